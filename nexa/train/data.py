"""From configured sources to this rank's micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batches import Batch, TrainBatches, ValidationRows, unique_names
from data_pipeline.embedded import embedded_store
from data_pipeline.store import PackedStore, available_splits, open_store
from data_pipeline.tokenizer import load_tokenizer
from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.parallel.topology import Topology

TensorBatch = dict[str, Tensor]


@dataclass(frozen=True)
class StepData:
    """This rank's share of one global batch, on the host."""

    micro_batches: list[TensorBatch]


def to_tensors(batch: Batch, pin: bool = False) -> TensorBatch:
    """Arguments of `Decoder.forward`, on the host."""
    tensors = {"input_ids": torch.from_numpy(batch.input_ids), "labels": torch.from_numpy(batch.labels)}
    if batch.document_ids is not None:
        tensors["document_ids"] = torch.from_numpy(batch.document_ids)
    return {key: value.pin_memory() for key, value in tensors.items()} if pin else tensors


class TrainingData:
    """Rows of each global batch dealt to data-parallel ranks: micro-batch m of rank r has rows
    [(m D + r) b, (m D + r + 1) b) with D ranks and micro-batches of b rows. What the global batch holds
    does not depend on any of these numbers."""

    def __init__(self, cfg: Config, topology: Topology, sources: Sources) -> None:
        """Raises UserError for a store that holds less than one sequence."""
        self._order = partial(
            TrainBatches,
            sources.stores,
            sources.weights,
            sequence_length=cfg.data.sequence_length,
            global_batch_size=cfg.train.global_batch_size,
            seed=cfg.train.seed,
            document_mask=cfg.data.document_mask,
            vocab_size=cfg.model.vocab_size,
            packing=cfg.data.packing,
        )
        self._batches = self._order()
        self._topology, self._micro, self._global = topology, cfg.train.micro_batch_size, cfg.train.global_batch_size
        self._accumulation = self._global // (self._micro * topology.data_size)
        every_target = cfg.data.packing == "chunk" and not cfg.data.document_mask
        self._constant = self._global * cfg.data.sequence_length if every_target else None
        self._pin = topology.device.type == "cuda"

    def continue_from(self, step: int, samples: int) -> None:
        """Let step `step` begin with sample number `samples` of the order, as after a changed batch size."""
        self._batches = self._order(first_sample=samples - step * self._global)

    def fetch(self, step: int) -> StepData:
        """This rank's micro-batches of step `step`; pure, and safe to call from another thread."""
        size, rank = self._topology.data_size, self._topology.data_rank
        micro_batches = []
        for index in range(self._accumulation):
            first = (index * size + rank) * self._micro
            rows = self._batches.rows(step, first, first + self._micro)
            micro_batches.append(to_tensors(rows, self._pin))
        return StepData(micro_batches)

    def scored_tokens(self, data: StepData, device: torch.device) -> Tensor | float:
        """Target tokens of the global batch that count in the loss; a sum over ranks only where they vary."""
        if self._constant is not None:
            return float(self._constant)
        local = sum(int((batch["labels"] >= 0).sum()) for batch in data.micro_batches)
        count = torch.tensor(float(local), device=device)
        dist.all_reduce(count, group=self._topology.data_group)
        return count

    def sample_ids(self, step: int) -> list[tuple[str, int]]:
        """(source, sample) of every row of step `step`, over all ranks."""
        return self._batches.sample_ids(step)

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Target tokens taken from each source before step `step`."""
        return self._batches.tokens_by_source(step)


def source_paths(cfg: Config, topology: Topology) -> list[tuple[Path, float]]:
    """(packed store, weight) of every training source; the embedded corpus is built on first use."""
    source = cfg.data.source
    if isinstance(source, list):
        return [(Path(part.path), part.weight) for part in source]
    if source != "embedded":
        return [(Path(source), 1.0)]
    size = cfg.data.tokenizer_vocab_size or min(cfg.model.vocab_size, 2048)
    if topology.local_rank == 0:
        embedded_store(cfg.data.cache_dir, size)
    dist.barrier(group=topology.control_group)
    return [(embedded_store(cfg.data.cache_dir, size), 1.0)]


@dataclass(frozen=True)
class Sources:
    """Training stores, where they are and how much of each."""

    paths: list[Path]
    stores: list[PackedStore]
    weights: list[float]


def open_sources(cfg: Config, topology: Topology) -> Sources:
    """Training stores. Raises UserError for a vocabulary larger than the model's."""
    paths = source_paths(cfg, topology)
    stores = [open_store(path) for path, _ in paths]
    for store in stores:
        if store.vocab_size is not None and store.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the vocabulary of {store.name} "
                f"({store.vocab_size} tokens): set model.vocab_size to at least {store.vocab_size}"
            )
    _one_tokenizer(cfg, stores)
    return Sources([path for path, _ in paths], stores, [weight for _, weight in paths])


