import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from bits.packing import pack_rows, row_bytes, unpack_rows
from bits.trellis import FAST_WINDOW, gaussian_codes
from kernels.build import library
from kv_cache import bit_fit
from kv_cache.bit_code import WHOLE, known_of
from kv_cache.bit_fit import WHOLE_RANGE, blocks_of, fit, fit_levels, least_bits
from kv_cache.bit_reader import reader_of
from kv_cache.bit_streams import GAIN_BITS, Streams, best_windows, size_of, windows_and_gain
from kv_cache.decoding_speed import cache_bytes
from kv_cache.hf_attention import RotaryTable, norm_of
from model import rotate
from surgery.bits_folder import save
from surgery.folder import WEIGHTS, load
from surgery.subject import Subject

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
modules = pytest.importorskip("kv_cache.hf_bits")

IDS = torch.randint(300, (6, 40), generator=torch.Generator().manual_seed(0))
QWEN3 = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
             num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0, bos_token_id=0)  # fmt: skip
WINDOWS = [(ids[None], ids[None]) for ids in torch.randint(300, (12, 48), generator=torch.Generator().manual_seed(1))]


def levels():
    return torch.stack([torch.zeros(2**FAST_WINDOW), *(code.levels[:, 0] for code in gaussian_codes(FAST_WINDOW))])


def coded(share, form="small", kind="llama"):
    """(the untouched toy, the toy with a coded cache, its codes)"""
    torch.manual_seed(0)
    untouched = getattr(toys, kind)()
    model = copy.deepcopy(untouched)
    return untouched, model, bit_fit.code_cache(Subject(model), WINDOWS, share, form, {})


@pytest.fixture(scope="module", params=["fast llama", "small llama", "fast neox", "small neox"])
def at_quarter(request):
    form, kind = request.param.split()
    return *coded(0.25, form, kind), form


# -- the mathematics --------------------------------------------------------------------------------------------------


def test_rows_of_many_depths_are_packed_and_read_again():
    bits = [8, 5, 3, 3, 2, 1, 1]
    windows = best_windows(torch.randn(50, len(bits)), bits, levels())
    packed = pack_rows(windows, bits)
    assert packed.shape == (50, row_bytes(bits)) == (50, 3)
    assert torch.equal(unpack_rows(packed, bits, FAST_WINDOW), windows.int())


compiled = pytest.mark.skipif(library() is None, reason="no C compiler")


@compiled
@pytest.mark.parametrize("bits", [[1], [1, 1, 8], [1, 2, 2, 3, 5, 7], [1] * 9 + [2, 3, 4, 5, 6, 7, 8] * 6 + [8]])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_loops_write_and_read_what_torch_does(bits, rows):
    bits, draw = sorted(bits), torch.Generator().manual_seed(rows)
    z = torch.randn(rows, len(bits), generator=draw) * 20 ** (torch.rand(rows, 1, generator=draw) * 2 - 1)
    streams, table = Streams([bits]), levels()[None]
    by_torch, found = (streams.write(t, table.to(t)) for t in (z.double(), z))
    assert found.shape == by_torch.shape == (rows, size_of(bits))
    assert torch.equal(windows_and_gain(found, bits)[1], windows_and_gain(by_torch, bits)[1])
    torch.testing.assert_close(streams.read(found, table), streams.read(found, table.double()).float())
    errors = [(z - streams.read(packed, table)).square().sum(1) for packed in (found, by_torch)]
    torch.testing.assert_close(*errors)  # of two equally good streams either may be found


def test_the_stream_of_least_error_is_found():
    """Against all 2^8 streams of three numbers."""
    bits, table, z = [3, 3, 2], levels(), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    streams = torch.arange(2**8)
    every = torch.stack([streams >> 5, streams >> 2, streams], 1)  # the window of each number: L = 8 bits of the stream
    values = torch.stack([table[b][w] for b, w in zip(bits, every.T)], 1)
    least = (z[:, None] - values).square().sum(-1).amin(1)
    found = torch.stack([table[b][w] for b, w in zip(bits, best_windows(z, bits, table).T)], 1)
    torch.testing.assert_close((z - found).square().sum(-1), least)


@pytest.mark.parametrize("b", [1, 2, 4])
def test_the_error_is_that_of_the_trellis(b):
    z = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
    error = (z - levels()[b][best_windows(z, [b] * 400, levels())]).square()
    error = error[:, FAST_WINDOW:].mean().item()  # a stream's first numbers have less choice
    assert error == pytest.approx(gaussian_codes(FAST_WINDOW)[b - 1].error, rel=0.05)


