"""Surgery of more kinds of models: our own checkpoints, untied heads, the families of Hugging Face, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.dataset import Dataset, write_dataset
from common.tokenizer import train_bpe
from kv_cache.hf_layers import find_layers
from model import GPT, GPTConfig
from surgery.evaluator import Evaluator, answers
from surgery.folder import load as load_small
from surgery.moments import Moments
from surgery.rank_cut import Surgeon, check_changes, fingerprint
from surgery.rank_folder import save as save_small
from surgery.rank_modules import shrink
from surgery.rank_points import MODES, Point
from surgery.subject import OwnSubject, Subject, load_subject
from surgery.texts import encode
from training import checkpoint
from training.evaluate import evaluate
from util_factorization import MATRIX_METHODS
from util_factorization import METHODS as TABLE_METHODS
from util_factorization.calibrate import calibrate
from util_factorization.decompose_table import decompose
from util_factorization.import_hf import from_hugging_face

toys, safetensors = pytest.importorskip("toys"), pytest.importorskip("safetensors.torch")
transformers, TEXT, llama, redrawn, save_tokenizer = (
    toys.transformers, toys.TEXT, toys.llama, toys.redrawn, toys.save_tokenizer
)  # fmt: skip

SHAPE = dict(
    vocab_size=300, block_size=64, n_layer=2, n_head=4, n_embd=32, mlp_expansion_factor=2, activation="gelu", bias=True,
    dropout=0.1,
)  # fmt: skip
OWN = dict(
    gpt=dict(),
    compressed=dict(v_proj_dim=16, k_proj_dim=12),
    narrow=dict(v_proj_dim=16, v_proj_narrow=True),
    factorized=dict(n_embd_wte=12, n_embd_wte_mean=True),
    adapted=dict(lora_rank=2, lora_alpha=4.0, lora_targets="wte,q_proj"),
)


def sharpened(model):
    """Attention that looks at something, so that queries and keys matter."""
    for layer in find_layers(redrawn(model)):
        for linear in layer.linears.values():
            linear.weight.data *= 4
    return model


def own(kind):
    return sharpened(GPT(GPTConfig(**SHAPE | OWN[kind])))


def save(path, model, dataset):
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, model, args=dict(dataset=str(dataset)), iter_num=0, data_step=0, tokens=None)


TINY = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    eos_token_id=0, bos_token_id=0, pad_token_id=0,
)  # fmt: skip


def family(name, **changes):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**TINY | changes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def own_clinic(tmp_path_factory):
    """A folder with text/, a dataset; run folders of our models that name it; an HF NeoX and the same as our checkpoint."""
    folder = tmp_path_factory.mktemp("clinic")
    bpe = train_bpe([TEXT], 300)
    ids = np.array(bpe.encode(TEXT).ids)
    meta = dict(vocab_size=300, tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0)
    write_dataset(folder / "text", ids[:9000], ids[9000:14000], meta)
    for kind in OWN:
        save(folder / kind / "ckpt.pt", own(kind), folder / "text")
    theirs = sharpened(family("GPTNeoX", intermediate_size=64, max_position_embeddings=64))
    theirs.save_pretrained(folder / "neox")
    save_tokenizer(folder / "neox")
    save(folder / "pythia.pt", from_hugging_face(theirs), folder / "text")
    (folder / "calib.txt").write_text(TEXT[: len(TEXT) // 2])
    (folder / "eval.txt").write_text(TEXT[len(TEXT) // 2 :])
    return folder


@pytest.fixture
def operate(own_clinic, run_main, tmp_path):
    """operate("--rank", 8, model="gpt"): surgery at toy size; its Result also has the lines of results.jsonl."""

    def run(*argv, model="gpt", out="out"):
        sizes = ("--window", 32, "--eval_windows", 2, "--calib_tokens", 512, "--answer_tokens", 3)
        places = ("--model", own_clinic / model, "--out_dir", tmp_path / out)
        texts = ("--calib_text", own_clinic / "calib.txt", "--eval_text", own_clinic / "eval.txt")
        result = run_main("-m", "surgery", *places, *texts, *sizes, *argv)
        lines = tmp_path / out / "results.jsonl"
        result.records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return result

    return run


# -- every mode and method --------------------------------------------------------------------------------------------

FAMILIES = dict(Mistral={}, Qwen2={}, Qwen3=dict(head_dim=16), Gemma=dict(head_dim=16))


def points(levels):
    """Every choice of targets, mode and method at each level."""
    of_layers = [(mode, m) for mode in MODES for m in MATRIX_METHODS if (mode, m) != ("shared_layers", "sequential")]
    for mode, method in [*of_layers, *(("table", method) for method in TABLE_METHODS)]:
        for level in levels:
            yield Point(method, mode, ("wte",) if mode == "table" else ("q", "k", "v"), *level)


@pytest.mark.parametrize("name", [*OWN, *FAMILIES])
def test_everything_kept_is_the_identity_and_only_what_is_asked_for_changes(name):
    """Our own models whatever their parts; biases (Qwen2), normed queries and keys (Qwen3), scaled rows (Gemma)."""
    subject = OwnSubject(own(name)) if name in OWN else Subject(sharpened(family(name, **FAMILIES[name])))
    model, layers = subject.model.requires_grad_(False), find_layers(subject.model)
    x = torch.randint(300, (20, 40), generator=torch.Generator().manual_seed(0))
    with Moments(layers, [(x, x.roll(-1, 1))]) as moments:
        head, lookup = calibrate(subject, [(x.numpy(), x.roll(-1, 1).numpy())], gradients=True)
    surgeon = Surgeon(subject, layers, 2, moments, dict(counts=x.flatten().bincount(minlength=300), head=head, lookup=lookup))
    evaluator, before = Evaluator(subject, dict(text=[(x[:1], x[1:2])])), fingerprint(model)
    assert evaluator.measure()["kl"] == pytest.approx(0, abs=1e-6) and len(layers) == 2
    for point in points(levels=(("variance", 1.0), ("rank", 5))):
        if point.of_table and (not subject.tables or (point.method == "joint" and "head" in subject.tables)):
            continue
        cut, rank = surgeon.cut(point), point.at("rank")
        check_changes(before, model, *cut.parameters())
        changed = {n for n, crc in fingerprint(model).items() if crc != before[n]}
        words = ("wte", "lm_head", "embed_tokens") if point.of_table else ("q_proj", "k_proj", "v_proj")
        assert {n.split(".")[-2] for n in changed} <= set(words) and all(n.endswith("weight") for n in changed)
        loose = point.of_table and point.method == "joint"  # which gives back a table only nearly
        kl = evaluator.measure()["kl"]
        assert loose or (kl < 1e-5 if rank is None else kl > 1e-4), point
        for target, part in cut.facts.items():
            assert part["ranks"] == ([5] * len(part["full"]) if rank else part["full"])
            if rank and point.mode == "separate" and point.method != "pca":
                assert {int(torch.linalg.matrix_rank(layer.weight(target), rtol=1e-4)) for layer in layers} == {5}
        cut.undo()
        check_changes(before, model)


# -- our own checkpoints ----------------------------------------------------------------------------------------------


def test_an_imported_pythia_is_cut_as_the_hugging_face_one(operate):
    """q, k and v are fused in theirs and apart in ours, and both have a head of their own."""
    flags = ("--targets", "q,k,v/wte", "--mode", ",".join(MODES), "--method", "svd,whiten,fisher", "--rank", "5")
    theirs, ours = operate(*flags, model="neox", out="theirs"), operate(*flags, model="pythia.pt", out="ours")
    assert theirs.status == ours.status == 0, theirs.err + ours.err
    assert len(ours.records) == 1 + 9 + 3
    for a, b in zip(theirs.records, ours.records):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["kl"] == pytest.approx(a["kl"], rel=1e-2, abs=1e-5)
        assert a["parts"].keys() == b["parts"].keys() and a["answer"] == b["answer"]
        for name, part in a["parts"].items():
            assert part["errors"] == pytest.approx(b["parts"][name]["errors"], rel=1e-2)
    assert min(r["kl"] for r in ours.records[1:]) > 1e-4 and list(ours.records[-1]["parts"]) == ["wte", "head"]


@pytest.mark.parametrize("name", ["llama", "neox", "gpt"])
def test_cut_in_order_loses_less(name):
    """On the text that it was fitted to, and not where a first layer alone is cut: nothing is spoilt before it."""
    subject = OwnSubject(own(name)) if name in OWN else Subject(sharpened(getattr(toys, name)()))
    subject.model.requires_grad_(False)
    layers, x = find_layers(subject.model), torch.randint(300, (60, 40), generator=torch.Generator().manual_seed(0))
    with Moments(layers, [(x, x.roll(-1, 1))]) as moments:
        calibrate(subject, [(x.numpy(), x.roll(-1, 1).numpy())], gradients=True)
    evaluator = Evaluator(subject, dict(text=[(row[None], row.roll(-1)[None]) for row in x]))
    lost = []
    for these in (layers, layers[:1]):
        surgeon = Surgeon(subject, these, 2, moments)
        for method in ("fisher", "sequential"):
            with surgeon.cut(Point(method, "shared_kv", ("k", "v"), "rank", 4)) as cut:
                lost.append(evaluator.measure()["kl"])
                assert cut.facts["kv"]["ranks"] == [4] * len(these)
    assert lost[1] < lost[0] and lost[3] == pytest.approx(lost[2], rel=1e-3)


def test_what_cut_in_order_is_not_for(operate, assert_one_line_error):
    assert_one_line_error(
        operate("--method", "sequential", "--mode", "separate,shared_layers", "--rank", "5"),
        "--method sequential",
        "shared_layers",
    )


@pytest.mark.parametrize("kind", [*OWN, "pythia"])
def test_the_loss_is_that_of_evaluate(own_clinic, kind):
    saved = checkpoint.load(own_clinic / ("pythia.pt" if kind == "pythia" else kind))
    model, data = checkpoint.build(saved, dropout=0.0).eval(), Dataset(str(own_clinic / "text"))
    windows = [tuple(map(torch.from_numpy, xy)) for xy in data.fixed_windows(3, 1, model.config.block_size)]
    found = Evaluator(OwnSubject(model), dict(text=windows)).measure()
    exact = evaluate(model, data, SimpleNamespace(eval_iters=3, batch_size=1), "cpu", torch.no_grad())
    assert found["loss"] == pytest.approx(exact["val_loss"], abs=1e-5) and found["kl"] == pytest.approx(0, abs=1e-6)


def test_an_answer_is_what_the_model_finds_likeliest_up_to_block_size(own_clinic):
    subject = OwnSubject(own("compressed"))
    ids = torch.arange(1, 62)
    with torch.no_grad():
        for step in range(4):
            likeliest = subject.model(ids[None])[0][0, -1].argmax()
            ids = torch.cat([ids, likeliest[None]])
            assert subject.generate(ids[:61], step + 1, None, (None,))[0, -1] == likeliest
    assert subject.generate(ids[:61], 50, None, (None,)).shape == (1, 4)  # 64 positions, and one after the last
    both, turned = (subject.generate(ids[:5], 20, None, seeds) for seeds in ((3, 4), (4, None, 3)))
    assert torch.equal(both, turned[[2, 0]]) and not torch.equal(*both)


@torch.no_grad()
def test_the_same_head_is_measured_without_probabilities():
    """KL by the hidden states is the one by the logits, for a head with a bias too; another head is found out."""
    hf, x = redrawn(llama()), torch.arange(1, 40)[None]
    hf.lm_head = torch.nn.Linear(32, 300)
    subject = Subject(hf)
    evaluator = Evaluator(subject, dict(text=[(x[:, :-1], x[:, 1:])]))
    hf.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    by_hidden = evaluator.measure()
    assert len(evaluator.predictions) == 1
    evaluator.head, evaluator.predictions = torch.nn.Sequential(evaluator.head), {}
    by_logits = evaluator.measure()
    assert not evaluator.predictions and by_logits["kl"] > 1e-4
    for name in ("loss", "kl", "top1"):
        assert by_hidden[name] == pytest.approx(by_logits[name], rel=1e-4, abs=1e-6)
    evaluator.head = evaluator.head[0]
    hf.lm_head.weight.mul_(1.01)
    evaluator.measure()
    assert not evaluator.predictions


class Words:
    """A tokenizer whose prompt is always the same."""

    chat_template, eos_token_id = None, None

    def __init__(self, prompt):
        self.prompt = prompt

    def __call__(self, text):
        return dict(input_ids=self.prompt)

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


def mamba():
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, mamba], ids=["llama", "mamba"])
def test_answers_side_by_side_are_those_of_transformers(make):
    """The likeliest tokens, up to one of the ends; a sample beside them does not matter. A state of another kind, too."""
    hf = redrawn(make())
    ids, options = torch.arange(1, 9), dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    theirs = hf.generate(ids[None], attention_mask=torch.ones(1, 8), **options)[0, 8:]
    found = Subject(hf).generate(ids, 20, [], (None, 5))
    assert torch.equal(found[0], theirs) and not torch.equal(*found)
    ends = theirs[[4, 9]].tolist()
    over = min(map(theirs.tolist().index, ends))
    found = Subject(hf).generate(ids, 20, ends, (None, 5))[0].tolist()
    assert found[: over + 1] == theirs[: over + 1].tolist() and set(found[over + 1 :]) <= {ends[0]}
    hf.generation_config.eos_token_id = ends
    assert answers(Subject(hf), Words(ids.tolist()), "", 20, (None,)) == [" ".join(map(str, theirs[:over].tolist()))]


# -- a head of its own ------------------------------------------------------------------------------------------------


def untied():
    return llama(tie_word_embeddings=False)


def moment(seed, n=32):
    x = np.random.default_rng(seed).normal(size=(200, n)) * np.geomspace(3, 0.2, n)
    return torch.from_numpy(x.T @ x / 200)


TABLE = dict(counts=torch.arange(300), head=moment(1), lookup=moment(2))


def cut_table(model, method, rank):
    return Surgeon(Subject(model), [], 2, table=TABLE).cut(Point(method, "table", ("wte",), "rank", rank))


def test_table_and_head_are_cut_to_the_rank_and_nothing_else_changes():
    model = untied()
    complete, before = {name: p.clone() for name, p in model.named_parameters()}, fingerprint(model)
    cut = cut_table(model, "svd", 5)
    assert list(cut.facts) == ["wte", "head"]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, complete[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    check_changes(before, model, *cut.parameters())
    with pytest.raises(RuntimeError, match="changed and should not have"):
        check_changes(before, model, {"lm_head.weight"}, {"lm_head.weight"})
    for name in changed:
        assert torch.linalg.matrix_rank(model.get_parameter(name), rtol=1e-4) == 5
    cut.undo()
    check_changes(before, model)


def test_each_is_best_in_the_metric_of_its_own_use():
    """The weighted error is the tail of numpy's singular values: G of the lookup alone, C of the head alone, or 1."""
    p = (TABLE["counts"] + 1).double() / (TABLE["counts"] + 1).sum()
    metrics = dict(
        freq=(None, None), whiten=(None, TABLE["head"]), fisher=(TABLE["lookup"], TABLE["head"])
    )  # of the lookup, of the head
    for method, of_uses in metrics.items():
        model = untied()
        before = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
        cut_table(model, method, 6)
        for old, new, M in zip(before, (model.model.embed_tokens.weight, model.lm_head.weight), of_uses):
            L = np.linalg.cholesky(np.eye(32) if M is None else M.numpy())
            weigh = p.sqrt()[:, None].numpy()
            centred = (old.double() - p @ old.double()).numpy()
            tail = np.linalg.svd(weigh * centred @ L, compute_uv=False)[6:]
            assert np.linalg.norm(weigh * (old - new).detach().double().numpy() @ L) == pytest.approx(
                np.linalg.norm(tail), rel=1e-3
            )


