"""Distributional Preference Learning (DPL): reward models that output a distribution of utility.

Siththaranjan, Laidlaw, Hadfield-Menell 2023, https://arxiv.org/abs/2312.08358

Preference data hide context: who judged, and by which objective. A reward model fitted by Eq. 1
orders alternatives by their Borda count and not by their expected utility (Theorem 3.1). DPL gives
every alternative a distribution of utility instead, and fits it by the likelihood (Sec. 4)
P(a beats b) = P(u_a > u_b) + P(u_a = u_b) / 2, where u_a and u_b are independent. Reward types:

    base               one number r          -log sigmoid(r_a - r_b)
    mean_and_variance  N(mu, softplus(f)^2)  -log Phi(mean / sd of u_a - u_b)
    categorical        softmax over K atoms  -log sum_ij p_i(a) p_j(b) M_ij
                                             M_ij = 1 (i > j), 1/2 (i = j), 0

    python methods/dpl.py                hidden-context: two reward types in the tiny world
    python methods/dpl.py synthetic 1d   a small Figure 3, in seconds; 2d: the released second world
    python methods/dpl.py figure3        Figure 3 as released
    python methods/dpl.py train --type categorical --model gpt2 --data pairs.jsonl --lr 1e-5
    python methods/dpl.py evaluate --data pairs.csv --out eval.jsonl   chosen, rejected; group
    python methods/dpl.py score --data prompts.jsonl --out outputs.jsonl   rows: prompt, responses
    python methods/dpl.py score --prompt "Human: Hi" --response " Hello"
    python methods/dpl.py summarize --files eval.jsonl outputs.jsonl

Presets: the commands above, and hh, which is train with Llama-2-7B and LoRA (App. C.2).

These follow the released code and not the paper: the link of mean_and_variance (the paper's is
--link probit), the weight decay, and a context drawn for each side of a synthetic pair
(--shared-context: one for both, Eq. 2). These follow neither: the reward head is float32 (in
bfloat16 it stops learning at the paper's rate), losses stay in log space, sigma has a floor, LoRA
has no dropout, synthetic batch norm sees both sides at once, and a coin breaks synthetic ties.

With hidden-context, seeds 0 to 2, base follows the Borda count (correlation .96 to .97) and rates
up the monsters that a quarter of the readers hate. The sd of mean_and_variance finds what divides
the readers (AUC .98 to 1.00). categorical learns more slowly and is not shown: in as many steps its
AUC is .66 to .80.
"""

import importlib.util
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import tyro

RewardType = Literal["base", "mean_and_variance", "categorical", "compare"]


@dataclass
class Args:
    """Options of train, hh and hidden-context."""

    type: RewardType = "mean_and_variance"  # compare: base and mean_and_variance, in the tiny world
    link: Literal["logistic", "probit"] = "logistic"  # of mean_and_variance; probit: the paper's
    num_atoms: int = 10  # K of categorical; App. C.2
    entropy: Literal["example", "batch"] = "example"  # batch: H of the batch's mean p, as released
    entropy_coeff: float = 0.1  # kappa, weight of the entropy bonus of categorical; App. C.2
    sigma_floor: float = 1e-4  # its square is added to var_a + var_b; none in the released code
    soft_labels: bool = False  # p_u(a, b) of Eq. 1 is the row's p_chosen in training, not 1
    # Which pairs: both, which is all of them, or a group of any name: a sub-folder, or the value of
    # a column data_subset, subset or group
    subset: str = "both"
    lora: bool = False  # train rank 8, alpha 32 (App. C.2) and merge it at the end; needs peft

    model: str = "tiny"  # tiny, a local or run folder, or a hub id
    data: str = "tiny"  # tiny, hh, ultrafeedback, ..., a file, a folder or a hub id
    # Held-out pairs: a file, a folder or a hub id; empty: the test split of --data, which is the
    # last 5 % of a file alone, or the last 10 of fewer than 200 rows.
    test_data: str = ""
    max_length: int = 1024  # tokens; pairs with a longer side are dropped, not cut; App. C.2
    lr: float = 3e-3  # of AdamW, for the tiny model; the paper's is 3e-6
    head_lr: float = 0.0  # of the reward head; 0: the same as lr
    schedule: Literal["cosine", "constant"] = "cosine"  # of both rates; cosine ends at a tenth
    weight_decay: float = 1e-3  # of AdamW; released code, 1e-4 in App. C.2
    batch_size: int | None = None  # pairs per optimiser step, of all processes; None: 32 at most
    epochs: int = 1  # passes over the training pairs
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    max_grad_norm: float = 1.0  # longer gradients are cut to this norm; released code
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    compile: bool = True  # decoder layers, on a GPU, in bfloat16, in runs of 300 steps and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; head and losses stay float32
    seed: int = 0  # of the head's first weights and the order of the pairs

    eval_every: int = 0  # training pairs between evaluations; 0: only at the end
    eval_pairs: int = 256  # held-out pairs; a pass over all of them costs more than training
    save_every: int = 0  # training pairs between checkpoints; 0: none
    out: str = ""  # run folder; empty: results/dpl-train, or results/dpl for compare
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder
    plan: bool = False  # print what the run needs of memory, and leave; needs no weights, no GPU


@dataclass
class SyntheticArgs:
    """Options of synthetic and figure3."""

    env: tyro.conf.Positional[Literal["1d", "2d"]] = "1d"  # 1d: Figure 3; 2d: of the released code
    shared_context: bool = False  # one context for both sides of a pair, Eq. 2; 1d only
    width: int = 64  # of the three hidden layers
    batch_size: int = 512  # pairs, drawn anew for every step
    lr: float = 3e-3  # of Adam, decaying exponentially to 1e-5
    steps: int = 600  # optimiser steps for each reward type
    seed: int = 0  # of the pairs and the first weights
    out: str = ""  # run folder; empty: results/dpl-<env>
    overwrite: bool = False  # delete the run that is in the run folder


@dataclass
class ScoreArgs:
    """Options of evaluate and score."""

    checkpoints: tuple[str, ...] = ("results/dpl-train",)  # run or model folders
    # A NAME for each checkpoint: its columns are mean_NAME, sd_NAME, risk_NAME, reward_outputs_NAME
    names: tuple[str, ...] = ("both",)
    data: str = ""  # JSON lines of prompt and responses; or pairs, as for train
    split: Literal["train", "test"] = "test"  # of pairs
    subset: str = "both"  # of pairs: both, which is all, or the name of a group
    max_length: int = 2**30  # tokens; pairs with a longer side are dropped, nothing is ever cut
    prompt: str = ""  # with --response, instead of --data: print the numbers of one text
    response: str = ""  # see --prompt
    risk: Literal["mean", "quantile"] = "quantile"  # the utility in risk_NAME
    alpha: float = 0.01  # of the quantile; Sec. 5
    tokens_per_microbatch: int = 16384  # memory knob: packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute
    out: str = "reward_outputs.jsonl"  # the file to write
    overwrite: bool = False  # replace that file


@dataclass
class SummarizeArgs:
    """Options of summarize."""

    files: tuple[str, ...] = ()  # written by evaluate, score or the released code
    alpha: float = 0.01  # of the quantile; Sec. 5


