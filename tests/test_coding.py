"""Bits by component: what a bit is worth, trellis codes, packing, coded matrices, and plain quantisation beside them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bits import coded_matrix, trellis
from bits import encode as coding
from bits import predicted_rows as parents
from bits.budget import spend
from bits.coded_matrix import CodedMatrix
from bits.encode import choose, code, draft_layer, draft_table, feedback, fit, groups_by_weight, row_weights
from bits.integers import in_groups
from bits.modules import CodedLinear
from bits.packing import pack, stream_bytes, unpack
from bits.trellis import FAST_WINDOW, WINDOW, Code, encode, gaussian_code, gaussian_codes, measured
from kernels import build as kernels
from surgery.heal import TrainableCodes

V, d = 700, 24


def metric(seed, n=d):
    x = np.random.default_rng(seed).normal(size=(3 * n, n)) * np.geomspace(3, 0.1, n)
    turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(n, n)))
    return torch.from_numpy(turn.T @ x.T @ x @ turn / len(x))


def table_of(alike, d=d):
    """alike: every second row is much like the one before it."""
    draw = np.random.default_rng(3)
    rows = draw.normal(size=(V, d))
    if alike:
        rows[1::2] = 0.9 * rows[::2] + 0.3 * draw.normal(size=(V // 2, d))
    return torch.from_numpy(rows @ np.diag(np.geomspace(1, 0.05, d))).float()


@pytest.fixture(scope="module")
def table():
    return table_of(alike=False)


def weights_of():
    return row_weights(torch.from_numpy(np.random.default_rng(4).zipf(1.5, size=V).clip(max=10_000)) - 1)


@pytest.fixture(scope="module", params=["rows apart", "rows alike"])
def draft(request):
    alike, weights, M = request.param == "rows alike", weights_of(), metric(5)
    groups = None if alike else groups_by_weight(weights, first=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "COST", 0)  # 24 numbers a row pay for little
        patch.setattr(parents, "LEAST_ALIKE", 0.6)  # and some are alike by chance
        made = draft_table(table_of(alike), weights, M, groups)
    assert (made.parents is not None) == alike
    if alike:
        assert (made.parents[made.groups[1]] < 0).any()  # a row without a parent behind the first group
    return made


@pytest.fixture(scope="module")
def coded(draft):
    bits, codes = fit([draft], 16_000)
    return code(draft, bits[0], codes)


# -- bits -------------------------------------------------------------------------------------------------------------


def test_bits_are_spent_where_no_other_choice_is_better():
    worth, price, distortion = torch.tensor([9.0, 2.0, 0.5]), torch.tensor([1, 1, 2]), ([0, 0.5, 1, 2], [1, 0.6, 0.3, 0.1])

    def cost(steps):
        return sum(w * distortion[1][s] for w, s in zip(worth.tolist(), steps))

    def bits(steps):
        return sum(distortion[0][s] * p for s, p in zip(steps, price.tolist()))

    for budget in range(1, 10):
        found = spend(worth, price, budget, distortion).tolist()
        used = bits(found)
        as_cheap = [steps for steps in itertools.product(range(4), repeat=3) if bits(steps) <= used]
        assert used <= budget
        assert cost(found) == pytest.approx(min(map(cost, as_cheap)))


def test_a_distortion_whose_steps_rise_is_refused():
    with pytest.raises(ValueError, match="steps"):
        spend(torch.ones(2), torch.ones(2), 3, ([0, 1, 2], [1, 0.9, 0.2]))


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1, 2])
def test_the_viterbi_path_is_the_best_of_all(numbers):
    draw = torch.Generator().manual_seed(0)
    code, x = Code(2, torch.randn(16, numbers, generator=draw), 0.0), torch.randn(3, 4 * numbers, generator=draw)
    windows = encode(x, code)
    assert torch.equal(windows[:, :-1] % 4, windows[:, 1:] >> 2)  # neighbours share two of four bits
    best = torch.full((3,), torch.inf)
    for bits in itertools.product(range(2), repeat=4 + 3 * 2):  # the first window, then two bits for each number
        number = [int("".join(map(str, bits[2 * t : 2 * t + 4])), 2) for t in range(4)]
        best = torch.minimum(best, (x - code.levels[number].flatten()).square().sum(1))
    torch.testing.assert_close((x - code.levels[windows].flatten(1)).square().sum(1), best, rtol=1e-4, atol=1e-5)


def test_a_window_of_the_numbers_own_bits_is_lloyds_quantiser():
    assert gaussian_code(1, 1).levels.flatten().tolist() == pytest.approx([-0.798, 0.798], abs=0.01)  # Max 1960, table I
    assert gaussian_code(2, 2).error == pytest.approx(0.1175, abs=0.003)
    assert gaussian_code(2, 8).error < 0.085  # QTIP's and Marcellin and Fischer's trellises of 256 states; the bound is 0.0625


def test_the_codes_on_disk_are_those_that_are_fitted():
    for bits in (4, 8):
        kept, fitted = gaussian_codes(FAST_WINDOW)[bits - 1], gaussian_code(bits, FAST_WINDOW)
        torch.testing.assert_close(kept.levels, fitted.levels, rtol=0, atol=0.01)
        assert kept.error == pytest.approx(fitted.error, rel=0.02)


def test_longer_windows_and_half_bits_err_less():
    """The codes are what their file says, above the bound, below the fast ones, and below a mixture of whole bits."""
    fast = {code.half_bits: code.error for code in gaussian_codes(FAST_WINDOW)}
    slow = {code.half_bits: code.error for code in gaussian_codes(WINDOW)}
    assert all(2.0**-depth < slow[depth] < fast[depth] for depth in range(2, 16, 2))
    assert all(slow[depth] < (slow.get(depth - 1, 1.0) + slow[depth + 1]) / 2 for depth in (1, 3, 5, 7))
    for kept in (gaussian_codes()[0], gaussian_codes()[3]):
        assert measured(kept, torch.Generator().manual_seed(5)) == pytest.approx(kept.error, rel=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_windows_are_read_at_any_place(bits):
    window, draw = max(bits, 5), torch.Generator().manual_seed(bits)
    stream = torch.randint(2, (3, window + 10 * bits), generator=draw)
    places = torch.arange(11)[:, None] * bits + torch.arange(window)
    windows = (stream[:, places] << torch.arange(window - 1, -1, -1)).sum(-1)
    packed, size = pack(windows, bits, window), stream_bytes(11, bits, window)
    assert packed.numel() == 3 * size + 2
    starts = torch.arange(3)[:, None] * size * 8 + torch.arange(11) * bits
    assert torch.equal(unpack(packed, window, starts).long(), windows)


# -- matrices ---------------------------------------------------------------------------------------------------------


def test_feedback_factors_the_metric():
    M = metric(1)
    U, roots = feedback(M, columns=1)
    D = roots[:, 0].double().square()
    assert torch.allclose(U.double() @ D.diag() @ U.double().T, M, rtol=1e-5, atol=1e-6)
    assert torch.equal(U.tril(-1), torch.zeros_like(U)) and torch.allclose(U.diag(), torch.ones(d))
    assert D.log().sum().item() == pytest.approx(torch.logdet(M).item(), rel=1e-6)
    assert torch.allclose(coding.metric_of(*feedback(M, columns=5)), M, rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_the_tensors_and_within_the_budget(draft):
    for budget in (7_000, 10_000, 14_000):
        bits, codes = fit([draft], budget)
        made = code(draft, bits[0], codes)
        assert made.bytes() == draft.bytes(bits[0], codes)
        assert 0.99 * budget < made.bytes() <= budget


def test_the_packed_form_is_read_alike_everywhere(coded):
    W, ids, x = coded.matrix(), torch.randint(V, (3, 5)), torch.randn(2, 4, d)
    torch.testing.assert_close(coded.lookup(ids), W[ids])
    assert coded.lookup(ids[:0]).shape == (0, 5, d)
    torch.testing.assert_close(coded.product(x), x @ W.T, rtol=1e-4, atol=1e-4)
    again = CodedMatrix.from_tensors(coded.tensors(), coded.codes)
    assert torch.equal(again.matrix(), W)


def test_what_is_healed_begins_as_the_matrix_and_keeps_its_form(coded):
    codes = TrainableCodes(coded)
    torch.testing.assert_close(codes.weight(), coded.matrix(), rtol=1e-3, atol=1e-3)  # its numbers are float16
    torch.testing.assert_close(codes.healed().matrix(), coded.matrix(), rtol=1e-3, atol=2e-2)  # P is rounded again
    codes.weight().square().sum().backward()
    assert all(p.grad.any() for p in codes.parameters())


def random_matrix(sizes, k):
    """Columns of all depths, of random bits."""
    draw, codes = torch.Generator().manual_seed(0), {code.half_bits: code for code in gaussian_codes()}
    depths = torch.tensor([0, *codes])[torch.randint(len(codes) + 1, (len(sizes), k), generator=draw)]
    streams = {}
    for g, rows in enumerate(sizes):
        for b in depths[g][depths[g] > 0].unique().tolist():
            size = coded_matrix.stream_size(int((depths[g] == b).sum()), rows, codes[b])
            streams[g, b] = torch.randint(256, (size,), generator=draw, dtype=torch.uint8)
    place, scales = torch.randperm(sum(sizes), generator=draw).int(), torch.rand(len(sizes), k, generator=draw).half()
    return CodedMatrix(place, torch.tensor(sizes).int(), depths.to(torch.uint8), scales, streams, codes)


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_compiled_loops_read_what_torch_does(monkeypatch):
    made = random_matrix([5, 700, 2500], 40)
    ids, x = torch.randint(3205, (2, 50)), torch.randn(coded_matrix.TOKENS_AT_ONCE + 1, 40)
    W, rows, products = made.matrix(), made.lookup(ids), [made.product(x[:n]) for n in (1, 7, len(x))]
    monkeypatch.setattr(CodedMatrix, "kernel", lambda self, name: None)
    assert torch.equal(W, made.matrix()) and torch.equal(rows, made.lookup(ids)) and torch.equal(rows, W[ids])
    for y in products:
        torch.testing.assert_close(y, made.product(x[: len(y)]), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_the_loop_over_parents_does_what_torch_does(coded, monkeypatch):
    W, ids, x = coded.matrix(), torch.randint(V, (20,)), torch.randn(3, d)
    found = coded.lookup(ids), coded.product(x)
    wide = replace(coded, parent=None if coded.parent is None else coded.parents().int())
    assert torch.equal(wide.matrix(), W)
    monkeypatch.setattr(coded_matrix, "bind", lambda name, *first: None)
    again = replace(coded)
    torch.testing.assert_close(again.matrix(), W, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((again.lookup(ids), again.product(x)), found, rtol=1e-4, atol=1e-4)


def test_a_packed_layer_keeps_its_matrix_and_follows_its_buffers():
    first, x = random_matrix([700], 40), torch.randn(3, 40)
    others = replace(first, depths=first.depths.flip(1))
    layer, second = CodedLinear(first), CodedLinear(others)
    assert layer.coded is layer.coded and torch.equal(layer(x), first.product(x))
    layer.load_state_dict(second.state_dict())
    assert torch.equal(layer(x), others.product(x))
    layer.scales = (2 * others.scales).view(torch.int16)
    torch.testing.assert_close(layer(x), 2 * others.product(x))


def test_long_columns_lie_in_several_streams(draft, monkeypatch):
    monkeypatch.setattr(coded_matrix, "SEGMENT", 37)
    monkeypatch.setattr(coded_matrix, "SEGMENTS_AT_ONCE", 2)
    bits, codes = fit([draft], 16_000)
    made = code(draft, bits[0], codes)
    W = made.matrix()
    assert made.bytes() == draft.bytes(bits[0], codes)
    assert (W - (draft.Z + draft.means[group_of(draft)]) @ draft.P - draft.mean).square().mean() < 0.01
    torch.testing.assert_close(made.lookup(torch.arange(V)), W)
    torch.testing.assert_close(made.product(torch.ones(1, d)), W.sum(1)[None], rtol=1e-4, atol=1e-4)


def group_of(draft):
    found = torch.empty(V, dtype=torch.long)
    for g, rows in enumerate(draft.groups):
        found[rows] = g
    return found


def test_more_bytes_lose_less_and_frequent_rows_least(draft):
    errors, table = [], table_of(draft.parents is not None)
    for budget in (10_000, 16_000, 30_000):
        bits, codes = fit([draft], budget)
        made = code(draft, bits[0], codes)
        if draft.parents is None:  # else groups are made by weight and size
            assert made.bits_of_number == sorted(made.bits_of_number, reverse=True)
        errors.append((made.matrix() - table).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * table.square().mean()


def test_rows_that_are_alike_cost_less():
    """Half of the rows are told from others to a tenth of their squares: they need up to 1.6 bits a number less."""
    n, costs = 96, []
    W, weights, M = table_of(alike=True, d=n), weights_of(), metric(5, n)
    with_parents = draft_table(W, weights, M)
    assert choose([with_parents], 0.6 * W.numel())[0] is with_parents
    layers = [draft_layer(torch.randn(300, n), torch.eye(n), torch.full((300,), 1e-3)) for _ in range(8)]
    size = W.numel() + sum(layer.Z.numel() for layer in layers)
    assert choose([*layers, with_parents], 0.6 * size)[-1] is with_parents  # a small part of what is lost
    for drafted in (with_parents, with_parents.without):
        bits, codes = fit([drafted], 0.6 * W.numel())
        E = (code(drafted, bits[0], codes).matrix() - W).double()
        costs.append((weights * (E @ M * E).sum(1)).sum().item())
    assert costs[0] < 0.85 * costs[1]


def test_few_bytes_have_no_parents():
    """Parents take three bytes a row whatever the budget is: half of it here."""
    W, weights, M = table_of(alike=True, d=96), weights_of(), metric(5, 96)
    made, budget = draft_table(W, weights, M), 0.2 * W.numel()
    assert choose([made], budget)[0] is made.without
    costs = []
    for drafted in (made, made.without):
        bits, codes = fit([drafted], budget)
        E = (code(drafted, bits[0], codes).matrix() - W).double()
        costs.append((weights * (E @ M * E).sum(1)).sum().item())
    assert costs[1] < costs[0]


def test_a_row_is_told_from_the_row_that_is_most_like_it():
    X = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    X[39], X[38] = 2 * X[3], -X[5]
    found, saved = parents.find_parents(X, [torch.arange(20), torch.arange(20, 40)])
    assert found[39] == 3 and found[38] != 5 and (found[:20] == -1).all() and saved > 0
    told, rest, factor = parents.told_by_parents(X, X, found, torch.tensor([39, 0]), 1)
    assert parents.ROW_FACTORS[factor].tolist() == [15 / 8, 0]  # the largest factor there is
    torch.testing.assert_close(told + rest, X[[39, 0]])


def test_error_feedback_lowers_the_cost_in_the_metric(monkeypatch):
    monkeypatch.setattr(coding, "COLUMNS", 4)
    W, M = torch.from_numpy(np.random.default_rng(6).normal(size=(300, d))).float(), metric(7)
    blind = draft_layer(W, torch.eye(d), torch.ones(300))

    def cost(draft, bits, codes):
        E = (W - code(draft, bits, codes).matrix()).double()
        return (E @ M * E).sum().item()

    seeing = draft_layer(W, M, torch.ones(300))
    bits, codes = fit([seeing], 9000)
    even, _ = fit([blind], 9000)
    assert cost(seeing, bits[0], codes) < 0.5 * cost(blind, even[0], codes)


def test_a_layers_scales_are_the_least_squares_of_its_codes(monkeypatch):
    """numpy's, of (Z - units * scales) L with C = L L^T and rows by their weights; without the ridge that keeps scales near."""
    monkeypatch.setattr(coding, "RIDGE", 0.0)
    draw = np.random.default_rng(6)
    W, weights = torch.from_numpy(draw.normal(size=(60, d))).float(), torch.from_numpy(draw.uniform(0.1, 2, 60))
    draft = draft_layer(W, metric(7), weights)
    made = code(draft, fit([draft], 3000)[0][0], gaussian_codes())
    (rows,), units = draft.groups, made.units(torch.zeros(60, dtype=torch.long), torch.arange(60)).double().numpy()
    L, by = np.linalg.cholesky(coding.metric_of(draft.U, draft.roots).numpy()), weights[rows].sqrt().numpy()[:, None]
    A = np.einsum("vk,km->vmk", by * units, L).reshape(-1, d)
    found, *_ = np.linalg.lstsq(A, (by * W[rows].double().numpy() @ L).flatten(), rcond=None)
    np.testing.assert_allclose(made.scales[0].double().numpy(), found, rtol=2e-3)


