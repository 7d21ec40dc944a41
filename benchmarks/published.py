"""Published training speeds in bf16, with what is needed to work them out: data for benchmarks/simulate.py.

Every figure was read at the source named in `SOURCES`. Throughput is tokens per second and GPU, or model FLOP/s per
GPU where that is what was published. What a source does not say and the model needs is `ASSUMED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCES = {
    "llm-foundry": "mosaicml/llm-foundry scripts/train/benchmarking/README.md at 8c8dd48f",
    "torchtitan-2024": "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md at b5bcd76c",
    "torchtitan-2025": "pytorch/torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md at b5bcd76c",
    "fms-fsdp": "foundation-model-stack/fms-fsdp README.md at 5a296afe",
    "tinyllama": "jzhang38/TinyLlama README.md at bf122247",
    "megatron-0.8": "NVIDIA/Megatron-LM images/model_table.png at d98e8a64 (Megatron-Core r0.8.0)",
}
ASSUMED = """\
llm-foundry: the first FlashAttention (mid-2023), weights gathered in bf16 and gradients reduced in fp32 (bf16 where its
table says PURE), on H100 400 Gbit/s between nodes for each GPU (only the A100 tables state a network: 1600 Gbit/s a
node). Megatron: one micro-batch of 4, 400 Gbit/s. TinyLlama: 4 micro-batches, 200 Gbit/s. fms-fsdp: vocabulary of 32000
and 4,096 tokens (its defaults), network per node of 8; "selective" checkpointing of every other block for 13B and of
every block for 34B and 70B, which its HFU over MFU (1.13, 1.35, 1.35) says."""


@dataclass(frozen=True)
class Shape:
    """A decoder: `gated` has three matrices of a feed-forward block, else two."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    gated: bool = True
    tied: bool = False


