"""Figures from descriptions: labelled, readable in grey, as PNG and SVG."""

import sys
from contextlib import suppress
from dataclasses import dataclass

from common.cli import reason

# Line styles and markers tell the lines apart without colour.
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "d", "p")


def pyplot():
    """matplotlib.pyplot, imported for the first figure: where it is broken or missing, a report keeps its tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "nanopca"  # the same figure is the same file
    return plt


def style(order, name):
    """How a series is drawn in every figure: by its place in order; hollow markers from the thirteenth on."""
    i = order.index(name)
    filled = "full" if i < len(MARKERS) else "none"
    return dict(color=f"C{i % 10}", linestyle=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], fillstyle=filled)


def legend_beside(ax, handles):
    ax.legend(*handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)


def save(fig, path):
    """Write path.png and path.svg."""
    fig.savefig(f"{path}.png", dpi=130)
    fig.savefig(f"{path}.svg", metadata=dict(Date=None))
    pyplot().close(fig)


def scree_plot(path, spectra, ranks):
    """spectra: name -> singular values, falling. ranks: the ranks to mark."""
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, S), line in zip(spectra.items(), LINES):
        energy = [s * s for s in S]
        total = sum(energy)
        kept = [sum(energy[: k + 1]) / total for k in range(len(S))]
        left.semilogy(range(1, len(S) + 1), [max(s, 1e-12) / S[0] for s in S], linestyle=line, label=name)
        right.plot(range(1, len(S) + 1), kept, linestyle=line, label=name)
    left.set(xlabel="component", ylabel="singular value / largest", title="Spectrum of the token table", ylim=(1e-3, 1.3))
    right.set(xlabel="rank k", ylabel="share of the energy kept", title="What rank k keeps", ylim=(0, 1.02))
    for ax in (left, right):
        for k in ranks:
            ax.axvline(k, color="grey", linewidth=0.8)
            ax.annotate(f"{k}", (k, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="right", va="top", rotation=90)
        ax.grid(alpha=0.3)
        ax.legend()
    save(fig, path)


def series_plot(path, panels, order, x, ranks=False, front=False):
    """
    panels: (y label, {series: [(x, [y of each seed])]}, {series: y of a horizontal rule}), drawn side by side.

    order: all series; it gives each its style. ranks: x is a rank, with a tick for every rank that was run. front: draw the
    Pareto front, a step line through the points that no other point beats in both x and y. Bars show the range over seeds.
    """
    fig, axes = pyplot().subplots(1, len(panels), figsize=(5.2 * len(panels) + 4, 4.8), layout="constrained", squeeze=False)
    handles = {}
    for ax, (ylabel, series, rules) in zip(axes[0], panels):
        for name, points in series.items():
            xs, ys = zip(*points)
            middle = [sum(y) / len(y) for y in ys]
            reach = [[max(m - min(y), 0) for m, y in zip(middle, ys)], [max(max(y) - m, 0) for m, y in zip(middle, ys)]]
            handles[name] = ax.errorbar(xs, middle, yerr=reach, markersize=6, capsize=3, **style(order, name))
        for name, y in rules.items():
            handles[name] = ax.axhline(y, linestyle=style(order, name)["linestyle"], color="black", linewidth=1.2)
        if front:
            best, steps = float("inf"), []
            for position, y in sorted((x, sum(ys) / len(ys)) for points in series.values() for x, ys in points):
                if y < best:
                    best = y
                    steps.append((position, y))
            handles["front: none is left of it and below"] = ax.step(
                *zip(*steps), where="post", color="grey", linewidth=3, alpha=0.4
            )[0]
            ax.set_xscale("log")
        if ranks:
            ticks = sorted({x for points in series.values() for x, _ in points})
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(rank) for rank in ticks])
        ax.set(xlabel=x, ylabel=ylabel)
        ax.grid(alpha=0.3)
    legend_beside(axes[0][-1], (handles.values(), handles))
    save(fig, path)


def curves_plot(path, curves, order, unigram):
    """
    curves: (series, rank or None) -> [(tokens, loss)], a panel for each rank, with the dense models in every one.

    unigram: the loss that a model without context can reach; a horizontal line.
    """
    ranks = sorted({k for _, k in curves if k}) or [None]
    size = dict(figsize=(4 * len(ranks) + 4, 4.4), layout="constrained")
    fig, axes = pyplot().subplots(1, len(ranks), sharey=True, squeeze=False, **size)
    handles = {}
    for ax, rank in zip(axes[0], ranks):
        for (name, k), points in curves.items():
            if k in (None, rank):
                handles[name] = ax.plot(*zip(*points), markersize=4, **style(order, name))[0]
        ax.axhline(unigram, color="black", linewidth=1)
        ax.annotate("unigram entropy", (1, unigram), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        ax.set(xlabel="training tokens", title="dense" if rank is None else f"k = {rank}")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss (nats per token)")
    if min(loss for points in curves.values() for _, loss in points) < unigram:
        axes[0][0].set_ylim(top=unigram + 0.4)  # the untrained start lies far above and would flatten what matters
    legend_beside(axes[0][-1], (handles.values(), handles))
    save(fig, path)


def lines_plot(path, curves, order, x, y, quantile=1.0):
    """curves: series -> [(x, y)]. quantile: the y axis ends above this share of the values; the first steps are far off."""
    fig, ax = pyplot().subplots(figsize=(9, 4.6), layout="constrained")
    for name, points in curves.items():
        ax.plot(*zip(*points), markersize=5, label=name, **style(order, name))
    ys = sorted(y for points in curves.values() for _, y in points)
    low, high = ys[0], ys[round(quantile * (len(ys) - 1))]
    room = 0.05 * (high - low) or 0.1
    ax.set(xlabel=x, ylabel=y, ylim=(low - room, high + room))
    ax.grid(alpha=0.3)
    legend_beside(ax, ax.get_legend_handles_labels())
    save(fig, path)


@dataclass
class Figure:
    """What a figure shows. kind: a key of DRAW. data: what the function of this kind takes beside the path."""

    name: str  # of the files, without a suffix
    caption: str
    kind: str
    data: dict


DRAW = dict(series=series_plot, curves=curves_plot, lines=lines_plot, scree=scree_plot)


def draw(folder, figure, kinds=DRAW):
    """
    Draw a figure into a folder -> the markdown that shows it. kinds: {kind: the function that draws it}.

    Where that fails there is a word in its place, in the report too: a figure never costs a report its tables.
    """
    try:
        kinds[figure.kind](folder / figure.name, **figure.data)
        return f"![{figure.caption}]({figure.name}.png)"
    except Exception as error:
        for suffix in ("png", "svg"):  # half a figure, or one of before, which does not belong to these tables
            with suppress(OSError):
                (folder / f"{figure.name}.{suffix}").unlink()
        print(f"note: the figure {figure.name} is not drawn: {reason(error)}", file=sys.stderr)
        return f"(The figure {figure.name} is not drawn: {reason(error)})"


def draw_all(folder, figures, kinds=DRAW):
    """draw() for every figure -> the markdown lines, with captions."""
    lines = []
    for figure in figures:
        lines += [draw(folder, figure, kinds), "", f"*{figure.caption}*", ""]
    return lines
