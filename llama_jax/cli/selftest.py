"""`selftest`: the same loss for every mesh, accumulation, form, remat, attention, packing and
resume, on your devices.
"""

import json
import pathlib
import tempfile
import time

from llama_jax.cli.distributed import keep_compiled_programs, make_room_for_virtual_devices
from llama_jax.cli.options import OptionParser
from llama_jax.cli.writing import note, prepare_output
from llama_jax.errors import InputError

# Measured on two cores: 44 s, 8 min on 8 virtual devices; 12 s and 4 min with the programs compiled
# before.
_TAKES = "about a minute on one device of a CPU, up to ten minutes on eight, less the next time"
_HEAD = f"{'case':14}{'computed otherwise':46}{'difference':>12}{'bound':>10}"


def make_parser(prog: str) -> OptionParser:
    """The options of `selftest`."""
    parser = OptionParser(
        prog,
        "Compares ways of computing the same updates on this process's devices; exits "
        "with 1 if any differ. All groups take "
        f"{_TAKES}.",
    )
    parser.add_argument(
        "--only",
        metavar="GROUP,...",
        help="of mesh, accumulation, layers, remat, attention, documents, resume",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="to compute in; the bounds of bfloat16 are wide",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="the first N devices; all by default"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of text"
    )
    return parser


def main(arguments: list[str], prog: str = "selftest") -> int:
    """Runs `selftest` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    make_room_for_virtual_devices()
    import jax

    from llama_jax.training.selftest import GROUPS, SelfTest

    groups = GROUPS if options.only is None else tuple(options.only.split(","))
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise InputError(f"--only: {unknown[0]!r} given; some of {','.join(GROUPS)} expected")
    devices = jax.local_devices()
    wanted = len(devices) if options.devices is None else options.devices
    if not 1 <= wanted <= len(devices):
        raise InputError(f"--devices: {wanted} given; 1 to {len(devices)} expected")
    keep_compiled_programs()
    prepare_output(options.json)
    start = time.perf_counter()
    note(
        f"{wanted} x {devices[0].device_kind}, {options.dtype}, jax {jax.__version__}; "
        f"all groups take {_TAKES}"
    )
    if not options.json:
        print(_HEAD, flush=True)
    failed = done = 0
    with tempfile.TemporaryDirectory() as directory:
        for case in SelfTest(devices[:wanted], options.dtype, pathlib.Path(directory)).cases(
            groups
        ):
            done, failed = done + 1, failed + (not case.ok)
            if options.json:
                print(json.dumps({**case._asdict(), "ok": case.ok}), flush=True)
            else:
                verdict = "ok" if case.ok else f"DIFFERS {case.note}"
                print(
                    f"{case.group:14}{case.name:46}{case.difference:12.1e}{case.bound:10.0e} "
                    f" {verdict}".rstrip(),
                    flush=True,
                )
    note(f"{done - failed} of {done} within their bounds, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)
