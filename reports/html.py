"""
Writes a report as one self-contained page: it needs no network and no other file. Its input is the parts of report.md.

Figures are SVG. A point shows its values under the pointer or a finger, and as a tooltip if scripts are off. Each series can be
switched off. A click on a column's name sorts a table. All text comes from files and is escaped.
"""

import math
import re
from html import escape
from itertools import groupby
from pathlib import Path

from common.plots import Figure, apart, ends, front, short, style, ticks
from reports.claims import Judged
from reports.markdown import Samples, Table

HERE = Path(__file__).parent
# The browser refuses everything that is not in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SIGNS = {"holds": "✓", "does not hold": "✗", "inconclusive": "?"}

# -- charts -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 440, 270  # of a panel, in its own units; the page scales it
LEFT, TOP, BOTTOM = 54, 24, 42  # margins around the axes, for text
LINE = 13  # height of a line of a label
SHAPES = {
    "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", "s": "M-3.5,-3.5h7v7h-7Z", "^": "M0,-4.5L4.5,3.5H-4.5Z",
    "D": "M0,-4.8L4.8,0L0,4.8L-4.8,0Z", "v": "M0,4.5L4.5,-3.5H-4.5Z", "P": "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3Z",
    "X": "M-4.2,-2.1L-2.1,-4.2L0,-2.1L2.1,-4.2L4.2,-2.1L2.1,0L4.2,2.1L2.1,4.2L0,2.1L-2.1,4.2L-4.2,2.1L-2.1,0Z", "": "",
}  # fmt: skip


class Axis:
    """Maps numbers to places in a panel. A log axis becomes linear if no number is positive."""

    def __init__(self, values, scale, start, end, limits=None):
        low, high = limits or (min(values, default=0), max(values, default=1))
        self.log = scale != "linear" and low > 0
        self.start, self.end = start, end
        a, b = self.of(low), self.of(high)
        equal = b - a <= 1e-9 * max(abs(a), abs(b))  # up to rounding
        room = 0 if limits and not equal else (abs(0.1 * a) or 0.1) if equal else 0.04 * (b - a)
        self.low, self.high = a - room, b + room
        edges = [10 ** max(-300, min(e, 300)) if self.log else e for e in (self.low, self.high)]
        self.ticks = ticks(*edges, "log" if self.log else "linear")
        if scale == "ranks":
            self.ticks = sorted(set(values))

    def of(self, value):
        return math.log10(max(value, 1e-12)) if self.log else value

    def at(self, value):
        """The place of a number. For a number far outside the axes, a place that an SVG can still express."""
        share = (self.of(value) - self.low) / (self.high - self.low)
        return round(self.start + max(-1e3, min(1e3, share)) * (self.end - self.start), 1)


def axes_of(figure):
    """[(x axis, y axis)], one pair for every panel."""

    def xs(panel):
        return [p.x for points in panel.lines.values() for p in points]

    def ys(panel):
        return [y for points in panel.lines.values() for p in points for y in p.ys] + list(panel.rules.values())

    every = [[value for panel in figure.panels for value in of(panel)] for of in (xs, ys)]
    beside = 26 + 6.5 * max(len(line) for panel in figure.panels for *_, words in ends(panel) for line in words)
    found = []
    for panel in figure.panels:
        x = Axis(every[0] if figure.behind else xs(panel), panel.xscale, LEFT, WIDTH - beside)
        y = Axis(every[1] if figure.same_y else ys(panel), panel.yscale, HEIGHT - BOTTOM, TOP, panel.ylim)
        found.append((x, y))
    return found


def path(points, x, y):
    return "M" + "L".join(f"{x.at(a)},{y.at(b)}" for a, b in points)


def frame(panel, x, y):
    """SVG of the axes with ticks and labels."""
    right, bottom = x.end, HEIGHT - BOTTOM
    words = panel.yticks or {value: short(value) for value in y.ticks}
    parts = [f'<text class="axis" x="2" y="12">{escape(panel.y)}</text>']
    for value, word in words.items():
        if TOP - 1 <= (at := y.at(value)) <= bottom + 1:
            parts.append(f'<path class="grid" d="M{LEFT},{at}H{right}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at + 4}" text-anchor="end">{escape(word)}</text>')
    for value in x.ticks:
        at = x.at(value)
        parts.append(f'<path class="grid" d="M{at},{TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 15}" text-anchor="middle">{short(value)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(panel.x)}</text>')
    for value in panel.marks:
        at = x.at(value)
        parts.append(
            f'<path class="mark" d="M{at},{TOP}V{bottom}"/><text class="tick" x="{at + 2}" y="{TOP + 10}">{value}</text>'
        )
    return parts


