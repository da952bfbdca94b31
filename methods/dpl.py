"""Distributional Preference Learning (DPL): reward models that output a distribution of utility.

Siththaranjan, Laidlaw, Hadfield-Menell 2023, https://arxiv.org/abs/2312.08358

Preferences hide context: who judged, by which objective.  A reward model fitted by Eq. 1 follows Borda count,
not expected utility (Thm. 3.1).  DPL outputs a distribution D(a) of utility, fitted by the likelihood
P(a beats b) = P(u_a > u_b) + P(u_a = u_b) / 2, where u_a ~ D(a) and u_b ~ D(b) are independent:

    base               one point r_a                   -log sigmoid(r_a - r_b)   (Eq. 1)
    mean_and_variance  N(mu, sigma = softplus(f))      -log Phi((mu_a - mu_b) / sqrt(sigma_a^2 + sigma_b^2))
    categorical        softmax on K atoms in [0, 1]    -log sum_ij p_i(a) p_j(b) M_ij, M_ij = 1, 1/2 or 0

    python methods/dpl.py                 hidden-context: all three in the tiny world
    python methods/dpl.py synthetic 1d    Fig. 3 in seconds; figure3: at full size; 2d: the other world
    python methods/dpl.py train --type categorical --model gpt2 --data pairs.jsonl --lr 1e-5 --out results/cat
    python methods/dpl.py evaluate --checkpoints results/cat --data pairs.jsonl --out eval_results.jsonl
    python methods/dpl.py score --checkpoints results/cat --prompt "Human: Hi" --response " Hello"
    python methods/dpl.py score --checkpoints results/cat --data samples.jsonl --risk cvar    (best of n)
    python methods/dpl.py summarize --files reward_outputs.jsonl eval_results.jsonl

Presets: the commands, figure3, and hh, which is train with Llama-2-7B and LoRA (App. C.2).
As in the released code, not the paper: link of mean_and_variance (the paper's: --link probit), entropy bonus
(--entropy example), weight decay, z drawn for each side of a synthetic pair (--shared-context is Eq. 2).
Not as in the released code: fp32 head, losses in log space (a bf16 head stops learning at lr 3e-6), a floor
on sigma, no dropout in LoRA, a coin for synthetic ties, the true Borda count in 2d.

Found by hidden-context on the tiny world, seeds 0, 1, 2: base follows Borda count (r .96-.97) and rates up
the monsters that a quarter of the readers hate; the sd of mean_and_variance finds what divides the readers
(AUC 1.00, .84, .97), its 1 % quantile avoids it; after as many steps categorical finds little (AUC .55-.61).
"""

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import tyro

TYPES = "base", "mean_and_variance", "categorical"
RISKS = "mean", "quantile", "cvar", "mean_sd", "entropic"
ALPHAS = 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 0.9, 0.99


@dataclass
class Args:
    type: Literal[(*TYPES, "all")] = "mean_and_variance"  # all: the three, against the tiny world's truth
    link: Literal["logistic", "logistic_matched", "probit"] = "logistic"  # of mean_and_variance
    num_atoms: int = 10  # K of categorical; App. C.2
    entropy: Literal["batch", "example"] = "batch"  # of a micro-batch's mean p, or mean of each (App. C.2)
    entropy_coeff: float = 0.1  # kappa, categorical only; App. C.2
    variance_penalty: float = 0.0  # times sigma_chosen^2 + sigma_rejected^2; released code only
    sigma_floor: float = 1e-4  # a width added to every comparison; none in the released code
    soft_labels: bool = False  # p_u(a, b) of Eq. 1 is the row's p_chosen instead of 1
    subset: Literal["both", "helpful", "harmless"] = "both"  # sub-folder of data, or by data_subset
    lora: bool = False  # rank 8, alpha 32 (App. C.2) on whole frozen weights, merged at the end; needs peft
    schedule: Literal["cosine", "step", "linear", "constant"] = "cosine"  # no warm-up; cosine ends at a tenth

    model: str = "tiny"  # tiny, a local or run folder, or a hub id
    data: str = "tiny"  # tiny, hh, ultrafeedback, ..., a file, a folder or a hub id
    max_length: int = 1024  # tokens; pairs with a longer side are dropped, not cut; App. C.2
    lr: float = 3e-3  # of AdamW, for the tiny model; the paper's is 3e-6
    head_lr: float = 0.0  # of the head; 0: as lr
    weight_decay: float = 1e-3  # released code; 1e-4 in App. C.2
    batch_size: int = 32  # pairs per optimiser step, over all processes
    epochs: int = 1
    max_steps: int = 0  # 0: as many as the epochs hold
    max_grad_norm: float = 1.0  # released code
    tokens_per_microbatch: int = 8192  # packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights, head, losses stay float32
    seed: int = 0
    eval_every: int = 0  # training pairs between evaluations; 0: only at the end
    eval_pairs: int = 256  # held out; passes over all, as in the released code, cost more than training
    save_every: int = 0  # training pairs between checkpoints; 0: none
    out: str = ""  # run folder; empty: results/dpl-train, or results/dpl for all
    resume: bool = False  # continue the run in the run folder
    overwrite: bool = False  # delete the run in the run folder


