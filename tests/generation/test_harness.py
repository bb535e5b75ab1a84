"""Under lm-evaluation-harness: the methods it calls, without it; and, where it is installed, a
local task end to end.
"""

import dataclasses
import json
import types

import numpy as np
import pytest
from support import float64_logprobs, shallow

from llama_jax.errors import InputError
from llama_jax.generation.harness import HarnessMethods, harness_model
from llama_jax.generation.score import score
from llama_jax.generation.text import generate
from llama_jax.text.chat import encode_chat
from llama_jax.weights.load import load

TASK = """
task: local_animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return shallow(load(tiny_directory))


@pytest.fixture(scope="module")
def methods(tiny):
    return HarnessMethods(tiny, None, 3, 8)


def requests(*args):
    return [types.SimpleNamespace(args=arg) for arg in args]


def test_loglikelihood_is_the_score(tiny, methods):
    pairs = [("The cat", " sat on"), ("", "The dog"), ("A quick", " brown fox")]
    expected = score(tiny, *zip(*pairs))
    got = methods.loglikelihood(requests(*pairs))
    assert [greedy for _, greedy in got] == [result.greedy for result in expected]
    assert [value for value, _ in got] == pytest.approx(
        [result.logprob for result in expected], abs=1e-4
    )


def shortened(model, context: int) -> HarnessMethods:
    config = type(model.config)(**{**model.config.__dict__, "context_length": context})
    return HarnessMethods(model._replace(config=config), None, 3, 8)


def logprobs(model, ids: list[int]) -> np.ndarray:
    """log p of every token but the first."""
    return float64_logprobs(model.params, ids, model.config)[np.arange(len(ids) - 1), ids[1:]]


def test_long_contexts_lose_their_beginning(tiny):
    """16 tokens are run: the last of the continuation is only predicted, so 17 of the text are
    left.
    """
    prompt, following = "the cat sat on the mat and" * 9, " dog sat"
    ids, tail = tiny.tokenizer.encode(prompt + following), tiny.tokenizer.encode(following)
    assert ids[-len(tail) :] == tail
    ((got, _),) = shortened(tiny, 16).loglikelihood(requests((prompt, following)))
    assert got == pytest.approx(float(logprobs(tiny, ids[-17:])[-len(tail) :].sum()), abs=1e-3)


def test_rolling_predicts_every_token_once(tiny):
    """Windows of 16: [end] then 16 tokens, the next 16 after one token of past, the last 5 after
    12: the harness's own rule.
    """
    text = "The cat saw the dog sit, a quick brown fox jumps over the log. The cat sat."
    ids = [tiny.tokenizer.end_id, *tiny.tokenizer.encode(text)]
    count, total = len(ids) - 1, 0.0
    for start in range(0, count, 16):
        end = min(start + 16, count)
        window = ids[max(0, end - 16) : end + 1]
        total += float(logprobs(tiny, window)[-(end - start) :].sum())
    assert count > 32
    assert count % 16
    (got,) = shortened(tiny, 16).loglikelihood_rolling(requests((text,)))
    assert got == pytest.approx(total, abs=1e-3)
    (whole,) = HarnessMethods(tiny, None, 3, 8).loglikelihood_rolling(requests((text,)))
    assert whole == pytest.approx(float(logprobs(tiny, ids).sum()), abs=1e-3)


def test_generate_until(tiny, methods):
    prompts = ["The cat", "A dog sat on"]
    plain = [c.text for c in generate(tiny, prompts, max_new_tokens=8)]
    greedy = {"until": [], "do_sample": False, "temperature": 0.7}
    assert methods.generate_until(requests(*[(p, greedy) for p in prompts])) == plain
    stop = plain[0][2:4]
    (cut,) = methods.generate_until(requests((prompts[0], {"until": stop})))
    assert cut == plain[0][: plain[0].index(stop)]
    mixed = methods.generate_until(
        requests((prompts[1], {"max_gen_toks": 8}), (prompts[0], {"max_gen_toks": 2}))
    )
    assert mixed == [plain[1], generate(tiny, prompts[:1], max_new_tokens=2)[0].text]
    by_name = [
        {"max_new_tokens": 2},
        {"max_tokens": 2, "num_beams": 1},
        {"max_gen_toks": 2, "max_tokens": 7},
    ]
    assert (
        methods.generate_until(requests(*[(prompts[0], names) for names in by_name]))
        == [mixed[1]] * 3
    )
    assert methods.generate_until(requests((prompts[0], {"stop": [stop], "until": ["zzz"]}))) == [
        cut
    ]
    for bad, words in (
        ({"num_beams": 4}, "num_beams: 4 given; 1 expected"),
        ({"length_penalty": 1.0}, "'length_penalty' is unknown"),
    ):
        with pytest.raises(InputError, match=f"generation_kwargs {words}"):
            methods.generate_until(requests(("The cat", bad)))


def test_contexts_before_an_answer_are_cut_by_tokens(tiny):
    """The last 16 - 5 ids, whatever text they are: as `HFLM.tok_batch_encode` cuts them."""
    short = shortened(tiny, 16)
    messages = [{"role": "user", "content": "The cat sat. " * 9}]
    for context, ids in (
        ("你" * 30, tiny.tokenizer.encode("你" * 30)),  # bytes: a cut inside of a character
        (short.apply_chat_template(messages), encode_chat(tiny.template, tiny.tokenizer, messages)),
    ):
        assert len(ids) > 11
        with pytest.warns(UserWarning, match="1 of 2 contexts are longer .* cut from the left"):
            got, _ = short.generate_until(
                requests((context, {"max_gen_toks": 5}), ("The", {"max_gen_toks": 5}))
            )
        (expected,) = short._generator.generate([ids[-11:]], 5, stop_ids=tiny.stop_ids)
        assert got == tiny.tokenizer.decode(
            [t for t in expected.token_ids if t not in tiny.stop_ids]
        )
    with pytest.raises(InputError, match="up to 16 tokens asked of a model whose context is 16"):
        short.generate_until(requests(("The cat", {"max_gen_toks": 16})))


PAIRS = [
    ("The cat", " sat"),
    ("The cat ", "sat"),
    ("The cat  ", " sat"),
    ("Answer:\n", "yes"),
    ("Answer:\n\n", "\nyes"),
    ("The c", "at"),
    ("a\t ", "b"),
    ("The quick bro", "wn fox"),
    (" ", "dog"),
    ("th", "e"),
    ("x\n", "  y"),
    ("The cat. ", ""),
    ("你", "好"),
]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["begin token", "plain"])
def test_pairs_are_those_of_the_harness(tiny, tiny_directory, kind):
    """As lm-evaluation-harness 0.4.9 to 0.4.13 encodes pairs (`TemplateLM._encode_pair`), with
    transformers' tokenizer.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    theirs, model = AutoTokenizer.from_pretrained(tiny_directory), tiny
    if kind == "begin token":
        begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        theirs.backend_tokenizer.post_processor = begin
        model = tiny._replace(
            tokenizer=dataclasses.replace(tiny.tokenizer, begin_id=0, adds_begin=True)
        )
    ours = HarnessMethods(model, None, 3, 8)
    for context, continuation in PAIRS:
        kept = context.rstrip()
        whole, alone = theirs.encode(context + continuation), theirs.encode(kept)
        assert ours._pair(context, continuation) == (alone or [0], whole[len(alone) :]), (
            context,
            continuation,
        )
    assert ours._pair("", " dog") == ([0], theirs.encode(" dog", add_special_tokens=False))
    assert ours._windows("The cat") == [([0], theirs.encode("The cat"))]


