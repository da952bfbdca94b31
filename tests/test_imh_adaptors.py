"""Adaptors against the library and a table, IMH against enumeration, the commands end to end."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import imh_adaptors as imh
import numpy as np
import pytest
import released
import scipy.stats
import torch
import transformers
from conftest import ROOT, begin, run
from imh_adaptors import Args, adapt, imh_chain, parse_adaptor

import common

INF = math.inf
L1 = [2, 1, 0.5, 0, -1, -2]
L2 = [1, 1, 1, 0, 0, -1]
L3 = [math.log(x) for x in (0.5, 0.25, 0.125, 0.0625, 0.0625)]
PROCESSORS = dict(  # in the order in which generate() applies them
    temperature=transformers.TemperatureLogitsWarper,
    top_k=transformers.TopKLogitsWarper,
    top_p=transformers.TopPLogitsWarper,
    min_p=transformers.MinPLogitsWarper,
    typical_p=transformers.TypicalLogitsWarper,
    eta_cutoff=lambda x: transformers.EtaLogitsWarper(x, device="cpu"),
)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def library(logits, adaptor):
    """Eq. 2 by the library: its processors, one after the other, then the definition of Z."""
    scores = logits
    for name, make in PROCESSORS.items():
        if name in adaptor:
            scores = make(int(adaptor[name]) if name == "top_k" else adaptor[name])(None, scores)
    log_q = scores.log_softmax(-1)
    log_a = logits.log_softmax(-1) / adaptor.get("temperature", 1.0)
    return log_q, log_a.masked_fill(log_q == -INF, -INF).logsumexp(-1)


SPECS = [
    "temperature=0.7",
    "top_k=5",
    "top_k=1",
    "top_p=0.9",
    "min_p=0.1",
    "typical_p=0.5",
    "eta_cutoff=0.1",
    "temperature=1.5,top_k=20,top_p=0.8",
    "temperature=0.5,typical_p=0.9",
    "top_k=30,typical_p=0.5",
    "temperature=1.3,top_k=25,top_p=0.95,min_p=0.02,typical_p=0.9,eta_cutoff=0.01",
]


@pytest.mark.parametrize("spec", SPECS)
def test_adaptors_equal_the_library(spec):
    torch.manual_seed(0)
    logits = 2 * torch.randn(
        300, 40, dtype=torch.float64
    )  # no ties, so that the two agree on every set
    for ours, theirs in zip(adapt(logits, spec), library(logits, parse_adaptor(spec))):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    ours, theirs = (
        adapt(logits.float(), spec)[0].isfinite(),
        library(logits.float(), parse_adaptor(spec))[0].isfinite(),
    )
    assert (ours != theirs).sum(1).max() <= 1  # in float32 one token may fall on a set's edge


def test_large_vocabularies_are_sorted_in_parts():
    """Beyond 1024 tokens only the likeliest are sorted, all where these hold too little mass."""
    torch.manual_seed(0)
    flat, peaked = (
        torch.randn(8, 3000, dtype=torch.float64) / 9,
        4 * torch.randn(8, 3000, dtype=torch.float64),
    )
    for spec in ("top_p=0.9", "typical_p=0.9", "top_k=50", "top_k=2000", "top_k=50,typical_p=0.5"):
        for logits in (flat, peaked):
            for ours, theirs in zip(adapt(logits, spec), library(logits, parse_adaptor(spec))):
                torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert (
        adapt(flat, "top_p=0.9")[0].isfinite().sum(1).min() > 2000
    )  # more than the part that is sorted first


@pytest.mark.parametrize("spread", [1.5, 2.0, 3.0])
def test_the_edge_of_a_nucleus_is_that_of_float64(spread):
    """Log q of peaked rows of 50,304 logits: the library's is off where its float32 sum of the tail
    puts the edge one token too early or too late; ours is that of float64 in every row.

    Where the token at the edge has a probability of .002, so much is log q off.
    """
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(60, 50_304, generator=generator)
    p, order = torch.sort(logits.double().softmax(-1), descending=True, stable=True)
    size = (p.cumsum(-1) < 0.9 - 1e-6).sum(-1) + 1
    exact = p[:, 0] / p.cumsum(-1).gather(1, size[:, None] - 1)[:, 0]  # q of the likeliest token

    log_q, log_kept = adapt(logits, "top_p=0.9")
    assert torch.equal(log_q.isfinite().sum(-1), size)
    ours = log_q.gather(1, order[:, :1])[:, 0].double()
    assert (ours - exact.log()).abs().max() < 2e-6  # float32 rounding of log q itself
    tokens, drawn, _ = imh.draw_tokens(logits, torch.zeros(60), {"top_p": 0.9})
    assert (drawn - log_q[range(60), tokens]).abs().max() < 3e-6

    theirs = transformers.TopPLogitsWarper(0.9)(None, logits).isfinite().sum(-1)
    assert (theirs - size).abs().max() == 1  # in a few of the rows


def kept(logits, spec):
    return "".join(
        map(
            str,
            adapt(torch.tensor(logits, dtype=torch.float64), spec)[0]
            .isfinite()
            .nonzero()[:, 0]
            .tolist(),
        )
    )


@pytest.mark.parametrize(
    "spec, one, two, three",
    [  # three vectors: without ties, with ties, with masses met exactly
        ("top_k=1", "0", "0", "0"),
        ("top_k=2", "01", "01", "01"),
        ("top_k=3", "012", "012", "012"),
        ("top_k=4", "0123", "0123", "0123"),
        ("top_p=0.5", "0", "01", "0"),
        ("top_p=0.75", "01", "012", "01"),
        ("top_p=0.9", "0123", "01234", "0123"),
        ("top_p=0.95", "0123", "01234", "01234"),
        ("typical_p=0.2", "1", "0", "1"),
        ("typical_p=0.5", "01", "01", "01"),
        ("typical_p=0.9", "0123", "01234", "0123"),
        ("eta_cutoff=0.0009", "012345", "012345", "01234"),
        ("eta_cutoff=0.1", "012", "01234", "012"),
        ("eta_cutoff=0.25", "01", "012", "01"),
        ("min_p=0.1", "0123", "012345", "01234"),
        ("min_p=0.25", "01", "01234", "012"),
        ("min_p=0.5", "0", "012", "01"),
        ("top_p090,temperature=1.5,top_p=0.75", "012", "0123", "012"),
        ("temperature=0.5,typical_p=0.5", "0", "01", "0"),
        ("top_k=3,top_p=0.9", "012", "012", "012"),
        ("top_k=3,typical_p=0.5", "0", "01", "01"),
        ("greedy", "0", "0", "0"),
    ],
)
def test_kept_sets_and_ties(spec, one, two, three):
    """Exact sets, the lowest index first; where the library keeps ties, the definition decides."""
    assert (kept(L1, spec), kept(L2, spec), kept(L3, spec)) == (one, two, three)


def test_numbers_by_hand():
    # L3: the two likeliest hold 3/4, so q = (2/3, 1/3) and the kept mass is 3/4
    log_q, log_Z = adapt(torch.tensor(L3), "top_k=2")
    torch.testing.assert_close(log_q.exp(), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]))
    torch.testing.assert_close(log_Z.exp(), torch.tensor(0.75))
    # T = 1/2 squares: sum of squares 1/4 + 1/16 + 1/64 + 2/256 = 0.3359375
    log_q, log_Z = adapt(torch.tensor(L3), {"temperature": 0.5})
    torch.testing.assert_close(log_Z.exp(), torch.tensor(0.3359375))
    torch.testing.assert_close(log_q[0].exp(), torch.tensor(0.25 / 0.3359375))
    constant = adapt(
        torch.tensor(L1) + 100, "top_p=0.9,temperature=1.2"
    )  # a constant changes nothing
    torch.testing.assert_close(constant[0], adapt(torch.tensor(L1), "top_p=0.9,temperature=1.2")[0])


def test_bad_adaptors_name_the_remedy():
    for spec, vocabulary, words in (
        ("top_k=7", 6, "top_k <= 6"),
        ("top_p=1.5", 6, "top_p <= 1"),
        ("top_p=0", 6, "keeps nothing"),
        ("temperature=0", 6, "temperature"),
        ("top_k=2.5", 6, "number of tokens"),
        ("top_q=1", 6, "top_q"),
        ("nonsense", 6, "ancestral_strict"),
        ("top_p=x", 6, "key=number"),
        ("epsilon_cutoff=0.1", 6, "epsilon_cutoff"),
    ):
        with pytest.raises(SystemExit, match=re.escape(words)):
            parse_adaptor(spec, vocabulary)
    with pytest.raises(SystemExit, match="keeps nothing at 1 of 2 positions"):
        adapt(torch.tensor([[0.0, 1.0], [-INF, -INF]]), "top_p=0.9")
    with pytest.raises(ValueError, match="unknown adaptor 'top_q'"):
        imh.kept_set(torch.zeros(1, 6), torch.ones(1, 6), "top_q", 1)
    assert (
        parse_adaptor("ancestral") == parse_adaptor("top_k50")
        and parse_adaptor("top_k=0,top_p=1") == {}
    )


def test_chain_by_hand():
    log_w = torch.tensor([0, -1.2, 0.7, -0.3, 2.1, 0.4])
    draws = torch.tensor([0, 3, 1, 2, 4, 0, 5, 2, 4, 1, 3, 0, 5, 2, 1, 4])
    u = torch.tensor(
        [
            0.5,
            0.80,
            0.35,
            0.90,
            0.10,
            0.35,
            0.15,
            0.30,
            0.55,
            0.02,
            0.08,
            0.97,
            0.45,
            0.20,
            0.26,
            0.91,
        ]
    )
    held = imh_chain(log_w[draws], u.log())
    assert draws[held].tolist() == [0, 0, 0, 2, 4, 4, 5, 2, 4, 1, 3, 0, 5, 2, 2, 4]
    assert (held[1:] == torch.arange(1, 16)).sum() == 11
    assert (
        draws[imh_chain(log_w[draws], torch.full((16,), -INF))].tolist() == draws.tolist()
    )  # accept all
    assert (draws[held][1:] + 1.0).mean().item() == pytest.approx(3.53333333)
    constant = imh_chain(log_w[draws].double() + 1000, u.double().log())
    assert constant.tolist() == held.tolist()


def test_chains_side_by_side_equal_a_python_loop():
    torch.manual_seed(0)
    log_w, log_u = 2 * torch.randn(50, 200), torch.rand(50, 200).log()
    log_w[:, ::7] = -INF  # draws outside the target's support are never accepted
    log_w[:, 0] = 0.0
    held = imh_chain(log_w, log_u)
    for chain, weights, uniforms in zip(held.tolist(), log_w, log_u):
        state, weights, uniforms = 0, weights.tolist(), uniforms.tolist()
        for i in range(200):
            if i and torch.tensor(uniforms[i]) < torch.tensor(weights[i]) - torch.tensor(
                weights[state]
            ):
                state = i
            assert chain[i] == state


def test_a_chain_in_pieces_is_the_chain(monkeypatch):
    torch.manual_seed(1)
    log_w, log_u = 2 * torch.randn(20, 50), torch.rand(20, 50).log()
    log_w[:, ::7] = -INF  # among them the first of a piece
    log_w[0] = torch.arange(50, 0, -1)  # accepts rarely: one draw is held over several pieces
    whole = imh_chain(log_w, log_u)
    for piece in (1, 7, 25, 49, 50, 51):
        monkeypatch.setattr(imh, "PIECE", piece)
        assert torch.equal(imh.held_steps(log_w, log_u), whole)


def test_all_draws_impossible_or_huge():
    for log_w in (torch.full((1, 5), -INF), torch.tensor([[1e4, -1e4, 0.0, -INF, 1e4]])):
        assert imh_chain(log_w, torch.rand(1, 5).log()).min() >= 0
    limit = imh.pool_limit(np.array([1e4, -1e4, 0.0, -INF, 1e4]))
    assert limit.ess == pytest.approx(0.4) and limit.weights[0] == 0.5
    assert math.isnan(imh.pool_limit(np.full(5, -INF)).ess)


def test_pool_limit():
    log_w = exact([0, -1.2, 0.7, -0.3, 2.1, 0.4])
    limit = imh.pool_limit(log_w.numpy())
    w_bar = limit.weights
    expected = [0.07291946, 0.02196292, 0.14684177, 0.05402007, 0.59547273, 0.10878306]
    assert w_bar == pytest.approx(expected, abs=5e-9)
    assert w_bar @ np.arange(1, 7) == pytest.approx(4.40351284, abs=1e-7)
    assert 6 * limit.ess == pytest.approx(2.52078506, abs=1e-7)
    assert limit.accept == pytest.approx(0.46968705, abs=1e-7)
    gap = 1 / (6 * w_bar.max())  # of the chain that proposes from the pool
    assert 1 - gap == pytest.approx(0.72011033, abs=1e-7)
    assert limit.log_Z == pytest.approx(log_w.exp().mean().log().item())
    # the chain itself: 400,000 states, tau about 5, sd 1.2: 0.02 is 5 standard errors
    rng = np.random.default_rng(0)
    draws = torch.tensor(rng.integers(6, size=(200, 2100)))
    held = imh_chain(log_w[draws], torch.tensor(rng.random((200, 2100))).log())
    states = draws.gather(1, held)[:, 100:].double() + 1
    assert states.mean().item() == pytest.approx(4.40351284, abs=0.02)
    assert (held[:, 1:] == torch.arange(1, 2100)).double().mean().item() == pytest.approx(
        0.46968705, abs=0.006
    )


@pytest.mark.parametrize(
    "s, accept", [(0.25, 0.85968380), (0.5, 0.72367361), (1, 0.47950012), (2, 0.15729921)]
)
def test_gaussian_log_weights(s, accept):
    quantiles = (torch.arange(200_000).double() + 0.5) / 200_000
    log_w = s * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    limit = imh.pool_limit(log_w.numpy())  # atol: the tail beyond the last quantile
    assert limit.accept == pytest.approx(accept, abs=2e-3)
    assert limit.ess == pytest.approx(math.exp(-s * s), abs=2e-2)


def thirteen_strings(adaptor, target="global", beta=0.5):
    """IMH over the strings of at most two of A, B, C and an end E, written out, nothing sampled.

    A token is worth .25, .85, -.6, and .3 for being there; a repetition costs .8.
    """
    root = exact([1, 0.5, 0, -0.5])
    after = exact(
        [
            [0.2, 0.8, -0.4, 0.6],
            [-0.3, 0.4, 0.9, 0.1],
            [0.7, -0.6, 0, 1.1],
            [-INF, -INF, -INF, 0],
        ]
    )
    log_p = root.log_softmax(0)[:, None] + after.log_softmax(1)  # (4, 4), -inf: no such string
    worth = exact([0.25 + 0.3, 0.85 + 0.3, -0.6 + 0.3, 0])
    r = worth[:, None] + worth + torch.diag(exact([-0.8, -0.8, -0.8, 0]))
    log_Z = (log_p + r / beta).flatten().logsumexp(0)
    log_p_plus = log_p + r / beta - log_Z  # Eq. 1

    q_1, Z_1 = adapt(log_p_plus.logsumexp(1), adaptor)  # of the first token
    q_2, Z_2 = adapt(log_p_plus, adaptor)  # of the second, after each first one
    log_q = q_1[:, None] + q_2
    log_kept = (Z_1 + Z_2)[:, None].expand(4, 4)
    s = log_q.isfinite()
    log_p, r, log_p_plus, log_q, log_kept = log_p[s], r[s], log_p_plus[s], log_q[s], log_kept[s]
    q = log_q.exp()
    log_w = log_kept if target == "global" else log_p_plus - log_q
    law = (log_q + log_w).softmax(0)
    move = q * (log_w - log_w[:, None]).clamp(max=0).exp()  # Eq. 5: propose and accept
    P = move + torch.diag(1 - move.sum(1))

    steps = []  # n steps after a draw of q: worst total variation, E r, E log p
    state, powers = q, torch.eye(len(P), dtype=P.dtype)
    for _ in range(11):
        worst = (powers - law).abs().sum(1).max() / 2
        steps.append([worst.item(), (state @ r).item(), (state @ log_p).item()])
        state, powers = state @ P, powers @ P
    return dict(
        log_p=log_p,
        r=r,
        log_p_plus=log_p_plus,
        log_Z=log_Z,
        log_q=log_q,
        log_kept=log_kept,
        P=P,
        target=law,
        spectrum=torch.linalg.eigvals(P).real.sort(descending=True).values,
        w_star=(law / q).max(),
        accept=law @ move.sum(1),
        steps=steps,
    )


def test_listed_law_is_the_product_over_tokens():
    """The thirteen strings as a list: Eq. 2 to 4 by prefix shares equal those by two steps."""
    for spec in ("top_k=2", "top_p=0.8,temperature=1.5", "typical_p=0.6", "ancestral_strict"):
        everything = thirteen_strings("ancestral_strict")
        found = thirteen_strings(spec)
        pairs = [(i, j) for i in range(4) for j in range(4) if i < 3 or j == 3]
        log_q, log_kept = imh.listed_law(
            torch.tensor(pairs), everything["log_p_plus"].exp(), spec, vocabulary=4
        )
        kept = log_q.isfinite()
        torch.testing.assert_close(log_q[kept], found["log_q"], atol=1e-12, rtol=0)
        torch.testing.assert_close(log_kept[kept], found["log_kept"], atol=1e-12, rtol=0)


def test_aligned_world():
    found = thirteen_strings("ancestral_strict")
    p_plus, log_p, r, log_Z = found["log_p_plus"].exp(), found["log_p"], found["r"], found["log_Z"]
    assert len(r) == 13 and log_Z.item() == pytest.approx(2.27616999, abs=1e-8)
    assert (
        log_p + r / 0.5 - found["log_p_plus"] - log_Z
    ).abs().max() < 1e-10  # Eq. 1, for every string
    entropy = -(p_plus @ found["log_p_plus"])
    assert entropy.item() == pytest.approx(1.59656864, abs=1e-8)
    assert (p_plus @ (log_p + 2 * r)).item() == pytest.approx((log_Z - entropy).item(), abs=1e-10)
    assert (p_plus @ r).item() == pytest.approx(1.45235589, abs=1e-8)
    assert (p_plus @ log_p).item() == pytest.approx(-2.22511043, abs=1e-8)
    assert found["accept"].item() == pytest.approx(1) and found["w_star"].item() == pytest.approx(1)


def test_enumeration_top_k():
    found = thirteen_strings("top_k=2")
    q, g, P = found["log_q"].exp(), found["target"], found["P"]
    order = [1, 0, 2, 3]  # the strings A, AB, BA, BB
    torch.testing.assert_close(
        q[order], exact([0.04651266, 0.56664017, 0.16462571, 0.22222147]), atol=5e-9, rtol=0
    )
    torch.testing.assert_close(
        g[order], exact([0.05234575, 0.63770183, 0.13190257, 0.17804984]), atol=5e-9, rtol=0
    )
    matrix = [
        [0.15794666, 0.56664017, 0.11720414, 0.15820904],
        [0.04651266, 0.67807417, 0.11720414, 0.15820904],
        [0.04651266, 0.56664017, 0.16462571, 0.22222147],
        [0.04651266, 0.56664017, 0.16462571, 0.22222147],
    ]
    torch.testing.assert_close(P[order][:, order], exact(matrix), atol=5e-9, rtol=0)
    flow = g[:, None] * P
    torch.testing.assert_close(flow, flow.T)  # detailed balance
    assert (found["log_q"] + found["log_kept"]).exp().sum().item() == pytest.approx(
        0.82264593, abs=5e-9
    )  # Z_g
    assert found["w_star"].item() == pytest.approx(1.12540880, abs=5e-9)
    assert found["accept"].item() == pytest.approx(0.92310524, abs=5e-9)
    assert found["spectrum"].tolist() == pytest.approx([1, 0.11143400, 0.11143400, 0], abs=5e-9)
    worst = [step[0] for step in found["steps"]]
    assert [worst[1], worst[2]] == pytest.approx([0.10560090, 0.01176753], abs=5e-9)
    assert worst[5] == pytest.approx(1.628e-5, abs=1e-8)
    assert all(
        step <= (1 - 1 / found["w_star"].item()) ** n + 1e-12 for n, step in enumerate(worst)
    )
    for n, r, log_p in (
        (0, 1.60206615, -2.23228795),
        (1, 1.60395548, -2.15313043),
        (2, 1.60416601, -2.14430959),
        (5, 1.60419238, -2.14320491),
    ):  # a chain that accepts all stays at step 0
        assert found["steps"][n][1:] == pytest.approx([r, log_p], abs=5e-9)
    ratio = (g / q).log()  # Eq. 4: log g / q = sum_t log Z_t - log Z_g
    torch.testing.assert_close(ratio, found["log_kept"] - math.log(0.82264593), atol=5e-9, rtol=0)
    assert (found["log_kept"] <= 0).all() and (
        found["log_q"] >= found["log_p_plus"]
    ).all()  # truncation at T = 1


@pytest.mark.parametrize(
    "spec, target, E_q, log_Z_g, w_star, accept, E_g",
    [
        (
            "top_k=2,temperature=1.5",
            "global",
            (1.54812707, -2.29200404),
            1.27868025,
            1.04965554,
            0.97139014,
            (1.54604619, -2.25884092),
        ),
        (
            "top_k=2,temperature=1.5",
            "aligned",
            (1.54812707, -2.29200404),
            None,
            1.31584888,
            0.83751127,
            (1.60419241, -2.14320338),
        ),
        (
            "top_p=0.8",
            "global",
            (1.59721338, -2.15966064),
            0.84539801,
            1.01204696,
            0.99261338,
            (1.59917603, -2.15220013),
        ),
        (
            "typical_p=0.6",
            "global",
            (1.65555571, -2.22298542),
            0.77958391,
            1.09748608,
            0.94022614,
            (1.66242304, -2.15282899),
        ),
        (
            "eta_cutoff=0.05",
            "global",
            (1.52790728, -2.17818752),
            0.94234406,
            1.02780490,
            0.98924375,
            (1.52554787, -2.18914466),
        ),
        (
            "min_p=0.25",
            "global",
            (1.58139684, -2.16888499),
            0.89928204,
            1.07702123,
            0.97020456,
            (1.57226188, -2.19968895),
        ),
        (
            "temperature=0.7",
            "global",
            (1.56711823, -2.14071138),
            0.55942805,
            1.29865165,
            0.91406464,
            (1.58657713, -2.05234658),
        ),
        (
            "temperature=0.7",
            "aligned",
            (1.56711823, -2.14071138),
            None,
            19.52713744,
            0.86187121,
            (1.45235589, -2.22511043),
        ),
        (
            "temperature=1.5",
            "global",
            (1.25489446, -2.33968667),
            1.85303779,
            1.13701557,
            0.93869269,
            (1.26410310, -2.38834334),
        ),
        (
            "temperature=1.5",
            "aligned",
            (1.25489446, -2.33968667),
            None,
            1.36094208,
            0.80018030,
            (1.45235589, -2.22511043),
        ),
    ],
)
def test_enumeration(spec, target, E_q, log_Z_g, w_star, accept, E_g):
    found = thirteen_strings(spec, target)
    expectations = lambda law: [(law @ found["r"]).item(), (law @ found["log_p"]).item()]
    assert expectations(found["log_q"].exp()) == pytest.approx(E_q, abs=5e-9)
    assert expectations(found["target"]) == pytest.approx(E_g, abs=5e-9)
    assert found["w_star"].item() == pytest.approx(w_star, abs=5e-8)
    assert found["accept"].item() == pytest.approx(accept, abs=5e-9)
    assert found["log_q"].exp().sum().item() == pytest.approx(1)
    if log_Z_g:
        assert (found["log_q"] + found["log_kept"]).exp().sum().item() == pytest.approx(
            log_Z_g, abs=5e-9
        )
    q, tau = found["log_q"].exp(), found["target"]  # Liu 1996: the spectrum from the weights alone
    order = (tau / q).argsort(descending=True)
    q, tau = q[order], tau[order]
    liu = [1] + [(q[k:] - tau[k:] / (tau / q)[k]).sum().item() for k in range(len(q) - 1)]
    assert sorted(found["spectrum"].tolist()) == pytest.approx(sorted(liu), abs=1e-9)


def test_temperature_leaves_the_released_target_where_it_is():
    """--target aligned is p_+ on the kept set; top-k's kept set has no temperature, Eq. 4 does."""
    one, other = (
        thirteen_strings(f"top_k=2,temperature={T}", "aligned")["target"] for T in (1.0, 1.5)
    )
    torch.testing.assert_close(one, other)
    assert (thirteen_strings("top_k=2,temperature=1.5")["target"] - one).abs().max() > 0.05


