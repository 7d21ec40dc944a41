"""The `nexa` command as a user meets it."""

import json

import pytest

from nexa.cli import main as cli
from tests.cli.common import tiny_model, write_checkpoint
from tests.conftest import processor_seconds, run_command


def nexa(*arguments, **options):
    return run_command("-m", "nexa.cli.main", *arguments, **options)


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return (ended.value.code, *capsys.readouterr())


def test_help_is_quick_and_lists_every_command():
    before = processor_seconds()
    done = nexa("--help")
    assert processor_seconds() - before < 0.5
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_loads_nothing_heavy(command):
    code = (
        "import sys\nfrom nexa.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'datasets', 'hydra') if m in sys.modules])"
    )
    done = run_command("-c", code, command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: nexa {command}")
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scor"], "unknown command 'scor'; did you mean score?"),
        (["frobnicate"], "there are data, config"),
        ([], "COMMAND"),
        (["score", "somewhere"], "FILE"),
        (["score", "a", "b", "--batch-size", "many"], "--batch-size"),
        (["score", "a", "b", "--nonsense"], "--nonsense"),
        (["generate", "somewhere"], "--prompt"),
        (["generate", "no/such/run", "--prompt", "x"], "no/such/run"),
        (["generate", "x", "--prompt", "x", "--temperature", "-1"], "--temperature -1"),
        (["doctor", "--verbose"], "--verbose"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("nexa: error:") == 1
    assert "Traceback" not in err


def test_a_damaged_checkpoint_in_a_process_of_its_own(tmp_path):
    path = write_checkpoint(tiny_model(), tmp_path)
    (path / "config.json").write_text("{}")
    done = nexa("generate", str(tmp_path), "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m nexa.cli.main config | head -n 1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_score_and_generate(tmp_path, capsys):
    write_checkpoint(tiny_model("peri"), tmp_path)
    text = tmp_path / "t.txt"
    text.write_text("some text to score")
    code, out, _ = run(capsys, "score", tmp_path, text, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["tokens"], found["bytes"], found["sequence_length"], found["stride"]) == (18, 18, 16, 16)
    code, out, _ = run(capsys, "score", tmp_path, text)
    assert f"{found['loss']:.6f}" in out
    code, out, _ = run(capsys, "generate", tmp_path, "--prompt", "some", "--max-new-tokens", "3", "--greedy")
    assert code == 0
    assert out.startswith("some")


def test_version(capsys):
    import nexa as package

    assert run(capsys, "--version")[:2] == (0, f"nexa {package.__version__}\n")
