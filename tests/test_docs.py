"""Every command in README and docs is one the programs accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nexa.cli.main import build_parser
from nexa.config import check, compose
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LAUNCHERS = re.compile(r"(?:python|torchrun(?: --nproc-per-node=(\d+))?) train\.py (.*)")


def commands(page: Path) -> list[str]:
    """Lines of ```bash blocks, without comments; lines of scripts with variables or continuations are left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if "#!" not in block]
    return [line for line in lines if line and not line.startswith("#") and not line.endswith("\\")]


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), [case for case in ALL if "train.py" in case[1]])
def test_training_commands_compose_and_validate(page: str, command: str) -> None:
    found = LAUNCHERS.fullmatch(command)
    assert found, command
    words = shlex.split(found[2])
    if any(word.startswith("--") or word == "-m" for word in words):
        pytest.skip("Hydra's own flags are tested in tests/config")
    assert check(compose(words), world_size=int(found[1] or 1)) == []


@pytest.mark.parametrize(("page", "command"), [case for case in ALL if case[1].startswith("nexa ")])
def test_nexa_commands_parse(page: str, command: str) -> None:
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    assert callable(arguments.handler)


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in {word for _, command in ALL for word in re.findall(r"^make (\w+)", command)}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"
