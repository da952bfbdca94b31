"""Adaptors against the library's processors and a table, IMH against enumeration, the commands end to end."""

import csv
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import common
import imh_adaptors as imh
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, run
from imh_adaptors import Args, adapt, imh_chain, parse_adaptor

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
    epsilon_cutoff=transformers.EpsilonLogitsWarper,
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
    "epsilon_cutoff=0.02",
    "eta_cutoff=0.1",
    "temperature=1.5,top_k=20,top_p=0.8",
    "temperature=0.5,typical_p=0.9",
    "top_k=30,typical_p=0.5",
    "temperature=1.3,top_k=25,top_p=0.95,min_p=0.02,typical_p=0.9,eta_cutoff=0.01",
]


@pytest.mark.parametrize("spec", SPECS)
def test_adaptors_equal_the_library(spec):
    torch.manual_seed(0)
    logits = 2 * torch.randn(300, 40, dtype=torch.float64)  # no ties, so that the two agree on every set
    for ours, theirs in zip(adapt(logits, spec), library(logits, parse_adaptor(spec))):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    ours, theirs = (
        adapt(logits.float(), spec)[0].isfinite(),
        library(logits.float(), parse_adaptor(spec))[0].isfinite(),
    )
    assert (ours != theirs).sum(1).max() <= 1  # in float32 one token may fall on a set's edge


def test_large_vocabularies_are_sorted_in_parts():
    """Beyond 1024 tokens only the likeliest are sorted, all of them where these hold too little mass."""
    torch.manual_seed(0)
    flat, peaked = torch.randn(8, 3000, dtype=torch.float64) / 9, 4 * torch.randn(8, 3000, dtype=torch.float64)
    for spec in ("top_p=0.9", "typical_p=0.9", "top_k=50", "top_k=2000", "top_k=50,typical_p=0.5"):
        for logits in (flat, peaked):
            for ours, theirs in zip(adapt(logits, spec), library(logits, parse_adaptor(spec))):
                torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert adapt(flat, "top_p=0.9")[0].isfinite().sum(1).min() > 2000  # more than the part that is sorted first


