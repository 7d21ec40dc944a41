"""`nexa norms`: placements and kinds of norm, and which go together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, get_args

from nexa.config import check, from_mapping
from nexa.config.schema import NormKind, Placement

PLACEMENTS: tuple[str, ...] = get_args(Placement)
KINDS: tuple[str, ...] = get_args(NormKind)
LAYERS = 4


def add_parser(subparsers: Any) -> None:
    """Add the `norms` command to the `nexa` parser; `run` is its handler."""
    about = (
        "Print what norm.placement and norm.kind can be, and which go together. In the formulas of the placements "
        "a is attention, m the feed-forward and each N a norm; in those of the kinds n is the number of features."
    )
    parser = subparsers.add_parser(
        "norms", help="placements and kinds of norm, and which go together", description=about
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 0."""
    found = report()
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(_lines(found)))
    return 0


def report() -> dict[str, Any]:
    """placements: name -> equations of the first and last block of 4; kinds: name -> its row; refused: pair -> why."""
    from nexa.model.kinds import KINDS as ROWS

    kinds = {name: {"formula": r.formula, "initial": r.initial, "source": r.source} for name, r in ROWS.items()}
    refused = {}
    for placement in PLACEMENTS:
        for kind in KINDS:
            problems = refusals(placement, kind)
            if problems:
                refused[f"{placement} {kind}"] = problems
    return {
        "placements": {p: [equations(p, 0), equations(p, LAYERS - 1)] for p in PLACEMENTS},
        "kinds": kinds,
        "refused": refused,
    }


def refusals(placement: str, kind: str) -> list[str]:
    """What the configuration check says against a pair; empty: it is allowed."""
    cfg = from_mapping({"norm": {"placement": placement, "kind": kind}, "train": {"steps": 1}})
    return check(cfg)


def equations(placement: str, index: int) -> list[str]:
    """The two sublayers of block `index` of `LAYERS`, read from the table of placements."""
    from nexa.model.placement import block_plans

    norm = from_mapping({"norm": {"placement": placement}}).norm
    plan = block_plans(norm, LAYERS)[index]
    inner = {"a": "_qkvnorm" if plan.head_norms else "_headscale" if plan.head_scale else ""}
    inner["m"] = "_midnorm" if plan.mid_norm else ""
    found = []
    for name, sub in (("a", plan.attn), ("m", plan.mlp)):
        read = "N(x)" if sub.input else "x"
        read = read if sub.input_scale == 1.0 else f"{sub.input_scale:.3g} {read}"
        y = f"{name}{inner[name]}({read})"
        skip = "x" if sub.skip_scale == 1.0 else f"{sub.skip_scale:.3g} x"
        joined = f"{skip} + {f'N({y})' if sub.output else y}"
        found.append(f"x = N({joined})" if sub.residual else f"x = {joined}")
    return found


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"norm.placement (of {LAYERS} blocks: the first, and the last where it differs)"
    for name, (first, last) in found["placements"].items():
        yield f"  {name:<12} {first[0]:<34} {first[1]}"
        if last != first:
            yield f"  {'':<12} {last[0]:<34} {last[1]}"
    yield "\nnorm.kind"
    for name, row in found["kinds"].items():
        yield f"  {name:<12} {row['formula']}\n  {'':<12} {row['initial']}; {row['source']}"
    yield "\nwhich go together"
    yield f"  {'':<12} " + " ".join(KINDS)
    for placement in PLACEMENTS:
        marks = ["no" if f"{placement} {kind}" in found["refused"] else "yes" for kind in KINDS]
        cells = " ".join(f"{mark:<{len(kind)}}" for mark, kind in zip(marks, KINDS, strict=True))
        yield f"  {placement:<12} {cells}".rstrip()
    same: dict[tuple[str, str], list[str]] = {}
    for pair, problems in found["refused"].items():
        placement, kind = pair.split()
        why = "; ".join(problems).replace(f", norm.placement={placement}:", ":")
        same.setdefault((kind, why), []).append(placement)
    for (kind, why), placements in same.items():
        yield f"  {', '.join(placements)} {kind}: {why}"
