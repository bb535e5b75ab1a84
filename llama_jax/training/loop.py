"""A run from its first step to its last: text to batches, batches to updates, updates to
checkpoints.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax.accounting import parameter_count
from llama_jax.axes import Parameters
from llama_jax.data.prepare import copy_tokenizer
from llama_jax.data.tokens import unigram_cross_entropy
from llama_jax.parallel.hosts import Hosts
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.checkpointing import (
    Saver,
    Summary,
    changed_settings,
    clear_run,
    keep_config,
    learning_rate_jump,
    only_run,
)
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import micro_batch_size
from llama_jax.training.consistency import require_equal_replicas, require_same, require_same_data
from llama_jax.training.data import (
    make_batches,
    open_data,
    packing_figures,
    packing_lines,
    split_corpus,
)
from llama_jax.training.display import Display, si
from llama_jax.training.evaluate import (
    Evaluation,
    Evaluator,
    PairEvaluation,
    Samples,
    batch_evaluator,
    byte_counts,
    choose_held_out,
    evaluate,
    pair_evaluation,
    pair_evaluator,
    text_evaluation,
    together,
)
from llama_jax.training.metrics import StepRecord, require_trackers
from llama_jax.training.recovery import Recovery, Trouble, array_figures, let_go
from llama_jax.training.run_log import RunLog, mfu_line
from llama_jax.training.setup import (
    MADE_FROM,
    TOKENIZER,
    adopt,
    describe_run,
    frozen_base,
    make_directory,
    make_recipe,
    require_fitting_objective,
    require_same_base,
    require_same_run,
    require_vocabulary,
    run_mesh,
)
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    batch_sharding,
    global_batch,
    sharded_init,
    sharded_step,
    state_shapes,
)
from llama_jax.weights.checkpoint import Checkpoints, read_metadata
from llama_jax.weights.load import RUN_CHECKPOINTS, RUN_TOKENIZER, Form, load

Held = Evaluation | PairEvaluation
Stop = Callable[[int], bool]  # asked after every step whether to save and end there


class Run:
    """The parts of one run, built once: data, mesh, programs, checkpoints. Use as `Run(config,
    display).train()`.
    """

    def __init__(
        self,
        config: TrainConfig,
        display: Display,
        hosts: Hosts | None = None,
        before: TrainConfig | None = None,
    ) -> None:
        """Checks the config, the cheapest checks first, and prepares the data; compiles nothing
        yet.

        Until `train` is called, a run that the directory holds is not touched.

        Args:
          config: of the run.
          display: where it is shown.
          hosts: the processes that train together; this one alone by default. What is to be
            prepared is prepared by the first of them.
          before: the config with which the directory was trained so far, where it is known; what
            has changed is told.

        Raises:
          InputError: naming what in the config does not fit the devices, the tokenizer, the text,
            or the run to go on with; or the process that differs from the others.
        """
        self.display = display
        self.hosts = hosts = hosts or Hosts()
        self.directory, self._before = Path(config.run.dir), before
        self.mesh = run_mesh(config)
        make_recipe(config)  # refuses what cannot be run here, before anything is read
        require_vocabulary(config)
        require_trackers(config.run.trackers)
        hosts.first_does("directory", lambda: make_directory(self.directory))
        self.config, made_from = hosts.in_turn("adopt", lambda: adopt(config, hosts.first))
        config = self.config
        saved = None if config.run.overwrite else read_metadata(self.directory / RUN_CHECKPOINTS)
        split = split_corpus(config)
        self.metadata = describe_run(config, split)
        require_same_base(saved, made_from, self.directory)
        require_same_run(
            saved, self.metadata, self.directory
        )  # before the text is encoded, which may take long
        held_out = {} if split is None else {"held-out text (hash)": split.held_out.sha256[:16]}
        require_same_data(hosts, self.metadata | held_out, self.directory)
        self.data = hosts.in_turn("data", lambda: open_data(config, split, display.event))
        self.metadata[TOKENIZER] = self.data.tokenizer_sha256[:16]
        require_same(hosts, "tokenizer", {TOKENIZER: self.metadata[TOKENIZER]})
        require_same_run(saved, self.metadata, self.directory)
        self.metadata |= {} if made_from is None else {MADE_FROM: made_from}
        self.batches = make_batches(self.data, config.data)
        require_fitting_objective(config, self.batches.unit)
        data = config.data
        self._held_out = choose_held_out(
            self.data.held_out,
            data.length,
            data.packing,
            config.run.eval_tokens,
            data.seed,
            data.too_long,
        )
        self._take(config)

    def _take(self, config: TrainConfig) -> None:
        """Builds what depends on how the model is run."""
        self.config, self.recipe = config, make_recipe(config)
        model, mesh = self.recipe.model, self.mesh
        self._samples = Samples(
            config.run, model, mesh, self.data.tokenizer_path, self.display.event
        )
        self._evaluator = self._make_evaluator()

    def _make_evaluator(self) -> Evaluator:
        model, chunk = self.recipe.model, self.recipe.loss_chunk
        if self.batches.unit == 2:
            return pair_evaluator(model, chunk, self.recipe.objective)
        return batch_evaluator(
            model, chunk, byte_counts(load_tokenizer(self.data.tokenizer_path).token_bytes)
        )

    def train(
        self,
        should_stop: Stop = lambda step: False,
        settle: Callable[[TrainConfig], TrainConfig] = lambda config: config,
        write: Callable[[TrainConfig], None] = lambda config: None,
    ) -> Summary:
        """Trains until `run.steps` updates are done in all, from the newest checkpoint of the
        directory if there is one.

        Args:
          should_stop: asked after every update; when it says so, the state is saved and the run
            ends early.
          settle: asked once, with the state in its place and nobody else in the directory, for the
            config with which to go on; what differs may be how the model is run, such as
            `compute.remat`.
          write: puts that config into the directory; called by one process.

        Raises:
          InputError: if another process trains in the directory.
        """
        with contextlib.ExitStack() as held:
            self.hosts.first_does("lock", lambda: held.enter_context(only_run(self.directory)))
            return self._train(should_stop, settle, write)

    def _train(
        self,
        should_stop: Stop,
        settle: Callable[[TrainConfig], TrainConfig],
        write: Callable[[TrainConfig], None],
    ) -> Summary:
        config, mesh = self.config, self.mesh
        self.hosts.first_does("files", self._write_files)
        text = self.data.held_out if self.batches.unit == 1 else {}  # the loss of pairs is another
        unigram = unigram_cross_entropy(self.data.train, list(text.values())) if text else None
        with jax.set_mesh(mesh), self._open_checkpoints() as checkpoints:
            skip, say = config.data.skip_steps, self.display.event
            self._recovery = Recovery(config.guard, skip, self.directory, checkpoints, say)
            self.batches = self._recovery.without_bad_data(self.batches)
            frozen = frozen_base(config, self.recipe, mesh)
            state = self._restore_or_init(checkpoints)
            first = int(state.step)
            kinds = [device.device_kind for device in mesh.devices.flat]
            books = RunLog(
                config,
                lambda step: self.batches.tokens_before(step),
                kinds,
                first,
                say,
                self.hosts.first,
            )
            with books.clock("compile"):
                self._take(settle(config))
            self.hosts.first_does("changes", lambda: self._tell_changes(first, books))
            self.hosts.first_does("config", lambda: write(self.config))
            if figures := packing_figures(self.batches):
                books.event(first, "packing", **figures)
            self.display.start(self._heading(first, unigram), config.run.steps)
            self._samples.begin(first)
            saver = Saver(
                checkpoints, self.directory, config.run.checkpoint_every, self._saved_metadata, say
            )
            with books.watchdog:
                state, evaluation = self._steps(
                    state, frozen, checkpoints, saver, books, should_stop
                )
                step = int(state.step)
                with books.clock("save"):
                    saver.finish(step, state)
            goodput = books.close(step)
            saved = self.hosts.agree("saved", "yes" if step in checkpoints.steps() else "") != ""
            skipped, rewinds = self._recovery.skipped, self._recovery.count
            return Summary(
                step,
                config.run.steps,
                evaluation,
                unigram,
                saved,
                goodput,
                skipped,
                rewinds,
                saver.failures,
            )

    def _tell_changes(self, step: int, books: RunLog) -> None:
        """Says which settings have changed since the run was trained last, keeps that among the
        metrics, and the old config.
        """
        changes = (
            changed_settings(self._before, self.config) if self._before is not None and step else {}
        )
        if self._before is None or not changes:
            return
        jump = learning_rate_jump(self._before, self.config, step)
        for line in [
            *(f"{key}: {change}" for key, change in changes.items()),
            *([jump] if jump else []),
        ]:
            self.display.event(f"changed   {line}")
        keep_config(self.directory, step)
        books.event(step, "changed", **changes, **({"learning_rate": jump} if jump else {}))

    def _saved_metadata(self) -> dict:
        """What a checkpoint says of the run now."""
        return self.metadata | self._recovery.metadata()

    def _open_checkpoints(self) -> Checkpoints:
        return Checkpoints.open(
            self.directory / RUN_CHECKPOINTS, self.config.run.keep_checkpoints, self.hosts
        )

    def _write_files(self) -> None:
        """Clears what is to be done anew; the tokenizer is part of the run."""
        if self.config.run.overwrite:
            clear_run(self.directory)
        copy_tokenizer(self.data.tokenizer_path, self.directory / RUN_TOKENIZER)

    def _restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        """The newest good state, or a fresh one, watched from there on."""
        restored = checkpoints.restore_newest(state_shapes(self.recipe, self.mesh))
        for warning in restored.warnings if restored else ():
            self.display.event(f"warning: {warning}")
        state = restored.state if restored else self._init()
        self._recovery.begin(state)
        return state

    def _init(self) -> TrainState:
        """A fresh state: random parameters, or those of the model that the run begins with."""
        state = sharded_init(self.recipe, self.mesh)(jax.random.key(self.config.run.seed))
        if self.config.run.init is None or self.config.adapter.rank:
            return state
        form: Form = "stacked" if self.recipe.model.options.scan else "unrolled"
        model = load(self.config.run.init, self.config.optimizer.param_dtype, form, self.mesh)
        for line in model.report.brief():
            self.display.event(line)
        return state._replace(params=model.params)

    def _heading(self, first: int, unigram: float | None) -> list[str]:
        config, devices = self.config, self.mesh.devices.size
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        tokens = config.data.batch_size * config.data.length
        training, held_out = (
            sum(part.size for part in parts)
            for parts in (self.data.train, self.data.held_out.values())
        )
        kinds = [device.device_kind for device in self.mesh.devices.flat]
        return [
            f"model     {si(parameter_count(config.model))} parameters, "
            f"{config.model.layers} layers, "
            f"{self.recipe.model.options.dtype} compute, remat {self.recipe.model.options.remat}",
            f"devices   {devices} x {self.mesh.devices.flat[0].device_kind} ({shape})",
            f"data      {si(training)} training tokens, {si(held_out)} held out; "
            f"{si(tokens)} tokens/step, "
            f"{self.batches.tokens_before(config.run.steps) / training:.2f} epochs in all",
            f"mfu       {mfu_line(config, kinds)}",
            *self._mixture_lines(),
            *[f"packing   {line}" for line in packing_lines(self.batches)],
            *self._evaluation_lines(),
            *(
                []
                if unigram is None
                else [f"baseline  unigram entropy of the held-out text {unigram:.3f} nats/token"]
            ),
            f"run       {self.directory}, "
            + (f"going on from step {first}" if first else "from the start"),
        ]

    def _mixture_lines(self) -> list[str]:
        """The share of the sequences that each data set has, where there are several."""
        if len(self.data.corpora) == 1:
            return []
        shares = (
            f"{corpus.name} {share:.4%}"
            for corpus, share in zip(self.data.corpora, self.batches.shares)
        )
        return [f"mixture   {', '.join(shares)} of the sequences"]

    def _evaluation_lines(self) -> list[str]:
        """What evaluations read, where that is not all held-out text."""
        if not self._held_out:
            return ["held-out  no text is held out: no evaluation"]
        sequences, whole = (
            sum(len(part.numbers) for part in self._held_out.values()),
            sum(p.end for p in self._held_out.values()),
        )
        if sequences == whole:
            return []
        tokens = sequences * self.config.data.length
        return [
            f"held-out  evaluations read {si(tokens)} tokens, the same ones each time "
            "(run.eval_tokens; 0 for all)"
        ]

    def _steps(
        self,
        state: TrainState,
        frozen: tuple[Parameters, ...],
        checkpoints: Checkpoints,
        saver: Saver,
        books: RunLog,
        should_stop: Stop,
    ) -> tuple[TrainState, Held | None]:
        """The loop itself; returns the last state and, at the end of the run, its evaluation."""
        run, sequences = self.config.run, micro_batch_size(self.config.data)
        step_program, sharding = (
            sharded_step(self.recipe, self.mesh, *frozen),
            batch_sharding(self.recipe, self.mesh),
        )
        step = int(state.step)
        before: StepMetrics | None = None
        while step < run.steps:
            with books.clock("data"):
                batch = global_batch(self.batches, step, sequences, sharding)
            state, figures = books.trace.run(step + 1, step_program, state, batch, *frozen)
            step += 1
            books.add(step, figures)
            jax.block_until_ready(
                before
            )  # the host is one step ahead, not ten: a wish to stop is heard within a step
            before = figures
            last = step == run.steps
            ending = last or should_stop(step)
            saving = saver.due(step) or ending
            evaluating = bool(self._held_out) and (
                last or (not ending and is_due(step, run.eval_every))
            )
            recording = ending or evaluating or is_due(step, run.log_every)
            trouble = self._recovery.look(step, books.log.fetch()) if recording or saving else None
            if trouble is not None:
                state = self._go_back(trouble, state, frozen, checkpoints, saver, books)
                step = int(state.step)
                continue
            if is_due(step, self.config.guard.check_replicas):
                require_equal_replicas(state.params, self.mesh, step)
            record = self._record(step, books) if recording else None
            if record is not None and not evaluating:
                self.display.step(record)
            # After the metrics of the update, so that what a checkpoint holds is never missing
            # there; before the evaluation, which may take long. Not after a skipped step: nothing
            # has changed, and a newer checkpoint may push out an older one that the run is to go
            # back to.
            if ending or (saving and not self._recovery.streak):
                with books.clock("save"):
                    saver.save(step, state)
            evaluation = None
            if record is not None and evaluating:
                with books.log.pause(), books.clock("eval"):
                    evaluation, more = self._evaluate(state, frozen, books.clock.alive)
                books.write(step, evaluation.metrics() | more)
                self.display.step(record._replace(held_out_loss=evaluation.loss))
            if ending:
                return state, evaluation
        return state, None

    def _go_back(
        self,
        trouble: Trouble,
        state: TrainState,
        frozen: tuple[Parameters, ...],
        checkpoints: Checkpoints,
        saver: Saver,
        books: RunLog,
    ) -> TrainState:
        """The state to go on with after a trouble.

        Raises:
          DivergedError: if the run has gone back there often enough.
        """
        with books.clock("save"):
            saver.wait(int(state.step))
        rewind = self._recovery.plan(trouble, self.batches.steps)
        if rewind is None:
            sequences, sharding = (
                micro_batch_size(self.config.data),
                batch_sharding(self.recipe, self.mesh),
            )
            batch = global_batch(self.batches, trouble.steps[-1].step, sequences, sharding)
            arrays = array_figures(self.recipe, state, batch, frozen)
            raise self._recovery.give_up(trouble, self.batches.steps, state, arrays)
        step = int(state.step)
        with books.clock("save"):  # it reads a checkpoint, which may take as long as to write one
            self._recovery.go_back(rewind)
            let_go(state)
            state = self._restore_or_init(checkpoints)
        saver.go_back()
        books.go_back(
            step, int(state.step), rewind
        )  # perhaps further than was planned: past a checkpoint that is damaged
        self._samples.begin(int(state.step))
        self.batches = self._recovery.without_bad_data(self.batches)
        return state

    def _record(self, step: int, books: RunLog) -> StepRecord:
        """The figures of the updates since the last record, written down."""
        record = books.log.record(step)._replace(
            skipped=self._recovery.skipped, rewinds=self._recovery.count
        )
        books.write(step, record.flat())
        books.log.start_clock()
        return record

    def _evaluate(
        self, state: TrainState, frozen: tuple[Parameters, ...], alive: Callable[[], None]
    ) -> tuple[Held, dict[str, float | int]]:
        """The evaluation of a state, and the loss of each data set where there are several, by
        their names in the metrics.
        """
        sequences, rules = micro_batch_size(self.config.data), self.recipe.model.options.rules
        params = self.recipe.parameters(state.params, frozen[0] if frozen else None, None)
        self._samples.take(int(state.step), params)
        alive()
        sums = {
            name: evaluate(self._evaluator, params, part, sequences, self.mesh, rules, alive)
            for name, part in self._held_out.items()
        }
        if self.batches.unit == 2:
            each: dict[str, Held] = {name: pair_evaluation([part]) for name, part in sums.items()}
            whole: Held = pair_evaluation(list(sums.values()))
        else:
            texts = {name: text_evaluation(part) for name, part in sums.items()}
            each, whole = dict(texts), together(list(texts.values()))
        return whole, {f"held_out/{name}/loss": part.loss for name, part in each.items()} if len(
            each
        ) > 1 else {}


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 is never."""
    return every > 0 and step % every == 0
