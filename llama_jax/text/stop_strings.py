"""Ending a text at a string, while it streams."""

from collections.abc import Sequence


class StopStrings:
    """Watches a text that comes piece by piece for the first of some strings.

    Text that might be the beginning of a stop string is held back until it is certain; the string itself is never given out.

    Attributes:
      found: whether a stop string has come; nothing is given out after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> str:
        """The text that became certain with this piece."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        certain = len(self._held) - self._open()
        ready, self._held = self._held[:certain], self._held[certain:]
        return ready

    def flush(self) -> str:
        """What was held back and turned out to be text, at the end."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _open(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
