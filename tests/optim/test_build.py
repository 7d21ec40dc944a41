"""Parameter groups and AdamW against its equations."""

from __future__ import annotations

import torch
from torch import nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder
from nexa.optim import build


def decoder(**model) -> Decoder:
    shape = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    return Decoder(ModelConfig(**shape, **model), NormConfig(placement="hybrid"))


def test_every_parameter_is_in_one_group() -> None:
    model = decoder()
    optimizer = build("adamw", model.named_parameters(), lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decayed = {n for group in optimizer.param_groups if group["weight_decay"] for n in group["names"]}
    assert decayed == {n for n in names if "_proj" in n} | {"lm_head.weight"}


def test_decay_switches() -> None:
    model = decoder(tie_word_embeddings=True)
    options = dict(lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
    everything = build("adamw", model.named_parameters(), decay_embeddings=True, decay_norms=True, **options)
    assert len(everything.param_groups) == 1
    plain = build("adamw", model.named_parameters(), **options)
    undecayed = {n for group in plain.param_groups if not group["weight_decay"] for n in group["names"]}
    assert "model.embed_tokens.weight" in undecayed
    assert "model.layers.0.self_attn.q_norm.weight" in undecayed


def test_gates_of_norms_are_matrices_and_the_rest_of_a_norm_is_not() -> None:
    shape = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    options = dict(lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
    for kind, decayed in (("gatednorm", {"gate_down.weight", "gate_up.weight"}), ("seednorm", set()), ("dyt", set())):
        model = Decoder(ModelConfig(**shape), NormConfig(kind=kind))
        groups = build("adamw", model.named_parameters(), **options).param_groups
        found = {n for group in groups if group["weight_decay"] for n in group["names"] if "norm." in n}
        assert {".".join(n.split("norm.")[1].split(".")) for n in found} == decayed
        both = build("adamw", model.named_parameters(), decay_norms=True, **options).param_groups
        assert {n for group in both if not group["weight_decay"] for n in group["names"]} == {
            "model.embed_tokens.weight"
        }


def test_adamw_equations() -> None:
    """W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), bias-corrected moments (Loshchilov and Hutter 2019)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(5)]
    parameter = nn.Parameter(start.clone())
    name = "model.layers.0.mlp.up_proj.weight"
    optimizer = build("adamw", [(name, parameter)], lr=0.01, weight_decay=0.3, betas=[0.8, 0.9], eps=1e-3)
    w, m, v = start.double(), torch.zeros(6, 5).double(), torch.zeros(6, 5).double()
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w * (1 - 0.01 * 0.3) - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-5, atol=1e-6)
