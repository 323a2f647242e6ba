"""
Every reader is given files that are damaged or made to harm: it reads them rightly, or ends in one line with status 2.

Here few of each. HOSTILE=200 gives every file 200 (10 minutes), and prints what came of them: pytest -s tests/test_hostile.py
"""

import os

import pytest
import torch
from trials import Case, try_case

from common import checkpoint

NUMBER = int(os.environ.get("HOSTILE", 24))  # mutations of each file


@pytest.fixture
def survives(tmp_path):
    """survives(name, folder, files, read): no version of the files makes the reader fail. Prints the counts."""

    def check(name, folder, files, read, work=None, number=NUMBER):
        count = try_case(Case(name, folder, files, read), number, work or tmp_path / "work")
        print(f"\n{count}")
        assert not count.bad, "\n".join(map(str, [count, *count.bad[:20]]))
        assert count.fates["refused"]

    return check


def saved(path, model, **more):
    facts = dict(args=dict(dataset="toy"), iter_num=3, data_step=3, tokens=96, starts_from=None, val_loss=4.5)
    checkpoint.save(path, model, **facts | more)


def used(model):
    with torch.no_grad():
        return model(torch.arange(8)[None] % model.config.vocab_size)


@pytest.mark.parametrize("parts", [dict(), dict(n_embd_wte=8, lora_rank=2, lora_targets="wte,q_proj", lora_alpha=4.0),
                                   dict(rotary_pct=0.5, v_proj_dim=6, tie_head=False)])  # fmt: skip
def test_checkpoints(survives, tmp_path, tiny_model, parts):
    saved(tmp_path / "run" / "ckpt.pt", tiny_model(**parts))
    survives("checkpoint", tmp_path / "run", {"ckpt.pt": "torch"}, lambda run: used(checkpoint.build(checkpoint.load(run))))
