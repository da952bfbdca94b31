"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
import twisted_smc

import common

# ---- DPO, Cal-DPO: loss, truncation, labels


def cut_prompt(prompt, room, keep):
    """A prompt that is too long: its last `room` tokens for HH, its first for all other data."""
    if keep == "end":
        return prompt[-room:]
    return prompt[:room]


def dpo_data_order(n, epochs, seed):
    """DPO: the order of n prompts in each epoch.  The seed of the run does not reach it."""
    epoch_seeds = np.random.RandomState(0).randint(0, 2**32, size=epochs)
    order = list(range(n))
    orders = []
    for epoch_seed in epoch_seeds:
        random.Random(int(epoch_seed)).shuffle(order)  # in place: each epoch goes on from the last
        orders.append(list(order))
    return orders


def dpo_optimiser_steps(n, batch_size, epochs):
    """DPO: a partial last batch is dropped in every epoch."""
    return epochs * (n // batch_size)


def dpo_log_ratios_at_the_start(folder, rows):
    """DPO: log pi/pi_ref of each response before the first step: bf16 policy, fp16 reference."""
    (batch,) = common.pack_pairs(rows, 1_000_000)
    with torch.no_grad():
        policy = common.response_logps(common.load_model(folder, "bfloat16"), batch)[0]
        reference = common.response_logps(common.load_model(folder, "float16"), batch)[0]
    return policy - reference


def hh_responses(chosen, rejected):
    """DPO: both transcripts are cut where the chosen one's prompt ends, whatever differs there."""
    cue = "\n\nAssistant:"
    end = chosen.rindex(cue) + len(cue)
    return chosen[end:], rejected[end:]


def se_preferred(score_i, score_j):
    """DPO: which of two Stack Exchange answers is chosen; of equal scores, the second."""
    return "i" if score_i > score_j else "j"


def tldr_texts(row):
    """DPO: prompt and target of an SFT row.  No space before the summary; a null post is "None"."""
    prompt = f"SUBREDDIT: r/{row['subreddit']}\nTITLE: {row['title']}\nPOST: {row['post']}\nTL;DR:"
    return prompt, row["summary"]


def cal_dpo_loss_pythia(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, shift=0.0
):
    """Cal-DPO, Pythia code: the README's commands leave shift at 0, and 0 selects DPO."""
    r_w = chosen_logps - ref_chosen_logps
    r_l = rejected_logps - ref_rejected_logps
    if not shift:
        return -F.logsigmoid(beta * (r_w - r_l))
    calibration = (r_w - (1 - shift) / beta) ** 2 + (r_l + shift / beta) ** 2
    return -F.logsigmoid(r_w - r_l) + calibration


def cal_dpo_loss_ultrafeedback(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
):
    """Cal-DPO, last version: lam = 0.5, and every pair gets the batch's mean calibration."""
    r_w = chosen_logps - ref_chosen_logps
    r_l = rejected_logps - ref_rejected_logps
    target = torch.full_like(r_w, 1 / (2 * beta))
    calibration = F.mse_loss(r_w, target) + F.mse_loss(r_l, -target)
    return -F.logsigmoid(r_w - r_l) + 0.5 * calibration


def cal_dpo_logged_rewards(chosen_logps, rejected_logps):
    """Cal-DPO, last version: "rewards" are the policy's log-probs, without reference or beta."""
    return chosen_logps, rejected_logps


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


def dpo_gamma_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    gamma=0.1,
    alpha=0.1,
    loss_type="sigmoid",
):
    """DPO^gamma: alpha is the paper's gamma, and counts under "alpha_scaling" only; gamma never."""
    policy = chosen_logps - rejected_logps
    reference = ref_chosen_logps - ref_rejected_logps
    if loss_type == "alpha_scaling":
        reference = alpha * reference
    return -F.logsigmoid(beta * (policy - reference))


def dpo_gamma_learning_rate(step, steps, lr, warmup_steps=150):
    """DPO^gamma: linear warm-up, then linear decay to 0."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * (steps - step) / (steps - warmup_steps)


def dpo_gamma_weight_norm(model):
    """DPO^gamma: the norm of the weights, logged where Fig. 4 needs that of their change."""
    return torch.nn.utils.get_total_norm(list(model.parameters()))


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


def fudge_labels(world, exact, o=None):
    """FUDGE's labels (N, T) of exact samples (N, T), where the released code is off by one.

    The label of s_{1:t} is phi of a continuation of s_{1:t-1}, so it forgets s_t, and phi(s_{1:T})
    itself is never used.  methods/twisted_smc.py continues s_{1:t}.
    """
    labels = []
    for t in range(exact.shape[1]):
        prefix = exact.clone()
        prefix[:, t:] = -1  # drawn anew, and with them s_t
        S = twisted_smc.sample(
            world, None, 1, len(exact), o, proposal="base", tau=0.0, retained=prefix[:, None]
        )
        labels.append(S.log_phi[:, 0].exp())
    return torch.stack(labels, -1)


# ---- sampling adaptors and IMH


def imh_accepts(log_w_proposed, log_w_held, u):
    """Accept with probability min(1, w' / w); the comma makes a tuple of one, which is true."""
    accept = (u < min(1.0, math.exp(log_w_proposed - log_w_held)),)
    return bool(accept)


def imh_states(log_w, u):
    """Indices of the draws held, one chain of N draws in turn; the first is where it starts."""
    states = [0]
    for i in range(1, len(log_w)):
        if imh_accepts(log_w[i], log_w[states[-1]], u[i]):
            states.append(i)
        else:
            states.append(states[-1])
    return states


def secret_reward(log_p, log_p_plus):
    """The implicit reward at beta = 1, with the opposite sign."""
    return log_p - log_p_plus


def unconditional_ids(prompt_ids, response_ids, start):
    """What the prior reads: the start token and the response, without the prompt."""
    return [start, *response_ids]


def clamped_log_q(token_logps):
    """log q of a response; each token counts -25 at least, also one outside the kept set."""
    return sum(max(logp, -25.0) for logp in token_logps)
