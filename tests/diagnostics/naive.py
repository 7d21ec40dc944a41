"""Every quantity of a diagnosis by hand: float64, loops over tokens, on the independent decoder of tests/model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.model.reference import Reference

PARTS = ("attention", "feed_forward")


class Recorder(Reference):
    """Remembers, for one sequence, what its sublayers and output norms give and what its softmaxes get."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.results, self.normed, self.scores = {}, {}, {}

    def attention(self, i, x, allowed):
        p = f"model.layers.{i}.self_attn."
        dh = self.s[p + "q_proj.weight"].shape[0] // self.h
        heads = {}
        for n, count in (("q", self.h), ("k", self.g)):
            y = (x @ self.s[f"{p}{n}_proj.weight"].T).view(1, x.shape[1], count, dh)
            if self.placement in {"hybrid", "hybrid_star"}:
                y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.eps) * self.s[f"{p}{n}_norm.weight"]
            heads[n] = self.rope(y.transpose(1, 2))[0].detach()
        self.scores[i] = {
            (head, t, s): float(heads["q"][head, t] @ heads["k"][head * self.g // self.h, s]) / math.sqrt(dh)
            for head in range(self.h)
            for t in range(x.shape[1])
            for s in range(t + 1)
            if bool(allowed[0, 0, t, s])
        }
        self.results["attention", i] = super().attention(i, x, allowed)
        return self.results["attention", i]

    def mlp(self, i, x):
        self.results["feed_forward", i] = super().mlp(i, x)
        return self.results["feed_forward", i]

    def norm(self, name, x):
        self.normed[name] = super().norm(name, x)
        return self.normed[name]

    def added(self, part, i):
        short = {"attention": "attn", "feed_forward": "mlp"}[part]
        return self.normed.get(f"model.layers.{i}.{short}_norm.output", self.results[part, i])[0]

    def streams(self, ids, documents=None):
        """[T, d] of the L + 1 streams of one sequence [T]."""
        T = len(ids)
        allowed = torch.tril(torch.ones(T, T, dtype=torch.bool))[None, None]
        if documents is not None:
            allowed = allowed & (documents[:, None] == documents[None, :])
        x = self.s["model.embed_tokens.weight"][ids][None]
        found = [x[0]]
        for i in range(self.L):
            x = self.block(i, x, allowed)
            found.append(x[0])
        return found

    def nll(self, x, labels):
        """Summed loss of one sequence from its last stream [T, d]."""
        if self.placement != "deepnorm":
            x = self.norm("model.norm", x)
        return F.cross_entropy(x @ self.s["lm_head.weight"].T, labels, ignore_index=-100, reduction="sum")


def recorder(model, **changed):
    """For a model of tests.cli.common.tiny_model."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    cfg = model.config
    settings = dict(
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        layers=cfg.num_hidden_layers,
        placement=model.norm_config.placement,
        kind=model.norm_config.kind,
        eps=model.norm_config.eps,
        theta=cfg.rope_theta,
    )
    return Recorder(state, **(settings | changed))


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def variance(x):
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / len(x)


def kurtosis(x):
    mean = sum(x) / len(x)
    return sum((v - mean) ** 4 for v in x) / len(x) / variance(x) ** 2


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def angle(x, y):
    return math.acos(min(1.0, max(-1.0, cosine(x, y)))) / math.pi


def by_hand(model, inputs):
    """All quantities that need no second forward pass; inputs as for `measure`, in one batch."""
    L = model.config.num_hidden_layers
    rows = []  # (streams as lists of tokens that count, added, scores, which tokens count)
    nll = 0.0
    for number, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        counted = [t for t, label in enumerate(labels.tolist()) if label >= 0]
        if not counted:
            continue
        documents = inputs["document_ids"][number] if "document_ids" in inputs else None
        one = recorder(model)
        streams = one.streams(ids, documents)
        nll += float(one.nll(streams[-1], labels))
        tokens = [[h[t].tolist() for t in counted] for h in streams]
        parts = {
            part: [one.added(part, i)[counted].tolist() for i in range(L)] for part in ("attention", "feed_forward")
        }
        rows.append((tokens, parts, one.scores, counted))
    streams = [[token for tokens, *_ in rows for token in tokens[n]] for n in range(L + 1)]
    found = {
        "loss": nll / len(streams[0]),
        "variance": [mean(map(variance, h)) for h in streams],
        "mean_square": [mean(mean(v * v for v in x) for x in h) for h in streams],
        "kurtosis": [mean(map(kurtosis, h)) for h in streams],
        "influence": [1 - mean(map(cosine, streams[i], streams[i + 1])) for i in range(L)],
        "angular": [[mean(map(angle, a, b)) for b in streams] for a in streams],
        "angular_last": [
            [mean(angle(tokens[a][-1], tokens[b][-1]) for tokens, *_ in rows) for b in range(L + 1)]
            for a in range(L + 1)
        ],
    }
    for part in ("attention", "feed_forward"):
        found[f"{part}_variance"] = [
            mean(variance(x) for _, parts, *_ in rows for x in parts[part][i]) for i in range(L)
        ]
    found |= massive(rows, L) | sinks(streams) | logits(rows, L)
    return found


def massive(rows, L):
    found = {name: [] for name in ("top1", "top2", "top3", "median", "massive_count")}
    for n in range(L + 1):
        every = [sorted(abs(v) for x in tokens[n] for v in x) for tokens, *_ in rows]
        medians = [lower_median(values) for values in every]
        for rank in (1, 2, 3):
            found[f"top{rank}"].append(mean(values[-rank] for values in every))
        found["median"].append(mean(medians))
        found["massive_count"].append(
            mean(sum(v > 100 and v >= 1000 * m for v in values) for values, m in zip(every, medians, strict=True))
        )
    return found


def sinks(streams):
    found = {name: [] for name in ("channel_ratio", "peak_ratio", "peak_ratio_max")}
    for h in streams:
        channels = [mean(abs(x[j]) for x in h) for j in range(len(h[0]))]
        peaks = [max(map(abs, x)) / math.sqrt(mean(v * v for v in x)) for x in h]
        found["channel_ratio"].append(max(channels) / lower_median(channels))
        found["peak_ratio"].append(mean(peaks))
        found["peak_ratio_max"].append(max(peaks))
    return found


def logits(rows, L):
    found = {"logit_max": [], "sink_share": []}
    for i in range(L):
        largest, shares = 0.0, []
        for _, _, scores, counted in rows:
            queries = {(head, t) for head, t, _ in scores[i] if t in counted}
            for head, t in queries:
                own = {s: value for (h, q, s), value in scores[i].items() if (h, q) == (head, t)}
                largest = max(largest, *map(abs, own.values()))
                if len(own) > 1:
                    shares.append(math.exp(own[min(own)]) / sum(map(math.exp, own.values())))
        found["logit_max"].append(largest)
        found["sink_share"].append(mean(shares))
    return found
