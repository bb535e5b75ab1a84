"""Chaos: one training under a seeded schedule of faults of all kinds, which ends in the bits of one
that was left alone.

`LLAMA_JAX_CHAOS=40` asks for so many faults in place of eight, `LLAMA_JAX_CHAOS_SEED=7` for that
schedule.
"""

import collections
import hashlib
import os
import pathlib
import random
import signal
import time

import pytest
from faults.child import flip_bit
from faults.harness import Spawner, assert_bitwise, checkpoint_steps, leaf_hashes, make_run

from llama_jax.training.config import TrainConfig
from llama_jax.weights.restore import verify_checkpoints
from llama_jax.weights.run import RUN_CHECKPOINTS

FAULTS = int(os.environ.get("LLAMA_JAX_CHAOS", "8"))
SEED = int(os.environ.get("LLAMA_JAX_CHAOS_SEED", "40"))
EVERY = 3  # steps between two checkpoints
STEPS = 6 * FAULTS
PACE = "before_update:*:slow=0.04"  # so that there is something to hit

# What happens to a program, and the exit status that it is to have then.
KINDS = {
    "kill -9": -9,
    "kill -9 in a save": -9,
    "kill -9 before clean-up": -9,
    "SIGTERM": 0,
    "full disk": 5,
    "bit flip": None,
}


def disturb(kind: str, source: random.Random, spawn: Spawner, run: TrainConfig) -> None:
    """Starts or goes on with the run, and hits it in the steps just before it."""
    directory = pathlib.Path(run.run.dir) / RUN_CHECKPOINTS
    steps = checkpoint_steps(run)
    first = max(steps, default=0)
    step = first + source.randint(1, EVERY)
    saved = first + EVERY - first % EVERY  # the next step that is saved
    if kind == "bit flip":
        if len(steps) > 1:  # with a single checkpoint there is nothing to go back to
            flip_bit(directory / str(first), source.random())
        return
    if kind == "kill -9":
        child = spawn.train(run, fault=PACE)
        child.wait_for(rf"^ *{step}/")
        time.sleep(source.random() * 0.1)
        child.send(signal.SIGKILL)
    else:
        fault = {
            "kill -9 in a save": f"in_async_commit:{saved}:kill9,in_data:{saved + 1}:slow=30",
            "kill -9 before clean-up": f"after_commit_before_gc:{saved}:kill9,in_data:{saved + 1}:slow=30",
            "SIGTERM": f"in_data:{step}:term",
            "full disk": f"in_data:{first + 1}:full=20000,in_data:{saved + 1}:term",
        }[kind]
        child = spawn.train(run, fault=f"{PACE},{fault}")
    assert child.end() == KINDS[kind], f"{kind}\n{child}"


@pytest.mark.timeout(600 + 60 * FAULTS)
def test_chaos(spawn, tmp_path, corpus, reference, capsys):
    """Killed, ended, short of disk, damaged, in any order: whatever is listed is whole, and the end
    is the same bit by bit.
    """
    changes = {"run": {"steps": STEPS, "checkpoint_every": EVERY}}
    straight, run = (
        make_run(tmp_path / name, corpus, reference, **changes) for name in ("straight", "run")
    )
    spawn.train(straight).expect(0)
    source = random.Random(SEED)
    kinds = [source.choice([*KINDS]) for _ in range(FAULTS)]
    for kind in kinds:
        disturb(kind, source, spawn, run)
        if checkpoint_steps(run):
            newest = checkpoint_steps(run)[-1]
            found = list(verify_checkpoints(pathlib.Path(run.run.dir) / RUN_CHECKPOINTS))
            assert all(
                state.condition == "ok" or (kind == "bit flip" and state.step == newest)
                for state in found
            ), found
    spawn.train(run).expect(0)
    assert_bitwise(run, straight)
    digest = hashlib.sha256("".join(leaf_hashes(run, STEPS).values()).encode()).hexdigest()[:16]
    counts = ", ".join(
        f"{count} {kind}" for kind, count in sorted(collections.Counter(kinds).items())
    )
    with capsys.disabled():
        print(
            f"\nchaos: seed {SEED}, {FAULTS} faults ({counts}) over {STEPS} steps: final "
            f"state {digest}, bit by bit that of "
            "the undisturbed run"
        )
