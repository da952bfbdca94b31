"""Sampling adaptors, the probability-quality trade-off and independent Metropolis-Hastings (IMH).

Tan, Valvoda, Liu, Svete, Qin, Kan, Cotterell 2024, https://arxiv.org/abs/2406.10203 (the
numbers of the equations are ours)

    Eq. 1  aligned model     p_+(y) = p(y) exp(r(y) / beta) / Z, of a prior p and a reward r,
                             so log p + r / beta = log p_+ + log Z
    Eq. 2  sampling adaptor  a_t(v) = p_+(v | y_<t)^(1/T) 1[v in S_t], Z_t = sum_v a_t(v);
                             S_t: the kept tokens
    Eq. 3  local             q(y) = prod_t a_t(y_t) / Z_t, what a sampler draws
    Eq. 4  global            g(y) = prod_t a_t(y_t) / Z_g, so g(y) / q(y) = prod_t Z_t / Z_g
    Eq. 5  IMH               from y propose y' ~ q, move with probability min(1, w(y') / w(y)),
                             else repeat y; w = target / q.  Targets, on the support of q: global
                             (g of Eq. 4), aligned (p_+ as --model gives it), posterior (Eq. 1,
                             with p as --ref-model and r as --reward give it)

    python methods/imh_adaptors.py                 all on the tiny world: generate, ..., toy, exact
    python methods/imh_adaptors.py exact           p_+ known exactly, under every adaptor
    python methods/imh_adaptors.py generate --model results/dpo --out results/mine
                                                   then score, imh, figures with the same flags
    python methods/imh_adaptors.py all rlhf        presets: tiny (default), rlhf, dpo (7B models)
    python methods/imh_adaptors.py imh --csv data_dpo --pooled --target aligned
                                                   the authors' files; then figures likewise
    python methods/imh_adaptors.py --model A --ref-model P --data prompts.txt --reward own.py:short

The trade-off: a corpus is typical if its mean log p_+ is close to what is expected.  By Eq. 1,
typical corpora share the sum of mean log p and mean r / beta.  The default run shows it on a p_+
whose probabilities are known exactly (figures/tradeoff.png, beside results/dpo if that is there),
and on draws of the prior that IMH turns into draws of Eq. 1.

In the released code the accept test is a one-element tuple, so that every proposal is accepted; the
implicit reward is log p - log p_+, the negative of Eq. 1's; the prior does not see the prompt; and
log-probs of tokens are clamped at -25.  One chain goes over all prompts, its target is aligned, and
every adaptor without a top-k of its own gets top-k 50 (here: top_p090,top_k=50).
"""

import json
import math
import os
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import tyro

Target = Literal["global", "aligned", "posterior"]  # of IMH, Eq. 5


@dataclass
class Args:
    sampling_types: tuple[str, ...] = (  # names of the released code, or top_p=0.8,min_p=0.1
        "ancestral_strict",
        "top_k50",
        "top_k30",
        "top_p095",
        "top_p090",
        "typical_p090",
        "eta_n00009",
        "greedy",
    )
    temperatures: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)  # each with each type but greedy
    prompts: int = 1000  # distinct prompts of the test split, drawn at random
    samples: int = 2  # responses per prompt and setting
    template: str = "{}"  # {}: prompts as they are; else {} in it becomes their first human turn
    # The reward: tiny (for the tiny world's prompts alone), implicit, FILE.py:FUNCTION (yours:
    # function(prompts, responses) -> a number for each), or a reward model's folder or hub id
    reward: str = "tiny"
    beta: float = 0.5  # KL weight of Eq. 1: of the implicit reward and of --target posterior

    target: Target = "global"  # see Eq. 5; exact: global; all: posterior if --model is --ref-model
    pooled: bool = False  # one chain over all prompts, as released; else one chain per prompt
    chain_length: int = 1000  # proposals per chain, drawn with replacement from the stored draws
    burn_in: int = 100  # first states of each chain, which are left out
    corpus_size: int = 200  # strings in each of the 1000 corpora whose means are compared
    eps: float = 0.25  # typical: mean log p_+ within eps standard errors of its expectation
    csv: str = ""  # folder of the authors' scored CSVs, read by imh and figures instead of scores

    model: str = "tiny"  # aligned model p_+: a run folder, a local folder or a hub id
    ref_model: str = "tiny"  # prior p: the model p_+ was trained from
    # prompts: tiny, hh, a file, a folder or a hub id; a file of prompts alone (.txt: one a line; or
    # rows with only prompt, text or chat messages) is taken whole
    data: str = "tiny"
    # one prompt instead of --data: text as it stands, without a chat template, unless it is JSON:
    # a list of messages, '[{"role": "user", "content": "Hi"}]', or {"prompt": list, "tools": []}
    prompt: str = ""
    max_length: int = 256  # tokens of a response and of the longest prompt sampled beside it
    max_prompt_length: int = 255  # tokens of a prompt; longer ones are left out
    batch_size: int = 64  # responses sampled side by side
    tokens_per_microbatch: int = 8192  # memory knob of scoring: packed tokens per forward pass
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: S_t may gain or lose a token
    seed: int = 0  # of every random draw
    out: str = "results/imh_adaptors"  # run folder; toy adds -toy to its name, exact adds -exact
    resume: bool = False  # continue a killed generate or score: finished chunks are kept
    overwrite: bool = False  # replace what is in the run folder