def said(name, point, panel):
    """The text that the page shows for a point."""
    seeds = f" ({min(point.ys):.4g} to {max(point.ys):.4g}, {len(point.ys)} seeds)" if len(point.ys) > 1 else ""
    values = f"{panel.y}: {point.y:.4g}{seeds}\n{panel.x}: {point.x:,.5g}"
    return "\n".join(filter(None, (name, point.words, values)))


def series(panel, order, x, y):
    """SVG of the lines, which are clipped to the axes, and of their points."""
    parts, dots = [], []
    for name, points in panel.lines.items():
        i, _, marker, dashes = style(order, name)
        dash = f' stroke-dasharray="{" ".join(map(str, dashes))}"' if dashes else ""
        bars = "".join(f"M{x.at(p.x)},{y.at(min(p.ys))}V{y.at(max(p.ys))}" for p in points if len(p.ys) > 1)
        line = path([(p.x, p.y) for p in points], x, y)
        parts.append(
            f'<g class="s s{i % 8}" data-s="{i}"><path class="line" d="{line}"{dash}/><path class="bar" d="{bars}"/></g>'
        )
        every = max(len(points) // 12, 1)
        for j, p in enumerate(points):
            at = x.at(p.x), y.at(p.y)
            if TOP - 1 <= at[1] <= HEIGHT - BOTTOM + 1:
                shape = SHAPES[marker] if j % every == 0 else ""
                dots.append(f'<path class="dot s s{i % 8}" data-s="{i}" transform="translate({at[0]},{at[1]})" d="{shape}">'
                            f"<title>{escape(said(name, p, panel))}</title></path>")  # fmt: skip
    for name, value in panel.rules.items():
        i, _, _, dashes = style(order, name)
        dash = f' stroke-dasharray="{" ".join(map(str, dashes))}"' if dashes else ""
        of = "" if i is None else f'data-s="{i}"'
        parts.append(f'<path class="line s s{"" if i is None else i % 8}" {of} d="M{LEFT},{y.at(value)}H{x.end}"{dash}/>')
    return parts, dots


def labels(panel, order, x, y):
    """SVG of the lines' names, right of the axes."""
    named = ends(panel)
    wished = [max(TOP, min(y.at(value), HEIGHT - BOTTOM)) for _, value, _ in named]
    heights = [LINE * len(words) + 3 for _, _, words in named]
    parts = []
    for (name, _, words), at in zip(named, apart(wished, heights, TOP, HEIGHT - BOTTOM)):
        i, _, marker, _ = style(order, name)
        of = "" if i is None else f'data-s="{i}"'
        first = at + 4 - LINE * (len(words) - 1) / 2
        spans = "".join(
            f'<tspan x="{x.end + 18:.1f}" y="{first + LINE * j:.1f}">{escape(w)}</tspan>' for j, w in enumerate(words)
        )
        parts.append(f'<g class="label s s{"" if i is None else i % 8}" {of}><path d="{SHAPES[marker]}" '
                     f'transform="translate({x.end + 10:.1f},{at:.1f})"/><text>{spans}</text></g>')  # fmt: skip
    return parts


def chart(figure, panel, x, y, number):
    """HTML of a panel: its title, and its lines as SVG."""
    lines, dots = series(panel, figure.order, x, y)
    grey = []
    for other in figure.panels if figure.behind else ():
        for points in other.lines.values() if other is not panel else ():
            grey.append(path([(p.x, p.y) for p in points], x, y))
    if panel.front:
        corners = front(panel)
        steps = [(b, a) for (_, a), (b, _) in zip(corners, corners[1:])]
        both = sorted([*corners, *steps], key=lambda corner: (corner[0], -corner[1]))
        lines.insert(0, f'<path class="front" d="{path(both, x, y)}"/>')
    clip = f"{figure.name}-{number}"
    inside = f'<rect x="{LEFT - 5}" y="{TOP - 5}" width="{x.end - LEFT + 10:.1f}" height="{HEIGHT - TOP - BOTTOM + 10}"/>'
    body = [f'<clipPath id="{escape(clip)}">{inside}</clipPath>', inside.replace("<rect", '<rect class="inside"')]
    body += [*frame(panel, x, y), f'<g clip-path="url(#{escape(clip)})">']
    body += [*([f'<path class="behind" d="{"".join(grey)}"/>'] if grey else []), *lines, "</g>", *dots]
    body += labels(panel, figure.order, x, y)
    heading = "<br>".join(escape(part) for part in panel.title.split("\n"))
    title = f"<h4>{heading}</h4>" if panel.title else ""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title or figure.title)}">'
    return "".join([f'<div class="panel">{title}', head, *body, "</svg></div>"])


