"""What runs under Slurm and local.sh are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.train.test_kills import MODEL, mixture

__all__ = ["PATIENCE", "STEPS", "mixture", "unbroken"]
PATIENCE = 400.0
"""Seconds to wait for anything that must happen."""
STEPS = 40


@pytest.fixture(scope="module")
def unbroken(mixture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, on one process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    words = [*MODEL, mixture, f"run.dir={folder}", f"train.steps={STEPS}", "checkpoint.every=0"]
    done = run_command("train.py", *words, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder
