"""Activation checkpointing: what a block keeps for its backward pass and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
EXPENSIVE = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What `selective` keeps: matrix products and attention. Norms, rotation and the activation function are cheap."""


def _policy(ctx: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _plain(block: nn.Module, *args: Any) -> Tensor:
    result: Tensor = block(*args)
    return result


def _checkpointed(block: nn.Module, *args: Any, **options: Any) -> Tensor:
    result: Tensor = checkpoint(block, *args, use_reentrant=False, **options)
    return result


RECOMPUTE: dict[str, Callable[..., Tensor]] = {
    "none": _plain,
    "full": _checkpointed,
    "selective": partial(_checkpointed, context_fn=partial(create_selective_checkpoint_contexts, _policy)),
}
"""`train.activation_checkpointing` -> how to run a block on its arguments."""