def test_levels_are_fitted_to_the_tails():
    torch.manual_seed(0)
    z = torch.distributions.Laplace(0, 0.5**0.5).sample((2000, 12))
    bits = [1] * 4 + [3] * 8
    fitted, z = fit_levels(z[1000:], bits, levels()), z[:1000]
    streams = Streams([bits])
    errors = [(z - streams.read(streams.write(z, t), t)).square().mean() for t in (levels()[None], fitted[None])]
    assert errors[1] < 0.95 * errors[0]


def test_dear_components_are_not_clipped(monkeypatch):
    """One token in 200 has a component that is twenty times as large as others'."""
    draw = torch.Generator().manual_seed(0)
    x, D = torch.randn(20, 64, 100, generator=draw), 100
    x.view(-1, D)[::200, 0] = 20.0
    metric, flat, errors = torch.ones(D).index_fill(0, torch.tensor([0]), 1e4).diag(), x[:, WHOLE:].flatten(0, 1), []
    for whole_range in (WHOLE_RANGE, 99):
        monkeypatch.setattr("kv_cache.bit_fit.WHOLE_RANGE", whole_range)
        code = fit([x], x[..., :1], [metric], 2 * D, [[torch.arange(D)]])[0]
        errors.append((flat - code.read(code.write(flat, None), None))[:, 0].square().mean())
    assert code.bits[0][-1] >= WHOLE_RANGE
    assert errors[0] < 0.7 * errors[1]


def test_few_bits_go_to_a_stream_that_can_use_them():
    x, e, G = texts()
    blocks = [[torch.arange(3)], [torch.arange(3, 6)]]
    for more in range(3):
        codes = fit(x, e, G, least_bits(3, 2) + more, blocks)
        spent = [sum(stream) for code in codes for stream in code.bits]
        assert 5 <= sum(spent) <= 5 + more and all(bits == 0 or bits >= 5 for bits in spent)


def test_a_token_of_another_size_is_read_back_as_well():
    """A gain for each token: the error of a token is in proportion to its size, also far from the size of the others."""
    x, e, G = texts()
    code = fit(x, e, G, 36)[1]
    known = known_of([x[0]], e).flatten(0, 1)
    left = x[1].flatten(0, 1) - code.expected(known)

    def relative_error(size):
        now = code.expected(known) + size * left
        z, read = ((t - code.expected(known)) @ code.to_z for t in (now, code.read(code.write(now, known), known)))
        return ((read - z).square().sum() / z.square().sum()).item()

    assert relative_error(4) == pytest.approx(relative_error(1), rel=0.25)


def texts(layers=3, D=6, d=5, B=40, T=24):
    """Layers that follow one another closely, and metrics."""
    draw = torch.Generator().manual_seed(0)
    e, x = torch.randn(B, T, d, generator=draw), []
    for i in range(layers):
        before = known_of(x[-1:], e)
        new = 0.3 * torch.randn(B, T, D, generator=draw) if i else 0
        x.append(before @ torch.randn(before.shape[-1], D, generator=draw) + new)
    G = [torch.diag(10.0 ** -torch.arange(D)) for _ in x]
    return x, e, G


def read_back(codes, x, e):
    read = []
    for code, now in zip(codes, x):
        known = known_of(read, e).flatten(0, 1) if len(code.forecast) else None
        read.append(code.read(code.write(now.flatten(0, 1), known), known).view_as(now))
    return read


def loss(G, x, read):
    """In the metric, mean over the tokens that are coded."""
    return sum(((a - b)[:, WHOLE:] @ g.sqrt()).square().sum(-1).mean().item() for g, a, b in zip(G, x, read))


def test_bits_are_spent_within_the_budget_and_forecasts_and_the_metric_pay():
    x, e, G = texts()
    budget = 24 + 6 * GAIN_BITS
    codes = fit(x, e, G, budget - 3 * GAIN_BITS)
    assert sum(sum(code.bits[0]) for code in codes) == 24
    assert codes[0].bits == [[]]  # the first layer is a function of e
    plain = fit(x, e, G, budget, [[torch.arange(3)], [torch.arange(3, 6)]])
    assert 20 < sum(sum(stream) for code in plain for stream in code.bits) <= 24
    assert all(row_bytes([*stream, GAIN_BITS]) > 1 for code in plain for stream in code.bits if stream)
    blind = fit(x, e, [torch.eye(6)] * 3, budget - 3 * GAIN_BITS)
    best = loss(G, x, read_back(codes, x, e))
    assert best < 0.2 * loss(G, x, read_back(plain, x, e))
    assert best < 0.5 * loss(G, x, read_back(blind, x, e))


