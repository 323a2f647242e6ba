import copy
import json
import math
import re

import pytest
import torch

from kv_cache.decoding_speed import cache_bytes
from kv_cache.hf_latents import LatentAttention
from kv_cache.hf_layers import find_layers
from surgery import rank_cut
from surgery.evaluator import Evaluator
from surgery.folder import load
from surgery.heal import Recipe, heal
from surgery.rank_cut import Surgeon
from surgery.rank_folder import latents_to_keys, save
from surgery.rank_modules import shrink
from surgery.rank_points import Point
from surgery.subject import Subject
from util_factorization.decompose_matrix import decompose, from_skeleton, skeleton
from util_factorization.modules import FactorizedTable

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
transformers, llama, neox, redrawn, save_tokenizer = (
    toys.transformers, toys.llama, toys.neox, toys.redrawn, toys.save_tokenizer
)  # fmt: skip

SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip


def qwen2():
    return redrawn(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)))


def qwen3():
    return redrawn(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **SHAPE)))


def mistral():
    return redrawn(transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=8, head_dim=8, **SHAPE)))


MODELS = dict(llama=llama, neox=neox, qwen2=qwen2, qwen3=qwen3, mistral=mistral)
IDS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))


def sharpened(model):
    """Attention that looks at something, so that keys matter."""
    for layer in find_layers(model):
        for linear in layer.linears.values():
            linear.weight.data *= 6
    return model


def cut(model, method="svd", **point):
    """(the model cut in place, the same as a smaller model, its plan)."""
    model = sharpened(model)
    small = copy.deepcopy(model)
    point = Point.of_record(dict(method=method) | point)
    done = Surgeon(Subject(model), [] if point.of_table else find_layers(model), 2).cut(point)
    return model, small, shrink(small, done.stacks, done.tables)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


POINTS = [("separate", "q"), ("separate", "k"), ("separate", "q,k,v"), ("shared_kv", "k,v"), ("shared_layers", "k,v")]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("mode", "targets"), POINTS)
@torch.no_grad()
def test_factors_compute_what_the_cut_matrices_do(make, mode, targets):
    """On whole texts, left padding among them, and through each model's own cache; pca has a mean, which is folded in."""
    untouched = sharpened(make())(IDS).logits
    model, small, _ = cut(make(), "pca", mode=mode, targets=targets, rank=6)
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    assert (model(IDS).logits - untouched).abs().max() > 0.01
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    options = dict(attention_mask=padding, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    ours, theirs = (m.generate(IDS, pad_token_id=0, **options) for m in (small, model))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.sequences, theirs.sequences)


def wide():
    """Heads of 64 numbers, for which the compiled loop has its own branch."""
    return llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)


@pytest.mark.parametrize("make", [llama, neox, qwen2, wide], ids=["llama", "neox", "qwen2", "wide"])
@pytest.mark.parametrize(("mode", "rank"), [("shared_kv", 16), ("shared_kv", 9), ("separate", 6), ("shared_layers", 20)])
def test_latents_turned_to_keys_decode_the_same(make, mode, rank, monkeypatch):
    """Through growing buffers, for beams, and with left padding: as torch does with the latents that are stored."""
    _, small, _ = cut(make(), mode=mode, targets="k,v", rank=rank)
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    options = dict(attention_mask=padding, max_new_tokens=30, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    monkeypatch.setattr("kv_cache.hf_latents.growing", lambda cache, i: None)
    theirs, their_beams = small.generate(IDS, do_sample=False, **options), small.generate(IDS, num_beams=3, **options)
    monkeypatch.undo()
    latents_to_keys(small)
    monkeypatch.setattr("kv_cache.hf_attention.AT_ONCE", 8)
    ours, beams = small.generate(IDS, do_sample=False, **options), small.generate(IDS, num_beams=3, **options)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-3, rtol=1e-3)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(beams.sequences, their_beams.sequences)
    layer, attn = ours.past_key_values.layers[1], small.get_submodule(find_attention(small))
    assert layer.keys.untyped_storage().nbytes() == layer.buffers[0].tensor.nbytes > layer.keys.nbytes  # a view of a longer one
    if mode == "shared_kv":
        assert (layer.reader.at < rank).sum() >= min(rank, len(layer.reader.at)) - 2  # a poor pivot is left to a value
        before = small(IDS, use_cache=False).logits
        small.to(torch.float64)  # the stored latents again
        assert attn.basis is None and not (attn.k_proj.up.weight == 1).any()
        torch.testing.assert_close(small(IDS, use_cache=False).logits.float(), before, atol=1e-3, rtol=1e-3)


