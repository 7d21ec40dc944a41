"""What a resume says about a checkpoint that differs from the configuration where no tensor shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nexa.config.schema import Config, ModelConfig, NormConfig
from nexa.interop.huggingface import config_json
from nexa.train.resume import differences


def checkpoint(folder: Path, norm: NormConfig, **model: Any) -> Path:
    text = json.dumps(config_json(ModelConfig(**model), norm, eos_token_id=None))
    (folder / "config.json").write_text(text)
    return folder


def test_nothing_to_say(tmp_path: Path) -> None:
    cfg = Config(norm=NormConfig(placement="mix"))
    assert differences(cfg, checkpoint(tmp_path, cfg.norm), {"lr": cfg.optim.lr}) == []
    assert differences(cfg, tmp_path, {}) == []  # an imported model has no learning rate


def test_what_changes_the_function_is_named(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path, NormConfig(placement="lns", kind="crmsnorm"), rope_theta=5e5, rms_norm_eps=1e-5)
    found = differences(Config(), saved, {"lr": 1.0})
    assert "optim.lr: 1.0 in the checkpoint, 0.0003 in the config" in found
    assert "model.rope_theta: 500000.0 in the checkpoint, 10000.0 in the config" in found
    assert "norm.placement: lns in the checkpoint, pre in the config" in found
    assert "norm.kind: crmsnorm in the checkpoint, rmsnorm in the config" in found
    assert any(line.startswith("norm.eps: 1e-05 in the checkpoint") for line in found)
