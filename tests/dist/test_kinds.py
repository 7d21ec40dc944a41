"""Every kind of norm under ZeRO on several processes against a plain PyTorch loop.

What could go wrong is the kinds' own: parameters of one number, of a module beside its children (the embedding's
scale), and matrices inside a norm, which ZeRO-3 must gather while the norm runs.

AdamW's eps is 1e-4: with the usual 1e-8 an update is nearly the sign of the gradient, and where a gradient is nearly 0
the order of a summation decides it. The plain loop against itself, whole batch against micro-batches, then differs
by up to 5e-4 in some weights (scalenorm with dssn); at 1e-4 every case here stays below 5e-6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nexa.config.build import from_mapping
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.model.kinds import KINDS
from tests.dist import test_layouts as layouts

ADAM_EPS = 1e-4
MATRICES = ("_proj.weight", "lm_head.weight", "gate_down.weight", "gate_up.weight")


def config(kind: str, stage: int, placement: str = "pre", micro: int = 2) -> dict:
    norm = {"kind": kind, "gate_rank": 3, "embedding": True}
    return layouts.config(placement, stage, micro, norm=norm, optim={"eps": ADAM_EPS})


def plain_loop(mapping: dict) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, no engine: losses, gradient norms, weights."""
    cfg = from_mapping(mapping)
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, 0)
    decay = [p for n, p in model.named_parameters() if n.endswith(MATRICES)]
    rest = [p for n, p in model.named_parameters() if not n.endswith(MATRICES)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=layouts.LR, betas=(0.9, 0.95), eps=ADAM_EPS)
    generator = torch.Generator().manual_seed(7)
    losses, norms = [], []
    for _ in range(layouts.STEPS):
        rows = torch.randint(0, 61, (8, 13), generator=generator)
        torch.rand((8, 12), generator=generator)  # the worker draws which labels to ignore: none here
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), layouts.CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    return losses, norms, {n: p.detach().flatten() for n, p in model.named_parameters()}


def check(tmp_path: Path, mapping: dict, processes: int) -> None:
    losses, norms, weights = layouts.run(tmp_path, mapping, processes)
    expected_losses, expected_norms, expected = plain_loop(mapping)
    assert losses == pytest.approx(expected_losses, rel=layouts.TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=layouts.TOLERANCE)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # a weight that starts at 0 is measured by how far it could have come
        scale = max(expected[name].abs().max().item(), layouts.STEPS * layouts.LR)
        assert (weight - expected[name]).abs().max().item() <= layouts.TOLERANCE * scale, name


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"rmsnorm", "layernorm"}])
def test_two_processes(tmp_path: Path, kind: str, stage: int) -> None:
    check(tmp_path, config(kind, stage), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("placement", ["post", "dssn"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rmsnorm"])
def test_grid(tmp_path: Path, kind: str, placement: str, stage: int, processes: int) -> None:
    check(tmp_path, config(kind, stage, placement), processes)
