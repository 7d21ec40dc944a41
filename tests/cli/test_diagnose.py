"""`nexa diagnose`: what it measures on, what it writes, and every way in which it can be wrong."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from nexa.cli.main import main
from nexa.config import to_yaml
from nexa.config.schema import Config
from nexa.diagnostics import MEASURES, measure
from nexa.diagnostics.figures import FIGURES, Lines
from nexa.diagnostics.report import render
from tests.cli.common import read_json, tiny_model, write_checkpoint

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
WORDS = "Norms stand before a sublayer, or after it, or on both sides; that is the question here. " * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `pre` and `lns` of the byte tokenizer, and a text."""
    root = tmp_path_factory.mktemp("diagnose")
    for number, placement in enumerate(("pre", "lns")):
        write_checkpoint(tiny_model(placement, seed=number, **SIZES), root / placement)
    (root / "book.txt").write_text(WORDS)
    return root


def call(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", *map(str, arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed.out, printed.err


@pytest.fixture(scope="module")
def pair(place: Path) -> Path:
    """The report of both runs on the text."""
    out = place / "both"
    options = ["--tokens", "200", "--batch-size", "3", "--label", "Pre-LN", "LNS <b>$x_1$ & more"]
    files = map(str, (place / "pre", place / "lns", "--text", place / "book.txt", "--out", out))
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", *files, *options])
    assert ended.value.code == 0
    return out


def test_what_is_measured(place: Path, pair: Path) -> None:
    document = read_json(pair / "diagnosis.json")
    assert document["data"] == str(place / "book.txt") and document["sequence_length"] == 16
    ids = [256, *WORDS.encode()]
    rows = 13  # 200 tokens in whole rows of 16
    inputs = torch.tensor(ids[: rows * 16]).view(rows, 16)
    labels = torch.tensor(ids[1 : rows * 16 + 1]).view(rows, 16)
    for number, (run, placement) in enumerate(zip(document["runs"], ("pre", "lns"), strict=True)):
        assert (run["placement"], run["kind"], run["step"], run["blocks"]) == (placement, "rmsnorm", 1, 4)
        assert run["tokens"] == rows * 16
        model = tiny_model(placement, seed=number, **SIZES)
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
        expected = measure(model, [{"input_ids": inputs, "labels": labels}])
        assert run["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert run["values"].keys() == expected.values.keys()
        for name in ("variance", "loss_increase", "logit_max", "gradient_norm", "growth_exponent"):
            assert run["values"][name] == pytest.approx(expected.values[name], rel=1e-4, abs=1e-6), name


class Page(HTMLParser):
    """The text of each element that matters, and every address in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = {"th": [], "span": [], "h2": [], "h3": [], "figcaption": []}
        self.figures, self.addresses, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        if tag == "figure":
            self.figures.append(found["id"])
        self.addresses += [found[key] for key in ("href", "src", "xlink:href") if key in found]
        if tag in self.text:
            self.text[tag].append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data


def test_the_page(pair: Path) -> None:
    text = (pair / "report.html").read_text()
    page = Page()
    page.feed(text)
    labels = ["Pre-LN", "LNS <b>$x_1$ & more"]
    assert page.text["span"] == labels and page.text["h3"] == labels
    assert [cell for cell in page.text["th"] if cell in labels] == labels
    assert page.figures == [figure.name for figure in FIGURES]
    assert page.text["h2"] == [figure.title for figure in FIGURES]
    assert page.text["figcaption"] == [figure.what for figure in FIGURES]
    assert all(what.count(".") >= 1 and what.endswith(".") for what in page.text["figcaption"])
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert set(re.findall(r"https?://[^\"]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme:dark" in text and not re.search("#0a0[bc]", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_pictures(pair: Path) -> None:
    """Every picture is a whole SVG with a line of each run, or a heat map for each."""
    runs = read_json(pair / "diagnosis.json")["runs"]
    text = (pair / "report.html").read_text()
    for figure in FIGURES:
        part = text.split(f'<figure id="{figure.name}"')[1].split("</figure>")[0]
        pictures = re.findall(r"<svg.*?</svg>", part, re.S)
        assert len(pictures) == (2 if figure.name == "angular" else 1)
        for picture in pictures:
            root = ET.fromstring(picture)
            assert "var(--text)" in picture
            words = " ".join(root.itertext())
            assert figure.axis in words
        if isinstance(figure, Lines):
            for number in range(len(runs)):
                assert f"stroke: var(--run{number})" in pictures[0], figure.name


def test_a_page_is_made_of_what_there_is(pair: Path) -> None:
    document = read_json(pair / "diagnosis.json")
    for run in document["runs"]:
        del run["values"]["loss_increase"]
        run["values"]["variance"][2] = None
        run["values"]["growth_exponent"] = None
    page = Page()
    page.feed(render(document))
    assert page.figures == [figure.name for figure in FIGURES if figure.name != "loss_increase"]


def test_many_runs_have_lines_of_their_own(pair: Path) -> None:
    document = read_json(pair / "diagnosis.json")
    few = {"influence": document["runs"][0]["values"]["influence"]}
    document["runs"] = [dict(document["runs"][0], label=f"run {number}", values=few) for number in range(10)]
    text = render(document)
    assert text.count('<span><svg viewBox="0 0 34 10"') == 10
    styles = re.findall(r'stroke="(var\(--run\d\))" stroke-width="3" stroke-dasharray="([^"]*)"', text)
    assert len(set(styles)) == 10


def test_output_and_defaults(place: Path, capsys) -> None:
    out, err = call(capsys, place / "pre", "--text", place / "book.txt", "--tokens", 32, "--no-drop")
    folder = place / "pre" / "reports" / "diagnose_1"
    assert f"report: {folder / 'report.html'}" in out and "measuring on" in err
    assert "growth exponent" in out and "Traceback" not in err
    document = read_json(folder / "diagnosis.json")
    assert document["runs"][0]["label"] == "pre"
    assert (
        "loss_increase" not in document["runs"][0]["values"]
        and "loss_increase" not in (folder / "report.html").read_text()
    )
    printed, _ = call(
        capsys, place / "pre", "--text", place / "book.txt", "--tokens", 32, "--no-drop", "--json", "--out", place / "j"
    )
    assert json.loads(printed) == document


@pytest.fixture
def no_page(monkeypatch) -> None:
    """Figures take a second."""
    monkeypatch.setattr("nexa.diagnostics.report.render", lambda document: "")


def test_progress(place: Path, capsys, monkeypatch, no_page) -> None:
    monkeypatch.setattr("nexa.cli.diagnose.NOTE_SECONDS", 0.0)
    shared = ("--text", place / "book.txt", "--tokens", 64, "--no-drop", "--out", place / "p", "--batch-size", 2)
    _, err = call(capsys, place / "pre", place / "lns", *shared)
    lines = [line for line in err.splitlines() if "tokens/s" in line]
    rate = r"[\d,]+ tokens/s"
    assert re.fullmatch(rf"nexa diagnose: pre: 32 of 64 tokens, {rate}, \d+ s left, 1 more to measure", lines[0])
    assert re.fullmatch(rf"nexa diagnose: lns: 64 of 64 tokens, {rate}, 0 s left", lines[-1])


def store(path: Path, splits: dict[str, list[str]], tokenizer: object = None) -> Path:
    """A packed store of bytes."""
    from data_pipeline.tokenizer import ByteTokenizer
    from data_pipeline.writer import StoreWriter

    path.mkdir()
    writer = StoreWriter(path, np.dtype(np.uint16))
    for split, texts in splits.items():
        writer.append(split, *ByteTokenizer().encode_documents(texts, np.dtype(np.uint16)))
    writer.finish(ByteTokenizer(), {"name": path.name, "sources": [], "bad": 0})
    return path


def test_the_runs_own_validation_split(place: Path, tmp_path: Path, capsys, no_page) -> None:
    data = store(tmp_path / "data", {"train": [WORDS], "validation": ["short.", "another one, a bit longer."]})
    write_checkpoint(tiny_model("pre", **SIZES), tmp_path / "run")
    cfg = Config()
    cfg.data.source, cfg.data.document_mask = str(data), True
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(cfg))
    out, _ = call(capsys, tmp_path / "run", "--no-drop", "--json")
    document = json.loads(out)
    assert document["data"] == f"validation split of {data}, the run's own data, documents masked"
    # 34 tokens, of which all but the first are targets, and one begins another document
    assert document["runs"][0]["tokens"] == 32
    out, _ = call(capsys, tmp_path / "run", "--no-drop", "--data", data, "--json")
    assert json.loads(out)["runs"][0]["tokens"] == 33


def test_without_a_run_the_embedded_text(place: Path, capsys, monkeypatch, no_page) -> None:
    documents = [("train", "not this"), ("validation", WORDS), ("validation", "more")]
    monkeypatch.setattr("nexa.diagnostics.data.embedded_documents", lambda: documents)
    out, err = call(capsys, place / "pre", "--no-drop", "--tokens", 48, "--out", place / "e")
    assert "validation documents of the embedded text, because" in out and "config.yaml: no such file" in err
    assert read_json(place / "e" / "diagnosis.json")["runs"][0]["tokens"] == 48


BAD = [
    (["{place}/nowhere"], "nowhere does not exist"),
    (["{place}/pre", "{place}/pre/checkpoints/step_00000001"], "the same checkpoint 2 times"),
    (["{place}/pre", "--tokens", "0"], "--tokens 0: must be at least 1"),
    (["{place}/pre", "--batch-size", "-1"], "--batch-size -1: must be at least 1"),
    (["{place}/pre", "--text", "{place}/no.txt"], "no.txt: no such file"),
    (["{place}/pre", "--text", "{place}/empty.txt"], "empty.txt: has no text to measure on"),
    (["{place}/pre", "--data", "{place}/nostore"], "nostore: no such packed store"),
    (["{place}/pre", "--data", "x", "--text", "y"], "--data x and --text y: give one of them"),
    (["{place}/pre", "--text", "{place}/book.txt", "--sequence-length", "65"], "longer than the 64 positions"),
    (["{place}/pre", "{place}/lns", "--label", "a"], "--label: 1 names (a) for 2 checkpoints"),
    (["{place}/pre", "{place}/lns", "--label", "a", "a"], "--label: a, a: every checkpoint needs a name of its own"),
    (["{place}/pre", "--text", "{place}/book.txt", "--out", "{place}/book.txt/x"], "book.txt/x: cannot be written"),
    (["{place}/pre", "--device", "tpu"], "invalid choice: 'tpu'"),
    ([], "the following arguments are required: CHECKPOINT"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(place: Path, capsys, arguments: list[str], message: str) -> None:
    (place / "empty.txt").write_text("")
    out, err = call(capsys, *(word.format(place=place) for word in arguments), code=2)
    assert out == "" and message in err and "Traceback" not in err
    assert err.count("nexa: error:") == 1


def test_weights_that_are_not_finite(tmp_path: Path, place: Path, capsys) -> None:
    model = tiny_model("pre", **SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    write_checkpoint(model, tmp_path / "bad")
    _, err = call(capsys, tmp_path / "bad", "--text", place / "book.txt", code=2)
    assert "the loss is nan" in err and str(tmp_path / "bad") in err


def test_a_store_of_another_tokenizer(tmp_path: Path, place: Path, capsys) -> None:
    data = store(tmp_path / "data", {"train": [WORDS]})
    manifest = read_json(data / "manifest.json")
    manifest["tokenizer"] = {"kind": "bytes", "vocab_size": 257, "eod_id": 256, "sha256": "other", "file": None}
    (data / "manifest.json").write_text(json.dumps(manifest))
    _, err = call(capsys, place / "pre", "--data", data, code=2)
    assert "another tokenizer than that of" in err and "--text FILE" in err


def test_every_measure_has_its_figure_or_row() -> None:
    """What is measured is shown: no quantity by block without a figure."""
    model = tiny_model("pre", **SIZES)
    ids = torch.arange(32).view(2, 16)
    values = measure(model, [{"input_ids": ids, "labels": ids}], tuple(MEASURES)).values
    shown = {figure.name for figure in FIGURES}
    assert shown <= values.keys()
    hidden = {name for name, value in values.items() if isinstance(value, list)} - shown
    assert hidden == {"angular_last", "top2", "top3", "peak_ratio_max"}