def find_attention(small):
    return next(name for name, module in small.named_modules() if isinstance(module, LatentAttention))


def step(small, past, ids, **options):
    return small(ids, past_key_values=past, use_cache=True, **options).logits


@pytest.fixture
def turned():
    _, small, _ = cut(llama(), mode="shared_kv", targets="k,v", rank=10)
    latents_to_keys(small)
    return small


def test_caches_of_every_kind_go_on_as_a_whole_text_does(turned, monkeypatch):
    """One that makes its layers late, one of another's pairs, shallow copies, after a crop, out of inference mode."""
    monkeypatch.setattr("kv_cache.hf_attention.AT_ONCE", 8)
    more = torch.cat([IDS, IDS[:, :6]], 1)

    def right(found, wanted):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)

    with torch.no_grad():
        whole = turned(more, use_cache=False).logits
        past = transformers.DynamicCache()
        for start, end in ((0, 20), (20, 21), (21, 24)):
            right(step(turned, past, more[:, start:end]), whole[:, start:end])
        pairs = transformers.DynamicCache([(layer.keys, layer.values) for layer in past.layers])
        right(step(turned, pairs, more[:, 24:25]), whole[:, 24:25])
        twin = copy.copy(past)
        twin.layers = [copy.copy(layer) for layer in past.layers]
        right(step(turned, past, more[:, 24:25]), whole[:, 24:25])
        step(turned, twin, IDS[:, 9:10])  # goes another way
        right(step(turned, past, more[:, 25:26]), whole[:, 25:26])
        past.crop(-4)
        right(step(turned, past, more[:, 22:23]), whole[:, 22:23])
    with torch.inference_mode():
        past = turned(IDS, use_cache=True).past_key_values
        right(step(turned, past, more[:, 20:21]), whole[:, 20:21])
    with torch.no_grad():
        right(step(turned, past, more[:, 21:22]), whole[:, 21:22])
        with torch.autocast("cpu", torch.bfloat16):
            assert step(turned, past, more[:, 22:23]).isfinite().all()
    for layer in past.layers:
        layer.reset()
        assert layer.buffers == [None, None] and layer.reader is None