PRESETS = {
    "hidden-context": Args(
        type="compare", soft_labels=True, lr=3e-4, head_lr=5e-3, batch_size=16, epochs=3
    ),
    "train": Args(),
    # evaluate and score are one command. evaluate drops the pairs that training would drop.
    "evaluate": ScoreArgs(data="tiny", max_length=1024, out="eval_results_both.jsonl"),
    "score": ScoreArgs(),
    "summarize": SummarizeArgs(),
    "synthetic": SyntheticArgs(),
    "figure3": SyntheticArgs(width=512, batch_size=2048, lr=1e-3, steps=1000),  # released README
    "hh": Args(  # App. C.2; for one subset: --epochs 2 --data hh-helpful-base
        model="meta-llama/Llama-2-7b-hf",
        data="hh",
        lora=True,
        dtype="bfloat16",
        lr=3e-6,
        batch_size=2,
        save_every=2000,
    ),
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    # Without a command: hidden-context, with the options that are given. Only --help stays without
    # one, since it lists the commands.
    given = sys.argv[1:]
    if not given:
        sys.argv.insert(1, "hidden-context")
    elif given[0].startswith("-") and given[0] not in ("-h", "--help"):
        sys.argv.insert(1, "hidden-context")
    command = tyro.extras.subcommand_type_from_defaults(PRESETS, prefix_names=False)
    args = tyro.cli(command, description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

# common.py lies beside this file or one folder up.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
# isort: off
from common import response_hiddens  # log-probabilities
from common import encode_rows, pack_pairs, require_context, show_example  # tokenization
from common import Unusable, require_text  # tokenization
from common import batch_order, load_pairs, load_split, plan_steps  # data
from common import read_rows, report, subset  # data
from common import words  # the plain text of a string or of chat messages
from common import clip_gradients, compile_layers, load_model, load_tokenizer  # models
from common import model_folder, plan_memory, save_model  # models
from common import TINY_GROUPS, tiny_attributes, tiny_reward  # the tiny world
from common import load_checkpoint, on_rank0, require, save_checkpoint, setup  # processes
from common import check_ranges, require_free, start_run, stop_requested  # processes
from common import stop_unless_finite, to_device, write  # processes
from common import log, merge, progress, save_figure, say, setting, speed  # logging
from common import say_claim, verdict, wilson  # how a run ends
# isort: on


# ---- the paper: losses


def base_loss(chosen, rejected):
    """Eq. 1 for each pair, whose label is 1.  (B, 1) rewards, twice -> (B,) losses"""
    return -F.logsigmoid(chosen[:, 0] - rejected[:, 0])


def normal_loss(mu_chosen, sigma_chosen, mu_rejected, sigma_rejected, link, sigma_floor=1e-12):
    """-log P(u_chosen > u_rejected), independent normal utilities (Sec. 4).  (B,) each -> (B,)

    The probit link is the paper's. The logistic link is the released code's: its slope at 0 is
    pi / 2 times that of the probit, so that the fitted sigma comes out too large by that factor.
    sigma_floor keeps z finite where both sigma vanish. The default here, 1e-12, changes nothing
    else; that of the option --sigma-floor is 1e-4.
    """
    # z is the mean of u_chosen - u_rejected in units of its standard deviation.
    variance = sigma_chosen**2 + sigma_rejected**2 + sigma_floor**2
    z = (mu_chosen - mu_rejected) / variance.sqrt()
    if link == "probit":
        return -torch.special.log_ndtr(z)
    if link == "logistic":
        return -F.logsigmoid(math.sqrt(2 * math.pi) * z)
    raise ValueError(f"unknown link {link!r}")


def mean_variance_loss(chosen, rejected, link="logistic", sigma_floor=1e-12):
    """The normal loss with sigma = softplus(f) (App. C.2).  (B, 2) of mu and f, twice -> (B,)"""
    mu_chosen, f_chosen = chosen.unbind(-1)
    mu_rejected, f_rejected = rejected.unbind(-1)
    sigma_chosen = F.softplus(f_chosen)
    sigma_rejected = F.softplus(f_rejected)
    return normal_loss(mu_chosen, sigma_chosen, mu_rejected, sigma_rejected, link, sigma_floor)


def categorical_loss(chosen, rejected):
    """-log sum_ij p_i(chosen) p_j(rejected) M_ij (Sec. 4).  (B, K) logits, twice -> (B,)

    M_ij is 1 if atom i lies above atom j, 1/2 if they are the same and 0 if it lies below.
    """
    log_p_chosen = chosen.log_softmax(-1)
    log_p_rejected = rejected.log_softmax(-1)
    atom = torch.arange(chosen.shape[-1], dtype=chosen.dtype, device=chosen.device)
    M = (1 + torch.sign(atom[:, None] - atom)) / 2

    # In log space a sum of products that are too small for a float is still finite. Where M is 0,
    # its log is -inf and the term drops out of the sum.
    log_terms = log_p_chosen[:, :, None] + log_p_rejected[:, None, :] + M.log()
    return -log_terms.flatten(1).logsumexp(-1)


def entropy(chosen, rejected, over="example"):
    """The entropy H of App. C.2.  (B, K) logits, twice -> ()

    The objective is the mean loss - kappa H.
    "example" is the paper's, the mean of each alternative's H(p). "batch" is the released code's, H
    of the mean p: it asks the batch to use all atoms, and lets single predictions collapse.
    """
    log_p = torch.cat([chosen, rejected]).log_softmax(-1)
    if over == "batch":
        log_p = log_p.logsumexp(0) - math.log(len(log_p))  # of the mean p
    elif over != "example":
        raise ValueError(f"unknown entropy {over!r}")
    H = -(log_p.exp() * log_p).sum(-1)  # (2B,), of each p; or (), of the mean p
    return H.mean()


def entropy_shares(chosen, rejected, log_mean_p):
    """Each pair's share in H of the mean p of a batch, of which these pairs may be a part.

    (B, K) logits, twice, and the log of the whole batch's mean p, a constant (K,) -> (B,)
    The mean of the shares over the whole batch is H, and its gradient is that of H.
    """
    # With pbar the mean of p over all alternatives a, H = -sum_k pbar_k log pbar_k has the gradient
    #     dH = -sum_k (log pbar_k + 1) dpbar_k = the mean over a of -sum_k log pbar_k dp_k(a)
    # since sum_k dp_k(a) = 0. Once pbar is known it is linear in p(a), and may be summed over
    # micro-batches and processes. The value is exact, too: the mean of -sum_k p_k(a) log pbar_k.
    shares_chosen = -(chosen.softmax(-1) * log_mean_p).sum(-1)
    shares_rejected = -(rejected.softmax(-1) * log_mean_p).sum(-1)
    return (shares_chosen + shares_rejected) / 2


def pair_losses(chosen, rejected, reward_type, link="logistic", sigma_floor=1e-12):
    """The loss of each pair; exp(-loss) is the model's P(chosen wins).  (B, K), twice -> (B,)"""
    if reward_type == "base":
        return base_loss(chosen, rejected)
    if reward_type == "mean_and_variance":
        return mean_variance_loss(chosen, rejected, link, sigma_floor)
    if reward_type == "categorical":
        return categorical_loss(chosen, rejected)
    raise ValueError(f"unknown reward type {reward_type!r}")


# ---- the paper: distributions of utility as numbers


def normal_utility(mu, sigma, measure, alpha):
    """Mean, sd or alpha-quantile of N(mu, sigma^2).  Any shapes -> that shape"""
    if measure == "mean":
        return mu
    if measure == "sd":
        return sigma
    return mu + NormalDist().inv_cdf(alpha) * sigma


def categorical_utility(logits, measure, alpha):
    """Mean, sd or alpha-quantile of a distribution over atoms in [0, 1].  (..., K) -> (...)

    In mean and sd atom i = 0 .. K - 1 is the point i / (K - 1). In the quantile it is the bin from
    i / K to (i + 1) / K, as in the released code: quantiles of points would tie.
    """
    K = logits.shape[-1]
    p = logits.softmax(-1)
    if measure == "quantile":
        # The share of each bin below the quantile: all, none, or a part of the bin that holds it.
        # An empty bin gives an infinity, which clamp cuts, or 0 / 0, which counts as none.
        below = p.cumsum(-1) - p
        filled = ((alpha - below) / p).nan_to_num(0).clamp(0, 1)
        return filled.sum(-1) / K

    # Moments of the points.
    atoms = torch.arange(K, dtype=logits.dtype, device=logits.device) / (K - 1)
    mean = (p * atoms).sum(-1)
    if measure == "mean":
        return mean
    return (p * (atoms - mean[..., None]) ** 2).sum(-1).sqrt()


def utility(outputs, reward_type, measure="mean", alpha=0.01):
    """Each distribution of utility as one number.  (..., K) raw outputs -> (...)

    measure: mean; sd, the trace of hidden context; or quantile, the risk-averse utility of Sec. 5.
    """
    if measure not in ("mean", "sd", "quantile"):
        raise ValueError(f"unknown measure {measure!r}")
    if reward_type == "base":
        reward = outputs[..., 0]
        return torch.zeros_like(reward) if measure == "sd" else reward
    if reward_type == "mean_and_variance":
        return normal_utility(outputs[..., 0], F.softplus(outputs[..., 1]), measure, alpha)
    if reward_type == "categorical":
        return categorical_utility(outputs, measure, alpha)
    raise ValueError(f"unknown reward type {reward_type!r}")


def r_squared(mean, sd):
    """Share of the variance of utility that is not hidden context (Sec. 4).  Any shapes -> ()"""
    explained = mean.var(correction=0)
    return explained / (explained + (sd**2).mean())


def correlation(x, y):
    """Pearson's correlation over all elements -> float"""
    both = torch.stack([x.flatten(), y.flatten()]).double()
    return torch.corrcoef(both)[0, 1].item()


# ---- the synthetic worlds


def environment(env, a):
    """Utility is E[u] / q with probability q, and else 0.  (..., d) alternatives -> E[u], q

    1d is the paper's (Sec. 4, Figure 3): beyond 0.8 a coin decides. 2d is from the released code.
    """
    if env == "1d":
        mean = a[..., 0]
        q = torch.where(mean < 0.8, 1.0, 0.5).to(a)
        return mean, q
    if env == "2d":
        x, y = a.unbind(-1)
        return y, 1 - x * y
    raise ValueError(f"unknown environment {env!r}")


def dimensions(env):
    """How many numbers an alternative of this world is."""
    if env == "1d":
        return 1
    if env == "2d":
        return 2
    raise ValueError(f"unknown environment {env!r}")


def borda(env, a, shared=False):
    """Borda count BC(a) = E_b[p(a, b)] (Sec. 3) in closed form.  (..., d) alternatives -> (...)

    By Theorem 3.1 a base model orders the alternatives as BC does.
    shared: both sides of a pair have one context, Eq. 2; else each side its own, as in the released
    code. Only the 1d world has a closed form for shared contexts.
    """
    mean, q = environment(env, a)
    if env == "1d":
        # Up to 0.8 the utility is a: it beats smaller ones (a) and the zeros beyond 0.8 (0.1).
        up_to = 0.1 + mean
        if shared:
            # Beyond, in one half of the contexts 2a beats all smaller ones (a). In the other half
            # 0 ties with all that lie beyond 0.8 (0.2 / 2) and loses to the rest.
            beyond = 0.05 + 0.5 * mean
        else:
            # Beyond, half the time 2a beats all below 0.8 (0.8), the zeros (0.1) and the smaller
            # ones beyond (0.5 (a - 0.8)); in all 0.5 + 0.5 a. Else 0 ties with the zeros (0.1 / 2).
            beyond = 0.275 + 0.25 * mean
        return torch.where(q == 1, up_to, beyond)

    # 2d: with probability q the utility is v = y / (1 - xy); else it is 0, which ties with other
    # zeros (1/4 of all utilities, so 1/8). G(v) is the probability of a utility below v: 1/4 for
    # the zeros, and the integral of q' = 1 - x'y' over v' < v, that is over y' < v / (1 + v x').
    v = mean / q

    # v <= 1: this bound of y' is below 1 for all x'.
    G_low = 0.25 + torch.log1p(v) / 2 + v / (2 * (1 + v))

    # v > 1: all y' count where x' < c = 1 - 1 / v. Here 1 / v is q / mean, and c is 0 for v <= 1.
    c = 1 - (q / mean).clamp(max=1)
    G_high = 0.25 + c - c**2 / 4  # the zeros, and the integral over x' < c
    G_high = G_high + torch.log((1 + v) / v) / 2  # this line and the next: that over x' > c
    G_high = G_high - 1 / (2 * (1 + v)) + 1 / (2 * v)
    G = torch.where(v <= 1, G_low, G_high)
    return q * G + (1 - q) / 8


def draw_pairs(env, n, shared, generator):
    """n random pairs.

    -> alternatives (2n, d), all first sides before all second sides; whether the first wins (n, 1)
    """
    # Alternatives, contexts z and coins, all uniform.
    first, second = torch.rand(2, n, dimensions(env), generator=generator)
    context_first, context_second, coin = torch.rand(3, n, generator=generator)
    if shared:
        context_second = context_first  # Eq. 2

    # The utilities in these contexts.
    mean, q = environment(env, first)
    u_first = torch.where(context_first < q, mean / q, 0)
    mean, q = environment(env, second)
    u_second = torch.where(context_second < q, mean / q, 0)

    # O_u of Eq. 2: the higher utility wins, and a tie goes either way.
    first_wins = torch.where(u_first == u_second, coin < 0.5, u_first > u_second)
    return torch.cat([first, second]), first_wins[:, None]


# ---- model and data


def encode(texts, tokenizer, max_length, what="tokens"):
    """Rows of text -> rows of token ids without the end of text; "row" is the index of the text.

    Rows with a side of more than max_length tokens are dropped and counted, never cut (App. C.2).
    what: begins the line that counts them.
    """
    # The released code reads the reward at the last token of the text itself, so the end-of-text
    # token is taken off; of a chat all that the template writes is read.
    kept = []
    dropped = defaultdict(list)
    for number, found in enumerate(encode_rows(texts, tokenizer)):
        if isinstance(found, str):
            dropped[found].append(number + 1)
            continue
        responses = found.responses
        if not found.is_chat:
            responses = [ids[:-1] for ids in responses]
        longest = len(found.prompt_ids) + max(map(len, responses))
        if longest > max_length:
            dropped[f"a side of over --max-length {max_length} tokens"].append(number + 1)
            continue
        row = {"prompt_ids": found.prompt_ids, "responses": responses, "row": number}
        row["p_chosen"] = texts[number].get("p_chosen")
        kept.append(row)
    report(what, len(kept), dropped)
    show_example(tokenizer, kept[0]["prompt_ids"], kept[0]["responses"][0])
    require_context(tokenizer, kept)
    return kept


def load_subset(args, split, test_data=""):
    """The pairs of --data that belong to --subset; held-out ones of test_data, if there is any.

    They are in the sub-folder of that name; without one, a column of GROUP_COLUMNS has that name.
    """
    # The relabelled HH-RLHF has a folder for each subset; to read them all would take pairs twice.
    folder = Path(args.data, args.subset)
    if folder.is_dir():
        return load_split(str(folder), test_data, split)

    rows = load_split(args.data, test_data, split)
    if args.subset == "both":
        return rows
    groups = sorted(set(map(group_of, rows)))
    rows = [row for row in rows if group_of(row) == args.subset]
    problem = f"no row of group {args.subset!r}, nor such a sub-folder; use --subset both"
    require(rows, f"{args.data}: {problem}, or one of {', '.join(groups)[:60]}")
    return rows


GROUP_COLUMNS = ("data_subset", "subset", "group")  # where a row names its group of readers


def group_of(row):
    """The group that a row belongs to, by any name; "other" if it names none."""
    for column in GROUP_COLUMNS:
        if row.get(column) is not None:
            return str(row[column])
    return "other"


def number_of_outputs(reward_type, num_atoms):
    """K, the outputs of the reward head."""
    if reward_type == "base":
        return 1
    if reward_type == "mean_and_variance":
        return 2
    if reward_type == "categorical":
        return num_atoms
    raise ValueError(f"unknown reward type {reward_type!r}")


def add_head(model, weight):
    """Attach the float32 reward head `score`, as the library's classifiers name it.  (K, d)"""
    K, width = weight.shape
    model.score = nn.Linear(width, K, bias=False, device=model.device)
    model.score.weight.data.copy_(weight)
    model.config.num_labels = K
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor):  # the body is sharded over several processes
        fully_shard(model.score, mesh=parameter.device_mesh)


def new_reward_model(args, tokenizer):
    """A language model with a fresh head of args.type -> the model, and its LoRA form or None."""
    # With LoRA the body stays frozen and whole on every process; else it is trained, sharded.
    model = load_model(args.model, args.dtype, train=not args.lora)
    adapted = None
    if args.lora:
        import peft

        # The adapters go into the model itself; `adapted` can merge them into its weights later.
        config = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0)
        adapted = peft.get_peft_model(model, config)

    # The head starts at 1 % of the library's first weights, which have sd 0.02, so that all outputs
    # are close to 0 (released code).
    K = number_of_outputs(args.type, args.num_atoms)
    add_head(model, 0.01 * 0.02 * torch.randn(K, model.config.get_text_config().hidden_size))

    # A reward model predicts no tokens, so its output embeddings are not trained. Where they are
    # tied, they are also the input embeddings, which are trained.
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().requires_grad_(False)

    # config.json says how to read the outputs. This file needs type and K; a reader of the outputs
    # may need link and atoms.
    atoms = []
    if args.type == "categorical":
        atoms = [i / (K - 1) for i in range(K)]
    model.config.dpl = {"type": args.type, "K": K, "link": args.link, "atoms": atoms}
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, adapted