def kept(logits, spec):
    return "".join(
        map(
            str, adapt(torch.tensor(logits, dtype=torch.float64), spec)[0].isfinite().nonzero()[:, 0].tolist()
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
        ("epsilon_cutoff=0.0625", "0123", "01234", "01234"),
        ("epsilon_cutoff=0.1", "012", "012", "012"),
        ("epsilon_cutoff=0.3", "0", "0", "0"),
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
    constant = adapt(torch.tensor(L1) + 100, "top_p=0.9,temperature=1.2")  # a constant changes nothing
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
    ):
        with pytest.raises(SystemExit, match=re.escape(words)):
            parse_adaptor(spec, vocabulary)
    with pytest.raises(SystemExit, match="keeps nothing at 1 of 2 positions"):
        adapt(torch.tensor([[0.0, 1.0], [-INF, -INF]]), "top_p=0.9")
    assert parse_adaptor("ancestral") == parse_adaptor("top_k50") and parse_adaptor("top_k=0,top_p=1") == {}


def test_chain_by_hand():
    log_w = torch.tensor([0, -1.2, 0.7, -0.3, 2.1, 0.4])
    draws = torch.tensor([0, 3, 1, 2, 4, 0, 5, 2, 4, 1, 3, 0, 5, 2, 1, 4])
    u = torch.tensor(
        [0.5, 0.80, 0.35, 0.90, 0.10, 0.35, 0.15, 0.30, 0.55, 0.02, 0.08, 0.97, 0.45, 0.20, 0.26, 0.91]
    )
    held = imh_chain(log_w[draws], u.log())
    assert draws[held].tolist() == [0, 0, 0, 2, 4, 4, 5, 2, 4, 1, 3, 0, 5, 2, 2, 4]
    assert (held[1:] == torch.arange(1, 16)).sum() == 11
    assert draws[imh_chain(log_w[draws], torch.full((16,), -INF))].tolist() == draws.tolist()  # accept all
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
            if i and torch.tensor(uniforms[i]) < torch.tensor(weights[i]) - torch.tensor(weights[state]):
                state = i
            assert chain[i] == state


def test_all_draws_impossible_or_huge():
    for log_w in (torch.full((1, 5), -INF), torch.tensor([[1e4, -1e4, 0.0, -INF, 1e4]])):
        assert imh_chain(log_w, torch.rand(1, 5).log()).min() >= 0
    w_bar, found = imh.pool_diagnostics(np.array([1e4, -1e4, 0.0, -INF, 1e4]))
    assert found["ess"] == pytest.approx(0.4) and w_bar[0] == 0.5
    assert math.isnan(imh.pool_diagnostics(np.full(5, -INF))[1]["ess"])


def test_pool_limit():
    log_w = exact([0, -1.2, 0.7, -0.3, 2.1, 0.4])
    w_bar, found = imh.pool_diagnostics(log_w.numpy())
    assert w_bar == pytest.approx([0.07291946, 0.02196292, 0.14684177, 0.05402007, 0.59547273, 0.10878306], abs=5e-9)
    assert w_bar @ np.arange(1, 7) == pytest.approx(4.40351284, abs=1e-7)
    assert 6 * found["ess"] == pytest.approx(2.52078506, abs=1e-7)
    assert found["accept_limit"] == pytest.approx(0.46968705, abs=1e-7)
    assert 1 - found["gap"] == pytest.approx(0.72011033, abs=1e-7)
    assert found["log_Z"] == pytest.approx(log_w.exp().mean().log().item())
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
    found = imh.pool_diagnostics(log_w.numpy())[1]  # atol: the tail beyond the last quantile
    assert found["accept_limit"] == pytest.approx(accept, abs=2e-3)
    assert found["ess"] == pytest.approx(math.exp(-s * s), abs=2e-2)


def test_autocorrelation_time():
    # AR(1) with coefficient 0.5: (1 + 0.5) / (1 - 0.5) = 3; 40 chains of 5,000 states pin it to about 0.1
    rng, x = np.random.default_rng(0), np.zeros((40, 5000))
    for t in range(1, 5000):
        x[:, t] = 0.5 * x[:, t - 1] + rng.standard_normal(40)
    assert imh.autocorrelation_time(torch.tensor(x)).mean().item() == pytest.approx(3, abs=0.3)
    assert imh.autocorrelation_time(torch.ones(1, 9)).isnan()


def world(adaptor, target="global"):
    return imh.enumerate_world(Args(adaptor=adaptor, target=target, beta=0.5))


def test_aligned_world(capsys):
    found = world("ancestral_strict")
    p_plus, log_p, r, log_Z = found["log_p_plus"].exp(), found["log_p"], found["r"], found["log_Z"]
    assert len(r) == 13 and log_Z.item() == pytest.approx(2.27616999, abs=1e-8)
    assert (log_p + r / 0.5 - found["log_p_plus"] - log_Z).abs().max() < 1e-10  # Eq. 1, for every string
    entropy = -(p_plus @ found["log_p_plus"])
    assert entropy.item() == pytest.approx(1.59656864, abs=1e-8)
    assert (p_plus @ (log_p + 2 * r)).item() == pytest.approx((log_Z - entropy).item(), abs=1e-10)
    assert (p_plus @ r).item() == pytest.approx(1.45235589, abs=1e-8)
    assert (p_plus @ log_p).item() == pytest.approx(-2.22511043, abs=1e-8)
    assert found["accept"].item() == pytest.approx(1) and found["w_star"].item() == pytest.approx(1)
    assert "spectrum" in capsys.readouterr().out


def test_enumeration_top_k():
    found = world("top_k=2")
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
    assert all(step <= (1 - 1 / found["w_star"].item()) ** n + 1e-12 for n, step in enumerate(worst))
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
    found = world(spec, target)
    expectations = lambda law: [(law @ found["r"]).item(), (law @ found["log_p"]).item()]
    assert expectations(found["log_q"].exp()) == pytest.approx(E_q, abs=5e-9)
    assert expectations(found["target"]) == pytest.approx(E_g, abs=5e-9)
    assert found["w_star"].item() == pytest.approx(w_star, abs=5e-8)
    assert found["accept"].item() == pytest.approx(accept, abs=5e-9)
    assert found["log_q"].exp().sum().item() == pytest.approx(1)
    if log_Z_g:
        assert (found["log_q"] + found["log_kept"]).exp().sum().item() == pytest.approx(log_Z_g, abs=5e-9)
    q, tau = found["log_q"].exp(), found["target"]  # Liu 1996: the spectrum from the weights alone
    order = (tau / q).argsort(descending=True)
    q, tau = q[order], tau[order]
    liu = [1] + [(q[k:] - tau[k:] / (tau / q)[k]).sum().item() for k in range(len(q) - 1)]
    assert sorted(found["spectrum"].tolist()) == pytest.approx(sorted(liu), abs=1e-9)


def test_temperature_leaves_the_released_target_where_it_is():
    """--target aligned is p_+ on the kept set, and top-k's kept set knows no temperature; Eq. 4 does."""
    one, other = (world(f"top_k=2,temperature={T}", "aligned")["target"] for T in (1.0, 1.5))
    torch.testing.assert_close(one, other)
    assert (world("top_k=2,temperature=1.5")["target"] - one).abs().max() > 0.05


def test_trade_off_across_adaptors_of_the_aligned_world():
    """Between settings the two means correlate positively in an exactly aligned world, q and g alike."""
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
            found = world(f"{spec},temperature={T}")
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


# The commands, on a small random model: the aligned model is the prior with its head scaled and shifted.
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
    args = Args(
        **SETTINGS, **models, out=str(tmp_path_factory.mktemp("run") / "run"), also=("top_k=20", "top_p=0.5")
    )
    imh.generate(args)
    imh.score(args)
    return args


def read(args, kind):
    return {
        path.name: [row for chunk in sorted(path.glob("*.json")) for row in json.loads(chunk.read_text())]
        for path in sorted(Path(args.out, kind).glob("*/"))
    }


def test_generate_stores_what_was_drawn(scored):
    samples, scores = read(scored, "samples"), read(scored, "scores")
    assert len(samples) == 7 and {len(rows) for rows in samples.values()} == {24}
    for row in samples["greedy"]:  # once, whatever the temperatures; no token is likelier than the drawn one
        assert row["log_q"] == [0.0] * len(row["ids"])
    model = common.load_model(scored.model)
    end = common.load_tokenizer(scored.model).eos_token_id
    for spec in samples:
        for row, sums in zip(samples[spec][:4], scores[spec][:4]):
            assert end not in row["ids"][:-1] and len(row["ids"]) == len(row["log_q"]) == len(row["log_kept"])
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
            assert sums["log_aligned"] == pytest.approx(full, abs=1e-3) and sums["outside"] == 0
            assert sums["log_q"] == pytest.approx(sums["rescored"], abs=1e-3)


def test_scores_do_not_depend_on_the_batch(scored, models):
    """Each response alone in its batch, the prior by the library, further adaptors in the same pass."""
    rows, prior = read(scored, "scores")["top_p090,temperature=1"][:3], common.load_model(models["ref_model"])
    aligned, samples = common.load_model(models["model"]), read(scored, "samples")["top_p090,temperature=1"]
    for row, sample in zip(rows, samples):
        ids, n = torch.tensor([sample["prompt_ids"] + sample["ids"]]), len(sample["prompt_ids"])
        target = torch.tensor(sample["ids"])[:, None]
        log_p = prior(ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, target).sum().item()
        assert row["log_prior"] == pytest.approx(log_p, abs=1e-3)
        for spec, value in zip(("top_k=20", "top_p=0.5"), row["also"]):
            expected = (
                library(aligned(ids).logits[0, n - 1 : -1], parse_adaptor(spec))[0]
                .gather(1, target)
                .sum()
                .item()
            )
            assert value == pytest.approx(expected, abs=1e-3)
        assert row["implicit"] == pytest.approx(scored.beta * (row["log_aligned"] - log_p), abs=1e-3)
        assert row["reward"] == common.tiny_reward(row["prompt"], sample["text"])


def test_imh_and_figures(scored, capsys):
    records = {x["setting"]: x for x in imh.imh(scored)}
    table = capsys.readouterr().out
    assert all(spec in table for spec in records) and "accept" in table
    for x in records.values():
        assert x["check"] < 1e-3 and x["outside"] == 0  # log a / q = sum_t log Z_t
        assert 1 / 4 <= x["ess"] <= 1 and 1 <= x["w_star"] <= 4 and x["prompts"] == 6
        # 6 chains of 100 kept states around SNIS: 5 standard errors from the spread of strings and tau
        spread = 5 * math.sqrt(np.var(np.array(x["corpora"]["chain"])[:, 0]) * scored.corpus_size * 6 / 600)
        assert x["chain"][0] == pytest.approx(x["snis"][0], abs=spread)
    plain = records["ancestral_strict,temperature=1"]
    assert plain["accept"] == pytest.approx(1, abs=5e-3) and plain["w_star"] == pytest.approx(1, abs=1e-3)
    imh.figures(scored)
    assert "Pearson" in capsys.readouterr().out
    names = {path.name for path in Path(scored.out, "figures").iterdir()}
    assert names == {"correlations.png", "correlations_dpo_secret.png"}


def test_burn_in_and_thinning(scored):
    """The last of 200 states alone, and by every 40th after 100: the same chain, other states of it."""
    last = imh.imh(imh.replace(scored, burn_in=199))[0]
    rows = read(scored, "scores")["ancestral_strict,temperature=0.7"]
    six = last["chain"][0] * 6  # one state per prompt, so their sum is one of the sums of six strings
    pools = [[x["log_prior"] for x in rows if x["prompt"] == prompt] for prompt in sorted({x["prompt"] for x in rows})]
    sums = np.array([0.0])
    for pool in pools:
        sums = np.add.outer(sums, pool).ravel()
    assert np.abs(sums - six).min() < 1e-6
    every = [imh.imh(imh.replace(scored, burn_in=start, thin=199))[0]["chain"][0] for start in (0, 199)]
    both = imh.imh(imh.replace(scored, burn_in=0, thin=199))[0]["chain"][0]  # steps 0 and 199
    first = imh.imh(imh.replace(scored, burn_in=0, thin=200))[0]["chain"][0]
    assert both == pytest.approx((first + every[1]) / 2) and every[0] == both


def test_legacy_accept_all(scored):
    fixed = {x["setting"]: x for x in imh.imh(scored)}
    released = {x["setting"]: x for x in imh.imh(imh.replace(scored, legacy_accept_all=True))}
    spec = "ancestral_strict,temperature=0.7"
    assert released[spec]["accept"] == 1.0 and fixed[spec]["accept"] < 0.9
    # all of it accepted is a bootstrap of the draws: the local means again, 5 standard errors of 600 states
    log_p = [row["log_prior"] for row in read(scored, "scores")[spec]]
    error = 5 * math.sqrt(np.var(log_p) / 600)
    assert released[spec]["chain"][0] == pytest.approx(released[spec]["local"][0], abs=error)
    assert abs(fixed[spec]["chain"][0] - fixed[spec]["local"][0]) > 2 * error


def test_targets(scored, models):
    """log w by hand from the stored sums; pooled chains have one pool."""
    rows = read(scored, "scores")["top_p090,temperature=0.7"]
    for target, numerator in (
        ("global", lambda x: x["log_aligned"] / 0.7),
        ("aligned", lambda x: x["log_aligned"]),
        ("posterior", lambda x: x["log_prior"] + x["reward"] / scored.beta),
    ):
        found = imh.imh(imh.replace(scored, target=target, pooled=True))
        x = next(x for x in found if x["setting"] == "top_p090,temperature=0.7")
        log_w = exact([numerator(row) - row["log_q"] for row in rows])
        w_bar = log_w.softmax(0)
        assert x["prompts"] == 1 and x["w_star"] == pytest.approx(24 * w_bar.max().item())
        mean = (w_bar @ exact([row["log_prior"] for row in rows])).item()
        assert x["snis"][0] == pytest.approx(mean, abs=1e-6)
        assert x["log_Z"] == pytest.approx((log_w.logsumexp(0) - math.log(24)).item(), abs=1e-6)


def listed_law(ids, weights, adaptor, V):
    """Eq. 2 and 3 for N different strings listed with their weights: p_+(v | y_<t) is the share of v in those
    that begin with y_<t.  (N, T) padded ids, (N,) -> log q (N,), sum log Z_t (N,)"""
    log_q, log_kept, node = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros(len(ids)).long()
    for v in ids.T:  # node: the number of the prefix y_<t
        mass = weights.new_zeros(node.max() + 1, V).index_put_((node, v), weights, accumulate=True)
        step_q, log_Z = torch.zeros_like(mass), torch.zeros_like(mass[:, 0])
        fork = (mass > 0).sum(1) > 1  # elsewhere the next token is certain
        step_q[fork], log_Z[fork] = adapt(mass[fork].log(), adaptor)
        log_q, log_kept = log_q + step_q[node, v], log_kept + log_Z[node]
        node = (node * V + v).unique(return_inverse=True)[1]
    return log_q, log_kept


EXACT = ("ancestral_strict,temperature=0.5", "ancestral_strict,temperature=1", "ancestral_strict,temperature=1.5",
         "top_k=5,temperature=1", "top_p090,temperature=1", "typical_p=0.5,temperature=1", "greedy")


def exact_posterior(args, prompts=8, support=512, settings=EXACT):
    """The exact p_+ of Eq. 1 on real generations: the prior is the language model --ref-model given that its
    response is one of its own `support` draws for the prompt.  So p is known by scoring, log Z is a sum, and
    p_+ has an exact probability for every next token, under every adaptor.  Prints E log p and E r under q
    (local) and g (global), log Z_g and the acceptance, nothing sampled; writes --samples draws per prompt as
    scores of args.out, for imh and figures.  -> {setting: (exact values, largest error of Eq. 1)}"""
    tokenizer, prior, found, worlds = common.load_tokenizer(args.ref_model), common.load_model(args.ref_model), {}, []
    texts = list(dict.fromkeys(row["prompt"] for row in common.load_pairs(args.data, "test")))[:prompts]
    for i, text in enumerate(texts):
        prompt, rng = tokenizer(text).input_ids, np.random.default_rng([args.seed, i])
        uniforms = torch.tensor(rng.random((support, args.max_length - len(prompt))))
        log_p = {tuple(y): math.fsum(x) for y, x, _ in imh.sample(prior, [prompt], support, {}, uniforms, tokenizer)}
        r = [common.tiny_reward(text, tokenizer.decode(y, skip_special_tokens=True)) for y in log_p]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(y) for y in log_p], True, tokenizer.eos_token_id)
        worlds.append((text, rng, ids, exact(list(log_p.values())), exact(r)))
    covered = np.mean([log_p.logsumexp(0).exp().item() for *_, log_p, _ in worlds])
    print(f"{len(worlds)} prompts, {np.mean([len(x[2]) for x in worlds]):.0f} strings each, of mass {covered:.3f}")
    print(f"{'exact':34s} local: log p, r | global: log p, r |  log_Z_g   accept  error of Eq. 1")
    for spec in settings:
        rows, values, worst = [], [], 0.0
        for text, rng, ids, log_p, r in worlds:
            log_p = log_p.log_softmax(0)
            log_Z = (log_p + r / args.beta).logsumexp(0)
            weights = (log_p + r / args.beta - log_Z).exp()
            log_p_plus, _ = listed_law(ids, weights, {}, len(tokenizer))  # token by token, as from a model
            log_q, log_kept = listed_law(ids, weights, spec, len(tokenizer))
            q, g = log_q.exp(), (log_q + log_kept).softmax(0)
            log_w = log_kept.masked_fill(log_q == -INF, 0)
            move = q * (log_w - log_w[:, None]).clamp(max=0).exp()
            values.append([(q @ log_p).item(), (q @ r).item(), (g @ log_p).item(), (g @ r).item(),
                           (log_q + log_kept).logsumexp(0).item(), (g @ move.sum(1)).item()])
            worst = max(worst, (log_p + r / args.beta - log_p_plus - log_Z).abs().max().item())
            assert abs(q.sum().item() - 1) < 1e-9
            for k in rng.choice(len(q), args.samples, p=q / q.sum()):
                row = dict(prompt=text, log_prior=log_p[k], reward=r[k], log_aligned=log_p_plus[k], log_q=log_q[k],
                           log_kept=log_kept[k], implicit=args.beta * (log_p_plus[k] - log_p[k]), log_Z=log_Z)
                rows.append({k: v if k == "prompt" else v.item() for k, v in row.items()} | {"outside": 0})
        found[spec] = np.mean(values, 0), worst
        print(f"{spec:34s}", *(f"{v:8.3f}" for v in found[spec][0]), f"{worst:.1e}", flush=True)
        folder = Path(args.out, "scores", spec)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "00000.json").write_text(json.dumps(rows))
    return found


