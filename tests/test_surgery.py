import json
import math

import numpy as np
import pytest
import torch

from kv_cache.hf_layers import find_layers
from surgery.moments import Moments
from surgery.rank_cut import Surgeon, check_changes, fingerprint
from surgery.rank_points import Point
from surgery.subject import Subject
from util_factorization import MATRIX_METHODS as METHODS
from util_factorization.calibrate import calibrate
from util_factorization.decompose_matrix import decompose, refit, relative_error

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers, llama, neox, TEXT, save_tokenizer = toys.transformers, toys.llama, toys.neox, toys.TEXT, toys.save_tokenizer

OUT, IN = 20, 32


def second_moment(seed, n):
    x = np.random.default_rng(seed).normal(size=(300, n)) * np.geomspace(3, 0.1, n)
    turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(n, n)))
    return torch.from_numpy(turn.T @ x.T @ x @ turn / 300)


def root(M):
    values, vectors = np.linalg.eigh(M)
    return vectors * np.sqrt(values) @ vectors.T


W = torch.from_numpy(np.random.default_rng(0).normal(size=(OUT, IN)) + 0.5).float()
C, G = second_moment(1, IN), second_moment(3, OUT)


def metric(A, method):
    """The error A as the method counts it."""
    A = A.double().numpy()
    A = root(G.numpy()) @ A if "G" in METHODS[method] else A
    return np.linalg.norm(A @ root(C.numpy()) if "C" in METHODS[method] else A)


# -- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tall", [False, True])
def test_pca_is_numpys(tall):
    """Rows are the samples; columns are, where there are more rows than columns."""
    M = W.T.contiguous() if tall else W
    samples = (M.T if tall else M).double().numpy()
    mean = samples.mean(0)
    _, S, Vh = np.linalg.svd(samples - mean, full_matrices=False)
    complete = decompose(M, "pca")
    np.testing.assert_allclose(complete.S, S, atol=1e-9)
    share = (S**2).cumsum() / (S**2).sum()
    for k in (1, 7, OUT):
        rebuilt = (samples - mean) @ Vh[:k].T @ Vh[:k] + mean
        np.testing.assert_allclose(complete.factors(k).matrix(), rebuilt.T if tall else rebuilt, atol=1e-5)
        assert complete.energy(k) == pytest.approx(share[k - 1])
    assert complete.rank_for(share[4] - 1e-9) == 5 and complete.rank_for(share[4] + 1e-9) == 6