RESTORE = "restore the files that train saved"


def is_description(meta, K):
    """Is it what train writes of a reward model with K outputs: {"type", "K", "link", ...}?"""
    if not isinstance(meta, dict) or meta.get("K", K) != K:
        return False
    if meta.get("link", "logistic") not in ("logistic", "probit"):
        return False
    if meta.get("type") == "categorical":
        return K >= 2
    if meta.get("type") in ("base", "mean_and_variance"):
        return K == number_of_outputs(meta["type"], 0)
    return False


def read_description(folder):
    """The entry dpl of a model's config.json: {"type", "K", "link", "atoms"}"""
    config = folder / "config.json"
    try:
        found = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        why = type(error).__name__
        raise SystemExit(f"{config}: cannot be read ({why}); {RESTORE}") from None
    meta = None
    if isinstance(found, dict):
        meta = found.get("dpl")
    require(meta, f"{config}: no entry dpl, so this is no reward model; `dpl.py train` makes one")
    fine = isinstance(meta, dict) and isinstance(meta.get("K"), int)
    fine = fine and is_description(meta, meta["K"])
    require(fine, f"{config}: the entry dpl names no type, link and K that are known; {RESTORE}")
    return meta


def read_head(folder):
    """The weight of the reward head in the files of a model -> (K, d), or None if it has none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, "pt")
            if "score.weight" in file.keys():
                return file.get_tensor("score.weight")
        except (SafetensorError, OSError) as error:
            why = type(error).__name__
            raise SystemExit(f"{path}: cannot be read ({why}); {RESTORE}") from None
    return None


def load_head(name):
    """The reward head of what train saved -> its weight (K, d), and {"type", "K", "link", "atoms"}

    SystemExit: not a reward model, or one whose files do not belong together.
    """
    folder = model_folder(name)
    meta = read_description(folder)
    weight = read_head(folder)
    require(weight is not None, f"{folder}: no score.weight in the model's files; {RESTORE}")

    fine = weight.dim() == 2 and weight.isfinite().all()
    require(fine, f"{folder}: the head is no matrix of finite numbers; {RESTORE}")

    # A head of another shape would be read as another distribution.
    found = len(weight)
    named = f"those of {meta['type']} with K = {meta['K']} as in config.json"
    problem = f"{folder}: the head has {found} outputs, not {named}; {RESTORE}"
    require(found == meta["K"], problem)
    return weight, meta


def load_reward_model(name, dtype):
    """What train saved -> the model, its tokenizer, and {"type", "K", "link", "atoms"}"""
    # load_model reads the body only; the head comes from the same files.
    weight, meta = load_head(name)
    model = load_model(name, dtype)
    reads = weight.shape[1]
    width = model.config.get_text_config().hidden_size
    problem = f"{name}: the head is for width {reads}, the model has {width}; {RESTORE}"
    require(reads == width, problem)
    add_head(model, weight)
    return model, load_tokenizer(name), meta


def head_outputs(model, batch):
    """Raw outputs at each response's last token in a packed batch -> (responses, K) float32"""
    return model.score(response_hiddens(model, batch).float())


@torch.no_grad()
def raw_outputs(model, rows, tokens_per_microbatch):
    """Raw outputs for encoded rows, the same on all processes -> list of (responses, K), CPU

    SystemExit(143) between two micro-batches after SIGTERM or Ctrl-C.
    """
    # Packed rows: a prompt is computed once for all its responses, and nothing is padded.
    sizes = [len(row["responses"]) for row in rows]
    outputs = [torch.zeros(n, model.config.num_labels) for n in sizes]
    for batch in pack_pairs(rows, tokens_per_microbatch):
        if stop_requested():
            raise SystemExit(143)
        index = batch["index"]  # which of the rows are in this batch
        of_rows = head_outputs(model, batch).cpu().split([sizes[i] for i in index])
        for i, row_outputs in zip(index, of_rows, strict=True):
            outputs[i] = row_outputs

    # Every process filled in its own rows and left the others at 0.
    whole = torch.cat(outputs)
    dist.all_reduce(whole)
    return whole.split(sizes)


# ---- training


@torch.no_grad()
def log_mean_probabilities(model, batches, args):
    """log of the mean p over a whole batch of pairs, the same on all processes -> (K,)

    batches: the micro-batches of this process. It takes one more forward pass; None, without one,
    if the objective has no entropy of a batch.
    """
    wanted = args.type == "categorical" and args.entropy == "batch" and args.entropy_coeff != 0
    if not wanted:
        return None
    log_p = [head_outputs(model, batch).log_softmax(-1) for batch in batches]
    log_sum = torch.cat(log_p).logsumexp(0)

    # Sums over the pairs of all processes stay in log space.
    log_sums = [torch.empty_like(log_sum) for _ in range(dist.get_world_size())]
    dist.all_gather(log_sums, log_sum)
    return torch.stack(log_sums).logsumexp(0) - math.log(2 * args.batch_size)


def batch_losses(model, batch, args, log_mean_p=None):
    """A packed batch's objective with gradient (B,), and what is logged of each pair, (B,) each.

    log_mean_p: of log_mean_probabilities, for --entropy batch.
    Accuracy is that of `right`, of hard labels. The loss that is logged has the labels of training:
    soft ones with --soft-labels.
    """
    # The responses of a pair stand side by side: chosen, rejected.
    outputs = head_outputs(model, batch)
    chosen = outputs[0::2]
    rejected = outputs[1::2]
    hard_losses = pair_losses(chosen, rejected, args.type, args.link, args.sigma_floor)
    losses = hard_losses
    if args.soft_labels:  # Eq. 1: p_u(a, b) of either order
        p_chosen = [float(row["p_chosen"]) for row in batch["rows"]]
        p = to_device(torch.tensor(p_chosen), outputs.device)
        swapped_losses = pair_losses(rejected, chosen, args.type, args.link, args.sigma_floor)
        losses = p * hard_losses + (1 - p) * swapped_losses

    # The entropy bonus: of each alternative (App. C.2), or of the batch's mean p (released code).
    objective = losses
    if args.type == "categorical" and log_mean_p is None:
        objective = losses - args.entropy_coeff * entropy(chosen, rejected)
    elif args.type == "categorical":
        shares = entropy_shares(chosen, rejected, log_mean_p)
        objective = losses - args.entropy_coeff * shares
    return objective, {"loss": losses.detach(), "accuracy": right(hard_losses)}


