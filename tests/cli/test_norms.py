"""`nexa norms` says what the tables and the check say."""

import json

import pytest

from nexa.cli import norms
from nexa.cli.main import main
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS


def output(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["norms", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_row_is_there_and_every_pair_but_bhyts_allowed(capsys):
    found = json.loads(output(capsys, "--json"))
    assert set(found["placements"]) == set(PLACEMENTS)
    assert set(found["kinds"]) == set(KINDS)
    others = [placement for placement in norms.PLACEMENTS if placement not in {"pre", "lns"}]
    assert list(found["refused"]) == [f"{placement} bhyt" for placement in others]
    last = output(capsys).splitlines()[-1]
    assert last.startswith(f"  {', '.join(others)} bhyt: norm.kind=bhyt: the norm before the feed-forward takes its")


def test_the_equations_are_the_papers():
    assert norms.equations("pre", 3) == ["x = x + a(N(x))", "x = x + m(N(x))"]
    assert norms.equations("post", 3) == ["x = N(x + a(x))", "x = N(x + m(x))"]
    assert norms.equations("peri", 3) == ["x = x + N(a(N(x)))", "x = x + N(m(N(x)))"]
    assert norms.equations("lns", 3) == ["x = x + a(0.5 N(x))", "x = x + m(0.5 N(x))"]
    assert norms.equations("hybrid_star", 3) == ["x = N(x + a_qkvnorm(x))", "x = x + m(x)"]
    assert norms.equations("deepnorm", 3) == ["x = N(1.68 x + a(x))", "x = N(1.68 x + m(x))"]
    assert norms.equations("normformer", 3) == ["x = x + N(a_headscale(N(x)))", "x = x + m_midnorm(N(x))"]


def test_blocks_that_differ_are_both_shown(capsys):
    assert norms.equations("mix", 0) == norms.equations("post", 0)
    assert norms.equations("mix", 3) == norms.equations("pre", 3)
    lines = output(capsys).splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith("  mix "))
    assert lines[row].split("  mix")[1].strip().startswith("x = N(x + a(x))")
    assert lines[row + 1].strip().startswith("x = x + a(N(x))")


def test_a_refused_pair_is_shown_with_its_reason(capsys, monkeypatch):
    why = "norm.kind=dyt: a reason"
    refuse = lambda placement, kind: [why] if (placement, kind) == ("post", "dyt") else []  # noqa: E731
    monkeypatch.setattr(norms, "refusals", refuse)
    lines = output(capsys).splitlines()
    table = lines[lines.index("which go together") + 1 :]
    columns = dict(
        zip(table[0].split(), next(row for row in table if row.startswith("  post")).split()[1:], strict=True)
    )
    assert columns == {kind: "no" if kind == "dyt" else "yes" for kind in KINDS}
    assert f"  post dyt: {why}" in table


def test_the_check_is_asked():
    assert norms.refusals("mix", "gatednorm") == []
