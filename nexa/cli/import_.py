"""`nexa import`: a Hugging Face folder as a checkpoint."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

ABOUT = """
Write a Hugging Face LLaMA folder (config.json; safetensors, one file or several with an index; fp32, bf16 or fp16; tied
or not; with or without a tokenizer), or a folder that `nexa export` wrote, as a new checkpoint in fp32. What nexa does
not compute (biases, scaled rotary positions, another architecture) and pickled weights are refused.

DST is the checkpoint: nexa score, generate and export take it, and any number of processes trains on from it with the
train.py command that is printed. DST must not exist; it appears when it is whole. Memory does not grow with the model.

  nexa import hf/TinyLlama-1.1B runs/tinyllama
  nexa score runs/tinyllama book.txt
"""


def add_parser(subparsers: Any) -> None:
    """Add the `import` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "import", help="make a checkpoint of a Hugging Face folder", description=ABOUT, formatter_class=form
    )
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder")
    parser.add_argument("destination", metavar="DST", help="checkpoint to make")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Import and say how to go on. Raises UserError."""
    from nexa.interop.import_ import import_folder

    done = import_folder(
        arguments.source,
        arguments.destination,
        note=lambda text: print(f"nexa import: {text}", file=sys.stderr, flush=True),
    )
    print(f"{done.path}: {done.parameters / 1e6:,.2f}M parameters, {done.weight_bytes / 1e6:,.1f} MB in fp32")
    if not done.tokenizer:
        print("without a tokenizer.json: train.py takes the tokenizer of its data; nexa score and generate need one")
    print("train on from it (add data.source, train.steps and the rest of the run):")
    print(f"  python train.py {shlex.join(done.overrides())}")
    return 0