def right(losses):
    """Is P(chosen wins) above 1/2?  A tie counts half.  (B,) hard losses -> (B,)"""
    even = math.log(2)
    return (losses < even).float() + (losses == even).float() / 2


def evaluate(model, rows, args):
    """Loss and accuracy of held-out pairs, (pairs,) each.

    Here labels are hard, also where training has --soft-labels: exp(-eval_loss) is the probability
    that the model gives to the choice that was seen. Held-out pairs need no p_chosen, and eval_loss
    is not to be compared with the loss of soft labels in training.
    """
    outputs = torch.stack(raw_outputs(model, rows, args.tokens_per_microbatch))
    losses = pair_losses(outputs[:, 0], outputs[:, 1], args.type, args.link, args.sigma_floor)
    return {"eval_loss": losses, "eval_accuracy": right(losses)}


def log_held_out(out, step, model, optimizer, rows, args):
    """Log loss and accuracy of the held-out pairs -> the record.

    When asked to stop meanwhile, it saves the run before it leaves: --resume evaluates again.
    """
    try:
        values = evaluate(model, rows, args)
    except SystemExit:
        save_checkpoint(out, step, model, optimizer)
        raise
    return log(out, step, **values)


def lr_factor(schedule, t, T):
    """Learning rate of step t of T, as a multiple of the first."""
    if schedule == "cosine":  # released code
        return 0.1 + 0.45 * (1 + math.cos(math.pi * t / T))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}")


def new_optimizer(model, args):
    """AdamW with two groups of parameters, body and head, which may learn at different rates."""
    head = model.score.weight
    body = [p for p in model.parameters() if p.requires_grad and p is not head]
    groups = [{"params": body}, {"params": [head]}]
    fused = True if head.is_cuda else None  # on a GPU one pass over the weights
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=fused)


def set_rates(optimizer, args, factor):
    """Rates of the next step: of the body, which is returned, and of the head."""
    body, head = optimizer.param_groups
    body["lr"] = args.lr * factor
    if args.head_lr == 0:
        head["lr"] = args.lr * factor
    else:
        head["lr"] = args.head_lr * factor
    return body["lr"]


def average_gradients(model):
    """Mean over the processes, for weights that every process holds whole (LoRA)."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@dataclass
class Pairs:
    """What reward models are trained on; it is read before a run folder is made."""

    tokenizer: object  # of --model
    rows: list  # encoded pairs to train on
    held_out: list  # encoded pairs of --eval-pairs
    steps: int  # optimiser steps


def load_training_pairs(args):
    """The pairs of --data as token ids, the longer ones dropped -> Args with a batch size, Pairs"""
    tokenizer = load_tokenizer(args.model)
    rows = encode(load_subset(args, "train", args.test_data), tokenizer, args.max_length)
    held_out = encode(load_subset(args, "test", args.test_data), tokenizer, args.max_length)
    held_out = subset(held_out, args.eval_pairs, seed=0)
    if args.soft_labels:
        problem = f"{args.data}: --soft-labels: every row needs p_chosen, a number from 0 to 1"
        for row in rows:
            p = row["p_chosen"]
            require(isinstance(p, int | float) and 0 <= p <= 1, problem)

    # Each process needs a pair in every batch, and one to evaluate.
    args, steps = plan_steps(args, len(rows), len(held_out))
    fewest = min(args.batch_size, len(held_out))
    world = dist.get_world_size()
    problem = f"{fewest} pairs for {world} processes: raise --batch-size and --eval-pairs"
    require(fewest >= world, problem)
    plan_memory(args, rows, steps, state=2, trained=not args.lora)  # the two moments of AdamW
    return args, Pairs(tokenizer, rows, held_out, steps)


def train(args):
    """Fit a reward model of args.type to the pairs of --data -> the new records of metrics.jsonl"""
    setup(args.seed)
    args, pairs = load_training_pairs(args)
    history = fit(args, pairs)

    # The last record has the accuracy on the held-out pairs.
    accuracy = history[-1]["eval_accuracy"]
    lines = training_claim(accuracy, len(pairs.held_out), args.type, args.data)
    say_claim(*lines, Path(args.out or "results/dpl-train"))
    return history


def training_claim(accuracy, n, reward_type, data):
    """What the paper says of accuracy, and that of n held-out pairs -> two lines"""
    paper = "models of a distribution are as accurate as ordinary ones (Table 1: 66 to 68 %)"
    low, high = wilson(accuracy * n, n)
    where = "the tiny world" if data == "tiny" else data
    shown = f"{verdict(low, high, 0.5)}: on {where} a {reward_type} model predicts held-out "
    shown += f"preferences better than a coin, of {n} pairs ({accuracy:.3f} "
    return paper, f"{shown}[{low:.3f}, {high:.3f}])"


def fit(args, pairs):
    """Fit a reward model of args.type to Pairs -> the new records of metrics.jsonl"""
    # Model: the body is a language model, the head is new and depends on the seed alone.
    setup(args.seed)
    rows = pairs.rows
    steps = pairs.steps
    eval_steps = max(1, args.eval_every // args.batch_size)
    save_steps = max(1, args.save_every // args.batch_size)
    model, adapted = new_reward_model(args, pairs.tokenizer)
    optimizer = new_optimizer(model, args)

    # The run folder: all that can be refused has been.
    out = start_run(args, "dpl-train")
    start = 0
    if args.resume:
        start, _ = load_checkpoint(out, model, optimizer)
    compile_layers(model, args.compile, steps - start)

    history = []
    for step in progress(range(start, steps)):
        if args.eval_every and step % eval_steps == 0:
            history.append(log_held_out(out, step, model, optimizer, pairs.held_out, args))

        # The gradient of the mean objective of the batch, a few packed rows at a time.
        started = time.time()
        index = batch_order(len(rows), args.batch_size, step, args.seed)
        batch_rows = [rows[i] for i in index]
        batches = pack_pairs(batch_rows, args.tokens_per_microbatch)
        log_mean_p = log_mean_probabilities(model, batches, args)
        metrics = []
        for batch in batches:
            objective, values = batch_losses(model, batch, args, log_mean_p)
            share = dist.get_world_size() / args.batch_size  # FSDP averages over the processes
            (objective.sum() * share).backward()
            metrics.append(values)

        # One step of AdamW.
        if args.lora:
            average_gradients(model)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        lr = set_rates(optimizer, args, lr_factor(args.schedule, step, steps))
        optimizer.step()
        optimizer.zero_grad()

        # Log, save, and stop when asked to.
        values = {**merge(metrics), "lr": lr, "grad_norm": grad_norm, **speed(batch_rows, started)}
        history.append(log(out, step, **values))
        stop_unless_finite(history[-1]["grad_norm"], step, batch_rows, out)
        stop = stop_requested()
        if stop or (args.save_every and (step + 1) % save_steps == 0):
            save_checkpoint(out, step + 1, model, optimizer)
        if stop:
            raise SystemExit(143)  # SIGTERM or Ctrl-C: --resume continues

    # The last record is that of the held-out pairs.
    history.append(log_held_out(out, steps, model, optimizer, pairs.held_out, args))
    whole = adapted.merge_and_unload() if args.lora else model
    save_model(whole, pairs.tokenizer, out / "model")
    return history


# ---- scoring


def is_file_of_responses(path):
    """Is it a file of prompts with responses? Else it holds pairs, or is no file at all."""
    if not path.is_file():
        return False
    rows = read_rows(path)
    return len(rows) > 0 and "chosen" not in rows[0]


def require_responses(row, place):
    """SystemExit unless the row has a prompt, and a list of responses that are texts."""
    problem = f"{place}: needs prompt and responses, none empty"
    responses = row.get("responses")
    require("prompt" in row and isinstance(responses, list) and responses, problem)
    for text in responses:
        require(isinstance(text, str) and text, problem)
    try:
        for part in [row["prompt"], *responses]:
            require_text(part)
    except Unusable as reason:
        raise SystemExit(f"{problem} ({reason})") from None


def rows_to_score(args):
    """Rows of --data with "prompt" and "responses".

    The responses of a pair are [rejected, chosen], since summarize counts how often the second one
    is rated no lower than the first: for pairs, this is to be right.
    """
    # Pairs, in any form that train reads.
    path = Path(args.data)
    if not is_file_of_responses(path):
        rows = load_subset(args, args.split)
        for row in rows:
            row["responses"] = [row["rejected"], row["chosen"]]
        return rows

    # Prompts with responses, as in the released code's jailbroken_responses.jsonl.
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        require_responses(row, f"{args.data}:{number}")
    return rows


COMMAND_LINE = "--prompt, --response"  # in place of a file's name


def add_scores(rows, name, checkpoint, args):
    """The rows with more columns: mean_NAME and sd_NAME of each response's utility, risk_NAME; and
    for summarize reward_outputs_NAME, the raw outputs, and reward_model_NAME.
    """
    texts = [{"prompt": row["prompt"], "responses": row["responses"]} for row in rows]
    source = COMMAND_LINE
    if args.response == "":
        source = f"{args.data} as tokens"
    encoded = encode(texts, load_tokenizer(checkpoint), args.max_length, source)

    # encode has printed how many rows it dropped. Training drops such pairs, too; but a file of
    # prompts and responses is scored whole or not at all.
    if "chosen" not in rows[0]:
        complete = len(encoded) == len(rows)
        require(complete, f"{source}: take the dropped rows out of the file before scoring it")

    # The rows that are left get their columns.
    model, _, meta = load_reward_model(checkpoint, args.dtype)
    kept = [rows[code["row"]] for code in encoded]
    outputs = raw_outputs(model, encoded, args.tokens_per_microbatch)
    for row, row_outputs in zip(kept, outputs, strict=True):
        row[f"mean_{name}"] = utility(row_outputs, meta["type"], "mean").tolist()
        row[f"sd_{name}"] = utility(row_outputs, meta["type"], "sd").tolist()
        risk = utility(row_outputs, meta["type"], args.risk, args.alpha)
        row[f"reward_outputs_{name}"] = row_outputs.tolist()
        row[f"risk_{name}"] = risk.tolist()
        row[f"reward_model_{name}"] = meta
    return kept


def score(args):
    """Utilities of pairs or responses under reward models -> the rows, written to args.out.

    Printed are mean and sd, what summarize prints and, of pairs, what the groups say.
    """
    alone = args.response != ""  # one text on the command line
    if alone:
        rows = [{"prompt": args.prompt, "responses": [args.response]}]
        require_responses(rows[0], COMMAND_LINE)
    else:
        rows = rows_to_score(args)
    for checkpoint in args.checkpoints:
        load_head(checkpoint)  # what is no reward model is refused before any is read whole

    for name, checkpoint in zip(args.names, args.checkpoints, strict=True):
        rows = add_scores(rows, name, checkpoint, args)

    if alone:
        for name in args.names:
            print_utilities(rows[0], name, args.alpha)
        return rows
    text = "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()
    on_rank0(lambda: write(args.out, text), f"{args.out}: cannot be written")
    report_scores(args, rows)
    say(f"{len(rows)} rows: {args.out}")
    return rows


def report_scores(args, rows):
    """Print means and sds, what summarize prints, and of pairs what the groups say."""
    for name in args.names:
        print_means(rows, name)
    counts = {len(row["responses"]) for row in rows}
    if len(counts) == 1 and counts != {1}:
        for scored in scored_in(args.out, rows):
            print_summary(args.out, scored, summary_of(scored, args.alpha), args.alpha)
    if "chosen" not in rows[0]:
        return
    for name in args.names:
        groups = group_table(rows, name)
        if len(groups) < 3:  # all, and one more
            say("\none group: a column data_subset, subset or group names the readers of each pair")
            return
        shared = shared_responses(rows, name)
        print_groups(name, groups, shared)
        path = figure_path(args, name)
        caption = f"{args.data}, {args.split}: reward model {name}"
        figure = draw_groups(groups, shared, caption)
        on_rank0(lambda figure=figure, path=path: save_figure(figure, path), f"{path}: not written")
        say(f"figure: {path}")


def print_means(rows, name, most=6):
    """Mean and sd of the first responses under the reward model NAME, a line for each."""
    say(f"\n{name + ': row':20}{'mean':>10}{'sd':>10}  response")
    for number, row in enumerate(rows[:most], 1):
        for i, response in enumerate(row["responses"]):
            mean = row[f"mean_{name}"][i]
            sd = row[f"sd_{name}"][i]
            text = " ".join(words(response).split())[:50]
            say(f"{number:<20}{mean:10.4f}{sd:10.4f}  {text}")
    if len(rows) > most:
        say(f"... and {len(rows) - most} rows more")


# ---- what groups of readers say of pairs


@dataclass
class Group:
    """A group's pairs under one reward model."""

    pairs: int
    hits: float  # pairs whose chosen response has the larger mean; a tie is half
    sd: float  # mean of the sds of all responses


