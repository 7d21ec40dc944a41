"""A checkpoint as another one that computes the same function with cheaper norms, or without any.

LayerNorm of x is RMSNorm of x - mean(x). Where all that reads the residual stream reads it through a norm, everything
that writes to it may as well write vectors of mean zero, and then LayerNorm is RMSNorm; of a vector of mean zero one
coordinate follows from the others and need not be kept (CRMSNorm). Gains and biases move into the linear layers behind
the norms (Jiang et al. 2023, arXiv 2305.14858, section 3), and so does all of a norm that divides by a constant
(`nexa.model.removal`).

    writers   embedding rows, o_proj, down_proj: minus their mean over d; for crmsnorm without the last coordinate
    readers   q, k, v, gate, up, head: W diag(gain), and W bias as their bias; for crmsnorm W[:, :-1] - W[:, -1:]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nexa.checkpoint import catalog, files
from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError
from nexa.interop import tokenizer_files
from nexa.interop.destination import check_free, new_folder
from nexa.interop.export import open_checkpoint
from nexa.interop.huggingface import config_json
from nexa.interop.import_ import EMBEDDING, HEAD, Imported, complete, copy_beside
from nexa.interop.weights import SHARD_BYTES, Note, Shapes, WeightFolder, parameter_shapes, write_weights
from nexa.model.decoder import parameter_count
from nexa.model.kinds import NormBuilder
from nexa.model.placement import block_plans, has_final_norm

Target = Literal["rmsnorm", "crmsnorm", "none"]
_RULED = {
    "model": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings input_bias initializer "
    "initializer_range initializer_shape attention",
    "norm": "placement kind eps gate_rank warmup_steps mix_alpha mix_post_layers qk embedding final deepnorm_alpha "
    "depth_scaling depth_numbers removal",
}
"""Keys that the rules here take into account, or that say nothing about the models they let pass."""
CENTRED = 1e-5
"""Largest share of a mean in what a matrix writes that counts as none: rounding to fp32 leaves about 1e-8."""
_EMBED_NORM = "model.embed_norm"
_KEPT = ("_norm.weight", ".qk_scale")
"""Ends of the names of attention's own tensors, which stand behind the projections and stay as they are."""


class Rows(Protocol):
    """Where the tensors of the model to convert come from: a `WeightFolder`."""

    def rows(self, name: str) -> Iterator[Tensor]:
        """A matrix [m, n] in fp64, some of its rows at a time; a vector is one row."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a linear layer reads: norm `norm` of the residual stream, times a fixed `scale` (LayerNorm Scaling's)."""

    norm: str
    scale: float


def readers(model: ModelConfig, norm: NormConfig) -> dict[str, Reader]:
    """Every linear layer that reads the residual stream of a model that `refusal` lets pass."""
    found = {"lm_head": Reader("model.norm", 1.0)}
    for index, plan in enumerate(block_plans(norm, model.num_hidden_layers)):
        block = f"model.layers.{index}"
        attention = Reader(f"{block}.input_layernorm", plan.attn.input_scale)
        feed_forward = Reader(f"{block}.post_attention_layernorm", plan.mlp.input_scale)
        found |= {f"{block}.self_attn.{name}_proj": attention for name in "qkv"}
        found |= {f"{block}.mlp.{name}_proj": feed_forward for name in ("gate", "up")}
    return found


def writers(model: ModelConfig) -> list[str]:
    """Every matrix [d, n] whose product is added to the residual stream."""
    blocks = range(model.num_hidden_layers)
    return [f"model.layers.{i}.{name}.weight" for i in blocks for name in ("self_attn.o_proj", "mlp.down_proj")]


def refusal(model: ModelConfig, norm: NormConfig, target: Target) -> str | None:
    """Why a model of this configuration has no equal with `target` norms; None when it has, or its weights decide."""
    if norm.kind not in {"layernorm", "rmsnorm"}:
        return f"norm.kind={norm.kind}: only layernorm, and what was made of it, is another norm in disguise"
    if norm.kind == target:
        return f"norm.kind={norm.kind}: it is that already"
    if target == "none" and norm.removal.start is None:
        return "norm.removal.start=null: its norms divide by what they measure; train on with norm.removal first"
    if target != "none" and norm.removal.start is not None:
        return f"norm.removal.start={norm.removal.start}: its norms are being removed; --to none when all are"
    for group, config in (("model", model), ("norm", norm)):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in _RULED[group].split() and value != field.default:
                return f"{group}.{field.name}={value}: conversion has no rule for it, and does not guess"
    for index, plan in enumerate(block_plans(norm, model.num_hidden_layers)):
        sides = plan.attn, plan.mlp
        if plan.mid_norm or any(side.output or side.residual for side in sides):
            return (
                f"norm.placement={norm.placement}: block {index} has a norm with no linear layer behind it that could "
                "take its mean, gain and bias; it must be pre or lns"
            )
        if not all(side.input for side in sides):
            return (
                f"norm.placement={norm.placement}: a sublayer of block {index} reads the residual stream without a "
                "norm, and so its mean; it must be pre or lns"
            )
    if not has_final_norm(norm):
        return "norm.final=false: the head reads the residual stream without a norm, and so its mean"
    return None


