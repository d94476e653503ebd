"""One HTML page with everything inside it: sections, tables, pictures, readable in light and dark and on a phone."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llama_mini.lab.reporting.style import DARK, INK, LIGHT
from llama_mini.lab.table import Table

_CSS = f"""
:root{{color-scheme:light dark;--ink:{INK};--page:{LIGHT};--line:#8884;--soft:#8882}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e6edf3;--page:{DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:60rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}}
h1,h2,h3{{line-height:1.25}}
h2{{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}}
h3{{font-size:.95rem;margin:.5rem 0}}
figure{{margin:1rem 0}}
.wide{{overflow-x:auto}}
.wide svg{{display:block;width:100%;min-width:34rem;height:auto}}
figcaption{{font-size:.9rem;margin-top:.5rem}}
.blocks{{display:flex;flex-wrap:wrap;gap:1rem 2rem}}
.blocks div{{flex:0 1 17rem;min-width:0}}
.blocks svg{{display:block;width:100%;height:auto}}
table{{border-collapse:collapse;font-size:.9rem}}
th,td{{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line);
overflow-wrap:normal}}
td.number{{text-align:right;font-variant-numeric:tabular-nums}}
td.text{{overflow-wrap:anywhere;min-width:6rem}}
code{{background:var(--soft);border-radius:.2rem;padding:0 .2rem;white-space:pre-wrap}}
summary{{cursor:pointer}}
"""

COMMAND = "python -m llama_mini.lab"


@dataclass(frozen=True)
class Shell:
    """The options that name a model, and a text, on the lab's command line."""

    model: str
    text: str

    def command(self, words: str) -> str:
        return f"{COMMAND} {words} {self.model} {self.text}"


def page(title: str, sections: Sequence[str]) -> str:
    """The whole file. The title is text, the sections are HTML."""
    name = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def picture(svg: str, seen: str, command: str, title: str) -> str:
    """An <svg> with its caption: what is seen, and the command or the call that made it."""
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f'<figure><div class="wide">{labelled}</div>{caption(seen, command)}</figure>'


def caption(seen: str, command: str) -> str:
    return f"<figcaption>{escape(seen)} Made by <code>{escape(command)}</code>.</figcaption>"


def facts(rows: dict[str, str]) -> str:
    cells = "".join(f'<tr><th>{escape(k)}</th><td class="text">{escape(v)}</td></tr>' for k, v in rows.items())
    return f"<table>{cells}</table>"


def table(rows: Table[Any] | Sequence[dict[str, Any]]) -> str:
    """A header and a line a row; floats have four significant digits."""
    lines = [row if isinstance(row, dict) else vars(row) for row in rows]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in lines[0])
    body = "".join(f"<tr>{''.join(map(_cell, line.values()))}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def number(value: float) -> str:
    """Four significant digits, or a whole number with commas."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{number(value)}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    return f'<td class="text">{"–" if value is None else escape(str(value))}</td>'