def test_exact_posterior_of_the_tiny_language_model(tmp_path, capsys):
    """Eq. 1 string by string; IMH from local draws reaches the exact global means; the trade-off of typical
    corpora.  Three prompts of 128 draws each, 600 strings per setting; 5 standard errors, seeded."""
    args = Args(out=str(tmp_path), max_length=128, samples=200, chain_length=2000)
    found = exact_posterior(args, prompts=3, support=128)
    records = {x["setting"]: x for x in imh.imh(args)}
    rows = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("scores/*/*.json")}
    for spec, (values, worst) in found.items():
        x = records[spec]
        assert worst < 1e-10 and x["check"] < 1e-10  # float64 throughout
        identity = [row["log_prior"] + row["reward"] / 0.5 - row["log_aligned"] - row["log_Z"] for row in rows[spec]]
        assert np.abs(identity).max() < 1e-10
        spread = {k: np.std([row[k] for row in rows[spec]]) for k in ("log_prior", "reward")}
        for i, k in enumerate(("log_prior", "reward")):
            assert x["local"][i] == pytest.approx(values[i], abs=5 * spread[k] / math.sqrt(600) + 1e-9)
            se = 5 * spread[k] / math.sqrt(600 * x["ess"]) + 1e-9
            assert x["snis"][i] == pytest.approx(values[2 + i], abs=se)
            assert x["chain"][i] == pytest.approx(values[2 + i], abs=se + 5 * spread[k] * math.sqrt(
                np.nan_to_num(x["tau"], nan=1) / 5700))
        assert x["accept_limit"] == pytest.approx(values[5], abs=0.05)
    plain = records["ancestral_strict,temperature=1"]
    assert found["ancestral_strict,temperature=1"][0][4] == pytest.approx(0, abs=1e-12)
    assert plain["r_typ"] < -0.9 < plain["r_all"] < 0  # conditioning on typical corpora sharpens the trade-off
    assert plain["slope"] == pytest.approx(0.5, abs=0.05)  # beta, but for log Z(x) between prompts
    # the temperature moves the local means less than the global ones, and q differs from g
    cold = found["ancestral_strict,temperature=0.5"][0]
    assert cold[3] > cold[1] and cold[5] < 0.9