@pytest.mark.parametrize("method", ["svd", "centered", "freq", "whiten", "fisher"])
def test_every_component_of_an_untied_table_is_the_identity(method):
    model = untied()
    before = [p.clone() for p in model.parameters()]
    parts = cut_table(model, method, 32).facts
    assert parts["wte"]["full"] == parts["head"]["full"] == [32]
    for old, new in zip(before, model.parameters()):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "method"), [(untied, "svd"), (untied, "fisher"), (lambda: sharpened(family("Gemma")), "centered")]
)
def test_the_smaller_model_is_the_cut_one(make, method, tmp_path):
    """A head of its own beside the table; Gemma's looked-up rows, which are scaled where the head's are not."""
    model, small = make(), make()
    plan = shrink(small, [], cut_table(model, method, 6).tables)
    x = torch.arange(40)[None]
    torch.testing.assert_close(small(x).logits.log_softmax(-1), model(x).logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    tables = 2 if make is untied else 1
    stored, left = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert stored - left == tables * 300 * (32 - 6) - 2 * 32 * 6 - (0 if method == "svd" else 32)
    save_tokenizer(tmp_path)
    save_small(tmp_path / "small", small, transformers.AutoTokenizer.from_pretrained(tmp_path), plan)
    assert torch.equal(load_small(tmp_path / "small")[0](x).logits, small(x).logits)


def test_a_tied_table_is_weighed_by_both_uses():
    model = llama()
    table = model.lm_head.weight.clone()
    cut_table(model, "fisher", 7)
    Z, P, mean = decompose(table, "fisher", **TABLE).factors(7)
    torch.testing.assert_close(model.lm_head.weight, Z @ P + mean)


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_the_gradient_of_the_lookup_is_that_of_the_tables_rows(name):
    """Against autograd's, on ids that occur once; Gemma's rows enter the trunk scaled."""
    model, x = sharpened(family(name, tie_word_embeddings=False, head_dim=8)), np.arange(20, 60)[None]
    G = calibrate(Subject(model), [(x, x + 1)], gradients=True)[1]
    model.requires_grad_(True)
    loss = F.cross_entropy(model(torch.from_numpy(x)).logits[0], torch.from_numpy(x + 1)[0], reduction="sum")
    rows = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0][20:60].double()
    torch.testing.assert_close(G, rows.T @ rows / 40, rtol=1e-3, atol=1e-6 * G.abs().max().item())


