"""A rule of width, and the gradients of micro-batches, in every layout against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nexa.config.build import from_mapping
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from tests.dist.common import CLIP, EPS, LR, TOLERANCE, Outcome, config, deviation, run_jobs
from tests.dist.grid import STAGES, parallel

STEPS = 6
RULE = {"width_rule": "mup_root_decay", "base_hidden_size": 6}
"""A quarter of the width: one head of four."""


def rate_and_decay(name: str) -> tuple[float, float]:
    """By hand for m = 4: table 8 of arXiv 2203.03466 with the output's multiplier in its weights, decay by 2510.15262."""
    if name == "lm_head.weight":
        return LR / 4, 0.1 * 4
    if name.endswith("_proj.weight"):
        return LR / 4, 0.1 * 2
    return LR, 0.0


def plain(mapping: dict, micro: int) -> Outcome:
    """One process without engine; gradients of the last step also by micro-batches of `micro` rows."""
    cfg = from_mapping({group: values for group, values in mapping.items() if group != "parallel"})
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "lm_head.weight":
                p /= 4
            elif name.endswith("_proj.weight"):
                p /= 2
    groups = []
    for name, p in model.named_parameters():
        lr, decay = rate_and_decay(name)
        groups.append({"params": [p], "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
    generator = torch.Generator().manual_seed(7)
    losses, norms, squares = [], [], 0.0
    for step in range(STEPS):
        rows = torch.randint(0, 61, (8, 13), generator=generator)
        labels = rows[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        parts = [slice(at, at + micro) for at in range(0, 8, micro)] if step == STEPS - 1 else []
        for part in parts:
            loss = F.cross_entropy(model(rows[part, :-1]).flatten(0, 1), labels[part].flatten(), reduction="sum")
            found = torch.autograd.grad(loss / (labels >= 0).sum(), list(model.parameters()))
            squares += sum(float(g.double().square().sum()) for g in found)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    weights = {name: p.detach().flatten() for name, p in model.named_parameters()}
    return Outcome(losses, norms, weights, micro_squares=squares)


def test_every_layout(tmp_path: Path) -> None:
    """With accumulation at every stage; tensor and sequence parallelism; key-value heads that every rank has whole."""
    common = {"optim": {"eps": EPS, **RULE}, "log": {"gradient_noise": 1, "every": 1}}
    jobs = [
        config(**common, train={"micro_batch_size": 2}, parallel=parallel(stage, (1, 2, False))) for stage in STAGES
    ]
    jobs.append(config(**common, parallel=parallel(0, (2, 1, False))))
    jobs.append(config(**common, model={"num_key_value_heads": 1}, parallel=parallel(3, (2, 1, True))))
    outcomes = run_jobs(tmp_path, jobs, 2, ignore=0.3, steps=STEPS)
    for job, outcome in zip(jobs, outcomes, strict=True):
        expected = plain(job, job["train"]["micro_batch_size"])
        assert max(expected.norms) > CLIP
        assert deviation(outcome, expected).worst <= TOLERANCE, (job["parallel"], deviation(outcome, expected))
        assert outcome.micro_squares == pytest.approx(expected.micro_squares, rel=1e-4), job["parallel"]
        assert outcome.micro_squares is not None and outcome.micro_squares > 0.5 * expected.norms[-1] ** 2