def test_log_Z_two_ways(models, tmp_path):
    """Eq. 1's Z(x) by draws from the prior and by draws from another model, both weighted: they must agree."""
    estimates = []
    for model in (models["ref_model"], models["model"]):
        args = Args(**{**models, "model": model}, **{**SETTINGS, "sampling_types": ("ancestral_strict",)}, beta=20.0)
        args = imh.replace(args, temperatures=(1.0,), prompts=2, samples=300, max_length=46, batch_size=600,
                           out=str(tmp_path / Path(model).name), target="posterior", pooled=True)
        imh.generate(args)
        imh.score(args)
        estimates.append(imh.imh(args)[0])
    errors = [math.sqrt((1 / x["ess"] - 1) / 600) for x in estimates]  # of log Z, by the delta method
    assert estimates[0]["log_Z"] == pytest.approx(estimates[1]["log_Z"], abs=5 * math.hypot(*errors))
    assert errors[0] < 0.01 and estimates[0]["ess"] > 0.9


def test_reward_model(scored, tmp_path, models):
    """A sequence classification model with one output judges prompt + response; others are refused."""
    config = transformers.AutoConfig.from_pretrained(models["ref_model"], num_labels=1)
    torch.manual_seed(0)
    judge = transformers.AutoModelForSequenceClassification.from_config(config)
    tokenizer = common.load_tokenizer(models["ref_model"])
    for folder, outputs in (("judge", 1), ("two", 2)):
        if outputs == 2:
            judge = transformers.AutoModelForSequenceClassification.from_config(
                transformers.AutoConfig.from_pretrained(models["ref_model"], num_labels=2))
        judge.config.pad_token_id = tokenizer.eos_token_id
        judge.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    rows = rescore(scored, tmp_path, reward=str(tmp_path / "judge"))["top_p090,temperature=1"]
    samples = read(scored, "samples")["top_p090,temperature=1"]
    for row, sample in list(zip(rows, samples))[:4]:
        ids = tokenizer(sample["prompt"] + sample["text"], return_tensors="pt").input_ids
        assert row["reward"] == pytest.approx(judge(ids).logits.item(), abs=1e-5)
    assert len({row["reward"] for row in rows}) > 10
    for name in ("two", models["ref_model"]):
        with pytest.raises(SystemExit, match="not a reward model"):
            imh.score(imh.replace(scored, reward=str(tmp_path / name), out=scored.out, overwrite=True))


