"""What a store holds in numbers, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.store import PackedStore, available_splits, open_store, read_manifest, verify_store

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BAR = 40


def verify(path: str | Path) -> dict[str, Any]:
    """Recompute every checksum and read the whole index; returns {store, checksums, files}.

    A bare Megatron pair carries no checksums (`checksums` is false); its index is read all the same. Raises
    `UserError` that names what is damaged.
    """
    whole = Path(path).expanduser().is_dir()
    files = verify_store(path) if whole else {}
    for split in available_splits(path):
        open_store(path, split).check()
    return {"store": str(path), "checksums": whole, "files": len(files)}


def statistics(path: str | Path) -> dict[str, Any]:
    """Documents, tokens and lengths of each split; bytes of text per token, in all and of each input.

    Lengths are in tokens, the end-of-document token included; percentiles are nearest ranks over all documents. Memory
    grows with the number of different lengths only. What a store does not know (a bare pair: its text) is null.
    """
    splits = {split: _lengths(open_store(path, split)) for split in available_splits(path)}
    is_store = Path(path).expanduser().is_dir()
    manifest = read_manifest(Path(path).expanduser()) if is_store else {}
    found: dict[str, Any] = {"store": str(path), "splits": splits}
    for key in ("documents", "tokens"):
        found[key] = sum(split[key] for split in splits.values())
    found["text_bytes"] = manifest.get("text_bytes")
    found["bytes_per_token"] = _ratio(found["text_bytes"], found["tokens"])
    sources = [source for source in manifest.get("sources", []) if isinstance(source, dict)]
    found["sources"] = [
        {key: value for key, value in source.items() if key != "size"}
        | {"bytes_per_token": _ratio(source.get("text_bytes"), source.get("tokens"))}
        for source in sources
    ]
    return found


def _ratio(amount: int | None, tokens: int | None) -> float | None:
    return round(amount / tokens, 4) if amount is not None and tokens else None


def _lengths(store: PackedStore) -> dict[str, Any]:
    counts: Counter[int] = Counter()
    for _, lengths in store.document_blocks():
        values, times = np.unique(lengths, return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    lengths = np.array(sorted(counts), np.int64)
    times = np.array([counts[length] for length in lengths.tolist()], np.int64)
    ends = np.cumsum(times)
    documents = int(ends[-1])
    ranks = [-(-percent * documents // 100) for percent in PERCENTILES]
    picked = lengths[np.searchsorted(ends, ranks)].tolist()
    return {
        "documents": documents,
        "tokens": store.tokens,
        "length": {
            "mean": round(store.tokens / documents, 2),
            "min": int(lengths[0]),
            **{f"p{percent}": length for percent, length in zip(PERCENTILES, picked, strict=True)},
            "max": int(lengths[-1]),
        },
        "histogram": list(_histogram(lengths, times)),
    }


def _histogram(lengths: np.ndarray, times: np.ndarray) -> Iterator[dict[str, int]]:
    """Documents and tokens by powers of two; `from` and `to` both belong to the bin."""
    low = 1
    if lengths[0] == 0:
        yield {"from": 0, "to": 0, "documents": int(times[0]), "tokens": 0}
    while low <= lengths[-1]:
        inside = (lengths >= low) & (lengths < 2 * low)
        if inside.any():
            tokens = int((lengths[inside] * times[inside]).sum())
            yield {"from": low, "to": 2 * low - 1, "documents": int(times[inside].sum()), "tokens": tokens}
        low *= 2


def as_lines(found: dict[str, Any]) -> Iterator[str]:
    """`statistics` for people."""
    yield f"store      {found['store']}: {found['documents']:,} documents, {found['tokens']:,} tokens"
    if found["bytes_per_token"] is not None:
        yield f"text       {found['text_bytes']:,} bytes, {found['bytes_per_token']} bytes per token"
    for name, split in found["splits"].items():
        yield f"\n{name}: {split['documents']:,} documents, {split['tokens']:,} tokens"
        yield "length in tokens: " + ", ".join(f"{key} {value:,}" for key, value in split["length"].items())
        most = max(row["tokens"] for row in split["histogram"])
        yield f"{'length':>21}  {'documents':>13}  {'tokens':>15}"
        for row in split["histogram"]:
            bar = "#" * round(_BAR * row["tokens"] / max(1, most))
            span = f"{row['from']:,}-{row['to']:,}"
            yield f"{span:>21}  {row['documents']:>13,}  {row['tokens']:>15,}  {bar}".rstrip()
    for source in found["sources"]:
        removed = sum(source.get(key, 0) for key in ("empty", "bad", "duplicates", "near_duplicates"))
        yield (
            f"\n{source['path']}: {source['documents']:,} documents, {removed:,} removed, {source['tokens']:,} tokens, "
            f"{source['text_bytes']:,} bytes, {source['bytes_per_token']} bytes per token"
        )
