"""A run from its first step to its last: text to batches, batches to updates, updates to
checkpoints.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.accounting import parameter_count
from llama_jax.data.batches import Batches
from llama_jax.data.prepare import copy_tokenizer
from llama_jax.data.tokens import unigram_cross_entropy
from llama_jax.formatting import si
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
from llama_jax.training.config import TrainConfig, with_remat
from llama_jax.training.config_sections import micro_batch_size
from llama_jax.training.consistency import require_equal_replicas, require_same, require_same_data
from llama_jax.training.data import (
    RunData,
    make_batches,
    open_data,
    packing_figures,
    packing_lines,
    split_corpus,
)
from llama_jax.training.display import Display
from llama_jax.training.evaluate import (
    Evaluation,
    Evaluator,
    HeldOut,
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
    require_attention,
    require_fitting_objective,
    require_same_base,
    require_same_run,
    require_vocabulary,
    run_mesh,
)
from llama_jax.training.step import (
    Recipe,
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
Write = Callable[[TrainConfig], None]


def never(step: int) -> bool:
    """No request to stop."""
    return False


def ignore(config: TrainConfig) -> None:
    """Writes nothing."""


@dataclasses.dataclass
class Run:
    """A run whose parts `prepare` has built and checked: `prepare(config, display).train()`.

    Attributes:
      config: of the run, completed by the model that it begins with.
      display: where the run is shown.
      hosts: the processes that train together.
      before: the config with which the directory was trained last, if known.
      mesh: the devices.
      data: token files for training and evaluation.
      batches: the global batches of training.
      held_out: the sequences that every evaluation reads, by data set.
      metadata: the description of the run in its checkpoints.
      recipe: model, optimizer and objective.
      evaluator: compiled evaluation.
      samples: prompts that each evaluation continues.
    """

    config: TrainConfig
    display: Display
    hosts: Hosts
    before: TrainConfig | None
    mesh: Mesh
    data: RunData
    batches: Batches
    held_out: dict[str, HeldOut]
    metadata: dict
    recipe: Recipe
    evaluator: Evaluator
    samples: Samples

    @property
    def directory(self) -> Path:
        """The directory of the run."""
        return Path(self.config.run.dir)

    def train(self, should_stop: Stop = never, write: Write = ignore) -> Summary:
        """Trains up to `run.steps` updates, from the newest checkpoint of the directory if any.

        Args:
          should_stop: asked after every update with its number; true saves the state and ends.
          write: puts the config into the directory; called by one process.

        Raises:
          InputError: if another process trains in the directory.
        """
        config, mesh, say = self.config, self.mesh, self.display.event
        with contextlib.ExitStack() as held:
            self.hosts.first_does("lock", lambda: held.enter_context(only_run(self.directory)))
            self.hosts.first_does("files", self._write_files)
            text = self.data.held_out if self.batches.unit == 1 else {}  # pairs have another loss
            unigram = unigram_cross_entropy(self.data.train, list(text.values())) if text else None
            held.enter_context(jax.set_mesh(mesh))
            self._checkpoints = held.enter_context(self._open_checkpoints())
            self._recovery = Recovery(
                config.guard, config.data.skip_steps, self.directory, self._checkpoints, say
            )
            self.batches = self._recovery.without_bad_data(self.batches)
            self._frozen = frozen_base(config, self.recipe, mesh)
            state = self._restore_or_init()
            first = int(state.step)
            kinds = [device.device_kind for device in mesh.devices.flat]
            self._log = log = RunLog(
                config,
                lambda step: self.batches.tokens_before(step),
                kinds,
                first,
                say,
                self.hosts.first,
            )
            self.hosts.first_does("changes", lambda: self._report_changes(first))
            self.hosts.first_does("config", lambda: write(config))
            if figures := packing_figures(self.batches):
                log.event(first, "packing", **figures)
            self.display.start(self._heading(first, unigram), config.run.steps)
            self.samples.begin(first)
            self._saver = Saver(
                self._checkpoints,
                self.directory,
                config.run.checkpoint_every,
                self._saved_metadata,
                say,
            )
            with log.watchdog:
                state, evaluation = self._steps(state, should_stop)
                step = int(state.step)
                with log.clock("save"):
                    self._saver.finish(step, state)
            goodput = log.close(step)
            whole = "yes" if step in self._checkpoints.steps() else ""
            return Summary(
                step,
                config.run.steps,
                evaluation,
                unigram,
                self.hosts.agree("saved", whole) != "",
                goodput,
                self._recovery.skipped,
                self._recovery.count,
                self._saver.failures,
            )

    def _report_changes(self, step: int) -> None:
        """Prints and records the settings that changed since the last training; keeps the old
        config.
        """
        if self.before is None or not step:
            return
        changes = changed_settings(self.before, self.config)
        if not changes:
            return
        jump = learning_rate_jump(self.before, self.config, step)
        for line in [
            *(f"{key}: {change}" for key, change in changes.items()),
            *([jump] if jump else []),
        ]:
            self.display.event(f"changed   {line}")
        keep_config(self.directory, step)
        self._log.event(step, "changed", **changes, **({"learning_rate": jump} if jump else {}))

    def _saved_metadata(self) -> dict:
        """What a checkpoint says of the run now."""
        return self.metadata | self._recovery.metadata()

    def _open_checkpoints(self) -> Checkpoints:
        return Checkpoints.open(
            self.directory / RUN_CHECKPOINTS, self.config.run.keep_checkpoints, self.hosts
        )

    def _write_files(self) -> None:
        """Clears the run if it starts anew; the tokenizer is part of the run."""
        if self.config.run.overwrite:
            clear_run(self.directory)
        copy_tokenizer(self.data.tokenizer_path, self.directory / RUN_TOKENIZER)

    def _restore_or_init(self) -> TrainState:
        """The newest good state, or a fresh one, watched by the recovery."""
        restored = self._checkpoints.restore_newest(state_shapes(self.recipe, self.mesh))
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
            + (f"resumed from step {first}" if first else "from the start"),
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
        if not self.held_out:
            return ["held-out  no text is held out: no evaluation"]
        sequences, whole = (
            sum(len(part.numbers) for part in self.held_out.values()),
            sum(p.end for p in self.held_out.values()),
        )
        if sequences == whole:
            return []
        tokens = sequences * self.config.data.length
        return [
            f"held-out  evaluations read {si(tokens)} tokens, the same ones each time "
            "(run.eval_tokens; 0 for all)"
        ]

    def _steps(self, state: TrainState, should_stop: Stop) -> tuple[TrainState, Held | None]:
        """The training loop: returns the last state and, at the end of the run, its evaluation."""
        log, saver, frozen = self._log, self._saver, self._frozen
        run, sequences = self.config.run, micro_batch_size(self.config.data)
        step_program, sharding = (
            sharded_step(self.recipe, self.mesh, *frozen),
            batch_sharding(self.recipe, self.mesh),
        )
        step = int(state.step)
        before: StepMetrics | None = None
        while step < run.steps:
            with log.clock("data"):
                batch = global_batch(self.batches, step, sequences, sharding)
            with log.trace.step(step + 1):
                state, figures = step_program(state, batch, *frozen)
            step += 1
            log.add(step, figures)
            # The host stays one step ahead, not ten, so that a stop request is heard within a step.
            jax.block_until_ready(before)
            before = figures
            last = step == run.steps
            ending = last or should_stop(step)
            saving = saver.due(step) or ending
            evaluating = bool(self.held_out) and (
                last or (not ending and is_due(step, run.eval_every))
            )
            recording = ending or evaluating or is_due(step, run.log_every)
            trouble = (
                self._recovery.look(step, log.step_log.fetch()) if recording or saving else None
            )
            if trouble is not None:
                state = self._go_back(trouble, state)
                step = int(state.step)
                continue
            if is_due(step, self.config.guard.check_replicas):
                require_equal_replicas(state.params, self.mesh, step)
            record = self._record(step) if recording else None
            if record is not None and not evaluating:
                self.display.step(record)
            # After the metrics of the update, so that the metrics of a checkpoint's step are never
            # missing there; before the evaluation, which may take long. Not after a skipped step:
            # nothing has changed, and a newer checkpoint may push out an older one that the run is
            # to go back to.
            if ending or (saving and not self._recovery.streak):
                with log.clock("save"):
                    saver.save(step, state)
            evaluation = None
            if record is not None and evaluating:
                with log.step_log.pause(), log.clock("eval"):
                    evaluation, more = self._evaluate(state)
                log.write(step, evaluation.metrics() | more)
                self.display.step(record._replace(held_out_loss=evaluation.loss))
            if ending:
                return state, evaluation
        return state, None

    def _go_back(self, trouble: Trouble, state: TrainState) -> TrainState:
        """The state to resume from after a trouble.

        Raises:
          DivergedError: if the run has gone back there often enough.
        """
        log, saver = self._log, self._saver
        with log.clock("save"):
            saver.wait(int(state.step))
        rewind = self._recovery.plan(trouble, self.batches.steps)
        if rewind is None:
            sequences, sharding = (
                micro_batch_size(self.config.data),
                batch_sharding(self.recipe, self.mesh),
            )
            batch = global_batch(self.batches, trouble.steps[-1].step, sequences, sharding)
            arrays = array_figures(self.recipe, state, batch, self._frozen)
            raise self._recovery.give_up(trouble, self.batches.steps, state, arrays)
        step = int(state.step)
        with log.clock("save"):  # it reads a checkpoint, which may take as long as to write one
            self._recovery.go_back(rewind)
            let_go(state)
            state = self._restore_or_init()
        saver.go_back()
        # Perhaps further back than planned: a damaged checkpoint is passed over.
        log.go_back(step, int(state.step), rewind)
        self.samples.begin(int(state.step))
        self.batches = self._recovery.without_bad_data(self.batches)
        return state

    def _record(self, step: int) -> StepRecord:
        """The figures of the updates since the last record, written down."""
        record = self._log.step_log.record(step)._replace(
            skipped=self._recovery.skipped, rewinds=self._recovery.count
        )
        self._log.write(step, record.flat())
        self._log.step_log.start_clock()
        return record

    def _evaluate(self, state: TrainState) -> tuple[Held, dict[str, float | int]]:
        """The evaluation of a state, and the loss of each data set where there are several, by
        their names in the metrics.
        """
        sequences, rules = micro_batch_size(self.config.data), self.recipe.model.options.rules
        alive = self._log.clock.alive
        params = self.recipe.parameters(
            state.params, self._frozen[0] if self._frozen else None, None
        )
        self.samples.take(int(state.step), params)
        alive()
        sums = {
            name: evaluate(self.evaluator, params, part, sequences, self.mesh, rules, alive)
            for name, part in self.held_out.items()
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
    """Whether an event that happens every `every` steps is due after this one; 0 is never."""
    return every > 0 and step % every == 0


def prepare(
    config: TrainConfig,
    display: Display,
    hosts: Hosts | None = None,
    before: TrainConfig | None = None,
    choose_remat: Callable[[TrainConfig], str] | None = None,
) -> Run:
    """Builds the parts of a run in the order in which they are needed, the cheapest checks first.

    Nothing that the directory holds is touched before `Run.train`, and no step is compiled but by
    `choose_remat`.

    Args:
      config: of the run.
      display: where the run is shown.
      hosts: the processes that train together; this one alone by default. The first of them
        prepares the data.
      before: the config with which the directory was trained last, if known; changes are reported.
      choose_remat: the rematerialization policy for a config; that of the config by default.

    Raises:
      InputError: naming the value that does not fit the devices, the tokenizer, the text, or the
        run to resume; or the process that differs from the others.
    """
    hosts, directory = hosts or Hosts(), Path(config.run.dir)
    mesh = run_mesh(config)
    require_attention(config)
    require_vocabulary(config)
    require_trackers(config.run.trackers)
    hosts.first_does("directory", lambda: make_directory(directory))
    config, made_from = hosts.in_turn("adopt", lambda: adopt(config, hosts.first))

    saved = None if config.run.overwrite else read_metadata(directory / RUN_CHECKPOINTS)
    split = split_corpus(config)
    metadata = describe_run(config, split)
    require_same_base(saved, made_from, directory)
    require_same_run(saved, metadata, directory)  # before the text is encoded, which may take long
    held_out = {} if split is None else {"held-out text (hash)": split.held_out.sha256[:16]}
    require_same_data(hosts, metadata | held_out, directory)
    data = hosts.in_turn("data", lambda: open_data(config, split, display.event))
    metadata[TOKENIZER] = data.tokenizer_sha256[:16]
    require_same(hosts, "tokenizer", {TOKENIZER: metadata[TOKENIZER]})
    require_same_run(saved, metadata, directory)
    metadata |= {} if made_from is None else {MADE_FROM: made_from}
    batches = make_batches(data, config.data)
    require_fitting_objective(config, batches.unit)
    chosen = choose_held_out(
        data.held_out,
        config.data.length,
        config.data.packing,
        config.run.eval_tokens,
        config.data.seed,
        config.data.too_long,
    )

    if choose_remat is not None:
        config = with_remat(config, choose_remat(config))
    recipe = make_recipe(config)
    samples = Samples(config.run, recipe.model, mesh, data.tokenizer_path, display.event)
    if batches.unit == 2:
        evaluator = pair_evaluator(recipe.model, recipe.loss_chunk, recipe.objective)
    else:
        counts = byte_counts(load_tokenizer(data.tokenizer_path).token_bytes)
        evaluator = batch_evaluator(recipe.model, recipe.loss_chunk, counts)
    return Run(
        config,
        display,
        hosts,
        before,
        mesh,
        data,
        batches,
        chosen,
        metadata,
        recipe,
        evaluator,
        samples,
    )
