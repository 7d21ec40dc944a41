"""`nexa doctor`: what this machine offers, what is in use, and why the rest is not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "deepspeed", "megatron-core", "transformers", "hydra-core", "datasets", "tokenizers", "wandb")
OPTIONAL = {
    "flash-attn": "faster attention on GPUs; pip install 'nexa[gpu]'",
    "triton": "torch.compile on GPUs; comes with torch for CUDA",
    "tensorboard": "log.tensorboard=true; pip install 'nexa[tensorboard]'",
    "transformer-engine": "not used by nexa",
    "apex": "not used by nexa",
}
Section = dict[str, Any]


def add_parser(subparsers: Any) -> None:
    """Add the `doctor` command."""
    about = "Versions, devices, kernels in use and why not the others, the peak FLOP/s behind the MFU. Changes nothing."
    parser = subparsers.add_parser("doctor", help="what this machine offers and what is in use", description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 whatever is missing."""
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, section in found.items():
        print(title)
        width = max(map(len, section))
        for key, value in section.items():
            print(f"  {key:<{width}}  {_text(value)}")
    return 0


def _text(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def report() -> dict[str, Section]:
    """Section -> name -> finding, in JSON types."""
    return {
        "versions": versions(),
        "devices": devices(),
        "attention": attention(),
        "compile": compilers(),
        "peak for MFU": peaks(),
        "places": places(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Section:
    """Python and packages; what is absent says what it would be for."""
    import nexa

    found: Section = {"nexa": nexa.__version__, "python": f"{platform.python_version()} ({sys.executable})"}
    for package in REQUIRED:
        found[package] = _version(package) or "MISSING: run `make setup`"
    for package, purpose in OPTIONAL.items():
        found[package] = _version(package) or f"not installed ({purpose})"
    return found


def devices() -> Section:
    """GPUs, and what the CPU can do in half precision."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: Section = {
        "cpu": f"{usable} usable cores, torch uses {torch.get_num_threads()} threads",
        "cpu bf16": _cpu_bf16(),
    }
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found["gpu"] = "none found" if built else f"none: torch {torch.__version__} is built for CPUs only"
        return found
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if about.major >= 8 or torch.version.hip else "no bf16"
        found[f"gpu {index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}"
    return found


def _cpu_bf16() -> str:
    """Which bf16 instructions the CPU has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"unknown: {platform.system()} has no /proc/cpuinfo"
    words = set(text.split())
    have = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in words]
    return (
        f"{', '.join(have)}: faster than fp32" if have else "emulated: slower than fp32; train.precision=fp32 is better"
    )


def attention() -> Section:
    """The kernels, and which one runs."""
    from nexa.model.attention import flash_status

    usable, reason = flash_status()
    use = "bf16 and fp16 with model.attention=auto or flash"
    return {
        "flash-attn": f"active for {use}" if usable else f"not active: {reason}",
        "sdpa": "active for fp32; for half precision with model.attention=sdpa" if usable else "active",
    }


def compilers() -> Section:
    """Whether torch.compile (train.compile=true) can work."""
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name) or shutil.which("clang++")
    triton = util.find_spec("triton") is not None
    return {
        "for cpu": compiler or f"no C++ compiler ({name}, clang++): train.compile=true cannot work on the CPU",
        "for gpu": "triton" if triton else "no triton: train.compile=true cannot work on a GPU",
    }


def peaks() -> Section:
    """Peak FLOP/s of the device that a run would take, by precision."""
    import torch

    from nexa.hardware import PRECISIONS, peak_flops

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found: Section = {}
    for precision in PRECISIONS:
        value, source = peak_flops(device, precision)
        found[precision] = f"n/a: {source}" if value is None else f"{value / 1e12:g} TFLOP/s ({source})"
    return found


def places() -> Section:
    """The cache, and Weights & Biases."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexa"
    parent = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    writable = "writable" if os.access(parent, os.W_OK) else "NOT writable: set data.cache_dir"
    return {"cache": f"{cache} ({writable})", "wandb key": _wandb_key()}


def _wandb_key() -> str:
    """Where a key was found; the key itself is not shown."""
    if os.environ.get("WANDB_API_KEY"):
        return "present (WANDB_API_KEY)"
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        present = "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        present = False
    return f"present ({netrc})" if present else "absent: log.wandb=online falls back to offline"