@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_is_the_identity(method):
    for M, metric_of_rows in ((W, G), (W.T.contiguous(), second_moment(5, IN))):
        complete = decompose(M, method, second_moment(1, M.shape[1]), metric_of_rows)
        assert complete.rank_for(1.0) == complete.full == OUT
        assert relative_error(M, complete.factors(complete.full).matrix()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_the_singular_value_tail_in_the_methods_metric(method):
    complete = decompose(W, method, C, G)
    for k in (1, 5, OUT - 2):
        assert metric(W - complete.factors(k).matrix(), method) == pytest.approx(complete.tail(k), rel=1e-3)


@pytest.mark.parametrize("method", ["whiten", "fisher"])
def test_each_method_is_best_in_its_own_metric(method):
    for k in (2, 9):
        errors = {
            other: metric(W - decompose(W, other, C, G).factors(k).matrix(), method) for other in METHODS if other != "pca"
        }
        assert min(errors, key=errors.get) == method and errors[method] < 0.95 * errors["svd"]


@pytest.mark.parametrize("method", METHODS)
def test_folding_the_mean_is_one_component_more(method):
    for M in (W, W.T.contiguous()):
        factors = decompose(M, method, second_moment(1, M.shape[1]), second_moment(5, len(M))).factors(4)
        left, right = factors.folded()
        assert left.shape[1] == right.shape[0] == (5 if method == "pca" else 4)
        torch.testing.assert_close(left @ right, factors.matrix(), atol=1e-5, rtol=1e-5)


def test_refitting_a_stack_lowers_the_error_under_each_input():
    parts = [(torch.randn(8, IN, generator=torch.Generator().manual_seed(s)), second_moment(10 * s, IN)) for s in (1, 2)]
    stacked, mean_C = torch.cat([p[0] for p in parts]), (parts[0][1] + parts[1][1]) / 2
    factors = decompose(stacked, "whiten", mean_C).factors(6)
    better = refit(factors, parts)
    assert better.right is factors.right
    for (M, own), before, after in zip(parts, factors.matrix().split(8), better.matrix().split(8)):
        assert relative_error(M, after, own) < relative_error(M, before, own)
    complete = decompose(stacked, "whiten", mean_C).factors(16)
    torch.testing.assert_close(refit(complete, parts).matrix(), stacked, atol=1e-4, rtol=1e-4)


def test_what_decompose_refuses():
    for method, words in (("joint", "none of pca"), ("whiten", "needs C"), ("fisher", "needs C")):
        with pytest.raises(ValueError, match=words):
            decompose(W, method)
    with pytest.raises(ValueError, match="fisher needs G"):
        decompose(W, "fisher", C)


# -- the program on tiny models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "neox", "biased"])
def test_every_mode_and_method_runs_and_1_is_the_identity(operate, model, tmp_path):
    modes, methods = "separate,shared_kv,shared_layers", "pca,svd,whiten,fisher"
    if model == "biased":
        methods = "fisher"
    result = operate("--mode", modes, "--method", methods, "--variance", "1.0,0.6", "--html", model=model)
    assert result.status == 0, result.err
    untouched, *points = result.records
    assert (
        len(points) == 6 * len(methods.split(",")) and untouched["kl"] == pytest.approx(0, abs=1e-6) and untouched["top1"] == 1
    )
    assert untouched["ppl"] == pytest.approx(math.exp(untouched["loss"]))
    for r in points:
        complete = r["variance"] == 1
        assert (abs(r["loss"] - untouched["loss"]) < 1e-3 and r["kl"] < 1e-4) == complete, r
        for part in r["parts"].values():
            assert (part["ranks"] == part["full"]) == complete and (max(part["errors"]) < 1e-4) == complete
        assert set(r["parts"]) == ({"q", "kv"} if r["mode"] == "shared_kv" else {"q", "k", "v"})
        layers = 2 if model == "neox" else 3
        assert {len(p["ranks"]) for p in r["parts"].values()} == {-(-layers // 2) if r["mode"] == "shared_layers" else layers}
        assert isinstance(r["answer"], str) and isinstance(r["sampled"], str)
    report = (tmp_path / "out" / "report.md").read_text()
    for words in (
        "q,k,v shared_kv fisher",
        "attention_by_variance.png",
        "ranks_by_layer.png",
        "## Answers to the prompt",
    ):
        assert words in report
    assert (tmp_path / "out" / "attention_by_rank.png").read_bytes().startswith(b"\x89PNG")
    assert '<figure id="ranks_by_layer"' in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("method", ["svd", "centered", "freq", "whiten", "joint", "fisher"])
def test_the_table_of_a_real_model(operate, method):
    result = operate("--targets", "wte", "--method", method, "--rank", "8,32")
    assert result.status == 0, result.err
    untouched, cut, complete = result.records
    assert cut["kl"] > 0.001 and (method == "joint" or complete["kl"] < 1e-5)
    assert cut["parts"]["wte"]["ranks"] == [8]


def test_again_skips_what_is_done_and_more_points_are_added(operate):
    first = operate("--targets", "k", "--rank", "4")
    assert first.last["points"] == 2 and first.last["skipped"] == 0
    again = operate("--targets", "k", "--rank", "4")
    assert again.last["points"] == 0 and again.last["skipped"] == 2 and again.records == first.records
    more = operate("--targets", "k/v", "--rank", "4,8", "--method", "pca,whiten")
    assert more.last["points"] == 7 and more.records[:2] == first.records


def test_a_line_that_was_cut_off_is_measured_again(operate, tmp_path):
    first = operate("--targets", "k", "--rank", "4,8")
    file = tmp_path / "out" / "results.jsonl"
    file.write_text(file.read_text()[:-20])
    again = operate("--targets", "k", "--rank", "4,8")
    assert again.last["points"] == 1
    same = [{k: v for k, v in r.items() if k != "seconds"} for r in first.records]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again.records] == same


def test_a_point_does_not_hang_on_the_points_before_it(operate):
    """The weights are whole again after each point."""
    after = operate("--mode", "shared_kv,separate", "--method", "svd", "--rank", "2,8", out="a").records[-1]
    alone = operate("--mode", "separate", "--method", "svd", "--rank", "8", out="b").records[-1]
    assert after["loss"] == alone["loss"] and after["parts"] == alone["parts"]


def test_the_original_shared_kv_pca_cuts_q_alone_and_loses_the_mean(operate):
    result = operate("--as_original", "--variance", "1.0", out="faithful")
    assert result.status == 0, result.err
    record = result.records[-1]
    assert record["mode"] == "seed_faithful" and list(record["parts"]) == ["q"]
    assert min(record["parts"]["q"]["errors"]) > 1e-2  # every component kept, and yet not the same
    assert operate("--seed_faithful", "--variance", "1.0", out="faithful").last["points"] == 0  # the old spelling
    truth = operate("--targets", "q", "--variance", "1.0", out="faithful").records[-1]
    assert max(truth["parts"]["q"]["errors"]) < 1e-5 and abs(truth["kl"]) < abs(record["kl"]) / 2


def test_one_text_for_both_gives_its_even_and_its_odd_documents(operate, clinic):
    parts = [TEXT[i : i + 9000] for i in range(0, 72000, 9000)]
    (clinic / "books.txt").write_text("\f".join(parts))
    (clinic / "wiki.txt").write_text("".join(f"\n = Part {i} = \n\n{part}\n" for i, part in enumerate(parts)))
    ended = [part + "\f" for part in parts[:-1]] + parts[-1:]  # a form feed belongs to the document that it ends
    (clinic / "even.txt").write_text("".join(ended[::2]))
    (clinic / "odd.txt").write_text("".join(ended[1::2]))
    apart = operate("--targets", "k", "--method", "whiten", "--rank", "4", calib="even.txt", evaluate="odd.txt", out="a")
    one = operate("--targets", "k", "--method", "whiten", "--rank", "4", calib="books.txt", evaluate="books.txt", out="b")
    assert one.records[-1]["loss"] == apart.records[-1]["loss"]
    wiki = operate("--targets", "k", "--method", "whiten", "--rank", "4", calib="wiki.txt", evaluate="wiki.txt", out="c")
    assert wiki.status == 0 and wiki.records[-1]["loss"] != one.records[-1]["loss"]


# -- layers, moments, changes -----------------------------------------------------------------------------------------


def cut(model, mode, targets, rank):
    """A model cut by svd at a rank -> (the layers, the Cut, the fingerprint from before)."""
    layers, before = find_layers(model), fingerprint(model)
    surgeon = Surgeon(Subject(model), layers, per_group=2)
    return layers, surgeon.cut(Point("svd", mode, targets, "rank", rank)), before


@pytest.mark.parametrize("make", [llama, neox])
def test_only_what_was_asked_for_changes(make):
    model = make()
    complete = {name: p.clone() for name, p in model.named_parameters()}
    layers, done, before = cut(model, "separate", ("k",), 3)
    check_changes(before, model, *done.parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, complete[name])}
    part = "query_key_value" if make is neox else "k_proj"
    assert changed == {name for name in complete if name.endswith(f"{part}.weight")}
    for layer in layers:
        assert torch.linalg.matrix_rank(layer.weight("k"), rtol=1e-4) == 3
        assert torch.linalg.matrix_rank(layer.weight("v"), rtol=1e-4) > 3
    if make is neox:  # of the fused matrix the rows of k alone
        for name in changed:
            now, old = (p.unflatten(0, (4, 3, 8)) for p in (dict(model.named_parameters())[name], complete[name]))
            assert torch.equal(now[:, [0, 2]], old[:, [0, 2]]) and not torch.equal(now[:, 1], old[:, 1])
    with pytest.raises(RuntimeError, match="changed and should not have"):
        check_changes(before, model)
    done.undo()
    check_changes(before, model)
    with pytest.raises(RuntimeError, match="did not"):
        check_changes(before, model, changed, changed)
    assert all(torch.equal(p, complete[name]) for name, p in model.named_parameters())


def test_k_and_v_share_a_basis():
    model = llama()
    layers, _, _ = cut(model, "shared_kv", ("k", "v"), 5)
    for layer in layers:
        k, v = layer.weight("k"), layer.weight("v")
        ranks = [torch.linalg.matrix_rank(M, rtol=1e-4) for M in (k, v, torch.cat([k, v]))]
        assert ranks == [5, 5, 5]  # so r = right @ x, 5 numbers a token, give both


def test_layers_of_a_group_share_a_basis():
    model = llama()
    layers, _, _ = cut(model, "shared_layers", ("k",), 5)
    first, second, third = (layer.weight("k") for layer in layers)
    assert torch.linalg.matrix_rank(torch.cat([first, second]), rtol=1e-4) == 5
    assert torch.linalg.matrix_rank(torch.cat([first, third]), rtol=1e-4) == 10  # three layers: the last is alone


def test_moments_are_those_of_inputs_and_gradients():
    """Against autograd's own leaves, on a layer with fused and one with separate weights."""
    for make in (llama, neox):
        model = make()
        layers = find_layers(model)
        windows = [(np.arange(40).reshape(2, 20) + i, np.arange(1, 41).reshape(2, 20) + i) for i in range(2)]
        subject = Subject(model)
        with Moments(layers) as moments:
            calibrate(subject, windows, gradients=True)
        seen, layer = {}, layers[1]

        def keep(module, inputs, output, seen=seen):
            seen.setdefault("x", inputs[0].detach())
            output.requires_grad_().retain_grad()
            seen.setdefault("outputs", []).append(output)

        model.requires_grad_(True)
        for linear in layer.linears.values():
            linear.register_forward_hook(keep)
        G = C = 0
        for x, y in windows:
            seen.clear()
            logits = model(torch.from_numpy(x)).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten(), reduction="sum").backward()
            g, x = torch.cat([o.grad for o in seen["outputs"]], -1).flatten(0, 1), seen["x"].flatten(0, 1)
            C, G = C + x.T @ x / 80, G + g.T @ g / 80
        rows = torch.cat([layer.rows["k"], layer.rows["v"]])
        got_C, got_G = moments.of([(layer, "k"), (layer, "v")])
        torch.testing.assert_close(got_C, C, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_G, G[rows][:, rows], rtol=1e-3, atol=1e-6 * G.abs().max().item())


