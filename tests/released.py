"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

import numpy as np
import torch
import torch.nn.functional as F

# ---- DPO, Cal-DPO: loss, truncation, labels


def cut_prompt(prompt, room, keep):
    """A prompt that is too long: its last `room` tokens for HH, its first for all other data."""
    if keep == "end":
        return prompt[-room:]
    return prompt[:room]


# ---- ranking accuracy and DPO^gamma


def idealized_log_ratio(ref_log_ratio, alpha, beta, epsilon=1e-3):
    """Eq. 2 with epsilon for a zero denominator alone: a share of 0 has log odds of -inf."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    denominator = torch.where(alpha < 1, 1 - alpha, epsilon)
    return torch.as_tensor(ref_log_ratio) + torch.log(alpha / denominator) / beta


def idealized_ranking_accuracy(ref_log_ratio, alpha, beta):
    """R* of Eq. 3 with a dead zone: ratios within 5 % of 1 are ties, which agree only with ties."""
    sides = []
    for log_ratio in (
        idealized_log_ratio(ref_log_ratio, alpha, beta),
        idealized_log_ratio(0.0, alpha, 1.0),
    ):
        ratio = log_ratio.exp()
        sides.append(1.0 * (ratio >= 1.05) - 1.0 * (ratio <= 0.95))
    return (sides[0] == sides[1]).double()


def raw_log_ratio(first_logps, second_logps):
    """In place of the ratio of likelihoods, the ratio of log-likelihoods."""
    return torch.log(first_logps / second_logps)


def score_the_first_tokens(row):
    """Left padding shifts the prompt's mask: the first |y| tokens of x + y are scored."""
    responses = []
    for response in row["responses"]:
        whole = row["prompt_ids"] + response
        responses.append(whole[1 : 1 + len(response)])
    return {**row, "prompt_ids": row["prompt_ids"][:1], "responses": responses}


def draw_rows(rows, n):
    """--sample-size draws rows, which for Alpaca Farm are single votes, before they are grouped."""
    index = np.random.default_rng(0).choice(len(rows), n, replace=False)
    return [rows[i] for i in index]


def calibration(alpha, p, bins=10, quantiles=False):
    """Distances of probabilities p from shares alpha, as calculate_calibration_metrics prints them.

    -> mean (p - alpha)^2, mean |log p - log alpha|, |difference of means|, calibration error
    """
    alpha = np.maximum(np.asarray(alpha, float), 1e-300)
    p = np.maximum(np.asarray(p, float), 1e-300)
    edges = np.linspace(0, 1, bins + 1)
    if quantiles:
        edges = np.quantile(p, edges)
    gaps = np.bincount(np.searchsorted(edges[1:-1], p), p - alpha)  # sum in each bin
    squared = np.mean((p - alpha) ** 2)
    logs = np.mean(abs(np.log(p / alpha)))
    return [squared, logs, abs(np.mean(p) - np.mean(alpha)), abs(gaps).sum() / len(p)]


# ---- distributional preference learning


def categorical_loss(chosen, rejected):
    """The product of the softmaxes and a plain log: inf where P(chosen wins) underflows."""
    atom = torch.arange(chosen.shape[-1]).to(chosen)
    M = (1 + torch.sign(atom[:, None] - atom)) / 2
    p_wins = (chosen.softmax(-1) @ M * rejected.softmax(-1)).sum(-1)
    return -p_wins.log()


def variance_penalty(chosen, rejected, weight):
    """An option that is not in the paper: both variances of a pair are added to its loss."""
    variance = F.softplus(chosen[:, 1]) ** 2 + F.softplus(rejected[:, 1]) ** 2
    return weight * variance


def step_schedule(t, T):
    """An option beside the cosine: a tenth of the learning rate after each third of the steps."""
    thirds = (t >= T // 3) + (t >= 2 * T // 3)
    return 0.1**thirds


def first_wins(u_first, u_second):
    """Who is preferred in a synthetic pair: a tie goes to the first side."""
    return ~(u_second > u_first)


def borda_2d(a):
    """The Borda count drawn for the 2d world, which is off by up to 0.153."""
    x, y = a.unbind(-1)
    q = 1 - x * y
    return 0.25 + q * y * (1 - y / 4) - x * y / 8


# ---- twisted SMC


# ---- sampling adaptors and IMH
