"""Training on reweighted samples, on two processes, against a plain loop with the weights written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.dist.common import check, config, deviation, reference
from tests.dist.grid import parallel

IGNORED = 0.85
"""Share of targets not scored: of rows with 12 targets now and then one has none."""
REWEIGHT = {"strategy": "quadratic", "apply": True, "temperature": 1.0, "delta": 0.7}


def objective(losses: torch.Tensor) -> torch.Tensor:
    """sum_i w_i l_i, l_i the mean of row i of losses [B, T]; nan is not scored, a row of them only is left out."""
    rows = [row[~row.isnan()].mean() for row in losses if not row.isnan().all()]
    values = np.array([row.item() for row in rows])
    h = 2 * 0.7 * values / np.ptp(values) - 0.7 * (values.max() + values.min()) / np.ptp(values)
    weights = np.exp(1 - h**2 / 0.7**2)
    weights /= weights.sum()
    return sum(float(w) * row for w, row in zip(weights, rows, strict=True))


def test_two_processes_train_on_the_weighted_loss(tmp_path: Path) -> None:
    layouts = [
        (1, parallel(1, (1, 2, False))),
        (4, parallel(3, (1, 2, False))),
        (2, parallel(0, (2, 1, False))),
        (4, parallel(2, (2, 1, True))),
        (8, parallel(1, (2, 1, True), backend="megatron")),
    ]
    mappings = [config("pre", reweight=REWEIGHT, train={"micro_batch_size": b}, parallel=p) for b, p in layouts]
    check(tmp_path, mappings, processes=2, ignore=IGNORED, objective=objective)
    plain = config("pre", train={"micro_batch_size": 1})
    assert deviation(reference(plain, IGNORED), reference(plain, IGNORED, objective)).worst > 0.01, "weights matter"
