"""Processes and groups: who shares what with whom."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nexa.config.schema import Config
from nexa.hardware import return_freed_memory
from nexa.parallel.timeouts import record_flights
from nexa.parallel.watch import Watch


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Ranks of one tensor-parallel group are consecutive (one node).

    Its methods are the ones DeepSpeed calls on an `mpu`. It must not have `initialize_sequence_parallel`:
    DeepSpeed takes the name's presence as a sign to ignore tensor parallelism.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    """`native` or `megatron`: whose layers and groups serve tensor parallelism."""
    tensor_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    """Gloo, for flags and messages of the host: never waits for a device."""
    watch: Watch = field(default_factory=Watch, compare=False)
    """Notices when another rank is lost."""

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.tensor_size

    @property
    def data_rank(self) -> int:
        """This process's place among the data-parallel ranks."""
        return self.rank // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """This process's place among the ranks that share a layer."""
        return self.rank % self.tensor_size

    @property
    def is_main(self) -> bool:
        """Rank 0 writes the run folder."""
        return self.rank == 0

    def get_model_parallel_rank(self) -> int:
        """DeepSpeed's name for `tensor_rank`."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """DeepSpeed's name for `tensor_size`."""
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name for `tensor_group`."""
        return self.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """DeepSpeed's name for `data_rank`."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """DeepSpeed's name for `data_size`."""
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name for `data_group`."""
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of `data_group`."""
        return dist.get_process_group_ranks(self.data_group)

    def get_pipeline_model_parallel_rank(self) -> int:
        """No pipeline."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """No pipeline."""
        return 1


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` is this rank's GPU where there is one, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def choose_backend(cfg: Config, device: torch.device) -> str:
    """Whose tensor-parallel layers `parallel.backend` means here; without tensor parallelism there are none."""
    if cfg.parallel.tensor == 1:
        return "native"
    if cfg.parallel.backend != "auto":
        return cfg.parallel.backend
    divides = cfg.model.intermediate_size % cfg.parallel.tensor == 0  # megatron-core has no uneven shares
    return "megatron" if device.type == "cuda" and divides else "native"


def _groups_of(size: int, world_size: int, timeout: timedelta) -> tuple[list[dist.ProcessGroup], ...]:
    """(tensor groups, data groups): every rank makes every group, in the same order."""
    blocks = [list(range(start, start + size)) for start in range(0, world_size, size)]
    strides = [list(range(offset, world_size, size)) for offset in range(size)]
    return (
        [dist.new_group(ranks, timeout=timeout) for ranks in blocks],
        [dist.new_group(ranks, timeout=timeout) for ranks in strides],
    )


def _threads(environment: Mapping[str, str], cores: int, local_world: int) -> int:
    """Threads of one process: what OMP_NUM_THREADS says, else its share of the cores. torchrun sets the variable to 1
    when it is not set, which is not anybody's wish."""
    wish = environment.get("OMP_NUM_THREADS", "")
    if wish.isdecimal() and int(wish) > 0 and (wish != "1" or "RANK" not in environment):
        return int(wish)
    return max(1, cores // local_world)


def connect(cfg: Config) -> Topology:
    """Join the process group under `torchrun`, or be a world of one without it; build all groups."""
    # deprecated names, of which the new ones are not in every version of PyTorch that serves
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(cfg.train.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        record_flights(Path(cfg.run.dir))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(_threads(os.environ, len(os.sched_getaffinity(0)), local_world))
    return_freed_memory()
    timeout = timedelta(seconds=cfg.parallel.timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # a world of one needs no port, so that many can start on one machine at once
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id, **alone)
    size, world_size = cfg.parallel.tensor, dist.get_world_size()
    tensor_layers = choose_backend(cfg, device)
    if tensor_layers == "megatron":
        from nexa.parallel.megatron import initialise_groups

        tensor_group, data_group = initialise_groups(size, timeout)
    else:
        tensor_groups, data_groups = _groups_of(size, world_size, timeout)
        tensor_group, data_group = tensor_groups[rank // size], data_groups[rank % size]
    world = dist.group.WORLD
    assert world is not None
    control = world if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    watch = Watch(float(cfg.parallel.patience_seconds))
    return Topology(rank, world_size, local_rank, device, tensor_layers, size, tensor_group, data_group, control, watch)


def disconnect() -> None:
    """Leave the process group; without it a rank now and then ends with an abort after a good run."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
