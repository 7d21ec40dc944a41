"""What a checkpoint is measured on: rows of a packed store or of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batches import TokenSource, ValidationRows
from data_pipeline.embedded import embedded_documents, embedded_store
from data_pipeline.store import available_splits, open_store
from nexa.config import load
from nexa.errors import UserError
from nexa.inference.checkpoint import Opened
from nexa.inference.score import TextFile


@dataclass(frozen=True)
class Text:
    """Tokens of documents end to end, as a packed store has them. `location` says where they are from."""

    ids: np.ndarray
    starts: np.ndarray
    """Where documents begin."""
    name: str
    location: str

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64."""
        return self.ids[start : start + count]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which a document begins."""
        return self.starts[(self.starts >= start) & (self.starts < stop)]


@dataclass(frozen=True)
class Measured:
    """The rows on which a checkpoint is measured."""

    rows: ValidationRows

    def batches(self, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Arguments of `Decoder.forward`, `size` rows at a time. Raises UserError for an id outside the vocabulary."""
        for start in range(0, len(self.rows), size):
            batch = self.rows.rows(start, min(start + size, len(self.rows)))
            inputs = {"input_ids": torch.from_numpy(batch.input_ids), "labels": torch.from_numpy(batch.labels)}
            if batch.document_ids is not None:
                inputs["document_ids"] = torch.from_numpy(batch.document_ids)
            yield {key: value.to(device) for key, value in inputs.items()}

    @classmethod
    def of(cls, source: TokenSource, opened: Opened, tokens: int, length: int, document_mask: bool) -> Measured:
        """The first rows of `source`: `tokens` rounded up to whole rows of `length`, or all that there are."""
        vocabulary = opened.model.config.vocab_size
        return cls(ValidationRows(source, length, -(-tokens // length), document_mask, vocabulary))


@dataclass(frozen=True)
class StoreData:
    """One split of a packed store."""

    path: str | Path
    split: str
    document_mask: bool
    description: str
    """For people: which data, and why these."""

    def measured(self, opened: Opened, tokens: int, length: int) -> Measured:
        """For one checkpoint. Raises UserError when the store has another tokenizer."""
        store = open_store(self.path, self.split)
        if store.tokenizer_hash not in {None, opened.tokenizer.hash}:
            raise UserError(
                f"{store.location} was tokenised with another tokenizer than that of {opened.path} "
                f"({store.tokenizer_hash} against {opened.tokenizer.hash}); measure on a text with --text FILE instead"
            )
        return Measured.of(store, opened, tokens, length, self.document_mask)


@dataclass(frozen=True)
class TextData:
    """Documents, tokenised with each checkpoint's own tokenizer."""

    documents: Callable[[], Iterator[list[str]]]
    """Some texts at a time."""
    name: str
    description: str

    def measured(self, opened: Opened, tokens: int, length: int) -> Measured:
        """For one checkpoint, as many documents as `tokens` need. Raises UserError for a text without a token.

        The first document follows an end-of-document token, as in training.
        """
        tokenizer = opened.tokenizer
        pieces, lengths = [np.array([tokenizer.eod_id], np.int64)], [1]
        for texts in self.documents():
            ids, sizes = tokenizer.encode_documents(texts, np.dtype(np.int64))
            pieces.append(ids)
            lengths += sizes.tolist()
            if sum(lengths) > tokens + length:
                break
        if sum(lengths) < 3:
            raise UserError(f"{self.name}: has no text to measure on")
        source = Text(np.concatenate(pieces), np.cumsum([0, *lengths])[:-1], self.name, self.name)
        return Measured.of(source, opened, tokens, length, False)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder whose checkpoint this is, None when it is none's."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def choose(checkpoint: Path, data: str | None = None, text: TextFile | None = None) -> StoreData | TextData:
    """What to measure on: a packed store `data` (its validation split if it has one), a text file, or with neither the
    validation split of the run that wrote `checkpoint`, or else the embedded text.

    Raises UserError naming what was asked for and cannot be read.
    """
    if data is not None:
        split = "validation" if "validation" in available_splits(data) else "train"
        return StoreData(data, split, False, f"{split} split of {data}")
    if text is not None:
        return TextData(text.blocks, str(text.path), str(text.path))
    try:
        return _of_run(checkpoint)
    except UserError as error:
        reason = str(error).splitlines()[0]
    return TextData(
        _embedded_documents, "embedded text", f"validation documents of the embedded text, because {reason}"
    )


def _embedded_documents() -> Iterator[list[str]]:
    return ([text] for split, text in embedded_documents() if split == "validation")


def _of_run(checkpoint: Path) -> StoreData:
    """The validation split of the (first) source that the checkpoint's run was trained on."""
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"{checkpoint} is not in the checkpoints folder of a run")
    cfg = load(run)
    source = cfg.data.source
    if source == "embedded":
        size = cfg.data.tokenizer_vocab_size or min(cfg.model.vocab_size, 2048)
        path, name = embedded_store(cfg.data.cache_dir, size), "the embedded corpus"
    else:
        path = Path(source if isinstance(source, str) else source[0].path)
        name = str(path)
    if "validation" not in available_splits(path):
        raise UserError(f"the run's {path} has no validation split")
    mask = ", documents masked" if cfg.data.document_mask else ""
    return StoreData(
        path, "validation", cfg.data.document_mask, f"validation split of {name}, the run's own data{mask}"
    )
