"""What the hardware can do at best, and how much memory is in use."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Peak:
    """Dense matrix FLOP/s of a GPU, without sparsity, by precision; fp32 without TF32. None: it has no such unit."""

    name: str
    """Regular expression for the whole device name as CUDA reports it, without the vendor."""
    bf16: float | None
    fp16: float | None
    fp32: float
    source: str


_NVL = "H100 NVL product brief, half of the figure with sparsity"
_HOPPER = "H100 data sheet, half of the figure with sparsity"
PEAKS = (
    Peak(r"(Tesla )?V100-SXM2-\d+GB(-LS)?", None, 125e12, 15.7e12, "V100 data sheet"),
    Peak(r"(Tesla )?V100-PCIE-\d+GB", None, 112e12, 14.0e12, "V100 data sheet"),
    Peak(r"(Tesla )?T4", None, 65e12, 8.1e12, "T4 data sheet"),
    Peak(r"A100-(SXM4?|PCIE)-\d+GB|A100 \d+GB PCIe", 312e12, 312e12, 19.5e12, "A100 data sheet"),
    Peak(r"A10", 125e12, 125e12, 31.2e12, "A10 data sheet"),
    Peak(r"A10G", 70e12, 70e12, 31.5e12, "A10G data sheet"),
    Peak(r"A30", 165e12, 165e12, 10.3e12, "A30 data sheet"),
    Peak(r"A40", 149.7e12, 149.7e12, 37.4e12, "A40 data sheet"),
    Peak(r"RTX A6000", 154.8e12, 154.8e12, 38.7e12, "RTX A6000 data sheet"),
    Peak(r"L4", 121e12, 121e12, 30.3e12, "L4 data sheet, half of the figure with sparsity"),
    Peak(r"L40", 181e12, 181e12, 90.5e12, "L40 data sheet"),
    Peak(r"L40S", 362e12, 362e12, 91.6e12, "L40S data sheet"),
    Peak(r"GeForce RTX 3090", 71e12, 71e12, 35.6e12, "GA102 whitepaper, fp32 accumulation"),
    Peak(r"GeForce RTX 4090", 165.2e12, 165.2e12, 82.6e12, "Ada whitepaper, fp32 accumulation"),
    Peak(r"H100 PCIe", 756e12, 756e12, 51e12, _HOPPER),
    Peak(r"H100 NVL", 835e12, 835e12, 60e12, _NVL),
    Peak(r"H100( SXM5)? \d+GB HBM3", 989e12, 989e12, 67e12, _HOPPER),
    Peak(r"GH200( \d+GB)?( HBM3e?)?", 989e12, 989e12, 67e12, "GH200 data sheet, half of the figure with sparsity"),
    Peak(r"H200( SXM)?", 989e12, 989e12, 67e12, "H200 data sheet, half of the figure with sparsity"),
    Peak(r"H200 NVL", 835e12, 835e12, 60e12, "H200 data sheet, half of the figure with sparsity"),
    Peak(r"B200", 2250e12, 2250e12, 75e12, "HGX B200 data sheet, an eighth of its dense figure"),
)


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a GPU besides its peak FLOP/s; data sheet figures, decimal units."""

    name: str
    """As users write it."""
    device: str
    """As CUDA reports it, for `peak_of`."""
    memory: float
    """Bytes. CUDA reports a few per cent more on some (80 GB are 79.6 GiB on an H100)."""
    bandwidth: float
    """Bytes per second of the memory."""
    link: float | None
    """Bytes per second and direction to the other GPUs of a node over NVLink, half of the sum that data sheets give;
    None where that depends on the machine."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", "B200", 180e9, 8.0e12, 900e9, "HGX B200 data sheet, an eighth of it"),
        Gpu("H200", "H200", 141e9, 4.8e12, 450e9, "H200 data sheet"),
        Gpu("H200-NVL", "H200 NVL", 141e9, 4.8e12, None, "H200 data sheet; NVLink bridges join 2 or 4"),
        Gpu("GH200", "GH200 480GB", 96e9, 4.0e12, None, "GH200 data sheet, 96 GB HBM3"),
        Gpu("H100", "H100 80GB HBM3", 80e9, 3.35e12, 450e9, "H100 data sheet, SXM"),
        Gpu("H100-PCIe", "H100 PCIe", 80e9, 2.0e12, None, "H100 data sheet; NVLink bridges join 2"),
        Gpu("H100-NVL", "H100 NVL", 94e9, 3.9e12, None, "H100 data sheet; NVLink bridges join 2"),
        Gpu("A100-80GB", "A100-SXM4-80GB", 80e9, 2.039e12, 300e9, "A100 data sheet, SXM"),
        Gpu("A100-40GB", "A100-SXM4-40GB", 40e9, 1.555e12, 300e9, "A100 data sheet, SXM"),
        Gpu("A100-80GB-PCIe", "A100 80GB PCIe", 80e9, 1.935e12, None, "A100 data sheet; NVLink bridges join 2"),
        Gpu("V100-32GB", "Tesla V100-SXM2-32GB", 32e9, 0.9e12, 150e9, "V100 data sheet"),
        Gpu("V100-16GB", "Tesla V100-SXM2-16GB", 16e9, 0.9e12, 150e9, "V100 data sheet"),
        Gpu("A40", "A40", 48e9, 0.696e12, None, "A40 data sheet; NVLink bridges join 2"),
        Gpu("A30", "A30", 24e9, 0.933e12, None, "A30 data sheet; NVLink bridges join 2"),
        Gpu("A10", "A10", 24e9, 0.6e12, None, "A10 data sheet, no NVLink"),
        Gpu("L40S", "L40S", 48e9, 0.864e12, None, "L40S data sheet, no NVLink"),
        Gpu("L40", "L40", 48e9, 0.864e12, None, "L40 data sheet, no NVLink"),
        Gpu("L4", "L4", 24e9, 0.3e12, None, "L4 data sheet, no NVLink"),
        Gpu("RTX-A6000", "RTX A6000", 48e9, 0.768e12, None, "RTX A6000 data sheet; NVLink bridges join 2"),
        Gpu("RTX-4090", "GeForce RTX 4090", 24e9, 1.008e12, None, "RTX 4090 specifications, no NVLink"),
        Gpu("RTX-3090", "GeForce RTX 3090", 24e9, 0.936e12, None, "RTX 3090 specifications; NVLink bridges join 2"),
    )
}
"""Name -> GPU, for plans. Others are unknown: a plan for them has no times, and takes their memory from the user."""


def peak_of(name: str, precision: str) -> tuple[float | None, str]:
    """(dense FLOP/s, source) of a GPU by the name CUDA gives it; (None, reason) when it is not known exactly."""
    bare = name.removeprefix("NVIDIA ").strip()
    for peak in PEAKS:
        if re.fullmatch(peak.name, bare):
            value: float | None = getattr(peak, precision)
            return value, f"{name}, {precision} dense: {peak.source}" if value else f"{name} has no {precision} units"
    return None, f"no data sheet figure for {name} in nexa/hardware.py"


def peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """(peak FLOP/s, its source) of `device` for `precision` (fp32, bf16, fp16), the divisor of the MFU.

    (None, reason) for CPUs and for GPUs without an entry: their MFU is n/a, never that of another device.
    """
    assert precision in PRECISIONS
    if device.type != "cuda":
        return None, "a CPU's peak depends on clock and cores; nexa states none"
    import torch

    return peak_of(torch.cuda.get_device_name(device), precision)


@functools.cache
def cpu_units() -> frozenset[str]:
    """What the CPU can do, by PyTorch's names, as `avx512_f` or `amx_bf16`; empty where it does not tell."""
    return frozenset(name for name, there in _cpu().items() if there is True)


