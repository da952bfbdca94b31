"""Sampling on a GPU against the CPU: the same sets, the same draws for the same uniforms."""

import imh_adaptors
import pytest
import torch

import common

if not torch.cuda.is_available():
    pytest.skip("no CUDA device, so its sampling is not tested", allow_module_level=True)

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"typical_p": 0.9},
    {"min_p": 0.05},
    {"eta_cutoff": 0.0009},
    {"top_k": 300, "top_p": 0.8},
]


def rows(n, V, spread, ties):
    scores = spread * torch.randn(n, V, generator=torch.Generator().manual_seed(0))
    if ties:
        scores = (4 * scores).round() / 4
    return scores


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_kept_sets_are_those_of_the_cpu(filters, ties):
    if not filters:
        pytest.skip("no filter, no set")
    log_pi = rows(64, 5000, 2.0, ties).log_softmax(-1)  # made once, so that both get the same bits
    p = log_pi.exp()
    here = common.kept_by_all(log_pi, p, filters, imh_adaptors.kept_set)
    there = common.kept_by_all(log_pi.cuda(), p.cuda(), filters, imh_adaptors.kept_set)
    different = (here != there.cpu()).sum(-1)
    if len(filters) == 1 and "typical_p" not in filters and "eta_cutoff" not in filters:
        assert different.max() == 0
    else:  # an entropy, or a second normalisation: one token may lie within rounding of the edge
        assert different.max() <= 1


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_uniforms_draw_the_same_tokens(filters):
    scores = rows(2000, 3000, 2.0, ties=False)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept_set = imh_adaptors.kept_set
    tokens, log_q, log_sum = common.sample_kept(scores, u, filters, kept_set)
    found, found_q, found_sum = common.sample_kept(scores.cuda(), u.cuda(), filters, kept_set)
    same = found.cpu() == tokens
    assert same.float().mean() > 0.998  # a uniform within 1e-6 of an edge of the CDF may flip
    torch.testing.assert_close(found_q.cpu()[same], log_q[same], atol=2e-3, rtol=0)
    torch.testing.assert_close(found_sum.cpu(), log_sum, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filters", [{"top_k": 20}, {"top_p": 0.9}, {"typical_p": 0.7}], ids=str)
def test_draws_have_the_law_of_the_kept_set(filters):
    """400,000 draws: none outside of the set; total variation as of exact draws (McDiarmid)."""
    n, V = 400_000, 700
    scores = rows(1, V, 2.0, ties=True)
    log_pi = scores.log_softmax(-1)
    kept = common.kept_by_all(log_pi, log_pi.exp(), filters, imh_adaptors.kept_set)
    law = (log_pi.exp() * kept)[0].double()
    law = law / law.sum()
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.zeros(V, dtype=torch.float64)
    for part in u.cuda().split(n // 10):
        every = scores.cuda().expand(len(part), -1)
        tokens, _, _ = common.sample_kept(every, part, filters, imh_adaptors.kept_set)
        counts += tokens.cpu().bincount(minlength=V)
    assert counts[kept[0] == 0].sum() == 0
    distance = (counts / n - law).abs().sum().item() / 2
    assert distance < (law * (1 - law) / n).sqrt().sum().item() / 2 + 0.003