def test_a_dear_column_has_no_clipped_number():
    """One weight of 30 standard deviations on the largest input: its error is half a step, not 25 deviations."""
    W, C = torch.randn(200, d, generator=torch.Generator().manual_seed(0)), torch.diag(torch.ones(d))
    W[7, 3], C[3, 3] = 30.0, 1e6
    draft = draft_layer(W, C, torch.ones(200))
    bits, codes = fit([draft], 8000)
    assert bits[0][:, 3].min() >= 2 * 5
    assert (code(draft, bits[0], codes).matrix() - W)[:, 3].abs().max() < 1


def test_two_matrices_share_one_water_level():
    W, M = torch.randn(200, d, generator=torch.Generator().manual_seed(0)), torch.eye(d)
    one, dear = draft_layer(W, M, torch.ones(200)), draft_layer(W, M, 16 * torch.ones(200))
    (few, many), _ = fit([one, dear], 7500)
    assert 1.5 < (many - few).double().mean() / 2 < 2.6  # a bit divides the error by about 4


def test_a_budget_below_a_column_is_refused(draft):
    with pytest.raises(ValueError, match="are too few for"):
        fit([draft], 1400)


@pytest.mark.parametrize("name, change", [
    ("depths", lambda t: t + 1), ("scales", lambda t: t * float("nan")), ("sizes", lambda t: t - 1), ("P", lambda t: t[:, :-1]),
    ("place", lambda t: t * 0), ("means", lambda t: t[:1]), ("sizes", lambda t: t.long()), ("depths", lambda t: t.int()),
    ("parent", lambda t: t * 0 + V - 1), ("parent", lambda t: t.int() * 0 - 5), ("parent", lambda t: t[1:]),
    ("relation", lambda t: t + 16),
])  # fmt: skip
def test_a_damaged_tensor_is_noticed(coded, name, change):
    tensors = coded.tensors()
    if name not in tensors:
        pytest.skip("its rows have no parents")
    with pytest.raises(ValueError):
        CodedMatrix.from_tensors(tensors | {name: change(tensors[name])}, coded.codes)
    del tensors[name]
    if name not in ("means", "P"):
        with pytest.raises((KeyError, ValueError)):
            CodedMatrix.from_tensors(tensors, coded.codes)


