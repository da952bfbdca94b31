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

In the released code (--legacy flags here) the accept test is a one-element tuple, so all are accepted; the
implicit reward is log p - log p_+, the negative of Eq. 1's; the prior does not see the prompt; log-probs of
tokens are clamped at -25. Its target is aligned, pooled; top-k 50 joins every adaptor (top_p090,top_k=50).
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
from typing import Literal

import tyro


@dataclass
class Args:
    sampling_types: tuple[str, ...] = ("ancestral_strict", "top_k50", "top_k30", "top_p095", "top_p090",
                                       "typical_p090", "eta_n00009", "greedy")  # or top_p=0.8,min_p=0.1
    temperatures: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)  # each with every sampling type but greedy
    prompts: int = 1000  # distinct prompts of the test split, drawn at random
    samples: int = 2  # responses per prompt and setting
    template: str = "{}"  # around the prompt; other than {}: around the first turn, to its first blank line
    reward: str = "tiny"  # tiny (the known one), implicit, or a sequence classification model
    beta: float = 0.5  # KL weight of Eq. 1: of the implicit reward, of --target posterior and of enumerate
    also: tuple[str, ...] = ()  # further adaptors under which every response is scored, in the same pass
    adaptor: str = "top_k=2"  # of enumerate: a name, or key=value,key=value
    target: Literal["global", "aligned", "posterior"] = "global"  # of IMH; aligned: on q's support, any T
    pooled: bool = False  # one chain over all prompts, which weighs a prompt by its normaliser
    chain_length: int = 1000  # proposals per chain, drawn with replacement from the stored draws
    burn_in: int = 100  # steps left out
    thin: int = 1  # every thin-th step is kept
    corpus_size: int = 200  # strings of a corpus, for the figures and the typicality filter
    eps: float = 0.25  # typical corpus: mean log p_+ within eps standard errors of its expectation
    csv: str = ""  # folder of the authors' scored CSVs, read by imh and figures instead of the scores
    legacy_accept_all: bool = False  # imh: every proposal of a finite weight is accepted
    legacy_flip_reward: bool = False  # score, or imh of CSVs: the implicit reward's sign
    legacy_unconditional_prior: bool = False  # score: log p(y) after the start token, not log p(y | x)
    legacy_clamp: float = 0.0  # score: 25 takes log p_+ and log q from a second pass, each token's >= -25
    model: str = "results/dpo"  # aligned model p_+: a run folder, a local folder or a hub id
    ref_model: str = "tiny"  # prior p: the model p_+ was trained from
    data: str = "tiny"  # prompts: tiny, hh, a file, a folder or a hub id
    max_length: int = 256  # of the longest prompt in a batch and a response, in tokens
    max_prompt_length: int = 255  # longer prompts are left out
    batch_size: int = 64  # responses sampled side by side
    tokens_per_microbatch: int = 8192  # memory knob of scoring: packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 may move tokens across a kept set's edge
    seed: int = 0
    out: str = "results/imh_adaptors"  # run folder of generate, score, imh, figures; of toy, with -toy
    resume: bool = False  # continue a killed generate or score: chunks already written are kept
    overwrite: bool = False  # replace what is in the run folder


PRESETS = {
    "tiny": Args(sampling_types=("ancestral_strict", "top_k=5", "top_p090", "typical_p090", "greedy"),
                 temperatures=(0.5, 1.0, 1.5), prompts=32, samples=8, max_length=128),
    "rlhf": Args(model="ethz-spylab/rlhf-7b-harmless", ref_model="meta-llama/Llama-2-7b-hf", data="hh",
                 reward="ethz-spylab/reward_model", template="Human: {} Assistant:", dtype="bfloat16"),
    "dpo": Args(model="kaist-ai/janus-dpo-7b", ref_model="kaist-ai/janus-7b", reward="implicit", beta=1.0,
                template="[INST] Human: {} Assistant:[/INST]", data="hh", dtype="bfloat16")}  # its prior
