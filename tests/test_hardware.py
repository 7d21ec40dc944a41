"""Peak FLOP/s: the device's own or none."""

import platform
from pathlib import Path

import pytest
import torch

from nexa.hardware import memory_gib, peak_flops, peak_of
from tests.conftest import run_command


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_known(name, precision, teraflops):
    value, source = peak_of(name, precision)
    assert value == pytest.approx(teraflops * 1e12)
    assert name in source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A1000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_unknown_gets_no_other_gpus_figure(name):
    assert peak_of(name, "bf16")[0] is None


def test_no_such_unit():
    assert peak_of("Tesla V100-SXM2-16GB", "bf16") == (None, "Tesla V100-SXM2-16GB has no bf16 units")


def test_cpu():
    assert peak_flops(torch.device("cpu"), "bf16")[0] is None
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(64 << 20)  # 256 MiB, touched
    assert memory_gib(torch.device("cpu")) - before == pytest.approx(0.25, abs=0.1)
    del block


FAULTS = """
import resource, torch
from nexa.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(20 << 20)  # 80 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = keep_freed_memory()
faults()
print(kept, before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_not_faulted_in_again():
    done = run_command("-c", FAULTS)
    kept, before, after = done.stdout.split()
    assert kept == "True", done.stderr
    # the pages of the first allocation are there; without it each of the ten brings its own
    assert int(after) < 20 < int(before)


LARGE = """
import torch
from nexa.hardware import keep_freed_memory

keep_freed_memory()
address, inside = torch.ones(20 << 20).data_ptr() + (1 << 20), False  # not the page that the heap ended in
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        inside = start <= address < stop
    elif inside and line.startswith("VmFlags:"):
        print(line)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages")
def test_what_is_allocated_then_asks_for_large_pages():
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("the kernel counts promises of memory")
    done = run_command("-c", LARGE)
    assert "hg" in done.stdout.split(), done.stdout + done.stderr
    done = run_command("-c", LARGE, MALLOC_PERTURB_="165")
    assert "VmFlags:" in done.stdout and "hg" not in done.stdout.split(), "glibc would fill all of the memory"
