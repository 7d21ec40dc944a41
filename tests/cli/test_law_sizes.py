"""`nexa law scaling`, `mixture` and `ladder` end to end; every mistake ends with code 2 and one message."""

import dataclasses
import json
import shlex

import numpy as np
import pytest

from nexa.cli.main import main
from nexa.config import compose
from nexa.model.decoder import parameter_count
from nexa.scaling.sizes.chinchilla import PUBLISHED
from nexa.scaling.sizes.repetition import Repeated
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


def write_run(folder, share, ratio, capsys):
    """A folder like that of a finished run of the ladder, with losses of the law."""
    from nexa.config import to_yaml

    line = call(capsys, "ladder", "+exp=quickstart", "--shares", share, "--tokens-per-parameter", ratio).strip()
    cfg = compose(shlex.split(line)[2:])
    size = parameter_count(cfg.model, cfg.norm)
    tokens = cfg.total_steps * cfg.train.global_batch_size * cfg.data.sequence_length
    folder = folder / cfg.run.name
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(cfg))
    from nexa.optim import learning_rate

    rows = [
        {
            "step": s,
            "lr": learning_rate(s - 1, cfg.optim.lr, cfg.total_steps, cfg.schedule),
            "loss": LAW.loss(size, tokens),
        }
        for s in range(1, cfg.total_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_run_folders_are_points(tmp_path, capsys):
    folders = [write_run(tmp_path, share, ratio, capsys) for share in (0.3, 0.5, 0.9) for ratio in (1, 2)]
    call(capsys, "scaling", "fit", *folders, "--tied", "--out", tmp_path / "scaling.json")
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines()
    (folders[0] / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "give runs that have finished" in call(capsys, "scaling", "fit", *folders, "--out", "x", code=2)


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
