"""Worlds of twisted SMC that are small enough to enumerate, and their exact values.

MarkovWorld has what smc and the learners ask of a world (LMWorld in twisted_smc.py), with tables in
place of a language model.  enumerate_sequences computes log Z, sigma, the optimal twists of Prop.
3.2 and both KLs from all V^T sequences.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import twisted_smc

# A Markov chain on three tokens: the first token's law, and that of the next one after each.
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
NEXT = torch.tensor(
    [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64
).log()
PREFIXES = 13  # 1 + 3 + 9 of at most two tokens


class MarkovDecoder:
    """n slots that walk through the tree of prefixes; a slot's state is the number of its
    prefix."""

    def __init__(self, world, n, o):
        self.world = world
        self.row = torch.zeros(n, dtype=torch.long)
        self.block = 0  # of one-hot states that belong to the condition
        if o is not None:
            self.block = PREFIXES * o[:, 0].repeat_interleave(n // len(o))

    def step(self, last=None, ancestors=None):
        if ancestors is not None:
            self.row = self.row[ancestors]
        if last is not None:
            self.row = 3 * self.row + 1 + last
        hidden = F.one_hot(self.block + self.row, self.world.d).double()
        return hidden, self.world.table[self.row]


class MarkovWorld:
    """w1: T = 3, phi a sigmoid.  w2: T = 2, conditioned on o = s_3.

    Hidden states are one-hot in (o, prefix), so that a linear twist is a table of log psi.
    """

    def __init__(self, name):
        self.name = name
        self.conditional = name == "w2"
        self.V = 3
        self.T = 2 if self.conditional else 3
        self.c = 1 if self.conditional else 0
        self.d = PREFIXES * 3**self.c
        self.log_bound = 0.0
        self.log_floor = -torch.inf
        self.table = torch.cat([FIRST[None], NEXT, NEXT.repeat(3, 1)])  # log p0 after each prefix

    def decoder(self, n, o=None, body=None):
        return MarkovDecoder(self, n, o)

    def head(self, hidden):
        return hidden @ self.table.repeat(3**self.c, 1)

    def embed(self, twist, o):
        return None

    def log_phi(self, s, o=None):
        if self.conditional:
            return NEXT[s[..., 1], o]
        s = s.double()
        score = -1 + s @ s.new_tensor([0.8, -0.6, 1.1]) + 0.5 * (s[..., 0] == s[..., 2])
        return F.logsigmoid(score)


@dataclass
class Enumeration:
    """Exact values of one case, over all V^T sequences in lexicographic order."""

    log_Z: float
    log_p: torch.Tensor  # (V^T,), of whole sequences
    log_q: torch.Tensor  # (V^T,)
    log_sigma: torch.Tensor  # (V^T,)
    log_phi: torch.Tensor  # (V^T,)
    log_psi_star: list  # for each t (V^t,), optimal twists
    log_psi: list  # for each t (V^t,), the twist's
    kl_prior: float  # KL(q | p0)
    kl_q_sigma: float
    kl_sigma_q: float


def kl(log_a, log_b):
    """KL(a | b) of two laws given by their log-probabilities."""
    return (log_a.exp() * (log_a - log_b)).nan_to_num(0.0).sum().item()


def all_sequences(V, T):
    """(V^T, T), in lexicographic order."""
    return torch.cartesian_prod(*[torch.arange(V)] * T).view(-1, T)


def enumerate_sequences(world, twist, o=None):
    """All sequences of a world, under one condition o (1, c) if it has conditions ->
    Enumeration."""
    V, T = world.V, world.T
    sequences = all_sequences(V, T)
    if o is not None:
        o = o.expand(len(sequences), -1)
    S = twisted_smc.sample(world, twist, 1, len(sequences), o, tau=0.0, retained=sequences[:, None])
    log_p, log_q = S.log_p[:, 0].sum(-1), S.log_q[:, 0].sum(-1)
    log_phi = S.log_phi[:, 0]
    log_Z = (log_p + log_phi).logsumexp(0)
    log_sigma = log_p + log_phi - log_Z

    # psi*_t(s_{1:t}) = E phi over what follows: a prefix owns a stretch of V^(T - t) sequences.
    log_psi_star, log_psi = [], []
    for t in range(1, T + 1):
        n = V ** (T - t)
        joint = (log_p + log_phi).view(-1, n).logsumexp(-1)
        log_psi_star.append(joint - S.log_p[::n, 0, :t].sum(-1))
        log_psi.append(S.log_psi[::n, 0, t - 1])
    return Enumeration(
        log_Z=log_Z.item(),
        log_p=log_p,
        log_q=log_q,
        log_sigma=log_sigma,
        log_phi=log_phi,
        log_psi_star=log_psi_star,
        log_psi=log_psi,
        kl_prior=kl(log_q, log_p),
        kl_q_sigma=kl(log_q, log_sigma),
        kl_sigma_q=kl(log_sigma, log_q),
    )


def exact_values(world, twist):
    """log Z and both KLs of a world, means over its conditions o with their probabilities Z(o)."""
    conditions = [None]
    if world.conditional:
        conditions = [torch.tensor([[v]]) for v in range(world.V)]
    mean = torch.zeros(3, dtype=torch.float64)
    for o in conditions:
        E = enumerate_sequences(world, twist, o)
        share = math.exp(E.log_Z) if world.conditional else 1.0
        mean += share * torch.tensor([E.log_Z, E.kl_q_sigma, E.kl_sigma_q], dtype=torch.float64)
    return mean.tolist()
