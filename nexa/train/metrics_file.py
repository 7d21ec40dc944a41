"""metrics.jsonl: one object per logged step, the run's record of truth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexa.checkpoint.files import write_all
from nexa.errors import UserError


def _complete_lines(path: Path, last_step: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines up to `last_step` and their rows; a line cut by a crash is dropped, as is what came after it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return
        if step <= last_step:
            yield line, row


def complete_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows that a run which goes on from `last_step` keeps."""
    return [row for _, row in _complete_lines(path, last_step)]


class MetricsFile:
    """Append-only; opening it for a resume cuts it back to the checkpoint's step, so that no step is twice.

    Every method raises UserError when the disk is full or the file cannot be written; what is there stays.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """last_step: step of the checkpoint the run goes on from; 0 for a fresh run."""
        self._path = path
        with self._errors_explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = [line for line, _ in _complete_lines(path, last_step)]
                aside = path.with_suffix(".tmp")
                aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(aside, path)
            # Not buffered: a killed process loses no row, and closing has nothing left to write that could fail again.
            self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row and hand it to the system; its own numbers may be infinite or NaN, those of lists in it not."""
        infinite = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        clean = {key: None if key in infinite else value for key, value in row.items()}
        with self._errors_explained():
            write_all(self._file.fileno(), memoryview(f"{json.dumps(clean)}\n".encode()))

    def sync(self) -> None:
        """Make every row so far survive a power cut: called before a checkpoint is completed."""
        with self._errors_explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror or error}); checkpoints so far are intact. Free "
                "space and start the same command again, or set run.dir to another folder"
            ) from error
