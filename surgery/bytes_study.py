"""
Compare low rank, plain quantisation and bits by component at equal bytes, on a model's token table, matrices and cache.

    python -m surgery.bytes_study --calib_text wiki.txt,sotu,books.txt --eval_text wiki.txt,other_books.txt

A row is one method at one size. It gets a line in results.jsonl of --out_dir: its bytes as a share of float16, and its loss on
each text with a standard error over windows. The same command again skips the rows that are done. scripts/run_bytes.sh also
makes the report.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, finish, flag, parse
from surgery.flags import BOS

LINE = dict(row=str, system=str)  # identifies the rows that are measured already
SYSTEMS = ("table", "weights", "cache")


@dataclass
class Args:
    system: str = flag(
        "table,weights,cache",
        "comma-separated. table: the token table; weights: every linear layer and the table; cache: keys and values",
    )
    model: str = flag("", "as for python -m surgery; default: TinyLlama, or SmolLM2-135M if the hub does not answer")
    tokenizer: str = flag("", "hub id, folder or dataset; default: the model's own")
    shares: str = flag("", "bytes of bits by component, as shares of float16, comma-separated; default: each system's list")
    rows: str = flag(
        "",
        "rows to measure, such as 'bits' or 'rank 256', comma-separated; all: every row of the system; default: the main "
        "rows, or all if --shares is given",
    )
    calib_text: str = flag("", "texts to calibrate on, as for python -m surgery")
    calib_tokens: int = flag(21504, "tokens of --calib_text, in windows evenly spread over each text", low=1)
    eval_text: str = flag("", "texts to evaluate on, as for python -m surgery")
    eval_windows: int = flag(16, "evaluation windows, in equal shares; the published numbers use 48", low=2)
    window: int = flag(512, "tokens in a window", low=2)
    bos: str = flag("auto", "whether each window begins with the beginning of text, as for python -m surgery", choices=BOS)
    seed: int = flag(1337, "random seed of the labels that the model draws", low=0, high=2**63 - 1)
    out_dir: str = flag("model_weights/bytes", "folder of results.jsonl")


@dataclass(frozen=True)
class Row:
    """One measurement. name: of the method. given: its size, as a share of float16, as bits and group, or as a rank."""

    name: str
    given: tuple = ()

    @property
    def key(self):
        return " ".join([self.name, *map(str, self.given)])


RANKS = (256, 128)
SHARES = dict(
    table="0.3125,0.23,0.1875,0.13,0.08", weights="0.5,0.3125,0.25,0.1875,0.125", cache="0.3125,0.25,0.1875,0.125,0.08"
)


# Names or keys of rows that need --rows or --shares: they take as long as the others and show less.
MORE = dict(
    table={"to nearest 4 32", "to nearest 3 64", "error-aware 4 64", "error-aware 2 32", "rank 128", "ranks by frequency 128",
           "bits without parents", "bits in one group", "bits without a basis"},
    weights={"error-aware 7 32", "error-aware 2 32", "bits 0.125"},
    cache={"to nearest 4 32", "to nearest 3 32", "bits 0.3125", "bits 0.1875", "bits 0.08", "bits read in place 0.3125",
           "bits read in place 0.1875"},
)  # fmt: skip


def rows_of(system, shares):
    """The rows of a system, the cheapest to measure first."""
    coded, small = [Row("bits", (share,)) for share in shares], sorted(shares)[:2][-1]
    if system == "cache":
        plain, fast = (Row("to nearest", b) for b in ((8, "row"), (4, 32), (3, 32))), sorted(shares)[-3:]
        return [Row("untouched"), *plain, *coded, *(Row("bits read in place", (share,)) for share in fast)]
    if system == "weights":
        plain = (Row("error-aware", b) for b in ((7, 32), (4, 32), (3, 32), (2, 32)))
        return [Row("untouched"), *coded, *plain]
    ablations = [Row(name, (small,)) for name in ("bits without parents", "bits in one group", "bits without a basis")]
    plain = [Row("to nearest", b) for b in ((8, "row"), (4, 32), (3, 64))]
    plain += [Row("error-aware", b) for b in ((4, 32), (4, 64), (3, 64), (2, 32))]
    ranks = [Row(name, (r,)) for name in ("rank", "ranks by frequency") for r in RANKS]
    return [Row("untouched"), *plain, *ranks, *coded, *ablations]


def plan(args):
    """{system: its rows} that the flags choose."""
    systems = args.system.split(",")
    if unknown := [system for system in systems if system not in SYSTEMS]:
        fail(f"--system {unknown[0]}: there are {', '.join(SYSTEMS)}")
    found = {system: rows_of(system, shares_of(args, system)) for system in systems}
    if args.rows not in ("", "all"):
        asked = set(args.rows.split(","))
        known = {name: None for rows in found.values() for row in rows for name in (row.key, row.name)}
        if unknown := asked - known.keys():
            fail(f"--rows {min(unknown)}: there are {', '.join(known)}")
        return {system: [row for row in rows if asked & {row.name, row.key}] for system, rows in found.items()}
    if args.rows or args.shares:
        return found
    return {system: [row for row in rows if not MORE[system] & {row.name, row.key}] for system, rows in found.items()}


def shares_of(args, system):
    try:
        shares = [float(share) for share in (args.shares or SHARES[system]).split(",")]
    except ValueError:
        shares = [0]
    if not all(0 < share <= 1 for share in shares):
        fail(f"--shares {args.shares}: give shares of float16's bytes, above 0 and up to 1, such as 0.25,0.125")
    return shares


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    systems = plan(args)

    from kv_cache.bit_fit import check_cache
    from surgery.checks import check_window
    from surgery.evaluator import Evaluator
    from surgery.rank_cut import digest
    from surgery.subject import OwnSubject, choose_model, load_subject
    from surgery.sweep import prepare_folder, read_records
    from surgery.texts import TextReader, announced, announced_bos, bos_of, choose, settings

    chosen = choose(args.calib_text, args.eval_text)
    name = args.model or choose_model()
    print(f"model: {name}", *announced(chosen), sep="\n", flush=True)
    subject, tokenizer = load_subject(name, args.tokenizer)
    check_window(args, name, subject)
    if "cache" in systems and isinstance(subject, OwnSubject):
        fail("--system cache needs a Llama, Mistral, Qwen or GPT-NeoX of Hugging Face: give --system table,weights")
    parts = check_cache(subject.model, min(shares_of(args, "cache")), args.window, "small") if "cache" in systems else None
    texts = TextReader(chosen, tokenizer, len(subject.table.weight), args.window, bos_of(tokenizer, args.bos))
    print(announced_bos(tokenizer, texts.bos), flush=True)
    shared = {k: v for k, v in vars(args).items() if k not in ("system", "shares", "rows", "out_dir")}
    shared["model"] = Path(name).name if Path(name).exists() else name
    shared |= dict(weights=digest(subject.model), bos=texts.bos is not None)
    args.device = "cpu"
    folder, records, claim = prepare_folder(args, shared | settings(chosen), LINE)
    done, left, failed = {(record["system"], record["row"]) for record in records}, {}, []
    for system, rows in systems.items():
        rows = [row for row in rows if not row.name.startswith("rank") or row.given[0] < subject.table.weight.shape[1]]
        left[system] = [row for row in rows if (system, row.key) not in done]
    if any(left.values()):
        evaluator = Evaluator(subject, texts.evaluation_windows(args.eval_windows))
        for system, rows in left.items():
            failed += measure(args, system, rows, subject, texts, evaluator, folder, parts) if rows else []
    claim.release()
    if failed:
        fail(f"{'; '.join(failed)}: --rows and --shares choose others")
    counts = dict(rows=len(read_records(folder / "results.jsonl", LINE)), measured=sum(map(len, left.values())))
    finish(out_dir=str(folder), **counts)


def measure(args, system, rows, subject, texts, evaluator, folder, parts):
    """Measure rows of a system and write a line for each in results.jsonl -> messages about rows that cannot be measured."""
    from surgery.study_rows import CacheMeasurer, Measurer
    from surgery.sweep import add_line

    if system == "cache":
        measurer = CacheMeasurer(args, subject, texts, evaluator, parts)
    else:
        targets = "wte" if system == "table" else "all"
        measurer = Measurer(args, subject, targets, texts, evaluator, folder / "calibration.pt")
    failed = []
    for row in rows:
        started = time.time()
        try:
            measured = measurer.measure(row)
        except ValueError as error:  # bits or groups that do not fit
            failed.append(f"row {row.key} of {system}: {error}")
            continue
        record = dict(row=row.key, system=system, name=row.name, given=row.given) | measured
        add_line(folder / "results.jsonl", record | dict(seconds=round(time.time() - started, 1)))
        lost = "  ".join(f"{text} {m['nats']:+.4f} +/- {m['nats_se'] or 0:.4f}" for text, m in record["texts"].items())
        print(f"{system:8} {row.key:28} {record['share']:7.2%}  {lost}", flush=True)
    return failed


if __name__ == "__main__":
    main()
