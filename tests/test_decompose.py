import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import REPO

from util_factorization import METHODS
from util_factorization.decompose import BLOCK, decompose

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


def oracle(table, method, counts):
    """numpy's SVD of diag(sqrt p) (W - mu), with p and mu as DESIGN has them: (p, mu, S, Vh)."""
    W = table.astype(np.float64)
    p = (counts + 1) / (counts + 1).sum() if method == "freq" else np.full(V, 1 / V)
    mu = 0 if method == "svd" else p @ W
    _, S, Vh = np.linalg.svd(np.sqrt(p)[:, None] * (W - mu), full_matrices=False)
    return p, mu, S, Vh


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_reaches_the_singular_value_tail(table, counts, method):
    p, mu, S, _ = oracle(table, method, counts)
    whole = decompose(table, method, counts)
    np.testing.assert_allclose(whole.S, S, rtol=1e-6, atol=1e-9 * S[0])
    for k in (1, 5, 23):
        Z, P, mean = (None if f is None else f.double().numpy() for f in whole.factors(k))
        assert Z.shape == (V, k) and P.shape == (k, d) and (mean is None) == (method == "svd")
        residual = np.sqrt(p)[:, None] * (table - Z @ P - (0 if mean is None else mean))
        optimum = np.sqrt((S[k:] ** 2).sum())
        assert np.linalg.norm(residual) == pytest.approx(optimum, rel=1e-5)
        assert whole.tail(k) == pytest.approx(optimum, rel=1e-5)
        assert whole.energy(k) == pytest.approx((S[:k] ** 2).sum() / (S**2).sum(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_relative_errors_are_those_of_the_rebuilt_table(table, counts, method):
    ranks = [2, 9, d]
    whole = decompose(table, method, counts)
    for weights in (None, counts):
        p = np.ones(V) if weights is None else weights
        for k, error in zip(ranks, whole.relative_errors(ranks, weights), strict=True):
            Z, P, mean = whole.factors(k)
            rebuilt = (Z @ P + (0 if mean is None else mean)).numpy()
            direct = np.sqrt((p * ((table - rebuilt) ** 2).sum(1)).sum() / (p * (table**2).sum(1)).sum())
            assert error == pytest.approx(direct, rel=1e-3, abs=1e-6)


def test_freq_is_better_per_token_and_svd_per_row(table, counts):
    k = [6]
    svd, freq = decompose(table, "svd"), decompose(table, "freq", counts)
    assert freq.relative_errors(k, counts)[0] < svd.relative_errors(k, counts)[0]
    assert decompose(table, "centered").relative_errors(k)[0] < freq.relative_errors(k)[0]


def test_rank_for_is_the_smallest_rank_with_that_energy(table):
    whole = decompose(table)
    for share in (0.5, 0.9, 0.999):
        k = whole.rank_for(share)
        assert whole.energy(k) >= share > whole.energy(k - 1)
    assert whole.rank_for(1.0) == d


def test_a_table_of_lower_rank_is_found_out():
    rng = np.random.default_rng(3)
    table = (rng.normal(size=(300, 4)) @ rng.normal(size=(4, 40))).astype(np.float32)
    whole = decompose(table)
    Z, P, _ = whole.factors(4)
    np.testing.assert_allclose((Z @ P).numpy(), table, atol=1e-5)
    assert whole.rank_for(0.9999) <= 4


def test_torch_and_numpy_tables_give_the_same(table):
    a, b = decompose(table).factors(5), decompose(torch.from_numpy(table)).factors(5)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_what_it_refuses(table):
    with pytest.raises(ValueError, match="none of svd, centered, freq"):
        decompose(table, "pca")
    with pytest.raises(ValueError, match="needs the token counts"):
        decompose(table, "freq")
    with pytest.raises(ValueError, match="7 counts for a table of"):
        decompose(table, "freq", np.ones(7))


def test_gpt2_sized_table_beats_numpy_in_time_and_stays_under_1500_mb():
    """Four ranks of a 50257 x 768 table, in a process of its own, since peak memory is a process's."""
    code = """
        import json, resource, time; import numpy as np, torch
        from util_factorization.decompose import decompose
        torch.manual_seed(0)
        table = torch.randn(50257, 768) @ torch.diag(torch.linspace(1, 0.02, 768) ** 2) @ torch.randn(768, 768) / 28
        t = time.time()
        whole = decompose(table)
        factors = {k: whole.factors(k) for k in (64, 128, 256, 512)}
        ours = time.time() - t
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        t = time.time()
        _, S, _ = np.linalg.svd(table.numpy(), full_matrices=False)
        numpy = time.time() - t
        S = torch.linalg.svdvals(table.double())
        def excess(k, Z, P, mean):
            return ((table.double() - Z.double() @ P.double()).norm() / S[k:].norm() - 1).item()
        excess = [excess(k, *f) for k, f in factors.items()]
        print(json.dumps(dict(seconds=ours, numpy_svd_seconds=numpy, peak_mb=peak / 1e6, excess_error=excess)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=REPO, capture_output=True, text=True, check=True)
    print(done.stdout)
    got = json.loads(done.stdout)
    assert got["seconds"] < got["numpy_svd_seconds"] and got["peak_mb"] < 1500 and max(got["excess_error"]) < 1e-5
