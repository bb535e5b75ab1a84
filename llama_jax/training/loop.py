"""A run from its first step to its last: text to batches, batches to updates, updates to checkpoints."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.accounting import parameter_count
from llama_jax.data.batches import PackedBatches
from llama_jax.data.corpus import read_corpus, standard_library
from llama_jax.data.prepare import PreparedData, copy_tokenizer, hash_tokenizer, prepare
from llama_jax.data.split import Split, split_documents
from llama_jax.data.unigram import unigram_cross_entropy
from llama_jax.errors import InputError
from llama_jax.model.attention import choose_backend
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
    TrainState,
    batch_sharding,
    micro_batches,
    sharded_init,
    sharded_step,
    state_shapes,
)
from llama_jax.training.step_log import StepLog
from llama_jax.weights.checkpoint import Checkpoints, SaveError, list_steps, read_metadata
from llama_jax.weights.load import RUN_CHECKPOINTS, RUN_TOKENIZER

RUN_METRICS = "metrics.jsonl"
RUN_CONFIG = "config.yaml"

# Keys in the metadata of checkpoints that stand for what a config only names the place of.
_TEXT = "paths (hash of the text)"
_TOKENIZER = "data.tokenizer (hash)"

Stop = Callable[[int], bool]  # asked after every step whether to save and end there


class Summary(NamedTuple):
    """How a run stands when the program ends.

    Attributes:
      step: updates done.
      steps: updates wanted.
      evaluation: on the held-out text with the final parameters; `None` where this call did not come to the end.
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
        """Checks the config, the cheapest checks first, and prepares the data; compiles nothing yet.

        Until `train` is called, a run that the directory holds is not touched.

        Raises:
          InputError: naming what in the config does not fit the devices, the tokenizer, the text, or the run to go on with.
        """
        self.config = config
        self.display = display
        self.directory = Path(config.run.dir)
        self.mesh = run_mesh(config)
        self.recipe = make_recipe(config)
        require_vocabulary(config)
        make_directory(self.directory)
        saved = None if config.run.overwrite else read_metadata(self.directory / RUN_CHECKPOINTS)
        split = split_corpus(config)
        self.metadata = describe_run(config, split)
        require_same_run(saved, self.metadata, self.directory)  # before the text is encoded, which may take long
        self.data = prepare_data(config, split, display)
        self.metadata[_TOKENIZER] = self.data.train.header.tokenizer_sha256[:16]
        require_same_run(saved, self.metadata, self.directory)
        self.batches = PackedBatches(self.data.train, config.data.batch_rows, config.data.length, config.data.seed)
        self._evaluator = batch_evaluator(self.recipe.model, self.recipe.loss_chunk)

    def train(self, should_stop: Stop = lambda step: False) -> Summary:
        """Trains until `run.steps` updates are done in all, from the newest checkpoint of the directory if there is one.

        Args:
          should_stop: asked after every update; when it says so, the state is saved and the run ends early.

        Raises:
          InputError: if another process trains in the directory.
        """
        with only_run(self.directory):
            return self._train(should_stop)

    def _train(self, should_stop: Stop) -> Summary:
        config, mesh = self.config, self.mesh
        if config.run.overwrite:
            clear_run(self.directory)
        copy_tokenizer(self.data.tokenizer_path, self.directory / RUN_TOKENIZER)
        unigram = unigram_cross_entropy(self.data.train, self.data.held_out)
        with jax.set_mesh(mesh), Checkpoints.open(self.directory / RUN_CHECKPOINTS, config.run.keep_checkpoints) as checkpoints:
            state = self._restore_or_init(checkpoints)
            first = int(state.step)
            self.display.start(self._heading(first, unigram), config.run.steps)
            metrics = MetricsFile(self.directory / RUN_METRICS, first, self.display.event)
            state, evaluation = self._steps(state, first, checkpoints, metrics, should_stop)
            metrics.close()
            self._attempt(checkpoints.wait)
            step = int(state.step)
            return Summary(step, config.run.steps, evaluation, unigram, saved=step in checkpoints.steps())

    def _restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        """The newest good state, or a fresh one."""
        restored = checkpoints.restore_newest(state_shapes(self.recipe, self.mesh))
        if restored is None:
            return sharded_init(self.recipe, self.mesh)(jax.random.key(self.config.run.seed))
        for warning in restored.warnings:
            self.display.event(f"warning: {warning}")
        return restored.state

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
    ) -> tuple[TrainState, Evaluation | None]:
        """The loop itself; returns the last state and, at the end of the run, its evaluation."""
        run, accumulation = self.config.run, self.config.data.accumulation
        step_program, sharding = sharded_step(self.recipe, self.mesh), batch_sharding(self.recipe, self.mesh)
        log = StepLog(self.config)
        for step in range(first, run.steps):
            batch = jax.device_put(micro_batches(self.batches.batch(step), accumulation), sharding)
            state, figures = step_program(state, batch)
            log.add(figures)
            done = step + 1
            last = done == run.steps
            ending = last or should_stop(done)
            evaluating = last or (not ending and is_due(done, run.eval_every))
            evaluation = None
            if ending or evaluating or is_due(done, run.log_every):
                record = log.record(done)
                evaluation = self._evaluate(state) if evaluating else None
                self._report(record, evaluation, metrics)
                self._attempt(checkpoints.poll)
                log.start_clock()
            # After the metrics, so that what a checkpoint holds is never missing there.
            if ending or is_due(done, run.checkpoint_every):
                self._attempt(functools.partial(checkpoints.save, done, state, self.metadata))
            if ending:
                return state, evaluation
        return state, None

    def _report(self, record: StepRecord, evaluation: Evaluation | None, metrics: MetricsFile) -> None:
        """Shows and keeps the figures of a step."""
        more = _flat(evaluation) if evaluation else {}
        metrics.write(record.step, record.flat() | more)
        self.display.step(record._replace(held_out_loss=evaluation.nats_per_token if evaluation else None))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Does something with checkpoints; a failing disk is reported and training goes on."""
        try:
            action()
        except SaveError as error:
            self.display.event(f"warning: {error}")

    def _evaluate(self, state: TrainState) -> Evaluation:
        data, model = self.config.data, self.recipe.model
        rows = data.batch_rows // data.accumulation
        return evaluate(self._evaluator, state.params, self.data.held_out, data.length, rows, self.mesh, model)


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds a run's directory against a second run; the hold ends with the process, however that ends.

    Raises:
      InputError: if another process trains there.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run.dir: another process trains in {directory}; wait for it, or name another") from None
        yield
    finally:
        os.close(handle)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 is never."""
    return every > 0 and step % every == 0


