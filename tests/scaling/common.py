"""Small configurations for plans."""

from nexa.config.build import from_mapping
from nexa.config.schema import Config
from nexa.scaling.layout import Layout

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def configuration(**groups: dict) -> Config:
    """`SMALL`, one step, with further values by group."""
    model = SMALL | groups.pop("model", {})
    train = {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2} | groups.pop("train", {})
    data = {"sequence_length": 16} | groups.pop("data", {})
    return from_mapping({"model": model, "train": train, "data": data, **groups})


def layout(cfg: Config, world: int = 1, stage: int = 0, bucket: int = 1000, overlap: bool = False) -> Layout:
    """As if the engine had chosen this."""
    return Layout(cfg, world, stage, bucket, overlap)
