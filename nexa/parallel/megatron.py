"""The same layers from megatron-core, without Transformer Engine or Apex.

Its column layer would communicate by itself, once for each of query, key and value; here it is told not to, and
megatron-core's own mappings enter the sublayer once. Parameters, names, marks and initial weights are those of
`NativeLayers`, as the tests compare.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexa.model.layers import Features, Head
from nexa.model.loss import IGNORED
from nexa.parallel.layers import Crossing, NativeLayers, VocabularyHead, mark_rows, vocabulary_share


def _import_megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every optional package that is not there
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.model_parallel_config import ModelParallelConfig
    return parallel_state, tensor_parallel, ModelParallelConfig


def initialise_groups(tensor_size: int, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """megatron-core's (tensor group, data group) of this rank; its loss looks its group up by itself."""
    parallel_state, _, _ = _import_megatron()
    if not torch.cuda.is_available():
        # megatron-core asks CUDA where to put gathered tokens
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    if parallel_state.model_parallel_is_initialized():  # another run in this process
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size, distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60))
    )
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()


def _output_only(layer: type[nn.Module]) -> type[nn.Module]:
    """`layer`, whose forward gives (output, bias), with one that gives the output, and no state but its weight."""

    class OutputOnly(layer):  # type: ignore[valid-type, misc]
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x)[0]
            return output

    OutputOnly.__name__ = layer.__name__
    return OutputOnly


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def megatron_kernel(logits: Tensor, labels: Tensor, weights: Tensor, words: Features) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core's cross-entropy as a kernel of `nexa.model.loss`: logits [N, rows], labels [N] of all words."""
    _, tensor_parallel, _ = _import_megatron()
    scored = labels != IGNORED
    wide = logits.detach().float()
    wide[:, words.local :] = torch.finfo(wide.dtype).min
    with torch.enable_grad():
        wide.requires_grad_()
        # a copy: the function works in its argument's memory
        losses = tensor_parallel.vocab_parallel_cross_entropy(wide.clone()[:, None], labels.clamp_min(0)[:, None])
        losses = losses[:, 0] * scored
        total = torch.dot(losses, weights)
        (gradient,) = torch.autograd.grad(total, wide)
    return total.detach(), losses.detach(), gradient.to(logits.dtype)


class MegatronLayers(NativeLayers):
    """Shares of layers made by megatron-core, whose groups must be initialised."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool, device: torch.device | str | None = None) -> None:
        """As `NativeLayers`."""
        super().__init__(group, sequence, device)
        _, self._library, config = _import_megatron()
        shared = {
            "tensor_model_parallel_size": self.tensor_size,
            "use_cpu_initialization": True,  # allocate where torch's default device is
            "perform_initialization": False,
            "params_dtype": torch.float32,
            "gradient_accumulation_fusion": False,
        }
        self._row_config = config(sequence_parallel=sequence, **shared)
        self._column_config = config(sequence_parallel=False, **shared)

    @property
    def enter(self) -> Crossing:
        """megatron-core's gather, or copy."""
        if self.sequence:
            return partial(self._library.gather_from_sequence_parallel_region, group=self.group)
        return partial(self._library.copy_to_tensor_model_parallel_region, group=self.group)

    def column(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """megatron-core's ColumnParallelLinear."""
        with torch.device(self.device or "cpu"):
            layer = _output_only(self._library.ColumnParallelLinear)(
                in_features,
                out_features,
                config=self._column_config,
                init_method=None,
                bias=bias,
                disable_grad_reduce=True,
                tp_group=self.group,
            )
        mark_rows(self.features(out_features), layer, in_features)
        return layer

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """megatron-core's RowParallelLinear."""
        with torch.device(self.device or "cpu"):
            layer = _output_only(self._library.RowParallelLinear)(
                in_features,
                out_features,
                config=self._row_config,
                init_method=None,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=self.group,
            )
        self.features(in_features).mark(_weight(layer), 1, (out_features, in_features))
        return layer

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """megatron-core's VocabParallelEmbedding."""
        words, rows = vocabulary_share(vocabulary, self.rank, self.tensor_size)
        with torch.device(self.device or "cpu"):
            layer: nn.Module = self._library.VocabParallelEmbedding(
                rows * self.tensor_size, width, init_method=None, config=self._column_config, tp_group=self.group
            )
        if self.sequence:
            # its own reduce-scatter would deal out positions; here it is tokens, in the order of the batch
            scatter = partial(self._library.scatter_to_sequence_parallel_region, group=self.group)
            layer.register_forward_hook(lambda module, inputs, output: scatter(output.flatten(0, 1)))
        words.mark(_weight(layer), 0, (vocabulary, width))
        return layer

    def head(self, width: int, vocabulary: int, bias: bool = False) -> Head:
        """The head in chunks, with megatron-core's cross-entropy."""
        layer = super().head(width, vocabulary, bias)
        assert isinstance(layer, VocabularyHead)
        layer.kernel = partial(megatron_kernel, words=layer.words)
        return layer
