import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import REPO

from util_factorization import METHODS
from util_factorization.calibrate import calibrate
from util_factorization.decompose_table import BLOCK, decompose

V, d = BLOCK + 500, 24  # two blocks of rows, the second of another length


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    spectrum = np.diag(np.geomspace(1, 1e-2, d))  # steep, yet its tail is far above float32's rounding of the factors
    turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (rng.normal(size=(V, d)) @ spectrum @ turn + rng.normal(size=d)).astype(np.float32)


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(1).zipf(1.5, size=V).clip(max=100_000) - 1


def square(seed, scale):
    """A second moment as a model has them: full rank, with a few large directions."""
    x = np.random.default_rng(seed).normal(size=(400, d)) * np.geomspace(3, 0.2, d) * scale
    turn, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(d, d)))
    return turn.T @ x.T @ x @ turn / 400


C, G = square(10, 1.0), square(20, 0.5)
METRIC = dict(whiten=C, fisher=C + G)  # of a method whose cost is one metric; a new method's belongs here


def root(M):
    values, vectors = np.linalg.eigh(M)
    return vectors * np.sqrt(values) @ vectors.T


def decomposed(table, method, counts):
    moments = {name: torch.from_numpy(M) for name, M in dict(head=C, lookup=G).items() if name in METHODS[method]}
    return decompose(table, method, counts, joint_lambda=0.3, **moments)


def oracle(table, method, counts):
    """As DESIGN has them, by numpy: (p, mu, the blocks [V, d or 2d] whose SVD is taken, side by side)."""
    W = table.astype(np.float64)
    p = np.full(V, 1 / V) if method in ("svd", "centered") else (counts + 1) / (counts + 1).sum()
    mu = 0 if method == "svd" else p @ W
    X = np.sqrt(p)[:, None] * (W - mu)
    if method in METRIC:
        return p, mu, X @ root(METRIC[method])
    if method == "joint":
        A, B = X / np.linalg.norm(W, axis=1)[:, None], X @ root(C)
        return p, mu, np.concatenate([np.sqrt(0.3) * A / np.linalg.norm(A), B / np.linalg.norm(B)], 1)
    return p, mu, X


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_the_factors_of_numpys_svd(table, counts, method):
    p, mu, blocks = oracle(table, method, counts)
    U, S, _ = np.linalg.svd(blocks, full_matrices=False)
    complete = decomposed(table, method, counts)
    np.testing.assert_allclose(complete.S, S, rtol=1e-4, atol=1e-7 * S[0])
    X = table - mu
    for k in (1, 5, 23):
        Z, P, mean = (None if f is None else f.double().numpy() for f in complete.factors(k))
        assert Z.shape == (V, k) and P.shape == (k, d) and (mean is None) == (method == "svd")
        weighted = np.sqrt(p)[:, None] * Z
        signs = np.sign((weighted * U[:, :k]).sum(0))
        np.testing.assert_allclose(weighted * signs, U[:, :k] * S[:k], atol=2e-5 * S[0] / np.sqrt(V))
        best = np.linalg.lstsq(weighted, np.sqrt(p)[:, None] * X, rcond=None)[0]  # numpy's least squares
        np.testing.assert_allclose(P, best, atol=2e-4 * np.abs(best).max())
        optimum = np.sqrt((S[k:] ** 2).sum())
        assert complete.tail(k) == pytest.approx(optimum, rel=1e-4)
        assert complete.energy(k) == pytest.approx((S[:k] ** 2).sum() / (S**2).sum(), rel=1e-7)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "joint"])  # whose two uses weigh rows apart
def test_every_rank_reaches_the_singular_value_tail(table, counts, method):
    """No factorization of rank k has a smaller error in the method's metric, M = 1, C or C + G."""
    p, mu, blocks = oracle(table, method, counts)
    S = np.linalg.svd(blocks, compute_uv=False)
    M = METRIC.get(method, np.eye(d))
    for k in (1, 5, 23):
        Z, P, mean = (None if f is None else f.double().numpy() for f in decomposed(table, method, counts).factors(k))
        residual = np.sqrt(p)[:, None] * (table - Z @ P - (0 if mean is None else mean))
        error = np.sqrt(np.einsum("id,de,ie->", residual, M, residual))
        assert error == pytest.approx(np.sqrt((S[k:] ** 2).sum()), rel=1e-4)


def test_the_head_wants_the_same_map_as_the_lookup(table, counts):
    """Least squares under a metric on the right is plain least squares: scale_down has nothing of its own to be."""
    p, mu, _ = oracle(table, "whiten", counts)
    Z, P, _ = (f.double().numpy() for f in decomposed(table, "whiten", counts).factors(7))
    s = np.sqrt(p)[:, None]
    for_logits = np.linalg.lstsq(s * Z, s * (table - mu) @ root(C), rcond=None)[0] @ np.linalg.inv(root(C))
    np.testing.assert_allclose(for_logits, P, atol=1e-4 * np.abs(P).max())


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_table_but_for_joint(table, counts, method):
    """joint's two blocks scale a row differently, so together they have more than d directions."""
    Z, P, mean = decomposed(table, method, counts).factors(d)
    rebuilt = (Z @ P + (0 if mean is None else mean)).numpy()
    assert np.allclose(rebuilt, table, atol=2e-4) == (method != "joint")


