"""What was found out about a model before it is trusted: a report for the screen, for JSON, and for checkpoints made of it."""

import dataclasses
import json
from typing import Any

from llama_jax.accounting import parameter_count
from llama_jax.config import LlamaConfig
from llama_jax.presets import name_of
from llama_jax.text.formats import recognise
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.contents import contents
from llama_jax.weights.oddities import oddities
from llama_jax.weights.open import Opened

_LAYOUTS = {"run": "halves", "hugging_face": "halves", "meta": "adjacent", "gguf": "adjacent"}
_LAYOUT_WORDS = {"halves": "pairs half a head apart, as here", "adjacent": "adjacent pairs, reordered when loaded"}
_LONGEST_LINE = 1000
MADE_FROM = "llama_jax.made_from"  # key of the report in what is made from a model
_FEW = 8  # special tokens on the screen; Llama 3 has 256


@dataclasses.dataclass(frozen=True)
class Report:
    """Facts about a model on disk, all from headers and small files.

    Attributes:
      origin: one line that says what it is.
      path: where it is.
      format: `run`, `hugging_face`, `meta` or `gguf`.
      preset: name of the published architecture that it has, number for number; `None` for any other.
      model: the architecture.
      parameters: counted from the shapes in the files.
      expected_parameters: by the closed form.
      layout: which channels of queries and keys turn together in the files: `halves` of a head apart, or `adjacent` ones.
      types: how many tensors of each type the files hold.
      nbytes: bytes of the tensors.
      tokenizer_vocab_size: token ids of the tokenizer; `None` without one.
      begin: text of the token that begins a text; `None` if there is none.
      adds_begin: whether a plain prompt begins with it.
      stops: tokens that end a text, their texts by id; `None` for a text that only a tokenizer would know.
      special_tokens: special tokens and their ids.
      chat_template: `none`, a built-in format to which it is equivalent (`llama2`, `llama3`, `chatml`), or `foreign`.
      odd: a sentence for everything strange.
    """

    origin: str
    path: str
    format: str
    preset: str | None
    model: LlamaConfig
    parameters: int
    expected_parameters: int
    layout: str
    types: dict[str, int]
    nbytes: int
    tokenizer_vocab_size: int | None
    begin: str | None
    adds_begin: bool
    stops: dict[int, str | None]
    special_tokens: dict[str, int]
    chat_template: str
    odd: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {
            "stops": {str(token): text for token, text in self.stops.items()},
            "odd": [*self.odd],
        }

    def made_from(self) -> dict[str, str]:
        """All of it but the path, which concerns nobody else, as the metadata of a model made from this one."""
        values = {name: value for name, value in self.to_dict().items() if name != "path"}
        return {MADE_FROM: json.dumps(values)}

    def brief(self) -> list[str]:
        """One line, and another if anything is odd."""
        kinds = "+".join(self.types)
        size = f"{_scaled(self.parameters)} parameters in {kinds}, {_scaled(self.nbytes)}B"
        line = f"{self.origin}: {self.preset or 'custom architecture'}, {size}, chat template {self.chat_template}"
        more = f" (and {len(self.odd) - 1} more; see inspect)" if len(self.odd) > 1 else ""
        return [_printable(text) for text in (line, *(f"odd: {sentence}{more}" for sentence in self.odd[:1]))]

    def lines(self) -> list[str]:
        """All of it for a screen, a fact a line."""
        rows = {
            "model": self.origin,
            "path": self.path,
            "architecture": self.preset or "custom",
            "parameters": f"{self.parameters:,} in the files, {self.expected_parameters:,} by the architecture",
            "sizes": _sizes(self.model),
            "head": "tied to the embedding" if self.model.tied_head else "separate",
            "context": f"{self.model.context_length} tokens",
            "RoPE": _rope(self.model),
            "query, key": _LAYOUT_WORDS[self.layout],
            "tensors": ", ".join(f"{count} {kind}" for kind, count in self.types.items())
            + f"; {_scaled(self.nbytes)}B, {8 * self.nbytes / self.parameters:.3g} bits a parameter",
            "vocabulary": self._vocabulary(),
            "begin": "none" if self.begin is None else f"{self.begin}, {'' if self.adds_begin else 'not '}put before prompts",
            "stops": ", ".join(f"{token} {text or '(text unknown)'}" for token, text in self.stops.items()) or "none",
            "special": self._special(),
            "chat template": self.chat_template,
        }
        pairs = [*rows.items(), *(("odd", sentence) for sentence in self.odd)]
        return [f"{name:15}{_printable(value)}" for name, value in pairs]

    def _vocabulary(self) -> str:
        tokenizer = "no tokenizer" if self.tokenizer_vocab_size is None else f"{self.tokenizer_vocab_size} of the tokenizer"
        return f"{self.model.vocab_size} tokens of the model, {tokenizer}"

    def _special(self) -> str:
        texts = [f"{token} {text}" for text, token in sorted(self.special_tokens.items(), key=lambda item: item[1])]
        rest = [f"and {len(texts) - _FEW} more"] if len(texts) > _FEW else []
        return ", ".join(texts[:_FEW] + rest) or "none"


def report(opened: Opened) -> Report:
    """What the files of an opened model say; no weight is read."""
    held, config, tokenizer = contents(opened.source), opened.source.config, opened.tokenizer
    return Report(
        origin=opened.origin,
        path=str(opened.path),
        format=opened.format,
        preset=name_of(config),
        model=config,
        parameters=held.parameters,
        expected_parameters=parameter_count(config),
        layout=_LAYOUTS[opened.format],
        types=held.types,
        nbytes=held.nbytes,
        tokenizer_vocab_size=tokenizer.vocab_size if tokenizer else None,
        begin=_text(tokenizer, tokenizer.begin_id) if tokenizer and tokenizer.begin_id is not None else None,
        adds_begin=tokenizer is not None and tokenizer.adds_begin,
        stops={token: _text(tokenizer, token) for token in opened.stop_ids},
        special_tokens=dict(tokenizer.special_tokens) if tokenizer else {},
        chat_template="none" if opened.template is None else recognise(opened.template) or "foreign",
        odd=tuple(oddities(opened, held)),
    )


def _text(tokenizer: Tokenizer | None, token: int) -> str | None:
    """The text of a token, special or not."""
    if tokenizer is None:
        return None
    special = {number: text for text, number in tokenizer.special_tokens.items()}
    return special.get(token) or tokenizer.decode([token])


def _printable(text: str) -> str:
    """Text from files as it may go to a terminal: control characters spelled out, and cut where it is long."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST_LINE])
    return spelled + (" ..." if len(text) > _LONGEST_LINE else "")


def _sizes(config: LlamaConfig) -> str:
    heads = f"{config.heads} heads of {config.head_dim} ({config.kv_heads} of keys and values)"
    return f"{config.layers} layers, width {config.dim}, {heads}, feed-forward {config.ffn_dim}, epsilon {config.norm_eps:g}"


def _rope(config: LlamaConfig) -> str:
    scaling = config.rope_scaling
    base = f"base {config.rope_theta:g}"
    if scaling is None:
        return f"default, {base}"
    original = f", original context {scaling.original_context}" if scaling.original_context else ""
    return f"{scaling.rope_type}, {base}, factor {scaling.factor:g}{original}"


def _scaled(number: int) -> str:
    """A number with three digits and a prefix: 1.24 G."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number} "