COMMANDS = ("all", "toy", "enumerate", "generate", "score", "imh", "figures")

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    if sys.argv[1:2] not in [["--help"], ["-h"], *([name] for name in COMMANDS)]:
        sys.argv.insert(1, "all")
    preset = PRESETS[sys.argv.pop(2) if sys.argv[2:] and sys.argv[2] in PRESETS else "tiny"]
    kinds = {name: type(name, (Args,), {"__doc__": ""})(**asdict(preset)) for name in COMMANDS}
    args = tyro.cli(tyro.extras.subcommand_type_from_defaults(kinds), description=__doc__)

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.cm import tab20
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (decode_step, load_model, load_pairs, load_tokenizer, model_folder, on_rank0, pack_pairs,
                    prefill, read_rows, reorder, require, response_logps, sample_tokens, setting, setup,
                    start_run, stay_in_place, stop_requested, tiny_reward, write)

SAMPLING_TYPES = {  # the released code's names; what is absent is off
    "ancestral_strict": "top_k=0", "ancestral": "top_k=50", "top_k50": "top_k=50", "top_k30": "top_k=30",
    "top_p095": "top_p=0.95", "top_p090": "top_p=0.9", "typical_p090": "typical_p=0.9",
    "eta_n00009": "eta_cutoff=0.0009", "greedy": "top_k=1"}
ORDER = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # the library's