def of_figure(figure):
    """HTML of a figure: its title, a button for each series, its panels."""
    names = [name for name in figure.order if any(name in {**p.lines, **p.rules} for p in figure.panels)]
    buttons = []
    for name in names if len(names) > 1 else ():
        i, _, marker, _ = style(figure.order, name)
        key = f'<svg viewBox="-6 -6 12 12"><path d="{SHAPES[marker]}"/></svg>'
        buttons.append(f'<button type="button" class="s{i % 8}" data-s="{i}" aria-pressed="true">{key}{escape(name)}</button>')
    charts = [chart(figure, panel, *axes, n) for n, (panel, axes) in enumerate(zip(figure.panels, axes_of(figure)))]
    hint = '<div class="series" role="group" aria-label="series">' + "".join(buttons) + "</div>" if buttons else ""
    wide = ' class="wide"' if len(charts) > 1 else ""
    return (
        f'<figure id="{escape(figure.name)}"{wide}><h3>{inline(figure.title)}</h3>{hint}'
        f'<div class="panels">{"".join(charts)}</div>'
        f"<figcaption>{inline(figure.caption)}.</figcaption></figure>"
    )


# -- text -------------------------------------------------------------------------------------------------------------


def inline(text):
    """Markdown within a paragraph (code, bold, emphasis) -> HTML."""
    parts = re.split(r"`([^`]*)`", text)
    for i, part in enumerate(parts):
        part = escape(part)
        if i % 2 == 0:
            part = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
            part = re.sub(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])", r"<em>\1</em>", part)
        parts[i] = f"<code>{part}</code>" if i % 2 else part
    return "".join(parts)


def of_lines(lines):
    """The markdown that reports write (headings, lists, paragraphs) -> HTML."""
    html, paragraph, items = [], [], []

    def close():
        if paragraph:
            html.append(f"<p>{inline(' '.join(paragraph))}</p>")
        if items:
            html.append(f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>")
        paragraph.clear()
        items.clear()

    for line in lines:
        if match := re.match(r"(#+) (.*)", line):
            close()
            level, words = len(match[1]), match[2]
            html.append(f'<h{level} id="{slug(words)}">{inline(words)}</h{level}>')
        elif line.startswith("- "):
            if not items:
                close()
            items.append(line[2:])
        elif not line.strip():
            close()
        elif items:
            items[-1] += " " + line.strip()
        else:
            paragraph.append(line)
    close()
    return "".join(html)


def slug(words):
    return re.sub(r"\W+", "-", words.lower()).strip("-")


def of_table(table):
    head = "".join(f'<th scope="col"><button type="button">{escape(str(c)) or "&nbsp;"}</button></th>' for c in table.header)
    rows = ""
    for first, *rest in table.lines:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        rows += f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>'
    html = f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{escape(table.title)}</summary>{html}</details>" if table.title else html


def of_claim(claim):
    kind = claim.verdict.replace(" ", "-")
    badge = f'<span class="verdict {kind}">{SIGNS[claim.verdict]} {claim.verdict}</span>'
    head = f"{badge} <b>{inline(claim.text)}</b> <small>{inline(claim.note)}</small>"
    if not claim.numbers:
        return f'<div class="claim">{head}</div>'
    return f'<details class="claim"><summary>{head}</summary>{of_table(claim.numbers)}</details>'


def of_samples(samples):
    prompt = f"<p>To the prompt <em>{escape(samples.prompt)}</em>:</p>" if samples.prompt else ""
    cards = []
    for model, texts in samples.written:
        said = "".join(f"<p>{f'<small>{escape(how)}</small> ' if how else ''}{escape(text)}</p>" for how, text in texts.items())
        cards.append(f"<blockquote><h4>{escape(model)}</h4>{said}</blockquote>")
    return f'{prompt}<div class="samples">{"".join(cards)}</div>'


PARTS = {Table: of_table, Figure: of_figure, Judged: of_claim, Samples: of_samples}


def page(parts):
    """The parts of a report (lines of markdown, and objects) -> the text of an HTML file."""
    body = []
    for kind, group in groupby(parts, key=lambda part: type(part) if type(part) in PARTS else str):
        if kind is str:
            body.append(of_lines([line for text in group for line in text.split("\n")]))
        else:
            html = "".join(map(PARTS[kind], group))
            body.append(f'<div class="figures">{html}</div>' if kind is Figure else html)
    headings = [line for part in parts if isinstance(part, str) for line in part.split("\n") if re.match("##? ", line)]
    title = next((line[2:] for line in headings if line.startswith("# ")), "Report")
    links = "".join(f'<a href="#{slug(line.lstrip("# "))}">{inline(line.lstrip("# "))}</a>' for line in headings)
    style_sheet, script = ((HERE / f"page.{kind}").read_text() for kind in ("css", "js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">'
        f"<style>\n{style_sheet}</style></head>\n<body><nav>{links}</nav><main>\n{''.join(body)}\n</main>"
        f'<div id="tip" role="status"></div><script>\n{script}</script></body></html>\n'
    )
