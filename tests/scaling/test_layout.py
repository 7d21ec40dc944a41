"""What a rank holds: counts by hand, and the parts of all ranks make the whole."""

import math

import pytest

from nexa.model.decoder import Decoder, parameter_count
from nexa.scaling.layout import full_shapes, local_shape, sizes
from tests.scaling.common import configuration, layout


def test_counts_of_a_whole_model():
    cfg = configuration()
    found = sizes(cfg, full_shapes(cfg.model, cfg.norm), 1)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80 + 2 * 32
    assert found.blocks == (block, block)
    assert (found.embedding, found.head) == (320 * 32, 320 * 32 + 32)
    assert (
        found.total
        == parameter_count(cfg.model, cfg.norm)
        == sum(p.numel() for p in Decoder(cfg.model, cfg.norm).parameters())
    )
    assert found.largest == 320 * 32
    assert found.group == found.total - 320 * 32 - 5 * 32  # the embedding and the norms do not decay


def test_counts_of_a_tensor_parallel_rank():
    cfg = configuration()
    found = sizes(cfg, full_shapes(cfg.model, cfg.norm), 2)
    assert found.blocks[0] == (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80) // 2 + 2 * 32
    assert found.embedding == 160 * 32


def test_keys_and_values_stay_whole_when_they_cannot_be_dealt():
    assert local_shape("model.layers.0.self_attn.k_proj.weight", (16, 32), 4, 2) == (16, 32)
    assert local_shape("model.layers.0.self_attn.k_proj.weight", (16, 32), 2, 2) == (8, 32)
    assert local_shape("model.layers.0.self_attn.q_proj.weight", (32, 32), 4, 2) == (8, 32)
    assert local_shape("model.layers.0.self_attn.gate_proj.weight", (4, 32), 2, 2) == (2, 32)
    assert local_shape("model.layers.0.mlp.down_proj.weight", (32, 80), 4, 2) == (32, 20)
    assert local_shape("model.norm.weight", (32,), 4, 2) == (32,)
    assert local_shape("model.layers.0.self_attn.k_proj.bias", (16,), 4, 2) == (16,)
    assert local_shape("model.layers.0.mlp.up_proj.bias", (81,), 2, 2) == (41,)
    assert local_shape("model.norm.bias", (32,), 4, 2) == (32,)


@pytest.mark.parametrize("tensor", [2, 3, 4, 7])
def test_vocabulary_rows_are_padded_up(tensor):
    rows = local_shape("lm_head.weight", (320, 32), tensor, 2)[0]
    assert rows * tensor >= 320 > (rows - 1) * tensor
    assert rows == math.ceil(320 / tensor)


def test_a_tied_head_counts_once():
    cfg = configuration(model={"tie_word_embeddings": True})
    assert sizes(cfg, full_shapes(cfg.model, cfg.norm), 1).head == 32


def test_ranks_and_micro_batches():
    cfg = configuration(train={"global_batch_size": 48, "micro_batch_size": 2}, parallel={"tensor": 2})
    found = layout(cfg, world=8)
    assert (found.data, found.accumulation, found.tokens) == (4, 6, 32)
