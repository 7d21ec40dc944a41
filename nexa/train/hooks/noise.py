"""The gradient noise scale, from what the steps of the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nexa.scaling.noise import SCALE, SQUARE, VARIANCE, NoiseScale
from nexa.train.hook import Hook, Row
from nexa.train.metrics_file import complete_rows

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


class NoiseHook(Hook):
    """Adds `gradient_noise_scale`, in tokens, to rows with a measurement, from it and those before.

    Stands before the hook that writes rows. After a resume the rows of the run give the means back.
    """

    def __init__(self, metrics: Path) -> None:
        self._metrics, self._scale = metrics, NoiseScale()

    def start(self, trainer: Trainer) -> None:
        """Read the rows of the run so far."""
        if trainer.topology.is_main and self._metrics.exists():
            for row in complete_rows(self._metrics, trainer.state.step):
                self._add(row)

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """Take in the row; add the noise scale to it."""
        if self._add(row) and (tokens := self._scale.tokens) is not None:
            row[SCALE] = tokens

    def _add(self, row: Row) -> bool:
        square, variance = row.get(SQUARE), row.get(VARIANCE)
        if square is None or variance is None:
            return False
        self._scale.add(square, variance)
        return True
