"""Twisted sequential Monte Carlo (SMC) for language models.

Zhao, Brekelmans, Makhzani, Grosse 2024, https://arxiv.org/abs/2404.17546

    target, Eq. 1        sigma(s_{1:T}) = p0(s_{1:T}) phi(s_{1:T}) / Z
    twisted, Eq. 9       pi_t = p0(s_{1:t}) psi_t(s_{1:t}) / Z_t for t < T, and pi_T = sigma
    proposal, Eq. 14-15  q = p0 psi_t / Z^pi_t, Z^pi_t = sum_v p0(v | s_{1:t-1}) psi_t(s_{1:t-1}, v)
    weights, Eq. 10      w_t = p0 psi_t / (q psi_{t-1}), and phi takes the place of psi_T
    weights, Eq. 16      w_t = Z^pi_t / psi_{t-1} under that proposal
    estimate, Eq. 8      Z-hat = product of mean_k prod_t w_t^k over blocks, with E Z-hat = Z;
                         a block is the steps from one resampling to the next
    bounds, Eq. 24       E log Z-hat <= log Z <= E log Z-hat with one exact sample retained

    python methods/twisted_smc.py                          the tiny world, six learners, 90 seconds
    python methods/twisted_smc.py toxicity --learner ctl   one row of Table 2 (GPU, downloads)
    python methods/twisted_smc.py --model M --prompt "Once" --potential own.py:short --learner ctl
    python methods/twisted_smc.py sample results/twisted_smc --runs 20     with the twists of a run
    torchrun --standalone --nproc-per-node 4 methods/twisted_smc.py infilling --learner dpg

Presets are tiny, which is the default; toxicity, sentiment, infilling and infilling-2-1 for Tables
2, 3, 4 and 8; toxicity-exact and sentiment-exact for Tables 9 and 10; toxicity-threshold for
Fig. 3; toxicity-story and sentiment-review for the texts of App. H.1.

Three things differ from the paper. There is no resampling after t = 1 under the twist proposal,
where all weights are equal. Losses are means over t where Table 1 has sums, as in the released
code, whose learning rates need it. FUDGE, which needs phi <= 1, learns phi / bound where a bound is
known.

Four things differ from the released code. FUDGE continues each exact prefix s_{1:t} itself, and not
s_{1:t-1}, so that the label of s_t depends on s_t. RL averages its two batches. PPO trains its
critic and has no dropout. Exact samples come from rejection for every bounded potential and beta.
"""

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro

LEARNERS = ("ctl", "rl", "sixo", "fudge", "dpg", "ppo")


@dataclass
class Args:
    # What to sample from: sigma is proportional to p0 phi^beta (Eq. 1; Eq. 19 with phi = exp(r)).
    model: str = "tiny"  # p0: tiny, a local folder or a hub id
    # what p0 continues: text as it stands, without a chat template, unless it is JSON, a list of
    # messages or {"prompt": messages, "tools": []}; or a file of prompts (.txt, one a line, or
    # rows), each of which has a run of its own
    prompt: str = (
        "\n\nHuman: Tell me a story about a fox in a cave."
        "\n\nAssistant: Fine. Once a fox lived in a cave. It"
    )
    T: int = 5  # tokens generated; the end token is a token like others
    # phi is one of: tiny:monster, tiny:polite, tiny:happy, tiny:reward (the tiny world's stories);
    # class:LABEL (the probability of that label, by --classifier), threshold:ETA (is its score
    # below ETA?); infilling, continuation (p0 of the tokens that follow);
    # FILE.py:FUNCTION (yours: function(prompts, responses) -> log phi of each); a reward model's
    # folder or hub id (exp of its score)
    potential: str = "tiny:monster"
    beta: float = 1.0  # phi^beta; the inverse of DPO's beta; 1 for infilling and threshold
    classifier: str = ""  # sequence classification model of the potentials class and threshold
    c: int = 0  # infilling: the number of tokens that follow, on which sigma is conditioned
    continuation: str = ""  # the text that follows, for continuation; infilling only shows its use
    # Who learns: one learner, all six, none (psi = 1), or a policy that is evaluated as q.
    learner: Literal["ctl", "rl", "sixo", "fudge", "dpg", "ppo", "all", "none", "policy"] = "all"
    policy: str = ""  # for --learner policy: a causal LM with the vocabulary of --model
    twist: Literal["linear", "mlp", "body", "body-mlp"] = "mlp"  # head on p0 or on a trained copy
    K: int = 64  # particles of an update; under infilling see --conditions
    # only infilling, where an update has conditions * K particles: CTL draws this many conditions,
    # each with K particles; every other learner draws a new condition for each particle
    conditions: int = 1
    # learn from exact samples (Tables 9, 10); FUDGE and PPO ignore it, and infilling always does
    train_on_exact: bool = False
    lr: float = 0.0  # Adam's rate for every learner; 0: each learner has its own, see --rates
    rates: str = "tiny"  # while --lr is 0: the row of table LR (tiny, toxicity, sentiment, ...)
    max_steps: int = 80  # updates
    # updates from one evaluation and checkpoint to the next; 0: after 0, 2, 4, 8, ... updates (the
    # paper's epochs)
    eval_every: int = 40
    # How it is measured (Section 5).
    proposal: Literal["twist", "base"] = "twist"  # q of the bounds: Eq. 14 or p0
    scheme: Literal["systematic", "multinomial"] = "systematic"  # of resampling; paper: multinomial
    # resample where ESS < tau K; above 1: at every step (the paper), 0: never
    tau: float = 2.0
    exact: int = 200  # how many exact samples, for upper bounds and KL(sigma | q); 0: none
    exact_samples: str = ""  # file that holds them, made if absent; empty: in the run folder
    bound_K: tuple[int, ...] = (8, 32)  # bounds for each of these K; the KLs use the last
    runs: int = 8  # of each bound; under infilling the KLs use so many conditions and no more
    seeds: int = 1  # repetitions with seed, seed + 1, ... (the paper's tables: 5)
    seed: int = 0  # of all random draws
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of p0; twists stay float32
    out: str = ""  # run folder; empty: results/twisted_smc, with the preset's name if there is one
    resume: bool = False  # continue from the newest checkpoints
    overwrite: bool = False  # delete the run that is in the run folder


