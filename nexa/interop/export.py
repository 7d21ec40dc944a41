"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from nexa.api import read_config
from nexa.checkpoint import catalog, files, load
from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError
from nexa.interop import tokenizer_files
from nexa.interop.destination import check_free, new_folder
from nexa.interop.huggingface import NEXA, from_config_json
from nexa.interop.weights import SHARD_BYTES, Note, WeightFolder, parameter_shapes, statistics, write_weights
from nexa.model.placement import SublayerPlan, block_plans, has_final_norm
from nexa.model.precision import DTYPES

GENERATION = "generation_config.json"
MODULES = ("configuration_nexa.py", "modeling_nexa.py", "norms_nexa.py")
"""Modules that a folder carries when transformers does not know the model."""
_CLASSES = {"AutoConfig": "configuration_nexa.NexaConfig", "AutoModelForCausalLM": "modeling_nexa.NexaForCausalLM"}
"""Auto classes that they serve."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: `model_type` is `llama` or `nexa`, `weight_bytes` without headers."""

    source: Path
    path: Path
    model_type: str
    weight_bytes: int
    weight_files: int
    tokenizer: bool


def open_checkpoint(checkpoint: str | Path) -> tuple[Path, dict[str, Any], ModelConfig, NormConfig]:
    """(directory, config.json, what it says) of a checkpoint, or of a run's newest one, whose files are whole.

    Raises UserError naming the file that is missing or damaged.
    """
    source = load.find(checkpoint)
    catalog.verify_parts(source, ("model", catalog.CONFIG, GENERATION, *tokenizer_files.FILES))
    config = read_config(source)
    return source, config, *from_config_json(config, where=str(source / catalog.CONFIG))


def export(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    note: Note = lambda text: None,
) -> Exported:
    """Write a checkpoint, or a run's newest one, as a new folder that transformers opens.

    dtype: a key of `DTYPES`; statistics stay fp32. A LLaMA is written as `model_type: llama`; any other model is
    `nexa` and carries the modules of `nexa.interop.standalone`. Weights are copied in pieces: memory does not grow
    with the model.
    Raises UserError when the checkpoint is damaged (naming the file), when `destination` is there already, when it
    cannot be written, and for weights that `dtype` cannot hold.
    """
    target = Path(destination).absolute()
    check_free(target)
    source, config, model, norm = open_checkpoint(checkpoint)
    if norm.removal.start is not None:
        raise UserError(
            f"{source / catalog.CONFIG}: norm.removal.start={norm.removal.start}: its norms are being removed, which "
            f"an exported folder cannot say; when all are, export the result of `nexa convert {source} DST --to none`"
        )
    shapes = parameter_shapes(model, norm)
    with WeightFolder(source) as weights:
        weights.compare(shapes, source / catalog.CONFIG)
        with new_folder(target) as folder:
            kept = statistics(model, norm)
            written = write_weights(weights, shapes, folder, DTYPES[dtype], shard_bytes, note, kept)
            tokenizer = tokenizer_files.write_tokenizer(source, config, folder)
            config["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
            if config["model_type"] == NEXA:
                config |= standalone_config(model, norm)
                for name, path in standalone_files().items():
                    files.write_file(folder / name, files.read_chunks(path))
            files.write_json(folder / catalog.CONFIG, config)
            _write_generation_config(source, config, folder)
    weight_files = len(set(written.homes.values()))
    return Exported(source, target, config["model_type"], written.total_bytes, weight_files, tokenizer)


def standalone_files() -> dict[str, Path]:
    """{name in the folder: file} of the modules that compute a `nexa` model without nexa."""
    return {name: Path(__file__).with_name("standalone") / name for name in MODULES}


def standalone_config(model: ModelConfig, norm: NormConfig) -> dict[str, Any]:
    """What `config.json` says besides for these modules: where they are, and the plan of each block."""
    blocks = []
    for plan in block_plans(norm, model.num_hidden_layers):
        block = dataclasses.asdict(plan) | {"attn": _sublayer(plan.attn), "mlp": _sublayer(plan.mlp)}
        blocks.append({key: value for key, value in block.items() if value or key in {"attn", "mlp"}})
    return {"auto_map": dict(_CLASSES), "nexa_plan": {"blocks": blocks, "final_norm": has_final_norm(norm)}}


@functools.cache
def _absent() -> dict[str, Any]:
    return dataclasses.asdict(SublayerPlan())


def _sublayer(plan: SublayerPlan) -> dict[str, Any]:
    """What a plan says other than the default, without what matters to initial weights alone."""
    values = dataclasses.asdict(plan)
    return {key: value for key, value in values.items() if value != _absent()[key] and key != "output_gain"}


def _write_generation_config(source: Path, config: dict[str, Any], folder: Path) -> None:
    """The checkpoint's own, for a model that was imported with one; else the ids that begin and end a text."""
    if (source / GENERATION).is_file():
        files.write_file(folder / GENERATION, files.read_chunks(source / GENERATION))
        return
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    files.write_json(folder / GENERATION, ids)
