"""Norms of every parameter's gradient, weight and update in every layout against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexa.parallel.norms import ParameterNorms, summarise
from tests.dist.common import config, reference, run_jobs
from tests.dist.grid import STAGES, parallel


@pytest.mark.parametrize("layout", [(1, 2, False), (2, 1, True)])
def test_every_parameter(tmp_path: Path, layout: tuple[int, int, bool]) -> None:
    mappings = [config("normformer", parallel=parallel(stage, layout)) for stage in STAGES]
    expected = reference(mappings[0]).measured
    assert expected is not None
    for outcome in run_jobs(tmp_path, mappings, processes=2):
        assert outcome.measured is not None and outcome.measured.keys() == expected.keys()
        for name, norms in outcome.measured.items():
            assert norms == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name


def test_summary() -> None:
    rows = summarise(
        {
            "model.embed_tokens.weight": ParameterNorms(3.0, 1.0, 0.0),
            "model.layers.0.mlp.up_proj.weight": ParameterNorms(1.0, 2.0, 0.3),
            "model.layers.0.input_layernorm.weight": ParameterNorms(1.0, 2.0, 0.4),
        }
    )
    assert rows["grad_norm/layers.0"] == pytest.approx(2**0.5)
    assert rows["param_norm"] == pytest.approx(3.0)
    assert rows["update_norm"] == rows["update_norm/layers.0"] == pytest.approx(0.5)
    assert rows["grad_norm/embed_tokens"] == 3.0
