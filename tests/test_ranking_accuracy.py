"""methods/ranking_accuracy.py against numbers computed by other means: by hand, by enumeration, by
optimisation.
"""

import dataclasses
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ranking_accuracy as ra
import released
import scipy.stats
import torch
from conftest import run as start
from ranking_accuracy import Args
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from common import response_logps

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)


def close(actual, expected, atol=1e-6):
    """Published numbers have six or more decimals: 1e-6 is their last digit."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=atol,
        rtol=0,
    )


# ---- Eq. 1, 15, 11, 12, 14

PPL = [[4, 5], [6, 3], [2.5, 2.5], [3, 2, 4], [3, 2, 4]]
TOKENS = [[10, 8], [4, 12], [5, 5], [5, 20, 3], [5, 5, 5]]
HUMAN = [[1, 2], [1, 2], [1, 2], [2, 1, 3], [1, 1, 3]]
LOGPS = [[-n * math.log(p) for n, p in zip(*item)] for item in zip(TOKENS, PPL)]


def test_ranking_accuracy_by_hand():
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    assert ra.ranking_accuracy(chosen, rejected).tolist() == [1, 1, 0]  # >=: a tie counts
    assert ra.ranking_accuracy(chosen / 1, rejected / 4).tolist() == [
        0,
        0,
        0,
    ]  # Eq. 15 with 1 and 4 tokens


def measured(ranks, shares, logps, tokens, **options):
    """Items and records as `score` gives them -> what `measure` makes of them."""
    items = [ra.Item("", [], rank, share) for rank, share in zip(ranks, shares)]
    records = {}
    for i, pair in enumerate(zip(logps, tokens)):
        records[i] = [record(x, n) for x, n in zip(*pair)]
    return ra.measure(items, records, Args(**options))


def record(logp, tokens):
    return ra.Record(0, 0, float(logp), int(tokens), 1, False)


def test_exact_match_of_five_items():
    close(LOGPS[3], [-5.493061, -13.862944, -4.158883])
    assert [ra.competition_ranks([-p for p in ppl]) == h for h, ppl in zip(HUMAN, PPL)] == [
        1,
        0,
        0,
        1,
        0,
    ]
    assert [ra.competition_ranks(logps) == h for h, logps in zip(HUMAN, LOGPS)] == [0, 1, 0, 0, 0]
    pairs = ([3, 2, 1], [1.01, 0.02, 0.05]), ([1, 2, 3, 4], [0.08, 0.1, 0.2, 1])
    assert [ra.competition_ranks([-p for p in ppl]) == h for h, ppl in pairs] == [0, 1]

    found = measured(HUMAN, [None] * 5, LOGPS, TOKENS)
    assert found.lists == 2 and found.R.exact == 0 and found.R_tilde.exact == 0.5
    # Pairs, >=: items 1, 2, 3 give raw 0, 1, 1 and normalised 1, 0, 1. The fourth, human 2 1 3: raw
    # says y1 > y2 (wrong),
    # y3 > y1 (wrong), y3 > y2 (wrong); normalised all right. The fifth: y1 against y3 and y2
    # against y3, raw right, right;
    # normalised right (3 < 4), right (2 < 4).
    assert found.pairs == 8 and found.ties == 1 and found.R.ties == found.R_tilde.ties == 1
    # One of them is a tie of the model, in R and in R~: in an accuracy it counts half.
    close([found.R.accuracy, found.R_tilde.accuracy], [3.5 / 8, 6.5 / 8])
    # exact match by chance: 1/3! for the fourth, 0 for the fifth, whose humans tie
    close([found.chance_exact, found.shorter_exact], [1 / 12, 0])


@pytest.mark.parametrize(
    "scores, ranks",
    [
        ([3, 3, 1], [1, 1, 3]),
        ([3, 3, 3, 2], [1, 1, 1, 4]),
        ([4, 7, 3, 2], [2, 1, 3, 4]),
        ([(12, 2), (11, 2), (11, 1), (10, 1), (10, 1), (9, 1)], [1, 2, 3, 4, 4, 6]),
    ],
)
def test_competition_ranks(scores, ranks):
    assert ra.competition_ranks(scores) == ranks


def test_tie_rule():
    # Eq. 14 with equal votes for the first three items: R~ compares e^(log p / n): .500 and .509
    # are within .01, .50 and
    # .52 are not; R compares log-probs, of which only the third item's are within .01. The majority
    # wins the fourth
    # item with its .6 and loses the fifth with .4.
    probabilities = [(0.500, 0.509), (0.50, 0.52), (0.500, 0.5001), (0.6, 0.4), (0.6, 0.4)]
    found = measured(
        [[1, 1]] * 3 + [[1, 2], [2, 1]],
        [0.5, 0.5, 0.5, 0.75, 0.25],
        np.log(probabilities),
        [[1, 1]] * 5,
    )
    assert found.R_tilde.with_ties == pytest.approx(3 / 5) and found.R.with_ties == pytest.approx(
        2 / 5
    )
    assert found.ties == 3 and found.R.accuracy == 0.5


def test_correlations_against_scipy():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 4, (2, 6))  # ties in both
        if len(set(x)) == 1 or len(set(y)) == 1:
            continue
        expected = [
            f(x, y).statistic
            for f in (scipy.stats.pearsonr, scipy.stats.spearmanr, scipy.stats.kendalltau)
        ]
        np.testing.assert_allclose(
            ra.rank_correlations(x, y), expected, atol=1e-12
        )  # float64 rounding


def test_correlations_by_hand():
    close(ra.rank_correlations([2, 1, 4, 3], [2, 1, 3, 4]), [0.8, 0.8, 2 / 3])
    close(ra.rank_correlations([0.25, 9], [1.5, 6])[0], 1)
    assert ra.rank_correlations([1, 1], [1, 2]) is None  # not the released code's +-1
    strict = [
        ra.rank_correlations(h, ra.competition_ranks(s))
        for h, s in zip(HUMAN, LOGPS)
        if len(s) == 3
    ]
    # [2, 1, 3] by [2, 3, 1]: all three pairs turned around; [1, 1, 3] by [2, 1, 3]: tau-b = 2 /
    # sqrt(2 * 3)
    close([s[2] for s in strict], [-1, 2 / math.sqrt(6)])


@pytest.mark.parametrize(
    "scores, pearson, kendall",
    [([[-p for p in ppl] for ppl in PPL], 0.573205, 0.563299), (LOGPS, 0.173205, 0.163299)],
)
def test_published_mean_correlations(scores, pearson, kendall):
    # They count the model's tie at the third item as ranks 1, 1.001, hence as +1; here a constant
    # row is left out.
    ranks = [ra.competition_ranks(s) for s in scores]
    assert ra.rank_correlations(HUMAN[2], ranks[2]) is None
    ranks[2] = [1, 1.001]
    close(
        np.mean([ra.rank_correlations(h, r) for h, r in zip(HUMAN, ranks)], 0)[[0, 2]],
        [pearson, kendall],
    )


def test_published_distances():
    e, p = [2, 1, 4, 3], [2, 1, 3, 4]
    close(released.calibration(e, p)[:3], [0.5, 0.143841, 0])
    labels, p = [1, 0, 1, 0], [0.8, 0.3, 0.6, 0.4]
    assert released.calibration(labels, p)[3] == pytest.approx(
        0.325
    )  # each in a bin of its own: .2, .3, .4, .4
    assert released.calibration(labels, p, bins=2, quantiles=True)[3] == pytest.approx(
        0.325
    )  # {.3, .4} .35, {.6, .8} .3


def test_calibration_against_its_definition():
    # sum over bins of the share of pairs in it times |mean alpha - mean p|; of a calibrated p it
    # vanishes as 1/sqrt(n)
    rng = np.random.default_rng(0)
    p, alpha = rng.uniform(size=(2, 500))
    bins = np.minimum((10 * p).astype(int), 9)
    expected = sum(
        np.mean(bins == b) * abs(alpha[bins == b].mean() - p[bins == b].mean()) for b in range(10)
    )
    assert released.calibration(alpha, p)[3] == pytest.approx(expected)
    labels = rng.uniform(size=100_000) < (p := rng.uniform(size=100_000))
    assert (
        released.calibration(labels, p)[3] < 0.01
    )  # ten bins of 10,000: mean 0.004; above 0.01 below once in 10^6


def test_bootstrap_covers():
    # 95 % intervals of 200 samples of 100 coins: 190 +- 3.1 cover 0.6; below 180 has probability
    # 2e-3, seed fixed
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = ra.bootstrap_interval(
            rng.random(100) < 0.6, np.arange(100), seed, resamples=300
        )
        covered += low <= 0.6 <= high
    assert covered >= 180


def test_bootstrap_draws_items_not_pairs():
    # 50 items of 6 identical pairs know as much as 50 pairs: the interval is as wide
    values = np.random.default_rng(1).random(50) < 0.5
    single = ra.bootstrap_interval(values, np.arange(50), 0)
    repeated = ra.bootstrap_interval(values.repeat(6), np.arange(50).repeat(6), 0)
    np.testing.assert_allclose(single, repeated, atol=1e-12)


# ---- Eq. 2, 3

A1 = torch.tensor([0.75, 0.25, 1, 0, 0.75, 2 / 3], dtype=torch.float64)
PPL_1, PPL_2 = torch.tensor([[6, 3, 8, 2, 5, 3.1], [4, 4.5, 3, 9, 5, 3]], dtype=torch.float64)
N_1, N_2 = torch.tensor([[50, 20, 100, 10, 30, 40], [30, 40, 20, 60, 10, 41]], dtype=torch.float64)
RAW_1, RAW_2 = -N_1 * PPL_1.log(), -N_2 * PPL_2.log()
NORMALISED = {
    0.01: (109.455764, -109.455764, 689.694649, -689.171400, 109.861229, 69.281928),
    0.1: (10.580658, -10.580658, 68.086719, -67.563470, 10.986123, 6.898682),
    1.0: (0.693147, -0.693147, 5.925926, -5.402677, 1.098612, 0.660357),
    5.0: (-0.185743, 0.185743, 0.400522, 0.122726, 0.219722, 0.105840),
    10.0: (-0.295604, 0.295604, -0.290154, 0.813402, 0.109861, 0.036525),
}
RAW = {
    0.01: (61.862086, -71.670379, 504.703569, -565.773475, 77.672471, 69.101737),
    0.1: (-37.013020, 27.204727, -116.904361, 55.834455, -21.202635, 6.718491),
    1.0: (-46.900530, 37.092238, -179.065154, 117.995248, -31.090146, 0.480167),
    5.0: (-47.779420, 37.971128, -184.590557, 123.520652, -31.969036, -0.074351),
    10.0: (-47.889281, 38.080989, -185.281233, 124.211327, -32.078897, -0.143666),
}


@pytest.mark.parametrize(
    "beta, correct, theirs", [(0.01, 6, 6), (0.1, 6, 6), (1.0, 6, 6), (5.0, 3, 4), (10.0, 2, 2)]
)
def test_idealized_normalised(beta, correct, theirs):
    ref = PPL_2.log() - PPL_1.log()
    close(ra.idealized_log_ratio(ref, A1, beta), NORMALISED[beta])
    assert ra.idealized_ranking_accuracy(ref, A1, beta).sum() == correct
    found = released.idealized_ranking_accuracy(ref, A1, beta).sum()
    print(f"beta {beta}, of six pairs right: Eq. 3 {correct}, in the released code {found:.0f}")
    assert found == theirs
    if beta == 10:
        ratios = released.idealized_log_ratio(ref, A1, beta).exp()
        close(
            ratios, [0.744082, 1.34394, 0.748223, 0, 1.11612, 1.0372], atol=1e-5
        )  # printed to six digits


@pytest.mark.parametrize("beta, correct", [(0.01, 6), (0.1, 1), (1.0, 1), (5.0, 0), (10.0, 0)])
def test_idealized_raw(beta, correct):
    close(ra.idealized_log_ratio(RAW_1 - RAW_2, A1, beta), RAW[beta])
    assert ra.idealized_ranking_accuracy(RAW_1 - RAW_2, A1, beta).sum() == correct
    shares = A1.tolist()
    logps = torch.stack([RAW_1, RAW_2], 1)
    tokens = torch.stack([N_1, N_2], 1)
    ranks = [[1, 2] if a > 0.5 else [2, 1] for a in shares]
    found = measured(ranks, shares, logps, tokens)
    ideal = ra.ideal_table(found.R.delta, found.alpha, Args(betas=(beta,)))
    assert ideal[0] == [pytest.approx(correct / 6)]
    theirs = released.idealized_ranking_accuracy(released.raw_log_ratio(RAW_1, RAW_2), A1, beta)
    print(f"beta {beta}, raw, of six: Eq. 3 {correct}, in the released code {theirs.sum():.0f}")
    assert theirs.all()  # all right at every beta
    theirs = released.idealized_ranking_accuracy(RAW_1 / N_1 - RAW_2 / N_2, A1, beta)
    assert theirs.sum() == {5.0: 4, 10.0: 2}.get(beta, 6)


def test_released_example_of_three_items():
    # beta 2: human ratios .25, 9, 1 and posteriors sqrt(.25) 3/1 = 1.5, sqrt(9) 4/2 = 6, 4/3 ->
    # only the second agrees
    alpha, ref = (
        torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64),
        torch.tensor([3.0, 2.0, 4 / 3]).log(),
    )
    close(ra.idealized_log_ratio(ref, alpha, 2.0).exp(), [1.5, 6, 4 / 3])
    assert released.idealized_ranking_accuracy(ref, alpha, 2.0).tolist() == [0, 1, 0]


def test_log_version_of_two_items():
    # a1 = exp(-.1), exp(-.2): log odds 2.252, 1.508; with log-ppl (4, 2), (2, 1.5) the order turns
    # around
    alpha = torch.tensor([-0.1, -0.2], dtype=torch.float64).exp()
    ideal = ra.idealized_log_ratio(torch.tensor([-2.0, -0.5]), alpha, 1.0)
    close(ra.rank_correlations(torch.logit(alpha).numpy(), ideal.numpy())[0], -1)


def test_one_sided_epsilon():
    # unanimous for the second response: released odds 0, right at every beta; symmetric odds 1/999,
    # wrong at beta 10
    ours = ra.idealized_log_ratio(0.0, 0.0, 1.0).item()
    theirs = released.idealized_log_ratio(0.0, 0.0, 1.0).item()
    print("log odds of a share of 0: here", ours, "in the released code", theirs)
    assert ours == pytest.approx(-math.log(999)) and theirs == -math.inf
    assert released.idealized_log_ratio(0.0, 1.0, 1.0).item() == pytest.approx(math.log(1000))
    assert released.idealized_ranking_accuracy(50.0, 0.0, 10.0) == 1
    assert ra.idealized_ranking_accuracy(50.0, 0.0, 10.0) == 0


def test_limits_and_monotony():
    torch.manual_seed(0)
    ref, alpha = 20 * torch.randn(500, dtype=torch.float64), torch.rand(500, dtype=torch.float64)
    own = ra.ranking_accuracy(torch.where(alpha >= 0.5, ref, -ref), 0)
    assert ra.idealized_ranking_accuracy(ref, alpha, 1e-9).all()
    assert torch.equal(
        ra.idealized_ranking_accuracy(ref, alpha, 1e9), own.double()
    )  # the reference's own ranking
    assert ra.idealized_ranking_accuracy(torch.zeros(500), alpha, 10.0).all()
    grid = torch.logspace(-4, 4, 200, dtype=torch.float64)
    right = torch.stack([ra.idealized_ranking_accuracy(ref, alpha, b) for b in grid])
    assert (right.diff(dim=0) <= 0).all()  # a pair is lost at most once as beta grows ...
    flip = -torch.logit(alpha.clamp(0.001, 0.999)) / ref
    lost_at = torch.where(flip > 0, flip, math.inf)  # ... at beta = -logit(alpha) / log-ratio
    assert torch.equal(right, 1.0 * (grid[:, None] < lost_at))


# ---- the toy bigram model: four tokens, BOS = EOS = 0

POLICY = torch.tensor(
    [[(3 * i + 5 * j + 1) % 7 / 2 for j in range(4)] for i in range(4)], dtype=torch.float64
)
REFERENCE = torch.tensor(
    [[(2 * i + 3 * j) % 5 / 2 for j in range(4)] for i in range(4)], dtype=torch.float64
)
PROMPT, CHOSEN, REJECTED = [1], [2, 3, 0], [3, 3, 1, 2, 0]


def bigram_logp(table, prompt, response):
    ids = [0, *prompt, *response]
    return sum(
        table.log_softmax(-1)[a, b].item() for a, b in list(zip(ids, ids[1:]))[len(prompt) :]
    )


def test_raw_and_normalised_differ_on_the_bigram():
    w, l = (bigram_logp(POLICY, PROMPT, y) for y in (CHOSEN, REJECTED))
    close(
        [w, l, w / 3, l / 5],
        [-7.623465320327, -11.286157151497, -2.541155106776, -2.257231430299],
        1e-11,
    )
    assert ra.ranking_accuracy(w, l) == 1 and ra.ranking_accuracy(w / 3, l / 5) == 0
    for response, expected in (
        (CHOSEN, -0.276256651285),
        (REJECTED, -1.136077933356),
    ):  # sum of log(1 - p)
        logps = [bigram_logp(POLICY, [*PROMPT, *response[:t]], [y]) for t, y in enumerate(response)]
        close(sum(math.log1p(-math.exp(logp)) for logp in logps), expected, 1e-11)
    w, l = (bigram_logp(REFERENCE, PROMPT, y) for y in (CHOSEN, REJECTED))
    close(
        [w, l, w / 3, l / 5],
        [-4.079912330813, -6.413257392452, -1.359970776938, -1.282651478490],
        1e-11,
    )
    assert ra.ranking_accuracy(w, l) == 1 and ra.ranking_accuracy(w / 3, l / 5) == 0


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (0.75, (13.319467948320, 4.530569638975, 3.431957350307)),
        (0.9, (24.305590835001, 6.727794216311, 4.530569638975)),
        (2 / 3, (9.264816867238, 3.719639422759, 3.026492242199)),
    ],
)
def test_idealized_on_the_bigram(alpha, expected):
    ref = bigram_logp(REFERENCE, PROMPT, CHOSEN) - bigram_logp(REFERENCE, PROMPT, REJECTED)
    close(
        [ra.idealized_log_ratio(ref, alpha, beta).item() for beta in (0.1, 0.5, 1.0)],
        expected,
        1e-11,
    )


def test_optimum_on_the_enumerated_bigram():
    # All 40 responses of 1 to 3 tokens after the prompt (EOS ends one) are arms of a softmax
    # policy.  Its DPO^gamma
    # optimum with soft labels, found by Newton's method on the two arms compared, has the log-ratio
    # of Eq. 2.
    arms = [
        y
        for n in (1, 2, 3)
        for y in itertools.product(range(4), repeat=n)
        if 0 not in y[:-1] and (n == 3 or y[-1] == 0)
    ]
    ref = torch.tensor([bigram_logp(REFERENCE, PROMPT, y) for y in arms], dtype=torch.float64)
    close(ref.exp().sum(), 1.0, 1e-12)  # the enumeration is complete
    rng = np.random.default_rng(0)
    for _ in range(20):
        w, l = rng.choice(len(arms), 2, replace=False)
        alpha, beta, gamma = (
            rng.uniform(0.05, 0.95),
            rng.uniform(0.2, 2),
            rng.choice([0.0, 0.5, 1.0, 2.0]),
        )
        ideal = ra.idealized_log_ratio(ref[w] - ref[l], alpha, beta, gamma)
        assert ideal.item() == pytest.approx(minimise(ref, w, l, alpha, beta, gamma)[0], abs=1e-6)


def minimise(ref, w, l, alpha, beta, gamma):
    """Optimum of the soft-label DPO^gamma loss over free logits -> log-ratio of w to l, loss.

    Newton on their difference.
    """
    delta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        margin = beta * (delta - gamma * (ref[w] - ref[l]))
        loss = -alpha * torch.nn.functional.logsigmoid(margin) - (
            1 - alpha
        ) * torch.nn.functional.logsigmoid(-margin)
        (slope,) = torch.autograd.grad(loss, delta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, delta)
        with torch.no_grad():
            delta -= (slope / curvature.clamp(min=1e-6)).clamp(-1 / beta, 1 / beta)
    return delta.item(), loss.item()


ARMS = torch.tensor([0.05, 0.10, 0.15, 0.45, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(
    "beta, alpha, gamma, log_ratio, entropy",
    [
        (0.5, 0.8, 1.0, 0.5753641449, 0.5004024235),
        (0.1, 0.75, 1.0, 8.7888983093, 0.5623351446),
        (0.5, 0.8, 0.5, 1.6739764336, 0.5004024235),
        (1.0, 0.6, 1.0, -1.7917594692, 0.6730116670),
    ],
)
def test_optimum_of_five_arms(beta, alpha, gamma, log_ratio, entropy):
    ref = ARMS.log()
    assert ra.idealized_log_ratio(ref[0] - ref[3], alpha, beta, gamma).item() == pytest.approx(
        log_ratio, abs=1e-9
    )
    assert ra.idealized_ranking_accuracy(ref[0] - ref[3], alpha, beta, gamma) == (log_ratio > 0)
    found, loss = minimise(ref, 0, 3, alpha, beta, gamma)
    assert found == pytest.approx(log_ratio, abs=1e-7) and loss == pytest.approx(entropy, abs=1e-9)


def test_rlhf_optimum():
    rewards, beta = torch.tensor([1.2, 0.3, -0.5, 0.4, 0], dtype=torch.float64), 0.5
    optimum = (ARMS.log() + rewards / beta).softmax(0)
    close(optimum, [0.2701697952, 0.0893175336, 0.0270493485, 0.4909170683, 0.1225462543], 1e-9)
    alpha = torch.sigmoid(rewards[0] - rewards[3])
    close(alpha, 0.6899744811, 1e-9)
    close(ra.idealized_log_ratio((ARMS[0] / ARMS[3]).log(), alpha, beta), -0.5972245773, 1e-9)


# ---- Theorem 4.1, Prop. 2.6, Prop. A.7


def test_thresholds():
    c = torch.tensor([-32.2, 0, 0.26, 0.45, 10, 50, 100, 457.6], dtype=torch.float64)
    expected = torch.tensor(
        [
            3.259177499,
            0.6931471806,
            0.6802316782,
            0.6709002842,
            0.3132616875,
            0.006715348489,
            4.539889922e-5,
            1.338703837e-20,
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        ra.loss_threshold(c, 0.1), expected, rtol=1e-9, atol=0
    )  # relative: 1e-20 must not be 0
    # read backwards: the largest c for which a loss means that the pair is ranked right
    largest = [1.958704, 10.502256, 22.521685, 29.706281, 46.001660]
    close(ra.loss_threshold(largest, 0.1), [0.6, 0.3, 0.1, 0.05, 0.01])
    close(
        ra.loss_threshold(largest, 0.2, 0.5), [0.6, 0.3, 0.1, 0.05, 0.01]
    )  # beta gamma is what counts


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_theorem_on_random_pairs(gamma):
    torch.manual_seed(0)
    delta, c = 50 * torch.randn(2, 100_000, dtype=torch.float64)
    loss = -torch.nn.functional.logsigmoid(0.1 * (delta + gamma * c))
    # rounding decides only where both sides agree to the last bits: losses below 1e-300 and |delta|
    # < 1e-10 do not occur
    assert torch.equal(loss <= ra.loss_threshold(c, 0.1, gamma), delta >= 0)
    right = (c <= 0) & (-torch.nn.functional.logsigmoid(0.1 * (delta + c)) <= math.log(2))
    assert (delta[right] >= 0).all()  # Prop. 2.6, which has 0.6, with its sharp constant


def test_ipo():
    assert ra.ipo_threshold(-3.0, 0.1).item() == pytest.approx(4.0)
    torch.manual_seed(0)
    delta, ref = 10 * torch.randn(2, 100_000, dtype=torch.float64)
    loss = (delta - ref - 1 / (2 * 0.1)) ** 2
    guaranteed = loss < ra.ipo_threshold(ref, 0.1)
    assert guaranteed.any() and (delta[guaranteed] >= 0).all()
    assert (
        ref[ra.ipo_threshold(ref, 0.1) == -math.inf] + 5 < 0
    ).all()  # zero loss there means delta < 0


def test_losses_of_dpo_gamma():
    # The loss of a table of four pairs, beta .1: below its threshold exactly where the policy ranks
    # the pair right
    delta, ref = torch.tensor([[12.5, -21.5, 0, -13], [5, -40, 3, -19.5]], dtype=torch.float64)
    for gamma, expected in (
        (0.5, (0.3132616875, 0.7709570478, 0.7709570478, 0.8687926040)),
        (1.0, (0.3868710061, 0.1460354111, 0.8543552445, 0.4200553357)),
    ):
        losses = -torch.nn.functional.logsigmoid(0.1 * (delta - gamma * ref))
        close(losses, expected, 1e-9)
        assert (losses <= ra.loss_threshold(-ref, 0.1, gamma) + 1e-12).tolist() == [
            True,
            False,
            True,
            False,
        ]


# ---- scoring: the bigram model as a transformer whose single layer adds nothing


def save_bigram(folder, table):
    """Tokens 0 (BOS = EOS) to 3, written "a" to "d"; logits of the next token are the row of the
    last one.
    """
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-20,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(
            torch.eye(4)
        )  # the final norm makes it twice the identity
        model.lm_head.weight.copy_(table.T / 2)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="a", eos_token="a").save_pretrained(
        folder
    )
    return str(folder)


def text(ids):
    return " ".join("abcd"[i] for i in ids)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of the reference and the policy, and a file of 40 pairs with known probabilities."""
    folder = tmp_path_factory.mktemp("bigram")
    ra.setup(0)
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        prompt, *pair = (rng.integers(1, 4, rng.integers(1, 7)).tolist() for _ in range(3))
        rows.append(
            dict(
                prompt=text(prompt),
                chosen=text(pair[0]),
                rejected=text(pair[1]),
                ids=[prompt, *pair],
                p_chosen=float(rng.uniform(0.02, 0.98)),
            )
        )
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        ref=save_bigram(folder / "ref", REFERENCE),
        policy=save_bigram(folder / "policy", POLICY),
        data=str(folder / "test.jsonl"),
        rows=rows,
        folder=folder,
    )