# -- plain quantisation -----------------------------------------------------------------------------------------------


def test_to_nearest_is_at_most_half_a_step_off(table):
    read, size = in_groups(table, 4, 8)
    parts = table.view(V, -1, 8)
    step = (parts.amax(2) - parts.amin(2)) / 15
    assert ((read - table).view(V, -1, 8).abs().amax(2) <= 0.51 * step + 1e-3).all()
    assert size == V * d // 2 + V * d // 8 * 4


def test_rounding_in_a_metric_lowers_its_cost(table):
    M = metric(8)
    costs = [((E := (in_groups(table, 3, 8, m)[0] - table).double()) @ M * E).sum().item() for m in (None, M)]
    assert costs[1] < 0.7 * costs[0]


def test_groups_that_do_not_fit_the_width_are_refused(table):
    with pytest.raises(ValueError, match="divisor"):
        in_groups(table, 4, 7)


def test_the_compiled_encoder_leaves_other_codes_to_torch():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for bits, numbers in ((2, 2), (4, 2)):
        levels = torch.randn(2**WINDOW, numbers, generator=torch.Generator().manual_seed(1))
        windows = encode(x, Code(bits, levels, 0.0))
        assert (x - levels[windows].flatten(1)).square().mean() < 0.3
        assert torch.equal(windows[:, :-1] % 2 ** (WINDOW - bits), windows[:, 1:] >> bits)


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
@pytest.mark.parametrize("window, width", [(WINDOW, None), (FAST_WINDOW, None), (FAST_WINDOW, 4), (FAST_WINDOW, 16)])
def test_the_compiled_encoder_finds_the_same_streams(window, width, monkeypatch, request):
    """As torch, whose number of streams that are encoded at once does not matter. width: of registers."""
    if width:
        monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-O1", f"-DWIDTH={width}"))  # compiled in a fifth of the time
        monkeypatch.setattr(kernels, "library_file", lambda *given: None)
        kernels.library.cache_clear()
        request.addfinalizer(kernels.library.cache_clear)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    found = [(each, encode(x, each)) for each in gaussian_codes(window)]
    monkeypatch.setattr(trellis, "bind", lambda name: None)
    monkeypatch.setattr(trellis, "COSTS_AT_ONCE", 2 ** (window + 1))
    for each, windows in found:
        errors = [(x - each.levels[w].flatten(1)).square().sum(1) for w in (windows, encode(x, each))]
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-6)
        assert torch.equal(windows[:, :-1] % 2 ** (window - each.bits), windows[:, 1:] >> each.bits)
