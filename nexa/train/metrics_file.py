"""metrics.jsonl: one object per logged step, the run's record of truth."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from nexa.train.hook import Row


def _complete_rows(path: Path, last_step: int) -> list[str]:
    """Lines up to `last_step`; a line cut by a crash is dropped, as is what came after it."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        if step <= last_step:
            kept.append(line)
    return kept


class MetricsFile:
    """Append-only; opening it for a resume cuts it back to the checkpoint's step, so that no step is twice."""

    def __init__(self, path: Path, last_step: int) -> None:
        """last_step: step of the checkpoint the run goes on from; 0 for a fresh run."""
        if path.exists():
            kept = _complete_rows(path, last_step)
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row and hand it to the system, so that a killed process does not lose it."""
        clean = {key: (value if math.isfinite(value) else None) for key, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make every row so far survive a power cut: called before a checkpoint is completed."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