def test_trade_off_across_adaptors_of_the_aligned_world():
    """Between settings the two means correlate positively in this exactly aligned world."""
    local, globally = [], []
    for spec in (
        "ancestral_strict",
        "top_k=2",
        "top_k=3",
        "top_p=0.8",
        "top_p=0.95",
        "typical_p=0.6",
        "eta_cutoff=0.05",
    ):
        for T in (0.5, 0.75, 1.0, 1.25, 1.5):
            found = thirteen_strings(f"{spec},temperature={T}")
            for means, law in ((local, found["log_q"].exp()), (globally, found["target"])):
                means.append([(law @ found["log_p"]).item(), (law @ found["r"]).item()])
    assert imh.correlations(*np.array(local).T)[0] == pytest.approx(0.74244319, abs=5e-9)
    assert imh.correlations(*np.array(globally).T)[0] == pytest.approx(0.87409711, abs=5e-9)
    assert local[0] == pytest.approx([-2.070126, 1.624341], abs=1e-6)


def test_correlations():
    x, y = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])
    # ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4): 4.5 / sqrt(4.5 * 5)
    assert imh.correlations(x, y)[1] == pytest.approx(4.5 / math.sqrt(22.5))
    assert all(map(math.isnan, imh.correlations(x, np.ones(4))))


