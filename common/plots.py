"""
Describes figures and draws them with matplotlib as PNG and SVG. reports/html.py draws the same figures into a page.

A figure's title states its one answer. Its panels are small. Each line is labelled at its end, and has its own colour, marker
and dashes, so that readers can distinguish the lines without colour.
"""

import math
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.cli import reason

# Seven markers and eight colours: 56 series before two look alike. Every colour is legible as text on white.
COLORS = ("#1f5fa8", "#c2410c", "#1b7a43", "#7a3fa0", "#b0256f", "#0e7490", "#7a5c1e", "#4b5563")
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3), (5, 1, 1, 1, 1, 1), (1, 3))  # lengths in points: line, gap, line, ...
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL_WIDTH = 18  # characters of a label at a line's end


class Point(NamedTuple):
    x: float
    ys: list  # a number for each seed
    words: str = ""  # the page's text for it; default: x and y

    @property
    def y(self):
        return sum(self.ys) / len(self.ys)


@dataclass
class Panel:
    """The content of one pair of axes."""

    lines: dict  # name -> [Point]
    x: str  # labels of the axes, with the unit
    y: str
    title: str = ""
    rules: dict = field(default_factory=dict)  # name -> y of a horizontal line
    marks: tuple = ()  # x of vertical lines
    front: bool = False  # whether to draw front()
    xscale: str = "linear"  # linear, log, or ranks: log, with a tick for each x
    yscale: str = "linear"
    ylim: tuple | None = None
    yticks: dict = field(default_factory=dict)  # y -> its label

    def __post_init__(self):
        self.lines = {name: points for name, points in self.lines.items() if points}


@dataclass
class Figure:
    name: str  # of its files, without suffix
    title: str  # the answer, in a sentence
    caption: str  # what is drawn
    panels: list
    order: list  # all series; a series' index decides its style, so it is the same in every figure of a report
    same_y: bool = True  # whether the panels share the y axis
    behind: bool = False  # whether each panel shows the other panels' lines in grey, on the same x axis


def style(order, name):
    """The style of a series: (its index, colour, marker, dashes). A rule that is not a series is black."""
    if name not in order:
        return None, "black", "", ()
    i = order.index(name)
    return i, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]


def front(panel):
    """[(x, y)] sorted by x: the points of a panel that no other point beats in both x and y."""
    best, found = float("inf"), []
    for x, y in sorted((point.x, point.y) for points in panel.lines.values() for point in points):
        if y < best:
            best = y
            found.append((x, y))
    return found


def ends(panel):
    """The labels at the right edge: [(name, y of its line's end, the label's lines of text)]."""
    last = {name: points[-1].y for name, points in panel.lines.items()} | panel.rules
    return [(name, y, textwrap.wrap(name, LABEL_WIDTH, break_on_hyphens=False)) for name, y in last.items()]


