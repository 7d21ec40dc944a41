"""Corpora in: JSON lines, parquet, text files and Hugging Face data sets, cut into units of bounded size.

The main process reads raw blocks (`read_units`); worker processes turn them into documents (`parse_unit`). Where the
cuts fall depends on the files alone, never on the number of workers.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.hub import open_dataset
from data_pipeline.streams import SUFFIXES, open_stream
from nexa.errors import UserError

UNIT_BYTES = 1 << 20
ROWS_PER_READ = 64
BYTES_PER_ROW = 1024
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
FORMATS = "jsonl, ndjson, json (one object per line), txt, text, md, each also .gz or .zst; parquet; hf:NAME"


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents. `text_documents`: `file` (a text file is one document) or `line`."""

    text_key: str = "text"
    text_documents: str = "file"
    max_document_bytes: int = 64 << 20
    hf_config: str | None = None
    hf_split: str = "train"
    hf_revision: str | None = None
    hf_streaming: bool = False


@dataclass(frozen=True)
class Source:
    """One input file or data set. `size`: bytes on disk (a guess for a data set); `identity`: follows the content."""

    path: str
    kind: str
    size: int
    identity: str


@dataclass(frozen=True)
class Cursor:
    """A place between two units: bytes of (decompressed) text or rows read, and lines read."""

    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Unit:
    """A piece of a source. `payload`: whole lines, or texts; `first`: number of its first line or row, from 1.

    `after`: where the next unit begins; `consumed`: how much of the source's size has been read, for progress.
    """

    source: Source
    payload: bytes | list[Any]
    first: int
    after: Cursor
    consumed: int
    too_long: int = 0

    @property
    def size(self) -> int:
        """Bytes of the payload (characters, where a data set gives text)."""
        if isinstance(self.payload, bytes):
            return len(self.payload)
        return sum(len(value) for value in self.payload if isinstance(value, str | bytes))


@dataclass
class Documents:
    """What a unit held. `bad`: (place, reason) of everything skipped except empty documents."""

    texts: list[str] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    empty: int = 0


def find_sources(inputs: Iterable[str | Path], options: ReadOptions) -> list[Source]:
    """Sources named by files, directories (all known formats below, sorted), glob patterns and `hf:NAME`.

    Raises `UserError` for a missing file, an unknown format, an empty directory or no input at all.
    """
    sources: list[Source] = []
    for entry in map(str, inputs):
        path = Path(entry).expanduser()
        if entry.startswith("hf:") or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            sources.append(_hf_source(entry.removeprefix("hf:"), options))
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and not p.name.startswith("."))
            if not found:
                raise UserError(f"{path}: no file of a known format in this directory; known: {FORMATS}")
            sources += [_file_source(p) for p in found]
        elif path.is_file():
            sources.append(_file_source(path))
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(entry) else []
            if not matches:
                raise UserError(f"{entry}: no such file or directory (a Hugging Face data set is written hf:{entry})")
            sources += [_file_source(Path(match)) for match in matches if Path(match).is_file()]
    if not sources:
        raise UserError(f"no input: give at least one file, directory or data set ({FORMATS})")
    return sources


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    kind = _KINDS.get(Path(name).suffix)
    return None if kind == "parquet" and not path.name.lower().endswith(".parquet") else kind


