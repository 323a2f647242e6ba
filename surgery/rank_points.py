"""The points of a sweep: what is cut, how, and to which level. It needs no torch, so wrong flags are refused at once."""

from dataclasses import dataclass

from common.cli import fail
from util_factorization import MATRIX_METHODS, METHODS

MODES = ("separate", "shared_kv", "shared_layers")
SEEDS_VARIANCES = "0.99,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"
# kind of level -> (type of its number, test for an allowed number, words of the error)
LEVELS = dict(
    variance=(float, lambda x: 0 < x <= 1, "give a share of the energy, in (0, 1]"),
    rank=(int, lambda x: x >= 1, "give a rank of 1 or more"),
    budget=(float, lambda x: 0 < x < 1, "give a share of the numbers, between 0 and 1"),
)


@dataclass(frozen=True)
class Point:
    """One measurement. method, mode and targets are None for the untouched model. level: a key of LEVELS."""

    method: str | None = None
    mode: str | None = None  # one of MODES, "seed_faithful" (--as_original), or "table"
    targets: tuple = ()  # some of "q", "k", "v"; or ("wte",)
    level: str | None = None
    value: float | None = None

    @property
    def of_table(self):
        return self.mode == "table"

    def at(self, level):
        """The value if the point has this kind of level, else None."""
        return self.value if self.level == level else None

    def record(self):
        """The point's part of its line in results.jsonl."""
        names = dict(method=self.method or "-", mode=self.mode or "-", targets=",".join(self.targets) or "-")
        return names | {level: self.at(level) for level in LEVELS}

    @staticmethod
    def of_record(record):
        level = next((level for level in LEVELS if record.get(level) is not None), None)
        method, mode, targets = (None if record[name] == "-" else record[name] for name in ("method", "mode", "targets"))
        return Point(method, mode, tuple((targets or "").split(",") if targets else ()), level, record.get(level))


UNTOUCHED = Point()


def read_levels(args):
    """The levels of the three flags: [("variance", 0.9), ("rank", 96), ...]."""
    texts = {level: getattr(args, level) for level in LEVELS}
    if not any(texts.values()):
        texts["variance"] = SEEDS_VARIANCES
    found = []
    for level, (kind, allowed, rule) in LEVELS.items():
        for part in filter(None, texts[level].split(",")):
            try:
                value = kind(part)
            except ValueError:
                fail(f"--{level} {part}: {rule}")
            if not allowed(value):
                fail(f"--{level} {part}: {rule}")
            found.append((level, value))
    return found or fail("--variance, --rank or --budget: give numbers between the commas, such as 0.9,0.8")


def make_points(args):
    """All Points that the flags ask for, without repeats."""
    levels = read_levels(args)
    if args.as_original:
        return [Point("pca", "seed_faithful", ("q",), *level) for level in dict.fromkeys(levels)]
    points = []
    for choice in args.targets.split("/"):
        targets = tuple(choice.split(","))
        of_table = targets == ("wte",)
        if not of_table and (not set(targets) <= set("qkv") or len(set(targets)) < len(targets)):
            fail(f"--targets {choice}: give some of q,k,v, or wte alone; a slash separates several choices")
        for mode in args.mode.split(","):
            if mode not in MODES:
                fail(f"--mode {mode}: there are {', '.join(MODES)}")
            if not of_table and mode == "shared_kv" and not {"k", "v"} <= set(targets):
                fail(f"--mode shared_kv shares between k and v: --targets {choice} lacks one of them")
        for method in args.method.split(","):
            known = METHODS if of_table else MATRIX_METHODS
            if method not in known:
                fail(f"--method {method}: for {choice} there are {', '.join(known)}")
            if of_table and args.budget:
                fail("--budget is divided between layers, and wte is one matrix: give --rank")
            if method == "sequential" and "shared_layers" in args.mode.split(","):
                fail("--method sequential cuts layer after layer, --mode shared_layers several at once: change one of them")
            modes = ["table"] if of_table else args.mode.split(",")
            points += [Point(method, mode, targets, *level) for mode in modes for level in levels]
    return list(dict.fromkeys(points))
