"""Weights & Biases and TensorBoard: views of the rows, never in the way of the run."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexa.errors import UserError
from nexa.train.hook import Hook, Row

if TYPE_CHECKING:
    from nexa.train.loop import Trainer

logger = logging.getLogger("nexa")

WANDB_INIT_SECONDS = 15
WANDB_FINISH_SECONDS = 30


class WandbHook(Hook):
    """Rows to Weights & Biases, with tokens as an x-axis.

    The run's id comes from its directory, so that a requeued run goes on in the same place. Any failure
    is reported once and ends the tracking, not the training: metrics.jsonl has everything.
    """

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir
        self._run: Any = None

    def start(self, trainer: Trainer) -> None:
        """Open the run: offline when asked, or when there is no key or no answer."""
        if not trainer.topology.is_main:
            return
        wanted = trainer.config.log.wandb == "online"
        if wanted and not _has_key():
            logger.warning("W&B: no API key (WANDB_API_KEY or `wandb login`); logging offline")
        mode: Literal["online", "offline"] = "online" if wanted and _has_key() else "offline"
        try:
            self._open(trainer, mode)
        except Exception as error:
            if mode == "offline":
                logger.warning("W&B is off: %s", error)
                return
            logger.warning("W&B: no connection (%s); logging offline", error)
            try:
                self._open(trainer, "offline")
            except Exception as again:
                logger.warning("W&B is off: %s", again)

    def _open(self, trainer: Trainer, mode: Literal["online", "offline"]) -> None:
        import wandb

        settings = wandb.Settings(
            init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, silent=True, console="off"
        )
        self._run = wandb.init(
            project=trainer.config.log.wandb_project,
            entity=trainer.config.log.wandb_entity,
            name=trainer.config.run.name,
            id=hashlib.sha256(str(self._dir.resolve()).encode()).hexdigest()[:12],
            resume="allow",
            mode=mode,
            dir=str(self._dir),
            config=asdict(trainer.course.cfg),
            settings=settings,
        )
        # rows carry `step` and `tokens` as values: W&B drops a row whose own step goes back after a resume
        for axis, metrics in (("tokens", "*"), ("step", "lr")):
            self._run.define_metric(axis)
            self._run.define_metric(metrics, step_metric=axis)

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """Hand the row over; W&B sends it from a process of its own."""
        if self._run is None:
            return
        try:
            self._run.log(row)
        except Exception as error:
            logger.warning("W&B is off from step %d: %s", row["step"], error)
            self._run = None

    def close(self) -> None:
        """Finish the run, within a bounded time."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            logger.warning("W&B did not finish cleanly: %s", error)
        self._run = None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.exists() and "wandb" in netrc.read_text(errors="replace")


class TensorBoardHook(Hook):
    """Rows to <run.dir>/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir / "tensorboard"
        self._writer: Any = None

    def start(self, trainer: Trainer) -> None:
        """Open the writer; steps after the resumed one are purged from view."""
        if not trainer.topology.is_main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard=true: the package tensorboard is not installed; pip install tensorboard, "
                "or set log.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(str(self._dir), purge_step=trainer.state.step + 1)

    def on_row(self, trainer: Trainer, row: Row) -> None:
        """Every number of the row over the step."""
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
