"""`nexa convert`: a checkpoint as another one that computes the same with cheaper norms."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

ABOUT = """
Write a checkpoint as a new one that computes the same function with other norms (arXiv 2305.14858):

  rmsnorm    of a layernorm model: what writes to the residual stream loses its mean, gains and biases of the norms
             move into the linear layers behind them, which therefore have biases; a tied head becomes its own
  crmsnorm   of a layernorm model, or of the result of --to rmsnorm: also without the last coordinate of the
             residual stream, which is minus the sum of the others
  none       of a model whose norms norm.removal has made constants: the matrices behind them take them over

The placement must be pre or lns, with a final norm. Any other model is refused with the reason. Weights are computed in
fp64 and written in fp32: logits agree to rounding.

DST is a checkpoint without optimizer state, as that of nexa import; it must not exist and appears when it is whole.
Memory does not grow with the model.

  nexa convert runs/layernorm converted/rmsnorm --to rmsnorm
  nexa convert runs/layernorm converted/crmsnorm --to crmsnorm
"""


def add_parser(subparsers: Any) -> None:
    """Add the `convert` command."""
    parser = subparsers.add_parser(
        "convert",
        help="make an equal checkpoint with cheaper norms",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, or a run's for its newest checkpoint")
    parser.add_argument("destination", metavar="DST", help="checkpoint to make")
    parser.add_argument("--to", choices=("rmsnorm", "crmsnorm", "none"), required=True, help="norms of the result")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert and say how to go on. Raises UserError."""
    from nexa.interop.convert import convert

    done = convert(
        arguments.source,
        arguments.destination,
        arguments.to,
        note=lambda text: print(f"nexa convert: {text}", file=sys.stderr, flush=True),
    )
    print(f"{done.path}: {done.parameters / 1e6:,.2f}M parameters, {done.weight_bytes / 1e6:,.1f} MB in fp32")
    print("train on from it (add data.source, train.steps and the rest of the run):")
    print(f"  python train.py {shlex.join(done.overrides())}")
    return 0
