"""Hosts: what the devices of each one read is together the batch of the step, whatever their
number; after a resume too.
"""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_runs import tiny_config, write_corpus, write_yaml

from llama_jax.cli.data import main as data_command
from llama_jax.data.batches import Batches
from llama_jax.data.packing import Batch, fingerprint
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, batch_spec
from llama_jax.training import step as hosts
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import micro_batch_size
from llama_jax.training.data import make_batches, open_data

DEVICES, STEPS, STOPPED = 8, 7, 3
MESHES = [(8, 1, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """A run with all that moves sequences about: accumulation, a growing batch, skipped steps,
    epochs that end inside a batch.
    """
    root = tmp_path_factory.mktemp("hosts")
    data = {"batch_size": 16, "accumulation": 2, "batch_ramp": ((5, 32),), "skip_steps": ((1, 2),)}
    return tiny_config(root / "run", write_corpus(root / "text", 12), data=data)


def made(config: TrainConfig) -> Batches:
    """The batches of a run that has just been started."""
    return make_batches(open_data(config), config.data)


def read_by_hosts(
    monkeypatch, batches: Batches, step: int, micro: int, sizes: tuple[int, int, int], count: int
) -> tuple[Batch, list[int]]:
    """What so many hosts put on their devices, laid together by places; and the sequences that each
    has read.

    Every host runs the product's own function. That JAX asks a process for the parts of its own
    devices only is imitated: a host has the devices of its number, one after another.
    """
    mesh = make_mesh(*sizes)
    whole, have, asked = {}, {}, collections.Counter()

    def of_host(host, shape, sharding, callback):
        field = asked[host]
        asked[host] += 1
        values = whole.setdefault(field, np.full(shape, -7, np.float64))
        mine = mesh.devices.flat[host * DEVICES // count : (host + 1) * DEVICES // count]
        for device, index in sharding.devices_indices_map(shape).items():
            if device in mine:
                values[index] = callback(index)
                have.setdefault(field, np.zeros(shape, bool))[index] = True

    read: list[set[int]] = []
    chosen = Batches.chosen_sequences

    def noted(self, step, numbers):
        read[-1].update(numbers.tolist())
        return chosen(self, step, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "chosen_sequences", noted)
        for host in range(count):
            read.append(set())
            patch.setattr(
                jax, "make_array_from_callback", lambda *given, host=host: of_host(host, *given)
            )
            hosts.global_batch(
                batches, step, micro, NamedSharding(mesh, batch_spec(TRAINING, leading=1))
            )
    assert all(places.all() for places in have.values())
    kinds = (np.int32, np.int32, np.float32, np.int32)
    # Micro-batch `a` holds every sequence `i` with `i % A == a`.
    fields = [
        whole[field].swapaxes(0, 1).reshape(-1, batches.length).astype(kind)
        for field, kind in enumerate(kinds)
    ]
    return Batch(*fields), [len(sequences) for sequences in read]


def verified(capsys, config_file, step: int) -> str:
    """The hash of a step's batch, as the command prints it."""
    assert data_command(["verify", "--config", str(config_file), "--step", str(step)]) == 0
    return re.search(r"sha256 ([0-9a-f]{64})", capsys.readouterr().out)[1]


@pytest.mark.parametrize("sizes", MESHES)
def test_hashes_of_1_2_4_and_8_hosts_are_equal(monkeypatch, config, sizes):
    batches, micro = made(config), micro_batch_size(config.data)
    for step in (0, 1, 3):
        wanted, sequences = fingerprint(batches.batch(step)), batches.sequences_at(step)
        ways = sizes[0] * sizes[1]
        for count in (1, 2, 4, 8):
            batch, read = read_by_hosts(monkeypatch, batches, step, micro, sizes, count)
            assert fingerprint(batch) == wanted
            assert (
                read == [max(sequences // count, sequences // ways)] * count
            )  # no host reads more than its devices hold


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 2), (2, 4)])
def test_another_number_of_hosts_goes_on_with_the_remaining_batches(
    monkeypatch, capsys, tmp_path, config, before, after
):
    file = write_yaml(tmp_path / "config.yaml", config)
    wanted = [verified(capsys, file, step) for step in range(STEPS)]
    found = []
    for count, steps in ((before, range(STOPPED)), (after, range(STOPPED, STEPS))):
        batches = made(config)  # nothing is known but the config and the step
        for step in steps:
            batch, _ = read_by_hosts(
                monkeypatch, batches, step, micro_batch_size(config.data), (8, 1, 1), count
            )
            found.append(fingerprint(batch))
    assert found == wanted
    assert len(set(wanted)) == STEPS


def test_accumulation_does_not_change_the_batch(capsys, tmp_path, config):
    more = dataclasses.replace(config, data=dataclasses.replace(config.data, accumulation=8))
    files = [write_yaml(tmp_path / f"{i}.yaml", one) for i, one in enumerate((config, more))]
    assert verified(capsys, files[0], 6) == verified(capsys, files[1], 6)