@dataclass
class Shared:
    """A response that two groups at least have judged."""

    sd: float  # learned
    difference: float  # between the groups' shares of pairs that it wins, the largest


def group_table(rows, name):
    """{group: Group}, all pairs first.  A group is any name in a column of GROUP_COLUMNS."""
    members = {"all": rows}
    for row in rows:
        members.setdefault(group_of(row), []).append(row)
    found = {}
    for group, own in members.items():
        hits = 0.0
        sds = 0.0
        for row in own:
            rejected, chosen = row[f"mean_{name}"]
            hits += (chosen > rejected) + (chosen == rejected) / 2
            sds += sum(row[f"sd_{name}"]) / 2
        found[group] = Group(len(own), hits, sds / len(own))
    return found


def shared_responses(rows, name):
    """The responses that two groups or more have judged, in the same pair or in others -> [Shared]

    This needs no knowledge of the groups but who preferred what.
    """
    # For each response, what each group has said: 1 where it was chosen, else 0.
    verdicts = defaultdict(dict)
    sds = {}
    for row in rows:
        for won, response in enumerate(row["responses"]):  # rejected, chosen
            key = json.dumps([row["prompt"], response], default=str)
            verdicts[key].setdefault(group_of(row), []).append(won)
            sds[key] = row[f"sd_{name}"][won]

    # By how much do the groups differ?
    found = []
    for key, of_groups in verdicts.items():
        shares = [sum(won) / len(won) for won in of_groups.values()]
        if len(shares) > 1:
            found.append(Shared(sds[key], max(shares) - min(shares)))
    return found


DIVIDED = 0.5  # groups disagree on a response where their shares differ by this much


def sds_by_kind(shared):
    """The sds of responses on which groups agree, and of those on which they do not."""
    agreed = [one.sd for one in shared if one.difference < DIVIDED]
    divided = [one.sd for one in shared if one.difference >= DIVIDED]
    return torch.tensor(agreed), torch.tensor(divided)


def found_by_spread(shared):
    """How often the sd is larger where groups disagree than where they agree, ties by half.

    1/2 is chance.  nan without responses of both kinds.
    """
    agreed, divided = sds_by_kind(shared)
    larger = (divided[:, None] - agreed).sign() / 2 + 0.5
    return larger.mean().item()


def print_groups(name, groups, shared):
    """A table of the groups, and whether the spread finds where they disagree."""
    title = f"{name}: group"
    say(f"\n{title:24}{'pairs':>8}{'accuracy':>10}   95 % interval{'mean sd':>12}")
    for group, seen in groups.items():
        low, high = wilson(seen.hits, seen.pairs)
        line = f"{shown(group):24}{seen.pairs:8}{seen.hits / seen.pairs:10.4f}"
        say(f"{line}  [{low:.4f}, {high:.4f}]{seen.sd:10.4f}")
    agreed, divided = sds_by_kind(shared)
    if len(divided) == 0 or len(agreed) == 0:
        kinds = f"{len(divided)} responses divide the groups, on {len(agreed)} they agree"
        say(f"{kinds}: too few that two groups judged to tell whether the spread finds them")
        return
    line = f"sd where groups disagree ({len(divided)} responses) is larger than where they agree "
    say(f"{line}({len(agreed)}) in {found_by_spread(shared):.1%} of comparisons; chance is 50 %")


def draw_groups(groups, shared, caption):
    """Two panels -> the figure.  Accuracy of each group; sd where groups agree and disagree."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    figure.suptitle(caption, fontsize=9)

    # Whose preferences does the mean utility predict?
    for place, seen in enumerate(groups.values()):
        share = seen.hits / seen.pairs
        low, high = wilson(seen.hits, seen.pairs)
        below = max(share - low, 0.0)  # rounding may leave a little less than 0
        above = max(high - share, 0.0)
        axes[0].errorbar(place, share, [[below], [above]], fmt="o", capsize=4)
    axes[0].axhline(0.5, color="k", ls=":")
    axes[0].set_xticks(range(len(groups)), [shown(group)[:16] for group in groups])
    axes[0].set(title="accuracy of the mean, 95 % interval", xlabel="group", ylabel="accuracy")

    # Does the spread find where the groups disagree?
    agreed, divided = sds_by_kind(shared)
    labels = [f"groups agree ({len(agreed)})", f"they disagree ({len(divided)})"]
    axes[1].hist([agreed.numpy(), divided.numpy()], 20, color=["C0", "C3"], label=labels)
    share = found_by_spread(shared)
    title = f"sd is larger where they disagree: {share:.1%}\nof comparisons, chance 50 %"
    if math.isnan(share):
        title = "too few responses that two groups judged"
    axes[1].set(title=title, xlabel="learned sd of utility", ylabel="responses")
    axes[1].legend(fontsize=8)
    return figure


def figure_path(args, name):
    """The figure of a reward model's groups, beside the file of scores."""
    path = Path(args.out)
    if len(args.names) == 1:
        return path.with_suffix(".png")
    return path.with_name(f"{path.stem}_{name}.png")


def print_utilities(row, name, alpha):
    """One line: mean, sd and quantile of a row's only response under the reward model NAME."""
    outputs = torch.tensor(row[f"reward_outputs_{name}"])
    line = [name]
    for measure in ("mean", "sd", "quantile"):
        value = utility(outputs, row[f"reward_model_{name}"]["type"], measure, alpha).item()
        line.append(f"{measure} {value:.6g}")
    say("  ".join(line))


# ---- summary of scored files

# Levels of risk aversion in summarize's table.
ALPHAS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 0.9, 0.99)


@dataclass
class Scored:
    """What one reward model said of the rows of a file."""

    name: str  # of the reward model; "NAME, SUBSET" where only that data_subset is meant
    reward_type: str
    outputs: torch.Tensor  # (rows, responses, K), raw, float64


@dataclass
class Rate:
    """How often the second response is rated no lower than the first.

    Of pairs, the second is the chosen one; of the released jailbreaks, the jailbroken one.
    """

    hits: int
    ties: int  # hits where both are the same
    rows: int


@dataclass
class Summary:
    """What summarize prints of one reward model in one file."""

    r_squared: float
    r_squared_within: float  # of the variance within prompts only
    mean: Rate
    quantile: Rate  # at --alpha
    quantiles: dict  # {alpha of ALPHAS: Rate}


def shown(text):
    """A name from a file for a message: one line, and not too long."""
    return " ".join(text.split())[:60]


def are_numbers(values):
    """Is it a list of numbers that a float32 can hold, and not empty?"""
    if not isinstance(values, list) or len(values) == 0:
        return False
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not abs(value) <= torch.finfo(torch.float32).max:  # NaN is not
            return False
    return True


def output_table(path, rows, column):
    """A column of raw outputs -> (rows, responses, K) float64; SystemExit names file and line."""
    table = []
    for number, row in enumerate(rows, 1):
        place = f"{path}:{number}: {shown(column)}"
        outputs = row.get(column)
        fine = isinstance(outputs, list) and len(outputs) > 0 and all(map(are_numbers, outputs))
        problem = f"{place}: needs a list of finite numbers for each response; score the file again"
        require(fine, problem)

        # One K for all, and as many responses in every row.
        table.append(outputs)
        as_many = len(outputs) == len(table[0])
        lengths = set(map(len, outputs))
        problem = f"{place} is not as many numbers as in line 1; score the file again"
        require(as_many and lengths == {len(table[0][0])}, problem)
    return torch.tensor(table, dtype=torch.float64)


