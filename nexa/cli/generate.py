"""`nexa generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nexa.errors import UserError

if TYPE_CHECKING:
    from nexa.inference.generate import Continuation

ABOUT = """
Continue prompts with a checkpoint, up to the end of the document or --max-new-tokens. A prompt begins a document.
Several prompts are computed together; none changes what another gets. The same seed gives the same text: prompt
number i, counted from 0, draws with seed + i.

  nexa generate runs/quickstart --prompt 'def main' --max-new-tokens 200
  nexa generate runs/quickstart --prompt-file prompts.jsonl --json
"""
NOTE_SECONDS = 5.0


def add_parser(subparsers: Any) -> None:
    """Add the `generate` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("generate", help="sample text", description=ABOUT, formatter_class=form)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or a run's for its newest checkpoint")
    add("--prompt", action="append", metavar="TEXT", help="beginning of the text; may be empty; may be repeated")
    add("--prompt-file", metavar="FILE", help="a prompt per line; of a .jsonl file the key prompt of each line")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (default: 128)")
    add("--temperature", type=float, default=0.8, help="below 1 sharpens, above 1 flattens (default: 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=0.95, help="share of the probability to draw from (default: 0.95)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts computed at once (default: 8)")
    add("--no-cache", action="store_true", help="compute the whole context for each token: slower, the same text")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add("--json", action="store_true", help="print a JSON object per prompt and line")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Sample and print. Raises UserError."""
    from nexa.inference.checkpoint import open_checkpoint
    from nexa.inference.generate import continue_texts
    from nexa.inference.prompts import read_prompts
    from nexa.inference.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "greedy", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    prompts = list(arguments.prompt or [])
    if arguments.prompt_file is not None:
        prompts += read_prompts(arguments.prompt_file)
    if not prompts:
        raise UserError("nexa generate: no prompt; give --prompt TEXT or --prompt-file FILE")
    opened = open_checkpoint(arguments.checkpoint, arguments.device)
    found = continue_texts(opened, prompts, sampling, batch_size=arguments.batch_size, cache=not arguments.no_cache)
    for number, one in enumerate(_noted(found, len(prompts)), 1):
        if arguments.json:
            print(json.dumps(vars(one), ensure_ascii=False), flush=True)
            continue
        if len(prompts) > 1:
            print(f"--- {number} of {len(prompts)}")
        print(one.text, flush=True)
    return 0


def _noted(found: Iterator[Continuation], total: int) -> Iterator[Continuation]:
    """The same, with the progress on standard error every few seconds and a line at the end."""
    begin = last = time.monotonic()
    tokens = 0
    for done, one in enumerate(found, 1):
        tokens += one.new_tokens
        yield one
        now = time.monotonic()
        if done < total and now - last < NOTE_SECONDS:
            continue
        last = now
        seconds = now - begin
        left = f", {seconds / done * (total - done):,.0f} s left" if done < total else ""
        note = f"{done:,} of {total:,} prompts, {tokens:,} new tokens in {seconds:.1f} s"
        print(f"nexa generate: {note}, {tokens / seconds:,.0f} tokens/s{left}", file=sys.stderr, flush=True)
