"""Arithmetic of one GPU by hand."""

from dataclasses import replace

import pytest

from nexa.hardware import GPUS
from nexa.scaling.compute import PASSES, REACH, Chip, Reach, Work, architecture_of, micro_batch, product

CHIP = Chip(peak=1e12, bandwidth=1e9, reach=Reach(0.5, 0.25, "by hand"))
FAST_MEMORY = replace(CHIP, bandwidth=1e15)


def test_a_large_product_takes_its_flops():
    assert product(1024, 512, 256, FAST_MEMORY) == pytest.approx(2 * 1024 * 512 * 256 / 0.5e12)


def test_a_product_fills_whole_tiles():
    assert product(1, 128, 128, FAST_MEMORY) == product(128, 128, 128, FAST_MEMORY)
    assert product(129, 128, 128, FAST_MEMORY) == product(256, 128, 128, FAST_MEMORY)


def test_a_thin_product_takes_its_bytes():
    moved = 2 * (128 * 256 + 256 * 512 + 128 * 512)
    assert moved / 1e9 > 2 * 512 * 256 * 128 / 0.5e12
    assert product(512, 256, 128, CHIP) == pytest.approx(moved / 1e9)


def work(**changes) -> Work:
    given = dict(matrices={(128, 256): 3}, between=3 * 384, head=(640, 256), attention=512, tokens=128, sequence=1024)
    return Work(**(given | changes))


def test_a_micro_batch_by_hand():
    """Three matrices and a head; attention 4 x width x T x tokens / 2; the rest two thirds in the backward pass."""
    chip = replace(CHIP, bandwidth=1e11)
    forward, backward = micro_batch(work(), chip)
    products = 3 * product(128, 256, 128, chip) + product(640, 256, 128, chip)
    twice = 3 * (product(256, 128, 128, chip) + product(128, 128, 256, chip))
    twice += product(256, 640, 128, chip) + product(640, 128, 256, chip)
    attention = 4 * 512 * 1024 * 128 / 2 / 0.25e12
    rest = PASSES * 2 * 128 * (3 * 384 + 640 + 256) / 1e11
    assert forward == pytest.approx(products + attention + rest / 3)
    assert backward == pytest.approx(twice + 2.5 * attention + rest * 2 / 3)


def test_checkpointing_repeats_what_it_says():
    plain, full = (
        micro_batch(work(**c), FAST_MEMORY)
        for c in ({}, {"products_again": 1.0, "rest_again": True, "attention_again": True})
    )
    assert full[0] == plain[0]
    head = work(head=(0, 256))
    assert full[1] - plain[1] == pytest.approx(micro_batch(head, FAST_MEMORY)[0], rel=1e-6)


def test_narrow_models_reach_less_of_the_peak():
    """The same FLOPs in narrower matrices take longer, as more is between them."""
    chip = Chip(312e12, 2e12, REACH["Ampere"])
    wide = work(matrices={(4096, 4096): 1}, between=8192, head=(0, 0), attention=0, tokens=8192)
    narrow = work(matrices={(512, 512): 64}, between=64 * 1024, head=(0, 0), attention=0, tokens=8192)
    assert sum(micro_batch(narrow, chip)) > 1.5 * sum(micro_batch(wide, chip))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_shares(name):
    expected = "Hopper" if name.startswith(("H1", "H2", "GH", "B2")) else "Ampere"
    assert architecture_of(name) == expected
