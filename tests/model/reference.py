"""An independent decoder for tests: plain functions on a state dict in float64, written from the papers'
equations, one branch per placement, sharing nothing with the product."""

from __future__ import annotations

import math

import torch


def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return weight * (x - mean) / torch.sqrt(var + eps) + bias


class Reference:
    """logits(ids) for a state dict; cfg values are plain Python."""

    def __init__(self, state, *, heads, kv_heads, layers, placement, kind="rmsnorm", eps=1e-6, theta=1e4, **options):
        self.s, self.h, self.g, self.L = state, heads, kv_heads, layers
        self.placement, self.kind, self.eps, self.theta, self.o = placement, kind, eps, theta, options

    def norm(self, name, x, mean_square=None):
        s, n, w = {k.removeprefix(name + "."): v for k, v in self.s.items()}, x.shape[-1], self.s[f"{name}.weight"]
        if self.o.get("pre_affine"):
            x = x * s["pre_weight"]
        match self.kind:
            case "rmsnorm":
                return rms(x, w, self.eps)
            case "layernorm":
                return layer(x, w, s["bias"], self.eps)
            case "crmsnorm":
                # RMSNorm of the vector with its last coordinate put back
                whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
                return rms(whole, torch.ones((), dtype=x.dtype), self.eps)[..., :n] * w
            case "scalenorm":
                return w * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-5)
            case "dyt":
                return w * torch.tanh(s["alpha"] * x)
            case "seednorm":
                dot = torch.einsum("btn,n->bt", x, s["beta"])
                gain = torch.tanh(dot)[..., None] * s["alpha"] + w
                return gain * rms(x, torch.ones((), dtype=x.dtype), self.eps)
            case "gatednorm":
                y = rms(x, w, self.eps)
                h = y @ s["gate_down.weight"].T
                h = (h / (1 + torch.exp(-h))) @ s["gate_up.weight"].T
                return 2 * y / (1 + torch.exp(-h))
            case "eln":
                return w * x / torch.sqrt(x**2 + s["c"] ** 2 + self.eps) + s["bias"]
            case "bhyt":
                mean_square = (x * x).mean(-1, keepdim=True) if mean_square is None else mean_square
                return w * torch.tanh(s["lambda"] * x / (10 * torch.sqrt(mean_square + self.eps)))
            case "powernorm" | "unifiednorm":  # evaluation
                u = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) if self.kind == "powernorm" else x
                return w * u / torch.sqrt(s["running_square"] + self.eps) + s["bias"]
        raise AssertionError(self.kind)

    def linear(self, name, x):
        """With the bias that only models with `model.input_bias` have."""
        return x @ self.s[f"{name}.weight"].T + self.s.get(f"{name}.bias", 0.0)

    def rope(self, x):
        """[B, heads, T, dh]: rotate pairs (j, j + dh/2) by t * theta^(-2j/dh)."""
        T, dh = x.shape[-2:]
        out = torch.empty_like(x)
        for j in range(dh // 2):
            a = torch.arange(T, dtype=x.dtype) * self.theta ** (-2 * j / dh)
            p, q = x[..., j], x[..., j + dh // 2]
            out[..., j] = p * torch.cos(a) - q * torch.sin(a)
            out[..., j + dh // 2] = q * torch.cos(a) + p * torch.sin(a)
        return out

    def attention(self, i, x, allowed):
        p = f"model.layers.{i}.self_attn."
        B, T, _ = x.shape
        dh = self.s[p + "q_proj.weight"].shape[0] // self.h
        qkv = {}
        for n, heads in (("q", self.h), ("k", self.g), ("v", self.g)):
            y = self.linear(f"{p}{n}_proj", x)
            if self.o.get("qk") == "rms_full" and n in "qk":
                y = rms(y, self.s[f"{p}{n}_norm.weight"], self.eps)
            y = y.view(B, T, heads, dh)
            if self.placement in {"hybrid", "hybrid_star"} or (self.o.get("qk") == "rms" and n in "qk"):
                y = rms(y, self.s[f"{p}{n}_norm.weight"], self.eps)
            if self.o.get("qk") == "cosine" and n in "qk":
                y = y / y.norm(dim=-1, keepdim=True)
            qkv[n] = y.transpose(1, 2)
        q, k, v = self.rope(qkv["q"]), self.rope(qkv["k"]), qkv["v"]
        k, v = (t.repeat_interleave(self.h // self.g, dim=1) for t in (k, v))
        scale = self.s[p + "qk_scale"] if self.o.get("qk") == "cosine" else 1 / math.sqrt(dh)
        scores = (q @ k.transpose(-1, -2)) * scale
        scores = scores.masked_fill(~allowed, -math.inf)
        y = torch.softmax(scores, -1) @ v
        gate = self.o.get("attention_gate", "none")
        if gate != "none":
            g = 1 / (1 + torch.exp(-(x @ self.s[p + "gate_proj.weight"].T)))
            g = g.view(B, T, self.h, dh if gate == "elementwise" else 1)
            y = y * g.transpose(1, 2)
        scaled = self.o.get("head_scale", "heads") if self.placement == "normformer" else None
        if scaled == "heads":
            y = y * self.s[p + "head_scale"].view(1, -1, 1, 1)
        y = y.transpose(1, 2).reshape(B, T, -1) @ self.s[p + "o_proj.weight"].T
        if scaled == "output":
            pieces = y.split(y.shape[-1] // self.h, -1)
            y = torch.cat([piece * c for piece, c in zip(pieces, self.s[p + "head_scale"], strict=True)], -1)
        return y

    def mean_square_after_attention(self, i, x, scale):
        """BHyT's: that of x, and of W_O W_V applied to an average of T vectors of mean square (scale lambda / 10)^2."""
        p, T = f"model.layers.{i}.", self.o["tokens"]
        v, o = self.s[p + "self_attn.v_proj.weight"], self.s[p + "self_attn.o_proj.weight"]
        dh, d = v.shape[0] // self.g, v.shape[1]
        product = torch.zeros(d, d, dtype=x.dtype)
        for head in range(self.h):
            kv = head // (self.h // self.g)
            product = product + o[:, head * dh : (head + 1) * dh] @ v[kv * dh : (kv + 1) * dh]
        c = torch.linalg.matrix_norm(product, "fro") ** 2 / (T * d)
        return (x * x).mean(-1, keepdim=True) + (c * (scale * self.s[p + "input_layernorm.lambda"]) ** 2 / 100).detach()

    def mlp(self, i, x):
        p = f"model.layers.{i}.mlp."
        a = self.linear(p + "gate_proj", x)
        y = a * torch.sigmoid(a) * self.linear(p + "up_proj", x)
        if self.placement == "normformer":
            y = self.norm(p + "mid_norm", y)
        return y @ self.s[p + "down_proj.weight"].T

    def block(self, i, x, allowed):
        p = f"model.layers.{i}."
        pre1, pre2 = p + "input_layernorm", p + "post_attention_layernorm"
        out1, out2 = p + "attn_norm.output", p + "mlp_norm.output"
        res1, res2 = p + "attn_norm.residual", p + "mlp_norm.residual"

        depth = 1 / math.sqrt(i + 1) if self.o.get("depth_scaling") else 1.0
        branch, value = self.o.get("branch_scale", "none"), self.o.get("branch_scale_value")

        def scaled(name, y):
            """What a sublayer gives, after its output norm if it has one."""
            if branch == "none":
                return y
            return y * ((value or (2 * self.L) ** -0.5) if branch == "fixed" else self.s[f"{p}{name}_scale"])

        def a(y):
            return self.attention(i, y, allowed)

        def m(y):
            return self.mlp(i, y)

        if branch != "none" or depth != 1.0:
            # the options, written out for the two placements they are tested with
            if self.placement == "post":
                x = self.norm(res1, x + scaled("attn", a(x)))
                return self.norm(res2, x + scaled("mlp", m(x)))
            assert self.placement == "peri"
            x = x + scaled("attn", self.norm(out1, a(depth * self.norm(pre1, x))))
            return x + scaled("mlp", self.norm(out2, m(depth * self.norm(pre2, x))))
        place = self.placement
        if place == "mix":
            n_post = self.o.get("mix_post_layers")
            n_post = int(self.o.get("mix_alpha", 0.25) * self.L) if n_post is None else n_post
            place = "post" if i < n_post else "pre"
        if self.kind == "bhyt":
            s = 1 / math.sqrt(i + 1) if place == "lns" else 1.0
            second = self.mean_square_after_attention(i, x, s)
            x = x + a(s * self.norm(pre1, x))
            return x + m(s * self.norm(pre2, x, second))
        if place == "none":
            x = x + a(x)
            return x + m(x)
        if place == "pre":
            x = x + a(self.norm(pre1, x))
            return x + m(self.norm(pre2, x))
        if place == "post":
            x = self.norm(res1, x + a(x))
            return self.norm(res2, x + m(x))
        if place == "lns":
            s = 1 / math.sqrt(i + 1)
            x = x + a(s * self.norm(pre1, x))
            return x + m(s * self.norm(pre2, x))
        if place in {"peri", "sandwich", "dssn"}:
            x = x + self.norm(out1, a(self.norm(pre1, x)))
            return x + self.norm(out2, m(self.norm(pre2, x)))
        if place == "reordered":
            x = x + self.norm(out1, a(x))
            return x + self.norm(out2, m(x))
        if place == "deepnorm":
            alpha = self.o.get("deepnorm_alpha") or (2 * self.L) ** 0.25
            x = self.norm(res1, alpha * x + a(x))
            return self.norm(res2, alpha * x + m(x))
        if place == "hybrid_star" and i == 0:
            y = x + a(self.norm(pre1, x))
            return y + m(self.norm(pre2, y))
        if place in {"hybrid", "hybrid_star"}:
            z = self.norm(res1, x + a(x))
            return z + m(z)
        assert place == "normformer"
        x = x + self.norm(out1, a(self.norm(pre1, x)))
        skip = x * self.s[p + "mlp.residual_gain"] if self.o.get("residual_gain") else x
        return skip + m(self.norm(pre2, x))

    def logits(self, ids, documents=None):
        B, T = ids.shape
        allowed = torch.tril(torch.ones(T, T, dtype=torch.bool)).expand(B, 1, T, T)
        if documents is not None:
            allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
        table = self.s["model.embed_tokens.weight"]
        if self.o.get("fixnorm"):
            table = table / torch.sqrt((table * table).sum(-1, keepdim=True))
        x = table[ids] * (math.sqrt(table.shape[-1]) if self.o.get("fixnorm") else 1.0)
        if self.kind in {"dyt", "eln"}:
            x = x * self.s["model.embed_scale"]
        if self.o.get("embedding"):
            x = self.norm("model.embed_norm", x)
        for i in range(self.L):
            x = self.block(i, x, allowed)
        if self.o.get("final", self.placement not in {"deepnorm", "none"}):
            x = self.norm("model.norm", x)
        head = self.s.get("lm_head.weight", table)
        return x @ head.T + self.s.get("lm_head.bias", 0.0)