def test_sampled_labels_are_the_models_own():
    """The true Fisher: the mean over draws is what every next token gives, weighed by its probability."""
    model = llama(vocab_size=6, num_hidden_layers=1)
    subject, x = Subject(model), np.array([[1, 4]])
    torch.manual_seed(0)
    many = np.repeat(x, 4000, 0)
    draws = calibrate(subject, [(many, many)], gradients=True, sampled=True)[1]
    p = model(torch.from_numpy(x)).logits[0].softmax(-1)
    exact = sum(
        p[0, a] * p[1, b] * calibrate(subject, [(x, np.array([[a, b]]))], gradients=True)[1] for a in range(6) for b in range(6)
    )
    assert relative_error(exact, draws) < 0.1
    assert relative_error(exact, calibrate(subject, [(x, x)], gradients=True)[1]) > 0.2


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(operate, clinic, tmp_path, assert_one_line_error):
    for argv, *words in [
        (["--variance", "1.5"], "--variance 1.5", "(0, 1]"),
        (["--variance", "0"], "--variance 0", "(0, 1]"),
        (["--variance", "0.9,high"], "--variance high"),
        (["--rank", "0"], "--rank 0"),
        (["--rank", "900"], "--rank 900", "ranks 1 to 32"),
        (["--targets", "q,x"], "--targets q,x"),
        (["--targets", "q,wte"], "--targets q,wte"),
        (["--method", "joint"], "--method joint", "pca"),
        (["--mode", "apart"], "--mode apart"),
        (["--mode", "shared_kv", "--targets", "k"], "shared_kv", "lacks"),
        (["--as_original", "--method", "svd"], "--as_original", "--method"),
        (["--calib_tokens", "32", "--method", "whiten"], "--calib_tokens", "32 tokens"),
        (["--window", "100000"], "--window 100000", "2048 tokens", "lower"),
        (["--eval_text", tmp_path / "none.txt"], "--eval_text", "none.txt"),
        (["--eval_text", clinic / "calib.txt"], "--calib_text", "one document"),
        (["--model", tmp_path], "--model", "config"),
        (["--model", tmp_path / "none.gguf"], "--model", "gguf"),
        (["--model", clinic / "gpt2"], "gpt2", "fused in", "c_attn"),
        (["--device", "cuda"], "--device cuda"),
    ]:
        if argv != ["--device", "cuda"] or not torch.cuda.is_available():
            assert_one_line_error(operate("--targets", "q", *argv), *words)
    (clinic / "short.txt").write_text("too short")
    assert_one_line_error(operate("--rank", "4", "--method", "whiten", calib="short.txt"), "--calib_text", "short.txt")
    (clinic / "latin.txt").write_bytes(b"caf\xe9 " * 999)
    assert_one_line_error(operate("--rank", "4", evaluate="latin.txt"), "latin.txt", "UTF-8")


