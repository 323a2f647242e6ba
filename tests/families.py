"""
What one does first with a model, tried on tiny random models of many families of transformers (zoo.py).

    python tests/families.py [--only llama,phi] [--cells rank,bytes] [--out FILE.jsonl]

Each cell is `equal` with its figure, `refused` with its seconds, or wrong: the numbers differ, a traceback, a refusal after 20
seconds, or one that blames the user for an error of ours. With --out, families that the file has are not tried again. Exit
status 1 if a cell is wrong.

    rank     k and v with every component: written, loaded, logits equal; a padded batch; greedy decoding
    cache    the cache at 90% of its bytes: KL below 0.01 nats
    wte      the token table with every component: logits equal
    bytes    all matrices at half of their bytes: KL as measured, and loaded again the same
    dense    the folder of `rank`, or of `wte`, as a standard folder: from_pretrained gives equal logits
    compact  the same as a folder with its own code
    eval     surgery.eval on that folder: its loss is that of the logits
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import toys
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import export.__main__ as export
import surgery.__main__ as surgery
from surgery import eval as surgery_eval
from surgery import load

CELLS = ("rank", "cache", "wte", "bytes", "dense", "compact", "eval")
IDS = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
FEW = "--window 32 --eval_windows 2 --calib_tokens 1024 --answer_tokens 0".split()


class Wrong(Exception):
    """A cell whose numbers differ."""


def near(figure, limit, what):
    if not figure <= limit:
        raise Wrong(f"{what} {figure:.2g}")
    return f"{figure:.1g}"


@torch.no_grad()
def logits_of(hf):
    """Logits of a batch, one text of it padded on the left."""
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    return torch.cat([hf(IDS).logits.flatten(0, 1), hf(IDS, attention_mask=MASK, position_ids=positions).logits[MASK.bool()]])


@torch.no_grad()
def decoded(hf):
    """Logits of 8 greedy steps through the cache, from padded prompts."""
    given = dict(
        max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0, eos_token_id=None
    )
    return torch.stack(hf.generate(IDS[:, :12], attention_mask=MASK[:, :12], **given).logits)


class Family:
    def __init__(self, name, folder):
        self.model, self.folder, self.out, self.kept = zoo.build(name), folder, folder / "sweep", None
        self.model.save_pretrained(folder / "model")
        toys.save_tokenizer(folder / "model")
        for half, text in (("calib", toys.TEXT[:40000]), ("eval", toys.TEXT[-40000:])):
            (folder / f"{half}.txt").write_text(text)

    def surgery(self, name, *argv):
        texts = ("--calib_text", self.folder / "calib.txt", "--eval_text", self.folder / "eval.txt")
        places = ("--model", self.folder / "model", "--out_dir", self.folder / f"sweep_{name}", "--out", self.folder / name)
        surgery.main([*map(str, (*places, *texts, *FEW, *argv))])
        return json.loads((self.folder / name / "measured.json").read_text())["models"]

    def same(self, hf, what, limit=2e-3):
        theirs = logits_of(self.model)
        scale = theirs.std().item()
        found = near((logits_of(hf) - theirs).abs().max().item() / scale, limit, f"{what}: logits apart by")
        near((decoded(hf) - decoded(self.model)).abs().max().item() / scale, limit, f"{what}: decoding apart by")
        return found

    def rank(self):
        self.surgery("rank", "--targets", "k,v", "--method", "svd", "--variance", "1.0")
        self.kept = "rank"
        return self.same(load(self.folder / "rank")[0], "rank")

    def wte(self):
        self.surgery("wte", "--targets", "wte", "--method", "svd", "--variance", "1.0")
        self.kept = self.kept or "wte"
        return self.same(load(self.folder / "wte")[0], "wte")

    def cache(self):
        found = self.surgery("cache", "--cache_bytes", "0.9")["packed"]
        return near(found["kl"], 0.01, "KL")

    def bytes(self):
        found = self.surgery("bytes", "--bytes", "0.5")["packed"]
        read = load(self.folder / "bytes")[0]
        same = (logits_of(read) - logits_of(load(self.folder / "bytes", packed=False)[0])).abs().max().item()
        near(same, 1e-2, "packed and decoded apart by")
        return near(found["kl"], 0.1, "KL")

    def exported(self, form):
        if not self.kept:
            self.wte()
        out = self.folder / form
        export.main(["--model", str(self.folder / self.kept), "--out", str(out), f"--{form}"])
        return self.same(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval(), form)

    def dense(self):
        return self.exported("dense")

    def compact(self):
        return self.exported("compact")

    @torch.no_grad()
    def eval(self):
        if not self.kept:
            self.wte()
        text, out = self.folder / "short.txt", io.StringIO()
        text.write_text(toys.TEXT[:300])
        with contextlib.redirect_stdout(out):
            surgery_eval.main(["--model", str(self.folder / self.kept), "--text", str(text), "--window", "200"])
        ids = AutoTokenizer.from_pretrained(self.folder / "model")(toys.TEXT[:300])["input_ids"]
        x = torch.tensor([[0, *ids]])
        loss = torch.nn.functional.cross_entropy(self.model(x[:, :-1]).logits[0], x[0, 1:]).item()
        return near(abs(json.loads(out.getvalue().splitlines()[-1])["loss"] - loss), 2e-3, "loss apart by")


def tried(family, cell):
    """-> dict(state, figure, seconds): what a cell of a family gives."""
    out, started = io.StringIO(), time.time()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            state, figure = "equal", getattr(family, cell)()
    except Wrong as error:
        state, figure = "WRONG", str(error)
    except SystemExit as end:
        lines = out.getvalue().strip().splitlines()
        line = next((text for text in reversed(lines) if "error: " in text), lines[-1])
        ours = [word for word in ("TypeError", "AttributeError", "KeyError", "RuntimeError", "IndexError") if word in line]
        state = "LATE" if "not checked" in lines[-1] else "refused" if end.code == 2 and not ours else "BLAMED"
        figure = line
    except Exception as error:  # what a user would see as a traceback
        state, figure = "TRACEBACK", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds = time.time() - started
    return dict(state="LATE" if state == "refused" and seconds > 20 else state, figure=figure, seconds=round(seconds, 1))


def table(lines, cells):
    from reports.markdown import table as markdown

    def shown(found):
        return f"equal {found['figure']}" if found["state"] == "equal" else f"{found['state']} {found['seconds']:.0f} s"

    return markdown(["family", *cells], [[x["family"], *(shown(x[c]) if c in x else "-" for c in cells)] for x in lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(zoo.FAMILIES))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    file, cells = Path(args.out), args.cells.split(",")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if args.out and file.exists() else []
    for name in args.only.split(","):
        if name in [line["family"] for line in lines]:
            continue
        folder = Path(tempfile.mkdtemp())
        family = Family(name, folder)
        lines.append(dict(family=name, **{cell: tried(family, cell) for cell in cells}))
        shutil.rmtree(folder)
        for cell in cells:
            found = lines[-1][cell]
            print(f"{name:16} {cell:8} {found['seconds']:5.1f} s  {found['state']:9} {found['figure']}", flush=True)
        if args.out:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(lines, cells))
    wrong = [x["family"] for x in lines if any(x[c]["state"] not in ("equal", "refused") for c in cells if c in x)]
    print(f"wrong: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
