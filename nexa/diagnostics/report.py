"""diagnosis.json as one page: a table and figures of all runs side by side, in one file that needs no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from nexa.diagnostics.figures import DARK, FIGURES, LIGHT, Figure, Run, page_colours, run_style

Scalar = Callable[[Run], Any]
NOTHING = "–"


def _largest(name: str) -> Scalar:
    return lambda run: max((v for v in run["values"].get(name, []) if v is not None), default=None)


def _mean(name: str) -> Scalar:
    def find(run: Run) -> float | None:
        values = [value for value in run["values"].get(name, []) if value is not None]
        return sum(values) / len(values) if values else None

    return find


def _block(name: str, pick: Callable[..., int]) -> Scalar:
    """`value (block i)` of the block whose value `pick` (min or max) takes."""

    def find(run: Run) -> str | None:
        values = run["values"].get(name)
        if not values or None in values:
            return None
        number = pick(range(len(values)), key=values.__getitem__)
        return f"{_number(values[number])} (block {number})"

    return find


def _growth(run: Run) -> str | None:
    exponent = run["values"].get("growth_exponent")
    return None if exponent is None else f"{_number(exponent)} (r² {run['values']['growth_r2']:.2f})"


SCALARS: tuple[tuple[str, Scalar], ...] = (
    ("checkpoint", lambda run: run["checkpoint"]),
    ("step", lambda run: run["step"]),
    ("placement, kind of norm", lambda run: f"{run['placement']}, {run['kind']}"),
    ("blocks", lambda run: run["blocks"]),
    ("parameters", lambda run: run["parameters"]),
    ("tokens measured", lambda run: run["tokens"]),
    ("loss (nats per token)", lambda run: run["loss"]),
    ("perplexity", lambda run: math.exp(run["loss"]) if run["loss"] < 709 else None),
    ("variance after the last block", lambda run: run["values"].get("variance", [None])[-1]),
    ("growth exponent p of variance = a l^p, l ≥ 2", _growth),
    ("smallest block influence", _block("influence", min)),
    ("least loss increase without a block", _block("loss_increase", min)),
    ("largest loss increase without a block", _block("loss_increase", max)),
    ("gradient norm", lambda run: run["values"].get("gradient_norm_whole")),
    ("block with the largest gradient", _block("gradient_norm", max)),
    ("block with the smallest gradient", _block("gradient_norm", min)),
    ("largest attention logit", _largest("logit_max")),
    ("attention on the first token, mean of blocks", _mean("sink_share")),
    ("largest activation", _largest("top1")),
    ("massive activations in a sequence, most after a block", _largest("massive_count")),
    ("largest / median channel, most after a block", _largest("channel_ratio")),
    ("kurtosis, most after a block", _largest("kurtosis")),
)
"""Rows of the table; a run that did not measure one has a dash."""

_STYLE = """
:root{color-scheme:light dark;--page:#ffffff;--panel:#f6f7f9;--text:#1c2024;--quiet:#5b6570;--grid:#b9c0c8;LIGHT}
@media (prefers-color-scheme:dark){
:root{--page:#14171a;--panel:#1c2125;--text:#e8eaed;--quiet:#a3adb8;--grid:#565f69;DARK}}
body{margin:0 auto;max-width:1180px;padding:1.2rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.05rem;margin:0 0 .3rem}h3{font-size:.9rem;margin:.3rem 0}
p{margin:.3rem 0;color:var(--quiet)}
.runs{position:sticky;top:0;background:var(--page);padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;
border-bottom:1px solid var(--grid);z-index:1}
.runs svg{width:34px;height:10px;vertical-align:middle;margin-right:.4rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-size:.88rem}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid var(--grid);overflow-wrap:anywhere}
td{font-variant-numeric:tabular-nums}th[scope=row]{font-weight:normal;color:var(--quiet);min-width:15rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1rem}
figure{margin:0;padding:.8rem;background:var(--panel);border-radius:8px}figure.whole{grid-column:1/-1}
figure>svg,.heat svg{width:100%;height:auto;display:block}
.heats{display:flex;flex-wrap:wrap;gap:1rem}.heat{flex:1 1 300px;max-width:430px}
figcaption{color:var(--quiet);font-size:.86rem;margin-top:.4rem}
"""


def render(document: Mapping[str, Any]) -> str:
    """The page of a diagnosis.json."""
    runs: Sequence[Run] = document["runs"]
    title = "Diagnosis of " + ", ".join(run["label"] for run in runs)
    legend = "".join(f"<span>{_swatch(number)}{escape(run['label'])}</span>" for number, run in enumerate(runs))
    figures = "\n".join(_figure(figure, runs) for figure in FIGURES if _measured(figure, runs))
    about = f"Measured on {document['data']}, in sequences of {document['sequence_length']} tokens."
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{_style()}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n"
        f'<div class="runs">{legend}</div>\n<div class="wide">{_table(runs)}</div>\n'
        f'<div class="figures">\n{figures}\n</div>\n</body></html>\n'
    )


def _style() -> str:
    light, dark = (
        "".join(f"--run{number}:{colour};" for number, colour in enumerate(colours)) for colours in (LIGHT, DARK)
    )
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _swatch(number: int) -> str:
    colour, dashes = run_style(number)
    line = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"'
    return f'<svg viewBox="0 0 34 10" aria-hidden="true"><path d="M0 5H34" {line}/></svg>'


def _measured(figure: Figure, runs: Sequence[Run]) -> bool:
    return all(figure.name in run["values"] for run in runs)


def _figure(figure: Figure, runs: Sequence[Run]) -> str:
    pictures = [(heading, page_colours(svg)) for heading, svg in figure.draw(runs)]
    label = f'role="img" aria-label="{escape(figure.title)}"'
    drawn = [(heading, svg.replace("<svg", f"<svg {label}", 1)) for heading, svg in pictures]
    if any(heading for heading, _ in drawn):
        body = "".join(f'<div class="heat"><h3>{escape(heading)}</h3>{svg}</div>' for heading, svg in drawn)
        body = f'<div class="heats">{body}</div>'
    else:
        body = drawn[0][1]
    kind = ' class="whole"' if figure.wide else ""
    return (
        f'<figure id="{figure.name}"{kind}><h2>{escape(figure.title)}</h2>{body}'
        f"<figcaption>{escape(figure.what)}</figcaption></figure>"
    )


def _cells(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, one text for each run) of every row of the table that says something."""
    rows = [(name, [_number(scalar(run)) for run in runs]) for name, scalar in SCALARS]
    return [(name, cells) for name, cells in rows if set(cells) != {NOTHING}]


def table_lines(runs: Sequence[Run]) -> list[str]:
    """The table as aligned lines for a terminal, without the checkpoints' paths."""
    rows = [("", [run["label"] for run in runs]), *(row for row in _cells(runs) if row[0] != "checkpoint")]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(cells[number]) for _, cells in rows) for number in range(len(runs))]
    return [
        f"{name:<{first}}  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        for name, cells in rows
    ]


def _table(runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{escape(run["label"])}</th>' for run in runs)
    rows = []
    for name, cells in _cells(runs):
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{columns}</tr>')
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: Any) -> str:
    """Four digits of a number, thousands apart in an integer; a dash for nothing."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