def test_mistakes_with_bytes_are_one_line(operate, tmp_path, assert_one_line_error):
    out = tmp_path / "small"
    for argv, *words in [
        (["--bytes", "0.5", "--rank", "4", "--out", out], "--bytes", "--rank", "give one of them"),
        (["--bytes", "0.5"], "--bytes", "give --out"),
        (["--bytes", "1.5", "--out", out], "--bytes", "1.5"),
        (["--bytes", "0.5", "--targets", "q", "--out", out], "--targets q", "all or wte"),
        (["--cache_bytes", "0.5", "--targets", "wte", "--out", out], "--targets", "--bytes"),
        (["--cache_bytes", "0.001", "--out", out], "--cache_bytes 0.001", "scales", "give 0."),
        (["--cache_bytes", "0.5", "--window", "4", "--out", out], "--window 4", "longer"),
        (["--bytes", "0.5", "--heal_rank", "4", "--out", out], "--heal_rank", "--heal_steps"),
    ]:
        assert_one_line_error(operate(*argv), *words)
    for argv, reason in [
        (["--bytes", "0.0001", "--targets", "wte"], "are too few for the basis"),
    ]:
        result = operate(*argv, "--out", out, "--calib_tokens", "1024")
        said = result.err.strip().splitlines()[-1]  # after bars of progress
        assert result.status == 2 and " ".join(argv[:2]) in said and reason in said
        assert not out.exists()


def test_a_tokenizer_of_another_model_is_refused(operate, clinic, assert_one_line_error):
    (clinic / "large").mkdir()
    save_tokenizer(clinic / "large", 500)
    assert_one_line_error(operate("--tokenizer", clinic / "large"), "500 tokens", "table of 300", "--tokenizer")


def test_another_sweep_in_the_folder_is_refused(operate, assert_one_line_error):
    assert operate("--targets", "k", "--rank", "4").status == 0
    assert_one_line_error(operate("--targets", "k", "--rank", "4", "--eval_windows", "2"), "--out_dir", "eval_windows 3")


def test_quantised_models_are_refused(operate, clinic, assert_one_line_error):
    llama().save_pretrained(clinic / "quantised")
    config = json.loads((clinic / "quantised" / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="gptq", bits=4)
    (clinic / "quantised" / "config.json").write_text(json.dumps(config))
    assert_one_line_error(operate("--targets", "q", "--rank", "4", model="quantised"), "quantised", "float model")
