"""A run from its first step to its last: text to batches, batches to updates, updates to checkpoints."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.accounting import parameter_count
from llama_jax.data.batches import PackedBatches
from llama_jax.data.corpus import read_corpus, standard_library
from llama_jax.data.prepare import PreparedData, prepare
from llama_jax.data.unigram import unigram_cross_entropy
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, check_divisible
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.config import TrainConfig
from llama_jax.training.display import Display, duration, si
from llama_jax.training.evaluate import Evaluation, batch_evaluator, evaluate
from llama_jax.training.metrics import MetricsFile, StepRecord
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.step import (
    Recipe,
    StepMetrics,
    TrainState,
    batch_sharding,
    micro_batches,
    sharded_init,
    sharded_step,
    state_shapes,
)
from llama_jax.weights.checkpoint import Checkpoints, SaveError, list_steps
from llama_jax.weights.load import RUN_CHECKPOINTS, RUN_TOKENIZER

RUN_METRICS = "metrics.jsonl"
RUN_CONFIG = "config.yaml"

Stop = Callable[[int], bool]  # asked after every step whether to save and end there


class Summary(NamedTuple):
    """How a run stands when the program ends.

    Attributes:
      step: updates done.
      steps: updates wanted.
      evaluation: on the held-out text with the final parameters; `None` where the run was stopped before its end.
      unigram: nats a token of guessing held-out tokens by their frequency in the training text, as a baseline.
      saved: whether the last state is on disk.
    """

    step: int
    steps: int
    evaluation: Evaluation | None
    unigram: float
    saved: bool


class Run:
    """The parts of one run, built once: data, mesh, programs, checkpoints. Use as `Run(config, display).train()`."""

    def __init__(self, config: TrainConfig, display: Display) -> None:
        """Prepares data and mesh; compiles nothing yet.

        Raises:
          InputError: naming what in the config does not fit the text, the tokenizer or the devices.
        """
        self.config = config
        self.display = display
        self.directory = Path(config.run.dir)
        self.data = prepare_data(config, display)
        self.batches = PackedBatches(self.data.train, config.data.batch_rows, config.data.length, config.data.seed)
        self.mesh = run_mesh(config)
        self.recipe = make_recipe(config)
        self.metadata = describe_run(config, self.data)

    def train(self, should_stop: Stop = lambda step: False) -> Summary:
        """Trains until `run.steps` updates are done in all, from the newest checkpoint of the directory if there is one.

        Args:
          should_stop: asked after every update; when it says so, the state is saved and the run ends early.
        """
        config, mesh = self.config, self.mesh
        unigram = unigram_cross_entropy(self.data.train, self.data.held_out)
        with jax.set_mesh(mesh), Checkpoints.open(self.directory / RUN_CHECKPOINTS, config.run.keep_checkpoints) as checkpoints:
            state = self._restore_or_init(checkpoints)
            first = int(state.step)
            self.display.start(self._heading(first, unigram), config.run.steps)
            metrics = MetricsFile(self.directory / RUN_METRICS, first, self.display.event)
            state, saved = self._steps(state, first, checkpoints, metrics, should_stop)
            done = int(state.step) == config.run.steps
            evaluation = self._evaluate(state) if done else None
            if evaluation:
                metrics.write(config.run.steps, _flat(evaluation))
            metrics.close()
        return Summary(int(state.step), config.run.steps, evaluation, unigram, saved)

    def _restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        """The newest good state, checked to be of this run, or a fresh one."""
        restored = checkpoints.restore_newest(state_shapes(self.recipe, self.mesh))
        if restored is None:
            return sharded_init(self.recipe, self.mesh)(jax.random.key(self.config.run.seed))
        for warning in restored.warnings:
            self.display.event(f"warning: {warning}")
        require_same_run(restored.metadata, self.metadata, self.directory)
        return TrainState(*restored.state) if not isinstance(restored.state, TrainState) else restored.state

    def _heading(self, first: int, unigram: float) -> list[str]:
        config, devices = self.config, self.mesh.devices.size
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        tokens = config.data.batch_rows * config.data.length
        return [
            f"model     {si(parameter_count(config.model))} parameters, {config.model.layers} layers, "
            f"{self.recipe.model.options.dtype} compute",
            f"devices   {devices} x {self.mesh.devices.flat[0].device_kind} ({shape})",
            f"data      {si(self.data.train.header.tokens)} training tokens, {si(self.data.held_out.header.tokens)} held out; "
            f"{si(tokens)} tokens a step, {config.run.steps * tokens / self.data.train.header.tokens:.2f} epochs in all",
            f"baseline  unigram entropy of the held-out text {unigram:.3f} nats a token",
            f"run       {self.directory}, " + (f"going on from step {first}" if first else "from the start"),
        ]

    def _steps(
        self, state: TrainState, first: int, checkpoints: Checkpoints, metrics: MetricsFile, should_stop: Stop
    ) -> tuple[TrainState, bool]:
        """The loop itself; returns the last state and whether it is on disk."""
        run, data = self.config.run, self.config.data
        step_program, sharding = sharded_step(self.recipe, self.mesh), batch_sharding(self.recipe, self.mesh)
        log = StepLog(self.config)
        for step in range(first, run.steps):
            batch = jax.device_put(micro_batches(self.batches.batch(step), data.accumulation), sharding)
            state, figures = step_program(state, batch)
            log.add(figures)
            done = step + 1
            ending = done == run.steps or should_stop(done)
            if done % run.log_every == 0 or ending:
                evaluated = run.eval_every and done % run.eval_every == 0 and not ending
                record = log.record(done, self._evaluate(state) if evaluated else None)
                metrics.write(done, record.flat())
                self.display.step(record)
            if done % run.checkpoint_every == 0 or ending:
                self._save(checkpoints, state, done)
            if ending:
                break
        return state, self._settle(checkpoints)

    def _save(self, checkpoints: Checkpoints, state: TrainState, step: int) -> None:
        """Starts a checkpoint; a failing disk is reported and training goes on."""
        if step in checkpoints.steps():
            return
        try:
            checkpoints.save(step, state, self.metadata)
        except SaveError as error:
            self.display.event(f"warning: {error}")

    def _settle(self, checkpoints: Checkpoints) -> bool:
        """Waits for the last checkpoint."""
        try:
            checkpoints.wait()
        except SaveError as error:
            self.display.event(f"warning: {error}")
            return False
        return True

    def _evaluate(self, state: TrainState) -> Evaluation:
        data, model = self.config.data, self.recipe.model
        if not hasattr(self, "_evaluator"):
            self._evaluator = batch_evaluator(model, self.recipe.loss_chunk)
        rows = data.batch_rows // data.accumulation
        return evaluate(self._evaluator, state.params, self.data.held_out, data.length, rows, self.mesh, model)


class StepLog:
    """Figures of the updates since the last record, left on the device until a record is made."""

    def __init__(self, config: TrainConfig) -> None:
        self._tokens_per_step = config.data.batch_rows * config.data.length
        self._pending: list[StepMetrics] = []
        self._since = 0.0
        self._timed = 0  # updates since `_since`
        self._warm = False

    def add(self, figures: StepMetrics) -> None:
        """Takes the figures of one update; the first is waited for and not timed, since it holds the compilation."""
        self._pending.append(figures)
        if self._warm:
            self._timed += 1
            return
        jax.block_until_ready(figures)
        self._since, self._warm = time.perf_counter(), True

    def record(self, step: int, evaluation: Evaluation | None) -> StepRecord:
        """The mean loss since the last record, the latest of everything else, and the speed."""
        figures = jax.device_get(self._pending)
        seconds = (time.perf_counter() - self._since) / max(1, self._timed)
        self._pending, self._since, self._timed = [], time.perf_counter(), 0
        last = figures[-1]
        return StepRecord(
            step=step,
            loss=float(np.mean([f.loss for f in figures])),
            learning_rate=float(last.learning_rate),
            gradient_norm=float(last.grad_norm),
            tokens=step * self._tokens_per_step,
            tokens_per_second=self._tokens_per_step / seconds,
            step_seconds=seconds,
            held_out_loss=evaluation.nats_per_token if evaluation else None,
        )


def prepare_data(config: TrainConfig, display: Display) -> PreparedData:
    """Token files and tokenizer of a run, below its directory; made once, then opened."""
    directory, data = Path(config.run.dir), config.data
    documents = standard_library if not data.paths else lambda: read_corpus(data.paths)
    reported: list[str] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage not in reported and stage != "read":
            reported.append(stage)
            display.event({"vocabulary": "training the tokenizer ...", "encode": "encoding the text ..."}[stage])

    prepared = prepare(
        directory / "data",
        documents,
        vocab_size=data.vocab_size,
        held_out_fraction=data.held_out_fraction,
        seed=data.seed,
        tokenizer_path=Path(data.tokenizer) if data.tokenizer else None,
        on_progress=on_progress,
    )
    vocabulary = load_tokenizer(prepared.tokenizer_path).vocab_size
    if vocabulary > config.model.vocab_size:
        raise InputError(f"model.vocab_size: {config.model.vocab_size} given, at least {vocabulary} (the tokenizer's) expected")
    shutil.copyfile(prepared.tokenizer_path, directory / RUN_TOKENIZER)
    return prepared


def run_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a run, checked against its model and its batch."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_divisible(config.model, mesh, TRAINING)
    rows, ways = config.data.batch_rows // config.data.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise InputError(
            f"data.batch_rows: micro-batches of {rows} rows given; a multiple of mesh.data * mesh.fsdp ({ways}) expected"
        )
    return mesh


def make_recipe(config: TrainConfig) -> Recipe:
    """Model, optimizer and schedule of a run."""
    compute = config.compute
    platform = jax.devices()[0].platform
    dtype = compute.dtype if compute.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    options = ModelOptions(dtype=dtype, scan=compute.scan_layers, remat=compute.remat, attention=compute.attention)
    schedule = learning_rate_schedule(config.optimizer, config.run.steps)
    return Recipe(
        Llama(config.model, options), make_optimizer(config.optimizer, config.run.steps), schedule, compute.loss_chunk
    )


def describe_run(config: TrainConfig, data: PreparedData) -> dict:
    """What a checkpoint says of its run: a resume with another of these is refused."""
    return {
        "model": dataclasses.asdict(config.model),
        "tokenizer": data.train.header.tokenizer_sha256,
        "data": {
            "sources": data.train.header.sources_sha256,
            "length": config.data.length,
            "batch_rows": config.data.batch_rows,
            "seed": config.data.seed,
        },
    }


def require_same_run(saved: dict, wanted: dict, directory: Path) -> None:
    """Refuses to go on with another model, tokenizer or data order than the checkpoint's.

    Raises:
      InputError: naming the first difference.
    """
    before, now = _leaves(saved), _leaves(wanted)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{directory} holds a run with {key} {before.get(key)!r}, {now.get(key)!r} was asked for; "
                "take another --run.dir, or --run.overwrite true to start anew"
            )


def _leaves(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _flat(evaluation: Evaluation) -> dict[str, float | int | None]:
    return {
        "held_out/loss": evaluation.nats_per_token,
        "held_out/bits_per_byte": evaluation.bits_per_byte,
        "held_out/tokens": evaluation.tokens,
    }


def summary_lines(summary: Summary, seconds: float) -> dict[str, str]:
    """A summary as the rows of the display's last table."""
    rows = {"steps": f"{summary.step} of {summary.steps}", "time": duration(seconds)}
    if summary.evaluation:
        loss, bits = summary.evaluation.nats_per_token, summary.evaluation.bits_per_byte
        rows["held-out"] = f"{loss:.4f} nats a token, {bits:.4f} bits a byte ({summary.evaluation.tokens} tokens)"
        rows["unigram"] = f"{summary.unigram:.4f} nats a token (the entropy to beat)"
    return rows


def fingerprint(state: TrainState) -> str:
    """SHA-256 of every bit of a state, for telling whether two runs are the same."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a run's directory, 0 if there is none."""
    checkpoints = directory / RUN_CHECKPOINTS
    return max(list_steps(checkpoints), default=0)


def clear_run(directory: Path) -> None:
    """Removes what a run wrote into its directory, so that the next one starts anew; prepared data stays."""
    shutil.rmtree(directory / RUN_CHECKPOINTS, ignore_errors=True)
    for name in (RUN_METRICS, RUN_TOKENIZER, RUN_CONFIG):
        (directory / name).unlink(missing_ok=True)
