"""What kind of model lies at a path, and its parts ready to be read: only headers and small files
are looked at.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, template_from_directory, template_from_gguf
from llama_jax.text.formats import format_for
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.stops import (
    declared_stop_ids,
    declared_stop_ids_from_gguf,
    end_of_turn_ids,
    stop_ids,
)
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hf_read import HuggingFaceSource, inside
from llama_jax.weights.meta import MetaSource
from llama_jax.weights.run import (
    RUN_CHECKPOINTS,
    RunSource,
    has_adapters,
    origin_of,
    run_config,
    run_manifest,
)
from llama_jax.weights.source import CONFIG as ADAPTERS_CONFIG
from llama_jax.weights.source import MergedSource, Source, blamed_on, json_object, shown

if TYPE_CHECKING:
    from llama_jax.weights.peft import Adapters


# --- hub ---
#
# Models by their name on the Hugging Face Hub, fetched by its own client into its own cache (extra
# `hf`).
#
# What the client is told by the environment holds here too: where the cache is, whether to stay
# offline, who is asking.


_NAME = re.compile(r"([a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)

# What a model is made of; nothing else of a repository is fetched.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)  # where there is no safetensors

# By the name of the client's error.
_REASONS = {
    "GatedRepoError": "its licence has to be accepted there first, and you logged in with: hf auth "
    "login",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached or offline "
    "mode "
    "is "
    "set",
    "OfflineModeIsEnabled": "it is not in the cache, and offline mode is set",
    "RepositoryNotFoundError": "no such model, or one for which you have to be logged in",
    "RevisionNotFoundError": "no such revision of it",
}


def names_model(path: pathlib.Path) -> bool:
    """Whether a path that leads nowhere may be a name such as `meta-llama/Llama-3.2-1B`, with
    `@revision` or without.

    A path into a folder that is there is a path: a slip of the pen in it asks nobody on the
    network.
    """
    return (
        _NAME.fullmatch(path.as_posix()) is not None
        and not path.exists()
        and not path.parent.exists()
    )


def fetch(path: pathlib.Path) -> pathlib.Path:
    """The directory of a model by its name, from the client's cache or, where that lacks a file,
    from the Hub.

    Raises:
      InputError: if the client is not installed, or cannot get the model: no such name, no network,
        no permission.
    """
    match = _NAME.fullmatch(path.as_posix())
    if match is None:
        raise InputError(
            f"{path}: a name such as meta-llama/Llama-3.2-1B or one with @revision expected"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        advice = (
            "to fetch a model of that name from the Hugging Face Hub: pip install 'llama-jax[hf]'"
        )
        raise InputError(f"{path}: nothing there; {advice}") from None
    try:
        found = pathlib.Path(
            snapshot_download(match[1], revision=match[2], allow_patterns=list(_FILES))
        )
        if not any(found.glob("model*.safetensors")):
            snapshot_download(match[1], revision=match[2], allow_patterns=[*_FILES, *_PICKLES])
        return found
    except (
        Exception
    ) as error:  # the client's own, those of its HTTP library, those of the file system
        reason = _REASONS.get(type(error).__name__, f"{type(error).__name__}: {shown(str(error))}")
        raise InputError(
            f"{path}: nothing there, and not to be had from the Hugging Face Hub by that "
            f"name ({reason})"
        ) from None


# --- open ---


Format = Literal["run", "hugging_face", "meta", "gguf"]

_MADE_FROM = "made_from"  # in the metadata of a run: the report on the model that it began with
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What lies beside the weights of a directory of Hugging Face's.
_BESIDE = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *_TOKENIZER_FILES,
)
_KINDS = (
    "a run directory, a directory with config.json (Hugging Face) or params.json (Meta), a "
    ".gguf file, or a name on the Hub"
)
_PART_SUFFIXES = (".safetensors", ".json", ".pth", ".bin", ".pt", ".model")


class Opened(NamedTuple):
    """A model on disk, its weights not read yet.

    Attributes:
      source: the weights, tensor by tensor, and the architecture (`source.config`).
      tokenizer: text to ids and back; `None` where the files hold none.
      template: how the model wants a conversation written; `None` if its files say nothing.
      stop_ids: tokens that end a text.
      format: which kind of files it is.
      path: where it is.
      origin: one line that describes it, for people.
      beside: where the files of its tokenizer are, if not at `path`.
      rewritten: whether the tokenizer is another than that of the files.
    """

    source: Source
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    format: Format
    path: pathlib.Path
    origin: str
    beside: pathlib.Path | None = None
    rewritten: bool = False


def open_model(path: str | pathlib.Path) -> Opened:
    """Opens a run directory of `train.py`, a directory of Hugging Face's, of Meta's or of PEFT's,
    or a GGUF file.

    Of a GGUF model in several files any part will do. A name such as `meta-llama/Llama-3.2-1B`,
    with `@revision` or without, where there is no such path, is that of a model on the Hugging Face
    Hub; see `llama_jax.weights.open`. A directory of adapters (PEFT's, or a run of them) is the
    model that they were made for, with them merged.

    Names, shapes and types of all tensors are checked; no weight is read but adapters.

    Raises:
      InputError: for a path that holds none of these, and naming whatever is wrong inside.
      CorruptError: when the manifests of all checkpoints of a run are damaged.
    """
    path = pathlib.Path(path)
    try:
        if names_model(path):
            return _open_hugging_face(fetch(path))._replace(
                origin=f"Hugging Face {path.as_posix()}"
            )
        return _opener(path)(path)
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be read ({error.strerror or error})"
        ) from None


def verified(opened: Opened) -> Opened:
    """The same, and where it is a run, its parameters read and verified: the origin names the
    checkpoint that is whole.

    Raises:
      CorruptError: when all checkpoints are damaged.
    """
    if not isinstance(opened.source, RunSource):
        return opened
    return opened._replace(origin=origin_of(opened.source.directory, opened.source.verified))


def _opener(path: pathlib.Path) -> Callable[[pathlib.Path], Opened]:
    """What opens the kind of model that lies at a path."""
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf
    if (path / RUN_CHECKPOINTS).is_dir():
        return _open_run
    if (path / "config.json").is_file():
        return _open_hugging_face
    if (path / ADAPTERS_CONFIG).is_file():
        return _open_adapted
    if (path / "params.json").is_file() and any(path.glob("consolidated*.pth")):
        return _open_meta
    raise InputError(f"{path}: {_found(path)}")


def _found(path: pathlib.Path) -> str:
    """What is at a path that is no model, and what to do."""
    if path.is_file() and path.suffix in _PART_SUFFIXES:
        return f"one file of a model given; give its directory, {path.parent}"
    if path.is_dir() and RUN_CHECKPOINTS in (path.absolute().name, path.absolute().parent.name):
        run = path if path.absolute().name == RUN_CHECKPOINTS else path.parent
        return f"the checkpoints of a run given; give the directory of the run, {run.parent}"
    if not path.exists():
        return f"no such file or directory; {_KINDS} expected"
    return (
        f"{'a directory without a model' if path.is_dir() else 'another file'} given; "
        f"{_KINDS} expected"
    )


def _open_gguf(path: pathlib.Path) -> Opened:
    source = GgufSource.open(path)
    metadata = source.file.metadata
    # `none` and `no_vocab`: what llama.cpp calls a file of weights alone.
    alone = metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab")
    with blamed_on(path):
        tokenizer = None if alone else tokenizer_from_gguf(metadata)
        template = None if alone else template_from_gguf(metadata)
    declared = declared_stop_ids_from_gguf(metadata)
    stops = _stops(tokenizer, template, declared) if tokenizer else tuple(sorted(set(declared)))
    return Opened(source, tokenizer, template, stops, "gguf", path, f"GGUF {path.absolute().name}")


def _open_hugging_face(path: pathlib.Path) -> Opened:
    source = HuggingFaceSource.open(path)
    with blamed_on(path):
        for name in _BESIDE:
            inside(path, name)
    tokenizer = (
        load_tokenizer(path) if any((path / name).is_file() for name in _TOKENIZER_FILES) else None
    )
    declared, template = declared_stop_ids(path), template_from_directory(path)
    stops = _stops(tokenizer, template, declared) if tokenizer else tuple(sorted(set(declared)))
    return Opened(
        source,
        tokenizer,
        template,
        stops,
        "hugging_face",
        path,
        f"Hugging Face {path.absolute().name}",
    )


def _stops(
    tokenizer: Tokenizer, template: ChatTemplate | None, declared: tuple[int, ...]
) -> tuple[int, ...]:
    """The stops that are declared or known, and of tokens that only the template makes special the
    one that ends turns.
    """
    promoted = {tokenizer.special_tokens[token] for token in getattr(tokenizer, "promoted", ())}
    ends = end_of_turn_ids(tokenizer, template) if promoted else ()
    return stop_ids(tokenizer, [*declared, *promoted.intersection(ends)])


def merged(base: Opened, adapters: "Adapters", path: pathlib.Path) -> Opened:
    """An opened model with adapters from `path` merged into its weights as they are read.

    A tokenizer or a chat template beside the adapters takes the place of the model's, whose stops
    stay.
    """
    source = MergedSource(base.source, adapters)
    untied = (
        ", its head no longer tied to the embedding"
        if base.source.config.tied_head > source.config.tied_head
        else ""
    )
    opened = base._replace(
        source=source, origin=f"{base.origin} with adapters {path.absolute().name}{untied}"
    )
    if (path / RUN_CHECKPOINTS).is_dir():
        return opened
    template = template_from_directory(path) or base.template
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return opened._replace(template=template)
    tokenizer = load_tokenizer(path)
    stops = _stops(
        tokenizer, template, tuple(token for token in base.stop_ids if token < tokenizer.vocab_size)
    )
    return opened._replace(tokenizer=tokenizer, template=template, stop_ids=stops, beside=path)


def base_of(path: pathlib.Path) -> pathlib.Path | None:
    """Where the model is that a directory of adapters belongs to; `None` for every other kind of
    model.

    Raises:
      InputError: if it is not where the description says.
    """
    return (
        _base_of(path)
        if (path / ADAPTERS_CONFIG).is_file() and _opener(path) is _open_adapted
        else None
    )


def _base_of(path: pathlib.Path) -> pathlib.Path:
    with blamed_on(path):
        named = json_object(inside(path, ADAPTERS_CONFIG)).get("base_model_name_or_path")
        base = _place_of(named, path) if isinstance(named, str) and named else None
        if base is None or (base / ADAPTERS_CONFIG).is_file():
            raise InputError(
                f"{ADAPTERS_CONFIG} names the model {shown(named)}, not here; name it: "
                f"adapters merge MODEL {path} DST"
            )
    return base


def _open_adapted(path: pathlib.Path) -> Opened:
    opened = open_model(_base_of(path))
    from llama_jax.weights.peft import (
        read_adapters,
    )  # it needs JAX, as opening a model otherwise does not

    return merged(opened, read_adapters(path, opened.source.config), path)


def _place_of(named: str, adapters: pathlib.Path) -> pathlib.Path | None:
    """Where the model of adapters is: as they name it, from here or from their directory; `None` if
    it is gone.
    """
    places = (pathlib.Path(named), adapters / named)
    return next(
        (place for place in places if os.path.exists(place)), None
    )  # also where no path is so long


def _open_meta(path: pathlib.Path) -> Opened:
    """Meta's files do not tell instruct models from base ones: a template only where the tokenizer
    has the tokens of one.
    """
    source = MetaSource.open(path)
    folders = (
        path,
        path.absolute().parent,
    )  # shared by all sizes of a release, it may lie above them
    tokenizers = (
        folder / "tokenizer.model" for folder in folders if (folder / "tokenizer.model").is_file()
    )
    tokenizer = next(map(load_tokenizer, tokenizers), None)
    template = format_for(tokenizer) if tokenizer else None
    stops = stop_ids(tokenizer) if tokenizer else ()
    return Opened(source, tokenizer, template, stops, "meta", path, f"Meta {path.absolute().name}")


def _open_run(path: pathlib.Path) -> Opened:
    manifest = run_manifest(path)
    if has_adapters(manifest):
        return _open_adapter_run(path, run_config(path, manifest))
    source = RunSource.open(path)
    tokenizer = load_tokenizer(
        path
    )  # with a template beside it, if the run was one of conversations
    template = template_from_directory(path)
    origin = f"run {path.absolute().name} at step {source.manifest.step}"
    stops = _stops(tokenizer, template, _inherited_stops(source, tokenizer))
    return Opened(source, tokenizer, template, stops, "run", path, origin)


def _open_adapter_run(path: pathlib.Path, config: LlamaConfig) -> Opened:
    """A run of adapters: the model that it began with, with them merged, and the words of the
    run.
    """
    from llama_jax.weights.peft import (
        restore_adapters,
    )  # it needs Orbax, which takes seconds to import

    adapters, restored = restore_adapters(path)
    named = adapters.base or ""
    place = _place_of(named, path) or pathlib.Path(named)
    if not os.path.exists(place) and not names_model(place):
        raise InputError(
            f"{path}: adapters of the model {shown(named)}, not here; name it: adapters "
            f"merge MODEL {path} DST"
        )
    base = open_model(place)
    if base.source.config != config:
        raise InputError(
            f"{path}: adapters of another model than {place} is now; name theirs: "
            f"adapters merge MODEL {path} DST"
        )
    tokenizer, template = load_tokenizer(path), template_from_directory(path)
    return merged(base, adapters, path)._replace(
        tokenizer=tokenizer,
        template=template,
        stop_ids=_stops(tokenizer, template, base.stop_ids),
        origin=f"{base.origin} with adapters of {origin_of(path, restored)}",
    )


def _inherited_stops(source: RunSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The stops of the model that a run began with, as far as they are the same tokens here."""
    made_from = source.manifest.metadata.get(_MADE_FROM)
    stops = made_from.get("stops") if isinstance(made_from, dict) else None
    if not isinstance(stops, dict):
        return ()
    texts = dict(enumerate(tokenizer.token_bytes.pieces)) | {
        token: text.encode() for text, token in tokenizer.special_tokens.items()
    }
    same = (
        token
        for token, text in texts.items()
        if stops.get(str(token)) == text.decode(errors="replace")
    )
    return tuple(same)
