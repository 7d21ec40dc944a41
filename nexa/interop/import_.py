"""A Hugging Face folder as a checkpoint."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import torch

from nexa.api import read_config
from nexa.checkpoint import catalog, files
from nexa.checkpoint.fragment import WEIGHT
from nexa.config import check, from_mapping
from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError
from nexa.interop import tokenizer_files
from nexa.interop.destination import check_free, new_folder
from nexa.interop.export import GENERATION
from nexa.interop.huggingface import config_json, from_config_json
from nexa.interop.weights import SHARD_BYTES, Note, Shapes, WeightFolder, Written, parameter_shapes, write_weights
from nexa.model.decoder import parameter_count

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = ".rotary_emb.inv_freq"
"""End of the names of tables that old releases of transformers stored and that follow from the configuration."""
_NOT_SIZES = {"initializer", "initializer_range", "attention"}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Imported:
    """The checkpoint that was written, and the architecture for a run that goes on from it."""

    path: Path
    model: ModelConfig
    norm: NormConfig
    parameters: int
    weight_bytes: int
    tokenizer: bool

    def overrides(self) -> list[str]:
        """Arguments of train.py that make the same model and start from these weights."""
        return overrides(self.path, self.model, self.norm, "weights_only")


def overrides(path: Path, model: ModelConfig, norm: NormConfig, mode: str) -> list[str]:
    """Arguments of train.py that make a model and start from a checkpoint of it, as `resume.mode` says."""
    sizes = dataclasses.asdict(model)
    norms, default = dataclasses.asdict(norm), dataclasses.asdict(NormConfig())
    words = {"resume.mode": mode, "resume.path": path}
    words |= {f"model.{key}": one for key, one in sizes.items() if one is not None and key not in _NOT_SIZES}
    words |= {f"norm.{key}": one for key, one in norms.items() if key == "placement" or one != default[key]}
    return [f"{key}={str(one).lower() if isinstance(one, bool) else one}" for key, one in words.items()]


def import_folder(source: str | Path, destination: str | Path, *, note: Note = lambda text: None) -> Imported:
    """Write a Hugging Face folder (a LLaMA, or what `export` wrote) as a new checkpoint of step 0, in fp32.

    `destination` is the checkpoint itself: every layout starts from it with `resume.mode=weights_only`, and score,
    generate and export read it. Weights are copied in pieces: memory does not grow with the model.
    Raises UserError naming file and key for what is missing, damaged or cannot be represented, and when
    `destination` is there already or cannot be written.
    """
    folder, target = Path(source), Path(destination).absolute()
    check_free(target)
    _check_source(folder)
    config = read_config(folder)
    where = str(folder / catalog.CONFIG)
    model, norm = from_config_json(config, where)
    checked = from_mapping({"model": dataclasses.asdict(model), "norm": dataclasses.asdict(norm)})
    if problems := [one for one in check(checked) if one.startswith(("model.", "norm."))]:
        raise UserError(f"{where}: " + "; ".join(problems))
    shapes = parameter_shapes(model, norm)
    with WeightFolder(folder) as weights:
        _check_weights(weights, shapes, model.tie_word_embeddings)
        with new_folder(target) as aside:
            written = write_weights(weights, shapes, aside, torch.float32, SHARD_BYTES, note)
            records = copy_beside(folder, aside)
            eos = _first(config.get("eos_token_id"))
            ours = config_json(model, norm, eos_token_id=eos) | {"bos_token_id": _first(config.get("bos_token_id"))}
            if "nexa_tokenizer" in config:
                ours["nexa_tokenizer"] = config["nexa_tokenizer"]
            records[catalog.CONFIG] = files.write_json(aside / catalog.CONFIG, ours)
            complete(aside, written, shapes, records, {"imported_from": str(folder.absolute())})
    count = parameter_count(model, norm)
    return Imported(target, model, norm, count, written.total_bytes, tokenizer_files.TOKENIZER in records)


def _check_source(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, not a directory" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give a Hugging Face folder: config.json and safetensors")
    if catalog.is_complete(folder):
        raise UserError(f"{folder} is a checkpoint of nexa already; use it as it stands")
    if not (folder / catalog.CONFIG).is_file():
        raise UserError(f"{folder} has no {catalog.CONFIG}; give a Hugging Face folder: config.json and safetensors")


def _first(token_ids: Any) -> int | None:
    """One id of a configuration's value, which may be a list: the first is the end of a text, others end a turn."""
    one = token_ids[0] if isinstance(token_ids, list) and token_ids else token_ids
    return one if isinstance(one, int) else None


