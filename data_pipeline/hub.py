"""A data set of the Hugging Face hub, or one in its formats on disk, read and tokenised while a run goes on.

Documents come in the order of the data set, or permuted inside windows of `shuffle_buffer` of them. A place in the
stream is small and in JSON: the library's own state before a window, and how much of the window has been used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from nexa.errors import UserError

PREFIX = "hf:"
DOCUMENTS = 64
"""Documents that are tokenised at once, and read at once where nothing is shuffled."""


@dataclass(frozen=True)
class HubSource:
    """What is streamed. name: at the hub, or the path of a folder. shuffle_buffer: documents of a window; 0 is none."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_key: str = "text"
    shuffle_buffer: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """A place in the stream.

    state: the data set's, before the window; None at its beginning. window: number of the window. piece: pieces of the
    window already used. token: tokens of the next piece already used.
    """

    state: dict[str, Any] | None = None
    window: int = 0
    piece: int = 0
    token: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tokens:
    """Documents end to end. place: of the first token. ids: int32 [n]. opens: bool [n], where a document begins."""

    place: Place
    ids: np.ndarray
    opens: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class HubStream:
    """A data set that is read from its first document to its last, once.

    Attributes, as a packed store's: `name` (short, for metrics), `location` (for messages), `vocab_size`, `eod_id`,
    `tokenizer_hash`, `tokenizer_path` (None: the configuration names the tokenizer).
    """

    tokenizer_path: Path | None = None

    def __init__(self, source: HubSource, tokenizer: str | Path) -> None:
        """Open the data set and look at its first row.

        Raises UserError for what cannot be opened (no such data set, configuration, split, or no network), has no row,
        or no text under the key.
        """
        self._source = source
        self._tokenizer: Tokenizer = load_tokenizer(tokenizer)
        self.name, self.location = Path(source.name).name, f"{PREFIX}{source.name} ({source.split})"
        self.vocab_size, self.eod_id = self._tokenizer.vocab_size, self._tokenizer.eod_id
        self.tokenizer_hash = self._tokenizer.hash
        self._data = _open(source)
        row = next(self._rows(iter(copy.copy(self._data))), None)
        if row is None:
            raise UserError(f"{self.location}: has no rows")
        self._text(row)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of tokens depends on, in JSON; of the data itself no more than its name."""
        known = asdict(self._source) | {"tokenizer": self.tokenizer_hash}
        return known if self._source.shuffle_buffer else {key: known[key] for key in known if key != "seed"}

    def tokens_from(self, place: Place) -> Iterator[Tokens]:
        """The tokens from a place on, piece by piece, each document closed by the end-of-document token.

        Empty documents are left out. The permutation of a window depends on (seed, its number) only.
        Raises UserError when reading fails, and for a row whose text is none.
        """
        data = copy.copy(self._data)
        state, window, piece, skip = place.state, place.window, place.piece, place.token
        if state is not None:
            data.load_state_dict(state)
        rows = self._rows(iter(data))
        while texts := list(islice(map(self._text, rows), max(self._source.shuffle_buffer, DOCUMENTS))):
            if self._source.shuffle_buffer:
                random = np.random.Generator(np.random.PCG64([self._source.seed, window]))
                texts = [texts[i] for i in random.permutation(len(texts))]
            for number in range(piece, -(-len(texts) // DOCUMENTS)):
                ids, opens = self._tokenised(texts[number * DOCUMENTS : (number + 1) * DOCUMENTS])
                yield Tokens(Place(state, window, number, skip), ids[skip:], opens[skip:])
                skip = 0
            state, window, piece = data.state_dict(), window + 1, 0

    def _rows(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same rows; what goes wrong while reading is the user's to mend."""
        try:
            yield from rows
        except Exception as error:  # the library and what it reads with raise many kinds
            raise UserError(
                f"{self.location}: reading failed ({_reason(error)}); the same command goes on from the newest "
                "checkpoint. `nexa data prepare` makes a packed store, which needs no network"
            ) from None

    def _text(self, row: dict[str, Any]) -> str:
        key = self._source.text_key
        if key not in row:
            raise UserError(f"data.text_key={key}: {self.location} has no such column; it has {', '.join(row)}")
        text = row[key]
        if text is not None and not isinstance(text, str):
            raise UserError(f"data.text_key={key}: holds {type(text).__name__} in {self.location}, not text")
        return text or ""

    def _tokenised(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where documents begin) of documents end to end, without the empty ones."""
        documents = [text for text in texts if text.strip()]
        ids, lengths = self._tokenizer.encode_documents(documents, np.dtype(np.int32))
        opens = np.zeros(len(ids), bool)
        opens[np.cumsum(lengths) - lengths] = True
        return ids, opens


def open_dataset(
    name: str, config: str | None, split: str, revision: str | None, *, streaming: bool, what: str, hint: str
) -> Any:
    """A `datasets.Dataset`, or with `streaming` an `IterableDataset`: of the hub, of files, or saved to disk.

    what, hint: beginning and end of the message of the UserError that is raised when it cannot be had.
    """
    import datasets

    path = Path(name).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved: Any = datasets.load_from_disk(str(path))
            data = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return data.to_iterable_dataset() if streaming else data
        place = str(path) if path.exists() else name
        return datasets.load_dataset(place, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the library raises many kinds; all mean that the data set cannot be had
        raise UserError(f"{what}: the data set cannot be opened ({_reason(error)}); {hint}") from None


def _open(source: HubSource) -> Any:
    return open_dataset(
        source.name,
        source.config,
        source.split,
        source.revision,
        streaming=True,
        what=f"data.source={PREFIX}{source.name}",
        hint="see data.hf_config, data.hf_split and data.hf_revision, or give the path of a copy on disk",
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
