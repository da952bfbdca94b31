"""Twisted sequential Monte Carlo (SMC) for language models.

Zhao, Brekelmans, Makhzani, Grosse 2024, https://arxiv.org/abs/2404.17546

    target, Eq. 1        sigma(s_{1:T}) = p0(s_{1:T}) phi(s_{1:T}) / Z
    twisted, Eq. 9       pi_t = p0(s_{1:t}) psi_t(s_{1:t}) / Z_t for t < T, and pi_T = sigma
    proposal, Eq. 14-15  q = p0 psi_t / Z^pi_t, Z^pi_t = sum_v p0(v | s_{1:t-1}) psi_t(s_{1:t-1}, v)
    weights, Eq. 10      w_t = p0 psi_t / (q psi_{t-1}), and phi takes the place of psi_T
    weights, Eq. 16      w_t = Z^pi_t / psi_{t-1} under that proposal
    estimate, Eq. 8      Z-hat = product over blocks of mean_k prod_t w_t^k, with E Z-hat = Z
    bounds, Eq. 24       E log Z-hat <= log Z <= E log Z-hat with one exact sample retained

    python methods/twisted_smc.py                          the tiny world, six learners, 90 seconds
    python methods/twisted_smc.py toxicity --learner ctl   one row of Table 2 (GPU, downloads)
    torchrun --standalone --nproc-per-node 4 methods/twisted_smc.py infilling --learner dpg

Presets are tiny, which is the default; toxicity, sentiment, infilling and infilling-2-1 for Tables
2, 3, 4 and 8; toxicity-exact and sentiment-exact for Tables 9 and 10; toxicity-threshold for
Fig. 3; toxicity-story and sentiment-review for the texts of App. H.1.

Three things differ from the paper. There is no resampling after t = 1 under the twist proposal,
where all weights are equal. Losses are means over t where Table 1 has sums, as in the released
code, whose learning rates need it. FUDGE serves every potential with a known bound, as phi / bound.

Four things differ from the released code. FUDGE continues each exact prefix s_{1:t} itself, and not
s_{1:t-1}, so that the label of s_t depends on s_t. RL averages its two batches. PPO trains its
critic and has no dropout. Exact samples come from rejection for every bounded potential and beta.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

LEARNERS = ("ctl", "rl", "sixo", "fudge", "dpg", "ppo")


@dataclass
class Args:
    # What to sample from: sigma ~ p0 phi^beta (Eq. 1; Eq. 19 with phi = exp(r)).
    model: str = "tiny"  # p0: tiny, a local folder or a hub id
    prompt: str = (  # the text that p0 continues
        "\n\nHuman: Tell me a story about a fox in a cave."
        "\n\nAssistant: Fine. Once a fox lived in a cave. It"
    )
    T: int = 5  # tokens generated; the end token is a token like others
    # phi is one of: tiny:monster, tiny:polite, tiny:happy, tiny:reward (the tiny world);
    # class:LABEL, threshold:ETA, reward (of --classifier);
    # infilling, continuation (p0 of the tokens that follow);
    # FILE.py:FUNCTION (your own log phi)
    potential: str = "tiny:monster"
    beta: float = 1.0  # phi^beta; the inverse of DPO's beta
    classifier: str = ""  # sequence classification model of the potentials class, threshold, reward
    c: int = 0  # infilling: the number of tokens that follow, on which sigma is conditioned
    continuation: str = ""  # the text that follows: for continuation, and to show under infilling
    # Who learns: one learner, all six, none (psi = 1), or a policy that is evaluated as q.
    learner: Literal["ctl", "rl", "sixo", "fudge", "dpg", "ppo", "all", "none", "policy"] = "all"
    policy: str = ""  # for --learner policy: a causal LM with the vocabulary of --model
    twist: Literal["linear", "mlp", "body", "body-mlp"] = "mlp"  # head on p0 or on a trained copy
    K: int = 64  # particles of an update, or per condition
    # infilling, per update: CTL draws this many conditions with K particles each; the other
    # learners draw conditions * K conditions with one particle each
    conditions: int = 1
    train_on_exact: bool = False  # positives are exact samples (Tables 9, 10); not of FUDGE and PPO
    lr: float = 0.0  # Adam's rate for every learner; 0: each its own, from the row --rates
    rates: str = "tiny"  # a row of the table LR: tiny, toxicity, sentiment, infilling, ...
    max_steps: int = 96  # updates
    eval_every: int = 32  # in updates, also saves; 0: after 0, 2, 4, 8, ... (the paper's epochs)
    # How it is measured (Section 5).
    proposal: Literal["twist", "base"] = "twist"  # q of the bounds: Eq. 14 or p0
    scheme: Literal["systematic", "multinomial"] = "systematic"  # of resampling; paper: multinomial
    tau: float = 2.0  # resample where ESS < tau K: above 1 at every step (the paper), 0 never
    exact: int = 200  # exact samples, for upper bounds and KL(sigma | q); 0: none
    exact_samples: str = ""  # their file, made if absent; empty: in the run folder
    bound_K: tuple[int, ...] = (8, 32)  # particles of the bounds; the KLs use the last
    runs: int = 8  # runs of each bound
    seeds: int = 1  # repetitions with seed, seed + 1, ... (the paper's tables: 5)
    seed: int = 0  # of all random draws
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of p0; twists stay float32
    out: str = ""  # run folder; empty: results/twisted_smc, with the preset's name if there is one
    resume: bool = False  # continue from the newest checkpoints
    overwrite: bool = False  # delete the run that is in the run folder


# Learning rates by the learner's name: the released code's last commands.  Its first release had
# 1e-4 for CTL on toxicity, 4096 updates for toxicity and sentiment, 6000 and 16384 for infilling.
LR = {
    "tiny": {"ctl": 3e-3, "rl": 5e-3, "sixo": 3e-3, "fudge": 3e-3, "dpg": 3e-3, "ppo": 1e-3},
    "toxicity": {"ctl": 3e-5, "rl": 3e-5, "sixo": 3e-5, "fudge": 1e-4, "dpg": 3e-5, "ppo": 1e-6},
    "toxicity-exact": {
        "ctl": 1e-4,
        "rl": 3e-5,
        "sixo": 3e-5,
        "fudge": 1e-4,
        "dpg": 3e-5,
        "ppo": 1e-6,
    },
    "sentiment": {"ctl": 1e-4, "rl": 1e-4, "sixo": 1e-4, "fudge": 1e-3, "dpg": 1e-4, "ppo": 1e-5},
    "infilling": {"ctl": 3e-6, "rl": 3e-5, "sixo": 1e-4, "fudge": 1e-6, "dpg": 1e-4, "ppo": 3e-5},
    "infilling-2-1": {
        "ctl": 1e-4,
        "rl": 1e-4,
        "sixo": 1e-4,
        "fudge": 1e-4,
        "dpg": 1e-4,
        "ppo": 3e-5,
    },
}

TOXICITY = Args(  # App. G: prompt, T, K and evaluation; updates and rates from the released code
    model="roneneldan/TinyStories-33M",
    prompt="Once upon a time, there was a",
    T=20,
    potential="class:0",  # a single logit is that of class 1, "not toxic"
    classifier="nicholasKluge/ToxicityModel",
    twist="body",
    K=100,
    rates="toxicity",
    max_steps=2048,
    eval_every=0,
    scheme="multinomial",
    exact=2000,
    bound_K=(32, 500),
    runs=4,
)
SENTIMENT = replace(
    TOXICITY,
    model="gpt2-medium",
    prompt="I bought this",
    T=10,
    potential="class:0",  # one star of five
    classifier="LiYuan/amazon-review-sentiment-analysis",
    twist="mlp",
    rates="sentiment",
)
INFILLING = replace(
    TOXICITY,
    T=15,
    potential="infilling",
    classifier="",
    c=10,
    twist="body-mlp",
    K=4,
    conditions=25,
    rates="infilling",
    max_steps=5500,
    eval_every=500,
    runs=30,
)
INFILLING_2_1 = replace(
    INFILLING,
    T=2,
    c=1,
    K=10,
    conditions=10,
    rates="infilling-2-1",
    max_steps=8192,
    eval_every=0,
)
TOXICITY_THRESHOLD = replace(
    TOXICITY,
    T=10,
    potential="threshold:-5",
    twist="mlp",
    K=1000,
    lr=1e-4,
    max_steps=5000,
    eval_every=500,
    exact=100,
    bound_K=(4, 8, 16, 32, 128, 512, 2048),
    runs=20,
)
TOXICITY_STORY = replace(
    TOXICITY,
    T=200,
    beta=10.0,
    twist="linear",
    K=32,
    lr=3e-4,
    max_steps=2500,
    eval_every=250,
    exact=0,
    bound_K=(8, 32),
)
SENTIMENT_REVIEW = replace(SENTIMENT, T=20, beta=1e2, twist="linear", max_steps=16384, exact=0)
PRESETS = {
    "tiny": Args(),
    "toxicity": TOXICITY,
    "toxicity-exact": replace(TOXICITY, max_steps=64, train_on_exact=True, rates="toxicity-exact"),
    "toxicity-threshold": TOXICITY_THRESHOLD,
    "toxicity-story": TOXICITY_STORY,
    "sentiment": SENTIMENT,
    "sentiment-exact": replace(SENTIMENT, max_steps=512, train_on_exact=True, lr=1e-4),
    "sentiment-review": SENTIMENT_REVIEW,
    "infilling": INFILLING,
    "infilling-2-1": INFILLING_2_1,
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    folder = "results/twisted_smc"
    if preset != "tiny":
        folder = f"{folder}-{preset}"
    args = tyro.cli(Args, default=replace(PRESETS[preset], out=folder), description=__doc__)

import copy
import importlib.util
import json
import math
import shutil
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: here or one up
# isort: off
from common import prefill, decode_step, reorder, stay_in_place, sample_tokens  # sampling
from common import load_model, load_tokenizer, model_folder  # models
from common import tiny_attributes, tiny_reward  # the tiny world
from common import load_checkpoint, log, require, say, save_checkpoint  # processes
from common import setup, start_run, stop_requested  # processes

# isort: on

# ---- Sections 2, 3 and 5: SMC and its bounds


@dataclass
class Step:
    """One token for each of n particles, and what it weighs; all (n,), logarithms in nats."""

    tokens: torch.Tensor  # s_t
    log_p: torch.Tensor  # log p0(s_t | s_{1:t-1})
    log_q: torch.Tensor  # log q(s_t | s_{1:t-1})
    log_psi: torch.Tensor  # log psi_t(s_{1:t})
    log_norm: torch.Tensor  # log Z^pi_t(s_{1:t-1}), Eq. 15


@dataclass
class Particles:
    """What smc returns: N runs of K particles; (N, K, T) goes along each particle's ancestry."""

    tokens: torch.Tensor  # (N, K, T)
    log_p: torch.Tensor  # (N, K, T), as in Step
    log_q: torch.Tensor  # (N, K, T)
    log_psi: torch.Tensor  # (N, K, T)
    log_norm: torch.Tensor  # (N, K, T)
    lineage: torch.Tensor  # (N, K, T), the slot in which final particle k's ancestor stood at t
    log_phi: torch.Tensor | None = None  # (N, K)
    log_w: torch.Tensor | None = None  # (N, K), since the last resampling
    log_Z: torch.Tensor | None = None  # (N,), log Z-hat
    ess: torch.Tensor | None = None  # (N, T), before resampling
    o: torch.Tensor | None = None  # (N, c), conditions: this and the next two come from sample()
    states: torch.Tensor | None = None  # (N, K, T, d), hidden states of p0 before each token
    z: torch.Tensor | None = None  # (N, K, T, d), hidden states that the twist's head reads


