"""Weights of samples by their loss against numpy, their gradient against autograd, and losses by source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexa.config.schema import ModelConfig, NormConfig, ReweightConfig
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.train.reweight import report, token_factors, weights
from nexa.train.rows import losses_by_source

SUMS = torch.tensor([12.0, 3.0, 0.0, 20.0, 4.5], dtype=torch.float64)
TOKENS = torch.tensor([4.0, 2.0, 0.0, 4.0, 1.0])
LOSSES = np.array([3.0, 1.5, 5.0, 4.5])
"""Of the rows that have scored tokens."""
SCORES = {
    "linear_upper": lambda h, delta: np.minimum(h + delta, delta),
    "quadratic": lambda h, delta: 1 - h**2 / delta**2,
    "extremes": lambda h, delta: np.abs(h),
}


def expected(strategy: str, delta: float, temperature: float, losses: np.ndarray = LOSSES) -> np.ndarray:
    """As in the paper's section 3, with scipy-free softmax."""
    high, low = losses.max(), losses.min()
    h = 2 * delta * losses / (high - low) - delta * (high + low) / (high - low)
    exponential = np.exp(SCORES[strategy](h, delta) / temperature)
    return exponential / exponential.sum()


@pytest.mark.parametrize("strategy", SCORES)
@pytest.mark.parametrize(("delta", "temperature"), [(1.0, 1.0), (0.4, 0.1), (3.0, 5.0)])
def test_weights(strategy: str, delta: float, temperature: float) -> None:
    found = weights(SUMS, TOKENS, ReweightConfig(strategy, delta=delta, temperature=temperature)).numpy()
    wanted = expected(strategy, delta, temperature)
    np.testing.assert_allclose(found[[0, 1, 3, 4]], wanted, rtol=1e-12)
    assert found[2] == 0, "no scored token"


def test_what_is_reported() -> None:
    wanted = expected("linear_upper", 1.0, 0.5)
    assert report(SUMS, TOKENS, ReweightConfig("linear_upper", temperature=0.5)) == pytest.approx(
        {
            "reweight/loss": wanted @ LOSSES,
            "reweight/effective_samples": 1 / (wanted**2).sum(),
            "reweight/max_weight": wanted.max(),
        }
    )


@pytest.mark.parametrize("strategy", SCORES)
def test_equal_losses_have_equal_weights(strategy: str) -> None:
    cfg = ReweightConfig(strategy, temperature=0.01)
    tokens = torch.tensor([2.0, 4.0, 0.0, 8.0])
    torch.testing.assert_close(weights(tokens * 1.25, tokens, cfg), torch.tensor([1, 1, 0, 1]).double() / 3)
    alone = weights(torch.tensor([0.0, 7.0]), torch.tensor([0.0, 3.0]), cfg)
    assert alone.tolist() == [0, 1]


def test_equal_weights_are_plain_training() -> None:
    """Each of eight rows of as many tokens counts exactly once, so that nothing changes."""
    equal = weights(torch.full((8,), 3.0), torch.full((8,), 5.0), ReweightConfig("extremes"))
    assert token_factors(equal, torch.full((8,), 5.0)).tolist() == [1.0] * 8


def decoder() -> Decoder:
    model = ModelConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    made = Decoder(model, NormConfig(), loss_chunk_tokens=7)
    initialise(made, model, NormConfig(), 0)
    return made.double()


@pytest.mark.parametrize("strategy", SCORES)
def test_gradient_of_the_weighted_loss(strategy: str) -> None:
    """In fp64: two passes over chunks that end inside rows, against autograd through full logits."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 31, (5, 10), generator=generator)
    labels = torch.randint(0, 31, (5, 10), generator=generator)
    labels[0, :7] = labels[3] = -100
    cfg, model, plain = ReweightConfig(strategy, temperature=0.05), decoder(), decoder()
    tokens = (labels >= 0).sum(1).double()
    with torch.no_grad():
        total, sums = model(ids, labels, row_weights=torch.ones(5))
    assert total.item() == pytest.approx(sums.sum().item(), rel=1e-12)
    factors = token_factors(weights(sums, tokens, cfg), tokens)
    total, again = model(ids, labels, row_weights=factors)
    (total / tokens.sum()).backward()
    assert torch.equal(again, sums) and not again.requires_grad and sums[3] == 0

    logits = plain(ids)
    rows = [F.cross_entropy(logits[i, labels[i] >= 0], labels[i, labels[i] >= 0]) for i in (0, 1, 2, 4)]
    by_hand = expected(strategy, 1.0, 0.05, np.array([row.item() for row in rows]))
    loss = sum(float(w) * row for w, row in zip(by_hand, rows, strict=True))
    loss.backward()
    assert (total / tokens.sum()).item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_losses_by_source() -> None:
    names = ["web", "books", "code", "web", "books"]
    found = losses_by_source(names, SUMS, TOKENS)
    assert found == {"web": (12 + 20) / 8, "books": (3 + 4.5) / 3}, "code has no scored token"