def converted(model: ModelConfig, norm: NormConfig, target: Target) -> tuple[ModelConfig, NormConfig]:
    """The configuration of the result: untied; for crmsnorm one coordinate less and the same heads."""
    less = 1 if target == "crmsnorm" else 0
    sizes = dataclasses.replace(
        model,
        hidden_size=model.hidden_size - less,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        tie_word_embeddings=False,
        input_bias=model.input_bias or norm.kind == "layernorm",
    )
    if target == "none":
        bare = NormConfig(placement="none", eps=norm.eps, qk=norm.qk)  # of norms, those of queries and keys stay
        return sizes, bare
    return sizes, dataclasses.replace(norm, kind=target, embedding=False)


class Converted:
    """The tensors of the result, each made in fp64 from those of `source` when it is asked for, some rows at a time."""

    def __init__(self, source: Rows, model: ModelConfig, norm: NormConfig, target: Target) -> None:
        """model, norm: of `source`. Nothing is checked here: `refusal` and `check_centred` say whether it is exact."""
        self._source, self._model = source, model
        self._drop, self._constant = target == "crmsnorm", target == "none"
        self._centre = norm.kind == "layernorm" or self._drop
        self._readers, self._writers = readers(model, norm), frozenset(writers(model))
        self._norm_names = frozenset(f"{reader.norm}.weight" for reader in self._readers.values())
        self._has_bias = norm.kind == "layernorm"
        self._embed_norm = _embed_norm(source, model, norm) if norm.embedding else None

    def rows(self, name: str) -> Iterator[Tensor]:
        """Tensor `name` of the result as `Rows.rows` gives it."""
        layer, _, part = name.rpartition(".")
        if layer in self._readers:
            yield from self._reader(layer) if part == "weight" else [self._bias(layer)]
        elif name in self._norm_names:
            yield torch.ones(1, self._model.hidden_size - self._drop, dtype=torch.float64)
        elif name == EMBEDDING:
            yield from self._embedding()
        elif name in self._writers:
            yield from self._writer(name)
        else:
            yield from self._source.rows(name)

    def chunks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Tensor `name` of the result as `nexa.interop.weights.write_weights` wants it."""
        for piece in self.rows(name):
            yield piece.flatten().to(dtype)

    def _vector(self, name: str) -> Tensor:
        return next(iter(self._source.rows(name)))[0]

    def _matrix(self, layer: str) -> Iterator[Tensor]:
        tied = layer == "lm_head" and self._model.tie_word_embeddings
        return self._source.rows(EMBEDDING if tied else f"{layer}.weight")

    def _reader(self, layer: str) -> Iterator[Tensor]:
        reader = self._readers[layer]
        gain = self._vector(f"{reader.norm}.weight")
        if self._constant:
            gain = gain * reader.scale / self._vector(f"{reader.norm}.fixed_rms")
        for rows in self._matrix(layer):
            folded = rows * gain
            yield folded[:, :-1] - folded[:, -1:] if self._drop else folded

    def _bias(self, layer: str) -> Tensor:
        """[1, m]; the fixed scale multiplies what the layer reads, and the norm's bias with it."""
        found = torch.zeros((), dtype=torch.float64)
        if self._has_bias:
            reader = self._readers[layer]
            shift = self._vector(f"{reader.norm}.bias") * reader.scale
            found = torch.cat([rows @ shift for rows in self._matrix(layer)])
        return (found + self._vector(f"{layer}.bias") if self._model.input_bias else found)[None]

    def _embedding(self) -> Iterator[Tensor]:
        for rows in self._source.rows(EMBEDDING):
            written = rows if self._embed_norm is None else self._embed_norm(rows)
            centred = written - written.mean(-1, keepdim=True) if self._centre else written
            yield centred[:, :-1] if self._drop else centred

    def _writer(self, name: str) -> Iterator[Tensor]:
        left = self._model.hidden_size - self._drop
        mean: Tensor | float = 0.0
        if self._centre:
            mean = sum(rows.sum(0) for rows in self._source.rows(name)) / self._model.hidden_size
        for rows in self._source.rows(name):
            yield (rows - mean)[:left]
            left -= len(rows)


