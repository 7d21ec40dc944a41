"""Laws on curves that they were not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexa.errors import UserError
from nexa.scaling.laws.base import Law
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.fit import Fit, fit, score


def held_out(
    law: Law,
    train: Sequence[Curve],
    test: Sequence[Curve] | None = None,
    *,
    profile: bool = False,
    prior: float | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Errors of the law on `test`; without it on each curve of `train` when it is left out of the fit.

    Returns `params` of the fit on all of `train`, `curves` and their unweighted `mean` as in `measures`, `seconds` of
    all fits, `warnings` of the first.

    Raises:
        UserError: nothing is left to fit or to measure.
    """
    train = [curve for curve in train if curve.measured]
    test = None if test is None else [curve for curve in test if curve.measured]
    if (test is None and len(train) < 2) or test == []:
        raise UserError("compare: give at least two measured curves, or --test with measured ones")
    options: dict[str, Any] = {"profile": profile, "prior": prior, "bootstrap": bootstrap, "seed": seed}
    whole = fit(law, train, **options)
    fits: list[Fit] = [whole]
    entries = []
    for number, curve in enumerate(train if test is None else test):
        used = whole
        if test is None:
            used = fit(law, [*train[:number], *train[number + 1 :]], profile=profile, prior=prior)
            fits.append(used)
        entries.append(score(used.law, used.params, curve))
    mean = {key: sum(entry[key] for entry in entries) / len(entries) for key in entries[0] if key != "path"}
    return {
        "params": whole.params,
        "intervals": whole.intervals(),
        "curves": entries,
        "mean": mean,
        "seconds": round(sum(each.seconds for each in fits), 3),
        "warnings": whole.warnings,
    }