def cpu_name() -> str:
    """As the CPU itself gives it, from its vendor on; empty where PyTorch does not tell."""
    return str(_cpu().get("cpu_name", ""))


def _cpu() -> dict[str, Any]:
    import torch

    tell = getattr(torch.cpu, "get_capabilities", None)
    return dict(tell()) if tell else {}


def memory_gib(device: torch.device) -> float:
    """GiB: peak allocated on a GPU since the start, else the process's resident memory now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what PyTorch frees on the CPU, for the rest of the process; whether that was possible.

    CPU tensors have no caching allocator, and glibc gives every freed block above 32 MiB back to the kernel, which
    zeroes its pages again in the next step. Resident memory then stays at its peak. Call it before training.
    What is allocated from then on is in pages of 2 MiB where the kernel gives them on request: a step is faster by
    2 to 5 %, because fewer pages have fewer addresses to look up.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    kept = _mallopt(m_mmap_max, 0) and _mallopt(m_trim_threshold, -1)
    if kept:
        _ask_for_large_pages()
    return kept


def _ask_for_large_pages() -> None:
    """Grow the heap by as many addresses as there is memory, and advise the kernel to use large pages for them.

    Addresses cost nothing until they are used, unless the kernel counts promises (overcommit mode 2) or glibc fills
    what it gives out, to find faults. One request for all: a heap that grows later would grow without the advice.
    """
    import ctypes

    import psutil

    mode = Path("/proc/sys/vm/overcommit_memory")
    counts_promises = not mode.exists() or mode.read_text(encoding="ascii").strip() == "2"
    fills = "MALLOC_PERTURB_" in os.environ or "malloc.perturb" in os.environ.get("GLIBC_TUNABLES", "")
    if counts_promises or fills:
        return
    page, size, madv_hugepage = os.sysconf("SC_PAGE_SIZE"), psutil.virtual_memory().available, 14  # <sys/mman.h>
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:  # a limit on addresses: small pages do as well
        return
    start = -(-block // page) * page
    libc.madvise(start, size - page - (start - block), madv_hugepage)  # a kernel without large pages says no
    libc.free(block)


def return_freed_memory() -> bool:
    """Let glibc give every block from 1 MiB on back to the kernel when it is freed; whether that was possible.

    Its own threshold grows with what is freed, and matrices that are made one after the other, each leaving a part
    behind, then leave holes in the heap that no later one fits: a whole model's worth. For the time of building one.
    """
    m_mmap_threshold = -3
    return _mallopt(m_mmap_threshold, 1 << 20)


def _mallopt(option: int, value: int) -> bool:
    import ctypes

    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (AttributeError, OSError):  # macOS, musl
        return False
