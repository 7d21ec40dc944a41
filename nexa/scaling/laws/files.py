"""law.json: a fitted law on disk, and the curves that it predicts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nexa.errors import UserError
from nexa.scaling.laws import LAWS
from nexa.scaling.laws.base import Law
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.fit import DELTA, INTERVAL, Fit, intervals, score
from nexa.scaling.laws.limits import Seen, seen
from nexa.scaling.laws.rates import Floats


@dataclass(frozen=True)
class Fitted:
    """A law with its parameters."""

    law: Law
    params: dict[str, float]
    seen: Seen | None = None
    """Of the curves it was fitted on; None in a file that does not say."""
    samples: list[list[float]] = field(default_factory=list)
    """Bootstrap replicates of the parameters, in the order of `params`."""
    warnings: list[str] = field(default_factory=list)
    """Of the fit."""

    def intervals(self) -> dict[str, list[float]]:
        """95 % interval of each parameter; {} without bootstrap."""
        return intervals(self.params, self.samples)

    def predict(self, curve: Curve) -> Floats:
        """The loss at every row [n]; not finite where the law has none. Raises UserError without a size it needs."""
        return self._at(curve, self.params)

    def interval(self, curve: Curve) -> tuple[Floats, Floats] | None:
        """95 % interval of the law at every row ([n], [n]); None without bootstrap. The noise of a run is not in it."""
        if not self.samples:
            return None
        names = list(self.params)
        features = self.law.features(curve.rates, curve.index, curve.size)
        vectors = [self.law.vector(dict(zip(names, sample, strict=True))) for sample in self.samples]
        low, high = np.percentile([self.law.evaluate(features, vector) for vector in vectors], INTERVAL, axis=0)
        return low, high

    def _at(self, curve: Curve, params: Mapping[str, float]) -> Floats:
        if self.law.needs_size and curve.size is None:
            raise UserError(f"{curve.path}: law {self.law.name} needs the size of the model; give parameters: 25e6")
        return self.law.predict(curve.rates, curve.index, params, curve.size)


def of_fit(fit: Fit, curves: Sequence[Curve]) -> Fitted:
    """What `fit` on `curves` found."""
    return Fitted(fit.law, fit.params, seen([curve.rates for curve in curves]), fit.samples, fit.warnings)


def document(fit: Fit, curves: Sequence[Curve]) -> dict[str, Any]:
    """What law.json holds: `law`, `params` and `curves` by contract, the rest for those who want to know."""
    return {
        "law": fit.law.name,
        "params": fit.params,
        "curves": [score(fit.law, fit.params, curve) for curve in curves if curve.measured],
        "options": fit.law.chosen,
        "intervals": fit.intervals(),
        "fit": {
            "objective": fit.objective,
            "huber_delta": DELTA,
            "prior": fit.prior,
            "rows": fit.rows,
            "condition": fit.condition,
            "seconds": round(fit.seconds, 3),
        },
        "seen": vars(seen([curve.rates for curve in curves])),
        "profile": fit.profile,
        "warnings": fit.warnings,
        "samples": fit.samples,
    }


def write(path: str | Path, text: str) -> None:
    """Write a file whole or not at all. Raises UserError when it cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def to_json(content: Mapping[str, Any]) -> str:
    """JSON that every reader takes: numbers that are none become null."""
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def read(path: str | Path) -> Fitted:
    """A law from its file; only `law` and `params` are needed, so that published parameters can be written by hand.

    Raises:
        UserError: no such file, not JSON, an unknown law or option, a parameter that is missing, unknown or no number.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the law.json that nexa law fit wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); give the law.json that nexa law fit wrote") from error
    name = content.get("law") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in LAWS:
        raise UserError(f"{path}: law={name!r}; give one of {', '.join(LAWS)}")
    params = content.get("params")
    law = LAWS[name]
    if not isinstance(params, dict) or set(params) != set(law.order):
        shown = ", ".join(params) if isinstance(params, dict) else repr(params)
        raise UserError(f"{path}: params has {shown}; law {name} has {', '.join(law.order)}")
    wrong = [key for key, value in params.items() if not _is_number(value)]
    if wrong:
        raise UserError(f"{path}: params.{wrong[0]}={params[wrong[0]]!r}; give a finite number")
    fixed = {key: float(params[key]) for key in law.order if key not in law.linear + law.shape}
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise UserError(f"{path}: options={options!r}; give a mapping or leave it out")
    ordered = {key: float(params[key]) for key in law.order}
    warnings = content.get("warnings") or []
    if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
        raise UserError(f"{path}: warnings={warnings!r}; give a list of texts or leave it out")
    samples = _samples(content, len(ordered), path)
    return Fitted(law(fixed, **options), ordered, _seen(content, path), samples, warnings)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _seen(content: dict[str, Any], path: str | Path) -> Seen | None:
    """`seen` of a file."""
    entry = content.get("seen")
    if entry is None:
        return None
    names = set(Seen.__dataclass_fields__)
    if (
        not isinstance(entry, dict)
        or set(entry) != names
        or not all(isinstance(v, int | float) for v in entry.values())
    ):
        raise UserError(f"{path}: seen={entry!r}; it has the numbers {', '.join(sorted(names))}, or leave it out")
    return Seen(**entry)


def _samples(content: dict[str, Any], width: int, path: str | Path) -> list[list[float]]:
    """`samples` of a file."""
    samples = content.get("samples") or []
    good = isinstance(samples, list) and all(
        isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in samples
    )
    if not good:
        raise UserError(f"{path}: samples are not lists of {width} numbers; leave them out")
    return samples


def prediction_csv(curve: Curve, predicted: Floats) -> str:
    """`step,lr,loss,predicted`, one line for every row of the curve; nan where there is no number."""
    lines = [["step", "lr", "loss", "predicted"]]
    for step, *numbers in zip(curve.step, curve.lr, curve.loss, predicted, strict=True):
        lines.append([str(step), *(f"{value:.10g}" if math.isfinite(value) else "nan" for value in numbers)])
    return "".join(",".join(line) + "\n" for line in lines)