def test_interval_of_a_correlation():
    # One correlation: scipy's interval, which is Fisher's too.
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    oracle = scipy.stats.pearsonr(x, y)
    expected = [oracle.statistic, *oracle.confidence_interval()]
    assert imh.mean_correlation([oracle.statistic], [60]) == pytest.approx(expected, abs=1e-6)

    # Four of them: half as wide in z; what is nan or too small is left out.
    z = np.arctanh(imh.mean_correlation([0.5], [103]))
    four = np.arctanh(imh.mean_correlation([0.5] * 4 + [math.nan, 1.0], [103] * 5 + [3]))
    assert four[2] - four[0] == pytest.approx((z[2] - z[0]) / 2)
    assert np.isnan(imh.mean_correlation([math.nan], [50])).all()


def test_the_claim_follows_the_correlation():
    where = "in the tiny world, model m,"
    for values, sizes, words in (
        ([-0.9, -0.8], [100, 100], "holds"),
        ([0.5, 0.4], [100, 100], "does not hold"),
        ([-0.9], [3], "too few to tell"),  # three corpora
        ([0.1], [30], "too few to tell"),
        ([math.nan], [100], "too few to tell"),  # greedy: all corpora are the same
    ):
        paper, shown = imh.claim(values, sizes, where)
        assert "typical corpora" in paper and shown.startswith(f"{words}: {where} ")
        assert shown.endswith("])")
    assert "; of m2, +0.33 (" in imh.claim([-0.9], [50], where, "; of m2, +0.33")[1]


def test_the_dpo_run_beside_a_run(tmp_path):
    """It is looked at only where it is a finished run on the tiny world."""
    args = imh.replace(imh.PRESETS["tiny"], out=str(tmp_path / "imh"), resume=True)
    assert imh.dpo_options(args) is None
    (tmp_path / "dpo" / "model").mkdir(parents=True)
    config = tmp_path / "dpo" / "config.json"
    config.write_text(json.dumps({"data": "hh", "beta": 0.1}))
    assert imh.dpo_options(args) is None
    config.write_text(json.dumps({"data": "tiny", "beta": 0.2}))
    found = imh.dpo_options(args)
    assert found.beta == 0.2 and found.model == str(tmp_path / "dpo") and not found.resume
    assert imh.all_settings(found.sampling_types, found.temperatures) == [imh.PLAIN]


def test_the_main_figure_and_its_claim(tmp_path, capsys, pictures):
    """Drawn from two imh.json alone, one with Eq. 1 and one without."""
    rng = np.random.default_rng(0)
    common.setup(0)
    args = imh.replace(imh.PRESETS["tiny"], out=str(tmp_path / "imh"))
    options = imh.exact_options(args), imh.replace(args, out=str(tmp_path / "imh-dpo"))
    for one, slope in zip(options, (-0.5, 0.5)):
        log_p = rng.normal(size=100)
        points = np.stack([log_p, slope * log_p, 0 * log_p, 0 * log_p], 1).tolist()
        corpora = {"local": points, "chain": points, "typical": points}
        zeros = [[0.0] * 4] * 3
        record = imh.Record(imh.PLAIN, "global", 1, 20, *zeros, r_typ=2 * slope, n_typ=100)
        record.corpora = corpora
        Path(one.out).mkdir()
        Path(one.out, "imh.json").write_text(json.dumps([dataclasses.asdict(record)]))
    Path(args.out).mkdir()
    imh.conclude(args, *options)
    lines = (tmp_path / "imh" / "claim.txt").read_text().splitlines()
    assert lines[1].startswith("here:  holds: in the tiny world, of its exact posterior,")
    assert "+1.00 (-1.00 [-1.00, -1.00])" in lines[1]
    assert (tmp_path / "imh" / "figures" / "tradeoff.png").stat().st_size > 10_000
    assert "why not of DPO" in capsys.readouterr().out


def test_toy_prints_the_published_numbers(tmp_path, capsys):
    found = imh.toy(Args(out=str(tmp_path)))
    assert found["strings"] == (
        1000,
        pytest.approx(0.48555634, abs=1e-8),
        pytest.approx(0.42737101, abs=1e-8),
    )
    assert found["corpora"][1:] == pytest.approx([-0.1205, -0.1198], abs=5e-5)
    assert found["typical corpora"] == (
        213,
        pytest.approx(-0.81572708, abs=1e-7),
        pytest.approx(-0.79757275, abs=1e-7),
    )
    assert found["typical, stratified"][1:] == pytest.approx([-0.92153421, -0.92460644], abs=1e-8)
    assert "5.0053" in capsys.readouterr().out
    names = {path.name for path in Path(f"{tmp_path}-toy/figures").iterdir()}
    assert names == {"toy-distributions.png", "toy-string-correlation.png", "toy-correlations.png"}


# The commands, on a small random model; the aligned model is the prior, scaled and shifted.
SETTINGS = dict(
    sampling_types=("ancestral_strict", "top_k=20", "top_p090", "greedy"),
    temperatures=(0.7, 1.0),
    prompts=6,
    samples=4,
    max_length=50,
    batch_size=8,
    chain_length=200,
    corpus_size=20,
)


@pytest.fixture(scope="module")
def models(blank, tmp_path_factory):
    aligned = tmp_path_factory.mktemp("aligned")
    prior = common.AutoModelForCausalLM.from_pretrained(blank / "model")
    torch.manual_seed(1)
    for weight in prior.parameters():
        weight.data += 0.5 * weight.std().nan_to_num(0.0) * torch.randn_like(weight)
    prior.get_output_embeddings().weight.data *= 8  # far from uniform, so that adaptors keep little
    prior.save_pretrained(aligned)
    common.load_tokenizer(str(blank / "model")).save_pretrained(aligned)
    data = aligned / "test.jsonl"  # so named, it is a test split as a whole
    data.write_bytes((blank / "pairs.jsonl").read_bytes())
    return dict(model=str(aligned), ref_model=str(blank / "model"), data=str(data))


@pytest.fixture(scope="module")
def scored(models, tmp_path_factory):
    args = Args(**SETTINGS, **models, out=str(tmp_path_factory.mktemp("run") / "run"))
    imh.generate(args)
    imh.score(args)
    return args


def read(args, kind):
    return {
        path.name: [
            row for chunk in sorted(path.glob("*.json")) for row in json.loads(chunk.read_text())
        ]
        for path in sorted(Path(args.out, kind).glob("*/"))
    }


