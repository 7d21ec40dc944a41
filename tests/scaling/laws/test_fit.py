"""Fits find the parameters that made the curves, and say when they cannot."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.compare import held_out
from nexa.scaling.laws.fit import DELTA, Problem, fit, measures, score
from tests.scaling.laws.common import ANNEALING, MULTIPOWER, curve, rates

NOISE = 3e-4
"""Relative; runs of one configuration differ by about as much (loss 3, spread .001)."""
TRAIN = ("cosine", "constant", "drop")


def made(law, params, names=TRAIN, noise=NOISE, **more):
    return [curve(law, params, name, noise=noise, **more) for name in names]


def annealing(decay=ANNEALING["lambda"]):
    return LAWS["annealing"]({"lambda": decay})


def test_annealing_is_recovered_and_lambda_chosen():
    found = fit(LAWS["annealing"](), made(annealing(), ANNEALING), profile=True)
    assert found.params["lambda"] == ANNEALING["lambda"]
    assert found.params == pytest.approx(ANNEALING, rel=0.01)
    assert list(found.params) == ["L0", "A", "alpha", "C", "lambda"]
    assert found.warnings == []
    assert found.condition < 1e4
    assert [row["lambda"] for row in found.profile if row["objective"] == min(r["objective"] for r in found.profile)]


def test_multipower_without_prior_is_recovered_without_noise():
    law = LAWS["multipower"]()
    found = fit(law, made(law, MULTIPOWER, noise=0.0, every=50), prior=0)
    assert found.params == pytest.approx(MULTIPOWER, rel=0.01)


def test_multipower_predicts_a_schedule_it_has_not_seen():
    law = LAWS["multipower"](warmup="interpretable")
    found = fit(law, made(law, MULTIPOWER, every=40))
    unseen = curve(law, MULTIPOWER, "wsd")
    assert score(law, found.params, unseen)["mean_relative_error"] < 1e-3
    assert {name: found.params[name] for name in ("L0", "A", "alpha")} == pytest.approx(
        {name: MULTIPOWER[name] for name in ("L0", "A", "alpha")}, rel=0.05
    )


def test_sizes_are_recovered():
    law, params = (
        LAWS["annealing_size"]({"lambda": 0.995}),
        ANNEALING | {"gamma": 0.2, "B": 3.0, "beta": 0.3, "L0": 1.8},
    )
    curves = [c for size in (10e6, 30e6, 100e6, 300e6) for c in made(law, params, size=size, every=60)]
    assert fit(law, curves).params == pytest.approx(params, rel=0.01)
    with pytest.raises(UserError, match="parameters: 25e6"):
        fit(law, made(annealing(), ANNEALING))


def test_the_objective_is_the_huber_loss_of_logs_and_its_gradient_right():
    problem = Problem(annealing(), made(annealing(), ANNEALING), 0.0)
    theta = np.array([3.0, 0.5, 0.7, 0.45])
    value, gradient = problem.objective_with_gradient(theta)
    logs = np.concatenate([np.log(law_loss) for law_loss in (problem.law.evaluate(f, theta) for f in problem.features)])
    sizes = np.abs(logs - problem.logs)
    expected = sum(0.5 * r * r if r < DELTA else DELTA * (r - DELTA / 2) for r in sizes)
    assert value == pytest.approx(expected, rel=1e-12)
    for at in range(4):
        shift = np.zeros(4)
        shift[at] = 1e-6
        difference = problem.objective(theta + shift) - problem.objective(theta - shift)
        assert gradient[at] == pytest.approx(difference / 2e-6, rel=1e-4)


def test_one_schedule_is_ill_posed():
    warnings = " ".join(fit(annealing(), made(annealing(), ANNEALING, ["cosine"])).warnings)
    assert "all curves have one schedule" in warnings
    warnings = " ".join(fit(annealing(), made(annealing(), ANNEALING, ["constant"])).warnings)
    assert "say nothing about C" in warnings


def test_what_cannot_be_told_apart_is_said():
    law = LAWS["multipower"](warmup="interpretable")
    found = fit(law, made(law, MULTIPOWER, every=60), prior=0)
    assert any("ill-conditioned" in text for text in found.warnings)
    found = fit(law, made(law, MULTIPOWER, every=60))
    assert any("C, beta, gamma" in text for text in found.warnings)
    assert found.params["C"] == pytest.approx(law.anchor["C"], rel=0.2)


def test_bootstrap_covers_the_truth_and_repeats_itself():
    curves = made(annealing(), ANNEALING)
    found = fit(annealing(), curves, bootstrap=40, seed=3)
    again = fit(annealing(), curves, bootstrap=40, seed=3)
    assert found.samples == again.samples
    assert len(found.samples) == 40
    for name, (low, high) in found.intervals().items():
        assert low <= found.params[name] <= high
        assert abs(ANNEALING[name] - found.params[name]) <= 2 * (high - low) + 1e-12
        assert high - low < 0.05 * ANNEALING[name]


def test_measures():
    found = measures(np.array([2.0, 4.0]), np.array([2.5, 4.0]))
    assert found == pytest.approx(
        {"mae": 0.25, "mean_relative_error": 0.125, "worst_relative_error": 0.25, "r2": 0.875}
    )


def test_leaving_curves_out():
    curves = made(annealing(), ANNEALING)
    found = held_out(annealing(), curves)
    assert [entry["path"] for entry in found["curves"]] == list(TRAIN)
    without = fit(annealing(), curves[1:])
    assert found["curves"][0] == score(without.law, without.params, curves[0])
    tested = held_out(annealing(), curves, made(annealing(), ANNEALING, ["wsd"], noise=0.0))
    assert tested["mean"]["mae"] < 1e-3
    with pytest.raises(UserError, match="at least two"):
        held_out(annealing(), curves[:1])


def test_too_little_to_fit():
    few = curve(annealing(), ANNEALING, "cosine", every=2500)
    with pytest.raises(UserError, match="3 rows after warm-up for 4 parameters"):
        fit(annealing(), [few])
    with pytest.raises(UserError, match="no lambda"):
        fit(LAWS["multipower"](), made(annealing(), ANNEALING), profile=True)
    assert rates("cosine").total == 6000
