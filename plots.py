"""The figures of report.py and of the factorization: labelled, readable in grey, PNG."""

import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Line styles and markers tell the lines apart without colour.
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h", ">")
STYLES = [(LINES[i % len(LINES)], marker) for i, marker in enumerate(MARKERS)]


def figure(xlabel, ylabel, title):
    fig, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.grid(alpha=0.3)
    return fig, ax


def legend_beside(ax):
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)


def save(fig, path):
    fig.savefig(path, dpi=130)
    plt.close(fig)


def scree_plot(path, spectra, ranks):
    """spectra: name -> singular values, falling. ranks: those that were cut to, marked."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, S), (line, _) in zip(spectra.items(), STYLES):
        energy = [s * s for s in S]
        total = sum(energy)
        kept = [sum(energy[: k + 1]) / total for k in range(len(S))]
        left.semilogy(range(1, len(S) + 1), [max(s, 1e-12) / S[0] for s in S], linestyle=line, label=name)
        right.plot(range(1, len(S) + 1), kept, linestyle=line, label=name)
    left.set(xlabel="component", ylabel="singular value / largest", title="Spectrum of the token table")
    right.set(xlabel="rank k", ylabel="share of the energy kept", title="What rank k keeps", ylim=(0, 1.02))
    for ax in (left, right):
        for k in ranks:
            ax.axvline(k, color="grey", linewidth=0.8)
            ax.annotate(f"{k}", (k, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="right", va="top", rotation=90)
        ax.grid(alpha=0.3)
        ax.legend()
    save(fig, path)


def curves_plot(path, curves, unigram):
    """curves: name -> [(tokens, loss)]; unigram: the entropy that a model without context can reach, as a rule."""
    fig, ax = figure("training tokens", "validation loss (nats per token)", "Validation loss")
    for (name, points), (line, marker) in zip(curves.items(), itertools.cycle(STYLES)):
        tokens, losses = zip(*points)
        ax.plot(tokens, losses, linestyle=line, marker=marker, markersize=4, label=name)
    ax.axhline(unigram, color="black", linewidth=1)
    ax.annotate("unigram entropy", (1, unigram), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    if min(loss for points in curves.values() for _, loss in points) < unigram:
        ax.set_ylim(top=unigram + 0.4)  # the untrained start lies far above and would flatten what matters
    legend_beside(ax)
    save(fig, path)


def parameters_plot(path, points):
    """points: name -> (stored parameters, [loss of each seed])."""
    fig, ax = figure(
        "stored parameters", "best validation loss (nats per token)", "Loss against size (bars: the range over seeds)"
    )
    for (name, (parameters, losses)), (_, marker) in zip(points.items(), itertools.cycle(STYLES)):
        middle = sum(losses) / len(losses)
        reach = [[middle - min(losses)], [max(losses) - middle]] if len(losses) > 1 else None
        ax.errorbar([parameters], [middle], yerr=reach, marker=marker, markersize=8, capsize=4, linestyle="none", label=name)
    ax.margins(0.15)
    legend_beside(ax)
    save(fig, path)
