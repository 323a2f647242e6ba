"""
Reads the flags of every program and ends it. Flags are the fields of a dataclass. A user's mistake prints one line and exits
with status 2. The last line on stdout is one JSON object. Only the standard library is imported, so --help is fast.
"""

import argparse
import difflib
import errno
import json
import sys
import types
import typing
from dataclasses import MISSING, field, fields
from pathlib import Path

from common.versions import check_torch, check_transformers

LARGE = 10**9  # upper limit of a number whose flag gives only a lower one: larger numbers are typing errors
json_at_terminal = False  # set by --json


def flag(default=MISSING, help="", choices=None, low=None, high=None, above=None, below=None):
    """
    A dataclass field that is also a command-line flag. Without a default, the flag is required.

    low, high: the smallest and the largest number allowed. above, below: the same, but the limit itself is not allowed.
    parse() refuses other numbers.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, above=above, below=below))


def fail(message):
    """End the program because of a user's mistake. The message names the flag or file, what is wrong, and what to do."""
    words = "".join(
        c if c.isprintable() else "?" for c in " ".join(str(message).split())
    )  # a file's text could contain terminal commands
    print(f"{program_name()}: error: {words}", file=sys.stderr)
    sys.exit(2)


def program_name():
    """The program's name: train.py; surgery.eval for `python -m surgery.eval`, surgery for `python -m surgery`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec and spec.origin == sys.argv[0] else Path(sys.argv[0]).name


def last_words(kind, error, trace):
    """
    Python's hook for uncaught exceptions. It prints one line for Ctrl-C, for output that cannot be written, and for a package
    that is not installed.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and error.filename is None:
        print(f"stopped: the output cannot be written ({error.strerror})", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and not is_ours(package := (error.name or "").split(".")[0]):
        fail(f"the package {package} is not installed: bash scripts/setup.sh, or pip install {package}")
    else:
        if issubclass(kind, ImportError):  # maybe of a transformers that is too new for the installed torch
            check_transformers(fail)
        sys.__excepthook__(kind, error, trace)


def is_ours(name):
    """Whether a module belongs to this repository. An empty name counts as ours."""
    return any((Path(__file__).parents[1] / path).exists() for path in (name, f"{name}.py"))


def reason(error):
    """Another package's exception as text that fits on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def finish(**result):
    """Print the last line of a program: one JSON object. At a terminal it is printed only with --json."""
    if json_at_terminal or not sys.stdout.isatty():
        print(json.dumps(result), flush=True)


def rounded(x):
    """A measured number, rounded to four significant digits for output."""
    return float(f"{x:.4g}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def value_type(hint):
    """The type that a flag's text is converted to: int | None -> int."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def build_parser(cls, presets, description, epilog=None, prog=None):
    parser = Parser(
        prog=prog or program_name(),
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that parse() can distinguish given flags from defaults
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        is_bool = hints[f.name] is bool
        options = dict(action=argparse.BooleanOptionalAction) if is_bool else dict(type=value_type(hints[f.name]))
        choices = tuple(presets) if f.name == "preset" else f.metadata["choices"]
        if choices:
            options["choices"] = choices
        elif not is_bool:
            options["metavar"] = value_type(hints[f.name]).__name__.upper()
        shown = "" if f.default in (MISSING, None, "") else f" (default: {f.default})"
        help = (f.metadata["help"] + shown).replace("%", "%%")
        parser.add_argument(f"--{f.name}", required=f.default is MISSING, help=help, **options)
    words = "print the result as a JSON object in the last line, at a terminal too"
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=words)
    return parser


def parse(cls, argv=None, presets=None, description=None, epilog=None, prog=None):
    """
    Read the command line into an instance of cls. Given flags override the preset's values, which override the defaults.

    presets: name -> {field: value}; the field `preset` chooses one. prog: the program's name in --help, if it is not
    program_name().
    Returns (the instance, the dict of given flags).
    """
    global json_at_terminal
    sys.excepthook = last_words
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that has no sign for +/- prints ? in its place
    check_torch(fail)
    parser = build_parser(cls, presets or {}, description, epilog, prog)
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    json_at_terminal = given.pop("json", False)
    if unknown:
        names = [o for action in parser._actions for o in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    preset = given.get("preset")
    base = presets[preset] if preset else {}
    args = cls(**(base | given))
    check_ranges(args)
    return args, given


def check_ranges(args):
    """Refuse a number outside the range that its flag() states."""
    for f in fields(args):
        value, (low, high, above, below) = getattr(args, f.name), (f.metadata[x] for x in ("low", "high", "above", "below"))
        if value is None or (low, high, above, below) == (None,) * 4:
            continue
        within_low = (low is None or low <= value) and (above is None or above < value)  # false for NaN
        within_high = value <= (LARGE if high is None else high) and (below is None or value < below)
        if not (within_low and within_high):
            ends = {"{} or more": low, "above {}": above, "{} or less": high, "below {}": below}
            if within_low and high is None and below is None:
                ends = {"{} or less": LARGE}
            allowed = ", ".join(words.format(end) for words, end in ends.items() if end is not None)
            both = low is not None and high is not None
            fail(f"--{f.name} {value}: give {f'{low} to {high}' if both else allowed}")
