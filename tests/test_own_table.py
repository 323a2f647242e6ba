"""The token table of our own models, as surgery sees it: split off, factorized, measured by bits."""

import pytest
import torch

from common.modules import AtTable
from surgery.bits_model import draft_all, matrices_of, whole_moments
from surgery.subject import OwnSubject

V = 600
IDS = torch.randint(V, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [None, 8])
def test_the_split_at_the_table_is_the_same_model(tiny_model, rank):
    model, x = tiny_model(n_embd_wte=rank), IDS % 97
    for split in (AtTable(model), OwnSubject(model)):
        rows = split.lookup(x)
        assert rows.shape[-1] == (rank or 16)
        torch.testing.assert_close(split.logits(split.trunk(rows)), model(x)[0])


def test_a_factorized_table_of_ours_can_be_measured_by_bits(tiny_model, tmp_path):
    subject = OwnSubject(tiny_model(vocab_size=V, n_embd=32, n_embd_wte=24))
    moments = whole_moments(subject, torch.ones(V), [(IDS, IDS.roll(-1))], tmp_path / "moments.pt")
    assert moments.C.shape == moments.G.shape == (24, 24)  # of what the narrow head reads, at the narrow row
    draft = draft_all(matrices_of(subject, "wte"), moments)["wte"]
    assert draft.Z.shape == (V, 24) and draft.P.shape == (24, 24)
    C, squares = moments.linears.of("transformer.h.0.mlp.mlp_up")
    assert C.shape == (32, 32) and squares.shape == (128,)