def usual_type(K):
    """The reward type with K outputs, for the released code's files, which do not name it."""
    if K == 1:
        return "base"
    if K == 2:
        return "mean_and_variance"
    return "categorical"


def named_type(path, rows, name, K):
    """The reward type that all rows of a file name for the model NAME, which has K outputs."""
    column = f"reward_model_{name}"
    metas = [row.get(column) for row in rows]
    if metas.count(None) == len(metas):
        return usual_type(K)
    first = None
    for number, meta in enumerate(metas, 1):
        place = f"{path}:{number}: {shown(column)}"
        problem = f"{place} is no reward model with {K} outputs; score the file again"
        require(is_description(meta, K), problem)
        found = [meta["type"], meta.get("link", "logistic")]
        first = first or found
        problem = f"{place} is {' '.join(found)}, in line 1 {' '.join(first)}; score the file again"
        require(found == first, problem)
    return first[0]


def read_outputs(path):
    """Raw outputs in a file of score, evaluate or the released code -> list of Scored"""
    rows = read_rows(Path(path))
    require(rows, f"{path}: no rows; write the file with score or evaluate")
    return scored_in(path, rows)


def scored_in(path, rows):
    """As read_outputs, of the rows of that file."""
    # The released code's eval_results have one reward model, and a column for each side of a pair.
    # That model has no name in the file; here it is called "pairs".
    for row in rows:
        if "reward_output_chosen" in row:
            sides = [row.get("reward_output_rejected"), row["reward_output_chosen"]]
            row["reward_outputs_pairs"] = sides

    # All others have a column for each reward model.
    prefix = "reward_outputs_"
    names = [key.removeprefix(prefix) for key in rows[0] if key.startswith(prefix)]
    require(names, f"{path}:1: no reward_outputs_NAME; write the file with score or evaluate")

    found = []
    parts = sorted(set(map(group_of, rows)))
    for name in names:
        outputs = output_table(path, rows, prefix + name)
        reward_type = named_type(path, rows, name, outputs.shape[-1])
        found.append(Scored(name, reward_type, outputs))

        # Helpfulness accuracy is that of the helpful rows (Table 1).
        if len(parts) > 1:
            for part in parts:
                members = [group_of(row) == part for row in rows]
                found.append(Scored(f"{name}, {part}", reward_type, outputs[members]))
    return found


def rate(utilities):
    """(rows, responses >= 2) -> Rate.  Ties count as hits, as in the released code."""
    first = utilities[:, 0]
    second = utilities[:, 1]
    hits = (second >= first).sum().item()
    ties = (second == first).sum().item()
    return Rate(hits, ties, len(utilities))


def summary_of(scored, alpha):
    """r^2 (Sec. 4) and the rates of Table 1 of one reward model's outputs -> Summary"""
    # 1 - r^2 is the share of hidden context.
    mean = utility(scored.outputs, scored.reward_type, "mean")
    sd = utility(scored.outputs, scored.reward_type, "sd")

    # Comparisons within prompts say nothing about the differences between prompts.
    # Each prompt's own mean is taken off; n / (n - 1) makes up for the variance that this removes.
    n = mean.shape[1]
    within = (mean - mean.mean(1, keepdim=True)) * math.sqrt(n / (n - 1))

    # How much risk aversion does it take to refuse the jailbreaks?
    quantiles = {}
    for level in ALPHAS:
        quantiles[level] = rate(utility(scored.outputs, scored.reward_type, "quantile", level))
    return Summary(
        r_squared=r_squared(mean, sd).item(),
        r_squared_within=r_squared(within, sd).item(),
        mean=rate(mean),
        quantile=rate(utility(scored.outputs, scored.reward_type, "quantile", alpha)),
        quantiles=quantiles,
    )


def print_summary(path, scored, summary, alpha):
    """A paragraph for one reward model in one file."""
    rows, responses = scored.outputs.shape[:2]
    say(f"\n{path}: {scored.name}, {scored.reward_type}, {rows} rows of {responses}")
    say(f"  r^2 {summary.r_squared:.4f}, within prompts {summary.r_squared_within:.4f}")
    rates = {"mean": summary.mean}
    if scored.reward_type != "base":
        rates[f"quantile {alpha:g}"] = summary.quantile
    for label, found in rates.items():
        # The published rates count ties as hits; of an accuracy they are half.
        half = found.hits - found.ties / 2
        low, high = wilson(half, found.rows)
        share = f"{found.hits:6}/{found.rows}  {found.hits / found.rows:.4f}  ties {found.ties}"
        say(f"  {label:14}{share}; ties half: {half / found.rows:.4f} [{low:.4f}, {high:.4f}]")
    if scored.reward_type != "base":
        say("  alpha   " + "".join(f"{level:6g}" for level in ALPHAS))
        say("  quantile" + "".join(f"{found.hits:6}" for found in summary.quantiles.values()))


def summarize(args):
    """Print r^2 and the rate at which the second response is preferred -> {name: Summary}"""
    found = []
    for path in args.files:
        for scored in read_outputs(path):
            several = scored.outputs.shape[1] > 1
            require(several, f"{path}: one response a prompt, and nothing to compare it with")
            found.append((path, scored))

    results = {}
    names = [scored.name for _, scored in found]
    for path, scored in found:
        summary = summary_of(scored, args.alpha)
        print_summary(path, scored, summary, args.alpha)
        key = scored.name
        if names.count(key) > 1:  # one name in two files: both are kept
            key = f"{path}: {key}"
        results[key] = summary
    return results


# ---- tables and figures


def print_table(table):
    """{name of a column: {label of a row: number}} in aligned lines.  A column may lack rows."""
    # The rows of all columns, in the order in which they first appear.
    labels = []
    for column in table.values():
        for label in column:
            if label not in labels:
                labels.append(label)

    # The names of the columns, then a line for each row.
    say("\n" + " " * 32 + "".join(f"{name:>19}" for name in table))
    for label in labels:
        line = f"{label:32}"
        for column in table.values():
            if label in column:
                line += f"{column[label]:19.4f}"
            else:
                line += " " * 19
        say(line)


