"""`nexa law scaling`, `mixture` and `ladder` end to end; every mistake ends with code 2 and one message."""

import dataclasses
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest

from nexa.cli.main import main
from nexa.config import compose
from nexa.model.decoder import parameter_count
from nexa.scaling.sizes.chinchilla import PUBLISHED
from nexa.scaling.sizes.ladder import plan
from nexa.scaling.sizes.repetition import Repeated
from nexa.scaling.sizes.runs import describe
from tests.conftest import REPOSITORY
from tests.scaling.sizes.test_chinchilla import runs
from tests.scaling.sizes.test_mixing import DOMAINS, SOURCES, TRUTH, mixtures

LAW = PUBLISHED["besiroglu"][0]


def call(capsys, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main(["law", *map(str, words)])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.err if code else out.out


def write_csv(path, head, rows):
    path.write_text("\n".join([",".join(head), *(",".join(f"{x:.8g}" for x in row) for row in rows)]) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    return write_csv(tmp_path / "runs.csv", ["parameters", "tokens", "loss"], zip(*runs(LAW, 1e-3), strict=True))


def test_fit_predict_optimum(table, tmp_path, capsys):
    out = tmp_path / "scaling.json"
    text = call(capsys, "scaling", "fit", table, "--bootstrap", 20, "--out", out)
    assert "42 runs: mean error 0.00" in text
    document = json.loads(out.read_text())
    assert document["params"]["E"] == pytest.approx(LAW.E, rel=0.02)
    low, high = document["intervals"]["alpha"]
    assert low < document["params"]["alpha"] < high
    large = {"parameters": 7e9, "tokens": 1.4e11}
    predicted = json.loads(
        call(capsys, "scaling", "predict", out, *(w for k, v in large.items() for w in (f"--{k}", v)))
    )
    assert predicted["loss"] == pytest.approx(LAW.loss(**large), rel=3e-3)
    assert predicted["interval"][0] < predicted["loss"] < predicted["interval"][1]
    best = json.loads(call(capsys, "scaling", "optimum", out, "--flops", "1e21"))
    assert best["parameters"] == pytest.approx(LAW.optimum(1e21)[0], rel=0.1)
    assert 6 * best["parameters"] * best["tokens"] == pytest.approx(1e21)
    assert best["parameters_interval"][0] < best["parameters"] < best["parameters_interval"][1]


def test_published_laws_and_repetition(capsys):
    words = ["--parameters", 1e9, "--tokens", 2e10]
    fresh = json.loads(call(capsys, "scaling", "predict", "c4", *words))
    assert fresh["loss"] == pytest.approx(PUBLISHED["c4"][0].loss(1e9, 2e10))
    assert fresh["interval"] is None
    again = json.loads(call(capsys, "scaling", "predict", "c4", *words, "--unique-tokens", 5e9))
    assert again["loss"] == pytest.approx(Repeated(PUBLISHED["c4"][0], 5e9).loss(1e9, 2e10))
    assert again["loss"] > fresh["loss"]
    assert again["epochs"] == 4


def test_too_many_epochs_are_said(capsys):
    with pytest.raises(SystemExit):
        main(["law", "scaling", "predict", "c4", "--parameters", "1e9", "--tokens", "1e11", "--unique-tokens", "1e9"])
    assert "warning: 100 epochs: beyond 16 real runs over-fit" in capsys.readouterr().err


def test_mixture(tmp_path, capsys):
    shares = mixtures(30)
    head = [*(f"weight/{name}" for name in SOURCES), *(f"loss/{name}" for name in DOMAINS)]
    rows = np.hstack([7 * shares, TRUTH.losses(shares)])  # weights need no sum
    path, out = write_csv(tmp_path / "mixtures.csv", head, rows), tmp_path / "mixture.json"
    assert "news             mean error 0.00" in call(capsys, "mixture", "fit", path, "--out", out)
    best = json.loads(call(capsys, "mixture", "best", out, "--domain", "python=1", "--most", "code=0.6"))
    expected = TRUTH.best(np.array([0.0, 1.0]), np.zeros(3), np.array([1.0, 0.6, 1.0]))
    assert list(best["weights"].values()) == pytest.approx(expected, abs=0.02)
    assert best["losses"]["python"] == pytest.approx(TRUTH.losses(expected)[1], rel=0.01)
    even = json.loads(call(capsys, "mixture", "best", out))
    assert even["losses"]["news"] < best["losses"]["news"]


def test_mixture_for_a_larger_run(tmp_path, capsys):
    from tests.scaling.sizes.test_nested import TARGET, law_at, table

    shares, scales, losses = table()
    head = ["parameters", "tokens", *(f"weight/{name}" for name in SOURCES), *(f"loss/{name}" for name in DOMAINS)]
    columns = [scales["parameters"], scales["tokens"], *shares.T, *losses.T]
    path, out = write_csv(tmp_path / "m.csv", head, np.stack(columns, 1)), tmp_path / "mixture.json"
    assert "say with --tokens" in call(capsys, "mixture", "fit", path, "--out", out, code=2)
    words = [word for name, value in TARGET.items() for word in (f"--{name}", value)]
    assert "144 runs, 12 mixtures" in call(capsys, "mixture", "fit", path, *words, "--out", out)
    document = json.loads(out.read_text())
    assert document["target"] == TARGET
    assert document["exponents"]["tokens"]["news"] == pytest.approx(0.25, rel=0.05)
    found = json.loads(call(capsys, "mixture", "best", out))
    truth = law_at(TARGET["parameters"], TARGET["tokens"])
    best = truth.best(np.array([0.5, 0.5]), np.zeros(3), np.ones(3))
    assert list(found["weights"].values()) == pytest.approx(best, abs=0.03)
    assert list(found["losses"].values()) == pytest.approx(truth.losses(best), rel=0.01)


def test_ladder_commands_are_runs(capsys):
    words = ["+exp=pre_130m", "--shares", 0.25, 0.5, "--tokens-per-parameter", 10, 40]
    lines = call(capsys, "ladder", *words).splitlines()
    assert len(lines) == 4
    for line, (share, ratio) in zip(lines, [(0.25, 10), (0.25, 40), (0.5, 10), (0.5, 40)], strict=True):
        command = shlex.split(line)
        assert command[:2] == ["python", "train.py"]
        cfg = compose(command[2:])
        size = parameter_count(cfg.model, cfg.norm)
        tokens = cfg.total_steps * cfg.train.global_batch_size * cfg.data.sequence_length
        assert tokens / size == pytest.approx(ratio, rel=0.01)
        assert cfg.model.num_hidden_layers == round(12 * share)
        assert cfg.run.name == f"ladder_{share:g}_{ratio}"
        assert cfg.run.dir.endswith(cfg.run.name)
    large = compose(["+exp=pre_130m"])
    assert cfg.optim.lr > large.optim.lr  # smaller models like higher rates


LADDER = ["ladder", "+exp=quickstart", "--shares", 0.3, 0.5, 0.9, "--tokens-per-parameter", 1, 2]


@pytest.fixture(scope="module")
def planned():
    return plan(["+exp=quickstart"], (0.3, 0.5, 0.9), (1, 2), "ladder")


def write_runs(folder, planned, key):
    """Folders like those of the finished runs of a ladder, with losses of the law."""
    from nexa.config import to_yaml
    from nexa.optim import learning_rate

    paths = []
    for rung in planned[1]:
        cfg, facts = rung.cfg, describe(rung.cfg)
        paths.append(folder / cfg.run.dir)
        paths[-1].mkdir(parents=True)
        (paths[-1] / "config.yaml").write_text(to_yaml(cfg))
        rates = [learning_rate(s, cfg.optim.lr, cfg.total_steps, cfg.schedule) for s in range(cfg.total_steps)]
        rows = [{"step": s, "lr": lr, "loss": 9.0} for s, lr in enumerate(rates, start=1)]
        for row in rows if key == "loss" else rows[-1:]:
            row[key] = LAW.loss(facts.size, facts.tokens)
        (paths[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_run_folders_are_points(planned, tmp_path, capsys):
    folders = write_runs(tmp_path, planned, "loss")
    call(capsys, "scaling", "fit", *folders, "--tied", "--out", tmp_path / "scaling.json")
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines()
    (folders[0] / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "give runs that have finished" in call(capsys, "scaling", "fit", *folders, "--out", "x", code=2)


def test_a_finished_ladder_predicts_the_large_run(planned, tmp_path, capsys, monkeypatch):
    """With the only validation of each run, its last; and what is said of runs that are not as planned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nexa.scaling.sizes.ladder.plan", lambda *asked: planned)
    folders = write_runs(tmp_path, planned, "val/x/loss")
    out = call(capsys, *LADDER, "--tied", "--run", "--bootstrap", 5, "--loss", "val/x/loss", "--out", "scaling.json")
    found, facts = json.loads(out), describe(planned[0])
    assert (found["large"]["parameters"], found["large"]["tokens"]) == (facts.size, facts.tokens)
    assert found["large"]["loss"] == pytest.approx(LAW.loss(facts.size, facts.tokens), rel=0.02)
    assert len(found["large"]["interval"]) == 2
    assert [row["path"] for row in found["runs"]][:2] == ["runs/ladder_0.3_1", "runs/ladder_0.3_2"]
    assert json.loads((tmp_path / "scaling.json").read_text())["params"] == found["params"]
    lines = (folders[-1] / "metrics.jsonl").read_text().splitlines()
    (folders[-1] / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    said = call(capsys, *LADDER, "--out", "scaling.json", code=2)
    assert "1 of 6 runs have not finished (runs/ladder_0.9_2); train them, or give --run" in said
    said = call(capsys, *LADDER, "--run", "--launcher", "sh -c 'echo what it said; exit 3'", code=2)
    assert "train.py ended with code 3 before the last step; see runs/ladder_0.9_2.log" in said
    assert "what it said" in (tmp_path / "runs" / "ladder_0.9_2.log").read_text()
    assert "--launcher nowhere" in call(capsys, *LADDER, "--run", "--launcher", "nowhere", code=2)
    (folders[0] / "config.yaml").write_text((folders[1] / "config.yaml").read_text())
    assert "other settings than this ladder's" in call(capsys, *LADDER, "--out", "scaling.json", code=2)
    monkeypatch.setattr("nexa.scaling.sizes.ladder.plan", lambda *asked: (planned[0], planned[1][:2]))
    assert "2 runs; the law needs 6: give more" in call(capsys, *LADDER, "--out", "scaling.json", code=2)


@pytest.mark.slow
def test_a_ladder_is_trained_fitted_and_predicts(tmp_path, capsys, monkeypatch):
    """Six runs of seconds and the large one, whose loss is near what they say; nothing is trained twice."""
    monkeypatch.chdir(tmp_path)
    large = ["+exp=quickstart", "model.hidden_size=48", "model.intermediate_size=96", "model.num_hidden_layers=2"]
    large += ["model.num_attention_heads=4", "model.num_key_value_heads=4", "data.sequence_length=64"]
    large += ["train.steps=60", "schedule.warmup_steps=6", "checkpoint.every=1000", "eval.every=0", "eval.batches=2"]
    large += ["log.plot=false", "log.sample_tokens=0"]
    words = ["ladder", *large, "--shares", 0.25, 0.5, 0.75, "--tokens-per-parameter", 0.4, 0.8, "--tied"]
    found = json.loads(call(capsys, *words, "--run", "--out", "scaling.json"))
    assert len({row["parameters"] for row in found["runs"]}) == 3
    logs = {path: path.stat().st_mtime for path in (tmp_path / "runs").glob("*.log")}
    assert len(logs) == 6
    assert json.loads(call(capsys, *words, "--run", "--out", "scaling.json")) == found
    assert {path: path.stat().st_mtime for path in logs} == logs
    subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *large, "run.name=large"], check=True)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "large" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row][-6:]
    assert found["large"]["loss"] == pytest.approx(sum(losses) / 6, rel=0.15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scaling", "optimum", "none.json", "--flops", "1e21"], "or a published law: hoffmann, besiroglu, c4"),
        (["scaling", "optimum", "c4", "--flops", "-1"], "--flops -1: give a number above 0"),
        (["scaling", "optimum", "c4", "--flops", "nan"], "--flops nan"),
        (["scaling", "predict", "c4", "--parameters", "1e9", "--tokens", "0"], "--tokens 0"),
        (["scaling", "fit", "none.csv", "--out", "x"], "none.csv: No such file"),
        (["scaling", "fit", "RUNS", "--bootstrap", "-1", "--out", "x"], "--bootstrap -1"),
        (["scaling", "fit", "RUNS", "--out", "/proc/no/x.json"], "cannot be written"),
        (["mixture", "fit", "RUNS", "--out", "x"], "give at least two weight/<source> and one loss/<domain>"),
        (["mixture", "best", "none.json"], "none.json: No such file"),
        (["ladder", "+exp=pre_130m", "--shares", "2"], "--shares, --tokens-per-parameter: 2"),
        (["ladder", "+exp=pre_130m", "optim.lr=-1"], "optim.lr=-1.0: must be greater than 0"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_arguments(table, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in call(capsys, *(table if word == "RUNS" else word for word in words), code=2)
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters,tokens\n1,2\n", "no column loss; the first line has parameters, tokens"),
        ("parameters,tokens,loss\n", "has no runs"),
        ("parameters,tokens,loss\n1,2\n", "run 1: 2 cells where the first line has 3"),
        ("parameters,tokens,loss\n1e8,2e9,nan\n", "run 1: loss is 'nan'"),
        ("parameters,tokens,loss\n1e8,,3\n", "run 1: tokens is ''"),
        ("parameters,tokens,loss\n1e8,2e9,3\n", "1 runs for 5 parameters"),
    ],
    ids=lambda value: value[-12:].strip(),
)
def test_bad_tables(capsys, tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    assert message in call(capsys, "scaling", "fit", tmp_path / "t.csv", "--out", tmp_path / "x", code=2)


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("scaling", "{", "not JSON"),
        ("scaling", '{"law": "mixture"}', "law='mixture'; give a file whose law is 'chinchilla'"),
        ("scaling", '{"law": "chinchilla", "params": {"E": 1}}', "params={'E': 1}"),
        (
            "scaling",
            '{"law": "chinchilla", "params": {"E": 1, "A": 1, "B": 1, "alpha": 0, "beta": 1}}',
            "are numbers above 0",
        ),
        ("mixture", "[]", "law=[]; give a file whose law is 'mixture'"),
        ("mixture", '{"law": "mixture"}', "damaged (KeyError('params'))"),
    ],
    ids=lambda value: value[:30],
)
def test_damaged_files(capsys, tmp_path, command, text, message):
    (tmp_path / "law.json").write_text(text)
    words = {"scaling": ["optimum", tmp_path / "law.json", "--flops", 1e20], "mixture": ["best", tmp_path / "law.json"]}
    assert message in call(capsys, command, *words[command], code=2)


@pytest.mark.parametrize("option", ["--domain", "--most", "--least"])
def test_unknown_names(tmp_path, capsys, option):
    shares = mixtures(30)
    head = [*(f"weight/{name}" for name in SOURCES), *(f"loss/{name}" for name in DOMAINS)]
    path = write_csv(tmp_path / "m.csv", head, np.hstack([shares, TRUTH.losses(shares)]))
    call(capsys, "mixture", "fit", path, "--out", tmp_path / "m.json")
    for word in ("other=1", "web", "web=-1", "news=x"):
        message = call(capsys, "mixture", "best", tmp_path / "m.json", option, word, code=2)
        assert f"{option} {word}: give NAME=X" in message


def test_a_run_that_grew_counts_its_average_parameters(tmp_path, capsys):
    """Half of the tokens with each size; a ladder of such a run is refused."""
    from nexa.config import to_yaml
    from nexa.growth.stages import growth_steps, rate_of
    from nexa.scaling.sizes.runs import from_run

    words = ["+exp=quickstart", "growth.stages=[{at_tokens: 20480, factor: 2}]", "train.steps=20"]
    words += ["train.global_batch_size=8", "data.sequence_length=256", "schedule.warmup_steps=0"]
    cfg = compose(words)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    rates = [rate_of(cfg, step, growth_steps(cfg)) for step in range(20)]
    rows = [{"step": step, "lr": rate, "loss": 3.0} for step, rate in enumerate(rates, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = parameter_count(cfg.model, cfg.norm)
    large = parameter_count(dataclasses.replace(cfg.model, num_hidden_layers=8), cfg.norm)
    point = from_run(tmp_path, "loss")
    assert (point.parameters, point.tokens) == ((small + large) / 2, 40960)
    assert "growth.stages: a ladder is of runs of one size each" in call(capsys, "ladder", *words, code=2)
