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
        ("top_k=2.5", 6, "whole"),
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
    w_bar, found = imh.pool_diagnostics(torch.tensor([[1e4, -1e4, 0.0, -INF, 1e4]]), torch.tensor([5]))
    assert found["ess"].item() == pytest.approx(0.4) and w_bar[0, 0] == 0.5
    assert imh.pool_diagnostics(torch.full((1, 5), -INF), torch.tensor([5]))[1]["ess"].isnan()


def test_pool_limit():
    log_w = torch.tensor([[0, -1.2, 0.7, -0.3, 2.1, 0.4]], dtype=torch.float64)
    w_bar, found = imh.pool_diagnostics(log_w, torch.tensor([6]))
    expected = exact([[0.07291946, 0.02196292, 0.14684177, 0.05402007, 0.59547273, 0.10878306]])
    torch.testing.assert_close(w_bar, expected, atol=5e-9, rtol=0)
    assert (w_bar @ torch.arange(1.0, 7.0).double()).item() == pytest.approx(4.40351284, abs=1e-7)
    assert 6 * found["ess"].item() == pytest.approx(2.52078506, abs=1e-7)
    assert found["accept_limit"].item() == pytest.approx(0.46968705, abs=1e-7)
    assert 1 - found["gap"].item() == pytest.approx(0.72011033, abs=1e-7)
    # the chain itself: 400,000 states, tau about 5, sd 1.2: 0.02 is 5 standard errors
    rng = np.random.default_rng(0)
    draws = torch.tensor(rng.integers(6, size=(200, 2100)))
    held = imh_chain(log_w[0][draws], torch.tensor(rng.random((200, 2100))).log())
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
    found = imh.pool_diagnostics(log_w[None], torch.tensor([200_000]))[1]
    assert found["accept_limit"].item() == pytest.approx(
        accept, abs=2e-3
    )  # the tail beyond the last quantile
    assert found["ess"].item() == pytest.approx(math.exp(-s * s), abs=2e-2)


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
    sampling_types=("ancestral_strict", "top_k=20", "top_p090"),
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
    assert len(samples) == 6 and {len(rows) for rows in samples.values()} == {24}
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
        spread = 5 * math.sqrt(np.array(x["chain_cov"])[0, 0] * 6 / 600)
        assert x["chain"][0] == pytest.approx(x["snis"][0], abs=spread)
    plain = records["ancestral_strict,temperature=1"]
    assert plain["accept"] == pytest.approx(1, abs=5e-3) and plain["w_star"] == pytest.approx(1, abs=1e-3)
    imh.figures(scored)
    assert "Pearson" in capsys.readouterr().out
    assert len(list(Path(scored.out, "figures").glob("correlations-*.png"))) == 2


def test_legacy_accept_all(scored):
    fixed = {x["setting"]: x for x in imh.imh(scored)}
    released = {x["setting"]: x for x in imh.imh(imh.replace(scored, legacy_accept_all=True))}
    spec = "ancestral_strict,temperature=0.7"
    assert released[spec]["accept"] == 1.0 and fixed[spec]["accept"] < 0.9
    # all of it accepted is a bootstrap of the draws: the local means again, 5 standard errors of 600 states
    error = 5 * math.sqrt(np.array(fixed[spec]["local_cov"])[0, 0] / 600)
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
    found = imh.imh(args)
    assert all(0 < x["accept"] < 1 for x in found)
    imh.figures(args)


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
    with pytest.raises(SystemExit, match="00000.json: row 0: a prompt without response"):
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
    process = subprocess.Popen(
        [sys.executable, method, "generate", *map(str, flags), "--out", killed], cwd=ROOT
    )
    while process.poll() is None and len(list(killed.glob("samples/*/*.json"))) < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("samples/*/*.json")}
    assert len(before) >= 3
    imh.generate(imh.replace(scored, out=str(killed), resume=True))
    run(method, "generate", *flags, "--out", two, processes=2)
    whole = Path(scored.out)
    chunks = {path.relative_to(whole): path.read_bytes() for path in whole.glob("samples/*/*.json")}
    assert len(chunks) == 18 and all(path.stat().st_mtime_ns == t for path, t in before.items())
    for other in (killed, two):
        assert {
            path.relative_to(other): path.read_bytes() for path in other.glob("samples/*/*.json")
        } == chunks
    with pytest.raises(SystemExit, match="seed 0 -> 1"):
        imh.generate(imh.replace(scored, out=str(killed), resume=True, seed=1))
    imh.score(imh.replace(scored, out=str(killed)))
    lost = next(killed.glob("scores/*/*.json"))
    lost.unlink()
    imh.score(imh.replace(scored, out=str(killed), resume=True))
    assert lost.read_bytes() == (whole / lost.relative_to(killed)).read_bytes()


def test_help_is_instant():
    start = time.time()
    done = run(ROOT / "methods/imh_adaptors.py", "--help")
    assert time.time() - start < 5 and "arxiv.org/abs/2406.10203" in done.stdout  # 0.3 s on an idle machine
    assert "typical_p090" in run(ROOT / "methods/imh_adaptors.py", "generate", "--help").stdout
