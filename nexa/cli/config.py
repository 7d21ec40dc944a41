"""`nexa config [NAME]`: every configuration key with its type, default and meaning, and the options of each group."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from nexa.config.fields import Key, groups, item_keys, keys, nearest, suggest, type_name
from nexa.config.files import CONF
from nexa.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the `config` command to the `nexa` parser; `run` is its handler."""
    parser = subparsers.add_parser(
        "config",
        help="explain the configuration keys",
        description="Print configuration keys with type, default and meaning, and the options of each group in conf/.",
        epilog="Examples: nexa config; nexa config train; nexa config optim.lr; nexa config exp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="?", metavar="GROUP", help="a group (train), a key (train.steps) or exp; default all"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what `arguments.name` asks for; exit code 0.

    Raises:
        UserError: there is neither a group nor a key of that name.
    """
    name = arguments.name
    if name in keys():
        print("\n".join(_describe(keys()[name])))
        return 0
    folders = sorted(path.name for path in CONF.iterdir() if path.is_dir()) if CONF.is_dir() else []
    known = [*groups(), *(folder for folder in folders if folder not in groups())]
    if name is not None and name not in known:
        close = nearest(name, known) or suggest(name)
        hint = f"did you mean {' or '.join(close)}?" if close else f"groups are {', '.join(known)}"
        raise UserError(f"nexa config {name}: no such group or key; {hint}")
    for group in known if name is None else [name]:
        print("\n".join(_group(group)), end="\n\n")
    return 0


def _group(group: str) -> Iterator[str]:
    """Lines about one group: its purpose, the files that set it, its keys."""
    purpose = (groups()[group].__doc__ or "").strip() if group in groups() else "Whole runs, chosen with +exp=NAME."
    yield f"{group}: {purpose}"
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if options:
        flag = group if group in groups() else f"+{group}"
        yield from _wrapped(f"{flag}= " + ", ".join(options), 2)
    for key in keys().values():
        if key.name.startswith(f"{group}."):
            yield from _describe(key)


def _describe(key: Key) -> Iterator[str]:
    """Lines about one key, and about the keys of the mappings it may list."""
    yield f"  {key.name} = {_default(key.default)}   ({type_name(key.type)})"
    yield from _wrapped(key.doc, 6)
    for item in item_keys(key):
        yield from _describe(item)


def _default(value: Any) -> str:
    """A default as it would stand in YAML."""
    return value if isinstance(value, str) and value and value.strip() == value else json.dumps(value)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 110, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
    )
