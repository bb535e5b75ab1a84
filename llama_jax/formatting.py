"""Numbers and texts as people read them: in messages, plans and on the screen."""

import math


def one_line(text: object, most: int = 300) -> str:
    """A text, such as what a library says of an error, on one line of bounded length."""
    return " ".join(str(text).split())[:most]


def duration(seconds: float) -> str:
    """A time in its two largest units: `12.3 ms`, `3.46 s`, `4m 05s`, `3h 12m`, `3d 04h`; `?` when
    not known.
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = whole // 60
    hours = minutes // 60
    return f"{hours}h {minutes % 60:02d}m" if hours < 24 else f"{hours // 24}d {hours % 24:02d}h"


def si(number: float) -> str:
    """A number to three digits with its SI prefix: `1.21M`."""
    if not math.isfinite(number):
        return "?"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"
