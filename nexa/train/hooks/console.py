"""What a person sees: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from nexa.train.evaluate import perplexity
from nexa.train.hook import Hook, Row

if TYPE_CHECKING:
    from nexa.train.loop import Trainer

LOG_FILE_SECONDS = 10.0
"""Least time between progress lines in a log file: a day of training stays readable."""


def duration(seconds: float) -> str:
    """'4 s', '3 min 20 s', '2 h 05 min', '3 d 04 h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def quantity(value: float) -> str:
    """'812', '12.3k', '4.56M', '1.20G'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def train_line(row: Row, total: int) -> str:
    """One line for one logged step."""
    width = len(str(total))
    parts = [
        f"step {int(row['step']):>{width}}/{total}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:.3f}",
        f"{quantity(row['tokens_per_second'])} tok/s",
        f"mfu {row['mfu']:.1%}" if "mfu" in row else "mfu n/a",
        f"{row['memory_gib']:.2f} GiB",
        f"eta {duration((total - row['step']) * row['step_seconds'])}",
    ]
    return "  ".join(parts)


def validation_lines(row: Row) -> list[str]:
    """One line for each validation loss in the row."""
    return [
        f"step {int(row['step'])}  {key.removesuffix('/loss')}  loss {value:.4f}  perplexity {perplexity(value):.2f}"
        for key, value in row.items()
        if key.startswith("val/") and key.endswith("/loss")
    ]


class ConsoleHook(Hook):
    """Overwrites one line on a terminal; in a file, a line when enough time has passed and at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._open_line = False
        self._last = -LOG_FILE_SECONDS

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """Show the row."""
        line = train_line(row, trainer.last_step)
        now = time.monotonic()
        if self._live:
            self._stream.write(f"\r\x1b[2K{line}")
            self._open_line = True
        elif trainer.leaving or now - self._last >= LOG_FILE_SECONDS:
            self._stream.write(f"{line}\n")
            self._last = now
        for text in validation_lines(row):
            self._finish_line()
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _finish_line(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False

    def end(self, trainer: Trainer) -> None:
        """Leave the cursor on a new line."""
        self.close()

    def close(self) -> None:
        """Leave the cursor on a new line."""
        self._finish_line()
        self._stream.flush()
