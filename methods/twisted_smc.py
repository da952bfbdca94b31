"""Twisted sequential Monte Carlo (SMC) for language models.

Zhao, Brekelmans, Makhzani, Grosse 2024, https://arxiv.org/abs/2404.17546

    target, Eq. 1        sigma(s_{1:T}) = p0(s_{1:T}) phi(s_{1:T}) / Z
    twisted, Eq. 9       pi_t = p0(s_{1:t}) psi_t(s_{1:t}) / Z_t  for t < T,  pi_T = sigma
    proposal, Eq. 14-15  q = p0 psi_t / Z^pi_t,  Z^pi_t = sum_v p0(v | s_{1:t-1}) psi_t(s_{1:t-1}, v)
    weights, Eq. 10, 16  w_t = p0 psi_t / (q psi_{t-1}) = Z^pi_t / psi_{t-1};  at T, phi in place of psi_T
    estimate, Eq. 8      Z-hat = product over blocks of mean_k prod_t w_t^k,  E Z-hat = Z
    bounds, Eq. 24       E log Z-hat <= log Z <= E log Z-hat with one exact sample retained

    python methods/twisted_smc.py                            tiny world, all six learners, about a minute
    python methods/twisted_smc.py --world w1                 enumerable world: estimates beside exact values
    python methods/twisted_smc.py toxicity --learner ctl     a row of the paper's Table 2 (GPU, hub)
    torchrun --standalone --nproc-per-node 4 methods/twisted_smc.py infilling --learner dpg

Presets: tiny, world | toxicity, sentiment, infilling, infilling-2-1: Tables 2, 3, 4, 8 | toxicity-v1,
sentiment-v1, infilling-v1, infilling-2-1-v1: with the first release's updates | toxicity-exact,
sentiment-exact: Tables 9, 10 | toxicity-threshold: Fig. 3 | toxicity-story, sentiment-review: App. H.1.
Differs from the paper: no resampling after t = 1 under the twist proposal, where all weights are equal;
losses are means over t where Table 1 sums, as in the released code, whose learning rates need it.
Differs from the released code: FUDGE continues each exact prefix s_{1:t} itself (--legacy-fudge: s_{1:t-1},
so that the label of s_t ignores s_t); RL averages q-samples and exact samples; PPO trains its critic, without
dropout; rejection gives exact samples for every bounded potential, whatever beta; no prefix is sampled twice.
Tiny world, seed 0: 64 updates bring both KLs below 0.1 nats; rl, with bootstrapped targets, needs hundreds.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

LEARNERS = ("ctl", "rl", "sixo", "fudge", "dpg", "ppo")


@dataclass
class Args:
    learner: Literal[LEARNERS + ("all", "policy", "none")] = "all"  # policy: evaluate --policy; none: psi = 1
    potential: str = "tiny:monster"  # class, threshold, reward, infilling, continuation, tiny:..., x.py:name
    beta: float = 1.0  # phi^beta, Eq. 19: sigma ~ p0 exp(beta r), beta being 1 / DPO's
    T: int = 8  # tokens generated
    c: int = 0  # infilling: tokens that follow, on which sigma and the twist are conditioned
    K: int = 64  # particles per update and prompt, or per condition
    conditions: int = 1  # infilling, per update: ctl so many of K particles, others conditions * K of one
    twist: Literal["linear", "mlp", "body", "body-mlp"] = "mlp"  # head on p0's states, or on a trained copy's
    proposal: Literal["twist", "base"] = "twist"  # of the bounds
    scheme: Literal["systematic", "stratified", "multinomial"] = "systematic"  # the paper: multinomial
    tau: float = 2.0  # resample where ESS < tau K: above 1 at every step (the paper), 0 never
    stop_at_eos: bool = False  # the end token absorbs; the paper draws T tokens whatever they are
    legacy_fudge: bool = False  # infilling: FUDGE's labels as in the released code
    train_on_exact: bool = False  # positives are exact samples (Tables 9, 10)
    world: Literal["", "w1", "w2"] = ""  # an enumerable world instead of the model
    prompts: tuple[str, ...] = ("\n\nHuman: Tell me a story about a fox in a cave.\n\nAssistant: Fine. "
                                "Once a fox lived in a cave. It",)  # one or several
    continuation: str = ""  # what follows: for the potential "continuation", or to --show under "infilling"
    classifier: str = ""  # sequence classification model of the potentials class, threshold, reward
    label: int = 0  # its class; a single logit has class 0: sigmoid(-logit) and 1: sigmoid(logit)
    threshold: float = 0.0  # eta: phi = 1[score < eta] + floor; score: the logit, or logit 1 less logit 0
    floor: float = 1e-16  # released code
    policy: str = ""  # a causal LM with the model's tokenizer, evaluated as q
    exact: int = 200  # exact samples, for upper bounds and KL(sigma | q); 0: none
    exact_folder: str = ""  # where they are kept and found again; empty: the run folder
    bound_K: tuple[int, ...] = (8, 32)  # particles of the bounds; the KLs use the last
    runs: int = 8  # R, runs of each bound, of each process
    show: int = 0  # weighted samples to print after training
    seeds: int = 1  # repetitions: seed, seed + 1, ...
    model: str = "tiny"  # p0: tiny, a local folder or a hub id
    lrs: tuple[float, ...] = (3e-3, 3e-4, 3e-3, 3e-3, 3e-3, 3e-3)  # Adam, in the order above, or one
    max_steps: int = 64  # updates
    eval_every: int = 16  # 0: after 0, 2, 4, 8, ... updates (the paper's epochs)
    save_every: int = 0  # 0: at the end
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of p0; twists stay float32
    seed: int = 0
    out: str = ""  # run folder; empty: results/twisted_smc, with the preset's name if there is one
    resume: bool = False  # continue from the newest checkpoints
    overwrite: bool = False  # delete the run that is in the run folder


RATES = (1e-4, 3e-5, 3e-5, 1e-4, 3e-5, 1e-6)
TOXICITY = Args(  # App. G: prompt, T, K, evaluation; updates and rates: the released code's last commands
    model="roneneldan/TinyStories-33M", prompts=("Once upon a time, there was a",), T=20, K=100, exact=2000,
    runs=4, bound_K=(32, 500), scheme="multinomial", classifier="nicholasKluge/ToxicityModel",
    potential="class", twist="body", lrs=(3e-5, *RATES[1:]), max_steps=2048, eval_every=0)
SENTIMENT = replace(  # label 0: one star of five
    TOXICITY, model="gpt2-medium", prompts=("I bought this",), T=10, twist="mlp",
    classifier="LiYuan/amazon-review-sentiment-analysis", lrs=(1e-4, 1e-4, 1e-4, 1e-3, 1e-4, 1e-5))
INFILLING = replace(TOXICITY, potential="infilling", T=15, c=10, twist="body-mlp", K=4, conditions=25,
                    runs=30, lrs=(3e-6, 3e-5, 1e-4, 1e-6, 1e-4, 3e-5), max_steps=5500, eval_every=500)
TWO_ONE = replace(INFILLING, T=2, c=1, K=10, conditions=10, lrs=(1e-4,) * 5 + (3e-5,), max_steps=8192,
                  eval_every=0)
PRESETS = {
    "tiny": Args(),
    "world": Args(world="w1", conditions=10, lrs=(0.03,) * 6, max_steps=128, eval_every=0, runs=99, exact=99),
    "toxicity": TOXICITY, "toxicity-v1": replace(TOXICITY, max_steps=4096, lrs=RATES),
    "toxicity-exact": replace(TOXICITY, max_steps=64, train_on_exact=True, lrs=RATES),
    "toxicity-threshold": replace(
        TOXICITY, potential="threshold", threshold=-5.0, T=10, K=1000, twist="mlp", lrs=(1e-4,) * 6, runs=20,
        max_steps=5000, eval_every=500, exact=100, bound_K=(4, 8, 16, 32, 128, 512, 2048)),
    "toxicity-story": replace(TOXICITY, T=200, beta=10.0, twist="linear", K=32, lrs=(3e-4,) * 6, exact=0,
                              max_steps=2500, eval_every=250, bound_K=(8, 32), show=4),
    "sentiment": SENTIMENT, "sentiment-v1": replace(SENTIMENT, max_steps=4096),
    "sentiment-exact": replace(SENTIMENT, max_steps=512, train_on_exact=True, lrs=(1e-4,) * 6),
    "sentiment-review": replace(SENTIMENT, T=20, beta=1e2, twist="linear", max_steps=16384, exact=0, show=4),
    "infilling": INFILLING, "infilling-v1": replace(INFILLING, max_steps=6000),
    "infilling-2-1": TWO_ONE, "infilling-2-1-v1": replace(TWO_ONE, max_steps=16384)}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "world" if any(flag.split("=")[0] == "--world" for flag in sys.argv) else "tiny"
    preset = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else preset
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    name = "twisted_smc" if preset == "tiny" else f"twisted_smc-{preset}"
    args = tyro.cli(Args, default=replace(PRESETS[preset], out=f"results/{name}"), description=__doc__)

import copy
import hashlib
import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (decode_step, load_checkpoint, load_model, load_tokenizer, log, model_folder, prefill,
                    reorder, require, sample_tokens, save_checkpoint, setup, start_run, stay_in_place,
                    stop_requested, tiny_attributes, tiny_reward)

# ---- Sections 2, 3 and 5: SMC and its bounds


def ess(log_w):
    """Effective sample size 1 / sum_k w_k^2 of log-weights (..., K), in [1, K]; 0 if all are -inf."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def resample(log_w, u, scheme="systematic", slot=None):
    """Ancestors (N, K) of N runs: particle k has K w_k offspring on average.  log_w (N, K), u (N, K + 1).

    slot (N, 1): the retained particle.  It has an offspring for certain, in the slot that is returned beside
    the ancestors; the others follow the scheme's law given that, as Prop. 5.1 needs.
    """
    w, K, u, home = log_w.softmax(-1), log_w.shape[1], 1 - u, slot  # u in (0, 1] never hits one with w = 0
    cdf, grid, shift = w.cumsum(-1), torch.arange(K, device=w.device), u[:, :1]
    if slot is not None:
        x = cdf.gather(1, slot) - w.gather(1, slot) * (1 - u[:, K:])  # uniform on the retained one's stretch
        home = slot if scheme == "multinomial" else (K * x).ceil().long().clamp(1, K) - 1
        shift = K * x - home
    points = {"multinomial": u[:, :K], "stratified": (grid + u[:, :K]) / K, "systematic": (grid + shift) / K}
    ancestors = torch.searchsorted(cdf, points[scheme] * cdf[:, -1:]).clamp(max=K - 1)
    return ancestors if slot is None else ancestors.scatter(1, home, slot), home


