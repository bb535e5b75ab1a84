"""A run from its first step to its last: text to batches, batches to updates, updates to checkpoints."""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from llama_jax.accounting import parameter_count
from llama_jax.axes import Parameters
from llama_jax.data.prepare import copy_tokenizer
from llama_jax.data.unigram import unigram_cross_entropy
from llama_jax.errors import InputError
from llama_jax.training.books import Books
from llama_jax.training.config import TrainConfig, micro_rows
from llama_jax.training.corpora import make_batches, open_data, split_corpus
from llama_jax.training.display import Display, duration, si
from llama_jax.training.evaluate import Evaluation, batch_evaluator, evaluate, together
from llama_jax.training.goodput import RUN_GOODPUT, Goodput
from llama_jax.training.hosts import global_batch
from llama_jax.training.identity import MADE_FROM, TOKENIZER, describe_run, require_same_run
from llama_jax.training.metrics import RUN_METRICS, StepRecord
from llama_jax.training.setup import (
    adopt,
    frozen_base,
    make_directory,
    make_recipe,
    require_fitting_objective,
    require_vocabulary,
    run_mesh,
)
from llama_jax.training.step import TrainState, batch_sharding, sharded_init, sharded_step, state_shapes
from llama_jax.training.step_log import mfu_line
from llama_jax.training.trackers import require_trackers
from llama_jax.weights.checkpoint import Checkpoints, SaveError
from llama_jax.weights.checkpoint_files import list_steps, read_metadata
from llama_jax.weights.load import RUN_CHECKPOINTS, RUN_TOKENIZER, Form, load

RUN_CONFIG = "config.yaml"

Stop = Callable[[int], bool]  # asked after every step whether to save and end there


class Summary(NamedTuple):
    """How a run stands when the program ends.

    Attributes:
      step: updates done.
      steps: updates wanted.
      evaluation: on the held-out text with the final parameters; `None` where this call did not come to the end.
      unigram: nats a token of guessing held-out tokens by their frequency in the training text, as a baseline.
      saved: whether the last state is on disk.
      goodput: where the wall time of the run went, restarts included.
    """

    step: int
    steps: int
    evaluation: Evaluation | None
    unigram: float
    saved: bool
    goodput: Goodput = Goodput()


