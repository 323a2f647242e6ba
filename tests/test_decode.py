"""The KV cache, the ways to attend over it, and sample.py."""

import pytest
import torch

from common.dataset import write_dataset
from kernels import build as kernels
from kv_cache import KV_DTYPES
from kv_cache import number_formats as rows
from kv_cache.generate import chooser, generate
from kv_cache.own_attention import WAYS, decoder, fastest, fastest_dtype, is_compressed
from kv_cache.own_cache import KVCache, Store
from model import NO_CACHE

PYTHIA = dict(n_embd=32, n_head=2, rotary_pct=0.25, parallel_residual=True, tie_head=False)
SHAPES = dict(
    gpt2=dict(),
    factorized=dict(n_embd_wte=8),
    pythia=PYTHIA,
    one_norm=PYTHIA | dict(norms_per_layer=1),
    v=PYTHIA | dict(v_proj_dim=20),
    kv=PYTHIA | dict(v_proj_dim=20, k_proj_dim=12),
    k=PYTHIA | dict(k_proj_dim=12),
    kv_all_rotated=PYTHIA | dict(v_proj_dim=20, k_proj_dim=12, rotary_pct=1.0),
    narrow=PYTHIA | dict(v_proj_dim=20, v_proj_narrow=True),
    gpt2_kv=dict(v_proj_dim=10, k_proj_dim=6),
    gpt2_kv_no_bias=dict(v_proj_dim=10, k_proj_dim=6, bias=False),
)
COMPRESSED = [name for name in SHAPES if "v_proj_dim" in SHAPES[name] or "k_proj_dim" in SHAPES[name] if name != "narrow"]


def ids(model, B=3, T=None):
    torch.manual_seed(1)
    return torch.randint(model.config.vocab_size, (B, T or model.config.block_size))


def cached_logits(model, x, prompt, kv_dtype="float32", chunk=1):
    """The logits of every position: the first `prompt` at once, then `chunk` at a time."""
    cache, out, i = KVCache(model, len(x), x.shape[1], kv_dtype), [], 0
    with torch.no_grad():
        while i < x.shape[1]:
            step = prompt if i == 0 else chunk
            out.append(model.logits(model.hidden(x[:, i : i + step], cache)))
            i += step
    return torch.cat(out, 1)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt, chunk", [(1, 1), (5, 1), (4, 3)])