def _check_weights(weights: WeightFolder, shapes: Shapes, tied: bool) -> None:
    """Raises UserError unless the tensors are those of the model, in a type that fp32 holds exactly."""
    for name in [name for name in weights.entries if name.endswith(_IGNORED)]:
        del weights.entries[name]
    for name, entry in weights.entries.items():
        if entry.dtype not in _TYPES:
            known = ", ".join(str(one).removeprefix("torch.") for one in _TYPES)
            raise UserError(f"{weights.file_of(name)}: {name} is {entry.dtype}; nexa imports {known}")
    if tied and HEAD in weights.entries and EMBEDDING in weights.entries:
        if not weights.same(HEAD, EMBEDDING):
            raise UserError(
                f"{weights.folder / catalog.CONFIG}: tie_word_embeddings=True, but {HEAD} in "
                f"{weights.file_of(HEAD).name} differs from {EMBEDDING}; set it to false if the head is its own"
            )
        del weights.entries[HEAD]
    weights.compare(shapes, weights.folder / catalog.CONFIG)


def copy_beside(source: Path, target: Path) -> dict[str, files.FileRecord]:
    """Copy the tokenizer and the settings of generation, of which any may be absent."""
    present = [name for name in (*tokenizer_files.FILES, GENERATION) if (source / name).is_file()]
    return {name: files.write_file(target / name, files.read_chunks(source / name)) for name in present}


def complete(
    folder: Path, written: Written, shapes: Shapes, extra: dict[str, files.FileRecord], origin: dict[str, Any]
) -> None:
    """State, manifest and marker of a folder with weights alone, where training has not begun: see `seal`."""
    # a run that reads it takes the weights alone; these keys say that nothing has happened yet
    state = {
        "state": {"step": 0, "samples": 0, "tokens": 0, "skipped": 0},
        "data": {},
        "optim": {},
        "total_steps": 0,
        "tokens_by_source": {},
        "scalars": {},
    }
    states = {name: {WEIGHT: written.homes[name]} for name in shapes}
    seal(folder, written.files | extra, shapes, states, 0, state | origin)


def seal(
    folder: Path,
    records: dict[str, files.FileRecord],
    shapes: Shapes,
    states: dict[str, dict[str, str]],
    step: int,
    state: dict[str, Any],
    **more: Any,
) -> None:
    """Write `state.json`, manifest and marker: what makes a folder a checkpoint (see `nexa.checkpoint.commit`).

    states: for each parameter the file of each of its states. more: further keys of the manifest.
    """
    records = records | {catalog.STATE: files.write_json(folder / catalog.STATE, state)}
    manifest = {
        "format": catalog.FORMAT,
        "version": catalog.VERSION,
        "step": step,
        "world_size": 1,
        "files": {name: dataclasses.asdict(record) for name, record in records.items()},
        "parameters": {name: {"shape": list(shape), "states": states[name]} for name, shape in shapes.items()},
    }
    record = files.write_json(folder / catalog.MANIFEST, manifest | more)
    marker = {"step": step, "attempt": secrets.token_hex(6), "manifest_sha256": record.sha256}
    files.write_json(folder / catalog.COMPLETE, marker)
