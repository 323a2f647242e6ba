"""What the reports are made of: aligned tables, verdicts with their numbers, where the runs come from."""

import json

from reports.compare import judge, mean, shown_p, spread


def table(header, lines):
    """A markdown table that is aligned, so that it reads on a terminal too."""
    cells = [header, *lines]
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(header))]

    def line(row):
        padded = (str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2 if i == 0 else w + 1) + ("" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in lines)])


def title(row):
    return f"{row.label} {row.name}".strip()


def claim_lines(claims, rows):
    """A verdict for each claim, and the numbers that it follows from: markdown lines."""
    lines = []
    for claim, verdict, found in judge(claims, rows):
        at = claim.ranks if found else "not run"
        lines += [f"**{claim.text}: {verdict}** ({at}). {claim.note}".strip(), ""]
        cells = []
        for d in found:
            if d.problem:
                cells.append([d.name, "-", "-", len(d.values), "-", "-", "-", "-", f"inconclusive: {d.problem}"])
                continue
            pair = (d.first, d.second)
            tokens = dict.fromkeys(f"{more:+,}" for more in (min(d.more_tokens), max(d.more_tokens)))
            cells.append(
                [
                    d.name,
                    f"{mean(d.values):+.4f}",
                    f"{spread(d.values):.4f}" if len(d.values) > 1 else "-",
                    len(d.values),
                    shown_p(d.p) if d.p is not None else "-",
                    " to ".join(tokens),
                    " / ".join(f"{mean(row.values('seconds')):,.0f}" for row in pair),
                    " / ".join(f"{row.trained:,}" for row in pair),
                    d.verdict(claim.margin),
                ]
            )
        header = ["", "difference", "spread", "seeds", "paired t-test", "more tokens", "own seconds", "trained", "claim"]
        lines += [table(header, cells), ""] if cells else []
    return lines


def provenance_lines(rows):
    configs = [json.loads((folder / "config.json").read_text()) for row in rows for folder in row.folders.values()]

    def all_of(values):
        return ", ".join(sorted(set(map(str, values))))

    def over_runs(*path):
        return all_of(f"{x:,}" if isinstance(x, int) else x for row in rows for x in row.values(*path))

    versions = all_of(f"{name} {version}" for config in configs for name, version in config["versions"].items())
    seeds = all_of(seed for row in rows for seed in row.summaries)
    return [
        f"Dataset {over_runs('dataset')}, {over_runs('tokens_per_step')} tokens a step, evaluated on "
        f"{over_runs('eval_tokens')} tokens. Seeds: {seeds}.",
        f"{all_of(config['hardware'] for config in configs)}; {versions}; commit {all_of(c['commit'] for c in configs)}. "
        f"First command: `{configs[0]['command']}`",
    ]
