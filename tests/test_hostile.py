"""
Every reader is given files that are damaged or made to harm: it reads them rightly, or ends in one line with status 2.

Here few of each. bash scripts/hostile.sh 200 gives every file 200 and prints the counts.
"""

import os
from functools import partial

import numpy as np
import pytest
import torch
from test_report import write_run
from trials import all_survive

from common.dataset import Dataset, TrainingText, write_dataset
from common.hugging_face import read_config
from common.texts import codec_of
from common.tokenizer import train_bpe
from common.untrusted import read_json, read_json_lines
from reports import rows
from reports.html import page
from train_args import parse_args
from training import checkpoint
from training.device import start_processes
from training.factor_files import read_factors, read_facts, write_factors
from training.optimizer import make_optimizer
from training.run_folder import RunFolder
from training.start import begin, whole_last


@pytest.fixture
def survives(tmp_path):
    """survives(name, folder, files, read): no version of the files makes the reader fail. Prints the counts."""
    return partial(all_survive, tmp_path / "work")


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


def test_a_run_that_goes_on(survives, train, tmp_path):
    assert train(out_dir=tmp_path / "run", max_iters=3, n_layer=1, optimizer="muon").status == 0

    def read(run):
        args, given = parse_args(["--init_from", "resume", "--out_dir", str(run), "--max_iters", "5"])
        state = torch.get_rng_state()
        try:
            start = begin(args, given)
            start_processes(start.args)  # refuses a device that is not here
            optimizer = make_optimizer(start.args, start.model)
            start.restore(optimizer, torch.amp.GradScaler("cpu", enabled=False), "cpu", True)
            RunFolder(start.args, start.resumed_at)
            x, y = TrainingText(start.dataset, start.args, None, 0, 0, 1).batch(start.step, 0)
            start.model(torch.from_numpy(x), torch.from_numpy(y))[1].backward()
            optimizer.step()
        finally:
            torch.set_rng_state(state)

    survives(
        "a run that goes on", tmp_path / "run", {"last.pt": "torch", "config.json": "json", "metrics.jsonl": "lines"}, read
    )


@pytest.fixture
def text(tmp_path):
    """A dataset with a tokenizer of its own."""
    bpe, ids = train_bpe(["so it goes, so it went"], 270), np.arange(400) % 270
    meta = dict(vocab_size=270, tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0)
    write_dataset(tmp_path / "text", ids, ids[:100], meta)
    return tmp_path / "text"


def test_datasets(survives, text):
    def read(folder):
        dataset = Dataset(folder)
        dataset.check_block_size(16)
        dataset.batch(2, 16, 0)
        codec, _ = codec_of(folder, "give another")
        codec.decode([i for i in dataset.val.tolist() if i != codec.end_of_text])
        codec.encode("so it goes")

    survives("dataset", text, {"meta.pkl": "pickle", "train.bin": "raw", "val.bin": "raw"}, read)


def test_factor_files(survives, tmp_path, tiny_model):
    rng, names = np.random.default_rng(0), dict(method="freq", k=4)
    Z, P, mean = (rng.normal(size=shape).astype(np.float32) for shape in ((97, 4), (4, 16), 16))
    facts = names | dict(ckpt_tokens=9, energy=0.5, relative_error=0.1, relative_error_per_token=0.1, parameters=500)
    facts |= dict(compression=2.0, singular_values=[2.0, 1.0])
    kinds = {"wte_freq_k4.npy": "npy", "scale_mats_freq_k4.npz": "npz", "factors_freq_k4.json": "json"}
    kinds = {f"pca_factorized/{name}": kind for name, kind in kinds.items()}
    wte, scale, _ = kinds
    write_factors(tmp_path / "root" / wte, tmp_path / "root" / scale, Z, P, mean, facts)
    model = tiny_model(n_embd_wte=4, n_embd_wte_mean=True)

    def read(root):
        model.import_factors(**read_factors(root / wte, root / scale, 97, 4, 16))
        assert all(p.isfinite().all() for p in model.parameters())
        assert type(read_facts(root / wte).get("ckpt_tokens")) in (int, type(None))
        rows.read_factors(root)

    survives("factors", tmp_path / "root", kinds, read)


def test_reports(survives, tmp_path):
    """The pages of both systems; matplotlib, which takes seconds, draws the same figures."""
    from reports import token_table, value_cache

    runs = tmp_path / "runs"
    write_run(runs / "gpt_baseline", 5.0)
    write_run(runs / "gpt_pca_k4", 5.1, 4, starts_from=dict(part="token table", ckpt="x", tokens=9))
    cache = dict(cache_widths=[16, 12], epoch_steps=5)
    point = dict(iter=10, tokens=9, val_loss=5.0, val_ppl=148.0, ln_f_cosine=0.2, ln_f_cosine_full=0.3, v_recon=0.1)
    point |= dict(position_loss={"0-16": 5.0}, v_error=[0.1, 0.2])
    write_run(runs / "pythia_baseline", 5.0, best=point, last=point, **cache | dict(cache_widths=[16, 16]))
    write_run(runs / "vdproj_end_to_end_r12", 5.1, best=point, last=point, **cache)

    def read(root):
        found, _ = rows.read_rows(root)
        for part, of_cache in ((token_table, False), (value_cache, True)):
            if some := [row for row in found if row.of_cache == of_cache]:
                page(part.section(root, some)[1])

    files = {f"{run}/{file}": kind for run in ("gpt_pca_k4", "vdproj_end_to_end_r12")
             for file, kind in (("summary.json", "json"), ("metrics.jsonl", "lines"), ("config.json", "json"))}  # fmt: skip
    survives("report", runs, files, read)


@pytest.mark.parametrize("name", [".lock", "last.pt.part", "metrics.jsonl.part", "last.previous.pt"])
@pytest.mark.parametrize("is_there", [True, False])
def test_links_in_a_run_folder_lead_nowhere(train, tmp_path, name, is_there):
    run, outside = tmp_path / "run", tmp_path / "outside"
    assert train(out_dir=run, max_iters=3).status == 0
    if is_there:
        outside.write_text("another's")
    (run / name).symlink_to(outside)
    result = train(out_dir=run, init_from="resume", max_iters=5)
    assert result.status == (2 if name == ".lock" else 0), result.err
    assert outside.read_text() == "another's" if is_there else not outside.exists()
    assert not any(file.is_symlink() for file in run.iterdir() if file.name != ".lock")


def test_pipes_are_not_read(text, tmp_path, capsys):
    """Nothing ever comes out of this one."""
    (text / "meta.pkl").unlink()
    os.mkfifo(text / "meta.pkl"), os.mkfifo(tmp_path / "config.json"), os.mkfifo(tmp_path / "last.pt")
    readers = (lambda: Dataset(text), lambda: read_config(tmp_path, "--model"), lambda: whole_last(tmp_path),
               lambda: read_json(text / "meta.pkl", dict, "a", "b"),
               lambda: read_json_lines(tmp_path / "last.pt", dict, "a", "b"))  # fmt: skip
    for read in readers:
        with pytest.raises(SystemExit) as end:
            read()
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