def test_many_bits_give_the_numbers_back():
    x, e, G = texts()
    for now, read in zip(x, read_back(fit(x, e, G, 8 * 18 + 3 * GAIN_BITS), x, e)):
        assert (now - read)[:, WHOLE:].square().mean() < 1e-4 * now.square().mean()


def test_no_bits_and_short_texts_are_refused():
    x, e, G = texts()
    with pytest.raises(ValueError, match="too few for the scales"):
        fit(x, e, G, 3 * GAIN_BITS)
    with pytest.raises(ValueError, match="give longer ones"):
        fit([now[:, :WHOLE] for now in x], e[:, :WHOLE], G, 24)


# -- in a model of Hugging Face ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, kind", [("small", "llama"), ("fast", "neox")])
def test_with_all_bits_it_is_the_untouched_model(form, kind):
    untouched, model, _ = coded(0.55, form, kind)  # 8 bits of each number, the most there are
    few = coded(0.15, form, kind)[1]
    with torch.no_grad():
        before, after, less = (m(IDS).logits for m in (untouched, model, few))
    assert (after - before).square().mean() < 2e-3 * before.var()
    assert (less - before).square().mean() > 10 * (after - before).square().mean()


@torch.no_grad()
def test_chunks_and_single_tokens_read_the_same(at_quarter):
    model = copy.deepcopy(at_quarter[1]).double()  # a number on the edge of two codes would be rounded otherwise in float32
    whole = model(IDS).logits
    for sizes in ([1] * 40, [2, 3, 30, 5], [40]):
        cache, found = None, []
        for part in IDS.split(sizes, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_bytes_that_are_allocated_are_those_that_were_paid(at_quarter):
    untouched, model, codes, form = at_quarter
    layers, D = bit_fit.numbers_of(untouched)
    of_token = bit_fit.kept_of_id(model, form) + sum(code.bytes_per_token for code in codes)
    assert 0.23 * 2 * layers * D < of_token <= 0.25 * 2 * layers * D
    assert cache_bytes(model, IDS[0]) == of_token + layers * 2 * D * WHOLE / 40
    assert cache_bytes(untouched, IDS[0]) == 4 * layers * D  # float32


@compiled
@pytest.mark.parametrize("heads,groups,n,turned", [(6, 2, 40, 40), (3, 3, 7, 4), (4, 1, 64, 32)])
@pytest.mark.parametrize("pads,normed", [(None, False), ([0, 3, 120], True)])
def test_the_loops_attend_as_torch_does(heads, groups, n, turned, pads, normed):
    """
    On the same rows: several blocks, queries that share keys, heads that turn in part, padding, a norm of keys, and a buffer
    with room.
    """
    draw, angles = torch.Generator().manual_seed(0), torch.logspace(0, -3, turned // 2)
    D, S, B = groups * n, 150, 3
    normal = partial(torch.randn, generator=draw)
    x = [normal(8, 60, 2 * D) @ normal(2 * D, 2 * D)]
    code = fit(x, normal(8, 60, 4), [torch.eye(2 * D)], 2 * D * 2, blocks_of(groups, n, turned))[0]
    assert all(code.bits)
    x, q, pads = 9 * normal(B, S, 2 * D), normal(B, heads, n), None if pads is None else torch.tensor(pads)
    rows = torch.nn.functional.pad(code.write(x.flatten(0, 1), None).unflatten(0, (B, S)), (0, 0, 0, 9))[:, :S]
    whole = x[:, : WHOLE + (0 if pads is None else 120)].half()
    turns = RotaryTable(lambda like, at: [f(at[..., None] * angles).repeat(1, 1, 2) for f in (torch.cos, torch.sin)])
    reader = reader_of(code, n)
    norm = torch.nn.RMSNorm(n, eps=0.3).requires_grad_(False) if normed else torch.nn.Identity()
    if normed:
        norm.weight.copy_(normal(n))
    first = reader.first_positions(whole, pads, turns, norm)
    scores = reader.scores(q, rows, first, norm_of(norm, n), turns.columns(S, q), 0.2)
    weights = scores.softmax(-1)
    found = reader.outputs(weights, rows, first)

    kept = modules.Kept(rows, whole, pads)
    read = code.read(rows.flatten(0, 1), None).view(B, S, -1)
    read[:, : whole.shape[1]] = torch.where(kept.counts()[..., None], whole.float(), read[:, : whole.shape[1]])
    k, v = (part.unflatten(-1, (-1, n)).transpose(1, 2).repeat_interleave(heads // groups, 1) for part in read.chunk(2, -1))
    cos, sin = turns(S, q)
    k, turned_q = rotate(norm(k), cos, sin), rotate(q[:, :, None], cos[:, -1:], sin[:, -1:])
    torch.testing.assert_close(scores, 0.2 * (turned_q @ k.mT)[:, :, 0], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found, (weights[:, :, None] @ v).flatten(1)[:, None], atol=1e-4, rtol=1e-5)


@compiled
@torch.no_grad()
def test_keys_with_a_norm_are_decoded_in_place(monkeypatch):
    """Qwen 3: a padded batch, token by token, as without a cache. A norm that trains keeps its gradient."""
    torch.manual_seed(0)
    model = toys.redrawn(toys.transformers.Qwen3ForCausalLM(toys.transformers.Qwen3Config(**QWEN3)))
    with torch.enable_grad():
        bit_fit.code_cache(Subject(model.requires_grad_(False)), WINDOWS, 0.4, "fast", {})
    attn, calls = model.model.layers[1].self_attn, []
    in_place = type(attn).read_in_place
    monkeypatch.setattr(type(attn), "read_in_place", lambda *given: (calls.append(1), in_place(*given))[1])
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    for _ in range(2):
        cache, found = None, []
        for part, end in zip(IDS.split([10] + [1] * 30, 1), range(10, 41)):
            out = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
        whole = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(torch.cat(found, 1)[:, 7:], whole[:, 7:], atol=1e-3, rtol=1e-3)
        attn.k_norm.weight.mul_(torch.rand(16) + 0.5)  # what the loops read follows
    assert len(calls) == 2 * 2 * 30
    with torch.enable_grad():
        attn.k_norm.weight.requires_grad_(True)
        out = model(IDS[:, -1:], past_key_values=cache, use_cache=True)
        assert attn.norm_in_place(torch.zeros(1, 4, 1, 16)) is None
        assert torch.autograd.grad(out.logits.sum(), attn.k_norm.weight)[0].any()


def test_a_norm_of_another_kind_is_not_taken_for_one():
    assert norm_of(torch.nn.LayerNorm(8), 8) is None and norm_of(torch.nn.Linear(8, 8), 8) is None
    assert norm_of(torch.nn.Identity(), 8) == (None, 0.0)


@compiled
@torch.no_grad()
def test_what_is_decoded_does_not_depend_on_the_way(at_quarter):
    """Token by token, past the first room for cosines; after a crop, and from a copy; with scores times a whole number."""
    model = copy.deepcopy(at_quarter[1])
    for module in model.modules():
        if isinstance(module, modules.CodedAttention):
            module.scaling = 1
    ids = torch.cat([IDS[:1], IDS[1:3].view(1, -1)], 1)
    cache, found = None, []
    for part in ids.split(1, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, found = out.past_key_values, [*found, out.logits]
    torch.testing.assert_close(torch.cat(found, 1), model(ids).logits, atol=1e-3, rtol=1e-3)
    copied = pickle.loads(pickle.dumps(cache))
    for each in (cache, copied):
        each.crop(-30)
        again = model(ids[:, 90:91], past_key_values=each, use_cache=True)
        torch.testing.assert_close(again.logits, found[90], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_layer_without_bits_has_positions_too():
    torch.manual_seed(0)
    model = toys.llama()
    with torch.enable_grad():
        x, e, G = bit_fit.gather(Subject(model), WINDOWS)
    x[0], x[1] = 0 * x[0], 0 * x[1]
    for form in modules.STREAMS:
        small = copy.deepcopy(model)
        codes = fit(x, e, G, bit_fit.cache_bits(small, 0.2, form), bit_fit.blocks_for(small, form))
        assert not any(codes[0].bits) and (form == "small" or not any(codes[1].bits))
        modules.install_cache(small, codes, {})
        cache, found = None, []
        for part in IDS[:2].split([20, 1, 9, 10], 1):
            out = small(part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
        assert [cache.get_seq_length(i) for i in range(3)] == [40] * 3
        torch.testing.assert_close(torch.cat(found, 1), small(IDS[:2]).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_generate_with_left_padding_is_that_of_single_texts(at_quarter):
    model = copy.deepcopy(at_quarter[1]).double()
    lengths, options = (20, 13, 2), dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    padded, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, 20 - n :], mask[i, 20 - n :] = IDS[i, :n], 1
    together = model.generate(padded, attention_mask=mask, **options)[:, 20:]
    for i, n in enumerate(lengths):
        alone = model.generate(IDS[i : i + 1, :n], attention_mask=torch.ones(1, n, dtype=torch.long), **options)
        assert torch.equal(alone[0, n:], together[i])


@torch.no_grad()
def test_a_step_of_padding_alone_leaves_the_first_positions_where_they_are(at_quarter):
    model = copy.deepcopy(at_quarter[1]).double()
    padded, mask = IDS[:2, :20].clone(), torch.ones(2, 20, dtype=torch.long)
    mask[1, :18] = 0
    whole = model(padded, attention_mask=mask).logits
    first = model(padded[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = model(padded[:, 8:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest[:, -2:], whole[:, -2:])


@pytest.mark.parametrize("form, kind", [("fast", "llama"), ("small", "llama"), ("fast", "neox")])
def test_the_folder_reads_back_and_a_damaged_one_is_one_line(tmp_path, capsys, form, kind):
    untouched, model, codes = coded(0.12, form, kind)
    for p in (*untouched.parameters(), *model.parameters()):
        p.data.copy_(p.data.half())  # as they are stored
    toys.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = toys.transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save(tmp_path / "out", untouched, tokenizer, {}, codes)
    read, _ = load(tmp_path / "out")
    with torch.no_grad():
        before, after, again = (m(IDS).logits for m in (untouched, model, read))
    # the cache's constants are stored in 16 bits: some keys fall to other codes, and the error is another one, not a larger one
    assert (again - before).square().mean() < 1.5 * (after - before).square().mean()
    assert cache_bytes(read, IDS[0]) == cache_bytes(model, IDS[0])
    prompt = IDS[:1, :5]
    generated = read.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9) and torch.equal(generated[:, :5], prompt)

    tensors = load_file(tmp_path / "out" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("to_z") and tensors[name].numel())
    damaged = [{name: tensors[name][:-1]}, {name: tensors[name] * torch.nan}]
    if form == "fast":  # a number of the keys that gives values too
        damaged.append({name.replace("to_z", "from_z"): torch.ones(tensors[name].T.shape).half()})
    for bad in damaged:
        save_file(tensors | {k: t.contiguous() for k, t in bad.items()}, tmp_path / "out" / WEIGHTS, metadata=dict(format="pt"))
        with pytest.raises(SystemExit) as stop:
            load(tmp_path / "out")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and "of the cache" in message


def test_gradients_pass_and_rows_without_ids_are_refused(at_quarter):
    model = copy.deepcopy(at_quarter[1])
    model.requires_grad_(True)
    model(IDS, use_cache=False).logits[:, WHOLE:].square().mean().backward()
    for layer in modules.find_layers(model):
        gradients = torch.cat([linear.weight.grad for linear in layer.linears.values()])
        assert all(gradients[layer.rows[target]].abs().sum() > 0 for target in "qkv")
    model(IDS[:1, :7])
    refused = pytest.raises(ValueError, match="give the model input_ids")  # not the ids of the call before
    with refused if at_quarter[3] == "small" else nullcontext():
        model(inputs_embeds=torch.randn(1, 7, 32))


def test_a_head_that_turns_neighbours_is_refused(capsys):
    config = toys.transformers.GlmConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        bit_fit.check_cache(toys.redrawn(toys.transformers.GlmForCausalLM(config)), 0.5, 64, "fast")
    assert "model.layers.0.self_attn (GlmAttention) computes attention in a way" in capsys.readouterr().err


def test_a_sliding_window_is_refused(capsys):
    sliding = toys.llama()
    sliding.config.sliding_window = 8
    with pytest.raises(SystemExit):
        bit_fit.check_cache(sliding, 0.5, 64, "fast")
    assert "sliding window" in capsys.readouterr().err


SIZES = [(3, 64, 64, 48), (8, 64, 16, 48), (12, 64, 16, 48), (40, 16, 4, 80), (4, 8, 0, 32)]


@pytest.mark.parametrize("groups, n, turned, size", SIZES)
def test_blocks_part_the_keys_and_no_pair(groups, n, turned, size):
    keys, (values,) = blocks_of(groups, n, turned)
    assert torch.cat(keys).sort().values.tolist() == list(range(groups * n)) and len(keys[0]) == size
    assert values.tolist() == list(range(groups * n, 2 * groups * n))
    for block in keys:
        numbers = set((block % n).tolist())
        assert all((i + turned // 2) % turned in numbers for i in numbers if i < turned)
