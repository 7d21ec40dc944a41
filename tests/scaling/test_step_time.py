"""Arithmetic and traffic by hand."""

from dataclasses import replace

import pytest

from nexa.hardware import GPUS, peak_of
from nexa.model.decoder import flops_per_token
from nexa.scaling.collectives import Network
from nexa.scaling.layout import Sizes
from nexa.scaling.step_time import (
    Machine,
    Strategy,
    data_bytes,
    data_time,
    flops,
    step_time,
    strategy_of,
    tensor_time,
    time_of,
    work_of,
)
from nexa.scaling.trace import Tracer
from tests.scaling.common import configuration, layout

COUNT = Sizes(total=1000, largest=300, group=900, embedding=200, blocks=(300, 300), head=200)


def test_flops_are_those_of_the_mfu():
    for tied in (False, True):
        for kind in ("rmsnorm", "gatednorm"):
            cfg = configuration(model={"tie_word_embeddings": tied}, norm={"kind": kind})
            model, again = flops(layout(cfg), Tracer(cfg.model, cfg.norm).shapes)
            assert model == flops_per_token(cfg.model, cfg.norm, cfg.data.sequence_length)
            assert again == 0


def test_full_checkpointing_repeats_the_blocks():
    cfg = configuration(train={"activation_checkpointing": "full"})
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80)
    assert flops(layout(cfg), Tracer(cfg.model, cfg.norm).shapes)[1] == 2 * matrices + 4 * 2 * 32 * 16


def strategy(**changes) -> Strategy:
    """Eight ranks of one node, a million parameters in four pieces."""
    given = dict(data=8, tensor=1, stage=3, accumulation=2, elements=1e6, pieces=4, width=2, reduce_width=4)
    return Strategy(**(given | changes))


PLAIN = Network(inside=1e9, between=1e9, hop=0.0, hop_between=0.0, call=0.0, share=1.0)
"""A ring of 8 takes 7/8 of (bytes / 1e9) seconds: 1.75 ms to gather a million bf16 weights, 3.5 ms to reduce fp32."""
GATHER, REDUCE = 1.75e-3, 3.5e-3


@pytest.mark.parametrize(
    ("stage", "forward", "backward", "reduce", "gather"),
    [
        (0, 1.0, 2.0, 2 * REDUCE, 0),  # once, an all-reduce, beside nothing
        (1, 1.0, 2.0, REDUCE / 4, GATHER),  # once, all but the first piece hidden; weights after the update
        (1, 1e-3, 2e-3, REDUCE - 2e-3, GATHER),
        (2, 1e-3, 2e-3, 2 * (REDUCE - 2e-3), GATHER),  # for each of two micro-batches
        (3, 1.0, 2.0, 2 * REDUCE / 4, 2 * 2 * GATHER / 4),
        (3, 1e-3, 2e-3, 2 * (REDUCE - (2e-3 - GATHER)), 2 * (GATHER - 1e-3 + GATHER / 4)),
        (3, 0.0, 0.0, 2 * REDUCE, 2 * 2 * GATHER),
    ],
)
def test_what_data_parallelism_cannot_hide(stage, forward, backward, reduce, gather):
    found = data_time(strategy(stage=stage), forward, backward, PLAIN)
    assert found == pytest.approx((reduce, gather))


def test_weights_gathered_early_hide_beside_the_forward_pass():
    early = data_time(strategy(stage=2, early_gather=True), 1e-3, 2e-3, PLAIN)[1]
    assert early == pytest.approx(GATHER - 1e-3)


def test_every_collective_pays_its_latency():
    few, many = (data_time(strategy(stage=0, pieces=n), 1, 1, replace(PLAIN, call=1e-3))[0] for n in (1, 5))
    assert (few, many) == (pytest.approx(2 * REDUCE + 1e-3), pytest.approx(2 * REDUCE + 5e-3))