def make_directory(directory: Path) -> None:
    """Makes the directory of a run.

    Raises:
      InputError: if it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir: {directory} cannot be made ({error.strerror}); name a writable directory") from None
    if not os.access(directory, os.W_OK):
        raise InputError(f"run.dir: {directory} cannot be written; name a writable directory")


def split_corpus(config: TrainConfig) -> Split:
    """The text of a run, its two sides."""
    paths = config.data.paths
    return split_documents(lambda: read_corpus(paths) if paths else standard_library(), config.data.held_out_fraction)


def prepare_data(config: TrainConfig, split: Split, display: Display) -> PreparedData:
    """Token files and tokenizer of a run, below its directory; made once, then opened."""
    reported: list[str] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        """Says once that a stage has begun."""
        if stage not in reported:
            reported.append(stage)
            display.event({"vocabulary": "training the tokenizer ...", "encode": "encoding the text ..."}[stage])

    return prepare(
        Path(config.run.dir) / "data",
        split,
        vocab_size=config.data.vocab_size,
        seed=config.data.seed,
        tokenizer_path=Path(config.data.tokenizer) if config.data.tokenizer else None,
        on_progress=on_progress,
    )


def require_vocabulary(config: TrainConfig) -> None:
    """Refuses a given tokenizer with tokens that the model does not have.

    Raises:
      InputError: with both sizes; or if there is no such tokenizer.
    """
    if config.data.tokenizer is None:
        return
    vocabulary = load_tokenizer(Path(config.data.tokenizer)).vocab_size
    if vocabulary > config.model.vocab_size:
        raise InputError(f"model.vocab_size: {config.model.vocab_size} given, at least {vocabulary} (the tokenizer's) expected")


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
    attention = choose_backend(compute.attention, config.data.length, config.data.length)
    options = ModelOptions(dtype=dtype, scan=compute.scan_layers, remat=compute.remat, attention=attention)
    schedule = learning_rate_schedule(config.optimizer, config.run.steps)
    return Recipe(
        Llama(config.model, options), make_optimizer(config.optimizer, config.run.steps), schedule, compute.loss_chunk
    )


def describe_run(config: TrainConfig, split: Split) -> dict:
    """What a checkpoint says of its run, but for a tokenizer yet to be trained: resuming with another of these is refused."""
    data = config.data
    values: dict[str, object] = {
        "held_out_fraction": data.held_out_fraction,  # before the text, whose hash follows it: the first difference is told
        _TEXT: split.train.sha256[:16],
        "length": data.length,
        "batch_rows": data.batch_rows,
        "seed": data.seed,
    }
    if data.tokenizer is None:
        return {"model": dataclasses.asdict(config.model), "data": values | {"vocab_size": data.vocab_size}}
    given = hash_tokenizer(Path(data.tokenizer))[:16]
    return {"model": dataclasses.asdict(config.model), _TOKENIZER: given, "data": values}


def require_same_run(saved: dict | None, wanted: dict, directory: Path) -> None:
    """Refuses to go on with another model, tokenizer or data order than the checkpoint's.

    Args:
      saved: metadata of the checkpoint, if there is one.
      wanted: the same of this run; a section that it does not have yet is not looked at.
      directory: of the run.

    Raises:
      InputError: naming the first difference.
    """
    if saved is None:
        return
    before, now = _leaves({section: saved.get(section) for section in wanted}), _leaves(wanted)
    for key in [*now, *before]:
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


def require_same_model(config: TrainConfig) -> None:
    """Refuses a config with another model than the checkpoints of its directory, without looking at the text.

    Raises:
      InputError: naming the first difference.
    """
    directory = Path(config.run.dir)
    require_same_run(read_metadata(directory / RUN_CHECKPOINTS), {"model": dataclasses.asdict(config.model)}, directory)


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a run's directory, 0 if there is none."""
    checkpoints = directory / RUN_CHECKPOINTS
    return max(list_steps(checkpoints), default=0)


def clear_run(directory: Path) -> None:
    """Removes what a run wrote while it trained, so that the next one starts anew; prepared data stays."""
    if (directory / RUN_CHECKPOINTS).exists():
        shutil.rmtree(directory / RUN_CHECKPOINTS)
    (directory / RUN_METRICS).unlink(missing_ok=True)