@dataclass
class SyntheticArgs:
    env: tyro.conf.Positional[Literal["1d", "2d"]] = "1d"  # 1d: the paper's
    shared_context: bool = False  # one z for both sides of a pair, Eq. 2; 1d only
    width: int = 64  # of three hidden layers
    batch_size: int = 512  # pairs, drawn anew for every step
    lr: float = 3e-3  # of Adam, decaying exponentially to 1e-5
    steps: int = 600  # for each type
    seed: int = 0
    out: str = ""  # run folder; empty: results/dpl-<env>
    overwrite: bool = False  # delete the run in the run folder


@dataclass
class ScoreArgs:
    checkpoints: tuple[str, ...] = ("results/dpl-train",)  # run or model folders
    names: tuple[str, ...] = ("both",)  # one for each: reward_outputs_NAME, risk_NAME and its best_NAME
    data: str = ""  # JSON lines of prompt and responses, or of prompt and response; or pairs, as for train
    split: Literal["train", "test"] = "test"  # of pairs
    subset: Literal["both", "helpful", "harmless"] = "both"  # of pairs
    max_length: int = 2**30  # tokens; pairs with a longer side are dropped, nothing is ever cut
    prompt: str = ""  # with --response, instead of --data: print the numbers of one text
    response: str = ""  # see --prompt
    risk: Literal[RISKS] = "quantile"  # what risk_NAME holds; see utility
    alpha: float = 0.01  # of quantile and cvar; Sec. 5
    c: float = 1.0  # of mean_sd and entropic
    tokens_per_microbatch: int = 16384  # packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute
    out: str = "reward_outputs.jsonl"  # the file to write
    overwrite: bool = False  # replace that file


@dataclass
class SummarizeArgs:
    files: tuple[str, ...] = ()  # of evaluate or score; responses[0] is taken for safe, [1] for jailbroken
    alpha: float = 0.01  # of quantile and cvar; Sec. 5
    c: float = 1.0  # of mean_sd and entropic


PRESETS = {
    "hidden-context": Args(type="all", soft_labels=True, lr=3e-4, head_lr=3e-2, batch_size=16, epochs=3),
    "train": Args(),
    "evaluate": ScoreArgs(data="tiny", max_length=1024, out="eval_results_both.jsonl"), "score": ScoreArgs(),
    "summarize": SummarizeArgs(), "synthetic": SyntheticArgs(),
    "figure3": SyntheticArgs(width=512, batch_size=2048, lr=1e-3, steps=1000),  # released README
    "hh": Args(model="meta-llama/Llama-2-7b-hf", data="hh", lora=True, dtype="bfloat16", lr=3e-6,
               batch_size=2, save_every=2000)}  # App. C.2; one subset: --epochs 2 --data hh-helpful-base