def ess(log_w):
    """Effective sample size 1 / sum_k w_k^2 of log-weights (..., K): 1 to K; 0 if all are -inf."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def reweigh(log_w, increment):
    """log_w + increment, but a weight of zero stays zero: its increment may be inf or nan."""
    return torch.where(log_w == -torch.inf, log_w, log_w + increment)


def retained_shift(w, cdf, slot, u):
    """Shift (N, 1) of systematic resampling's grid that gives the retained particle an offspring.

    w, cdf (N, K): weights and their sums.  slot (N, 1): the retained particle.  u (N, 1): uniforms.
    -> shift, and home (N, 1), the grid point that hits that particle.
    """
    K = w.shape[1]
    # x is drawn uniformly from the stretch of the cdf that belongs to the retained particle.
    x = cdf.gather(1, slot) - w.gather(1, slot) * u
    # The K grid points are (i + shift) / K.  The one that hits x has i = home, which fixes shift.
    home = (K * x).ceil().long().clamp(1, K) - 1
    return K * x - home, home


def resample(log_w, u, scheme="systematic", slot=None):
    """Draw ancestors for N runs: particle k has K w_k offspring on average.

    log_w (N, K): log-weights.  u (N, K + 1): uniforms.  -> ancestors (N, K), home (N, 1).
    slot (N, 1): where the retained particle stands.  Exactly one of its offspring is retained
    again; home (N, 1) is that offspring's place among the K.  The law of the other K - 1 is the
    scheme's, given that, as Prop. 5.1 needs.  Without a retained particle both are None.
    """
    K = log_w.shape[1]
    w = log_w.softmax(-1)
    cdf = w.cumsum(-1)
    u_right = 1 - u  # in (0, 1]: never hits a particle without weight
    home = slot

    # K points in (0, 1]; each one draws the particle on whose stretch of the cdf it lies.
    if scheme == "systematic":
        shift = u_right[:, :1]
        if slot is not None:
            shift, home = retained_shift(w, cdf, slot, u[:, K:])
        points = (torch.arange(K, device=w.device) + shift) / K
    elif scheme == "multinomial":
        points = u_right[:, :K]
    else:
        raise ValueError(f"unknown resampling scheme {scheme!r}")

    ancestors = torch.searchsorted(cdf, points * cdf[:, -1:]).clamp(max=K - 1)
    if slot is not None:
        ancestors = ancestors.scatter(1, home, slot)
    return ancestors, home


def follow(slot, home, parents, moved):
    """Where the retained particle's offspring stands after stay_in_place has permuted them all.

    slot (N, 1): the retained particle.  home (N, 1): its retained offspring among `parents` (N, K).
    moved (N, K): the same parents, permuted.  -> (N, 1)
    If `home` is the r-th of the offspring it stays the r-th: always taking the first would not do,
    since under the systematic scheme the slots are not alike.
    """
    # rank: home is the r-th of the offspring (1, 2, ...).
    rank = (parents == slot).cumsum(-1).gather(1, home)
    # The r-th of them in the permuted order is the one child that has this rank.
    child = moved == slot
    is_rth = child & (child.cumsum(-1) == rank)
    return is_rth.int().argmax(-1, keepdim=True)


def log_sum_exp(x):
    """(n, V) -> (n,) in float64; on a CPU a few rows at a time, which stay in its cache."""
    rows = len(x)
    if x.is_cpu:
        rows = max(8, 2**18 // x.shape[1])
    return torch.cat([part.logsumexp(-1) for part in x.split(rows)]).double()


def pick(x, tokens):
    """x[i, tokens[i]] in float64.  (n, V), (n,) -> (n,)"""
    return x.gather(1, tokens[:, None])[:, 0].double()


def propose(logits, log_psi, proposal, forced=None):
    """Draw s_t of n particles -> Step.

    logits (n, V): log p0(. | s_{1:t-1}), not normalised.  log_psi (n, V), or None for psi = 1.
    forced (n,): tokens of retained particles, -1 for the others; None: all are free.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # p0, p0 psi_t and q over the vocabulary, none of them normalised.
    log_p_psi = logits
    if log_psi is not None:
        log_p_psi = logits + log_psi
    log_q = logits  # q = p0
    if proposal == "twist":
        log_q = log_p_psi  # Eq. 14

    # sample_tokens returns log q of the drawn token: its score less that is the log-normaliser of
    # q, which so needs no other pass over the vocabulary.
    uniforms = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
    tokens, log_q_of_token = sample_tokens(log_q, uniforms)
    norm_q = pick(log_q, tokens) - log_q_of_token

    # The log-normalisers of p0 and of p0 psi_t: at least one of the two is q.
    if log_psi is None:  # both are
        norm_p = norm_q
        norm_p_psi = norm_q
    elif proposal == "twist":
        norm_p = log_sum_exp(logits)
        norm_p_psi = norm_q
    else:
        norm_p = norm_q
        norm_p_psi = log_sum_exp(log_p_psi)

    # Retained particles take their own token, which has its own probability.
    if forced is not None:
        tokens = torch.where(forced < 0, tokens, forced)
    log_psi_of_token = torch.zeros_like(norm_p)
    if log_psi is not None:
        log_psi_of_token = pick(log_psi, tokens)
    return Step(
        tokens=tokens,
        log_p=pick(logits, tokens) - norm_p,
        log_q=pick(log_q, tokens) - norm_q,
        log_psi=log_psi_of_token,
        log_norm=norm_p_psi - norm_p,  # Eq. 15
    )


def draw_ancestors(log_w, low, scheme, slot):
    """Resample the runs that are `low` (N,) -> ancestors (N K,), moved (N, K), slot.

    log_w (N, K): log-weights.  slot (N, 1) or None: the retained particle, before and after.
    moved[n, k]: the slot of run n from which slot k goes on; ancestors: the same, of all N K slots.
    """
    if slot is not None and slot.shape[1] != 1:
        raise ValueError(
            "resampling takes one retained particle; for several of them tau must be 0"
        )
    N, K = log_w.shape
    # Draw parents (N, K), counted within their run.
    uniforms = torch.rand(N, K + 1, dtype=torch.float64, device=log_w.device)
    parents, home = resample(log_w, uniforms, scheme, slot)

    # In the runs that are not low every particle goes on as it is.
    own = torch.arange(K, device=log_w.device).repeat(N, 1)
    parents = torch.where(low[:, None], parents, own)
    if slot is not None:
        home = torch.where(low[:, None], home, slot)

    # Survivors keep their slots, so that only the slots of dead particles are overwritten.
    first_row = K * torch.arange(N, device=log_w.device)[:, None]  # of each run, among all N K
    ancestors = stay_in_place((first_row + parents).view(-1))
    moved = ancestors.view(N, K) - first_row
    if slot is not None:
        slot = follow(slot, home, parents, moved)
    return ancestors, moved, slot


def log_mean(log_w):
    """log of the mean weight of each run.  (N, K) -> (N,)"""
    return log_w.logsumexp(-1) - math.log(log_w.shape[1])


def along_ancestry(path, moves, own):
    """The Steps of every particle at T, each step taken from the ancestor it had then -> Particles.

    path: the T Steps.  moves: for every t < T `moved` (N, K), the slots at t that the slots at
    t + 1 went on from.  own (N, K): the slots at T, 0 to K - 1.
    lineage[n, k, t]: the slot in which the ancestor at t of final particle k stood.
    """
    # Backwards from T: slots[t] = moved_t[slots[t + 1]].
    slots = [own]
    for moved in reversed(moves):
        slots.append(moved.gather(1, slots[-1]))
    slots.reverse()
    lineage = torch.stack(slots, -1)

    # What happened in each slot, (N, K, T); then the same along the lineages.
    shape = lineage.shape
    tokens = torch.stack([step.tokens for step in path], -1).view(shape)
    log_p = torch.stack([step.log_p for step in path], -1).view(shape)
    log_q = torch.stack([step.log_q for step in path], -1).view(shape)
    psi = torch.stack([step.log_psi for step in path], -1).view(shape)
    log_norm = torch.stack([step.log_norm for step in path], -1).view(shape)
    return Particles(
        tokens=tokens.gather(1, lineage),
        log_p=log_p.gather(1, lineage),
        log_q=log_q.gather(1, lineage),
        log_psi=psi.gather(1, lineage),
        log_norm=log_norm.gather(1, lineage),
        lineage=lineage,
    )