@pytest.mark.parametrize(("stage", "bytes_"), [(0, 4e6), (1, 4e6 + 2e6), (2, 2 * 4e6 + 2e6), (3, 2 * (4e6 + 2 * 2e6))])
def test_bytes_that_data_parallelism_moves(stage, bytes_):
    assert data_bytes(strategy(stage=stage)) == bytes_
    assert data_bytes(strategy(stage=stage, data=1)) == 0


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("checkpointing", "passes"), [("none", 8), ("selective", 12), ("full", 12)])
def test_tensor_parallel_time(sequence, checkpointing, passes):
    """Gathers and scatters of tokens have the volume of all-reduces; recomputing repeats those of the forward pass."""
    train = {"activation_checkpointing": checkpointing}
    cfg = configuration(parallel={"tensor": 2, "sequence": sequence}, train=train)
    stream = 32 * 32 * 4
    found = tensor_time(strategy_of(layout(cfg, 2), COUNT), PLAIN)
    assert found == pytest.approx((passes * 2 + 4) * stream / 2 / 1e9)


def test_the_slowest_of_two_ranks_is_waited_for():
    """Mean of the larger of two standard normal numbers: 1/sqrt(pi)."""
    alone, two = (
        time_of(strategy(data=n, stage=0, elements=0), (1.0, 2.0), 1e12, PLAIN, variation=0.1) for n in (1, 2)
    )
    assert alone.straggler == 0
    assert two.straggler == pytest.approx(6.0 * 0.1 / 3.141592653589793**0.5)
    assert two.total == pytest.approx(6.0 + two.straggler)


def test_work_of_a_tensor_rank_by_hand():
    """Two blocks of 4 heads of 8, 2 of them keys', feed-forward of 80, cut in two."""
    cfg = configuration(train={"precision": "bf16"}, parallel={"tensor": 2, "sequence": True})
    found = work_of(layout(cfg, 2), Tracer(cfg.model, cfg.norm).shapes)
    assert found.matrices == {(16, 32): 2, (8, 32): 4, (32, 16): 2, (40, 32): 4, (32, 40): 2}
    # cut sides as they are, whole sides by two: q, k and v, o, gate and up, down
    assert found.between == 2 * ((16 + 16) + 2 * (8 + 16) + (16 + 16) + 2 * (40 + 16) + (40 + 16))
    assert (found.head, found.attention, found.tokens) == ((160, 32), 2 * 32 // 2, 32)


def test_one_gpu_is_arithmetic_and_update():
    cfg = configuration(train={"precision": "bf16"})
    tracer = Tracer(cfg.model, cfg.norm)
    found, basis = step_time(layout(cfg, 1, 1), Machine(GPUS["H100"], mfu=0.5), tracer)
    assert found is not None
    assert found.compute == pytest.approx(32 * flops(layout(cfg), tracer.shapes)[0] / (989e12 * 0.5))
    assert (found.data, found.tensor) == (0, 0)
    assert "50%" in basis and "given" in basis


def test_unknown_figures_give_no_time():
    cfg = configuration(train={"precision": "bf16", "global_batch_size": 4})
    tracer = Tracer(cfg.model, cfg.norm)
    assert step_time(layout(cfg, 1, 1), Machine(GPUS["V100-32GB"]), tracer)[0] is None  # no bf16 units
    alone, _ = step_time(layout(cfg, 1, 1), Machine(GPUS["L40S"]), tracer)
    two, why = step_time(layout(cfg, 2, 1), Machine(GPUS["L40S"]), tracer)
    assert alone is not None and two is None
    assert "L40S" in why


def test_a_slow_network_shows():
    cfg = configuration(train={"precision": "bf16", "global_batch_size": 32})
    tracer = Tracer(cfg.model, cfg.norm)
    fast, slow = (step_time(layout(cfg, 16, 1), Machine(GPUS["H100"], network=n), tracer)[0] for n in (1e12, 1e3))
    assert fast is not None and slow is not None
    assert slow.data > 1000 * fast.data
    assert slow.compute == fast.compute


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak_under_its_device_name(name):
    assert peak_of(GPUS[name].device, "fp16")[0] is not None


@pytest.mark.parametrize(
    ("name", "gigabytes", "terabytes_per_second", "nvlink_sum"),
    [("H100", 80, 3.35, 900), ("H200", 141, 4.8, 900), ("A100-80GB", 80, 2.039, 600), ("B200", 180, 8, 1800)],
)
def test_figures_of_the_data_sheets(name, gigabytes, terabytes_per_second, nvlink_sum):
    gpu = GPUS[name]
    assert (gpu.memory, gpu.bandwidth) == (gigabytes * 1e9, pytest.approx(terabytes_per_second * 1e12))
    assert 2 * gpu.link == nvlink_sum * 1e9
