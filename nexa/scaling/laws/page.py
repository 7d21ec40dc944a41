"""A law and curves as one HTML page: parameters, errors, warnings and the figure. No script, nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nexa.scaling.laws import files
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.figures import svg
from nexa.scaling.laws.files import Fitted
from nexa.scaling.laws.fit import score

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 52em; margin: 2em auto; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 1.8em; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .2em 1em .2em 0; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: 1em; } li { margin: .3em 0; } svg { max-width: 100%; height: auto; }
"""


def write(path: str | Path, fitted: Fitted, curves: Sequence[Curve], warnings: Sequence[str]) -> None:
    """Write the page. Raises UserError when it cannot be written."""
    files.write(path, page(fitted, curves, warnings))


def page(fitted: Fitted, curves: Sequence[Curve], warnings: Sequence[str]) -> str:
    """The page as text. `warnings`: about the curves; those of the fit are the law's own."""
    law = fitted.law
    equation = (inspect.getdoc(type(law)) or "").partition("\n\n")[0].replace("\n", " ")
    said = [*fitted.warnings, *(text for text in warnings if text not in fitted.warnings)]
    items = "".join(f"<li>{escape(text)}</li>" for text in said) or "<li>none</li>"
    conventions = ", ".join(f"{key} {value}" for key, value in law.chosen.items())
    parts = [
        f"<h1>Loss-curve law <code>{escape(law.name)}</code></h1>",
        f"<p>{escape(equation)}</p>",
        f"<p>Convention: {escape(conventions)}.</p>" if conventions else "",
        f"<h2>Parameters</h2>{_parameters(fitted)}",
        f"<h2>Curves</h2>{_errors(fitted, curves)}",
        f"<h2>Warnings</h2><ul>{items}</ul>",
        "<h2>Figure</h2><p>Dots are measured, lines the law, bands its 95 % intervals where there was a bootstrap.</p>",
        _embedded(svg(fitted, curves)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(law.name)}</title><style>{STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{c}</{tag}>' for c in others) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _parameters(fitted: Fitted) -> str:
    intervals = fitted.intervals()
    rows = []
    for name, value in fitted.params.items():
        kind = "" if name in fitted.law.fitted else "fixed"
        between = f"{intervals[name][0]:.5g} to {intervals[name][1]:.5g}" if name in intervals and not kind else kind
        rows.append([name, f"{value:.6g}", between or "no bootstrap"])
    return _table(["", "value", "95 % interval"], rows)


def _errors(fitted: Fitted, curves: Sequence[Curve]) -> str:
    """Errors over the rows after warm-up, and the last row, of each curve."""
    rows = []
    for curve in curves:
        last, entry = float(fitted.predict(curve)[-1]), score(fitted.law, fitted.params, curve)
        errors = ["", "", "", ""]
        if curve.measured:
            shares = (f"{entry['mean_relative_error']:.3%}", f"{entry['worst_relative_error']:.3%}")
            errors = [f"{entry['mae']:.5f}", *shares, f"{entry['r2']:.4f}"]
        rows.append([curve.path, *errors, str(curve.step[-1]), f"{last:.4f}"])
    return _table(["curve", "mean |r|", "mean |r| / loss", "worst", "R2", "last step", "law there"], rows)


def _embedded(drawing: str) -> str:
    """The `svg` element of an SVG file, without what only a file needs."""
    element = drawing[drawing.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.S)