def test_what_does_more_than_a_table_a_trunk_and_a_head_is_refused(operate, own_clinic, assert_one_line_error):
    for name, changes, words in (
        ("Gemma2", dict(head_dim=8), "gemma2 is more"),  # logits bent by a softcap
        ("Phi3", {}, "qkv_proj"),
    ):
        redrawn(family(name, **changes)).save_pretrained(own_clinic / name)
        save_tokenizer(own_clinic / name)
        assert_one_line_error(operate("--targets", "q", "--rank", "4", model=name), words, "give a")


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_with_our_own_checkpoints_are_one_line(operate, own_clinic, tmp_path, assert_one_line_error):
    (own_clinic / "broken.pt").write_bytes(b"nothing")
    save(own_clinic / "far.pt", own("gpt"), tmp_path / "far")
    write_dataset(own_clinic / "mute", np.arange(300), np.arange(300), dict(vocab_size=300, tokenizer="none"))
    save(own_clinic / "mute.pt", own("gpt"), own_clinic / "mute")
    bpe = train_bpe([TEXT], 400)
    meta = dict(vocab_size=400, tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0)
    write_dataset(own_clinic / "wide", np.arange(300), np.arange(300), meta)
    for argv, *words in [
        (["--window", "65"], "--window 65", "64 tokens", "lower"),
        (["--prompt", TEXT], "--prompt", "64", "--answer_tokens 0"),
        (["--prompt", ""], "--prompt has 0 tokens", "give another"),
        (["--model", own_clinic / "none.pt"], "none.pt", "--model"),
        (["--model", own_clinic / "broken.pt"], "broken.pt", "ckpt.pt"),
        (["--model", own_clinic / "far.pt"], "--model", "far", "prepare.py", "--tokenizer"),
        (["--model", own_clinic / "mute.pt"], "meta.pkl", "--tokenizer"),
        (["--tokenizer", own_clinic / "wide"], "400 tokens", "table of 300", "--tokenizer"),
        (["--out", tmp_path / "small"], "--out", "drop --out"),
        (["--tokenizer", own_clinic / "calib.txt"], "--tokenizer", "calib.txt"),
        (["--targets", "wte", "--model", own_clinic / "factorized"], "--targets wte", "factorized already", "q,k,v"),
        (["--targets", "wte", "--method", "joint", "--model", own_clinic / "pythia.pt"], "--method joint", "two", "fisher"),
    ]:
        assert_one_line_error(operate("--targets", "q", "--method", "svd", "--rank", "4", *argv), *words)