def new_figure(rows, caption):
    """-> a figure of three panels a row, and its axes, a flat array."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3).flatten()
    figure.suptitle(caption, fontsize=9)
    return figure, axes


def save_results(out, curves, figure):
    """Write the curves that the figure shows, and the figure."""
    write(out / "curves.json", {name: values.tolist() for name, values in curves.items()})
    save_figure(figure, out / "figures" / "dpl.png")


def finish(out, table, curves, figure):
    """Print the table, and let rank 0 write the curves and the figure."""
    print_table(table)
    on_rank0(lambda: save_results(out, curves, figure), f"{out}: cannot be written")


# ---- synthetic and figure3


def synthetic_grid(env):
    """Alternatives to look at, the midpoints of 400 or of 50 x 50 cells.  -> (cells, d)"""
    if env == "1d":
        return ((torch.arange(400) + 0.5) / 400)[:, None]
    if env == "2d":
        line = (torch.arange(50) + 0.5) / 50
        return torch.cartesian_prod(line, line)
    raise ValueError(f"unknown environment {env!r}")


def synthetic_net(reward_type, env, width):
    """The net of App. C.1: three hidden layers, and K outputs of reward_type."""
    num_atoms = 20 if env == "1d" else 8  # released code
    K = number_of_outputs(reward_type, num_atoms)
    layers = []
    inputs = dimensions(env)
    for _ in range(3):
        layers.append(nn.Linear(inputs, width))
        if reward_type == "categorical":
            # As in the released code. There first and second sides have statistics of their own;
            # here they are one batch.
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers, nn.Linear(width, K))


def synthetic_sigma(outputs):
    """Here sigma is exp(f - 2), as in the released code, and not softplus(f).  (..., 2) -> (...)"""
    return (outputs[..., 1] - 2).exp()


def synthetic_losses(net, reward_type, n, args, generator):
    """Losses of n new pairs.  -> (n,)"""
    sides, first_wins = draw_pairs(args.env, n, args.shared_context, generator)
    first, second = net(sides).chunk(2)
    chosen = torch.where(first_wins, first, second)
    rejected = torch.where(first_wins, second, first)
    if reward_type == "mean_and_variance":
        sigma_chosen = synthetic_sigma(chosen)
        sigma_rejected = synthetic_sigma(rejected)
        return normal_loss(chosen[:, 0], sigma_chosen, rejected[:, 0], sigma_rejected, "logistic")
    return pair_losses(chosen, rejected, reward_type)


def fit_synthetic(reward_type, args, generator, out):
    """Train a net on fresh pairs in every step -> the net, and its loss on 50,000 more."""
    net = synthetic_net(reward_type, args.env, args.width)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    for step in range(args.steps):
        if stop_requested():
            raise SystemExit(143)  # SIGTERM or Ctrl-C: what is in metrics.jsonl stays
        losses = synthetic_losses(net, reward_type, args.batch_size, args, generator)
        if step % 100 == 0:
            log(out, step, **{reward_type: losses})
        losses.mean().backward()

        # The learning rate falls exponentially, from --lr to 1e-5.
        optimizer.param_groups[0]["lr"] = args.lr * (1e-5 / args.lr) ** (step / args.steps)
        optimizer.step()
        optimizer.zero_grad()

    net.eval()
    with torch.no_grad():
        losses = synthetic_losses(net, reward_type, 50000, args, generator)
    log(out, args.steps, **{reward_type: losses})
    return net, losses.mean().item()


def synthetic(args):
    """Fit all types to preferences of the world -> {type: {"loss", "corr. E[u]", "corr. Borda"}}"""
    setup(args.seed)
    out = start_run(args, f"dpl-{args.env}")
    generator = torch.Generator().manual_seed(args.seed)

    # What is true of the alternatives on a grid.
    grid = synthetic_grid(args.env)
    expected, _ = environment(args.env, grid)
    curves = {"u": expected, "borda": borda(args.env, grid, args.shared_context)}

    # What each reward type learns of them.
    table = {}
    for reward_type in ("base", "categorical", "mean_and_variance"):
        net, loss = fit_synthetic(reward_type, args, generator, out)
        with torch.no_grad():
            outputs = net(grid)
        learned = utility(outputs, reward_type)
        if reward_type == "base":
            learned = learned - learned.mean()  # Eq. 1 does not see a constant
        elif reward_type == "categorical":
            curves["p"] = outputs.softmax(-1)
        else:
            curves["sd"] = synthetic_sigma(outputs)
        curves[reward_type] = learned
        table[reward_type] = {
            "loss": loss,
            "corr. E[u]": correlation(learned, curves["u"]),
            "corr. Borda": correlation(learned, curves["borda"]),
        }

    if args.env == "1d":
        figure = draw_1d(curves, f"As Figure 3: {args.steps} steps, seed {args.seed}")
    else:
        figure = draw_2d(curves, f"Synthetic 2d: {args.steps} steps, seed {args.seed}")
    finish(out, table, curves, figure)
    say_claim(*borda_claim(curves["base"], curves["borda"], curves["u"], args.env), out)
    return table


def borda_claim(learned, borda_count, expected, env, pairs=2000):
    """What Theorem 3.1 says of a base model, and what this one does -> two lines

    Three utilities of the same alternatives, (cells,) each.  Of `pairs` random pairs those count
    that Borda count and expected utility order differently; a tie of `learned` counts half.
    """
    paper = "a base model orders alternatives by Borda count, not expected utility (Theorem 3.1)"
    n = len(learned)
    first, second = torch.randint(n, (2, pairs), generator=torch.Generator().manual_seed(0))
    by_borda = (borda_count[first] - borda_count[second]).sign()
    by_expected = (expected[first] - expected[second]).sign()
    differ = by_borda * by_expected < 0

    # With Borda +1, against it -1, a tie 0.
    sides = (learned[first] - learned[second]).sign() * by_borda
    hits = ((sides[differ] + 1) / 2).sum().item()
    count = int(differ.sum())
    where = f"in the synthetic {env} world"
    if count == 0:
        return paper, f"too few to tell: {where} both orders are the same (nan [0, 1])"
    low, high = wilson(hits, count)
    shown = f"{verdict(low, high, 0.5)}: {where} base goes with the Borda count in this share of "
    shown += f"{count} random pairs that the two order differently ({hits / count:.3f} "
    return paper, f"{shown}[{low:.3f}, {high:.3f}])"


def draw_1d(curves, caption):
    """Figure 3: what each reward type learned in the 1d world -> the figure"""
    figure, axes = new_figure(1, caption)
    u = curves["u"]
    twin = axes[0].twinx()
    axes[0].plot(u, curves["base"], "k", label="learned utility (left axis)")
    twin.plot(u, curves["borda"], "b--", label="Borda count (right)")
    twin.plot(u, u, "r:", label="expected utility (right)")
    peak = u[curves["base"].argmax()]
    borda_peak = u[curves["borda"].argmax()]
    title = f"base is highest at a = {peak:.2f}, the Borda count at\n{borda_peak:.2f}, "
    axes[0].set_title(f"{title}and the expected utility at {u.max():.2f}", fontsize=9)
    twin.set_ylabel("Borda count, expected utility")

    # The band is cut where sd has diverged: beyond 0.8 it grows without bound.
    mean = curves["mean_and_variance"]
    sd = curves["sd"]
    low = (mean - sd).clamp(mean.min() - 1)
    high = (mean + sd).clamp(max=mean.max() + 1)
    axes[1].plot(u, mean, "k", label="learned mean")
    axes[1].fill_between(u, low, high, alpha=0.3, label="± learned sd, cut at the frame")
    below = sd[u < 0.8].median()
    beyond = sd[u >= 0.8].median()
    title = f"mean_and_variance: median sd {below:.2g} up to 0.8\nand {beyond:.2g} beyond it"
    axes[1].set_title(title, fontsize=9)

    # All panels: where hidden context begins.
    extent = (0, 1, 0, 1)
    axes[2].imshow(curves["p"].T, origin="lower", extent=extent, aspect="auto", cmap="Greys")
    axes[2].set_title(
        "categorical: p(u | a), the darker the likelier;\ntwo branches: hidden context"
    )
    axes[2].title.set_fontsize(9)
    for axis in axes:
        label = "0.8: beyond it a coin decides"
        axis.axvline(0.8, color="C2", lw=1, ls="-.", label=label)
        axis.set(xlabel="alternative a", ylabel="learned utility")
    axes[2].set_ylabel("utility u")

    # One legend for all: a label that is in several panels once.
    entries = {}
    for axis in (twin, *axes):
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries[label] = handle
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_2d(curves, caption):
    """The released code's second figure, with the true Borda count -> the figure"""
    figure, axes = new_figure(2, caption)
    base = curves["base"]
    like_borda = correlation(base, curves["borda"])
    like_expected = correlation(base, curves["u"])
    titles = {
        "u": "expected utility",
        "borda": "Borda count",
        "base": f"base: learned utility, correlation {like_borda:.2f}\n"
        f"with the Borda count, {like_expected:.2f} with expected utility",
        "mean_and_variance": "mean_and_variance: learned mean",
        "sd": "mean_and_variance: learned sd,\nlarge where x y, the chance of utility 0, is",
        "p": "categorical: learned p(u | x, y), a bar for each of 8 u",
    }
    side = math.isqrt(len(curves["u"]))
    for axis, name in zip(axes, titles, strict=True):
        axis.set(xlabel="x", ylabel="y")
        axis.set_title(titles[name], fontsize=9)
        if name != "p":
            drawn = axis.contourf(curves[name].view(side, side).T, 12, extent=(0, 1, 0, 1))
            figure.colorbar(drawn, ax=axis)

    # The last panel shows the distributions at the midpoints of a 4 x 4 grid, as bars.
    p = curves["p"].view(side, side, -1)
    middle = [(2 * i + 1) * side // 8 for i in range(4)]  # of each quarter of a side
    for i in range(4):
        for j in range(4):
            place = (i / 4 + 0.02, j / 4 + 0.02, 0.21, 0.21)  # left, bottom, width, height
            inset = axes[5].inset_axes(place, xticks=[], yticks=[], ylim=(0, 1))
            bars = p[middle[i], middle[j]]
            inset.bar(range(len(bars)), bars)
    return figure


# ---- hidden-context, an experiment of ours

# The types that it trains: they learn within its few updates.
SHOWN = ("base", "mean_and_variance")


@dataclass
class Readers:
    """What the readers think of four responses to each prompt; (prompts, 4) unless said."""

    mean: torch.Tensor  # expected utility over the groups of readers
    sd: torch.Tensor  # over the groups
    worst: torch.Tensor  # utility to the group that likes it least
    borda: torch.Tensor  # mean probability of beating a response to any prompt
    divides: torch.Tensor  # 1 where the groups disagree, which is where there is a monster
    p_first_wins: torch.Tensor  # (prompts * 6,), the true probability for each of the pairs of four
    attributes: torch.Tensor  # (prompts * 4, 5), of attributes_of


def pairs_of_four(values):
    """(prompts, 4, ...) -> first and second sides of each prompt's 6 pairs, (prompts * 6, ...)"""
    first, second = torch.combinations(torch.arange(4)).unbind(1)
    return values[:, first].flatten(0, 1), values[:, second].flatten(0, 1)


def group_utilities(rows):
    """What each group of readers gives to the four responses.  -> (groups, prompts, 4)"""
    utilities = []
    for group in range(len(TINY_GROUPS)):
        of_group = []
        for row in rows:
            of_group.append([tiny_reward(row["prompt"], text, group) for text in row["responses"]])
        utilities.append(of_group)
    return torch.tensor(utilities)


def attributes_of(rows):
    """Regressors of utility: 1, polite, happy end, distance from 2 adjectives, monster.

    Two adjectives are what the readers like best.  -> (prompts * 4, 5) float64
    """
    attributes = []
    for row in rows:
        for text in row["responses"]:
            seen = tiny_attributes(text)
            distance = abs(seen["detail"] - 2)
            attributes.append([1.0, seen["polite"], seen["happy"], distance, seen["monster"]])
    return torch.tensor(attributes, dtype=torch.float64)


def ask_readers(rows):
    """Held-out rows of the tiny world -> Readers.  A group's preferences are Bradley-Terry."""
    # An element of TINY_GROUPS is (share of the readers, what the monster is worth to them).
    utilities = group_utilities(rows)  # (groups, prompts, 4)
    shares = torch.tensor([share for share, _ in TINY_GROUPS])[:, None, None]  # (groups, 1, 1)
    mean = (shares * utilities).sum(0)
    sd = (shares * (utilities - mean) ** 2).sum(0).sqrt()

    # Eq. 2: the probability that the first wins, with one reader for both sides.
    p_first_wins = torch.zeros(len(rows) * 6)
    for (share, _), of_group in zip(TINY_GROUPS, utilities, strict=True):
        first, second = pairs_of_four(of_group)
        p_first_wins = p_first_wins + share * torch.sigmoid(first - second)

    # beats[i, j]: probability that response i wins over j, for any two responses.
    flat = utilities.flatten(1)  # (groups, prompts * 4)
    margins = flat[:, :, None] - flat[:, None]
    beats = (shares * torch.sigmoid(margins)).sum(0)
    return Readers(
        mean=mean,
        sd=sd,
        worst=utilities.amin(0),
        borda=beats.mean(1).view_as(mean),
        divides=(sd > 1).float(),  # sd is 0 without a monster, and about 3 with one
        p_first_wins=p_first_wins,
        attributes=attributes_of(rows),
    )


def auc(sd, divides, resamples=1000):
    """How often sd is larger where readers disagree than where they do not, ties by half.

    Both (prompts, responses), divides 1 or 0 -> AUC, low, high: floats, a 95 % interval.  1/2 is
    chance.  The interval is a bootstrap over prompts, since the responses to one are no independent
    evidence.  nan where one of the two kinds is missing.
    """
    # P(larger) + P(tie) / 2 of two responses, one of each kind.
    members = divides == 1
    larger = (sd[members][:, None] - sd[~members]).sign() / 2 + 0.5

    # How often is each prompt drawn?  The first row of counts is the data: each prompt once.
    n = len(sd)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(resamples, n).scatter_add(1, drawn, torch.ones(resamples, n))
    counts = torch.cat([torch.ones(1, n), counts])

    # The mean of `larger`, with each response as often as its prompt.
    prompts = torch.arange(n)[:, None].expand_as(sd)
    times_divided = counts[:, prompts[members]]
    times_agreed = counts[:, prompts[~members]]
    sums = (times_divided @ larger * times_agreed).sum(1)
    means = sums / (times_divided.sum(1) * times_agreed.sum(1))
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
    return means[0].item(), low, high


def claim(sd, divides):
    """What the paper says of hidden context, and what these readers show -> two lines

    sd (prompts, responses): learned, of each utility; divides: 1 where the readers disagree.
    """
    paper = "the spread of a learned distribution of utility detects hidden context (Sec. 4 and 5)"
    value, low, high = auc(sd, divides)
    # Chance is 1/2; above it the spread finds what divides the readers.
    shown = f"{verdict(low, high, 0.5)}: in the tiny world the learned sd is larger where monsters "
    shown += f"divide the readers, in this share of the comparisons ({value:.2f} "
    return paper, f"{shown}[{low:.2f}, {high:.2f}])"


def compare(readers, mean, sd, risk_averse):
    """Learned mean, sd and risk-averse utility (prompts, 4) beside the readers' -> {row: number}"""
    # Worth of each attribute by least squares. A learned utility may have any unit, so the table
    # has a ratio: how many happy ends a monster is worth.
    fit = torch.linalg.lstsq(readers.attributes, mean.flatten()[:, None].double())
    names = ("intercept", "polite", "happy", "distance", "monster")
    worth = dict(zip(names, fit.solution[:, 0], strict=True))

    column = {
        "corr. Borda": correlation(mean, readers.borda),
        "corr. E[u]": correlation(mean, readers.mean),
        "worth of a monster / happy end": (worth["monster"] / worth["happy"]).item(),
        "r^2": r_squared(mean, sd).item(),
        "AUC of sd for monsters": auc(sd, readers.divides)[0],
    }

    # What readers would get if they were given the best of four by the learned utility.
    for label, utilities in (("mean", mean), ("1 % quantile", risk_averse)):
        best = utilities.argmax(1, keepdim=True)  # its number among the four, (prompts, 1)
        monsters = readers.divides.gather(1, best).mean().item()
        column[f"best of 4 by {label}: monsters"] = monsters
        worst = readers.worst.gather(1, best).mean().item()
        column[f"best of 4 by {label}: worst u"] = worst
    return column


def hidden_context(args):
    """Train two types in the tiny world, where two groups of readers judge -> the table"""
    # Data: pairs to train on, and four held-out responses to each prompt.
    setup(args.seed)
    args, pairs = load_training_pairs(args)
    rows = load_pairs("tiny", "test")
    texts = [{"prompt": row["prompt"], "responses": row["responses"]} for row in rows]
    encoded = encode(texts, pairs.tokenizer, args.max_length)
    problem = f"--max-length {args.max_length}: too short for some of the responses; raise it"
    require(len(encoded) == len(rows), problem)
    load_model(args.model, args.dtype)  # one that cannot be read is refused before the run folder
    out = start_run(args, "dpl", also=(*SHOWN, "curves.json"))

    # What the readers think of the responses.
    readers = ask_readers(rows)
    p_win = readers.p_first_wins
    curves = {"E[u]": readers.mean, "true sd": readers.sd, "P(win)": p_win}

    # The best that can be learned: the readers' own numbers.
    table = {"expected u": compare(readers, readers.mean, readers.sd, readers.worst)}
    for reward_type in SHOWN:
        # With --resume, a type that is finished is not trained again; one that was begun goes on.
        folder = out / reward_type
        finished = args.resume and (folder / "model").is_dir()
        if not finished:
            begun = args.resume and (folder / "config.json").is_file()
            fit(replace(args, type=reward_type, out=str(folder), resume=begun), pairs)

        # Score the held-out responses.
        model, _, _ = load_reward_model(folder, args.dtype)
        outputs = torch.stack(raw_outputs(model, encoded, args.tokens_per_microbatch))
        mean = utility(outputs, reward_type)
        sd = utility(outputs, reward_type, "sd")
        table[reward_type] = compare(readers, mean, sd, utility(outputs, reward_type, "quantile"))

        # What it predicts for the six pairs of each prompt: exp(-loss) is P(first wins).
        first, second = pairs_of_four(outputs)
        losses = pair_losses(first, second, reward_type, args.link, args.sigma_floor)
        predicted = torch.exp(-losses)
        error = (predicted - p_win).abs().mean().item()
        table[reward_type]["|P(win) - true P(win)|"] = error
        curves[reward_type] = mean
        curves[f"{reward_type} sd"] = sd
        curves[f"{reward_type} P(win)"] = predicted

    caption = f"Hidden context: {setting(args)}; {mean.numel()} held-out responses"
    finish(out, table, curves, draw_hidden(curves, table, caption))
    say("categorical is not shown: as many updates do not teach it reliably what divides readers")
    spread = curves["mean_and_variance sd"]
    say_claim(*claim(spread, readers.divides), out)
    return table


def calibration(predicted, true):
    """Means of both in ten bins of the predicted probability, the empty ones left out -> two lists

    The last bin holds P = 1, too.
    """
    bins = (predicted * 10).long().clamp(max=9)
    predicted_means = []
    true_means = []
    for i in range(10):
        members = bins == i
        if members.any():
            predicted_means.append(predicted[members].mean().item())
            true_means.append(true[members].mean().item())
    return predicted_means, true_means


def draw_hidden(curves, table, caption):
    """Three panels, each with what it shows in its title -> the figure

    Learned against expected utility; the learned sd where readers agree and where they do not;
    predicted against true P(win).
    """
    figure, axes = new_figure(1, caption)
    divides = curves["true sd"] > 1  # as in Readers
    spread = curves["mean_and_variance sd"]
    blue = {"color": "C0", "label": "without a monster: readers agree"}
    red = {"color": "C3", "label": "with a monster: readers disagree"}
    for style, members in ((blue, ~divides), (red, divides)):
        axes[0].plot(curves["E[u]"][members], curves["base"][members], ".", **style)
        axes[1].hist(spread[members], 40, alpha=0.6, **style)

    # What a monster is worth to the base model, and to the readers.
    row = "worth of a monster / happy end"
    learned = table["base"][row]
    true = table["expected u"][row]
    title = f"a monster is worth {learned:+.2f} happy ends to base,\n{true:+.2f} to the readers"
    axes[0].set(title=title, xlabel="expected utility of the readers (log-odds)")
    axes[0].set(ylabel="utility that base learned (log-odds)")

    # How well the spread finds what divides the readers; 1/2 is chance.
    value, low, high = auc(spread, divides)
    title = "mean_and_variance: its sd is larger with a monster\n"
    title += f"in {value:.0%} of comparisons [{low:.0%}, {high:.0%}], chance 50 %"
    axes[1].set(title=title, xlabel="learned sd of utility (log-odds)", ylabel="responses")

    # Calibration: the diagonal is right.
    errors = []
    for reward_type in SHOWN:
        means = calibration(curves[f"{reward_type} P(win)"], curves["P(win)"])
        axes[2].plot(*means, ".-", label=reward_type)
        error = table[reward_type]["|P(win) - true P(win)|"]
        errors.append(f"{reward_type} {error:.3f}")
    axes[2].axline((0, 0), (1, 1), color="k", ls=":", label="predicted = true")
    title = f"mean |predicted - true P(win)|:\n{', '.join(errors)}"
    axes[2].set(title=title, xlabel="predicted P(win)", ylabel="true P(win), mean of a bin")
    for axis in axes:
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8)
    return figure


