"""Reads run folders into rows. A row is one model, with a run for each random seed."""

import re
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail
from common.untrusted import COUNT, WHOLE, expect, read_json, read_json_lines, reading
from util_factorization import METHODS

# The fields that are read from the files of a run and of factors, as shapes of common/untrusted.py. Older runs lack the fields
# with a question mark.
POINT = dict(iter=COUNT, tokens=COUNT, val_loss=float, val_ppl=float, ln_f_cosine=float, ln_f_cosine_full=float)
STARTS_FROM = dict(part=str, ckpt=str, tokens=(COUNT, None))
SUMMARY = dict(
    seed=COUNT, dataset=str, n_embd=WHOLE, n_embd_wte=(WHOLE, None), starts_from=(STARTS_FROM, None),
    parameters={"total": WHOLE, "token_table": WHOLE, **dict.fromkeys(("positions", "mlp", "norms", str), COUNT)},
    parameters_trained=COUNT,
    flops_per_token=dict(head=float), val_unigram_entropy=float, eval_tokens=WHOLE, best=POINT, final=POINT, tokens=COUNT,
    tokens_per_step=COUNT, seconds=float, tokens_per_second=(float, None), peak_memory_bytes=COUNT,
)  # fmt: skip
CACHE_POINT = {"position_loss": {str: float}, "v_recon?": float, "v_error?": [float, ...]}
CACHE_SUMMARY = dict(cache_widths=[WHOLE, WHOLE], epoch_steps=(WHOLE, None), best=CACHE_POINT, last=POINT)
CONFIG = dict(versions={str: str}, hardware=str, commit=str, command=str)
FACTS = {
    "method": tuple(METHODS), "k": WHOLE, "energy": float, "relative_error": float, "relative_error_per_token?": (float, None),
    "parameters": WHOLE, "compression": float, "singular_values": [float],
}  # fmt: skip
AGAIN = "delete the folder and run it again"

METHOD = rf"(?P<m>{'|'.join(list(METHODS)[1:])})"  # a method in a folder's name; the original scripts call svd "pca"


@dataclass(frozen=True)
class Kind:
    """A kind of run. {m} stands for the method in the folder's name. To add a kind, add a line to KINDS."""

    label: str
    folder: str  # a pattern: k\d+ is the rank of the table, r\d+ the cached numbers of a token and layer
    series: str  # the name of its line in the figures
    what: str
    of_cache: bool = False  # about the value cache instead of the token table


KINDS = (  # in the order of the tables' rows
    Kind("D", r"gpt_baseline", "baseline", "experiment 1: dense table, from scratch"),
    Kind("A", r"gpt_pca_k\d+", "PCA table, rest from scratch (A)", "PCA table, the rest from scratch"),
    Kind("C", r"gpt_random_lowrank_k\d+", "random factors, scratch (C)", "random factors, from scratch"),
    Kind("2-5", r"gpt_lowrank_scratch_k\d+", "low-rank scratch (2-5)", "random factors, from scratch"),
    Kind("6-9", r"gpt_pca_nofinetune_k\d+", "PCA, no training (6-9)", "D, its table factorized by svd, not trained on"),
    Kind("10-13", r"gpt_pca_lora_k\d+", "PCA + LoRA (10-13)", "D, its table factorized by svd, adapters trained"),
    Kind("{m}", rf"gpt_{METHOD}_nofinetune_k\d+", "{m}, no training", "D, its table factorized by {m}, not trained on"),
    Kind("{m}+LoRA", rf"gpt_{METHOD}_lora_k\d+", "{m} + LoRA", "D, its table factorized by {m}, adapters trained"),
    Kind("B", r"gpt_pca_finetune_k\d+", "PCA + full fine-tuning (B)",
         "D, its table factorized by svd, every weight trained on"),
    Kind("B {m}", rf"gpt_{METHOD}_finetune_k\d+", "{m} + full fine-tuning",
         "D, its table factorized by {m}, every weight trained on"),
    Kind("2-5+", r"gpt_lowrank_scratch_more_k\d+", "low-rank scratch, more steps (2-5+)",
         "2-5, every weight trained for as many extra steps"),
    Kind("D+", r"gpt_baseline_more", "baseline, more steps (D+)", "D, dense, every weight trained for as many extra steps"),
    Kind("D+LoRA", r"gpt_baseline_lora", "baseline + LoRA (D+LoRA)", "D, dense, adapters trained for as many extra steps"),
    Kind("Pythia", r"pythia_baseline", "Pythia (baseline)", "keys and values uncompressed", of_cache=True),
    Kind("end to end", r"vdproj_end_to_end_r\d+", "V-DProj, end to end", "compressed values, error in the loss with weight 0.1",
         of_cache=True),
    Kind("2-phase", r"vdproj_two_phase_r\d+", "V-DProj, 2-phase",
         "phase 1, then the rest trained with v_compress and v_restore frozen", of_cache=True),
    Kind("2-phase trained", r"vdproj_two_phase_trained_r\d+", "V-DProj, 2-phase from trained", "phase 1 trained, then the same",
         of_cache=True),
    Kind("narrow", r"vdproj_narrow_r\d+", "narrow value heads", "v_proj computes the cached numbers, nothing restores them",
         of_cache=True),
    Kind("K+V", r"kvdproj_end_to_end_r\d+", "K and V, end to end", "as end to end, with compressed keys too", of_cache=True),
    Kind("phase 1", r"vdproj_phase1_r\d+", "phase 1", "v_compress and v_restore fitted to the values of the random network",
         of_cache=True),
    Kind("phase 1 trained", r"vdproj_phase1_trained_r\d+", "phase 1 from trained", "fitted to those of the trained baseline",
         of_cache=True),
)  # fmt: skip