def test_a_single_token_has_gradients(turned):
    """The compiled loop computes none, so it is left out where they are asked for."""
    found = []
    for use_cache in (True, False):
        x = turned.get_input_embeddings()(IDS).detach()
        with torch.no_grad():
            past = turned(inputs_embeds=x[:, :-1], use_cache=True).past_key_values
        x.requires_grad_(True)
        out = turned(inputs_embeds=x[:, -1:], past_key_values=past) if use_cache else turned(inputs_embeds=x, use_cache=False)
        found.append(torch.autograd.grad(out.logits[:, -1].square().sum(), x)[0][:, -1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_the_cache_holds_what_it_says():
    """Bytes counted on the tensors: r numbers a token and layer, float32, instead of 2 G n."""
    layers, G, n = 3, 2, 8
    complete, small, _ = cut(llama(), mode="shared_kv", targets="k,v", rank=10)
    assert cache_bytes(complete, IDS[0]) == layers * 2 * G * n * 4
    assert cache_bytes(small, IDS[0]) == layers * 10 * 4
    _, apart, _ = cut(llama(), mode="separate", targets="k,v", rank=5)
    assert cache_bytes(apart, IDS[0]) == layers * (5 + 5) * 4
    _, keys, _ = cut(llama(), mode="separate", targets="k", rank=5)
    assert cache_bytes(keys, IDS[0]) == layers * (5 + G * n) * 4


def test_a_skeleton_is_the_same_matrix_with_unit_rows():
    left, right = torch.randn(20, 6), torch.randn(6, 9)
    rows, rest, own = skeleton(left, right)
    again = from_skeleton(rows, rest)
    torch.testing.assert_close(again @ own, left @ right, atol=1e-4, rtol=1e-4)
    assert torch.equal(again[rows], torch.eye(6)) and rest.shape == (14, 6)
    torch.testing.assert_close(own, (left @ right)[rows], atol=1e-4, rtol=1e-4)  # what is kept are outputs
    everything = skeleton(torch.eye(4), right[:4])
    assert everything[1].shape == (0, 4) and torch.equal(from_skeleton(*everything[:2]) @ everything[2], right[:4])


def test_parameters_are_those_of_the_factors():
    complete, small, _ = cut(llama(), mode="separate", targets="q,k,v", rank=4)
    dense, factors = 32 * 32 + 2 * 16 * 32, 4 * (32 + 32) + 2 * 4 * (32 + 16)
    assert parameters(small) == parameters(complete) - 3 * (dense - factors)
    complete, shared, _ = cut(llama(), mode="shared_layers", targets="q", rank=4)  # of three layers two share, one is alone
    assert parameters(shared) == parameters(complete) - 3 * 32 * 32 + 3 * 4 * 32 + 2 * 4 * 32
    complete, table, _ = cut(llama(), mode="table", targets="wte", rank=4)
    assert parameters(table) == parameters(complete) - 300 * 32 + 300 * 4 + 2 * 4 * 32


@pytest.mark.parametrize("method", ["svd", "centered"])
def test_a_factorized_table(method):
    model, small, plan = cut(llama(), method, mode="table", targets="wte", rank=7)
    assert isinstance(small.get_input_embeddings(), FactorizedTable) and plan["table"]["mean"] == (method == "centered")
    # The mean shifts all logits of a position alike, and the head leaves it out.
    torch.testing.assert_close(small(IDS).logits.log_softmax(-1), model(IDS).logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [llama, neox, qwen2])
def test_saved_and_loaded_with_one_call(make, tmp_path):
    for i, (mode, targets) in enumerate([*POINTS, ("table", "wte")][0 if make is llama else 3 : 6 if make is llama else 5]):
        _, small, plan = cut(make(), mode=mode, targets=targets, rank=5)
        save_tokenizer(tmp_path / "tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        numbers, size = save(tmp_path / f"{i}", small, tokenizer, plan)
        assert size == (tmp_path / f"{i}" / "surgery.safetensors").stat().st_size
        rows = sum(stack["rank"] for stack in plan["stacks"])  # whose places are stored, and which are not
        assert numbers == parameters(small) - sum(stack["rank"] ** 2 for stack in plan["stacks"]) + rows
        read, spoken = load(tmp_path / f"{i}")
        torch.testing.assert_close(read(IDS).logits, small(IDS).logits, atol=1e-4, rtol=1e-4)
        assert spoken("1 is odd") == tokenizer("1 is odd")
        with pytest.raises(OSError):  # and never as a model whose missing weights are drawn at random
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{i}")


def test_a_file_that_lacks_a_weight_is_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    _, small, plan = cut(llama(), mode="shared_kv", targets="k,v", rank=5)
    save_tokenizer(tmp_path / "tokenizer")
    save(tmp_path / "small", small, transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), plan)
    file = str(tmp_path / "small" / "surgery.safetensors")
    complete = load_file(file)
    for name in ("model.norm.weight", "stacks.1.rest"):
        save_file({k: t for k, t in complete.items() if k != name}, file)
        with pytest.raises(SystemExit):
            load(tmp_path / "small")
        assert name in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(tensors, file, metadata=None):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    _, small, plan = cut(llama(), mode="shared_kv", targets="k,v", rank=8)
    with pytest.raises(SystemExit) as stop:
        save(tmp_path / "smaller", small, None, plan)
    words = capsys.readouterr().err
    assert stop.value.code == 2 and "--out" in words and "No space left" in words and words.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- budgets ----------------------------------------------------------------------------------------------------------


def spectra(*scales):
    generator = torch.Generator().manual_seed(0)
    return [decompose(scale * torch.randn(6, 9, generator=generator), "svd") for scale in scales]


def test_a_budget_is_spent_where_it_saves_most():
    """Against every choice of ranks."""
    decompositions, costs = spectra(1, 2, 1), (1.0, 0.5, 3.0)
    ranks = rank_cut.ranks_for(decompositions, costs, 0.5)
    assert sum(ranks) == 9

    def lost(ranks):
        return sum(a * complete.tail(k) ** 2 for a, complete, k in zip(costs, decompositions, ranks))

    choices = [(i, j, 9 - i - j) for i in range(1, 7) for j in range(1, 7) if 1 <= 9 - i - j <= 6]
    assert lost(ranks) == pytest.approx(min(map(lost, choices))) and lost(ranks) < 0.95 * lost((3, 3, 3))


def test_what_is_left_of_a_budget_goes_to_cheaper_matrices():
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (decompose(torch.randn(n, 9, generator=generator), "svd") for n in (9, 2))
    ranks = rank_cut.ranks_for([wide, narrow], (1.0, 1e-6), 0.99)  # of 9 components of 18 numbers and 2 of 11
    assert ranks == [9, 1]
    assert rank_cut.prices([wide, narrow])[1] == 29 / 184


def test_the_unit_cost_is_what_the_loss_says():
    assert rank_cut.unit_cost(0.5, 2.0) == 0.125 and rank_cut.unit_cost(-1e-9, 2.0) == 0


def test_budgets_in_a_sweep(operate, clinic):
    uneven = llama()
    for i, layer in enumerate(uneven.model.layers):
        layer.self_attn.o_proj.weight.data *= 4**i
        layer.self_attn.v_proj.weight.data[: 8 * (i % 2)] *= 0.1
    uneven.save_pretrained(clinic / "uneven")
    save_tokenizer(clinic / "uneven")
    point = ("--targets", "k,v", "--mode", "shared_kv", "--method", "fisher", "--rank", "16", "--budget")
    result = operate(*point, "0.25,0.5", model="uneven")
    assert result.status == 0, result.err
    _, uniform, quarter, half = result.records
    for record, share in ((quarter, 0.25), (half, 0.5)):
        ranks = record["parts"]["kv"]["ranks"]
        assert sum(ranks) == share * 3 * 32 and len(set(ranks)) > 1 and record["budget"] == share
    assert uniform["parts"]["kv"]["ranks"] == [16] * 3
    alone = operate(*point, "0.5", out="alone", model="uneven")
    assert alone.records[-1]["parts"] == half["parts"]  # no point depends on those before it


# -- healing ----------------------------------------------------------------------------------------------------------


def test_healing_wins_back_and_leaves_a_plain_model_of_the_same_size():
    model, small, _ = cut(llama(), mode="shared_kv", targets="k,v", rank=3)
    untouched = Subject(sharpened(llama()))
    windows = [(x[None, :-1], x[None, 1:]) for x in IDS.repeat(1, 5)]  # longer than what Subject's check has cached
    evaluator, student = Evaluator(untouched, dict(text=windows)), Subject(small)
    before, size, names = evaluator.measure(student), parameters(small), set(small.state_dict())
    teacher = {name: p.clone() for name, p in untouched.model.named_parameters()}
    facts = heal(student, untouched, windows, Recipe(30, 4, 1e-2))
    after = evaluator.measure(student)
    assert after["kl"] < 0.7 * before["kl"] and facts["steps"] == 30 and facts["tokens"] == 30 * 99
    assert parameters(small) == size and set(small.state_dict()) == names
    assert not any(p.requires_grad for p in small.parameters())
    assert all(torch.equal(p, teacher[name]) for name, p in untouched.model.named_parameters())
    for attn in (m for m in small.modules() if isinstance(m, LatentAttention)):
        assert attn.k_proj.down is attn.v_proj.down


def test_the_program_writes_heals_reads_back_and_measures(operate, clinic, tmp_path, run_main):
    sharpened(llama()).save_pretrained(clinic / "sharp")
    save_tokenizer(clinic / "sharp")
    out = tmp_path / "smaller"
    point = ("--targets", "k,v", "--mode", "shared_kv", "--method", "fisher", "--rank", "8")
    (clinic / "pages.txt").write_text("\f".join(toys.TEXT[i : i + 9000] for i in range(0, 72000, 9000)))
    texts = ("--calib_text", clinic / "pages.txt", "--eval_text", f"{clinic}/pages.txt,{clinic}/eval.txt")
    heal = ("--heal_text", clinic / "calib.txt", "--heal_steps", "12", "--heal_rank", "2")
    result = operate(*point, *texts, *heal, "--out", out, model="sharp")
    assert result.status == 0, result.err
    for words in ("calibrated on: {0}/pages.txt (even documents)\n", "healed on: {0}/calib.txt\n",
                  "evaluated on: {0}/pages.txt (odd documents), {0}/eval.txt\n"):  # fmt: skip
        assert words.format(clinic) in result.out
    measured = json.loads((out / "measured.json").read_text())["models"]
    assert measured["smaller"]["loss"] == pytest.approx(result.records[-1]["loss"], abs=1e-4)
    assert measured["healed"]["cache_bytes"] == measured["untouched"]["cache_bytes"] / 4
    assert measured["healed"]["bytes"] == (out / "surgery.safetensors").stat().st_size
    assert measured["healed"]["kl"] != measured["healed"]["training_kl"] and measured["smaller"]["kl"] > 0
    assert measured["healed"]["steps"] == 12 and len(measured["healed"]["tokens_per_second"]) == 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Really smaller" in report and f"12 on {clinic}/calib.txt" in report
    for part in report.split("## Really smaller"):  # each text has its columns, with what calibration has to do with it
        assert "perplexity, pages.txt (other documents)" in part and "perplexity, eval.txt (not calibrated on)" in part
    for name, found in measured["healed"]["texts"].items():
        of_untouched, change = measured["untouched"]["texts"][name], math.expm1(found["nats"])
        assert found["ppl"] / of_untouched["ppl"] - 1 == pytest.approx(change, abs=1e-6) and of_untouched["nats"] == 0
        assert f"{found['ppl']:.2f} | {change:+.1%} ± {math.exp(found['nats']) * found['nats_se']:.1%} |" in re.sub(
            " +", " ", report
        )
    text, few = clinic / "eval.txt", ("--window", 40, "--characters", 90)
    alone = run_main("-m", "surgery.eval", "--model", out, "--reference", clinic / "sharp", "--text", text, *few)
    hf, tokenizer = load(out)
    ids = torch.tensor([[0, *tokenizer(text.read_text()[:90])["input_ids"]]])
    assert alone.last["loss"] == pytest.approx(hf(ids, labels=ids).loss.item(), abs=1e-5) and alone.last["kl"] > 0
    again = operate(*point, *texts, "--out", tmp_path / "second", model="sharp")
    assert again.status == 0 and again.last["points"] == 0 and (tmp_path / "second" / "surgery.safetensors").exists()


def test_attention_of_another_kind_is_refused_before_anything_is_measured(operate, clinic, tmp_path, assert_one_line_error):
    clipped = transformers.OlmoConfig(**SHAPE, eos_token_id=0, pad_token_id=0, clip_qkv=0.5)
    olmo = redrawn(transformers.OlmoForCausalLM(clipped))
    scaled = llama(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4), max_position_embeddings=64)
    for name, model, word in (("olmo", olmo, "OlmoAttention"), ("scaled", scaled, "rotation")):
        model.save_pretrained(clinic / name)
        save_tokenizer(clinic / name)
        result = operate("--targets", "k", "--rank", "4", "--method", "svd", "--out", tmp_path / "small", model=name)
        assert_one_line_error(result, "--out", word)
        assert not result.records


def test_a_static_cache_is_refused_and_beams_are_not():
    model, small, _ = cut(llama(), mode="shared_kv", targets="k,v", rank=10)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(small.generate(IDS, num_beams=3, **options), model.generate(IDS, num_beams=3, **options))
    with pytest.raises(NotImplementedError, match="static"):
        small.generate(IDS, cache_implementation="static", **options)


def test_bfloat16_is_for_the_products_and_the_divergence_stays_exact():
    """A divergence of 0.0001 nats: log-probabilities of bfloat16 cannot tell it from chance."""
    torch.manual_seed(0)
    small, windows, found = llama(), [(torch.randint(300, (1, 64)), None)], {}
    untouched = Subject(copy.deepcopy(small).requires_grad_(False))
    for p in small.parameters():
        p.data.add_(0.02 * torch.randn_like(p) * p.std())
    for dtype in ("float32", "bfloat16"):
        student = Subject(copy.deepcopy(small))
        found[dtype] = heal(student, untouched, windows, Recipe(1, 2, 1e-9, dtype=dtype))["training_kl"]
    assert 0 < found["float32"] < 2e-4 and found["bfloat16"] == pytest.approx(found["float32"], rel=0.2)


def test_one_step_of_healing_moves_the_model():
    _, small, _ = cut(llama(), mode="shared_kv", targets="k,v", rank=3)
    before = small.model.layers[0].mlp.up_proj.weight.clone()
    windows = [(IDS[:1, :-1], IDS[:1, 1:])]
    heal(Subject(small), Subject(sharpened(llama())), windows, Recipe(1, 4, 1e-2))
    assert not torch.equal(small.model.layers[0].mlp.up_proj.weight, before)


def test_mistakes_about_smaller_models_are_one_line(operate, tmp_path, assert_one_line_error):
    (tmp_path / "there").mkdir()
    for argv, *words in [
        (["--rank", "4", "--out", tmp_path / "there"], "--out", "exists"),
        (["--rank", "4,8", "--out", tmp_path / "new"], "--out", "2"),
        (["--rank", "4", "--heal_steps", "5"], "--heal_steps", "--out"),
        (["--budget", "1.5"], "--budget 1.5"),
        (["--rank", "4", "--heal_lr", "-1"], "--heal_lr"),
        (["--rank", "4", "--seed", str(2**70)], "--seed"),
        (["--budget", "0.5", "--targets", "wte", "--method", "svd"], "--budget", "--rank"),
    ]:
        assert_one_line_error(operate("--targets", "q", *argv), *words)
    little = operate("--targets", "q", "--method", "svd", "--budget", "0.01")
    assert little.status == 2 and "--budget 0.01" in little.err and "0.031" in little.err
    with pytest.raises(SystemExit):
        load(tmp_path / "there")