def parse_adaptor(spec, vocabulary=math.inf):
    """An adaptor by the library's generate() keywords, from such a dict, "name", "key=value,..." or both;
    top_k=0, top_p=1, temperature=1: off.  SystemExit: unknown, or out of range, as top_k above vocabulary."""
    if not isinstance(spec, dict):
        pairs = [SAMPLING_TYPES.get(part, part).split("=") for part in spec.split(",")]
        require(all(len(pair) == 2 and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", pair[1]) for pair in pairs),
                f"adaptor {spec!r}: write one of {', '.join(SAMPLING_TYPES)}, or key=number,...")
        spec = {key: float(value) for key, value in pairs}
    for key, value in spec.items():
        require(key in ("temperature", *ORDER), f"adaptor: no {key!r}: use temperature, {', '.join(ORDER)}")
        high = {"temperature": math.inf, "top_k": vocabulary}.get(key, 1)
        require(0 < value <= high and (key != "top_k" or value % 1 == 0) or (key, value) == ("top_k", 0),
                f"adaptor: {key}={value:g} keeps nothing, or is not a number of tokens: 0 < {key} <= {high}")
    return {k: v for k, v in spec.items() if v != dict(top_k=0, top_p=1, temperature=1).get(k)}


def kept_set(log_pi, name, x):
    """The tokens S(pi) an adaptor keeps.  Log-probs (..., V), -inf: dropped before -> booleans (..., V)"""
    H, V = lambda: torch.special.entr(log_pi.exp()).sum(-1, keepdim=True), log_pi.shape[-1]  # the entropy
    if name in ("top_k", "top_p", "typical_p"):  # x tokens, or least mass x, of the likeliest or most typical
        key = (-log_pi - H()).abs() if name == "typical_p" else -log_pi
        order = key.float().view(torch.int32).long().bitwise_left_shift_(32)  # of (key, index), as one number
        order.bitwise_or_(torch.arange(V, device=key.device))
        reached = math.inf if name == "top_k" else max(x - 1e-6, 1e-9)
        for n in [int(x)] if name == "top_k" else [min(1024, V), V]:  # all are sorted if 1024 hold less
            first = (torch.from_numpy(np.sort(np.partition(order, n - 1)[..., :n])) if order.is_cpu
                     else order.topk(n, largest=False).values)
            mass = log_pi.gather(-1, first & 0xFFFFFFFF).exp().cumsum(-1, dtype=torch.float64)
            if (mass[..., -1] >= reached).all():
                break
        last = torch.searchsorted(mass, torch.full_like(mass[..., :1], reached)).clamp(max=n - 1)
        return order <= first.gather(-1, last)  # the token that reaches x is kept
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
    log_q = log_a.log_softmax(-1) if "temperature" in adaptor else log_a
    for name in [name for name in ORDER if name in adaptor]:
        log_a = log_a.masked_fill(~kept_set(log_q, name, adaptor[name]), -math.inf)
        log_q = log_a.log_softmax(-1)
    log_Z = log_a.amax(-1) - log_q.amax(-1)  # read off the likeliest token; logsumexp is slow on -inf
    require(log_Z.isfinite().all(), f"adaptor {adaptor} keeps nothing at {(~log_Z.isfinite()).sum()} of "
            f"{log_Z.numel()} positions: the logits there are -inf or nan; check the model and --dtype")
    return log_q, log_Z


def imh_chain(log_w, log_u):
    """The draw held at each step of Eq. 5, for chains side by side.  (..., N), (..., N) -> indices (..., N)
    log_w = log target - log q of the draws, + constant; log_u: of uniforms, -inf accepts finite weights."""
    log_w, log_u = (torch.as_tensor(x).movedim(-1, 0).contiguous() for x in (log_w, log_u))
    held, state = torch.zeros(log_w.shape, dtype=torch.long, device=log_w.device), torch.zeros_like(log_w[0])
    low, steps = torch.finfo(log_w.dtype).min / 4, torch.arange(len(log_w)).to(log_w)
    log_w_held, accept = log_w[0].clamp(min=low), torch.empty_like(log_w[0])
    for i in range(1, len(log_w)):
        proposed = log_w[i].clamp(min=low)  # finite, as lerp needs
        torch.lt(log_u[i].clamp(min=low / 2), proposed - log_w_held, out=accept)  # 1. or 0.
        log_w_held.lerp_(proposed, accept)  # a choice without branches: a random mask costs a CPU dearly
        held[i] = state.lerp_(steps[i], accept)
    return held.movedim(0, -1)


def pool_diagnostics(log_w):
    """What IMH over N stored draws tends to: self-normalised importance sampling.  (N,) log-weights -> SNIS
    weights (N,); log Z = log mean w, w* = max w / mean w, gap = 1 / w*, ESS per draw, acceptance."""
    w_bar, N = torch.as_tensor(log_w).softmax(0).numpy(), len(log_w)
    pairs = np.sort(w_bar)[::-1] @ (2 * np.arange(N) + 1)  # sum_ij min(w_i, w_j)
    return w_bar, dict(log_Z=np.logaddexp.reduce(log_w) - math.log(N), w_star=N * w_bar.max(),
                       gap=1 / (N * w_bar.max()), ess=1 / (w_bar @ w_bar) / N, accept_limit=pairs / N)


def autocorrelation_time(x):
    """1 + 2 sum_k rho_k, up to the first negative rho_k.  (P, N) chains -> (P,); nan for a constant chain."""
    x, N = x - x[..., :1], x.shape[-1]  # exactly 0 in a constant chain
    rho = torch.fft.irfft(torch.fft.rfft(x - x.mean(-1, keepdim=True), 2 * N).abs().square())[..., :N]
    return 2 * (rho / rho[..., :1] * (rho < 0).cumsum(-1).eq(0)).sum(-1) - 1


def correlations(x, y):
    """Pearson's and Spearman's (equals share their mean rank) of n pairs; nan below three, or if constant."""
    counted = [np.unique(z, return_inverse=True, return_counts=True)[1:] for z in (x, y)]
    ranks = [(counts.cumsum() - (counts - 1) / 2)[inverse] for inverse, counts in counted]
    usable = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return [float(np.corrcoef(*pair)[0, 1]) if usable else math.nan for pair in ((x, y), ranks)]


def scatter(out, name, note, panels, xlabel, ylabel):
    """panels: {title: {label: (n, 2) points}}, all with the same labels -> out/figures/name.png"""
    figure = Figure((4.5 * len(panels) + 2, 4.5), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for i, (label, xy) in enumerate(series.items()):
            axis.plot(*np.transpose(xy), "o^s"[i // 20 % 3], ms=2, color=tab20(i % 20), label=label)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, markerscale=3)
    figure.suptitle(f"as {name}.png of the released code; {note}", fontsize=8)
    Path(out, "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, "figures", f"{name}.png"), dpi=130)


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
    shown = {"strings": np.stack([log_p, r], 1), "corpora": means, "typical corpora": typical,
             "typical, stratified": np.concatenate(even)}  # 100 per tenth of the range, as released
    found = {name: (len(points), *correlations(*points.T)) for name, points in shown.items()}
    print(f"toy: E r {p_plus @ r:.4f} = -H(p_+) {-H:.4f} - E log p {p_plus @ log_p:.4f}")
    for name, (n, pearson, spearman) in found.items():
        print(f"  {name:20s} n {n:5d}  Pearson {pearson:+.4f}  Spearman {spearman:+.4f}")
    bars = {k: {"strings": [*enumerate(x)]} for k, x in (("p_+", p_plus), ("p", np.exp(log_p)), ("r", r))}
    dots = [(f"{k}: Pearson {found[k][1]:+.2f}", {"one each": points}) for k, points in shown.items()]
    scatter(out, "toy-distributions", "1000 strings", bars, "string", "value")
    scatter(out, "toy-string-correlation", "1000 strings", dict(dots[:1]), "log p (nats)", "r")
    scatter(out, "toy-correlations", "means of 100,000", dict(dots[1:]), "mean log p (nats)", "mean r")
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
    return dict(log_p=log_p, r=r, log_p_plus=log_p_plus, log_Z=log_Z, log_q=log_q, log_kept=log_kept, P=P,
                target=target, spectrum=spectrum, w_star=w_star, accept=accept, steps=steps)


def write_chunks(out, jobs, fresh):
    """Each rank writes the rows of its share of jobs, {path: function} alike on all ranks, unless they are
    there; a chunk is whole or absent and depends on its own job only.  fresh: delete old chunks first."""
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
        drawn, n = [], 1 + 2**19 // len(tokenizer)  # rows of logits that stay in a CPU core's cache
        for block, u in zip(logits[:, :len(tokenizer)].float().split(n), uniforms[rows, t].split(n)):
            log_q, log_Z = adapt(block, adaptor)
            drawn.append((*sample_tokens(log_q, u), log_Z))
        tokens, log_q, log_Z = map(torch.cat, zip(*drawn))
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
    specs = dict.fromkeys("greedy" if kind == "greedy" else f"{kind},temperature={T:g}"  # greedy: once
                          for kind in args.sampling_types for T in args.temperatures)
    adaptors = [parse_adaptor(spec, len(tokenizer)) for spec in specs]
    turn = lambda x: x if args.template == "{}" else x.split("Human:", 1)[-1].strip().split("\n\n")[0]
    texts = [args.template.replace("{}", turn(row["prompt"])) for row in load_pairs(args.data, "test")]
    longest = min(args.max_prompt_length, args.max_length - 1)
    rows = [(ids, x) for x in dict.fromkeys(texts) if 0 < len(ids := tokenizer(x).input_ids) <= longest]
    require(rows, f"{args.data}: no prompt of up to {longest} tokens; --max-prompt-length, --max-length")
    out = start_run(args, "imh_adaptors") / "samples"
    rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))[:args.prompts]]
    rows.sort(key=lambda row: len(row[0]))  # about equal lengths share a chunk
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
    ready = hasattr(model, "packs") or response_logps(model, batch)  # readies packed attention, once
    require(ready and model.packs, f"{type(model).__name__}: its rows cannot be packed, nor adaptors scored")
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
    judge = lambda row: tiny_reward(row["prompt"], row["text"])
    if args.reward not in ("tiny", "implicit"):
        reader, options = load_tokenizer(args.reward), dict(dtype=torch.float32, output_loading_info=True)
        rm, info = AutoModelForSequenceClassification.from_pretrained(model_folder(args.reward), **options)
        require(not info["missing_keys"] and rm.num_labels == 1, f"{args.reward}: not a reward model, with a "
                "sequence classification head of one output; give such a --reward, or implicit, or tiny")
        rm, encode = rm.to(device).eval().requires_grad_(False), partial(reader, return_tensors="pt")
        judge = lambda row: rm(encode(row["prompt"] + row["text"]).input_ids.to(device)).logits.item()
    out = folder.with_name("scores")  # --resume also begins a score that had not begun
    start_run(replace(args, out=str(out), resume=args.resume and out.exists()), "imh_adaptors")
    model, prior = load_model(args.model, args.dtype), load_model(args.ref_model, args.dtype)
    def score_chunk(path):
        found, groups = [], {}
        for number, row in enumerate(read_rows(path)):
            require(row["ids"] and max(row["ids"]) < len(tokenizer), f"{path}: row {number}: no response, or "
                    "tokens that --model does not have; delete the file, generate --resume")
            groups.setdefault(tuple(row["prompt_ids"]), []).append(row)
        rows = [dict(prompt_ids=list(x), responses=[y["ids"] for y in rows]) for x, rows in groups.items()]
        for batch in pack_pairs(rows, args.tokens_per_microbatch, 0, 1):
            members = [row for i in batch["index"] for row in list(groups.values())[i]]
            given = batch if not args.legacy_unconditional_prior else pack_pairs([dict(prompt_ids=[
                tokenizer.bos_token_id], responses=[row["ids"] for row in members])], 10**9, 0, 1)[0]
            log_p = adaptor_logps(prior, given, [], len(tokenizer))
            tokens = adaptor_logps(model, batch, specs[path], len(tokenizer))
            tokens = torch.cat([log_p, tokens[1:2].isinf(), tokens.clamp(-args.legacy_clamp or -math.inf)])
            sums = tokens.new_zeros(len(tokens), len(members)).index_add(1, batch["owner"], tokens).T.tolist()
            for row, (before, outside, after, rescored, *also) in zip(members, sums):
                implicit = args.beta * (after - before) * (-1 if args.legacy_flip_reward else 1)
                found.append(dict(prompt=row["prompt"], log_prior=before, log_aligned=after, also=also,
                    rescored=rescored, log_q=rescored if args.legacy_clamp else math.fsum(row["log_q"]),
                    log_kept=math.fsum(row["log_kept"]), outside=outside, implicit=implicit,
                    reward=implicit if args.reward == "implicit" else judge(row)))
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
    for path in sorted(Path(args.csv).glob("*numgenerations*_t*_scored*.csv")) if args.csv else []:
        kind, T, file = re.search(r"numgenerations\d+_(.+?)_t([\d.]+)_.*?(scored[a-z]+)", path.name).groups()
        sign, setting = 1 if file == "scoredreward" else -1, joined.setdefault(f"{kind},temperature={T}", {})
        for number, row in enumerate(read_rows(path), 2):
            for name in ("prompt", "generated_text", *names[file].values()):
                require(row.get(name) is not None, f"{path}:{number}: no column {name!r} in {', '.join(row)}")
            values = {ours: sign * float(row[name] or "nan") for ours, name in names[file].items()}
            setting.setdefault((row["prompt"], row["generated_text"]), {}).update(values)
    for spec, rows in joined.items():
        corpora[spec] = [dict(x, prompt=prompt, outside=0, log_kept=math.nan,
                              implicit=beta * (x["log_aligned"] - x["log_prior"])) for (prompt, text), x in
                         rows.items() if len(x) == 4 and text.strip() and math.isfinite(sum(x.values()))]
    require(corpora and all(corpora.values()), f"{args.csv}: each setting needs CSVs *_{', *_'.join(names)}*"
            if args.csv else f"{args.out}: no scores; first run generate, then score, with this --out")
    return corpora


def imh(args):
    """Chains of Eq. 5 over each setting's draws, and their limit in closed form: out/imh.json and a table.
    check: Eq. 2 and 3, log a - log q = sum log Z_t.  id_sd: the sd of log p + r / beta - log p_+, by Eq. 1 of
    log Z(x); slope: of r on log p_+ - log p, by Eq. 1 beta.  r, rho: Pearson, Spearman of log p and r, r_i,
    rho_i of log p and the implicit reward, of strings; r_all: of 1000 corpora; r_typ: of the typical ones."""
    require(0 <= args.burn_in < args.chain_length and args.thin > 0, "--burn-in < --chain-length, --thin > 0")
    records, n = [], args.corpus_size
    shown = "accept w_star ess tau log_Z check outside id_sd slope r rho r_i rho_i r_all r_typ".split()
    print(" " * 35 + "as drawn: log p, r | chain: log p, r | SNIS: log p, r, s.e. |", *shown)
    for spec, rows in read_corpora(args).items():
        rng, T = np.random.default_rng([args.seed, len(records)]), parse_adaptor(spec).get("temperature", 1)
        log_p, r, implicit, log_p_plus, log_q, log_kept = (np.array([row[name] for row in rows]) for name in (
            "log_prior", "reward", "implicit", "log_aligned", "log_q", "log_kept"))
        values, cov = np.stack([log_p, r, implicit, log_p_plus], 1), np.cov(log_p_plus - log_p, r)
        target = {"global": log_p_plus / T, "aligned": log_p_plus, "posterior": log_p + r / args.beta}
        log_w = np.where(np.isfinite(log_q), target[args.target] - log_q, -math.inf)  # outside q: no weight
        prompt = np.unique([row["prompt"] if not args.pooled else "" for row in rows], return_inverse=True)[1]
        pools = np.split(prompt.argsort(kind="stable"), np.bincount(prompt).cumsum()[:-1])
        w_bar, found = zip(*(pool_diagnostics(log_w[pool]) for pool in pools))
        snis = np.stack([w @ values[pool] for w, pool in zip(w_bar, pools)])
        u = rng.random((2, len(pools), args.chain_length))
        proposals = np.stack([pool[(v * len(pool)).astype(int)] for pool, v in zip(pools, u[0])])
        held = imh_chain(log_w[proposals], torch.tensor(u[1] * (not args.legacy_accept_all)).log()).numpy()
        states = np.take_along_axis(proposals, held, 1)[:, args.burn_in::args.thin]
        corpora = {kind: drawn[rng.integers(len(drawn), size=(1000, n))].mean(1) for kind, drawn in (
            ("local", values), ("chain", values[states.ravel()]))}
        near = abs(corpora["local"][:, 3] - log_p_plus.mean()) * math.sqrt(n) < args.eps * log_p_plus.std()
        corpora["typical"] = corpora["local"][near]
        x = {name: np.mean([one[name] for one in found]).item() for name in found[0]} | dict(
            setting=spec, prompts=len(pools), local=values.mean(0).tolist(), snis=snis.mean(0).tolist(),
            chain=values[states.ravel()].mean(0).tolist(), outside=sum(row["outside"] for row in rows),
            snis_error=(snis.std(0) / (len(pools) - 1 or math.nan)**0.5).tolist(), n=n,
            accept=(held[:, 1:] == np.arange(1, args.chain_length)).mean().item(), target=args.target,
            tau=autocorrelation_time(torch.tensor(r[states])).nanmean().item(),
            check=abs(log_p_plus / T - log_q - log_kept).max().item(), slope=cov[0, 1] / max(cov[0, 0], 1e-3),
            id_sd=np.std(log_p + r / args.beta - log_p_plus).item(),
            corpora={kind: means[:100].tolist() for kind, means in corpora.items()})
        x |= zip(("r", "rho", "r_i", "rho_i"), correlations(log_p, r) + correlations(log_p, implicit))
        x["r_all"], x["r_typ"] = (correlations(*corpora[kind][:, :2].T)[0] for kind in ("local", "typical"))
        records.append(x)
        means = *x["local"][:2], *x["chain"][:2], *x["snis"][:2], x["snis_error"][1]
        print(f"{spec:34s}", *(f"{v:8.3f}" for v in means), *(f"{x[k]:7.3g}" for k in shown), flush=True)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write(Path(args.out, "imh.json"), records)
    return records


def figures(args):
    """Strings, and 100 corpora of each setting: as drawn (local), the typical of these, after IMH."""
    require(Path(args.out, "imh.json").exists(), f"{args.out}: no imh.json; first run imh with this --out")
    runs, data = read_rows(Path(args.out, "imh.json")), read_corpora(args)
    for k, name, file in ((1, "reward", "correlations"), (2, "implicit", "correlations_dpo_secret")):
        shown = {"strings": {s: np.array([(x["log_prior"], x[name]) for x in v]) for s, v in data.items()}}
        for kind, title in (("local", "as drawn"), ("typical", "as drawn, typical"), ("chain", "after IMH")):
            corpora = {x["setting"]: np.reshape(x["corpora"][kind], (-1, 4)) for x in runs}
            shown[f"{runs[0]['n']}-string means {title}"] = {s: x[:, [0, k]] for s, x in corpora.items()}
        panels = {"{}\nPearson {:+.2f}, Spearman {:+.2f}".format(title, *correlations(
            *np.concatenate([*series.values()]).T)): series for title, series in shown.items()}
        print(f"{name}:", "; ".join(panels).replace("\n", " "))
        scatter(args.out, file, f"{setting(args)}; IMH: {runs[0]['target']}", panels, "log p (nats)", name)


def main(args, command="all"):
    steps = dict(toy=toy, enumerate=enumerate_world, generate=generate, score=score, imh=imh, figures=figures)
    if command == "all" and args.model == Args.model and not Path(args.model, "model").exists():
        if Path(__file__).with_name("dpo.py").exists():
            import dpo
            dpo.main(dpo.Args(beta=args.beta, lr=1e-4, max_steps=40, eval_pairs=32, out=args.model))
        else:  # carried away alone: the chains go from the prior to Eq. 1
            print(f"no {args.model}, nor dpo.py to train it: --model {args.ref_model} --target posterior")
            args = replace(args, model=args.ref_model, target="posterior")
    for name in steps if command == "all" else [command]:
        if name in ("generate", "score") or os.environ.get("RANK", "0") == "0":
            steps[name](args)


if __name__ == "__main__":
    main(args, type(args).__name__)
