"""Rules of width: the table by hand, no change at ratio 1, and muP with an output multiplier as a second model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nexa.config import check, from_mapping
from nexa.config.schema import Config
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.optim.build import build, described, set_rate, settings
from nexa.optim.widths import RULES, Width, scale_initial
from nexa.scaling import coordinates


def config(rule: str = "mup", base: int | None = 8, **groups: dict) -> Config:
    """A model of width 32; ratio 4."""
    model = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    optim = {"width_rule": rule, "base_hidden_size": base, "lr": 0.01, "weight_decay": 0.2}
    cfg = from_mapping(
        {
            "model": model | groups.get("model", {}),
            "norm": groups.get("norm", {}),
            "optim": optim | groups.get("optim", {}),
            "train": {"steps": 9},
        }
    )
    assert check(cfg) == []
    return cfg


def made(cfg: Config) -> Decoder:
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, 3)
    scale_initial(model, Width.of(cfg), cfg.model, cfg.norm)
    return model


def grouped(cfg: Config) -> tuple[Decoder, torch.optim.Optimizer]:
    model = made(cfg)
    return model, build(named_parameters=model.named_parameters(), **settings(cfg))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 32
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("rule", "decay"), [("mup", 4.0), ("mup_root_decay", 2.0), ("mup_plain_decay", 1.0)])
def test_the_table(rule: str, decay: float) -> None:
    """m = 4: rate and decay of every parameter, each in one group."""
    gated = {"norm": {"kind": "gatednorm"}, "model": {"attention_gate": "headwise", "input_bias": True}}
    model, optimizer = grouped(config(rule, **gated))
    found = {
        name: (group["lr"], group["lr_factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }
    assert len(found) == sum(len(g["names"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for name, values in found.items():
        if name == "lm_head.weight" or "gate_down.weight" in name:  # d numbers are summed to a fixed number of them
            expected = (0.0025, 0.25, 0.8)
        elif "_proj.weight" in name:
            expected = (0.0025, 0.25, 0.2 * decay)
        elif "gate_up.weight" in name:  # a fixed number is summed
            expected = (0.01, 1.0, 0.2)
        else:  # embedding, biases, gains
            expected = (0.01, 1.0, 0.0)
        assert values == pytest.approx(expected), name
    assert len(described(optimizer)) == len(optimizer.param_groups)
    set_rate(optimizer, 0.004)
    assert {round(g["lr"] / g["lr_factor"], 9) for g in optimizer.param_groups} == {0.004}


def test_initial_weights() -> None:
    """Normal: std of the base over sqrt(m), the head over m; by fan-in: the rule has the root already."""
    for initializer, hidden, head in (("normal", 0.5, 0.25), ("fan_in", 1.0, 0.5), ("xavier", 1.0, 0.25)):
        cfg = config(model={"initializer": initializer})
        ruled, plain = made(cfg), made(config("none", None, model={"initializer": initializer}))
        for (name, one), other in zip(ruled.named_parameters(), plain.parameters(), strict=True):
            expected = hidden if "_proj" in name else head if "lm_head" in name else 1.0
            torch.testing.assert_close(one, other * expected, rtol=1e-6, atol=0, msg=f"{initializer} {name}")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_ratio_1_is_no_rule_bit_for_bit(rule: str) -> None:
    for tied in (False, True):
        extra = {"model": {"tie_word_embeddings": tied, "initializer": "small_init"}}
        one, first = grouped(config(rule, None if rule == "none" else 32, **extra))
        other, second = grouped(config("none", None, **extra))
        assert [g["names"] for g in first.param_groups] == [g["names"] for g in second.param_groups]
        set_rate(first, 0.003)
        set_rate(second, 0.003)
        assert train(one, first) == train(other, second)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_mup_with_an_output_multiplier(tied: bool) -> None:
    """Table 8 as it stands, in fp64: the head's weights, rate and decay of the base, and logits times 1/m."""
    # gains decay here: in the tied model the last one stands for the multiplier, and decays as in the other
    cfg = config(model={"tie_word_embeddings": tied}, optim={"decay_norms": True})
    model = made(cfg).double()
    reference = Decoder(cfg.model, cfg.norm).double()
    reference.load_state_dict(model.state_dict())
    special = "model.norm.weight" if tied else "lm_head.weight"
    with torch.no_grad():
        dict(reference.named_parameters())[special].mul_(4)
    reference.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 4, *inputs[1:]))
    options = {**settings(cfg), "eps": 1e-30}
    groups = []
    for name, p in reference.named_parameters():
        hidden = "_proj" in name
        decay = 0.0 if "embed" in name else 0.2 * (4 if hidden else 1)
        groups.append({"params": [p], "lr": 0.01 / (4 if hidden else 1), "weight_decay": decay})
    torch_adamw = torch.optim.AdamW(groups, betas=tuple(options["betas"]), eps=1e-30)
    losses = train(model, build(named_parameters=model.named_parameters(), **options))
    assert train(reference, torch_adamw) == pytest.approx(losses, rel=1e-9)
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one * (4 if name == special else 1), other, rtol=1e-7, atol=1e-9, msg=name)


def test_growth_changes_the_ratio() -> None:
    """The model's present width counts: twice as wide, half the rate."""
    cfg = config()
    wider = replace(cfg, model=replace(cfg.model, hidden_size=64, intermediate_size=96, num_attention_heads=8))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (Width.of(cfg).lr(name), Width.of(wider).lr(name)) == (1 / 4, 1 / 8)


def test_coordinates_are_alike_at_every_width_under_mup_and_not_without() -> None:
    cfg = config(model={"num_key_value_heads": 2}, optim={"lr": 0.01, "weight_decay": 0.0})
    widths = [32, 64, 128, 256]
    without, ruled = (coordinates.check(cfg, rule, widths, length=16, seeds=1) for rule in ("none", "mup"))
    assert list(ruled.rows) == list(coordinates.PLACES)
    assert max(abs(slope) for slope in ruled.slopes.values()) < 0.25, ruled
    assert ruled.growing == []
    for place in ("attention", "feed-forward", "logits"):
        assert without.slopes[place] > 0.5, (place, without)
    assert {"attention logits", "attention", "feed-forward", "logits"} <= set(without.growing)
    for place, row in ruled.rows.items():  # the narrowest model is the base: the rule does nothing to it
        assert row[0] == without.rows[place][0]
