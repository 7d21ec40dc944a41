"""The studies of benchmarks/: their runs are valid, end once, and are not mixed with those of other settings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.studies import (
    continual,
    growth,
    growth_report,
    laws,
    laws_report,
    live,
    optimizers,
    optimizers_report,
    runner,
)
from benchmarks.studies.placements import LEARNING_RATES, SEEDS, VARIANTS, points
from benchmarks.studies.placements_report import loss_table, name_of
from benchmarks.studies.runner import Point, run_points
from nexa.cli.main import build_parser
from nexa.config import check, compose
from nexa.config.files import to_yaml
from nexa.config.schema import Config
from nexa.growth.stages import budget, sizes
from nexa.optim import learning_rate
from nexa.optim.build import build, settings


def test_the_placement_study_is_valid_and_compares_one_thing() -> None:
    found = points("embedded", 2048)
    assert len({point.name for point in found}) == len(VARIANTS) * len(LEARNING_RATES) * len(SEEDS) == len(found)
    first = {name: compose(list(p.overrides)) for name, p in zip(VARIANTS, found, strict=False)}
    for cfg in first.values():
        assert check(cfg, 1) == []
        assert (cfg.model.num_hidden_layers, cfg.optim, cfg.train) == (16, first["pre"].optim, first["pre"].train)
    assert [cfg.norm.placement for cfg in first.values()] == [*list(VARIANTS)[:-1], "pre"]


def test_the_continual_study_is_valid_and_compares_one_thing(tmp_path: Path) -> None:
    parts = continual.points("stores/old", "stores/new", 4096, tmp_path)
    found = {point.name: compose(list(point.overrides)) for part in parts for point in part}
    assert len(found) == sum(map(len, parts)) == 12 * len(continual.SEEDS)
    assert [check(cfg, 1) for cfg in found.values()] == [[]] * len(found)
    for seed in continual.SEEDS:
        trunk = found[f"trunk_seed{seed}"]
        replays = [found[f"replay_{share * 100:g}_seed{seed}"] for share in continual.REPLAY]
        for cfg, share in zip(replays, continual.REPLAY, strict=True):
            assert cfg.data == dataclasses.replace(
                trunk.data, source="stores/new", replay_from=cfg.resume.path, replay=share
            )
            assert (cfg.train, cfg.schedule, cfg.optim, cfg.model) == (
                trunk.train,
                trunk.schedule,
                trunk.optim,
                trunk.model,
            )
            assert Path(str(cfg.resume.path)).name == f"trunk_seed{seed}" in {point.name for point in parts[2 * seed]}
        union = found[f"union_seed{seed}"]
        assert union.train == dataclasses.replace(trunk.train, steps=2 * trunk.total_steps)
        ending, base = found[f"infinite_5_seed{seed}"], found[f"infinite_trunk_seed{seed}"]

        def rate(cfg: Config, step: int) -> float:
            return learning_rate(step, cfg.optim.lr, cfg.total_steps, cfg.schedule)

        assert rate(ending, 0) == pytest.approx(rate(base, base.total_steps - 1)) == pytest.approx(2.2e-3)
        assert rate(ending, ending.total_steps) == pytest.approx(rate(trunk, trunk.total_steps)) == pytest.approx(4e-4)


def test_the_growth_study_is_valid_and_compares_one_thing() -> None:
    found = {point.name: compose(list(point.overrides)) for point in growth.points("stores/text", 2048)}
    assert set(found) == {f"{name}_seed{seed}" for name in growth_report.TITLES for seed in growth.SEEDS}
    assert [check(cfg, 1) for cfg in found.values()] == [[]] * len(found)
    scratch, shorter = found["scratch_seed0"], found["scratch_equal_flops_seed0"]
    assert shorter.train.steps is not None and shorter.train.steps < growth.STEPS
    for name, cfg in found.items():
        if (variant := name.partition("_seed")[0]) in [f"scratch_{blocks}" for blocks in growth.SMALLER]:
            assert cfg.model == dataclasses.replace(scratch.model, num_hidden_layers=int(variant[-1]))
            cfg = dataclasses.replace(cfg, model=scratch.model)
        elif variant in [f"scratch_lr{rate:g}" for rate in growth.RATES]:
            assert cfg.optim.lr != scratch.optim.lr
            cfg = dataclasses.replace(cfg, optim=scratch.optim)
        ends = sizes(cfg)
        last = ends[-1].model
        assert (last.hidden_size, last.intermediate_size, last.num_hidden_layers) == (64, 176, 8), name
        assert ends[-1].parameters == sizes(scratch)[0].parameters
        if name.endswith("_seed0") and cfg is not shorter:
            assert dataclasses.replace(cfg, model=scratch.model, growth=scratch.growth) == scratch, name
    one_step = budget(shorter, sizes(shorter)).flops / shorter.train.steps
    stack = found["stack_seed0"]
    assert budget(shorter, sizes(shorter)).flops == pytest.approx(budget(stack, sizes(stack)).flops, abs=one_step)


def test_the_growth_report_measures_speed_up_to_the_same_loss() -> None:
    def falling(first: float, per_step: float) -> growth_report.Curve:
        axis = [float(number) for number in range(1, 11)]
        return growth_report.Curve(axis, [10 * one for one in axis], [first - per_step * one for one in axis])

    found = {"scratch": {0: falling(5.0, 0.1), 1: falling(5.0, 0.1)}, "stack": {0: falling(5.0, 0.2)}}
    found["stack"][1] = falling(6.0, 0.1)
    assert growth_report.reached([1, 2, 3], [5.0, 4.0, 2.0], 3.0) == 2.5
    assert growth_report.reached([1, 2], [5.0, 4.0], 3.0) is None
    assert growth_report.speedups(found, "stack", "flops") == pytest.approx([1.0])  # 10 steps in 5
    lines = {line.split(" | ")[0].strip("| "): line for line in growth_report.table(found)}
    assert "+100.0% (1 of 2 never there)" in lines["stack, 2 -> 8 blocks"]
    assert lines["from scratch"].startswith("| from scratch | 2 | 4.000 ± 0.000 | +0.000 ± 0.000 |")
    assert "not run" in lines["interleave, 2 -> 8"]


def test_the_study_of_laws_is_valid_and_compares_schedules_alone() -> None:
    found = {}
    told = {"chosen": {"point_steps": [120, 2000, 2400], "point_ratios": [1.0, 0.9, 0.02]}}
    schedules = laws.usual((*laws.FITTED, *laws.TESTED)) | laws.chosen(told)
    for point in laws.points("stores/text", 2048, laws.WHOLE, laws.SEEDS, schedules):
        found[point.name] = compose(list(point.overrides))
    assert len(found) == len(laws_report.SCHEDULES) * len(laws.SEEDS)
    assert [check(cfg, 1) for cfg in found.values()] == [[]] * len(found)
    for seed in laws.SEEDS:
        first = found[f"cosine_seed{seed}"]
        for name in laws_report.SCHEDULES:
            cfg = found[f"{name}_seed{seed}"]
            assert dataclasses.replace(cfg, schedule=first.schedule) == first, name
            assert cfg.schedule.warmup_steps == laws.WHOLE.warmup, name
        last = [learning_rate(2400, 1.0, 2400, found[f"{n}_seed{seed}"].schedule) for n in laws_report.SCHEDULES]
        assert last == pytest.approx([0.02, 1.0, 0.02, 0.02])


def test_the_study_of_predictions_is_valid_and_varies_the_schedule_alone() -> None:
    found = [compose(list(point.overrides)) for point in live.points("stores/text", 2048, live.STEPS, (0,))]
    assert [check(cfg, 1) for cfg in found] == [[]] * len(live.SCHEDULES)
    assert all(dataclasses.replace(cfg, schedule=found[0].schedule) == found[0] for cfg in found)
    assert len({str(cfg.schedule) for cfg in found}) == len(found) >= 6
    assert found[0].log.predict_loss == "val/text/loss"


def made_run(study: Path, name: str, schedule: tuple[str, ...], offset: float) -> None:
    """A run of 120 steps whose validation loss is 3 + 2 S^-0.5 - what the rate has fallen by, and its result."""
    (point,) = laws.points("stores/text", 2048, laws.SMOKE, (0,), {name: schedule})
    cfg = compose(list(point.overrides))
    folder = study / "runs" / f"{name}_seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    rates = [learning_rate(step, laws.PEAK, 120, cfg.schedule) for step in range(121)]
    lines = []
    for step in range(4, 121, 4):
        fallen = (1 - rates[step - 1] / laws.PEAK) if step > 12 else 0.0
        loss = 3 + 2 * (sum(rates[:step]) / laws.PEAK) ** -0.5 - 0.3 * fallen + offset
        lines.append(json.dumps({"step": step, "lr": rates[step - 1], "val/text/loss": loss}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (study / "results").mkdir(exist_ok=True)
    (study / "results" / f"{name}_seed0.json").write_text("{}")


def test_the_study_of_laws_predicts_before_it_tests_and_reports(tmp_path: Path) -> None:
    schedules = laws.usual((*laws.FITTED, *laws.TESTED))
    for name in laws.FITTED:
        made_run(tmp_path, name, schedules[name], 0.0)
    told = laws.predict(tmp_path, laws.SMOKE, "text", (0,))
    made_run(tmp_path, "wsd", schedules["wsd"], 0.0)
    made_run(tmp_path, "chosen", laws.chosen(told)["chosen"], -0.01)
    assert laws.predict(tmp_path, laws.SMOKE, "text", (0, 1, 2)) == json.loads(
        (tmp_path / "predictions.json").read_text()
    )
    runs = laws_report.ended(tmp_path)
    assert list(runs) == list(laws_report.SCHEDULES)
    end = laws_report.final(runs["wsd"][0])
    assert told["final"]["annealing"]["wsd"] == pytest.approx(end, rel=0.03)
    table = {line.split(" | ")[0].strip("| "): line for line in laws_report.prediction_table(runs, told)}
    said = told["final"]["annealing"]["wsd"]
    assert f"| predicted | 1 | {end:.4f} | {said:.4f} | {said / end - 1:+.2%} |" in table["wsd"]
    assert "| fitted | 1 |" in table["cosine"]
    choice = "\n".join(laws_report.choice_table(runs))
    assert f"| wsd | 1 | {laws_report.final(runs['chosen'][0]) - end:+.4f} |" in choice
    error, inside = laws_report.live(runs["constant"][0])
    assert abs(error) < 0.01 and inside
    assert laws_report.live(runs["constant"][0], 0.1) is None, "too early for a word"
    assert list(laws_report.live_table(runs))[-1].startswith("| median of all | ")
    del runs["chosen"]
    assert "| chosen | predicted | 0 | not run |" in "\n".join(laws_report.prediction_table(runs, told))


def test_a_grown_run_against_one_of_its_average_size() -> None:
    def run(loss: float, parameters: float) -> growth_report.Curve:
        return growth_report.Curve([1.0], [1.0], [loss], parameters)

    found = {"scratch": {0: run(3.0, 4e6)}, "scratch_2": {0: run(4.0, 1e6)}, "stack": {0: run(3.3, 2e6)}}
    (line,) = list(growth_report.of_average_size(found))[2:]
    assert line == "| stack, 2 -> 8 blocks | 2.00M | 3.500 | 3.300 | -0.200 |"
    found["scratch_4"] = {0: run(3.1, 2e6)}
    assert list(growth_report.of_average_size(found))[2].endswith("| 3.100 | 3.300 | +0.200 |")
    del found["scratch"]
    found["stack"] = {0: run(3.3, 3e6)}
    assert len(list(growth_report.of_average_size(found))) == 2, "beyond what was run nothing is said"


def test_points_end_once_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(point: Point, folder: Path) -> dict:
        trained.append(point.name)
        if point.name == "c" and len(trained) == 3:
            raise RuntimeError("c: train.py ended with 1")
        result = {"overrides": list(point.overrides), "diverged": False, "validation": {"a": 1.0}, "seconds": 0.0}
        (folder / "results" / f"{point.name}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(runner, "_train", train)
    wanted = [Point(name, (f"optim.lr={name}",)) for name in "abc"]
    with pytest.raises(SystemExit, match="c: train"):
        run_points(wanted, tmp_path)
    assert list(run_points(wanted, tmp_path)) == ["a", "b", "c"]
    assert trained == ["a", "b", "c", "c"]
    with pytest.raises(SystemExit, match="made with other settings"):
        run_points([Point("a", ("optim.lr=1",))], tmp_path)


def ended(loss: float | None) -> dict:
    return {"diverged": loss is None, "validation": {} if loss is None else {"english": loss}}


def test_the_table_has_mean_spread_and_divergence() -> None:
    results = {name_of("pre", lr, seed): ended(3.0 + lr + seed / 10) for lr in LEARNING_RATES for seed in SEEDS}
    results |= {name_of("post", LEARNING_RATES[1], seed): ended(None) for seed in SEEDS}
    results[name_of("post", LEARNING_RATES[0], 0)] = ended(2.9)
    lines = {line.split(" | ")[0].strip("| "): line for line in loss_table(results)}
    assert lines["pre"] == "| pre | 3.052 ± 0.050 | 3.056 ± 0.050 | 3.052 | +0.000 |"
    assert lines["post"] == "| post | 2.900 ± 0.000 | 2 of 2 diverged | 2.900 | -0.152 |"
    assert "not run" in lines["lns"]


def test_the_study_of_optimizers_is_valid_and_compares_one_thing() -> None:
    grids = {name: optimizers.grid(one.centre) for name, one in optimizers.METHODS.items()}
    points = optimizers.points("store", 1024, grids, optimizers.SEEDS)
    assert len({point.name for point in points}) == len(points) == len(grids) * 3 * len(optimizers.SEEDS)
    assert len({one.method for one in optimizers.METHODS.values()} - {"adamw"}) >= 6
    of_name = {point.name: set(point.overrides) for point in points}
    found = {}
    for name, one in optimizers.METHODS.items():
        assert grids[name][1] == one.centre
        centre = of_name[optimizers.name_of(name, one.centre, 0)]
        found[name] = cfg = compose(next(list(p.overrides) for p in points if set(p.overrides) == centre))
        assert (check(cfg, 1), cfg.optim.name, cfg.optim.lr) == ([], one.method, one.centre)
        for rate in grids[name]:
            changed = {f"optim.lr={rate:g}", "train.seed=1"}
            assert of_name[optimizers.name_of(name, rate, 1)] - changed == centre - {
                f"optim.lr={one.centre:g}",
                "train.seed=0",
            }
    assert all(dataclasses.replace(cfg, optim=found["muon"].optim) == found["muon"] for cfg in found.values())
    tuned = [found[name].optim for name in optimizers.BASELINES]
    assert len({(tuple(one.betas), one.weight_decay, one.name) for one in tuned}) == len(tuned) == 5


def test_what_stands_for_adam_with_another_rate_outside_matrices_is_that() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 4), "lm_head.weight": (5, 4), "model.norm.weight": (4,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mine, plain = ({name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2))
    cfg = compose(["optim=frugal", *optimizers.OUTSIDE])
    ours = build(named_parameters=mine.items(), **{**settings(cfg), "lr": 1e-2})
    groups = [{"params": [p], "lr": 1e-2 * (1 if "mlp" in name else 4)} for name, p in plain.items()]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(5):
        for name, shape in shapes.items():
            mine[name].grad = torch.randn(shape, generator=generator)
            plain[name].grad = mine[name].grad.clone()
        ours.step()
        adam.step()
    for name in shapes:
        torch.testing.assert_close(mine[name], plain[name], rtol=1e-5, atol=1e-6)


def bowls(best: dict[str, float], diverging: Sequence[str] = ()) -> Callable[..., dict[str, dict]]:
    """Stands for `run_points`: a loss that is lowest, 3, at `best` (else at the centre) of a method."""

    def run(points: Sequence[Point], folder: Path, jobs: int) -> dict[str, dict]:
        results = {}
        for point in points:
            variant, _, rest = point.name.partition("_lr")
            rate, seed = rest.split("_seed")
            aim = best.get(variant, optimizers.METHODS[variant].centre)
            off = abs(optimizers_report.log(float(rate) / aim)) / optimizers_report.log(3)
            results[point.name] = ended(None if variant in diverging else round(3 + 0.5 * off + int(seed) / 100, 2))
            results[point.name] |= {"overrides": list(point.overrides), "seconds": 60.0}
        return results

    return run


def test_the_study_of_optimizers_looks_beyond_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"muon": 3.6e-2, "conda": 1.0, "scale": 1e-4}
    monkeypatch.setattr(optimizers, "run_points", bowls(best, ["galore"]))
    results, rates = optimizers.search("store", 1024, Path(), 1, (0, 1), smoke=False)
    assert rates["adamw"] == [1.3e-3, 4e-3, 1.2e-2]
    assert rates["muon"] == [1.3e-3, 4e-3, 1.2e-2, 3.6e-2, 0.11], "the best one is inside"
    assert rates["conda"] == [3.3e-3, 1e-2, 3e-2, 9e-2, 0.27], "no more than two beyond"
    assert rates["scale"] == [3.7e-5, 1.1e-4, 3.3e-4, 1e-3, 3e-3]
    assert rates["galore"] == [3.7e-4, 1.1e-3, 3.3e-3, 1e-2, 3e-2], "what diverges is tried lower"
    assert len(results) == 2 * sum(map(len, rates.values()))
    found = optimizers_report.searches(results)
    assert {name: search.best for name, search in found.items()} == {
        **{name: one.centre for name, one in optimizers.METHODS.items()},
        "muon": 3.6e-2,
        "conda": 0.27,
        "scale": 1.1e-4,
        "galore": None,
    }
    assert [name for name, search in found.items() if search.edge] == ["conda", "galore"]


def test_the_report_of_optimizers_takes_each_at_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "run_points", bowls({"conda": 1.0}, ["galore"]))
    results, _ = optimizers.search("store", 1024, tmp_path, 1, (0, 1), smoke=False)
    for name, loss in (("muon", 2.8), ("scale", 3.005), ("adamw_slow", 2.99)):
        rate = optimizers.METHODS[name].centre
        results |= {n: results[n] | ended(loss + s / 50) for s, n in enumerate(_both(name, rate))}
    del results[optimizers.name_of("apollo", 3e-2, 1)]  # not ended yet
    found = optimizers_report.searches(results)
    assert optimizers_report.tuned(found) == "adamw_slow"
    lines = {line.split(" | ")[0].strip("| "): line for line in optimizers_report.main_table(found, results, tmp_path)}
    assert lines["muon"].startswith("| muon | 0.004 | 2 | 2.810 ± 0.010 | -0.190 ± 0.000 | lower | ")
    assert lines["scale"].startswith("| scale | 0.001 | 2 | 3.015 ± 0.010 | +0.015 ± 0.000 | within the seeds | ")
    assert "| 0.27 (edge) | 2 |" in lines["conda"] and "| higher |" in lines["conda"]
    assert lines["AdamW (beta2 0.999), the tuned one"].endswith("| 2 | 3.000 ± 0.010 | – | – | 8.00 | – |")
    assert "all diverged" in lines["galore"]
    rows = {line.split(" | ")[0].strip("| "): line for line in optimizers_report.rate_table(found)}
    assert rows["apollo"] == "| apollo | 0.01 |  |  | 3.505 ± 0.005 | 3.005 ± 0.005 | 3.500 |  |  |"
    assert rows["galore"].count("2 of 2 diverged") == 5
    optimizers_report.draw(found, tmp_path / "optimizers.png")
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000
    text = optimizers_report.page(found, results, tmp_path)
    assert "**Below the tuned AdamW with every seed**: muon." in text
    assert "**Best rate at the edge of what was tried**: conda, galore;" in text
    assert f"{len(results)} runs, {len(results) / 60:.1f} hours" in text


def _both(name: str, rate: float) -> list[str]:
    return [optimizers.name_of(name, rate, seed) for seed in (0, 1)]


def test_states_in_the_report_of_optimizers_are_of_the_whole_model() -> None:
    scale = optimizers.METHODS["scale"]
    rates = {name: [one.centre] for name, one in optimizers.METHODS.items()}
    overrides = {p.name: p.overrides for p in optimizers.points("store", 1024, rates, (0,))}
    found = optimizers_report.bytes_of_state(overrides[optimizers.name_of("scale", scale.centre, 0)])
    head, vectors, all_blocks = 1024 * 64, 9 * 64, 4 * (4 * 64**2 + 3 * 64 * 176)
    assert found == pytest.approx((4 * head + 8 * vectors) / (2 * head + vectors + all_blocks))


def test_text_becomes_a_store_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
        commands.append(command)
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "manifest.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert optimizers.packed(tmp_path / "text.jsonl", tmp_path, 512) == tmp_path / "store"
    assert optimizers.packed(tmp_path / "store", tmp_path / "other", 512) == tmp_path / "store"
    ((*start, command, prepare), *rest) = [commands[0][:5]]
    assert (start[1:], command, prepare, rest, len(commands)) == (["-m", "nexa.cli.main"], "data", "prepare", [], 1)
    asked = build_parser().parse_args(commands[0][3:])
    assert (asked.inputs, Path(asked.out), asked.train_bpe) == ([str(tmp_path / "text.jsonl")], tmp_path / "store", 512)