def log_sum_exp(x):
    """(n, V) -> (n,) float64; a few rows at a time stay in the CPU's cache."""
    return torch.cat([rows.logsumexp(-1) for rows in x.split(8 if x.is_cpu else len(x))]).double()


def smc(scores, log_phi, T, K, N=1, *, proposal="twist", scheme="systematic", tau=2.0, first=None,
        retained=None, eos=None, draw=sample_tokens, resampler=resample):
    """Alg. 1, and Alg. 2 with `retained`: N independent runs of twisted SMC with K particles each.

    scores(last, ancestors) -> logits, log_psi: (N K, V) each, unnormalised log p0(. | s_{1:t-1}) and twists
        log psi_t(s_{1:t-1}, .), None for psi = 1.  It first reorders its state by `ancestors` (N K,), then
        appends the tokens `last` (N K,); either is None where there is nothing to do.
    log_phi(tokens (N, K, T)) -> (N, K), the terminal potential; -inf is allowed.
    proposal: "twist" (Eq. 14) or "base", q = p0.  tau: a run resamples where ESS < tau K: 0 never (SIS),
        above 1 at every step.  first: after t = 1 too?  Default: only under "base"; else w_1 is Z^pi_1.
    retained (N, R, T): tokens forced on the first R particles, -1 leaves one free.  With resampling R must be
        1, and that particle survives.
    eos: absorbing end token; a finished particle keeps its slot, its psi and its weight.
    -> tokens (N, K, T); log_w (N, K) since the last resampling; log_Z (N,); log_phi (N, K); ess (N, T) before
       resampling; along each particle's ancestry (N, K, T): log_p, log_q, log_psi, lineage (the slot it stood
       in) and log_norm = log Z^pi_t(s_{1:t-1}).  Weights are float64, in log space throughout.
    """
    steps, jumps, ess_of, last, ancestors, log_Z = [], [], [], None, None, 0.0
    for t in range(T):
        logits, log_psi = scores(last, ancestors)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if t == 0:
            here = dict(device=logits.device)
            run, ended = K * torch.arange(N, **here)[:, None], torch.zeros(N * K, dtype=torch.bool, **here)
            acc = psi_before = torch.zeros(N, K, dtype=torch.float64, **here)
            slot = None if retained is None else torch.arange(retained.shape[1], **here).repeat(N, 1)
        if ended.any():  # p0 is 1 on the end token, and psi what it was
            other = ended[:, None] & (torch.arange(logits.shape[1], **here) != eos)
            logits = logits.masked_fill(other, -torch.inf)
            frozen = psi_before.view(-1, 1)
            log_psi = None if log_psi is None else torch.where(ended[:, None], frozen, log_psi)
        joint = logits if log_psi is None else logits + log_psi
        chances = joint if proposal == "twist" else logits
        tokens, log_q = draw(chances, torch.rand(N * K, dtype=torch.float64, **here))
        norm_q = chances.gather(1, tokens[:, None])[:, 0].double() - log_q  # log-sum-exp without another pass
        if retained is not None:
            forced, tokens = retained[:, :, t], tokens.view(N, K)
            tokens = tokens.scatter(1, slot, torch.where(forced < 0, tokens.gather(1, slot), forced)).view(-1)
        of_token = lambda x, tokens=tokens: x.gather(1, tokens[:, None])[:, 0].double()
        norm_p = norm_q if chances is logits else log_sum_exp(logits)
        log_norm = (norm_q if chances is joint else log_sum_exp(joint)) - norm_p  # log Z^pi_t, Eq. 15
        psi = torch.zeros_like(norm_p) if log_psi is None else of_token(log_psi)
        log_p, log_q = of_token(logits) - norm_p, of_token(chances) - norm_q
        log_w = (log_norm if proposal == "twist" else psi).view(N, K) - psi_before  # Eq. 16; Eq. 10 if q = p0
        acc = torch.where(acc == -torch.inf, acc, acc + log_w)
        steps.append([x.view(N, K) for x in (tokens, log_p, log_q, psi, log_norm)])
        psi_before, last, ancestors, jump = psi.view(N, K), tokens, None, torch.arange(K, **here).repeat(N, 1)
        ended = ended if eos is None else ended | (tokens == eos)
        ess_of.append(ess(acc))
        now = (ess_of[-1] < tau * K) & (ess_of[-1] > 0) & (t < T - 1)
        if now.any() and (t > 0 or (proposal == "base" if first is None else first)):
            parents, home = resampler(acc, torch.rand(N, K + 1, dtype=torch.float64, **here), scheme, slot)
            parents = torch.where(now[:, None], parents, jump)
            ancestors = stay_in_place((run + parents).view(-1))  # survivors keep their slot
            jump = ancestors.view(N, K) - run
            if retained is not None:  # the r-th offspring of the retained particle remains the r-th
                r = (parents == slot).cumsum(-1).gather(1, torch.where(now[:, None], home, slot))
                slot = ((jump == slot) & ((jump == slot).cumsum(-1) == r)).int().argmax(-1, keepdim=True)
            log_Z = log_Z + torch.where(now, acc.logsumexp(-1) - math.log(K), 0.0)
            acc, psi_before = torch.where(now[:, None], 0.0, acc), psi_before.gather(1, jump)
            last, ended = last[ancestors], ended[ancestors]
        jumps.append(jump)
    lineage = [torch.arange(K, **here).repeat(N, 1)]
    for jump in jumps[-2::-1]:
        lineage.insert(0, jump.gather(1, lineage[0]))
    paths = (torch.stack([x.gather(1, at) for x, at in zip(column, lineage)], -1) for column in zip(*steps))
    S = SimpleNamespace(**dict(zip(("tokens", "log_p", "log_q", "log_psi", "log_norm"), paths)))
    S.log_phi, S.lineage = log_phi(S.tokens).double(), torch.stack(lineage, -1)
    S.log_w = torch.where(acc == -torch.inf, acc, acc + S.log_phi - psi_before)  # phi takes psi_T's place
    S.log_Z = log_Z + S.log_w.logsumexp(-1) - math.log(K)  # Eq. 8
    S.ess = torch.stack([*ess_of[:-1], ess(S.log_w)], -1)
    return S