def test_generate_stores_what_was_drawn(scored):
    samples, scores = read(scored, "samples"), read(scored, "scores")
    assert len(samples) == 7 and {len(rows) for rows in samples.values()} == {24}
    for row in samples[
        "greedy"
    ]:  # once, whatever the temperatures; no token is likelier than the drawn one
        assert row["log_q"] == [0.0] * len(row["ids"])
    model = common.load_model(scored.model)
    tokenizer = common.load_tokenizer(scored.model)
    end, V = tokenizer.eos_token_id, len(tokenizer)
    for spec in samples:
        for row, sums in zip(samples[spec][:4], scores[spec][:4]):
            assert end not in row["ids"][:-1] and len(row["ids"]) == len(row["log_q"]) == len(
                row["log_kept"]
            )
            logits = model(torch.tensor([row["prompt_ids"] + row["ids"]])).logits[
                0, len(row["prompt_ids"]) - 1 : -1
            ]
            log_q, log_kept = library(
                logits, parse_adaptor(spec)
            )  # teacher forcing and the library's processors
            ids = torch.tensor(row["ids"])[:, None]
            torch.testing.assert_close(
                log_q.gather(1, ids)[:, 0], torch.tensor(row["log_q"]), atol=1e-4, rtol=0
            )
            torch.testing.assert_close(log_kept, torch.tensor(row["log_kept"]), atol=1e-4, rtol=0)
            full = logits.log_softmax(-1).gather(1, ids).sum().item()
            assert sums["log_aligned"] == pytest.approx(full, abs=1e-3)
            # scoring under the adaptor finds what was drawn, and no token outside the kept set
            packed = dict(prompt_ids=row["prompt_ids"], responses=[row["ids"]])
            batch = common.pack_pairs([packed], 10**6, 0, 1)[0]
            rescored = imh.adaptor_logps(model, batch, [parse_adaptor(spec)], V)[1]
            assert rescored.isfinite().all()
            assert sums["log_q"] == pytest.approx(rescored.sum().item(), abs=1e-3)
            # Eq. 2 and 3: log a - log q = sum_t log Z_t
            T = parse_adaptor(spec).get("temperature", 1)
            log_w = sums["log_aligned"] / T - sums["log_q"]
            assert log_w == pytest.approx(sums["log_kept"], abs=1e-3)


def test_scores_do_not_depend_on_the_batch(scored, models):
    """Each response alone in its batch, the prior by the library, adaptors in the same pass."""
    rows, prior = (
        read(scored, "scores")["top_p090,temperature=1"][:3],
        common.load_model(models["ref_model"]),
    )
    aligned, samples = (
        common.load_model(models["model"]),
        read(scored, "samples")["top_p090,temperature=1"],
    )
    for row, sample in zip(rows, samples):
        ids, n = torch.tensor([sample["prompt_ids"] + sample["ids"]]), len(sample["prompt_ids"])
        target = torch.tensor(sample["ids"])[:, None]
        log_p = prior(ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, target).sum().item()
        assert row["log_prior"] == pytest.approx(log_p, abs=1e-3)
        packed = dict(prompt_ids=sample["prompt_ids"], responses=[sample["ids"]])
        batch = common.pack_pairs([packed], 10**6, 0, 1)[0]
        specs = ("top_k=20", "top_p=0.5")
        also = imh.adaptor_logps(aligned, batch, specs, len(common.load_tokenizer(models["model"])))
        for spec, value in zip(specs, also[1:].sum(1).tolist()):
            expected = (
                library(aligned(ids).logits[0, n - 1 : -1], parse_adaptor(spec))[0]
                .gather(1, target)
                .sum()
                .item()
            )
            assert value == pytest.approx(expected, abs=1e-3)
        assert row["implicit"] == pytest.approx(
            scored.beta * (row["log_aligned"] - log_p), abs=1e-3
        )
        assert row["reward"] == common.tiny_reward(row["prompt"], sample["text"])


def test_imh_and_figures(scored, capsys):
    records = {x.setting: x for x in imh.imh(scored)}
    table = capsys.readouterr().out
    assert all(spec in table for spec in records) and "accept" in table
    for x in records.values():
        assert 1 / 4 <= x.ess <= 1 and x.prompts == 6
        # 6 chains of 100 kept states around the limit: 5 standard errors from the spread of strings
        spread = 5 * math.sqrt(
            np.var(np.array(x.corpora["chain"])[:, 0]) * scored.corpus_size * 6 / 600
        )
        assert x.chain[0] == pytest.approx(x.snis[0], abs=spread)
    plain = records["ancestral_strict,temperature=1"]
    assert plain.accept == pytest.approx(1, abs=5e-3) and plain.ess == pytest.approx(1, abs=1e-3)
    imh.figures(scored)
    assert "Pearson" in capsys.readouterr().out
    names = {path.name for path in Path(scored.out, "figures").iterdir()}
    assert names == {"correlations.png", "correlations_dpo_secret.png"}


def test_burn_in(scored):
    """The last of 200 states alone, and all of them: the same chain, other states of it."""
    last = imh.imh(imh.replace(scored, burn_in=199))[0]
    rows = read(scored, "scores")["ancestral_strict,temperature=0.7"]
    six = last.chain[0] * 6  # one state per prompt, so their sum is one of the sums of six strings
    prompts = sorted({x["prompt"] for x in rows})
    pools = [[x["log_prior"] for x in rows if x["prompt"] == prompt] for prompt in prompts]
    sums = np.array([0.0])
    for pool in pools:
        sums = np.add.outer(sums, pool).ravel()
    assert np.abs(sums - six).min() < 1e-6
    whole, most = (imh.imh(imh.replace(scored, burn_in=n))[0].chain[0] for n in (0, 1))
    first = 200 * whole - 199 * most  # the mean of the six first states
    assert np.abs(sums - 6 * first).min() < 1e-6


def test_accept_all_as_released(scored):
    """The released accept test is a tuple: its chain holds every draw, a bootstrap of the draws."""
    spec = "ancestral_strict,temperature=0.7"
    fixed = {x.setting: x for x in imh.imh(scored)}[spec]
    log_p = np.array([row["log_prior"] for row in read(scored, "scores")[spec]])
    corpus = imh.read_corpora(scored)[spec]
    log_w = imh.log_weights(corpus, 0.7, "global", scored.beta)
    rng, accepted, means = np.random.default_rng(0), [], []
    for pool in imh.pools_of(corpus.prompts, pooled=False):
        draws = pool[rng.integers(len(pool), size=200)]
        states = released.imh_states(log_w[draws].tolist(), rng.random(200).tolist())
        accepted.append(np.mean(np.array(states)[1:] == np.arange(1, 200)))
        means.append(log_p[draws[states[100:]]].mean())
    print(f"accepted {np.mean(accepted):.3f} as released, {fixed.accept:.3f} by Eq. 5")
    print(f"mean log p {np.mean(means):.2f} as released, {fixed.chain[0]:.2f} by Eq. 5")
    print(f"and {log_p.mean():.2f} of the draws")
    assert np.mean(accepted) == 1.0 and fixed.accept < 0.9
    # the local means again, 5 standard errors of 600 states
    error = 5 * math.sqrt(np.var(log_p) / 600)
    assert np.mean(means) == pytest.approx(fixed.local[0], abs=error)
    assert abs(fixed.chain[0] - fixed.local[0]) > 2 * error
    assert released.imh_accepts(-5.0, 0.0, 0.999)  # a ratio of exp(-5)
    held = imh_chain(torch.tensor([0.0, -5.0]), torch.tensor([0.5, 0.999]).log())
    assert held.tolist() == [0, 0]


def test_targets(scored, models):
    """log w by hand from the stored sums; pooled chains have one pool."""
    rows = read(scored, "scores")["top_p090,temperature=0.7"]
    for target, numerator in (
        ("global", lambda x: x["log_aligned"] / 0.7),
        ("aligned", lambda x: x["log_aligned"]),
        ("posterior", lambda x: x["log_prior"] + x["reward"] / scored.beta),
    ):
        found = imh.imh(imh.replace(scored, target=target, pooled=True))
        x = next(x for x in found if x.setting == "top_p090,temperature=0.7")
        log_w = exact([numerator(row) - row["log_q"] for row in rows])
        w_bar = log_w.softmax(0)
        assert x.prompts == 1 and x.ess == pytest.approx(1 / (24 * w_bar.square().sum().item()))
        mean = (w_bar @ exact([row["log_prior"] for row in rows])).item()
        assert x.snis[0] == pytest.approx(mean, abs=1e-6)
        assert x.log_Z == pytest.approx((log_w.logsumexp(0) - math.log(24)).item(), abs=1e-6)
    with pytest.raises(ValueError, match="unknown target"):
        imh.imh(imh.replace(scored, target="nonsense"))


EXACT = (
    "ancestral_strict,temperature=0.5",
    "ancestral_strict,temperature=1",
    "ancestral_strict,temperature=1.5",
    "top_k=5,temperature=1",
    "top_p090,temperature=1",
    "typical_p=0.5,temperature=1",
    "greedy",
)


