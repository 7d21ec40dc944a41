"""Arithmetic and traffic by hand."""

import pytest

from nexa.hardware import GPUS, peak_of
from nexa.model.decoder import flops_per_token
from nexa.scaling.layout import Sizes
from nexa.scaling.step_time import Machine, flops, step_time, traffic
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


@pytest.mark.parametrize(
    ("stage", "hidden", "exposed"),
    [
        (0, 2 * 0.75 * 4000, 0),
        (1, 2 * 0.75 * 4000, 0.75 * 2000),
        (2, 3 * 2 * 0.75 * 4000, 0.75 * 2000),
        (3, 3 * 0.75 * (4000 + 2 * 2000), 0),
    ],
)
def test_data_parallel_traffic(stage, hidden, exposed):
    cfg = configuration(train={"precision": "bf16", "global_batch_size": 24})
    found = traffic(layout(cfg, 4, stage), COUNT)
    assert (found.hidden, found.exposed, found.tensor) == (hidden, exposed, 0)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("checkpointing", "passes"), [("none", 8), ("selective", 12), ("full", 12)])
def test_tensor_parallel_traffic(sequence, checkpointing, passes):
    """Gathers and scatters of tokens have the volume of all-reduces; recomputing repeats those of the forward pass."""
    train = {"activation_checkpointing": checkpointing}
    cfg = configuration(parallel={"tensor": 2, "sequence": sequence}, train=train)
    stream = 32 * 32 * 4
    assert traffic(layout(cfg, 2), COUNT).tensor == (passes * 2 + 4) * stream / 2


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
    fast, slow = (step_time(layout(cfg, 16, 1), Machine(GPUS["H100"], network=n), tracer)[0] for n in (1e12, 1e6))
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
