"""Sampling adaptors, the probability-quality trade-off and independent Metropolis-Hastings (IMH).

Tan, Valvoda, Liu, Svete, Qin, Kan, Cotterell 2024, https://arxiv.org/abs/2406.10203 (equation numbers: ours)

Eq. 1  aligned model     p_+(y) = p(y) exp(r(y) / beta) / Z,  so  log p + r / beta = log p_+ + log Z
Eq. 2  sampling adaptor  a_t(v) = p_+(v | y_<t)^(1/T) 1[v in S_t],  Z_t = sum_v a_t(v),  S_t: kept tokens
Eq. 3  local             q(y) = prod_t a_t(y_t) / Z_t, what a sampler draws
Eq. 4  global            g(y) = prod_t a_t(y_t) / Z_g,  so  g(y) / q(y) = prod_t Z_t / Z_g
Eq. 5  IMH               from y propose y' ~ q, move with probability min(1, w(y') / w(y)), else repeat y;
                         w = target / q;  --target global: Eq. 4, aligned: p_+, posterior: Eq. 1

    python methods/imh_adaptors.py             the tiny world: toy, enumerate, generate, score, imh, figures
    python methods/imh_adaptors.py enumerate --adaptor top_k=2,temperature=1.5   13 strings, IMH written out
    python methods/imh_adaptors.py generate --model results/dpo --out results/mine  then score, imh, figures
    python methods/imh_adaptors.py all rlhf    presets: tiny (default), rlhf, dpo (the paper's 7B models)
    python methods/imh_adaptors.py imh --csv data_dpo         the authors' scored corpora, by their columns

In the released code (each a --legacy flag here) the accept test is a one-element tuple, so all proposals are
accepted; the implicit reward is log p - log p_+, the negative of Eq. 1's; the prior does not see the prompt;
a token's log-prob is clamped at -25. Its target is --target aligned, its chains are --pooled, the library's
top-k 50 joins every adaptor (here: top_p090,top_k=50). Here log q is kept from sampling.
"""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import tyro


@dataclass
class Args:
    sampling_types: tuple[str, ...] = ("ancestral_strict", "top_k50", "top_k30", "top_p095", "top_p090",
                                       "typical_p090", "eta_n00009")  # or specs such as top_p=0.8,min_p=0.1
    temperatures: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)  # each with every sampling type
    prompts: int = 1000  # distinct prompts of the test split, drawn at random
    samples: int = 2  # responses per prompt and setting
    template: str = "{}"  # around the prompt; other than {}: around the first human turn of a dialogue
    reward: str = "tiny"  # tiny (the known one), implicit, or a sequence classification model
    beta: float = 0.5  # KL weight of Eq. 1: of the implicit reward, of --target posterior and of enumerate
    also: tuple[str, ...] = ()  # further adaptors under which every response is scored, in the same pass
    adaptor: str = "top_k=2"  # of enumerate: a name, or key=value,key=value
    target: str = "global"  # of IMH: global, aligned (p_+ on q's support, whatever T) or posterior
    pooled: bool = False  # one chain over all prompts, which weighs a prompt by its normaliser
    chain_length: int = 1000  # proposals per chain, drawn with replacement from the stored draws
    burn_in: int = 100  # steps left out
    thin: int = 1  # every thin-th step is kept
    corpus_size: int = 200  # strings of a corpus, for the ellipses and the typicality filter
    eps: float = 0.25  # typical corpus: mean log p_+ within eps standard errors of its expectation
    csv: str = ""  # folder of the authors' scored CSVs, read by imh and figures instead of the scores
    legacy_accept_all: bool = False  # imh: every proposal is accepted
    legacy_flip_reward: bool = False  # score, or imh of CSVs: the implicit reward's sign
    legacy_unconditional_prior: bool = False  # score: log p(y) after the start token, not log p(y | x)
    legacy_clamp: float = 0.0  # score: 25 takes log p_+ and log q from a second pass, each token's >= -25

    model: str = "results/dpo"  # aligned model p_+: a run folder, a local folder or a hub id
    ref_model: str = "tiny"  # prior p: the model p_+ was trained from
    data: str = "tiny"  # prompts: tiny, hh, a file, a folder or a hub id
    max_length: int = 256  # tokens of prompt and response together
    max_prompt_length: int = 128  # longer prompts are left out
    batch_size: int = 64  # responses sampled side by side
    tokens_per_microbatch: int = 8192  # memory knob of scoring: packed tokens per forward pass and process
    dtype: str = "float32"  # bfloat16 can move tokens across a kept set's edge when they are scored again
    seed: int = 0
    out: str = "results/imh_adaptors"  # run folder of generate, score, imh, figures; of toy, with -toy
    resume: bool = False  # continue a killed generate or score: chunks already written are kept
    overwrite: bool = False  # replace what is in the run folder


