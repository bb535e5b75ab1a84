"""`doctor`: whether this machine is ready: versions, devices, their collectives, caches, disk,
environment.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from llama_jax import __version__
from llama_jax.cli.distributed import keep_compiled_programs, make_room_for_virtual_devices
from llama_jax.cli.options import OptionParser, positive
from llama_jax.cli.writing import prepare_output
from llama_jax.formatting import one_line

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
_EXTRAS = {
    "hf": "huggingface_hub",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
    "plot": "matplotlib",
    "eval": "lm_eval",
}
# By their beginnings; none of these holds a password.
_ENVIRONMENT = (
    "JAX_",
    "XLA_",
    "LIBTPU_",
    "TPU_",
    "NCCL_",
    "CUDA_VISIBLE_DEVICES",
    "NPROC",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "TF_CPP_MIN_LOG_LEVEL",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
)
_WRITTEN = 16 << 20  # bytes of the write test
_LITTLE_SPACE = 2 << 30

T = TypeVar("T")


class Check(NamedTuple):
    """One line of the report.

    Attributes:
      name: what was looked at.
      status: `ok`, `note` (nothing to judge), `warning` or `failed`.
      text: what was found, and what to do about it.
    """

    name: str
    status: str
    text: str


class Late(Exception):
    """Something did not answer in time."""


def make_parser(prog: str) -> OptionParser:
    """The options of `doctor`."""
    parser = OptionParser(prog, "Checks this machine; exits with 1 if anything failed.")
    parser.add_argument(
        "--dir",
        default=".",
        metavar="DIR",
        help="directory to be written to, such as that of the runs",
    )
    parser.add_argument(
        "--seconds", type=positive, default=120.0, metavar="S", help="limit for devices to answer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def main(arguments: list[str], prog: str = "doctor") -> int:
    """Runs `doctor` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    prepare_output(options.json)
    environment = environment_checks()
    make_room_for_virtual_devices()
    checks = [
        *version_checks(),
        *device_checks(options.seconds),
        cache_check(),
        disk_check(pathlib.Path(options.dir)),
        *environment,
    ]
    failed = any(check.status == "failed" for check in checks)
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [check._asdict() for check in checks]}))
    else:
        print("\n".join(f"{check.status:8} {check.name:12} {check.text}" for check in checks))
    if any(thread.name == within.__name__ for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(1)  # a device that hangs would hold up the end of the program as well
    return int(failed)


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_checks() -> list[Check]:
    """Python, ours, and what we stand on."""
    found = {name: version(name) for name in _PACKAGES}
    text = ", ".join(f"{name} {number or '-'}" for name, number in found.items())
    extras = ", ".join(
        f"{name} {'yes' if importlib.util.find_spec(package) else '-'}"
        for name, package in _EXTRAS.items()
    )
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    same = found["jax"] == found["jaxlib"]
    return [
        Check("python", "ok", f"{python}, {os.cpu_count()} cores, llama_jax {__version__}"),
        Check(
            "packages",
            "ok" if same else "warning",
            text if same else f"{text}; jax and jaxlib of one version expected",
        ),
        Check("extras", "note", extras),
    ]


def within(seconds: float, function: Callable[[], T]) -> T:
    """The result of a function that may hang.

    Raises:
      Late: if it has none after so many seconds; it goes on in its thread.
      Exception: what the function raises.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        """Keeps what comes out."""
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=within.__name__, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise Late
    return results[0]


def device_checks(seconds: float) -> list[Check]:
    """The devices, and whether they compute and talk to each other."""
    import jax

    from llama_jax.training.consistency import collective_test

    try:
        devices = within(seconds, jax.local_devices)
    except Late:
        advice = "does another process hold them, or does a host of the slice not run?"
        return [Check("devices", "failed", f"no answer in {seconds:g} s; {advice}")]
    except RuntimeError as error:
        return [
            Check("devices", "failed", f"{one_line(error)}; JAX_PLATFORMS=cpu starts without them")
        ]
    found = Check("devices", "ok", device_words(devices, jax.device_count()))
    words = (
        f"products, and a sum of 1 MiB over {len(devices)} device{'s' if len(devices) > 1 else ''}"
    )
    try:
        wrong, took = within(seconds, lambda: collective_test(devices))
    except Late:
        return [found, Check("collectives", "failed", f"{words}: no answer in {seconds:g} s")]
    except Exception as error:  # whatever the runtime raises
        return [
            found,
            Check("collectives", "failed", f"{words}: {type(error).__name__}: {one_line(error)}"),
        ]
    if wrong:
        return [
            found,
            Check(
                "collectives",
                "failed",
                f"{words}: wrong on {', '.join(wrong)}; do not train on these",
            ),
        ]
    return [found, Check("collectives", "ok", f"{words} in {took * 1e3:.2f} ms")]


def device_words(devices: list, in_all: int) -> str:
    """Number, kind, memory and peak of devices."""
    from llama_jax.parallel.chips import peak_flops

    device = devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        memory = (
            f"{stats['bytes_limit'] / 2**30:.1f} GiB each, "
            f"{stats.get('bytes_in_use', 0) / 2**30:.1f} in use"
        )
    else:
        memory = (
            f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of "
            "the host"
        )
    peak = peak_flops(device.device_kind)
    speed = "peak unknown: no MFU" if peak is None else f"peak {peak / 1e12:g} TFLOP/s in bfloat16"
    others = f" of {in_all} in all" if in_all > len(devices) else ""
    return f"{len(devices)} x {device.device_kind}{others} ({device.platform}), {memory}, {speed}"


def cache_check() -> Check:
    """Where compiled programs are kept."""
    import jax

    keep_compiled_programs()
    path = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not path:
        return Check(
            "compiled",
            "warning",
            "kept nowhere: every start compiles anew; set JAX_COMPILATION_CACHE_DIR",
        )
    if "://" in path:
        return Check("compiled", "note", f"kept in {path}")
    directory = pathlib.Path(path)
    sizes = [file.stat().st_size for file in directory.glob("*") if file.is_file()]
    text = f"kept in {path}: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB"
    writable = not directory.exists() or os.access(directory, os.W_OK)
    return Check(
        "compiled", "ok" if writable else "warning", text if writable else f"{text}; not writable"
    )


def disk_check(directory: pathlib.Path) -> Check:
    """Room in a directory, and whether what is written there comes back."""
    try:
        free = shutil.disk_usage(directory).free
        seconds = write_test(directory)
    except OSError as error:
        return Check(
            "disk",
            "failed",
            f"{directory}: {error.strerror or error}; name a writable directory with --dir",
        )
    if seconds is None:
        return Check(
            "disk",
            "failed",
            f"{directory}: what was written is not what is read; do not train here",
        )
    text = (
        f"{directory.absolute()}: {free / 1e9:.1f} GB free, {_WRITTEN / seconds / 1e6:.0f} "
        "MB/s written and synced"
    )
    return Check("disk", "warning" if free < _LITTLE_SPACE else "ok", text)


def write_test(directory: pathlib.Path) -> float | None:
    """Seconds to write 16 MiB and sync them; `None` if they come back changed."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as file:
        start = time.perf_counter()
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        file.seek(0)
        same = all(file.read(len(block)) == block for _ in range(_WRITTEN // len(block)))
    return seconds if same else None


def environment_checks() -> list[Check]:
    """Variables that change how programs run, as they were given."""
    found = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)
    }
    return [
        Check("environment", "note", f"{name}={one_line(value)}") for name, value in found.items()
    ]