if __name__ == "__main__":  # before torch is imported: --help answers at once
    if not sys.argv[1:] or sys.argv[1][0] == "-" and sys.argv[1] not in ("-h", "--help"):
        sys.argv.insert(1, "hidden-context")
    command = tyro.extras.subcommand_type_from_defaults(PRESETS, prefix_names=False)
    args = tyro.cli(command, description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (TINY_GROUPS, batch_order, clip_gradients, load_checkpoint, load_model, load_pairs,
                    load_tokenizer, log, model_folder, on_rank0, optimiser_steps, pack_pairs, read_rows,
                    require, response_hiddens, save_checkpoint, save_model, say, setting, setup, speed,
                    start_run, stop_requested, stop_unless_finite, subset, tiny_attributes, tiny_reward,
                    tokenize_pairs, write)


def base_loss(chosen, rejected):
    """Eq. 1 for each pair.  (B, 1) rewards -> (B,) losses"""
    return -F.logsigmoid(chosen[:, 0] - rejected[:, 0])


def mean_variance_loss(chosen, rejected, link="logistic", sigma=F.softplus, sigma_floor=1e-12):
    """-log P(u_chosen > u_rejected), u ~ N(mu, sigma(f)^2) (Sec. 4).  (B, 2) of mu, f -> (B,)

    probit is the paper's.  logistic, the released code's, is pi/2 too steep at 0: sigma comes out too large.
    logistic_matched has Phi's slope.  The floor keeps z finite where both sigma vanish.
    """
    (mu_c, f_c), (mu_r, f_r) = chosen.unbind(-1), rejected.unbind(-1)
    z = (mu_c - mu_r) / (sigma(f_c) ** 2 + sigma(f_r) ** 2 + sigma_floor**2).sqrt()
    if link == "probit":
        return -torch.special.log_ndtr(z)
    return -F.logsigmoid(math.sqrt(2 * math.pi if link == "logistic" else 8 / math.pi) * z)


def categorical_loss(chosen, rejected):
    """-log sum_ij p_i(chosen) p_j(rejected) M_ij, tied atoms count half (Sec. 4).  (B, K) logits -> (B,)"""
    i = torch.arange(chosen.shape[-1]).to(chosen)
    log_M = torch.log((1 + torch.sign(i[:, None] - i)) / 2)  # 0 for i > j, -log 2 for i = j, -inf for i < j
    log_p_c, log_p_r = chosen.log_softmax(-1), rejected.log_softmax(-1)
    return -(log_p_c[:, :, None] + log_p_r[:, None, :] + log_M).flatten(1).logsumexp(-1)


def entropy(chosen, rejected, over="batch"):
    """H of App. C.2, to be subtracted kappa times from the mean loss.  (B, K) logits, twice -> ()

    "example" is the mean of H(p(.|a)), the paper's; "batch" is H of the mean p, the released code's: it asks
    the batch to use all atoms and lets single predictions collapse.
    """
    log_p = torch.cat([chosen, rejected]).log_softmax(-1)
    if over == "batch":
        log_p = log_p.logsumexp(0) - math.log(len(log_p))
    return -(log_p.exp() * log_p).sum(-1).mean()


def pair_losses(chosen, rejected, type, link="logistic", sigma_floor=1e-12):
    """The loss of each pair, for which exp(-loss) is the model's P(chosen wins).  (B, K), twice -> (B,)"""
    if type == "mean_and_variance":
        return mean_variance_loss(chosen, rejected, link, sigma_floor=sigma_floor)
    return base_loss(chosen, rejected) if type == "base" else categorical_loss(chosen, rejected)


def utility(outputs, type, risk="mean", alpha=0.01, c=1.0, scale=1.0):
    """Each distribution of utility as one number.  (..., K) raw outputs -> (...)

    risk: mean, sd, quantile (alpha), cvar (mean of the worst share alpha), mean_sd (mean - c sd) or entropic
    (-log E[exp(-c u)] / c).  scale multiplies sigma: 2 / pi brings a logistic link's to the matched slope.
    Atom i = 0 .. K - 1 is the point i / (K - 1), but in quantile and cvar the bin from i / K to (i + 1) / K,
    as in the released code: quantiles of points would tie.
    """
    if type == "base":
        return torch.zeros_like(outputs[..., 0]) if risk == "sd" else outputs[..., 0]
    if type == "mean_and_variance":
        mean, sd, x = outputs[..., 0], scale * F.softplus(outputs[..., 1]), NormalDist().inv_cdf(alpha)
        quantile, cvar = mean + x * sd, mean - NormalDist().pdf(x) / alpha * sd
        entropic = mean - c * sd**2 / 2
    else:
        log_p, K = outputs.log_softmax(-1), outputs.shape[-1]
        p, i = log_p.exp(), torch.arange(K).to(outputs)
        u = i / (K - 1)
        mean, entropic = (p * u).sum(-1), -(log_p - c * u).logsumexp(-1) / c
        sd = (p * (u - mean[..., None]) ** 2).sum(-1).sqrt()
        room = alpha - (p.cumsum(-1) - p)
        tail, filled = room.clamp(min=0).minimum(p), (room / p).nan_to_num(0).clamp(0, 1)  # mass, share
        quantile, cvar = filled.sum(-1) / K, (tail * (i + filled / 2)).sum(-1) / K / alpha
    measures = dict(mean=mean, sd=sd, quantile=quantile, cvar=cvar, mean_sd=mean - c * sd, entropic=entropic)
    return measures[risk]


def r_squared(mean, sd):
    """Sec. 4: the share of the variance of utility that is not hidden context.  Any shapes -> ()"""
    return mean.var(correction=0) / (mean.var(correction=0) + (sd**2).mean())


def wilson(k, n, z=1.959964):
    """95 % interval of a rate, seen k times in n."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def environment(a):
    """Of the synthetic utility, E[u] / q with probability q, else 0.  (..., 1 or 2) -> E[u], q, both (...)"""
    if a.shape[-1] == 1:
        return a[..., 0], torch.where(a[..., 0] < 0.8, 1.0, 0.5).to(a)
    return a[..., 1], 1 - a[..., 0] * a[..., 1]


def borda(a, shared=False):
    """BC(a) = E_b[p(a, b)] (Sec. 3) in closed form; z drawn for each side or shared (1d).  -> (...)"""
    u, q = environment(a)
    if a.shape[-1] == 1:
        return torch.where(q == 1, 0.1 + u, 0.05 + 0.5 * u if shared else 0.275 + 0.25 * u)
    v, c = u / q, 1 - (q / u).clamp(max=1)
    low = 0.25 + torch.log1p(v) / 2 + v / (2 * (1 + v))
    high = 0.25 + c - c**2 / 4 + torch.log((1 + v) / v) / 2 - 1 / (2 * (1 + v)) + 1 / (2 * v)
    return q * torch.where(v <= 1, low, high) + (1 - q) / 8  # u = v; or u = 0, which ties with other zeros


def correlation(x, y):
    """Pearson's, over all elements -> float"""
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1].item()