PAPER = dict(data="hh", dtype="bfloat16", max_prompt_length=255)  # and the defaults: 1000 prompts x 2 samples
PRESETS = {
    "tiny": Args(sampling_types=("ancestral_strict", "top_k=5", "top_p090", "typical_p090"),
                 temperatures=(0.5, 1.0, 1.5), prompts=32, samples=8, max_length=128),
    "rlhf": Args(model="ethz-spylab/rlhf-7b-harmless", ref_model="meta-llama/Llama-2-7b-hf", **PAPER,
                 reward="ethz-spylab/reward_model", template="Human: {} Assistant:"),
    "dpo": Args(model="kaist-ai/janus-dpo-7b", ref_model="kaist-ai/janus-7b", reward="implicit", beta=1.0,
                template="[INST] Human: {} Assistant:[/INST]", **PAPER)}  # prior: where DPO started from
COMMANDS = ("all", "toy", "enumerate", "generate", "score", "imh", "figures")

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    if sys.argv[1:2] not in [["--help"], ["-h"], *([name] for name in COMMANDS)]:
        sys.argv.insert(1, "all")
    preset = PRESETS[sys.argv.pop(2) if sys.argv[2:] and sys.argv[2] in PRESETS else "tiny"]
    kinds = {name: type(name, (Args,), {"__doc__": ""})(**asdict(preset)) for name in COMMANDS}
    args = tyro.cli(tyro.extras.subcommand_type_from_defaults(kinds), description=__doc__)

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (decode_step, load_model, load_pairs, load_tokenizer, model_folder, on_rank0, pack_pairs,
                    prefill, read_rows, reorder, require, response_logps, sample_tokens, setup, start_run,
                    stay_in_place, stop_requested, tiny_reward, write)

SAMPLING_TYPES = {  # the released code's names; what is absent is off
    "ancestral_strict": {}, "ancestral": dict(top_k=50), "top_k50": dict(top_k=50), "top_k30": dict(top_k=30),
    "top_p095": dict(top_p=0.95), "top_p090": dict(top_p=0.90), "typical_p090": dict(typical_p=0.90),
    "eta_n00009": dict(eta_cutoff=0.0009), "greedy": dict(top_k=1)}
ORDER = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # the library's