def _mpt(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(hidden, layers, heads, heads, 4 * hidden, 50368, gated=False, tied=True)


def _gpt(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(hidden, layers, heads, heads, 4 * hidden, 131072, gated=False, tied=False)


MODELS = {
    "mpt-125m": _mpt(768, 12, 12),
    "mpt-350m": _mpt(1024, 24, 16),
    "mpt-760m": _mpt(1536, 24, 12),
    "mpt-1b": _mpt(2048, 24, 16),
    "mpt-3b": _mpt(2560, 32, 20),
    "mpt-7b": _mpt(4096, 32, 32),
    "mpt-13b": _mpt(5120, 40, 40),
    "mpt-30b": _mpt(7168, 48, 56),
    "mpt-70b": _mpt(8192, 80, 64),
    "llama3-8b": Shape(4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": Shape(8192, 80, 64, 8, 28672, 128256),
    "llama2-7b": Shape(4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": Shape(5120, 40, 40, 40, 13824, 32000),
    "llama2-34b": Shape(8192, 48, 64, 8, 22016, 32000),
    "llama2-70b": Shape(8192, 80, 64, 8, 28672, 32000),
    "tinyllama": Shape(2048, 22, 32, 4, 5632, 32000),
    "gpt-1.7b": _gpt(2048, 24, 16),
    "gpt-7.1b": _gpt(4096, 30, 32),
    "gpt-16b": _gpt(6144, 32, 48),
    "gpt-32b": _gpt(7168, 48, 56),
}


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    source: str
    model: str
    gpu: str
    gpus: int
    sequence: int
    micro: int
    """Sequences of a micro-batch."""
    published: float
    """Tokens per second and GPU; below, model FLOP/s per GPU when `in_flops`."""
    accumulation: int = 1
    stage: int = 3
    tensor: int = 1
    again: str = "none"
    """Checkpointing: a row of `RECOMPUTE` in benchmarks/simulate.py."""
    compiled: bool = False
    """torch.compile, or kernels written for it: shown, not used."""
    network: float = 50e9
    """Bytes per second of a GPU's port."""
    reduce_width: int = 4
    attention: float = 1.0
    """Speed of its attention kernel over that of FlashAttention-2."""
    in_flops: bool = False


def _foundry(
    gpu: str, model: str, gpus: int, sequence: int, micro: int, accumulation: int, speed: float, **more: Any
) -> Row:
    stated = {"attention": FIRST_FLASH} | ({"network": 25e9} if gpu.startswith("A100") else {})
    return Row("llm-foundry", f"mpt-{model}", gpu, gpus, sequence, micro, speed, accumulation, **(stated | more))


FIRST_FLASH = 0.325 / 0.615
"""FlashAttention's 25 to 40% of the peak over the 50 to 73% of FlashAttention-2 (arXiv 2307.08691, abstract)."""


def _full(*values: Any, **more: Any) -> Row:
    return _foundry(*values, again="full", **more)


H, A, A40 = "H100", "A100-80GB", "A100-40GB"
ROWS = [
    _foundry(H, "1b", 8, 2048, 14, 1, 45455),
    _foundry(H, "3b", 8, 4096, 5, 6, 20964),
    _foundry(H, "7b", 8, 2048, 6, 1, 10643),
    _foundry(A, "1b", 8, 2048, 14, 4, 20513),
    _foundry(A, "3b", 8, 2048, 10, 2, 10811),
    _foundry(A, "7b", 8, 2048, 6, 2, 4641),
    _foundry(H, "760m", 8, 2048, 24, 2, 63147),
    _foundry(H, "760m", 32, 2048, 24, 1, 67971),
    _foundry(H, "1b", 8, 512, 56, 4, 52275),
    _foundry(H, "1b", 8, 8192, 3, 4, 29157),
    _foundry(H, "1b", 8, 32768, 1, 4, 12025),
    _foundry(H, "1b", 64, 2048, 20, 1, 44402),
    _foundry(H, "1b", 128, 2048, 12, 1, 44123, stage=2),
    _foundry(H, "1b", 256, 2048, 12, 1, 42555, stage=2),
    _foundry(H, "1b", 512, 2048, 12, 1, 39837, stage=2),
    _foundry(H, "3b", 64, 2048, 6, 3, 22525),
    _foundry(H, "3b", 512, 2048, 8, 1, 21664, stage=2),
    _foundry(H, "7b", 128, 2048, 6, 1, 10475),
    _foundry(H, "7b", 256, 2048, 6, 1, 10119),
    _foundry(H, "7b", 512, 2048, 6, 1, 9670),
    _foundry(H, "13b", 8, 2048, 2, 1, 4792),
    _foundry(H, "13b", 64, 2048, 2, 1, 4800),
    _full(H, "7b", 8, 4096, 16, 2, 8611),
    _full(H, "7b", 8, 32768, 2, 2, 3318),
    _full(H, "13b", 128, 2048, 16, 1, 5080),
    _full(H, "13b", 512, 2048, 16, 1, 4952),
    _full(H, "30b", 8, 2048, 3, 21, 2002),
    _full(H, "30b", 128, 2048, 8, 1, 2199),
    _full(H, "30b", 512, 2048, 8, 1, 2115),
    _full(H, "70b", 32, 2048, 2, 16, 882),
    _full(H, "70b", 128, 2048, 8, 1, 1058),
    _full(H, "70b", 512, 2048, 8, 1, 1007),
    _foundry(A, "125m", 8, 2048, 32, 2, 141737),
    _foundry(A, "350m", 8, 2048, 32, 2, 58782),
    _foundry(A, "760m", 8, 2048, 24, 2, 32434),
    _foundry(A, "1b", 8, 16384, 2, 4, 9956),
    _foundry(A, "13b", 8, 2048, 2, 3, 2262),
    _full(A, "13b", 8, 4096, 10, 3, 2060),
    _full(A, "30b", 8, 2048, 3, 21, 916),
    _full(A, "70b", 64, 2048, 8, 4, 410, reduce_width=2),
    _foundry(A40, "350m", 128, 2048, 18, 1, 51934),
    _foundry(A40, "1b", 128, 2048, 10, 1, 18647),
    _foundry(A40, "3b", 128, 2048, 6, 1, 9538),
    _full(A40, "7b", 128, 2048, 18, 1, 3623, reduce_width=2),
    _full(A40, "70b", 128, 2048, 4, 1, 376, reduce_width=2),
    Row("torchtitan-2024", "llama3-8b", "H100-500W", 8, 8192, 2, 5762, again="every other product"),
    Row(
        "torchtitan-2024",
        "llama3-8b",
        "H100-500W",
        8,
        8192,
        2,
        6667,
        again="every other product",
        compiled=True,
    ),
    Row("torchtitan-2024", "llama3-8b", "H100-500W", 128, 8192, 2, 5605, again="every other product"),
    Row("torchtitan-2024", "llama3-8b", "H100-500W", 128, 8192, 2, 6514, again="every other product", compiled=True),
    Row(
        "torchtitan-2025",
        "llama3-8b",
        "H100-500W",
        64,
        8192,
        12,
        4378,
        tensor=8,
        again="every other product",
        compiled=True,
    ),
    Row("torchtitan-2025", "llama3-70b", "H100-500W", 256, 8192, 16, 597.3, tensor=8, again="full", compiled=True),
    Row("fms-fsdp", "llama2-13b", A, 128, 4096, 2, 2150, again="half", compiled=True, network=6.25e9, reduce_width=2),
    Row("fms-fsdp", "llama2-34b", A, 128, 4096, 2, 820, again="full", compiled=True, network=6.25e9, reduce_width=2),
    Row("fms-fsdp", "llama2-70b", A, 128, 4096, 2, 410, again="full", compiled=True, network=6.25e9, reduce_width=2),
    Row("fms-fsdp", "llama2-13b", H, 96, 4096, 2, 4850, again="half", compiled=True, network=12.5e9, reduce_width=2),
    Row("fms-fsdp", "llama2-34b", H, 96, 4096, 2, 1830, again="full", compiled=True, network=12.5e9, reduce_width=2),
    Row("fms-fsdp", "llama2-70b", H, 96, 4096, 2, 890, again="full", compiled=True, network=12.5e9, reduce_width=2),
    Row("tinyllama", "tinyllama", A40, 16, 2048, 8, 24000, accumulation=4, compiled=True, network=25e9),
    Row("megatron-0.8", "gpt-1.7b", H, 48, 4096, 4, 408.8e12, stage=1, compiled=True, in_flops=True),
    Row(
        "megatron-0.8",
        "gpt-7.1b",
        H,
        96,
        4096,
        4,
        465.9e12,
        stage=1,
        tensor=2,
        compiled=True,
        in_flops=True,
    ),
    Row("megatron-0.8", "gpt-16b", H, 192, 4096, 4, 489.1e12, stage=1, tensor=4, compiled=True, in_flops=True),
    Row("megatron-0.8", "gpt-32b", H, 384, 4096, 4, 459.6e12, stage=1, tensor=8, compiled=True, in_flops=True),
]

FITTED = {
    ("mpt-1b", "H100", 8, 2048),
    ("mpt-7b", "H100", 8, 2048),
    ("mpt-13b", "H100", 8, 2048),
    ("mpt-70b", "H100", 128, 2048),
    ("mpt-1b", "A100-80GB", 8, 2048),
    ("mpt-7b", "A100-80GB", 8, 2048),
    ("mpt-30b", "A100-80GB", 8, 2048),
    ("tinyllama", "A100-40GB", 16, 2048),
    ("llama2-70b", "A100-80GB", 128, 4096),
    ("llama3-8b", "H100-500W", 8, 8192),
}
"""(model, GPU, how many, length) of the rows to which constants were fitted: five constants, together, by least
squares of the logarithm of the error. Of torchtitan's pair only the compiled row."""


def fitted(row: Row) -> bool:
    """Whether constants were fitted to `row`; every other row is a test of them."""
    compiled = row.compiled or row.source != "torchtitan-2024"
    return compiled and (row.model, row.gpu, row.gpus, row.sequence) in FITTED
