"""launch/local.sh: stopped from the keyboard, a rank killed, finished all the same."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from nexa.checkpoint.catalog import list_checkpoints, step_of
from tests.conftest import REPOSITORY
from tests.launch.cluster import wait_for
from tests.launch.conftest import PATIENCE, STEPS
from tests.train.test_kills import MODEL, compare, rows

pytestmark = pytest.mark.slow


def ranks(script: psutil.Process) -> list[psutil.Process]:
    return [one for one in script.children(recursive=True) if any("train.py" in w for w in one.cmdline()[:3])]


def test_stopped_and_killed_and_finished(mixture: str, unbroken: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = [*MODEL, mixture, f"run.dir={run}", f"train.steps={STEPS}", "checkpoint.every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}

    def start() -> psutil.Popen:
        command = ["bash", str(REPOSITORY / "launch/local.sh"), "-n", "2", "-r", "1", *words]
        with log.open("a") as output:
            return psutil.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)

    def wait_for_step(step: int) -> None:
        def reached() -> bool:
            assert process.is_running(), log.read_text()[-3000:]
            return bool((run / "metrics.jsonl").exists() and [r for r in rows(run) if r["step"] >= step])

        wait_for(f"step {step}", reached, PATIENCE)

    process = start()
    wait_for_step(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, log.read_text()[-3000:]
    saved = step_of(list_checkpoints(run / "checkpoints")[-1])
    assert saved == rows(run)[-1]["step"]

    process = start()
    wait_for_step(saved + 3)
    ranks(process)[1].kill()
    assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert log.read_text().count("resuming from") == 2
    compare(run, unbroken, STEPS)
