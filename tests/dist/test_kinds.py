"""Every kind of norm under ZeRO and tensor parallelism against a plain PyTorch loop.

What could go wrong is the kinds' own: parameters of one number, of a module beside its children (the embedding's
scale), matrices inside a norm, which ZeRO-3 must gather while the norm runs, and statistics of features that ranks
share (NormFormer's norm inside the feed-forward).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nexa.model.kinds import KINDS
from tests.dist.common import check, config
from tests.dist.grid import STAGES, parallel


def case(kind: str, placement: str, stage: int, layout: tuple[int, int, bool]) -> dict:
    norm = {"kind": kind, "gate_rank": 3, "embedding": True, "placement": placement}
    if kind in {"powernorm", "unifiednorm"}:
        norm["warmup_steps"] = 6  # then 14 steps of running statistics
    # weights of 1/sqrt(d): with smaller ones DyT would be linear, and a wrong one not seen
    small = {"model": {"num_hidden_layers": 2, "initializer_range": 0.2}, "train": {"micro_batch_size": 8 // layout[1]}}
    return config(norm=norm, parallel=parallel(stage, layout), **small)


def test_data_parallel(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in {"rmsnorm", "layernorm"}]
    check(tmp_path, [case(kind, "pre", stage, (1, 2, False)) for kind in kinds for stage in (1, 3)], processes=2)


def test_features_that_ranks_share(tmp_path: Path) -> None:
    whole = [case(kind, "normformer", 1, (2, 1, False)) for kind in KINDS]
    shared = [case(kind, "normformer", 3, (2, 1, True)) for kind in KINDS]
    check(tmp_path, whole + shared, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post", "dssn", "normformer"])
@pytest.mark.parametrize("kind", KINDS)
def test_grid(tmp_path: Path, kind: str, placement: str) -> None:
    layouts = [(1, 4, False), (2, 2, False), (2, 2, True)]
    check(tmp_path, [case(kind, placement, stage, layout) for stage in STAGES for layout in layouts], processes=4)
