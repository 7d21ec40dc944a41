"""The run folder: what a run was, kept beside what it did."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from nexa.config import to_yaml
from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.parallel.topology import Topology

logger = logging.getLogger("nexa")

PACKAGES = ("torch", "deepspeed", "megatron-core", "hydra-core", "transformers", "datasets", "numpy", "nexa")


def package_versions() -> dict[str, str | None]:
    """Installed version of what a run depends on; None for what is not installed."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: find(name) for name in PACKAGES}}


def _git_commit() -> str | None:
    """Commit of the checkout this code runs from, with '+' when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(topology: Topology) -> dict[str, Any]:
    """Versions, commit, devices, topology and launch command of this start."""
    on_gpu = topology.device.type == "cuda"
    return {
        "versions": package_versions(),
        "git_commit": _git_commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(topology.device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "world_size": topology.world_size,
        "data_parallel": topology.data_size,
        "tensor_parallel": topology.tensor_size,
        "command": [sys.executable, *sys.argv],
        "working_directory": str(Path.cwd()),
    }


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


class RunFolder:
    """<run.dir>; held by one live run at a time."""

    def __init__(self, cfg: Config) -> None:
        self.path = Path(cfg.run.dir)
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def open(self, cfg: Config, topology: Topology) -> None:
        """On the main rank: make the folder, refuse a second live run, write config.yaml and environment.json.

        Raises UserError when the folder cannot be written or is in use.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            self._take(self._lock)
            _replace(self.path / "config.yaml", to_yaml(cfg))
            _replace(self.path / "environment.json", json.dumps(environment(topology), indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"run.dir={self.path}: cannot be written ({error}); set run.dir to another folder"
            ) from None

    def _take(self, lock: IO[str]) -> None:
        """Lock the folder until this process ends. Raises UserError when another one has it."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir={self.path}: another run is writing here; give this one another run.name or wait"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: the file system has no locks (%s); a second run here would not be noticed", self.path, error
            )
