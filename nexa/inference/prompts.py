"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path

from nexa.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: of a `.jsonl` file the key `prompt` of each line, of any other file each line.

    Blank lines are skipped. Raises UserError naming the file or line that cannot be read, and for a file without
    prompts.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompt-file {path}: has no prompts; write one per line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt(line, f"{path}:{number}") for number, line in numbered]


def _prompt(line: str, place: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{place}: must be an object with the text under "prompt", is {line[:80]}')
    return found["prompt"]