def log_Z_bounds(run, exact, K):
    """Stochastic bounds on log Z (Prop. 5.1) of R runs each, {name: (R,)}, and the runs of the lower ones.

    run(K, N, tau=..., retained=...) calls smc.  exact (R, T): exact samples of sigma (others would void the
    upper bounds), or the number R: lower bounds only.  smc_*: as `run` resamples; sis_*: never, i.e. IWAE,
    which for K = 1 is F_q = E_q log w <= log Z <= G_q = E_sigma log w.
    """
    R, held = (exact, None) if isinstance(exact, int) else (len(exact), exact[:, None])
    sis, twisted = run(K, R, tau=0.0), run(K, R)
    bounds = dict(sis_lower=sis.log_Z, smc_lower=twisted.log_Z)
    if held is not None:
        bounds["sis_upper"] = run(K, R, tau=0.0, retained=held).log_Z
        bounds["smc_upper"] = run(K, R, retained=held).log_Z
    return bounds, sis, twisted


# ---- Section 4, Table 1: the learners' losses, means over t.  log psi_t(s_{1:t}) (..., K, T) -> losses (...)


def ctl_loss(log_psi, W, log_psi_neg, w_neg):
    """Contrastive twist learning, Eq. 21-22: sum_t KL(sigma(s_{1:t}) | pi_t); leaves each psi_t a constant.

    W (..., K) ~ p0 phi / q of the whole sequence, for every t; w_neg (..., K, T) ~ p0 psi_t / q of prefixes;
    both sum to 1 over K.  The value is a surrogate, its gradient that of the KL.
    """
    positive = (W[..., None].detach() * log_psi).sum(-2)  # E_sigma log psi_t
    negative = (w_neg.detach() * log_psi_neg).sum(-2)  # E_pi_t log psi_t
    return -(positive - negative).mean(-1)


def rl_loss(log_psi, targets):
    """Soft-Q, App. C.1.1.  targets (..., K, T): log sum_v p0 psi_{t+1} for t < T, log phi for T."""
    return (targets.detach() - log_psi).square().mean((-2, -1))


def sixo_loss(log_psi, W, log_psi_neg):
    """Noise contrastive estimation, App. C.3: prefixes of sigma, weighted W (..., K), against p0's."""
    positive = (W[..., None].detach() * F.logsigmoid(log_psi)).sum(-2)
    return -(positive + F.logsigmoid(-log_psi_neg).mean(-2)).mean(-1)


def fudge_loss(logits, phi):
    """App. C.4: cross-entropy between psi_t = sigmoid(logits) and phi in [0, 1] of a continuation by p0."""
    return -(phi * F.logsigmoid(logits) + (1 - phi) * F.logsigmoid(-logits)).mean((-2, -1))


def dpg_loss(log_q, W):
    """App. E.3: KL(sigma | q) but for a constant.  psi_t is free up to c(s_{1:t-1}): no pi_t (Prop. E.2)."""
    return -(W[..., None].detach() * log_q).sum(-2).mean(-1)


def gae(rewards, values, lam=0.95):
    """Generalised advantages (..., T), gamma = 1 -> advantages, returns, whitened advantages."""
    advantages = rewards + F.pad(values[..., 1:], (0, 1)) - values
    for t in reversed(range(rewards.shape[-1] - 1)):
        advantages[..., t] += lam * advantages[..., t + 1]
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    return advantages, advantages + values, whitened


def ppo_loss(log_q, old_log_q, advantages, values, old_values, returns, clip=0.2, vf=0.1):
    """App. E.2: clipped policy and value losses; rewards (log phi - log q / p0) / beta give KL(q | sigma)."""
    ratio, near = (log_q - old_log_q).exp(), old_values + (values - old_values).clamp(-clip, clip)
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    value = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
    return (policy + vf * value).mean((-2, -1))


class Twist(nn.Module):
    """App. G.2: log psi_t(s_{1:t-1}, .) of every next token from the hidden state z (..., d) of s_{t-1}.

    layers: 1 (linear) or 3 (MLP).  condition: z is joined by e (..., d), the hidden state of o's last token.
    body: a trainable transformer; None: z comes from the frozen base model, which runs anyway.  log_sigmoid:
    FUDGE's psi in (0, 1).  Weights are Xavier normal and biases 0: log psi starts near 0, q near p0.
    """

    def __init__(self, d, V, layers=1, condition=False, body=None, log_sigmoid=False):
        super().__init__()
        self.body, self.condition, self.log_sigmoid, d = body, condition, log_sigmoid, d * (1 + condition)
        self.layers = nn.ModuleList(nn.Linear(d, V if i == layers - 1 else d) for i in range(layers))
        self.critic = nn.Linear(d, 1)  # PPO's value of s_{1:t-1}
        for layer in [*self.layers, self.critic]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, e=None, tokens=None, raw=False, critic=False):
        """-> (..., V), or only the entries of `tokens` (...), which needs no V-sized tensor; raw: logits."""
        z = (z if e is None else torch.cat([z, e.expand(*z.shape[:-1], -1)], -1)).to(self.critic.weight.dtype)
        if critic:
            return self.critic(z)[..., 0]
        for layer in self.layers[:-1]:
            z = layer(z).relu()
        head = self.layers[-1]
        out = head(z) if tokens is None else (z * head.weight[tokens]).sum(-1) + head.bias[tokens]
        return F.logsigmoid(out) if self.log_sigmoid and not raw else out