@pytest.mark.parametrize("method", METHODS)
def test_relative_errors_are_those_of_the_rebuilt_table(table, counts, method):
    ranks = [2, 9, d]
    complete = decomposed(table, method, counts)
    for weights in (None, counts):
        p = np.ones(V) if weights is None else weights
        for k, error in zip(ranks, complete.relative_errors(ranks, weights), strict=True):
            Z, P, mean = complete.factors(k)
            rebuilt = (Z @ P + (0 if mean is None else mean)).numpy()
            direct = np.sqrt((p * ((table - rebuilt) ** 2).sum(1)).sum() / (p * (table**2).sum(1)).sum())
            assert error == pytest.approx(direct, rel=1e-3, abs=2e-5)


def test_freq_is_better_per_token_and_svd_per_row(table, counts):
    k = [6]
    svd, freq = decompose(table, "svd"), decompose(table, "freq", counts)
    assert freq.relative_errors(k, counts)[0] < svd.relative_errors(k, counts)[0]
    assert decompose(table, "centered").relative_errors(k)[0] < freq.relative_errors(k)[0]


def test_rank_for_is_the_smallest_rank_with_that_energy(table):
    complete = decompose(table)
    for share in (0.5, 0.9, 0.999):
        k = complete.rank_for(share)
        assert complete.energy(k) >= share > complete.energy(k - 1)
    assert complete.rank_for(1.0) == d


def test_a_table_of_lower_rank_is_found_out():
    rng = np.random.default_rng(3)
    table = (rng.normal(size=(300, 4)) @ rng.normal(size=(4, 40))).astype(np.float32)
    complete = decompose(table)
    Z, P, _ = complete.factors(4)
    np.testing.assert_allclose((Z @ P).numpy(), table, atol=1e-5)
    assert complete.rank_for(0.9999) <= 4


def test_torch_and_numpy_tables_give_the_same(table):
    a, b = decompose(table).factors(5), decompose(torch.from_numpy(table)).factors(5)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_what_it_refuses(table):
    with pytest.raises(ValueError, match=f"none of {', '.join(METHODS)}"):
        decompose(table, "pca")
    for method, lacks in (("freq", "counts"), ("whiten", "head"), ("joint", "head"), ("fisher", "head")):
        with pytest.raises(ValueError, match=f"{method} needs {lacks}"):
            decompose(table, method, None if lacks == "counts" else np.ones(V))
    with pytest.raises(ValueError, match="fisher needs lookup"):
        decompose(table, "fisher", np.ones(V), torch.eye(d))
    with pytest.raises(ValueError, match="7 counts for a table of"):
        decompose(table, "freq", np.ones(7))


def test_a_large_table_is_never_copied_whole_and_is_cut_exactly():
    """
    Peak memory, in a process of its own: beside the table and the factors a few blocks of rows. A copy in float64 would be
    twice the table. The error at each rank is the tail of torch's singular values.
    """
    code = """
        import json, resource, torch
        from util_factorization.decompose_table import decompose
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        torch.manual_seed(0)
        mix = torch.diag(torch.linspace(1, 0.02, 256) ** 2) @ torch.randn(256, 256) / 16
        table = torch.cat([torch.randn(5000, 256) @ mix for _ in range(24)])
        decompose(table[:9000]).factors(16)  # loads what is loaded at first use
        before = peak()
        decomposition = decompose(table)
        factors = {k: decomposition.factors(k) for k in (16, 64)}
        grown = peak() - before
        S = torch.linalg.eigvalsh(sum(part.double().T @ part.double() for part in table.split(5000))).flip(0).sqrt()
        def excess(k, Z, P, mean):
            parts = zip(table.split(5000), Z.split(5000))
            error = sum((part.double() - z.double() @ P.double()).square().sum() for part, z in parts)
            return (error.sqrt() / S[k:].norm() - 1).item()
        excess = [excess(k, *f) for k, f in factors.items()]
        sizes = dict(table=table.numel() * 4, factors=sum(f[0].numel() * 4 for f in factors.values()))
        print(json.dumps(dict(grown=grown, excess=excess, **{name: size / 2**20 for name, size in sizes.items()})))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=REPO, capture_output=True, text=True, check=True)
    got = json.loads(done.stdout)
    assert got["grown"] < got["factors"] + 0.9 * got["table"] and max(map(abs, got["excess"])) < 1e-5, got


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_measures_what_the_model_does(tiny_model):
    """C against ln_f's outputs; G by bumping a looked-up row and watching the loss."""
    model = tiny_model().double()
    rng = np.random.default_rng(0)
    windows = [(rng.integers(97, size=(2, 16)), rng.integers(97, size=(2, 16))) for _ in range(2)]
    C, G = calibrate(model, windows, gradients=True)
    hidden, gradients = [], []
    for x, y in ((torch.from_numpy(a) for a in pair) for pair in windows):
        hidden.append(model.hidden(x).flatten(0, 1))
        rows = model.lookup(x)
        for b, t, i in np.ndindex(2, 16, 16):
            two = []
            for bump in (1e-5, -1e-5):
                moved = rows.clone()
                moved[b, t, i] += bump
                logits = model.logits(model.trunk(moved))
                two.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item())
            gradients.append((two[0] - two[1]) / 2e-5)
    h, g = torch.cat(hidden), torch.tensor(gradients, dtype=torch.float64).view(-1, 16)
    torch.testing.assert_close(C, h.T @ h / len(h))
    torch.testing.assert_close(G, g.T @ g / len(g), rtol=1e-4, atol=1e-6)
    assert calibrate(model, windows)[1] is None