def test_presets_of_seven_billion_fail_in_one_line(tmp_path):
    """Complete settings, and offline one line that names what is missing and the remedy."""
    assert len(imh.PRESETS["rlhf"].sampling_types) == 8 and len(imh.PRESETS["dpo"].temperatures) == 5
    for preset, model in (("rlhf", "ethz-spylab/rlhf-7b-harmless"), ("dpo", "kaist-ai/janus-dpo-7b")):
        done = run(ROOT / "methods/imh_adaptors.py", "generate", preset, "--out", tmp_path / preset, check=False)
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


def test_legacy_flip_reward(scored, tmp_path):
    ours, released = (
        read(scored, "scores"),
        rescore(scored, tmp_path, reward="implicit", legacy_flip_reward=True),
    )
    for spec in ours:
        for a, b in zip(ours[spec], released[spec]):
            assert b["reward"] == pytest.approx(-scored.beta * (a["log_aligned"] - a["log_prior"]), abs=1e-9)


def test_legacy_unconditional_prior(scored, tmp_path, models):
    released = rescore(scored, tmp_path, legacy_unconditional_prior=True)["top_k=20,temperature=1"]
    prior, start = (
        common.load_model(models["ref_model"]),
        common.load_tokenizer(models["ref_model"]).bos_token_id,
    )
    samples = read(scored, "samples")["top_k=20,temperature=1"]
    for row, sample in list(zip(released, samples))[:3]:
        logits = prior(torch.tensor([[start, *sample["ids"]]])).logits[0, :-1]
        log_p = logits.log_softmax(-1).gather(1, torch.tensor(sample["ids"])[:, None]).sum().item()
        assert row["log_prior"] == pytest.approx(log_p, abs=1e-3)


