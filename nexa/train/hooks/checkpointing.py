"""Saving, as part of the loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa.checkpoint.save import CheckpointWriter
from nexa.train.hook import Hook

if TYPE_CHECKING:
    from nexa.train.loop import Trainer

logger = logging.getLogger("nexa")
SAVED = "checkpoint of step %d: training waited %.3f s for it"


class CheckpointHook(Hook):
    """Writes a checkpoint whenever one is due; the files are written while training goes on."""

    def __init__(self, root: Path, model_config: dict[str, Any], files: dict[str, Path], data: dict[str, Any]) -> None:
        """root: <run.dir>/checkpoints. model_config: config.json. files: name -> file to copy along.
        data: what identifies the data order, for the resume to compare."""
        self._root, self._model_config, self._files, self._data = root, model_config, files, data
        self._writer: CheckpointWriter | None = None

    def start(self, trainer: Trainer) -> None:
        """Join the ranks that write together."""
        cfg, topology = trainer.config.checkpoint, trainer.topology
        self._writer = CheckpointWriter(
            self._root,
            rank=topology.rank,
            world_size=topology.world_size,
            group=topology.control_group,
            keep_last=cfg.keep_last,
            permanent_every=cfg.permanent_every,
            asynchronous=cfg.asynchronous,
        )
        if cfg.every > 0:
            self._writer.prepare(trainer.engine.fragments())

    def after_step(self, trainer: Trainer) -> None:
        """Save when due; an error of the save before surfaces here."""
        assert self._writer is not None
        if not trainer.checkpoint_due:
            return
        state: dict[str, Any] = {
            "state": trainer.state.to_dict(),
            "data": self._data,
            "optim": {"lr": trainer.config.optim.lr},
            "total_steps": trainer.total_steps,
            "stage_starts": trainer.data.stage_starts,
            "tokens_by_source": trainer.data.tokens_by_source(trainer.state.step),
        }
        state |= trainer.course.saved() | trainer.faults.saved()
        if (place := trainer.data.position(trainer.state.step)) is not None:
            state["stream"] = place
        self._writer.save(trainer.state.step, trainer.engine.fragments(), state, self._model_config, self._files)
        logger.info(SAVED, trainer.state.step, self._writer.stall_seconds)

    def end(self, trainer: Trainer) -> None:
        """Wait until the last checkpoint is complete."""
        assert self._writer is not None
        self._writer.wait()

    def close(self) -> None:
        """Let the background thread come to an end."""
        if self._writer is not None:
            self._writer.close()