def smc(
    scores, log_phi, T, K, N=1, *, proposal="twist", scheme="systematic", tau=2.0, retained=None
):
    """Alg. 1, and Alg. 2 if a particle is retained: N runs of twisted SMC -> Particles.

    scores(last, ancestors) -> logits, log_psi: (N K, V) each, log p0(. | s_{1:t-1}), unnormalised,
        and log psi_t(s_{1:t-1}, .), None for psi = 1.  It first reorders its state by `ancestors`
        (N K,), then appends the tokens `last` (N K,); either is None where there is nothing to do.
    log_phi(tokens (N, K, T)) -> (N, K): the terminal potential; -inf is allowed.
    proposal: "twist" (Eq. 14) or "base", which is q = p0.
    tau: a run resamples where ESS < tau K, so never for 0 (SIS) and at every step above 1.
    retained (N, R, T): tokens forced on the first R particles, -1 leaves one free.  R must be 1
        where there is resampling, which that particle survives.
    Weights are float64, and in log space throughout.
    """
    if proposal not in ("twist", "base"):
        raise ValueError(f"unknown proposal {proposal!r}")
    logits, log_psi = scores(None, None)
    own = torch.arange(K, device=logits.device).repeat(N, 1)  # (N, K), the slots of each run
    log_w = torch.zeros(N, K, dtype=torch.float64, device=logits.device)  # of the present block
    log_Z = log_w.new_zeros(N)
    psi_before = log_w  # log psi_0 = 0
    slot = None  # of the retained particles
    if retained is not None:
        slot = own[:, : retained.shape[1]]
    path = []  # a Step for each t
    moves = []  # for each t < T, the slot that each particle goes on from
    ess_of = []

    for t in range(T):
        # Propose: extend every particle by one token, drawn from q (Eq. 14) unless it is retained.
        forced = None
        if retained is not None:
            forced = torch.full_like(own, -1).scatter(1, slot, retained[:, :, t]).view(-1)
        step = propose(logits, log_psi, proposal, forced)
        path.append(step)
        psi = step.log_psi.view(N, K)

        # Weigh: under the twist proposal w_t does not depend on the token that was drawn.
        if proposal == "twist":
            increment = step.log_norm.view(N, K) - psi_before  # Eq. 16
        else:
            increment = psi - psi_before  # Eq. 10 with q = p0
        log_w = reweigh(log_w, increment)
        ess_of.append(ess(log_w))
        if t == T - 1:
            break

        # Resample the runs whose effective sample size is low; there a block ends, its mean weight
        # becomes a factor of Z-hat (Eq. 8), and weights start again.  Not after t = 1 under the
        # twist proposal, where w_1 = Z^pi_1 is one number for all particles.
        last = step.tokens
        ancestors = None
        moved = own
        # A run whose particles are all dead (ESS 0) is left alone.
        low = (ess_of[-1] < tau * K) & (ess_of[-1] > 0)
        if low.any() and (t > 0 or proposal == "base"):
            ancestors, moved, slot = draw_ancestors(log_w, low, scheme, slot)
            log_Z = log_Z + torch.where(low, log_mean(log_w), 0.0)
            log_w = torch.where(low[:, None], 0.0, log_w)
            psi = psi.gather(1, moved)  # of the parents, as the last tokens are
            last = last[ancestors]
        moves.append(moved)
        psi_before = psi
        logits, log_psi = scores(last, ancestors)

    # At T the true potential takes the place of psi_T (Eq. 10), and the last block ends (Eq. 8).
    particles = along_ancestry(path, moves, own)
    particles.log_phi = log_phi(particles.tokens).double()
    particles.log_w = reweigh(log_w, particles.log_phi - psi)
    particles.log_Z = log_Z + log_mean(particles.log_w)
    ess_of[-1] = ess(particles.log_w)
    particles.ess = torch.stack(ess_of, -1)
    return particles


def log_Z_bounds(run, exact, K):
    """Stochastic bounds on log Z (Prop. 5.1, Eq. 24) of R runs with K particles each.

    run(K, N, tau=..., retained=...): a function that returns smc's N runs of K particles, on a
    target and with a twist of the caller's; without tau it resamples as the caller does.
    exact: R exact samples of sigma, (R, T); any others would void the upper bounds.  If it is a
    number, which is R, there are lower bounds only.
    -> {name: (R,)}, and the Particles of the lower bounds, without and with resampling.
    smc_*: as `run` resamples.  sis_*: never, which is IWAE; for K = 1 these are F_q = E_q log w and
    G_q = E_sigma log w.
    """
    has_upper = not isinstance(exact, int)
    R = len(exact) if has_upper else exact
    sis = run(K, R, tau=0.0)
    twisted = run(K, R)
    bounds = {"sis_lower": sis.log_Z, "smc_lower": twisted.log_Z}
    if has_upper:
        retained = exact[:, None]  # one particle of each run
        bounds["sis_upper"] = run(K, R, tau=0.0, retained=retained).log_Z
        bounds["smc_upper"] = run(K, R, retained=retained).log_Z
    return bounds, sis, twisted


# ---- Section 4, Table 1: the learners' losses

# Each takes log psi_t(s_{1:t}) or log q(s_t | s_{1:t-1}) of K particles, (..., K, T), and gives the
# mean over t, (...).


def ctl_loss(log_psi, W, log_psi_neg, w_neg):
    """Contrastive twist learning, Eq. 21-22: sum_t KL(sigma(s_{1:t}) | pi_t).

    W (..., K) ~ p0 phi / q of the whole sequence, for every t.  w_neg (..., K, T) ~ p0 psi_t / q
    of prefixes.  Both sum to 1 over K.  The value is a surrogate; its gradient is that of the KL.
    Each psi_t is learned up to a constant.
    """
    positive = (W[..., None].detach() * log_psi).sum(-2)  # E_sigma log psi_t
    negative = (w_neg.detach() * log_psi_neg).sum(-2)  # E_pi_t log psi_t
    return -(positive - negative).mean(-1)


def rl_loss(log_psi, targets):
    """Soft-Q, App. C.1.1.  targets (..., K, T): log sum_v p0 psi_{t+1} for t < T, log phi for T."""
    return (targets.detach() - log_psi).square().mean((-2, -1))


def sixo_loss(log_psi, W, log_psi_neg):
    """Noise contrastive estimation, App. C.3: sigma's prefixes, weighted W (..., K), and p0's."""
    positive = (W[..., None].detach() * F.logsigmoid(log_psi)).sum(-2)
    negative = F.logsigmoid(-log_psi_neg).mean(-2)
    return -(positive + negative).mean(-1)


def fudge_loss(logits, phi):
    """App. C.4: cross-entropy of psi_t = sigmoid(logits) and phi in [0, 1] of p0's continuation."""
    return -(phi * F.logsigmoid(logits) + (1 - phi) * F.logsigmoid(-logits)).mean((-2, -1))


def dpg_loss(log_q, W):
    """App. E.3: KL(sigma | q) up to a constant.  psi_t is free up to c(s_{1:t-1}), so it defines a
    proposal but no target pi_t (Prop. E.2)."""
    return -(W[..., None].detach() * log_q).sum(-2).mean(-1)


def gae(rewards, values, lam=0.95):
    """Advantages (GAE), gamma = 1.  (..., T) each -> advantages, returns, whitened advantages."""
    advantages = rewards + F.pad(values[..., 1:], (0, 1)) - values
    for t in reversed(range(rewards.shape[-1] - 1)):
        advantages[..., t] += lam * advantages[..., t + 1]
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    return advantages, advantages + values, whitened


def ppo_loss(log_q, old_log_q, advantages, values, old_values, returns, clip=0.2, vf=0.1):
    """App. E.2: clipped policy and value losses.

    With the rewards r_t = (log p0 - log q) / beta, plus log phi / beta at T, its minimum is that of
    KL(q | sigma).
    """
    ratio = (log_q - old_log_q).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    near = old_values + (values - old_values).clamp(-clip, clip)
    value = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
    return (policy + vf * value).mean((-2, -1))


# ---- The twist


class Twist(nn.Module):
    """App. G.2: log psi_t(s_{1:t-1}, .) of every next token from s_{t-1}'s hidden state z (..., d).

    layers: 1 (linear) or 3 (MLP).  condition: z is joined by e (..., d), the hidden state of o's
    last token.  body: a trainable transformer; without one z comes from the frozen p0, which runs
    anyway.  log_sigmoid: FUDGE's psi in (0, 1).  Weights are Xavier normal and biases 0: at first
    psi is near 1, and q near p0.
    """

    def __init__(self, d, V, layers=1, condition=False, body=None, log_sigmoid=False):
        super().__init__()
        self.body = body
        self.condition = condition
        self.log_sigmoid = log_sigmoid
        if condition:
            d = 2 * d
        # All layers are square but the last, which has an output for every token.
        self.layers = nn.ModuleList()
        for _ in range(layers - 1):
            self.layers.append(nn.Linear(d, d))
        self.layers.append(nn.Linear(d, V))
        self.critic = nn.Linear(d, 1)  # PPO's value of s_{1:t-1}
        for layer in [*self.layers, self.critic]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def join(self, z, e):
        """z (..., d), with e (..., d) beside it under a condition, in the precision of the head."""
        if e is not None:
            z = torch.cat([z, e.expand(*z.shape[:-1], -1)], -1)
        return z.to(self.critic.weight.dtype)

    def features(self, z, e):
        """What the last layer reads, (..., d)."""
        z = self.join(z, e)
        for layer in self.layers[:-1]:
            z = layer(z).relu()
        return z

    def forward(self, z, e=None):
        """log psi_t(s_{1:t-1}, .), (..., V)"""
        logits = self.layers[-1](self.features(z, e))
        if self.log_sigmoid:
            return F.logsigmoid(logits)
        return logits

    def logits_of(self, tokens, z, e=None):
        """The head's output at `tokens` (...) alone, so that no V-sized tensor is made -> (...)"""
        head = self.layers[-1]
        return (self.features(z, e) * head.weight[tokens]).sum(-1) + head.bias[tokens]

    def log_psi_of(self, tokens, z, e=None):
        """log psi_t(s_{1:t}) (...) of the tokens s_t (...)"""
        logits = self.logits_of(tokens, z, e)
        if self.log_sigmoid:
            return F.logsigmoid(logits)
        return logits

    def value(self, z, e=None):
        """PPO's estimate (...) of the rewards that are to come after s_{1:t-1}."""
        return self.critic(self.join(z, e))[..., 0]


