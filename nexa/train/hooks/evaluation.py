"""Validation during and at the end of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexa.config.schema import EvalConfig
from nexa.train.data import ValidationSet
from nexa.train.evaluate import validate
from nexa.train.hook import Hook, Row

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


class EvaluationHook(Hook):
    """Adds `val/<source>/loss` (and `harness_loss` if asked for) to the row of the steps at which it is due."""

    def __init__(self, cfg: EvalConfig, sets: list[ValidationSet]) -> None:
        self._config, self._sets = cfg, sets

    def measure(self, trainer: Trainer) -> Row:
        """Evaluate every `eval.every` steps and, with `eval.at_end`, after the last one."""
        every = self._config.every
        due = every > 0 and trainer.state.step % every == 0
        if not due and not (self._config.at_end and trainer.finished):
            return {}
        row: Row = {}
        for data in self._sets:
            found = validate(trainer.engine, data)
            row[f"val/{data.name}/loss"] = found.loss
            if self._config.harness_compatible:
                row[f"val/{data.name}/harness_loss"] = found.harness_loss
        return row
