"""One self-contained HTML page of text, tables and drawings: no script, nothing from elsewhere.

It is made for reading: a light and a dark theme, tables that scroll in a box of their own on a
narrow screen, drawings that take their colours from the theme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["COLOURS", "Page", "inline_svg", "table"]

# {name: (light, dark)}. Drawings are made in the light ones, which inline_svg makes variables of.
# The six of data are Okabe and Ito's, told apart with any colour vision; dark ones are lighter.
COLOURS = {
    "ground": ("#fbfaf7", "#14171b"),
    "ink": ("#1d2126", "#e8e6e1"),
    "soft": ("#5d6670", "#a2abb5"),
    "line": ("#d8d6cf", "#333a42"),
    "blue": ("#0072b2", "#56aee8"),
    "green": ("#009e73", "#2cc698"),
    "orange": ("#d98f00", "#f0b545"),
    "red": ("#d55e00", "#ff8d4d"),
    "grey": ("#7a828b", "#98a1ab"),
    "purple": ("#b5568b", "#e29cc3"),
}


class Page:
    """Sections in reading order, then the whole page as text."""

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._lead = lead
        self._sections: list[tuple[str, str, str]] = []

    def section(self, anchor: str, title: str, source: str, parts: Sequence[str]) -> None:
        """Adds a section; source: what of the paper it shows, or ""; parts: HTML."""
        heading = escape(title) + (f' <span class="source">{escape(source)}</span>' * bool(source))
        body = "\n".join(parts)
        text = f'<section id="{anchor}">\n<h2>{heading}</h2>\n{body}\n</section>'
        self._sections.append((anchor, title, text))

    def html(self) -> str:
        """The page."""
        links = "".join(f'<li><a href="#{a}">{escape(t)}</a></li>' for a, t, _ in self._sections)
        sections = "\n".join(text for _, _, text in self._sections)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
            f'<header>\n<h1>{escape(self._title)}</h1>\n<p class="lead">{self._lead}</p>\n'
            f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n</header>\n'
            f"<main>\n{sections}\n</main>\n</body>\n</html>\n"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """A table of cells of HTML, in a box that scrolls; the first column names its rows."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for cells in rows
    )
    return (
        f'<h3>{title}</h3>\n<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{titles}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def inline_svg(svg: str, name: str, description: str) -> str:
    """An SVG document as part of a page: themed, described, with identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1var(--sans)", svg)
    for colour, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{colour})")
    label = escape(description, quote=True)
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"',
        lambda m: f'<svg{m[1]} role="img" aria-label="{label}"',
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )


def _style() -> str:
    def variables(index: int) -> str:
        return "".join(f"--{name}:{pair[index]};" for name, pair in COLOURS.items())

    themes: Mapping[str, str] = {"LIGHT": variables(0), "DARK": variables(1)}
    return re.sub("LIGHT|DARK", lambda m: themes[m[0]], _STYLE)


_STYLE = """
:root { color-scheme: light dark; LIGHT
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Palatino, "DejaVu Serif", Georgia,
    serif; }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 0 1.1rem 5rem; max-width: 68rem; background: var(--ground);
  color: var(--ink); font: 1.0625rem/1.6 var(--serif); overflow-wrap: break-word; }
header { padding: 3.2rem 0 1rem; border-bottom: 1px solid var(--line); }
h1, h2, h3, nav, table, figcaption, .source, .key { font-family: var(--sans); }
h1 { margin: 0 0 .8rem; font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15;
  letter-spacing: -.02em; max-width: 24em; text-wrap: balance; }
h2 { margin: 0 0 .5rem; font-size: 1.35rem; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .4rem; font-size: .95rem; line-height: 1.35; }
.source { display: inline-block; margin-left: .35rem; padding: .1rem .5rem; font-size: .72rem;
  font-weight: 500; letter-spacing: .01em; color: var(--soft); border: 1px solid var(--line);
  border-radius: 1rem; vertical-align: .2em; white-space: nowrap; }
p, ul { max-width: 44em; margin: .5rem 0 1rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
.note { color: var(--soft); font-size: .95rem; }
nav ol { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 1.4rem 0 .6rem; padding: 0;
  list-style: none; font-size: .9rem; }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: .18em; }
section { padding: 2.6rem 0 .8rem; border-bottom: 1px solid var(--line); }
section:last-child { border: 0; }
.figures { display: grid; gap: 1.6rem 2.2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.figures figure { max-width: 34rem; }
figure { margin: 0; min-width: 0; }
figure.wide { overflow-x: auto; max-width: 100%; }
figure.wide svg { min-width: 30rem; }
figcaption { margin-bottom: .3rem; font-size: .92rem; font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; }
svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; margin: .2rem 0 1.6rem; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .38rem .75rem; text-align: right; white-space: nowrap; }
td:last-child { padding-right: .2rem; }
thead th { font-weight: 500; color: var(--soft); border-bottom: 1.5px solid var(--ink);
  vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--ground); }
tbody th { font-weight: 500; }
td small, th small { color: var(--soft); font-weight: 400; font-size: .9em; }
th small { display: block; white-space: normal; min-width: 9em; max-width: 17em; }
td b { font-weight: 700; }
.up { color: var(--green); } .down { color: var(--red); }
@media (max-width: 40rem) { body { font-size: 1rem; } header { padding-top: 1.8rem; }
  th, td { padding: .36rem .5rem; } th small { max-width: 10em; min-width: 7em; } }
@media print { body { max-width: none; } nav { display: none; }
  figure, tr { break-inside: avoid; } }
"""
