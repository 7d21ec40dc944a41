"""Models and batches that several benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

from nexa.config.schema import Config, ModelConfig
from nexa.model.decoder import flops_per_token


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    model: ModelConfig
    batch: int
    """Rows of a step."""
    length: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Of a step: 6 per matrix weight and token, and attention."""
        return flops_per_token(self.model, Config().norm, self.length) * self.tokens


SHAPES = {
    "34m": Shape(
        ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=256,
            attention="auto",
        ),
        batch=8,
        length=256,
    ),
    "134m": Shape(
        ModelConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=256,
            attention="auto",
        ),
        batch=8,
        length=256,
    ),
    "1b": Shape(
        ModelConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=24,
            num_attention_heads=32,
            max_position_embeddings=2048,
            attention="auto",
        ),
        batch=8,
        length=2048,
    ),
}
"""For CPUs (LLaMA 130M the second), and for one GPU (the 1B size with a feed-forward that is a multiple of 128)."""


def default_shape(device: str) -> str:
    """The one for a kind of device."""
    return "34m" if device == "cpu" else "1b"
