"""Norms with running statistics over ranks: checkpoints in the middle of the warm-up. Layouts are `test_kinds`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from nexa.api import load_model
from nexa.checkpoint.load import load_state_dict
from tests.conftest import run_command
from tests.dist.common import LR, config
from tests.dist.grid import parallel

KINDS = ("powernorm", "unifiednorm")
DATA = (1, 2, False)
SEQUENCE = (2, 1, True)
BEFORE, AFTER = 4, 3


def job(folder: Path, store: Path, kind: str, stage: int, layout: tuple[int, int, bool], **run: Any) -> dict[str, Any]:
    """Two passes a step over 4 sequences each, whoever has them; warm-up of 6 steps, so 12 passes."""
    mapping = config(
        model={"vocab_size": 261, "num_hidden_layers": 2},
        norm={"kind": kind, "placement": "normformer", "warmup_steps": 6},
        data={"source": str(store), "sequence_length": 12},
        train={"global_batch_size": 8, "micro_batch_size": 4 // layout[1], **run.get("train", {})},
        parallel=parallel(stage, layout),
    )
    load, name = run["load"], run["name"]
    return {
        "config": mapping,
        "steps": run["steps"],
        "lr": LR,
        "load": None if load is None else str(folder / load / f"step_{BEFORE:08d}"),
        "save": str(folder / name),
        "moments": str(folder / f"{name}.safetensors"),
    }


def test_checkpoints_in_the_middle_of_the_warm_up(tmp_path: Path, store: Path) -> None:
    """On the same layout the run goes on to the bit; on another one within rounding, from the same statistics."""
    jobs: list[dict[str, Any]] = []
    for kind in KINDS:
        jobs += [
            job(tmp_path, store, kind, 1, DATA, name=f"{kind}-saved", load=None, steps=BEFORE),
            job(tmp_path, store, kind, 1, DATA, name=f"{kind}-whole", load=None, steps=BEFORE + AFTER),
            job(tmp_path, store, kind, 1, DATA, name=f"{kind}-same", load=f"{kind}-saved", steps=AFTER),
            job(tmp_path, store, kind, 3, SEQUENCE, name=f"{kind}-other", load=f"{kind}-saved", steps=AFTER),
            job(tmp_path, store, kind, 3, DATA, name=f"{kind}-read", load=f"{kind}-saved", steps=0),
        ]
    half = {"precision": "bf16"}
    jobs.append(job(tmp_path, store, "powernorm", 3, DATA, name="half", load=None, steps=2, train=half))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    arguments = str(tmp_path / "jobs.json"), str(tmp_path / "results.json")
    done = run_command("tests/dist/reshard_worker.py", *arguments, processes=2, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for index, kind in enumerate(KINDS):
        _, whole, same, other, _ = results[5 * index : 5 * index + 5]
        assert same["losses"] == whole["losses"][BEFORE:]
        assert other["losses"] == pytest.approx(whole["losses"][BEFORE:], rel=1e-5)
        assert other["norms"] == pytest.approx(whole["norms"][BEFORE:], rel=1e-5)
        states = {name: weights(tmp_path / f"{kind}-{name}") for name in ("saved", "whole", "same", "other", "read")}
        for name, tensor in states["whole"].items():
            assert torch.equal(states["same"][name], tensor), name
            assert torch.equal(states["read"][name], states["saved"][name]), name
            torch.testing.assert_close(states["other"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert float(states["saved"]["model.norm.updates"]) == 2 * BEFORE
        assert float(states["whole"]["model.norm.updates"]) == 2 * (BEFORE + AFTER)
        shared = "model.layers.1.mlp.mid_norm.running_gradient"  # of which each tensor rank has half
        assert states["other"][shared].shape == (40,)
        assert states["other"][shared].abs().min() > 0
        loaded = load_model(newest(tmp_path / f"{kind}-whole"))
        assert not loaded.training
        assert all(torch.equal(buffer, states["whole"][name]) for name, buffer in loaded.named_buffers())
    statistics = weights(tmp_path / "half")["model.norm.running_square"]
    assert not torch.equal(statistics, statistics.bfloat16().float())


def newest(root: Path) -> Path:
    return max(root.glob("step_*"))


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint's model files, each tensor in one of them."""
    names = []
    for file in newest(root).glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            names += list(opened.keys())
    assert len(names) == len(set(names))
    state = load_state_dict(newest(root))
    assert set(state) == set(names)
    return state