# Learning rates by the learner's name.  All rows but "tiny" are from the commands in the newest
# README of the released code.  Its first README had 1e-4 for CTL on toxicity, 4096 updates for
# toxicity and sentiment, and 6000 and 16384 for infilling.
LR = {
    "tiny": {"ctl": 3e-3, "rl": 3e-3, "sixo": 3e-3, "fudge": 3e-3, "dpg": 3e-3, "ppo": 1e-3},
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
    potential="class:0",  # toxic: the model's only logit is that of class 1, "not toxic"
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
# Table 3: reviews of one star of five.
SENTIMENT = replace(
    TOXICITY,
    model="gpt2-medium",
    prompt="I bought this",
    T=10,
    potential="class:0",
    classifier="LiYuan/amazon-review-sentiment-analysis",
    twist="mlp",
    rates="sentiment",
)
# Table 4: 15 tokens before 10 that are given.
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
# Table 8: 2 tokens before one that is given.
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
# Fig. 3: a score below a threshold, and bounds for many K.
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
# App. H.1: toxic stories and reviews of one star, to be read; without exact samples.
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
# By the name that is given on the command line.
PRESETS = {
    "tiny": Args(),
    "toxicity": TOXICITY,
    "toxicity-exact": replace(TOXICITY, max_steps=64, train_on_exact=True, rates="toxicity-exact"),
    "toxicity-threshold": TOXICITY_THRESHOLD,
    "toxicity-story": TOXICITY_STORY,
    "sentiment": SENTIMENT,
    # On exact samples; as released, one rate for all learners.
    "sentiment-exact": replace(SENTIMENT, max_steps=512, train_on_exact=True, lr=1e-4),
    "sentiment-review": SENTIMENT_REVIEW,
    "infilling": INFILLING,
    "infilling-2-1": INFILLING_2_1,
}

# --help ends its text with this.
EXAMPLE = """
Your own potential is a function in a file, log phi; short.log_bound = 0, where it has a bound,
allows for exact samples:

    # own.py: the shorter a response, the better
    def short(prompts, responses):
        values = []
        for prompt, response in zip(prompts, responses):
            values.append(-len(response))
        return values
"""


def args_of_run(folder):
    """The options of an earlier run of this file, by its config.json.  SystemExit: no such run."""
    path = Path(folder, "config.json")
    try:
        saved = dict(json.loads(path.read_bytes()))
        known = {field.name for field in fields(Args)}
        options = {name: value for name, value in saved.items() if name in known}
        options["bound_K"] = tuple(options["bound_K"])
        right = saved["method"] == "twisted_smc"
    except (OSError, ValueError, KeyError, TypeError):
        right = False
    if not right:
        problem = f"sample {folder}: no run of this file; name the folder of a trained twist"
        raise SystemExit(f"{problem}, as in: sample results/twisted_smc")
    return replace(Args(), **options | {"resume": False, "overwrite": False})


earlier = ""  # the run whose twists are sampled, if they are
if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset == "sample":
        given = sys.argv[1:2]
        if not given or given[0].startswith("-"):
            raise SystemExit("sample: name the folder of a run, as in: sample results/twisted_smc")
        earlier = sys.argv.pop(1).rstrip("/")
        default = replace(args_of_run(earlier), out=f"{earlier}-samples")
    elif preset in PRESETS:
        folder = "results/twisted_smc"
        if preset != "tiny":
            folder = f"{folder}-{preset}"
        default = replace(PRESETS[preset], out=folder)
    else:
        known = f"sample FOLDER, or a preset: {', '.join(PRESETS)}"
        raise SystemExit(f"no preset {preset!r}: choose {known}")
    args = tyro.cli(Args, default=default, description=__doc__ + EXAMPLE)

import copy
import io
import math
import signal
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: here or one up
# isort: off
from common import prefill, decode_step, reorder, stay_in_place  # sampling
from common import inputs_of_head, rows_in_cache, sample_tokens  # sampling
from common import encode_prompt, head_logits, show_example  # tokenization, logits
from common import load_prompts, prompt_row, show_samples, words  # data
from common import load_model, load_tokenizer, load_score, model_folder  # models, and what rates
from common import are_tiny_prompts, tiny_attributes, tiny_reward  # the tiny world
from common import Unusable, number  # what others wrote
from common import check_ranges, checksum, load_checkpoint, log, require  # processes
from common import say, save_checkpoint  # processes
from common import memory, progress, require_free, require_writable  # processes
from common import save_figure, setup, signals, start_run  # processes
from common import stop_requested, write, write_shared  # processes
from common import on_rank0  # calls a function once; where it fails, all processes end with a line
from common import say_claim, verdict  # how a run ends

# isort: on

# ---- Sections 2, 3 and 5: SMC and its bounds


@dataclass
class Step:
    """One token for each of n particles, and its log-probs and twists; all (n,), in nats."""

    tokens: torch.Tensor  # s_t
    log_p: torch.Tensor  # log p0(s_t | s_{1:t-1})
    log_q: torch.Tensor  # log q(s_t | s_{1:t-1})
    log_psi: torch.Tensor  # log psi_t(s_{1:t})
    log_Z_pi: torch.Tensor  # log Z^pi_t(s_{1:t-1}), Eq. 15


@dataclass
class Particles:
    """What smc returns: the whole sequences of N runs' K particles at T.

    What a particle took over from its ancestors in resampling is part of its sequence.
    """

    # Of every token, (N, K, T): what Step has of it.
    tokens: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor
    log_psi: torch.Tensor
    log_Z_pi: torch.Tensor
    lineage: torch.Tensor  # (N, K, T), the slot in which sequence k's ancestor stood at t

    # Of every sequence or run.
    log_phi: torch.Tensor | None = None  # (N, K)
    log_w: torch.Tensor | None = None  # (N, K), since the last resampling
    log_Z: torch.Tensor | None = None  # (N,), log Z-hat
    ess: torch.Tensor | None = None  # (N, T), before resampling

    # What sample() adds.
    o: torch.Tensor | None = None  # (N, c), conditions
    states: torch.Tensor | None = None  # (N, K, T, d), hidden states of p0 before each token
    z: torch.Tensor | None = None  # (N, K, T, d), hidden states that the twist's head reads


def ess(log_w):
    """Effective sample size 1 / sum_k w_k^2 of log-weights (..., K): 1 to K; 0 if all are -inf."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def reweigh(log_w, increment):
    """log_w + increment, but a weight of zero stays zero.

    Where psi_{t-1} was 0 the increment divides by it, and may be inf or nan.
    """
    return torch.where(log_w == -torch.inf, log_w, log_w + increment)


def retained_shift(w, cdf, slot, u):
    """Draw the shift of systematic resampling, given that the retained particle is a parent.

    w, cdf (N, K): weights and their sums.  slot (N, 1): the retained particle.  u (N, 1): uniforms.
    -> shift (N, 1), and home (N, 1), the offspring that goes on from that particle.

    Without that condition the grid has the points (i + shift) / K for i = 0, ..., K - 1, and shift
    is uniform in (0, 1].  One of these points, chosen at random, is then uniform in (0, 1] itself.
    The retained offspring is such a random choice.  The condition says that its point lies on the
    retained particle's stretch of the cdf, so the point is uniform on that stretch.  Once it is
    drawn, it fixes the rest of the grid.
    """
    K = w.shape[1]
    # The point of the retained offspring: uniform on the retained particle's stretch of the cdf.
    point = cdf.gather(1, slot) - w.gather(1, slot) * u
    # It is (home + shift) / K with a shift in (0, 1].
    home = (K * point).ceil().long().clamp(1, K) - 1
    return K * point - home, home


def resample(log_w, u, scheme="systematic", slot=None):
    """Draw ancestors for N runs: particle k has K w_k offspring on average.

    log_w (N, K): log-weights.  u (N, K + 1): uniforms, K to draw with and one for the retained
    particle.  slot (N, 1): where the retained particle stands.
    -> parents (N, K), home (N, 1).  Exactly one offspring of the retained particle is retained
    again; home is that offspring's place among the K.  The law of the other K - 1 is the scheme's,
    given that, as Prop. 5.1 needs.  Without a retained particle slot and home are None.
    """
    K = log_w.shape[1]
    w = log_w.softmax(-1)
    cdf = w.cumsum(-1)
    u_right = 1 - u  # in (0, 1]: never hits a particle without weight

    # K points in (0, 1]; each one draws the particle on whose stretch of the cdf it lies.
    if scheme == "systematic":
        shift = u_right[:, :1]
        home = None
        if slot is not None:
            shift, home = retained_shift(w, cdf, slot, u[:, K:])
        points = (torch.arange(K, device=w.device) + shift) / K
    elif scheme == "multinomial":
        # The K draws are independent and alike, so it does not matter which of them the retained
        # offspring replaces: it stays where its parent stood.
        points = u_right[:, :K]
        home = slot
    else:
        raise ValueError(f"unknown resampling scheme {scheme!r}")

    # Rounding leaves the last sum a little off 1; scaled by it no point lies beyond.
    parents = torch.searchsorted(cdf, points * cdf[:, -1:]).clamp(max=K - 1)
    if slot is not None:
        parents = parents.scatter(1, home, slot)
    return parents, home


def follow(slot, home, parents, sources):
    """Where the retained offspring stands after stay_in_place has permuted the offspring.

    slot (N, 1): the retained particle.  home (N, 1): its retained offspring's place in `parents`
    (N, K).  sources (N, K): the same parents, permuted.  -> (N, 1)
    The offspring of one particle are copies, and `home` is the r-th of them.  After the permutation
    it is again the r-th.  To take the first each time would be wrong: the systematic scheme reads
    the particles in the order of their slots, so its draws would not be those that Prop. 5.1 needs.
    """
    # r = 1, 2, ... of home among the offspring of the retained particle.
    r = (parents == slot).cumsum(-1).gather(1, home)
    # The slot at which the permuted offspring, counted from the left, are r in number.
    is_offspring = sources == slot
    is_rth = is_offspring & (is_offspring.cumsum(-1) == r)
    return is_rth.int().argmax(-1, keepdim=True)


def log_sum_exp(x, tokens):
    """(n, V) -> (n,), the value at any token that is not -inf less its log-prob; tokens (n,)."""
    return pick(x, tokens) - pick(x.log_softmax(-1), tokens)  # faster than logsumexp


def pick(x, tokens):
    """x[i, tokens[i]] in float64.  (n, V), (n,) -> (n,)"""
    return x.gather(1, tokens[:, None])[:, 0].double()


def propose(logits, log_psi, proposal, uniforms, forced=None):
    """Draw s_t of n particles -> Step.

    logits (n, V): log p0(. | s_{1:t-1}), not normalised.  log_psi (n, V), or None for psi = 1.
    uniforms (n,): a particle's draw depends on its own alone.
    forced (n,): tokens of retained particles, -1 for the others; None: all are free.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Unnormalised logarithms of p0 psi_t and of q, (n, V); those of p0 are the logits.
    p_psi_logits = logits
    if log_psi is not None:
        p_psi_logits = logits + log_psi
    q_logits = logits  # q = p0
    if proposal == "twist":
        q_logits = p_psi_logits  # Eq. 14

    # Draw.  A token's logit less its log-prob is the log-normaliser of q: no sum over V is needed.
    tokens, log_q_of_drawn = sample_tokens(q_logits, uniforms)
    log_sum_q = pick(q_logits, tokens) - log_q_of_drawn

    # The log-normalisers of p0 and of p0 psi_t.  That of q is one of the two, or both.
    if log_psi is None:
        log_sum_p = log_sum_q
        log_sum_p_psi = log_sum_q
    elif proposal == "twist":
        log_sum_p = log_sum_exp(logits, tokens)
        log_sum_p_psi = log_sum_q
    else:
        log_sum_p = log_sum_q
        log_sum_p_psi = p_psi_logits.logsumexp(-1).double()

    # Retained particles take their own token, which has its own probability.
    if forced is not None:
        tokens = torch.where(forced < 0, tokens, forced)
    log_psi_of_token = torch.zeros_like(log_sum_p)
    if log_psi is not None:
        log_psi_of_token = pick(log_psi, tokens)
    return Step(
        tokens=tokens,
        log_p=pick(logits, tokens) - log_sum_p,
        log_q=pick(q_logits, tokens) - log_sum_q,
        log_psi=log_psi_of_token,
        log_Z_pi=log_sum_p_psi - log_sum_p,  # Eq. 15
    )


def propose_in_blocks(logits, log_psi, proposal, forced=None):
    """propose, a few particles at a time: their (V,) values stay in the processor's cache."""
    uniforms = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
    n = rows_in_cache(logits)
    steps = []
    for start in range(0, len(logits), n):
        rows = slice(start, start + n)
        psi_rows = None if log_psi is None else log_psi[rows]
        forced_rows = None if forced is None else forced[rows]
        steps.append(propose(logits[rows], psi_rows, proposal, uniforms[rows], forced_rows))

    # One Step of all of them.
    tokens = torch.cat([step.tokens for step in steps])
    log_p = torch.cat([step.log_p for step in steps])
    log_q = torch.cat([step.log_q for step in steps])
    log_psi_of_token = torch.cat([step.log_psi for step in steps])
    log_Z_pi = torch.cat([step.log_Z_pi for step in steps])
    return Step(tokens, log_p, log_q, log_psi_of_token, log_Z_pi)


def draw_ancestors(log_w, low, scheme, slot):
    """Resample some of the N runs -> ancestors (N K,), sources (N, K), slot.

    log_w (N, K): log-weights.  low (N,): true for the runs to resample, whose ESS is low.
    slot (N, 1) or None: where the retained particle stands, before and after.
    sources[n, k]: the slot of run n from which slot k goes on.  ancestors: the same with all N K
    slots in one row, as a KV cache has them.
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
    own = torch.arange(K, device=log_w.device).repeat(N, 1)  # own[n, k] = k
    parents = torch.where(low[:, None], parents, own)
    if slot is not None:
        home = torch.where(low[:, None], home, slot)

    # Survivors keep their slots, so that only the slots of dead particles are overwritten.
    first_row = K * torch.arange(N, device=log_w.device)[:, None]  # of each run, among all N K
    ancestors = stay_in_place((first_row + parents).view(-1))
    sources = ancestors.view(N, K) - first_row
    if slot is not None:
        slot = follow(slot, home, parents, sources)
    return ancestors, sources, slot


def log_mean(log_w):
    """log of the mean weight of each run.  (N, K) -> (N,)"""
    return log_w.logsumexp(-1) - math.log(log_w.shape[1])


def along_ancestry(steps, sources_of, own):
    """Whole sequences from what was drawn slot by slot -> Particles.

    steps: the T Steps.  sources_of: for every t < T `sources` (N, K), the slots at t from which the
    slots at t + 1 went on.  own (N, K): own[n, k] = k, the slots at T.
    A sequence may have stood in another slot at each t.  lineage[n, k, t] is the slot at t of the
    sequence that ends in slot k.
    """
    # Backwards from T: a sequence's slot at t is the source of its slot at t + 1.
    slots = [own]
    for sources in reversed(sources_of):
        slots.append(sources.gather(1, slots[-1]))
    slots.reverse()
    lineage = torch.stack(slots, -1)

    # What was drawn in each slot, (N, K, T); then the same for each sequence.
    shape = lineage.shape
    tokens = torch.stack([step.tokens for step in steps], -1).view(shape)
    log_p = torch.stack([step.log_p for step in steps], -1).view(shape)
    log_q = torch.stack([step.log_q for step in steps], -1).view(shape)
    log_psi = torch.stack([step.log_psi for step in steps], -1).view(shape)
    log_Z_pi = torch.stack([step.log_Z_pi for step in steps], -1).view(shape)
    return Particles(
        tokens=tokens.gather(1, lineage),
        log_p=log_p.gather(1, lineage),
        log_q=log_q.gather(1, lineage),
        log_psi=log_psi.gather(1, lineage),
        log_Z_pi=log_Z_pi.gather(1, lineage),
        lineage=lineage,
    )


def smc(
    scores, log_phi, T, K, N=1, *, proposal="twist", scheme="systematic", tau=2.0, retained=None
):
    """Alg. 1, and Alg. 2 if a particle is retained: N runs of twisted SMC -> Particles.

    scores(last, ancestors) -> logits, log_psi: (N K, V) each, log p0(. | s_{1:t-1}), unnormalised,
      and log psi_t(s_{1:t-1}, .), None for psi = 1.  It first reorders its state by `ancestors`
      (N K,), then appends the tokens `last` (N K,).  Both are None in the first call;
      `ancestors` is also None after a step without resampling.
    log_phi(tokens (N, K, T)) -> (N, K): the terminal potential; -inf is allowed.
    proposal: "twist" (Eq. 14) or "base", which is q = p0.
    tau: a run resamples where ESS < tau K, so never for 0 (SIS) and at every step above 1.
    retained (N, R, T): the tokens that the first R particles of each run must take; where it is -1
      the token is drawn.  With resampling R must be 1, and that particle survives.
    Weights are float64, and in log space throughout.
    """
    if proposal not in ("twist", "base"):
        raise ValueError(f"unknown proposal {proposal!r}")
    logits, log_psi = scores(None, None)
    own = torch.arange(K, device=logits.device).repeat(N, 1)  # own[n, k] = k
    log_w = torch.zeros(N, K, dtype=torch.float64, device=logits.device)  # of the present block
    log_Z = log_w.new_zeros(N)
    log_psi_before = torch.zeros_like(log_w)  # psi_0 = 1
    slot = None  # (N, R), where the retained particles stand
    if retained is not None:
        slot = own[:, : retained.shape[1]]
    steps = []  # a Step for each t
    sources_of = []  # for each t < T, the slots that the next step goes on from
    ess_at = []

    for t in range(T):
        # Propose: extend every particle by one token, drawn from q (Eq. 14) unless it is retained.
        forced = None
        if retained is not None:
            forced = torch.full_like(own, -1).scatter(1, slot, retained[:, :, t]).view(-1)
        step = propose_in_blocks(logits, log_psi, proposal, forced)
        steps.append(step)
        log_psi_now = step.log_psi.view(N, K)

        # Weigh: under the twist proposal w_t does not depend on the token that was drawn.
        if proposal == "twist":
            increment = step.log_Z_pi.view(N, K) - log_psi_before  # Eq. 16
        else:
            increment = log_psi_now - log_psi_before  # Eq. 10 with q = p0
        log_w = reweigh(log_w, increment)
        ess_at.append(ess(log_w))
        if t == T - 1:
            break

        # Resample the runs whose effective sample size is low; there a block ends, its mean weight
        # becomes a factor of Z-hat (Eq. 8), and weights start again.  Not after t = 1 under the
        # twist proposal, where w_1 = Z^pi_1 is one number for all particles.
        last = step.tokens
        ancestors = None
        sources = own
        # A run whose particles are all dead (ESS 0) is left alone.
        low = (ess_at[-1] < tau * K) & (ess_at[-1] > 0)
        if low.any() and (t > 0 or proposal == "base"):
            ancestors, sources, slot = draw_ancestors(log_w, low, scheme, slot)
            log_Z = log_Z + torch.where(low, log_mean(log_w), 0.0)
            log_w = torch.where(low[:, None], 0.0, log_w)
            log_psi_now = log_psi_now.gather(1, sources)  # of the parents, as the last tokens are
            last = last[ancestors]
        sources_of.append(sources)
        log_psi_before = log_psi_now
        logits, log_psi = scores(last, ancestors)

    # The loop weighed step T with psi_T, like every other step.  Here the true potential takes its
    # place (Eq. 10), and the last block ends (Eq. 8).
    particles = along_ancestry(steps, sources_of, own)
    particles.log_phi = log_phi(particles.tokens).double()
    particles.log_w = reweigh(log_w, particles.log_phi - log_psi_now)
    particles.log_Z = log_Z + log_mean(particles.log_w)
    ess_at[-1] = ess(particles.log_w)
    particles.ess = torch.stack(ess_at, -1)
    return particles


def log_Z_bounds(run_smc, K, R, exact_tokens=None):
    """Stochastic bounds on log Z (Prop. 5.1, Eq. 24) of R runs with K particles each.

    run_smc(K, N, tau=..., retained=...): a function that returns smc's N runs of K particles, on a
    target and with a twist of the caller's; without tau it resamples as the caller does.
    exact_tokens (R, T): an exact sample of sigma for each run; any others would void the upper
    bounds.  If it is None there are lower bounds only.
    -> {name: (R,)}, and the Particles of the lower bounds, without and with resampling.
    smc_*: as `run_smc` resamples.  sis_*: never, which is IWAE; for K = 1 these are F_q = E_q log w
    and G_q = E_sigma log w.
    """
    sis = run_smc(K, R, tau=0.0)
    twisted = run_smc(K, R)
    bounds = {"sis_lower": sis.log_Z, "smc_lower": twisted.log_Z}
    if exact_tokens is not None:
        retained = exact_tokens[:, None]  # (R, 1, T), one particle of each run
        bounds["sis_upper"] = run_smc(K, R, tau=0.0, retained=retained).log_Z
        bounds["smc_upper"] = run_smc(K, R, retained=retained).log_Z
    return bounds, sis, twisted


# ---- Section 4, Table 1: the learners' losses

# Each takes log psi_t(s_{1:t}) or log q(s_t | s_{1:t-1}) of K particles, (..., K, T), and gives a
# loss (...), its mean over t.


def ctl_loss(log_psi, W, log_psi_neg, w_neg):
    """Contrastive twist learning, Eq. 21-22: KL(sigma(s_{1:t}) | pi_t), mean over t.

    log_psi: of positives, which stand for sigma by their weights W (..., K).  W is proportional to
    p0 phi / q of the whole sequence, and serves its prefixes of every length t.
    log_psi_neg: of negatives, which stand for pi_t by their weights w_neg (..., K, T), proportional
    to p0 psi_t / q of the prefix s_{1:t}.
    Both weights sum to 1 over K.  The value is a surrogate; its gradient is that of the KL.
    Each psi_t is learned up to a constant.
    """
    positive = (W[..., None].detach() * log_psi).sum(-2)  # E_sigma log psi_t
    negative = (w_neg.detach() * log_psi_neg).sum(-2)  # E_pi_t log psi_t
    return -(positive - negative).mean(-1)


def rl_loss(log_psi, targets):
    """Soft-Q, App. C.1.1: squared error of log psi_t and its target, mean over particles too.

    targets (..., K, T): for t < T log sum_v p0(v | s_{1:t}) psi_{t+1}(s_{1:t}, v), for T log phi.
    """
    return (targets.detach() - log_psi).square().mean((-2, -1))


def sixo_loss(log_psi, W, log_psi_neg):
    """Noise contrastive estimation, App. C.3: psi_t tells sigma's prefixes from p0's.

    log_psi: of positives, which stand for sigma by their weights W (..., K), as in ctl_loss.
    log_psi_neg: of draws of p0, which count alike.
    """
    positive = (W[..., None].detach() * F.logsigmoid(log_psi)).sum(-2)
    negative = F.logsigmoid(-log_psi_neg).mean(-2)
    return -(positive + negative).mean(-1)


def fudge_loss(logits, phi):
    """App. C.4: cross-entropy of psi_t(s_{1:t}) and a label phi, mean over particles too.

    logits: psi_t = sigmoid(logits).  phi (..., K, T or 1): the potential, in [0, 1], of a
    continuation of s_{1:t} by p0.
    """
    cross_entropy = -phi * F.logsigmoid(logits) - (1 - phi) * F.logsigmoid(-logits)
    return cross_entropy.mean((-2, -1))


def dpg_loss(log_q, W):
    """App. E.3: KL(sigma | q) up to a constant, from samples weighted W (..., K), as in ctl_loss.

    Any factor c(s_{1:t-1}) of psi_t leaves q as it is.  So the learned psi_t defines a proposal but
    no target pi_t (Prop. E.2).
    """
    return -(W[..., None].detach() * log_q).sum(-2).mean(-1)


def generalised_advantages(rewards, values, decay=0.95):
    """PPO's generalised advantage estimates (GAE), without discount.

    rewards, values (..., T): r_t, and the critic's V_t before the token s_t; V_{T+1} = 0.
    A_t = (r_t + V_{t+1} - V_t) + decay A_{t+1}.
    -> advantages A, returns A + V, and A with mean 0 and variance 1, (..., T) each.
    """
    next_values = F.pad(values[..., 1:], (0, 1))
    advantages = rewards + next_values - values
    for t in reversed(range(rewards.shape[-1] - 1)):
        advantages[..., t] += decay * advantages[..., t + 1]
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    return advantages, advantages + values, whitened


def ppo_loss(log_q, old_log_q, advantages, values, old_values, returns, clip=0.2, value_weight=0.1):
    """App. E.2: clipped policy and value losses, mean over particles too.

    The reward of a token is (log p0 - log q) / beta; that of the last one also has log phi / beta.
    log phi contains beta already, since phi is the paper's exp(beta r); so log phi / beta is r.
    The rewards add up to (log Z - KL(q | sigma)) / beta on average, which is to be maximised.
    """
    # Policy: the pessimistic one of two objectives.
    ratio = (log_q - old_log_q).exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)

    # Critic: the worse of two squared errors.
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    error = (values - returns).square()
    clipped_error = (clipped_values - returns).square()
    value_loss = 0.5 * torch.maximum(error, clipped_error)
    return (policy_loss + value_weight * value_loss).mean((-2, -1))


# ---- The twist


class Twist(nn.Module):
    """App. G.2: log psi_t(s_{1:t-1}, .) of every next token from s_{t-1}'s hidden state z (..., d).

    layers: 1 (linear) or 3 (MLP).
    condition: the head reads z and beside it e (..., d), the hidden state of o's last token.
    body: a trainable transformer that gives z; without one the frozen p0 does, which runs anyway.
    log_sigmoid: psi is in (0, 1), as FUDGE has it.
    Weights are Xavier normal and biases 0: at first psi is near 1 (FUDGE's near 1/2), q near p0.
    """

    def __init__(self, d, V, layers=1, condition=False, body=None, log_sigmoid=False):
        super().__init__()
        self.body = body
        self.condition = condition
        self.log_sigmoid = log_sigmoid
        width = 2 * d if condition else d
        # All layers are square but the last, which has an output for every token.
        self.layers = nn.ModuleList()
        for _ in range(layers - 1):
            self.layers.append(nn.Linear(width, width))
        self.layers.append(nn.Linear(width, V))
        self.critic = nn.Linear(width, 1)  # PPO's value of s_{1:t-1}
        for layer in [*self.layers, self.critic]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def join(self, z, e):
        """z (..., d), or z and e side by side (..., 2 d), in the dtype of the head's weights."""
        if e is not None:
            z = torch.cat([z, e.expand(*z.shape[:-1], -1)], -1)
        return z.to(self.critic.weight.dtype)

    def features(self, z, e):
        """What the last layer reads, (..., width)."""
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
    """A language model q in the twist's place: psi_t = q / p0, both of s_t given s_{1:t-1}."""

    body: nn.Module  # a causal LM with p0's vocabulary


def make_twist(args, learner, world, model):
    """The twist that a learner trains.  None for "none" (psi = 1).  A Policy for "policy"."""
    if learner == "none":
        return None
    if learner == "policy":
        problem = (
            f"--policy {args.policy!r}: name a model with the vocabulary of --model {args.model}"
        )
        require(args.policy, problem)
        vocabulary_of_p0 = load_tokenizer(args.model).get_vocab()
        require(load_tokenizer(args.policy).get_vocab() == vocabulary_of_p0, problem)
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
    twist = Twist(
        world.d,
        world.V,
        layers,
        condition=world.conditional,
        body=body,
        log_sigmoid=learner == "fudge",
    )
    twist.critic.requires_grad_(learner == "ppo")
    return twist.to(model.device)


# ---- Potentials of decoded texts

# Each has log_phi(tokens (M, T), texts) -> (M,), which contains beta, and log_bound, a number that
# log phi never exceeds, or None if no such number is known.


class TinyPotential:
    """phi^beta of a story of the tiny world.

    tiny:polite, tiny:happy, tiny:monster: phi is 0.98 for a story with that attribute, else 0.02.
    tiny:reward: phi = exp(r).
    """

    def __init__(self, what, beta):
        self.what = what
        self.beta = beta
        largest = math.log(0.98)  # of log phi, without beta
        if what == "reward":
            largest = 3.0  # tiny_reward is at most 3
        self.log_bound = beta * largest

    def log_phi(self, prompts, responses, texts):
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


class ScorePotential:
    """phi^beta = exp(beta score), of your own function or of a reward model.

    Your function may have an attribute log_bound, a number that it never exceeds; rejection, and so
    exact samples, need it.
    """

    def __init__(self, name, beta):
        self.score = load_score(name, "potential", zero=True)
        self.tools = None  # that the prompt's chat may call, see set_prompt
        self.beta = beta
        self.log_bound = None
        function = getattr(self.score, "function", None)  # a reward model has none
        bound = getattr(function, "log_bound", None)
        if bound is not None:
            try:
                self.log_bound = beta * number(bound)
            except Unusable as reason:
                raise SystemExit(f"potential {name}: its log_bound {reason}") from None

    def log_phi(self, prompts, responses, texts):
        tools = [self.tools] * len(prompts)
        scores = self.score(prompts, responses, tools)
        return self.beta * torch.tensor(scores, dtype=torch.float64)


FLOOR = 1e-16  # phi of the texts that miss a threshold, as in the released code


def load_classifier(name):
    """A sequence classification model -> model, tokenizer, weights that are not in its files.

    Such weights are random.  SystemExit: a folder that holds no such model, or a damaged one.
    """
    from transformers import AutoModelForSequenceClassification

    folder = model_folder(name)
    try:
        tokenizer = load_tokenizer(name)
        load = AutoModelForSequenceClassification.from_pretrained
        judge, info = load(folder, output_loading_info=True)
    except Exception as error:  # damaged files: many types
        said = str(error).strip().partition("\n")[0]
        why = f"{type(error).__name__}: {said[:60]}"
        raise SystemExit(f"--classifier {folder}: cannot be loaded ({why}); restore it") from None
    return judge, tokenizer, info["missing_keys"]


class ClassifierPotential:
    """What a sequence classification model says of a text.

    score: the log odds of class 1.  A model with one logit has score = logit, p(1) =
    sigmoid(score) and p(0) = sigmoid(-score); one with two has score = logit 1 - logit 0.

    class:LABEL    phi^beta = p(label | text)^beta
    threshold:ETA  phi = 1[score < eta] + FLOOR; beta is 1

    kind, what: what is before and after the colon.
    """

    def __init__(self, kind, what, classifier, beta, device):
        self.kind = kind
        self.beta = beta
        self.device = device
        judge, self.tokenizer, untrained = load_classifier(classifier)
        self.judge = judge.to(device).requires_grad_(False)
        judge.config.pad_token_id = self.tokenizer.pad_token_id
        self.context = min(512, self.tokenizer.model_max_length)
        self.cut = False  # has a text been longer?

        # Does the model have the logits that the potential needs?  And how large can log phi be?
        n = judge.config.num_labels  # as many logits; 1 logit makes two classes
        if kind == "class":
            self.label = int(what)
            fits = 0 <= self.label < max(2, n)
            self.log_bound = 0.0
        elif kind == "threshold":
            self.eta = float(what)
            fits = n in (1, 2)
            self.log_bound = math.log1p(FLOOR)
        else:
            raise ValueError(f"unknown potential of a classifier {kind!r}")
        problem = (
            f"potential {kind}:{what}: {classifier} has {n} labels; class needs one of them, "
            "threshold 1 or 2, and all must be trained"
        )
        require(fits and not untrained, problem)

    def logits(self, texts):
        """(M, labels), in batches of 256 texts; a line at the first text that is cut."""
        parts = []
        for start in range(0, len(texts), 256):
            batch = self.tokenizer(
                texts[start : start + 256],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.context,
            )
            full = int((batch["attention_mask"].sum(1) == self.context).sum())
            if full and not self.cut:
                self.cut = True
                say(f"the classifier reads {self.context} tokens: the end of {full} texts is cut")
            parts.append(self.judge(**batch.to(self.device)).logits.double())
        return torch.cat(parts)

    def log_phi(self, prompts, responses, texts):
        # The score is the log odds of class 1.
        logits = self.logits(texts)
        single = logits.shape[1] == 1
        score = logits[:, 0] if single else logits[:, 1] - logits[:, 0]
        if self.kind == "threshold":
            return ((score < self.eta) + FLOOR).log()

        # The probability of a class: by sigmoid if there is one logit, else by softmax.
        if not single:
            return self.beta * logits.log_softmax(-1)[:, self.label]
        if self.label == 1:
            return self.beta * F.logsigmoid(score)
        return self.beta * F.logsigmoid(-score)


def text_potential(args, device):
    """The potential of --potential; None for infilling and continuation, which p0 itself gives."""
    kind, _, what = args.potential.rpartition(":")
    if args.potential in ("infilling", "continuation"):
        return None
    if kind == "tiny":
        return TinyPotential(what, args.beta)
    if kind in ("class", "threshold"):
        return ClassifierPotential(kind, what, args.classifier, args.beta, device)
    return ScorePotential(args.potential, args.beta)


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
    log_bound: a number that log phi never exceeds, or None if none is known.
    log_floor: a sequence is a hit, which tells of sigma, only if its log phi is above this.
    """

    def __init__(self, model, tokenizer, args):
        self.model = model
        self.tokenizer = tokenizer
        self.name = args.potential  # for messages
        self.beta = args.beta
        self.V = min(len(tokenizer), len(model.get_output_embeddings().weight))  # no padded rows
        self.d = model.get_output_embeddings().weight.shape[1]
        self.T = args.T

        # The potential: of decoded texts, or the probability under p0 of what follows.
        self.text_potential = text_potential(args, model.device)
        self.conditional = args.potential == "infilling"
        self.log_bound = 0.0  # log of a probability
        if self.text_potential is not None:
            self.log_bound = self.text_potential.log_bound
        self.log_floor = -math.inf  # hits are all sequences with phi above 0
        if args.potential.startswith("threshold:"):
            self.log_floor = math.log(2 * FLOOR)  # phi of a miss is FLOOR, that of a hit 1

        # The tokens that follow s_{1:T}: those of --continuation, or c that are drawn (infilling,
        # where a --continuation is only shown).
        self.continuation = []
        if args.continuation:
            self.continuation = tokenizer(args.continuation, add_special_tokens=False).input_ids
        self.c = args.c
        if self.continuation and not self.conditional:
            self.c = len(self.continuation)
        self.set_prompt(args)

    def set_prompt(self, args):
        """Go on from --prompt.  Exit with one line if it is empty or leaves no room."""
        asked = prompt_row(args.prompt)
        tools = asked.get("tools")
        self.prompt_as_given = asked["prompt"]  # text, or chat messages
        self.prompt = encode_prompt(self.prompt_as_given, self.tokenizer, tools)  # ids
        if isinstance(self.text_potential, ScorePotential):
            self.text_potential.tools = tools
        self.check_lengths(args)

    def check_lengths(self, args):
        """Exit with one line if prompt, sequence and continuation do not fit together."""
        # A condition to show under infilling is as long as those that are drawn.
        n = len(self.continuation)
        wrong = f"--continuation {args.continuation[:40]!r} has {n} tokens, but --c is {args.c}"
        require(not self.conditional or n in (0, self.c), wrong)
        empty = args.potential == "continuation" and n == 0
        require(not empty, f"--continuation {args.continuation[:40]!r} has no tokens; give a text")

        # What the model's context leaves for the prompt.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", math.inf)
        room = context - self.T - self.c
        problem = (
            f"--prompt: has {len(self.prompt)} tokens; with {self.T + self.c} to follow in a "
            f"context of {context} it must have 1 to {room}"
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
        return head_logits(self.model, hidden)[..., : self.V].float()

    def after_prompt(self, tokens):
        """Tokens (N, K, t) -> (N K, P + t), each row with the prompt before it."""
        tokens = tokens.flatten(0, 1)
        prompt = torch.tensor(self.prompt, device=tokens.device)
        return torch.cat([prompt.expand(len(tokens), -1), tokens], -1)

    def hidden(self, body, tokens):
        """Hidden states of a body before each token, teacher-forced.  (N, K, T) -> (N, K, T, d)"""
        # The state before a token is that at the token before it, so the last token is not read.
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
        if self.text_potential is not None:
            values = self.log_phi_of_texts(self.after_prompt(tokens))
        else:
            # p0 of what follows: the condition of each run, or the one continuation.
            if not self.conditional:
                o = torch.tensor([self.continuation], device=tokens.device).expand(len(tokens), -1)
            follows = o[:, None].expand(-1, tokens.shape[1], -1)
            values = self.beta * self.log_p_of_last(torch.cat([tokens, follows], -1))
        return values.view(tokens.shape[:2])

    def log_phi_of_texts(self, ids):
        """log phi (M,) of the texts of (M, P + T) ids; -inf is allowed."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [self.prompt_as_given] * len(texts)
        responses = self.responses(ids)
        answer = self.text_potential.log_phi(prompts, responses, texts)
        return torch.as_tensor(answer, dtype=torch.float64, device=ids.device)

    def responses(self, ids):
        """What follows the prompt in (M, P + T) ids, as text; its first space is kept."""
        start = self.tokenizer.decode(self.prompt, skip_special_tokens=True)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.removeprefix(start) for text in texts]

    @torch.no_grad()
    def log_p_of_last(self, tokens):
        """log p0 (N K,) of the last c of the tokens (N, K, T + c), given those before them."""
        sums = []
        for ids in self.after_prompt(tokens).split(256):
            # The logits for a token are those one position before it; those after all are not used.
            with inputs_of_head(self.model):  # in the order of memory, which is faster
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
def sample_p0(world, N, T):
    """N draws of T tokens from p0 alone, (N, T).  phi is not used, so any T will do."""
    scores = Scores(world, None, N, 1, None)
    particles = smc(scores, no_potential, T, 1, N, proposal="base", tau=0.0)
    return particles.tokens[:, 0]


@torch.no_grad()
def sample(world, twist, K, N=1, o=None, **options):
    """smc on a world -> Particles: N runs, or one for each row of o (N, c).

    twist: a Twist, a Policy, or None for psi = 1.  options: those of smc.  The hidden states of p0
    (states) and of the twist's body (z) are kept: a head trains on them without another pass.
    """
    log_phi = partial(world.log_phi, o=o)
    if o is not None:
        N = len(o)
    scores = Scores(world, twist, N, K, o)
    particles = smc(scores, log_phi, world.T, K, N, **options)
    particles.o = o
    particles.states = states_along(scores.states, particles.lineage)
    particles.z = particles.states
    if scores.body is not None:
        particles.z = states_along(scores.z, particles.lineage)
    return particles


def head_inputs(world, twist, particles):
    """What the twist's head reads, with gradient into its body if it has one.

    -> z (N, K, T, d), and e (N, 1, 1, d) of the conditions, or None.
    """
    z = particles.z
    if twist.body is not None:
        z = world.hidden(twist.body, particles.tokens)
    e = world.embed(twist, particles.o)
    if e is not None:
        e = e[:, None, None]
    return z, e


def log_psi_of_particles(world, twist, particles):
    """log psi_t(s_{1:t}) of particles, (N, K, T), with gradient."""
    z, e = head_inputs(world, twist, particles)
    return twist.log_psi_of(particles.tokens, z, e)


def log_q_in_full(world, twist, particles):
    """log q(s_t | s_{1:t-1}) of particles, (N, K, T), with gradient; makes (N, K, T, V) tensors."""
    z, e = head_inputs(world, twist, particles)
    q_logits = world.head(particles.states) + twist(z, e)  # Eq. 14
    return q_logits.log_softmax(-1).gather(-1, particles.tokens[..., None])[..., 0]


def log_q_of_particles(world, twist, particles):
    """As log_q_in_full, but its (N, K, T, V) tensors are not kept; backward() makes them anew."""
    return checkpoint(log_q_in_full, world, twist, particles, use_reentrant=False)


# ---- One update of a learner: draw a batch without gradient, then its loss


@dataclass
class Batch:
    """What one update of a learner is made from; N is 1, or the number of conditions."""

    samples: Particles  # K own draws: p0's for SIXO and FUDGE, q's for the others
    positives: Particles  # n particles that stand for sigma; they may be the samples again
    W: torch.Tensor  # (N, n), weights of the positives; they sum to 1, or are all 0
    hit: torch.Tensor  # (N,), factor of a run's loss: 0 if all its W are 0, else 1
    w_neg: torch.Tensor | None = None  # CTL: (N, K, T), weights of the samples' prefixes under pi_t
    targets: torch.Tensor | None = None  # RL, FUDGE: (N, K, T or 1), what psi_t of samples fits
    positive_targets: torch.Tensor | None = None  # the same for positives that are exact
    advantages: torch.Tensor | None = None  # PPO: (N, K, T), whitened
    returns: torch.Tensor | None = None  # PPO: (N, K, T)
    values: torch.Tensor | None = None  # PPO: (N, K, T), the critic's before the update


def draw_positives(learner, world, twist, samples, exact_tokens, scheme):
    """Particles that stand for sigma, and their weights W (N, n).

    exact_tokens (N, n, T): exact samples of sigma, or None.
    W sums to 1 over the positives, or is 0 where all weights are 0.  As in the released code, only
    two of the cases resample.
    """
    N, K, _ = samples.tokens.shape
    o = samples.o

    if exact_tokens is not None and learner == "ctl" and world.conditional:
        # Conditional SMC: the one exact sample is retained among K particles, with resampling.
        positives = sample(world, twist, K, N, o, scheme=scheme, retained=exact_tokens)
    elif exact_tokens is not None:
        # The exact samples themselves, which count alike.  All tokens are forced: nothing is drawn.
        n = exact_tokens.shape[1]
        positives = sample(world, twist, n, N, o, tau=0.0, retained=exact_tokens)
        return positives, torch.full_like(positives.log_w, 1 / n)
    elif learner == "sixo":
        # Its samples are draws of p0, so new ones are drawn from q, with resampling.
        positives = sample(world, twist, K, N, o, scheme=scheme)
    else:
        # The samples of q again.
        positives = samples
    # Weights p0 phi / q (since the last resampling, where there is any).
    return positives, positives.log_w.softmax(-1).nan_to_num(0.0)


def soft_values(particles):
    """RL's targets (N, K, T), App. C.1.1: for t < T log Z^pi_{t+1}(s_{1:t}), for T log phi."""
    return torch.cat([particles.log_Z_pi[..., 1:], particles.log_phi[..., None]], -1)


def fudge_labels(world, sequences, o=None):
    """phi (N, T) of a continuation by p0 of every prefix s_{1:t} of N sequences (N, T)."""
    # Every prefix of every sequence, (T, N, T): row t - 1 keeps s_{1:t}, and -1 leaves the tokens
    # after it to p0.
    N, T = sequences.shape
    keep = torch.ones(T, T, dtype=torch.bool, device=sequences.device).tril()
    prefixes = torch.where(keep[:, None], sequences, -1)

    # One run of one particle for each prefix.
    prefixes = prefixes.reshape(T * N, 1, T)
    if o is not None:
        o = o.repeat(T, 1)
    particles = sample(world, None, 1, N * T, o, proposal="base", tau=0.0, retained=prefixes)
    return particles.log_phi.exp().view(T, N).T


def draw_batch(learner, world, twist, K, exact_tokens=None, o=None, beta=1.0, scheme="systematic"):
    """Draw what one update of a learner needs -> Batch.

    o (N, c): a run of K particles for each of these conditions; None: one run.
    exact_tokens (N, n, T): n exact samples for each run, or None.
    """
    if learner not in LEARNERS:
        raise ValueError(f"unknown learner {learner!r}")
    N = 1 if o is None else len(o)
    if learner in ("sixo", "fudge"):
        samples = sample(world, None, K, N, o, proposal="base", tau=0.0)
    else:
        samples = sample(world, twist, K, N, o, tau=0.0)

    # Positives that miss a threshold say nothing of sigma; the weight of the others sums to 1.
    positives, W = draw_positives(learner, world, twist, samples, exact_tokens, scheme)
    W = W * (positives.log_phi > world.log_floor)
    hit = (W.sum(-1) > 0).double()
    W = W / W.sum(-1, keepdim=True).clamp(min=1e-300)  # no 0 / 0 where there is no hit
    batch = Batch(samples, positives, W, hit)

    # What each learner wants to know of its own samples.
    if learner == "ctl":
        # The samples' prefixes are of q; weighted p0 psi_t / q they stand for pi_t (Eq. 9).
        ratio = (samples.log_p - samples.log_q).cumsum(-1)
        batch.w_neg = (ratio + samples.log_psi).softmax(1)
    elif learner == "rl":
        batch.targets = soft_values(samples)
        if exact_tokens is not None:
            batch.positive_targets = soft_values(positives)
    elif learner == "fudge":
        # One label phi / bound for all prefixes of a sample, each of which p0 has continued.
        batch.targets = (samples.log_phi - world.log_bound).exp()[..., None]
        # Samples of p0 hardly ever fit their condition; exact prefixes, continued by p0, do.  The
        # bound of a conditional phi, which is a probability, is 1.
        if exact_tokens is not None and world.conditional:
            batch.positive_targets = fudge_labels(world, exact_tokens[:, 0], o)[:, None]
    elif learner == "ppo":
        with torch.no_grad():
            z, e = head_inputs(world, twist, samples)
            batch.values = twist.value(z, e).double()
        # Every token costs log q / p0, and the last one earns log phi, which contains beta.
        earned = F.pad(samples.log_phi[..., None], (world.T - 1, 0))  # 0 before T
        rewards = (samples.log_p - samples.log_q + earned) / beta
        _, batch.returns, batch.advantages = generalised_advantages(rewards, batch.values)
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
        # CTL: the positives stand for sigma, the prefixes of the samples for pi_t.
        log_psi_neg = log_psi_of_particles(world, twist, samples)
        log_psi_pos = log_psi_neg
        if positives is not samples:
            log_psi_pos = log_psi_of_particles(world, twist, positives)
        return (batch.hit * ctl_loss(log_psi_pos, batch.W, log_psi_neg, batch.w_neg)).mean()
    if learner == "sixo":
        # SIXO: the positives stand for sigma, the samples are draws of p0.
        log_psi_pos = log_psi_of_particles(world, twist, positives)
        log_psi_neg = log_psi_of_particles(world, twist, samples)
        return (batch.hit * sixo_loss(log_psi_pos, batch.W, log_psi_neg)).mean()
    if learner == "dpg":
        # DPG: q becomes likely to draw the positives.
        log_q_pos = log_q_of_particles(world, twist, positives)
        return (batch.hit * dpg_loss(log_q_pos, batch.W)).mean()
    if learner in ("rl", "fudge"):
        # RL and FUDGE fit targets: those of own samples, and of exact ones if there are any.
        loss = regression_loss(learner, world, twist, samples, batch.targets).mean()
        if batch.positive_targets is None:
            return loss
        on_exact = regression_loss(learner, world, twist, positives, batch.positive_targets).mean()
        return (loss + on_exact) / 2
    if learner == "ppo":
        # PPO: its policy q and its critic, on samples from before the update.
        z, e = head_inputs(world, twist, samples)
        values = twist.value(z, e).double()
        log_q = log_q_of_particles(world, twist, samples)
        losses = ppo_loss(
            log_q, samples.log_q, batch.advantages, values, batch.values, batch.returns
        )
        return losses.mean()
    raise ValueError(f"unknown learner {learner!r}")


# ---- Exact samples


@dataclass
class ExactSamples:
    """Exact samples of sigma, each with its condition."""

    tokens: torch.Tensor  # (M, T)
    o: torch.Tensor | None  # (M, c): infilling, where sample i is from sigma( . | o_i)


def draw_exact_samples(world, n, batch=1000, patience=1000):
    """Draw n exact samples of sigma -> ExactSamples.

    Infilling: T + c tokens of p0, cut in two.  The first part is then an exact sample under the
    second as its condition (BDMC, Sec. 3.3).
    Otherwise rejection: a draw of p0 is kept with probability phi / bound.  Draws are made in
    batches.  It gives up after `patience` of them, and `patience` more for each sample found.
    """
    if world.conditional:
        tokens = sample_p0(world, n, world.T + world.c)
        return ExactSamples(tokens[:, : world.T], tokens[:, world.T :])

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

        # Say how many there are, and stop if there are far too few.
        if draws % (100 * batch) == 0:
            print(f"exact samples: {len(kept)} of {n} after {draws} draws of p0", flush=True)
        problem = (
            f"exact samples: {len(kept)} in {draws} draws of p0: phi is (nearly) zero everywhere; "
            "change it or --beta, or take --exact 0: no upper bounds"
        )
        require(draws < patience * batch * (1 + len(kept)), problem)
    return ExactSamples(torch.stack(kept[:n]), None)


def target_of(args):
    """All that decides sigma, for the file of its exact samples."""
    names = ["model", "dtype", "prompt", "T", "potential", "beta", "classifier", "c"]
    if args.potential == "continuation":
        names.append("continuation")
    target = {name: getattr(args, name) for name in names}
    path = Path(args.potential.rpartition(":")[0])
    if path.suffix == ".py" and path.is_file():
        target["file"] = path.read_text(errors="replace")  # an edited potential is another target
    return target


def are_ids(tokens, n, V):
    """Is this a tensor of token ids, (any number, n), all below V?"""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.long:
        return False
    if tokens.dim() != 2 or tokens.shape[1] != n:
        return False
    return bool(((tokens >= 0) & (tokens < V)).all())


def samples_checksum(saved):
    """A number that tells the contents of a file of exact samples from changed ones."""
    lists = [saved["tokens"].tolist()]
    if saved["o"] is not None:
        lists.append(saved["o"].tolist())
    return checksum(lists)


def read_exact_samples(path, args, V):
    """Exact samples that an earlier run has written; exits if they are of another target.

    V: the token ids that there are.
    """
    problem = f"{path}: no file of exact samples"
    try:
        saved = torch.load(path, "cpu")
        target = dict(saved["target"])
        tokens = saved["tokens"]
        o = saved["o"]
    except Exception as error:  # torn, or another kind of file: many types
        why = f"{problem} ({type(error).__name__}); delete it, or name another"
        raise SystemExit(why) from None

    # The same target, ids of its tokens and conditions, and samples enough.
    wanted = target_of(args)
    changed = [name for name in wanted if target.get(name) != wanted[name]]
    other = f"{path}: exact samples of another target, with another {', '.join(changed)}"
    require(not changed, f"{other}; name another --exact-samples")
    whole = are_ids(tokens, args.T, V)
    if args.potential == "infilling":
        whole = whole and are_ids(o, args.c, V) and len(o) == len(tokens)
    else:
        whole = whole and o is None
    whole = whole and saved.get("crc") in (None, samples_checksum(saved))
    require(whole, f"{problem}: its tokens are damaged; delete it, or name another")
    few = f"{path}: holds {len(tokens)} exact samples, fewer than --exact {args.exact}; delete it"
    require(len(tokens) >= args.exact, few)
    if o is not None:
        o = o[: args.exact]
    return ExactSamples(tokens[: args.exact], o)


def exact_path(args, out):
    """The file of the run's exact samples."""
    return Path(args.exact_samples or out / "exact_samples.pt")


def read_or_draw_exact_samples(args, world, out):
    """The run's exact samples -> ExactSamples, called `pool` below.  Only the first process works.

    They are read from the file --exact-samples; if there is none they are drawn, and not yet
    written: the run folder is made after all that can fail.
    """
    path = exact_path(args, out)
    in_folder = path.resolve() == (out / "exact_samples.pt").resolve()
    deleted = args.overwrite and in_folder  # by start_run, in a moment
    if path.exists() and not deleted:
        return read_exact_samples(path, args, world.V)
    require_writable(path.parent, "--exact-samples")
    print(f"drawing {args.exact} exact samples: {path}", flush=True)
    with leaving_at_once():
        drawn = draw_exact_samples(world, args.exact)
    if drawn.o is not None:
        drawn.o = drawn.o.cpu()
    return ExactSamples(drawn.tokens.cpu(), drawn.o)


def save_exact_samples(args, pool, out):
    """Write the run's exact samples, if their file is not there, whole or not at all."""
    path = exact_path(args, out)
    if path.exists():
        return
    contents = {"target": target_of(args), "tokens": pool.tokens.cpu(), "o": None}
    if pool.o is not None:
        contents["o"] = pool.o.cpu()
    contents["crc"] = samples_checksum(contents)
    data = io.BytesIO()
    torch.save(contents, data)
    write_shared(path, data.getvalue())


def load_exact_samples(args, world, out, device):
    """The run's exact samples, on all processes; None if there are none of this potential."""
    if world.log_bound is None or args.exact == 0:
        return None
    work = partial(read_or_draw_exact_samples, args, world, out)
    pool = on_rank0(work, f"{exact_path(args, out)}: no exact samples")
    pool.tokens = pool.tokens.to(device)
    if pool.o is not None:
        pool.o = pool.o.to(device)
    return pool


# ---- Section 5: evaluation


def half_width(x):
    """Half of the 95 % interval of the mean of independent values (n,); nan for one value."""
    if len(x) < 2:
        return math.nan
    return 1.96 * x.std().item() / math.sqrt(len(x))


def midpoint(bounds):
    """log Z of R runs as the released code has it -> log Z (R,), gap.

    There are two pairs of bounds, without and with resampling.  The gap of a pair is its upper
    bound less its lower one, mean over runs.  log Z is the middle of the pair with the smaller gap.
    """
    sis_gap = (bounds["sis_upper"] - bounds["sis_lower"]).mean().item()
    smc_gap = (bounds["smc_upper"] - bounds["smc_lower"]).mean().item()
    if smc_gap < sis_gap:
        return (bounds["smc_lower"] + bounds["smc_upper"]) / 2, smc_gap
    return (bounds["sis_lower"] + bounds["sis_upper"]) / 2, sis_gap


def kl_estimates(run_smc, pool, bounds, log_w):
    """Both KLs of the proposal q to sigma, and log Z, with half widths -> {name: value}.

    run_smc: as in log_Z_bounds.  pool: ExactSamples.  bounds {name: (R,)}: those of log_Z_bounds.
    log_w (R, K): log p0 phi / q of q's samples.
    Only R conditions have a log Z: under conditions KL(sigma | q) takes no more exact samples than
    these, else all there are.
    """
    conditional = pool.o is not None
    log_Z, gap = midpoint(bounds)  # (R,)
    record = {"log_Z": log_Z.mean().item(), "log_Z_ci": half_width(log_Z), "gap": gap}

    # log w of exact samples, (M,): each one is the only particle of a run, under its condition.
    M = len(pool.tokens)
    if conditional:
        M = len(log_Z)
    retained = pool.tokens[:M, None]
    log_w_exact = run_smc(1, M, tau=0.0, retained=retained, proposal="twist").log_w[:, 0]

    # Both KLs (Eq. 23), value by value; and the half width that the error of log Z adds to them.
    if conditional:  # every condition has its own log Z, whose error is in the spread
        kl_q_sigma = log_Z - log_w.mean(1)
        kl_sigma_q = log_w_exact - log_Z
        log_Z_error = 0.0
    else:
        log_Z_mean = log_Z.mean()
        kl_q_sigma = (log_Z_mean - log_w).flatten()
        kl_sigma_q = log_w_exact - log_Z_mean
        log_Z_error = half_width(log_Z)
    record["kl_q_sigma"] = kl_q_sigma.mean().item()
    record["kl_q_sigma_ci"] = math.hypot(half_width(kl_q_sigma), log_Z_error)
    record["kl_sigma_q"] = kl_sigma_q.mean().item()
    record["kl_sigma_q_ci"] = math.hypot(half_width(kl_sigma_q), log_Z_error)
    record["G_q"] = log_w_exact.mean().item()
    record["G_q_ci"] = half_width(log_w_exact)
    return record


def evaluate(args, world, twist, pool):
    """Bounds on log Z for every K of --bound-K, and both KLs with the last -> {name: value}.

    pool: the run's ExactSamples.  If it is None there are lower bounds only.
    Under conditions each has its own log Z.
    """
    # R runs, each with an exact sample and under that sample's condition if there are any.
    R = args.runs
    o = None
    exact_tokens = None
    if pool is not None:
        R = min(R, len(pool.tokens))
        exact_tokens = pool.tokens[:R]
        if pool.o is not None:
            o = pool.o[:R]
    options = {"proposal": args.proposal, "scheme": args.scheme, "tau": args.tau}
    run_smc = partial(sample, world, twist, o=o, **options)

    # The bounds (Eq. 24); what follows reads those of the last K.
    record = {}
    for K in args.bound_K:
        bounds, sis, twisted = log_Z_bounds(run_smc, K, R, exact_tokens)
        for name, values in bounds.items():
            record[f"{name}_{K}"] = values.mean().item()
            record[f"{name}_{K}_ci"] = half_width(values)
    for t, value in enumerate(twisted.ess.mean(0).tolist(), 1):
        record[f"ess_{t}"] = value

    # Samples of the twist-induced proposal q, without resampling: the bounds have them, unless
    # their proposal is p0.
    q_samples = sis
    if args.proposal != "twist":
        q_samples = run_smc(args.bound_K[-1], R, tau=0.0, proposal="twist")
    log_phi = q_samples.log_phi
    problem = (
        f"potential {args.potential}: zero on all {log_phi.numel()} samples, so log Z-hat = "
        "-inf; choose one that p0 reaches"
    )
    require(log_phi.max() > -math.inf, problem)
    record["kl_prior"] = (q_samples.log_q - q_samples.log_p).sum(-1).mean().item()
    record["reward"] = log_phi.mean().item() / args.beta  # without the beta that log phi contains
    record["hits"] = (log_phi > world.log_floor).double().mean().item()
    record["F_q"] = q_samples.log_w.mean().item()
    # Samples under one condition are no independent evidence of the mean over conditions.
    of_run = q_samples.log_w.mean(1)
    record["F_q_ci"] = half_width(q_samples.log_w.flatten() if o is None else of_run)
    record["conditional"] = float(o is not None)

    if pool is None:
        record["lower"] = max(bounds["sis_lower"].mean(), bounds["smc_lower"].mean()).item()
        return record
    record.update(kl_estimates(run_smc, pool, bounds, q_samples.log_w))
    return record


# What is printed, and the columns of the table.  gap: between the bounds whose middle is log Z.
# lower: the larger lower bound on log Z, where there are no exact samples.  kl_prior: KL(q | p0).
# hits: the share of q's samples whose phi is above 0, or above a threshold's floor.
SHOWN = ("kl_q_sigma", "kl_sigma_q", "log_Z", "gap", "lower", "kl_prior", "reward", "hits")


def evaluate_and_log(args, world, twist, pool, out, step):
    """The first process evaluates; all of them log its record to out/metrics.jsonl."""
    work = partial(evaluate_alone, args, world, twist, pool)
    record = on_rank0(work, f"{out}: not evaluated after {step} updates")
    line = {name: record[name] for name in SHOWN if name in record}  # first, since they are printed
    line.update(record)
    log(out, step, **line)


def evaluate_alone(args, world, twist, pool):
    """evaluate(), which a signal ends at once."""
    with leaving_at_once():
        return evaluate(args, world, twist, pool)


# ---- Training


def is_due(step, eval_every):
    """Whether to evaluate after `step` updates.

    At the multiples of eval_every; if that is 0, at 0, 2, 4, 8, ..., where the paper's epochs end.
    """
    if eval_every > 0:
        return step % eval_every == 0
    only_one_bit = (step & (step - 1)) == 0  # true of the powers of two, and of 0
    return only_one_bit and step != 1


def draw_exact_and_conditions(args, learner, world, pool):
    """What an update's batch starts from -> K, exact_tokens, o.

    pool: the run's ExactSamples, or None.  K: particles of each of the batch's N runs.
    exact_tokens (N, n, T): exact samples to learn from, or None.  o (N, c): conditions, or None.
    """
    if world.conditional and learner == "ctl":
        # K particles for each new condition, with the exact sample that BDMC draws with it.
        fresh = draw_exact_samples(world, args.conditions)
        return args.K, fresh.tokens[:, None], fresh.o
    if world.conditional:
        # The same number of particles, but each has a condition and an exact sample of its own.
        fresh = draw_exact_samples(world, args.conditions * args.K)
        return 1, fresh.tokens[:, None], fresh.o
    if args.train_on_exact:
        # K of the pool, drawn with replacement.
        chosen = torch.randint(len(pool.tokens), (args.K,), device=pool.tokens.device)
        return args.K, pool.tokens[chosen][None], None
    return args.K, None, None


def update(args, learner, world, twist, pool, optimizer, step):
    """One update of a learner's twist.  Every process draws a batch; their mean gradient counts."""
    K, exact_tokens, o = draw_exact_and_conditions(args, learner, world, pool)
    batch = draw_batch(learner, world, twist, K, exact_tokens, o, args.beta, args.scheme)

    # One step of Adam, with the mean gradient of all processes; PPO uses its batch four times.
    weights = optimizer.param_groups[0]["params"]
    epochs = 4 if learner == "ppo" else 1
    for _ in range(epochs):
        optimizer.zero_grad()
        batch_loss(learner, world, twist, batch).backward()
        for weight in weights:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        grad_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item()
        problem = (
            f"{learner}, update {step}: the loss or its gradient is not finite; take a smaller "
            "--lr, and for rl a potential that is nowhere zero"
        )
        require(math.isfinite(grad_norm), problem)
        optimizer.step()


def train(args, learner, seed, world, model, pool, out):
    """One learner with one seed -> its twist; evaluations go to out/metrics.jsonl."""
    make = partial(out.mkdir, parents=True, exist_ok=True)
    on_rank0(make, f"{out}: cannot be made; make room")

    # All processes begin with the same twist; then each draws its own particles.
    torch.manual_seed(seed)
    twist = make_twist(args, learner, world, model)
    torch.manual_seed(1000 * seed + dist.get_rank())
    updates = 0  # "none" and "policy" are only evaluated
    begun = 0  # this run starts here: 0, or the checkpoint that it resumes
    optimizer = None
    if learner in LEARNERS:
        updates = args.max_steps
        weights = [weight for weight in twist.parameters() if weight.requires_grad]
        rate = args.lr
        if rate == 0:
            rate = LR[args.rates][learner]
        optimizer = torch.optim.Adam(weights, lr=rate)
        if args.resume:
            begun, _ = load_checkpoint(out, twist, optimizer)
    else:
        # Evaluated anew, even where a run is resumed.
        forget = partial((out / "metrics.jsonl").unlink, missing_ok=True)
        on_rank0(forget, f"{out}: cannot be written to")

    for step in progress(range(begun, max(begun, updates) + 1)):
        # When asked to stop, save and leave between two updates.
        if stop_requested() and step < updates:
            if step > begun:
                save_checkpoint(out, step, twist, optimizer)
            sys.exit(143)

        # Save and evaluate when that is due, and after the last update.
        if is_due(step, args.eval_every) or step >= updates:
            if step > begun:
                save_checkpoint(out, step, twist, optimizer)
            evaluate_and_log(args, world, twist, pool, out, step)
        if step < updates:
            update(args, learner, world, twist, pool, optimizer, step)
    return twist


# ---- Texts, table and figure


def draw_samples(args, world, twist):
    """Texts that are nearly samples of sigma, one of each of --runs sets of K samples of q.

    It is drawn by their weights -> [{"prompt", "response", "log_phi", "one_of"}, ...]
    """
    rows = []
    together = max(1, 2048 // args.K)  # sets that are drawn side by side
    for first in range(0, args.runs, together):
        N = min(together, args.runs - first)
        # Under infilling what follows is --continuation, or drawn like the conditions of training.
        o = None
        if world.conditional and world.continuation:
            o = torch.tensor([world.continuation] * N, device=world.model.device)
        elif world.conditional:
            o = draw_exact_samples(world, N).o
        particles = sample(world, twist, args.K, N, o, tau=0.0)

        # One of each set, by weight.
        chosen = particles.log_w.softmax(-1).multinomial(1)  # (N, 1)
        tokens = particles.tokens.take_along_dim(chosen[..., None], 1)  # (N, 1, T)
        log_phi = particles.log_phi.gather(1, chosen)[:, 0].tolist()
        show_example(world.tokenizer, world.prompt, tokens[0, 0])
        for i, response in enumerate(world.responses(world.after_prompt(tokens))):
            row = {"prompt": world.prompt_as_given, "response": response, "log_phi": log_phi[i]}
            if o is not None:
                row["condition"] = world.tokenizer.decode(o[i])
            row["one_of"] = args.K
            rows.append(row)
    return rows


def write_samples(path, rows):
    """Write a file of samples, whole or not at all."""
    lines = [json.dumps(row) + "\n" for row in rows]
    write(path, "".join(lines).encode())


# At every evaluation.
RECORDED = ("step", "kl_prior", "reward", "hits", "F_q", "F_q_ci", "conditional")


def read_history(out):
    """The records of a run's metrics.jsonl, in the order of their updates.

    SystemExit: a line that is no record of an evaluation.
    """
    path = out / "metrics.jsonl"
    records = []
    for place, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        whole = isinstance(record, dict)
        for name in RECORDED:
            whole = whole and isinstance(record.get(name), int | float)
        require(whole, f"{path}:{place}: no record of an evaluation; --overwrite starts anew")
        records.append(record)
    return records


def look_back(args, world, twist, out):
    """A learner's records when it has been trained; the first process writes out/samples.jsonl.

    Of one learner three samples are shown, else one of each.
    """
    with leaving_at_once():
        history = read_history(out)
        rows = draw_samples(args, world, twist)
    path = out / "samples.jsonl"
    write_samples(path, rows)
    shown = 3
    if args.learner == "all":
        shown = 1
    for row in rows[:shown]:
        text = row["response"]
        if "condition" in row:
            text = f"{text} [{row['condition']}]"
        print(f"one of {args.K} by weight: log phi {row['log_phi']:.3f}, {text!r}")
    print(f"{len(rows)} samples: {path}", flush=True)
    return history


def values_over_seeds(name, records, log_Z):
    """The value of a column for every seed's record.

    The KLs (Eq. 23) are taken anew with one common log Z, unless each condition has its own.
    """
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


def title_of(name):
    """A column's title: KLs as the paper writes them, others by their name."""
    if name.startswith("kl"):
        return TITLES[name]
    return name.replace("_", " ")


def table_rows(finals, names, log_Z):
    """Cells of the table, and a warning for each KL that the gap of the bounds on log Z may hide.

    finals: {learner: last records, one for each seed}.  log_Z: the common one of the KLs.
    """
    rows = []
    warnings = []
    for learner, records in finals.items():
        row = [learner]
        gap = records[0].get("gap", 0.0)  # that of the first seed
        for name in names:
            # Mean and half of its 95 % interval: over seeds if there are several, else samples.
            values = values_over_seeds(name, records, log_Z)
            mean = values.mean().item()
            width = records[0].get(f"{name}_ci", math.nan)
            if len(values) > 1:
                width = half_width(values)
            cell = f"{mean:.3f}"
            if not math.isnan(width):
                cell = f"{cell} ± {width:.3f}"
            row.append(cell)

            # log Z may lie anywhere between its bounds, so a KL is known no better than their gap.
            # Warn if the KL is smaller than the gap, unless its own noise is larger still: then the
            # table's ± says enough.  A gap below 0 is noise.  Without a ± (nan) there is a warning.
            gap_hides_kl = gap > 0 and gap > mean
            noise_is_larger = width > gap
            if name in ("kl_q_sigma", "kl_sigma_q") and gap_hides_kl and not noise_is_larger:
                warnings.append(
                    f"warning, {learner}: {title_of(name)} = {mean:.3f} is less than the gap "
                    f"{gap:.3f} between the bounds on log Z; a larger --bound-K closes it"
                )
        rows.append(row)
    return rows, warnings


def write_table(out, records):
    """Print and write table.md: the first evaluation, and the last one of every learner.

    records: {(learner, seed): its evaluations}.
    """
    # The common log Z of the KLs is the median over learners and seeds, as released; of two in the
    # middle the larger.  Without exact samples there are no KLs, and the 0 is not used.
    finals = {}
    log_Zs = []
    for (learner, _), history in records.items():
        finals.setdefault(learner, []).append(history[-1])
        log_Zs.append(history[-1].get("log_Z", 0.0))
    log_Z = sorted(log_Zs)[len(log_Zs) // 2]

    # Above the learners, the first one before its first update.
    first_history = next(iter(records.values()))
    untrained = first_history[0]
    if len(first_history) > 1:
        finals = {"untrained": [untrained], **finals}
    names = [name for name in SHOWN if name in untrained]
    rows, warnings = table_rows(finals, names, log_Z)
    rows.insert(0, ["q"] + [title_of(name) for name in names])

    # Cells of a column have one width.
    widths = []
    for column in range(len(rows[0])):
        widths.append(max(len(row[column]) for row in rows))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    write(out / "table.md", ("\n".join(lines) + "\n").encode())
    print("", *lines, "", *warnings, sep="\n")


def fall(before, after):
    """How far a quantity of the evaluations fell, and half of its 95 % interval -> fall, half

    before, after: (value, half width) for each seed.  Over several seeds the interval is that of
    the mean of their falls; of one it is that of the samples of the two evaluations.
    """
    falls = torch.tensor([old - new for (old, _), (new, _) in zip(before, after)])
    if len(falls) > 1:
        return falls.mean().item(), half_width(falls)
    return falls.item(), math.hypot(before[0][1], after[0][1])


def kl_falls(histories):
    """How far the KLs of one learner fell with training -> {KL: (fall, half width)}

    histories: its evaluations, for each seed.  log Z drops out of the difference: KL(q | sigma) is
    log Z - F_q and KL(sigma | q) is G_q - log Z (Eq. 23).  The second needs exact samples.
    """
    firsts = [history[0] for history in histories]
    lasts = [history[-1] for history in histories]
    before = [(-record["F_q"], record["F_q_ci"]) for record in firsts]
    after = [(-record["F_q"], record["F_q_ci"]) for record in lasts]
    falls = {"KL(q | sigma)": fall(before, after)}
    if "G_q" in firsts[0]:
        before = [(record["G_q"], record["G_q_ci"]) for record in firsts]
        after = [(record["G_q"], record["G_q_ci"]) for record in lasts]
        falls["KL(sigma | q)"] = fall(before, after)
    return falls


def claim(records, where):
    """What the paper says of learned twists, and what this run shows -> two lines

    records: {(learner, seed): its evaluations}.  The claim is one of every learner and both KLs, so
    the number is the one that says least.
    """
    paper = "learned twists bring the proposal q near the target sigma, in both KLs (Tables 2 to 4)"
    histories = {}
    for (learner, _), history in records.items():
        histories.setdefault(learner, []).append(history)

    # The fall whose interval begins lowest.  nan, of a single value, is lower than any number.
    least = None
    for learner, of_seeds in histories.items():
        for name, (value, half) in kl_falls(of_seeds).items():
            low = value - half
            if least is None or not low >= least[0]:
                least = (low, value + half, value, f"{name} of {learner}")
    low, high, value, name = least
    learners = ", ".join(histories)
    shown = f"{verdict(low, high)}: {where} the KLs fall with training, of {learners}; "
    return paper, f"{shown}nats, least {name} ({value:.3f} [{low:.3f}, {high:.3f}])"


def claim_of_evaluation(record, where):
    """What the paper says of measuring a sampler, and the KL of an untrained one -> two lines

    record: its evaluation.  The gap of the bounds on log Z is the most that the KL may be off.
    """
    paper = "two-sided bounds on log Z measure the KL of any sampler to the target (Section 5)"
    value = record.get("kl_q_sigma", math.nan)
    half = record.get("kl_q_sigma_ci", math.nan)
    gap = record.get("gap", math.nan)
    low = value - half
    high = value + half
    shown = f"{verdict(low, high, gap)}: {where} KL(q | sigma) is larger than the gap {gap:.3f} of "
    return paper, f"{shown}the bounds, in nats ({value:.3f} [{low:.3f}, {high:.3f}])"


def claim_of(args, records):
    """The two lines of the claim that this run can make."""
    where = f"on {args.potential} of {args.model}"
    if args.model == "tiny":
        where = f"in the tiny world ({args.potential})"
    first = next(iter(records.values()))
    if len(first) == 1:  # none and policy are only evaluated
        return claim_of_evaluation(first[0], where)
    return claim(records, where)


COLOURS = {"ctl": "C0", "rl": "C1", "sixo": "C2", "fudge": "C3", "dpg": "C4", "ppo": "C5"}
MARKERS = {"ctl": "o", "rl": "s", "sixo": "D", "fudge": "^", "dpg": "v", "ppo": "P"}


def style_of(learner, seed, args):
    """Colour and marker of a learner; and at the first seed its name, for the legend."""
    label = learner if seed == args.seed else None
    return {
        "color": COLOURS.get(learner, "k"),
        "marker": MARKERS.get(learner, "*"),
        "markersize": 5,
        "linewidth": 1.2,
        "label": label,
    }


def draw_updates(axis, name, records, args):
    """A quantity of q against the number of updates, a line for each learner and seed.

    Bars: 95 % intervals, where there are some.
    """
    lasts = []
    for (learner, seed), history in records.items():
        steps = [record["step"] for record in history]
        values = [record[name] for record in history]
        halves = [record.get(f"{name}_ci", 0.0) for record in history]
        axis.errorbar(steps, values, halves, capsize=2, **style_of(learner, seed, args))
        lasts.append(values[-1])

    # What to see: from where to where; and KLs are compared with 0.
    title = f"{TITLES[name]}: {min(lasts):.2f} to {max(lasts):.2f}"
    first_history = next(iter(records.values()))
    if len(first_history) > 1:
        title += f" trained, {first_history[0][name]:.2f} untrained"
    axis.set(title=title, xlabel="updates", ylabel="nats, with 95 % intervals")
    if name.startswith("kl"):
        axis.axhline(0, color="0.5", linewidth=0.8, zorder=0, label="0: q is sigma")
    if args.eval_every == 0:  # the paper's epochs double the updates
        axis.set_xscale("symlog", base=2, linthresh=1)


BOUNDS = {  # name in a record: line style and what it is
    "sis_lower": ("o-", "IWAE, lower"),
    "sis_upper": ("o--", "IWAE, upper"),
    "smc_lower": ("s-", "SMC, lower"),
    "smc_upper": ("s--", "SMC, upper"),
}


def draw_bounds(axis, learner, history, args, known):
    """As Fig. 3: bounds on log Z (Eq. 24) against K, before and after training.

    known: (log Z, half width of its interval) from elsewhere, or None.
    """
    drawn = [(history[-1], COLOURS.get(learner, "k"))]
    if len(history) > 1:
        drawn.insert(0, (history[0], "0.65"))
        axis.plot([], [], color="0.65", label="grey: the same, untrained")
    for record, color in drawn:
        for name, (line_style, meaning) in BOUNDS.items():
            if f"{name}_{args.bound_K[0]}" not in record:
                continue  # no upper bounds without exact samples
            means = [record[f"{name}_{K}"] for K in args.bound_K]
            widths = [record[f"{name}_{K}_ci"] for K in args.bound_K]
            bars = {"color": color, "ms": 4, "capsize": 3, "lw": 1.2}
            if record is history[-1]:
                bars["label"] = meaning
            axis.errorbar(args.bound_K, means, widths, fmt=line_style, **bars)

    # Where log Z really is, if it is known.
    if known is not None:
        log_Z, width = known
        axis.axhspan(log_Z - width, log_Z + width, color="k", alpha=0.2, linewidth=0)
        axis.axhline(log_Z, color="k", linewidth=1, label="log Z, by 200,000 draws of p0")
    gap = history[-1].get("gap", math.nan)
    title = f"bounds on log Z, {learner} at the end:\n"
    axis.set_title(f"{title}{gap:.3f} nats between upper and lower, K = {args.bound_K[-1]}")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="K, particles", ylabel="nats, with 95 % intervals")
    axis.set_xticks(args.bound_K, [str(K) for K in args.bound_K])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def draw_ess(axis, records, args):
    """Effective sample size of the last evaluation against t; grey before training."""
    steps = range(1, args.T + 1)
    first_history = next(iter(records.values()))
    if len(first_history) > 1:
        share = [first_history[0][f"ess_{t}"] / args.bound_K[-1] for t in steps]
        axis.plot(steps, share, "o-", color="0.65", label="untrained")
    lasts = []
    for (learner, seed), history in records.items():
        share = [history[-1][f"ess_{t}"] / args.bound_K[-1] for t in steps]
        axis.plot(steps, share, **style_of(learner, seed, args))
        lasts.append(share[-1])
    title = f"weights at the end: {min(lasts):.0%} to {max(lasts):.0%} of the\nparticles count "
    axis.set(title=f"{title}at t = {args.T} (1: all alike)", xlabel="t, tokens")
    axis.set(ylabel="ESS before resampling / K", ylim=(0, 1.03))
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_figure(out, records, args):
    """figures/twisted_smc.png from the evaluations: KLs, bounds on log Z and ESS."""
    from matplotlib.figure import Figure

    figure = Figure((11, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    (learner, _), history = next(iter(records.items()))
    names = ("kl_q_sigma", "kl_sigma_q")
    if "kl_q_sigma" not in history[0]:
        names = ("kl_prior", "reward")  # without exact samples
    draw_updates(axes[0, 0], names[0], records, args)
    draw_updates(axes[0, 1], names[1], records, args)
    if names[0] == "kl_q_sigma":  # two divergences between the same two: one axis
        axes[0, 1].sharey(axes[0, 0])
    draw_bounds(axes[1, 0], learner, history, args, known_log_Z(args))
    draw_ess(axes[1, 1], records, args)
    for axis in axes.flat:
        axis.title.set_fontsize(10)

    # What it does not show, and one legend for all panels.
    where = f"model {args.model}"
    if args.model == "tiny":
        where = "the built-in tiny world, not the paper's setting"
    caption = f"How near is the proposal q to the target sigma = p0 phi / Z?  phi: {args.potential}"
    figure.suptitle(f"{caption}, {where}; T {args.T}, seed {args.seed}", fontsize=10)
    entries = {}
    for axis in (axes[0, 0], axes[1, 1]):
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=len(entries))
    save_figure(figure, out / "figures" / "twisted_smc.png", dpi=100)


# log Z of the default target and half of its 95 % interval: the log of the mean of phi over 200,000
# draws of p0; a test draws fewer.
TINY_LOG_Z = (-1.2146, 0.0064)


def known_log_Z(args):
    """(log Z, half width) of the default run's target, else None."""
    if target_of(args) == target_of(PRESETS["tiny"]):
        return TINY_LOG_Z
    return None


# ---- The run

RANGES = {  # option: its least and largest value
    "T": (1, 10**6),
    "c": (0, 10**6),
    "K": (1, 10**6),
    "conditions": (1, 10**6),
    "tau": (0, 10**9),
    "exact": (0, 10**9),
    "bound_K": (1, 10**6),
    "runs": (1, 10**6),
    "seeds": (1, 10**6),
}


def check_potential(args):
    """Exit with one line if --potential and its options do not fit."""
    name = args.potential
    kind, _, what = name.rpartition(":")
    # Each kind needs options of its own.
    is_score = kind.endswith(".py") or name.endswith(".py") or "/" in name or Path(name).is_dir()
    if name == "infilling":
        fits = args.c > 0 and args.beta == 1 and args.exact > 0
        problem = f"--c {args.c} must be above 0, --beta 1, and --exact above 0"
    elif name == "continuation":
        fits = args.continuation
        problem = "give its text with --continuation"
    elif kind == "tiny":
        # The attributes that any story has or lacks, by name.
        attributes = list(tiny_attributes(""))
        fits = what == "reward" or what in attributes
        problem = f"choose tiny:reward, or one of {', '.join(attributes)} after tiny:"
        if fits and not are_tiny_prompts([prompt_row(args.prompt)["prompt"]]):
            fits = False
            problem = "knows stories after a prompt of the tiny world alone; "
            problem += "give yours, --potential FILE.py:FUNCTION, or a reward model's folder"
    elif kind == "class":
        fits = args.classifier and what.isdecimal() and len(what) < 10
        problem = "give a label (0, 1, ...) after class:, and a --classifier"
    elif kind == "threshold":
        # A number such as -1.5: what is left without its sign and point are digits.
        digits = what.removeprefix("-").replace(".", "", 1)
        fits = args.classifier and digits.isdecimal() and args.beta == 1
        problem = (
            "give a number after threshold:, a --classifier, and --beta 1, since no power changes "
            "a phi of 0 or 1"
        )
    else:  # load_score says what is wrong with one that looks like a function or a reward model
        fits = is_score
        problem = (
            "unknown; choose infilling, continuation, tiny:WHAT, FILE.py:FUNCTION, a reward model, "
            "or class:LABEL, threshold:ETA with --classifier"
        )
    require(fits, f"potential {name[-80:]}: {problem}")


def check(args):
    """Exit with one line if an option is out of its range, before anything is loaded or made."""
    check_ranges(args, RANGES)
    require(args.rates in LR, f"unknown row of rates {args.rates!r}: choose one of {', '.join(LR)}")
    known = args.learner in (*LEARNERS, "all", "none", "policy")
    require(known, f"unknown learner {args.learner!r}: choose one of {', '.join(LEARNERS)}, all")
    problem = f"--learner policy: name it, with the vocabulary of --model {args.model}, by --policy"
    require(args.policy or args.learner != "policy", problem)

    # CTL, SIXO and DPG learn from how the weights of K particles differ.  Under infilling SIXO and
    # DPG do not: there they learn from one exact sample for each condition.
    need_weights = ("all", "ctl", "sixo", "dpg")
    if args.potential == "infilling":
        need_weights = ("all", "ctl")
    problem = "--K 1: the weight of one particle is always 1, so nothing is learned; take 2 or more"
    require(args.K > 1 or args.learner not in need_weights, problem)


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


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C has come: the program ends with code 143."""


def leave_now(signal_number, _):
    """What a signal does within leaving_at_once."""
    signals.append(signal_number)
    raise Stopped(143)


@contextmanager
def leaving_at_once():
    """Within it SIGTERM and Ctrl-C end the program at once, and not after a step.

    It is for long work that the first process does alone and that writes nothing.  There it cannot
    ask stop_requested, which the other processes would have to answer; and a step may be a user's
    potential that takes minutes.
    """
    if signals:
        raise Stopped(143)
    before = {}
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        before[signal_number] = signal.signal(signal_number, leave_now)
    try:
        yield
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def check_sizes(args, world, learners, device):
    """Exit with one line if the largest tensors would not fit the memory.

    The sizes are the least that is needed: p0's logits of one step, (n, V) in float32, and the
    hidden states of all steps, (n, T, d), of n particles.
    """
    a_particle = 4 * world.V + 4 * args.T * world.d
    room = memory(device)

    # An update.  DPG and PPO have log psi_t, log p0 and their sum for every token of every step.
    n = args.K
    flags = f"--K {args.K}, --T {args.T}"
    if world.conditional:
        n = args.K * args.conditions
        flags = f"{flags}, --conditions {args.conditions}"
    size = n * a_particle
    if "dpg" in learners or "ppo" in learners:
        size += 12 * n * args.T * world.V
    problem = f"{flags}: an update takes {size} bytes of {room}"
    require(size <= room, f"{problem}; lower them")

    # The bounds, of as many runs as there are exact samples for.
    exact = 0
    runs = args.runs
    if world.log_bound is not None and args.exact > 0:
        exact = args.exact
        runs = min(runs, exact)
    size = max(args.bound_K) * runs * a_particle
    problem = f"--bound-K {max(args.bound_K)}, --runs {runs}: bounds take {size} bytes of {room}"
    require(size <= room, f"{problem}; lower them")

    # Each exact sample is a particle: under conditions when they are drawn, else in KL(sigma | q).
    size = exact * a_particle
    problem = f"--exact {exact}, --T {args.T}: exact samples take {size} bytes of {room}"
    require(size <= room, f"{problem}; lower them")


@torch.no_grad()
def rehearse(args, world, model):
    """Try what may fail later: the potential on two texts, and the policy.

    Random draws are what they would be without it.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if world.text_potential is not None:
            ids = torch.arange(2 * world.T, device=model.device) % world.V
            world.log_phi(ids.view(1, 2, world.T))
        if args.learner == "policy":
            make_twist(args, "policy", world, model)


def write_results(out, records, args):
    """The table and the figure."""
    write_table(out, records)
    draw_figure(out, records, args)
    print(f"{out}: table.md, figures/twisted_smc.png")
    say_claim(*claim_of(args, records), out)


def prepare(args, out):
    """Load and try all that can be refused -> world, learners, pool.

    It comes before the run folder is made, so that the corrected command finds it free.
    """
    device = setup(args.seed)
    free = f"{out}: cannot hold a run; choose another --out"
    on_rank0(partial(require_free, args, out), free)

    # The target, and who learns to sample from it.
    model = load_model(args.model, args.dtype)
    world = lm_world(model, load_tokenizer(args.model), args)
    learners = choose_learners(args, world)
    check_sizes(args, world, learners, device)
    rehearse(args, world, model)

    # Exact samples, for upper bounds and KL(sigma | q).
    pool = load_exact_samples(args, world, out, device)
    return world, learners, pool


def prompts_of(args):
    """The prompts of --prompt, each as that option takes it, see prompt_row."""
    if args.prompt == "":
        return [args.prompt]
    prompts = []
    for row in load_prompts("", args.prompt):
        prompt = row["prompt"]
        if isinstance(prompt, list):
            prompt = json.dumps(prompt)
        if row.get("tools"):
            prompt = json.dumps({"prompt": row["prompt"], "tools": row["tools"]})
        prompts.append(prompt)
    return prompts


def check_prompts(args, prompts):
    """Exit with one line if a potential or the model does not fit one of several prompts."""
    tokenizer = load_tokenizer(args.model)
    for prompt in prompts:
        check_potential(replace(args, prompt=prompt))
        room = tokenizer.model_max_length - args.T - args.c
        asked = prompt_row(prompt)
        n = len(encode_prompt(asked["prompt"], tokenizer, asked.get("tools")))
        problem = f"--prompt {args.prompt[:60]}: {prompt[:40]!r} has {n} tokens"
        require(n <= room, f"{problem}; at most {room} leave room for what follows")


def run_each(args, prompts, out):
    """A run of its own for each prompt, in out/prompt1, out/prompt2, ... -> list of records"""
    problem = f"{out}: holds a run of one prompt; choose another --out"
    require(not (out / "config.json").exists(), problem)
    found = []
    for place, prompt in enumerate(prompts, 1):
        folder = out / f"prompt{place}"
        begun = args.resume and (folder / "config.json").exists()
        say(f"prompt {place} of {len(prompts)}: {words(prompt_row(prompt)['prompt'])[-60:]!r}")
        one = replace(args, prompt=prompt, out=str(folder), resume=begun)
        found.append(run_one(one, folder))
    return found


def trained(args, earlier):
    """The newest twist of each learner of an earlier run -> {folder: (learner, seed)}"""
    found = {}
    for folder in sorted(Path(earlier).glob("*-seed*")):
        learner, _, seed = folder.name.partition("-seed")
        known = learner in LEARNERS and seed.isdecimal()
        wanted = args.learner in ("all", learner)
        if known and wanted and any(folder.glob("step-*")):
            found[folder] = (learner, int(seed))
    problem = f"sample {earlier}: no twist of --learner {args.learner} in it; train one first"
    require(found, problem)
    return found


def sample_run(args, earlier):
    """Samples of the twists of an earlier run, after each prompt -> the rows of out/samples.jsonl

    --runs samples of each twist, one of K by weight.
    """
    setup(args.seed)
    prompts = prompts_of(args)
    check_prompts(args, prompts)
    before = args_of_run(earlier)
    for name in ("model", "twist", "dtype"):
        flag = f"--{name} {getattr(args, name)}"
        was = getattr(before, name)
        require(getattr(args, name) == was, f"{flag}: {earlier} was trained with {was}")
    folders = trained(args, earlier)
    model = load_model(args.model, args.dtype)
    first = replace(args, prompt=prompts[0])
    world = lm_world(model, load_tokenizer(args.model), first)
    rehearse(first, world, model)
    out = start_run(args, "twisted_smc")

    # Each twist, after all prompts.
    rows = []
    for folder, (learner, seed) in folders.items():
        twist = make_twist(args, learner, world, model)
        weights = [weight for weight in twist.parameters() if weight.requires_grad]
        step, _ = load_checkpoint(folder, twist, torch.optim.Adam(weights), only_read=True)
        say(f"{folder}: {learner} after {step} updates")
        work = partial(sample_after, args, world, twist, prompts)
        for row in on_rank0(work, f"{folder}: not sampled"):
            rows.append({**row, "learner": learner, "seed": seed})
    path = out / "samples.jsonl"
    on_rank0(partial(write_samples, path, rows), f"{path}: cannot be written")
    show_samples(path, rows)
    return rows


def sample_after(args, world, twist, prompts):
    """Samples of one twist after each prompt."""
    rows = []
    for prompt in prompts:
        world.set_prompt(replace(args, prompt=prompt))
        with leaving_at_once():
            rows += draw_samples(args, world, twist)
    return rows


def main(args, earlier=""):
    check(args)
    if earlier:
        return sample_run(args, earlier)
    out = Path(args.out or "results/twisted_smc")
    # Each of several prompts has a run of its own.
    prompts = prompts_of(args)
    if len(prompts) > 1:
        check_prompts(args, prompts)
        return run_each(args, prompts, out)
    args = replace(args, prompt=prompts[0])
    check_potential(args)
    return run_one(args, out)


def run_one(args, out):
    """Train and evaluate after one prompt -> {(learner, seed): its evaluations}"""
    world, learners, pool = prepare(args, out)
    start_run(args, "twisted_smc", also=("exact_samples.pt", "*-seed*"))
    if pool is not None:
        work = partial(save_exact_samples, args, pool, out)
        on_rank0(work, f"{exact_path(args, out)}: cannot be written; make room")

    # Train and evaluate every learner, with every seed.
    records = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for learner in learners:
            say(f"{learner}, seed {seed}")
            folder = out / f"{learner}-seed{seed}"
            twist = train(args, learner, seed, world, world.model, pool, folder)
            work = partial(look_back, args, world, twist, folder)
            records[learner, seed] = on_rank0(work, f"{folder}: no records, or no text")

    # Table and figure.
    on_rank0(partial(write_results, out, records, args), f"{out}: cannot be written")
    return records


if __name__ == "__main__":
    main(args, earlier)