# ---- the commands

# option: least and largest value, beside and before those that all methods share
RANGES = {
    "alpha": (1e-6, 1 - 1e-6),
    "num_atoms": (2, 1000),
    "entropy_coeff": (0, 1000),
    "sigma_floor": (0, 1000),
    "max_length": (1, 2**30),
    "head_lr": (0, 1),
    "weight_decay": (0, 1000),
    "width": (1, 2**13),
    "steps": (1, 10**9),
}


def check_training(args):
    """Refuse options of train, hh and hidden-context that do not go together."""
    default = "results/dpl-train"
    if args.type == "compare":
        default = "results/dpl"
        problem = "--type compare: only the tiny world has its readers, so use --data tiny"
        require(args.data == "tiny", problem)
    if args.lora:
        require(importlib.util.find_spec("peft"), "--lora: needs peft: pip install peft")

    # start_run will refuse this folder, too, but only after data and model have been read.
    require_free(args, Path(args.out or default))


def check_synthetic(args):
    """Refuse options of synthetic and figure3 that do not go together."""
    require(args.lr > 0, "--lr 0: must be above 0, since it decays to 1e-5 by a factor a step")
    layer = args.width * args.batch_size
    problem = f"--width {args.width} with --batch-size {args.batch_size}: too large; lower one"
    require(layer <= 2**28, problem)
    if args.env == "2d":
        require(not args.shared_context, "--shared-context: its Borda count is for 1d only")


def check_scoring(args):
    """Refuse options of evaluate and score that do not go together, and a file in the way."""
    require(args.checkpoints, "--checkpoints: name one reward model at least")
    different = len(set(args.names)) == len(args.names) and "" not in args.names
    matched = len(args.names) == len(args.checkpoints)
    require(different and matched, "--names: one per checkpoint, all different")
    require(args.data or args.response, "give --data, or --prompt and --response")
    require(args.response or not args.prompt, "--prompt: give --response, too")
    if args.response:
        return

    # The file to write.
    out = Path(args.out)
    require(args.out and not out.is_dir(), f"--out {args.out}: not a file; name the file to write")
    require(out.parent.is_dir(), f"--out {args.out}: its folder does not exist; make it")
    require(args.overwrite or not out.exists(), f"{args.out}: exists; --overwrite replaces it")


def check(args):
    """Whatever can be refused before anything is loaded or made is refused here, in one line."""
    check_ranges(args, RANGES)
    if isinstance(args, Args):
        check_training(args)
    elif isinstance(args, SyntheticArgs):
        check_synthetic(args)
    elif isinstance(args, ScoreArgs):
        check_scoring(args)
    else:
        require(args.files, "--files: name the files that score or evaluate wrote")


def main(args):
    check(args)

    # synthetic and figure3; evaluate and score; summarize; hidden-context; train and hh.
    if isinstance(args, SyntheticArgs):
        return synthetic(args)
    if isinstance(args, ScoreArgs):
        setup(0)
        return score(args)
    if isinstance(args, SummarizeArgs):
        return summarize(args)
    if args.type == "compare":
        return hidden_context(args)
    return train(args)


if __name__ == "__main__":
    main(args)