def test_exact_posterior_of_the_tiny_language_model(tmp_path, capsys):
    """Eq. 1 string by string; IMH from local draws reaches the exact global means; the trade-off.

    Three prompts of 128 draws each, 600 strings per setting; 5 standard errors, seeded.
    """
    args = Args(out=str(tmp_path), max_length=128, chain_length=2000)
    found = imh.exact(args, prompts=3, support=128, draws=200, settings=EXACT)
    assert "error of Eq. 1" in capsys.readouterr().out
    records = {x.setting: x for x in imh.imh(args)}
    rows = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("scores/*/*.json")
    }
    means = {spec: imh.mean_values(values) for spec, values in found.items()}
    for spec, values in found.items():
        x = records[spec]
        assert max(one.error for one in values) < 1e-10  # float64 throughout
        for one in values:
            assert one.log_q.exp().sum().item() == pytest.approx(1, abs=1e-9)
        T = parse_adaptor(spec).get("temperature", 1)
        for row in rows[spec]:
            identity = row["log_prior"] + row["reward"] / 0.5 - row["log_aligned"] - row["log_Z"]
            assert abs(identity) < 1e-10  # Eq. 1, string by string
            assert (
                abs(row["log_aligned"] / T - row["log_q"] - row["log_kept"]) < 1e-10
            )  # Eq. 2 and 3
        for i, k in enumerate(("log_prior", "reward")):
            spread = np.std([row[k] for row in rows[spec]])
            assert x.local[i] == pytest.approx(
                means[spec][i], abs=5 * spread / math.sqrt(600) + 1e-9
            )
            se = 5 * spread / math.sqrt(600 * x.ess) + 1e-9
            assert x.snis[i] == pytest.approx(means[spec][2 + i], abs=se)
            # 5700 states of the chains; one in (2 - a) / a is new where a share a is accepted
            tau = (2 - x.accept) / x.accept
            assert x.chain[i] == pytest.approx(
                means[spec][2 + i], abs=se + 5 * spread * math.sqrt(tau / 5700)
            )
        assert x.accept_limit == pytest.approx(means[spec][5], abs=0.05)
    plain = records["ancestral_strict,temperature=1"]
    assert means["ancestral_strict,temperature=1"][4] == pytest.approx(0, abs=1e-12)
    assert plain.r_typ < -0.9 < plain.r_all < 0  # typical corpora sharpen the trade-off
    gains, rewards = [], []
    for row in rows["ancestral_strict,temperature=1"]:
        gains.append(row["log_aligned"] - row["log_prior"] + row["log_Z"])
        rewards.append(row["reward"])
    slope = np.cov(gains, rewards)[0, 1] / np.var(gains, ddof=1)
    assert slope == pytest.approx(0.5, abs=1e-9)  # beta, once log Z(x) is known
    # the temperature moves the local means less than the global ones, and q differs from g
    cold = means["ancestral_strict,temperature=0.5"]
    assert cold[3] > cold[1] and cold[5] < 0.9


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The exact posterior as the default run shows it."""
    out = str(tmp_path_factory.mktemp("exact") / "run")
    args = imh.replace(imh.PRESETS["tiny"], model="exact posterior", out=out)
    return args, imh.exact(args), imh.imh(args)


def test_the_default_run_shows_the_trade_off(default_run, capsys):
    """Strings -.83, typical corpora of a setting -.99, settings -.81 drawn and +.03 after IMH.

    The bands are for tiny models that were trained on other machines.
    """
    args, found, records = default_run
    assert len(found) == len(records) == 12
    assert max(one.error for values in found.values() for one in values) < 5e-14
    assert np.mean([x.r_typ for x in records]) == pytest.approx(-0.99, abs=0.02)
    assert np.mean([x.strings[0] for x in records]) == pytest.approx(-0.86, abs=0.1)
    local, chain = np.array([x.local for x in records]), np.array([x.chain for x in records])
    assert imh.correlations(local[:, 0], local[:, 1])[0] == pytest.approx(-0.81, abs=0.1)
    assert imh.correlations(chain[:, 0], chain[:, 1])[0] == pytest.approx(0.03, abs=0.2)
    means = np.array([imh.mean_values(values) for values in found.values()])
    assert imh.correlations(means[:, 0], means[:, 1])[0] == pytest.approx(-0.754, abs=0.1)  # q
    assert imh.correlations(means[:, 2], means[:, 3])[0] == pytest.approx(0.073, abs=0.2)  # g
    assert "as the paper finds" in imh.what_is_seen(records)
    imh.figures(args)
    printed = capsys.readouterr().out
    strings = float(re.search(r"strings as drawn Pearson (\S+),", printed)[1])
    assert strings == pytest.approx(-0.83, abs=0.1)
    names = {path.name for path in Path(args.out, "figures").iterdir()}
    assert names == {"correlations.png", "correlations_dpo_secret.png"}


def test_what_is_seen_says_so_where_it_is_the_opposite(default_run):
    _, _, records = default_run
    turned = []
    for x in records:
        local = [-x.local[0], *x.local[1:]]
        turned.append(imh.replace(x, r_typ=-x.r_typ, local=local))
    assert "not the paper's trade-off" in imh.what_is_seen(turned)
    assert "the means of the" in imh.what_is_seen(turned)
    one = imh.what_is_seen(turned[:1])  # of one setting there is no correlation between settings
    assert "nan" not in one and "the means of the" not in one


def test_log_Z_two_ways(models, tmp_path):
    """Eq. 1's Z(x) by weighted draws from the prior and from another model: they must agree."""
    estimates = []
    for model in (models["ref_model"], models["model"]):
        args = Args(
            **{**models, "model": model},
            **{**SETTINGS, "sampling_types": ("ancestral_strict",)},
            beta=20.0,
        )
        args = imh.replace(
            args,
            temperatures=(1.0,),
            prompts=2,
            samples=300,
            max_length=46,
            batch_size=600,
            out=str(tmp_path / Path(model).name),
            target="posterior",
            pooled=True,
        )
        imh.generate(args)
        imh.score(args)
        estimates.append(imh.imh(args)[0])
    errors = [math.sqrt((1 / x.ess - 1) / 600) for x in estimates]  # of log Z, by the delta method
    error = 5 * math.hypot(*errors)
    assert estimates[0].log_Z == pytest.approx(estimates[1].log_Z, abs=error)
    assert errors[0] < 0.01 and estimates[0].ess > 0.9


def test_reward_model(scored, tmp_path, models):
    """A sequence classification model with one output judges prompt + response; others may not."""
    config = transformers.AutoConfig.from_pretrained(models["ref_model"], num_labels=1)
    torch.manual_seed(0)
    judge = transformers.AutoModelForSequenceClassification.from_config(config)
    tokenizer = common.load_tokenizer(models["ref_model"])
    for folder, outputs in (("judge", 1), ("two", 2)):
        if outputs == 2:
            judge = transformers.AutoModelForSequenceClassification.from_config(
                transformers.AutoConfig.from_pretrained(models["ref_model"], num_labels=2)
            )
        judge.config.pad_token_id = tokenizer.eos_token_id
        judge.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "judge"
    ).eval()
    rows = rescore(scored, tmp_path, reward=str(tmp_path / "judge"))["top_p090,temperature=1"]
    samples = read(scored, "samples")["top_p090,temperature=1"]
    for row, sample in list(zip(rows, samples))[:4]:
        ids = tokenizer(sample["prompt"] + sample["text"], return_tensors="pt").input_ids
        assert row["reward"] == pytest.approx(judge(ids).logits.item(), abs=1e-5)
    assert len({row["reward"] for row in rows}) > 10
    for name in ("two", models["ref_model"]):
        with pytest.raises(SystemExit, match="not a reward model"):
            imh.score(
                imh.replace(scored, reward=str(tmp_path / name), out=scored.out, overwrite=True)
            )


def test_presets_of_seven_billion_fail_in_one_line(tmp_path):
    """Complete settings, and offline one line that names what is missing and the remedy."""
    assert (
        len(imh.PRESETS["rlhf"].sampling_types) == 8 and len(imh.PRESETS["dpo"].temperatures) == 5
    )
    for preset, model in (
        ("rlhf", "ethz-spylab/rlhf-7b-harmless"),
        ("dpo", "kaist-ai/janus-dpo-7b"),
    ):
        done = run(
            ROOT / "methods/imh_adaptors.py",
            "generate",
            preset,
            "--out",
            tmp_path / preset,
            check=False,
        )
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(model) and "give a local folder" in last
        assert "Traceback" not in done.stderr and not (tmp_path / preset).exists()


def rescore(scored, tmp_path, **flags):
    """The same samples, scored with other flags."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").symlink_to(Path(scored.out, "samples"))
    args = imh.replace(scored, out=str(tmp_path / "run"), **flags)
    imh.score(args)
    return read(args, "scores")


def test_implicit_reward_and_the_released_sign(scored, tmp_path):
    ours = rescore(scored, tmp_path, reward="implicit")
    for rows in ours.values():
        for a in rows:
            theirs = released.secret_reward(a["log_prior"], a["log_aligned"])
            assert a["reward"] == a["implicit"]
            assert a["reward"] == pytest.approx(-scored.beta * theirs, abs=1e-9)
    print(f"implicit reward {a['reward']:.3f} by Eq. 1, {scored.beta * theirs:.3f} as released")


def test_unconditional_prior_as_released(scored, models):
    """The released prior reads the response alone; ours reads the prompt before it."""
    prior = common.load_model(models["ref_model"])
    tokenizer = common.load_tokenizer(models["ref_model"])
    samples = read(scored, "samples")["top_k=20,temperature=1"]
    scores = read(scored, "scores")["top_k=20,temperature=1"]
    for row, sample in list(zip(scores, samples))[:3]:
        n = len(sample["ids"])
        both = []
        for ids in (
            sample["prompt_ids"] + sample["ids"],
            released.unconditional_ids(sample["prompt_ids"], sample["ids"], tokenizer.bos_token_id),
        ):
            log_p = prior(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
            both.append(log_p.gather(1, torch.tensor(sample["ids"])[:, None]).sum().item())
        print(f"log p {both[0]:.2f} given the prompt, {both[1]:.2f} as released")
        assert row["log_prior"] == pytest.approx(both[0], abs=1e-3)
        assert abs(both[0] - both[1]) > 0.01


def test_one_pass_over_a_model_and_one_normaliser(scored, models):
    """Packed attention is readied once; logits beyond the tokenizer belong to no token."""
    model, passes = common.load_model(scored.model), []
    batch = common.pack_pairs(
        [dict(prompt_ids=[1, 2, 3], responses=[[4, 5, 6], [7, 8]])], 1000, 0, 1
    )[0]
    imh.adaptor_logps(model, batch, [], 400)
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    log_p = imh.adaptor_logps(model, batch, [], 300)[0]
    assert len(passes) == 1
    for ids, ours in (([4, 5, 6], log_p[:3]), ([7, 8], log_p[3:])):
        logits = model(torch.tensor([[1, 2, 3, *ids]])).logits[0, 2:-1, :300].double()
        naive = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(ours, naive, atol=1e-4, rtol=0)


def test_clamped_log_q_as_released(scored):
    """A token outside the kept set costs 25 nats there; here such a response has no weight."""
    model = common.load_model(scored.model)
    packed = dict(prompt_ids=[1, 2, 3], responses=[list(range(4, 20))])
    batch = common.pack_pairs([packed], 1000, 0, 1)[0]
    log_q = imh.adaptor_logps(model, batch, [dict(top_k=1)], 400)[1]
    outside = int((log_q == -INF).sum())
    theirs = released.clamped_log_q(log_q.tolist())
    print(f"log q {log_q.sum().item()} here, {theirs:.1f} as released, {outside} tokens outside")
    assert outside > 10 and log_q.sum() == -INF
    assert theirs == pytest.approx(-25.0 * outside, abs=1e-6)
    rows = read(scored, "scores")["ancestral_strict,temperature=1"][:2]
    corpus = imh.make_corpus([rows[0], rows[1] | {"log_q": -INF}])
    assert imh.log_weights(corpus, 1, "global", 0.5).tolist()[1] == -INF
    # clamped at 25, the likely tokens of a real response are as they were
    sample = read(scored, "samples")["ancestral_strict,temperature=0.7"][0]
    if min(sample["log_q"]) > -25:
        assert released.clamped_log_q(sample["log_q"]) == pytest.approx(math.fsum(sample["log_q"]))


def released_csvs(folder, drop=None):
    """Files as the authors' scripts name them: three settings, 40 strings, NLLs that are known."""
    rng, start = (
        np.random.default_rng(0),
        "some-model_l256_promptseed42_numprompt1000_numgenerations2_",
    )
    for kind, T in (("top_p090", 1.0), ("top_p090", 1.5), ("ancestral_strict", 1.0)):
        rows = []
        for i in range(40):
            p_plus, text = 20 + 30 * rng.random(), ["NA", "null", "", f"answer {i}"][min(i, 3)]
            rows.append(
                dict(
                    prompt=f"question {i // 2}",
                    generated_text=text,
                    score=rng.normal(),
                    negative_log_probability=p_plus + 19.0,
                    original_negative_log_probability=p_plus,
                    samplingbiased_negative_log_probability=p_plus - 2 * rng.random(),
                )
            )
        for end, columns in (
            ("scoredreward_humanassistant_includeprompt", ["score"]),
            ("scorednll", ["negative_log_probability"]),
            (
                f"scoredcorrectionnll_{kind}_{T}_humanassistant_includeprompt_conditioned",
                ["original_negative_log_probability", "samplingbiased_negative_log_probability"],
            ),
        ):
            with open(
                folder / f"{start}{kind}_t{T}_humanassistant_{end}.csv", "w", newline=""
            ) as file:
                columns = ["prompt", "generated_text", *(c for c in columns if c != drop)]
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