def test_whose_tokenizer_reads_for_our_checkpoint(own_clinic):
    """Its dataset's own; where that is gone, another dataset's or one of Hugging Face, here all the same."""
    save(own_clinic / "gone.pt", own("gpt"), own_clinic / "gone")
    choices = [("gpt", ""), ("gone.pt", own_clinic / "text"), ("gone.pt", own_clinic / "neox")]
    loaded = [load_subject(own_clinic / name, tokenizer and str(tokenizer)) for name, tokenizer in choices]
    ids = [encode(tokenizer, TEXT[:999], 300, "TEXT").tolist() for _, tokenizer in loaded]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) < 900
    words = [answers(subject, tokenizer, "7 is odd", 9, (5,)) for subject, tokenizer in loaded]
    assert words[0] == words[1] == words[2] and words[0]


def test_weights_that_cannot_be_changed_are_refused(operate, own_clinic, assert_one_line_error, capsys):
    whole_numbers = torch.nn.Linear(32, 32)
    whole_numbers.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    for part, words in ((torch.nn.Identity(), "Identity"), (whole_numbers, "Linear")):
        model = llama()
        model.model.layers[1].self_attn.q_proj = part
        with pytest.raises(SystemExit):
            find_layers(model)
        err = capsys.readouterr().err
        assert "layers.1.self_attn.q_proj is a " + words in err and "plain float weights" in err
    llama().save_pretrained(own_clinic / "scaled")
    save_tokenizer(own_clinic / "scaled")
    file = own_clinic / "scaled" / "model.safetensors"
    weights, name = safetensors.load_file(file), "model.layers.0.self_attn.q_proj"
    weights[f"{name}.weight"] = (weights[f"{name}.weight"] * 100).to(torch.int8)
    safetensors.save_file(weights | {f"{name}.SCB": torch.ones(32)}, file, metadata=dict(format="pt"))
    assert_one_line_error(operate("--targets", "q", "--rank", "4", model="scaled"), f"{name}.SCB", "float model")
    config = json.loads((own_clinic / "scaled" / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="bitsandbytes", load_in_4bit=True)
    (own_clinic / "scaled" / "config.json").write_text(json.dumps(config))
    assert_one_line_error(operate("--targets", "q", "--rank", "4", model="scaled"), "quantised", "float model")