def _embed_norm(source: Rows, model: ModelConfig, norm: NormConfig) -> nn.Module:
    """The norm behind the embedding, which maps each row of the table by itself and so becomes a part of it."""
    module = NormBuilder.of(model, norm)("embedding").double()
    state = {name: next(iter(source.rows(f"{_EMBED_NORM}.{name}")))[0] for name in module.state_dict()}
    module.load_state_dict(state)
    return module.requires_grad_(False)


def _mean_share(source: Rows, model: ModelConfig, name: str) -> float:
    """How much of what a matrix writes lies along (1, ..., 1): root mean squares over all rows or columns, 0 to 1."""
    sums, square = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in source.rows(name):
        square = square + rows.square().sum()
        sums = sums + (rows.sum(-1).square().sum() if name == EMBEDDING else rows.sum(0))
    along = sums if name == EMBEDDING else sums.square().sum()
    return float((along / model.hidden_size / square.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


def check_centred(source: Rows, model: ModelConfig, norm: NormConfig) -> None:
    """Raises UserError, naming the matrix, unless a model with RMSNorm writes vectors of mean zero only."""
    if norm.embedding:
        raise UserError("norm.embedding=true: what an RMSNorm behind the embedding writes has a mean")
    for name in (EMBEDDING, *writers(model)):
        share = _mean_share(source, model, name)
        if share > CENTRED:
            raise UserError(
                f"{name} writes a mean, {share:.2g} of the length, into the residual stream; an RMSNorm sees it and a "
                "CRMSNorm does not, so that no crmsnorm model of this width computes the same. Convert the layernorm "
                "model itself, or the result of --to rmsnorm before any training"
            )


def check_known(shapes: Shapes, model: ModelConfig, norm: NormConfig) -> None:
    """Raises UserError for a tensor that conversion has no rule for: it would be copied as if nothing had changed."""
    layers = readers(model, norm)
    names = {HEAD, EMBEDDING, *writers(model), *(f"{_EMBED_NORM}.{part}" for part in ("weight", "bias"))}
    names |= {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    parts = ("weight", "bias", "fixed_rms", "removed")
    names |= {f"{reader.norm}.{part}" for reader in layers.values() for part in parts}
    for name in shapes:
        if name not in names and not (".self_attn." in name and name.endswith(_KEPT)):
            raise UserError(
                f"{name}: conversion has no rule for this tensor; what reads or scales the residual stream here?"
            )


def check_removed(source: Rows, model: ModelConfig, norm: NormConfig) -> None:
    """Raises UserError, naming the first, unless all norms divide by constants."""
    names = dict.fromkeys(reader.norm for reader in readers(model, norm).values())
    left = [name for name in names if not bool(next(iter(source.rows(f"{name}.removed")))[0, 0])]
    if left:
        raise UserError(
            f"{left[0]} and {len(left) - 1} other norms still divide by what they measure: train on until "
            "removal/norms_left is 0 (norm.removal: start, every, and all three in order)"
        )


def convert(
    checkpoint: str | Path, destination: str | Path, target: Target, *, note: Note = lambda text: None
) -> Imported:
    """Write the equal of a checkpoint, or of a run's newest one, with `target` norms, as a new checkpoint of step 0.

    The result is fp32, computed in fp64 tensor by tensor in bounded memory; it has no
    optimizer state, and every layout starts from it with `resume.mode=weights_only`. Raises UserError when the
    checkpoint is damaged, when no such model computes the same (with the reason), and when `destination` is there
    already or cannot be written; nothing is left there then.
    """
    path = Path(destination).absolute()
    check_free(path)
    source, config, model, norm = open_checkpoint(checkpoint)
    shapes = parameter_shapes(model, norm)
    if (reason := refusal(model, norm, target)) is not None:
        raise UserError(f"{source / catalog.CONFIG}: {reason}")
    check_known(shapes, model, norm)
    new_model, new_norm = converted(model, norm, target)
    with WeightFolder(source) as weights:
        weights.compare(shapes, source / catalog.CONFIG)
        if target == "none":
            check_removed(weights, model, norm)
        elif norm.kind == "rmsnorm":
            check_centred(weights, model, norm)
        made, new_shapes = Converted(weights, model, norm, target), parameter_shapes(new_model, new_norm)
        with new_folder(path) as aside:
            written = write_weights(made, new_shapes, aside, torch.float32, SHARD_BYTES, note)
            records = copy_beside(source, aside)
            ours = config_json(new_model, new_norm, eos_token_id=config.get("eos_token_id"))
            ours |= {key: config[key] for key in ("bos_token_id", "nexa_tokenizer") if key in config}
            records[catalog.CONFIG] = files.write_json(aside / catalog.CONFIG, ours)
            complete(aside, written, new_shapes, records, {"converted_from": str(source.absolute())})
    has_tokenizer = tokenizer_files.TOKENIZER in records
    count = parameter_count(new_model, new_norm)
    return Imported(path, new_model, new_norm, count, written.total_bytes, has_tokenizer)