class Run:
    """The parts of one run, built once: data, mesh, programs, checkpoints. Use as `Run(config, display).train()`."""

    def __init__(self, config: TrainConfig, display: Display) -> None:
        """Checks the config, the cheapest checks first, and prepares the data; compiles nothing yet.

        Until `train` is called, a run that the directory holds is not touched.

        Raises:
          InputError: naming what in the config does not fit the devices, the tokenizer, the text, or the run to go on with.
        """
        self.display = display
        self.directory = Path(config.run.dir)
        self.mesh = run_mesh(config)
        self.recipe = make_recipe(config)
        require_vocabulary(config)
        require_trackers(config.run.trackers)
        make_directory(self.directory)
        self.config, made_from = adopt(config)
        config = self.config
        saved = None if config.run.overwrite else read_metadata(self.directory / RUN_CHECKPOINTS)
        split = split_corpus(config)
        self.metadata = describe_run(config, split)
        require_same_run(saved, self.metadata, self.directory)  # before the text is encoded, which may take long
        self.data = open_data(config, split, display.event)
        self.metadata[TOKENIZER] = self.data.tokenizer_sha256[:16]
        require_same_run(saved, self.metadata, self.directory)
        self.metadata |= {} if made_from is None else {MADE_FROM: made_from}
        self.batches = make_batches(self.data, config.data)
        require_fitting_objective(config, self.batches.unit)
        self._corpus_losses: dict[str, float | int | None] = {}  # of the last evaluation, where there are several corpora
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
        unigram = unigram_cross_entropy(self.data.train, list(self.data.held_out.values()))
        with jax.set_mesh(mesh), Checkpoints.open(self.directory / RUN_CHECKPOINTS, config.run.keep_checkpoints) as checkpoints:
            frozen = frozen_base(config, self.recipe, mesh)
            state = self._restore_or_init(checkpoints)
            first = int(state.step)
            self.display.start(self._heading(first, unigram), config.run.steps)
            kinds = [device.device_kind for device in mesh.devices.flat]
            books = Books(config, self.batches.tokens_before, kinds, first, self.display.event)
            state, evaluation = self._steps(state, frozen, checkpoints, books, should_stop)
            with books.clock("save"):
                self._attempt(checkpoints.wait)
            step = int(state.step)
            goodput = books.close(step)
            return Summary(step, config.run.steps, evaluation, unigram, step in checkpoints.steps(), goodput)

    def _restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        """The newest good state, or a fresh one."""
        restored = checkpoints.restore_newest(state_shapes(self.recipe, self.mesh))
        if restored is None:
            return self._init()
        for warning in restored.warnings:
            self.display.event(f"warning: {warning}")
        return restored.state

    def _init(self) -> TrainState:
        """A fresh state: random parameters, or those of the model that the run begins with."""
        state = sharded_init(self.recipe, self.mesh)(jax.random.key(self.config.run.seed))
        if self.config.run.init is None or self.config.adapter.rank:
            return state
        form: Form = "stacked" if self.recipe.model.options.scan else "unrolled"
        model = load(self.config.run.init, "float32", form, self.mesh)
        for line in model.report.brief():
            self.display.event(line)
        return state._replace(params=model.params)

    def _heading(self, first: int, unigram: float) -> list[str]:
        config, devices = self.config, self.mesh.devices.size
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        tokens = config.data.batch_rows * config.data.length
        training, held_out = (sum(part.size for part in parts) for parts in (self.data.train, self.data.held_out.values()))
        return [
            f"model     {si(parameter_count(config.model))} parameters, {config.model.layers} layers, "
            f"{self.recipe.model.options.dtype} compute",
            f"devices   {devices} x {self.mesh.devices.flat[0].device_kind} ({shape})",
            f"data      {si(training)} training tokens, {si(held_out)} held out; "
            f"{si(tokens)} tokens a step, {self.batches.tokens_before(config.run.steps) / training:.2f} epochs in all",
            f"mfu       {mfu_line(config, [device.device_kind for device in self.mesh.devices.flat])}",
            f"baseline  unigram entropy of the held-out text {unigram:.3f} nats a token",
            f"run       {self.directory}, " + (f"going on from step {first}" if first else "from the start"),
        ]

    def _steps(
        self, state: TrainState, frozen: tuple[Parameters, ...], checkpoints: Checkpoints, books: Books, should_stop: Stop
    ) -> tuple[TrainState, Evaluation | None]:
        """The loop itself; returns the last state and, at the end of the run, its evaluation."""
        run, rows = self.config.run, micro_rows(self.config.data)
        step_program, sharding = sharded_step(self.recipe, self.mesh, *frozen), batch_sharding(self.recipe, self.mesh)
        for step in range(int(state.step), run.steps):
            with books.clock("data"):
                batch = global_batch(self.batches, step, rows, sharding)
            state, figures = step_program(state, batch, *frozen)
            books.log.add(figures)
            done = step + 1
            last = done == run.steps
            ending = last or should_stop(done)
            evaluating = last or (not ending and is_due(done, run.eval_every))
            evaluation = None
            if ending or evaluating or is_due(done, run.log_every):
                record = books.log.record(done)
                with books.clock("eval"):
                    evaluation = self._evaluate(state, frozen) if evaluating else None
                self._report(record, evaluation, books)
                self._attempt(checkpoints.poll)
                books.log.start_clock()
            # After the metrics, so that what a checkpoint holds is never missing there.
            if ending or is_due(done, run.checkpoint_every):
                with books.clock("save"):
                    self._attempt(functools.partial(checkpoints.save, done, state, self.metadata))
            if ending:
                return state, evaluation
        return state, None

    def _report(self, record: StepRecord, evaluation: Evaluation | None, books: Books) -> None:
        """Shows and keeps the figures of a step."""
        more = _flat(evaluation) | self._corpus_losses if evaluation else {}
        books.write(record.step, record.flat() | more)
        self.display.step(record._replace(held_out_loss=evaluation.nats_per_token if evaluation else None))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Does something with checkpoints; a failing disk is reported and training goes on."""
        try:
            action()
        except SaveError as error:
            self.display.event(f"warning: {error}")

    def _evaluate(self, state: TrainState, frozen: tuple[Parameters, ...]) -> Evaluation:
        data, model = self.config.data, self.recipe.model
        params = self.recipe.parameters(state.params, frozen[0] if frozen else None, None)
        found = {
            name: evaluate(self._evaluator, params, tokens, data.length, micro_rows(data), self.mesh, model, data.packing)
            for name, tokens in self.data.held_out.items()
        }
        if len(found) > 1:
            self._corpus_losses = {f"held_out/{name}/loss": part.nats_per_token for name, part in found.items()}
        return together([(part, self.data.held_out[name].bytes_of_text) for name, part in found.items()])


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
    return rows | summary.goodput.lines()


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a run's directory, 0 if there is none."""
    checkpoints = directory / RUN_CHECKPOINTS
    return max(list_steps(checkpoints), default=0)


def clear_run(directory: Path) -> None:
    """Removes what a run wrote while it trained, so that the next one starts anew; prepared data stays."""
    if (directory / RUN_CHECKPOINTS).exists():
        shutil.rmtree(directory / RUN_CHECKPOINTS)
    for name in (RUN_METRICS, RUN_GOODPUT):
        (directory / name).unlink(missing_ok=True)