def test_released_csvs(tmp_path):
    released_csvs(tmp_path)
    args = Args(
        csv=str(tmp_path),
        out=str(tmp_path),
        beta=1.0,
        target="aligned",
        pooled=True,
        chain_length=300,
    )
    corpora = imh.read_corpora(args)
    assert {
        spec: len(corpus.prompts) for spec, corpus in corpora.items()
    } == dict.fromkeys(  # "NA" and "null" are texts
        [
            "ancestral_strict,temperature=1.0",
            "top_p090,temperature=1.0",
            "top_p090,temperature=1.5",
        ],
        39,
    )
    for corpus in corpora.values():  # + log p_+ - log p, and the negative as released
        assert corpus.implicit == pytest.approx(np.full(39, 19.0))
        theirs = released.secret_reward(corpus.log_prior, corpus.log_aligned)
        assert theirs == pytest.approx(np.full(39, -19.0))
    (tmp_path / "notes_scored.csv").write_text("not,of,the,grid\n")  # other files are left alone
    path = next(tmp_path.glob("*top_p090_t1.5*_scorednll.csv"))
    lines = path.read_text().splitlines()  # scores that are no numbers, or infinite, are left out
    lines[5:7] = [lines[5].rpartition(",")[0] + ",", lines[6].rpartition(",")[0] + ",inf"]
    path.write_text("\n".join(lines) + "\n")
    assert len(imh.read_corpora(args)["top_p090,temperature=1.5"].prompts) == 37
    found = imh.imh(imh.replace(args, out=str(tmp_path / "new" / "folder")))
    assert all(0 < x.accept < 1 and math.isfinite(x.snis[0]) for x in found)
    imh.figures(
        imh.replace(args, out=str(tmp_path / "new" / "folder"), target="global")
    )  # says what imh was run with


def test_bad_csvs(tmp_path):
    args = Args(csv=str(tmp_path), out=str(tmp_path))
    with pytest.raises(SystemExit, match="needs CSVs"):
        imh.imh(args)
    for command in ("all", "exact", "generate"):  # they would make scores of their own
        with pytest.raises(SystemExit, match="--csv"):
            imh.main(args, command)
    released_csvs(tmp_path, drop="samplingbiased_negative_log_probability")
    with pytest.raises(
        SystemExit, match=r"conditioned.csv:2: no column 'samplingbiased_negative_log_probability'"
    ):
        imh.imh(args)


def test_bad_input(models, scored, tmp_path):
    with pytest.raises(SystemExit, match="no scores; first run generate"):
        imh.imh(Args(out=str(tmp_path / "none")))
    with pytest.raises(SystemExit, match="no imh.json"):
        imh.figures(Args(out=str(tmp_path / "none")))
    with pytest.raises(SystemExit, match="first run generate"):
        imh.score(Args(**models, out=str(tmp_path / "none")))
    with pytest.raises(SystemExit, match="burn-in"):
        imh.main(imh.replace(scored, burn_in=200), "imh")
    with pytest.raises(SystemExit, match="0 < top_k <= "):
        imh.generate(imh.replace(scored, sampling_types=("top_k=9999",), out=str(tmp_path / "k")))
    with pytest.raises(SystemExit, match="max-prompt-length"):
        imh.generate(imh.replace(scored, max_prompt_length=2, out=str(tmp_path / "p")))
    with pytest.raises(SystemExit, match="holds a run"):
        imh.generate(scored)
    other = common.AutoTokenizer.from_pretrained(models["model"])
    other.add_tokens(["surprise"])
    model = common.AutoModelForCausalLM.from_pretrained(models["model"])
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="different vocabularies"):
        imh.score(imh.replace(scored, ref_model=str(tmp_path / "other"), overwrite=True))
    folder = tmp_path / "run/samples/top_k=5,temperature=1"
    folder.mkdir(parents=True)
    row = dict(prompt="a", prompt_ids=[1, 2], ids=[], text="", log_q=[], log_kept=[])
    (folder / "00000.json").write_text(json.dumps([row]))
    with pytest.raises(SystemExit, match="00000.json: row 0: no response"):
        imh.score(imh.replace(scored, out=str(tmp_path / "run")))
    assert not list((tmp_path / "run/scores").glob("*/*"))  # nothing half-written


def test_killed_runs_continue(models, scored, tmp_path):
    """Killed after some chunks and resumed, and on two processes: the same bytes as in one go."""
    flags = [
        x
        for name, value in {**models, **SETTINGS}.items()
        for x in ("--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [value]))
    ]
    killed, two, method = tmp_path / "killed", tmp_path / "two", ROOT / "methods/imh_adaptors.py"
    whole = Path(scored.out)
    for command, kind, function in (
        ("generate", "samples", imh.generate),
        ("score", "scores", imh.score),
    ):
        process = begin(method, command, *flags, "--out", killed)
        while process.poll() is None and len(list(killed.glob(f"{kind}/*/*.json"))) < 3:
            time.sleep(0.01)
        process.kill()
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in killed.glob(f"{kind}/*/*.json")}
        assert 3 <= len(before)
        function(imh.replace(scored, out=str(killed), resume=True))
        assert all(
            path.stat().st_mtime_ns == t for path, t in before.items()
        )  # kept, not made again
        run(method, command, *flags, "--out", two, processes=2)
        chunks = {
            path.relative_to(whole): path.read_bytes() for path in whole.glob(f"{kind}/*/*.json")
        }
        assert len(chunks) == 21
        for other in (killed, two):
            found = {
                path.relative_to(other): path.read_bytes()
                for path in other.glob(f"{kind}/*/*.json")
            }
            assert found == chunks
    with pytest.raises(SystemExit, match="seed 0 -> 1"):
        imh.generate(imh.replace(scored, out=str(killed), resume=True, seed=1))
    imh.imh(imh.replace(scored, out=str(two)))


# Numbers out of range, and sizes.


def numeric_options(args):
    """Every option that is a number or a tuple of numbers: its name and default."""
    for option in dataclasses.fields(args):
        default = getattr(args, option.name)
        first = default[0] if isinstance(default, tuple) else default
        if isinstance(first, int | float) and not isinstance(first, bool):
            yield option.name, default


BAD_NUMBERS = [
    (name, bad)
    for name, default in numeric_options(Args())
    for bad in (math.nan, INF, -INF, -1, 10**12, *[()] * isinstance(default, tuple))
]
ZERO = ("temperatures", "prompts", "samples", "beta", "chain_length", "corpus_size", "eps")
BAD_NUMBERS += [(name, 0) for name in (*ZERO, "max_length", "max_prompt_length", "batch_size")]
BAD_NUMBERS += [("chain_length", 1), ("burn_in", 1000), ("max_length", 1)]


def refused(args, command="all"):
    """The line that ends main before anything is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        for function in ("setup", "load_tokenizer", "load_prompts", "toy", "generate", "imh"):
            patch.setattr(imh, function, None)
        with pytest.raises(SystemExit) as stop:
            imh.main(args, command)
    message = str(stop.value)
    assert "\n" not in message and len(message) <= 200
    return message


@pytest.mark.parametrize("name, bad", BAD_NUMBERS)
def test_numbers_out_of_range_are_one_line(name, bad, tmp_path):
    if name == "temperatures" and bad != ():
        bad = (1.0, bad)
    args = imh.replace(Args(out=str(tmp_path / "run")), **{name: bad})
    assert refused(args).startswith("--" + name.replace("_", "-"))
    assert not list(tmp_path.iterdir())


def test_options_that_say_nothing_are_one_line():
    assert "give one at least" in refused(Args(sampling_types=()))
    assert "needs {}" in refused(Args(template="Human:"))


def test_the_numbers_of_the_presets_are_in_range():
    assert len({name for name, _ in BAD_NUMBERS}) == 13
    for args in imh.PRESETS.values():
        imh.check(args, "all")


def small_machine(monkeypatch):
    """8 GiB of memory."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**21}
    monkeypatch.setattr(common.os, "sysconf", sizes.get)


@pytest.mark.parametrize(
    "flags, size",
    [
        (dict(chain_length=10**9), "1 chains would take 64,000,000,000 bytes"),
        (dict(corpus_size=10**9), "1000 corpora would take 40,000,000,000,000 bytes"),
        (dict(corpus_size=250_000), "1000 corpora would take 10,000,000,000 bytes"),
        (dict(max_length=2**30), "uniforms of 64 responses would take 549,755,813,888 bytes"),
        (dict(samples=10**6, max_length=2000), "of 1000000 responses would take 16,000,000,000"),
    ],
)
def test_sizes_beyond_the_memory_are_one_line(flags, size, monkeypatch):
    small_machine(monkeypatch)
    message = refused(Args(**flags))
    assert size in message and "of 8,589,934,592 here; choose less" in message


def test_chains_beyond_the_memory_are_one_line(scored, tmp_path, monkeypatch):
    """Six prompts, so six chains, unless they are pooled: 384 bytes a step."""
    small_machine(monkeypatch)
    long = imh.replace(scored, chain_length=24_000_000, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="6 chains would take 9,216,000,000 bytes"):
        imh.generate(long)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="6 chains would take 9,216,000,000 bytes"):
        imh.imh(imh.replace(long, out=scored.out))
    imh.check_chains(long, 5)


MEASURED = """
import resource, sys
sys.path[:0] = [{methods!r}]
import numpy as np
import imh_adaptors as imh
rng = np.random.default_rng(0)
log_w = rng.normal(size=4000)
pools = [np.arange(4 * i, 4 * i + 4) for i in range(1000)]
values = rng.normal(size=(4000, 4))
imh.run_chains(log_w, pools, 10, 1, rng)
with open("/proc/self/statm") as file:
    start = int(file.read().split()[1]) * resource.getpagesize()
if {chains}:
    after = values[imh.run_chains(log_w, pools, 20_000, 1, rng).states.ravel()]
else:
    imh.corpus_means(values, 20_000, rng)
print((1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 2e7)
"""


@pytest.mark.parametrize("chains", [False, True])
def test_the_bytes_of_chains_and_corpora_are_measured(chains):
    """The peak of a process that makes 20 million steps of chains, or strings of corpora."""
    script = MEASURED.format(methods=str(ROOT / "methods"), chains=chains)
    done = run("-c", script)
    said = imh.CHAIN_BYTES if chains else imh.CORPUS_BYTES
    assert float(done.stdout) == pytest.approx(said, rel=0.15)


def test_responses_beyond_the_context_are_one_line(models, tmp_path):
    args = Args(**{**models, **SETTINGS, "max_length": 513}, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="--max-length 513: .* reads 512 tokens; lower it"):
        imh.generate(args)
    assert not (tmp_path / "run").exists()


def test_exact_without_room_for_a_response_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(imh, "load_model", None)
    args = Args(out=str(tmp_path / "run"), max_length=8)
    with pytest.raises(SystemExit) as stop:
        imh.exact(args)
    message = str(stop.value)
    assert re.match(
        r"--max-length 8: no room for a response to .* of \d+ tokens in tiny; ", message
    )
    assert len(message) <= 200 and not list(tmp_path.iterdir())


# Signals.


@pytest.fixture
def no_signals():
    """Signals that a test sends to itself are forgotten after it."""
    imh.setup(0)
    yield
    common.signals.clear()


