"""A disk that is full where a run writes something else than a checkpoint: one message, and nothing is lost."""

import errno
import json
import os
from pathlib import Path

import pytest

from nexa.config import compose
from nexa.errors import UserError
from nexa.train import folder, metrics_file
from nexa.train.folder import RunFolder
from nexa.train.metrics_file import MetricsFile


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(fd: int, piece: memoryview) -> None:
    """What fits of a row is written, as a disk would."""
    os.write(fd, piece[: len(piece) // 2])
    full()


def test_a_row_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2):
        file.write({"step": step, "loss": 1.0})
    monkeypatch.setattr(metrics_file, "write_all", half)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\).*intact"):
        file.write({"step": 3, "loss": 1.0})
    file.close()
    monkeypatch.undo()
    again = MetricsFile(path, 2)
    again.write({"step": 3, "loss": 2.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 2.0},
    ]


def test_no_room_to_cut_the_file_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        MetricsFile(path, 1)
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_room_for_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["+exp=quickstart", f"run.dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of the last start")
    monkeypatch.setattr(folder, "environment", lambda topology: {})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"run\.dir=.*/run: cannot be written .*No space left on device"):
        RunFolder(cfg).open(cfg, None)
    monkeypatch.undo()
    assert (tmp_path / "run" / "config.yaml").read_text() == "of the last start"
