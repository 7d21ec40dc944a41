"""How well a model predicts a text: every token once, weighted by tokens.

Context rule: a document's first token is predicted from the end-of-document token; the token at position p from
the tokens of its window before it. Windows of `length` tokens begin every `stride` tokens; in each, the tokens
that no earlier window scored are scored. With stride = length they do not overlap; a smaller stride gives each
token at least `length - stride` tokens of context where the document has them. Documents do not see one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline.sources import Cursor, ReadOptions, find_sources, parse_unit, read_units
from nexa.errors import UserError
from nexa.inference.checkpoint import Opened
from nexa.model.decoder import Decoder

LOGIT_TOKENS = 2048
"""Tokens whose logits exist at once."""
NOTE_SECONDS = 5.0


@dataclass(frozen=True)
class Window:
    """Inputs and targets [n], of which the targets from `first` on are scored."""

    inputs: np.ndarray
    targets: np.ndarray
    first: int


@dataclass(frozen=True)
class Score:
    """Sum of -log p over `tokens` tokens, in nats, and the UTF-8 bytes that they stand for."""

    nll: float
    tokens: int
    text_bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Mean over tokens, nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where it does not fit."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nll / math.log(2) / self.text_bytes


def windows(ids: np.ndarray, eod_id: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of one document [n] that score each of its tokens exactly once."""
    inputs = np.concatenate(([eod_id], ids[:-1]))
    done = 0
    for start in range(0, len(ids), stride):
        stop = min(start + length, len(ids))
        if stop > done:
            yield Window(inputs[start:stop], ids[start:stop], done - start)
            done = stop


@torch.no_grad()
def batch_nll(model: Decoder, batch: list[Window]) -> float:
    """Summed -log p of the scored tokens of some windows, added up in fp64."""
    device = model.lm_head.weight.device
    inputs = np.zeros((len(batch), max(len(w.inputs) for w in batch)), np.int64)
    scored = np.zeros(inputs.shape, bool)
    for row, window in enumerate(batch):  # padding on the right: causal attention never looks there
        inputs[row, : len(window.inputs)] = window.inputs
        scored[row, window.first : len(window.inputs)] = True
    targets = np.concatenate([w.targets[w.first :] for w in batch]).astype(np.int64)
    hidden = model.model(torch.from_numpy(inputs).to(device))[torch.from_numpy(scored).to(device)]
    total = 0.0
    for part, labels in zip(
        hidden.split(LOGIT_TOKENS), torch.from_numpy(targets).to(device).split(LOGIT_TOKENS), strict=True
    ):
        total += float(F.cross_entropy(model.lm_head(part).float(), labels, reduction="none").double().sum())
    return total


class TextFile:
    """Documents of a file: a text file is one, a jsonl file has one per line (also .gz, .zst; parquet by rows)."""

    def __init__(self, path: str | Path, text_key: str) -> None:
        """Raises UserError for a missing file or one of an unknown format."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        self._options = ReadOptions(text_key=text_key, max_document_bytes=1 << 40)
        (self._source,) = find_sources([Path(path)], self._options)
        self.path = self._source.path
        self.share = 0.0
        """How much of the file has been read."""

    def blocks(self) -> Iterator[list[str]]:
        """Texts, some at a time. Raises UserError naming the line that cannot be read: none is left out."""
        for unit in read_units(self._source, self._options, Cursor()):
            documents = parse_unit(unit, self._options)
            for place, reason in documents.bad:
                raise UserError(f"{place}: {reason}")
            self.share = unit.consumed / max(self._source.size, 1)
            yield documents.texts


def score_file(
    opened: Opened,
    file: TextFile,
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    note: Callable[[str], None] = lambda text: None,
) -> Score:
    """Score every token of a file. sequence_length: of a window, null is that of the training.

    `note` is told the progress every few seconds. Raises UserError naming the option or file that is wrong, and for
    a loss that is not finite.
    """
    length = opened.sequence_length if sequence_length is None else sequence_length
    stride = length if stride is None else stride
    _check(opened, length, stride, batch_size)
    tally = {"tokens": 0, "bytes": 0, "documents": 0}
    nll, begin, last = 0.0, time.monotonic(), time.monotonic()
    stream = _document_windows(opened, file.blocks(), tally, length, stride)
    while batch := list(islice(stream, batch_size)):
        nll += batch_nll(opened.model, batch)
        tally["tokens"] += sum(len(w.targets) - w.first for w in batch)
        if (now := time.monotonic()) - last >= NOTE_SECONDS:
            last = now
            note(f"{tally['tokens']:,} tokens, {tally['tokens'] / (now - begin):,.0f} tokens/s, {file.share:.0%} read")
    if not tally["tokens"]:
        raise UserError(f"{file.path}: has no text to score")
    if not math.isfinite(nll):
        raise UserError(f"{opened.path}: the loss is {nll}; the weights hold values that are not finite")
    return Score(nll, tally["tokens"], tally["bytes"], tally["documents"])


def _check(opened: Opened, length: int, stride: int, batch_size: int) -> None:
    longest = opened.model.config.max_position_embeddings
    if not 1 <= length <= longest:
        raise UserError(f"--sequence-length {length}: must be from 1 to the model's {longest} positions")
    if not 1 <= stride <= length:
        raise UserError(f"--stride {stride}: must be from 1 to the sequence length, {length}")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")


def _document_windows(
    opened: Opened, blocks: Iterable[list[str]], tally: dict[str, int], length: int, stride: int
) -> Iterator[Window]:
    """Windows of all documents, one after the other; documents and bytes are counted."""
    tokenizer = opened.tokenizer
    for texts in blocks:
        ids, lengths = tokenizer.encode_documents(texts, np.dtype(np.int32))
        start = 0
        for text, count in zip(texts, lengths, strict=True):
            # each document is closed by the end-of-document token, which is no part of the text
            yield from windows(ids[start : start + count - 1], tokenizer.eod_id, length, stride)
            start += count
            tally["bytes"] += len(text.encode("utf-8"))
            tally["documents"] += 1
