"""`nexa score`: loss, perplexity and bits per byte of a text."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

ABOUT = """
Token-weighted loss of a file under a checkpoint. Every token of the text is scored exactly once.

Context: windows of --sequence-length tokens that begin every --stride tokens (by default they do not overlap); a
window scores the tokens that no earlier one scored. The first token of a document is predicted from the
end-of-document token, as in training. A .txt or .md file is one document, a .jsonl file has one per line; documents
do not see one another. The result does not depend on --batch-size.

  nexa score runs/quickstart book.txt
  nexa score runs/quickstart/checkpoints/step_00001000 test.jsonl --stride 64 --json
"""


def add_parser(subparsers: Any) -> None:
    """Add the `score` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "score", help="loss and perplexity of a text file", description=ABOUT, formatter_class=form
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or a run's for its newest checkpoint")
    add("file", metavar="FILE", help="text, jsonl or parquet, also .gz and .zst")
    add("--sequence-length", type=int, metavar="N", help="tokens of a window (default: that of the training)")
    add("--stride", type=int, metavar="N", help="tokens from one window to the next (default: --sequence-length)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows computed at once (default: 8)")
    add("--text-key", default="text", metavar="KEY", help="key of the text in a jsonl line (default: text)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Score and print. Raises UserError."""
    from nexa.inference.checkpoint import open_checkpoint
    from nexa.inference.score import TextFile, score_file

    file = TextFile(arguments.file, arguments.text_key)
    opened = open_checkpoint(arguments.checkpoint, arguments.device)
    score = score_file(
        opened,
        file,
        sequence_length=arguments.sequence_length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        note=lambda text: print(f"nexa score: {text}", file=sys.stderr, flush=True),
    )
    length = arguments.sequence_length or opened.sequence_length
    result = {
        "checkpoint": str(opened.path),
        "file": arguments.file,
        "documents": score.documents,
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "sequence_length": length,
        "stride": arguments.stride or length,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{opened.path} on {arguments.file}")
    print(f"{score.tokens:,} tokens, {score.text_bytes:,} bytes, {score.documents:,} documents")
    print(f"windows of {length} tokens, every {result['stride']}")
    print(f"loss           {score.loss:.6f} nats per token")
    print(f"perplexity     {score.perplexity:.4f}")
    print(f"bits per byte  {score.bits_per_byte:.6f}")
    return 0