def _one_tokenizer(cfg: Config, stores: list[PackedStore]) -> None:
    """Token ids must mean the same in every source, and what `data.tokenizer` says they mean."""
    known = [(store.location, store.tokenizer_hash) for store in stores if store.tokenizer_hash is not None]
    if cfg.data.tokenizer is not None:
        known.insert(0, (f"data.tokenizer={cfg.data.tokenizer}", load_tokenizer(cfg.data.tokenizer).hash))
    for place, digest in known[1:]:
        if digest != known[0][1]:
            raise UserError(
                f"{place} was tokenised with another tokenizer than {known[0][0]} ({digest} against {known[0][1]}); "
                "prepare the sources with one tokenizer, or set data.tokenizer=null to take the store's own"
            )


class ValidationSet:
    """A fixed run of sequences from one split; the same whatever the batch size or layout."""

    def __init__(self, cfg: Config, topology: Topology, store: PackedStore, name: str) -> None:
        """name: in the metrics, where two stores must not share one."""
        limit = cfg.eval.batches * cfg.train.global_batch_size or None
        self.name = name
        self._rows = ValidationRows(
            store,
            cfg.data.sequence_length,
            limit,
            document_mask=cfg.data.document_mask,
            packing=cfg.eval.packing or cfg.data.packing,
        )
        self._topology, self._micro, self._global = topology, cfg.train.micro_batch_size, cfg.train.global_batch_size

    def __len__(self) -> int:
        """Rows, over all ranks."""
        return len(self._rows)

    def batches(self, global_batches: int | None = None) -> list[TensorBatch]:
        """This rank's batches: every rank has the same number, the surplus is rows that score nothing.

        global_batches: only of the first so many global batches.
        """
        rows = len(self._rows) if global_batches is None else min(len(self._rows), global_batches * self._global)
        stride = self._micro * self._topology.data_size
        first = self._topology.data_rank * self._micro
        return [
            to_tensors(self._rows.rows(start + first, start + first + self._micro)) for start in range(0, rows, stride)
        ]


def open_validation(cfg: Config, topology: Topology, sources: Sources) -> list[ValidationSet]:
    """Validation sets: the stores of `eval.sources`, else the validation split of every training source.

    A store named in `eval.sources` without a validation split is scored on its train split. Training
    sources without one are left out, and it is an error when none is left.
    """
    if cfg.eval.sources is not None:
        found = [
            open_store(path, "validation" if "validation" in available_splits(path) else "train")
            for path in cfg.eval.sources
        ]
    else:
        found = [open_store(path, "validation") for path in sources.paths if "validation" in available_splits(path)]
        if not found and (cfg.eval.every > 0 or cfg.eval.at_end):
            raise UserError(
                "eval: no training source has a validation split; set eval.sources=[<packed store>], prepare the data "
                "with a validation fraction, or switch evaluation off with eval.every=0 eval.at_end=false"
            )
    return [ValidationSet(cfg, topology, *one) for one in zip(found, unique_names(found), strict=True)]
