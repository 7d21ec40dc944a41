"""`nexa doctor` breaks on nothing that is optional."""

import importlib.util
import json

import pytest
import torch

from nexa.cli import doctor
from nexa.cli.main import main


def test_the_report_is_json_and_says_why(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["attention"] == {"flash-attn": "not active: no CUDA device", "sdpa": "active"}
    assert all(value.startswith("n/a: ") for value in found["peak for MFU"].values())


def test_nothing_installed_nothing_found(capsys, monkeypatch, tmp_path):
    def absent(package):
        raise doctor.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "Path", type("Nowhere", (type(tmp_path),), {"read_text": _unreadable}))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "MISSING" in out
    assert "no C++ compiler" in out
    assert "absent: log.wandb=online falls back to offline" in out


def _unreadable(self, *args, **kwargs):
    raise FileNotFoundError(self)


def test_a_key_is_found_and_not_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert doctor.places()["wandb key"] == "present (WANDB_API_KEY)"
    assert "secret" not in json.dumps(doctor.report())