def test_one_pass_over_a_model_and_one_normaliser(scored, models):
    """Packed attention is readied once; rows of logits beyond the tokenizer belong neither to p_+ nor to the prior."""
    model, passes = common.load_model(scored.model), []
    batch = common.pack_pairs([dict(prompt_ids=[1, 2, 3], responses=[[4, 5, 6], [7, 8]])], 1000, 0, 1)[0]
    imh.adaptor_logps(model, batch, [], 400)
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    log_p = imh.adaptor_logps(model, batch, [], 300)[0]
    assert len(passes) == 1
    for ids, ours in (([4, 5, 6], log_p[:3]), ([7, 8], log_p[3:])):
        logits = model(torch.tensor([[1, 2, 3, *ids]])).logits[0, 2:-1, :300].double()
        naive = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(ours, naive, atol=1e-4, rtol=0)


def test_legacy_clamp(scored, tmp_path):
    """Clamped at 1 nat, so that many tokens are; one outside the kept set costs the clamp."""
    samples, released = read(scored, "samples"), rescore(scored, tmp_path, legacy_clamp=1.0)
    changed = 0
    for spec in samples:
        for sample, row in zip(samples[spec], released[spec]):
            assert row["log_q"] == pytest.approx(sum(max(x, -1.0) for x in sample["log_q"]), abs=1e-3)
            changed += row["log_q"] > sum(sample["log_q"]) + 1
    assert changed > 10
    model, batch = (
        common.load_model(scored.model),
        common.pack_pairs([dict(prompt_ids=[1, 2, 3], responses=[list(range(4, 20))])], 1000, 0, 1)[0],
    )
    log_q = imh.adaptor_logps(model, batch, [dict(top_k=1)], 400)[1]
    assert (log_q == -INF).sum() > 10  # what --legacy-clamp 25 turns into -25