def parse_adaptor(spec, vocabulary=math.inf):
    """An adaptor by the library's generate() keywords, from such a dict, "name", "key=value,..." or both;
    absent, top_k=0, top_p=1: off.  SystemExit: unknown, or out of range, as top_k above the vocabulary."""
    if not isinstance(spec, dict):
        name, *rest = spec.split(",")
        pairs = [part.split("=") for part in (rest if name in SAMPLING_TYPES else [name, *rest])]
        require(all(len(pair) == 2 and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", pair[1]) for pair in pairs),
                f"adaptor {spec!r}: write one of {', '.join(SAMPLING_TYPES)}, or key=number,...")
        spec = SAMPLING_TYPES.get(name, {}) | {key: float(value) for key, value in pairs}
    for key, value in spec.items():
        require(key in ("temperature", *ORDER), f"adaptor: no {key!r}: use temperature, {', '.join(ORDER)}")
        high = {"temperature": math.inf, "top_k": vocabulary}.get(key, 1)
        require(0 < value <= high and not (key == "top_k" and value % 1) or (key, value) == ("top_k", 0),
                f"adaptor: {key}={value:g} keeps nothing, or means nothing: choose 0 < {key} <= {high}"
                + ", a whole number of tokens of the vocabulary" * (key == "top_k"))
    return {key: value for key, value in spec.items() if (key, value) not in (("top_k", 0), ("top_p", 1))}


def kept_set(log_pi, name, x):
    """The tokens S(pi) an adaptor keeps.  Log-probs (..., V), -inf: dropped before -> booleans (..., V)"""
    H = lambda: torch.special.entr(log_pi.exp()).sum(-1, keepdim=True)  # the entropy
    if name == "top_k":
        cutoff = log_pi.topk(int(x), -1).values[..., -1:]
        above, equal = log_pi > cutoff, log_pi == cutoff
        return above | equal & (equal.cumsum(-1) <= x - above.sum(-1, keepdim=True))
    if name in ("top_p", "typical_p"):  # least mass x of the likeliest or most typical tokens
        key = -log_pi if name == "top_p" else (-log_pi - H()).abs()
        pairs = key.float().view(torch.int32).long() << 32 | torch.arange(key.shape[-1], device=key.device)
        order = (torch.from_numpy(np.sort(pairs)) if pairs.is_cpu else pairs.sort().values) & 0xFFFFFFFF
        pi = log_pi.gather(-1, order).exp()
        kept = pi.cumsum(-1, dtype=torch.float64) - pi < max(x - 1e-6, 1e-9)  # the one that reaches x is kept
        return torch.zeros_like(kept).scatter(-1, order, kept)
    log_cutoff = {"min_p": math.log(x) + log_pi.amax(-1, keepdim=True), "epsilon_cutoff": math.log(x),
                  "eta_cutoff": (math.log(x) / 2 - H()).clamp(max=math.log(x))}[name]  # min(x, sqrt(x) e^-H)
    return (log_pi >= log_cutoff - 1e-6).scatter(-1, log_pi.argmax(-1, keepdim=True), True)


def adapt(logits, adaptor):
    """One step of the sampler, Eq. 2 and 3.  (..., V) logits -> log_q (..., V), log_kept_mass (...)
    log q = log a - log Z, a = p_+^(1/T) 1[S]; log_kept_mass = log Z = log sum a (T = 1: of the kept p_+).
    S is taken from softmax(logits / T), adaptor after adaptor in the library's order.  Ties: exact sets, the
    lowest index first; a mass or cutoff met to 1e-6 is met (library: equals stay; top-p: last one first)."""
    adaptor = parse_adaptor(adaptor, logits.shape[-1])
    log_p_plus = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log_a = log_p_plus / adaptor.get("temperature", 1.0)
    for name in [name for name in ORDER if name in adaptor]:
        log_a = log_a.masked_fill(~kept_set(log_a.log_softmax(-1), name, adaptor[name]), -math.inf)
    log_Z = log_a.logsumexp(-1)
    require(log_Z.isfinite().all(), f"adaptor {adaptor} keeps nothing at {(~log_Z.isfinite()).sum()} of "
            f"{log_Z.numel()} positions: the logits there are -inf or nan; check the model and --dtype")
    return log_a - log_Z[..., None], log_Z


def imh_chain(log_w, log_u):
    """Which draw is held at each step, Eq. 5; chains side by side.  (..., N), (..., N) -> (..., N) indices
    log_w[i] = log target(y_i) - log q(y_i), up to a constant; log_u[i]: log of a uniform.  Draw 0 starts; a
    rejection repeats the held draw; log_u = -inf accepts whatever has a weight."""
    steps_w, steps_u = (torch.as_tensor(x).movedim(-1, 0).contiguous() for x in (log_w, log_u))
    held, log_w_held = torch.zeros(steps_w.shape, dtype=torch.long, device=steps_w.device), steps_w[0]
    for i in range(1, len(steps_w)):
        accept = steps_u[i] < steps_w[i] - log_w_held
        held[i] = torch.where(accept, i, held[i - 1])
        log_w_held = torch.where(accept, steps_w[i], log_w_held)
    return held.movedim(0, -1)


def pool_diagnostics(log_w, counts):
    """IMH that proposes uniformly from stored draws tends to self-normalised importance sampling (SNIS).
    (P, M) log-weights of P pools, -inf beside a pool's counts (P,) draws -> SNIS weights (P, M); of each pool
    log Z = log mean w, w* = max w / mean w, gap 1 / w*, ESS per draw, acceptance in the limit (or nan)."""
    w_bar = log_w.double().softmax(-1)
    w = w_bar.sort(-1, descending=True).values
    pairs = (w * (2 * torch.arange(w.shape[-1], device=w.device) + 1)).sum(-1)  # sum_ij min(w_i, w_j)
    return w_bar, dict(log_Z=log_w.logsumexp(-1) - counts.log(), w_star=counts * w[..., 0], gap=1 / (
        counts * w[..., 0]), ess=1 / w.square().sum(-1) / counts, accept_limit=pairs / counts)


def autocorrelation_time(x):
    """1 + 2 sum_k rho_k, up to the first negative rho_k.  (P, N) chains -> (P,); nan for a constant chain."""
    x, N = x - x.mean(-1, keepdim=True), x.shape[-1]
    rho = torch.fft.irfft(torch.fft.rfft(x, 2 * N).abs().square())[..., :N]
    rho = rho / torch.where(x.abs().amax(-1, keepdim=True) > 1e-12, rho[..., :1], math.nan)
    return 2 * (rho * (rho < 0).cumsum(-1).eq(0)).sum(-1) - 1


def correlations(x, y):
    """Pearson's and Spearman's (equals share their mean rank) of n pairs; nan below three, or if constant."""
    counted = [np.unique(z, return_inverse=True, return_counts=True)[1:] for z in (x, y)]
    ranks = [(counts.cumsum() - (counts - 1) / 2)[inverse] for inverse, counts in counted]
    usable = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return [float(np.corrcoef(*pair)[0, 1]) if usable else math.nan for pair in ((x, y), ranks)]


def scatter(out, name, panels, xlabel="log p (prior)", ylabel="reward"):
    """panels: {title: {label: (x, y), or (x, y, covariance) for an ellipse of one standard deviation}}"""
    figure = plt.figure(figsize=(5 * len(panels), 5), layout="constrained")
    circle = np.stack([f(np.linspace(0, 2 * math.pi, 60)) for f in (np.cos, np.sin)])
    for axis, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for i, (label, (x, y, *cov)) in enumerate(series.items()):
            axis.scatter(x, y, s=20 if cov else 4, alpha=0.7, color=plt.cm.tab20(i % 20), label=label)
            for values, vectors in map(np.linalg.eigh, cov):
                ring = [[x], [y]] + vectors * np.sqrt(values.clip(0)) @ circle
                axis.plot(*ring, color=plt.cm.tab20(i % 20))
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    Path(out, "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "figures", f"{name}.png"), dpi=130)
    plt.close(figure)


def toy(args):
    """p_+ ~ Dirichlet(0.1) over 1000 strings, prior = softmax(p_+^(1/42) + noise), r = log p_+ / p, so Z = 1
    and beta = 1 in Eq. 1.  Prints, draws, returns {strings or corpora: (n, Pearson, Spearman)}."""
    stream, out = np.random.RandomState(42), f"{args.out}-toy"  # numpy's old generator, as released
    p_plus = stream.dirichlet([0.1] * 1000)
    scores = p_plus ** (1 / 42) + stream.uniform(-0.42, 0.42, 1000)
    log_p = scores - np.log(np.exp(scores).sum())
    r, H, means = np.log(p_plus) - log_p, -p_plus @ np.log(p_plus), []
    for c in range(1000):  # the draws of np.random.choice(1000, 100000, p=p_plus) after seed(c), counted
        u = np.sort(np.random.RandomState(c).random_sample(100_000))
        counts = np.diff(u.searchsorted(p_plus.cumsum() / p_plus.sum()), prepend=0)
        means.append([counts @ log_p / len(u), counts @ r / len(u)])
    means, stream = np.array(means), np.random.RandomState(42)
    typical = means[abs(means.sum(1) + H) < 0.001]  # Eq. 1: the sum is the corpus's mean log p_+
    bins = np.histogram_bin_edges(typical[:, 0], 10)[1:-1].searchsorted(typical[:, 0], "right")
    even = [typical[bins == k][stream.randint(0, (bins == k).sum(), 100)] for k in range(10)]
    shown = {"strings": (log_p, r), "corpora": means.T, "typical corpora": typical.T,
             "typical, stratified": np.concatenate(even).T}  # 100 per tenth of the range, as released
    found = {name: (len(x), *correlations(x, y)) for name, (x, y) in shown.items()}
    lines = (f"  {k:20s} n {n:5d}  Pearson {a:+.4f}  Spearman {b:+.4f}" for k, (n, a, b) in found.items())
    print(f"toy: E r {p_plus @ r:.4f} = -H(p_+) {-H:.4f} - E log p {p_plus @ log_p:.4f}", *lines, sep="\n")
    scatter(out, "toy-distributions", {name: {"": (range(1000), x)} for name, x in (
        ("aligned p_+", p_plus), ("prior p", np.exp(log_p)), ("reward r", r))}, "string", "")
    scatter(out, "toy-string-correlation", {"strings": {"": shown.pop("strings")}})
    scatter(out, "toy-correlations", {f"{k}: {found[k][1]:+.2f}": {"": x} for k, x in shown.items()})
    return found


def enumerate_world(args):
    """IMH over the strings of at most two of A, B, C and an end E, written out, nothing sampled."""
    after = [[0.2, 0.8, -0.4, 0.6], [-0.3, 0.4, 0.9, 0.1], [0.7, -0.6, 0, 1.1], [-math.inf] * 3 + [0]]
    root, after, worth, repeated = (torch.tensor(x, dtype=torch.float64) for x in (
        [1, 0.5, 0, -0.5], after, [0.25 + 0.3, 0.85 + 0.3, -0.6 + 0.3, 0], [-0.8, -0.8, -0.8, 0]))
    log_p = root.log_softmax(0)[:, None] + after.log_softmax(1)  # (4, 4), -inf: no such string
    r = worth[:, None] + worth + torch.diag(repeated)  # a token's worth and 0.3 each, -0.8 for a repetition
    log_Z = (log_p + r / args.beta).flatten().logsumexp(0)
    log_p_plus = log_p + r / args.beta - log_Z  # Eq. 1
    (q_1, Z_1), (q_2, Z_2) = (adapt(x, args.adaptor) for x in (log_p_plus.logsumexp(1), log_p_plus))  # logs
    log_q, log_kept = q_1[:, None] + q_2, (Z_1 + Z_2)[:, None].expand(4, 4)
    s = log_q.isfinite()
    log_p, r, log_p_plus, log_q, log_kept = (x[s] for x in (log_p, r, log_p_plus, log_q, log_kept))
    q, log_w = log_q.exp(), log_kept if args.target == "global" else log_p_plus - log_q
    target = (log_q + log_w).softmax(0)
    move = q * (log_w - log_w[:, None]).clamp(max=0).exp()  # Eq. 5: propose and accept
    P, w_star, accept = move + torch.diag(1 - move.sum(1)), (target / q).max(), target @ move.sum(1)
    spectrum = torch.linalg.eigvals(P).real.sort(descending=True).values
    print(f"{args.adaptor}, {args.target}: log Z {log_Z:.8f}  Z_g {(log_q + log_kept).exp().sum():.8f}  w* "
          f"{w_star:.8f}  acceptance {accept:.8f}\nspectrum", *(f"{x:.8f}" for x in spectrum))
    for (i, j), *row in zip(s.nonzero(), q, target, *P.T):
        print("ABCE"[i] + "ABCE"[j], "q {:.8f} target {:.8f} P".format(*row), *(f"{x:.6f}" for x in row[2:]))
    law, powers, steps = q, torch.eye(len(P), dtype=P.dtype), []
    for n in range(11):  # law: of the state n steps after a draw of q
        steps.append([x.item() for x in ((powers - target).abs().sum(1).max() / 2, law @ r, law @ log_p)])
        print("{:3d} steps: worst total variation {:.8f}   E r {:.8f}   E log p {:.8f}".format(n, *steps[-1]))
        law, powers = law @ P, powers @ P
    print(f"the target: E r {target @ r:.8f}   E log p {target @ log_p:.8f}", flush=True)
    return dict(log_p=log_p, r=r, log_p_plus=log_p_plus, log_Z=log_Z, log_q=log_q, log_kept=log_kept, P=P,
                target=target, spectrum=spectrum, w_star=w_star, accept=accept, steps=steps)


def write_chunks(out, jobs, fresh):
    """Each rank writes the rows of its share of jobs, {path: function} alike on all ranks, unless the path is
    there; a chunk is whole or absent and depends on its own job only.  fresh: delete the old chunks first."""
    on_rank0(lambda: [shutil.rmtree(path) for path in out.glob("*/") if fresh].clear(), f"{out}: not emptied")
    rank, world = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(jobs), world):
        for path, function in list(jobs.items())[first + rank:first + rank + 1]:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, json.dumps(function()).encode())
                print("wrote", path, flush=True)
        require(not stop_requested(), 143)  # --resume goes on
    dist.barrier()


