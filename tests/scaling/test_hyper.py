"""Hyper-parameter laws: worked values, and what is said of their ranges."""

import dataclasses

import pytest

from nexa.scaling import hyper
from nexa.scaling.hyper import RULES, Run, suggest

RUN = Run(3.5e8, 3.0e8, 7.86e9, 524_288.0, 2048.0, 1e-3, (0.9, 0.95), 0.1, 1024.0)


@pytest.mark.parametrize(
    ("size", "tokens", "lr", "batch"),
    [
        (25.31e6, 1.31e9, 5.94e-3, 93e3),
        (84.95e6, 2.62e9, 3.10e-3, 138e3),
        (302.43e6, 7.86e9, 1.75e-3, 259e3),
        (1208.01e6, 13.11e9, 7.65e-4, 347e3),
        (6476.27e6, 19.66e9, 2.62e-4, 438e3),
    ],
)
def test_step_law(size, tokens, lr, batch):
    """Values worked out by hand from the published constants, for the sizes of the C4 harness."""
    assert hyper.step_law_lr(size, tokens) == pytest.approx(lr, rel=3e-3)
    assert hyper.step_law_batch(tokens) == pytest.approx(batch, rel=5e-3)


@pytest.mark.parametrize(
    ("ratio", "share", "tokens", "decay"),
    [
        (19.5, 0.226, 2.62e9, 0.221),
        (21.4, 0.216, 7.86e9, 0.077),
        (9.8, 0.326, 13.11e9, 0.031),
        (22.6, 0.210, 1.31e9, 0.477),
    ],
)
def test_weight_decay_by_timescale(ratio, share, tokens, decay):
    """At rate 1e-3 and batches of 131,072 tokens."""
    assert hyper.timescale(ratio) == pytest.approx(share, abs=1e-3)
    found = hyper.weight_decay(131_072, 1e-3, tokens / ratio, tokens)
    assert found == pytest.approx(decay, rel=0.02)
    assert 131_072 / (1e-3 * found * tokens) == pytest.approx(hyper.timescale(ratio))


def test_beta2_keeps_its_half_life_in_tokens():
    """512 sequences with .95 go with .9999 at a single one (arXiv 2507.07101)."""
    assert hyper.beta2(524_288) == pytest.approx(0.95)
    assert hyper.beta2(1024) == pytest.approx(0.9999, abs=2e-6)
    lives = [hyper.half_life(batch, hyper.beta2(batch)) for batch in (4096, 65_536, 2_097_152)]
    assert lives == pytest.approx([lives[0]] * 3)
    assert lives[0] == pytest.approx(7.09e6, rel=1e-3)


def test_width_rules_keep_the_steady_state():
    """Top singular value ~ sqrt(lr / decay) d^(3/4) stays when rate and decay follow the width."""

    def top(width):
        rate, decay = hyper.width_lr(1e-3, width, 256), hyper.width_weight_decay(0.1, width, 256)
        return (rate / decay) ** 0.5 * width**0.75

    assert top(4096) == pytest.approx(top(256))
    assert hyper.width_lr(1e-3, 1024, 256) == pytest.approx(2.5e-4)
    assert hyper.width_weight_decay(0.1, 1024, 256) == pytest.approx(0.2)


def test_every_rule_speaks_of_the_run():
    rows = {row.key: row for row in suggest(RUN)}
    assert list(rows) == [rule.key for rule in RULES]
    assert rows["optim.lr"].value == pytest.approx(hyper.step_law_lr(3.0e8, 7.86e9))
    assert rows["train.global_batch_size"].value == pytest.approx(hyper.step_law_batch(7.86e9) / 2048)
    assert rows["train.global_batch_size"].current == 256
    assert rows["optim.betas[1]"].value == pytest.approx(0.95)
    assert all(row.source and row.note and not row.outside for row in rows.values())


def test_outside_its_range():
    rows = {row.key: row for row in suggest(dataclasses.replace(RUN, inner=5e7, tokens=2e11))}
    assert rows["optim.lr"].outside == [
        "50M parameters without embeddings, the law is from 60M to 1B",
        "200B tokens, the law is from 2B to 100B",
    ]
    assert rows["optim.betas[1]"].outside == []


def test_rules_of_width_only_with_a_proxy():
    rows = suggest(RUN, proxy_width=256)
    assert [row.key for row in rows[len(RULES) :]] == ["lr of matrices", "weight decay of matrices"]
    assert [row.value for row in rows[len(RULES) :]] == pytest.approx([2.5e-4, 0.2])
