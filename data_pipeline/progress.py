"""Progress of long work as plain lines, readable on a terminal and in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as `h:mm:ss`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Prints share done, MB/s, tokens/s and the time left, at most every `every` seconds."""

    def __init__(self, already: float = 0.0, every: float = 5.0, stream: TextIO | None = None) -> None:
        """`already`: share of the work done by an earlier run, which the rates must not count."""
        self._first, self._every, self._stream = already, every, stream or sys.stderr
        self._start = self._last = time.monotonic()
        self.bytes = self.tokens = self.documents = self.bad = 0

    def restart(self, already: float) -> None:
        """Measure rates from now on, with `already` of the work done before."""
        self._first, self._start = already, time.monotonic()

    def note(self, text: str) -> None:
        """Print a line."""
        print(f"nexa data prepare: {text}", file=self._stream, flush=True)

    def rates(self) -> str:
        """Speed since the start of this run."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{self.bytes / 1e6 / elapsed:.1f} MB/s, {self.tokens / elapsed:,.0f} tokens/s"

    def update(self, share: float) -> None:
        """Print where the work stands (`share` of 1 done) when it is time to."""
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        done = share - self._first
        left = duration((now - self._start) * (1 - share) / done) if done > 0 else "unknown"
        self.note(
            f"{100 * share:.1f} %, {self.bytes / 1e6:,.0f} MB text, {self.documents:,} documents, {self.rates()}, "
            f"{self.bad} bad, time left {left}"
        )
