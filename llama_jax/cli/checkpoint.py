"""`checkpoint`: what checkpoints a run has, and whether each of them is what was saved."""

import json
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_jax.cli.main import DAMAGED
from llama_jax.cli.options import OptionParser
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.weights.restore import CheckpointState

_ACTIONS = ("list", "verify")
_USAGE = (
    "llama-jax checkpoint list RUN [--json] | llama-jax checkpoint verify RUN [--step N] [--json]"
)


def make_parser(prog: str, action: str) -> OptionParser:
    """The options of one action."""
    if action == "list":
        parser = OptionParser(f"{prog} list", "List the checkpoints of a run; arrays are not read.")
    else:
        parser = OptionParser(
            f"{prog} verify",
            "Read every array of a run's checkpoints and compare it with its checksum.",
        )
        parser.add_argument("--step", type=int, metavar="N", help="of one checkpoint alone")
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def main(arguments: list[str], prog: str = "checkpoint") -> int:
    """Runs `checkpoint` and returns its exit status: 5 where a checkpoint is damaged.

    Raises:
      InputError: for another action than `list` and `verify`, and for a directory without
        checkpoints.
    """
    action, *rest = arguments or [""]
    if action in ("-h", "--help"):
        print(f"usage: {_USAGE}")
        return 0
    if action not in _ACTIONS:
        raise InputError(f"checkpoint {action!r} given; list or verify expected: {_USAGE}")
    options = make_parser(prog, action).parse(rest)
    from llama_jax.cli.train import quiet_libraries
    from llama_jax.weights.restore import list_checkpoints, verify_checkpoints
    from llama_jax.weights.run import RUN_CHECKPOINTS

    directory = pathlib.Path(options.run) / RUN_CHECKPOINTS
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; a run with checkpoints expected")
    quiet_libraries()
    found = (
        list_checkpoints(directory)
        if action == "list"
        else verify_checkpoints(directory, options.step)
    )
    return _show(found, options.json)


def _show(states: Iterable["CheckpointState"], as_json: bool) -> int:
    """Writes a line for each as it comes: to verify a large one takes a while."""
    status = 0
    if not as_json:
        print(f"{'step':>10}  {'size':>10}  {'written':19}  state")
    for state in states:
        status = DAMAGED if state.condition == "damaged" else status
        if as_json:
            print(json.dumps(state._asdict()))
            continue
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.time))
        what = f"{state.condition}: {state.reason}" if state.reason else state.condition
        name = "" if state.name == str(state.step) else f" ({state.name})"
        print(f"{state.step:>10}  {state.nbytes / 1e6:>7.2f} MB  {written}  {what}{name}")
        sys.stdout.flush()
    return status