@dataclass
class Policy:
    """A language model q in the twist's place: psi_t(s_{1:t}) = q(s_t | s_{1:t-1}) / p0."""

    body: nn.Module  # a causal LM with p0's vocabulary


def make_twist(args, learner, world, model):
    """The twist that a learner trains.  None for "none" (psi = 1).  A Policy for "policy"."""
    if learner == "none":
        return None
    if learner == "policy":
        ours = load_tokenizer(args.model).get_vocab()
        same = bool(args.policy) and load_tokenizer(args.policy).get_vocab() == ours
        problem = (
            f"--policy {args.policy!r}: name a model with the vocabulary of --model {args.model}"
        )
        require(same, problem)
        return Policy(load_model(args.policy, args.dtype))
    if learner not in LEARNERS:
        raise ValueError(f"unknown learner {learner!r}")

    # One of four architectures: linear or MLP, on the states of p0 or of a trained copy of p0.
    if args.twist in ("linear", "body"):
        layers = 1
    elif args.twist in ("mlp", "body-mlp"):
        layers = 3
    else:
        raise ValueError(f"unknown twist {args.twist!r}")
    body = None
    if args.twist in ("body", "body-mlp"):
        body = copy.deepcopy(model).float().requires_grad_(True)
        # The body's output head is not used.  If it is tied to the embeddings it stays trainable.
        head = body.get_output_embeddings()
        tied = head.weight is body.get_input_embeddings().weight
        if not tied:
            head.requires_grad_(False)
    twist = Twist(world.d, world.V, layers, world.conditional, body, learner == "fudge")
    twist.critic.requires_grad_(learner == "ppo")
    return twist.to(model.device)


# ---- Potentials of decoded texts

# Each has log_phi(tokens (M, T), texts) -> (M,), and log_bound >= log phi, or None if unbounded.


class TinyPotential:
    """phi^beta of a story of the tiny world.

    tiny:polite, tiny:happy, tiny:monster: phi is 0.98 for a story with that attribute, else 0.02.
    tiny:reward: phi = exp(r).
    """

    def __init__(self, what, beta):
        self.what = what
        self.beta = beta
        best = math.log(0.98)
        if what == "reward":
            best = 3.0  # tiny_reward is at most 3
        self.log_bound = beta * best

    def log_phi(self, tokens, texts):
        # What the prompt says does not count, only the story that follows it.
        values = []
        for text in texts:
            story = text.rpartition("Assistant:")[2]
            if self.what == "reward":
                value = tiny_reward("", story)
            elif tiny_attributes(story)[self.what]:
                value = math.log(0.98)
            else:
                value = math.log(0.02)
            values.append(self.beta * value)
        return values


