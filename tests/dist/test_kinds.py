"""Every kind of norm under ZeRO and tensor parallelism against a plain PyTorch loop.

What could go wrong is the kinds' own: parameters of one number, of a module beside its children (the embedding's
scale), matrices inside a norm, which ZeRO-3 must gather while the norm runs, and statistics of features that ranks
share (NormFormer's norm inside the feed-forward).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nexa.config.norm_checks import BHYT_PLACEMENTS
from nexa.model.kinds import KINDS
from tests.dist.common import check, config
from tests.dist.grid import STAGES, parallel


def case(kind: str, placement: str, stage: int, layout: tuple[int, int, bool]) -> dict:
    norm = {"kind": kind, "gate_rank": 3, "embedding": True, "placement": placement}
    if kind == "bhyt":
        # two tokens: the approximation is then no small part of the variance
        norm |= {"bhyt_tokens": 2, "placement": placement if placement in BHYT_PLACEMENTS else "lns"}
    if kind in {"powernorm", "unifiednorm"}:
        norm["warmup_steps"] = 6  # then 14 steps of running statistics
    # weights of 1/sqrt(d): with smaller ones DyT would be linear, and a wrong one not seen
    weights = 0.5 if kind == "bhyt" else 0.2
    small = {
        "model": {"num_hidden_layers": 2, "initializer_range": weights},
        "train": {"micro_batch_size": 8 // layout[1]},
    }
    return config(norm=norm, parallel=parallel(stage, layout), **small)


def test_data_parallel(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in {"rmsnorm", "layernorm"}]
    cases = [case(kind, "pre", stage, (1, 2, False)) for kind in kinds for stage in (1, 3)]
    # the other stages for what also communicates by itself
    cases += [case("unifiednorm", "pre", 0, (1, 2, False)), case("powernorm", "post", 2, (1, 2, False))]
    check(tmp_path, cases, processes=2)


def test_features_that_ranks_share(tmp_path: Path) -> None:
    whole = [case(kind, "normformer", 1, (2, 1, False)) for kind in KINDS]
    shared = [case(kind, "normformer", 3, (2, 1, True)) for kind in KINDS]
    check(tmp_path, whole + shared, processes=2)


def with_options(case: dict, **model: object) -> dict:
    return {**case, "model": {**case["model"], **model}}


def options(stage: int, layout: tuple[int, int, bool]) -> list[dict]:
    """Gates, weights before the statistics and scales after the projection; FixNorm's embedding, which is the head."""
    first, second = case("rmsnorm", "normformer", stage, layout), case("layernorm", "pre", stage, layout)
    first["norm"] |= {"pre_affine": True, "head_scale": "output"}
    second["norm"] |= {"embedding": False}
    tied = {"fixnorm": True, "tie_word_embeddings": True}
    return [with_options(first, attention_gate="elementwise"), with_options(second, attention_gate="headwise", **tied)]


def test_options(tmp_path: Path) -> None:
    check(tmp_path, options(1, (2, 1, False)) + options(3, (2, 1, True)), processes=2)


def test_bhyt_gathers_the_matrices_it_needs(tmp_path: Path) -> None:
    """Wide enough that DeepSpeed partitions them, and one key-value head, which all tensor-parallel ranks have."""
    wide = case("bhyt", "pre", 3, (1, 2, False))
    wide = with_options(wide, hidden_size=320, num_key_value_heads=4, initializer_range=0.05)
    wide["train"] |= {"activation_checkpointing": "full"}
    check(tmp_path, [wide, with_options(case("bhyt", "pre", 1, (2, 1, True)), num_key_value_heads=1)], processes=2)


@pytest.mark.slow
def test_options_grid(tmp_path: Path) -> None:
    layouts = [(1, 4, False), (2, 2, False), (2, 2, True)]
    check(tmp_path, [one for stage in STAGES for layout in layouts for one in options(stage, layout)], processes=4)
def test_learned_scales_of_sublayers(tmp_path: Path) -> None:
    scales = [("skip_init", 1, (2, 1, True)), ("layer_scale", 3, (2, 1, True)), ("layer_scale", 2, (1, 2, False))]
    cases = [
        config(
            norm={"placement": "peri", "branch_scale": scale, "depth_scaling": True},
            parallel=parallel(stage, layout),
            model={"num_hidden_layers": 2},
            train={"micro_batch_size": 8 // layout[1]},
        )
        for scale, stage, layout in scales
    ]
    check(tmp_path, cases, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post", "dssn", "normformer"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bhyt"])
def test_grid(tmp_path: Path, kind: str, placement: str) -> None:
    layouts = [(1, 4, False), (2, 2, False), (2, 2, True)]
    check(tmp_path, [case(kind, placement, stage, layout) for stage in STAGES for layout in layouts], processes=4)


@pytest.mark.slow
@pytest.mark.parametrize("placement", BHYT_PLACEMENTS)
def test_bhyt_grid(tmp_path: Path, placement: str) -> None:
    layouts = [(1, 4, False), (2, 2, False), (2, 2, True)]
    check(tmp_path, [case("bhyt", placement, stage, layout) for stage in STAGES for layout in layouts], processes=4)
