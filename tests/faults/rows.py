"""The catalogue of faults: which test shows what becomes of each. All of these tests are marked
`faults`.

Tests in this folder have the number in their docstring as well; the others stand beside what they
are about, and run with `make test` too.
"""

CHECKPOINT = "tests/weights/test_checkpoint.py::"
LOOP = "tests/training/test_loop.py::"
TOKENS = "tests/data/test_token_file.py::"
TRAIN = "tests/cli/test_train.py::"
GUARD = "tests/faults/test_guard_faults.py::"
HOSTS = "tests/faults/test_hosts_faults.py::"

ROWS: dict[str, tuple[str, ...]] = {
    "1 stopped and gone on with": (
        "tests/faults/test_resume.py::test_sigterm_and_the_same_command_again",
    ),
    "2 the same with accumulation, dropout, bfloat16, skipped data": (
        "tests/faults/test_resume.py::test_with_everything_that_has_a_state",
    ),
    "3 kill -9 at random moments": ("tests/faults/test_resume.py::test_kill_9_at_random_moments",),
    "4 kill -9 in the middle of a save": (
        "tests/faults/test_disk.py::test_killed_in_the_middle_of_a_save",
    ),
    "5 SIGTERM": ("tests/faults/test_resume.py::test_sigterm_and_the_same_command_again",),
    "6 SIGTERM to one of two processes": (
        HOSTS + "test_a_signal_to_one_saves_one_step_of_both_and_one_process_goes_on",
    ),
    "7 Ctrl-C, once and twice; SIGUSR1": (
        "tests/faults/test_resume.py::test_ctrl_c_once_and_twice",
        HOSTS + "test_a_signal_to_a_single_process_saves_and_two_go_on",
        HOSTS + "test_a_second_ctrl_c_ends_at_once",
    ),
    "8 kill -9 of one of two processes": (
        HOSTS + "test_the_other_one_ends_when_one_is_killed_and_both_go_on",
    ),
    "9 a process that is frozen": (HOSTS + "test_the_other_one_ends_when_one_is_frozen",),
    "10 a hang": (
        "tests/faults/test_hang.py::test_data_that_never_comes",
        "tests/faults/test_hang.py::test_what_takes_long_is_no_hang",
    ),
    "11 a full disk": (
        "tests/faults/test_disk.py::test_a_disk_that_is_full_for_a_while",
        "tests/faults/test_disk.py::test_a_disk_that_stays_full",
        "tests/faults/test_disk.py::test_a_thread_that_waits_for_ever_does_not_keep_the_program",
        CHECKPOINT + "test_a_full_disk",
    ),
    "12 a directory that cannot be written": (
        TRAIN + "test_a_directory_that_cannot_be_written",
        CHECKPOINT + "test_a_directory_that_cannot_be_made",
    ),
    "13 a flipped bit": (
        CHECKPOINT + "test_a_flipped_bit_is_never_restored",
        LOOP + "test_a_damaged_checkpoint_costs_steps_but_no_bit",
        "tests/faults/test_disk.py::test_a_bit_flipped_while_nobody_looked",
    ),
    "14 a file cut, gone, or with a page of zeros": (CHECKPOINT + "test_a_file_cut_or_gone",),
    "15 left-overs, strange files": (
        CHECKPOINT + "test_left_overs_do_not_count",
        CHECKPOINT + "test_a_missing_manifest_is_damage",
        CHECKPOINT + "test_a_directory_of_another_step_is_damage",
    ),
    "16 all checkpoints damaged": (
        CHECKPOINT + "test_all_damaged_is_an_error_again_and_again",
        "tests/faults/test_disk.py::test_all_checkpoints_damaged",
    ),
    "17 another model, tokenizer, data or order": (
        TRAIN + "test_going_on_with_another_run_is_refused",
        TRAIN + "test_overwrite_starts_anew_on_the_prepared_data",
    ),
    "18 another shape or dtype, an array too many or too few": (
        CHECKPOINT + "test_a_state_that_does_not_fit_names_the_path",
    ),
    "19 another number of devices, another mesh, another number of processes": (
        "tests/faults/test_resume.py::test_going_on_with_another_mesh",
        HOSTS + "test_a_signal_to_one_saves_one_step_of_both_and_one_process_goes_on",
        CHECKPOINT + "test_restores_under_any_sharding_with_the_same_checksums",
    ),
    "20 two runs in a directory": (
        "tests/faults/test_resume.py::test_two_runs_in_a_directory",
        LOOP + "test_one_run_a_directory",
    ),
    "21 steps that are not finite": (
        GUARD + "test_a_step_that_is_not_finite_leaves_the_weights_as_they_are",
        GUARD + "test_bad_data_is_left_out_after_going_back",
        GUARD + "test_scattered_bad_data_is_left_out_too",
        GUARD + "test_what_does_not_end_ends_the_run_with_a_report",
        GUARD + "test_no_checkpoint_has_weights_that_are_not_finite",
    ),
    "22 a spike": (GUARD + "test_a_spike_is_skipped_once_and_what_is_usual_stays_so",),
    "23 killed while it goes back": (
        GUARD + "test_killed_while_it_goes_back_past_a_saved_bad_step",
    ),
    "24 devices that disagree": (
        GUARD + "test_a_copy_that_differs_in_one_bit_is_named_with_its_device",
    ),
    "25 damaged token files": (
        TOKENS + "test_id_outside_the_vocabulary_is_named_with_its_document",
        TOKENS + "test_no_documents_is_an_error",
        TOKENS + "test_truncated_file_is_noticed_at_once",
        TOKENS + "test_longer_file_is_noticed_at_once",
        TOKENS + "test_damaged_header_is_noticed_at_once",
        TOKENS + "test_every_flipped_byte_of_the_content_is_noticed",
        TOKENS + "test_senseless_header_is_refused",
        TOKENS + "test_verify_finds_ids_above_the_vocabulary",
        "tests/data/test_shards.py::test_damage_is_found_and_named",
    ),
    "26 the order of the data": (
        "tests/data/test_permutation.py::test_is_a_bijection",
        "tests/data/test_permutation.py::test_order_is_part_of_the_format",
        "tests/data/test_batches.py::test_epoch_of_training_is_all_full_windows_once",
        "tests/data/test_batches.py::test_hosts_together_read_the_global_batch",
        "tests/data/test_batches.py::test_batch_does_not_depend_on_history",
        "tests/data/test_batches.py::test_epochs_continue_seamlessly_and_differ",
    ),
    "27 ends that fall together": (
        "tests/faults/test_surroundings.py::test_ends_that_fall_together",
    ),
    "36 hostile and mistaken configs": (
        "tests/cli/test_arguments.py::test_a_refusal_is_one_line_that_names_the_key",
        "tests/cli/test_arguments.py::test_a_file_is_refused_in_one_line",
        "tests/cli/test_arguments.py::test_nested_aliases_are_refused_at_once",
        "tests/training/test_training_config.py::test_a_wrong_value_is_refused_by_name",
    ),
    "38 no network": ("tests/faults/test_surroundings.py::test_without_a_network",),
    "40 readers that go away, terminals of all kinds": (
        TRAIN + "test_a_reader_that_goes_away_ends_it_quietly",
        TRAIN + "test_output_into_a_file_has_no_control_codes",
        "tests/faults/test_surroundings.py::test_a_terminal_of_another_age",
        "tests/faults/test_surroundings.py::test_no_standard_output_at_all",
        "tests/training/test_display.py::test_live_fits_the_width",
        "tests/training/test_display.py::test_plain_without_unicode",
    ),
    "42 loggers that fail": (
        "tests/training/test_trackers.py::test_a_tracker_that_cannot_start_is_left_out",
        "tests/training/test_trackers.py::test_a_tracker_that_fails_is_warned_of_once_and_tried_again",
        "tests/training/test_trackers.py::test_an_unwritable_directory_for_tensorboard_is_a_warning",
        "tests/training/test_metrics.py::test_a_full_disk_is_one_warning",
    ),
    "43 parameters donated while they are saved": (
        CHECKPOINT + "test_the_state_may_be_donated_at_once",
    ),
    "45 one compilation, no array moved unasked": (
        LOOP + "test_the_step_is_traced_once_whatever_else_happens",
        "tests/faults/test_surroundings.py::test_no_array_moves_unasked",
    ),
}

if (
    __name__ == "__main__"
):  # the files, for `make test-faults`, which need not look through all others
    print(
        "tests/faults",
        *sorted(
            {
                test.split("::")[0]
                for tests in ROWS.values()
                for test in tests
                if "/faults/" not in test
            }
        ),
    )
