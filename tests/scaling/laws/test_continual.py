"""The laws of continual pre-training: their equations by loops, slopes, recovery, and where a run's past comes from."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from nexa.config.files import to_yaml
from nexa.errors import UserError
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.curves import Curve, load
from nexa.scaling.laws.fit import fit, score
from nexa.scaling.laws.rates import Rates, distinct, from_spec
from tests.scaling.common import configuration

FINEWEB = {"L0": 3.057, "A": 0.49, "alpha": 0.497, "C1": 0.299, "C2": 0.298, "B": 0.366, "E": 28.0, "beta": 0.189}
"""arXiv 2505.07796: loss on the old data, 106M parameters."""
PARAMS = {
    "continual": FINEWEB | {"lambda": 0.99},
    "continual_replay": FINEWEB | {"b": -1.5, "e": 0.8, "lambda": 0.99},
    "continual_size": FINEWEB | {"L0": 1.8, "g1": 0.235, "g2": 0.199, "F": 3.072, "phi": 0.195, "lambda": 0.99},
}
PEAK = 2e-4


def schedule(kind="constant", total=4000, warmup=100, **more):
    return from_spec({"name": kind, "peak_lr": PEAK, "total_steps": total, "warmup_steps": warmup} | more, kind)


def continued(before, rates, replay=0.0):
    return replace(rates, before=before, replay=replay)


def runs(shares=(0.0,)):
    """Pre-training with and without decay, and what goes on from there in several ways."""
    constant, decayed = schedule(total=8000), schedule("cosine", 8000, min_lr=2e-5)
    ways = [schedule(total=6000), schedule("cosine", 6000, min_lr=0.0), schedule("linear", 2500, min_lr=0.0, warmup=0)]
    later = [
        continued(base, way, share) for base in (constant.until(3000), decayed) for way in ways for share in shares
    ]
    return [constant, decayed, *later]


def curves_of(law, params, many, noise=0.0, every=20, size=None):
    made = []
    for number, rates in enumerate(many):
        index = np.arange(rates.warmup, rates.total, every)
        loss = law.predict(rates, index, params, size)
        loss = loss * np.exp(noise * np.random.default_rng(number).standard_normal(len(index)))
        made.append(Curve(f"{number}", f"{number}.csv", rates, index, index, rates.values[index], loss, size))
    return made


def by_loops(name, rates, update, p, millions):
    """The loss after an update, step by step as the paper writes it."""

    def phase(eta, warmup, last):
        s1 = s2 = momentum = 0.0
        for i in range(last + 1):
            s1 += eta[i]
            momentum = p["lambda"] * momentum + (eta[i - 1] - eta[i] if i > warmup else 0.0)
            s2 += momentum
        return s1, s2

    old, new = rates.before or rates, (0.0, 0.0)
    first = phase(old.values, old.warmup, old.total - 1 if rates.before else update)
    if rates.before:
        new = phase(rates.values, rates.warmup, update)
    scale, speed, extra, grown = p["B"], p["E"], 0.0, (1.0, 1.0)
    if name == "continual_replay":
        scale, speed = scale * np.exp(p["b"] * rates.replay), speed * np.exp(p["e"] * rates.replay)
    if name == "continual_size":
        extra, grown = p["F"] * millions ** -p["phi"], (millions ** p["g1"], millions ** p["g2"])
    moved = scale * (1 - (1 + speed * new[0]) ** -p["beta"]) if rates.replay < 1 else 0.0
    annealing = p["C1"] * grown[0] * first[1] + p["C2"] * grown[1] * new[1]
    return p["L0"] + p["A"] * (first[0] + new[0]) ** -p["alpha"] - annealing + moved + extra


@pytest.mark.parametrize("name", PARAMS)
def test_the_law_is_its_equation(name):
    law, base = LAWS[name]({"lambda": 0.99}), schedule("cosine", 900, min_lr=2e-5)
    way = schedule("linear", 400, warmup=50, min_lr=0.0)
    for rates in (base, continued(base.until(700), way, 0.25), continued(base, schedule("linear", 300, 0, min_lr=0.0))):
        index = np.array([200, 203, 299])
        found = law.predict(rates, index, PARAMS[name], 70e6)
        assert found == pytest.approx([by_loops(name, rates, t, PARAMS[name], 70) for t in index], rel=1e-12)


def test_worked_numbers():
    """Two updates of 1e-4 x 10,000 before, one after: S1pt = 2, S1cpt = 1, nothing annealed."""
    rates = continued(Rates(np.ones(3), 0), Rates(np.ones(2), 0))
    (found,) = LAWS["continual"]().predict(rates, np.array([0]), FINEWEB)
    assert found == pytest.approx(3.057 + 0.49 * 3**-0.497 + 0.366 * (1 - 29**-0.189), rel=1e-12)


def test_same_data_has_no_shift():
    base, way = schedule("cosine", 900, min_lr=2e-5), schedule("linear", 400, warmup=0, min_lr=0.0)
    law, index = LAWS["continual"](), np.array([300])
    without = law.predict(continued(base, way), index, FINEWEB | {"B": 0.0})
    assert law.predict(continued(base, way, 1.0), index, FINEWEB) == pytest.approx(without)
    assert law.predict(continued(base, way), index, FINEWEB) > without + 0.04


@pytest.mark.parametrize("name", PARAMS)
def test_slopes(name):
    law, rates = LAWS[name]({"lambda": 0.99}), continued(schedule("cosine", 900, min_lr=0.0), schedule(total=900), 0.3)
    rates = replace(rates, values=rates.values * np.linspace(1, 0.5, 901))
    features, theta = law.features(rates, np.arange(120, 900, 60), 70e6), law.vector(PARAMS[name])
    value, slopes = law.evaluate_with_slopes(features, theta)
    assert value == pytest.approx(law.evaluate(features, theta), rel=1e-15)
    for column, step in enumerate(1e-5 * theta):
        move = np.zeros(len(theta))
        move[column] = step
        expected = (law.evaluate(features, theta + move) - law.evaluate(features, theta - move)) / (2 * step)
        assert np.abs(slopes[:, column]).max() > 0, law.fitted[column]
        assert slopes[:, column] == pytest.approx(expected, rel=1e-6, abs=1e-9), law.fitted[column]


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("continual", [True, False])
def test_the_final_loss_and_what_each_rate_does_to_it(name, continual):
    law, rates = LAWS[name]({"lambda": 0.99}), schedule("cosine", 500, min_lr=2e-5)
    rates = continued(schedule(total=700), rates, 0.2) if continual else rates
    value, slopes = law.final(rates, PARAMS[name], 70e6)
    assert value == pytest.approx(law.predict(rates, np.array([499]), PARAMS[name], 70e6)[0])
    for step in (3, 99, 100, 101, 300, 498, 499):
        moved = []
        for sign in (1, -1):
            values = rates.values.copy()
            values[step] *= 1 + sign * 1e-4
            moved.append(law.final(replace(rates, values=values), PARAMS[name], 70e6)[0])
        assert slopes[step] == pytest.approx((moved[0] - moved[1]) / (2e-4 * rates.values[step]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_recovery(sign):
    """Every parameter within 1 % at the noise of a validation loss; B of either sign."""
    law, params = LAWS["continual"](), FINEWEB | {"B": sign * 0.366, "beta": 0.6, "lambda": 0.999}
    found = fit(law, curves_of(law, params, runs(), 3e-4))
    assert found.params == pytest.approx(params, rel=0.01)
    assert found.warnings == []


def test_replay_is_recovered_and_another_share_predicted():
    law, params = LAWS["continual_replay"](), PARAMS["continual_replay"] | {"beta": 0.6, "e": 1.5, "lambda": 0.999}
    found = fit(law, curves_of(law, params, runs((0.0, 0.5)), 3e-4, every=50))
    assert found.params == pytest.approx(params, rel=0.01)
    unseen = curves_of(law, params, [continued(schedule(total=5000), schedule("cosine", 3000, min_lr=0.0), 0.35)])
    assert score(law, found.params, unseen[0])["worst_relative_error"] < 1e-3


def test_sizes_are_recovered():
    law, params = LAWS["continual_size"](), PARAMS["continual_size"] | {"beta": 0.6, "lambda": 0.999}
    sizes = (2e7, 2e8, 2e9)
    curves = [c for size in sizes for c in curves_of(law, params, runs()[::2], 3e-5, every=150, size=size)]
    assert fit(law, curves).params == pytest.approx(params, rel=0.01)
    with pytest.raises(UserError, match="parameters: 25e6"):
        fit(law, [replace(curve, size=None) for curve in curves])


def test_a_law_that_does_not_count_the_past_says_so():
    law, params = LAWS["continual"](), PARAMS["continual"]
    curves = curves_of(law, params, runs()[:4], every=100)
    found = " ".join(fit(LAWS["annealing"](), curves).warnings)
    assert "2: goes on from a run of 3000 steps, which law annealing does not count; law continual does" in found
    only = fit(law, curves_of(law, params, [schedule(), schedule("cosine", min_lr=0.0)], 1e-4, every=100)).warnings
    assert any("say nothing about C2, B, E, beta" in text for text in only)


def test_what_a_run_goes_on_from_makes_schedules_differ():
    base, way = schedule(), schedule(total=500)
    many = [
        way,
        continued(base, way),
        continued(base.until(3000), way),
        continued(base, way, 0.5),
        continued(base, way),
    ]
    assert distinct(many) == 4


SPEC = """curves:
  - name: new
    schedule: {name: linear, peak_lr: 1.0e-4, min_lr: 0, total_steps: 50}
