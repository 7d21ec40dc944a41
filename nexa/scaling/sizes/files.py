"""Tables of runs, and fitted laws on disk."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexa.errors import UserError
from nexa.scaling.sizes.chinchilla import PUBLISHED, Chinchilla, Fit, Floats
from nexa.scaling.sizes.mixing import MixingLaw
from nexa.scaling.sizes.nested import LEVELS

PARAMS = ("E", "A", "B", "alpha", "beta")
WEIGHT, LOSS = "weight/", "loss/"
"""Beginnings of the columns of a table of mixtures."""


def read_table(path: str | Path) -> dict[str, list[str]]:
    """Columns of a CSV file by the names in its first line, as text.

    Raises:
        UserError: no such file, not a CSV file, no rows, or a row of another length.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a CSV file with one line for each run") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    if len(table) < 2:
        raise UserError(f"{path}: has no runs; give a first line with names and a line for each run")
    head = [word.strip() for word in table[0]]
    for number, row in enumerate(table[1:], start=1):
        if len(row) != len(head):
            raise UserError(f"{path} run {number}: {len(row)} cells where the first line has {len(head)}")
    return {name: [row[at] for row in table[1:]] for at, name in enumerate(head)}


def numbers(table: Mapping[str, Sequence[str]], name: str, path: str | Path, *, zero: bool = False) -> Floats:
    """A column of numbers above 0 (`zero`: or 0). Raises UserError for a missing column or another cell."""
    if name not in table:
        raise UserError(f"{path}: no column {name}; the first line has {', '.join(table)}")
    found = []
    for number, cell in enumerate(table[name], start=1):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf or (zero and value == 0)):
            raise UserError(
                f"{path} run {number}: {name} is {cell!r}; give a number {'of at least' if zero else 'above'} 0"
            )
        found.append(value)
    return np.array(found)


@dataclass(frozen=True)
class Mixtures:
    """A table of runs of mixtures."""

    sources: list[str]
    domains: list[str]
    shares: Floats
    """[runs, sources]"""
    losses: Floats
    """[runs, domains]"""
    scales: dict[str, Floats]
    """Columns parameters and tokens [runs], those that there are."""


def mixtures(path: str | Path) -> Mixtures:
    """A table of mixtures.

    Columns are `weight/<source>`, `loss/<domain>` and perhaps `parameters` and `tokens`; weights of a run are scaled to
    sum to 1. Raises UserError.
    """
    table = read_table(path)
    sources = [name.removeprefix(WEIGHT) for name in table if name.startswith(WEIGHT)]
    domains = [name.removeprefix(LOSS) for name in table if name.startswith(LOSS)]
    if len(sources) < 2 or not domains:
        raise UserError(
            f"{path}: columns are {', '.join(table)}; give at least two weight/<source> and one loss/<domain>"
        )
    weights = np.stack([numbers(table, WEIGHT + name, path, zero=True) for name in sources], 1)
    empty = np.flatnonzero(weights.sum(1) == 0)
    if len(empty):
        raise UserError(f"{path} run {empty[0] + 1}: all weights are 0")
    losses = np.stack([numbers(table, LOSS + name, path) for name in domains], 1)
    scales = {name: numbers(table, name, path) for name in LEVELS if name in table}
    return Mixtures(sources, domains, weights / weights.sum(1, keepdims=True), losses, scales)


def scaling_document(fit: Fit, runs: int, largest: tuple[float, float]) -> dict[str, Any]:
    """What scaling.json holds. `largest`: parameters and tokens of the largest run."""
    samples = [[getattr(sample, name) for name in PARAMS] for sample in fit.samples]
    intervals = {name: fit.interval([getattr(s, name) for s in fit.samples]) for name in PARAMS} if samples else {}
    return {
        "law": "chinchilla",
        "params": {name: getattr(fit.law, name) for name in PARAMS},
        "runs": runs,
        "largest": {"parameters": largest[0], "tokens": largest[1]},
        "objective": fit.objective,
        "intervals": intervals,
        "samples": samples,
    }


def _content(path: str | Path, law: str) -> dict[str, Any]:
    """A JSON object whose `law` is this one. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = f", or a published law: {', '.join(PUBLISHED)}" if law == "chinchilla" else ""
        raise UserError(f"{path}: {error.strerror}; give the file that the fit wrote{known}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("law") != law:
        found = content.get("law") if isinstance(content, dict) else content
        raise UserError(f"{path}: law={found!r}; give a file whose law is {law!r}")
    return content


def read_scaling(name: str) -> tuple[Chinchilla, list[Chinchilla]]:
    """A law and its bootstrap samples: a published one by name, or of a file. Raises UserError."""
    if name in PUBLISHED:
        return PUBLISHED[name][0], []
    content = _content(name, "chinchilla")
    params, samples = content.get("params"), content.get("samples", [])
    if not isinstance(params, dict) or set(params) != set(PARAMS):
        raise UserError(f"{name}: params={params!r}; give the numbers {', '.join(PARAMS)}")
    rows = [[params[key] for key in PARAMS], *(samples if isinstance(samples, list) else [None])]
    wrong = [row for row in rows if not _positive(row, len(PARAMS))]
    if wrong:
        raise UserError(f"{name}: {wrong[0]!r}; {', '.join(PARAMS)} are numbers above 0")
    law, *others = (Chinchilla(*map(float, row)) for row in rows)
    return law, others


def _positive(row: Any, length: int) -> bool:
    """Whether this is a list of so many finite numbers above 0."""
    return (
        isinstance(row, list)
        and len(row) == length
        and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in row)
    )


def mixing_document(
    law: MixingLaw, runs: int, error: Floats, target: Mapping[str, float], exponents: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What mixture.json holds; `error`: mean |r| of each domain on what was fitted.

    `target`, `exponents`: of the laws of steps and sizes, when losses were taken to a target first.
    """
    return {
        "law": "mixture",
        "sources": law.sources,
        "domains": law.domains,
        "params": {"c": law.c.tolist(), "k": law.k.tolist(), "t": law.t.tolist()},
        "seen": {"low": law.low.tolist(), "high": law.high.tolist()},
        "runs": runs,
        "mae": dict(zip(law.domains, map(float, error), strict=True)),
        "target": dict(target),
        "exponents": {level: dict(zip(law.domains, of, strict=True)) for level, of in exponents.items()},
    }


def read_mixing(path: str | Path) -> MixingLaw:
    """A mixing law from its file. Raises UserError."""
    content = _content(path, "mixture")
    try:
        params, seen = content["params"], content["seen"]
        arrays = [np.array(params[key], dtype=np.float64) for key in "ckt"]
        bounds = [np.array(seen[key], dtype=np.float64) for key in ("low", "high")]
        sources, domains = list(content["sources"]), list(content["domains"])
        shapes = [array.shape for array in (*arrays, *bounds)]
        wanted = [(len(domains),)] * 2 + [(len(domains), len(sources))] + [(len(sources),)] * 2
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}); give the file that nexa law mixture fit wrote") from error
    if shapes != wanted or not all(np.isfinite(array).all() for array in (*arrays, *bounds)):
        raise UserError(f"{path}: damaged (sizes of params or seen); give the file that nexa law mixture fit wrote")
    return MixingLaw(sources, domains, *arrays, *bounds)
