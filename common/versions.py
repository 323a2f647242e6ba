"""
Which packages go with this Python and its torch. A program that cannot work with what is installed says so in one line.

scripts/setup.sh asks it, by its path:

    python common/versions.py list main      the lines of requirements.txt for pip; main: all but the tools of the tests
    python common/versions.py met tests      status 0 if what is installed meets the lines
    python common/versions.py notes          what is not as pinned or will not work, a line each
    python common/versions.py keeps          status 0 if the installed torch is kept
    python common/versions.py build          the torch and the CUDA that it is built for: "2.5.1, built for CUDA 12.4"

An installed torch from oldest() on is kept. A line "# torch<2.6: transformers==5.18.0" replaces a pin beside an older torch.
Only the packages' metadata is read, and none of them is imported, so that it answers in 0.1 s.
"""

import importlib.metadata as metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = "2.5.1"
OLDEST_ON_3_13 = "2.6.0"  # torch 2.5 has a build for Python 3.13, which can neither save a model nor compile one
TESTS = "# for the tests"
DRIVER = "580"  # of a card: the oldest that serves CUDA 13, which the pinned torch is built for


def release(version):
    """ "2.5.1+cu124" -> (2, 5, 1)"""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def older(version, than):
    return release(version) < release(than)


def oldest():
    """The oldest torch that works with this Python."""
    return OLDEST if sys.version_info < (3, 13) else OLDEST_ON_3_13


def installed(name):
    """The version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python():
    return f"Python {sys.version_info[0]}.{sys.version_info[1]}"


def build_of_torch():
    """Which torch is installed, and for what, in words."""
    if not installed("torch"):
        return "not installed"
    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, flags=re.M)
    return f"{installed('torch').split('+')[0]}, built {f'for CUDA {cuda[1]}' if cuda else 'without CUDA'}"


def driver():
    """The version of the cards' driver, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = re.match(r"[\d.]+", subprocess.run(asked, capture_output=True, text=True).stdout)
    return found and found[0]


# -- what a program needs -----------------------------------------------------------------------------------------------


def check_torch(fail):
    """fail(message) if the installed torch is older than this project runs on."""
    if (torch := installed("torch")) and older(torch, oldest()):
        fail(f"torch {torch} is too old for {python()}: bash scripts/setup.sh, or pip install 'torch>={oldest()}'")


def check_transformers(fail):
    """
    fail(message) if the installed transformers wants a newer torch. It would import, and then lack its models.

    Its metadata says which torch it wants; an older torch that we have tried has a line of its own in requirements.txt.
    """
    torch, transformers = installed("torch"), installed("transformers")
    if not torch or not transformers:
        return
    pin, pinned = (next((line for line in wanted(t) if line.startswith("transformers==")), None) for t in (torch, "999"))
    asked = [re.match(r"torch>=([\d.]+);.*extra == .torch.$", line) for line in metadata.requires("transformers") or []]
    if any(found and older(torch, found[1]) for found in asked) or (
        pin and pin != pinned and older(pin.split("==")[1], transformers)
    ):
        fail(
            f"transformers {transformers} needs a newer torch than {torch}, which is installed: bash scripts/setup.sh, or "
            f"pip install {pin}"
        )


def refuse_import(message):
    """A fail() for code that another program imports."""
    raise ImportError(message)


# -- what setup.sh installs ---------------------------------------------------------------------------------------------


def wanted(torch, part="main"):
    """The lines to install. With a kept torch: all but its own, with the pins that fit it. torch None: all as pinned."""
    text = (Path(__file__).parents[1] / "requirements.txt").read_text(encoding="utf-8")
    replaced, lines = {}, text.split(TESTS)[part == "tests"].splitlines()
    for line in lines:
        if (found := re.match(r"# torch<([\d.]+): ((\S+)==\S+)", line)) and torch and older(torch, found[1]):
            replaced[found[3]] = found[2]
    lines = [line.split("#")[0].strip() for line in lines]
    names = {line: re.match(r"[\w.-]+", line)[0] for line in lines if line}
    return [replaced.get(name, line) for line, name in names.items() if not (name == "torch" and torch)]


def is_met(line):
    from packaging.requirements import Requirement

    need = Requirement(line)
    if need.marker and not need.marker.evaluate():
        return True
    have = installed(need.name)
    return have is not None and need.specifier.contains(have, prereleases=True)


def are_met(lines):
    try:
        return all(map(is_met, lines))
    except ImportError:  # an environment without the package `packaging` lacks others too
        return False


def notes(torch):
    """What is not as pinned, or will not work, beside a torch that is kept, or None."""
    if not torch and (old := installed("torch")):
        yield (
            f"torch {old} is too old for {python()}, which needs {oldest()}: .venv gets the pinned one, a download of gigabytes"
            + (f". Python 3.12 works with torch {OLDEST}" if not older(old, OLDEST) else "")
        )
    if not torch and (version := driver()) and older(version, DRIVER):
        yield (
            f"the pinned torch needs driver {DRIVER} for its CUDA 13, this one is {version}: to use the card, install a torch "
            f"that fits it into an environment first (pip install torch=={oldest()}), activate that, and start again"
        )
    for line, pinned in zip(wanted(torch), wanted("999")) if torch else ():
        if line != pinned:
            yield f"torch {torch} is kept, so {line} is taken: {pinned} needs a newer torch"
    if sys.version_info[:2] > (3, 13):
        yield f"{python()} has not been tried: 3.10 to 3.13 have"


if __name__ == "__main__":
    kept = installed("torch")
    if kept and older(kept, oldest()):
        kept = None
    if sys.argv[1] == "build":
        print(build_of_torch())
    elif sys.argv[1] == "keeps":
        sys.exit(not kept)
    elif sys.argv[1] == "notes":
        print("".join(f"setup: {line}\n" for line in notes(kept)), end="")
    elif sys.argv[1] == "list":
        print("\n".join(wanted(kept, sys.argv[2])))
    else:
        sys.exit(not are_met(wanted(kept, sys.argv[2])))
