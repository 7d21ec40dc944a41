"""The model of a step against published measurements that no constant was fitted to."""

import statistics

import pytest

from benchmarks.published import MODELS, ROWS, SOURCES, fitted
from benchmarks.simulate import GOOD, flops_per_token, matrices, parameters, predict

RESULTS = [predict(row) for row in ROWS]
HELD_OUT = [result for result in RESULTS if not fitted(result.row)]


def test_there_is_enough_to_compare_with():
    assert len(RESULTS) - len(HELD_OUT) == 10
    assert len(HELD_OUT) >= 50
    assert {row.source for row in ROWS} == set(SOURCES)
    assert {result.row.source for result in HELD_OUT} == set(SOURCES) - {"tinyllama"}


def test_most_of_what_was_held_out_is_near():
    errors = [abs(result.error) for result in HELD_OUT]
    assert sum(error <= GOOD for error in errors) >= 48
    assert statistics.median(errors) < 0.04
    assert max(errors) < 0.20


@pytest.mark.parametrize(("source", "least"), [("torchtitan-2024", 1), ("torchtitan-2025", 2), ("megatron-0.8", 3)])
def test_rows_of_other_systems_are_near(source, least):
    """The shares of products come from llm-foundry: these say whether they carry over."""
    assert sum(abs(r.error) <= GOOD for r in HELD_OUT if r.row.source == source) >= least


def test_scaling_out_slows_as_measured():
    """llm-foundry's 7B at 128 and 512 GPUs: slower by 8%; the model must see some of it and no more."""
    few, many = (next(r for r in RESULTS if r.row.model == "mpt-7b" and r.row.gpus == n) for n in (128, 512))
    assert 0 < 1 - many.predicted / few.predicted < 1 - many.row.published / few.row.published + 0.01


@pytest.mark.parametrize(
    ("model", "billions"),
    [("mpt-1b", 1.316), ("mpt-7b", 6.659), ("mpt-70b", 64.86), ("llama3-8b", 8.03), ("llama3-70b", 70.55)],
)
def test_models_have_their_published_sizes(model, billions):
    """llm-foundry's table gives parameters with position embeddings; Llama's sizes are those of their cards."""
    assert parameters(MODELS[model]) / 1e9 == pytest.approx(billions, rel=0.005)


def test_flops_are_those_of_the_source():
    """MPT-1B at 2,048 tokens: 45,455 tokens/s are 413 TFLOP/s in the source's table."""
    assert flops_per_token(MODELS["mpt-1b"], 2048) * 45455 == pytest.approx(413e12, rel=0.01)


def test_tensor_ranks_share_the_work():
    whole, one = matrices(MODELS["llama3-8b"], 1)[0], matrices(MODELS["llama3-8b"], 8)[0]
    count = [sum(n * out * inner for (out, inner), n in found.items()) for found in (whole, one)]
    assert count[0] == 8 * count[1]