PRESETS = {
    "tiny": Args(
        sampling_types=("ancestral_strict", "top_k=5", "top_p090", "typical_p090", "greedy"),
        temperatures=(0.5, 1.0, 1.5),
        prompts=16,
        samples=8,
        max_length=128,
    ),
    "rlhf": Args(  # the paper's first experiment: a learned reward
        model="ethz-spylab/rlhf-7b-harmless",
        ref_model="meta-llama/Llama-2-7b-hf",
        data="hh",
        reward="ethz-spylab/reward_model",
        template="Human: {} Assistant:",
        dtype="bfloat16",
    ),
    "dpo": Args(  # the paper's second experiment: the implicit reward
        model="kaist-ai/janus-dpo-7b",
        ref_model="kaist-ai/janus-7b",
        data="hh",
        reward="implicit",
        beta=1.0,
        template="[INST] Human: {} Assistant:[/INST]",
        dtype="bfloat16",
    ),
}
# --help ends its text with this.
EXAMPLE = """
Your own reward is a function in a file:

    # own.py: the shorter a response, the better
    def short(prompts, responses):
        scores = []
        for prompt, response in zip(prompts, responses):
            scores.append(-len(response))
        return scores
"""
COMMANDS = ("all", "toy", "exact", "generate", "score", "imh", "figures")

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    command = "all"
    preset = "tiny"
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        command = sys.argv.pop(1)
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        known = f"a command ({', '.join(COMMANDS)}), then a preset ({', '.join(PRESETS)})"
        raise SystemExit(f"neither command nor preset: {preset!r}; choose {known}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__ + EXAMPLE)

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: here or one up
# isort: off
from common import packs  # log-probabilities
from common import decode_step, prefill, reorder, stay_in_place  # sampling
from common import above_cutoff, cheapest, fewest_with_mass, kept_by_all  # sampling
from common import log_sum_exp, require_mass, rows_in_cache, sample_kept, tempered  # sampling
from common import pack_pairs  # tokenization
from common import encode_prompt, encode_rows, end_tokens  # tokenization
from common import show_example  # tokenization
from common import is_number, load_prompts, read_rows, report, show_samples, words  # data
from common import load_model, load_tokenizer, load_score, OwnScore  # models, and what rates
from common import are_tiny_prompts, tiny_reward  # the tiny world
from common import check_ranges, checksum, hold_folder, leave_if_stopped, memory  # processes
from common import on_rank0, progress, removed_on_failure, require, say, setting  # processes
from common import save_figure, setup, start_run, stop_requested, write  # processes
from common import say_claim, verdict  # how a run ends
# isort: on


# Sampling adaptors: Eq. 2 to 4.

SAMPLING_TYPES = {  # the released code's names, as keywords of transformers' generate()
    "ancestral_strict": "top_k=0",
    "ancestral": "top_k=50",
    "top_k50": "top_k=50",
    "top_k30": "top_k=30",
    "top_p095": "top_p=0.95",
    "top_p090": "top_p=0.9",
    "typical_p090": "typical_p=0.9",
    "eta_n00009": "eta_cutoff=0.0009",
    "greedy": "top_k=1",
}
ORDER = ("top_k", "top_p", "min_p", "typical_p", "eta_cutoff")  # in which generate() applies them
OFF = {"top_k": 0, "top_p": 1, "temperature": 1}  # values that change nothing
NUMBER = re.compile(r"\d*\.?\d+(e-?\d+)?")  # 50, 0.95, .9 or 9e-4


def parse_adaptor(spec, vocabulary=math.inf):
    """An adaptor as {keyword of generate(): value}, without the keywords that change nothing.

    spec: such a dictionary, or text of names of SAMPLING_TYPES and of name=value, with commas.
    Raises SystemExit: an unknown name, or a value out of its range, as top_k above vocabulary.
    """
    # Text becomes a dictionary, name by name.
    values = {}
    if isinstance(spec, dict):
        values = spec
    else:
        remedy = f"write one of {', '.join(SAMPLING_TYPES)}, or key=number,..."
        for part in spec.split(","):
            keyword = SAMPLING_TYPES.get(part, part)
            name, _, number = keyword.partition("=")
            require(NUMBER.fullmatch(number), f"adaptor {spec!r:.50}: {remedy}")
            values[name] = float(number)

    # What changes nothing is left out, so that {} is the model itself.
    adaptor = {}
    for name, value in values.items():
        check_adaptor(name, value, vocabulary)
        if value != OFF.get(name):
            adaptor[name] = value
    return adaptor


def check_adaptor(name, value, vocabulary):
    """Refuse a name that is no adaptor's, and a value that keeps nothing or means nothing."""
    known = name == "temperature" or name in ORDER
    require(known, f"adaptor: no {name!r:.50}: use temperature, {', '.join(ORDER)}")

    # The values that mean something: a temperature, a number of tokens, or a probability.
    if name == "temperature":
        good = 0 < value <= math.inf
        rule = "must be above 0"
    elif name == "top_k":
        good = value % 1 == 0 and 0 <= value <= vocabulary
        rule = f"must be a whole number of tokens, 0 < top_k <= {vocabulary}, or 0 (off)"
    else:
        good = 0 < value <= 1
        rule = f"keeps nothing, or is no probability; choose 0 < {name} <= 1"
    require(good, f"adaptor: {name}={value:g} {rule}")


def entropy(log_pi, p):
    """The entropy of each distribution, in nats.  Log-probs and probabilities (n, V) -> (n, 1)"""
    finite = log_pi.clamp(min=-1000)  # 0 log 0 is 0, not nan
    return -(p * finite).sum(-1, keepdim=True)


def kept_set(log_pi, p, name, x):
    """The tokens S(pi) that the adaptor name=x keeps.

    Log-probs, -inf for tokens dropped before, and probabilities, (n, V) each -> (n, V), 1.0 for the
    tokens that are kept, else 0.0.  The sets are exact: of tokens that tie, those with the lowest
    index; a mass or cutoff met to 1e-6 is met.
    """
    if name == "top_k":
        return cheapest(-log_pi, int(x))
    if name == "top_p":
        return fewest_with_mass(-log_pi, p, x)
    if name == "typical_p":  # tokens whose surprise is close to the expected surprise come first
        distance = (-log_pi - entropy(log_pi, p)).abs()
        return fewest_with_mass(distance, p, x)
    if name == "min_p":  # pi >= x max pi
        return above_cutoff(log_pi, math.log(x) + log_pi.amax(-1, keepdim=True))
    if name == "eta_cutoff":  # pi >= min(x, sqrt(x) e^-H), H the entropy of pi
        log_cutoff = (math.log(x) / 2 - entropy(log_pi, p)).clamp(max=math.log(x))
        return above_cutoff(log_pi, log_cutoff)
    raise ValueError(f"unknown adaptor {name!r}")


def filters_of(adaptor):
    """What an adaptor keeps S_t by, {name: value} in the order of generate()."""
    return {name: adaptor[name] for name in ORDER if name in adaptor}


def adapt(logits, adaptor):
    """One step of the sampler, Eq. 2 and 3.  Logits (..., V) -> log_q (..., V), log_kept (...)

    adaptor: a dictionary or text, see parse_adaptor.
    log_q: log-probs of the sampler, -inf outside S_t.  log_kept: log Z_t of Eq. 2; at T = 1 this is
    the log of the mass of p_+ that is kept.
    Raises SystemExit where nothing is kept, as of logits that are all -inf, or nan.
    """
    adaptor = parse_adaptor(adaptor, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p_plus = logits.log_softmax(-1, dtype=dtype)
    require_mass(log_p_plus.amax(-1), adaptor)

    # Eq. 2: temper, then drop what is not in S_t.
    log_a = log_p_plus / adaptor.get("temperature", 1.0)
    log_q = log_a
    if "temperature" in adaptor:
        log_q = log_a.log_softmax(-1)
    filters = filters_of(adaptor)
    if filters:
        log_pi = log_q.reshape(-1, logits.shape[-1])
        kept = kept_by_all(log_pi, log_pi.exp(), filters, kept_set).view_as(log_a)
        log_a = log_a.masked_fill(kept == 0, -math.inf)
        log_q = log_a.log_softmax(-1)  # Eq. 3

    # By Eq. 3, log Z_t = log a_t - log q at any kept token, such as the likeliest.  To sum a_t, as
    # Eq. 2 does, gives the same, but logsumexp is slow with -inf.
    log_kept = log_a.amax(-1) - log_q.amax(-1)
    require_mass(log_kept, adaptor)
    return log_q, log_kept


def listed_law(ids, weights, adaptor, vocabulary):
    """Eq. 2 to 4 for a p_+ that is a list of N different strings with their probabilities.

    p_+(v | y_<t) is the share of v among the strings that begin with y_<t.
    (N, T) ids, all padded with one token, (N,) probabilities -> log q (N,), sum_t log Z_t (N,)
    """
    log_q = torch.zeros_like(weights)
    log_kept = torch.zeros_like(weights)
    prefix = torch.zeros(len(ids), dtype=torch.long)  # the number of each string's y_<t
    for token in ids.T:
        # mass[i, v]: what p_+ gives to the strings that go on from prefix i with v.
        mass = weights.new_zeros(prefix.max() + 1, vocabulary)
        mass.index_put_((prefix, token), weights, accumulate=True)

        # Where only one token can follow, it is certain: q = 1, Z_t = 1, and their logs stay 0.
        step_q = torch.zeros_like(mass)
        step_kept = torch.zeros_like(mass[:, 0])
        fork = (mass > 0).sum(1) > 1
        logits = mass[fork].log()  # adapt normalises them
        step_q[fork], step_kept[fork] = adapt(logits, adaptor)
        log_q = log_q + step_q[prefix, token]
        log_kept = log_kept + step_kept[prefix]

        # Prefixes one token longer get numbers: the same prefix and token, the same number.
        _, prefix = (prefix * vocabulary + token).unique(return_inverse=True)
    return log_q, log_kept


# Independent Metropolis-Hastings: Eq. 5.


def imh_chain(log_w, log_u):
    """The draw held at each step of Eq. 5, for chains side by side.

    (..., N), (..., N) -> indices (..., N).  log_w = log target - log q of the draws, up to a
    constant; log_u are logs of uniforms, and -inf accepts every finite weight.
    """
    log_w = torch.as_tensor(log_w).movedim(-1, 0).contiguous()  # one step of all chains: one row
    log_u = torch.as_tensor(log_u).movedim(-1, 0).contiguous()

    # lerp_ below needs finite numbers, so `lowest` stands for a log-weight of -inf: a quarter of
    # the lowest float, for differences of log-weights must be finite too.  log_u stops at half of
    # it: below any difference of finite log-weights, above that of -inf and a finite one.
    lowest = torch.finfo(log_w.dtype).min / 4
    log_w = log_w.clamp(min=lowest)
    log_u = log_u.clamp(min=lowest / 2)

    held = torch.zeros(log_w.shape, dtype=torch.long, device=log_w.device)
    state = torch.zeros_like(log_w[0])  # the index held; a float, as lerp_ wants it
    log_w_held = log_w[0].clone()
    accept = torch.empty_like(log_w[0])  # 1.0 or 0.0
    steps = torch.arange(len(log_w)).to(log_w)
    for i in range(1, len(log_w)):
        # Eq. 5: u < w(y') / w(y).  In plain form:
        #     accept = log_u[i] < log_w[i] - log_w_held
        #     log_w_held = where(accept, log_w[i], log_w_held)
        #     state = where(accept, i, state)
        # lerp_ by 1.0 or 0.0 is the same choice without branches, which cost a CPU dearly.
        torch.lt(log_u[i], log_w[i] - log_w_held, out=accept)
        log_w_held.lerp_(log_w[i], accept)
        state.lerp_(steps[i], accept)
        held[i] = state
    return held.movedim(0, -1)


@dataclass
class PoolLimit:
    """What IMH over N stored draws tends to: self-normalised importance sampling."""

    weights: np.ndarray  # (N,), w / sum w: the stationary law over the draws
    log_Z: float  # log mean w: log Z_g of Eq. 4, or log Z of Eq. 1
    ess: float  # effective sample size as a share of N, in (0, 1]
    accept: float  # acceptance of the stationary chain


def pool_limit(log_w):
    """The limit in closed form.  (N,) log-weights -> PoolLimit

    A chain proposes each of the N stored draws equally often, so that on the pool q_j = 1 / N, and
    target = w q is proportional to w alone: `weights`, the stationary law.
    """
    N = len(log_w)
    weights = torch.as_tensor(log_w).softmax(0).numpy()

    # Acceptance: from state i, which has probability weights_i, propose j and accept it by Eq. 5,
    #     sum_ij weights_i q_j min(1, w_j / w_i) = sum_ij min(weights_i, weights_j) / N.
    # The i-th largest weight (i = 0, 1, ...) is the smaller one in 2 i + 1 of these pairs: one pair
    # with itself, and two with each larger one.
    descending = np.sort(weights)[::-1]
    sum_of_minima = descending @ (2 * np.arange(N) + 1)
    return PoolLimit(
        weights=weights,
        log_Z=np.logaddexp.reduce(log_w) - math.log(N),
        ess=1 / (weights @ weights) / N,
        accept=sum_of_minima / N,
    )


@dataclass
class Corpus:
    """The scored responses of one setting, arrays (N,) in the order of the draws."""

    prompts: list  # of text
    log_prior: np.ndarray  # log p(y | x)
    reward: np.ndarray  # r(x, y)
    implicit: np.ndarray  # beta log p_+ / p
    log_aligned: np.ndarray  # log p_+(y | x)
    log_q: np.ndarray  # Eq. 3
    log_kept: np.ndarray  # sum_t log Z_t, to check log_q by; nan in the authors' files


def log_weights(corpus, T, target, beta):
    """log w of Eq. 5 = log target - log q of each draw, up to a constant -> (N,)

    Draws outside the support of q, as there are in files of others, get -inf.
    """
    if target == "global":
        # Eq. 4 and 3: log g + log Z_g - log q = sum_t log Z_t = sum_t log a_t - log q.  By Eq. 2,
        # sum_t log a_t = log p_+ / T, as drawn tokens are in S_t.  (Some files lack log_kept.)
        log_target = corpus.log_aligned / T
    elif target == "aligned":
        log_target = corpus.log_aligned
    elif target == "posterior":
        log_target = corpus.log_prior + corpus.reward / beta  # Eq. 1
    else:
        raise ValueError(f"unknown target {target!r}")
    outside = ~np.isfinite(corpus.log_q)
    return np.where(outside, -math.inf, log_target - corpus.log_q)


def pools_of(prompts, pooled):
    """The draws that share a chain: arrays of indices, one per prompt, or all together."""
    if pooled:
        return [np.arange(len(prompts))]
    pools = {}
    for i, prompt in enumerate(prompts):
        pools.setdefault(prompt, []).append(i)
    return [np.array(pools[prompt]) for prompt in sorted(pools)]


PIECE = 10_000  # steps of the chains between two looks at the signals


def held_steps(log_w, log_u):
    """imh_chain of (P, N) log-weights piece by piece, so that a signal is heard -> (P, N)"""
    held = torch.empty(log_w.shape, dtype=torch.long)
    for start in range(0, log_w.shape[1], PIECE):
        leave_if_stopped()
        end = start + PIECE
        if start == 0:
            held[:, :end] = imh_chain(log_w[:, :end], log_u[:, :end])
            continue

        # The draw held at the end of the last piece is the first one of this piece.
        last = held[:, start - 1 : start]
        piece_w = torch.cat([log_w.gather(1, last), log_w[:, start:end]], 1)
        piece_u = log_u[:, start - 1 : end]
        found = imh_chain(piece_w, piece_u)[:, 1:]
        held[:, start:end] = torch.where(found == 0, last, start - 1 + found)
    return held


@dataclass
class Chains:
    """The chains of one setting, side by side."""

    states: np.ndarray  # (P, N - burn_in) indices of the setting's draws
    accept: float  # share of the proposals that were accepted


def run_chains(log_w, pools, length, burn_in, rng):
    """One chain over each pool of draws, P lists of indices into log_w -> Chains

    A chain proposes its pool's draws at random, with replacement.
    """
    # Two uniforms a step: the first picks the proposal, the second decides whether it is accepted.
    uniforms = rng.random((2, len(pools), length))
    log_u = torch.tensor(uniforms[1]).log()
    proposals = []
    for pool, picks in zip(pools, uniforms[0]):
        numbers = (picks * len(pool)).astype(int)
        proposals.append(pool[numbers])
    proposals = np.stack(proposals)  # (P, length) indices into log_w

    # held[c, i]: the step whose proposal chain c holds at step i; i itself if it was accepted.
    held = held_steps(torch.as_tensor(log_w[proposals]), log_u).numpy()
    accepted = held[:, 1:] == np.arange(1, length)
    states = np.take_along_axis(proposals, held, 1)
    return Chains(states=states[:, burn_in:], accept=accepted.mean().item())


# The trade-off: means over corpora, which of them are typical, and their correlations.

LOG_P, REWARD, IMPLICIT, LOG_P_PLUS = range(4)  # the columns of strings' values and of their means


def mean_ranks(x):
    """Ranks from 1; equal values share the mean of theirs.  (n,) -> (n,)"""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # the last of the ranks that a value takes
    return (last - (counts - 1) / 2)[inverse]


def correlations(x, y):
    """Pearson's and Spearman's of n pairs, (n,), (n,); nan below three, or if one is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return [math.nan, math.nan]
    pearson = np.corrcoef(x, y)[0, 1]
    spearman = np.corrcoef(mean_ranks(x), mean_ranks(y))[0, 1]
    return [float(pearson), float(spearman)]


def mean_correlation(values, sizes):
    """The mean of independent correlations, of so many points each -> mean, low, high

    By Fisher's z = artanh(r), whose standard error is 1 / sqrt(n - 3): the 95 % interval of the
    mean z, taken back to correlations.  What has no correlation, or three points or fewer, is left
    out; nan if nothing is left.
    """
    z = []
    variances = []
    for r, n in zip(values, sizes):
        if math.isfinite(r) and n > 3:
            z.append(math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))))
            variances.append(1 / (n - 3))
    if not z:
        return math.nan, math.nan, math.nan
    mean = sum(z) / len(z)
    half = 1.959964 * math.sqrt(sum(variances)) / len(z)
    return math.tanh(mean), math.tanh(mean - half), math.tanh(mean + half)


def claim(values, sizes, where, beside=""):
    """What the paper says of typical corpora, and what this run shows -> two lines

    values and sizes: as in mean_correlation, of mean log p and mean reward, one for each setting.
    where: "in the tiny world, ...".  beside: a clause on another model, for comparison.
    """
    paper = "among typical corpora of an aligned model, mean reward is paid for in mean log p"
    value, low, high = mean_correlation(values, sizes)
    # The number that is to lie below 0 is the correlation.
    shown = f"{verdict(-high, -low)}: {where} the two correlate negatively among typical corpora"
    if len(values) > 1:
        shown += f", on average over {len(values)} settings"
    return paper, f"{shown}{beside} ({value:+.2f} [{low:+.2f}, {high:+.2f}])"


def corpus_means(values, n, rng):
    """Means of 1000 corpora of n strings, drawn with replacement.  (N, 4) -> (1000, 4)"""
    members = rng.integers(len(values), size=(1000, n))
    return values[members].mean(1)


def typical_corpora(means, log_p_plus, n, eps):
    """The corpora whose mean log p_+ is within eps standard errors of its expectation.

    (B, 4) means of corpora of n strings, (N,) log p_+ of the strings -> (at most B, 4)

    The expectation is over the strings that the corpora are drawn from.  For draws of p_+ itself it
    is -H(p_+).  Draws of another q have another one, E_q log p_+, and few of their corpora would be
    close to -H(p_+); but those close to E_q log p_+ share the sum in Eq. 1 just as well.
    """
    distance = abs(means[:, LOG_P_PLUS] - log_p_plus.mean())
    return means[distance * math.sqrt(n) < eps * log_p_plus.std()]


# Signals and sizes.


CHAIN_BYTES = 64  # of a step at the peak: uniforms, proposal, weight, state, its four values
CORPUS_BYTES = 40  # of a string in a corpus: its number and its four values


def require_memory(flag, what, size):
    """SystemExit: `what`, of so many bytes, does not fit into this machine; flag: with its value"""
    room = memory()
    problem = f"{flag}: {what} would take {size:,} bytes, of {room:,} here; choose less"
    require(size <= room, problem)


def check_chains(args, chains):
    """SystemExit: so many chains do not fit into memory."""
    flag = f"--chain-length {args.chain_length}"
    require_memory(flag, f"{chains} chains", chains * args.chain_length * CHAIN_BYTES)


# Model and data: settings, prompts and the reward.


def all_settings(sampling_types, temperatures):
    """Names of the settings, each type at each temperature; greedy knows no temperature."""
    names = []
    for kind in sampling_types:
        for T in temperatures:
            name = f"{kind},temperature={T:g}"
            if kind == "greedy":
                name = kind
            if name not in names:
                names.append(name)
    return names


def first_turn(text):
    """The first human turn of a transcript, to its first blank line."""
    without_head = text.split("Human:", 1)[-1]
    return without_head.strip().split("\n\n")[0]


def draw_prompts(args, tokenizer):
    """The prompts to answer: [(ids, row), ...], drawn by the seed, the shortest first."""
    # The template goes around the first turn of a transcript; without one the prompt is as it is.
    # Chat messages have the tokenizer's own template.
    prompts = []
    dropped = defaultdict(list)
    known = set()
    repeated = 0
    longest = min(args.max_prompt_length, args.max_length - 1)  # a prompt leaves room for a token
    context = tokenizer.model_max_length
    too_long = f"--max-length {args.max_length}: the model reads {context} tokens; lower it"
    require(args.max_length <= context, too_long)

    # The prompts as they stand in the data, then within the template.
    rows = []
    for row in load_prompts(args.data, args.prompt):
        rows.append({"prompt": row["prompt"], "responses": [], "tools": row.get("tools")})
    for row in rows:
        if args.template != "{}" and isinstance(row["prompt"], str):
            row["prompt"] = args.template.replace("{}", first_turn(row["prompt"]))

    # As token ids; what cannot be used or is too long is dropped, and what comes again is counted.
    for number, (row, found) in enumerate(zip(rows, encode_rows(rows, tokenizer)), 1):
        if isinstance(found, str):
            dropped[found].append(number)
        elif len(found.prompt_ids) > longest:
            dropped[f"more than {longest} tokens (--max-prompt-length)"].append(number)
        elif tuple(found.prompt_ids) in known:  # each once, in the order of the data
            repeated += 1
        else:
            known.add(tuple(found.prompt_ids))
            prompts.append((found.prompt_ids, row))
    note = f"; repeated {repeated}"
    source = args.prompt[:40] or args.data
    report(f"{source}: different prompts", len(prompts), dropped, note)

    # A random choice, sorted so that prompts of about equal length share a chunk.
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    chosen = [prompts[i] for i in order[: args.prompts]]
    return sorted(chosen, key=prompt_length)


def prompt_length(prompt):
    """The number of tokens of (ids, row)."""
    return len(prompt[0])


def load_reward(args):
    """What rates responses, see load_score in common.py; None for the rewards tiny, implicit."""
    if args.reward in ("tiny", "implicit"):
        return None
    return load_score(args.reward, "--reward")


def rewards_of(args, score, rows, implicit):
    """The rewards of rows of a sample file; implicit: the beta log p_+ / p of each of them."""
    if args.reward == "implicit":
        return implicit
    if args.reward == "tiny":
        return [tiny_reward(words(row["prompt"]), row["text"]) for row in rows]
    prompts = [row["prompt"] for row in rows]
    texts = [row["text"] for row in rows]
    tools = [row.get("tools") for row in rows]
    return score(prompts, texts, tools)


def require_known(args, prompts):
    """SystemExit: the reward of the tiny world for other prompts."""
    problem = "--reward tiny: known for the tiny world's prompts alone; give implicit, "
    problem += "FILE.py:FUNCTION, or a reward model's folder"
    require(args.reward != "tiny" or are_tiny_prompts(prompts), problem)


def check_reward(args, prompts):
    """Load --reward once, so that what is wrong with it ends the program before sampling."""
    asked = [row["prompt"] for _, row in prompts]
    require_known(args, asked)
    score = load_reward(args)
    if isinstance(score, OwnScore):  # tried on two responses
        tried = partial(score, [asked[0], asked[-1]], ["Yes.", ""])
        on_rank0(tried, f"--reward {args.reward}")


# Sampling, in chunks that a killed run keeps.


@dataclass
class Response:
    """One response, token by token as it is drawn."""

    ids: list = field(default_factory=list)  # token ids, end-of-text included
    log_q: list = field(default_factory=list)  # of every token, from the scores it was drawn from
    log_kept: list = field(default_factory=list)  # log Z_t of every step


def draw_tokens(logits, uniforms, adaptor):
    """One token for each row by Eq. 3.  (R, V), (R,) -> tokens, their log q, log Z_t, (R,) each

    adaptor: see parse_adaptor.  The law is that of `adapt`, but no (R, V) log q is made.
    """
    adaptor = parse_adaptor(adaptor, logits.shape[1])
    T = adaptor.get("temperature", 1.0)

    # Draw from a_t of Eq. 2, up to a factor.
    log_a = tempered(logits, T)
    tokens, log_q, log_sum = sample_kept(log_a, uniforms, filters_of(adaptor), kept_set)
    if not adaptor:  # the model itself, so Z_t = 1
        return tokens, log_q, torch.zeros_like(log_q)

    # log Z_t = log a_t - log q, as in `adapt`, here at the drawn token.
    if T != 1:
        log_sum = log_sum_exp(logits)
    log_p_plus = logits.gather(1, tokens[:, None])[:, 0] - log_sum
    return tokens, log_q, log_p_plus / T - log_q


@torch.no_grad()
def sample(model, prompts, copies, adaptor, uniforms, tokenizer):
    """Draw `copies` responses to each of P id lists by Eq. 3 -> a list of P * copies Responses

    Response i answers prompt i // copies.  uniforms: (P * copies, max_new_tokens); a response
    depends on its own prompt and row of uniforms only.
    """
    # The prompts are run once; then the cache takes one token of each response at a time.
    found = [Response() for _ in uniforms]
    # Slot s of the cache holds the text of response answered[s].
    answered = torch.arange(len(uniforms), device=uniforms.device)
    ends = torch.tensor(end_tokens(model, tokenizer), device=uniforms.device)
    last = uniforms.shape[1] - 1
    cache, _, logits = prefill(model, prompts, uniforms.shape[1], copies)
    for t in range(uniforms.shape[1]):
        # One token for each response that goes on.
        logits = logits[:, : len(tokenizer)].float()
        tokens, log_q_drawn, log_kept_drawn = draw_tokens(logits, uniforms[answered, t], adaptor)
        log_q = log_q_drawn.tolist()
        log_kept = log_kept_drawn.tolist()
        for slot, (number, token) in enumerate(zip(answered.tolist(), tokens.tolist())):
            found[number].ids.append(token)
            found[number].log_q.append(log_q[slot])
            found[number].log_kept.append(log_kept[slot])

        # The responses that go on, in as few slots; those that can stay where they are do.
        slots = stay_in_place(torch.isin(tokens, ends, invert=True).nonzero()[:, 0])
        if t == last or len(slots) == 0:
            break
        reorder(cache, slots)
        answered = answered[slots]
        _, logits = decode_step(model, cache, tokens[slots])
    return found


def turns(paths):
    """The chunks that this process writes, one a turn; None in a turn with nothing to write.

    A chunk depends on its own job only, so any process may write it, and one that is there is kept.
    All processes take equally many turns, since after each one they ask together whether to stop.
    """
    world = dist.get_world_size()
    own = []
    for first in range(0, len(paths), world):
        number = first + dist.get_rank()
        if number < len(paths) and not is_chunk(paths[number]):
            own.append(paths[number])
        else:
            own.append(None)
    return own


def is_chunk(path):
    """Whether a chunk is there as it was written; a line if it is damaged, and made again."""
    if not path.exists():
        return False
    try:
        changed = any(is_changed(row) for row in read_rows(path))
    except SystemExit:
        changed = True
    if changed:
        print(f"{path}: damaged, so it is made again", flush=True)
    return not changed


def chunk_rows(path, remedy):
    """The rows of a chunk.  SystemExit: it cannot be read; remedy ends the line."""
    try:
        return read_rows(path)
    except SystemExit:
        raise SystemExit(f"{path}: cannot be read as rows; {remedy}") from None


WRITTEN = ("samples", "samples.jsonl", "scores", "imh.json")  # beside what all methods write
CHUNKS = "chunks.json"  # the names of all chunks of samples, from the start


def require_chunks(args, command):
    """SystemExit: what generate or score writes is not complete; command: which of them.

    A run folder without a list of its chunks, or without samples, is taken as it is.
    """
    path = Path(args.out, "samples", CHUNKS)
    if not path.is_file():
        return
    folder = Path(args.out, "samples" if command == "generate" else "scores")
    try:
        names = json.loads(path.read_bytes())
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, TypeError):
        raise SystemExit(f"{path}: damaged; generate --resume writes it again") from None
    problem = f"{folder}: {len(missing)} of {len(names)} chunks are missing; {command} --resume"
    require(not missing, f"{problem} goes on")


def write_chunk(path, rows):
    """Write rows as JSON, each with its checksum, whole or not at all."""
    sealed = [{**row, "crc": checksum(row)} for row in rows]
    write(path, json.dumps(sealed).encode())


def is_changed(row):
    """Whether a row is not as write_chunk wrote it; its checksum is taken out, if it has one."""
    crc = row.pop("crc", None)
    return crc is not None and crc != checksum(row)


def generate(args, to_score=False):
    """Write out/samples/<setting>/<chunk>.json: prompts, responses, ids, each token's log q.

    Then out/samples.jsonl: prompt, response and setting of all of them.
    to_score: the reward will be needed, so it is tried before anything is drawn.
    """
    # Settings and prompts, which may be refused; then the run folder and the model.
    device = setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    settings = all_settings(args.sampling_types, args.temperatures)
    adaptors = [parse_adaptor(spec, len(tokenizer)) for spec in settings]
    prompts = draw_prompts(args, tokenizer)
    context = tokenizer.model_max_length
    problem = f"--max-length {args.max_length}: {args.model:.80} reads {context} tokens; lower it"
    require(args.max_length <= context, problem)
    check_chains(args, 1 if args.pooled else len(prompts))
    if to_score:
        check_reward(args, prompts)
    out = start_run(args, "imh_adaptors", also=WRITTEN) / "samples"
    model = load_model(args.model, args.dtype)

    # A chunk is a few prompts under one setting.
    size = max(1, args.batch_size // args.samples)
    jobs = {}  # path: number of the setting, number of the first prompt
    for i, spec in enumerate(settings):
        for start in range(0, len(prompts), size):
            jobs[out / spec / f"{start:05d}.json"] = (i, start)
    names = [str(path.relative_to(out)) for path in jobs]
    on_rank0(partial(write, out / CHUNKS, names), f"{out / CHUNKS}: not written")

    for path in progress(turns(list(jobs))):
        if path is not None:
            i, start = jobs[path]
            chunk = prompts[start : start + size]
            longest_ids, _ = chunk[-1]  # prompts come the shortest first
            # The uniforms depend on the seed and the chunk's place, not on the process.
            shape = (len(chunk) * args.samples, args.max_length - len(longest_ids))
            stream = np.random.default_rng([args.seed, i, start])
            uniforms = torch.tensor(stream.random(shape), device=device)
            rows = draw_chunk(model, chunk, args.samples, adaptors[i], uniforms, tokenizer)
            write_chunk(path, rows)
            show_example(tokenizer, rows[0]["prompt_ids"], rows[0]["ids"])
        if stop_requested():
            raise SystemExit(143)  # after SIGTERM or Ctrl-C; --resume continues
    dist.barrier()  # now all chunks are there
    say(f"{len(jobs)} chunks in {out}")
    on_rank0(partial(gather_samples, jobs, args.out), f"{args.out}/samples.jsonl: not written")


def gather_samples(jobs, out):
    """Write out/samples.jsonl, for people, of all chunks; show three of them."""
    rows = []
    for path in jobs:
        leave_if_stopped()
        for row in read_rows(path):
            setting_name = path.parent.name
            texts = {"prompt": row["prompt"], "response": row["text"], "setting": setting_name}
            if row.get("tools"):
                texts["tools"] = row["tools"]
            rows.append(texts)
    path = Path(out, "samples.jsonl")
    lines = [json.dumps(row) + "\n" for row in rows]
    write(path, "".join(lines).encode())
    show_samples(path, rows)


def draw_chunk(model, prompts, samples, adaptor, uniforms, tokenizer):
    """The rows of one chunk: `samples` responses to each of [(ids, row), ...]"""
    drawn = sample(model, [ids for ids, _ in prompts], samples, adaptor, uniforms, tokenizer)
    rows = []
    for number, response in enumerate(drawn):
        prompt_ids, asked = prompts[number // samples]
        row = {
            "prompt": asked["prompt"],
            "prompt_ids": prompt_ids,
            "ids": response.ids,
            "log_q": response.log_q,
            "log_kept": response.log_kept,
            "text": tokenizer.decode(response.ids, skip_special_tokens=True),
        }
        if asked.get("tools"):  # that the chat may call: a reward reads them, too
            row["tools"] = asked["tools"]
        rows.append(row)
    return rows


# Scoring, in the same chunks.


@torch.no_grad()
def adaptor_logps(model, batch, adaptors, vocabulary):
    """log p_+ of a packed batch's M response tokens, and log q under A adaptors -> (1 + A, M)

    One forward pass; logits beyond the first `vocabulary` ones belong to no token.  The command
    score gives no adaptors, as generate stores log q; texts that are from elsewhere need them.
    """
    # All rows of the batch in one, the head on response positions only.
    name = type(model).__name__
    fits = packs(model, batch)  # this also readies the model's attention for `segments`
    require(fits, f"{name}: its rows cannot be packed, nor adaptors scored")
    ids = batch["input_ids"].to(model.device)
    positions = batch["position_ids"].to(model.device)
    score_at = batch["score_at"].to(model.device)
    targets = batch["targets"].to(model.device)[:, None]
    output = model(
        input_ids=ids,
        position_ids=positions,
        # A 4-d mask is taken as it is; the attention reads `segments` instead.
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),
        segments=batch["segments"],
        logits_to_keep=score_at,
        use_cache=False,
    )
    logits = output.logits[0, :, :vocabulary]

    # The adaptors pass over each block of rows while it is in a CPU core's cache.
    n = rows_in_cache(logits)
    blocks = []
    for block, block_targets in zip(logits.split(n), targets.split(n)):
        found = []
        for adaptor in ({}, *adaptors):  # {} is the model itself
            log_q, _ = adapt(block.float(), adaptor)
            found.append(log_q.gather(1, block_targets)[:, 0])
        blocks.append(torch.stack(found))
    return torch.cat(blocks, 1).double().cpu()


def summed_logps(model, batch, vocabulary):
    """log p(y | x) of each response in a packed batch, in float64 -> (R,)"""
    logps = adaptor_logps(model, batch, [], vocabulary)[0]
    return logps.new_zeros(batch["responses"]).index_add(0, batch["owner"], logps)


def read_samples(path, vocabulary):
    """The rows of one sample file, by prompt: {prompt ids: rows}.  SystemExit: unusable rows."""
    groups = {}
    remedy = "delete the file, generate --resume"
    for number, row in enumerate(chunk_rows(path, remedy)):
        why = why_no_sample(row, vocabulary)
        require(not why, f"{path}: row {number}: {why}; {remedy}")
        groups.setdefault(tuple(row["prompt_ids"]), []).append(row)
    require(groups, f"{path}: no rows; {remedy}")
    return groups


def why_no_sample(row, vocabulary):
    """What is wrong with a row of a sample file, or "" if nothing is."""
    for name in ("prompt", "prompt_ids", "ids", "log_q", "log_kept", "text"):
        if name not in row:
            return f"no {name}"
    if not isinstance(row["text"], str) or not isinstance(row["prompt"], str | list):
        return "text or prompt is of the wrong type"

    # Tokens, and a finite log q and log Z_t for each of them.
    if row["ids"] == [] or row["prompt_ids"] == []:
        return "no response, or no prompt"
    if not are_tokens(row["prompt_ids"], vocabulary) or not are_tokens(row["ids"], vocabulary):
        return "tokens that --model does not have"
    for name in ("log_q", "log_kept"):
        if not are_numbers(row[name], len(row["ids"])):
            return f"{name} is not a list of {len(row['ids'])} finite numbers"
    return "not as it was written" if is_changed(row) else ""


def are_tokens(ids, vocabulary):
    """Whether a value of JSON is a list of token ids."""
    if not isinstance(ids, list):
        return False
    return all(type(one) is int and 0 <= one < vocabulary for one in ids)


def are_numbers(values, n):
    """Whether a value of JSON is a list of n finite numbers."""
    return isinstance(values, list) and len(values) == n and all(map(is_number, values))


def check_samples(args, sources, vocabulary):
    """SystemExit: one of the sample files has rows that cannot be scored."""
    for path in sources:
        leave_if_stopped()
        for rows in read_samples(path, vocabulary).values():
            require_known(args, [rows[0]["prompt"]])


@torch.no_grad()
def score_chunk(args, path, model, prior, rate, vocabulary):
    """The scores of one sample file: each response's summed log-probs, and its rewards."""
    # A prompt is run once for all its responses.
    groups = list(read_samples(path, vocabulary).items())
    packed = []
    for prompt_ids, rows in groups:
        packed.append(dict(prompt_ids=list(prompt_ids), responses=[row["ids"] for row in rows]))

    # Eq. 1's ingredients: log p, log p_+ and the reward; log q is as it was when drawn.
    found = []
    for batch in pack_pairs(packed, args.tokens_per_microbatch, rank=0, world=1):
        # The rows of this batch, in the order in which its responses are packed.
        rows = []
        for i in batch["index"]:
            _, members = groups[i]
            rows += members
        log_prior = summed_logps(prior, batch, vocabulary).tolist()
        log_aligned = summed_logps(model, batch, vocabulary).tolist()
        implicit = []
        for log_p, log_p_plus in zip(log_prior, log_aligned):
            implicit.append(args.beta * (log_p_plus - log_p))  # Eq. 1, up to beta log Z
        rewards = rewards_of(args, rate, rows, implicit)
        for i, row in enumerate(rows):
            scores = {"prompt": row["prompt"]}
            scores["log_prior"] = log_prior[i]
            scores["log_aligned"] = log_aligned[i]
            scores["log_q"] = math.fsum(row["log_q"])
            scores["log_kept"] = math.fsum(row["log_kept"])
            scores["implicit"] = implicit[i]
            scores["reward"] = rewards[i]
            found.append(scores)
    return found


def score(args):
    """Write out/scores/<setting>/<chunk>.json: each response's summed log-probs, and rewards."""
    # Samples, models and reward are checked before the scores of an earlier run are touched.
    setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    prior_vocabulary = load_tokenizer(args.ref_model).get_vocab()
    problem = f"{args.model} and {args.ref_model} have different vocabularies"
    require(tokenizer.get_vocab() == prior_vocabulary, f"{problem}; give another --ref-model")
    samples = Path(args.out, "samples")
    sources = sorted(samples.glob("*/*.json"))
    problem = f"{samples}: no <setting>/<chunk>.json; first run generate with this --out"
    require(sources, problem)
    on_rank0(partial(require_chunks, args, "generate"), f"{samples}: cannot be read")
    on_rank0(partial(check_samples, args, sources, len(tokenizer)), f"{samples}: cannot be read")
    rate = load_reward(args)

    # The scores are a run of their own inside the run folder, with the flags that they were made
    # with.  --resume also begins a score that had not begun.
    out = Path(args.out, "scores")
    resume = args.resume and (out / "config.json").is_file()
    start_run(replace(args, out=str(out), resume=resume), "imh_adaptors", also=("*/",))
    model = load_model(args.model, args.dtype)
    prior = load_model(args.ref_model, args.dtype)

    # A chunk of samples becomes a chunk of scores.
    jobs = {out / source.relative_to(samples): source for source in sources}
    for path in progress(turns(list(jobs))):
        if path is not None:
            rows = score_chunk(args, jobs[path], model, prior, rate, len(tokenizer))
            write_chunk(path, rows)
        if stop_requested():
            raise SystemExit(143)  # after SIGTERM or Ctrl-C; --resume continues
    dist.barrier()  # now all chunks are there
    say(f"{len(jobs)} chunks in {out}")


# Figures: points against points.


@dataclass
class Panel:
    """One panel of a scatter plot."""

    title: str
    xlabel: str
    ylabel: str
    series: dict = field(default_factory=dict)  # {label: (n, 2) points}
    slope: float = math.nan  # of a line through the middle of each series; nan: no lines


MARKERS = "osv^DP"  # of the temperatures, the lowest first


def split_label(label):
    """kind,temperature=T -> kind, "T"; any other label -> itself, "" """
    kind, comma, temperature = label.rpartition(",temperature=")
    if comma:
        return kind, temperature
    return label, ""


def temperature_number(temperature):
    """For sorting: "" comes first, then 0.5, 1, 1.5, 10, which would sort otherwise as text."""
    return float(temperature or 0)


def scatter(path, panels, caption):
    """Draw panels with the same labels side by side into a PNG file.

    A label of the form kind,temperature=T gets its colour by kind and its marker by T.
    """
    # Four panels make a square, fewer a row.
    columns = len(panels)
    if columns == 4:
        columns = 2
    lines = math.ceil(len(panels) / columns)
    figure = Figure((4.5 * columns + 2.2, 3.9 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()

    # A colour for each adaptor and a marker for each temperature.
    labels = [split_label(label) for label in panels[0].series]
    colors = {}
    for kind, _ in labels:
        colors.setdefault(kind, f"C{len(colors)}")
    markers = {}
    for temperature in sorted({T for _, T in labels}, key=temperature_number):
        markers[temperature] = MARKERS[len(markers) % len(MARKERS)]

    # The points.
    for axis, panel in zip(axes, panels):
        for label, points in panel.series.items():
            kind, temperature = split_label(label)
            x, y = np.reshape(points, (-1, 2)).T  # also of no points
            marker = markers[temperature]
            axis.plot(x, y, marker, color=colors[kind], ms=2.5, alpha=0.7, mew=0)
            if len(x) and math.isfinite(panel.slope):
                ends = np.array([x.min(), x.max()])
                line = y.mean() + panel.slope * (ends - x.mean())
                axis.plot(ends, line, "k-", lw=0.7, label="slope -beta, of Eq. 1")
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
    same_limits(axes, panels)

    # One legend for all panels: first the colours, then the markers.
    if len(labels) > 1:
        for kind, color in colors.items():
            axes[-1].plot([], [], "o", color=color, label=kind)
        for temperature, marker in markers.items():
            if temperature:
                axes[-1].plot([], [], marker, color="grey", label=f"T = {temperature}")
    entries = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            entries[name] = handle
    if entries:
        figure.legend(entries.values(), entries, loc="outside right center", fontsize=8)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path)


def same_limits(axes, panels):
    """Give the panels that show the same two quantities the same limits."""
    alike = {}
    for axis, panel in zip(axes, panels):
        alike.setdefault((panel.xlabel, panel.ylabel), []).append(axis)
    for group in alike.values():
        lows = np.min([[*axis.get_xlim(), *axis.get_ylim()] for axis in group], axis=0)
        highs = np.max([[*axis.get_xlim(), *axis.get_ylim()] for axis in group], axis=0)
        for axis in group:
            axis.set_xlim(lows[0], highs[1])
            axis.set_ylim(lows[2], highs[3])


# The toy experiment: a thousand strings with probabilities, no model.


def toy_world():
    """p_+ ~ Dirichlet(0.1) over 1000 strings and a prior like it -> p_+, log p, r, (1000,) each

    The prior is softmax(p_+^(1/42) + noise) and r = log p_+ / p: beta = 1 and Z = 1 in Eq. 1.
    All constants and the stream, numpy's old generator, are the released ones.
    """
    stream = np.random.RandomState(42)
    p_plus = stream.dirichlet([0.1] * 1000)
    scores = p_plus ** (1 / 42) + stream.uniform(-0.42, 0.42, 1000)
    log_p = scores - np.log(np.exp(scores).sum())
    return p_plus, log_p, np.log(p_plus) - log_p


def toy_corpora(p_plus, log_p, r):
    """1000 corpora of 100,000 draws of p_+ -> their mean log p and mean r, (1000, 2)

    The draws are those of np.random.choice(1000, 100000, p=p_plus) after np.random.seed(c).
    """
    means = []
    cdf = p_plus.cumsum() / p_plus.sum()
    for c in range(1000):
        leave_if_stopped()
        u = np.sort(np.random.RandomState(c).random_sample(100_000))
        # How often each string is drawn: how many of the uniforms fall on its stretch of the cdf.
        counts = np.diff(u.searchsorted(cdf), prepend=0)
        means.append([counts @ log_p / len(u), counts @ r / len(u)])
    return np.array(means)


def stratify(points):
    """100 of the points from each tenth of their range of log p, with replacement, as released."""
    stream = np.random.RandomState(42)
    edges = np.histogram_bin_edges(points[:, 0], 10)
    tenth = edges[1:-1].searchsorted(points[:, 0], "right")
    drawn = []
    for k in range(10):
        members = points[tenth == k]
        drawn.append(members[stream.randint(0, len(members), 100)])
    return np.concatenate(drawn)


def toy(args):
    """Print and draw the toy experiment -> {strings or corpora: (n, Pearson, Spearman)}"""
    p_plus, log_p, r = toy_world()
    H = -p_plus @ np.log(p_plus)
    print(f"toy: E r {p_plus @ r:.4f} = -H(p_+) {-H:.4f} - E log p {p_plus @ log_p:.4f}")

    # By Eq. 1 the sum of the two means is the corpus's mean log p_+, and its expectation is -H.  A
    # corpus is typical, as released, if the two differ by less than 0.001.
    corpora = toy_corpora(p_plus, log_p, r)
    mean_log_p_plus = corpora.sum(1)
    typical = corpora[abs(mean_log_p_plus + H) < 0.001]
    shown = {
        "strings": np.stack([log_p, r], 1),
        "corpora": corpora,
        "typical corpora": typical,
        "typical, stratified": stratify(typical),
    }
    found = {}
    panels = {}
    for name, points in shown.items():
        pearson, spearman = correlations(points[:, 0], points[:, 1])
        found[name] = (len(points), pearson, spearman)
        title = f"{len(points)} {name}: Pearson {pearson:+.2f}"
        panels[name] = Panel(title, "mean log p (nats)", "mean r (nats)", {"": points})
        if name == "typical corpora":
            panels[name].slope = -1.0  # beta is 1
        print(f"  {name:20s} n {len(points):5d}  Pearson {pearson:+.4f}  Spearman {spearman:+.4f}")

    columns = {
        f"p_+, the aligned model: entropy {H:.2f} nats": p_plus,
        f"p, the prior: entropy {-np.exp(log_p) @ log_p:.2f} nats": np.exp(log_p),
        "r = log p_+/p, the reward: unlikely strings cost most": r,
    }
    out = Path(f"{args.out}-toy")
    hold_folder(out)
    draw_toy(out / "figures", columns, panels)
    return found


def toy_alone(args):
    """The toy experiment, with a claim of its own."""
    n, pearson, _ = toy(args)["typical corpora"]
    say_claim(*claim([pearson], [n], "in a toy of 1000 strings"), Path(f"{args.out}-toy"))


def draw_toy(folder, columns, panels):
    """Three figures, each under the name of the released notebook's.

    columns: {title: (1000,) a value of each string}; panels: {name of the points: Panel}
    """
    caption = "of the authors' repository: a toy of 1000 strings, no language model, beta 1"

    # The two distributions and the reward, string by string.
    bars = []
    for title, values in columns.items():
        name = title.split()[0].strip(",")  # p_+ and p have axes of their own: their peaks differ
        ylabel = f"probability {name}"
        if name == "r":
            ylabel = "r (nats)"
        points = np.stack([np.arange(1000), values], 1)
        bars.append(Panel(title, "number of the string", ylabel, {"": points}))
    name = "toy-distributions.png"
    seen = "The aligned model prefers a few strings, whatever the prior thinks of them"
    scatter(folder / name, bars, f"{seen}\nAs {name} {caption}")

    # Each string's reward against its log p: values, where the other panels show means.
    strings = replace(panels["strings"], xlabel="log p (nats)", ylabel="r (nats)")
    name = "toy-string-correlation.png"
    seen = "Single strings: the likelier ones earn more.  The trade-off is one of corpora"
    scatter(folder / name, [strings], f"{seen}\nAs {name} {caption}")

    # The same means over corpora.
    corpora = [panel for key, panel in panels.items() if key != "strings"]
    name = "toy-correlations.png"
    seen = "Corpora whose mean log p_+ is typical lie in a band along which reward costs likelihood"
    scatter(folder / name, corpora, f"{seen}\nAs {name} {caption}")


# The exact posterior: p_+ of Eq. 1 over listed strings of a real language model.

EXACT_TYPES = ("ancestral_strict", "top_k=5", "top_p090", "typical_p=0.5")


@dataclass
class ListedWorld:
    """The strings that may follow one prompt, with their exact prior and reward."""

    prompt: str
    ids: torch.Tensor  # (n, T) token ids, padded with the end-of-text token
    log_p: torch.Tensor  # (n,) prior, normalised over the list; float64, as all below
    reward: torch.Tensor  # (n,)
    log_Z: torch.Tensor  # () of Eq. 1
    p_plus: torch.Tensor  # (n,) Eq. 1
    covered: float  # what the language model gives to the listed strings together
    rng: np.random.Generator  # of this prompt: drew the strings, and will draw from each q


@dataclass
class ExactValues:
    """One setting in one ListedWorld, nothing sampled."""

    log_q: torch.Tensor  # (n,) Eq. 3
    log_kept: torch.Tensor  # (n,) sum_t log Z_t
    log_p_plus: torch.Tensor  # (n,) Eq. 1, token by token, as from a model
    error: float  # the largest deviation from log p + r / beta = log p_+ + log Z
    local: list = field(default_factory=list)  # E_q log p and E_q r
    globally: list = field(default_factory=list)  # E_g log p and E_g r (`global` is taken)
    log_Z_g: float = 0.0  # Eq. 4
    accept: float = 0.0  # of IMH from q to g, stationary


def exact_prompts(args, tokenizer, n):
    """The first n prompts of the test split, each once: [(text, ids), ...]

    SystemExit: one that is no text or not of the tiny world, or leaves no room for a response.
    """
    rows = load_prompts(args.data, args.prompt)
    for row in rows:
        require(isinstance(row["prompt"], str), f"{args.data}: exact needs prompts that are text")
    problem = "exact: its reward is known for the tiny world's prompts alone; take --data tiny"
    require(are_tiny_prompts([row["prompt"] for row in rows]), problem)
    texts = list(dict.fromkeys(row["prompt"] for row in rows))
    found = []
    for text in texts[:n]:
        ids = encode_prompt(text, tokenizer)
        problem = f"--max-length {args.max_length}: no room for a response to {text[:30]!r}, "
        problem += f"a prompt of {len(ids)} tokens in {args.data:.60}; raise it"
        require(len(ids) < args.max_length, problem)
        found.append((text, ids))
    return found


def listed_worlds(args, tokenizer, prior, prompts, support):
    """Draw `support` responses to each (text, ids) from the prior and list the different ones.

    The prior is the language model --ref-model given that its response is one of these.  So p is
    known by scoring, log Z is a sum, and p_+ has an exact probability for every next token.
    """
    worlds = []
    for number, (text, prompt) in enumerate(prompts):
        leave_if_stopped()

        # Strings of the prior; a string that is drawn twice is listed once.
        rng = np.random.default_rng([args.seed, number])
        uniforms = rng.random((support, args.max_length - len(prompt)))
        uniforms = torch.tensor(uniforms, device=prior.device)
        drawn = sample(prior, [prompt], support, {}, uniforms, tokenizer)

        # log p of every different string, and what its text earns.
        found = {}
        for response in drawn:
            found[tuple(response.ids)] = math.fsum(response.log_q)
        rewards = []
        for ids in found:
            rewards.append(tiny_reward(text, tokenizer.decode(ids, skip_special_tokens=True)))
        raw_log_p = torch.tensor(list(found.values()), dtype=torch.float64)
        log_p = raw_log_p.log_softmax(0)
        reward = torch.tensor(rewards, dtype=torch.float64)

        # Eq. 1 over the list: log Z is a sum.
        log_Z = (log_p + reward / args.beta).logsumexp(0)
        p_plus = (log_p + reward / args.beta - log_Z).exp()
        listed = [torch.tensor(ids) for ids in found]
        ids = pad_sequence(listed, batch_first=True, padding_value=tokenizer.eos_token_id)
        covered = raw_log_p.logsumexp(0).exp().item()
        worlds.append(ListedWorld(text, ids, log_p, reward, log_Z, p_plus, covered, rng))
    return worlds


def exact_values(world, adaptor, beta, vocabulary):
    """The expectations of a ListedWorld under local and global normalisation -> ExactValues"""
    # p_+ by its own next-token probabilities must be what Eq. 1 says of whole strings.
    log_p_plus, _ = listed_law(world.ids, world.p_plus, {}, vocabulary)
    error = world.log_p + world.reward / beta - log_p_plus - world.log_Z
    log_q, log_kept = listed_law(world.ids, world.p_plus, adaptor, vocabulary)
    values = ExactValues(log_q, log_kept, log_p_plus, error=error.abs().max().item())

    # Eq. 3 and 4: the strings' probabilities under local and under global normalisation.
    q = log_q.exp()
    log_a = log_q + log_kept  # sum_t log a_t
    g = log_a.softmax(0)
    values.local = [(q @ world.log_p).item(), (q @ world.reward).item()]
    values.globally = [(g @ world.log_p).item(), (g @ world.reward).item()]
    values.log_Z_g = log_a.logsumexp(0).item()

    # Eq. 5 with w = g / q.  move[i, j]: from i, propose j and accept it.  Strings outside the
    # support have q = g = 0: whatever weight they get, they add nothing.
    log_w = log_kept.masked_fill(log_q == -math.inf, 0)
    move = q * (log_w - log_w[:, None]).clamp(max=0).exp()
    values.accept = (g @ move.sum(1)).item()
    return values


def draw_rows(world, values, n, beta):
    """n responses drawn from q, as rows of a score file.

    Their log_Z is for whoever reads the file: with it a row can be checked against Eq. 1.
    """
    q = values.log_q.exp().numpy()
    rows = []
    for number in world.rng.choice(len(q), n, p=q / q.sum()):
        row = {"prompt": world.prompt, "log_Z": world.log_Z.item()}
        row["log_prior"] = world.log_p[number].item()
        row["reward"] = world.reward[number].item()
        row["log_aligned"] = values.log_p_plus[number].item()
        row["log_q"] = values.log_q[number].item()
        row["log_kept"] = values.log_kept[number].item()
        row["implicit"] = beta * (row["log_aligned"] - row["log_prior"])
        rows.append(row)
    return rows


def exact(args, prompts=8, support=512, draws=64, settings=None):
    """Print E log p and E r under q and g where p_+ is exactly Eq. 1, setting by setting.

    support: how many responses are drawn to list the strings of a prompt.
    settings: by default EXACT_TYPES, each at each temperature.
    -> {setting: its ExactValues, one per prompt}

    Writes `draws` draws of q for each prompt as the scores of args.out, for imh and figures.
    """
    # All processes read the prompts and the model; rank 0 works while the others wait.
    if settings is None:
        settings = all_settings(EXACT_TYPES, args.temperatures)
    tokenizer = load_tokenizer(args.ref_model)
    chosen = exact_prompts(args, tokenizer, prompts)
    prior = load_model(args.ref_model)

    def work():
        hold_folder(Path(args.out))
        worlds = listed_worlds(args, tokenizer, prior, chosen, support)
        return exact_table(args, tokenizer, worlds, settings, draws)

    return on_rank0(work, f"exact with --out {args.out}: cannot go on")


def exact_table(args, tokenizer, worlds, settings, draws):
    """Print the exact numbers of each setting, write its draws -> {setting: its ExactValues}"""
    listed = np.mean([len(world.ids) for world in worlds])
    covered = np.mean([world.covered for world in worlds])
    head = f"exact posterior: {len(worlds)} prompts, {listed:.0f} strings each"
    print(f"{head}, of mass {covered:.3f}")
    print(f"{'':32} local: log p, r | global: log p, r |  log_Z_g   accept  error of Eq. 1")

    # Setting by setting: exact numbers to the table, and draws.
    found = {}
    drawn = {}
    means = []
    for spec in settings:
        adaptor = parse_adaptor(spec, len(tokenizer))
        found[spec] = []
        drawn[spec] = []
        for world in worlds:
            leave_if_stopped()
            values = exact_values(world, adaptor, args.beta, len(tokenizer))
            found[spec].append(values)
            drawn[spec] += draw_rows(world, values, draws, args.beta)
        means.append(mean_values(found[spec]))
        worst = max(values.error for values in found[spec])
        print(f"{spec:32}", *(f"{x:8.3f}" for x in means[-1]), f"{worst:8.1e}", flush=True)

    # The draws of all settings, all at once, take the place of an earlier run's.
    scores = Path(args.out, "scores")
    partial_scores = Path(args.out, "scores.partial")
    shutil.rmtree(partial_scores, ignore_errors=True)  # left by a killed process
    with removed_on_failure(partial_scores):
        for spec, rows in drawn.items():
            write_chunk(partial_scores / spec / "00000.json", rows)
    shutil.rmtree(scores, ignore_errors=True)
    os.replace(partial_scores, scores)

    # What the exact numbers say, with no draw in them.
    means = np.array(means)  # the first four columns: E_q log p, E_q r, E_g log p, E_g r
    local, _ = correlations(means[:, 0], means[:, 1])
    globally, _ = correlations(means[:, 2], means[:, 3])
    print(f"Seen here: between settings, E log p and E r correlate {local:+.2f} under local")
    print(f"normalisation (Eq. 3), {globally:+.2f} under global normalisation (Eq. 4).")
    return found


def mean_values(values):
    """Over the prompts: E log p and E r, local and global, log Z_g, and the acceptance."""
    columns = []
    for one in values:
        columns.append([*one.local, *one.globally, one.log_Z_g, one.accept])
    return np.mean(columns, 0)


# Corpora: the scores that imh and figures read.

NUMBERS = ("log_prior", "reward", "implicit", "log_aligned", "log_q", "log_kept")  # of a Corpus


def make_corpus(rows):
    """Rows of score files -> Corpus"""
    columns = {}
    for name in NUMBERS:
        columns[name] = np.array([row[name] for row in rows])
    prompts = []
    for row in rows:
        prompt = row["prompt"]
        if not isinstance(prompt, str):  # chat messages
            prompt = json.dumps(prompt)
        prompts.append(prompt)
    return Corpus(prompts=prompts, **columns)


def read_corpora(args):
    """{setting: Corpus} of the run folder's scores, or of --csv."""
    corpora = {}
    if args.csv:
        rows = read_released(args.csv, args.beta)
        problem = f"{args.csv}: each setting needs CSVs *_{', *_'.join(RELEASED)}*"
    else:
        require_chunks(args, "score")
        rows = read_scores(Path(args.out, "scores"))
        problem = f"{args.out}: no scores; first run generate, then score, with this --out"
    require(rows and all(rows.values()), problem)
    for spec, members in rows.items():
        parse_adaptor(spec)  # a name that is no setting's ends the program here
        corpora[spec] = make_corpus(members)
    return corpora


def read_scores(folder):
    """{setting: rows} of <setting>/<chunk>.json.  SystemExit: unusable rows."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        leave_if_stopped()
        rows = chunk_rows(path, "score it again")
        for number, row in enumerate(rows):
            why = why_no_scores(row)
            require(not why, f"{path}: row {number}: {why}; score it again")
        found.setdefault(path.parent.name, []).extend(rows)
    return found


def why_no_scores(row):
    """What is wrong with a row of a score file, or "" if nothing is."""
    if not isinstance(row.get("prompt"), str | list):
        return "no prompt"
    for name in NUMBERS:
        if name not in row:
            return f"no {name}"
        if not is_number(row[name]):
            return f"{name} {row[name]!r:.20} is not a finite number"
    return "not as it was written" if is_changed(row) else ""


RELEASED = {  # kind of the authors' file: {our column: theirs}
    "scoredreward": {"reward": "score"},
    "scorednll": {"log_prior": "negative_log_probability"},
    "scoredcorrectionnll": {
        "log_aligned": "original_negative_log_probability",
        "log_q": "samplingbiased_negative_log_probability",
    },
}
# The adaptor, the temperature and the kind of file in a name such as
# MODEL_l256_promptseed42_numprompt1000_numgenerations2_top_p095_t0.5_humanassistant_scorednll.csv
RELEASED_NAME = re.compile(r"numgenerations\d+_(.+?)_t([\d.]+)_.*?(scored[a-z]+)")


@dataclass
class ReleasedRow:
    """A row of one of the authors' CSVs."""

    number: int  # from 1
    key: tuple  # prompt and text
    scores: dict  # {our column: number}, nan where there is none


def read_released(folder, beta):
    """{setting: rows} of the authors' CSVs, joined by setting, prompt and text.

    Responses without text, that are not in all three files, or with a score that is missing or
    infinite, are left out and counted.
    """
    # Three files a setting, each with a part of the columns.
    files = {}  # {setting: {kind of file: ReleasedRows}}
    for path in sorted(Path(folder).glob("*numgenerations*_t*_scored*.csv")):
        leave_if_stopped()
        match = RELEASED_NAME.search(path.name)
        if match is None or match[3] not in RELEASED:
            continue  # another file of theirs
        kind, T, end = match.groups()
        parts = files.setdefault(f"{kind},temperature={T}", {})
        parts.setdefault(end, []).extend(read_released_file(path, end))

    # What has all four columns, and numbers in them, is kept.
    found = {}
    for spec, parts in files.items():
        for end in RELEASED:
            problem = f"{folder}: {spec} has no CSV *_{end}*: each setting needs CSVs of all three"
            require(end in parts, f"{problem} kinds; copy it there")
        found[spec] = join_released(f"{folder}: {spec}: responses", parts, beta)
    return found


def read_released_file(path, end):
    """One of the authors' CSVs -> ReleasedRows.  SystemExit: no such column, or no number."""
    sign = 1 if end == "scoredreward" else -1  # they store negative log-probs
    found = []
    line = 2  # line 1 names the columns
    for number, row in enumerate(read_rows(path), 1):
        place = f"{path}:{line}"
        for column in ("prompt", "generated_text", *RELEASED[end].values()):
            problem = f"{place}: no column {column!r} in {', '.join(map(str, row)):.80}"
            require(column in row, problem)
        scores = {}
        for ours, theirs in RELEASED[end].items():
            scores[ours] = sign * csv_number(row[theirs], f"{place}: {theirs}")
        key = (str(row["prompt"]), str(row["generated_text"]))
        found.append(ReleasedRow(number, key, scores))
        line += 1 + "".join(map(str, row.values())).count("\n")  # a text may have several lines
    return found


def csv_number(value, place):
    """A number of a CSV, nan where there is none.  SystemExit: another text."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except ValueError:
        problem = f"{place} {value!r:.20} is not a number; correct it, or empty the cell"
        raise SystemExit(problem) from None


def join_released(what, parts, beta):
    """Three lists of ReleasedRows, by kind -> rows as in score files; prints what is left out."""
    # By prompt and text, in the order of the file that comes first.
    joined = {}
    first = {}
    for rows in parts.values():
        for row in rows:
            joined.setdefault(row.key, {}).update(row.scores)
            first.setdefault(row.key, row.number)

    # A text that is drawn twice cannot be told from its double, whose scores it has.
    dropped = defaultdict(list)
    seen = set()
    for row in parts["scoredreward"]:
        if row.key in seen:
            dropped["the same text again"].append(row.number)
        seen.add(row.key)

    kept = []
    for key, scores in joined.items():
        prompt, text = key
        why = why_left_out(text, scores)
        if why:
            dropped[why].append(first[key])
            continue
        implicit = beta * (scores["log_aligned"] - scores["log_prior"])
        more = {"prompt": prompt, "implicit": implicit, "log_kept": math.nan}
        kept.append(scores | more)
    if dropped:
        report(what, len(kept), dropped)
    return kept


def why_left_out(text, scores):
    """The reason to leave a response of the authors' files out, or "" if it is usable."""
    if len(scores) < 4:
        return "not in all three files"
    if not text.strip():
        return "no text"
    if any(map(math.isnan, scores.values())):
        return "a score is missing"
    if any(map(math.isinf, scores.values())):
        return "a score is infinite"
    return ""


# IMH over the corpora, its table and its figures.


@dataclass
class Record:
    """What imh found of one setting; out/imh.json is a list of these."""

    setting: str
    target: str
    prompts: int  # chains; 1 if pooled
    n: int  # strings of a corpus
    # Means of log p, reward, implicit reward and log p_+, in this order:
    local: list = field(default_factory=list)  # over the draws
    chain: list = field(default_factory=list)  # over the chains' states
    snis: list = field(default_factory=list)  # in the limit: self-normalised importance sampling
    # Of the chains, and of the limit (means over the chains):
    accept: float = math.nan  # share of the proposals that the chains accepted
    accept_limit: float = math.nan  # the same of an infinite chain
    ess: float = math.nan  # effective sample size, as a share of the draws
    log_Z: float = math.nan  # log mean w
    # Correlations of log p and a reward:
    strings: list = field(default_factory=list)  # Pearson's and Spearman's, of strings
    implicit: list = field(default_factory=list)  # the same with the implicit reward
    r_all: float = math.nan  # Pearson's of the means of 1000 corpora
    r_typ: float = math.nan  # of the typical ones of these
    n_typ: int = 0  # how many these are, or how many draws, if those are fewer: for its interval
    # {local, chain or typical: up to 100 corpora, each as four means like `local`}
    corpora: dict = field(default_factory=dict)


def imh_setting(args, spec, corpus, rng):
    """The chains of one setting, their limit, and corpora before and after -> Record"""
    # Four values of each string; their means are what corpora are compared by.
    T = parse_adaptor(spec).get("temperature", 1)
    log_p_plus = corpus.log_aligned
    if args.target == "posterior":
        # p_+ is not the model's but that of Eq. 1.  log Z(x) is unknown and stays in: this is the
        # very sum of the trade-off, log p + r / beta.
        log_p_plus = corpus.log_prior + corpus.reward / args.beta
    values = np.stack([corpus.log_prior, corpus.reward, corpus.implicit, log_p_plus], 1)
    log_w = log_weights(corpus, T, args.target, args.beta)
    pools = pools_of(corpus.prompts, args.pooled)
    record = Record(spec, args.target, prompts=len(pools), n=args.corpus_size)

    # The limit of every chain in closed form, and the chains themselves.
    limits = []
    snis = []
    for pool in pools:
        leave_if_stopped()
        limit = pool_limit(log_w[pool])
        limits.append(limit)
        snis.append(limit.weights @ values[pool])
    chains = run_chains(log_w, pools, args.chain_length, args.burn_in, rng)
    after = values[chains.states.ravel()]
    record.local = values.mean(0).tolist()
    record.chain = after.mean(0).tolist()
    record.snis = np.mean(snis, 0).tolist()
    record.accept = chains.accept
    record.accept_limit = float(np.mean([limit.accept for limit in limits]))
    record.ess = float(np.mean([limit.ess for limit in limits]))
    record.log_Z = float(np.mean([limit.log_Z for limit in limits]))

    # Corpora as drawn and after IMH.  Under global and aligned the trade-off is looked for among
    # those as drawn; these are draws of q, so that typical means near E_q log p_+.  Under posterior
    # the draws are the prior's and only the states of the chains follow Eq. 1: among those after.
    local = corpus_means(values, record.n, rng)
    chain = corpus_means(after, record.n, rng)
    if args.target == "posterior":
        compared = chain
        typical = typical_corpora(chain, after[:, LOG_P_PLUS], record.n, args.eps)
    else:
        compared = local
        typical = typical_corpora(local, log_p_plus, record.n, args.eps)
    for kind, means in (("local", local), ("chain", chain), ("typical", typical)):
        record.corpora[kind] = means[:100].tolist()

    # The trade-off: of strings, of all corpora, of typical corpora.
    record.strings = correlations(corpus.log_prior, corpus.reward)
    record.implicit = correlations(corpus.log_prior, corpus.implicit)
    record.r_all, _ = correlations(compared[:, LOG_P], compared[:, REWARD])
    record.r_typ, _ = correlations(typical[:, LOG_P], typical[:, REWARD])
    record.n_typ = min(len(typical), len(values))  # a thousand corpora of few draws know no more
    return record


def imh(args):
    """Run IMH over each setting's draws, write out/imh.json and print a table -> Records"""
    corpora = read_corpora(args)
    for corpus in corpora.values():
        check_chains(args, len(pools_of(corpus.prompts, args.pooled)))
    print(f"IMH to {args.target}: mean log p and mean reward; correlations of the two")
    head = f"{'':32}   as drawn        | chain            | limit            |"
    print(f"{head} accept  limit   ess  log_Z | strings corpora typical")

    # One line for each setting; its chance depends on the seed and its number.
    records = []
    for number, (spec, corpus) in enumerate(corpora.items()):
        leave_if_stopped()
        rng = np.random.default_rng([args.seed, number])
        record = imh_setting(args, spec, corpus, rng)
        records.append(record)
        print_record(record)
    print(what_is_seen(records))
    write(Path(args.out, "imh.json"), [asdict(record) for record in records])
    return records


def print_record(record):
    """One line of imh's table."""
    line = f"{record.setting:32}"
    for means in (record.local, record.chain, record.snis):
        line += f" {means[LOG_P]:8.3f} {means[REWARD]:7.3f} |"
    line += f" {record.accept:6.3f} {record.accept_limit:6.3f} {record.ess:5.3f}"
    line += f" {record.log_Z:6.2f} |"
    pearson, _ = record.strings
    line += f" {pearson:+7.2f} {record.r_all:+7.2f} {record.r_typ:+7.2f}"
    print(line, flush=True)


def typical_correlation(records):
    """mean_correlation of the typical corpora of these settings -> mean, low, high"""
    values = [record.r_typ for record in records]
    return mean_correlation(values, [record.n_typ for record in records])


def claim_of(records, where, beside=""):
    """The two lines of `claim` of these settings."""
    values = [record.r_typ for record in records]
    return claim(values, [record.n_typ for record in records], where, beside)


def what_is_seen(records):
    """One sentence on the trade-off between mean log p and mean reward in these records."""
    # Within a setting: the mean over the settings that have typical corpora which differ.
    typical, low, high = typical_correlation(records)
    # Between settings: one point each.
    before = np.array([record.local for record in records])
    after = np.array([record.chain for record in records])
    local, _ = correlations(before[:, LOG_P], before[:, REWARD])
    chain, _ = correlations(after[:, LOG_P], after[:, REWARD])
    seen = f"Seen here: typical corpora of one setting correlate {typical:+.2f} on average\n"
    seen += f"[{low:+.2f}, {high:+.2f}]"
    if math.isfinite(local) and math.isfinite(chain):  # of several settings, which differ
        seen += f", the means of the {len(records)} settings {local:+.2f} as drawn"
        seen += f" and {chain:+.2f} after IMH"
    if verdict(-high, -low) == "holds":
        return f"{seen}:\nreward is paid for in likelihood, as the paper finds."
    return f"{seen}:\nnot the paper's trade-off, which needs p_+ to be Eq. 1 for this very reward."


def reward_panels(records, corpora, column, ylabel, beta):
    """Strings, and corpora of each setting: as drawn, after IMH, and typical -> four Panels

    column: REWARD or IMPLICIT, which of the two is drawn against log p.
    By Eq. 1 typical corpora lie on lines of slope -beta.
    """
    strings = Panel("strings as drawn", "log p(y | x) of the prior (nats)", ylabel)
    for spec, corpus in corpora.items():
        reward = corpus.reward
        if column == IMPLICIT:
            reward = corpus.implicit
        strings.series[spec] = np.stack([corpus.log_prior, reward], 1)
    panels = [strings]

    # The typical ones are chosen among the corpora as drawn; under posterior, after IMH.
    typical = "as drawn, typical"
    if records[0].target == "posterior":
        typical = "after IMH, typical"
    n = records[0].n
    titles = {"local": "as drawn", "typical": typical, "chain": "after IMH"}
    for kind, title in titles.items():
        title = f"corpora of {n} strings {title}"
        panel = Panel(title, "mean log p of the prior (nats)", f"mean {ylabel}")
        for record in records:
            means = np.reshape(record.corpora[kind], (-1, 4))  # also of no corpora
            panel.series[record.setting] = means[:, [LOG_P, column]]
        if kind == "typical":
            panel.slope = -beta
        panels.append(panel)

    # The correlation over all points of a panel goes into its title.
    for panel in panels:
        points = np.concatenate(list(panel.series.values()))
        pearson, spearman = correlations(points[:, 0], points[:, 1])
        panel.title += f"\nPearson {pearson:+.2f}, Spearman {spearman:+.2f}"
    return panels


def read_records(path):
    """The Records that imh wrote.  SystemExit: rows that are none."""
    records = []
    for number, row in enumerate(read_rows(path)):
        why = why_no_record(row)
        require(not why, f"{path}: row {number}: {why}; run imh again with this --out")
        records.append(Record(**row))
    require(records, f"{path}: no rows; run imh again with this --out")
    return records


def why_no_record(row):
    """What is wrong with a row of imh.json, or "" if nothing is."""
    if set(row) != {column.name for column in fields(Record)}:
        return "not the columns that imh writes"
    if not isinstance(row["setting"], str) or row["target"] not in get_args(Target):
        return "no such setting or target"
    whole = type(row["n"]) is int and type(row["n_typ"]) is int
    if not whole or type(row["r_typ"]) is not float:
        return "n, n_typ or r_typ is of the wrong type"
    for name in ("local", "chain", "snis"):
        if not are_numbers(row[name], 4):
            return f"{name} is not a list of 4 finite numbers"
    if not isinstance(row["corpora"], dict):
        return "corpora is not an object"
    for kind in ("local", "chain", "typical"):
        means = row["corpora"].get(kind)
        if not isinstance(means, list) or not all(are_numbers(one, 4) for one in means):
            return f"the {kind} corpora are not lists of 4 finite numbers"
    return ""


def figures(args):
    """Draw both rewards against log p: of strings, and of corpora before and after IMH."""
    path = Path(args.out, "imh.json")
    require(path.exists(), f"{args.out}: no imh.json; first run imh with this --out")
    records = read_records(path)
    corpora = read_corpora(args)
    for record in records:
        problem = f"{path}: has {record.setting}, of which there are no scores; run imh again"
        require(record.setting in corpora, problem)
    ylabel = "reward (the judge's unit)"
    draw_reward(args, records, corpora, REWARD, ylabel, "correlations.png")
    if all(np.ptp(corpus.implicit) == 0 for corpus in corpora.values()):
        print("implicit reward: the same for every response, since p_+ is the prior; no figure")
    else:
        ylabel = "implicit reward (nats)"
        draw_reward(args, records, corpora, IMPLICIT, ylabel, "correlations_dpo_secret.png")
    print(f"figures in {Path(args.out, 'figures')}")


def draw_reward(args, records, corpora, column, ylabel, name):
    """One figure of four panels, under the name of the authors' figure."""
    leave_if_stopped()
    panels = reward_panels(records, corpora, column, ylabel, args.beta)
    seen = what_is_seen(records)
    if column == IMPLICIT:
        seen = "The implicit reward beta log p_+ / p is the one for which p_+ is Eq. 1:\n"
        seen += "typical corpora lie near its line, whatever the reward of correlations.png does"
    caption = f"{seen}\n{setting(args)}, beta {args.beta:g};\n"
    caption += f"IMH to the target {records[0].target}; as {name} of the authors' repository"
    scatter(Path(args.out, "figures", name), panels, caption)
    titles = [panel.title.replace("\n", " ") for panel in panels]
    print(f"{name}: {'; '.join(titles)}")


# The default run's main figure: the exact posterior, and beside it a model that was trained.

PLAIN = "ancestral_strict,temperature=1"  # the model itself, no adaptor
WHY = (
    "why not of DPO: few pairs and updates do not bring its p_+ to p exp(r / beta) / Z, so that\n"
    "log p + r / beta differs from log p_+ + log Z, and typical corpora may gain or lose both"
)


def exact_options(args):
    """The options of exact, and of imh and figures on its draws."""
    # The model is no file here: it is the name in captions.
    return replace(args, model="exact posterior", target="global", out=f"{args.out}-exact")


def dpo_options(args):
    """The options to look at the DPO run beside the run folder as it is; None if there is none.

    It is a finished run of methods/dpo.py on the tiny world, as run_all.sh leaves it.
    """
    folder = Path(args.out).parent / "dpo"
    config = folder / "config.json"
    if not (folder / "model").is_dir() or not config.is_file():
        return None
    flags = json.loads(config.read_bytes())
    if flags.get("data") != "tiny" or not is_number(flags.get("beta")):
        return None
    out = f"{args.out}-dpo"
    return replace(
        args,
        model=str(folder),
        sampling_types=("ancestral_strict",),
        temperatures=(1.0,),
        samples=4 * args.samples,
        target="global",
        beta=flags["beta"],
        out=out,
        resume=args.resume and Path(out).exists(),
    )


def plain_record(args):
    """The Record of the model itself in a run folder."""
    for record in read_records(Path(args.out, "imh.json")):
        if record.setting == PLAIN:
            return record
    raise SystemExit(f"{args.out}/imh.json: no setting {PLAIN}; run imh again with this --out")


def draw_tradeoff(axis, record, beta, title):
    """Corpora of one model, all and typical: reward against log p."""
    # Deviations from what the strings have on average, in standard deviations of the corpora, so
    # that models can be compared.
    centre = np.array(record.local)
    spread = np.std(np.reshape(record.corpora["local"], (-1, 4)), axis=0)
    spread[spread == 0] = 1  # of a setting whose corpora are all the same
    labels = {"local": f"100 corpora of {record.n} strings", "typical": "typical corpora"}
    for kind, color in (("local", "0.7"), ("typical", "C0")):
        means = (np.reshape(record.corpora[kind], (-1, 4)) - centre) / spread
        axis.plot(means[:, LOG_P], means[:, REWARD], "o", ms=3, color=color, label=labels[kind])

    # Eq. 1: the sum of log p and r / beta is the same for all typical corpora.
    slope = -beta * spread[LOG_P] / spread[REWARD]
    axis.axline((0, 0), slope=slope, color="k", lw=1, label=f"Eq. 1: slope -beta = -{beta:g}")
    value, low, high = typical_correlation([record])
    seen = f"typical corpora correlate {value:+.2f} [{low:+.2f}, {high:+.2f}]"
    axis.set_title(f"{title}\n{seen}", fontsize=9)
    unit = f"less its expectation, divided by its sd of {spread[LOG_P]:.2g} nats"
    axis.set_xlabel(f"mean log p of the prior,\n{unit}")
    unit = f"less its expectation, divided by its sd of {spread[REWARD]:.2g}"
    axis.set_ylabel(f"mean true reward,\n{unit}")
    axis.set(xlim=(-4, 4), ylim=(-4, 4))
    axis.legend(fontsize=8)


def conclude(args, known, trained):
    """The default run's main figure, and its claim.

    known, trained: the options of the exact posterior and of the DPO run, or None.
    """
    panels = {"exact posterior: p_+ is Eq. 1 by construction": known}
    beside = ""
    caption = "Is reward paid for in likelihood?  The built-in tiny world, not the paper's models"
    if trained is None:
        say(f"no finished DPO run in {Path(args.out).parent}: python methods/dpo.py trains one")
    else:
        panels[f"{trained.model}: Eq. 1 need not hold"] = trained
        record = plain_record(trained)
        beside = f"; of {trained.model}, where Eq. 1 need not hold, {record.r_typ:+.2f}"
        caption += f"\n{WHY}"
        say(WHY)

    figure = Figure((5.2 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, options) in zip(axes, panels.items()):
        draw_tradeoff(axis, plain_record(options), options.beta, title)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, Path(args.out, "figures", "tradeoff.png"))

    # The claim is that of all settings of the exact posterior.
    shown = read_records(Path(known.out, "imh.json"))
    lines = claim_of(shown, "in the tiny world, of its exact posterior,", beside)
    say_claim(*lines, Path(args.out))


def conclude_alone(args):
    """The claim of one run folder's imh.json."""
    where = f"on {args.csv or args.data}, model {args.model},"
    if args.data == "tiny" and not args.csv:
        where = f"in the tiny world, model {args.model},"
    say_claim(*claim_of(read_records(Path(args.out, "imh.json")), where), Path(args.out))


RANGES = {  # option: its least and largest value
    "temperatures": (1e-6, 1e5),  # as `parse_adaptor` reads them from a name
    "prompts": (1, 10**9),
    "samples": (1, 10**6),
    "beta": (1e-9, 1e9),
    "chain_length": (2, 10**9),  # of one step no proposal could be accepted
    "burn_in": (0, 10**9),
    "corpus_size": (1, 10**9),
    "eps": (1e-9, 1e9),
    "max_length": (2, 2**30),
}


def check(args, command):
    """Refuse bad numbers, and --csv where it is not read, before anything is loaded."""
    # Numbers by themselves, and by what they would take.
    check_ranges(args, RANGES)
    problem = f"--burn-in {args.burn_in}: must be below --chain-length {args.chain_length}"
    require(args.burn_in < args.chain_length, problem)
    check_chains(args, chains=1)
    size = 1000 * args.corpus_size * CORPUS_BYTES
    require_memory(f"--corpus-size {args.corpus_size}", "1000 corpora", size)
    rows = max(args.batch_size, args.samples)
    size = rows * args.max_length * 8
    flag = f"--max-length {args.max_length}"
    require_memory(flag, f"the uniforms of {rows} responses", size)

    # Options that are no numbers.
    reads_csv = command in ("imh", "figures")
    problem = f"--csv: {command} does not read it; run imh, then figures, with this --csv"
    require(reads_csv or not args.csv, problem)
    require("{}" in args.template, "--template: needs {} where the prompt goes")
    require(args.sampling_types, "--sampling-types: give one at least")
    for spec in all_settings(args.sampling_types, args.temperatures):
        parse_adaptor(spec)


def alone(function, args):
    """function(args) by rank 0, while the others wait: if it leaves, they all do."""

    def work():
        if Path(args.out).is_dir():
            hold_folder(Path(args.out))
        function(args)

    on_rank0(work, f"{function.__name__} with --out {args.out}: cannot go on")


def main(args, command="all"):
    check(args, command)
    setup(args.seed)
    tiny = args.data == "tiny" and args.reward == "tiny" and args.prompt == ""
    known = exact_options(args)

    # Without an aligned model the prior proposes, and IMH alone goes to Eq. 1.
    if command == "all" and args.model == args.ref_model:
        say(f"IMH from the prior {args.ref_model} to the posterior of Eq. 1: --target posterior")
        args = replace(args, target="posterior")
    run_commands(args, command)

    # A toy, and a p_+ that is Eq. 1 to the last digit; all runs it where the reward is known.
    if command == "toy":
        alone(toy_alone, args)
    if command == "all":
        alone(toy, args)
    if command == "exact" or (command == "all" and tiny):
        exact(known)
        alone(imh, known)
        alone(figures, known)
    if command == "exact":
        alone(conclude_alone, known)

    # How it ends: the exact posterior and, if there is one, the DPO run; else what imh found.
    if command == "all" and tiny:
        trained = dpo_options(args)
        if trained is not None:
            run_commands(trained, command)
        work = partial(conclude, args, known, trained)
        on_rank0(work, f"{args.out}: cannot be concluded")
    elif command in ("all", "imh"):
        alone(conclude_alone, args)


def run_commands(args, command):
    """Generate, score, imh and figures, or one of them."""
    # Generate and score use every process; the rest is light and needs one.
    if command in ("all", "generate"):
        generate(args, to_score=command == "all")
    if command in ("all", "score"):
        score(args)
    if command in ("all", "imh"):
        alone(imh, args)
    if command in ("all", "figures"):
        alone(figures, args)


if __name__ == "__main__":
    main(args, command)
