"""Adapters in PEFT's files: against transformers with the same factors, and PEFT itself where it is
installed.
"""

import collections
import dataclasses
import json
import re
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import expected_tensors, tensors_of
from matrix import rounds
from safetensors.numpy import load_file, save_file
from support import TINY, random_parameters, random_tokens, transformers_config, transformers_model

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.cli import adapters as verb
from llama_jax.errors import InputError
from llama_jax.model.llama import logits
from llama_jax.model.lora import combine, init_adapters, merge
from llama_jax.weights.assemble import ParameterSource, stack, unstack
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.hf_read import NAMES
from llama_jax.weights.load import load
from llama_jax.weights.open import open_model
from llama_jax.weights.peft import (
    CONFIG,
    PICKLE,
    PREFIX,
    TENSORS,
    Adapters,
    places,
    read_adapters,
    save_adapters,
)
from llama_jax.weights.source import MergedSource, oriented


def random_adapters(config=TINY, rank=4, targets=LAYER_MATRICES):
    fresh = jax.eval_shape(lambda key: init_adapters(key, config, rank, targets), jax.random.key(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape).astype(np.float32)), fresh
    )


def loaded(directory):
    """A model of Hugging Face's, stacked, and its architecture."""
    model = load(directory, form="stacked")
    return model.params, model.config


def rewrite(directory, **changes):
    values = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize("form", [stack, unstack], ids=["stacked", "unrolled"])
