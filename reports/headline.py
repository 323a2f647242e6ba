"""
The README's first figure: what is kept, and what it costs, in the three places. Numbers from results/headline.json.

    python -m reports.headline        # writes results/headline.png and .svg
"""

import json
from pathlib import Path

from common.plots import pyplot, save

RESULTS = Path(__file__).parents[1] / "results"
LESS, MORE = "#1f5fa8", "#c8541c"  # little was cut, much was cut


def lost(loss, dense):
    return float(loss) - float(dense)


def table_rows(d):
    """[(group, colour, [(label, cost, what the bar says)])]. Costs in nats."""
    groups = []
    for share, words, color in ((0.5, "half of the rank kept", LESS), (0.125, "an eighth of the rank kept", MORE)):
        i = d["kept"].index(share)
        costs = (
            ("plain PCA", lost(d["pca"][i], d["dense"])),
            ("PCA weighted by effect on the loss", lost(d["fisher"][i], d["dense"])),
            ("plain PCA, then trained", lost(d["pca_trained_on"][i], d["dense_trained_on"])),
        )
        groups.append((words, color, [(label, cost, f"+{cost:.2f}") for label, cost in costs]))
    return groups


def cache_rows(d):
    names = dict(
        values_end_to_end="compressed from the start", narrow_heads="narrower value heads instead",
        values_fitted_to_trained="added to a trained model", keys_and_values="compressed from the start",
    )  # fmt: skip
    groups = {
        0.8125: ("values compressed: 81% of the cache", LESS, []),
        0.625: ("keys and values: 62.5% of the cache", MORE, []),
    }
    for name, label in names.items():
        share, loss = d[name]
        cost = lost(loss, d["dense"])
        groups[share][2].append((label, cost, f"+{cost:.3f}" if cost >= 0.001 else "under 0.001"))
    return list(groups.values())


def attention_rows(d):
    names = dict(
        svd="plain SVD",
        whiten="SVD weighted by the layer's inputs",
        fisher="SVD weighted by effect on the loss",
        healed="the same, then trained for 150 steps",
    )
    groups = []
    for i, words, color in ((0, "three quarters of the cache kept", LESS), (1, "half of the cache kept", MORE)):
        rows = []
        for name, label in names.items():
            if d[name][i] is not None:
                number = d[name][i]
                cost = float(number[:-1]) if number.endswith("%") else float("inf")
                rows.append((label, cost, f"+{number}" if number.endswith("%") else number))
        groups.append((words, color, rows))
    return groups


def panel(ax, title, groups, unit):
    """Horizontal bars, in groups by what is kept; a cost that does not fit ends at the edge."""
    limit = 1.05 * max(cost for _, _, rows in groups for _, cost, _ in rows if cost < float("inf"))
    y = 0
    for words, color, rows in groups:
        ax.text(-0.02 * limit, y, words, ha="right", va="center", fontsize=10.5, color=color, fontweight="bold")
        for label, cost, number in rows:
            y -= 1
            ax.barh(y, min(cost, limit), color=color, height=0.62)
            ax.text(-0.02 * limit, y, label, ha="right", va="center", fontsize=10.5)
            arrow = " \N{RIGHTWARDS ARROW}" if cost > limit else ""
            inside = cost > 0.8 * limit
            place = dict(ha="right" if inside else "left", color="white" if inside else "black")
            ax.text(
                min(cost, limit) + (-0.02 if inside else 0.02) * limit, y, number + arrow, va="center", fontsize=10.5, **place
            )
        y -= 1.4
    ax.set(xlim=(0, limit), ylim=(y + 0.8, 0.6), yticks=[], xticks=[])
    ax.set_title(title, fontsize=12, loc="right", pad=14)
    ax.set_xlabel(unit, fontsize=10, loc="right")
    ax.spines[["top", "right", "bottom"]].set_visible(False)


NATS = "loss added, in nats per token"
PANELS = (
    ("table", table_rows, "Token table of a GPT, 128 wide", NATS),
    ("cache", cache_rows, "Cache of a two-layer Pythia", NATS),
    ("attention", attention_rows, "Keys and values of SmolLM2-135M", "perplexity added on WikiText"),
)


def main():
    data = json.loads((RESULTS / "headline.json").read_text())
    fig, axes = pyplot().subplots(1, 3, figsize=(16, 3.9), layout="constrained")
    for ax, (name, rows, title, unit) in zip(axes, PANELS):
        panel(ax, title, rows(data[name]), unit)
    save(fig, RESULTS / "headline")


if __name__ == "__main__":
    main()
