"""Errors that are the user's to mend: one line saying what was given, what was expected, what to
do.
"""

import importlib
from types import ModuleType


class InputError(ValueError):
    """Wrong input: a config value, a file, a prompt. Programs print its one line and exit with
    status 2.
    """


class CorruptError(InputError):
    """A file of ours (checkpoint, token file) whose content contradicts its own header."""


class DivergedError(RuntimeError):
    """A training that cannot continue by itself: too many bad steps, or devices that disagree.
    Programs exit with status 4.
    """


class DeviceMemoryError(RuntimeError):
    """A device whose memory has run out: its arguments are lines, the last ones advice. Programs
    exit with status 2.
    """


def imported(package: str, extra: str) -> ModuleType:
    """A package that is not installed with us but by one of our extras, imported at its first use.

    Raises:
      InputError: naming the extra, where it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{package} is not installed, which this needs; pip install 'llama-jax[{extra}]'"
        ) from None
