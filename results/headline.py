"""
The README's first figure: what a smaller part costs, on one scale for all parts. The numbers are in headline.json.

    python results/headline.py        # writes headline.png and headline.svg
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.plots import pyplot, save

HERE = Path(__file__).parent
LESS, MORE = "#1f5fa8", "#c8541c"  # little was cut; much was cut
SMALLEST = 0.0005  # nats: the left end of the scale; what costs less is drawn there


def nats(perplexity):
    """ "31.1%" more perplexity, or "12.6 times" as much -> the loss that this adds, in nats."""
    number, kind = float(perplexity.rstrip("% times")), perplexity[-1]
    return math.log(1 + number / 100 if kind == "%" else number)


def table_rows(d):
    """[(heading, colour, [(label, loss added in nats)])]"""
    for share, words, color in ((0.5, "half of the rank", LESS), (0.125, "an eighth of the rank", MORE)):
        i, dense, trained = d["kept"].index(share), float(d["dense"]), float(d["dense_trained_on"])
        rows = [("plain PCA", float(d["pca"][i]) - dense), ("PCA weighted by the loss", float(d["fisher"][i]) - dense)]
        yield words, color, [*rows, ("plain PCA, then trained", float(d["pca_trained_on"][i]) - trained)]


def cache_rows(d):
    def costs(**names):
        return [(label.replace("_", " "), float(d[name][1]) - float(d["dense"])) for label, name in names.items()]

    yield "V compressed: 81% of the cache", LESS, costs(
        trained_so_from_the_start="values_end_to_end", narrower_heads_instead="narrow_heads",
        added_to_a_trained_model="values_fitted_to_trained",
    )  # fmt: skip
    yield "K and V compressed: 62.5%", MORE, costs(trained_so_from_the_start="keys_and_values")


def attention_rows(d):
    names = dict(svd="plain SVD", whiten="SVD weighted by inputs", fisher="SVD weighted by the loss", healed="and 150 steps")
    for i, words, color in ((0, "three quarters of the KV cache", LESS), (1, "half of the KV cache", MORE)):
        yield words, color, [(label, nats(d[name][i])) for name, label in names.items() if d[name][i]]


PARTS = (
    ("table", table_rows, "Token embeddings of a small GPT"),
    ("cache", cache_rows, "KV cache of a two-layer Pythia"),
    ("attention", attention_rows, "Keys and values of SmolLM2-135M"),
)


def main():
    data, y = json.loads((HERE / "headline.json").read_text()), 0
    fig, ax = pyplot().subplots(figsize=(6.2, 9.6))
    for name, rows_of, title in PARTS:
        ax.text(-0.86, y, title, transform=ax.get_yaxis_transform(), fontsize=14.5, fontweight="bold", va="center")
        for words, color, rows in rows_of(data[name]):
            y -= 1
            ax.text(-0.86, y, words, transform=ax.get_yaxis_transform(), fontsize=12.5, color=color, va="center")
            for label, cost in rows:
                y -= 1
                ax.text(-0.03, y, label, transform=ax.get_yaxis_transform(), fontsize=12.5, ha="right", va="center")
                place = max(cost, SMALLEST)
                ax.plot([SMALLEST, place], [y, y], color=color, lw=2, alpha=0.35)
                ax.plot(place, y, "o", color=color, ms=8)
                shown = f"{cost:.2g}" if cost >= 0.001 else "under 0.001"
                ax.text(place * 1.35, y, shown, fontsize=12.5, va="center")
        y -= 1.6
    ax.set(xscale="log", xlim=(SMALLEST, 12), ylim=(y + 1, 0.8), yticks=[], xticks=[0.001, 0.01, 0.1, 1])
    ax.set_xticklabels(["0.001", "0.01", "0.1", "1"], fontsize=12)
    ax.minorticks_off()
    ax.set_xlabel("loss added, nats per token (one log scale)", fontsize=12.5, loc="right")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    fig.subplots_adjust(left=0.475, right=0.985, top=0.99, bottom=0.065)
    save(fig, HERE / "headline")


if __name__ == "__main__":
    main()