class FilePotential:
    """exp(beta f(tokens, texts)) for a user's f; an attribute f.log_bound allows rejection."""

    def __init__(self, path, name, beta):
        # The file is run as a module, and the function is taken from it.
        spec = importlib.util.spec_from_file_location("potential", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        require(hasattr(module, name), f"potential {path}:{name}: {path} has no function {name}")
        self.function = getattr(module, name)

        # Without a bound there is no rejection, so there are no exact samples.
        self.beta = beta
        self.log_bound = None
        if hasattr(self.function, "log_bound"):
            self.log_bound = beta * self.function.log_bound

    def log_phi(self, tokens, texts):
        return self.beta * torch.as_tensor(self.function(tokens, texts), dtype=torch.float64)


FLOOR = 1e-16  # of the threshold's phi outside the set, as in the released code


class ClassifierPotential:
    """What a sequence classification model says of a text.

    score: the log odds of class 1.  A model with one logit has score = logit, p(1) =
    sigmoid(score) and p(0) = sigmoid(-score); one with two has score = logit 1 - logit 0.

    class:LABEL    phi^beta = p(label | text)^beta
    threshold:ETA  phi = 1[score < eta] + FLOOR, whatever beta is
    reward         phi^beta = exp(beta score), of a model with one logit
    """

    def __init__(self, kind, what, classifier, beta, device):
        from transformers import AutoModelForSequenceClassification

        self.kind = kind
        self.beta = beta
        self.device = device
        self.tokenizer = load_tokenizer(classifier)
        folder = model_folder(classifier)
        load = AutoModelForSequenceClassification.from_pretrained
        judge, info = load(folder, output_loading_info=True)
        self.judge = judge.to(device).requires_grad_(False)
        judge.config.pad_token_id = self.tokenizer.pad_token_id

        # Which labels the potential needs, and how large it can be.
        n = judge.config.num_labels
        if kind == "class":
            self.label = int(what)
            fits = 0 <= self.label < max(2, n)
            self.log_bound = 0.0
        elif kind == "threshold":
            self.eta = float(what)
            fits = n < 3
            self.log_bound = math.log1p(FLOOR)
        elif kind == "reward":
            fits = n == 1
            self.log_bound = None
        else:
            raise ValueError(f"unknown potential of a classifier {kind!r}")
        problem = (
            f"potential {kind}:{what}: {classifier} has {n} labels, {judge.config.id2label}; class "
            "needs one of them, threshold 1 or 2, reward 1, and all must be trained"
        )
        require(fits and not info["missing_keys"], problem)

    def logits(self, texts):
        """(M, labels), in batches of 256 texts."""
        parts = []
        for start in range(0, len(texts), 256):
            batch = self.tokenizer(
                texts[start : start + 256],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=512,
            )
            parts.append(self.judge(**batch.to(self.device)).logits.double())
        return torch.cat(parts)

    def log_phi(self, tokens, texts):
        # The score is the log odds of class 1.
        logits = self.logits(texts)
        single = logits.shape[1] == 1
        score = logits[:, 0] if single else logits[:, 1] - logits[:, 0]
        if self.kind == "threshold":
            return ((score < self.eta) + FLOOR).log()
        if self.kind == "reward":
            return self.beta * score

        # A class: the two of a single logit, or those of a softmax.
        if not single:
            return self.beta * logits.log_softmax(-1)[:, self.label]
        if self.label == 1:
            return self.beta * F.logsigmoid(score)
        return self.beta * F.logsigmoid(-score)


def text_potential(args, device):
    """The potential of args, or None for those that p0 itself gives: infilling, continuation."""
    kind, _, what = args.potential.rpartition(":")
    if args.potential in ("infilling", "continuation"):
        return None
    if kind == "tiny":
        return TinyPotential(what, args.beta)
    if kind.endswith(".py"):
        return FilePotential(kind, what, args.beta)
    if args.potential == "reward":
        return ClassifierPotential("reward", "", args.classifier, args.beta, device)
    if kind in ("class", "threshold"):
        return ClassifierPotential(kind, what, args.classifier, args.beta, device)
    raise SystemExit(f"unknown potential {args.potential!r}")


# ---- A language model as the world of SMC


class Decoder:
    """n copies of a prompt that a causal LM continues, one token at a time, on its KV cache."""

    def __init__(self, model, prompt, n, room, V):
        self.model = model
        self.prompt = prompt  # ids
        self.n = n
        self.room = room  # tokens that may follow
        self.V = V
        self.cache = None

    def step(self, last=None, ancestors=None):
        """Reorder by `ancestors` (n,), append `last` (n,) -> states (n, d), next logits (n, V)."""
        if self.cache is None:
            self.cache, hidden, logits = prefill(
                self.model, [self.prompt], self.room, copies=self.n
            )
        else:
            if ancestors is not None:
                reorder(self.cache, ancestors)
            hidden, logits = decode_step(self.model, self.cache, last)
        return hidden.float(), logits[:, : self.V].float()


class LMWorld:
    """p0, a causal LM after a prompt, and a potential phi: the target sigma of Eq. 1.

    V: token ids that are drawn.  T: tokens of a sequence.  c: of a condition or continuation.
    d: width of a hidden state.  conditional: sigma( . | o) for a condition o (N, c) (Sec. 3.3).
    log_bound >= log phi, or None.  log_floor: up to it a sequence counts as a miss.
    """

    def __init__(self, model, tokenizer, args):
        self.model = model
        self.tokenizer = tokenizer
        self.name = args.potential
        self.beta = args.beta
        self.prompt = tokenizer(args.prompt).input_ids
        self.V = min(len(tokenizer), len(model.get_output_embeddings().weight))  # no padded rows
        self.d = model.get_output_embeddings().weight.shape[1]
        self.T = args.T

        # The potential: of decoded texts, or of what follows under p0.
        self.of_texts = text_potential(args, model.device)
        self.conditional = args.potential == "infilling"
        self.log_bound = 0.0
        if self.of_texts is not None:
            self.log_bound = self.of_texts.log_bound
        self.log_floor = -math.inf
        if args.potential.startswith("threshold:"):
            self.log_floor = math.log(2 * FLOOR)

        # The tokens that follow s_{1:T}: those of --continuation, or c that are drawn (infilling,
        # where a --continuation is only shown).
        self.continuation = []
        if args.continuation:
            self.continuation = tokenizer(args.continuation, add_special_tokens=False).input_ids
        self.c = args.c
        if self.continuation and not self.conditional:
            self.c = len(self.continuation)
        self.check_lengths(args)

    def check_lengths(self, args):
        """Exit with one line if prompt, sequence and continuation do not fit together."""
        # A condition to show under infilling is as long as those that are drawn.
        n = len(self.continuation)
        wrong = f"--continuation {args.continuation!r} has {n} tokens, but --c is {args.c}"
        require(not self.conditional or n in (0, self.c), wrong)

        # What the model's context leaves for the prompt.
        room = self.model.config.max_position_embeddings - self.T - self.c
        problem = (
            f"--prompt: has {len(self.prompt)} tokens; with {self.T + self.c} to follow in a "
            f"context of {self.model.config.max_position_embeddings} it must have 1 to {room}"
        )
        require(1 <= len(self.prompt) <= room, problem)

    def decoder(self, n, o=None, body=None):
        """n slots at the prompt, of p0 or of a twist's body.

        o (N, c): not needed here, since p0 does not depend on the condition.  Scores gives it for
        worlds whose hidden states do, such as those of the tests.
        """
        return Decoder(body or self.model, self.prompt, n, self.T + self.c, self.V)

    def head(self, hidden):
        """Next-token logits (..., V) of p0's hidden states (..., d)."""
        logits = self.model.get_output_embeddings()(hidden.to(self.model.dtype))
        return logits[..., : self.V].float()

    def after_prompt(self, tokens):
        """Tokens (N, K, t) -> (N K, P + t), each row with the prompt before it."""
        tokens = tokens.flatten(0, 1)
        prompt = torch.tensor(self.prompt, device=tokens.device)
        return torch.cat([prompt.expand(len(tokens), -1), tokens], -1)

    def hidden(self, body, tokens):
        """Hidden states of a body before each token, teacher-forced.  (N, K, T) -> (N, K, T, d)"""
        ids = self.after_prompt(tokens)[:, :-1]
        states = body.base_model(ids).last_hidden_state[:, -self.T :].float()
        return states.unflatten(0, tokens.shape[:2])

    def embed(self, twist, o):
        """e (N, d): the state of the last token of o (N, c), read alone; None without condition."""
        if not twist.condition:
            return None
        body = twist.body or self.model
        return body.base_model(o).last_hidden_state[:, -1].float()

    def log_phi(self, tokens, o=None):
        """log phi^beta, (N, K), of sequences (N, K, T), under conditions o (N, c)."""
        if self.of_texts is not None:
            values = self.log_phi_of_texts(self.after_prompt(tokens))
        else:
            # p0 of what follows: the condition of each run, or the one continuation.
            if not self.conditional:
                o = torch.tensor([self.continuation], device=tokens.device).expand(len(tokens), -1)
            follows = o[:, None].expand(-1, tokens.shape[1], -1)
            values = self.beta * self.log_p_of_last(torch.cat([tokens, follows], -1))
        return values.view(tokens.shape[:2])

    def log_phi_of_texts(self, ids):
        """log phi (M,) of the texts of (M, P + T) ids; exits if the answer is no log phi."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answer = self.of_texts.log_phi(ids[:, -self.T :], texts)
        values = torch.as_tensor(answer, dtype=torch.float64, device=ids.device)
        problem = (
            f"potential {self.name}: gives an array of shape {tuple(values.shape)} for "
            f"{len(texts)} texts; it must give one number for each"
        )
        require(values.shape == (len(texts),), problem)

        # log phi = -inf is a potential of 0; nan and inf are no potentials.
        wrong = values.isnan() | values.isposinf()
        if wrong.any():
            i = wrong.nonzero()[0].item()
            raise SystemExit(
                f"potential {self.name}: log phi is {values[i]} for {texts[i]!r}; it must be a "
                "number below infinity, or -inf, for every text"
            )
        return values

    @torch.no_grad()
    def log_p_of_last(self, tokens):
        """log p0 (N K,) of the last c tokens of (N, K, T + c) after what is before, 256 at once."""
        sums = []
        for ids in self.after_prompt(tokens).split(256):
            logits = self.model(ids, use_cache=False, logits_to_keep=self.c + 1).logits
            log_p = logits[:, :-1, : self.V].float().log_softmax(-1)
            sums.append(log_p.gather(-1, ids[:, -self.c :, None]).sum((1, 2)))
        return torch.cat(sums)


def lm_world(model, tokenizer, args):
    """The world of a causal LM, its tokenizer, and the prompt and potential of args.

    Callers outside this file use it, whatever class a world may be.
    """
    return LMWorld(model, tokenizer, args)


# ---- Samples, and the twist on them


class Scores:
    """p0 and the twist, side by side in N K slots: what smc asks for the next scores."""

    def __init__(self, world, twist, N, K, o):
        # p0, and beside it the twist's own body if it has one.
        self.twist = twist
        self.base = world.decoder(N * K, o)
        self.body = None
        if twist is not None and twist.body is not None:
            self.body = world.decoder(N * K, o, twist.body)

        # The condition is read once, and then shown to all particles of its run.
        self.e = None
        if isinstance(twist, Twist):
            self.e = world.embed(twist, o)
        if self.e is not None:
            self.e = self.e.repeat_interleave(K, 0)

        # What sample() keeps for the learners.
        self.states = []  # of p0, (N K, d) for each t
        self.z = []  # of the twist's own body

    def __call__(self, last, ancestors):
        # Both walk on by one token; a head reads the body's states, or those of p0.
        hidden, logits = self.base.step(last, ancestors)
        self.states.append(hidden)
        if self.body is not None:
            hidden, body_logits = self.body.step(last, ancestors)
            self.z.append(hidden)

        # log psi_t of every next token.
        if self.twist is None:
            return logits, None
        if isinstance(self.twist, Policy):
            return logits, body_logits.log_softmax(-1) - logits.log_softmax(-1)  # log q / p0
        return logits, self.twist(hidden, self.e)


def no_potential(tokens):
    """log phi = 0, (N, K), of sequences (N, K, T): the target is p0 itself."""
    return tokens.new_zeros(tokens.shape[:2])


def states_along(states, lineage):
    """Hidden states of slots, T times (N K, d) -> (N, K, T, d) along each particle's ancestry."""
    N, K, _ = lineage.shape
    columns = []
    for t, hidden in enumerate(states):
        columns.append(hidden.view(N, K, -1).take_along_dim(lineage[:, :, t, None], 1))
    return torch.stack(columns, 2)


@torch.no_grad()
def sample(world, twist, K, N=1, o=None, T=None, **options):
    """smc on a world -> Particles: N runs, or one for each row of o (N, c).

    twist: a Twist, a Policy, or None for psi = 1.  options: those of smc.  T: another length than
    the world's, for draws of p0 alone (BDMC).  The hidden states of p0 (states) and of the twist's
    body (z) are kept: a head trains on them without another pass.
    """
    log_phi = partial(world.log_phi, o=o)
    if T is None:
        T = world.T
    elif T != world.T:
        log_phi = no_potential
    if o is not None:
        N = len(o)
    scores = Scores(world, twist, N, K, o)
    particles = smc(scores, log_phi, T, K, N, **options)
    particles.o = o
    particles.states = states_along(scores.states, particles.lineage)
    particles.z = particles.states
    if scores.body is not None:
        particles.z = states_along(scores.z, particles.lineage)
    return particles


def head_inputs(world, twist, particles):
    """z (N, K, T, d) and e (N, 1, 1, d) that the twist's head reads, with gradient into a body."""
    z = particles.z
    if twist.body is not None:
        z = world.hidden(twist.body, particles.tokens)
    e = world.embed(twist, particles.o)
    if e is not None:
        e = e[:, None, None]
    return z, e


def log_psi(world, twist, particles):
    """log psi_t(s_{1:t}) of particles, (N, K, T), with gradient."""
    z, e = head_inputs(world, twist, particles)
    return twist.log_psi_of(particles.tokens, z, e)


def log_q_in_full(world, twist, particles):
    """log q(s_t | s_{1:t-1}) of particles, (N, K, T), with gradient; makes (N, K, T, V) tensors."""
    z, e = head_inputs(world, twist, particles)
    log_p_psi = world.head(particles.states) + twist(z, e)
    return log_p_psi.log_softmax(-1).gather(-1, particles.tokens[..., None])[..., 0]


def log_q(world, twist, particles):
    """log q(s_t | s_{1:t-1}) of particles, (N, K, T); nothing V-sized waits for backward()."""
    return checkpoint(log_q_in_full, world, twist, particles, use_reentrant=False)


# ---- One update of a learner: draw a batch without gradient, then its loss


@dataclass
class Batch:
    """What one update of a learner is made from; N is 1, or the number of conditions."""

    samples: Particles  # K own draws: p0's for SIXO and FUDGE, q's for the others
    positives: Particles  # particles that stand for sigma; may be the samples again
    W: torch.Tensor  # (N, K'), weights of the positives, which sum to 1; all 0 if none has any
    hit: torch.Tensor  # (N,), 1 if some positive has weight; 0 drops the run from the loss
    w_neg: torch.Tensor | None = None  # CTL: (N, K, T), weights of the samples' prefixes under pi_t
    targets: torch.Tensor | None = None  # RL, FUDGE: (N, K, T or 1), for the samples' psi
    positive_targets: torch.Tensor | None = None  # the same for exact positives, if there are any
    advantages: torch.Tensor | None = None  # PPO: (N, K, T), whitened
    returns: torch.Tensor | None = None  # PPO: (N, K, T)
    values: torch.Tensor | None = None  # PPO: (N, K, T), the critic's before the update


def draw_positives(learner, world, twist, samples, exact, scheme):
    """Particles that stand for sigma, and their weights W (N, K').

    W sums to 1 over the positives, or is 0 where all weights are 0.  Resampling is used, as in the
    released code, only by SIXO and by CTL under conditions; the latter is conditional SMC with its
    one exact sample.  exact (N, n, T): exact samples, or None.
    """
    N, K, _ = samples.tokens.shape
    o = samples.o

    # Exact samples count alike; all others by their weight p0 phi / q.
    if exact is not None and learner == "ctl" and world.conditional:
        positives = sample(world, twist, K, N, o, scheme=scheme, retained=exact)
    elif exact is not None:
        # All particles are forced: this only scores the exact samples.
        n = exact.shape[1]
        positives = sample(world, twist, n, N, o, tau=0.0, retained=exact)
        return positives, torch.full_like(positives.log_w, 1 / n)
    elif learner == "sixo":
        positives = sample(world, twist, K, N, o, scheme=scheme)
    else:
        positives = samples
    return positives, positives.log_w.softmax(-1).nan_to_num(0.0)


def soft_values(particles):
    """RL's targets (N, K, T), App. C.1.1: log sum_v p0 psi_{t+1} for t < T, log phi for T."""
    return torch.cat([particles.log_norm[..., 1:], particles.log_phi[..., None]], -1)


def fudge_labels(world, exact, o=None):
    """phi (N, T) of a continuation by p0 of every prefix s_{1:t} of exact samples (N, T)."""
    # Every prefix of every sample, (T, N, T); -1 leaves what follows it to p0.
    N, T = exact.shape
    keep = torch.ones(T, T, dtype=torch.bool, device=exact.device).tril()  # row t: s_{1:t+1}
    prefixes = torch.where(keep[:, None], exact, -1)

    # One run of one particle for each prefix.
    prefixes = prefixes.reshape(T * N, 1, T)
    if o is not None:
        o = o.repeat(T, 1)
    particles = sample(world, None, 1, N * T, o, proposal="base", tau=0.0, retained=prefixes)
    return particles.log_phi.exp().view(T, N).T


def draw_batch(learner, world, twist, K, exact=None, o=None, beta=1.0, scheme="systematic"):
    """Draw what one update of a learner needs -> Batch.

    K particles for each row of o (N, c), or once.  exact (N, n, T): n exact samples each, or None.
    """
    if learner not in LEARNERS:
        raise ValueError(f"unknown learner {learner!r}")
    N = 1 if o is None else len(o)
    if learner in ("sixo", "fudge"):
        samples = sample(world, None, K, N, o, proposal="base", tau=0.0, scheme=scheme)
    else:
        samples = sample(world, twist, K, N, o, tau=0.0, scheme=scheme)

    # Positives outside the set of a threshold, or of weight 0, say nothing of sigma.
    positives, W = draw_positives(learner, world, twist, samples, exact, scheme)
    W = W * (positives.log_phi > world.log_floor)
    hit = (W.sum(-1) > 0).double()
    W = W / W.sum(-1, keepdim=True).clamp(min=1e-300)
    batch = Batch(samples, positives, W, hit)

    # What each learner wants to know of its own samples.
    if learner == "ctl":
        # Prefixes of q, weighted to be those of pi_t (Eq. 9).
        ratio = (samples.log_p - samples.log_q).cumsum(-1)
        batch.w_neg = (ratio + samples.log_psi).softmax(1)
    elif learner == "rl":
        batch.targets = soft_values(samples)
        if exact is not None:
            batch.positive_targets = soft_values(positives)
    elif learner == "fudge":
        batch.targets = (samples.log_phi - world.log_bound).exp()[..., None]  # psi is phi / bound
        # Samples of p0 hardly ever fit their condition; exact prefixes, continued by p0, do.
        if exact is not None and world.conditional:
            batch.positive_targets = fudge_labels(world, exact[:, 0], o)[:, None]
    elif learner == "ppo":
        # The reward at T is log phi, and log q / p0 is the cost of every token.
        with torch.no_grad():
            z, e = head_inputs(world, twist, samples)
            batch.values = twist.value(z, e).double()
        terminal = F.pad(samples.log_phi[..., None], (world.T - 1, 0))
        rewards = (samples.log_p - samples.log_q + terminal) / beta
        _, batch.returns, batch.advantages = gae(rewards, batch.values)
    return batch


def regression_loss(learner, world, twist, particles, targets):
    """RL's or FUDGE's loss (N,) of particles with their targets."""
    z, e = head_inputs(world, twist, particles)
    if learner == "rl":
        return rl_loss(twist.log_psi_of(particles.tokens, z, e), targets)
    return fudge_loss(twist.logits_of(particles.tokens, z, e), targets)


def batch_loss(learner, world, twist, batch):
    """The learner's loss of a batch, mean over its N conditions, with gradient."""
    samples = batch.samples
    positives = batch.positives
    if learner == "ctl":
        log_psi_neg = log_psi(world, twist, samples)
        log_psi_pos = log_psi_neg
        if positives is not samples:
            log_psi_pos = log_psi(world, twist, positives)
        return (batch.hit * ctl_loss(log_psi_pos, batch.W, log_psi_neg, batch.w_neg)).mean()
    if learner == "sixo":
        log_psi_pos = log_psi(world, twist, positives)
        log_psi_neg = log_psi(world, twist, samples)
        return (batch.hit * sixo_loss(log_psi_pos, batch.W, log_psi_neg)).mean()
    if learner == "dpg":
        return (batch.hit * dpg_loss(log_q(world, twist, positives), batch.W)).mean()
    if learner in ("rl", "fudge"):
        loss = regression_loss(learner, world, twist, samples, batch.targets).mean()
        if batch.positive_targets is None:
            return loss
        on_exact = regression_loss(learner, world, twist, positives, batch.positive_targets).mean()
        return (loss + on_exact) / 2
    if learner == "ppo":
        z, e = head_inputs(world, twist, samples)
        values = twist.value(z, e).double()
        new = log_q(world, twist, samples)
        old = samples.log_q
        return ppo_loss(new, old, batch.advantages, values, batch.values, batch.returns).mean()
    raise ValueError(f"unknown learner {learner!r}")


# ---- Exact samples


@dataclass
class Exact:
    """Exact samples of sigma, each with its condition."""

    tokens: torch.Tensor  # (M, T)
    o: torch.Tensor | None  # (M, c): infilling, where sample i is from sigma( . | o_i)


def exact_samples(world, n, batch=1000, patience=1000):
    """n exact samples of sigma -> Exact.

    Infilling: T + c tokens of p0, cut in two (BDMC, Sec. 3.3).  Otherwise rejection: draws of p0
    are kept with chance phi / bound; it gives up when fewer than one sample is found in `patience`
    batches, on average.
    """
    if world.conditional:
        T = world.T + world.c
        tokens = sample(world, None, 1, n, T=T, proposal="base", tau=0.0).tokens[:, 0]
        return Exact(tokens[:, : world.T], tokens[:, world.T :])

    # Rejection, in batches.
    kept = []
    draws = 0
    while len(kept) < n:
        particles = sample(world, None, batch, proposal="base", tau=0.0)
        draws += batch
        log_phi = particles.log_phi[0]
        require(log_phi.max() <= world.log_bound + 1e-6, "potential: its log_bound is too small")
        accepted = torch.rand_like(log_phi).log() < log_phi - world.log_bound
        kept.extend(particles.tokens[0, accepted])

        # Say how far it is, and stop if it leads nowhere.
        if draws % (100 * batch) == 0:
            print(f"exact samples: {len(kept)} of {n} after {draws} draws of p0", flush=True)
        problem = (
            f"exact samples: {len(kept)} in {draws} draws of p0: phi is (nearly) zero everywhere; "
            "change it or --beta, or take --exact 0: no upper bounds"
        )
        require(draws < patience * batch * (1 + len(kept)), problem)
    return Exact(torch.stack(kept[:n]), None)


def target_of(args):
    """All that decides sigma, for the file of its exact samples."""
    names = ["model", "dtype", "prompt", "T", "potential", "beta", "classifier", "c"]
    if args.potential == "continuation":
        names.append("continuation")
    target = {name: getattr(args, name) for name in names}
    path = Path(args.potential.rpartition(":")[0])
    if path.suffix == ".py":
        target["file"] = path.read_text()  # an edited potential is another target
    return target


def read_exact_samples(path, args, world):
    """Exact samples that an earlier run has written; exits if they are of another target."""
    try:
        saved = torch.load(path, "cpu")
        target = saved["target"]
        tokens = saved["tokens"]
        o = saved["o"]
    except Exception as error:
        why = (
            f"{path}: no file of exact samples ({type(error).__name__}); delete it, or name another"
        )
        raise SystemExit(why) from None

    # The same target, and samples enough.
    wanted = target_of(args)
    changed = [name for name in wanted if target.get(name) != wanted[name]]
    problem = f"{path}: exact samples of another target, with another {', '.join(changed)}"
    require(not changed, f"{problem}; name another --exact-samples")
    few = f"{path}: holds {len(tokens)} exact samples, fewer than --exact {args.exact}; delete it"
    require(len(tokens) >= args.exact, few)
    if o is not None:
        o = o[: args.exact]
    return Exact(tokens[: args.exact], o)


def load_exact_samples(args, world, out, device):
    """Exact samples from --exact-samples; the first process draws and writes them if need be."""
    path = Path(args.exact_samples or out / "exact_samples.pt")
    found = [None]
    if dist.get_rank() == 0 and path.exists():
        found = [read_exact_samples(path, args, world)]
    elif dist.get_rank() == 0:
        # Draw, and write under another name first, so that the file is never half-written.
        print(f"drawing {args.exact} exact samples: {path}", flush=True)
        exact = exact_samples(world, args.exact)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = {"target": target_of(args), "tokens": exact.tokens.cpu(), "o": None}
        if exact.o is not None:
            contents["o"] = exact.o.cpu()
        partial = Path(f"{path}.tmp")
        torch.save(contents, partial)
        partial.replace(path)
        found = [Exact(contents["tokens"], contents["o"])]

    # The others get them from the first process.
    dist.broadcast_object_list(found)
    exact = found[0]
    exact.tokens = exact.tokens.to(device)
    if exact.o is not None:
        exact.o = exact.o.to(device)
    return exact


# ---- Section 5: evaluation


def interval(x):
    """Half of the 95 % interval of the mean of independent values (n,); nan for one value."""
    if len(x) < 2:
        return math.nan
    return 1.96 * x.std().item() / math.sqrt(len(x))


def midpoint(bounds):
    """log Z (R,) as released: the middle of the tighter of two pairs of bounds, and its gap."""
    sis_gap = (bounds["sis_upper"] - bounds["sis_lower"]).mean().item()
    smc_gap = (bounds["smc_upper"] - bounds["smc_lower"]).mean().item()
    if smc_gap < sis_gap:
        return (bounds["smc_lower"] + bounds["smc_upper"]) / 2, smc_gap
    return (bounds["sis_lower"] + bounds["sis_upper"]) / 2, sis_gap


def kl_estimates(run, exact, bounds, log_w):
    """Both KLs of the proposal q to sigma, and log Z, with half widths -> {name: value}.

    bounds {name: (R,)}: those of log_Z_bounds.  log_w (R, K): log p0 phi / q of q's samples.
    KL(sigma | q) takes all exact samples; under conditions only the R that have a log Z.
    """
    conditional = exact.o is not None
    log_Z, gap = midpoint(bounds)  # (R,)
    record = {"log_Z": log_Z.mean().item(), "log_Z_ci": interval(log_Z), "gap": gap}

    # log w of exact samples, each a particle of its own run.
    M = len(exact.tokens)
    if conditional:
        M = len(log_Z)
    retained = exact.tokens[:M, None]
    G_q = run(1, M, tau=0.0, retained=retained, proposal="twist").log_w[:, 0]

    # Both KLs (Eq. 23).  `error` is what log Z adds to their half widths.
    if conditional:  # every condition has its own log Z, whose error is in the spread
        kl_q_sigma = log_Z - log_w.mean(1)
        kl_sigma_q = G_q - log_Z
        error = 0.0
    else:
        log_Z_mean = log_Z.mean()
        kl_q_sigma = (log_Z_mean - log_w).flatten()
        kl_sigma_q = G_q - log_Z_mean
        error = interval(log_Z)
    record["kl_q_sigma"] = kl_q_sigma.mean().item()
    record["kl_q_sigma_ci"] = math.hypot(interval(kl_q_sigma), error)
    record["kl_sigma_q"] = kl_sigma_q.mean().item()
    record["kl_sigma_q_ci"] = math.hypot(interval(kl_sigma_q), error)
    record["G_q"] = G_q.mean().item()
    return record


def evaluate(args, world, twist, exact):
    """Bounds on log Z for every K of --bound-K, and both KLs with the last -> {name: value}.

    Without exact samples there are lower bounds only.  Under conditions each has its own log Z.
    """
    # R runs, each with an exact sample and under that sample's condition if there are any.
    R = args.runs
    o = None
    retained = R  # without exact samples
    if exact is not None:
        R = min(R, len(exact.tokens))
        retained = exact.tokens[:R]
        if exact.o is not None:
            o = exact.o[:R]
    options = {"proposal": args.proposal, "scheme": args.scheme, "tau": args.tau}
    run = partial(sample, world, twist, o=o, **options)

    # The bounds (Eq. 24); what follows reads those of the last K.
    record = {}
    for K in args.bound_K:
        bounds, sis, twisted = log_Z_bounds(run, retained, K)
        for name, values in bounds.items():
            record[f"{name}_{K}"] = values.mean().item()
            record[f"{name}_{K}_ci"] = interval(values)
    for t, value in enumerate(twisted.ess.mean(0).tolist(), 1):
        record[f"ess_{t}"] = value

    # Samples of the twist-induced proposal q, without resampling: the bounds have them, unless
    # their proposal is p0.
    q_samples = sis
    if args.proposal != "twist":
        q_samples = run(args.bound_K[-1], R, tau=0.0, proposal="twist")
    log_phi = q_samples.log_phi
    problem = (
        f"potential {args.potential}: zero on all {log_phi.numel()} samples, so log Z-hat = "
        "-inf; choose one that p0 reaches"
    )
    require(log_phi.max() > -math.inf, problem)
    record["kl_prior"] = (q_samples.log_q - q_samples.log_p).sum(-1).mean().item()
    record["reward"] = log_phi.mean().item() / args.beta
    record["hits"] = (log_phi > world.log_floor).double().mean().item()
    record["F_q"] = q_samples.log_w.mean().item()
    record["conditional"] = float(o is not None)

    if exact is None:
        record["lower"] = max(bounds["sis_lower"].mean(), bounds["smc_lower"].mean()).item()
        return record
    record.update(kl_estimates(run, exact, bounds, q_samples.log_w))
    return record


# What is printed, and the columns of the table.  lower: the larger lower bound on log Z, where
# there are no exact samples.  hits: the share of q's samples whose phi is above 0, or above a
# threshold's floor.
SHOWN = ("kl_q_sigma", "kl_sigma_q", "log_Z", "gap", "lower", "kl_prior", "reward", "hits")


def evaluate_and_log(args, world, twist, exact, out, step):
    """The first process evaluates; all of them log its record to out/metrics.jsonl."""
    found = [None]
    if dist.get_rank() == 0:
        found = [evaluate(args, world, twist, exact)]
    dist.broadcast_object_list(found)
    record = found[0]
    line = {name: record[name] for name in SHOWN if name in record}  # first, since they are printed
    line.update(record)
    log(out, step, **line)


# ---- Training


def is_due(step, eval_every):
    """Whether to evaluate after `step` updates: at multiples, or for 0 at 0, 2, 4, 8, ..."""
    if eval_every:
        return step % eval_every == 0
    power_of_two = (step & (step - 1)) == 0  # of 0 too
    return power_of_two and step != 1


def draw_exact(args, learner, world, exact):
    """What an update's batch starts from -> K, retained, o.

    K: particles of each of the N runs.  retained (N, n, T): exact samples, which are the positives,
    or None.  o (N, c): conditions, or None.
    """
    if world.conditional and learner == "ctl":
        # K particles for each new condition, with the exact sample that BDMC draws with it.
        fresh = exact_samples(world, args.conditions)
        return args.K, fresh.tokens[:, None], fresh.o
    if world.conditional:
        # The same number of particles, but each has a condition of its own.
        fresh = exact_samples(world, args.conditions * args.K)
        return 1, fresh.tokens[:, None], fresh.o
    if args.train_on_exact:
        # K of the exact samples that are there.
        chosen = torch.randint(len(exact.tokens), (args.K,), device=exact.tokens.device)
        return args.K, exact.tokens[chosen][None], None
    return args.K, None, None


def update(args, learner, world, twist, exact, optimizer, step):
    """One update of a learner's twist, of every process's own batch with the mean gradient."""
    K, retained, o = draw_exact(args, learner, world, exact)
    batch = draw_batch(learner, world, twist, K, retained, o, args.beta, args.scheme)

    # One step of Adam, with the mean gradient of all processes; PPO uses its batch four times.
    weights = optimizer.param_groups[0]["params"]
    epochs = 4 if learner == "ppo" else 1
    for _ in range(epochs):
        optimizer.zero_grad()
        batch_loss(learner, world, twist, batch).backward()
        for weight in weights:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item()
        problem = (
            f"{learner}, update {step}: the loss or its gradient is not finite; take a smaller "
            "--lr, and for rl a potential that is nowhere zero"
        )
        require(math.isfinite(norm), problem)
        optimizer.step()


def train(args, learner, seed, world, model, exact, out):
    """One learner with one seed -> its twist; evaluations go to out/metrics.jsonl."""
    out.mkdir(parents=True, exist_ok=True)

    # All processes begin with the same twist; then each draws its own particles.
    torch.manual_seed(seed)
    twist = make_twist(args, learner, world, model)
    torch.manual_seed(1000 * seed + dist.get_rank())
    updates = 0
    step = 0
    optimizer = None
    if learner in LEARNERS:
        updates = args.max_steps
        weights = [weight for weight in twist.parameters() if weight.requires_grad]
        rate = args.lr
        if rate == 0:
            rate = LR[args.rates][learner]
        optimizer = torch.optim.Adam(weights, lr=rate)
        if args.resume:
            step, _ = load_checkpoint(out, twist, optimizer)
    begun = step  # this run starts here: 0, or the checkpoint that it resumes

    while True:
        # When asked to stop, save and leave between two updates.
        if stop_requested() and step < updates:
            if step > begun:
                save_checkpoint(out, step, twist, optimizer)
            sys.exit(143)

        # Save and evaluate when that is due, and after the last update.
        if is_due(step, args.eval_every) or step >= updates:
            if step > begun:
                save_checkpoint(out, step, twist, optimizer)
            evaluate_and_log(args, world, twist, exact, out, step)
        if step >= updates:
            return twist
        update(args, learner, world, twist, exact, optimizer, step)
        step += 1


# ---- Texts, table and figure


def print_text(args, world, twist):
    """A text that is nearly a sample of sigma: one of K samples of q, drawn by their weights."""
    # Under infilling what follows is --continuation, or drawn like the conditions of training.
    o = None
    if world.conditional and world.continuation:
        o = torch.tensor([world.continuation], device=world.model.device)
    elif world.conditional:
        o = exact_samples(world, 1).o
    particles = sample(world, twist, args.K, o=o, tau=0.0)
    k = particles.log_w[0].softmax(-1).multinomial(1).item()
    text = world.tokenizer.decode(particles.tokens[0, k])
    if o is not None:
        text = f"{text} [{world.tokenizer.decode(o[0])}]"
    log_phi = particles.log_phi[0, k].item()
    print(f"one of {args.K} by weight: log phi {log_phi:.3f}, {text!r}", flush=True)


def read_history(out):
    """The records of a run's metrics.jsonl, in the order of their updates."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def values_over_seeds(name, records, log_Z):
    """The value of a column for every seed's record; the KLs are taken with one common log Z."""
    values = []
    for record in records:
        if name == "kl_q_sigma" and not record["conditional"]:
            values.append(log_Z - record["F_q"])
        elif name == "kl_sigma_q" and not record["conditional"]:
            values.append(record["G_q"] - log_Z)
        else:
            values.append(record[name])
    return torch.tensor(values)


# Titles of the figure's panels; the table has those of the KLs too.
TITLES = {
    "kl_q_sigma": "KL(q ‖ σ)",
    "kl_sigma_q": "KL(σ ‖ q)",
    "kl_prior": "KL(q ‖ p0)",
    "reward": "mean log φ / β of q",
}


def pretty(name):
    """A column's title: KLs as the paper writes them, others by their name."""
    if name.startswith("kl"):
        return TITLES[name]
    return name.replace("_", " ")


def table_rows(finals, names, log_Z):
    """Cells of the table, and a warning for each KL below the gap of its bounds on log Z.

    finals: {learner: last records, one for each seed}.  log_Z: the common one of the KLs.
    """
    rows, warnings = [], []
    for learner, records in finals.items():
        row = [learner]
        for name in names:
            # Mean and half of its 95 % interval: over seeds if there are several, else samples.
            values = values_over_seeds(name, records, log_Z)
            mean = values.mean().item()
            width = records[0].get(f"{name}_ci", math.nan)
            if len(values) > 1:
                width = interval(values)
            cell = f"{mean:.3f}"
            if not math.isnan(width):
                cell = f"{cell} ± {width:.3f}"
            row.append(cell)

            # A gap between the bounds hides a KL, unless it is within the KL's own noise.  The gap
            # is that of the first seed.
            gap = records[0].get("gap", 0.0)
            hidden = gap > max(0.0, mean) and not gap < width
            if name in ("kl_q_sigma", "kl_sigma_q") and hidden:
                warnings.append(
                    f"warning, {learner}: {pretty(name)} = {mean:.3f} is less than the gap "
                    f"{gap:.3f} between the bounds on log Z; a larger --bound-K closes it"
                )
        rows.append(row)
    return rows, warnings


def write_table(out, records):
    """Print and write table.md: the first evaluation, and the last one of every learner.

    records: {(learner, seed): its evaluations}.
    """
    finals = {}
    middles = []
    for (learner, _), history in records.items():
        finals.setdefault(learner, []).append(history[-1])
        middles.append(history[-1].get("log_Z", 0.0))
    log_Z = sorted(middles)[len(middles) // 2]  # the median, as released
    first = next(iter(records.values()))
    if len(first) > 1:
        finals = {"untrained": [first[0]], **finals}
    names = [name for name in SHOWN if name in first[0]]
    rows, warnings = table_rows(finals, names, log_Z)
    rows.insert(0, ["q"] + [pretty(name) for name in names])

    # Cells of a column have one width.
    widths = []
    for column in range(len(rows[0])):
        widths.append(max(len(row[column]) for row in rows))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("", *lines, "", *warnings, sep="\n")


COLOURS = {"ctl": "C0", "rl": "C1", "sixo": "C2", "fudge": "C3", "dpg": "C4", "ppo": "C5"}
MARKERS = {"ctl": "o", "rl": "s", "sixo": "D", "fudge": "^", "dpg": "v", "ppo": "P"}


def style_of(learner, seed, args):
    """Colour and marker of a learner; its name once, for the legend."""
    label = learner if seed == args.seed else None
    return {
        "color": COLOURS.get(learner, "k"),
        "marker": MARKERS.get(learner, "*"),
        "markersize": 5,
        "linewidth": 1.2,
        "label": label,
    }


def draw_updates(axis, name, records, args):
    """A quantity of q against the number of updates, a line for each learner and seed."""
    for (learner, seed), history in records.items():
        steps = [record["step"] for record in history]
        values = [record[name] for record in history]
        axis.plot(steps, values, **style_of(learner, seed, args))

    # KLs are compared with 0; the paper's epochs double the updates.
    axis.set(title=TITLES[name], xlabel="updates", ylabel="nats")
    if name.startswith("kl"):
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if args.eval_every == 0:
        axis.set_xscale("symlog", base=2, linthresh=1)


def draw_bounds(axis, learner, history, args, known):
    """As Fig. 3: bounds on log Z (Eq. 24) against K, before and after training.

    known: (log Z, half width of its interval) from elsewhere, or None.
    """
    for record, color in ((history[0], "0.65"), (history[-1], COLOURS.get(learner, "k"))):
        for name, line in (
            ("sis_lower", "o-"),
            ("sis_upper", "o--"),
            ("smc_lower", "s-"),
            ("smc_upper", "s--"),
        ):
            if f"{name}_{args.bound_K[0]}" not in record:
                continue  # no upper bounds without exact samples
            means = [record[f"{name}_{K}"] for K in args.bound_K]
            widths = [record[f"{name}_{K}_ci"] for K in args.bound_K]
            axis.errorbar(
                args.bound_K, means, widths, fmt=line, color=color, ms=4, capsize=3, lw=1.2
            )

    # Where log Z really is, if it is known.
    title = f"log Z bounds, {learner} (grey: untrained)\nupper dashed; IWAE round, SMC square"
    if known is not None:
        log_Z, width = known
        axis.axhspan(log_Z - width, log_Z + width, color="k", alpha=0.2, linewidth=0)
        axis.axhline(log_Z, color="k", linewidth=1)
        title = f"{title}; black: log Z"
    axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel="K, particles", ylabel="nats")
    axis.set_xticks(args.bound_K, [str(K) for K in args.bound_K])
    axis.minorticks_off()


def draw_ess(axis, records, args):
    """Effective sample size of the last evaluation against t."""
    for (learner, seed), history in records.items():
        T = range(1, args.T + 1)
        share = [history[-1][f"ess_{t}"] / args.bound_K[-1] for t in T]
        axis.plot(T, share, **style_of(learner, seed, args))
    axis.set(title="after training", xlabel="t, tokens", ylabel="ESS before resampling / K")
    axis.set_ylim(0, 1.03)
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_figure(out, records, args):
    """figures/twisted_smc.png from the evaluations: KLs, bounds on log Z and ESS."""
    from matplotlib.figure import Figure

    figure = Figure((11, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    (learner, _), history = next(iter(records.items()))
    names = ("kl_q_sigma", "kl_sigma_q")
    if "kl_q_sigma" not in history[0]:
        names = ("kl_prior", "reward")  # without exact samples
    draw_updates(axes[0, 0], names[0], records, args)
    draw_updates(axes[0, 1], names[1], records, args)
    draw_bounds(axes[1, 0], learner, history, args, known_log_Z(args))
    draw_ess(axes[1, 1], records, args)

    # What it does not show, and one legend for all panels.
    where = f"model {args.model}"
    if args.model == "tiny":
        where = "the built-in tiny world, not the paper's setting"
    figure.suptitle(f"{args.potential}, {where}; T {args.T}, seed {args.seed}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    (out / "figures").mkdir(exist_ok=True)
    figure.savefig(out / "figures" / "twisted_smc.png", dpi=100)


# log Z of the default target and half of its 95 % interval: the log of the mean of phi over 200,000
# draws of p0; a test draws fewer.
TINY_LOG_Z = (-1.2248, 0.0065)


def known_log_Z(args):
    """(log Z, half width) of the default run's target, else None."""
    if target_of(args) == target_of(PRESETS["tiny"]):
        return TINY_LOG_Z
    return None


# ---- The run

LEAST = {
    "T": 1,
    "K": 1,
    "conditions": 1,
    "c": 0,
    "runs": 1,
    "seeds": 1,
    "seed": 0,
    "exact": 0,
    "max_steps": 0,
    "eval_every": 0,
    "lr": 0,
    "tau": 0,
}


def check_potential(args):
    """Exit with one line if --potential and its options do not fit."""
    name = args.potential
    kind, _, what = name.rpartition(":")
    # Each kind needs options of its own.
    if name == "infilling":
        fits = args.c > 0 and args.beta == 1 and args.exact > 0
        problem = f"--c {args.c} must be above 0, --beta 1, and --exact above 0"
    elif name == "continuation":
        fits = args.continuation
        problem = "give its text with --continuation"
    elif kind == "tiny":
        attributes = list(tiny_attributes(""))  # the names of those that any story has or lacks
        fits = what == "reward" or what in attributes
        problem = f"choose tiny:reward, or one of {', '.join(attributes)} after tiny:"
    elif kind.endswith(".py"):
        fits = Path(kind).is_file()
        problem = f"there is no file {kind}"
    elif name == "reward":
        fits = args.classifier
        problem = "name its --classifier"
    elif kind == "class":
        fits = args.classifier and what.isdecimal()
        problem = "give a label (0, 1, ...) after class:, and a --classifier"
    elif kind == "threshold":
        digits = what.removeprefix("-").replace(".", "", 1)  # of a number such as -1.5
        fits = args.classifier and digits.isdecimal()
        problem = "give a number after threshold:, and a --classifier"
    else:
        fits = False
        problem = (
            "unknown; choose infilling, continuation, tiny:WHAT, FILE.py:FUNCTION, or class:LABEL, "
            "threshold:ETA, reward with --classifier"
        )
    require(fits, f"potential {name}: {problem}")


def check(args):
    """Exit with one line if an option is out of its range, before anything is loaded or made."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        require(least <= value < math.inf, f"--{name.replace('_', '-')} {value}: at least {least}")
    require(0 < args.beta < math.inf, f"--beta {args.beta}: must be positive")
    require(args.bound_K and min(args.bound_K) > 0, "--bound-K: one number or several, at least 1")
    require(args.rates in LR, f"unknown row of rates {args.rates!r}: choose one of {', '.join(LR)}")
    known = args.learner in (*LEARNERS, "all", "none", "policy")
    require(known, f"unknown learner {args.learner!r}: choose one of {', '.join(LEARNERS)}, all")
    check_potential(args)

    # Learners that compare particles by weight; with several conditions only CTL does so within K.
    compared = ("all", "ctl", "sixo", "dpg")
    if args.conditions > 1:
        compared = ("all", "ctl")
    problem = "--K 1: the weight of one particle is always 1, so nothing is learned; take 2 or more"
    require(args.K > 1 or args.learner not in compared, problem)


def choose_learners(args, world):
    """The learners of this run; FUDGE and exact samples need a potential with a known bound."""
    bounded = world.log_bound is not None
    problem = "fudge and --train-on-exact need a potential with a known log_bound"
    require(bounded or not (args.train_on_exact or args.learner == "fudge"), problem)
    require(args.exact or not args.train_on_exact, "--train-on-exact needs --exact above 0")
    if args.learner != "all":
        return [args.learner]
    learners = list(LEARNERS)
    if not bounded:
        say("fudge is left out: the potential has no log_bound")
        learners.remove("fudge")
    return learners


def main(args):
    check(args)

    # The target, and who learns to sample from it.
    device = setup(args.seed)
    model = load_model(args.model, args.dtype)
    world = lm_world(model, load_tokenizer(args.model), args)
    learners = choose_learners(args, world)
    out = start_run(args, "twisted_smc")
    first = dist.get_rank() == 0

    # What an earlier run has left there goes with it.
    if args.overwrite and first:
        (out / "exact_samples.pt").unlink(missing_ok=True)
        for old in out.glob("*-seed*"):
            shutil.rmtree(old)

    # Exact samples, for upper bounds and KL(sigma | q).
    exact = None
    if world.log_bound is not None and args.exact > 0:
        exact = load_exact_samples(args, world, out, device)

    # Train and evaluate every learner, with every seed.
    records = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for learner in learners:
            say(f"{learner}, seed {seed}")
            folder = out / f"{learner}-seed{seed}"
            twist = train(args, learner, seed, world, model, exact, folder)
            if first:
                records[learner, seed] = read_history(folder)
                print_text(args, world, twist)

    # Table and figure.
    if first:
        write_table(out, records)
        draw_figure(out, records, args)
        print(f"{out}: table.md, figures/twisted_smc.png")
    return records


if __name__ == "__main__":
    main(args)
