"""torchtitan's Llama 3, compiled block by block as torchtitan compiles it, in the environment and at the orders of
benchmarks/peers.

Two choices make it LLaMA's computation on rows that are one document each: rotary positions by halves, and PyTorch's
scaled dot product attention (its flex and variable-length attention mask documents, and are for GPUs).
"""

from __future__ import annotations

from typing import Any

import torch
from master_adamw import MasterAdamW, training_step
from peer_turns import take_turns, the_job
from safetensors.torch import load_file
from torch import Tensor
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def renamed(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """nexa's (Hugging Face's) names -> torchtitan's, before its hook puts q, k and v together."""
    found = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        for mine, its in NAMES.items():
            found[f"{theirs}{its}.weight"] = weights[f"{ours}{mine}.weight"]
        for x in "qkv":
            found[f"{theirs}attention.qkv_linear.w{x}.weight"] = weights[f"{ours}self_attn.{x}_proj.weight"]
    return found


def config(job: dict[str, Any]) -> Llama3Model.Config:
    """The benchmark's model; nothing in it says how weights begin, because they are loaded."""
    width, inner, none = job["width"], job["inner"], {}
    rope = CosSinRoPE.Config(dim=width // job["heads"], max_seq_len=job["length"], theta=job["theta"])

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=width, eps=job["eps"], param_init=none)

    def block() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=width,
                n_heads=job["heads"],
                wqkv_param_init=none,
                wo_param_init=none,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=rope,
                fuse_qkv=True,
            ),
            feed_forward=make_ffn_config(dim=width, hidden_dim=inner, w1_param_init=none, w2w3_param_init=none),
        )

    return Llama3Model.Config(
        dim=width,
        vocab_size=job["vocab"],
        tok_embeddings=Embedding.Config(num_embeddings=job["vocab"], embedding_dim=width, param_init=none),
        norm=norm(),
        lm_head=Linear.Config(in_features=width, out_features=job["vocab"], param_init=none),
        layers=[block() for _ in range(job["layers"])],
    )


def main() -> None:
    """Build, then take turns."""
    job, device, dtype = the_job()
    model = config(job).build()
    weights = renamed(load_file(f"{job['weights']}/weights.safetensors"), job["layers"])
    model.load_state_dict(weights)
    model = model.to(device)
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)  # and no buffer: rotary tables are not rounded
    for layer in model.layers.values():
        layer.compile(fullgraph=True)
    compiled_loss, optimizer = torch.compile(cross_entropy_loss), MasterAdamW(list(model.parameters()))

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        mean: Tensor = compiled_loss(model(ids), labels) / labels.numel()
        return mean

    take_turns(job, device, training_step(loss_of, optimizer))


if __name__ == "__main__":
    main()
