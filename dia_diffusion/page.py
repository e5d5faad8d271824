"""Write reports as HTML pages that hold their pictures and need no server, network or other file."""

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from .files import replace_text

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#0b57d0, #8ab4f8) }
* { box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2; text-wrap: balance }
h2 { margin-top: 2.5rem; font-size: 1.25rem }
a { color: var(--accent) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem }
dt { font-weight: 600 }
dd { margin: 0 }
.wide { overflow-x: auto; margin: 1rem 0;
  background:
    linear-gradient(to right, Canvas 2rem, transparent) local, linear-gradient(to left, Canvas 2rem, transparent) local,
    linear-gradient(to right, var(--line), transparent 1rem), linear-gradient(to left, var(--line), transparent 1rem) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
td, th { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left }
th { white-space: normal; vertical-align: bottom; overflow-wrap: normal }
th[data-sorts] { cursor: pointer; user-select: none }
th[aria-sort=ascending]::after { content: " \\25b2" }
th[aria-sort=descending]::after { content: " \\25bc" }
img { max-width: 100%; height: auto; background: white }
img.pixels { image-rendering: pixelated }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); border-radius: .3rem }
summary { cursor: pointer }
@media (max-width: 40rem) {
  table { font-size: .85rem }
  .plot img { max-width: none; width: 44rem }
  dl { display: block }
  dd { margin: 0 0 .5rem }
  td, th { padding: .25rem .4rem }
  td:first-child { white-space: normal; overflow-wrap: normal }
}
"""
# A click on a head sorts by its column: by the first number in each cell, or by text where there are none.
_SCRIPT = """
for (const head of document.querySelectorAll('th[data-sorts]')) {
  const sort = () => {
    const column = head.cellIndex, body = head.closest('table').tBodies[0];
    const up = head.getAttribute('aria-sort') !== 'ascending', rows = [...body.rows];
    const text = row => row.cells[column].textContent.trim();
    const number = row => parseFloat(text(row).replace(/,/g, '').replace('\\u2212', '-'));
    const numeric = rows.some(row => !isNaN(number(row)));
    rows.sort((a, b) => {
      if (!numeric) return (up ? 1 : -1) * text(a).localeCompare(text(b));
      const [x, y] = [number(a), number(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return up ? x - y : y - x;
    });
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    body.append(...rows);
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
"""


def write_page(path: Path, title: str, parts: Sequence[str], raw: Sequence[Path] = ()) -> None:
    """Write a page.

    Args:
        path (`Path`): The file.
        title (`str`): Its heading.
        parts (sequence of `str`): HTML from the functions below.
        raw (sequence of `Path`, *optional*): Files of figures to link to.
    """
    links = [f"<a href='{quote(os.path.relpath(file, path.parent))}'>{html.escape(file.name)}</a>" for file in raw]
    figures = [f"<p>Raw figures: {', '.join(links)}</p>"] if links else []
    head = (
        "<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
    )
    body = [f"<h1>{html.escape(title)}</h1>", *parts, *figures]
    replace_text(path, head + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n</html>\n")


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def prose(text: str) -> str:
    """Return a paragraph, with `code` and **strong** words as in Markdown."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"[*][*]([^*]+)[*][*]", r"<b>\1</b>", text)
    return f"<p>{text}</p>"


def definitions(facts: Mapping[str, str]) -> str:
    """Return a list of facts, each under its title."""
    lines = [f"<dt>{html.escape(title)}</dt><dd>{html.escape(text)}</dd>" for title, text in facts.items()]
    return "<dl>" + "\n".join(lines) + "</dl>"


def folded(title: str, text: str) -> str:
    """Return a text that a click unfolds."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def picture(image: Image.Image | Path, description: str, pixels: bool = False) -> str:
    """Return an `img` element of a picture or a PNG file; with `pixels`, enlarging does not smooth it."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    kind, text = " class='pixels'" if pixels else "", html.escape(description, quote=True)
    return f"<img{kind} alt='{text}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def plot(path: Path, description: str) -> str:
    """Return a picture of a plot, which scrolls inside of the page where the page is narrow."""
    return f"<div class='wide plot'>{picture(path, description)}</div>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column to the left, figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(text: str, sortable: bool = True) -> str:
    """Convert the Markdown of reports, tables and paragraphs, to HTML.

    Args:
        text (`str`): A line that begins with a bar is a row of a table, any other a paragraph.
        sortable (`bool`, *optional*, defaults to `True`): Whether a click on a head sorts the rows by its column.
    """
    parts, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            parts.append(_table(rows[0], rows[2:], sortable))
            rows = []
        if line.strip():
            parts.append(prose(line))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sortable: bool) -> str:
    sorts = " data-sorts tabindex='0'" if sortable and len(rows) > 1 else ""
    names = "".join(f"<th{sorts} scope='col'>{html.escape(cell)}</th>" for cell in head)
    # An interval stands below its figure.
    lines = ["".join(f"<td>{html.escape(cell).replace(' [', '<br>[')}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