def stopped_at(monkeypatch, where, name, number, function):
    """Run function; the call of this number of where.name sends SIGTERM -> how many were made."""
    real = getattr(where, name)
    calls = []

    def signalled(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, signalled)
        with pytest.raises(SystemExit) as stop:
            function()
    assert stop.value.code == 143
    common.signals.clear()
    return len(calls)


def test_a_signal_ends_each_command_within_a_step(scored, tmp_path, monkeypatch, no_signals):
    """Every loop that takes longer than a second, and nothing is written."""
    toy = Args(out=str(tmp_path / "a"))
    assert stopped_at(monkeypatch, imh.np, "sort", 5, lambda: imh.main(toy, "toy")) == 5
    assert not list(tmp_path.iterdir())

    run = tmp_path / "run"
    shutil.copytree(Path(scored.out, "scores"), run / "scores")
    shutil.copytree(Path(scored.out, "samples"), run / "samples")
    args = imh.replace(scored, out=str(run))
    for name, number in (("read_rows", 2), ("pool_limit", 3), ("imh_setting", 2)):
        stop = lambda: imh.main(args, "imh")
        assert stopped_at(monkeypatch, imh, name, number, stop) == number, name
    monkeypatch.setattr(imh, "PIECE", 50)  # a chain of 200 steps has four
    assert stopped_at(monkeypatch, imh, "imh_chain", 2, lambda: imh.main(args, "imh")) == 2
    assert stopped_at(monkeypatch, imh, "read_samples", 2, lambda: imh.main(args, "score")) == 2
    assert {path.name for path in run.iterdir()} == {"scores", "samples"}

    imh.imh(args)
    assert stopped_at(monkeypatch, imh, "scatter", 1, lambda: imh.main(args, "figures")) == 1
    assert not (run / "figures/correlations_dpo_secret.png").exists()


def test_a_signal_leaves_the_scores_of_exact_as_they_were(tmp_path, monkeypatch, no_signals):
    args = Args(out=str(tmp_path), max_length=128)
    short = dict(prompts=2, support=8, draws=4, settings=("greedy", "top_k=5,temperature=1"))
    imh.exact(args, **short)
    before = {path: path.read_bytes() for path in tmp_path.glob("scores/*/*")}
    assert len(before) == 2
    other = imh.replace(args, seed=1)
    for name, number in (("sample", 1), ("exact_values", 1), ("exact_values", 3)):
        stop = lambda: imh.exact(other, **short)
        assert stopped_at(monkeypatch, imh, name, number, stop) == number
        assert {path: path.read_bytes() for path in tmp_path.glob("scores/*/*")} == before
    imh.exact(other, **short)
    assert {path: path.read_bytes() for path in tmp_path.glob("scores/*/*")} != before


def test_sigterm_of_the_toy_as_a_user_sends_it(tmp_path):
    process = begin("methods/imh_adaptors.py", "toy", "--out", tmp_path)
    process.wait_for("toy: E r")
    process.send_signal(signal.SIGTERM)
    start = time.time()
    done = process.wait(timeout=60)
    assert done.returncode == 143 and time.time() - start < 10 and done.stderr == ""


TWO = """
import os, signal, sys
sys.path[:0] = [{methods!r}]
import imh_adaptors as imh
args = imh.Args(out=sys.argv[1], max_length=128, chain_length=100, burn_in=10, corpus_size=20)
imh.setup(0)
found = imh.exact(args, prompts=2, support=8, draws=4, settings=("top_k=5,temperature=1", "greedy"))
assert len(found) == 2
imh.main(args, "imh")
real = imh.pool_limit

def signalled(log_w):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(log_w)

imh.pool_limit = signalled
imh.main(args, "imh")
"""