def scored(model, items, folder, **options):
    folder.mkdir(exist_ok=True)
    return ra.score(model, items, folder, Args(**options))


def item(prompt, *responses):
    return ra.Item(text(prompt), [text(response) for response in responses], [1, 2], None)


def test_scores_are_those_of_the_bigram(world, tmp_path):
    items = [item([1], [2, 3], [3, 3, 1, 2]), item([1, 2, 3, 1], [2, 3], [3, 3, 1, 2])]
    right = scored(world["policy"], items, tmp_path)
    for i in (0, 1):  # a bigram forgets all of the prompt but its last token
        close(
            [record.logp for record in right[i]], [-7.623465320327, -11.286157151497], 3e-6
        )  # float32
        assert [record.tokens for record in right[i]] == [3, 5]
    assert [record.prompt_tokens for record in right[1]] == [4, 4]
    row = dict(prompt_ids=[0, 1, 2, 3, 1], responses=[[2, 3, 0], [3, 3, 1, 2, 0]])
    window = scored_rows(world["policy"], released.score_the_first_tokens(row))
    print("log p here", [r.logp for r in right[1]], "in the released code's window", window)
    close(window, [-6.069563843983, -9.732255675153], 3e-6)
    close([window[0] / 3, window[1] / 5], [-2.023187947994, -1.946451135031], 1e-6)