def finish(out, table, curves, draw, panels, caption):
    """Print the table {column: {row: number}}, write curves.json and the figure drawn from it; by rank 0."""
    write(out / "curves.json", {name: x.tolist() for name, x in curves.items()})
    say(f"\n{'':32}" + "".join(f"{name:>19}" for name in table))
    for row in table["base"]:
        numbers = (f"{column[row]:19.4f}" if row in column else " " * 19 for column in table.values())
        say(f"{row:32}" + "".join(numbers))
    from matplotlib.figure import Figure
    figure = Figure((12, 3.4 * panels // 3), layout="constrained")
    curves = json.loads((out / "curves.json").read_bytes())
    draw({name: torch.tensor(x) for name, x in curves.items()}, figure.subplots(panels // 3, 3).flat)
    figure.suptitle(caption, fontsize=9)
    (out / "figures").mkdir(exist_ok=True)
    figure.savefig(out / "figures" / "dpl.png", dpi=120)


def draw_1d(curves, axes):
    """Fig. 3, right to left: what each type learned."""
    u, mean, sd, twin = *(curves[name] for name in ("u", "mean_and_variance", "sd")), axes[0].twinx()
    lines = axes[0].plot(u, curves["base"], "k"), twin.plot(u, curves["borda"], "b--"), twin.plot(u, u, "r:")
    names = "learned utility (left)", "Borda count (right)", "expected utility (right)"
    axes[0].legend([line for line, in lines], names, fontsize=8)
    axes[1].plot(u, mean, "k")
    low, high = (mean - sd).clamp(mean.min() - 1), (mean + sd).clamp(max=mean.max() + 1)
    axes[1].fill_between(u, low, high, alpha=0.3)
    axes[2].imshow(curves["p"].T, origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="Greys")
    for axis, title in zip(axes, ("base", "mean_and_variance: mean, sd", "categorical: p(u | a)")):
        axis.set(title=title, xlabel="alternative a", ylabel="utility")


def draw_2d(curves, axes):
    """The released code's second figure, with the true Borda count."""
    titles = {"u": "expected utility", "borda": "Borda count", "base": "base: learned utility",
              "mean_and_variance": "mean_and_variance: mean", "sd": "mean_and_variance: sd"}
    side, p = math.isqrt(len(curves["u"])), curves["p"]
    for axis, (name, title) in zip(axes, titles.items()):
        drawn = axis.contourf(curves[name].view(side, side).T, 12, extent=(0, 1, 0, 1))
        axis.figure.colorbar(drawn, ax=axis)
        axis.set(title=title, xlabel="x", ylabel="y")
    axes[5].set(title="categorical: p(u | x, y)", xlabel="x", ylabel="y")
    for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist():
        inset = axes[5].inset_axes((i / 4 + 0.02, j / 4 + 0.02, 0.21, 0.21), xticks=[], yticks=[])
        inset.bar(range(p.shape[1]), p.view(side, side, -1)[(2 * i + 1) * side // 8, (2 * j + 1) * side // 8])
        inset.set_ylim(0, 1)


def synthetic(args):
    """Fit all types to preferences of the environment -> {type: {"loss", "corr. Borda", "corr. E[u]"}}"""
    require(args.env == "1d" or not args.shared_context, "--shared-context: its Borda count is for 1d only")
    setup(args.seed)
    out, d = start_run(args, f"dpl-{args.env}"), int(args.env[0])
    generator = torch.Generator().manual_seed(args.seed)

    def compare(n):  # n pairs, and whether the first is preferred
        (a, b), z = torch.rand(2, n, d, generator=generator), torch.rand(3, n, generator=generator)
        (u_a, q_a), (u_b, q_b) = environment(a), environment(b)
        u_a = torch.where(z[0] < q_a, u_a / q_a, 0)
        u_b = torch.where(z[1 - args.shared_context] < q_b, u_b / q_b, 0)
        return torch.cat([a, b]), torch.where(u_a == u_b, z[2] < 0.5, u_a > u_b)[:, None]

    line = (torch.arange(400 // d**3) + 0.5) / (400 // d**3)
    grid = line[:, None] if d == 1 else torch.cartesian_prod(line, line)
    curves, table = dict(u=environment(grid)[0], borda=borda(grid, args.shared_context)), {}
    mean_variance = partial(mean_variance_loss, sigma=lambda f: (f - 2).exp())  # as in the released code
    for type, K, loss in (("base", 1, base_loss), ("categorical", 20 if d == 1 else 8, categorical_loss),
                          ("mean_and_variance", 2, mean_variance)):
        layers = []
        for n in (d, args.width, args.width):  # App. C.1; BatchNorm: released code, there of each side alone
            layers += [nn.Linear(n, args.width), *[nn.BatchNorm1d(args.width)] * (K > 2), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(args.width, K))
        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
        for step in range(args.steps + 1):  # the last is a test of the finished net
            net.train(step < args.steps)
            sides, wins = compare(args.batch_size if step < args.steps else 50000)
            out_a, out_b = net(sides).chunk(2)
            losses = loss(torch.where(wins, out_a, out_b), torch.where(wins, out_b, out_a))
            if step % 100 == 0 or step == args.steps:
                log(out, step, **{type: losses})
            if step < args.steps:
                losses.mean().backward()
                optimizer.param_groups[0]["lr"] = args.lr * (1e-5 / args.lr) ** (step / args.steps)
                optimizer.step()
                optimizer.zero_grad()
        outputs = net(grid).detach()
        curves[type] = utility(outputs, type) - utility(outputs, type).mean() * (K == 1)
        curves |= dict(p=outputs.softmax(-1)) if K > 2 else dict(sd=(outputs[:, -1] - 2).exp())
        table[type] = {"loss": losses.mean().item(), "corr. E[u]": correlation(curves[type], curves["u"]),
                       "corr. Borda": correlation(curves[type], curves["borda"])}
    draw = draw_1d if d == 1 else draw_2d
    caption = f"{'As Fig. 3' if d == 1 else 'Synthetic 2d'}: {args.steps} steps, seed {args.seed}"
    on_rank0(lambda: finish(out, table, curves, draw, 3 * d, caption), f"{out}: cannot be written")
    return table


def encode(texts, tokenizer, max_length):
    """Token ids of prompts and responses, without end-of-text; rows with a side over max_length go."""
    rows = tokenize_pairs(texts, tokenizer, 2**40, 2**39, what="")
    for row in rows:
        row["responses"] = [ids[:-1] for ids in row["responses"]]
        row["p"] = texts[row["row"]].get("p_chosen")
    kept = [row for row in rows if len(row["prompt_ids"]) + max(map(len, row["responses"])) <= max_length]
    if len(kept) < len(texts):
        say(f"kept {len(kept)} of {len(texts)} rows: {len(texts) - len(rows)} could not be tokenized, "
            f"{len(rows) - len(kept)} have a side of over --max-length {max_length} tokens")
    require(kept, "no row is left: raise --max-length")
    return kept


def load_subset(args, split):
    """Pairs of --data and --subset: the folder's sub-folder of that name, else rows by data_subset."""
    folder = Path(args.data, args.subset)
    rows = load_pairs(str(folder) if folder.is_dir() else args.data, split)
    if args.subset != "both" and not folder.is_dir():
        rows = [row for row in rows if row.get("data_subset") == args.subset]
    require(rows, f"{args.data}: no row has data_subset {args.subset}, nor is there such a sub-folder")
    return rows


def add_head(model, weight):
    """Attach the fp32 reward head `score`, a name of the library's sequence classifiers.  weight: (K, d)"""
    model.score = nn.Linear(*weight.shape[::-1], bias=False, device=model.device)
    model.score.weight.data.copy_(weight)
    model.config.num_labels = len(weight)
    if isinstance(one := next(model.parameters()), DTensor):
        fully_shard(model.score, mesh=one.device_mesh)


def load_reward_model(name, dtype):
    """-> model with its head, tokenizer, {"type", "K", "atoms", "link"}: what train saved"""
    folder = model_folder(name)
    meta = json.loads((folder / "config.json").read_bytes()).get("dpl")
    require(meta, f"{folder}/config.json: no entry dpl, so this is no reward model; `dpl.py train` makes one")
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    heads = [file.get_tensor("score.weight") for file in files if "score.weight" in file.keys()]
    K = {"base": 1, "mean_and_variance": 2}.get(meta["type"], meta["K"])
    n = len(heads[0]) if heads else 0
    require(n == K == meta["K"], f"{folder}: the head has {n} outputs, not those of {meta['type']} with K = "
            f"{meta['K']} as in config.json; restore the files that train saved")
    model = load_model(name, dtype)
    add_head(model, heads[0])
    return model, load_tokenizer(name), meta


@torch.no_grad()
def raw_outputs(model, rows, tokens_per_microbatch):
    """The head's outputs for the responses of encoded rows, on all ranks.  -> list of (responses, K), CPU"""
    sizes = [len(row["responses"]) for row in rows]
    outputs = [torch.zeros(n, model.config.num_labels) for n in sizes]
    for batch in pack_pairs(rows, tokens_per_microbatch):
        found = model.score(response_hiddens(model, batch).float()).cpu()
        for i, x in zip(batch["index"], found.split([sizes[i] for i in batch["index"]])):
            outputs[i] = x
    dist.all_reduce(whole := torch.cat(outputs))
    return whole.split(sizes)


def lr_factor(schedule, t, T):
    """Learning rate of step t of T, as a multiple of the first."""
    return {"cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * t / T)), "linear": 1 - t / T, "constant": 1.0,
            "step": 0.1 ** ((t >= T // 3) + (t >= 2 * T // 3))}[schedule]


def train(args):
    """Fit a reward model of args.type to pairs -> the lines of metrics.jsonl, the last with eval_ metrics."""
    setup(args.seed)
    out, world, tokenizer = start_run(args, "dpl-train"), dist.get_world_size(), load_tokenizer(args.model)
    rows, held_out = (encode(load_subset(args, x), tokenizer, args.max_length) for x in ("train", "test"))
    held_out = subset(held_out, args.eval_pairs, seed=0)
    known = all(isinstance(row["p"], (int, float)) and 0 <= row["p"] <= 1 for row in rows)
    require(known or not args.soft_labels, "--soft-labels: every row needs p_chosen, a number from 0 to 1")
    steps = optimiser_steps(len(rows), args.batch_size, args.epochs, args.max_steps)
    K = {"base": 1, "mean_and_variance": 2, "categorical": args.num_atoms}[args.type]
    require(K > (args.type == "categorical"), f"--num-atoms {K}: a distribution needs at least 2")
    model = load_model(args.model, args.dtype, train=not args.lora)
    if args.lora:
        import peft
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0))
    add_head(model, 0.01 * 0.02 * torch.randn(K, model.config.hidden_size))  # 1 % of the library's
    model.config.pad_token_id, model.config.dpl = tokenizer.pad_token_id, dict(
        type=args.type, K=K, link=args.link, atoms=[i / (K - 1) for i in range(K)] if K > 2 else [])
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().requires_grad_(False)  # unused
    body = [p for p in model.parameters() if p.requires_grad and p is not model.score.weight]
    groups = [dict(params=body), dict(params=[model.score.weight])]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
    start, history = load_checkpoint(out, model, optimizer)[0] if args.resume else 0, []

    def losses_of(chosen, rejected):
        return pair_losses(chosen, rejected, args.type, args.link, args.sigma_floor)

    def record(step, losses, hard, prefix="", **values):  # accuracy: the share with P(chosen wins) > 1/2
        hits = 1.0 * (hard < math.log(2))
        history.append(log(out, step, **{f"{prefix}loss": losses, f"{prefix}accuracy": hits, **values}))

    def evaluate(step):
        outputs = torch.stack(raw_outputs(model, held_out, args.tokens_per_microbatch))
        record(step, losses := losses_of(*outputs.unbind(1)), losses, "eval_")

    for step in range(start, steps):
        if args.eval_every and step % max(1, args.eval_every // args.batch_size) == 0:
            evaluate(step)
        started, seen = time.time(), []
        batch_rows = [rows[i] for i in batch_order(len(rows), args.batch_size, step, args.seed)]
        for batch in pack_pairs(batch_rows, args.tokens_per_microbatch):
            outputs = model.score(response_hiddens(model, batch).float())
            chosen, rejected = outputs.view(-1, 2, K).unbind(1)
            p = torch.tensor([row["p"] if args.soft_labels else 1.0 for row in batch["rows"]]).to(outputs)
            hard, bonus = losses_of(chosen, rejected), 0.0
            losses = p * hard + (1 - p) * losses_of(rejected, chosen) if args.soft_labels else hard  # Eq. 1
            if args.type == "categorical":
                bonus = args.entropy_coeff * entropy(chosen, rejected, args.entropy)
            elif args.type == "mean_and_variance":
                bonus = -2 * args.variance_penalty * (F.softplus(outputs[:, 1]) ** 2).mean()
            ((losses - bonus).sum() * world / args.batch_size).backward()  # FSDP averages over the processes
            seen.append(torch.stack([losses, hard]).detach())
        for p in [*body, model.score.weight] if args.lora else ():  # whole on every process
            dist.all_reduce(p.grad)
            p.grad /= world
        grad_norm = clip_gradients(model, args.max_grad_norm)
        stop_unless_finite(grad_norm, step, batch_rows, out)
        for group, lr in zip(optimizer.param_groups, (args.lr, args.head_lr or args.lr)):
            group["lr"] = lr * lr_factor(args.schedule, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        record(step, *torch.cat(seen, 1), lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm,
               **speed(batch_rows, time.time() - started))
        stop = stop_requested()
        if stop or args.save_every and (step + 1) % max(1, args.save_every // args.batch_size) == 0:
            save_checkpoint(out, step + 1, model, optimizer)
        if stop:
            raise SystemExit(143)  # SIGTERM or Ctrl-C: --resume continues
    evaluate(steps)
    save_model(adapted.merge_and_unload() if args.lora else model, tokenizer, out / "model")
    return history


def score(args):
    """Raw outputs of reward models for pairs or responses -> the rows written to args.out."""
    require(len(args.checkpoints) == len({*args.names}) == len(args.names), "--names: one per checkpoint")
    require(args.data or args.response, "give --data, or --prompt and --response")
    free = args.overwrite or args.response or not Path(args.out).exists()
    require(free, f"{args.out}: exists; --overwrite replaces it")
    setup(0)
    rows = read_rows(Path(args.data)) if Path(args.data).is_file() else []
    if args.response:
        rows = [dict(prompt=args.prompt, responses=[args.response])]
    elif not rows or "chosen" in rows[0]:
        rows = load_subset(args, args.split)
    else:
        groups = {}
        for number, row in enumerate(rows, 1):
            texts = row.get("responses", [row.get("response")])
            fine = isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)
            require("prompt" in row and fine, f"{args.data}:{number}: needs prompt and responses, none empty")
            key = json.dumps(row["prompt"]) if "response" in row else number
            groups.setdefault(key, {**row, "responses": []})["responses"] += texts
        rows = list(groups.values())
    pairs = "chosen" in rows[0]
    require(not pairs or len(args.names) == 1, "--checkpoints: for pairs one, each with its own --out")
    for name, checkpoint in zip(args.names, args.checkpoints):
        model, tokenizer, meta = load_reward_model(checkpoint, args.dtype)
        texts = rows if pairs else [dict(prompt=row["prompt"], responses=row["responses"]) for row in rows]
        encoded = encode(texts, tokenizer, args.max_length)
        require(pairs or len(encoded) == len(rows), f"{args.data}: drop these rows before scoring it")
        rows = [rows[row["row"]] for row in encoded]
        for row, outputs in zip(rows, raw_outputs(model, encoded, args.tokens_per_microbatch)):
            risk = utility(outputs, meta["type"], args.risk, args.alpha, args.c)
            if pairs:
                row["reward_output_chosen"], row["reward_output_rejected"] = outputs.tolist()
                row["reward_model"] = meta
                continue
            row |= {f"reward_outputs_{name}": outputs.tolist(), f"risk_{name}": risk.tolist(),
                    f"best_{name}": risk.argmax().item(), f"reward_model_{name}": meta}
        if args.response:
            numbers = ((risk, utility(outputs, meta["type"], risk, args.alpha, args.c).item())
                       for risk in ("mean", "sd", "quantile", args.risk))
            say("  ".join([name, *(f"{risk} {number:.6g}" for risk, number in numbers)]))
    if not args.response:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        on_rank0(lambda: write(args.out, text), f"{args.out}: cannot be written")
    return rows


def read_outputs(path):
    """Raw outputs in a file of score, evaluate or the released code -> {name: ((N, n, K), {"type", "link"})}

    Of pairs, rejected comes first.  Where the file does not tell, K = 1 is base and K = 2 mean_and_variance.
    """
    rows, found = read_rows(Path(path)), {}
    require(rows, f"{path}: no rows; write the file with score or evaluate")
    columns = {key[15:]: [key] for key in rows[0] if key.startswith("reward_outputs_")}
    if "reward_output_chosen" in rows[0]:
        columns = dict.fromkeys(sorted({"both", *(row.get("data_subset") or "both" for row in rows)}),
                                ["reward_output_rejected", "reward_output_chosen"])
    require(columns, f"{path}:1: no reward_outputs_NAME or reward_output_chosen; use score or evaluate")
    for name, keys in columns.items():
        outputs = []
        for number, row in enumerate(rows, 1):
            try:
                outputs.append(torch.tensor([row[key] for key in keys]).double().flatten(end_dim=-2))
            except (KeyError, TypeError, ValueError):
                outputs.append(torch.zeros(()))
            require(outputs[-1].dim() == 2 and outputs[-1].shape == outputs[0].shape,
                    f"{path}:{number}: {keys[-1]} is not as many numbers as in line 1; score the file again")
        type = {1: "base", 2: "mean_and_variance"}.get(outputs[0].shape[1], "categorical")
        meta = row.get(f"reward_model_{name}", row.get("reward_model", dict(type=type, link="logistic")))
        keep = [len(keys) == 1 or name in ("both", row.get("data_subset")) for row in rows]
        found[name] = torch.stack(outputs)[keep], meta
    return found


def summarize(args):
    """Print r^2 and how often the second response (jailbroken, chosen) is rated no lower than the first."""
    require(args.files, "--files: name the files that score or evaluate wrote")
    results = {}
    found = [(path, *item) for path in args.files for item in read_outputs(path).items()]
    for path, name, (outputs, meta) in found:
        require(outputs.shape[1] > 1, f"{path}: one response a prompt, and nothing to compare it with")
        type, n, m, result = meta["type"], *outputs.shape[:2], {}
        matched = 2 / math.pi if type == "mean_and_variance" and meta["link"] == "logistic" else 1.0
        mean, sd = utility(outputs, type), utility(outputs, type, "sd")
        within = (mean - mean.mean(1, keepdim=True)) * math.sqrt(m / (m - 1))  # a prompt's mean is arbitrary
        r2 = [r_squared(mean, sd).item(), r_squared(mean, matched * sd).item(), r_squared(within, sd).item()]
        say(f"\n{path}: {name}, {type}, {n} rows of {outputs.shape[1]}")
        say(f"  r^2 {r2[0]:.4f}, with slope-matched sigma {r2[1]:.4f}, within prompts {r2[2]:.4f}")
        scales = sorted({1.0, matched}, reverse=True)
        shown = [(risk, args.alpha, x) for risk in RISKS for x in scales if risk != "mean" or x == 1]
        for key in shown[:1 if type == "base" else None] + [("quantile", alpha, 1.0) for alpha in ALPHAS]:
            first, second, *_ = utility(outputs, type, *key[:2], args.c, key[2]).unbind(1)
            result[key] = k, ties = (second >= first).sum().item(), (second == first).sum().item()
            if key in shown:
                interval = "[{:.4f}, {:.4f}]".format(*wilson(k, n))
                say(f"  {key[0]:9} sigma x {key[2]:.3f} {k:6}/{n}  {k / n:.4f}  {interval}  ties {ties}")
        if type != "base":
            say("  alpha   " + "".join(f"{alpha:6g}" for alpha in ALPHAS))
            say("  quantile" + "".join(f"{result['quantile', alpha, 1.0][0]:6}" for alpha in ALPHAS))
        names = [other for _, other, _ in found]  # one name in two files: both are kept
        results[name if names.count(name) == 1 else f"{path}: {name}"] = dict(r2=r2, counts=result)
    return results


def draw_hidden(curves, axes):
    """Base beside both utilities; spread on what divides the groups; calibration."""
    divides = curves["true sd"] > 1
    for keep, label, color in ((~divides, "no monster", "C0"), (divides, "monsters divide the groups", "C3")):
        axes[0].plot(curves["E[u]"][keep], curves["base"][keep], ".", color=color, label=label)
        axes[1].hist(curves["mean_and_variance sd"][keep], 40, color=color, alpha=0.6, label=label)
    axes[0].set(title="base", xlabel="expected utility", ylabel="learned utility (log-odds)")
    axes[1].set(title="mean_and_variance", xlabel="learned sd of utility", ylabel="responses")
    for type in TYPES:  # ten bins of predictions
        p, true = curves[f"{type} P(win)"], curves["P(win)"]
        bins = [keep for keep in ((p * 10).long() == i for i in range(10)) if keep.any()]
        axes[2].plot(*([x[keep].mean() for keep in bins] for x in (p, true)), ".-", label=type)
    axes[2].axline((0, 0), (1, 1), color="k", ls=":")
    axes[2].set(title="calibration", xlabel="predicted P(win)", ylabel="true P(win)")
    for axis in axes:
        axis.legend(fontsize=8)


def hidden_context(args):
    """Train each type in the tiny world, where two groups of readers judge; compare with their utilities."""
    setup(args.seed)
    out, rows = start_run(args, "dpl"), load_pairs("tiny", "test")
    texts = [dict(prompt=row["prompt"], responses=row["responses"]) for row in rows]
    share = torch.tensor([share for share, _ in TINY_GROUPS])[:, None, None]
    u = torch.tensor([[[tiny_reward(row["prompt"], text, group) for text in row["responses"]] for row in rows]
                      for group in range(len(share))])  # (groups, prompts, 4)
    seen = [tiny_attributes(text) for row in rows for text in row["responses"]]
    seen = torch.tensor([[1.0, a["polite"], a["happy"], abs(a["detail"] - 2), a["monster"]] for a in seen])
    mean, (i, j), flat = (share * u).sum(0), torch.combinations(torch.arange(4)).unbind(1), u.flatten(1)
    sd = (share * (u - mean) ** 2).sum(0).sqrt()
    p = (share * torch.sigmoid(u[..., i] - u[..., j])).sum(0).flatten()
    BC = (share * torch.sigmoid(flat[:, :, None] - flat[:, None])).sum(0).mean(1).view_as(mean)
    curves, table, divides = {"E[u]": mean, "true sd": sd, "P(win)": p}, {}, 1.0 * (sd > 1)

    def measure(name, mean_hat, sd_hat, careful, p_hat=None):
        worth = torch.linalg.lstsq(seen, mean_hat.flatten()[:, None]).solution[:, 0]
        above = (sd_hat[divides > 0][:, None] - sd_hat[divides == 0]).sign()
        table[name] = {"corr. Borda": correlation(mean_hat, BC), "corr. E[u]": correlation(mean_hat, mean),
                       "worth of a monster / happy end": (worth[4] / worth[2]).item(),
                       "r^2": r_squared(mean_hat, sd_hat).item(),
                       "AUC of sd for monsters": above.mean().item() / 2 + 0.5}
        if p_hat is not None:
            table[name]["|P(win) - true P(win)|"] = (p_hat - p).abs().mean().item()
        for label, choice in (("mean", mean_hat), ("1 % quantile", careful)):
            best = choice.argmax(1, keepdim=True)
            table[name][f"best of 4 by {label}: monsters"] = divides.gather(1, best).mean().item()
            table[name][f"best of 4 by {label}: worst u"] = u.amin(0).gather(1, best).mean().item()

    measure("expected u", mean, sd, u.amin(0))
    for type in TYPES:
        if not args.resume or not (out / type / "model").is_dir():
            train(replace(args, type=type, out=f"{out / type}", resume=args.resume and (out / type).is_dir()))
        model, tokenizer, _ = load_reward_model(out / type, args.dtype)
        encoded = encode(texts, tokenizer, args.max_length)
        outputs = torch.stack(raw_outputs(model, encoded, args.tokens_per_microbatch))
        curves[f"{type} P(win)"] = p_hat = torch.exp(-pair_losses(
            outputs[:, i].flatten(0, 1), outputs[:, j].flatten(0, 1), type, args.link, args.sigma_floor))
        curves[type], curves[f"{type} sd"] = utility(outputs, type), utility(outputs, type, "sd")
        measure(type, curves[type], curves[f"{type} sd"], utility(outputs, type, "quantile"), p_hat)
    caption = f"Hidden context: {setting(args)}; {divides.numel()} held-out responses"
    on_rank0(lambda: finish(out, table, curves, draw_hidden, 3, caption), f"{out}: cannot be written")
    return table


def main(args):
    require(0 < getattr(args, "alpha", 0.5) < 1, "--alpha: a probability between 0 and 1 is needed; try 0.01")
    require(getattr(args, "c", 1.0) > 0, "--c: must be above 0")
    if isinstance(args, Args):
        return hidden_context(args) if args.type == "all" else train(args)
    return {SyntheticArgs: synthetic, ScoreArgs: score, SummarizeArgs: summarize}[type(args)](args)


if __name__ == "__main__":
    main(args)
