"""`nexa diagnose`: what normalisation does inside trained networks, compared side by side."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexa.errors import UserError

if TYPE_CHECKING:
    from nexa.diagnostics.data import StoreData, TextData

ABOUT = """
Measure checkpoints layer by layer on the same tokens: variance and mean square of the residual stream and how they
grow, what each sublayer adds, block influence, angular distance between layers, the loss without each block in turn,
gradient norms, massive activations, residual sinks, attention logits.

Writes DIR/diagnosis.json and DIR/report.html, one page with a figure for each quantity and a line for each checkpoint,
which needs no other file. The data is --data or --text, else the validation split of the first checkpoint's run, else
text that every Python carries; the output says which.

  nexa diagnose runs/quickstart
  nexa diagnose runs/pre runs/lns runs/post/checkpoints/step_00001000 --out comparison --tokens 65536
  nexa diagnose runs/pre runs/lns --label "Pre-LN" "LNS" --text book.txt --no-drop --json
"""
NOTE_SECONDS = 5.0


@dataclass(frozen=True)
class Target:
    """One checkpoint to measure."""

    path: Path
    label: str
    step: int


def add_parser(subparsers: Any) -> None:
    """Add the `diagnose` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "diagnose",
        help="measure checkpoints layer by layer, with a report that compares them",
        description=ABOUT,
        formatter_class=form,
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint directory, or a run's for its newest one")
    add("--data", metavar="STORE", help="packed store to measure on: its validation split if it has one")
    add("--text", metavar="FILE", help="text, jsonl or parquet to measure on, with each checkpoint's own tokenizer")
    add("--tokens", type=int, default=32768, metavar="N", help="tokens to measure on (default: 32768)")
    add("--sequence-length", type=int, metavar="N", help="of the rows (default: that of the first one's training)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows computed at once (default: 4)")
    add("--out", metavar="DIR", help="where to write (default: <first run>/reports/diagnose_<step>)")
    add("--no-drop", action="store_true", help="leave out the loss without each block, which takes most of the time")
    add("--label", nargs="+", action="extend", metavar="NAME", help="name of each checkpoint in the report, in order")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add("--json", action="store_true", help="print what diagnosis.json holds instead of lines")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write and say where. Raises UserError before anything is measured for all that can be known then."""
    _check_numbers(arguments)
    from nexa.diagnostics.data import choose
    from nexa.diagnostics.report import render, table_lines
    from nexa.inference.score import TextFile

    targets = find_targets(arguments.checkpoints, arguments.label)
    text = None if arguments.text is None else TextFile(arguments.text, "text")
    data = choose(targets[0].path, arguments.data, text)
    out = _folder(arguments.out, targets[0])
    print(f"nexa diagnose: measuring on {data.description}", file=sys.stderr, flush=True)
    document = _measure_all(targets, data, arguments)
    page = render(document)
    _write(out / "diagnosis.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    _write(out / "report.html", page)
    if arguments.json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return 0
    print(f"measured on {data.description}, in sequences of {document['sequence_length']} tokens")
    print("\n".join(table_lines(document["runs"])))
    print(f"values: {out / 'diagnosis.json'}\nreport: {out / 'report.html'}")
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("tokens", "sequence_length", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.data is not None and arguments.text is not None:
        raise UserError(f"--data {arguments.data} and --text {arguments.text}: give one of them")


def find_targets(checkpoints: list[str], labels: list[str] | None) -> list[Target]:
    """The checkpoints with a label each: that given, else the run's name, with the step where two would be the same.

    Raises UserError for a checkpoint that is not there or given twice, and for labels that do not fit.
    """
    from nexa.checkpoint.load import find, read_manifest
    from nexa.diagnostics.data import run_of

    paths = [find(path) for path in checkpoints]
    twice = [given for given, path in zip(checkpoints, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise UserError(f"{', '.join(twice)}: the same checkpoint {len(twice)} times; give each once")
    steps = [int(read_manifest(path).get("step", 0)) for path in paths]
    if labels is None:
        names = [(run_of(path) or path).name for path in paths]
        labels = [
            name if names.count(name) == 1 else f"{name} step {step}" for name, step in zip(names, steps, strict=True)
        ]
        if len(set(labels)) < len(labels):
            raise UserError("two checkpoints have the same run name and step; name each with --label NAME NAME …")
    if len(labels) != len(paths):
        raise UserError(
            f"--label: {len(labels)} names ({', '.join(labels)}) for {len(paths)} checkpoints; give one each"
        )
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise UserError(f"--label: {', '.join(labels)}: every checkpoint needs a name of its own")
    return [Target(*one) for one in zip(paths, labels, steps, strict=True)]


def _folder(out: str | None, first: Target) -> Path:
    """Where to write; made and tried before the work begins."""
    from nexa.diagnostics.data import run_of

    beside = run_of(first.path) or first.path.parent
    folder = Path(out) if out is not None else beside / "reports" / f"diagnose_{first.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from None
    return folder


def _measure_all(targets: list[Target], data: StoreData | TextData, arguments: argparse.Namespace) -> dict[str, Any]:
    """diagnosis.json; one model is in memory at a time."""
    from nexa.inference.checkpoint import open_checkpoint

    length: int | None = arguments.sequence_length
    runs = []
    for number, target in enumerate(targets):
        opened = open_checkpoint(target.path, arguments.device)
        longest = opened.model.config.max_position_embeddings
        length = opened.sequence_length if length is None else length
        if length > longest:
            raise UserError(
                f"--sequence-length {length}: longer than the {longest} positions of {target.path}; use at most these"
            )
        rows = data.measured(opened, arguments.tokens, length)
        progress = _Progress(target.label, number, len(targets), len(rows.rows) * length)
        runs.append(_measure(target, opened, rows, progress, arguments))
    return {
        "format": "nexa diagnosis",
        "version": 1,
        "data": data.description,
        "sequence_length": length,
        "runs": runs,
    }


def _measure(
    target: Target, opened: Any, rows: Any, progress: Callable[[int], None], arguments: argparse.Namespace
) -> dict[str, Any]:
    from nexa.diagnostics import MEASURES, measure

    model = opened.model
    names = [name for name in MEASURES if not (arguments.no_drop and name == "layer_drop")]
    found = measure(model, rows.batches(arguments.batch_size, opened.device), names, progress=progress)
    if not math.isfinite(found.loss):
        raise UserError(
            f"{target.path}: the loss is {found.loss}; the weights hold values that are not finite or far too large"
        )
    return {
        "label": target.label,
        "checkpoint": str(target.path),
        "step": target.step,
        "placement": model.norm_config.placement,
        "kind": model.norm_config.kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **found.as_dict(),
    }


class _Progress:
    """Lines on standard error, at most every few seconds."""

    def __init__(self, label: str, number: int, count: int, total: int) -> None:
        """`number` of `count` checkpoints; total: its tokens."""
        self._label, self._number, self._count, self._total = label, number, count, total
        self._begin = self._last = time.monotonic()

    def __call__(self, tokens: int) -> None:
        """So many tokens are done."""
        now = time.monotonic()
        if now - self._last < NOTE_SECONDS:
            return
        self._last = now
        rate = tokens / (now - self._begin)
        left = max(self._total - tokens, 0) / rate
        later = self._count - self._number - 1
        more = f", {later} more to measure" if later else ""
        print(
            f"nexa diagnose: {self._label}: {tokens:,} of {self._total:,} tokens, {rate:,.0f} tokens/s, "
            f"{left:,.0f} s left{more}",
            file=sys.stderr,
            flush=True,
        )


def _write(path: Path, text: str) -> None:
    """All or nothing: an older file stays until the new one is whole."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or name another folder") from None
