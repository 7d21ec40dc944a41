"""Rows to metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nexa.train.hook import Hook, Row
from nexa.train.metrics_file import MetricsFile

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


class MetricsHook(Hook):
    """Writes every row, always."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: MetricsFile | None = None

    def start(self, trainer: Trainer) -> None:
        """Cut the file back to the step the run goes on from."""
        if trainer.topology.is_main:
            self._file = MetricsFile(self._path, trainer.state.step)

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """Append; on disk for good before a checkpoint of this step can be completed."""
        assert self._file is not None
        self._file.write(row)
        if trainer.checkpoint_due:
            self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
