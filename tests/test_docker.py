"""The image's recipe: what it copies exists, what it runs is pinned, it has no root and no secrets; and it installs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nexa.config import check, compose
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "docker"
RECIPE = FOLDER / "Dockerfile"
SECRET = re.compile(
    r"(?i)(password|passwd|secret|token|api_?key|credential|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s]+:[^/\s]+@)"
)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words) of a Dockerfile, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    found = [line.strip().split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(words[0].upper(), words[1] if len(words) > 1 else "") for words in found]


STEPS = instructions(RECIPE.read_text())
LAST = max(index for index, (name, _) in enumerate(STEPS) if name == "FROM")


def sources() -> list[str]:
    """Paths of the repository that the recipe copies."""
    copies = [shlex.split(words) for name, words in STEPS if name in {"COPY", "ADD"}]
    return [word for words in copies if not words[0].startswith("--from") for word in words[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that fits it or a folder above it decides."""
    out = False
    parts = Path(path).parts
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        anywhere = line.removeprefix("!").startswith("**/")
        tops = parts if anywhere else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch(top, pattern) for top in tops):
            out = not line.startswith("!")
    return out


def test_what_is_copied_exists_and_is_sent() -> None:
    assert {"nexa", "data_pipeline", "conf", "train.py", "pyproject.toml", "constraints.txt"} <= set(sources())
    for path in sources():
        assert (REPOSITORY / path).exists(), path
        assert not ignored(path), path


@pytest.mark.parametrize(
    "path", [".git/config", ".env", "nexa/.env", "runs/a/x", ".venv/bin/python", "nexa/a.pyc", "tests"]
)
def test_nothing_else_is_sent(path: str) -> None:
    assert ignored(path)


def test_the_base_is_pinned_by_digest() -> None:
    arguments = dict(words.split("=", 1) for name, words in STEPS if name == "ARG" and "=" in words)
    stages = set()
    for name, words in STEPS:
        if name == "FROM":
            image, _, alias = words.partition(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
            assert image in stages or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", image), image
            stages.add(alias)


def test_the_python_of_the_base_is_one_that_is_tested() -> None:
    found = re.search(r"python:(\d+)\.(\d+)\.", RECIPE.read_text())
    assert found and (int(found[1]), int(found[2])) >= (3, 11)


def test_everything_installed_is_pinned() -> None:
    for name in ("constraints.txt", "docker/constraints-build.txt"):
        lines = [line for line in (REPOSITORY / name).read_text().splitlines() if line and not line.startswith("#")]
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), name
    installs = [line for line in (FOLDER / "install.sh").read_text().splitlines() if line.startswith("$pip")]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line or "docker/constraints-build.txt" in line for line in installs)
    run = " ".join(words for name, words in STEPS if name == "RUN")
    assert "apt-get" not in run and "pip install" not in run and "curl" not in run and "wget" not in run


def test_it_runs_as_nobody_special() -> None:
    users = [words for name, words in STEPS[LAST:] if name == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    after = [name for name, _ in STEPS[LAST:]][[name for name, _ in STEPS[LAST:]].index("USER") :]
    assert "RUN" not in after and "COPY" not in after


def test_nothing_is_left_over_from_building() -> None:
    """Compilers and caches stay in the first stage; the second only copies the environment out of it."""
    assert [words for name, words in STEPS[LAST:] if name == "COPY" and "--from" in words] == [
        "--from=build /opt/venv /opt/venv"
    ]
    assert "--no-cache-dir" in (FOLDER / "install.sh").read_text()
    assert not any("install.sh" in words for _, words in STEPS[LAST:])


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_secrets(path: Path) -> None:
    assert not SECRET.search(path.read_text())


def test_the_page_uses_what_is_in_the_image() -> None:
    page = (REPOSITORY / "docs" / "containers.md").read_text()
    assert ("WORKDIR", "/opt/nexa") in STEPS and ("WORKDIR", "/work") in STEPS
    runs = re.findall(r"(\S*)train\.py (.*)", page)
    assert runs and all(folder == "/opt/nexa/" for folder, _ in runs)
    for _, words in runs:
        assert check(compose(shlex.split(words)), world_size=8) == []


def test_install_refuses_another_device() -> None:
    found = subprocess.run(
        ["sh", "docker/install.sh", "tpu", "/nowhere"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "must be cpu or gpu" in found.stderr


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    subprocess.run(["hadolint", "--no-color", str(RECIPE)], check=True)


@pytest.mark.slow
def test_the_steps_run_and_the_command_works(tmp_path: Path) -> None:
    """The recipe by hand: what it copies, where it installs, and a configuration that composes from there."""
    root = tmp_path / "nexa"
    for path in {*sources(), "docker/install.sh", "docker/constraints-build.txt"}:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        origin = REPOSITORY / path
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, target)
    venv = tmp_path / "venv"
    clean = {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    try:
        socket.getaddrinfo("download.pytorch.org", 443)
    except OSError:  # a mirror of Python packages must do, which pip's own configuration names
        clean["TORCH_INDEX"] = "https://pypi.org/simple"
    passed = {name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "ssl_", "http"))}
    subprocess.run(["sh", "docker/install.sh", "cpu", str(venv)], cwd=root, env=clean | passed, check=True)
    elsewhere = tmp_path / "work"
    elsewhere.mkdir()
    for words in (["nexa", "doctor"], ["nexa", "plan", "+exp=pre_130m"], ["python", str(root / "train.py"), "--help"]):
        subprocess.run([str(venv / "bin" / words[0]), *words[1:]], cwd=elsewhere, env=clean, check=True)
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    code = "import torch, deepspeed; print(torch.__version__.split('+')[0], deepspeed.__version__)"
    python = str(venv / "bin" / "python")
    found = subprocess.run([python, "-c", code], env=clean, check=True, capture_output=True, text=True).stdout.split()
    assert found[-2:] == [pins["torch"], pins["deepspeed"]]
