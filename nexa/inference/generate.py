"""Sampling from a model: several prompts at once, each as if it were alone.

Context rule: a token is drawn from the tokens of its sequence from `start` on. When there would be more of them than
the model has positions (`max_position_embeddings`), `start` moves up so that half of the positions are used. Until
then nothing of the context changes but its end, and the keys and values of all but the newest token are taken from a
cache. The rule is the same without the cache, and so are the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexa.errors import UserError
from nexa.inference.checkpoint import Opened, open_checkpoint
from nexa.inference.sampling import SEEDS, Sampling, choose
from nexa.model.cache import KeyValueCache
from nexa.model.decoder import Decoder


@dataclass
class _Sequence:
    """A prompt and what was drawn after it; the model sees `ids[start:]`."""

    ids: list[int]
    start: int
    generator: torch.Generator

    @property
    def context(self) -> list[int]:
        """At least one id."""
        return self.ids[self.start :]

    def slide(self, window: int) -> bool:
        """Move `start` when the context is longer than `window`; whether it moved."""
        if len(self.ids) - self.start <= window:
            return False
        self.start = len(self.ids) - max(window // 2, 1)
        return True


@dataclass
class _Reader:
    """Gives the next token's logits of some sequences; what it has read stays in a cache between calls."""

    model: Decoder
    use_cache: bool
    tokens: int
    """Calls that will come at most: they size the cache."""
    cache: KeyValueCache | None = None
    documents: Tensor | None = None
    """[B, columns] 0 for the padding on the left and 1 for the rest; null when no row has padding."""
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.model.lm_head.weight.device

    def logits(self, sequences: Sequence[_Sequence]) -> Tensor:
        """[B, V] fp32 on the CPU (fp64 for an fp64 model)."""
        window = self.model.config.max_position_embeddings
        slid = [sequence.slide(window) for sequence in sequences]
        hidden = self._read_all(sequences) if self.cache is None or any(slid) else self._read_newest(sequences)
        self.tokens -= 1
        logits = self.model.lm_head(hidden[:, -1])
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))

    def keep(self, rows: list[int]) -> None:
        """Go on with these of the sequences."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        if self.cache is not None:
            self.cache.keep(index)
        if self.documents is not None:
            self.documents = self.documents[index]

    def _read_all(self, sequences: Sequence[_Sequence]) -> Tensor:
        """Hidden states [B, width, d] of the contexts, padded on the left; into a new cache."""
        contexts = [sequence.context for sequence in sequences]
        lengths = [len(context) for context in contexts]
        width, window = max(lengths), self.model.config.max_position_embeddings
        # the cache serves until the last call or until the shortest context has to move
        capacity = width + min(self.tokens, window - min(lengths))
        self.cache = KeyValueCache(capacity) if self.use_cache else None
        ids = torch.tensor([[0] * (width - len(c)) + c for c in contexts], device=self._device)
        padding = torch.tensor([[width - length] for length in lengths], device=self._device)
        columns = torch.arange(capacity, device=self._device)
        self.documents = (columns >= padding).long() if width > min(lengths) else None
        positions = (columns[:width] - padding).clamp(min=0)
        return self._forward(ids, positions)

    def _read_newest(self, sequences: Sequence[_Sequence]) -> Tensor:
        """Hidden states [B, 1, d] of the last ids, which the cache does not have yet."""
        ids = torch.tensor([[sequence.ids[-1]] for sequence in sequences], device=self._device)
        last = [[len(sequence.ids) - 1 - sequence.start] for sequence in sequences]
        return self._forward(ids, torch.tensor(last, device=self._device))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        past = 0 if self.cache is None else self.cache.get_seq_length()
        documents = None if self.documents is None else self.documents[:, : past + ids.shape[1]]
        return self.model.model(ids, documents, self.cache, positions)


@torch.no_grad()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    vocabulary: int | None = None,
    cache: bool = True,
) -> list[list[int]]:
    """The new ids of each prompt, at most `max_new_tokens`, ending with `stop_id` if it was drawn.

    prompts: at least one id each, of any lengths. vocabulary: ids from here on are never drawn (rows that pad the
    embedding). A prompt's draws depend on the seed and its number, not on the other prompts or on torch's global
    state. cache: False computes the whole context for each token, with the same result up to rounding. The model's
    mode is restored. Raises UserError when the logits are not finite.
    """
    window = model.config.max_position_embeddings
    sequences = [
        _Sequence(list(ids), max(0, len(ids) - window), sampling.generator(number))
        for number, ids in enumerate(prompts)
    ]
    assert all(sequence.ids for sequence in sequences)
    reader, active = _Reader(model, cache, sampling.max_new_tokens), sequences
    was_training = model.training
    model.eval()
    try:
        while active and reader.tokens:
            for logits, sequence in zip(reader.logits(active)[:, :vocabulary], active, strict=True):
                sequence.ids.append(choose(logits, sampling, sequence.generator))
            going = [row for row, sequence in enumerate(active) if sequence.ids[-1] != stop_id]
            if len(going) < len(active):
                reader.keep(going)
                active = [active[row] for row in going]
    finally:
        model.train(was_training)
    return [sequence.ids[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    vocabulary: int | None = None,
    cache: bool = True,
) -> list[int]:
    """`generate_batch` for one prompt."""
    return generate_batch(model, [prompt_ids], sampling, stop_id=stop_id, vocabulary=vocabulary, cache=cache)[0]


@dataclass(frozen=True)
class Continuation:
    """A prompt and `text`: the prompt with what the model wrote after it, up to the end of the document."""

    prompt: str
    text: str
    new_tokens: int
    """Ids drawn, with the one that ends the document."""
    ended: bool
    """The model ended the document; otherwise `max_new_tokens` did."""


def continue_texts(
    opened: Opened, prompts: Sequence[str], sampling: Sampling, *, batch_size: int = 8, cache: bool = True
) -> Iterator[Continuation]:
    """One continuation for each prompt, in order; `batch_size` prompts are computed at once.

    Raises UserError for a batch size below 1 and as `generate_batch`.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    tokenizer = opened.tokenizer
    options: dict[str, Any] = {"stop_id": tokenizer.eod_id, "vocabulary": tokenizer.vocab_size, "cache": cache}
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        before = [opened.encode(prompt) for prompt in batch]
        numbered = replace(sampling, seed=(sampling.seed + first) % SEEDS)
        after = generate_batch(opened.model, before, numbered, **options)
        for prompt, head, ids in zip(batch, before, after, strict=True):
            ended = ids[-1] == tokenizer.eod_id
            # decoded together: a character may begin in the prompt's last token and end in the first new one
            text = tokenizer.decode([*head[1:], *ids[: len(ids) - ended]])
            yield Continuation(prompt, text, len(ids), ended)


def generate_text(path: str | Path, prompt: str, *, device: str = "auto", cache: bool = True, **options: Any) -> str:
    """`prompt` continued by the checkpoint (or run) at `path`; options as in `Sampling`. Raises UserError."""
    sampling = Sampling(**options)
    (found,) = continue_texts(open_checkpoint(path, device), [prompt], sampling, cache=cache)
    return found.text
