"""`nexa widths +exp=NAME key=value …`: whether a rule of width keeps what updates change."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nexa.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nexa.config.optim import WidthRule
    from nexa.scaling.coordinates import Table


def add_parser(subparsers: Any) -> None:
    """Add the `widths` command to the `nexa` parser; `run` is its handler."""
    parser = subparsers.add_parser(
        "widths",
        help="whether updates change activations as much at every width",
        description="Train the configured model at several widths for a few steps on random tokens, on the CPU, with "
        "and without the rule of optim.width_rule (mup, when that is none), and print the root mean square of what "
        "changed. Under a rule that works the columns are alike; a slope is the power of the width that a row grows "
        "with.",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="+exp=NAME and overrides, as for train.py")
    add("--widths", nargs="+", type=int, metavar="N", help="default: 1, 2, 4 and 8 times the least there is")
    add("--steps", type=int, default=4, metavar="N", help="updates (default 4)")
    add("--sequences", type=int, default=8, metavar="N", help="of a step (default 8)")
    add("--length", type=int, default=32, metavar="N", help="tokens of a sequence (default 32)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print both tables. Raises ConfigError for the configuration, UserError for numbers that cannot be."""
    from nexa.config import check as problems_of
    from nexa.config import compose
    from nexa.scaling.coordinates import check, unit

    for name in ("steps", "sequences", "length"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    cfg = compose(arguments.overrides)
    rule: WidthRule = "mup" if cfg.optim.width_rule == "none" else cfg.optim.width_rule
    # the base is the first width here
    based = dataclasses.replace(cfg.optim, width_rule=rule, base_hidden_size=cfg.model.hidden_size)
    cfg = dataclasses.replace(cfg, optim=based)
    problems = [problem for problem in problems_of(cfg) if problem.startswith(("model.", "norm.", "optim."))]
    if problems:
        raise ConfigError(problems)
    widths = sorted(set(arguments.widths or [unit(cfg) * times for times in (1, 2, 4, 8)]))
    if len(widths) < 2:
        raise UserError(f"--widths {' '.join(map(str, arguments.widths))}: give two or more different widths")
    sizes = {"steps": arguments.steps, "sequences": arguments.sequences, "length": arguments.length}
    tables = [check(cfg, "none", widths, **sizes), check(cfg, rule, widths, **sizes)]
    if arguments.json:
        print(json.dumps({table.rule: dataclasses.asdict(table) for table in tables}, indent=2))
    else:
        print("\n\n".join("\n".join(_lines(table, cfg.optim.lr, arguments.steps)) for table in tables))
    return 0


def _lines(table: Table, lr: float, steps: int) -> Iterator[str]:
    yield f"optim.width_rule={table.rule}: change of activations after {steps} steps at rate {lr:g}, by width"
    yield f"  {'':<18}" + "".join(f"{width:>10}" for width in table.widths) + f"{'slope':>9}"
    for place, row in table.rows.items():
        slope = f"{table.slopes[place]:+9.2f}" if place in table.slopes else f"{'n/a':>9}"
        mark = "  grows" if place in table.growing else ""
        yield f"  {place:<18}" + "".join(f"{value:10.3g}" for value in row) + slope + mark