def test_white_space_that_ends_a_template_belongs_to_the_answer(tiny, methods):
    """ChatML ends with `assistant` and a line feed: what is scored begins with the line feed."""
    prompt, following = methods._pair(
        methods.apply_chat_template([{"role": "user", "content": "Hi"}]), "Yes"
    )
    whole = tiny.tokenizer.encode_after_special("assistant\nYes")
    alone = tiny.tokenizer.encode_after_special("assistant")
    assert prompt[-len(alone) - 1 :] == [tiny.tokenizer.special_tokens["<|im_start|>"], *alone]
    assert following == whole[len(alone) :]


def test_a_conversation_goes_through_the_template(tiny, methods):
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    context = methods.apply_chat_template(messages)
    (got,) = methods.generate_until(requests((context, {})))
    assert got == generate(tiny, [messages], max_new_tokens=8)[0].text
    text = "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert methods._pair(context, "Yes")[0] != tiny.tokenizer.encode(
        text
    )  # special words of the template are special
    assert methods._pair(context, "Yes")[0][0] == tiny.tokenizer.special_tokens["<|im_start|>"]
    with pytest.raises(InputError, match="gen_prefix"):
        methods.apply_chat_template(messages, add_generation_prompt=False)


def test_without_the_harness(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(InputError, match=r"pip install 'llama-jax\[eval\]'"):
        harness_model(tiny)


def test_a_local_task(tiny, tmp_path, monkeypatch):
    """The harness's own accuracy on a task of ours is that of `evaluate_choices`."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from llama_jax.generation.score import Question, evaluate_choices

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [
        "the cat",
        "a dog",
        "on the mat",
        "log",
        "brown fox jumps",
        "sat",
        "quick",
        "saw the dog sit",
    ]
    rng = np.random.default_rng(0)
    asked = [
        Question(
            f"The {words[i % 8]} sat on",
            [str(w) for w in rng.choice(words, 3, replace=False)],
            int(rng.integers(3)),
        )
        for i in range(12)
    ]
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps(question._asdict()) + "\n" for question in asked))
    (tmp_path / "local_animals.yaml").write_text(TASK.format(path=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        harness_model(tiny), tasks=["local_animals"], task_manager=manager, bootstrap_iters=0
    )
    found, ours = results["results"]["local_animals"], evaluate_choices(tiny, asked)
    assert found["acc,none"] == pytest.approx(ours.acc)
    assert found["acc_norm,none"] == pytest.approx(ours.acc_norm)
