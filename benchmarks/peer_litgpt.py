"""litgpt's GPT, compiled as its pre-training compiles it, in the environment and at the orders of benchmarks/peers."""

from __future__ import annotations

import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from master_adamw import MasterAdamW, training_step
from peer_turns import take_turns, the_job
from safetensors.torch import load_file


def renamed(weights: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """nexa's (Hugging Face's) names -> litgpt's."""
    found = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        found[f"{theirs}norm_1.weight"] = weights[f"{ours}input_layernorm.weight"]
        found[f"{theirs}norm_2.weight"] = weights[f"{ours}post_attention_layernorm.weight"]
        found[f"{theirs}attn.qkv.weight"] = torch.cat([weights[f"{ours}self_attn.{x}_proj.weight"] for x in "qkv"])
        found[f"{theirs}attn.proj.weight"] = weights[f"{ours}self_attn.o_proj.weight"]
        found[f"{theirs}mlp.fc_1.weight"] = weights[f"{ours}mlp.gate_proj.weight"]
        found[f"{theirs}mlp.fc_2.weight"] = weights[f"{ours}mlp.up_proj.weight"]
        found[f"{theirs}mlp.proj.weight"] = weights[f"{ours}mlp.down_proj.weight"]
    return found


def main() -> None:
    """Build, then take turns."""
    job, device, dtype = the_job()
    config = Config(
        name="benchmark",
        block_size=job["length"],
        vocab_size=job["vocab"],
        padded_vocab_size=job["vocab"],
        n_layer=job["layers"],
        n_head=job["heads"],
        n_embd=job["width"],
        intermediate_size=job["inner"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=job["eps"],
        mlp_class_name="LLaMAMLP",
        rope_base=int(job["theta"]),
    )
    model = GPT(config)
    model.load_state_dict(renamed(load_file(f"{job['weights']}/weights.safetensors"), job["layers"]))
    model = model.to(device, dtype)
    model.cos, model.sin = model.rope_cache(device=device)  # not rounded
    compiled, optimizer = torch.compile(model), MasterAdamW(list(model.parameters()))
    take_turns(job, device, training_step(lambda ids, labels: chunked_cross_entropy(compiled(ids), labels), optimizer))


if __name__ == "__main__":
    main()