"""
PAST = "    pretraining: {name: constant, peak_lr: 2.0e-4, warmup_steps: 10, total_steps: 100%s}\n"


def loaded(tmp_path, text):
    (tmp_path / "spec.yaml").write_text(text)
    return load([tmp_path / "spec.yaml"])[0].rates


def test_a_spec_says_what_was_before(tmp_path):
    rates = loaded(tmp_path, SPEC + PAST % ", until: 40" + "    replay: 0.25\n")
    assert (rates.total, rates.replay, rates.before.total, rates.before.warmup) == (50, 0.25, 40, 10)
    assert rates.before.values[-1] == 2e-4
    assert loaded(tmp_path, SPEC + PAST % "").before.total == 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    replay: 0.25\n", "replay=0.25, but no pretraining; give the schedule of the run before"),
        (PAST % "" + "    replay: 1.5\n", "replay=1.5; give the share of old data, from 0 to 1"),
        (PAST % "" + "    replay: half\n", "replay='half'; give the share"),
        (PAST % ", until: 101", "pretraining.until=101; give a step after its warm-up, 100"),
        (PAST % ", until: 10", "pretraining.until=10; give"),
        (PAST % ", until: 20.5", "pretraining.until=20.5; give"),
        ("    pretraining: cosine\n", "pretraining='cosine'; give a schedule"),
        ("    pretraining: {name: cosine, peak_lr: 1, min_lr: 0}\n", "pretraining: schedule.total_steps=None"),
        ("    pretraining: {name: sine, peak_lr: 1, min_lr: 0, total_steps: 9}\n", "pretraining: "),
    ],
    ids=lambda value: value.strip()[-30:],
)
def test_bad_specs(tmp_path, more, message):
    with pytest.raises(UserError) as raised:
        loaded(tmp_path, SPEC + more)
    assert f"{tmp_path / 'spec.yaml'}: curve 1: {message}" in str(raised.value)


def run_folder(folder, rows=20, **changes):
    groups = {"train": {"steps": rows}, "schedule": {"name": "linear", "warmup_steps": 2}, "optim": {"lr": 1e-3}}
    cfg = configuration(**(groups | changes))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    from nexa.optim import learning_rate

    lines = [
        {"step": n, "loss": 3.0, "lr": learning_rate(n - 1, cfg.optim.lr, rows, cfg.schedule)} for n in range(1, rows)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def checkpoint(run, step):
    """What a checkpoint of a run must have to be found."""
    from nexa.checkpoint.catalog import COMPLETE

    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / COMPLETE).write_text("{}")
    return folder


@pytest.mark.parametrize("mode", ["new_schedule", "branch", "weights_only"])
def test_a_run_folder_knows_its_past(tmp_path, mode):
    base = run_folder(tmp_path / "base", 40)
    checkpoint(base, 10)
    newest = checkpoint(base, 30)
    data = {"source": "stores/new", "replay_from": str(base), "replay": 0.25}
    past = {"resume": {"mode": mode, "path": str(base)}}
    (curve,) = load([run_folder(tmp_path / "run", data=data, **past)])
    assert curve.notes == []
    assert (curve.rates.total, curve.rates.before.total, curve.rates.replay) == (20, 30, 0.25)
    assert curve.rates.before.values.tolist() == load([base])[0].rates.values[:31].tolist()
    past["resume"]["path"] = str(newest.with_name("step_00000010"))
    (curve,) = load([run_folder(tmp_path / "same", **past)])
    assert (curve.rates.before.total, curve.rates.replay) == (10, 1.0)


def test_a_past_that_is_not_known_is_said(tmp_path):
    def note(name, **changes):
        (curve,) = load([run_folder(tmp_path / name, **changes)])
        assert curve.rates.before is None
        return curve.notes[0]

    assert "no law here takes into account" in note("a", resume={"mode": "branch", "path": str(tmp_path / "gone")})
    base = run_folder(tmp_path / "base", resume={"mode": "branch", "path": str(tmp_path / "gone")})
    past = {"mode": "new_schedule", "path": str(checkpoint(base, 20))}
    assert "that run goes on from another one" in note("b", resume=past)
    other = run_folder(tmp_path / "other")
    past["path"] = str(checkpoint(other, 20))
    assert "another model" in note("c", resume=past, model={"num_hidden_layers": 7})
    assert "in mid-schedule" in note("d", resume={"mode": "continue", "path": past["path"]})


def test_fit_and_predict_from_files(tmp_path, capsys):
    from tests.cli.test_law import call

    law, names = LAWS["continual"]({"lambda": 0.99}), ("base", "new", "other", "planned")
    base = {"name": "constant", "peak_lr": PEAK, "warmup_steps": 50, "total_steps": 2000}
    ways = [{"name": "cosine", "min_lr": 0.0}, {"name": "constant"}, {"name": "linear", "min_lr": 0.0}]
    ways = [way | {"peak_lr": PEAK, "warmup_steps": 50, "total_steps": 1500} for way in ways]
    entries = [{"schedule": base}, *({"schedule": way, "pretraining": base} for way in ways)]
    for name, entry in zip(names, entries, strict=True):
        rates = from_spec(entry["schedule"], name)
        rates = continued(from_spec(base, name), rates) if "pretraining" in entry else rates
        index = np.arange(50, rates.total, 10)
        rows = zip(index, law.predict(rates, index, PARAMS["continual"]), strict=True)
        (tmp_path / f"{name}.csv").write_text("step,loss\n" + "".join(f"{s},{x:.7f}\n" for s, x in rows))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"curves": [entry | {"path": f"{name}.csv"}]}))
    train, out = [tmp_path / f"{name}.yaml" for name in names[:3]], tmp_path / "law.json"
    call(capsys, "fit", *train, "--law", "continual", "--lambda", 0.99, "--out", out)
    printed = json.loads(call(capsys, "predict", out, tmp_path / "planned.yaml", "--out", tmp_path / "predicted"))
    assert printed["curves"][0]["worst_relative_error"] < 1e-3
