"""ZeRO-3 never has the model whole on a rank while it is built."""

from __future__ import annotations

import json

import pytest

from tests.conftest import run_command

MODEL = [
    "model.vocab_size=4096",
    "model.hidden_size=768",
    "model.intermediate_size=2048",
    "model.num_hidden_layers=24",
    "model.num_attention_heads=12",
]


@pytest.mark.slow
def test_four_ranks_hold_a_quarter_each() -> None:
    """176M parameters in bf16. Besides its share a rank needs one matrix as it is drawn in fp32, and as it is placed."""
    arguments = ["+exp=pre_350m", *MODEL, "train.steps=1", "train.global_batch_size=4", "train.precision=bf16"]
    done = run_command("benchmarks/build.py", *arguments, processes=4, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["whole_gib"] > 0.3
    assert max(record["peak_growth_gib"]) < 0.7 * record["whole_gib"], record
