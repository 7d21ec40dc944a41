"""A model that reads a sequence in pieces, through a cache, says what it says of the whole."""

import dataclasses

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.attention import document_mask
from nexa.model.cache import KeyValueCache
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS

PIECES = (7, 1, 1, 5, 1, 4, 1)
"""Tokens read at once: a prompt, single tokens, and pieces behind what is there."""
LENGTH = sum(PIECES)
IDS = torch.randint(0, 60, (3, LENGTH), generator=torch.Generator().manual_seed(0))


NORM = {field.name for field in dataclasses.fields(NormConfig)}


def decoder(*, placement="pre", kind="rmsnorm", qk="none", dtype=torch.float64, **sizes):
    """A tiny model whose every parameter is away from its initial value."""
    usual = dict(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=500.0,
    )
    options = {name: sizes.pop(name) for name in NORM & sizes.keys()}
    config = ModelConfig(**(usual | sizes))
    gain = placement == "normformer"
    norm = NormConfig(placement=placement, kind=kind, qk=qk, gate_rank=5, residual_gain=gain, embedding=True, **options)
    model = Decoder(config, norm)
    initialise(model, config, norm, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model.to(dtype).eval()


CASES = {
    **{f"placement {name}": dict(placement=name) for name in PLACEMENTS},
    **{
        f"{kind}, {name}": dict(placement=name, kind=kind)
        for kind in KINDS
        for name in ("pre", "post")
        if (name, kind) != ("post", "bhyt")
    },
    "bhyt, lns": dict(placement="lns", kind="bhyt", bhyt_tokens=2),
    "a weight before": dict(pre_affine=True),
    "scaled output": dict(placement="normformer", head_scale="output"),
    "gated features": dict(attention_gate="elementwise"),
    "gated heads": dict(attention_gate="headwise", placement="hybrid"),
    "fixnorm": dict(fixnorm=True, tie_word_embeddings=True),
    **{
        f"qk {qk}, {name}": dict(placement=name, qk=qk)
        for qk in ("rms", "rms_full", "cosine")
        for name in ("pre", "mix")
    },
    "tied": dict(tie_word_embeddings=True),
    "as many key heads": dict(num_key_value_heads=None),
    "one key head": dict(num_key_value_heads=1, placement="normformer"),
    "wide heads": dict(head_dim=16, qk="rms_full"),
}


@torch.no_grad()
def in_pieces(model, ids):
    cache, start, hidden = KeyValueCache(ids.shape[1]), 0, []
    for piece in PIECES:
        hidden.append(model.model(ids[:, start : start + piece], cache=cache))
        start += piece
        assert cache.get_seq_length() == start
    return model.lm_head(torch.cat(hidden, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_logits_of_the_whole(case, dtype):
    model = decoder(**CASES[case], dtype=dtype)
    with torch.no_grad():
        whole = model(IDS)
    assert whole.std() > 0.05, "a model that says nothing proves nothing"
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    assert (in_pieces(model, IDS) - whole).abs().max() < tolerance * whole.abs().max()


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model, lengths, new = decoder(placement="hybrid"), [7, 3, 1], 4
    width = max(lengths)
    rows = [IDS[row, : length + new] for row, length in enumerate(lengths)]
    padding = torch.tensor([[width - length] for length in lengths])
    documents = (torch.arange(width + new) >= padding).long()
    positions = (torch.arange(width + new) - padding).clamp(min=0)
    padded = torch.full((len(rows), width + new), 59)
    for line, row in zip(padded, rows, strict=True):
        line[-len(row) :] = row
    cache = KeyValueCache(width + new)
    first = model.model(padded[:, :width], documents[:, :width], cache, positions[:, :width])
    second = model.model(padded[:, width:], documents, cache, positions[:, width:])
    found = model.lm_head(torch.cat((first, second), 1))
    for line, row in zip(found, rows, strict=True):
        assert (line[-len(row) :] - model(row[None])[0]).abs().max() < 1e-12


@torch.no_grad()
def test_rows_can_be_dropped():
    model, cache = decoder(), KeyValueCache(LENGTH)
    model.model(IDS[:, :9], cache=cache)
    cache.keep(torch.tensor([2, 0]))
    found = model.lm_head(model.model(IDS[[2, 0], 9:], cache=cache))
    assert (found - model(IDS[[2, 0]])[:, 9:]).abs().max() < 1e-12


@torch.no_grad()
def test_a_full_cache_says_so():
    model, cache = decoder(), KeyValueCache(10)
    model.model(IDS[:, :10], cache=cache)
    with pytest.raises(ValueError, match="room for 10 tokens and was given 11"):
        model.model(IDS[:, 10:11], cache=cache)


def test_positions_of_rows_are_distances():
    model = decoder(qk="rms")
    shifted = torch.arange(LENGTH) + torch.tensor([[0], [5], [40]])
    with torch.no_grad():
        assert (model.model(IDS, positions=shifted) - model.model(IDS)).abs().max() < 1e-10


def test_the_mask_of_the_last_tokens_is_the_end_of_the_mask_of_all():
    documents = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 2, 2]])
    assert torch.equal(document_mask(documents, 2), document_mask(documents)[:, :, -2:])
