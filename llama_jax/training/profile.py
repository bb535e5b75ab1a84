"""A trace of some updates: what host and devices do in them, for whoever looks for time that is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from llama_jax.training.config import profiled_steps

RUN_PROFILE = "profile"  # in the directory of a run
_PERFETTO = "perfetto_trace.json.gz"

Result = TypeVar("Result")


class Trace:
    """Traces the steps of `run.profile`; training never fails for its sake.

    Args:
      profile: `FIRST:LAST`, or `None` for none; of these steps, those that this program does.
      directory: to write to.
      say: takes one line of text: where the trace is, or why there is none.
    """

    def __init__(self, profile: str | None, directory: Path, say: Callable[[str], None]) -> None:
        self._wanted = profiled_steps(profile)
        self._directory, self._say = directory, say
        self._traced: list[int] = []

    def run(self, step: int, program: Callable[..., Result], *args: Any) -> Result:
        """What a program gives; traced if the step is wanted, and with the last of them the trace is written.

        Args:
          step: number of the update that it does, from 1.
          program: compiled.
          *args: of the program.
        """
        if step in self._wanted and not self._traced:
            self._attempt(self._start)
        if step not in self._wanted:
            return program(*args)
        self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = program(*args)
        if step == self._wanted[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes a trace that is still under way, where the run ends before the last step that is wanted."""
        if self._traced and self._wanted:
            self._attempt(self._stop)
        self._wanted = range(0)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the frames of Python would be most of the trace
        alone = jax.process_count() == 1  # the file for Perfetto is not made where several hosts write into one folder
        jax.profiler.start_trace(self._directory, create_perfetto_trace=alone, profiler_options=options)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        files = sorted(self._directory.glob(f"plugins/profile/*/{_PERFETTO}"), key=lambda path: path.stat().st_mtime_ns)
        opened = f"open {files[-1]} at https://ui.perfetto.dev, or " if files else ""
        self._say(f"trace     steps {self._traced[0]} to {self._traced[-1]}: {opened}xprof --logdir {self._directory}")

    def _attempt(self, action: Callable[[], None]) -> None:
        """Does something with the profiler; after a failure nothing more is traced."""
        try:
            action()
        except Exception as error:  # whatever the profilers of the platforms raise
            self._wanted = range(0)
            self._say(f"warning: run.profile: no trace ({type(error).__name__}: {' '.join(str(error).split()):.160})")