# ---- Worlds: a target and how to run through it.  V, T, c, B (prompts; case n has prompt n % B), d, eos, and
#   start(N, K, o, body) -> step(last, ancestors) -> hidden states (N K, d), logits (N K, V) = head(hidden)
#   log_phi(tokens (N, K, T), o) -> (N, K);  log_bound >= log phi, or None;  floor of phi, or None
#   conditional: o (N, c) is what follows (infilling, Sec. 3.3); o: the tokens of --continuation
#   embed(twist, o) -> e or None;  hidden(body, tokens) -> z (N, K, T, d), with gradient into a body


def markov_world(name):
    """Enumerable, V = 3.  w1: T = 3, phi a sigmoid; w2: T = 2, o = s_3.  Hidden states are one-hot in
    (o, prefix), so that a linear twist is a table."""
    A = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    first, c = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log(), int(name == "w2")
    table = torch.cat([first, A, A.repeat(3, 1)])  # log p0 after each of 1 + 3 + 9 prefixes

    def start(N, K, o=None, body=None):
        row = torch.zeros(N * K, dtype=torch.long)
        block = 0 if o is None else 13 * o[:, 0].repeat_interleave(K)

        def step(last, ancestors):
            nonlocal row
            row = row if ancestors is None else row[ancestors]
            row = row if last is None else 3 * row + 1 + last
            return F.one_hot(block + row, 13 * 3**c).double(), table[row]
        return step

    def log_phi(s, o):
        if c:
            return A[s[..., 1], o]
        s = s.double()
        return F.logsigmoid(-1 + s @ s.new_tensor([0.8, -0.6, 1.1]) + 0.5 * (s[..., 0] == s[..., 2]))

    return SimpleNamespace(
        V=3, T=3 - c, c=c, B=1, d=13 * 3**c, eos=None, start=start, log_phi=log_phi, log_bound=0.0,
        floor=None, conditional=c > 0, head=lambda h: h @ table.repeat(3**c, 1), embed=lambda twist, o: None)


