"""`nexa data`: make a packed store from a corpus, and look into one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from nexa.errors import UserError

PREPARE = """
Inputs are files (.jsonl .ndjson .json with one object per line, .txt .text .md, each also .gz or .zst; .parquet),
directories of them, glob patterns in quotes, or Hugging Face data sets as hf:NAME or hf:PATH.

  nexa data prepare corpus/*.jsonl.gz --out stores/corpus --tokenizer path/to/tokenizer.json
  nexa data prepare book.txt --text-documents line --out stores/book --train-bpe 8000

Interrupted or killed, the same command goes on where it was. Train on the result with data.source=stores/corpus.
"""


def add_parser(subparsers: Any) -> None:
    """Add the `data` command to argparse's sub-parsers; its handler is `handler(arguments) -> exit code`."""
    parser = subparsers.add_parser("data", help="make and inspect packed token stores")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="{prepare,inspect,verify,stats}")
    form = argparse.RawDescriptionHelpFormatter
    _add_prepare(
        commands.add_parser("prepare", help="corpus to packed store", description=PREPARE, formatter_class=form)
    )
    inspect = _add_reader(commands, "inspect", "what a packed store holds", _inspect)
    inspect.add_argument("--show", type=int, default=0, metavar="N", help="print the text of the first N documents")
    _add_reader(commands, "verify", "recompute all checksums and read the whole index of a packed store", _verify)
    _add_reader(commands, "stats", "documents, tokens, lengths and compression of a packed store", _stats)


def _add_reader(commands: Any, name: str, what: str, handler: Callable[[argparse.Namespace], int]) -> Any:
    """A command that reads one store."""
    parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.add_argument("store", help="directory of a packed store, or the prefix of a Megatron .bin/.idx pair")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(handler=handler)
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", help="files, directories, glob patterns, hf:NAME")
    add("--out", required=True, metavar="DIR", help="directory of the new store")
    add("--tokenizer", metavar="T", help="tokenizer.json, a directory that holds one, or `bytes`")
    add("--train-bpe", type=int, metavar="SIZE", help="train a byte-level BPE of SIZE tokens on the corpus instead")
    add("--bpe-sample-mb", type=int, default=32, metavar="MB", help="text the BPE is trained on (default 32)")
    add("--eod", metavar="TOKEN", help="token that ends a document, where the tokenizer's own cannot be told")
    add("--text-key", default="text", metavar="KEY", help="key or column that holds the text (default text)")
    add(
        "--text-documents",
        choices=["file", "line"],
        default="file",
        help="what one document of a text file is (default file)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents kept for validation, chosen by a hash of their text (default 0.01)",
    )
    add("--dedup", choices=["exact", "near"], help="remove documents equal, or nearly equal, to an earlier one")
    add(
        "--near-threshold",
        type=float,
        metavar="J",
        help="--dedup near: Jaccard likeness of word 5-grams from which documents count as equal (default 0.8)",
    )
    add("--workers", type=int, metavar="N", help="processes (default: one per usable core)")
    add(
        "--shard-tokens",
        type=int,
        default=10**9,
        metavar="N",
        help="tokens from which a new shard begins (default 1e9)",
    )
    add("--max-document-mb", type=float, default=64, metavar="MB", help="longer documents count as bad (default 64)")
    add("--hf-config", metavar="NAME", help="configuration of a Hugging Face data set")
    add("--hf-split", default="train", metavar="NAME", help="split of a Hugging Face data set (default train)")
    add("--hf-revision", metavar="COMMIT", help="revision of a Hugging Face data set (default: the newest)")
    add(
        "--hf-streaming",
        action="store_true",
        help="read a Hugging Face data set from the network, without a copy",
    )
    parser.set_defaults(handler=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from data_pipeline.prepare import PrepareOptions, prepare
    from data_pipeline.sources import ReadOptions

    if arguments.near_threshold is not None and arguments.dedup != "near":
        raise UserError(f"--near-threshold: {arguments.near_threshold} has no effect without --dedup near")
    read = ReadOptions(
        text_key=arguments.text_key,
        text_documents=arguments.text_documents,
        max_document_bytes=int(arguments.max_document_mb * (1 << 20)),
        hf_config=arguments.hf_config,
        hf_split=arguments.hf_split,
        hf_revision=arguments.hf_revision,
        hf_streaming=arguments.hf_streaming,
    )
    options = PrepareOptions(
        read=read,
        tokenizer=arguments.tokenizer,
        train_bpe=arguments.train_bpe,
        bpe_sample_mb=arguments.bpe_sample_mb,
        eod=arguments.eod,
        validation_fraction=arguments.validation_fraction,
        shard_tokens=arguments.shard_tokens,
        dedup=arguments.dedup,
        near_threshold=0.8 if arguments.near_threshold is None else arguments.near_threshold,
    )
    prepare(arguments.inputs, arguments.out, options, workers=arguments.workers)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from data_pipeline.store import available_splits, open_store

    stores = [open_store(arguments.store, split) for split in available_splits(arguments.store)]
    described = {
        store.split: {
            "tokens": store.tokens,
            "documents": store.documents,
            "tokens_per_document": round(store.tokens / max(1, store.documents), 1),
            "dtype": store.dtype.name,
            "fingerprint": store.fingerprint,
        }
        for store in stores
    }
    about: dict[str, Any] = {"store": arguments.store, "splits": described}
    if stores:
        about["tokenizer"] = {
            "path": str(stores[0].tokenizer_path) if stores[0].tokenizer_path else None,
            "sha256": stores[0].tokenizer_hash,
            "vocab_size": stores[0].vocab_size,
            "eod_id": stores[0].eod_id,
        }
    if arguments.json:
        print(json.dumps(about, indent=1))
    else:
        _print_lines(about)
    if arguments.show:
        _show(arguments.store, stores[0], arguments.show)
    return 0


def _print_lines(about: dict[str, Any]) -> None:
    print(f"store      {about['store']}")
    for split, values in about["splits"].items():
        print(f"{split:<10} " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if "tokenizer" in about:
        print("tokenizer  " + ", ".join(f"{key} {value}" for key, value in about["tokenizer"].items()))


def _verify(arguments: argparse.Namespace) -> int:
    from data_pipeline.statistics import verify

    found = verify(arguments.store)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    checked = f"{found['files']} files agree with their checksums"
    print(f"{found['store']}: {checked if found['checksums'] else 'no checksums to compare'}; the index is in order")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from data_pipeline.statistics import as_lines, statistics

    found = statistics(arguments.store)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(as_lines(found)))
    return 0


def _show(path: str, store: Any, count: int) -> None:
    """Print the first documents; as ids where no tokenizer is known."""
    from data_pipeline.tokenizer import load_tokenizer

    known = store.tokenizer_hash is not None
    tokenizer = load_tokenizer(path) if known else None
    # Enough of the index for the documents asked for, without reading all of it.
    window = 1 << 16
    starts = store.document_starts(0, min(window, store.tokens))
    while len(starts) <= count and window < store.tokens:
        window *= 4
        starts = store.document_starts(0, min(window, store.tokens))
    ends = [*starts[1:].tolist(), store.tokens]
    for number, (start, end) in enumerate(list(zip(starts.tolist(), ends, strict=True))[:count]):
        ids = store.read(start, end - start).tolist()
        print(f"--- document {number}, {len(ids)} tokens")
        sys.stdout.write((tokenizer.decode(ids) if tokenizer else str(ids)) + "\n")
