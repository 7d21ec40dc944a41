"""Global batches from a stream: rows end to end in the stream's order, with a place to go on from after each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.batches import Batch, check_ids, empty_batch, fill_row
from data_pipeline.hub import HubStream, Place, Tokens
from data_pipeline.packing import Chunk
from nexa.errors import UserError


@dataclass(frozen=True)
class _Held:
    """The tokens of one global batch, with the one behind it, as rows are read from."""

    name: str
    location: str
    ids: np.ndarray
    opens: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return start + np.flatnonzero(self.opens[start:stop])


class StreamBatches:
    """Global batches of a stream, one after the other; each holds the rows of all ranks.

    Row i of step s is row g = first_sample + s * global_batch_size + i of the stream: its tokens [g T, g T + T], as in
    a store that is read in order, packed in chunks. World size does not enter: every rank reads the whole stream.
    """

    def __init__(
        self,
        stream: HubStream,
        *,
        sequence_length: int,
        global_batch_size: int,
        document_mask: bool = False,
        vocab_size: int | None = None,
        first_sample: int = 0,
        first_step: int = 0,
        place: dict[str, Any] | None = None,
        kept: int = 8,
    ) -> None:
        """place: `position(first_step)` of the batches before; None at the beginning of the stream.

        first_sample: number of the first row of step 0, as in `TrainBatches`. kept: steps whose positions can be asked.
        """
        self._stream, self._length, self._batch = stream, sequence_length, global_batch_size
        self._mask, self._vocab_size, self._first, self._kept = document_mask, vocab_size, first_sample, kept
        begin = Place(**place) if place is not None else Place()
        self._places = {first_step: begin}
        self._next = first_step
        self._source: Iterator[Tokens] = stream.tokens_from(begin)
        self._pieces: list[Tokens] = []
        self._held = _Held(stream.name, stream.location, np.empty(0, np.int32), np.empty(0, bool))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of a step: the one asked for last, or the next.

        Raises UserError where the stream ends before the batch is full.
        """
        if step == self._next:
            self._read(step)
        if step != self._next - 1 or not 0 <= start <= stop <= self._batch:
            raise IndexError(f"rows [{start}, {stop}) of step {step}, {self._next} is next; {self._batch} rows")
        batch = empty_batch(stop - start, self._length, self._mask)
        packing = Chunk(self._held, self._length)
        for row, number in enumerate(range(start, stop)):
            fill_row(batch, row, self._held, packing, number)
        check_ids(batch, self._vocab_size, self._stream.location)
        return batch

    def _read(self, step: int) -> None:
        """Hold the tokens of a step."""
        size = self._batch * self._length
        while (have := sum(map(len, self._pieces))) <= size:
            piece = next(self._source, None)
            if piece is None:
                raise UserError(self._end(step, have))
            self._pieces.append(piece)
        ids, opens = (np.concatenate([getattr(piece, key) for piece in self._pieces]) for key in ("ids", "opens"))
        self._held = replace(self._held, ids=ids[: size + 1], opens=opens[: size + 1])
        self._drop(size)
        self._places[step + 1] = self._pieces[0].place
        self._places.pop(step + 1 - self._kept, None)
        self._next = step + 1

    def _drop(self, count: int) -> None:
        """Let go of the first tokens; at least one stays."""
        while count >= len(self._pieces[0]):
            count -= len(self._pieces.pop(0))
        first = self._pieces[0]
        place = replace(first.place, token=first.place.token + count)
        self._pieces[0] = Tokens(place, first.ids[count:], first.opens[count:])

    def _end(self, step: int, left: int) -> str:
        read = (self._first + step * self._batch) * self._length + left
        stop = f"at most {step} steps" if step else "a smaller batch, or another data set"
        also = f"set train.stop_at={step} to end there, or train.steps={step} for a schedule that does" if step else ""
        return f"{self._stream.location}: ended after {read} tokens, in step {step + 1}: enough for {stop}; {also}"

    def describe(self) -> list[str]:
        """Lines for the start of a run."""
        begun = (
            f", goes on at row {self._first + self._next * self._batch}" if self._places[self._next] != Place() else ""
        )
        return [
            f"streaming {self._stream.location}{begun}: a resume is approximate, exact only while data set and reader "
            "stay the same; every rank reads and tokenises all of it. A packed store (nexa data prepare) needs neither"
        ]

    def position(self, step: int) -> dict[str, Any]:
        """Where step `step` begins, in JSON: of the last steps read and of the next one."""
        return self._places[step].to_dict()

    def sample_ids(self, step: int) -> list[tuple[str, int]]:
        """(stream, row of the stream) of every row of a step's global batch."""
        first = self._first + step * self._batch
        return [(self._stream.name, first + row) for row in range(self._batch)]

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Positions consumed before step `step`: T per row."""
        return {self._stream.name: (self._first + step * self._batch) * self._length}

    def epochs(self, step: int) -> dict[str, float]:
        """Nothing: the length of a stream is not known."""
        return {}