def lm_world(model, tokenizer, args):
    """A causal LM and the potential args.potential, after one prompt or several of any lengths."""
    prompts, device, T = [tokenizer(text).input_ids for text in args.prompts], model.device, args.T
    head, B, phi = model.get_output_embeddings(), len(prompts), potential(args, tokenizer, model.device)
    V = min(len(tokenizer), len(head.weight))  # ids beyond the tokenizer's are never drawn
    c, room = len(phi.o or ()) or args.c, model.config.max_position_embeddings
    for i, n in enumerate(map(len, prompts)):
        require(0 < n <= room - T - c, f"prompt {i}: has {n} tokens; with {T + c} to follow in a context of "
                f"{room} it must have 1 to {room - T - c}")

    def start(N, K, o=None, body=None):
        lm, cache = body or model, None

        def step(last, ancestors):
            nonlocal cache
            if cache is None:
                each = prompts if B == 1 else [prompts[n % B] for n in range(N)]
                cache, h, logits = prefill(lm, each, T + c, copies=N * K // len(each))
            else:
                reorder(cache, ancestors) if ancestors is not None else None
                h, logits = decode_step(lm, cache, last)
            return h.float(), logits[:, :V].float()
        return step

    def each(f, tokens):  # f(ids (n, P + t) of one prompt) -> (n, ...), for tokens (N, K, t) -> (N, K, ...)
        rows = [torch.cat([torch.tensor(prompt, device=device).expand(*x.shape[:2], -1), x], -1)
                for prompt, x in zip(prompts, tokens.unflatten(0, (-1, B)).unbind(1))]
        return torch.stack([f(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in rows], 1).flatten(0, 1)

    def of_text(ids):
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        out = torch.as_tensor(phi.of_text(ids[:, -T:], texts), dtype=torch.float64, device=device)
        require(out.shape == (len(texts),), f"potential {args.potential}: gives an array of shape "
                f"{tuple(out.shape)} for {len(texts)} texts; it must give one number for each")
        for i in (out.isnan() | out.isposinf()).nonzero()[:1, 0].tolist():
            raise SystemExit(f"potential {args.potential}: log phi is {out[i]} for {texts[i]!r}; it must be "
                             "a number below infinity, or -inf, for every text")
        return out

    @torch.no_grad()
    def of_continuation(ids):  # log p0 of the last c ids
        rows = ids.split(256)
        logits = (model(x, use_cache=False, logits_to_keep=c + 1).logits[:, :-1, :V].float() for x in rows)
        log_p = (x.log_softmax(-1).gather(-1, y[:, -c:, None]) for x, y in zip(logits, rows))
        return torch.cat([x.sum((1, 2)) for x in log_p])

    def log_phi(tokens, o=None):
        if phi.of_text:
            return each(of_text, tokens)
        o = o if phi.conditional else torch.tensor([phi.o], device=device).expand(len(tokens), -1)
        tokens = torch.cat([tokens, o[:, None].expand(-1, tokens.shape[1], -1)], -1)
        return args.beta * each(of_continuation, tokens)

    def embed(twist, o):
        if twist.condition:
            return (twist.body or model).base_model(o).last_hidden_state[:, -1].float()

    def hidden(body, tokens):
        return each(lambda ids: body.base_model(ids[:, :-1]).last_hidden_state[:, -T:].float(), tokens)

    return SimpleNamespace(
        V=V, T=T, c=c, B=B, d=head.weight.shape[1], start=start, log_phi=log_phi, log_bound=phi.log_bound,
        floor=phi.floor, conditional=phi.conditional, o=phi.o, embed=embed, hidden=hidden,
        head=lambda h: head(h.to(model.dtype))[..., :V].float(),
        eos=tokenizer.eos_token_id if args.stop_at_eos else None)


def potential(args, tokenizer, device):
    """-> of_text(tokens (M, T), texts) -> log phi (M,), or None: p0 of what follows; and log_bound, floor, o.

    tiny:monster, :polite, :happy  (0.98 if the story has it, else 0.02)^beta;  tiny:reward  exp(beta r)
    class  p(label | text)^beta;  threshold  1[score < eta] + floor;  reward  exp(beta score), by --classifier
    infilling  p0(the next c tokens | s_{1:T}), a condition;  continuation  p0(--continuation | s_{1:T})^beta
    file.py:function  exp(beta function(tokens, texts)); its attribute log_bound, if any, allows exact samples
    """
    name, beta, (kind, _, what) = args.potential, args.beta, args.potential.rpartition(":")
    out = SimpleNamespace(of_text=None, log_bound=0.0, floor=None, conditional=name == "infilling", o=None)
    if name in ("infilling", "continuation"):
        out.o = tokenizer(args.continuation, add_special_tokens=False).input_ids
        require(out.o or out.conditional, "potential continuation: give its text with --continuation")
        fits = args.c > 0 and beta == 1 and not args.stop_at_eos and args.conditions % len(args.prompts) == 0
        require(fits or not out.conditional, f"potential infilling: --c {args.c} must be above 0, --beta 1, "
                "--conditions a multiple of the number of --prompts, and --stop-at-eos off")
        require(not args.c or len(out.o) in (0, args.c), f"--continuation {args.continuation!r} has "
                f"{len(out.o)} tokens, but --c is {args.c}")
    elif kind == "tiny" and what in ("reward", *tiny_attributes("")):
        def of_text(_, texts):
            stories = [text.rpartition("Assistant:")[2] for text in texts]
            if what == "reward":
                return [beta * tiny_reward("", story) for story in stories]
            return [beta * math.log(0.98 if tiny_attributes(story)[what] else 0.02) for story in stories]
        out.of_text, out.log_bound = of_text, beta * (3.0 if what == "reward" else math.log(0.98))
    elif kind.endswith(".py"):
        require(Path(kind).is_file(), f"potential {name}: there is no file {kind}")
        spec = importlib.util.spec_from_file_location("potential", kind)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        own = getattr(module, what, None)
        require(own, f"potential {name}: {kind} has no function {what}")
        out.of_text = lambda tokens, texts: beta * torch.as_tensor(own(tokens, texts), dtype=torch.float64)
        out.log_bound = beta * own.log_bound if hasattr(own, "log_bound") else None
    else:
        require(name in ("class", "threshold", "reward") and args.classifier, f"potential {name}: choose "
                "infilling, continuation, tiny:..., x.py:name, or class, threshold, reward with --classifier")
        from transformers import AutoModelForSequenceClassification
        reader, folder = load_tokenizer(args.classifier), model_folder(args.classifier)
        judge, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        n = judge.to(device).requires_grad_(False).config.num_labels
        judge.config.pad_token_id = reader.pad_token_id
        fits = {"class": 0 <= args.label < max(2, n), "threshold": n < 3, "reward": n == 1}[name]
        require(fits and not info["missing_keys"], f"--label {args.label}: {args.classifier} has {n} labels, "
                f"{judge.config.id2label}; class needs one of them, threshold 1 or 2, reward 1, all trained")

        def of_text(_, texts):
            batches = (reader(texts[i:i + 256], return_tensors="pt", padding=True, truncation=True,
                              max_length=512) for i in range(0, len(texts), 256))
            logits = torch.cat([judge(**batch.to(device)).logits.double() for batch in batches])
            score = logits[:, 0] if n == 1 else logits[:, 1] - logits[:, 0]
            if name == "threshold":
                return ((score < args.threshold) + args.floor).log()
            if n == 1:
                return beta * (score if name == "reward" else F.logsigmoid(score if args.label else -score))
            return beta * logits.log_softmax(-1)[:, args.label]
        out.of_text, out.floor = of_text, args.floor if name == "threshold" else None
        out.log_bound = {"class": 0.0, "threshold": math.log1p(args.floor), "reward": None}[name]
    return out


# ---- Samples, and the twist on them


def sample(world, twist, K, N=1, o=None, T=None, **options):
    """smc on a world, N runs or one for each row of o (N, c); twist None: psi = 1.  Adds the hidden states
    (N, K, T, d) of p0 (states) and of the twist's body (z): a head trains on them without another pass."""
    N, T, own = len(o) if o is not None else N, T or world.T, getattr(twist, "body", None)
    base, body, states, z = world.start(N, K, o), own and world.start(N, K, o, own), [], []

    def scores(last, ancestors):
        h, logits = base(last, ancestors)
        states.append(h)
        if twist is None:
            return logits, None
        h, q = body(last, ancestors) if own else (h, None)  # q: log of a policy's, unnormalised
        z.append(h)
        return logits, twist(h, e) if isinstance(twist, Twist) else q.log_softmax(-1) - logits.log_softmax(-1)

    log_phi = lambda s: world.log_phi(s, o) if T == world.T else s.new_zeros(s.shape[:2])
    along = lambda hs: torch.stack([h.view(N, K, -1).take_along_dim(at[..., None], 1)
                                    for h, at in zip(hs, S.lineage.unbind(-1))], 2)
    with torch.no_grad():
        e = world.embed(twist, o) if isinstance(twist, Twist) else None
        e = e if e is None else e.repeat_interleave(K, 0)
        S = smc(scores, log_phi, T, K, N, eos=world.eos, **options)
    S.o, S.states = o, along(states)
    S.z = along(z) if own else S.states
    return S


def on_samples(world, twist, S, **options):
    """The twist on particles, (N, K, T, ...), with gradient, also into its own body if it has one."""
    e, z = world.embed(twist, S.o), S.z if twist.body is None else world.hidden(twist.body, S.tokens)
    return twist(z, e if e is None else e[:, None, None], **options)


def log_psi(world, twist, S, raw=False):
    """log psi_t(s_{1:t}) of particles, (N, K, T), with gradient; a finished one keeps its end token's."""
    out = on_samples(world, twist, S, tokens=S.tokens, raw=raw)
    end = (S.tokens == (-1 if world.eos is None else world.eos)).cumsum(-1).eq(0).sum(-1, keepdim=True)
    return out.gather(-1, torch.arange(world.T, device=out.device).expand_as(out).minimum(end))


def log_q(world, twist, S):
    """log q(s_t | s_{1:t-1}) of particles, (N, K, T), with gradient: V-wide, so redone in the backward."""
    def of(tokens):
        joint = world.head(S.states) + on_samples(world, twist, S)
        return joint.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    end = S.tokens == (-1 if world.eos is None else world.eos)
    return checkpoint(of, S.tokens, use_reentrant=False) * (end.cumsum(-1) - end.int() == 0)


def learner_loss(learner, world, twist, K, exact=None, o=None, *, beta=1.0, legacy_fudge=False,
                 scheme="systematic"):
    """Draw one batch as the learner does, without gradient -> loss(), its mean loss with gradient.

    K particles for each prompt or row of o (N, c); exact (N, n, T): n exact samples of each, or None.
    """
    N, given = world.B if o is None else len(o), exact is not None
    draw = lambda K=K, twist=twist, tau=0.0, **more: sample(
        world, twist, K, N, o, tau=tau, scheme=scheme, **more)
    psi = lambda S, raw=False: log_psi(world, twist, S, raw)
    S = draw(twist=None, proposal="base") if learner in ("sixo", "fudge") else draw()
    if given and not (learner == "ctl" and world.conditional):
        P = draw(K=exact.shape[1], retained=exact)
        W = torch.zeros_like(P.log_w).softmax(-1)
    else:  # as released: only SIXO's positives, and CTL's that retain an exact sample, are resampled
        P = draw(tau=2.0, retained=exact) if given or learner == "sixo" else S
        W = P.log_w.softmax(-1).nan_to_num(0.0)
    if world.floor is not None:  # particles outside the set say nothing of sigma; with none inside, no update
        W = W * (P.log_phi > math.log(2 * world.floor))
    hit = (W.sum(-1) > 0).double()
    W = W / W.sum(-1, keepdim=True).clamp(min=1e-300)

    if learner == "ctl":
        w_neg = ((S.log_p - S.log_q).cumsum(-1) + S.log_psi).softmax(1)
        return lambda: (hit * ctl_loss(at_P := psi(P), W, at_P if S is P else psi(S), w_neg)).mean()
    if learner == "sixo":
        return lambda: (hit * sixo_loss(psi(P), W, psi(S))).mean()
    if learner == "dpg":
        return lambda: (hit * dpg_loss(log_q(world, twist, P), W)).mean()
    if learner == "rl":
        targets = lambda X: torch.cat([X.log_norm[..., 1:], X.log_phi[..., None]], -1)
        batches = [(X, targets(X)) for X in [S, P][:1 + given]]
        return lambda: sum(rl_loss(psi(X), y).mean() for X, y in batches) / len(batches)
    if learner == "fudge":
        batches = [(S, (S.log_phi - world.log_bound).exp()[..., None])]  # psi may be phi / its bound
        if given and world.conditional:  # half on prefixes that matter
            batches.append((P, fudge_labels(world, exact[:, 0], o, legacy_fudge)[:, None]))
        return lambda: sum(fudge_loss(psi(X, raw=True), phi).mean() for X, phi in batches) / len(batches)
    critic = lambda: on_samples(world, twist, S, critic=True).double()
    rewards = (S.log_p - S.log_q + F.pad(S.log_phi[..., None], (world.T - 1, 0))) / beta
    _, returns, advantages = gae(rewards, values := critic().detach())
    return lambda: ppo_loss(log_q(world, twist, S), S.log_q, advantages, critic(), values, returns).mean()


def fudge_labels(world, exact, o=None, legacy=False):
    """phi of a p0-continuation of every prefix s_{1:t} of exact samples, (N, T) -> (N, T); legacy: of
    s_{1:t-1}, so that the label forgets s_t, and phi(s_{1:T}) itself is never used."""
    N, T = exact.shape
    t = torch.arange(T, device=exact.device)
    free = t >= t.repeat_interleave(N)[:, None] + (0 if legacy else 1)
    prefixes = exact.repeat(T, 1).masked_fill(free, -1)[:, None]
    o = None if o is None else o.repeat(T, 1)
    S = sample(world, None, 1, N * T, o, proposal="base", tau=0.0, retained=prefixes)
    return S.log_phi.exp().view(T, N).T


def exact_samples(world, n, batch=1000, patience=1000):
    """n exact samples of sigma (n, T), case i after prompt i % B, and their conditions o (n, c) or None.

    Infilling: T + c tokens of p0, cut in two (BDMC, Sec. 3.3).  Else rejection: kept with chance phi / bound.
    """
    if world.conditional:
        s = sample(world, None, 1, n, T=world.T + world.c, proposal="base", tau=0.0).tokens[:, 0]
        return s.split((world.T, world.c), 1)
    kept, draws = [[] for _ in range(world.B)], 0
    while world.B * min(map(len, kept)) < n:
        S, draws = sample(world, None, batch, world.B, proposal="base", tau=0.0), draws + batch
        require(S.log_phi.max() <= world.log_bound + 1e-6, "potential: its log_bound is too small")
        for own, tokens, log_phi in zip(kept, S.tokens, S.log_phi):
            own += tokens[torch.rand_like(log_phi).log() < log_phi - world.log_bound]
        found = min(map(len, kept))
        if draws % (100 * batch) == 0 and found < n:
            print(f"exact samples: {found} of {n // world.B} after {draws} draws of p0", flush=True)
        require(draws < patience * batch * (1 + found), f"exact samples: {found} in {draws} draws of p0: phi "
                "is (nearly) zero everywhere; change it or --beta, or take --exact 0: no upper bounds")
    return torch.stack([s for group in zip(*kept) for s in group])[:n], None


def enumerate_sequences(world, twist, o=None):
    """One case of a small world over all V^T sequences: exact log_Z, log_sigma, log_q, log_phi (V^T,), KLs,
    and for each t the optimal log_psi_star[t] (Prop. 3.2) and log_psi[t], (V^t,)."""
    V, T = world.V, world.T
    s = torch.arange(V**T)[:, None] // V ** torch.arange(T - 1, -1, -1) % V
    S = sample(world, twist, 1, V**T, o if o is None else o.expand(V**T, -1), tau=0.0, retained=s[:, None])
    log_p, log_q, log_phi = S.log_p[:, 0].sum(-1), S.log_q[:, 0].sum(-1), S.log_phi[:, 0]
    log_Z, tails = (log_p + log_phi).logsumexp(0), [V ** (T - t) for t in range(1, T + 1)]
    star = [(log_p + log_phi).view(-1, n).logsumexp(-1) - S.log_p[::n, 0, :t].sum(-1)
            for t, n in enumerate(tails, 1)]
    log_sigma, kl = log_p + log_phi - log_Z, lambda a, b: (a.exp() * (a - b)).nan_to_num(0.0).sum().item()
    return SimpleNamespace(
        log_Z=log_Z.item(), log_p=log_p, log_q=log_q, log_sigma=log_sigma, log_phi=log_phi, log_psi_star=star,
        log_psi=[S.log_psi[::n, 0, t] for t, n in enumerate(tails)], kl_prior=kl(log_q, log_p),
        kl_q_sigma=kl(log_q, log_sigma), kl_sigma_q=kl(log_sigma, log_q))


# ---- Runs


def make_twist(args, learner, world, model):
    """The twist of args, or the policy in its place (psi_t = q(s_t | s_{1:t-1}) / p0), or None."""
    if learner == "policy":
        words, its = (load_tokenizer(name).get_vocab() for name in (args.model, args.policy or args.model))
        require(args.policy and words == its, f"--policy {args.policy!r}: name a model with the vocabulary "
                f"of --model {args.model}")
        return SimpleNamespace(body=load_model(args.policy, args.dtype))
    if learner == "none":
        return None
    body = copy.deepcopy(model).float().requires_grad_(True) if args.twist.startswith("body") else None
    if body is not None and body.get_output_embeddings().weight is not body.get_input_embeddings().weight:
        body.get_output_embeddings().requires_grad_(False)  # unused
    layers = 1 if args.world or not args.twist.endswith("mlp") else 3
    twist = Twist(world.d, world.V, layers, world.conditional and not args.world, body, learner == "fudge")
    twist.critic.requires_grad_(learner == "ppo")
    return twist.double() if args.world else twist.to(model.device)


def interval(x):
    """Half of the 95 % interval of the mean of independent values (n,); nan for one value."""
    return 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def evaluate(args, world, twist, cases, o):
    """Section 5: bounds on log Z for every K of --bound-K, and both KLs with the last -> {name: value}.

    cases (M, T): exact samples; None: lower bounds only.  Under conditions o (M, c) each case has its log Z.
    """
    def everywhere(x):  # the rows of all processes
        dist.all_gather_object(parts := [None] * dist.get_world_size(), x.cpu())
        return torch.cat(parts)
    R = args.runs if cases is None else min(args.runs, len(cases))
    R, own, record = max(world.B, R - R % world.B), o is not None, {}
    cases, o = (x if x is None else x.roll(-dist.get_rank() * R, 0) for x in (cases, o))  # to each process
    run = lambda K, N, **options: sample(world, twist, K, N, o[:N] if own else None, **(
        dict(tau=args.tau, proposal=args.proposal, scheme=args.scheme) | options))
    for K in args.bound_K:
        bounds, sis, twisted = log_Z_bounds(run, R if cases is None else cases[:R], K)
        bounds = {name: everywhere(x) for name, x in bounds.items()}
        for name, x in bounds.items():
            record |= {f"{name}_{K}": x.mean().item(), f"{name}_{K}_ci": interval(x)}
    S = sis if args.proposal == "twist" else run(K, R, tau=0.0, proposal="twist")
    F_q, log_phi, prior = map(everywhere, (S.log_w, S.log_phi, (S.log_q - S.log_p).sum(-1)))  # (R, K) each
    hits = log_phi > (-math.inf if world.floor is None else math.log(2 * world.floor))
    require(world.floor is not None or hits.any(), f"potential {args.potential}: zero on all {hits.numel()} "
            "samples, so log Z-hat = -inf; choose one that p0 reaches")
    record |= dict(kl_prior=prior.mean().item(), reward=log_phi.mean().item() / args.beta, conditional=own,
                   hits=hits.double().mean().item(), F_q=F_q.mean().item(),
                   ess=everywhere(twisted.ess).mean(0).tolist())
    if cases is None:
        return record | dict(lower=max(bounds["sis_lower"].mean(), bounds["smc_lower"].mean()).item())
    gaps = {x: (bounds[f"{x}_upper"] - bounds[f"{x}_lower"]).mean().item() for x in ("sis", "smc")}
    best = "smc" if gaps["smc"] < gaps["sis"] else "sis"  # as released: log Z is the tighter pair's midpoint
    middle, M = (bounds[f"{best}_lower"] + bounds[f"{best}_upper"]) / 2, R if own else len(cases)
    G_q = run(1, M, retained=cases[:M, None], tau=0.0, proposal="twist").log_w[:, 0]
    G_q, log_Z = (everywhere(G_q), middle) if own else (G_q.cpu(), middle.mean())
    error = 0.0 if own else interval(middle)
    kl_q, kl_sigma = log_Z - F_q.mean(1) if own else (log_Z - F_q).flatten(), G_q - log_Z  # Eq. 23
    return record | dict(
        kl_q_sigma=kl_q.mean().item(), kl_q_sigma_ci=math.hypot(interval(kl_q), error), G_q=G_q.mean().item(),
        kl_sigma_q=kl_sigma.mean().item(), kl_sigma_q_ci=math.hypot(interval(kl_sigma), error),
        log_Z=middle.mean().item(), log_Z_ci=interval(middle), gap=gaps[best])


def exact_record(world, twist):
    """exact_log_Z and both exact KLs of an enumerable world, means over o."""
    conditions = [torch.tensor([[v]]) for v in range(world.V)] if world.conditional else [None]
    E = [enumerate_sequences(world, twist, o) for o in conditions]
    share = [math.exp(e.log_Z) if world.conditional else 1.0 for e in E]
    return {f"exact_{name}": sum(p * getattr(e, name) for p, e in zip(share, E))
            for name in ("log_Z", "kl_q_sigma", "kl_sigma_q")}


def train(args, learner, seed, world, model, cases, o, out):
    """One learner, one seed -> its twist; evaluations go to out/metrics.jsonl, in full to out/evaluation."""
    (out / "evaluation").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    twist, steps = make_twist(args, learner, world, model), args.max_steps if learner in LEARNERS else 0
    weights = [p for p in twist.parameters() if p.requires_grad] if steps else []
    optimizer = torch.optim.Adam(weights, lr=(args.lrs * 6)[LEARNERS.index(learner)]) if steps else None
    torch.manual_seed(1000 * seed + dist.get_rank())  # from here every process draws its own particles
    step = saved = load_checkpoint(out, twist, optimizer)[0] if args.resume and steps else 0
    while True:
        stop = stop_requested() and step < steps
        if step > saved and (stop or step >= steps or (args.save_every and step % args.save_every == 0)):
            save_checkpoint(out, saved := step, twist, optimizer)
        if stop:
            sys.exit(143)
        between = step % args.eval_every if args.eval_every else step == 1 or step & (step - 1)
        if step >= steps or not between:
            record = evaluate(args, world, twist, cases, o) | dict(step=step)
            record |= exact_record(world, twist) if args.world else {}
            if dist.get_rank() == 0:
                (out / "evaluation" / f"{step}.json").write_text(json.dumps(record))
            log(out, step, **{name: record[name] for name in SHOWN if name in record})
        if step >= steps:
            return twist
        batch, conditions, K = None, None, args.K
        if world.conditional:
            n, K = (args.conditions, K) if learner == "ctl" else (args.conditions * K, 1)
            batch, conditions = exact_samples(world, n)
            batch = batch[:, None]
        elif args.train_on_exact:
            chosen = torch.randint(len(cases) // world.B, (K,), device=cases.device)
            batch = cases.unflatten(0, (-1, world.B))[chosen].transpose(0, 1)
        loss = learner_loss(learner, world, twist, K, batch, conditions, beta=args.beta,
                            legacy_fudge=args.legacy_fudge, scheme=args.scheme)
        for _ in range(4 if learner == "ppo" else 1):  # PPO's inner epochs
            optimizer.zero_grad()
            loss().backward()
            for weight in weights:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights]).item()
            require(math.isfinite(norm), f"{learner}, update {step}: the loss or its gradient is not finite; "
                    "take smaller --lrs, and for rl a potential that is nowhere zero")
            optimizer.step()
        step += 1


SHOWN = ("kl_q_sigma", "kl_sigma_q", "exact_kl_q_sigma", "exact_kl_sigma_q", "log_Z", "exact_log_Z", "gap",
         "lower", "kl_prior", "reward", "hits")


def write_table(out, records):
    """table.md (printed) and table.tex of the last evaluations: mean ± half of the 95 % interval, over seeds
    if there are several, else samples.  Without conditions log Z is the median midpoint, as released."""
    first, finals, notes = next(iter(records.values()))[0], {}, []
    for (learner, _), history in records.items():
        finals.setdefault(learner, []).append(history[-1])
    middles = sorted(h.get("log_Z", 0.0) for hs in finals.values() for h in hs)
    log_Z, names = middles[len(middles) // 2], [name for name in SHOWN if name in first]
    pretty = lambda name: name.replace("_", " ").replace("q sigma", "q ‖ σ").replace("sigma q", "σ ‖ q")
    shared = {"kl_q_sigma": lambda h: log_Z - h["F_q"], "kl_sigma_q": lambda h: h["G_q"] - log_Z}
    grid = [["q", *map(pretty, names)]]
    for row, hs in (({"untrained": [first]} if len(history) > 1 else {}) | finals).items():
        grid.append([row])
        for name in names:
            common = name in shared and not first["conditional"]
            x = torch.tensor([shared[name](h) if common else h[name] for h in hs])
            width = interval(x) if len(x) > 1 else hs[0].get(name + "_ci", math.nan)
            grid[-1].append(f"{x.mean():.3f}" + (f" ± {width:.3f}" if width == width else ""))
            if name in shared and hs[0]["gap"] > max(0.0, x.mean()):
                notes.append(f"warning, {row}: {pretty(name)} = {x.mean():.3f} is less than the gap "
                             f"{hs[0]['gap']:.3f} between the bounds on log Z; a larger --bound-K closes it")
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = ["| " + " | ".join(x.ljust(n) for x, n in zip(row, widths)) + " |" for row in grid]
    lines.insert(1, "|" + "|".join("-" * (n + 2) for n in widths) + "|")
    print("", *lines, "", *notes, sep="\n")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    rows = "\n".join(" & ".join(row) + r" \\" for row in grid)
    rows = rows.translate({ord("‖"): r"$\|$", ord("±"): r"$\pm$", ord("σ"): r"$\sigma$"})
    (out / "table.tex").write_text(f"\\begin{{tabular}}{{l{'r' * len(names)}}}\n{rows}\n\\end{{tabular}}\n")


def draw_figure(out, records, caption):
    """figures/twisted_smc.png from the evaluations: KLs, bounds over updates and over K, ESS, frontier."""
    from matplotlib.figure import Figure
    figure = Figure((15, 8.5), layout="constrained")
    figure.suptitle(caption)
    kl, by_step, by_K, fraction, frontier = figure.subplot_mosaic("abc;de.").values()
    learners = list(dict.fromkeys(learner for learner, _ in records))
    for (learner, seed), history in records.items():
        last, style = history[-1], dict(color=f"C{learners.index(learner)}", marker=".", lw=1)
        Ks = [int(name[10:]) for name in last if name.startswith("smc_lower_") and name[10:].isdigit()]
        series = lambda name, hs=history: [h.get(name, math.nan) for h in hs]
        for axis, names in ((kl, ("kl_q_sigma", "kl_sigma_q")),
                            (by_step, (f"smc_lower_{Ks[-1]}", f"smc_upper_{Ks[-1]}"))):
            for name, line in zip(names, ("-", "--")):
                axis.plot(series("step"), series(name), line, **style)
        for name, line in dict(sis_lower="o-", sis_upper="o--", smc_lower="s-", smc_upper="s--").items():
            for h, color in ((history[0], "0.7"), (last, "C0")) if learner == learners[0] else ():
                y, error = ([series(f"{name}_{K}{end}", [h])[0] for K in Ks] for end in ("", "_ci"))
                by_K.errorbar(Ks, y, error, fmt=line, color=color, ms=4)
        fraction.plot(range(1, len(last["ess"]) + 1), [x / Ks[-1] for x in last["ess"]], **style)
        frontier.plot(series("kl_prior"), series("reward"), **style, label=f"{learner}, seed {seed}")
    kl.set(title="KL(q ‖ σ) solid, KL(σ ‖ q) dashed", xlabel="updates", ylabel="nats", yscale="log")
    by_step.set(title=f"SMC bounds on log Z, K = {Ks[-1]}, upper dashed", xlabel="updates", ylabel="nats")
    by_K.set(title=f"as Fig. 3: log Z bounds, {learners[0]} (grey: untrained)\nIWAE round, SMC square",
             xlabel="K", ylabel="nats", xscale="log", xticks=Ks, xticklabels=Ks)
    by_K.minorticks_off()
    fraction.set(title="after training", xlabel="t, tokens", ylabel="ESS before resampling / K", ylim=(0, 1))
    frontier.set(title="reward against distance", xlabel="KL(q ‖ p0), nats", ylabel="mean log φ / β, nats")
    figure.legend(*frontier.get_legend_handles_labels(), loc=(0.72, 0.2))
    for axis in (kl, by_step):
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xlim(0)
    for axis in (by_step, by_K) if "exact_log_Z" in last else ():
        axis.axhline(last["exact_log_Z"], color="k", lw=0.8)
    (out / "figures").mkdir(exist_ok=True)
    figure.savefig(out / "figures" / "twisted_smc.png", dpi=100)


def main(args):
    learners = LEARNERS if args.learner == "all" else (args.learner,)
    require(args.beta > 0, f"--beta {args.beta}: must be positive")
    require(min(args.T, args.K, args.runs, args.seeds, args.conditions, len(args.prompts), len(args.bound_K),
                *args.bound_K, args.max_steps + 1, args.floor) > 0, "--T, --K, --runs, --seeds, "
            "--conditions, --prompts, --bound-K: at least 1; --floor above 0; --max-steps at least 0")
    alone = args.K == 1 and ("ctl" in learners or args.conditions == 1)
    require(not alone or not {*learners} & {"ctl", "sixo", "dpg"}, "--K 1: the weight of one particle is "
            "always 1, so nothing is learned; take --K 2 or more")
    require(len(args.lrs) in (1, 6), "--lrs: one learning rate for all learners, or six, in their order")
    require(not args.world or args.beta == 1 and args.learner != "policy", "--world: --beta 1, no policy")
    setup(args.seed)
    model = None if args.world else load_model(args.model, args.dtype)
    tokenizer, device = model and load_tokenizer(args.model), model.device if model else "cpu"
    world = markov_world(args.world) if args.world else lm_world(model, tokenizer, args)
    learners = [name for name in learners if name != "fudge" or world.log_bound is not None]  # psi is bounded
    require(learners and (not args.train_on_exact or args.exact and world.log_bound is not None), "fudge and "
            "--train-on-exact need a potential with a known bound (log_bound), the latter --exact above 0")
    out, cases, o, records = start_run(args, "twisted_smc"), None, None, {}
    for x in [*out.glob("*-seed*"), *out.glob("exact-*")] if args.overwrite and dist.get_rank() == 0 else []:
        shutil.rmtree(x) if x.is_dir() else x.unlink()
    if world.log_bound is not None and args.exact:  # drawn once for a target, by the first process, and kept
        names = ("model prompts potential beta T c continuation classifier label threshold floor stop_at_eos "
                 "world exact dtype").split()
        own = Path(args.potential.rpartition(":")[0])  # the user's file
        key = repr([own.suffix == ".py" and own.read_text(), *(getattr(args, name) for name in names)])
        path = Path(args.exact_folder or out, f"exact-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt")
        if dist.get_rank() == 0 and not path.exists():
            print(f"drawing {args.exact} exact samples: {path}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(exact_samples(world, max(1, args.exact // world.B) * world.B), f"{path}.tmp")
            Path(f"{path}.tmp").replace(path)
        dist.broadcast_object_list(found := [torch.load(path, "cpu") if dist.get_rank() == 0 else None])
        cases, o = (x if x is None else x.to(device) for x in found[0])
    elif world.conditional:
        o = exact_samples(world, max(1, args.runs // world.B) * world.B * dist.get_world_size())[1]
    for seed, learner in ((args.seed + i, learner) for i in range(args.seeds) for learner in learners):
        print(f"\n{learner}, seed {seed}", flush=True)
        twist = train(args, learner, seed, world, model, cases, o, run := out / f"{learner}-seed{seed}")
        files = sorted((run / "evaluation").glob("*.json"), key=lambda path: int(path.stem))
        records[learner, seed] = [json.loads(path.read_text()) for path in files]
        if args.show and tokenizer:  # the heaviest of K particles; for infilling under --continuation
            given = exact_samples(world, world.B)[1] if world.conditional else None
            given = given.new_tensor([world.o] * world.B) if world.conditional and world.o else given
            S = sample(world, twist, args.K, world.B, given, tau=0.0)
            for k in S.log_w[0].argsort(descending=True)[:args.show].tolist():
                ids = S.tokens[0, k].tolist() + ([] if given is None else given[0].tolist())
                print(f"weight {S.log_w[0].softmax(-1)[k]:.3f}, log phi {S.log_phi[0, k]:.3f}: "
                      f"{args.prompts[0] + tokenizer.decode(ids)!r}")
    if dist.get_rank() == 0:
        write_table(out, records)
        where = "built-in, not the paper's setting" if args.world or args.model == "tiny" else args.model
        draw_figure(out, records, f"{args.world or args.potential} ({where}), T {world.T}, seed {args.seed}")
        print(f"\n{out}: table.md, table.tex, figures/twisted_smc.png")
    return records


if __name__ == "__main__":
    main(args)
