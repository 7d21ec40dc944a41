"""`nexa law scaling` and `mixture`: loss by parameters, tokens and data."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from nexa.cli import law_ladder
from nexa.errors import UserError

if TYPE_CHECKING:
    from nexa.scaling.sizes.chinchilla import Chinchilla
    from nexa.scaling.sizes.repetition import Repeated

FAR = 100
"""So many times the largest run is worth a word."""
LAW_HELP = "scaling.json, or a published law: hoffmann, besiroglu, c4"


def add_parsers(commands: Any) -> None:
    """Add these and `ladder` to the commands of `nexa law`."""
    scaling = commands.add_parser(
        "scaling",
        help="loss by parameters and tokens: fit, predict, optimum",
        description="L = E + A / N^alpha + B / D^beta for N parameters and D tokens (Chinchilla).",
    ).add_subparsers(dest="scaling_command", metavar="COMMAND", required=True)
    _scaling_fit_parser(scaling)
    _scaling_at_parser(scaling)
    _scaling_optimum_parser(scaling)
    mixture = commands.add_parser(
        "mixture",
        help="loss by the weights of sources: fit, best",
        description="L_i = c_i + k_i exp(sum_j t_ij r_j) of each validation domain i for shares r_j of the sources.",
    ).add_subparsers(dest="mixture_command", metavar="COMMAND", required=True)
    _mixture_parsers(mixture)
    law_ladder.add_parser(commands)


def _scaling_fit_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit the law to runs",
        description="Fit the law to runs on fresh data; writes FILE, prints a summary.",
    )
    add = parser.add_argument
    add(
        "runs", nargs="+", metavar="RUNS", help="CSV files with columns parameters,tokens,loss, or finished run folders"
    )
    add("--loss", default="loss", metavar="KEY", help="key of metrics.jsonl in run folders (default: loss)")
    add("--tied", action="store_true", help="alpha = beta: the over-training law of Gadre et al.")
    add("--bootstrap", type=int, default=0, metavar="N", help="replicates for intervals (default: 0, none)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    add("--out", required=True, metavar="FILE", help="scaling.json to write")
    parser.set_defaults(handler=scaling_fit)


def _scaling_at_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help="loss of N parameters and D tokens", description="Print JSON.")
    add = parser.add_argument
    add("law", metavar="LAW", help=LAW_HELP)
    add("--parameters", type=float, required=True, metavar="N", help="of the model; averaged over tokens if it grows")
    add("--tokens", type=float, required=True, metavar="D", help="of training, epochs included")
    add("--unique-tokens", type=float, metavar="U", help="different tokens that there are; more are repetitions")
    parser.set_defaults(handler=scaling_predict)


def _scaling_optimum_parser(commands: Any) -> None:
    parser = commands.add_parser("optimum", help="best N and D for a budget", description="Print JSON.")
    add = parser.add_argument
    add("law", metavar="LAW", help=LAW_HELP)
    add("--flops", type=float, required=True, metavar="C", help="of training, 6 N D")
    add("--unique-tokens", type=float, metavar="U", help="different tokens that there are; more are repetitions")
    parser.set_defaults(handler=scaling_optimum)


def _mixture_parsers(commands: Any) -> None:
    parser = commands.add_parser("fit", help="fit the law to runs", description="Fit the law; writes FILE.")
    add = parser.add_argument
    add("runs", metavar="RUNS", help="CSV file with columns weight/<source> and loss/<domain>, a line for each run")
    add("--parameters", type=float, metavar="N", help="predict each mixture at this size first (column parameters)")
    add("--tokens", type=float, metavar="D", help="predict each mixture at this length first (column tokens)")
    add("--out", required=True, metavar="FILE", help="mixture.json to write")
    parser.set_defaults(handler=mixture_fit)
    parser = commands.add_parser(
        "best", help="weights of the least loss", description="Print the best weights and their losses as JSON."
    )
    add = parser.add_argument
    add("law", metavar="LAW", help="mixture.json")
    add("--domain", nargs="+", default=[], metavar="NAME=X", help="weights of domains (default: all equal)")
    add("--most", nargs="+", default=[], metavar="NAME=X", help="largest share of a source, so that it lasts")
    add("--least", nargs="+", default=[], metavar="NAME=X", help="smallest share of a source")
    parser.set_defaults(handler=mixture_best)


def _note(text: str) -> None:
    print(f"nexa law: {text}", file=sys.stderr, flush=True)


def _above_zero(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")


def scaling_fit(arguments: argparse.Namespace) -> int:
    """Fit, write scaling.json, print parameters. Raises UserError."""
    import numpy as np

    from nexa.scaling.laws.files import to_json, write
    from nexa.scaling.sizes import files, runs
    from nexa.scaling.sizes.chinchilla import fit

    if arguments.bootstrap < 0 or arguments.seed < 0:
        raise UserError(f"--bootstrap {arguments.bootstrap} --seed {arguments.seed}: give numbers of at least 0")
    points = runs.load(arguments.runs, arguments.loss)
    columns = [np.array([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss")]
    found = fit(*columns, tied=arguments.tied, bootstrap=arguments.bootstrap, seed=arguments.seed)
    document = files.scaling_document(found, len(points), (columns[0].max(), columns[1].max()))
    write(arguments.out, to_json(document))
    off = np.abs(found.law.loss(columns[0], columns[1]) - columns[2])
    print(f"{len(points)} runs: mean error {off.mean():.4f}, worst {off.max():.4f} ({points[int(off.argmax())].path})")
    for name, value in document["params"].items():
        between = document["intervals"].get(name)
        print(f"  {name:<6} {value:.6g}" + (f"  ({between[0]:.5g} to {between[1]:.5g})" if between else ""))
    print(f"wrote {arguments.out}")
    return 0


def _limited(law: Chinchilla, arguments: argparse.Namespace) -> Chinchilla | Repeated:
    from nexa.scaling.sizes.repetition import Repeated

    return law if arguments.unique_tokens is None else Repeated(law, arguments.unique_tokens)


def _epochs(tokens: float, arguments: argparse.Namespace) -> dict[str, float]:
    """What is to be said of repetition; a warning where the law is known to be wrong."""
    from nexa.scaling.sizes.repetition import MOST_EPOCHS

    if arguments.unique_tokens is None:
        return {}
    epochs = tokens / arguments.unique_tokens
    if epochs > MOST_EPOCHS:
        _note(f"warning: {epochs:.3g} epochs: beyond {MOST_EPOCHS} real runs over-fit and end far above the law")
    return {"epochs": epochs}


def _interval(values: list[float]) -> list[float] | None:
    """95 % interval of bootstrap samples."""
    import numpy as np

    from nexa.scaling.sizes.chinchilla import INTERVAL

    return [float(v) for v in np.percentile(values, INTERVAL)] if values else None


def scaling_predict(arguments: argparse.Namespace) -> int:
    """Print the loss as JSON. Raises UserError."""
    from nexa.scaling.sizes.files import read_scaling

    _above_zero(arguments, "parameters", "tokens", "unique_tokens")
    law, samples = read_scaling(arguments.law)
    size, tokens = arguments.parameters, arguments.tokens
    losses = [float(_limited(sample, arguments).loss(size, tokens)) for sample in samples]
    found = {
        "loss": float(_limited(law, arguments).loss(size, tokens)),
        "interval": _interval(losses),
        "flops": 6 * size * tokens,
    }
    print(json.dumps(found | _epochs(tokens, arguments), indent=1))
    return 0


def scaling_optimum(arguments: argparse.Namespace) -> int:
    """Print the best size and length as JSON. Raises UserError."""
    from nexa.scaling.sizes.files import read_scaling

    _above_zero(arguments, "flops", "unique_tokens")
    law, samples = read_scaling(arguments.law)
    limited = _limited(law, arguments)
    size, tokens = limited.optimum(arguments.flops)
    sizes = [_limited(sample, arguments).optimum(arguments.flops)[0] for sample in samples]
    found = {
        "parameters": size,
        "parameters_interval": _interval(sizes),
        "tokens": tokens,
        "tokens_per_parameter": tokens / size,
        "loss": float(limited.loss(size, tokens)),
    }
    print(json.dumps(found | _epochs(tokens, arguments), indent=1))
    return 0


def mixture_fit(arguments: argparse.Namespace) -> int:
    """Fit, write mixture.json, print errors. Raises UserError."""
    import numpy as np

    from nexa.scaling.laws.files import to_json, write
    from nexa.scaling.sizes import files
    from nexa.scaling.sizes.mixing import fit
    from nexa.scaling.sizes.nested import LEVELS, project

    _above_zero(arguments, *LEVELS)
    table = files.mixtures(arguments.runs)
    target = {name: getattr(arguments, name) for name in LEVELS if getattr(arguments, name) is not None}
    at = project(table.shares, table.scales, table.losses, target)
    for name, largest in at.largest.items():
        if target[name] > FAR * largest:
            _note(f"warning: {name}: {target[name]:g} is {target[name] / largest:.3g} times the largest of the runs")
    law = fit(table.sources, table.domains, at.shares, at.losses)
    error = np.abs(law.losses(at.shares) - at.losses).mean(0)
    document = files.mixing_document(law, len(table.shares), error, target, at.exponents)
    write(arguments.out, to_json(document))
    print(f"{len(table.shares)} runs, {len(at.shares)} mixtures" if target else f"{len(table.shares)} runs")
    for number, (name, value) in enumerate(zip(table.domains, error, strict=True)):
        exponents = "".join(f", exponent of {level} {of[number]:.3f}" for level, of in at.exponents.items())
        print(f"  {name:<16} mean error {value:.4f}, spread {np.ptp(at.losses[:, number]):.4f}{exponents}")
    print(f"wrote {arguments.out}")
    return 0


def _assigned(words: list[str], names: list[str], option: str, default: float) -> Any:
    """Array of the values of NAME=X, `default` for the others. Raises UserError."""
    import numpy as np

    values = np.full(len(names), default)
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if name not in names or not 0 <= value < float("inf"):
            raise UserError(f"{option} {word}: give NAME=X with X of at least 0 and NAME one of {', '.join(names)}")
        values[names.index(name)] = value
    return values


def mixture_best(arguments: argparse.Namespace) -> int:
    """Print the best weights as JSON. Raises UserError."""
    from nexa.scaling.sizes.files import read_mixing

    law = read_mixing(arguments.law)
    weights = _assigned(arguments.domain, law.domains, "--domain", 0.0 if arguments.domain else 1.0)
    if weights.sum() <= 0:
        raise UserError("--domain: give at least one domain a weight above 0")
    low, high = (
        _assigned(arguments.least, law.sources, "--least", 0.0),
        _assigned(arguments.most, law.sources, "--most", 1.0).clip(max=1.0),
    )
    shares = law.best(weights / weights.sum(), low, high)
    outside = law.outside(shares)
    for name in outside:
        _note(f"warning: {name}: no run of the fit had such a share; run it before you believe it")
    found = {
        "weights": dict(zip(law.sources, shares.round(6).tolist(), strict=True)),
        "losses": dict(zip(law.domains, law.losses(shares).tolist(), strict=True)),
        "outside": outside,
    }
    print(json.dumps(found, indent=1))
    return 0