def apart(wished, heights, low, high):
    """Positions of labels with these heights, ascending and without overlap, each close to its wanted position."""
    order = sorted(range(len(wished)), key=lambda i: wished[i])
    offsets = [0.0]
    for a, b in zip(order, order[1:]):
        offsets.append(offsets[-1] + (heights[a] + heights[b]) / 2)
    blocks = []  # positions minus offsets must not decrease: isotonic regression, by pooling neighbours
    for i, offset in zip(order, offsets):
        blocks.append([wished[i] - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    free = [value for value, n in blocks for _ in range(n)]
    places = [0.0] * len(wished)
    for i, value, offset in zip(order, free, offsets):
        places[i] = max(low, min(value, high - offsets[-1])) + offset
    return places


def ticks(low, high, scale):
    """About four round numbers from low to high."""
    if scale == "log" and high / low > 10:
        powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        steps = (1, 2, 5) if high / low < 100 else (1,)
        found = [p * m for p in powers for m in steps if low <= p * m <= high]
        return found[:: -(-len(found) // 6)]
    power = 10 ** math.floor(math.log10((high - low) / 4 or 1))
    step = min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs((high - low) / step - 4))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(x):
    """A number for an axis: 1.2M, 400k, 0.25."""
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if abs(x) >= size:
            return f"{x / (1e6 if unit == 'M' else 1e3):.4g}{unit}"
    return f"{x:.4g}"


# -- matplotlib -------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot, imported at the first figure, so that a report without matplotlib still has its tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "nanopca"  # equal figures become equal files
    return plt


def save(fig, path):
    """Write path.png and path.svg."""
    for kind in ("png", "svg"):
        if (file := Path(f"{path}.{kind}")).is_symlink():
            file.unlink()  # the name may be a link to a file elsewhere
    fig.savefig(f"{path}.png", dpi=130)
    fig.set_layout_engine("none")  # keep the layout of the PNG
    fig.savefig(f"{path}.svg", metadata=dict(Date=None))
    pyplot().close(fig)


def draw_figure(path, figure):
    """Write path.png and path.svg."""
    n = len(figure.panels)
    columns = min(n, 2 if n in (2, 4) else 3)
    rows = -(-n // columns)
    size = (max(5.4 * columns, 8), 3.5 * rows + 0.7)
    shared = dict(sharex=figure.behind, sharey=figure.same_y)
    fig, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    fig.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    fig.suptitle(textwrap.fill(figure.title, int(9.5 * size[0])), x=0.01, ha="left", fontsize=12, fontweight="bold")
    for ax, panel in zip(axes.flat, figure.panels):
        draw_panel(ax, panel, figure)
    for ax, panel in zip(axes.flat, figure.panels):  # shared limits are final now
        name_ticks(ax, panel)
        label_ends(ax, panel, figure.order)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    save(fig, path)


def draw_panel(ax, panel, figure):
    others = [points for other in figure.panels if figure.behind and other is not panel for points in other.lines.values()]
    grey = [(p.x, p.y) for points in others for p in [*points, Point(float("nan"), [float("nan")])]]  # a gap after each line
    if grey:
        ax.plot(*zip(*grey), color="#dddddd", linewidth=1, zorder=0)
    for name, points in panel.lines.items():
        _, color, marker, dashes = style(figure.order, name)
        every = max(len(points) // 12, 1)
        ax.plot([p.x for p in points], [p.y for p in points], color=color, marker=marker, dashes=dashes, ms=5, markevery=every)
        if any(len(p.ys) > 1 for p in points):
            ax.vlines([p.x for p in points], [min(p.ys) for p in points], [max(p.ys) for p in points], color=color, linewidth=1)
    for name, y in panel.rules.items():
        _, color, _, dashes = style(figure.order, name)
        ax.axhline(y, color=color, dashes=dashes or (None, None), linewidth=1.2)
    if panel.front:
        ax.step(*zip(*front(panel)), where="post", color="grey", linewidth=6, alpha=0.25)
    ax.set_xscale("log" if panel.xscale == "ranks" else panel.xscale)
    ax.set_yscale(panel.yscale)
    ax.set(xlabel=panel.x, ylabel=panel.y)
    if panel.ylim:
        ax.set_ylim(*panel.ylim)
    for x in panel.marks:
        ax.axvline(x, color="grey", linewidth=0.8)
        ax.annotate(f"{x}", (x, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="right", va="top", rotation=90)
    ax.tick_params(labelbottom=True, labelleft=True)  # every panel has numbers, even if axes are shared
    ax.set_title(textwrap.fill(panel.title, 58), loc="left", fontsize=10)
    ax.grid(alpha=0.3)


def name_ticks(ax, panel):
    """Tick labels: the panel's own, or short numbers instead of powers."""
    if panel.xscale == "ranks":
        ranks = sorted({p.x for points in panel.lines.values() for p in points})
        ax.set_xticks(ranks, [f"{rank}" for rank in ranks])
    else:
        found = ticks(*ax.get_xlim(), panel.xscale)
        ax.set_xticks(found, [short(x) for x in found])
    low, high = ax.get_ylim()
    if panel.yticks or panel.yscale == "log":
        words = panel.yticks or {y: short(y) for y in ticks(low, high, "log")}
        within = [y for y in words if low <= y <= high]
        ax.set_yticks(within, [words[y] for y in within])
    ax.minorticks_off()


def label_ends(ax, panel, order):
    """Label the lines right of the axes, each near its end, with its marker."""
    named = ends(panel)
    to_axes = ax.transData + ax.transAxes.inverted()
    wished = [min(max(to_axes.transform((ax.get_xlim()[1], y))[1], 0), 1) for _, y, _ in named]
    places = apart(wished, [0.025 + 0.055 * len(words) for _, _, words in named], 0.0, 1.0)
    for (name, _, words), y in zip(named, places):
        _, color, marker, _ = style(order, name)
        ax.plot([1.035], [y], color=color, marker=marker, markersize=5, transform=ax.transAxes, clip_on=False)
        ax.annotate("\n".join(words), (1.06, y), xycoords="axes fraction", fontsize=9, color=color, va="center", linespacing=1)


def draw(folder, figure):
    """
    Draw a figure into a folder -> the markdown that shows it.

    If drawing fails, the markdown is a short note instead, so a report always keeps its tables.
    """
    try:
        draw_figure(folder / figure.name, figure)
        return f"![{figure.title}]({figure.name}.png)"
    except Exception as error:
        for suffix in ("png", "svg"):  # delete an incomplete or older figure, which does not belong to these tables
            with suppress(OSError):
                (folder / f"{figure.name}.{suffix}").unlink()
        print(f"note: the figure {figure.name} is not drawn: {reason(error)}", file=sys.stderr)
        return f"(The figure {figure.name} is not drawn: {reason(error)})"


def draw_all(folder, text):
    """Draw the figures of a report into the folder. text: its lines, tables and figures -> its markdown lines."""
    lines = []
    for part in text:
        lines += [draw(folder, part), "", f"*{part.caption}.*", ""] if isinstance(part, Figure) else [str(part)]
    return lines


def scree(name, spectra, ranks, caption):
    """Two panels: the spectrum of each method, and the energy that each rank keeps. spectra: {method: descending values}."""
    values, kept = {}, {}
    for method, S in spectra.items():
        total, sums = sum(s * s for s in S), []
        for s in S:
            sums.append((sums[-1] if sums else 0) + s * s / total)
        values[method] = [Point(i + 1, [max(s, 1e-12) / S[0]]) for i, s in enumerate(S)]
        kept[method] = [Point(i + 1, [share]) for i, share in enumerate(sums)]
    k = ranks[len(ranks) // 2]
    shares = sorted((points[k - 1].y, method) for method, points in kept.items())
    reach = " to ".join(f"{share:.0%} ({method})" for share, method in dict.fromkeys((shares[0], shares[-1])))
    panels = [
        Panel(values, "component", "singular value / largest", "Spectrum", marks=tuple(ranks), yscale="log", ylim=(1e-3, 1.3)),
        Panel(kept, "rank k", "share of the energy kept", "What rank k keeps", marks=tuple(ranks), ylim=(0, 1.02)),
    ]
    title = f"Rank {k} of {len(next(iter(spectra.values())))} keeps {reach} of the energy"
    return Figure(name, title, caption, panels, list(spectra), same_y=False)
