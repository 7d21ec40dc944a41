"""`nexa law` end to end on curves of known laws; every mistake ends with code 2 and one message."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from nexa.cli import law as command
from nexa.cli.main import main
from nexa.scaling.laws import LAWS, MultiPower
from tests.scaling.laws.common import ANNEALING, MULTIPOWER, PEAK, SCHEDULES, TOTAL, WARMUP, curve

COMMON = {"peak_lr": PEAK, "total_steps": TOTAL, "warmup_steps": WARMUP}


def call(capsys, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main(["law", *map(str, words)])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.err if code else out.out


def write_spec(folder, names, law=None, params=ANNEALING):
    """A spec and its curves; returns the path of the spec."""
    law = law or LAWS["annealing"]({"lambda": ANNEALING["lambda"]})
    entries = []
    for name in names:
        made = curve(law, params, name, noise=3e-4, every=40)
        rows = zip(made.step, made.lr, made.loss, strict=True)
        (folder / f"{name}.csv").write_text("step,lr,loss\n" + "".join(f"{s},{lr:g},{x:.6f}\n" for s, lr, x in rows))
        schedule = SCHEDULES[name] if "points" in SCHEDULES[name] else COMMON | SCHEDULES[name]
        entries.append({"path": f"{name}.csv", "schedule": schedule})
    path = folder / f"{'_'.join(names)}.yaml"
    path.write_text(yaml.safe_dump({"curves": entries}))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("law")
    train = write_spec(folder, ["cosine", "constant", "drop"])
    with pytest.raises(SystemExit) as ended:
        main(["law", "fit", str(train), "--law", "annealing", "--bootstrap", "10", "--out", str(folder / "law.json")])
    assert ended.value.code == 0
    return folder


class Page(HTMLParser):
    """Pieces of text of a page, and the tags that are still open."""

    def __init__(self):
        super().__init__()
        self.pieces, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.pieces.extend([data.strip()] if data.strip() else [])


def test_names_are_those_of_the_registry():
    assert set(command.LAW_NAMES) == set(LAWS)
    assert MultiPower.options["warmup"] == command.WARMUPS


def test_law_json_is_as_promised(fitted):
    content = json.loads((fitted / "law.json").read_text())
    assert content["law"] == "annealing"
    assert list(content["params"]) == ["L0", "A", "alpha", "C", "lambda"]
    assert content["params"] == pytest.approx(ANNEALING, rel=0.01)
    assert [entry["path"] for entry in content["curves"]] == ["cosine.csv", "constant.csv", "drop.csv"]
    for entry in content["curves"]:
        assert list(entry) == ["path", "mae", "mean_relative_error", "worst_relative_error", "r2"]
        assert entry["mae"] < 1e-3
    assert len(content["samples"]) == 10


def test_predict_writes_every_row_and_prints_errors(fitted, capsys, tmp_path):
    spec = write_spec(fitted, ["wsd"])
    printed = json.loads(call(capsys, "predict", fitted / "law.json", spec, "--out", tmp_path / "out"))
    (entry,) = printed["curves"]
    assert entry["path"] == "wsd.csv"
    rows = list(csv.DictReader((tmp_path / "out" / "wsd.csv").open()))
    given = list(csv.DictReader((fitted / "wsd.csv").open()))
    assert list(rows[0]) == ["step", "lr", "loss", "predicted"]
    assert [row["step"] for row in rows] == [row["step"] for row in given]
    assert [float(row["loss"]) for row in rows] == [float(row["loss"]) for row in given]
    off = [abs(float(row["loss"]) - float(row["predicted"])) for row in rows]
    assert entry["mae"] == pytest.approx(np.mean(off), rel=1e-6)
    assert entry["mae"] < 2e-3
    low, high = entry["final_interval"]
    assert low <= entry["final"] <= high


def test_published_parameters_by_hand(capsys, tmp_path):
    spec = write_spec(tmp_path, ["wsd"], LAWS["multipower"](), MULTIPOWER)
    (tmp_path / "law.json").write_text(json.dumps({"law": "multipower", "params": MULTIPOWER}))
    printed = json.loads(call(capsys, "predict", tmp_path / "law.json", spec, "--out", tmp_path / "out"))
    assert printed["curves"][0]["mean_relative_error"] < 4e-4


def test_a_schedule_that_was_not_run_is_predicted(fitted, capsys, tmp_path):
    planned = {"name": "planned", "schedule": COMMON | SCHEDULES["wsd"], "every": 100}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"curves": [planned]}))
    printed = json.loads(call(capsys, "predict", fitted / "law.json", tmp_path / "spec.yaml", "--out", tmp_path))
    rows = list(csv.DictReader((tmp_path / "planned.csv").open()))
    assert rows[-1]["step"] == str(TOTAL - 1)
    assert rows[0]["loss"] == "nan"
    assert float(rows[-1]["predicted"]) == pytest.approx(printed["curves"][0]["final"])


def test_a_doubled_peak_is_refused_unless_asked_for(fitted, capsys, tmp_path):
    planned = {"name": "high", "schedule": COMMON | {"name": "constant", "peak_lr": 2 * PEAK}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"curves": [planned]}))
    words = ["predict", fitted / "law.json", tmp_path / "spec.yaml", "--out", tmp_path / "out"]
    message = call(capsys, *words, code=2)
    assert "high: the peak rate 0.0006 is 2 times the largest fitted" in message
    assert not (tmp_path / "out").exists()
    printed = json.loads(call(capsys, *words, "--extrapolate"))
    assert "2 times the largest fitted" in printed["warnings"][0]


def test_compare_leaves_curves_out(fitted, capsys):
    spec = fitted / "cosine_constant_drop.yaml"
    printed = json.loads(call(capsys, "compare", spec, "--laws", "annealing", "--lambda", "0.995", "--json"))
    entry = printed["laws"]["annealing"]
    assert len(entry["curves"]) == 3
    assert entry["mean"]["mae"] == pytest.approx(np.mean([each["mae"] for each in entry["curves"]]))
    assert entry["params"]["lambda"] == 0.995
    test = write_spec(fitted, ["wsd"])
    text = call(capsys, "compare", spec, "--laws", "annealing", "--test", test)
    assert "annealing: mean MAE 0.0" in text
    assert "wsd.csv" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(fitted, capsys, tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    call(capsys, "plot", fitted / "law.json", fitted / "cosine_constant_drop.yaml", "--out", path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert suffix == "png" or all(name in data for name in (b"cosine", b"constant", b"drop", b"loss - law"))


def test_a_page_has_everything_and_needs_nothing(fitted, capsys, tmp_path):
    """Well-formed, without scripts and addresses; names that look like markup are text."""
    spec = yaml.safe_load((fitted / "cosine_constant_drop.yaml").read_text())
    for entry in spec["curves"]:
        entry["path"] = str(fitted / entry["path"])
    spec["curves"][0]["name"] = "<script>$x^2 & y"
    spec["curves"].append({"name": "planned <b>", "schedule": COMMON | SCHEDULES["to_zero"]})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    law = json.loads((fitted / "law.json").read_text())
    (tmp_path / "law.json").write_text(json.dumps(law | {"warnings": ["fitted on <two> & more"]}))
    path = tmp_path / "law.html"
    call(capsys, "plot", tmp_path / "law.json", tmp_path / "spec.yaml", "--out", path)
    text = path.read_text()
    assert not re.search(r"<script|<link|<img|<iframe|javascript:|@import|url\((?!#)", text)
    assert not re.search(r'(?:href|src)="(?!#)', text)
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    for name in ("<script>$x^2 & y", "planned <b>", "fitted on <two> & more", "loss - law"):
        assert any(name in piece for piece in parser.pieces), name
    assert any("rates down to" in piece for piece in parser.pieces)  # of the curve that was not fitted
    for name, (low, high) in law["intervals"].items():
        if name != "lambda":
            at = parser.pieces.index(name)
            assert parser.pieces[at : at + 3] == [name, f"{law['params'][name]:.6g}", f"{low:.5g} to {high:.5g}"]
    mae = f"{law['curves'][1]['mae']:.5f}"
    assert parser.pieces[parser.pieces.index(str(fitted / "constant.csv")) + 1] == mae
    (tmp_path / "law.json").write_text(json.dumps(law | {"warnings": "x"}))
    said = call(capsys, "plot", tmp_path / "law.json", tmp_path / "spec.yaml", "--out", path, code=2)
    assert "warnings='x'; give a list of texts" in said


def test_schedule_writes_an_option_of_the_trainer(fitted, capsys, tmp_path):
    path = tmp_path / "best.yaml"
    words = ["--total-steps", 3000, "--peak-lr", PEAK, "--warmup-steps", 200]
    printed = json.loads(call(capsys, "schedule", fitted / "law.json", *words, "--out", path))
    option = yaml.safe_load(path.read_text())
    assert option["name"] == "piecewise"
    assert option["point_steps"][0] == option["warmup_steps"] == 200
    assert option["point_steps"][-1] == 3000
    assert min(option["point_ratios"]) >= 0.1 - 1e-6  # the lowest rate of the fit
    assert printed["predicted"] < min(printed["others"].values())
    assert printed["warnings"] == []
    assert "name: piecewise" in call(capsys, "schedule", fitted / "law.json", *words)
    words[3] = 3 * PEAK
    assert "3 times the largest fitted" in call(capsys, "schedule", fitted / "law.json", *words, code=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"law": "other"}', "law='other'; give one of annealing"),
        ('{"law": "annealing", "params": {"L0": 1}}', "params has L0; law annealing has L0, A, alpha, C, lambda"),
        (json.dumps({"law": "annealing", "params": ANNEALING | {"C": "x"}}), "params.C='x'"),
        (json.dumps({"law": "annealing", "params": ANNEALING | {"lambda": 1}}), "lambda=1.0"),
        (json.dumps({"law": "multipower", "params": MULTIPOWER, "options": {"warmup": "no"}}), "warmup='no'"),
        (json.dumps({"law": "annealing", "params": ANNEALING, "seen": {"peak_lr": 1}}), "seen="),
        (json.dumps({"law": "annealing", "params": ANNEALING, "samples": [[1]]}), "lists of 5 numbers"),
    ],
    ids=lambda value: value[:25],
)
def test_a_damaged_law_file(fitted, capsys, tmp_path, content, message):
    (tmp_path / "law.json").write_text(content)
    words = ["predict", tmp_path / "law.json", fitted / "cosine_constant_drop.yaml", "--out", tmp_path / "out"]
    said = call(capsys, *words, code=2)
    assert message in said
    assert said.startswith("nexa: error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "none.yaml", "--out", "x"], "none.yaml: No such file"),
        (["fit", "SPEC", "--out", "x", "--lambda", "1.5"], "lambda=1.5"),
        (["fit", "SPEC", "--out", "x", "--lambda", "big"], "--lambda big"),
        (["fit", "SPEC", "--out", "x", "--bootstrap", "-1"], "--bootstrap -1"),
        (["fit", "SPEC", "--out", "x", "--prior", "nan"], "--prior nan"),
        (["fit", "SPEC", "--out", "x", "--law", "tissue"], "invalid choice: 'tissue'"),
        (["fit", "SPEC", "--out", "/proc/no/law.json", "--lambda", "0.9"], "cannot be written"),
        (["plot", "LAW", "SPEC", "--out", "x.gif"], "figures are .svg"),
        (["schedule", "LAW", "--total-steps", "3", "--peak-lr", "3e-4"], "--total-steps 3"),
        (["compare", "SPEC", "--test", "none.yaml"], "none.yaml"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_arguments(fitted, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    places = {"SPEC": fitted / "cosine_constant_drop.yaml", "LAW": fitted / "law.json"}
    assert message in call(capsys, *(places.get(word, word) for word in words), code=2)
    assert list(tmp_path.iterdir()) == []