def test_two_processes_write_the_same_and_stop_together(tmp_path):
    """exact and imh are rank 0's; the other process waits, and leaves with it."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(methods=str(ROOT / "methods")))
    one, two = tmp_path / "one", tmp_path / "two"
    done = run(script, one, check=False)
    assert done.returncode == 143, done.stderr
    done = run(script, two, processes=2, check=False)
    # Which of the two ends first, with code 143 or the other's 1, is chance.
    assert done.returncode == 1 and "one of 2 processes: exit code" in done.stderr, done.stderr
    assert "Gloo" not in done.stderr and 'two.py", line' not in done.stderr
    files = {path.relative_to(one): path.read_bytes() for path in one.glob("**/*.json")}
    assert len(files) == 3
    assert files == {path.relative_to(two): path.read_bytes() for path in two.glob("**/*.json")}


# Files that others wrote.

SAMPLE = dict(
    prompt="a",
    prompt_ids=[1, 2],
    ids=[3, 4, 5],
    text="b",
    log_q=[-1.0, 0.0, -2.5],
    log_kept=[0.0, -0.5, 0],
)


@pytest.mark.parametrize(
    "damage, why",
    [
        (dict(ids=[]), "no response, or no prompt"),
        (dict(prompt_ids=[]), "no response, or no prompt"),
        (dict(ids=[3, 4, 6]), "tokens that --model does not have"),
        (dict(ids=[3, 4, -1]), "tokens that"),
        (dict(ids=[3, 4, 5.0]), "tokens that"),
        (dict(ids=[3, 4, True]), "tokens that"),
        (dict(ids="345"), "tokens that"),
        (dict(prompt_ids=[1, None]), "tokens that"),
        (dict(log_q=[-1.0, 0.0]), "log_q is not a list of 3 finite numbers"),
        (dict(log_q=[-1.0, 0.0, math.nan]), "log_q is not"),
        (dict(log_q=[-1.0, 0.0, -INF]), "log_q is not"),
        (dict(log_q=[-1.0, 0.0, "-2.5"]), "log_q is not"),
        (dict(log_q=-3.5), "log_q is not"),
        (dict(log_kept=[0.0] * 4), "log_kept is not a list of 3 finite numbers"),
        (dict(log_kept=[0.0, 0.0, 10**400]), "log_kept is not"),
        (dict(log_kept=None), "log_kept is not"),
        (dict(text=None), "of the wrong type"),
        (dict(prompt=1), "of the wrong type"),
    ],
)
def test_samples_of_others_are_checked(tmp_path, damage, why):
    path = tmp_path / "00000.json"
    path.write_text(json.dumps([SAMPLE, SAMPLE | damage]))
    with pytest.raises(SystemExit) as stop:
        imh.read_samples(path, vocabulary=6)
    message = str(stop.value)
    assert message.startswith(f"{path}: row 1: ") and why in message
    assert message.endswith("; delete the file, generate --resume") and "\n" not in message
    path.write_text(json.dumps([SAMPLE, SAMPLE]))
    assert imh.read_samples(path, vocabulary=6) == {(1, 2): [SAMPLE, SAMPLE]}


@pytest.mark.parametrize("name", SAMPLE)
def test_samples_without_a_column(tmp_path, name):
    path = tmp_path / "00000.json"
    path.write_text(json.dumps([{key: SAMPLE[key] for key in SAMPLE if key != name}]))
    with pytest.raises(SystemExit, match=f"00000.json: row 0: no {name}; "):
        imh.read_samples(path, vocabulary=6)
    path.write_text("[]")
    with pytest.raises(SystemExit, match="00000.json: no rows; "):
        imh.read_samples(path, vocabulary=6)


def test_damaged_samples_leave_the_scores_as_they_were(scored, tmp_path):
    """Found in the last file, before the scores of the earlier run are touched."""
    for kind in ("samples", "scores"):
        shutil.copytree(Path(scored.out, kind), tmp_path / "run" / kind)
    before = {path: path.read_bytes() for path in tmp_path.glob("run/scores/**/*.json")}
    last = sorted(tmp_path.glob("run/samples/*/*.json"))[-1]
    rows = json.loads(last.read_text())
    rows[-1]["log_q"][0] = math.nan
    last.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=f"{last.name}: row {len(rows) - 1}: log_q is not"):
        imh.score(imh.replace(scored, out=str(tmp_path / "run"), overwrite=True))
    assert {path: path.read_bytes() for path in tmp_path.glob("run/scores/**/*.json")} == before


SCORES = dict(prompt="a", log_prior=-3.0, reward=1, implicit=0.5, log_aligned=-2.0)
SCORES |= dict(log_q=-2.0, log_kept=0.0)


@pytest.mark.parametrize("name", imh.NUMBERS)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF, None, "1", True, [1.0], 10**400])
def test_scores_of_others_are_checked(tmp_path, name, bad):
    """nan ended in a table of nan."""
    folder = tmp_path / "scores/top_k=5,temperature=1"
    folder.mkdir(parents=True)
    (folder / "00000.json").write_text(json.dumps([SCORES]))
    (folder / "00064.json").write_text(json.dumps([SCORES, SCORES | {name: bad}]))
    with pytest.raises(SystemExit) as stop:
        imh.imh(Args(out=str(tmp_path)))
    message = str(stop.value)
    assert f"00064.json: row 1: {name} " in message and message.endswith("score it again")
    assert "\n" not in message and len(message.replace(str(tmp_path), "")) <= 200
    assert not (tmp_path / "imh.json").exists()


def test_scores_of_a_setting_that_is_none(tmp_path):
    folder = tmp_path / "scores/top_q=5"
    folder.mkdir(parents=True)
    (folder / "00000.json").write_text(json.dumps([SCORES]))
    with pytest.raises(SystemExit, match="no 'top_q'"):
        imh.imh(Args(out=str(tmp_path)))
    (folder / "00000.json").write_text(json.dumps([dict(SCORES, prompt=None)]))
    with pytest.raises(SystemExit, match="00000.json: row 0: no prompt; score it again"):
        imh.imh(Args(out=str(tmp_path)))


def test_prompts_that_are_chats_have_chains_of_their_own():
    chats = [[{"role": "user", "content": text}] for text in "abab"]
    corpus = imh.make_corpus([dict(SCORES, prompt=chat) for chat in chats])
    pools = imh.pools_of(corpus.prompts, pooled=False)
    assert [pool.tolist() for pool in pools] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "damage, why",
    [
        (dict(extra=1), "not the columns"),
        (dict(target="nonsense"), "no such setting or target"),
        (dict(setting=1), "no such setting or target"),
        (dict(n="20"), "n, n_typ or r_typ"),
        (dict(n_typ=None), "n, n_typ or r_typ"),
        (dict(r_typ=None), "n, n_typ or r_typ"),
        (dict(local=[1.0, 2.0, 3.0]), "local is not a list of 4"),
        (dict(chain=[1.0, 2.0, 3.0, None]), "chain is not"),
        (dict(snis=[1.0, 2.0, 3.0, math.nan]), "snis is not"),
        (dict(corpora=[]), "corpora is not an object"),
        (dict(corpora=dict(local=[], chain=[])), "the typical corpora"),
        (dict(corpora=dict(local=[[1.0]], chain=[], typical=[])), "the local corpora"),
    ],
)
def test_records_of_others_are_checked(scored, tmp_path, damage, why):
    records = [dataclasses.asdict(imh.Record("greedy", "global", 1, 20, *[[0.0] * 4] * 3))]
    records[0]["corpora"] = dict(local=[[0.0] * 4], chain=[], typical=[])
    path = tmp_path / "imh.json"
    path.write_text(json.dumps(records))
    assert [dataclasses.asdict(record) for record in imh.read_records(path)][0]["n"] == 20
    path.write_text(json.dumps([*records, records[0] | damage]))
    with pytest.raises(SystemExit) as stop:
        imh.figures(imh.replace(scored, out=str(tmp_path)))
    message = str(stop.value)
    assert message.startswith(f"{path}: row 1: {why}") and message.endswith("with this --out")
    assert "\n" not in message and not (tmp_path / "figures").exists()


def test_records_of_other_scores_are_one_line(scored, tmp_path):
    shutil.copytree(Path(scored.out, "scores"), tmp_path / "scores")
    args = imh.replace(scored, out=str(tmp_path))
    imh.imh(args)
    shutil.rmtree(tmp_path / "scores/greedy")
    with pytest.raises(SystemExit, match="has greedy, of which there are no scores; run imh again"):
        imh.figures(args)
    (tmp_path / "imh.json").write_text("[]")
    with pytest.raises(SystemExit, match="imh.json: no rows; run imh again"):
        imh.figures(args)


def edit_csv(folder, name, edit):
    """Change the rows of the one file with this in its name."""
    (path,) = folder.glob(name)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    edit(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_missing_in_one_csv_are_counted(tmp_path, capsys):
    """Two rows less in one file, one in another, one text twice, a score empty, one infinite."""
    released_csvs(tmp_path)
    args = Args(csv=str(tmp_path), out=str(tmp_path), beta=1.0, target="aligned", pooled=True)
    whole = imh.read_corpora(args)
    capsys.readouterr()

    def shorter(rows):
        del rows[10:12]

    def last(rows):
        del rows[-1]
        rows[20]["negative_log_probability"] = ""
        rows[21]["negative_log_probability"] = "inf"

    def twice(rows):
        rows.append(rows[5])

    edit_csv(tmp_path, "*top_p090_t1.5*scoredcorrectionnll*", shorter)
    edit_csv(tmp_path, "*top_p090_t1.5*scorednll*", last)
    edit_csv(tmp_path, "*top_p090_t1.5*scoredreward*", twice)
    corpora = imh.read_corpora(args)
    printed = capsys.readouterr().out
    spec = "top_p090,temperature=1.5"
    line = next(line for line in printed.splitlines() if spec in line)
    assert line.startswith(f"{tmp_path}: {spec}: responses: kept 34, dropped 7 (")
    for reason in (
        "not in all three files: 3, the first is row 38",  # the last one, two rows up
        "no text: 1, the first is row 3",
        "a score is missing: 1, the first is row 19",  # of a file that lacks two rows before it
        "a score is infinite: 1, the first is row 20",
        "the same text again: 1, the first is row 41",
    ):
        assert reason in line, reason
    # What is kept has the numbers that it has in whole files.
    kept = [i for i in range(39) if i + (i >= 2) not in (10, 11, 20, 21, 39)]
    assert corpora[spec].reward.tolist() == whole[spec].reward[kept].tolist()
    assert corpora[spec].log_q.tolist() == whole[spec].log_q[kept].tolist()
    others = set(corpora) - {spec}
    assert all(len(corpora[name].prompts) == 39 for name in others)


def test_scores_of_zero_are_scores(tmp_path):
    """Greedy draws have log q = 0: no score that is missing."""
    released_csvs(tmp_path)

    def zero(rows):
        for number, row in enumerate(rows):
            row["samplingbiased_negative_log_probability"] = ["0", "0.0"][number % 2]

    edit_csv(tmp_path, "*ancestral*scoredcorrectionnll*", zero)
    corpora = imh.read_corpora(Args(csv=str(tmp_path), out=str(tmp_path)))
    assert corpora["ancestral_strict,temperature=1.0"].log_q.tolist() == [0.0] * 39


def test_csvs_that_are_damaged_are_one_line(tmp_path):
    """The line is that of the file, also below a text of several lines."""
    released_csvs(tmp_path)
    args = Args(csv=str(tmp_path), out=str(tmp_path))

    def damage(rows):
        rows[4]["generated_text"] = "two\nlines"
        rows[7]["score"] = "good"

    path = edit_csv(tmp_path, "*ancestral*scoredreward*", damage)
    line = 1 + next(i for i, text in enumerate(path.read_text().split("\n")) if "good" in text)
    with pytest.raises(SystemExit) as stop:
        imh.imh(args)
    assert str(stop.value).startswith(f"{path}:{line}: score 'good' is not a number; ")
    path.unlink()
    with pytest.raises(SystemExit) as stop:
        imh.imh(args)
    message = str(stop.value).replace(str(tmp_path), "")
    assert "ancestral_strict,temperature=1.0 has no CSV *_scoredreward*" in message
    assert "\n" not in message and len(message) <= 200


def test_markers_go_by_the_number_of_the_temperature(tmp_path, monkeypatch):
    """Five temperatures and greedy: 10 comes last, and each temperature is in the legend."""
    drawn = []
    monkeypatch.setattr(
        imh.Figure, "legend", lambda _, handles, names, **place: drawn.extend(zip(handles, names))
    )
    labels = [f"top_k=5,temperature={T}" for T in ("10", "1.5", "0.5", "0.75", "1")]
    panel = imh.Panel("", "", "", {label: [[0, 0]] for label in [*labels, "greedy"]})
    imh.scatter(tmp_path / "a.png", [panel], "")
    assert [(name, handle.get_marker()) for handle, name in drawn[2:]] == [
        ("T = 0.5", "s"),
        ("T = 0.75", "v"),
        ("T = 1", "^"),
        ("T = 1.5", "D"),
        ("T = 10", "P"),
    ]


def test_help_is_instant():
    start = time.time()
    done = run(ROOT / "methods/imh_adaptors.py", "--help")
    assert (
        time.time() - start < 5 and "arxiv.org/abs/2406.10203" in done.stdout
    )  # 0.3 s on an idle machine


@pytest.mark.parametrize("command", [*imh.COMMANDS, "all rlhf", "all dpo"])
def test_help_explains_every_flag(command):
    """The comment behind or above each option is printed by --help of every command."""
    printed = run(
        ROOT / "methods/imh_adaptors.py", *command.split(), "--help", COLUMNS="200"
    ).stdout
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", printed).split())
    source = (ROOT / "methods/imh_adaptors.py").read_text()
    options = source[source.index("class Args") : source.index("PRESETS")]
    option = r"^((?:    # .+\n)*)    (\w+): .*?(?:  # (.+))?$"
    explained = re.findall(option, options, flags=re.M)
    assert len(explained) == len(imh.Args.__dataclass_fields__)
    for above, name, behind in explained:
        help_text = behind or " ".join(above.replace("#", " ").split())
        assert help_text, name
        assert f"--{name.replace('_', '-')}" in words and help_text in words, name


def test_unknown_commands_end_in_one_line():
    done = run(ROOT / "methods/imh_adaptors.py", "enumerate", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "exact" in done.stderr and "rlhf" in done.stderr


# Prompts and a reward of one's own.


def own_file(folder):
    (folder / "own.py").write_text(
        "def short(prompts, responses):\n"
        "    assert all(prompt.startswith('A ') for prompt in prompts)\n"
        "    return [-len(response) for response in responses]\n"
        "def none(prompts, responses): pass\n"
        "def alone(responses): return [0.0] * len(responses)\n"
    )
    return f"{folder}/own.py"


def test_own_prompts_and_an_own_reward(models, tmp_path, capsys):
    """All commands; samples.jsonl has every response, and the scores are the function's."""
    (tmp_path / "p.txt").write_text("A fox\n\nA cat met\nA dog\n")
    options = SETTINGS | models | dict(data=str(tmp_path / "p.txt"), out=str(tmp_path / "run"))
    args = Args(**options, reward=f"{own_file(tmp_path)}:short", target="posterior")
    imh.generate(args, to_score=True)
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    printed = capsys.readouterr().out
    assert printed.count("sample: ") == 3
    assert f"{len(rows)} samples: {tmp_path}/run/samples.jsonl" in printed
    drawn = sum(map(len, read(args, "samples").values()))
    assert len(rows) == drawn and {row["prompt"] for row in rows} == {"A fox", "A cat met", "A dog"}
    imh.score(args)
    texts = read(args, "samples")
    for name, scores in read(args, "scores").items():
        of_prompt = {}
        for row in texts[name]:
            of_prompt.setdefault(row["prompt"], []).append(-len(row["text"]))
        for row in scores:
            assert row["reward"] == of_prompt[row["prompt"]].pop(0)
    imh.imh(args)
    imh.figures(args)


def test_one_prompt_on_the_command_line(models, tmp_path):
    options = SETTINGS | models | dict(prompt="A fox", out=str(tmp_path / "run"))
    args = Args(**options, reward="implicit")
    imh.generate(args, to_score=True)
    imh.score(args)
    prompts = set()
    for rows in read(args, "samples").values():
        prompts |= {row["prompt"] for row in rows}
    assert prompts == {"A fox"}
    imh.imh(args)


@pytest.mark.parametrize(
    "reward, words",
    [
        ("tiny", "FILE.py:FUNCTION"),
        ("{own}:none", "no numbers; it must be function(prompts, responses)"),
        ("{own}:alone", "TypeError"),
        ("{own}", "own.py:FUNCTION"),
        ("{own}:absent", "no function absent"),
        ("no.py:f", "there is no file no.py"),
    ],
)
def test_a_reward_that_does_not_fit_is_refused_before_sampling(models, tmp_path, reward, words):
    reward = reward.format(own=own_file(tmp_path))
    options = SETTINGS | models | dict(prompt="A fox", out=str(tmp_path / "run"))
    args = Args(**options, reward=reward)
    with pytest.raises(SystemExit) as stop:
        imh.main(args, "all")
    message = str(stop.value).replace(str(tmp_path), "/tmp/x")
    assert words in message and "\n" not in message and len(message) <= 200
    assert message.startswith("--reward") and not (tmp_path / "run").exists()


def test_exact_knows_the_tiny_world_alone(models, tmp_path):
    args = Args(**SETTINGS | models | dict(prompt="A fox", out=str(tmp_path / "run")))
    with pytest.raises(SystemExit, match="exact: its reward is known"):
        imh.exact(args)


def test_exact_draws_where_the_model_is(monkeypatch):
    """The uniforms lie on the model's device: here one that holds no numbers."""
    devices = []

    def drawn(model, prompts, copies, adaptor, uniforms, tokenizer):
        devices.append(uniforms.device.type)
        return [imh.Response(ids=[5], log_q=[-1.0], log_kept=[0.0])]

    monkeypatch.setattr(imh, "sample", drawn)
    tokenizer = imh.load_tokenizer("tiny")
    prompt = "\n\nHuman: Tell me a story about a fox in a cave.\n\nAssistant:"
    prior = SimpleNamespace(device=torch.device("meta"))
    args = Args(max_length=8)
    imh.listed_worlds(args, tokenizer, prior, [(prompt, [5, 6])], support=2)
    assert devices == ["meta"]
