"""The command line of `train.py`: YAML files, dotted overrides, strict keys and types.

jsonargparse checks the types, builds the dataclasses and writes the help. The merge of files and
flags is done here, before it, because its own messages name neither the file nor the nearest key,
and because here flags win over files in whatever order they come and the name of a preset may stand
for a whole model.
"""

import argparse
import dataclasses
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.formatting import one_line
from llama_jax.presets import preset
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import SourceConfig

Pair = tuple[str, object]  # a dotted key and its value; the value {} opens a section
Architecture = Callable[[str], LlamaConfig | None]  # of the model at a path

_LARGEST_FILE = 1 << 20  # bytes: a run needs a few kilobytes
_SWITCHES = ("help", "print_config")
_TEXT_TAG, *_NUMBER_TAGS = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))
_SHORT = {"profile": "run.profile"}
_SECTIONS: dict[str, type] = typing.get_type_hints(TrainConfig)
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
    tuple[str, ...]: "a list such as [a, b]",
    tuple[
        SourceConfig, ...
    ]: "a list such as [{path: a, weight: 2}, {path: b}] (path, weight, name)",
    tuple[tuple[int, int], ...]: "pairs of whole numbers such as [[100, 200]]",
}


def parse_train(
    arguments: list[str], default: Path, architecture: Architecture | None = None
) -> TrainConfig:
    """The run that a command line describes.

    Args:
      arguments: words after the program's name: `--config FILE` (several are merged, later ones
        win) and overrides `--section.key VALUE`, `--section.key=VALUE` or `section.key=VALUE`,
        which win over all files.
      default: the YAML file taken when no `--config` is given.
      architecture: from the path of a model on disk (`run.init`) to its numbers, which take the
        place of the files' model; `None` leaves that.

    Raises:
      InputError: one line naming the key or the file, for an unknown key (with the nearest known
        one), a value of the wrong type or out of range, and a file that is missing or is not plain
        YAML.
      SystemExit: with status 0, after `--help` and `--print_config`.
    """
    pairs = _split_arguments(arguments)
    switches = {key for key, _ in pairs if key in _SWITCHES}
    if "help" in switches:
        _parser(default).print_help()
        raise SystemExit(0)
    files = [Path(str(value)) for key, value in pairs if key == "config"] or [default]
    # A section as a whole (--model PRESET) comes before its keys, so that the order of the flags
    # does not matter.
    overrides = sorted(
        [pair for pair in pairs if pair[0] not in ("config", *_SWITCHES)],
        key=lambda pair: "." in pair[0],
    )
    given = [pair for path in files for pair in _read_file(path)]
    config = _build(_merge(_adopted(given, _checked(overrides), architecture)), default)
    if "print_config" in switches:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_yaml(config: TrainConfig) -> str:
    """The config as YAML that `parse_train` reads back equal."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _known_keys(config_class: type, prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Dotted keys of all fields with their types, sections before their keys."""
    for name, hint in typing.get_type_hints(config_class).items():
        yield f"{prefix}{name}", hint
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                yield from _known_keys(typing.cast(type, kind), f"{prefix}{name}.")


_KEYS = dict(_known_keys(TrainConfig))
_PARENTS = {key.rpartition(".")[0] for key in _KEYS} - {""}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without its traps: keys given twice, numbers in minutes, aliases of more
    than memory holds.
    """

    def resolve(self, kind: type[yaml.Node], value: typing.Any, implicit: typing.Any) -> str:
        """The type of a node; `10:15` is a text, as YAML 1.2 has it, and not 615."""
        tag = super().resolve(kind, value, implicit)
        return (
            _TEXT_TAG if kind is yaml.ScalarNode and tag in _NUMBER_TAGS and ":" in value else tag
        )

    def compose_node(self, parent: yaml.Node | None, index: typing.Any) -> yaml.Node | None:
        """A node of the file that is no alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias is not accepted", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping whose keys are all different."""
        keys = [key for key, _ in node.value]
        for index, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:index]):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _split_arguments(arguments: list[str]) -> list[tuple[str, str]]:
    """The (key, value) pairs of a command line; switches have the value ""."""
    pairs, words = [], ["--help" if word == "-h" else word for word in arguments]
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and not equals:
            raise InputError(
                f"argument {word!r} is unknown; an override is written --section.key VALUE"
            )
        if not equals and key not in _SWITCHES:
            if not words or words[0].startswith("--"):
                raise InputError(f"--{key}: nothing given, a value expected, as in --{key} VALUE")
            value = words.pop(0)
        pairs.append((_SHORT.get(key, key), value))
    return pairs


def _read_file(path: Path) -> list[Pair]:
    """The pairs that a YAML file holds."""
    values = _load_yaml(path, _read_text(path))
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: {reprlib.repr(values)} given, a mapping of sections "
            f"({', '.join(_SECTIONS)}) expected"
        )
    return list(_flatten(values, f"{path}: "))


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise InputError(
                f"{path}: {size} bytes given, a config of at most {_LARGEST_FILE} expected"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); --config takes the path of a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not UTF-8 text; --config takes the path of a YAML file"
        ) from None