def released_csvs(folder, drop=None):
    """Files as the authors' scripts name them: three settings, 40 strings, NLLs of known relation."""
    rng, start = np.random.default_rng(0), "some-model_l256_promptseed42_numprompt1000_numgenerations2_"
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
            with open(folder / f"{start}{kind}_t{T}_humanassistant_{end}.csv", "w", newline="") as file:
                columns = ["prompt", "generated_text", *(c for c in columns if c != drop)]
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


def test_released_csvs(tmp_path):
    released_csvs(tmp_path)
    args = Args(
        csv=str(tmp_path), out=str(tmp_path), beta=1.0, target="aligned", pooled=True, chain_length=300
    )
    corpora = imh.read_corpora(args)
    assert {spec: len(rows) for spec, rows in corpora.items()} == dict.fromkeys(  # "NA" and "null" are texts
        ["ancestral_strict,temperature=1.0", "top_p090,temperature=1.0", "top_p090,temperature=1.5"], 39
    )
    implicit = [row["implicit"] for rows in corpora.values() for row in rows]
    assert min(implicit) == pytest.approx(19) and max(implicit) == pytest.approx(19)  # + log p_+ - log p
    flipped = imh.read_corpora(imh.replace(args, legacy_flip_reward=True))
    assert flipped["top_p090,temperature=1.5"][0]["implicit"] == pytest.approx(-19)
    (tmp_path / "notes_scored.csv").write_text("not,of,the,grid\n")  # other files are left alone
    path = next(tmp_path.glob("*top_p090_t1.5*_scorednll.csv"))
    lines = path.read_text().splitlines()  # scores that are no numbers, or infinite, are left out
    lines[5:7] = [lines[5].rpartition(",")[0] + ",", lines[6].rpartition(",")[0] + ",inf"]
    path.write_text("\n".join(lines) + "\n")
    assert len(imh.read_corpora(args)["top_p090,temperature=1.5"]) == 37
    found = imh.imh(imh.replace(args, out=str(tmp_path / "new" / "folder")))
    assert all(0 < x["accept"] < 1 and math.isfinite(x["id_sd"]) for x in found)
    imh.figures(imh.replace(args, out=str(tmp_path / "new" / "folder"), target="global"))  # says what imh was run with