def _file_source(path: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: unknown format {''.join(path.suffixes) or '(no suffix)'!r}; known: {FORMATS}")
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:  # both ends: cheap, and enough to notice another file under the same name
        digest.update(stream.read(1 << 16))
        stream.seek(max(0, size - (1 << 16)))
        digest.update(stream.read(1 << 16))
    return Source(str(path), kind, size, digest.hexdigest()[:32])


def _hf_source(name: str, options: ReadOptions) -> Source:
    data, row_count = _load_hf(name, options), 0  # how many rows a stream has is not known
    known: list[object] = [name, options.hf_config, options.hf_split, options.hf_revision]
    if options.hf_streaming:
        known.append("streaming")
    else:
        row_count = len(data)
        known += [row_count, getattr(data, "_fingerprint", "")]
    identity = " ".join(map(str, known))
    return Source(name, "hf", row_count * BYTES_PER_ROW, hashlib.sha256(identity.encode()).hexdigest()[:32])


def _load_hf(name: str, options: ReadOptions) -> Any:
    data = open_dataset(
        name,
        options.hf_config,
        options.hf_split,
        options.hf_revision,
        streaming=options.hf_streaming,
        what=f"hf:{name}",
        hint="without a network give the path of a copy on disk; --hf-config and --hf-split choose a part",
    )
    names = data.column_names or list(next(iter(data), {}))
    if options.text_key not in names:
        raise UserError(f"hf:{name}: no column {options.text_key!r} (--text-key); it has {', '.join(names)}")
    return data


def read_units(source: Source, options: ReadOptions, cursor: Cursor) -> Iterator[Unit]:
    """Units of a source from a cursor on.

    Raises `UserError` for a damaged file, a missing column, and a text file larger than the limit of one document.
    """
    if source.kind == "hf":
        return _row_units(source, _hf_rows(source, options, cursor.offset), cursor)
    if source.kind == "parquet":
        return _row_units(source, _parquet_rows(source, options, cursor.offset), cursor)
    if source.kind == "text" and options.text_documents == "file":
        return _file_unit(source, options, cursor)
    return _line_units(source, options, cursor)


def _line_units(source: Source, options: ReadOptions, cursor: Cursor) -> Iterator[Unit]:
    """Blocks of whole lines; a line above the limit is dropped while it is read and reported by `too_long`."""
    with open_stream(source.path) as stream:
        stream.skip(cursor.offset)
        rest, dropped, offset, line = b"", 0, cursor.offset, cursor.line
        while True:
            block = stream.read(UNIT_BYTES)
            data, rest = rest + block, b""
            end = data.rfind(b"\n") + 1 if block else len(data)
            data, rest = data[:end], data[end:]
            if dropped and (data or not block):  # the end of the long line: the rest of it goes, its newline too
                tail, newline, data = data.partition(b"\n")
                length = dropped + len(tail)
                dropped, offset, line = 0, offset + length + len(newline), line + 1
                yield Unit(source, b"", line, Cursor(offset, line), stream.consumed(), too_long=length)
            if data:
                first, offset = line + 1, offset + len(data)
                line += data.count(b"\n") + (not data.endswith(b"\n"))
                yield Unit(source, data, first, Cursor(offset, line), stream.consumed())
            if not block:
                return
            if dropped or len(rest) > options.max_document_bytes:
                dropped, rest = dropped + len(rest), b""


def _file_unit(source: Source, options: ReadOptions, cursor: Cursor) -> Iterator[Unit]:
    if cursor.line:
        return
    limit = options.max_document_bytes
    with open_stream(source.path) as stream:
        pieces, size = [], 0
        while block := stream.read(UNIT_BYTES):
            pieces.append(block)
            size += len(block)
            if size > limit:
                raise UserError(
                    f"{source.path}: larger than one document may be (--max-document-mb {limit >> 20}); "
                    "take each line as a document with --text-documents line, or raise the limit"
                )
    yield Unit(source, [b"".join(pieces)], 1, Cursor(size, 1), source.size)


def _hf_rows(source: Source, options: ReadOptions, first: int) -> Iterator[tuple[list[Any], int]]:
    data, row = _load_hf(source.path, options), first
    data = data.select_columns([options.text_key])
    if options.hf_streaming:
        batches = data.skip(first).iter(batch_size=ROWS_PER_READ)  # reads what it skips, too
    else:
        batches = (data[start : start + ROWS_PER_READ] for start in range(first, len(data), ROWS_PER_READ))
    for batch in batches:
        rows = list(batch[options.text_key])
        row += len(rows)
        yield rows, min(source.size, row * BYTES_PER_ROW)


def _parquet_rows(source: Source, options: ReadOptions, first: int) -> Iterator[tuple[list[Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path, buffer_size=UNIT_BYTES) as file:
            names = file.schema_arrow.names
            if options.text_key not in names:
                raise UserError(
                    f"{source.path}: no column {options.text_key!r} (--text-key); it has {', '.join(names)}"
                )
            kind = file.schema_arrow.field(options.text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{source.path}: column {options.text_key!r} holds {kind}, not text")
            row, total = 0, max(1, file.metadata.num_rows)
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if end <= first:
                    row = end
                    continue
                for batch in file.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[options.text_key]):
                    skip = min(max(first - row, 0), len(batch))
                    row += len(batch)
                    if skip < len(batch):
                        # As bytes: text that is not UTF-8 is then a bad document, not the end of the file.
                        column = batch.column(0).slice(skip).cast(pa.large_binary())
                        yield column.to_pylist(), source.size * row // total
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source.path}: damaged or no parquet file: {str(error).splitlines()[0]}") from None


def _row_units(source: Source, reads: Iterator[tuple[list[Any], int]], cursor: Cursor) -> Iterator[Unit]:
    """Gather rows into units of about UNIT_BYTES."""
    row, gathered, size, consumed = cursor.offset, [], 0, 0
    for rows, consumed in reads:
        gathered += rows
        size += sum(len(value) for value in rows if isinstance(value, str | bytes))
        if size >= UNIT_BYTES:
            yield Unit(source, gathered, row + 1, Cursor(row + len(gathered), 0), consumed)
            row, gathered, size = row + len(gathered), [], 0
    if gathered:
        yield Unit(source, gathered, row + 1, Cursor(row + len(gathered), 0), consumed)


def parse_unit(unit: Unit, options: ReadOptions) -> Documents:
    """Documents of a unit; what cannot be one is left out, with its place and the reason."""
    documents = Documents()
    limit = options.max_document_bytes
    if unit.too_long:
        documents.bad.append((f"{unit.source.path}:{unit.first}", _too_long(unit.too_long, options)))
    values: Iterable[Any] = unit.payload if isinstance(unit.payload, list) else unit.payload.split(b"\n")
    in_json = unit.source.kind == "jsonl"
    for number, value in enumerate(values, unit.first):
        try:
            if isinstance(value, bytes) and len(value) > limit:
                raise ValueError(_too_long(len(value), options))
            text = _json_text(value, number, options) if in_json else _plain_text(value, unit, options)
            if text is None:
                continue
            data = text.encode("utf-8")
            if len(data) > limit:
                raise ValueError(_too_long(len(data), options))
        except UnicodeEncodeError as error:
            documents.bad.append((f"{unit.source.path}:{number}", f"lone surrogate at character {error.start}"))
        except UnicodeDecodeError as error:
            documents.bad.append((f"{unit.source.path}:{number}", f"not UTF-8 at byte {error.start}"))
        except (ValueError, RecursionError) as error:
            documents.bad.append((f"{unit.source.path}:{number}", str(error)[:200]))
        else:
            if text.strip():
                documents.texts.append(text)
                documents.encoded.append(data)
            else:
                documents.empty += 1
    return documents


def _too_long(size: int, options: ReadOptions) -> str:
    return f"{size} bytes, longer than --max-document-mb {options.max_document_bytes / (1 << 20):g}"


def _json_text(line: bytes, number: int, options: ReadOptions) -> str | None:
    """Text of a JSON line; None for a blank line. Raises ValueError saying what is wrong."""
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark belongs to the file, not to the JSON
    if not line.strip():
        return None
    try:
        # strict=False: raw control characters inside strings are kept as they are.
        record = json.loads(line.decode("utf-8"), strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if options.text_key not in record:
        raise ValueError(f"no key {options.text_key!r} (--text-key); it has {', '.join(list(record)[:8])}")
    return _checked_text(record[options.text_key], options)


def _plain_text(value: Any, unit: Unit, options: ReadOptions) -> str | None:
    if isinstance(unit.payload, bytes) and not value:
        return None  # an empty line of a text file read by lines, or what follows the last newline
    if isinstance(value, bytes):
        text = value.decode("utf-8")
        return text.removesuffix("\r") if isinstance(unit.payload, bytes) else text
    return _checked_text(value, options)


def _checked_text(value: Any, options: ReadOptions) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{options.text_key!r} holds {type(value).__name__}, not text")
    return value