@dataclass
class Row:
    """One model: the runs of one folder name, a run for each seed."""

    label: str
    name: str
    series: str  # its line in the figures
    what: str
    summaries: dict  # seed -> summary.json
    folders: dict  # seed -> its folder
    of_cache: bool = False  # about the value cache instead of the token table

    @property
    def title(self):
        return f"{self.label} {self.name}".strip()

    def values(self, *path):
        """One number for each seed, None for a run without it."""
        out = []
        for summary in self.summaries.values():
            for key in path:
                summary = summary[key]
            out.append(summary)
        return out

    def one(self, *path):
        return self.values(*path)[0]

    @property
    def k(self):
        """The rank of the token table, or the numbers that a compressed value has; None if nothing is compressed."""
        if not self.of_cache:
            return self.one("n_embd_wte")
        kept = self.one("cache_widths")[1]
        return kept if kept < self.one("n_embd") else None

    @property
    def group(self):
        """How its token table was made."""
        if self.k is None:
            return "dense"
        if not self.one("tokens"):
            return "as cut"
        whole = (self.one("starts_from") or {}).get("part") == "all weights" and not self.label.startswith("2-5")
        return "cut, then trained" if whole else "low-rank from scratch"

    @property
    def losses(self):
        return self.values("best", "val_loss")

    @property
    def stored(self):
        """The number of parameters of the model after its adapters are merged."""
        counts = self.one("parameters")
        return counts["total"] - counts.get("adapters", 0)  # old runs, before LoRA, have no adapters

    @property
    def trained(self):
        return self.one("parameters_trained") if self.one("tokens") else 0


def read_rows(root):
    """Read the runs under `root` -> (the finished runs as rows, the folders of unfinished runs)."""
    configs = sorted(p for pattern in ("*/config.json", "seed_*/*/config.json") for p in root.glob(pattern))
    found, unfinished = {}, []
    for config in configs:
        folder = config.parent
        if not (folder / "summary.json").exists():
            unfinished.append(folder)
            continue
        summary = read_json(folder / "summary.json", SUMMARY, "what train.py writes", AGAIN)
        seed = summary["seed"]
        row = found.setdefault(folder.name, Row("", folder.name, folder.name, "", {}, {}))
        if seed in row.summaries:
            fail(f"{folder} and {row.folders[seed]} are the same run with the same seed, {seed}: move one out of {root}")
        row.summaries[seed], row.folders[seed] = summary, folder
    rows = []
    for kind in KINDS:
        matches = [match for name in found if (match := re.fullmatch(kind.folder, name))]
        for match in matches:
            row = found[match.string]
            row.of_cache = kind.of_cache
            for seed, summary in row.summaries.items() if kind.of_cache else ():
                with reading(row.folders[seed] / "summary.json", "what train.py writes of a value cache", AGAIN):
                    expect(summary, CACHE_SUMMARY)
                    if odd := [bin for bin in summary["best"]["position_loss"] if not re.fullmatch(r"\d{1,9}-\d{1,9}", bin)]:
                        raise ValueError(f"{odd[0]!r} is not a range of positions")
        for match in sorted(matches, key=lambda match: place_of(match, found)):
            row = found.pop(match.string)
            row.label, row.series, row.what = (
                text.format(**match.groupdict()) for text in (kind.label, kind.series, kind.what)
            )
            if kind.label == "A" and row.k == row.one("n_embd"):
                row.label = row.series = "A full"
                row.what = "A's control: D's table as factors of full rank, the rest from scratch"
            rows.append(row)
    return rows + list(found.values()), unfinished


def place_of(match, found):
    """The sort key within a kind: method, then rank."""
    return list(METHODS).index(match.groupdict().get("m", "svd")), found[match.string].k or 0


def read_curve(folder):
    """The evaluations of a run: [(step, tokens that this run had trained on, val_loss)]."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_json_lines(path, dict, "what train.py logs", AGAIN) if "val_loss" in line]
    with reading(path, "what train.py logs", AGAIN):
        expect(lines, [dict(iter=COUNT, tokens=COUNT, val_loss=float)])
    return [(line["iter"], line["tokens"], line["val_loss"]) for line in lines]


def read_factors(root):
    """The JSON of every factor file: {method: [facts, sorted by rank]}."""
    found = {}
    for path in sorted([*root.glob("pca_factorized/factors_*.json"), *root.glob("seed_*/pca_factorized/factors_*.json")]):
        facts = read_json(path, FACTS, "what pca_factorize_wte.py writes", "delete it, or factorize the checkpoint again")
        found.setdefault(facts["method"], {}).setdefault(facts["k"], facts)  # keep the first seed
    return {method: [found[method][k] for k in sorted(found[method])] for method in METHODS if method in found}


def total_seconds(row, rows):
    """Training seconds of a run plus those of the run it starts from, one number for each seed; None if that run is missing."""
    out = []
    for seed, summary in row.summaries.items():
        start, before = summary["starts_from"], 0
        if start:
            # <root>/[seed_N/]NAME[/ckpt.pt] or the factors of gpt_baseline
            parts = ["gpt_baseline"] if start["part"] == "token table" else list(Path(start["ckpt"]).parts)
            sources = [r.summaries[seed] for r in rows if r.name in parts and seed in r.summaries]
            before = sources[0]["seconds"] if sources else None
        out.append(None if before is None else before + summary["seconds"])
    return out


def provenance_lines(rows):
    """Lines on how the runs of a report were made: data, seeds, hardware, versions, commit, command."""
    folders = [folder for row in rows for folder in row.folders.values()]
    configs = [read_json(folder / "config.json", CONFIG, "what train.py writes", AGAIN) for folder in folders]

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
