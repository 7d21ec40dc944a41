"""What is compiled is one graph: a break in it costs more than it is compiled for, and nobody would see it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import cpu_attention, cpu_linear
from nexa.model.cpu_linear import OneDnn
from nexa.model.decoder import Decoder
from nexa.model.placement import PLACEMENTS

SHAPE = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
OPTIONS: dict[str, tuple[dict, dict]] = {
    **{placement: ({}, {"placement": placement}) for placement in PLACEMENTS},
    "grouped queries": ({"num_key_value_heads": 1}, {}),
    "qk norm": ({}, {"qk": "rms"}),
    "cosine attention": ({}, {"qk": "cosine"}),
    "gate": ({"attention_gate": "headwise"}, {}),
    "layernorm": ({}, {"kind": "layernorm"}),
}
FAST = ("pre", "peri", "grouped queries", "qk norm")
CASES = [
    *(pytest.param(name, "none", marks=[] if name in FAST else pytest.mark.slow) for name in OPTIONS),
    *(pytest.param(name, "full", marks=[] if name == "hybrid" else pytest.mark.slow) for name in ("pre", "hybrid")),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("option", "recompute"), CASES)
def test_no_graph_breaks(option: str, recompute: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "cpu_units", lambda: {cpu_attention.UNITS[dtype]})
    monkeypatch.setattr(cpu_linear, "ways", lambda wide: {torch.bfloat16: cpu_linear.Turned, torch.float32: OneDnn})
    model, norm = OPTIONS[option]
    decoder = Decoder(ModelConfig(**{**SHAPE, **model}), NormConfig(**norm)).to(dtype)
    decoder.model.recompute = recompute  # type: ignore[assignment]
    torch.compiler.reset()
    counters.clear()
    for layer in decoder.model.layers:
        layer.self_attn.choose_kernel()
        layer.mlp.choose_kernel()
    for part in (*decoder.model.layers, decoder.model.embed_norm, decoder.model.norm):
        if part is not None:
            part.compile(backend="aot_eager")
    ids = torch.randint(0, 31, (2, 8))
    for _ in range(2):
        decoder(ids, ids).backward()
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], dict(counters["graph_break"])
