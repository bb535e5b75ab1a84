"""What the model in training says: some prompts continued at every evaluation."""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.axes import Parameters
from llama_jax.errors import InputError
from llama_jax.generation.checks import check_prompts
from llama_jax.generation.generate import Generator
from llama_jax.generation.session import NotFiniteError
from llama_jax.model.llama import Llama
from llama_jax.text.stops import stop_ids
from llama_jax.text.tokenizer import encode_prompt, load_tokenizer
from llama_jax.training.config import RunConfig
from llama_jax.training.metrics import LineFile, drop_later

RUN_SAMPLES = "samples.jsonl"  # in the directory of a run
_SHOWN = 160  # characters of a line on the display


class Samples:
    """The prompts of a run (`run.sample_prompts`), continued by the most probable tokens, all of them together.

    Args:
      run: which prompts, how many tokens, and where to keep the texts.
      model: the module that is trained.
      mesh: the devices that it is trained on.
      tokenizer_path: the tokenizer of the run.
      say: takes one line of text.

    Raises:
      InputError: for prompts that the model cannot take, and for prompts on several hosts.
    """

    def __init__(self, run: RunConfig, model: Llama, mesh: Mesh, tokenizer_path: Path, say: Callable[[str], None]) -> None:
        self._prompts, self._new_tokens = run.sample_prompts, run.sample_tokens
        self._path = Path(run.dir) / RUN_SAMPLES
        self._model, self._mesh, self._say = model, mesh, say
        if not self._prompts:
            return
        if jax.process_count() > 1:
            raise InputError(f"run.sample_prompts: given on {jax.process_count()} hosts, one expected; leave them out")
        self._tokenizer = load_tokenizer(tokenizer_path)
        try:
            self._ids = check_prompts([encode_prompt(self._tokenizer, prompt) for prompt in self._prompts], model.config)
        except InputError as error:
            raise InputError(f"run.sample_prompts: {error}") from None

    def begin(self, step: int) -> None:
        """Drops what an interrupted run left of steps after this one, from which training goes on."""
        if self._prompts:
            self._file(functools.partial(drop_later, self._path, step)).close()

    def take(self, step: int, params: Parameters) -> None:
        """Continues all prompts; shows and keeps the texts.

        Args:
          step: updates done.
          params: what the model runs now, in the form of the module, on the mesh.
        """
        if not self._prompts:
            return
        options = self._model.options  # the programs are compiled at the first call, and found again at the later ones
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a few tokens on the mesh of a training, whatever it gathers
            generator = Generator(params, self._model.config, self._mesh, dtype=options.dtype, rules=options.rules)
        try:
            rows = generator.generate(self._ids, self._new_tokens, stop_ids=stop_ids(self._tokenizer))
        except NotFiniteError as error:  # the guard of the run decides what becomes of it
            self._say(f"sample    {error}")
            return
        file = self._file()
        for prompt, row in zip(self._prompts, rows):
            # The model may have more rows than the tokenizer has tokens; those have no text.
            text = self._tokenizer.decode([token for token in row.token_ids if token < self._tokenizer.vocab_size])
            self._say(shown(prompt, text))
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}))
        file.close()

    def _file(self, prepare: Callable[[], None] = lambda: None) -> LineFile:
        return LineFile(self._path, "samples", self._say, prepare)


def shown(prompt: str, text: str) -> str:
    """A prompt and its text in one line of bounded length, whatever characters they hold."""
    line = f"sample    {prompt!r} {text!r}"
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."