def sample(model, prompts, copies, adaptor, uniforms, tokenizer):
    """`copies` responses to each of N id lists, from (N copies, max_new_tokens) uniforms -> of each its token
    ids, end-of-text included, and every token's log q and log Z_t, from the scores it was drawn from."""
    found, rows = [[] for _ in uniforms], torch.arange(len(uniforms), device=uniforms.device)
    cache, _, logits = prefill(model, prompts, uniforms.shape[1], copies)
    for t in range(uniforms.shape[1]):
        blocks = logits[:, :len(tokenizer)].float().split(1 + 2**19 // len(tokenizer))  # cache-sized
        log_q, log_Z = map(torch.cat, zip(*(adapt(block, adaptor) for block in blocks)))
        tokens, log_q = sample_tokens(log_q, uniforms[rows, t])
        for row, *values in zip(*(x.tolist() for x in (rows, tokens, log_q, log_Z))):
            found[row].append(values)
        slots = stay_in_place((tokens != tokenizer.eos_token_id).nonzero()[:, 0])
        if t + 1 == uniforms.shape[1] or len(slots) == 0:
            return [tuple(map(list, zip(*values))) for values in found]
        reorder(cache, slots)  # finished responses leave the batch
        rows, (_, logits) = rows[slots], decode_step(model, cache, tokens[slots])


def generate(args):
    """Writes out/samples/<setting>/<chunk>.json: prompts, responses, token ids, tokens' log q as sampled."""
    device, tokenizer = setup(args.seed), load_tokenizer(args.model)
    specs = [f"{kind},temperature={T:g}" for kind in args.sampling_types for T in args.temperatures]
    adaptors = [parse_adaptor(spec, len(tokenizer)) for spec in specs]
    texts = [row["prompt"] for row in load_pairs(args.data, "test")]
    if args.template != "{}":  # as in the paper: the first human turn up to its first blank line
        texts = [args.template.format(x.split("Human:", 1)[-1].strip().split("\n\n")[0]) for x in texts]
    rows = [(tokenizer(text).input_ids, text) for text in dict.fromkeys(texts)]
    rows = [row for row in rows if 0 < len(row[0]) <= min(args.max_prompt_length, args.max_length - 1)]
    require(rows, f"{args.data}: no prompt of up to {args.max_prompt_length} tokens; --max-prompt-length")
    out = start_run(args, "imh_adaptors") / "samples"
    chosen = np.random.default_rng(args.seed).permutation(len(rows))[:args.prompts]
    rows = sorted((rows[i] for i in chosen), key=lambda row: len(row[0]))  # about equal lengths share a chunk
    model, n, m = load_model(args.model, args.dtype), max(1, args.batch_size // args.samples), args.samples

    def draw(i, k):
        prompts, texts = zip(*rows[k:k + n])
        shape = len(prompts) * m, args.max_length - len(prompts[-1])
        u = torch.tensor(np.random.default_rng([args.seed, i, k]).random(shape), device=device)
        drawn = sample(model, prompts, m, adaptors[i], u, tokenizer)
        return [dict(prompt=texts[j // m], prompt_ids=prompts[j // m], ids=ids, log_q=log_q, log_kept=log_Z,
                     text=tokenizer.decode(ids, skip_special_tokens=True))
                for j, (ids, log_q, log_Z) in enumerate(drawn)]
    write_chunks(out, {out / spec / f"{k:05d}.json": partial(draw, i, k)
                       for i, spec in enumerate(specs) for k in range(0, len(rows), n)}, args.overwrite)


@torch.no_grad()
def adaptor_logps(model, batch, adaptors, vocabulary):
    """One forward pass over a packed batch -> (1 + A, M): its tokens' log p_+, and log q under A adaptors."""
    response_logps(model, batch)  # readies packed attention
    require(model.packs, f"{type(model).__name__}: its rows cannot be packed, so adaptors cannot be scored")
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    inputs |= dict(attention_mask=torch.zeros(1, 1, 1, 1, device=model.device), segments=batch["segments"])
    logits = model(**inputs, logits_to_keep=batch["score_at"].to(model.device), use_cache=False).logits[0]
    n = 1 + 2**19 // vocabulary  # rows of logits that stay in a CPU core's cache
    blocks = zip(logits[:, :vocabulary].split(n), batch["targets"].to(model.device)[:, None].split(n))
    return torch.cat([torch.cat([adapt(z.float(), adaptor)[0].gather(1, y).T for adaptor in ({}, *adaptors)])
                      for z, y in blocks], 1).double().cpu()


def score(args):
    """Writes out/scores/<setting>/<chunk>.json: of each response the summed log-probs, and its rewards."""
    device, folder, tokenizer = setup(args.seed), Path(args.out, "samples"), load_tokenizer(args.model)
    same = tokenizer.get_vocab() == load_tokenizer(args.ref_model).get_vocab()
    require(same, f"{args.model} and {args.ref_model} have different vocabularies; give another --ref-model")
    specs = {path: [parse_adaptor(spec, len(tokenizer)) for spec in (path.parent.name, *args.also)]
             for path in sorted(folder.glob("*/*.json"))}
    require(specs, f"{folder}: no <setting>/<chunk>.json; first run generate with this --out")
    if args.reward not in ("tiny", "implicit"):
        reader, judge = load_tokenizer(args.reward), AutoModelForSequenceClassification.from_pretrained(
            model_folder(args.reward), dtype=torch.float32).to(device).eval().requires_grad_(False)
    out = start_run(replace(args, out=str(Path(args.out, "scores"))), "imh_adaptors")
    model, prior = load_model(args.model, args.dtype), load_model(args.ref_model, args.dtype)

    def reward(row, implicit):
        if args.reward in ("tiny", "implicit"):
            return implicit if args.reward == "implicit" else tiny_reward(row["prompt"], row["text"])
        ids = reader(row["prompt"] + row["text"], return_tensors="pt").input_ids.to(device)
        return judge(ids).logits[0, 0].item()  # at the last token

    def score_chunk(path):
        found, groups = [], {}
        for number, row in enumerate(read_rows(path)):
            require(row["ids"], f"{path}: row {number}: a prompt without response; delete the file, --resume")
            require(max(row["ids"]) < len(tokenizer), f"{path}: row {number}: --model has no such tokens")
            groups.setdefault(tuple(row["prompt_ids"]), []).append(row)
        rows = [dict(prompt_ids=list(x), responses=[y["ids"] for y in rows]) for x, rows in groups.items()]
        for batch in pack_pairs(rows, args.tokens_per_microbatch, 0, 1):
            members = [row for i in batch["index"] for row in list(groups.values())[i]]
            given = batch if not args.legacy_unconditional_prior else pack_pairs([dict(prompt_ids=[
                tokenizer.bos_token_id], responses=[row["ids"] for row in members])], 10**9, 0, 1)[0]
            log_p = response_logps(prior, given)[0].tolist()
            tokens = adaptor_logps(model, batch, specs[path], len(tokenizer))
            tokens = torch.cat([tokens[1:2].isinf().double(), tokens.clamp(-args.legacy_clamp or -math.inf)])
            sums = tokens.new_zeros(len(tokens), len(members)).index_add(1, batch["owner"], tokens).T.tolist()
            for row, before, (outside, after, rescored, *also) in zip(members, log_p, sums):
                implicit = args.beta * (after - before) * (-1 if args.legacy_flip_reward else 1)
                found.append(dict(
                    prompt=row["prompt"], tokens=len(row["ids"]), log_prior=before, log_aligned=after,
                    log_q=rescored if args.legacy_clamp else math.fsum(row["log_q"]), rescored=rescored,
                    log_kept=math.fsum(row["log_kept"]), outside=outside, also=also, implicit=implicit,
                    reward=reward(row, implicit)))
        return found
    write_chunks(out, {out / p.relative_to(folder): partial(score_chunk, p) for p in specs}, args.overwrite)


def read_corpora(args):
    """{setting: rows} of the run folder's scores, or of --csv, joined by setting, prompt and text."""
    names = {"scoredreward": {"reward": "score"}, "scorednll": {"log_prior": "negative_log_probability"},
             "scoredcorrectionnll": {"log_aligned": "original_negative_log_probability",
                                     "log_q": "samplingbiased_negative_log_probability"}}
    corpora, joined, beta = {}, {}, args.beta * (-1 if args.legacy_flip_reward else 1)
    for path in sorted(Path(args.out, "scores").glob("*/*.json")) if not args.csv else []:
        corpora.setdefault(path.parent.name, []).extend(read_rows(path))
    for path in sorted(Path(args.csv).glob("*_scored*.csv")) if args.csv else []:
        kind, T, file = re.search(r"numgenerations\d+_(.+?)_t([\d.]+)_.*?(scored[a-z]+)", path.name).groups()
        sign, setting = 1 if file == "scoredreward" else -1, joined.setdefault(f"{kind},temperature={T}", {})
        for number, row in enumerate(read_rows(path), 2):
            for name in ("prompt", "generated_text", *names[file].values()):
                require(row.get(name) is not None, f"{path}:{number}: no column {name!r} in {', '.join(row)}")
            values = {ours: sign * float(row[name]) for ours, name in names[file].items()}
            setting.setdefault((row["prompt"], row["generated_text"]), {}).update(values)
    for spec, rows in joined.items():
        corpora[spec] = [
            dict(x, prompt=key[0], outside=0, log_kept=math.nan,
                 implicit=beta * (x["log_aligned"] - x["log_prior"]))
            for key, x in rows.items() if len(x) == 4 and key[1].strip()]
    require(corpora and all(corpora.values()), f"{args.csv}: each setting needs CSVs *_{', *_'.join(names)}*"
            if args.csv else f"{args.out}: no scores; first run generate, then score, with this --out")
    return corpora


def imh(args):
    """Chains of Eq. 5 over each setting's draws, and their limit in closed form: out/imh.json and a table."""
    require(0 <= args.burn_in < args.chain_length and args.thin > 0, "--burn-in < --chain-length, --thin > 0")
    records, shown = [], "accept w_star ess tau log_Z check outside id_sd slope r rho r_all r_typical".split()
    print(" " * 35 + "as drawn: log p, r | chain: log p, r | SNIS: log p, r, s.e. |", *shown)
    for spec, rows in read_corpora(args).items():
        rng, T = np.random.default_rng([args.seed, len(records)]), parse_adaptor(spec).get("temperature", 1)
        names = "prompt log_prior reward implicit log_aligned log_q log_kept outside".split()
        prompt, log_p, r, implicit, log_p_plus, log_q, log_kept, outside = map(np.array, zip(
            *([row[name] for name in names] for row in rows)))
        targets = {"global": log_p_plus / T, "aligned": log_p_plus, "posterior": log_p + r / args.beta}
        log_w = np.where(np.isfinite(log_q), targets[args.target] - log_q, -math.inf)  # outside q: no weight
        values = np.stack([log_p, r, implicit, log_p_plus], 1)
        prompt = np.unique(prompt if not args.pooled else [""] * len(rows), return_inverse=True)[1]
        order, counts = prompt.argsort(kind="stable"), np.bincount(prompt)
        first, at, P = (counts.cumsum() - counts)[:, None], np.arange(counts.max()), len(counts)
        pool = order[np.minimum(first + at, len(order) - 1)]  # (P, M): the draws of each prompt
        padded = torch.tensor(np.where(at < counts[:, None], log_w[pool], -math.inf))
        w_bar, found = pool_diagnostics(padded, torch.tensor(counts))
        means = np.einsum("pm,pmk->pk", w_bar, values[pool])  # SNIS of each prompt
        error = means.std(0, ddof=1) / math.sqrt(P) if P > 1 else np.sqrt(
            np.einsum("pm,pmk->k", w_bar**2, (values[pool] - means) ** 2))
        u = rng.random((2, P, args.chain_length))
        proposals = order[first + (u[0] * counts[:, None]).astype(int)]
        held = imh_chain(log_w[proposals], torch.tensor(u[1] * (not args.legacy_accept_all)).log()).numpy()
        states = np.take_along_axis(proposals, held, 1)[:, args.burn_in::args.thin]
        corpora = values[rng.integers(len(rows), size=(1000, args.corpus_size))].mean(1)
        typical = abs(corpora[:, 3] - log_p_plus.mean()) * args.corpus_size**0.5 < args.eps * log_p_plus.std()
        x, slope = {name: value.mean().item() for name, value in found.items()}, np.cov(log_p_plus - log_p, r)
        for kind, drawn in (("local", values), ("chain", values[states.ravel()])):
            x[kind], x[f"{kind}_cov"] = drawn.mean(0).tolist(), np.cov(drawn.T).tolist()
        records.append(x := x | dict(zip(("r", "rho"), correlations(log_p, r)), setting=spec, prompts=P,
                  snis=means.mean(0).tolist(), snis_error=error.tolist(), outside=outside.sum().item(),
                  accept=(held[:, 1:] == np.arange(1, args.chain_length)).mean().item(), strings=len(rows),
                  tau=autocorrelation_time(torch.tensor(r[states])).nanmean().item(),
                  check=abs(log_p_plus / T - log_q - log_kept).max().item(),  # Eq. 2, 3: they are equal
                  id_sd=np.std(log_p + r / args.beta - log_p_plus).item(),  # Eq. 1: of log Z(x)
                  slope=slope[0, 1] / max(slope[0, 0], 1e-12), r_all=correlations(*corpora[:, :2].T)[0],
                  r_typical=correlations(*corpora[typical, :2].T)[0]))
        means = *x["local"][:2], *x["chain"][:2], *x["snis"][:2], error[1]
        print(f"{spec:34s}", *(f"{v:8.3f}" for v in means), *(f"{x[k]:7.3g}" for k in shown), flush=True)
    write(Path(args.out, "imh.json"), records)
    return records


def figures(args):
    """String and corpus panels from out/imh.json and the scores: of the reward, and of the implicit one."""
    require(Path(args.out, "imh.json").exists(), f"{args.out}: no imh.json; first run imh with this --out")
    records, data = read_rows(Path(args.out, "imh.json")), read_corpora(args)
    for k, name in ((1, "reward"), (2, "implicit")):
        panels = {"strings": {s: np.array([(x["log_prior"], x[name]) for x in v]).T for s, v in data.items()}}
        for kind, title in (("local", "corpora as drawn"), ("chain", "corpora after IMH")):
            panels[title] = {x["setting"]: (x[kind][0], x[kind][k], np.array(x[f"{kind}_cov"])[
                :k + 1:k, :k + 1:k] / args.corpus_size) for x in records}
        xy = [[np.hstack([s[i] for s in series.values()]) for i in (0, 1)] for series in panels.values()]
        titles = ["{}\nPearson {:+.2f}, Spearman {:+.2f}".format(title, *correlations(*pair))
                  for title, pair in zip(panels, xy)]
        print(f"{name}:", "; ".join(titles).replace("\n", " "))
        scatter(args.out, f"correlations-{name}", dict(zip(titles, panels.values())), ylabel=name)


def main(args, command="all"):
    steps = dict(toy=toy, enumerate=enumerate_world, generate=generate, score=score, imh=imh, figures=figures)
    if command == "all" and args.model == Args.model and not Path(args.model).exists():
        import dpo
        dpo.main(dpo.Args(beta=args.beta, lr=1e-4, max_steps=40, eval_pairs=32, out=args.model))
    for name in steps if command == "all" else [command]:
        if name in ("generate", "score") or os.environ.get("RANK", "0") == "0":
            steps[name](args)


if __name__ == "__main__":
    main(args, type(args).__name__)
