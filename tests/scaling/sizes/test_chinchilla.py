"""The size law: worked values, its optimum by brute force, its fit on made runs."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.scaling.sizes.chinchilla import PUBLISHED, Chinchilla, average_parameters, fit
from nexa.scaling.sizes.repetition import TOKEN_DECAY, Repeated

BESIROGLU = PUBLISHED["besiroglu"][0]
C4 = PUBLISHED["c4"][0]


def runs(law, noise=0.0, seed=0):
    """Seven sizes by six lengths: parameters, tokens, loss."""
    sizes, ratios = np.geomspace(2e7, 2e9, 7), np.geomspace(5, 160, 6)
    parameters = np.repeat(sizes, len(ratios))
    tokens = parameters * np.tile(ratios, len(sizes))
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(tokens)))
    return parameters, tokens, law.loss(parameters, tokens) * scatter


def test_published_constants():
    """Table 1 of arXiv 2305.16264: E 1.87, A 521, B 1488, alpha = beta = .353."""
    assert pytest.approx([1.8691, 520.82, 1487.72], rel=1e-4) == [C4.E, C4.A, C4.B]
    # by hand: 1.8172 + 482.01 / 1e9^.3478 + 2085.43 / 2e10^.3658
    assert BESIROGLU.loss(1e9, 2e10) == pytest.approx(1.8172 + 482.01 / 1350.31 + 2085.43 / 5859.3, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_optimum_is_that_of_a_search(name, flops):
    law = PUBLISHED[name][0]
    sizes = np.geomspace(1e6, 1e13, 200_001)
    best = sizes[np.argmin(law.loss(sizes, flops / 6 / sizes))]
    parameters, tokens = law.optimum(flops)
    assert parameters == pytest.approx(best, rel=1e-3)
    assert 6 * parameters * tokens == pytest.approx(flops)
    assert law.parameters_for(tokens) == pytest.approx(parameters)


def test_the_refit_agrees_with_chinchilla_itself():
    """Besiroglu et al.: about 20 tokens a parameter at the compute of Chinchilla, 70B and 1.4T."""
    parameters, tokens = BESIROGLU.optimum(5.76e23)
    assert parameters == pytest.approx(70e9, rel=0.1)
    assert tokens / parameters == pytest.approx(20, rel=0.1)


def test_fit_recovers_the_law():
    truth = Chinchilla(1.82, 480.0, 2080.0, 0.348, 0.366)
    found = fit(*runs(truth)).law
    assert vars(found) == pytest.approx(vars(truth), rel=1e-3)


def test_fit_with_noise_and_its_intervals():
    truth = Chinchilla(1.82, 480.0, 2080.0, 0.348, 0.366)
    found = fit(*runs(truth, noise=1e-3), bootstrap=40)
    assert pytest.approx(truth.E, rel=0.02) == found.law.E
    flops = 1e23  # a thousand times the largest run
    low, high = found.interval([sample.loss(*sample.optimum(flops)) for sample in found.samples])
    assert low < truth.loss(*truth.optimum(flops)) < high
    assert high - low < 0.1


def test_tied_exponents_are_the_law_of_over_training():
    """Gadre et al.: E + (a M^eta + b M^-eta) C^-eta with M = D / N, written with a = A 6^eta and b = B 6^eta."""
    eta, a, b = 0.12, 30.0, 90.0
    truth = Chinchilla(1.9, a / 6**eta, b / 6**eta, 2 * eta, 2 * eta)
    parameters, tokens, loss = runs(truth)
    ratio, flops = tokens / parameters, 6 * parameters * tokens
    assert np.allclose(loss, 1.9 + (a * ratio**eta + b * ratio**-eta) * flops**-eta)
    found = fit(parameters, tokens, loss, tied=True).law
    assert found.alpha == found.beta
    assert vars(found) == pytest.approx(vars(truth), rel=1e-3)


def test_too_few_or_uniform_runs():
    parameters, tokens, loss = runs(BESIROGLU)
    with pytest.raises(UserError, match="5 runs for 5 parameters"):
        fit(parameters[:5], tokens[:5], loss[:5])
    with pytest.raises(UserError, match="all runs have parameters=2e"):
        fit(parameters[:6], tokens[:6], loss[:6])


def test_average_parameters():
    assert average_parameters([(1e8, 1e9), (4e8, 3e9)]) == pytest.approx(3.25e8)
    assert average_parameters([(5.0, 7.0)]) == 5.0


def test_repetition_ceilings():
    """arXiv 2305.16264: four epochs are nearly as good as fresh data, and nothing is worth 16.4 times its own."""
    some = Repeated(C4, 1e9)
    assert some.effective_tokens(5e8) == 5e8
    assert some.effective_tokens(1e9) == 1e9
    assert some.effective_tokens(4e9) / 4e9 == pytest.approx(0.93, abs=0.01)
    assert some.effective_tokens(1e13) / 1e9 == pytest.approx(16.39, abs=0.01)
    by_hand = 1e9 + 1e9 * TOKEN_DECAY * (1 - np.exp(-15 / TOKEN_DECAY))
    assert some.effective_tokens(16e9) == pytest.approx(by_hand)


def test_repetition_without_repeating_is_the_plain_law():
    parameters, tokens = C4.optimum(1e20)
    some = Repeated(C4, 2 * tokens)
    assert some.loss(parameters, tokens) == pytest.approx(C4.loss(parameters, tokens))
    assert some.optimum(1e20)[0] == pytest.approx(parameters, rel=1e-3)
    # too large a model for its tokens is worth at most 1 + 5.31 times what they can feed
    fed = C4.parameters_for(tokens)
    assert some.effective_parameters(1e6 * fed, tokens) / fed == pytest.approx(6.309743)


def test_repetition_prefers_epochs_to_parameters():
    """The paper's finding: with little data more of the budget goes to epochs than to parameters."""
    flops = 100 * 6 * C4.parameters_for(1e9) * 1e9
    parameters, tokens = Repeated(C4, 1e9).optimum(flops)
    assert parameters < C4.optimum(flops)[0]
    assert tokens > C4.optimum(flops)[1]
    losses = [Repeated(C4, 1e9).loss(size, flops / 6 / size) for size in np.geomspace(0.2, 5, 81) * parameters]
    assert np.argmin(losses) == 40
