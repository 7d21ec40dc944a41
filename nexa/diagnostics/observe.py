"""Measures as witnesses of a forward pass: hooks that are there while it runs and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nexa.diagnostics.base import Measure, Part, Seen, Sharing
from nexa.model.attention import AttentionContext
from nexa.model.block import Block
from nexa.model.decoder import Decoder


@contextmanager
def uncompiled(decoder: nn.Module) -> Iterator[None]:
    """Run compiled parts as plain PyTorch inside: compiled code does not see hooks that come later."""
    parts = [module for module in decoder.modules() if module._compiled_call_impl is not None]
    kept = [part._compiled_call_impl for part in parts]
    try:
        for part in parts:
            part._compiled_call_impl = None
        yield
    finally:
        for part, compiled in zip(parts, kept, strict=True):
            part._compiled_call_impl = compiled


def joined(block: Block) -> dict[Part, tuple[nn.Module, Tensor | float]]:
    """The modules whose outputs a block adds to its skip paths, and what it multiplies them with before."""
    attn, mlp = block.plan.attn, block.plan.mlp
    return {
        "attention": (
            block.attn_norm["output"] if attn.output else block.self_attn,
            attn.branch_scale if block.attn_scale is None else block.attn_scale,
        ),
        "feed_forward": (
            block.mlp_norm["output"] if mlp.output else block.mlp,
            mlp.branch_scale if block.mlp_scale is None else block.mlp_scale,
        ),
    }


class Observer:
    """Shows the forward passes of a decoder to measures."""

    def __init__(self, decoder: Decoder, measures: Sequence[Measure], sharing: Sharing) -> None:
        """The measures see whole streams, whatever share of the tokens this process has."""
        self._decoder, self._measures, self._sharing = decoder, measures, sharing

    @contextmanager
    def watching(self, seen: Seen) -> Iterator[None]:
        """A forward pass of the batch `seen` inside is shown, if it is `uncompiled`."""
        with ExitStack() as stack:
            for number, module in enumerate(self._decoder.model.layers):
                assert isinstance(module, Block)
                self._watch(number, module, seen, stack)
            yield

    def _watch(self, number: int, block: Block, seen: Seen, stack: ExitStack) -> None:
        def until_done(handle: Any) -> None:
            stack.callback(handle.remove)

        if number == 0:
            until_done(block.register_forward_pre_hook(partial(self._first, seen)))
        until_done(block.register_forward_hook(partial(self._output, seen, partial(self._stream, number + 1), 1.0)))
        for part, (module, scale) in joined(block).items():
            tell = partial(self._added, number, part)
            until_done(module.register_forward_hook(partial(self._output, seen, tell, scale)))
        block.self_attn.watch = partial(self._attention, seen, number)
        stack.callback(delattr, block.self_attn, "watch")

    def _first(self, seen: Seen, module: nn.Module, args: tuple[Tensor, AttentionContext]) -> None:
        seen.context = args[1]
        self._output(seen, partial(self._stream, 0), 1.0, module, (), args[0])

    @torch.no_grad()
    def _output(
        self,
        seen: Seen,
        tell: Callable[[Tensor, Seen], None],
        scale: Tensor | float,
        module: nn.Module,
        args: Any,
        output: Tensor,
    ) -> None:
        scaled = output if isinstance(scale, float) and scale == 1.0 else output * scale
        tokens = seen.rows(self._sharing.whole(scaled))
        if seen.lengths:
            tell(tokens, seen)

    def _stream(self, number: int, h: Tensor, seen: Seen) -> None:
        for measure in self._measures:
            measure.stream(number, h, seen)

    def _added(self, block: int, part: Part, y: Tensor, seen: Seen) -> None:
        for measure in self._measures:
            measure.added(block, part, y, seen)

    @torch.no_grad()
    def _attention(self, seen: Seen, block: int, q: Tensor, k: Tensor, scale: float) -> None:
        for measure in self._measures if seen.lengths else []:
            measure.attention(block, q, k, scale, seen)
