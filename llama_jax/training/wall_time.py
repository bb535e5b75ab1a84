"""The wall time that a run may take, as people write it."""

import math
import re

_TIME = re.compile(r"(\d{1,4}):([0-5]\d):([0-5]\d)|(\d{1,8})")


def wall_seconds(given: str | int | None) -> float:
    """Seconds of a time such as `03:50:00` or `13800`; infinite for `None`, 0 for what is no time."""
    if given is None:
        return math.inf
    found = None if isinstance(given, bool) else _TIME.fullmatch(str(given))
    if found is None:
        return 0
    hours, minutes, seconds, alone = found.groups()
    return int(alone) if alone else int(hours) * 3600 + int(minutes) * 60 + int(seconds)
