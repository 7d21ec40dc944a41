"""What normalisation does inside the network, while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.train.data import TensorBatch, ValidationSet
from nexa.train.hook import Hook, Row
from nexa.train.metrics_file import MetricsFile

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


class DiagnoseHook(Hook):
    """Measures the same validation sequences before training, every `diagnose.every` steps and after the last one.

    Writes reports/diagnose.jsonl and adds `diagnose/<quantity>/<block>` to the row of the step.
    """

    def __init__(self, cfg: Config, sets: list[ValidationSet]) -> None:
        """The first of `sets` is measured. Raises UserError when there is none."""
        if not sets:
            raise UserError(
                f"diagnose.every={cfg.diagnose.every}: there is no validation split to measure; set "
                "eval.sources=[<packed store>], or diagnose.every=0"
            )
        self._config, self._set = cfg, sets[0]
        self._path = Path(cfg.run.dir) / "reports" / "diagnose.jsonl"
        self._batches: list[TensorBatch] = []
        self._file: MetricsFile | None = None

    def start(self, trainer: Trainer) -> None:
        """Cut the file back to the step the run goes on from; measure a run that begins."""
        self._batches = self._set.batches(self._config.diagnose.batches)
        fresh = trainer.state.step == 0
        if trainer.topology.is_main:
            self._file = MetricsFile(self._path, -1 if fresh else trainer.state.step)
        if fresh:
            self._measure(trainer)

    def measure(self, trainer: Trainer) -> Row:
        """The rows of a step at which it is due."""
        due = trainer.state.step % self._config.diagnose.every == 0
        return self._measure(trainer) if due or trainer.finished else {}

    def _measure(self, trainer: Trainer) -> Row:
        from nexa.diagnostics import DURING_TRAINING, measure
        from nexa.parallel.diagnosis import sharing_of

        engine = trainer.engine
        found = measure(
            engine.module,
            ({key: value.to(engine.device) for key, value in batch.items()} for batch in self._batches),
            DURING_TRAINING,
            sharing=sharing_of(trainer.topology, self._config.parallel.sequence),
            forward=engine.total_loss,
        )
        if self._file is not None:
            row: dict[str, Any] = {"step": trainer.state.step, **found.as_dict()}
            self._file.write(row)
        return {f"diagnose/{name}": value for name, value in found.rows().items()}

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """On disk for good before a checkpoint of this step can be completed."""
        assert self._file is not None
        if trainer.checkpoint_due:
            self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
