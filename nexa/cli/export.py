"""`nexa export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from nexa.errors import UserError

ABOUT = """
Write a checkpoint as a new Hugging Face folder: config.json, safetensors (several files and an index above
--max-shard-size), the tokenizer, generation_config.json. A tied head is stored once.

A Pre-LN model with RMSNorm is a plain LLaMA and opens with AutoModelForCausalLM.from_pretrained(DST). Any other model
carries two small modules of its own and opens with trust_remote_code=True, or without it after `import nexa`.

DST must not exist (an empty directory is fine); it appears when it is whole. Memory does not grow with the model.

  nexa export runs/quickstart hf/quickstart
  nexa export runs/mixln_1b/checkpoints/step_00100000 hf/mixln_1b --dtype bf16 --max-shard-size 2GB
"""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def add_parser(subparsers: Any) -> None:
    """Add the `export` command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "export", help="write a checkpoint as a Hugging Face folder", description=ABOUT, formatter_class=form
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or a run's for its newest checkpoint")
    add("destination", metavar="DST", help="folder to make")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights (default: fp32, exact)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights: 500MB, 2GiB (default: 5GB)")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written. Raises UserError."""
    shard_bytes = parse_size(arguments.max_shard_size)
    from nexa.interop.export import export

    done = export(
        arguments.checkpoint,
        arguments.destination,
        dtype=arguments.dtype,
        shard_bytes=shard_bytes,
        note=lambda text: print(f"nexa export: {text}", file=sys.stderr, flush=True),
    )
    files = "1 file" if done.weight_files == 1 else f"{done.weight_files} files"
    print(
        f"{done.path}: {done.source.name} as {arguments.dtype}, {done.weight_bytes / 1e6:,.1f} MB of weights in {files}"
    )
    if not done.tokenizer:
        print("without a tokenizer: the checkpoint has none")
    code = ", trust_remote_code=True" if done.model_type == "nexa" else ""
    print(f'AutoModelForCausalLM.from_pretrained("{arguments.destination}"{code})')
    return 0


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `2GiB` or a plain number. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise UserError(f"--max-shard-size {text}: must be a number of bytes, or like 500MB, 5GB, 2GiB")
    return int(float(found[1]) * unit)
