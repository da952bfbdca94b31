"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

import torch
import torch.nn.functional as F

# ---- DPO, Cal-DPO: loss, truncation, labels


# ---- ranking accuracy and DPO^gamma


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
