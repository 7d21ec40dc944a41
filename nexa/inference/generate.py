"""Sampling from a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexa.errors import UserError
from nexa.inference.checkpoint import Opened, open_checkpoint
from nexa.model.decoder import Decoder


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """`logits` [V] with all but the smallest set of tokens that holds `top_p` of the probability at -inf.

    The likeliest token always stays (Holtzman et al. 2020).
    """
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    return logits.index_fill(0, order[(before >= top_p) & (before > 0)], float("-inf"))


@dataclass(frozen=True)
class Sampling:
    """How to draw. Raises UserError naming the option of `nexa generate` whose value cannot be."""

    max_new_tokens: int
    temperature: float = 0.8
    """Divides the logits."""
    top_p: float = 0.95
    """Share of the probability to draw from."""
    greedy: bool = False
    """Take the likeliest token and draw nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: must be above 0; --greedy takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be from 0 to 2^63 - 1")


@torch.no_grad()
def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    vocabulary: int | None = None,
) -> list[int]:
    """The new ids only, at most `max_new_tokens`, ending with `stop_id` if it was drawn.

    prompt_ids: at least one id. vocabulary: ids from here on are never drawn (rows that pad the embedding). The draw
    depends on the seed, not on torch's global state. Each token computes the whole sequence, of which the newest
    `model.config.max_position_embeddings` tokens count: there is no cache. The model's mode is restored.
    """
    assert prompt_ids
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    ids, window = list(prompt_ids), model.config.max_position_embeddings
    was_training = model.training
    model.eval()
    try:
        for _ in range(sampling.max_new_tokens):
            context = torch.tensor([ids[-window:]], device=device)
            logits = model.lm_head(model.model(context)[:, -1])[0, :vocabulary].float().cpu()
            ids.append(_choose(logits, sampling, generator))
            if ids[-1] == stop_id:
                break
    finally:
        model.train(was_training)
    return ids[len(prompt_ids) :]


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits [V]. Raises UserError when they are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's output is not finite: its weights are damaged or the training diverged")
    if sampling.greedy:
        return int(logits.argmax())
    probability = nucleus(logits / sampling.temperature, sampling.top_p).softmax(-1)
    return int(torch.multinomial(probability, 1, generator=generator))


def continue_text(opened: Opened, prompt: str, sampling: Sampling) -> str:
    """`prompt` and what the model writes after it, up to the end of the document."""
    tokenizer = opened.tokenizer
    before = opened.encode(prompt)
    ids = generate(opened.model, before, sampling, stop_id=tokenizer.eod_id, vocabulary=tokenizer.vocab_size)
    if ids[-1] == tokenizer.eod_id:
        ids.pop()
    # decoded together: a character may begin in the prompt's last token and end in the first new one
    return tokenizer.decode([*before[1:], *ids])


def generate_text(path: str | Path, prompt: str, *, device: str = "auto", **options: Any) -> str:
    """`continue_text` of the checkpoint (or run) at `path`; options as in `Sampling`. Raises UserError."""
    sampling = Sampling(**options)
    return continue_text(open_checkpoint(path, device), prompt, sampling)
