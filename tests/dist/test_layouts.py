"""ZeRO 0-3 x tensor x sequence parallelism on 1, 2 and 4 processes against a plain PyTorch loop: losses, gradient norms,
final weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nexa.config.build import from_mapping
from nexa.scaling.layout import full_shapes, local_shape
from tests.dist.common import PLACEMENTS, check, config, deviation, reference, run_jobs
from tests.conftest import run_command
from tests.dist.grid import STAGES, parallel

TP2, TP2_SP = (2, 1, False), (2, 1, True)
CONVERTED = {"model": {"input_bias": True, "hidden_size": 23, "head_dim": 6}, "norm": {"kind": "crmsnorm"}}
"""As `nexa convert` makes a model: biases, which are shared out like the rows of their matrices, and an odd width."""


def test_one_process(tmp_path: Path) -> None:
    check(tmp_path, [config("pre", parallel=parallel(stage, (1, 1, False))) for stage in STAGES], processes=1)


def test_two_processes(tmp_path: Path) -> None:
    """With accumulation, and with a different number of scored tokens on each rank and micro-batch."""
    data = [config("mix", train={"micro_batch_size": 1}, parallel=parallel(stage, (1, 2, False))) for stage in STAGES]
    tensor = [config("mix", parallel=parallel(stage, TP2)) for stage in STAGES]
    sequence = [config("peri", parallel=parallel(stage, TP2_SP)) for stage in STAGES]
    data.append(config(**CONVERTED, parallel=parallel(3, (1, 2, False))))
    tensor.append(config(**CONVERTED, parallel=parallel(0, TP2)))
    # key and value biases that every rank has whole
    whole = CONVERTED["model"] | {"num_key_value_heads": 1, "intermediate_size": 41}
    sequence.append(config(**CONVERTED | {"model": whole}, parallel=parallel(3, TP2_SP)))
    check(tmp_path, data + tensor + sequence, processes=2, ignore=0.3)


def test_the_insides_of_attention(tmp_path: Path) -> None:
    """Everything that reads or scales heads, with tensor-parallel ranks that have whole groups of them."""
    # a short context: cosine attention starts with the scale log2(L^2 - L), and 20 amplifies every rounding
    model = {"max_position_embeddings": 12}
    kinds = [{"qk": "rms"}, {"qk": "rms_full"}, {"qk": "cosine"}]
    mappings = [config("pre", model=model, norm=norm, parallel=parallel(1, TP2_SP)) for norm in kinds]
    mappings += [config(placement, parallel=parallel(3, TP2)) for placement in ("hybrid", "normformer")]
    mappings.append(config("pre", model={"tie_word_embeddings": True}, parallel=parallel(3, TP2_SP)))
    mappings.append(config("pre", data={"document_mask": False}, train={"micro_batch_size": 4}, parallel=parallel(0, TP2)))
    check(tmp_path, mappings, processes=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [pytest.param(4, 1, marks=pytest.mark.slow), (12, 3)])
def test_fewer_key_value_heads_than_ranks(tmp_path: Path, heads: int, kv_heads: int) -> None:
    """Four ranks: heads that several share, and three heads whose queries lie across ranks; an uneven feed-forward."""
    model = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": 41}
    plain = [config("pre", model=model, parallel=parallel(stage, (4, 1, stage == 1))) for stage in (1, 3)]
    normed = [config("pre", model=model, norm={"qk": "rms_full"}, parallel=parallel(2, (4, 1, True)))]
    check(tmp_path, plain + normed, processes=4)


def test_megatron_core_layers_compute_the_same(tmp_path: Path) -> None:
    cases = [("pre", 0, TP2), ("peri", 1, TP2_SP), ("normformer", 2, TP2_SP), ("hybrid", 3, TP2), ("mix", 3, TP2_SP)]
    mappings = [config(name, parallel=parallel(stage, layout, backend="megatron")) for name, stage, layout in cases]
    mappings.append(
        config("pre", model={"tie_word_embeddings": True}, parallel=parallel(1, TP2_SP, backend="megatron"))
    )
    mappings.append(config(**CONVERTED, parallel=parallel(2, TP2_SP, backend="megatron")))
    check(tmp_path, mappings, processes=2, ignore=0.3)


def test_the_plan_knows_what_a_rank_holds(tmp_path: Path) -> None:
    mappings = [
        config("normformer", model={"num_key_value_heads": heads, "input_bias": True}, parallel=parallel(stage, TP2))
        for heads, stage in ((1, 1), (2, 3))
    ]
    for mapping, outcome in zip(mappings, run_jobs(tmp_path, mappings, 2, steps=1), strict=True):
        cfg = from_mapping(mapping)
        kv_heads = mapping["model"]["num_key_value_heads"]
        matrices = {n: s for n, s in full_shapes(cfg.model, cfg.norm).items() if len(s) == 2 or "proj.bias" in n}
        assert outcome.held is not None and len(matrices) == 2 + 7 * 4 + 5 * 4
        for name, shape in matrices.items():
            assert outcome.held[name] == list(local_shape(name, shape, 2, kv_heads)), name


def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    for layout, processes in (((1, 1, False), 1), (TP2_SP, 2)):
        mappings = [
            config("peri", train={"activation_checkpointing": how}, parallel=parallel(stage, layout))
            for stage in (0, 3)
            for how in ("none", "selective", "full")
        ]
        outcomes = run_jobs(tmp_path, mappings, processes, steps=5)
        for first in (0, 3):
            for other in outcomes[first + 1 : first + 3]:
                assert deviation(other, outcomes[first]).worst <= 1e-6


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed refuses fp16 on this CPU")
def test_fp16_norms_are_those_without_the_loss_scale(tmp_path: Path) -> None:
    expected = reference(config("pre"))
    layouts = [(1, (1, 2, False)), (3, TP2_SP)]
    mappings = [config("pre", train={"precision": "fp16"}, parallel=parallel(*layout)) for layout in layouts]
    for outcome in run_jobs(tmp_path, mappings, 2):
        assert outcome.divergence == 0
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-3)
        assert outcome.norms == pytest.approx(expected.norms, rel=2e-3)


@pytest.mark.slow
def test_bf16_spreads_as_one_process_does(tmp_path: Path) -> None:
    """bf16 rounds each activation to 3 digits, and another order of the same sums rounds otherwise. How far that leads is
    measured on one process that reads its batch in pieces of 8, 4, 2 and 1; no layout may go
    further than three times that: tensor parallelism also rounds the partial sums of its ranks."""
    bf16 = [
        config("pre", train={"precision": "bf16", "micro_batch_size": micro}, parallel=parallel(1, (1, 1, False)))
        for micro in (8, 4, 2, 1)
    ]
    whole, *pieces = run_jobs(tmp_path, bf16, 1)
    spread = [deviation(one, whole) for one in pieces]
    (exact,) = run_jobs(tmp_path, [config("pre", parallel=parallel(0, (1, 1, False)))], 1)
    assert whole.losses == pytest.approx(exact.losses, rel=1e-2)
    mappings = [
        config("pre", train={"precision": "bf16"}, parallel=parallel(stage, layout))
        for stage in STAGES
        for layout in [(1, 2, False), TP2, TP2_SP]
    ]
    for mapping, outcome in zip(mappings, run_jobs(tmp_path, mappings, 2), strict=True):
        found = deviation(outcome, whole)
        assert found.divergence == 0
        assert found.loss <= 3 * max(one.loss for one in spread), (mapping["parallel"], found, spread)
        assert found.norm <= 3 * max(one.norm for one in spread), (mapping["parallel"], found, spread)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_grid(tmp_path: Path, placement: str, processes: int) -> None:
    """The contract's grid; `python -m tests.dist.grid` prints its figures."""
    layouts = {1: [(1, 1, False)], 2: [(1, 2, False), TP2, TP2_SP], 4: [(1, 4, False), (2, 2, False), (2, 2, True)]}
    mappings = [
        config(placement, train={"micro_batch_size": 4 // layout[1]}, parallel=parallel(stage, layout))
        for layout in layouts[processes]
        for stage in STAGES
    ]
    check(tmp_path, mappings, processes)




@pytest.mark.slow
def test_compiled_blocks_with_collectives_inside(tmp_path: Path) -> None:
    compiled = {"compile": True}
    mappings = [config("peri", train=compiled, parallel=parallel(1, layout)) for layout in (TP2, TP2_SP)]
    check(tmp_path, [*mappings, config("peri", train=compiled, parallel=parallel(3, (1, 2, False)))], 2)


def test_what_gathers_at_stage_3_does_not_break_up_compiled_blocks() -> None:
    done = run_command("-m", "tests.dist.compile_worker", processes=2, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # one graph for all blocks, forward and backward; one for the last norm; one for the loss
    assert found["breaks"] == {} and 0 < found["graphs"] <= 4, found
