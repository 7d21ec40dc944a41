"""`nexa generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

ABOUT = """
Continue a prompt with a checkpoint, up to the end of the document or --max-new-tokens. The prompt begins a document.
The same seed gives the same text.

  nexa generate runs/quickstart --prompt 'def main' --max-new-tokens 200
"""


def add_parser(subparsers: Any) -> None:
    """Add the `generate` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("generate", help="sample text", description=ABOUT, formatter_class=form)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or a run's for its newest checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="beginning of the text; may be empty")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (default: 128)")
    add("--temperature", type=float, default=0.8, help="below 1 sharpens, above 1 flattens (default: 0.8)")
    add("--top-p", type=float, default=0.95, help="share of the probability to draw from (default: 0.95)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Sample and print. Raises UserError."""
    from nexa.inference.generate import generate_text

    text = generate_text(
        arguments.checkpoint,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        greedy=arguments.greedy,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(text)
    return 0