def test_what_was_written_comes_back(form, tmp_path):
    tree = random_adapters(targets=("wq", "wo", "down"))
    save_adapters(Adapters(form(tree), 2.5, "/models/base"), tmp_path / "out", dropout=0.1)
    back = read_adapters(tmp_path / "out", TINY)
    assert (back.scale, back.base, back.rank) == (2.5, "/models/base", 4)
    jax.tree.map(np.testing.assert_array_equal, back.tree, tree)
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert values["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert (values["r"], values["lora_alpha"], values["lora_dropout"]) == (4, 10.0, 0.1)
    tensor = load_file(tmp_path / "out" / TENSORS)[
        "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    ]
    np.testing.assert_array_equal(tensor, tree["layers"]["feed_forward"]["down"]["a"][2].T)


@pytest.mark.parity
def test_logits_equal_transformers_with_merged_weights_in_float64(tmp_path):
    torch = pytest.importorskip("torch")
    params, tree, tokens = random_parameters(TINY), random_adapters(), random_tokens(TINY, (2, 12))
    save_adapters(Adapters(tree, 2.0), tmp_path / "out")
    model = transformers_model(TINY, params).double()
    state = model.state_dict()
    for name, tensor in load_file(tmp_path / "out" / TENSORS).items():
        if "lora_A" in name:
            up = load_file(tmp_path / "out" / TENSORS)[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            state[weight] += (
                torch.from_numpy(up.astype(np.float64) @ tensor.astype(np.float64)) * 2.0
            )
    with torch.no_grad():
        expected = model(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
    np.testing.assert_allclose(
        logits(combine(params, tree, 2.0), tokens, TINY), expected, atol=2e-4
    )


@pytest.mark.parity
def test_peft_reads_ours_and_we_read_its(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    params, tree, tokens = random_parameters(TINY), random_adapters(), random_tokens(TINY, (2, 12))
    save_adapters(Adapters(tree, 2.0), tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(
        transformers_model(TINY, params), tmp_path / "ours"
    ).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.array(tokens)).long()).logits.numpy()
    np.testing.assert_allclose(logits(combine(params, tree, 2.0), tokens, TINY), theirs, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    back = read_adapters(tmp_path / "theirs", TINY)
    assert back.scale == 2.0
    jax.tree.map(np.testing.assert_array_equal, back.tree, jax.device_get(tree))


def test_a_directory_of_adapters_loads_as_the_merged_model(tiny_directory, tmp_path):
    params, config = loaded(tiny_directory)
    tree = random_adapters(config)
    save_adapters(Adapters(tree, 0.5, str(tiny_directory)), tmp_path / "mine")
    model = load(tmp_path / "mine", form="stacked")
    assert model.origin == "Hugging Face tiny with adapters mine"
    assert model.tokenizer is not None
    assert model.template is not None
    assert model.report.parameters == model.report.expected_parameters
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
        model.params,
        merge(params, tree, 0.5),
    )


def test_merged_into_a_hugging_face_directory(tiny_directory, tmp_path, capsys):
    params, config = loaded(tiny_directory)
    tree = random_adapters(config, targets=("wk", "gate"))
    save_adapters(Adapters(tree, 0.5), tmp_path / "mine")
    assert (
        verb.main(
            [
                "merge",
                str(tiny_directory),
                str(tmp_path / "mine"),
                str(tmp_path / "out"),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert str(tmp_path / "out") in capsys.readouterr().out
    expected = expected_tensors(merge(params, tree, 0.5))
    for name, tensor in tensors_of(tmp_path / "out").items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-6)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny_directory / "tokenizer.json"
    ).read_bytes()


def test_exported_from_a_run(tiny_directory, tmp_path, capsys):
    _, config = loaded(tiny_directory)
    tree = random_adapters(config, targets=("wv",))
    with Checkpoints.open(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        metadata = {
            "adapter": {"rank": 4, "alpha": 2.0},
            "made_from": {"path": str(tiny_directory)},
        }
        checkpoints.save(7, {"params": tree}, {"model": dataclasses.asdict(config), **metadata})
    assert verb.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    back = read_adapters(tmp_path / "out", config)
    assert (back.scale, back.base) == (0.5, str(tiny_directory))
    jax.tree.map(np.testing.assert_array_equal, back.tree, jax.device_get(tree))
    assert (
        verb.main(["merge", str(tiny_directory), str(tmp_path / "run"), str(tmp_path / "merged")])
        == 0
    )
    assert open_model(tmp_path / "merged").source.config == config
    with pytest.raises(InputError, match="adapters 'mix' given; merge or export"):
        verb.main(["mix"])


BROKEN = {
    "peft_type": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "dora": ({"use_dora": True}, "'use_dora' is True"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
    "pattern": ({"alpha_pattern": {"(a+)+": 8}}, "is not known to take little time"),
    "unknown": ({"new_trick": 3}, "'new_trick' is 3"),
    "rank": ({"r": 8}, "misshapen"),
    "no rank": ({"r": None}, "r is missing"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha"),
    "not a number": ({"lora_alpha": float("nan")}, "lora_alpha is nan; a finite number"),
    "no end": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "beyond float32": ({"lora_alpha": 1e300}, "lora_alpha is 1e"),
    "saved": (
        {"modules_to_save": ["lm_head"]},
        "'modules_to_save' names 'lm_head', which the file does not have",
    ),
    "layers": ({"layers_to_transform": ["x"]}, "layers_to_transform is"),
    "tokens": ({"trainable_token_indices": [3]}, "not supported"),
    "dora, advice": ({"use_dora": True}, "merge the adapters with PEFT's merge_and_unload"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_plain_lora_is_refused(kind, tmp_path):
    changes, words = BROKEN[kind]
    save_adapters(Adapters(random_adapters(targets=("wq",)), 2.0), tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(InputError, match=words) as error:
        read_adapters(tmp_path / "out", TINY)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "out") in str(error.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    save_adapters(Adapters(random_adapters(targets=("wq",)), 2.0), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / TENSORS)
    name = next(iter(tensors))
    save_file(
        {key: value for key, value in tensors.items() if key != name}, tmp_path / "out" / TENSORS
    )
    with pytest.raises(InputError, match="1 missing: 'base_model"):
        read_adapters(tmp_path / "out", TINY)
    save_file(
        tensors | {"base_model.model.score.lora_A.weight": np.zeros((4, 4), np.float32)},
        tmp_path / "out" / TENSORS,
    )
    with pytest.raises(InputError, match="1 unexpected: 'base_model"):
        read_adapters(tmp_path / "out", TINY)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="adapter_config"):
        read_adapters(tmp_path / "out", TINY)
    with pytest.raises(InputError, match="dtype 'int8' given"):
        save_adapters(
            Adapters(random_adapters(targets=("wq",)), 2.0), tmp_path / "other", dtype="int8"
        )


def source_of(config, seed=0):
    """A model in memory as a source, and its tensors as PEFT's base would have them, by module."""
    params = random_parameters(config, seed)
    weights = {
        name.removesuffix(".weight"): tensor for name, tensor in expected_tensors(params).items()
    }
    return ParameterSource(config, params), weights


def write_peft(directory, tensors, pickle=False, **values):
    """Files as PEFT writes them: the tensors' names, and those keys of the description that
    matter.
    """
    directory.mkdir()
    described = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": [],
        "modules_to_save": None,
    }
    (directory / CONFIG).write_text(json.dumps(described | values))
    tensors = {
        f"base_model.model.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()
    }
    if pickle:
        torch = pytest.importorskip("torch")
        torch.save(
            {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, directory / PICKLE
        )
    else:
        save_file(tensors, directory / TENSORS)
    return directory


def lora(rng, weights, module, rank):
    """The two factors of a module, by their names in the file, and what they add, without the
    scale.
    """
    outputs, inputs = weights[module].shape
    down, up = (
        rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank))
    )
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, up.astype(
        np.float64
    ) @ down.astype(np.float64)


def placed(config):
    """Path and layer by the name in Hugging Face's files."""
    return {NAMES[path].format(layer): (path, layer) for path, layer in places(config)}


def require_modules(source, weights):
    """That a source has exactly the weights of these modules."""
    for name, (path, layer) in placed(source.config).items():
        read = oriented(path, source.read(path, layer))
        np.testing.assert_allclose(
            read, weights[name.removesuffix(".weight")], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("pickle", [False, True])
def test_ranks_scales_and_layers_of_single_modules(pickle, tmp_path):
    """A regular expression as target, layers left out, patterns by name, by path and by expression;
    the first that matches.
    """
    base, weights = source_of(TINY)
    rng, tensors = np.random.default_rng(3), {}
    rank_of = {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.2.self_attn.q_proj": 4,
        "model.layers.1.mlp.down_proj": 6,
    }
    alpha_of = dict(zip(rank_of, (3.0, 5.0, 8.0)))
    for module, rank in rank_of.items():
        factors, added = lora(rng, weights, module, rank)
        tensors |= factors
        weights[module] = weights[module] + added * alpha_of[module] / rank
    rank_pattern = {"model.layers.1.self_attn.q_proj": 2, "down_proj": 6}
    alpha_pattern = {r"layers\.1\.self_attn\.(q|k)_proj": 3.0, "q_proj": 5.0}
    directory = write_peft(
        tmp_path / "out",
        tensors,
        pickle,
        target_modules=r".*\.(q_proj|down_proj)",
        layers_to_transform=[1, 2],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    require_modules(MergedSource(base, read_adapters(directory, TINY)), weights)


def test_layers_that_are_listed_and_missing(tmp_path):
    weights = source_of(TINY)[1]
    tensors = lora(np.random.default_rng(1), weights, "model.layers.1.mlp.up_proj", 4)[0]
    directory = write_peft(
        tmp_path / "one", tensors, target_modules=["up_proj"], layers_to_transform=1
    )
    assert (
        read_adapters(directory, TINY).tree["layers"]["feed_forward"]["up"]["a"].shape[0]
        == TINY.layers
    )
    with pytest.raises(
        InputError,
        match=r"missing: 'base_model\.model\.model\.layers\.0\.mlp\.up_proj\.lora_A\.weight'",
    ):
        read_adapters(write_peft(tmp_path / "all", tensors, target_modules=["up_proj"]), TINY)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_embedding_and_head(tied, tmp_path):
    """As in PEFT a tied head does not follow the embedding."""
    config = dataclasses.replace(TINY, tied_head=tied)
    base, weights = source_of(config)
    rng, embedding = np.random.default_rng(4), "model.embed_tokens"
    weights.setdefault("lm_head", weights[embedding])
    factors, added = lora(rng, weights, "lm_head", 4)
    vectors, lookup = (
        rng.normal(0, 0.3, (4, config.vocab_size)),
        rng.normal(0, 0.3, (config.dim, 4)),
    )
    tensors = factors | {
        f"{embedding}.lora_embedding_A": vectors.astype(np.float32),
        f"{embedding}.lora_embedding_B": lookup.astype(np.float32),
    }
    directory = write_peft(tmp_path / "out", tensors, target_modules=["embed_tokens", "lm_head"])
    weights["lm_head"] = weights["lm_head"] + added * 2
    weights[embedding] = weights[embedding] + (lookup @ vectors).T * 2
    merged = MergedSource(base, read_adapters(directory, config))
    assert merged.config == TINY
    require_modules(merged, weights)


@pytest.mark.parametrize("ending", ["weight", "modules_to_save.weight", "base_layer.weight"])
def test_a_resized_vocabulary(ending, tmp_path):
    base, weights = source_of(TINY)
    rng, larger = np.random.default_rng(5), TINY.vocab_size + 3
    for module in ("model.embed_tokens", "lm_head"):
        weights[module] = rng.normal(0, 1, (larger, TINY.dim)).astype(np.float32)
    saved = {f"{module}.{ending}": weights[module] for module in ("model.embed_tokens", "lm_head")}
    named = None if ending == "base_layer.weight" else ["embed_tokens", "lm_head"]
    merged = MergedSource(
        base, read_adapters(write_peft(tmp_path / "out", saved, modules_to_save=named), TINY)
    )
    assert merged.config == dataclasses.replace(TINY, vocab_size=larger)
    require_modules(merged, weights)
    one = {f"model.embed_tokens.{ending}": weights["model.embed_tokens"]}
    with pytest.raises(
        InputError,
        match=f"resized from {TINY.vocab_size} to {larger}, and there is no head of that size",
    ):
        read_adapters(write_peft(tmp_path / "half", one), TINY)


@pytest.mark.parity
def test_a_vocabulary_resized_and_saved_by_peft(tmp_path):
    """Embedding and head in `modules_to_save` after `resize_token_embeddings`: PEFT writes each
    under two names, and what it replaced.
    """
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    base, _ = source_of(TINY)
    model = transformers_model(TINY, random_parameters(TINY))
    model.resize_token_embeddings(TINY.vocab_size + 3)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    theirs = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0)
                )
    transformers_config(TINY).save_pretrained(tmp_path)  # PEFT compares the size with the base's
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path)
    theirs.save_pretrained(tmp_path)
    merged = MergedSource(base, read_adapters(tmp_path, TINY))
    assert merged.config == dataclasses.replace(TINY, vocab_size=TINY.vocab_size + 3)
    state = theirs.merge_and_unload().state_dict()
    require_modules(
        merged, {name.removesuffix(".weight"): tensor.numpy() for name, tensor in state.items()}
    )
    stored = load_file(tmp_path / TENSORS)
    assert {name.split("lm_head")[1] for name in stored if "lm_head" in name} >= {
        ".weight",
        ".modules_to_save.weight",
        ".original_module.weight",
    }
    save_file(stored | {f"{PREFIX}lm_head.weight": np.zeros((100, 48), "f4")}, tmp_path / TENSORS)
    with pytest.raises(InputError, match=r"lm_head.weight' and .*modules_to_save.weight' differ"):
        read_adapters(tmp_path, TINY)


@pytest.mark.parametrize("modules", [("model.embed_tokens", "lm_head"), ("model.embed_tokens",)])
@pytest.mark.parametrize("more", [0, 3])
def test_adapters_over_a_tied_table_that_is_in_the_file(modules, more, tmp_path):
    """PEFT writes the table, once for each module that is adapted: the head is that table with the
    head's adapters, not with the embedding's.
    """
    config = dataclasses.replace(TINY, tied_head=True)
    (base, weights), rng = source_of(config), np.random.default_rng(7)
    table = weights["model.embed_tokens"]
    table = np.concatenate([table, rng.normal(0, 1, (more, config.dim)).astype(np.float32)])
    weights |= {"model.embed_tokens": table, "lm_head": table}
    tensors = {f"{module}.base_layer.weight": table for module in modules}
    for module in modules:
        factors, added = lora(rng, weights, module, 4)
        weights[module] = weights[module] + added * 2
        if module == "model.embed_tokens":
            down, up = (factors[f"{module}.lora_{which}.weight"] for which in "AB")
            factors = {f"{module}.lora_embedding_A": up.T, f"{module}.lora_embedding_B": down.T}
        tensors |= factors
    names = [module.split(".")[-1] for module in modules]
    merged = MergedSource(
        base, read_adapters(write_peft(tmp_path / "out", tensors, target_modules=names), config)
    )
    assert merged.config == dataclasses.replace(TINY, vocab_size=TINY.vocab_size + more)
    require_modules(merged, weights)


def test_saved_modules_of_several_matrices(tmp_path):
    base, weights = source_of(TINY)
    rng, tensors = np.random.default_rng(8), {}
    for module in weights:
        if ".mlp." in module:
            weights[module] = rng.normal(0, 1, weights[module].shape).astype(np.float32)
            tensors[f"{module}.weight"] = weights[module]
    directory = write_peft(tmp_path / "out", tensors, modules_to_save=["mlp"])
    require_modules(MergedSource(base, read_adapters(directory, TINY)), weights)
    rewrite(directory, modules_to_save=["mlp", "self_attn"])
    with pytest.raises(InputError, match="'modules_to_save' names 'self_attn'"):
        read_adapters(directory, TINY)


@pytest.mark.parametrize(
    ("saved", "tied"),
    [
        (("model.embed_tokens",), False),
        (("lm_head",), False),
        (("model.embed_tokens", "lm_head"), True),
    ],
)
def test_whole_tensors_of_a_tied_model(saved, tied, tmp_path):
    """A tied head stays what it was where the embedding alone is saved, and is tied where both are
    and are equal.
    """
    config = dataclasses.replace(TINY, tied_head=True)
    base, weights = source_of(config)
    weights["lm_head"] = weights["model.embed_tokens"]
    new = np.random.default_rng(6).normal(0, 1, (config.vocab_size, config.dim)).astype(np.float32)
    weights |= dict.fromkeys(saved, new)
    names = [module.split(".")[-1] for module in saved]
    directory = write_peft(
        tmp_path / "out", {f"{module}.weight": new for module in saved}, modules_to_save=names
    )
    merged = MergedSource(base, read_adapters(directory, config))
    assert merged.config.tied_head is tied
    require_modules(merged, weights)


def test_a_tokenizer_beside_adapters_is_theirs(tiny_directory, tmp_path):
    """And so is the chat template; an export takes both along."""
    _, config = loaded(tiny_directory)
    save_adapters(Adapters(random_adapters(config), 0.5, str(tiny_directory)), tmp_path / "mine")
    state = json.loads((tiny_directory / "tokenizer.json").read_text())
    state["added_tokens"].append(
        state["added_tokens"][-1] | {"id": config.vocab_size + 5, "content": "<|new|>"}
    )
    (tmp_path / "mine" / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "mine" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    opened = open_model(tmp_path / "mine")
    assert "<|new|>" in opened.tokenizer.special_tokens
    assert opened.template.source == "{{ messages[0]['content'] }}!"
    assert (
        verb.main(["merge", str(tiny_directory), str(tmp_path / "mine"), str(tmp_path / "out")])
        == 0
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()


def test_scales_of_rank_stabilised_adapters(tmp_path):
    save_adapters(Adapters(random_adapters(targets=("wq",)), 2.0), tmp_path / "out")
    rewrite(tmp_path / "out", use_rslora=True)
    assert read_adapters(tmp_path / "out", TINY).scale == 8.0 / 2  # alpha / sqrt(r)


def test_a_base_that_is_not_here_is_named(tmp_path):
    save_adapters(
        Adapters(random_adapters(targets=("wq",)), 2.0, "meta-llama/Llama-3.2-1B"), tmp_path / "out"
    )
    with pytest.raises(
        InputError,
        match=r"names the model 'meta-llama/Llama-3.2-1B', not here; name it: adapters merge",
    ):
        load(tmp_path / "out")
    rewrite(tmp_path / "out", base_model_name_or_path="x" * 100_000)
    with pytest.raises(InputError, match="not here") as error:
        load(tmp_path / "out")
    assert len(str(error.value)) < 500
    rewrite(tmp_path / "out", base_model_name_or_path=str(tmp_path / "out"))
    with pytest.raises(InputError, match="not here"):
        load(tmp_path / "out")


ABSURD = [
    "-1",
    "0",
    "1e400",
    "1" * 400,
    "null",
    "true",
    '""',
    "[]",
    "{}",
    "[" * 900 + "]" * 900,
    "NaN",
    '"../../x"',
    '"LORA"',
]


def mutated(data, random):
    """Bytes flipped, cut short, or one value of the JSON told otherwise."""
    way, at = random.integers(4), int(random.integers(min(len(data), 1500)))
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes([random.integers(256)]) + data[at + 1 :]
    if way == 2:
        return (
            data[:at]
            + int(random.choice([0, 2**31, 2**40, 2**63])).to_bytes(8, "little")
            + data[at + 8 :]
        )
    values = [
        match.span(1)
        for match in re.finditer(
            rb'(?<=[:\[,])\s*(\d[\d.e+-]*|"[^"]*"|true|false|null)', data[:9000]
        )
    ]
    start, end = values[random.integers(len(values))]
    return data[:start] + ABSURD[random.integers(len(ABSURD))].encode() + data[end:]


def outcome_of(directory):
    """Read, or refused in one line; what is read has finite numbers to be scaled by."""
    try:
        assert np.isfinite(read_adapters(directory, TINY).scale)
    except InputError as error:
        return (
            "refused" if len(str(error)) < 2000 and "\n" not in str(error) else "refused at length"
        )
    return "read"


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_mutated_adapters_are_read_or_refused(name, tmp_path):
    save_adapters(Adapters(random_adapters(targets=("wq",)), 2.0), tmp_path / "out")
    count, random, data = (
        rounds(250, 1000),
        np.random.default_rng(5),
        (tmp_path / "out" / name).read_bytes(),
    )
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcomes = collections.Counter()
    for _ in range(count):
        (tmp_path / "out" / name).unlink()  # the old one may still be mapped: it must not shrink
        (tmp_path / "out" / name).write_bytes(mutated(data, random))
        outcomes[outcome_of(tmp_path / "out")] += 1
    assert outcomes.keys() == {"read", "refused"}
    assert min(outcomes.values()) > count / 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert time.process_time() - started < 20