def test_cached_equals_uncached(tiny_model, shape, prompt, chunk):
    model = tiny_model(**SHAPES[shape])
    x = ids(model)
    with torch.no_grad():
        torch.testing.assert_close(cached_logits(model, x, prompt, chunk=chunk), model(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["gpt2", "pythia", *COMPRESSED])
def test_every_way_to_attend_is_equal(tiny_model, shape, way):
    model = tiny_model(**SHAPES[shape])
    x = ids(model)
    with torch.no_grad():
        expected, state = model(x)[0], {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(cached_logits(decoder(model, way), x, 5), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoder(model, way)(x[:, :1])[0], expected[:, :1], atol=1e-4, rtol=1e-4)  # without a cache
        assert torch.equal(model(x)[0], expected)  # the model is as it was, and can be saved
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", ["gpt2", "kv", "gpt2_kv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attends_alike_in_every_way(tiny_model, shape, dtype):
    model = tiny_model(**SHAPES[shape])
    x = ids(model)
    with torch.no_grad():
        expected = model(x)[0]
    model.to(dtype)
    for way in WAYS:
        found = cached_logits(decoder(model, way), x, 5, kv_dtype="float16")
        assert (found.float() - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_decoder_shares_the_weights_of_its_model(tiny_model):
    model = tiny_model(**SHAPES["kv"])
    shared = {p.data_ptr() for p in model.parameters()}
    own = [p for p in decoder(model, "late").parameters() if p.data_ptr() not in shared]
    # of each layer: k_proj and v_proj joined with what compresses them, and the keys' basis, with their biases
    assert sum(p.numel() for p in own) == 2 * (12 * 33 + 20 * 33 + 32 * 12 + 32)


@pytest.mark.parametrize("shape", ["kv", "gpt2_kv"])
def test_no_position_is_restored_for_a_single_token(tiny_model, shape):
    model = decoder(tiny_model(**SHAPES[shape]), "late")
    positions = []
    for block in model.transformer.h:
        for part in (block.attn.v_restore, block.attn.k_restore):
            part.register_forward_hook(lambda module, args, out: positions.append(args[0].shape[1]))
    cached_logits(model, ids(model), 5)
    assert positions == [5] * 4  # keys and values of two layers, once, for the prompt


def test_fastest_is_the_way_that_took_least(tiny_model):
    model = tiny_model(**SHAPES["kv"])
    way, seconds = fastest(model, 2, 16, "int8")
    assert set(seconds) == set(WAYS) and way == min(seconds, key=seconds.get)
    plain = tiny_model()
    assert not is_compressed(plain) and fastest(plain, 1, 16, "float32") == ("restore", {})
    dtype, seconds = fastest_dtype(plain, 1, 16)
    assert set(seconds) == {"float32", "bfloat16", "float16"} and dtype == min(seconds, key=seconds.get)
    assert plain.lm_head.weight.dtype == torch.float32  # copies were measured
    way, seconds = fastest(plain.half(), 1, 16, "float16")
    assert set(seconds) == set(WAYS) and way == min(seconds, key=seconds.get)
    assert len(fastest(tiny_model(), 1, 16, "int8")[1]) == 2


def test_bytes_are_those_allocated_and_shrink_as_promised(tiny_model):
    shape = PYTHIA | dict(n_embd=512, n_head=8, n_layer=1, vocab_size=8)
    models = dict(
        dense=tiny_model(**shape),
        v=tiny_model(**shape, v_proj_dim=320),
        kv=tiny_model(**shape, v_proj_dim=320, k_proj_dim=320),
    )
    stored = {
        (name, t): KVCache(m, 1, 16, t).bytes_per_token() for name, m in models.items() for t in ("float16", "int8", "int4")
    }
    assert stored["dense", "float16"] == 2 * 512 * 2
    assert stored["v", "float16"] / stored["dense", "float16"] == 1 - 0.1875
    assert stored["kv", "float16"] / stored["dense", "float16"] == 1 - 0.375
    assert stored["kv", "int8"] == 2 * 320 + 2 * 2  # a bfloat16 scale for the keys, one for the values
    assert stored["kv", "int4"] == 320 + 2 * 2
    assert stored["dense", "float16"] / stored["kv", "int8"] > 2.5


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("kv_dtype, levels", [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("r", [8, 7])
def test_whole_numbers_are_within_half_a_step(kv_dtype, levels, r, loops, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 5, r) * torch.tensor([1e-3, 1.0, 50.0, 3.0, 0.0])[:, None]
    if not loops:
        monkeypatch.setattr(kernels, "library", lambda: None)
    store = Store(kv_dtype, 2, 9, r, "cpu")
    store.append(torch.randn(2, 2, r))
    store.append(x[:, :3])
    store.append(x[:, 3:])
    back = store.read(torch.float32)[:, 2:]
    step = x.abs().amax(-1, keepdim=True) / levels
    assert ((back - x).abs() <= 0.503 * step.clamp(min=1e-30)).all()  # a bfloat16 scale is off by up to 1 / 256
    assert (back[..., :4] != x[..., :4]).any()  # it is not the numbers themselves
    assert (store.rows.dtype, store.rows.shape[-1]) == (torch.int8, 2 + (r if levels == 127 else (r + 1) // 2))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("groups, n", [(1, 200), (2, 64), (3, 5)])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_loops_write_and_read_what_torch_does(kv_dtype, groups, n, threads, monkeypatch):
    """Also after the cache has been cut and filled again; a number that is none stays one."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(2, 83, groups * n) * 10 ** torch.linspace(-6, 3, 83)[:, None]
    q, weights = torch.randn(2, 6, n), torch.randn(2, 6, 83).softmax(-1)
    weights[..., -1] = 0
    found = []
    for _ in range(2):
        store = Store(kv_dtype, 2, 90, groups * n, "cpu")
        store.append(x[:, :60].flip(1))
        store.length = 0
        for part in x.split([50, 1, 32], 1):
            store.append(part)
        found.append((store.rows[:, :83].clone(), store.scores(q, groups), store.sums(weights, groups)))
        store.length = 0
        store.append(x[:, :9].masked_fill(torch.arange(groups * n) == 3, torch.nan))
        assert store.read(torch.float32)[..., 3].isnan().all() and store.scores(q, groups)[:, : 6 // groups].isnan().all()
        monkeypatch.setattr(kernels, "library", lambda: None)
    assert torch.equal(found[0][0], found[1][0])
    for here, there in zip(*found):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4 * there.abs().max().item())


@pytest.mark.parametrize("kv_dtype, r", [("int8", 7), ("int4", 6)])
def test_a_scale_at_an_odd_byte_is_read(kv_dtype, r):
    store, x = Store(kv_dtype, 1, 4, r, "cpu"), torch.randn(1, 1, r)
    store.append(x)
    assert (store.read(torch.float32) - x).abs().max() < 0.1 * x.abs().max()


def test_small_numbers_are_read_in_half_precision():
    store, x = Store("int8", 1, 4, 32, "cpu"), 1e-5 * torch.randn(1, 4, 32)
    store.append(x)
    torch.testing.assert_close(store.read(torch.float16).float(), x, rtol=0, atol=2e-7)


UNFIT = [("float32", 2, 4, 3), ("float16", 1, 4, 3), ("float16", 2, 5, 3), ("float16", 2, 4, 2)]


@pytest.mark.parametrize("kv_dtype, B, length, groups", UNFIT)
def test_rows_that_do_not_fit_are_refused(kv_dtype, B, length, groups):
    store = Store("float16", 2, 4, 12, "cpu")
    store.append(torch.randn(2, 4, 12))
    with pytest.raises(ValueError, match="do not fit rows of"):
        rows.scores(kv_dtype, torch.randn(B, 6, 4), store.rows, length, groups)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_cache_and_one_of_other_texts_are_refused(tiny_model, way):
    model = decoder(tiny_model(), way)
    cache = KVCache(model, 2, 4, "int8")
    with torch.no_grad():
        model.hidden(ids(model, 2, 4), cache)
        for x in (ids(model, 2, 1), ids(model, 1, 1)):
            with pytest.raises(ValueError, match="room for 2 of 4"):
                model.hidden(x, cache)
            cache.truncate(3 if len(x) == 2 else 4)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "float16"])
def test_a_coarser_cache_is_near_and_not_equal(tiny_model, kv_dtype):
    model = tiny_model(**SHAPES["kv"])
    x = ids(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
    exact, coarse = cached_logits(model, x, 1), cached_logits(model, x, 1, kv_dtype)
    gap = (exact - coarse).abs().max() / exact.abs().max()
    assert 0 < gap < dict(float16=1e-2, int8=5e-2, int4=0.6)[kv_dtype]
    at_once = cached_logits(model, x, x.shape[1], kv_dtype)  # what perplexity is measured by
    torch.testing.assert_close(at_once, coarse, atol=1e-4, rtol=1e-4)


def test_a_cache_beyond_the_block_size_is_refused(tiny_model):
    with pytest.raises(ValueError, match="block_size 16"):
        KVCache(tiny_model(), 1, 17, "float32")


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_top_k_and_top_p_keep_what_they_say():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = p.log().expand(4000, 4)
    draw = lambda **options: set(chooser(1.0, **options, generator=torch.Generator().manual_seed(0))(logits).tolist())  # noqa: E731
    assert draw() == {0, 1, 2, 3} and draw(top_k=2) == {0, 1} and draw(top_k=9) == {0, 1, 2, 3}
    assert draw(top_p=0.4) == {0} and draw(top_p=0.6) == {0, 1} and draw(top_p=0.96) == {0, 1, 2, 3}
    assert draw(top_k=3, top_p=0.84) == {0, 1} and draw(top_p=1.0) == {0, 1, 2, 3}
    shares = chooser(1.0, generator=torch.Generator().manual_seed(0))(logits).bincount() / 4000
    torch.testing.assert_close(shares, p[0], atol=0.03, rtol=0)
    hot = chooser(2.0, generator=torch.Generator().manual_seed(0))(logits).bincount() / 4000
    torch.testing.assert_close(hot, p[0].sqrt() / p[0].sqrt().sum(), atol=0.03, rtol=0)
    assert chooser(0)(logits).eq(0).all()


@pytest.mark.parametrize("shape", ["gpt2", "kv"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_and_uncached_give_the_same_tokens(tiny_model, shape, temperature):
    model = tiny_model(**SHAPES[shape])
    x = ids(model, T=4)
    out = []
    for cache in (NO_CACHE, KVCache(model, 3, 16, "float32")):
        choose = chooser(temperature, generator=torch.Generator().manual_seed(5))
        out.append(torch.stack(list(generate(model, x, 13, choose, cache=cache))))
    assert torch.equal(*out) and out[0].shape == (13, 3)


def test_a_text_that_has_ended_stays_ended(tiny_model):
    model = tiny_model()
    draws = iter([[1, 2, 0], [0, 3, 4], [5, 6, 7], [8, 0, 9], [1, 1, 1]])
    choose = lambda logits: torch.tensor(next(draws))  # noqa: E731
    out = torch.stack(list(generate(model, ids(model, T=2), 9, choose, end_of_text=0))).T.tolist()
    assert out == [[1, 0, 0, 0], [2, 3, 6, 0], [0, 0, 0, 0]]


# -- sample.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset with a real tokenizer, on a text of a few words."""
    from common.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("texts")
    bpe = train_bpe(["the people of the states, naïve people"] * 20, 300)
    tokens = bpe.encode("the people of the states, naïve people " * 80).ids
    meta = dict(vocab_size=bpe.get_vocab_size(), tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0)
    write_dataset(folder, [*tokens, 0], [*tokens, 0], meta)
    return folder


@pytest.fixture
def trained(train, texts, tmp_path):
    out = tmp_path / "run"
    result = train(out_dir=out, dataset=texts, n_embd=32, rotary_pct=0.25, parallel_residual=True, v_proj_dim=20, k_proj_dim=12,
                   max_iters=60, eval_interval=60, dropout=0.0)  # fmt: skip
    assert result.status == 0, result.err
    return out


def test_sample_streams_what_the_batch_prints(trained, run_main, tmp_path):
    sample = ("sample.py", "--ckpt_path", trained, "--temperature", 0, "--max_new_tokens", 8)
    streamed = run_main(*sample, "--prompt", "the people")
    assert streamed.status == 0, streamed.err
    text = streamed.out.splitlines()[0]
    assert text.startswith("the people ") and "attend " in streamed.err
    assert streamed.last["cache_bytes_per_token"] == 2 * (20 + 12) * 4 and streamed.last["new_tokens"] == [8]
    (tmp_path / "prompt.txt").write_text("the people")
    for same in (["--no-kv_cache"], ["--attend", "late"], ["--kv_dtype", "float16", "--dtype", "auto"]):
        assert run_main(*sample, "--prompt_file", tmp_path / "prompt.txt", *same).out.splitlines()[0] == text
    batch = run_main(*sample, "--prompt", "the people", "--num_samples", 2)
    assert batch.out.splitlines()[1] == batch.out.splitlines()[3] == text
    from_end_of_text = run_main(*sample)
    assert from_end_of_text.status == 0 and from_end_of_text.last["prompt_tokens"] == 1


def test_sample_draws_by_its_seed_and_stops_at_the_block_size(trained, run_main):
    sample = ("sample.py", "--ckpt_path", trained, "--prompt", "the", "--temperature", 2.0, "--max_new_tokens", 90)
    first, again, other = (run_main(*sample, "--seed", seed) for seed in (1, 1, 2))
    assert first.out.splitlines()[0] == again.out.splitlines()[0] != other.out.splitlines()[0]
    assert "block_size 16" in first.err
    assert max(first.last["new_tokens"]) + first.last["prompt_tokens"] <= 17


def test_sample_at_the_edges(trained, run_main):
    """One token only, a prompt that fills the model, half precision, whole numbers, and an end-of-text that is drawn."""
    sample = ("sample.py", "--ckpt_path", trained, "--temperature", 0)
    expected = run_main(*sample, "--prompt_ids", "9,8,7").last["new_tokens"]
    for argv, new in [
        (["--max_new_tokens", 1], [1]),
        (["--prompt_ids", ",".join("9" * 16), "--max_new_tokens", 5], [1]),
        (["--prompt_ids", "9,8,7", "--dtype", "bfloat16", "--kv_dtype", "int8"], expected),
        (["--prompt_ids", "9,8,7", "--kv_dtype", "int4", "--num_samples", 2], expected * 2),
    ]:
        result = run_main(*sample, *argv)
        assert result.status == 0 and result.last["new_tokens"] == new, (argv, result.err)
    saved = torch.load(trained / "ckpt.pt", weights_only=True)
    saved["model"]["lm_head.weight"][0] = saved["model"]["transformer.ln_f.bias"] * 0 + 100  # end-of-text, or never
    saved["model"]["transformer.ln_f.bias"] += 10
    torch.save(saved, trained / "ckpt.pt")
    result = run_main(*sample, "--prompt_ids", "9,8,7", "--num_samples", 2)
    assert result.last["new_tokens"] == [0, 0]


def test_the_draw_obeys_top_k(trained, run_main):
    sample = ("sample.py", "--ckpt_path", trained, "--prompt_ids", "9,8,7")
    likeliest = run_main(*sample, "--temperature", 0).out.splitlines()[0]
    for only_one in (["--top_k", 1], ["--top_p", 1e-9]):
        assert run_main(*sample, "--temperature", 5.0, *only_one).out.splitlines()[0] == likeliest


def test_samples_of_adapters_and_of_ids_without_a_tokenizer(train, run_main, tmp_path):
    train(out_dir=tmp_path / "base")
    train(out_dir=tmp_path / "lora", init_from="prev_run", prev_run_ckpt=tmp_path / "base", lora_rank=2,
          lora_targets="wte,q_proj")  # fmt: skip
    result = run_main("sample.py", "--ckpt_path", tmp_path / "lora", "--prompt_ids", "1,2,3", "--max_new_tokens", 4)
    assert result.status == 0, result.err
    assert result.out.splitlines()[0].startswith("1,2,3,") and result.last["attend"] == "restore"


def test_characters_wait_for_their_last_byte(capsys):
    from common.tokenizer import read_codec, train_bpe
    from sample import Printer

    bpe = train_bpe(["ab"], 257)
    codec = read_codec(dict(tokenizer="bpe", tokenizer_json=bpe.to_str(), end_of_text=0), "here", "")
    printer, tokens = Printer(codec), codec.encode("é!")
    assert len(tokens) == 3  # two bytes of é, each a token
    for n in (1, 2, 3):
        printer.show(tokens[:n])
        assert capsys.readouterr().out == ["", "é", "!"][n - 1]


def test_sample_mistakes(trained, train, run_main, tmp_path, assert_one_line_error, toy_dataset):
    (tmp_path / "empty.txt").write_text("")
    torch.save(dict(weights=[1]), tmp_path / "other.pt")
    sample = ("sample.py", "--ckpt_path", trained)
    for words, argv in [
        (["Checkpoint not found", "none.pt"], ["sample.py", "--ckpt_path", tmp_path / "none.pt"]),
        (["other.pt", "not a checkpoint"], ["sample.py", "--ckpt_path", tmp_path / "other.pt"]),
        (["--prompt is empty"], [*sample, "--prompt", ""]),
        (["--prompt_file", "is empty"], [*sample, "--prompt_file", tmp_path / "empty.txt"]),
        (["--prompt_file", "cannot be read"], [*sample, "--prompt_file", tmp_path / "none.txt"]),
        (["--prompt_ids", "id 300"], [*sample, "--prompt_ids", "1,300"]),
        (["--prompt_ids", "id -1"], [*sample, "--prompt_ids=-1"]),
        (["--prompt_ids", "integers"], [*sample, "--prompt_ids", "1,x"]),
        (["17 tokens", "block_size 16"], [*sample, "--prompt_ids", ",".join(["1"] * 17)]),
        (["--prompt and --prompt_ids"], [*sample, "--prompt", "a", "--prompt_ids", "1"]),
        (["--temperature -1"], [*sample, "--temperature", "-1"]),
        (["--temperature 1e-39"], [*sample, "--temperature", "1e-39"]),
        (["--prompt", "UTF-8"], [*sample, "--prompt", "\udcff"]),
        (["--temperature 0", "--top_k"], [*sample, "--temperature", "0", "--top_k", "3"]),
        (["--top_p 1.5"], [*sample, "--top_p", "1.5"]),
        (["--top_k 0"], [*sample, "--top_k", "0"]),
        (["--num_samples 0"], [*sample, "--num_samples", "0"]),
        (["--no-kv_cache", "--kv_dtype"], [*sample, "--no-kv_cache", "--kv_dtype", "int8"]),
        (["--dtype auto", "--no-kv_cache"], [*sample, "--no-kv_cache", "--dtype", "auto"]),
        (["--dataset gone"], [*sample, "--dataset", "gone"]),
        (["tokenizer", "prepare.py"], [*sample, "--dataset", toy_dataset]),
        (["--device cuda"], [*sample, "--device", "cuda"]),
    ]:
        assert_one_line_error(run_main(*argv), *words)


# -- bench.py ---------------------------------------------------------------------------------------------------------


def test_bench_of_a_shape_counts_bytes_and_seconds(run_main, tmp_path, monkeypatch):
    import train_args

    monkeypatch.setitem(train_args.PRESETS, "laptop", train_args.PRESETS["laptop"] | dict(n_embd=64, n_layer=1))
    small = "--vocab_size 50 --context 20 --steps 4 --rounds 1 --kv_dtypes float16,int8 --dtypes float32,float16"
    result = run_main("bench.py", "decode", "--shape", "laptop", *small.split(), "--out", tmp_path / "a" / "bench.md")
    assert result.status == 0, result.err
    assert [row["dtype"] for row in result.last["rows"]] == ["float32"] * 6 + ["float16"] * 6
    rows = {(row["model"], row["kv_dtype"]): row for row in result.last["rows"]}
    assert rows["V 40/64", "float16"]["bytes_per_token"] == 0.8125 * rows["dense", "float16"]["bytes_per_token"]
    assert rows["K+V 40/64", "float16"]["bytes_per_token"] == 0.625 * rows["dense", "float16"]["bytes_per_token"]
    assert set(rows["K+V 40/64", "int8"]["tokens_per_second"]) == set(WAYS)
    assert "context 20" in (tmp_path / "a" / "bench.md").read_text()


def test_bench_mistakes(run_main, tmp_path, assert_one_line_error):
    for words, argv in [
        (["decode, generate or train"], []),
        (["decode, generate or train", "not --shape"], ["--shape", "laptop"]),
        (["decode, generate or train", "not eat"], ["eat", "--shape", "laptop"]),
        (["--runs and --shape"], ["decode"]),
        (["--dtypes", "'int8'"], ["decode", "--shape", "laptop", "--dtypes", "float32,int8"]),
        (["--kv_dtypes", "int2"], ["decode", "--shape", "laptop", "--kv_dtypes", "int2"]),
        (["pythia_baseline", "train_vdproj.sh"], ["decode", "--runs", tmp_path]),
        (["--context 20", "--steps 24"], ["decode", "--shape", "laptop", "--vocab_size", 50, "--context", 20]),
        (["--vs", "model.py"], ["decode", "--shape", "gpt2", "--vs", tmp_path]),
        (["--rank 900"], ["decode", "--shape", "laptop", "--rank", 900]),
        (["--rank 0", "1 or more"], ["decode", "--shape", "laptop", "--rank", 0]),
        (["--context 0", "1 or more"], ["decode", "--shape", "laptop", "--context", 0]),
        (["--out", "folder"], ["decode", "--shape", "laptop", "--out", tmp_path]),
        (["--device cuda"], ["decode", "--shape", "laptop", "--vocab_size", 50, "--device", "cuda"]),
    ]:
        assert_one_line_error(run_main("bench.py", *argv), *words)