def scored_rows(model, row):
    (batch,) = ra.pack_pairs([row], 1000, 0, 1)
    return response_logps(ra.load_model(model), batch)[0].tolist()


def test_padding_and_batches_do_not_matter(world, tmp_path):
    items = ra.load_items(world["data"], Args())
    few, many = (
        scored(world["ref"], items, tmp_path / str(n), tokens_per_microbatch=n)
        for n in (1, 100_000)
    )
    for i, row in enumerate(world["rows"]):
        exact = [bigram_logp(REFERENCE, row["ids"][0], [*y, 0]) for y in row["ids"][1:]]
        close([r.logp for r in few[i]], exact, 5e-6)  # float32, up to eight tokens
        close([r.logp for r in few[i]], [r.logp for r in many[i]], 1e-6)


def test_scores_add_up(world, tmp_path):
    # log p(y | x) + log p(z | x y) = log p(y z | x), and a bare end of text adds its own log-prob
    x, y, z = [1, 3], [2, 2, 1], [3, 1]
    found = scored(
        world["policy"], [item(x, y, y + z), item(x + y, z, z)], tmp_path, text="released"
    )
    close(found[0][0].logp + found[1][0].logp, found[0][1].logp, 3e-6)
    ended = scored(world["policy"], [item(x, y, y + z)], tmp_path)
    close(ended[0][0].logp - found[0][0].logp, POLICY.log_softmax(-1)[1, 0], 3e-6)


