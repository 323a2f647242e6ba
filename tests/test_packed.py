"""A whole model by bits: what an error costs, the budget, the modules that read the packed form, and the folder."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bits.encode import code, decompose_by, draft_table, fit
from bits.modules import CodedLinear, install_coded
from bits.trellis import float16_code
from surgery.bits_folder import save
from surgery.bits_model import coded_in, draft_all, matrices_of, metrics_of, set_prices, whole_moments
from surgery.evaluator import Evaluator
from surgery.folder import WEIGHTS, load
from surgery.heal import Recipe, heal_coded
from surgery.moments import LinearMoments, find_linears
from surgery.rank_in_order import blocks_of, repaired
from surgery.subject import Subject

toys = pytest.importorskip("toys", reason="this transformers wants a newer torch")
draw = torch.Generator().manual_seed(0)
WINDOWS = [(ids[None, :-1], ids[None, 1:]) for ids in torch.randint(300, (6, 33), generator=draw)]
COUNTS = torch.bincount(torch.cat([x.flatten() for x, _ in WINDOWS]), minlength=300)
MODELS = dict(llama=toys.llama, untied=lambda: toys.llama(tie_word_embeddings=False), neox=toys.neox)


class Packed:
    """A toy whose linear layers and tables are coded, and what was measured on the way."""

    def __init__(self, make, folder):
        torch.manual_seed(1)
        self.hf = make()
        self.subject = Subject(self.hf.requires_grad_(False))
        self.matrices = matrices_of(self.subject, "all")
        self.moments = whole_moments(self.subject, COUNTS, WINDOWS, folder / "moments.pt")
        self.drafts = draft_all(self.matrices, self.moments)
        self.evaluator = Evaluator(self.subject, dict(text=WINDOWS[:2]))
        self.prices = set_prices(self.drafts, self.matrices, self.evaluator)
        self.numbers = sum(module.weight.numel() for module in self.matrices.values())
        self.coded = self.code(0.6)

    def code(self, share):
        bits, codes = fit(list(self.drafts.values()), share * 2 * self.numbers)
        return {name: code(draft, b, codes) for (name, draft), b in zip(self.drafts.items(), bits)}


@pytest.fixture(scope="module", params=MODELS)
def packed(request, tmp_path_factory):
    return Packed(MODELS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    toys.save_tokenizer(folder.parent / "tokenizer")
    tokenizer = toys.transformers.AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    save(folder, packed.hf, tokenizer, packed.coded)
    return folder


def logits(hf):
    with torch.no_grad():
        return hf(WINDOWS[0][0]).logits


def test_moments_are_those_of_the_inputs_and_of_the_gradients():
    """Of one token, the cost that they forecast is exact: (g E x)^2, summed over rows as if these were alone."""
    subject = Subject(toys.llama().requires_grad_(False))
    name, ids = "model.layers.1.mlp.down_proj", torch.tensor([[5]])
    module, found = subject.model.get_submodule(name), []

    def watch(_, inputs, output):
        output.register_hook(lambda g: found.extend([inputs[0].detach()[0, 0], g[0, 0]]))

    moments = LinearMoments({name: module})
    with moments:
        hook = module.register_forward_hook(watch)
        rows = subject.lookup(ids).requires_grad_(True)
        subject.logits(subject.trunk(rows))[0, 0, 7].backward()
        hook.remove()
    (x, g), (C, squares) = found, moments.of(name)
    torch.testing.assert_close(C, x[:, None] * x)
    torch.testing.assert_close(squares, g.square())


def test_tokens_without_a_gradient_do_not_count(packed):
    name = next(iter(find_linears(packed.hf, packed.subject.head)))
    module, moments = packed.hf.get_submodule(name), LinearMoments({name: packed.hf.get_submodule(name)})
    x = torch.randn(2, module.in_features).requires_grad_(True)
    with moments:
        (module(x)[0] ** 2).sum().backward()
    torch.testing.assert_close(moments.of(name)[0], x[0].detach()[:, None] * x[0].detach())


def test_prices_are_what_a_kind_costs_over_what_the_metric_forecast(packed):
    assert set(packed.prices) == {name.rsplit(".", 1)[-1] for name in packed.matrices}
    assert all(0 < price < 100 for price in packed.prices.values())


def test_more_bytes_lose_less(packed):
    lost = []
    for coded in (packed.code(0.42), packed.code(0.55)):
        with coded_in(packed.matrices, coded.values()):
            lost.append(packed.evaluator.measure()["kl"])
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.8 * lost[0]
    assert packed.evaluator.measure()["kl"] == pytest.approx(0, abs=1e-6)  # put back


def test_packed_modules_compute_what_the_decoded_weights_do(packed):
    with coded_in(packed.matrices, packed.coded.values()):
        decoded = logits(packed.hf)
    for as_packed in (True, False):
        hf = copy.deepcopy(packed.hf)
        install_coded(hf, packed.coded, as_packed)
        torch.testing.assert_close(logits(hf), decoded, rtol=1e-4, atol=1e-4)
        assert as_packed == any(isinstance(m, CodedLinear) for m in hf.modules())


def test_the_folder_reads_back_and_generates_in_both_forms(packed, folder):
    size = (folder / WEIGHTS).stat().st_size
    kept = sum(made.bytes() for made in packed.coded.values())
    floats = sum(p.numel() for p in packed.hf.parameters()) - packed.numbers
    assert kept < size < kept + 4 * floats + 60_000  # the names and places of the tensors take some kilobytes
    found = [load(folder, packed=as_packed)[0] for as_packed in (True, False)]
    torch.testing.assert_close(*map(logits, found), rtol=1e-4, atol=1e-4)
    in_memory = sum(t.numel() * t.element_size() for t in [*found[0].parameters(), *found[0].buffers()])
    assert in_memory < size
    prompt = WINDOWS[0][0][:, :5]
    texts = [hf.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist() for hf in found]
    assert texts[0] == texts[1]


def test_healing_lowers_the_divergence_and_leaves_the_codes(packed):
    coded = packed.code(0.35)
    hf = copy.deepcopy(packed.hf).requires_grad_(False)
    made, facts = heal_coded(hf, coded, packed.subject, WINDOWS, Recipe(24, 2, 5e-4))
    assert facts["steps"] == 24 and facts["tokens"] == 24 * 32
    lost = []
    for matrices in (made, coded):
        hf = copy.deepcopy(packed.hf)
        install_coded(hf, matrices, packed=False)
        lost.append(packed.evaluator.measure(Subject(hf))["kl"])
    assert lost[0] < lost[1]
    for name, before in coded.items():
        assert all(torch.equal(stream, made[name].streams[key]) for key, stream in before.streams.items())
    assert any(not torch.equal(made[name].scales, before.scales) for name, before in coded.items())


@pytest.mark.parametrize("targets", ["all", "wte"])
def test_the_program_heals_writes_and_reads(operate, tmp_path, targets):
    toys.llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    toys.save_tokenizer(tmp_path / "model")
    result = operate("--bytes", 0.8, "--targets", targets, "--heal_steps", 3, "--out", tmp_path / "small",
                     model=tmp_path / "model")  # fmt: skip
    assert result.status == 0, result.err
    healed = json.loads((tmp_path / "small" / "measured.json").read_text())["models"]["healed"]
    assert healed["steps"] == 3 and healed["training_kl"] > 0
    found = [load(tmp_path / "small", packed=as_packed)[0] for as_packed in (True, False)]
    torch.testing.assert_close(*map(logits, found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["depths", "streams", "missing", "extra", "cut"])
def test_a_damaged_folder_is_one_line(packed, folder, tmp_path, capsys, part):
    bad = shutil.copytree(folder, tmp_path / "bad")
    tensors = load_file(bad / WEIGHTS)
    name = (
        next(name for name in tensors if name.startswith("coded.") and f".{part}" in name) if part in "depths streams" else ""
    )
    if part == "cut":
        (bad / WEIGHTS).write_bytes((bad / WEIGHTS).read_bytes()[:1000])
    else:
        changed = dict(depths=lambda t: t + 1, streams=lambda t: t[:-1]).get(part)
        tensors = tensors | {name: changed(tensors[name])} if changed else tensors
        tensors |= dict(unknown=torch.zeros(1)) if part == "extra" else {}
        if part == "missing":
            del tensors[min(name for name in tensors if name.endswith("scales"))]
        save_file(tensors, bad / WEIGHTS, metadata=dict(format="pt"))
    with pytest.raises(SystemExit) as stop:
        load(bad)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and WEIGHTS in message


def test_ranks_by_frequency_beat_one_rank_at_equal_bytes(packed):
    """In the metric, by the rows' weights. With numbers for all, the matrix comes back to float16's precision."""
    W, weights = packed.matrices["wte"].weight.data, packed.moments.weights
    metric, (V, d) = metrics_of(packed.matrices, packed.moments)["wte"], W.shape
    draft = draft_table(W, weights, metric, list(weights.argsort(descending=True).tensor_split(4)))

    def loss(made):
        error = (W - made).double()
        return (weights * ((error @ metric) * error).sum(1)).sum()

    for rank in (8, 16):
        one = decompose_by(W, weights, metric).factors(rank)
        (depths,), codes = fit([draft], 2 * (rank * (V + d) + d * d), [float16_code()])
        assert loss(code(draft, depths, codes).matrix()) < loss(torch.addmm(one[2], one[0], one[1]))
        assert set(depths.unique().tolist()) == {0, 32}
    (depths,), codes = fit([draft], 10**9, [float16_code()])
    whole = code(draft, depths.fill_(32), codes)
    whole.P, whole.P_scale = draft.P, torch.ones(len(draft.P))  # which is rounded to bytes
    assert loss(whole.matrix()) < 1e-5 * loss(torch.zeros_like(W))


def test_a_layer_is_repaired_for_what_it_really_reads():
    """Inputs that were mixed by A are unmixed; inputs as they were leave the matrix as it is."""
    draw = torch.Generator().manual_seed(2)
    W, x = torch.randn(5, 8, generator=draw), torch.randn(4000, 8, generator=draw)
    A = torch.eye(8) + 0.1 * torch.randn(8, 8, generator=draw)
    same, C = repaired(W, x, x)
    torch.testing.assert_close(same, W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(C, x.T @ x / 4000, rtol=1e-4, atol=1e-4)
    unmixed, _ = repaired(W, x, x @ A.T)
    assert (x @ W.T - x @ A.T @ unmixed.T).square().mean() < 0.01 * (x @ W.T - x @ A.T @ W.T).square().mean()


def test_the_blocks_hold_all_linear_layers(packed):
    blocks, inside = blocks_of(packed.hf, packed.moments.linears.linears), packed.moments.linears.linears.values()
    assert len(blocks) == packed.hf.config.num_hidden_layers and set(inside) <= set(blocks.modules())
