"""Our models under lm-evaluation-harness (extra `eval`): thousands of tasks, asked by its own
programs.

import lm_eval, llama_jax
lm = llama_jax.harness_model(llama_jax.load("SmolLM2-135M-Instruct.Q4_1.gguf"))
print(lm_eval.simple_evaluate(lm, tasks=["hellaswag"], limit=100)["results"])
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import InputError, imported
from llama_jax.generation.generate import Generator
from llama_jax.generation.score import Score, score_tokens
from llama_jax.generation.text import encode_user, generate, require_tokenizer
from llama_jax.text.chat import encode_chat
from llama_jax.text.tokenizer import encode_prompt
from llama_jax.weights.load import Pretrained

# begins a conversation on its way through the harness, which hands texts around
_CHAT = "\ue000chat\ue001"
_UNCHANGED = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}  # settings of tasks, and what leaves them out

_STOPS = ("until", "stop")  # names that tasks have for the texts that end an answer
# And for its most tokens; of several the first counts, as in the harness.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@runtime_checkable
class Request(Protocol):
    """What the harness asks for, `lm_eval.api.instance.Instance`: only its arguments matter
    here.
    """

    args: tuple


class _Plan(NamedTuple):
    """A request for text, understood."""

    context: str
    limit: int
    stops: list[str]
    sampling: dict[str, float]


class HarnessMethods:
    """The methods that the harness calls; `harness_model` joins them to its base class.

    Tokens that do not fit into the context are cut from its left, as the harness's own models have
    it, and a warning counts the contexts cut before an answer. A
    conversation goes through the model's template here, not in the harness, so that special words
    in questions stay text.
    """

    def __init__(
        self, model: Pretrained, generator: Generator | None, batch_size: int, max_new_tokens: int
    ) -> None:
        super().__init__()
        self._model, self._batch_size, self._max_new_tokens = model, batch_size, max_new_tokens
        self._tokenizer = require_tokenizer(model)
        self._generator = generator or Generator(model.params, model.config)

    @property
    def _first(self) -> int:
        """The token that stands before a text with nothing before it.

        Raises:
          InputError: for a tokenizer without a token that begins or ends a text.
        """
        first = (
            self._tokenizer.begin_id
            if self._tokenizer.begin_id is not None
            else self._tokenizer.end_id
        )
        if first is None:
            raise InputError(
                "an empty context given to a tokenizer without a token that begins or "
                "ends a text, which would "
                "stand there; a context expected"
            )
        return first

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps its requests apart."""
        return self._model.origin.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, for the harness's notes."""
        return self._model.template.source if chat_template and self._model.template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a text that the methods below know again.

        Raises:
          InputError: if an answer has been begun.
        """
        if not add_generation_prompt:
            raise InputError(
                "a task with gen_prefix given, an answer that is begun; one without "
                "expected, or no chat template"
            )
        return _CHAT + json.dumps(chat_history)

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would
        write it.
        """
        return [
            (score.logprob, score.greedy)
            for score in self._scores([self._pair(*r.args) for r in requests])
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text; of one beyond the context, in windows that predict
        every token once.
        """
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._scores([window for sequence in windows for window in sequence]))
        return [sum(next(scores).logprob for _ in sequence) for sequence in windows]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the task's stop strings.

        Raises:
          InputError: for settings of a task that are unknown here, and for limits that leave no
            room for a context.
        """
        plans = [
            _plan(request.args[0], request.args[1], self._max_new_tokens) for request in requests
        ]
        prompts = [self._prompt(plan) for plan in plans]
        cut = sum(len(ids) < whole for ids, whole in prompts)
        if cut:
            warnings.warn(
                f"{cut} of {len(plans)} contexts are longer than the model's context "
                f"({self._model.config.context_length} tokens) less their answer: cut from the "
                "left",
                stacklevel=2,
            )
        order = sorted(
            range(len(plans)), key=lambda i: (plans[i].limit.bit_length(), len(prompts[i][0]))
        )
        answers: dict[int, str] = {}
        for first in range(0, len(order), self._batch_size):
            batch = order[first : first + self._batch_size]
            written = self._written([prompts[i][0] for i in batch], [plans[i] for i in batch])
            answers.update(zip(batch, written))
        return [answers[i] for i in range(len(plans))]

    def _written(self, prompts: Sequence[list[int]], plans: Sequence[_Plan]) -> list[str]:
        settings: dict[str, Any] = {
            name: [plan.sampling[name] for plan in plans] for name in _UNCHANGED
        }
        found = generate(
            self._model,
            prompts,
            max_new_tokens=[plan.limit for plan in plans],
            stop=[plan.stops for plan in plans],
            generator=self._generator,
            **settings,
        )
        return [completion.text for completion in found]

    def _prompt(self, plan: _Plan) -> tuple[list[int], int]:
        """The last tokens of a context, a text or a conversation, that leave room for the answer;
        and how many tokens the context has.
        """
        length = self._model.config.context_length
        if plan.limit >= length:
            raise InputError(
                f"an answer of up to {plan.limit} tokens asked of a model whose context is "
                f"{length}; fewer expected (max_gen_toks of the task, or max_new_tokens)"
            )
        is_chat = plan.context.startswith(_CHAT)
        context = json.loads(plan.context.removeprefix(_CHAT)) if is_chat else plan.context
        ids = encode_user(self._model, context, chat=False) or [self._first]
        return ids[plan.limit - length :], len(ids)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and what follows it, as the harness's own models have them, the
        context cut to fit.

        White space at the end of a context belongs to the continuation. Both are tokenized
        together, and the continuation is what comes after as many tokens as the context alone has;
        these are the context, whatever merged at the border.
        """
        if context.startswith(_CHAT):
            prompt, following = self._chat_pair(
                json.loads(context.removeprefix(_CHAT)), continuation
            )
        elif context:
            kept = context.rstrip()
            prompt = encode_prompt(self._tokenizer, kept)
            following = encode_prompt(self._tokenizer, context + continuation)[len(prompt) :]
            prompt = prompt or [self._first]
        else:
            prompt, following = [self._first], self._tokenizer.encode(continuation)
        return prompt[-max(1, self._model.config.context_length + 1 - len(following)) :], following

    def _chat_pair(
        self, messages: list[dict[str, str]], continuation: str
    ) -> tuple[list[int], list[int]]:
        """A conversation and what follows it: white space that the template ends with belongs to
        that here too.
        """
        tokenizer, template = self._tokenizer, self._model.template
        if template is None:
            raise InputError(
                f"{self._model.origin} has no chat template; ask without apply_chat_template"
            )
        ids, special = (
            encode_chat(template, tokenizer, messages),
            set(tokenizer.special_tokens.values()),
        )
        start = next((i for i in range(len(ids), 0, -1) if ids[i - 1] in special), 0)
        words = tokenizer.decode(ids[start:])
        if start == 0 or tokenizer.encode_after_special(words) != ids[start:]:
            return ids, tokenizer.encode(continuation)
        kept = tokenizer.encode_after_special(words.rstrip()) if words.rstrip() else []
        return [*ids[:start], *kept], tokenizer.encode_after_special(words + continuation)[
            len(kept) :
        ]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Pairs that predict every token of a text once, each with as much past as the last of its
        window can have.
        """
        first, ids = [self._first], encode_prompt(self._tokenizer, text)
        size = self._model.config.context_length
        pairs = []
        for start in range(0, len(ids), size):
            end = min(start + size, len(ids))
            pairs.append((ids[max(0, end - size - 1) : start] or first, ids[start:end]))
        return pairs

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        return score_tokens(
            self._generator,
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            self._batch_size,
        )


def _plan(context: str, settings: Mapping[str, Any], limit: int) -> _Plan:
    unknown = set(settings) - {*_STOPS, *_LIMITS, "do_sample", "num_beams", *_UNCHANGED}
    if unknown:
        raise InputError(
            f"generation_kwargs {sorted(unknown)[0]!r} is unknown; until, stop, "
            "max_gen_toks, max_new_tokens, "
            "max_tokens, do_sample, num_beams, temperature, top_k, top_p or min_p expected"
        )
    if settings.get("num_beams", 1) != 1:
        raise InputError(
            f"generation_kwargs num_beams: {settings['num_beams']} given; 1 expected, "
            "there is no beam search"
        )
    limits = [int(settings[name]) for name in _LIMITS if settings.get(name) is not None]
    given = [settings.get(name) or [] for name in _STOPS]
    until = [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]
    sampling = {name: settings.get(name, neutral) for name, neutral in _UNCHANGED.items()}
    if not settings.get("do_sample", sampling["temperature"] > 0):
        sampling["temperature"] = 0.0
    elif "temperature" not in settings:
        sampling["temperature"] = 1.0
    return _Plan(context, next(iter(limits), limit), [text for text in until if text], sampling)


def harness_model(
    model: Pretrained,
    generator: Generator | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
) -> HarnessMethods:
    """A model as lm-evaluation-harness wants it: give it to `lm_eval.simple_evaluate`.

    Args:
      model: from `llama_jax.load`.
      generator: to use; else one is made.
      batch_size: texts run together.
      max_new_tokens: limit of an answer where the task names none.

    Raises:
      InputError: if lm-eval is not installed; for a model without tokenizer.
    """
    base = imported("lm_eval.api.model", "eval").LM
    return type("HarnessModel", (HarnessMethods, base), {})(
        model, generator, batch_size, max_new_tokens
    )