def test_constant_logits(tmp_path, world):
    # log p = -|y| log 4: R counts |y_w| < |y_l|, and half of the equals, as the "shorter wins"
    # baseline does; every R~ is a tie
    flat, args = save_bigram(tmp_path / "flat", torch.zeros(4, 4)), Args(betas=(1e-3,))
    items = ra.load_items(world["data"], args)
    found = ra.measure(items, scored(flat, items, tmp_path / "records"), args)
    lengths = [
        [len(y) for y in row["ids"][1:]][:: 1 if row["p_chosen"] >= 0.5 else -1]
        for row in world["rows"]
    ]
    by_length = [(w < l) + (w == l) / 2 for w, l in lengths]
    assert found.R.accuracy == found.shorter == pytest.approx(np.mean(by_length))
    assert (
        found.R_tilde.with_ties < 1
        and found.R_tilde.accuracy == 0.5
        and found.R_tilde.ties == len(items)
    )


def test_published_perplexities_of_constant_logits(tmp_path):
    ra.setup(0)
    # Logits (2, 1, 0) whatever comes before, no BOS, prompt of two tokens; the fourth token has no
    # mass (e^-80).
    model = ra.load_model(
        save_bigram(tmp_path / "model", torch.tensor([2.0, 1, 0, -80]).expand(4, 4))
    )
    rows = [
        dict(prompt_ids=[2, 2], responses=[response]) for response in ([1, 0], [1, 0, 1], [1, 0])
    ]
    sums, tokens = zip(*(response_logps(model, batch) for batch in ra.pack_pairs(rows, 100)))
    assert torch.cat(tokens).tolist() == [2, 3, 2]
    close(
        torch.exp(-torch.cat(sums).double() / torch.cat(tokens)),
        [2.478382090561, 2.927862489744, 2.478382090561],
    )


def test_near_ties_of_bfloat16_are_scored_again(tmp_path):
    # Rankings must not depend on the precision: of all responses of up to three tokens, neighbours
    # in likelihood
    table = POLICY * 1.0123  # bfloat16 rounds these logits
    model = save_bigram(tmp_path / "model", table)
    responses = [[*y] for n in (1, 2, 3) for y in itertools.product((1, 2, 3), repeat=n)]
    responses.sort(key=lambda y: bigram_logp(table, [1], y))
    items = [item([1], *pair) for pair in zip(responses, responses[1:])] + [
        item([1], responses[0], responses[-1])
    ]
    options = dict(text="released")
    exact, found = (
        scored(model, items, tmp_path / dtype, dtype=dtype, **options)
        for dtype in ("float32", "bfloat16")
    )
    again = {
        i for i in exact if all(abs(a.logp - b.logp) < 1e-5 for a, b in zip(found[i], exact[i]))
    }
    assert (
        again >= {i for i, (a, b) in exact.items() if abs(a.logp - b.logp) < 0.005}
        and len(items) - 1 not in again
    )
    for form in (lambda r: r.logp), (lambda r: r.logp / r.tokens):
        orders = [
            [np.sign(form(a) - form(b)) for a, b in scores.values()] for scores in (exact, found)
        ]
        assert orders[0] == orders[1]


def test_killed_run_goes_on(world, tmp_path, monkeypatch):
    items = ra.load_items(world["data"], Args())
    whole = scored(world["ref"], items, tmp_path)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(True)
    # killed inside a line, in the second response of item 10
    path.write_text("".join([*lines[:21], lines[21][:20]]))
    asked = []
    pack_pairs = ra.pack_pairs
    monkeypatch.setattr(
        ra, "pack_pairs", lambda rows, *rest: asked.extend(rows) or pack_pairs(rows, *rest)
    )
    again = scored(world["ref"], items, tmp_path)
    assert again == whole and [row["item"] for row in asked] == list(range(10, len(items)))
    monkeypatch.setattr(ra, "load_model", None)  # a third time needs no model
    assert scored(world["ref"], items, tmp_path) == whole


RECORD = dict(item=1, response=1, logp=-2.5, tokens=3, prompt_tokens=2, cut=False)


