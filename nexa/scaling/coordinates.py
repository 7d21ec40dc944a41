"""The coordinate check of a width rule: whether a few updates change activations by as much at every width.

Yang et al. (arXiv 2203.03466, appendix D.1): train models of several widths for a few steps at one learning rate and
look at the size of what changed. Under muP the change of every activation has a size that does not depend on the
width; without a rule those of hidden layers and logits grow with it, and a rate that is right for a narrow model is too
large for a wide one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nexa.config.optim import WidthRule
from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.model.attention import SelfAttention
from nexa.model.block import Block
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.optim.build import build, set_rate, settings
from nexa.optim.widths import Width, scale_initial

PLACES = ("embedding", "attention logits", "attention", "feed-forward", "last hidden", "logits")
GROWS = 0.25
"""A slope above it is growth: without a rule they are near 0.5 or 1, and measured ones of muP within 0.1 of 0."""


@dataclass(frozen=True)
class Table:
    """rows: place -> root mean square of the change at each width; slopes: of its logarithm over that of the width."""

    rule: str
    widths: list[int]
    rows: dict[str, list[float]]
    slopes: dict[str, float]

    @property
    def growing(self) -> list[str]:
        """Places whose change grows with the width."""
        return [place for place, slope in self.slopes.items() if slope > GROWS]


def unit(cfg: Config) -> int:
    """The least width: one key-value head, and the queries that look at it."""
    model = cfg.model
    return model.hidden_size // (model.num_key_value_heads or model.num_attention_heads)


def at_width(cfg: Config, width: int) -> Config:
    """`cfg` with this width: as many heads of its size, and the feed-forward and key-value heads in proportion.

    Raises UserError for a width without a whole number of heads, or of queries for each key-value head.
    """
    model = cfg.model
    size = model.head_dim or model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)
    least = unit(cfg)
    if width < least or width % least:
        raise UserError(f"--widths {width}: must be a multiple of {least}: heads of {size}, {queries} to a key head")
    heads = width * model.num_attention_heads // model.hidden_size
    return replace(
        cfg,
        model=replace(
            model,
            hidden_size=width,
            intermediate_size=round(model.intermediate_size * width / model.hidden_size),
            num_attention_heads=heads,
            num_key_value_heads=heads // queries,
            head_dim=size,
            attention="sdpa",
        ),
    )


def check(
    cfg: Config,
    rule: WidthRule,
    widths: Sequence[int],
    steps: int = 4,
    sequences: int = 8,
    length: int = 32,
    seeds: int = 2,
) -> Table:
    """Train models of these widths under `rule`, whose base is the first, and measure what changed. CPU, fp32.

    cfg: everything but the width; its rate is constant and its gradients are not clipped. Each of `seeds` models sees
    `sequences` random rows of `length` tokens, the same in every step and at every width. Raises UserError for a width
    that cannot be.
    """
    sized = [at_width(cfg, width) for width in widths]
    base = None if rule == "none" else widths[0]
    sized = [replace(one, optim=replace(one.optim, width_rule=rule, base_hidden_size=base)) for one in sized]
    found = [[_changes(one, seed, steps, sequences, length) for seed in range(seeds)] for one in sized]
    rows = {
        place: [float(np.sqrt(np.mean([each[place] for each in at_one]))) for at_one in found]
        for place in PLACES
        if place in found[0][0]
    }
    logarithm = np.log(np.array(widths, float))
    slopes = {place: float(np.polyfit(logarithm, np.log(row), 1)[0]) for place, row in rows.items() if min(row) > 0}
    return Table(rule, list(widths), rows, slopes)


def _changes(cfg: Config, seed: int, steps: int, sequences: int, length: int) -> dict[str, float]:
    """Mean square of what `steps` updates change at every place."""
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, seed)
    scale_initial(model, Width.of(cfg), cfg.model, cfg.norm)
    optimizer = build(named_parameters=model.named_parameters(), **settings(cfg))
    set_rate(optimizer, cfg.optim.lr)
    # words as frequent as in text, so that there is something to learn in a few steps
    frequencies = 1 / torch.arange(1, cfg.model.vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(frequencies, sequences * (length + 1), replacement=True, generator=generator)
    tokens = tokens.view(sequences, length + 1)
    before = _activations(model, tokens[:, :-1])
    for _ in range(steps):
        optimizer.zero_grad()
        (model(tokens[:, :-1], tokens[:, 1:]) / (sequences * length)).backward()
        optimizer.step()
    after = _activations(model, tokens[:, :-1])
    squares = {
        place: [float((new - old).square().mean()) for new, old in zip(after[place], tensors, strict=True)]
        for place, tensors in before.items()
    }
    return {place: float(np.mean(values)) for place, values in squares.items()}


@torch.no_grad()
def _activations(model: Decoder, tokens: Tensor) -> dict[str, list[Tensor]]:
    """What is at every place of a forward pass, once for each block where they have it."""
    found: dict[str, list[Tensor]] = {}

    def keep(place: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.setdefault(place, []).append(output.clone())

    def logits(q: Tensor, k: Tensor, scale: float) -> None:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
        found.setdefault("attention logits", []).append(scores.tril())

    hooks = [model.model.embed_tokens.register_forward_hook(keep("embedding"))]
    hooks.append(model.model.register_forward_hook(keep("last hidden")))
    hooks.append(model.lm_head.register_forward_hook(keep("logits")))
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention: SelfAttention = block.self_attn
        attention.watch = logits
        parts: tuple[tuple[str, nn.Module], ...] = (("attention", attention), ("feed-forward", block.mlp))
        hooks += [part.register_forward_hook(keep(place)) for place, part in parts]
    model(tokens)
    for hook in hooks:
        hook.remove()
    for block in model.model.layers:
        assert isinstance(block, Block)
        block.self_attn.watch = None
    return found