def test_bad_csvs(tmp_path):
    args = Args(csv=str(tmp_path), out=str(tmp_path))
    with pytest.raises(SystemExit, match="needs CSVs"):
        imh.imh(args)
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
        imh.imh(imh.replace(scored, burn_in=200))
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
        for name, value in {**models, **SETTINGS, "also": scored.also}.items()
        for x in ("--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [value]))
    ]
    killed, two, method = tmp_path / "killed", tmp_path / "two", ROOT / "methods/imh_adaptors.py"
    whole = Path(scored.out)
    for command, kind, function in (("generate", "samples", imh.generate), ("score", "scores", imh.score)):
        process = subprocess.Popen([sys.executable, method, command, *map(str, flags), "--out", killed], cwd=ROOT)
        while process.poll() is None and len(list(killed.glob(f"{kind}/*/*.json"))) < 3:
            time.sleep(0.01)
        process.kill()
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in killed.glob(f"{kind}/*/*.json")}
        assert 3 <= len(before)
        function(imh.replace(scored, out=str(killed), resume=True))
        assert all(path.stat().st_mtime_ns == t for path, t in before.items())  # kept, not made again
        run(method, command, *flags, "--out", two, processes=2)
        chunks = {path.relative_to(whole): path.read_bytes() for path in whole.glob(f"{kind}/*/*.json")}
        assert len(chunks) == 21
        for other in (killed, two):
            found = {path.relative_to(other): path.read_bytes() for path in other.glob(f"{kind}/*/*.json")}
            assert found == chunks
    with pytest.raises(SystemExit, match="seed 0 -> 1"):
        imh.generate(imh.replace(scored, out=str(killed), resume=True, seed=1))
    imh.imh(imh.replace(scored, out=str(two)))


def test_help_is_instant():
    start = time.time()
    done = run(ROOT / "methods/imh_adaptors.py", "--help")
    assert time.time() - start < 5 and "arxiv.org/abs/2406.10203" in done.stdout  # 0.3 s on an idle machine
    assert "typical_p090" in run(ROOT / "methods/imh_adaptors.py", "generate", "--help").stdout