@pytest.mark.parametrize(
    "damage, why",
    [
        (dict(item=40), "there is no item 40"),
        (dict(item=-1), "there is no item -1"),
        (dict(item="1"), "there is no item '1'"),
        (dict(item=True), "there is no item True"),
        (dict(item=1.0), "there is no item 1.0"),
        (dict(response=2), "has no response 2"),
        (dict(response=-1), "has no response -1"),
        (dict(response=None), "has no response None"),
        (dict(logp=math.nan), "logp nan is not a finite number"),
        (dict(logp=-math.inf), "logp -inf is not a finite number"),
        (dict(logp="-2.5"), "logp '-2.5' is not a finite number"),
        (dict(logp=[]), "logp [] is not"),
        (dict(logp=10**400), "is not a finite number"),
        (dict(tokens=0), "tokens 0 is not a number of tokens"),
        (dict(tokens=-3), "tokens -3"),
        (dict(tokens=2.5), "tokens 2.5"),
        (dict(tokens=True), "tokens True"),
        (dict(prompt_tokens=0), "prompt_tokens 0"),
        (dict(cut=0), "cut 0 is neither true nor false"),
        (dict(extra=1), "its names are not those of a record"),
        ("", "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("nonsense", "not a JSON object"),
        ("\udcff", "not a JSON object"),
    ],
)
def test_damaged_records_are_named(tmp_path, damage, why):
    """A line that is no record of these items: file, line, what is wrong, and the remedy."""
    items = [item([1], [2], [3]), item([1], [2], [3])]
    path = tmp_path / "records-1.jsonl"
    good = json.dumps(RECORD)
    bad = json.dumps(RECORD | damage) if isinstance(damage, dict) else damage
    text = f"{good}\n{bad}\n{good}\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        ra.read_records(path, items)
    message = str(stop.value)
    assert message.startswith(f"{path}:2: damaged, delete it: ") and why in message
    assert "\n" not in message and len(message.replace(str(tmp_path), "")) <= 200
    path.write_text(good + "\n")
    assert ra.read_records(path, items) == {(1, 1): ra.Record(**RECORD)}


def test_damaged_records_end_a_run(world, tmp_path):
    items = ra.load_items(world["data"], Args())
    scored(world["ref"], items, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("logp", 'lo"gp', 1))
    with pytest.raises(SystemExit, match="records-.*:1: damaged, delete it"):
        scored(world["ref"], items, tmp_path)


@pytest.fixture
def no_signals():
    """Signals that a test sends to itself are forgotten after it."""
    yield
    common.signals.clear()


def test_a_signal_ends_scoring_within_a_step(world, tmp_path, monkeypatch, no_signals):
    """SIGTERM in the third micro-batch: what was scored is kept, and --resume ends as in one go."""
    whole = run(world, tmp_path / "whole", model=(world["ref"],), tokens_per_microbatch=20)
    exact = ra.token_logps
    batches = []

    def signalled(model, batch):
        batches.append(batch["responses"])
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return exact(model, batch)

    options = dict(model=(world["ref"],), tokens_per_microbatch=20)
    monkeypatch.setattr(ra, "token_logps", signalled)
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", **options)
    assert stop.value.code == 143 and len(batches) == 3
    (path,) = (tmp_path / "run").glob("records-*")
    before = path.read_text().splitlines()
    assert len(before) == sum(batches) and not (tmp_path / "run/metrics.jsonl").exists()

    # The rest, and nothing of what was there.
    common.signals.clear()
    batches += [0, 0]
    again = run(world, tmp_path / "run", resume=True, **options)
    lines = path.read_text().splitlines()
    assert lines[: len(before)] == before and len(lines) == 2 * len(world["rows"])
    assert sum(batches) == len(lines)
    close(again[0].measured.R.delta, whole[0].measured.R.delta, 1e-6)


def test_a_signal_ends_the_arithmetic_within_a_step(world, tmp_path, monkeypatch, no_signals):
    """Ctrl-C before the second bootstrap, of as many resamples as last for hours."""
    bootstrap = ra.bootstrap_interval
    calls = []

    def signalled(values, items, seed):
        calls.append(len(values))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            return bootstrap(values, items, seed, resamples=10**9)
        return bootstrap(values, items, seed)

    monkeypatch.setattr(ra, "bootstrap_interval", signalled)
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run")
    assert stop.value.code == 143 and len(calls) == 2
    assert not (tmp_path / "run/metrics.jsonl").exists()
    common.signals.clear()
    monkeypatch.undo()
    monkeypatch.setattr(ra, "load_model", None)  # all is scored
    assert len(run(world, tmp_path / "run", resume=True)) == 2


@pytest.mark.parametrize("function", ["all_pairs", "measure_lists"])
def test_a_signal_ends_loops_over_items(function, no_signals):
    items = [ra.Item("", [], [1, 2, 3], None)]
    records = {0: [record(-1, 1), record(-2, 1), record(-3, 1)]}
    measured = ra.measure(items, records, Args())
    common.signals.append(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        if function == "all_pairs":
            ra.all_pairs(items, records, 0.75)
        else:
            ra.measure_lists(measured, [(items[0].ranks, records[0])])
    assert stop.value.code == 143


SIGNALLED = """
import os, signal, sys
sys.path[:0] = [{methods!r}]
import ranking_accuracy as ra
exact = ra.token_logps
batches = []

def signalled(model, batch):
    batches.append(batch)
    if len(batches) == 2 and ra.dist.get_rank() == 1 and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return exact(model, batch)

ra.token_logps = signalled
args = ra.Args(model=(sys.argv[1],), data=(sys.argv[2],), out=sys.argv[3], tokens_per_microbatch=20)
args.resume = "--resume" in sys.argv
ra.main(args)
"""


def test_two_processes_stop_together(world, tmp_path):
    """A signal to one of them ends both after the same micro-batch; what both scored is kept."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(methods=str(Path(ra.__file__).parent)))
    command = [script, world["ref"], world["data"]]
    out = str(tmp_path / "run")
    done = start(*command, out, processes=2, check=False)
    assert done.returncode == 1 and done.stderr.count("exit code 143") == 2, done.stderr
    assert "line" not in done.stdout and "Gloo" not in done.stderr
    (path,) = Path(out).glob("records-*")
    before = path.read_text().splitlines()
    assert 4 <= len(before) < 2 * len(world["rows"])
    start(*command, out, "--resume", processes=2)
    lines = path.read_text().splitlines()
    assert lines[: len(before)] == before and len(lines) == 2 * len(world["rows"])
    places = {(row["item"], row["response"]) for row in map(json.loads, lines)}
    assert len(places) == len(lines)


def test_unusable_items_are_counted(world, tmp_path, capsys):
    items = [
        item([1], [2], [3]),
        item([1] * 64, [2], [3]),
        item([1], [2], [3] * 70),
        item([1], [2], [0]),
    ]
    found = scored(world["policy"], items, tmp_path)
    assert (
        list(found) == [0, 2]
        and [r.cut for r in found[2]] == [False, True]
        and found[2][1].tokens == 63  # of 64 the prompt has one
    )
    line = capsys.readouterr().out
    assert (
        "kept 2, dropped 2" in line
        and "prompt fills the context: 1" in line
        and "responses cut 1" in line
    )
    assert "contains the special token a: 1" in line


def test_scores_that_are_not_finite_are_left_out(world, tmp_path, monkeypatch, capsys):
    exact = ra.token_logps
    monkeypatch.setattr(
        ra,
        "token_logps",
        lambda model, batch: exact(model, batch).masked_fill(batch["targets"] == 2, math.nan),
    )
    found = scored(world["policy"], [item([1], [3], [1]), item([1], [2, 1], [3])], tmp_path)
    assert list(found) == [0] and "log-prob is not finite: 1" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()  # their records are not kept, so that the file can be read again
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == [0, 0, 1]
    assert scored(world["policy"], [item([1], [3], [1]), item([1], [2, 1], [3])], tmp_path) == found


def test_chat_template_and_both_texts(world):
    tokenizer = ra.load_tokenizer(world["policy"])

    def ids(prompt, **options):
        one = ra.Item(prompt, ["c", "d"], [1, 2], None)
        ((row,),) = ra.encode(tokenizer, [one], Args(**options), 64)
        return row["prompt_ids"], row["responses"]

    assert ids("b") == ([1], [[2, 0], [3, 0]])
    assert ids("b", text="released") == ([0, 1], [[2], [3]])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'd ' if m['role'] == 'user' else 'c ' }}{{ m['content'] }} "
        "{% endfor %}{{ 'c ' if add_generation_prompt }}"
    )
    chat = [{"role": "user", "content": "b"}]
    assert ids(chat) == ids(chat, text="released") == ([3, 1, 2], [[2, 0], [3, 0]])


# ---- data of every kind


def items_of(folder, rows, **options):
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ra.load_items(str(path), Args(**options))


def test_ultrafeedback_and_stack_exchange(tmp_path):
    (found,) = items_of(
        tmp_path,
        [
            dict(
                instruction="x",
                completions=[
                    dict(response=r, overall_score=s) for r, s in zip("pqrs", (4, 7, 3, 2))
                ],
            )
        ],
    )
    asked = "\n\nHuman: x\n\nAssistant:"
    assert found == ra.Item(asked, [" p", " q", " r", " s"], ranks=[2, 1, 3, 4], share=None)
    (found,) = items_of(
        tmp_path,
        [
            dict(
                question="x",
                answers=[dict(text=r, pm_score=s) for r, s in zip("pqrs", (3, 3, "3", 2))],
            )
        ],
        text="released",
    )
    assert found == ra.Item("x", list("pqrs"), ranks=[1, 1, 1, 4], share=None)


def test_shp_groups_the_answers_of_a_post(tmp_path):
    answers = [("p", 12, 2), ("q", 11, 2), ("r", 11, 1), ("s", 10, 1), ("t", 10, 1), ("u", 9, 1)]
    rows = [
        dict(
            post_id="1",
            history="x",
            human_ref_A=a[0],
            human_ref_B=b[0],
            score_A=a[1],
            score_B=b[1],
            created_at_utc_A=a[2],
            created_at_utc_B=b[2],
            labels=1,
        )
        for a, b in zip(answers, answers[1:])
    ]
    other = dict(rows[0], post_id="2", history="y")
    first, second = items_of(tmp_path, [*rows, other], text="released")
    assert first == ra.Item(
        prompt="x", responses=list("pqrstu"), ranks=[1, 2, 3, 4, 4, 6], share=None
    )
    assert second.prompt == "y" and second.ranks == [1, 2]


def votes(pair, *preferences):
    return [
        dict(instruction=pair, output_1=pair + "1", output_2=pair + "2", preference=p)
        for p in preferences
    ]


def test_alpaca_farm_votes(tmp_path):
    rows = votes("p", 2, 1, 1) + votes("q", 2, 1) + votes("r", 2)
    found = items_of(tmp_path, rows[::-1], text="released")
    assert {i.prompt: (i.ranks, i.share) for i in found} == {
        "p": ([1, 2], 2 / 3),
        "q": ([1, 1], 0.5),
        "r": ([2, 1], 0.0),
    }


def test_simulated_proportions(tmp_path):
    pair = dict(prompt="p", chosen="a", rejected="b")
    found = items_of(tmp_path, [pair | dict(p_chosen=0.8, votes=[1, 2])])
    assert found[0].share == 0.8  # a known probability comes before votes
    items = items_of(tmp_path, [pair, pair | dict(chosen="c")])
    items[1].ranks = [2, 1]
    records = {i: [record(-n, n) for n in (2, 1)] for i in (0, 1)}
    line = ra.measure(items, records, Args(proportion=0.6))
    close(line.alpha, [0.6, 0.6])  # of y_w, whichever of the two it is
    assert line.R.accuracy == 0.5


def test_votes_are_drawn_whole(tmp_path):
    # 649 pairs of 4 votes. The released code draws 1000 votes: an item keeps 1.8 of them on
    # average,
    # some none; drawing items keeps all votes of each.
    rows = []
    for i in range(649):
        rows += votes(f"x{i:03}", *np.random.default_rng(i).integers(1, 3, 4).tolist())
    whole = items_of(tmp_path, rows, sample=100)
    single = items_of(tmp_path, released.draw_rows(rows, 1000))
    assert len(whole) == 100 and {item.share for item in whole} == {0, 0.25, 0.5, 0.75, 1}
    assert 530 < len(single) < 580  # 649 (1 - (1 - 1000/2596)^4) = 556, standard deviation 7
    ours, theirs = (np.mean([item.share in (0, 1) for item in x]) for x in (whole, single))
    print(f"unanimous: {ours:.3f} of items here, {theirs:.3f} in the released code; fair coins 1/8")
    assert theirs > 0.5 > ours


def test_rows_that_are_not_what_they_seem(tmp_path):
    wrong_type = "a column of the wrong type: 1, the first is row 1"
    for row, why in (
        (dict(votes("p", 1)[0], preference=3), "neither 1 nor 2"),
        (dict(preference=1, instruction="x", output_1="p"), "row 1 has no 'output_2', only"),
        (dict(completions=None, instruction="x"), wrong_type),
        (dict(completions=[{"response": "p"}]), "row 1 has no 'instruction', only completions"),
        (dict(prompt="x", chosen="p", rejected="q", votes=3), wrong_type),
        (dict(prompt="x", chosen="p", rejected="q", p_chosen="often"), "'often' is not a number"),
    ):
        with pytest.raises(SystemExit, match=f"test.jsonl.*{why}"):
            items_of(tmp_path, [row])


def test_numbers_in_a_csv(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("prompt,chosen,rejected,p_chosen\nx,1.50,NA,0.75\nx,2,3,0.25\n")
    first, second = ra.load_items(str(path), Args())
    assert first == ra.Item("x", ["1.50", "NA"], [1, 2], 0.75) and second.share == 0.25


@pytest.mark.parametrize(
    "n, start",
    [(8552, [4249, 399, 5129, 197, 3721, 1278]), (2596, [2332, 89, 1903, 2263, 1797, 349])],
)
def test_sample_is_the_released_one(tmp_path, n, start):
    rows = [dict(prompt=str(i), chosen="a", rejected="b") for i in range(n)]
    found = items_of(tmp_path, rows, sample=1000)
    assert len(found) == 1000 and [int(i.prompt) for i in found[:6]] == start


def test_pairs_lists_votes_and_transcripts(tmp_path):
    rows = [
        dict(prompt="x", chosen="p", rejected="q", votes=[1, 3]),
        dict(prompt="x", chosen="p", rejected="q", votes=[0, 0]),
        dict(prompt="x", chosen="p", rejected="q", votes=[2, 2], p_chosen=0.9),
        dict(
            chosen="\n\nHuman: 1\n\nAssistant: 1\n\nHuman: Q\n\nAssistant: good",
            rejected="\n\nHuman: 1\n\nAssistant: 1\n\nHuman: Q\n\nAssistant: bad",
        ),
    ]
    a, b, c = items_of(tmp_path, rows)
    assert (a.ranks, a.share) == ([2, 1], 0.25)  # y_w is the majority's choice, whatever the label
    assert (b.ranks, b.share) == ([1, 2], 0.9)
    assert c == ra.Item(
        prompt="\n\nHuman: 1\n\nAssistant: 1\n\nHuman: Q\n\nAssistant:",
        responses=[" good", " bad"],
        ranks=[1, 2],
        share=None,
    )
    lists = [
        dict(prompt="x", responses=["p", "q", "r"], scores=[1, 3, 2]),
        dict(prompt="x", responses=["p", "q"], ranks=[2, 1]),
        dict(prompt="x", responses=["p"], scores=[1]),
        dict(prompt="x", responses=["p", "q"], scores=[1]),
        dict(prompt="x", responses=["p", " "], scores=[1, 2]),
    ]
    assert [i.ranks for i in items_of(tmp_path, lists)] == [[3, 1, 2], [2, 1]]


def test_dropped_rows_are_counted(tmp_path, capsys):
    rows = (
        votes("p", 1)
        + [dict(votes("q", 1)[0], output_2="")]
        + [dict(votes("r", 1)[0], output_1=None)]
    )
    assert len(items_of(tmp_path, rows)) == 1
    line = capsys.readouterr().out
    assert "kept 1, dropped 2 (empty response: 1" in line
    assert "a prompt or response is null: 1, the first is row 3" in line
    with pytest.raises(SystemExit, match="no votes, or below 0: 1.*no row is left"):
        items_of(tmp_path, [dict(prompt="x", chosen="p", rejected="q", votes=[0, 0])])
    good, lists = (
        dict(prompt="x", chosen="p", rejected="q"),
        dict(prompt="x", responses=["p", "q", "r"]),
    )
    rows = [
        dict(good, p_chosen=75),
        dict(good, p_chosen=math.nan),
        dict(good, votes=[3, -1]),
        dict(good, votes=["3", "1"]),
    ]
    assert [i.share for i in items_of(tmp_path, rows)] == [
        0.75
    ]  # of "3" and "1"; a percentage is no share
    rows = [
        dict(lists, scores=[math.nan, 1, 2]),
        dict(lists, scores=["10", "9", "1e1"]),
        dict(lists, scores=[1, None, 2]),
    ]
    assert [i.ranks for i in items_of(tmp_path, rows)] == [[1, 3, 1]]  # numbers, not their spelling
    with pytest.raises(SystemExit, match="is not a number: 1, the first is row 1"):
        items_of(tmp_path, [dict(good, votes="[3, 2]")])


# ---- the whole run


def run(world, out, **options):
    return ra.main(
        Args(
            **{
                **dict(
                    model=(world["ref"], world["policy"]),
                    data=(world["data"],),
                    out=str(out),
                ),
                **options,
            }
        )
    )


def test_run_against_enumeration(world, tmp_path, capsys, pictures):
    ref, policy = run(world, tmp_path / "run")
    delta, ref_delta = (
        [
            bigram_logp(t, r["ids"][0], [*r["ids"][1], 0])
            - bigram_logp(t, r["ids"][0], [*r["ids"][2], 0])
            for r in world["rows"]
        ]
        for t in (POLICY, REFERENCE)
    )
    side = [1 if r["p_chosen"] >= 0.5 else -1 for r in world["rows"]]
    right, ref_right = ([s * d >= 0 for s, d in zip(side, deltas)] for deltas in (delta, ref_delta))
    assert policy.measured.R.accuracy == pytest.approx(
        np.mean(right)
    ) and ref.measured.R.accuracy == pytest.approx(np.mean(ref_right))
    four = [
        np.mean([(a, b) == pair for a, b in zip(ref_right, right)])
        for pair in itertools.product((True, False), repeat=2)
    ]
    close(policy.flips, four)
    # idealised: the sign of the reference's log-ratio plus logit(alpha) / beta, here with the true
    # probabilities
    for gamma, row in zip((1.0, 0.0, 0.5, 1.5, 2.0), policy.ideal):
        close(
            row,
            [
                np.mean(
                    [
                        s
                        * (
                            gamma * d
                            + math.log(min(max(p, 0.001), 0.999) / (1 - min(max(p, 0.001), 0.999)))
                            / beta
                        )
                        > 0
                        for s, d, p in zip(side, ref_delta, (r["p_chosen"] for r in world["rows"]))
                    ]
                )
                for beta in BETAS
            ],
        )
    close(policy.c, [-s * d for s, d in zip(side, ref_delta)], 1e-5)
    close(policy.measured.R.delta, [s * d for s, d in zip(side, delta)], 1e-5)
    assert [
        json.loads(line)["measured"]["R"]["accuracy"]
        for line in open(tmp_path / "run" / "metrics.jsonl")
    ] == [ref.measured.R.accuracy, policy.measured.R.accuracy]
    assert policy.ideal_own == policy.ideal[0][1]  # at the default beta 0.1 and gamma 1
    printed = capsys.readouterr().out
    assert f"reference right (c <= 0): {np.mean(ref_right):.1%}" in printed and "hardest" in printed
    assert (tmp_path / "run" / "figures" / "ranking.png").stat().st_size > 10_000


def test_figure_2_follows_the_evaluations_of_a_run(world, tmp_path, pictures):
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "model").symlink_to(world["policy"])
    (policy / "config.json").write_text(json.dumps(dict(beta=0.5, gamma=[2.0])))
    shares = [(0, 0.5, 0.0, 0.0, 0.5), (4, 0.25, 0.25, 0.5, 0.0)]
    (policy / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                dict(
                    step=step,
                    **dict(zip(("eval_kept", "eval_lost", "eval_fixed", "eval_missed"), four)),
                )
            )
            + "\n"
            + json.dumps(dict(step=step, loss=1.0))
            + "\n"
            for step, *four in shares
        )
    )
    ref, run_line = run(world, tmp_path / "run", model=(world["ref"], str(policy)))
    assert run_line.curve == [list(x) for x in shares] and (run_line.beta, run_line.gamma) == (
        0.5,
        2.0,
    )
    assert ref.curve[1][1:] == pytest.approx([np.mean(ref.c <= 0), 0, 0, np.mean(ref.c > 0)])
    assert (tmp_path / "run" / "figures" / "flips.png").stat().st_size > 10_000


def run_folder(world, folder, flags, metrics=""):
    """A run folder with the policy in it -> its name"""
    folder.mkdir()
    (folder / "model").symlink_to(world["policy"])
    (folder / "config.json").write_text(flags if isinstance(flags, str) else json.dumps(flags))
    (folder / "metrics.jsonl").write_text(metrics)
    return str(folder)


def test_beta_and_gamma_are_those_of_runs_only(world, tmp_path):
    args = Args(beta=0.3, gamma=0.7)
    assert ra.loss_of(run_folder(world, tmp_path / "sft", dict(lr=1)), args) == (0.3, 0.7)
    assert ra.loss_of(run_folder(world, tmp_path / "dpo", dict(beta=0.5)), args) == (0.5, 0.7)
    swept = run_folder(world, tmp_path / "dpo_gamma", dict(beta=1, gamma=[2.0]))
    assert ra.loss_of(swept, args) == (1, 2.0)
    # A model folder's config.json is the library's, whatever it calls beta.
    (tmp_path / "model").mkdir()
    for flags in (dict(model_type="llama", beta="none", gamma=1e-6), dict(beta=5)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(flags))
        assert ra.loss_of(str(tmp_path / "model"), args) == (0.3, 0.7)
    both = run_folder(world, tmp_path / "both", dict(model_type="llama", beta=5.0))
    assert ra.loss_of(both, args) == (0.3, 0.7)


GOOD = dict(step=0, eval_kept=0.25, eval_lost=0.25, eval_fixed=0.25, eval_missed=0.25)


@pytest.mark.parametrize(
    "flags, metrics, place, why",
    [
        ("{", "", "config.json: ", "not a JSON object"),
        ("[]", "", "config.json: ", "not a JSON object"),
        (dict(beta="0.1"), "", "config.json: ", "beta '0.1': no number from 1e-09 to 1e+09"),
        (dict(beta=0), "", "config.json: ", "beta 0: no number"),
        (dict(beta=True), "", "config.json: ", "beta True: no number"),
        (dict(beta=math.nan), "", "config.json: ", "beta nan: no number"),
        (dict(gamma=None), "", "config.json: ", "gamma None: no number from 0 to"),
        (dict(gamma=-1), "", "config.json: ", "gamma -1: no number"),
        (dict(gamma=[1.0, 2.0]), "", "config.json: ", "gamma [1.0, 2.0]: no number"),
        (dict(), GOOD | dict(eval_lost=None), "metrics.jsonl:2: ", "eval_lost, eval_fixed"),
        (dict(), GOOD | dict(eval_missed=math.nan), "metrics.jsonl:2: ", "must be numbers"),
        (dict(), GOOD | dict(step="1"), "metrics.jsonl:2: ", "step, eval_kept"),
        (dict(), "nonsense", "metrics.jsonl:2: ", "not a JSON object"),
    ],
)
def test_damaged_run_folders_are_one_line(world, tmp_path, flags, metrics, place, why):
    """File, line and remedy, before anything is scored or made."""
    bad = metrics if isinstance(metrics, str) else json.dumps(metrics)
    lines = f"{json.dumps(GOOD)}\n{bad}\n" if bad else ""
    name = run_folder(world, tmp_path / "policy", flags, lines)
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", model=(world["ref"], name))
    message = str(stop.value)
    assert message.startswith(f"{name}/{place}") and why in message and "give" in message
    assert "\n" not in message and len(message.replace(str(tmp_path), "")) <= 200
    assert not (tmp_path / "run").exists()


def test_a_torn_last_line_of_metrics_is_none(world, tmp_path):
    torn = json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:20]
    name = run_folder(world, tmp_path / "policy", {}, torn)
    assert ra.read_evaluations(name) == [[0, 0.25, 0.25, 0.25, 0.25]]


def test_another_beta_needs_no_model(world, tmp_path, monkeypatch):
    before = run(world, tmp_path / "run")
    monkeypatch.setattr(ra, "load_model", None)
    after = run(world, tmp_path / "run", betas=(0.5,), overwrite=True)
    assert (
        after[1].measured.R.accuracy == before[1].measured.R.accuracy
        and len(after[1].ideal[0]) == 1
    )


def test_what_theorem_4_1_prints(capsys):
    # c = 50, 10, -5: one of three above 46.0; at c = 50 gamma 46.0017 / 50 = 0.92 is enough; IPO: c
    # > 5 = 1 / (2 * 0.1) twice
    form = ra.Accuracy(0.5, [0.4, 0.6], np.zeros(3), 0, 0.5)
    item, c = np.array([7, 8, 9]), np.array([50.0, 10.0, -5.0])
    measured = ra.Measured(3, 3, 0, 0, item, np.full(3, 0.75), 0.5, form, form)
    ideal = [[0.5] * 5] * 5
    line = ra.Line("d", "m", "m", 0.1, 1.0, measured, c, ideal, ideal, 0.5, [0.25] * 4, [])
    ra.show_theorem(line, Args())
    ra.show_ideal(line, Args())
    ra.show_models([line])
    printed = capsys.readouterr().out
    assert "33.3% need a loss below 0.01 to flip (c > 46.0), none with gamma <= 0.92" in printed
    assert "for 66.7% even loss 0 is a wrong ranking" in printed


def test_tables_7_to_9_print_texts(capsys):
    """Hardest, easiest, to flip: each with its texts, y_w first, on lines that are not too long."""
    items = []
    for name in ("hard", "middle", "easy"):
        responses = [f"{name} loser", f"{name} winner " + "word " * 99]
        items.append(ra.Item(f"a question,\n{name}", responses, [2, 1], None))
    form = ra.Accuracy(0.5, [0.4, 0.6], np.array([-1.0, 1.0, 1.0]), 0, 0.5)
    c = np.array([50.0, 10.0, -5.0])
    measured = ra.Measured(3, 3, 0, 0, np.arange(3), np.full(3, 0.75), 0.5, form, form)
    measured.responses = np.array([[1, 1, 1], [0, 0, 0]])
    reference = ra.Line("d", "m", "m", 0.1, 1.0, measured, c, [], [], 0.5, [0.25] * 4, [])
    reference.preferences = False
    policy = dataclasses.replace(reference, model="p", preferences=True)
    ra.show_texts([reference, policy], items, Args())
    rows = capsys.readouterr().out.splitlines()[2:]
    heads = rows[::3]
    assert heads[0].startswith("hardest  c 50.0, right at a loss <= 0.00672, right in 0 of 1")
    assert [head.split(", ")[-1] for head in heads] == ["hard", "middle", "easy", "middle"] + [
        "middle",
        "hard",
    ]
    assert rows[1].startswith("    preferred: hard winner word") and rows[1].endswith("...")
    assert rows[2] == "    rejected:  hard loser"
    assert heads[4].startswith("to flip  c 10.0, right at a loss <= 0.313, right in 1 of 1")
    assert max(map(len, rows)) <= 170


def test_ties_count_half():
    assert ra.ties_half(np.array([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_wilson_counts_items_not_pairs():
    values = np.random.default_rng(1).random(50) < 0.5
    low, high = scipy.stats.binomtest(int(values.sum()), 50).proportion_ci(method="wilson")
    expected = pytest.approx([low, high], abs=1e-6)
    assert ra.wilson_over_items(values, np.arange(50)) == expected
    assert ra.wilson_over_items(values.repeat(6), np.arange(50).repeat(6)) == expected


def test_the_claim_is_of_all_models():
    """Of three gaps the one that says least decides."""
    far, near, over = [0.3, 0.2, 0.4], [0.05, -0.01, 0.11], [-0.2, -0.3, -0.1]
    paper, shown = ra.claim({"a": far}, "in the tiny world")
    assert "Table 1" in paper
    assert shown == (
        "holds: in the tiny world R of a is below R*, by R* - R (0.300 [0.200, 0.400])"
    )
    _, shown = ra.claim({"a": far, "b": near}, "on hh")
    assert shown.startswith("too few to tell: on hh R is below R*, of each of 2 models")
    assert shown.endswith("least for b (0.050 [-0.010, 0.110])")
    _, shown = ra.claim({"a": far, "b": near, "c": over}, "on hh")
    assert shown.startswith("does not hold: on hh") and "least for c" in shown


def test_the_gap_is_that_of_the_pairs(world, tmp_path):
    """R* less R of each model, and a claim whose models are trained on preferences."""
    lines = run(world, tmp_path / "run")
    for line in lines:
        assert line.gap[0] == pytest.approx(line.ideal_own - line.measured.R.accuracy)
        assert line.gap[1] <= line.gap[0] <= line.gap[2]
    assert [line.preferences for line in lines] == [False, True]
    shown = (tmp_path / "run" / "claim.txt").read_text().splitlines()
    assert len(shown) == 2 and "R* - R (" in shown[1]
    assert ra.claim_of(lines[:1])[1].count(ra.short_name(lines[0])) == 1  # no policy: itself


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=0.0), "--beta 0.0: must be from 1e-09"),
        (dict(betas=(1.0, -1.0)), "--betas -1.0: must be from 1e-09"),
        (dict(data=()), "--data: name one data set at least"),
        (dict(model=(__file__,)), "no config.json"),
        (dict(data=("nowhere.jsonl",)), "nowhere.jsonl"),
        (dict(model=("nowhere",)), "nowhere"),
        (dict(proportion=0.5), "--proportion 0.5: must be from 0.500001 to 0.999999"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, options, message):
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", **options)
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "run").exists()


def numeric_options(args):
    """Every option that is a number or a tuple of numbers: its name and default."""
    for option in dataclasses.fields(args):
        default = getattr(args, option.name)
        first = default[0] if isinstance(default, tuple) and default else default
        if isinstance(first, int | float) and not isinstance(first, bool):
            yield option.name, default


BAD_NUMBERS = [
    (name, bad)
    for name, default in numeric_options(Args())
    for bad in (math.nan, math.inf, -math.inf, -1, 10**12, *[()] * isinstance(default, tuple))
]


@pytest.mark.parametrize("name, bad", BAD_NUMBERS)
def test_numbers_out_of_range_are_one_line(name, bad, tmp_path, monkeypatch):
    """Of every numeric option, before anything is loaded or made."""
    for function in ("setup", "load_items", "model_folder", "start_run"):
        monkeypatch.setattr(ra, function, None)
    if isinstance(getattr(Args(), name), tuple) and bad != ():
        bad = (*getattr(Args(), name), bad)
    with pytest.raises(SystemExit) as stop:
        ra.main(dataclasses.replace(Args(out=str(tmp_path / "run")), **{name: bad}))
    message = str(stop.value)
    assert message.startswith("--" + name.replace("_", "-")) and "\n" not in message
    assert len(message) <= 200 and not (tmp_path / "run").exists()


def test_the_numbers_of_the_presets_are_in_range():
    assert len({name for name, _ in BAD_NUMBERS}) == 10
    for args in ra.PRESETS.values():
        ra.check(args)


def test_models_without_a_common_item_are_one_line():
    with pytest.raises(SystemExit, match="0 pairs"):
        ra.measure([item([1], [2], [3])], {}, Args())


def test_run_folder_is_not_overwritten(world, tmp_path):
    run(world, tmp_path / "run")
    with pytest.raises(SystemExit, match="--overwrite"):
        run(world, tmp_path / "run")


def test_only_ties_is_one_line(world, tmp_path):
    """Found before anything is scored."""
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(dict(prompt="b", chosen="c", rejected="d", votes=[1, 1])) + "\n")
    with pytest.raises(SystemExit, match="test.jsonl: every pair is a tie"):
        run(world, tmp_path / "run", data=(str(path),))
    assert not (tmp_path / "run").exists()


def test_two_processes_write_the_same_records(world, tmp_path):
    command = ["methods/ranking_accuracy.py", "--model", world["ref"], "--data", world["data"]]
    start(*command, "--out", tmp_path / "two", processes=2)
    run(world, tmp_path / "one", model=(world["ref"],))
    one, two = (
        [json.loads(line) for line in open(next((tmp_path / n).glob("records-*")))]
        for n in ("one", "two")
    )
    assert [dict(r, logp=0) for r in one] == [dict(r, logp=0) for r in two]
    close([r["logp"] for r in one], [r["logp"] for r in two], 1e-6)