def _load_yaml(path: Path, text: str) -> object:
    """The plain data of a YAML text; no tag can run code."""
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(
            f"{path}{line}: plain YAML expected ({one_line(error.problem or 'damaged')})"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: plain YAML expected ({one_line(str(error))})") from None


def _flatten(values: Mapping, where: str, prefix: str = "") -> Iterator[Pair]:
    """The pairs of nested mappings, each key known."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        _check_key(key, where)
        if key in _PARENTS and isinstance(value, Mapping):
            yield key, {}
            yield from _flatten(value, where, f"{key}.")
        else:
            yield key, value


def _checked(pairs: list[tuple[str, str]]) -> list[Pair]:
    for key, _ in pairs:
        _check_key(key, "")
    return list(pairs)


def _check_key(key: str, where: str) -> None:
    if key in _KEYS:
        return
    leaf = key.rpartition(".")[2]
    near = [known for known in _KEYS if known.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
    advice = f"the nearest is {near[0]}" if near else f"the sections are {', '.join(_SECTIONS)}"
    raise InputError(f"{where}key {key!r} is unknown; {advice}")


def _adopted(
    pairs: list[Pair], overrides: list[Pair], architecture: Architecture | None
) -> list[Pair]:
    """The pairs of files and command line; with `run.init`, the numbers of that model in place of
    the files'.
    """
    init = next((value for key, value in reversed(pairs + overrides) if key == "run.init"), None)
    numbers = (
        architecture(init) if isinstance(init, str) and architecture and init != "null" else None
    )
    if numbers is None:
        return pairs + overrides
    model: list[Pair] = list(_flatten({"model": dataclasses.asdict(numbers)}, f"{init}: "))
    return model + [pair for pair in pairs if pair[0].partition(".")[0] != "model"] + overrides


def _merge(pairs: list[Pair]) -> dict:
    """One nested dict of all pairs, later ones winning; the name of a preset becomes its
    numbers.
    """
    config: dict = {}
    for key, value in pairs:
        if key == "model" and isinstance(value, str):
            value = dataclasses.asdict(preset(value))
        elif key in _SECTIONS and value != {}:
            raise InputError(
                f"{key}: {reprlib.repr(value)} given, {_expected(_KEYS[key])} expected"
            )
        _assign(config, key, value)
    return config


def _assign(config: dict, key: str, value: object) -> None:
    """Sets one dotted key; a section is opened where there was none, or null."""
    *parents, leaf = key.split(".")
    for name in parents:
        config = _open_section(config, name)
    if value == {}:
        _open_section(config, leaf)
    else:
        config[leaf] = value


def _open_section(config: dict, name: str) -> dict:
    if not isinstance(config.get(name), dict):
        config[name] = {}
    return config[name]


def _build(values: dict, default: Path) -> TrainConfig:
    """The dataclasses of nested values, their types checked by jsonargparse."""
    parser = _parser(default)
    try:
        sections = parser.instantiate(parser.parse_object(values))
    except InputError as error:
        raise InputError(_with_section(str(error))) from None
    except (ArgumentError, ValueError) as error:
        raise InputError(_explain(str(error), values)) from None
    return TrainConfig(**{name: sections[name] for name in _SECTIONS})


def _with_section(message: str) -> str:
    """The model's own errors name its fields without the section."""
    of_model = message.partition(":")[0].partition(".")[0] in typing.get_type_hints(LlamaConfig)
    return f"model.{message}" if of_model else message


def _explain(message: str, values: dict) -> str:
    """One line for an error of jsonargparse: the key, the value given, the kind expected."""
    missing = re.search(r"arguments are required: (.*)", message)
    if missing and "Parser key" not in message:
        ways = (
            "every number of the model, a preset as in --model llama3.2-1b, or a model on "
            "disk as in --run.init PATH"
        )
        return f"{one_line(missing[1])} missing; give {ways}"
    ours = re.search(r"^ *- (\S+: .* given, .* expected.*)$", message, re.MULTILINE)
    if (
        ours
    ):  # an InputError of a nested dataclass, among the alternatives that jsonargparse has tried
        return _with_section(ours[1])
    found = re.search(r'Parser key "([\w.]+)"', message)
    if not found or found[1] not in _KEYS:
        return one_line(message)
    value: typing.Any = values
    for name in found[1].split("."):
        value = value[name] if isinstance(value, dict) and name in value else value
    return f"{found[1]}: {reprlib.repr(value)} given, {_expected(_KEYS[found[1]])} expected"


def _expected(hint: typing.Any) -> str:
    """A type in words."""
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(hint))}"
    choices = typing.get_args(hint)
    literal = typing.get_origin(hint) is typing.Literal
    return " or ".join(choices if literal else [_expected(choice) for choice in choices])


def _parser(default: Path) -> ArgumentParser:
    """The parser of jsonargparse: a group a section, titles and help from the docstrings of the
    dataclasses.
    """
    parser = ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        description="Train a LLaMA.",
        usage="train.py [--config FILE] [--section.key VALUE ...]",
    )
    later = f"YAML file; several are merged, later ones win (default: {default})"
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=later)
    parser.add_argument(
        "--print_config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the resolved config",
    )
    for section, kind in _SECTIONS.items():
        parser.add_class_arguments(kind, section)
        typing.cast(dict, parser.groups)[section].title = (
            (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        )
    texts = {
        key: text
        for section, kind in _SECTIONS.items()
        for key, text in _attribute_texts(section, kind)
    }
    for action in parser._actions:
        action.help = _help_text(action, texts)
    return parser


def _attribute_texts(section: str, kind: type) -> Iterator[tuple[str, str]]:
    """The entries under `Attributes:` of a docstring, by dotted key."""
    for name, text in re.findall(
        r"^      (\w+): (.*(?:\n        .*)*)", kind.__doc__ or "", re.MULTILINE
    ):
        yield f"{section}.{name}", one_line(text).rstrip(".")


def _help_text(action: argparse.Action, texts: Mapping[str, str]) -> str | None:
    if action.dest == "model":
        return "name of a preset, such as llama3.2-1b, in place of all the numbers"
    if action.dest in _SECTIONS or action.dest.endswith(".help"):
        return argparse.SUPPRESS
    return texts.get(action.dest, action.help)
