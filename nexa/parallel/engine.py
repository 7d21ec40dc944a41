"""The DeepSpeed engine behind six methods: the loop sees neither stages nor groups."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexa.checkpoint.fragment import Fragment
from nexa.config.schema import Config
from nexa.hardware import keep_freed_memory, return_freed_memory
from nexa.model.block import Block
from nexa.model.decoder import Decoder
from nexa.model.statistics import tensors_of
from nexa.numerics import total_norm
from nexa.optim.build import build, described, set_rate, settings
from nexa.optim.rule import RuleOptimizer, State
from nexa.parallel import private
from nexa.parallel.build import build_decoder
from nexa.parallel.deepspeed_config import alone, deepspeed_config, effective_stage
from nexa.parallel.noise import MicroBatchProbe
from nexa.parallel.norms import NormProbe, ParameterNorms
from nexa.parallel.one_rank import OneRank
from nexa.parallel.ownership import Ownership
from nexa.parallel.timing import ForwardTimer
from nexa.parallel.topology import Topology
from nexa.sharding import shard_of

logger = logging.getLogger("nexa")


CLIP_EPS = 1e-6
"""Added to the norm that clipping divides by, as PyTorch and DeepSpeed do."""


Judge = Callable[[Tensor], Tensor]
"""Shown the norm of the whole gradient before clipping, on the device; says there, the same on every rank, whether the
update is to be made (bool scalar). Called at most once a step, and may be collective."""


@dataclass(frozen=True)
class StepResult:
    """grad_norm: before clipping, on the device or the host. skipped: no update was made, after an fp16 overflow or by
    the judge. norms: of every parameter, when they were asked for and an update was made."""

    grad_norm: Tensor | float
    skipped: bool
    norms: dict[str, ParameterNorms] | None = None
    micro_squares: Tensor | None = None
    """Of a watched step (`Engine.watch_micro_batches`), what `MicroBatchProbe.finish` says."""


def _import_deepspeed(device_type: str) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device_type == "cpu":
        # DeepSpeed would compile a C++ op in init_distributed that only inference uses: 28 to 37 s, a hang when
        # an earlier build was killed, and a failure without a compiler.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


class Engine:
    """A model under ZeRO. `module` is the decoder; `device` where its inputs must be."""

    def __init__(self, cfg: Config, topology: Topology, *, initial: bool = True) -> None:
        """Build the model that `cfg` describes, sharded as `cfg.parallel` says.

        initial: with its initial weights; else they are 0, for a checkpoint to be loaded.
        """
        self.topology, self.device, self.config = topology, topology.device, cfg
        self.accumulation = cfg.accumulation(topology.data_size)
        self.stage, reason = effective_stage(cfg, topology.data_size)
        if reason is not None and topology.is_main:
            logger.info(reason)
        model = self.build(cfg, topology, initial=initial)
        if cfg.train.compile:
            model.compile_parts()
        model.model.recompute = cfg.train.activation_checkpointing
        optimizer = build(named_parameters=model.named_parameters(), **settings(cfg))
        if (cfg.optim.name, cfg.optim.width_rule) != ("adamw", "none") and topology.is_main:
            for line in described(optimizer):
                logger.info("%s, width rule %s: %s", cfg.optim.name, cfg.optim.width_rule, line)
        self._engine = self._around(model, optimizer)
        self.module: Decoder = self._engine.module
        if self.stage == 3 and cfg.train.activation_checkpointing == "selective":
            private.hide_gathers(self._engine)
        self._check_layout()
        self._ownership: Ownership | None = None
        if isinstance(optimizer, RuleOptimizer):
            optimizer.holder = self._ownership = Ownership(self._engine, topology)
        self._watched: MicroBatchProbe | None = None
        self.timer = ForwardTimer(self.device)
        if self.device.type == "cpu":
            # not before: kept memory between a model's parts would grow to a second model
            keep_freed_memory()

    def _around(self, model: Decoder, optimizer: torch.optim.Optimizer) -> Any:
        """DeepSpeed's engine, or what serves in its place."""
        if alone(self.config, self.topology.data_size):
            return OneRank(model, optimizer, self.accumulation)
        engine, *_ = self.prepare(self.topology).initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(self.config, self.topology.data_size, self.device.type),
            mpu=self.topology,
            dist_init_required=False,
        )
        return engine

    def release(self) -> None:
        """Give the memory back, for another engine in this process; this one cannot be used afterwards."""
        self._engine.destroy()
        del self._engine, self.module, self._ownership
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()

    @staticmethod
    def prepare(topology: Topology) -> Any:
        """The DeepSpeed module, ready for use on this rank; a second call costs nothing."""
        deepspeed = _import_deepspeed(topology.device.type)
        os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # DeepSpeed insists on it, also without torchrun
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        return deepspeed

    @classmethod
    def build(cls, cfg: Config, topology: Topology, *, initial: bool) -> Decoder:
        """This rank's share of the model; at stage 3 each matrix is partitioned before the next one is made."""
        if cfg.parallel.zero_stage < 3 or alone(cfg, topology.data_size):
            return build_decoder(cfg, topology, initial=initial, keep=lambda parameter: parameter)
        deepspeed, settings = cls.prepare(topology), deepspeed_config(cfg, topology.data_size, topology.device.type)

        def partition(parameter: nn.Parameter) -> nn.Parameter:
            holder = nn.ParameterList([parameter])
            group = topology.data_group
            deepspeed.zero.Init(module=holder, data_parallel_group=group, config_dict_or_path=settings, mpu=topology)
            return parameter

        decoder = build_decoder(cfg, topology, initial=initial, keep=partition)
        for block in decoder.model.layers:
            assert isinstance(block, Block)
            for parameter in block.borrowed():
                deepspeed.zero.register_external_parameter(block, parameter)
        if cfg.train.compile:
            # hooks that gather and free inside of a block would break up what is compiled: a block is gathered whole
            deepspeed.utils.set_z3_leaf_modules(decoder, [Block])
        return decoder

    def _check_layout(self) -> None:
        """The owned ranges of all data-parallel ranks must make up the whole model."""
        owned = torch.tensor([sum(r.stop - r.start for r in private.owned_ranges(self._engine))], dtype=torch.int64)
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        if self.stage > 0:
            owned = owned.to(self.device)
            dist.all_reduce(owned, group=self.topology.data_group)
        assert int(owned) == whole, f"DeepSpeed's layout changed: ranks own {int(owned)} of {whole} elements"

    def forward_backward(
        self, batch: dict[str, Tensor], scored_tokens: Tensor | float, row_weights: Tensor | None = None
    ) -> Tensor:
        """One micro-batch of b rows: add its share of the gradient of the mean loss.

        batch: arguments of `Decoder.forward` with labels, on `device`. scored_tokens: of the whole global
        batch. row_weights [b]: what each row's losses are multiplied by in the gradient; null is 1. Returns the summed
        loss of each row [b], without the weights, detached, on the device.
        """
        with self.timer.measured():
            total, rows = self._engine(**batch, row_weights=_ones(batch) if row_weights is None else row_weights)
        # DeepSpeed averages over data-parallel ranks and divides by the accumulation: undo both, so that the
        # gradient is that of (sum of losses) / (scored tokens) whatever the layout.
        share = total * (self.topology.data_size * self.accumulation / scored_tokens)
        self._engine.backward(share)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return rows

    def watch_micro_batches(self) -> None:
        """Before the first micro-batch of a step: let its result say how large the gradients of each of them are."""
        self._watched = MicroBatchProbe(self._engine, self.topology)

    def step(self, lr: float, measure: bool = False, judge: Judge | None = None) -> StepResult:
        """Clip and update with learning rate `lr`; with `measure` also take every parameter's norms (collective).

        judge: None wants a finite gradient. Without its consent no weight is touched and the step is a skipped one.
        """
        squares = None if self._watched is None else self._watched.finish()
        self._watched = None
        return replace(self._measured_step(lr, measure, judge or torch.isfinite), micro_squares=squares)

    def _measured_step(self, lr: float, measure: bool, judge: Judge) -> StepResult:
        if not measure:
            return self._step(lr, judge, measure)
        probe = NormProbe(self._engine, self.stage, self.topology)
        result = self._step(lr, judge, measure)
        if result.skipped:
            probe.finish(1.0)
            return result
        norm, clip = torch.as_tensor(result.grad_norm, device=self.device), self.config.train.grad_clip
        factor = (clip / (norm + CLIP_EPS)).clamp(max=1.0) if clip > 0 else 1.0
        return replace(result, norms=probe.finish(factor))

    def _step(self, lr: float, judge: Judge, measure: bool) -> StepResult:
        set_rate(private.client_optimizer(self._engine), lr)
        if self.stage == 0:
            norm = self._clip(measure)
            skipped = not bool(judge(norm))
            if isinstance(self._engine, OneRank):
                self._engine.step(not skipped)
                return StepResult(norm, skipped)
            if skipped:
                for parameter in self.module.parameters():
                    parameter.grad = None  # which an optimizer passes over
            self._engine.step()
            return StepResult(norm, skipped)
        with private.judged(self._engine, judge) as seen:
            self._engine.step()
        skipped = private.overflowed(self._engine)
        return StepResult(seen[0] if skipped and seen else private.gradient_norm(self._engine), skipped)

    @torch.no_grad()
    def _clip(self, measure: bool) -> Tensor:
        gradients = private.gradients_in_few_pieces(self._engine)
        if self.topology.tensor_size == 1:
            norm = total_norm(gradients)
        else:
            pairs = private.gradients(self._engine)
            # what all tensor ranks have whole counts on the first one
            first = self.topology.tensor_rank == 0
            square = total_norm(g for p, g in pairs if first or not shard_of(p).is_whole).square()
            dist.all_reduce(square, group=self.topology.tensor_group)
            norm = square.sqrt()
        if self.config.train.grad_clip > 0:
            factor = (self.config.train.grad_clip / (norm + CLIP_EPS)).clamp(max=1.0)
            if self.device.type != "cpu" or factor < 1:  # here looking costs nothing, and multiplying two passes
                if isinstance(self._engine, OneRank):
                    self._engine.divide(factor.reciprocal(), at_once=measure)
                else:
                    torch._foreach_mul_(gradients, factor)
        return norm

    @torch.no_grad()
    def row_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss of each row [b] of a batch without gradients, in evaluation mode."""
        self.module.eval()
        _, rows = self.module(**batch, row_weights=_ones(batch))
        self.module.train()
        assert isinstance(rows, Tensor)
        return rows

    def total_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss of a batch without gradients, in evaluation mode."""
        return self.row_losses(batch).sum()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter and statistic, by checkpoint name."""
        return {name: shard_of(tensor).shape for name, tensor in tensors_of(self.module)}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every optimizer state that one rank has whole, by `<state>/<parameter>`."""
        return {} if self._ownership is None else dict(self._ownership.state_shapes)

    def fragments(self) -> list[Fragment]:
        """Live views of the master weights and optimizer state this rank owns, made if there are none yet.

        Statistics of the model are weights without a state, which every data-parallel rank has. States of rules on
        whole tensors are fragments of their own, `<state>/<parameter>`.
        """
        result = []
        for owned in private.owned_ranges(self._engine):
            shard = shard_of(owned.parameter)
            start, stop = (min(at, shard.numel) for at in (owned.start, owned.stop))  # behind it is padding
            window = slice(owned.offset, owned.offset + stop - start)
            tensors = {"weight": owned.holder.data.view(-1)[window]}
            scalars = {}
            for key, value in self._state_of(owned).items():
                if torch.is_tensor(value) and value.numel() == owned.holder.numel() and value.dim() > 0:
                    tensors[key] = value.view(-1)[window]
                else:
                    scalars[key] = float(value)
            result.append(Fragment(owned.name, shard, start, stop, tensors, scalars))
        for name, buffer in self.module.named_buffers():
            flat = {"weight": buffer.detach().view(-1)}
            result.append(Fragment(name, shard_of(buffer), 0, buffer.numel(), flat, {}))
        return result + ([] if self._ownership is None else self._ownership.fragments())

    def _state_of(self, owned: private.OwnedRange) -> State:
        """Of the holder, made if there is none yet; nothing where an owner has it."""
        if self._ownership is not None and owned.name in self._ownership.owner:
            return {}
        state: State = private.client_optimizer(self._engine).state[owned.holder]
        if not state:
            state.update(self._fresh(owned))
        return state

    def _fresh(self, owned: private.OwnedRange) -> State:
        if self._ownership is None:
            return _fresh_adamw(owned.holder)
        return self._ownership.rules[owned.name].fresh(owned.holder)

    def finish_load(self, scalars: dict[str, dict[str, float]]) -> None:
        """After the fragments were written: set per-parameter scalars and refresh the working weights."""
        optimizer = private.client_optimizer(self._engine)
        for owned in private.owned_ranges(self._engine):
            for key, value in scalars.get(owned.name, {}).items():
                old = optimizer.state[owned.holder][key]
                optimizer.state[owned.holder][key] = torch.full_like(old, value) if torch.is_tensor(old) else value
        private.publish_master_weights(self._engine)


def _ones(batch: dict[str, Tensor]) -> Tensor:
    """The weights of rows that all count as they are, [b]."""
    labels = batch["labels"]
    return torch.ones(len(labels), device=labels.device)


def _fresh_adamw(holder: Tensor) -> State:
    """The state of PyTorch's own AdamW before its first step, as it makes it with fused=True."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=holder.device),
        "exp_avg": torch.zeros_like(holder, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(holder, memory_format=torch.preserve_format),
    }
