"""Calibrated Direct Preference Optimization (Cal-DPO).

Xiao, Yuan, Zhu, Li, Honavar 2024, https://arxiv.org/abs/2412.14516

Let r_w and r_l be log pi/pi_ref of the chosen and of the rejected response. The loss is that of DPO
at beta = 1, plus a calibration that pulls r_w to 1/(2 beta) and r_l to -1/(2 beta) (Eq. 10):

    L = -log sigmoid( r_w - r_l ) + lam [ (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2 ],  lam = 1

    python methods/cal_dpo.py                             tiny world, a minute on a laptop
    python methods/cal_dpo.py --contrast ipo              the calibration of another loss
    torchrun --standalone --nproc-per-node 4 methods/cal_dpo.py hh --model results/sft-hh

Presets: tiny (default) | hh, tldr: Pythia-2.8B on Anthropic HH, TL;DR | ultrafeedback: Zephyr-7B.

Does r_w stay positive? It cannot exceed -log pi_ref(y_w|x). If its target is below that ceiling,
one pair alone has its minimum at r_w > 0. Two things pull it down: pairs that want the opposite,
and that all probabilities add up to 1. In the tiny world r_w ends near 0, where DPO loses 12 nats.
If the target is above the ceiling (logged as "unreachable"), as at beta = 0.001, r_w can fall as
in DPO: while |r| is far below 1/(2 beta), the calibration pushes y_w up and y_l down with nearly
the same force 1/beta. At beta = 0.001 that is 1000 and the sigmoid adds 0.5: every step is clipped.

Differences from the paper's text and the released code:
- The released README's commands set loss=dpo, which runs DPO; here the default is Eq. 10.
- The last release has lam = 0.5; the paper, and this file, have 1.
- Algorithm 1 in App. B.1 misprints the target as 0.5 beta. The authors confirm 1/(2 beta).
- The logged calibration_part leaves out its value at the start, lam/(2 beta^2).
- The paper names IPO and SLiC without their formulas; those here are of their own papers.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # the log-ratios' targets are +-1/(2 beta); App. B.1 searches 0.001 to 0.1
    lam: float = 1.0  # weight of the calibration; 0 is DPO at beta = 1
    contrast: Literal["dpo", "ipo", "slic"] = "dpo"  # the loss that is calibrated

    model: str = "tiny"  # initial policy: tiny, a local or run folder, or a hub id
    ref_model: str = ""  # frozen reference; empty: the initial policy
    data: str = "tiny"  # tiny, hh, tldr, shp, se, ultrafeedback, a file, a folder or a hub id
    # Held-out pairs: a file, a folder or a hub id; empty: the test split of --data, which is the
    # last 5 % of a file alone, or the last 10 of fewer than 200 rows.
    test_data: str = ""
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to if the row exceeds max_length

    lr: float = 5e-5  # of RMSprop, after warm-up
    batch_size: int | None = None  # pairs per optimiser step of all processes; None: 32, or fewer
    epochs: int = 1  # passes over the training pairs
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    warmup_steps: int | None = None  # of linear warm-up, then lr is constant; None: 10 at most
    max_grad_norm: float = 10.0  # longer gradients are cut to this norm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    gradient_checkpointing: bool = False  # recompute in backward: less memory, a third more time
    reshard_after_forward: bool = True  # several GPUs; no: gathered once, 2 bytes a weight more
    compile: bool = True  # decoder layers, on a GPU, in bfloat16, in runs of 300 steps and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights and sums are float32
    seed: int = 0  # of the order of the data

    eval_every: int = 320  # training pairs between evaluations, rounded down to whole steps
    eval_pairs: int = 256  # held-out pairs, the same at every evaluation
    save_every: int = 0  # training pairs between checkpoints; 0: none
    out: str = "results/cal_dpo"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder
    plan: bool = False  # print what the run needs of memory, and leave; needs no weights, no GPU


PYTHIA = Args(  # the released commands for Pythia-2.8B
    model="EleutherAI/pythia-2.8b",  # give the SFT run: --model results/sft-hh
    lr=5e-7,  # as released; App. B.1 has 5e-6
    batch_size=64,  # as released; App. B.1 has 128
    warmup_steps=150,  # App. B.1
    max_grad_norm=10.0,
    dtype="bfloat16",
    max_length=512,
    max_prompt_length=256,
    tokens_per_microbatch=16384,
    eval_every=5000,
    eval_pairs=256,
    save_every=20000,
)
ZEPHYR = replace(  # the released code for UltraFeedback
    PYTHIA,
    model="alignment-handbook/zephyr-7b-sft-full",
    max_length=1024,
    max_prompt_length=512,
)
PRESETS = {
    "tiny": Args(),
    "hh": replace(PYTHIA, data="hh", beta=0.1, out="results/cal_dpo-hh"),
    "tldr": replace(PYTHIA, data="tldr", beta=0.001, out="results/cal_dpo-tldr"),
    "ultrafeedback": replace(
        ZEPHYR, data="ultrafeedback", beta=0.001, out="results/cal_dpo-ultrafeedback"
    ),
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F

# common.py is beside this file, or one folder up.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
# isort: off
from common import pair_metrics, reference_logps, response_logps, wins  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import batch_order, load_split, plan_steps, subset  # data
from common import CUDA, clip_gradients, compile_layers, load_model, load_tokenizer  # models
from common import plan_memory, save_model  # models
from common import check_ranges, log, merge, progress, require, setup  # processes
from common import speed, start_run, to_device  # processes
from common import load_checkpoint, save_checkpoint, stop_requested, stop_unless_finite  # processes
from common import plot_curves, print_evaluations, say_claim, setting, share_shown  # processes
# isort: on


def cal_dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    lam=1.0,
    contrast="dpo",
):
    """The loss of each pair, Eq. 10.  Four (B,) summed log-probs -> (B,) losses.

    contrast: the loss that is calibrated, see preference_loss.
    """
    r_w = chosen_logps - ref_chosen_logps
    r_l = rejected_logps - ref_rejected_logps
    target = 1 / (2 * beta)
    preference = preference_loss(r_w, r_l, target, contrast)
    return preference + lam * calibration_loss(r_w, r_l, target)  # Eq. 10


def preference_loss(r_w, r_l, target, contrast):
    """The first term of Eq. 10.  Log-ratios (B,), (B,) -> (B,)

    contrast: "dpo" in the paper's main results; "ipo" (IPO) and "slic" (SLiC) are the other losses
    that it calibrates.  Raises ValueError for any other.
    """
    if contrast == "dpo":
        return -F.logsigmoid(r_w - r_l)  # no beta in the sigmoid
    if contrast == "ipo":
        return (r_w - r_l - target) ** 2  # the loss of Azar et al. 2023, with margin 1/(2 beta)
    if contrast == "slic":
        return F.relu(1 - (r_w - r_l))  # Zhao et al. 2023, with margin 1
    raise ValueError(f"unknown contrast {contrast!r}: it is dpo, ipo or slic")


def calibration_loss(r_w, r_l, target):
    """The second term of Eq. 10 without lam: it pulls r_w to the target and r_l to its negative."""
    return (r_w - target) ** 2 + (r_l + target) ** 2


def load_rows(args, split, tokenizer):
    """The pairs of the split "train" or "test" as token ids."""
    pairs = load_split(args.data, args.test_data, split)
    return tokenize_pairs(pairs, tokenizer, args.max_length, args.max_prompt_length)


def score_reference(args, tokenizer, rows):
    """The reference's log-probs of chosen and rejected, (N, 2); computed once, cached on disk."""
    name = args.ref_model or args.model
    return reference_logps(name, tokenizer, rows, args.dtype, args.tokens_per_microbatch)


def pair_losses(model, batch, reference, args):
    """The losses of a micro-batch, with gradient, and what is logged of each of its pairs.

    reference: (N, 2) log-probs of the N rows that were packed; batch["index"] says which B of them
    this batch holds.  Returns (B,) losses and a dictionary of (B,) tensors.
    """
    # The responses of a batch are chosen, rejected, chosen, rejected, ...
    policy = response_logps(model, batch)[0].view(-1, 2)
    chosen_logps, rejected_logps = policy.unbind(1)
    reference = to_device(reference[batch["index"]], policy.device)
    ref_chosen_logps, ref_rejected_logps = reference.unbind(1)

    # cal_dpo_loss in its two parts, since both are logged.  In float64, since its constant, 5e5 at
    # beta = 0.001, would round the rest away.
    target = 1 / (2 * args.beta)
    r_w = chosen_logps.double() - ref_chosen_logps.double()
    r_l = rejected_logps.double() - ref_rejected_logps.double()
    preference = preference_loss(r_w, r_l, target, args.contrast)
    calibration = args.lam * calibration_loss(r_w, r_l, target)
    losses = preference + calibration  # Eq. 10

    # Its parts, the log-ratios, whether r_w can reach its target, what all preference methods log.
    at_start = 2 * args.lam * target**2  # the calibration at r_w = r_l = 0
    headroom = -ref_chosen_logps  # r_w cannot exceed it, since log pi <= 0
    metrics = {"loss": losses.detach()}
    metrics["preference_part"] = preference.detach()
    metrics["calibration_part"] = calibration.detach() - at_start
    metrics["log_ratios/chosen"] = r_w.detach()
    metrics["log_ratios/rejected"] = r_l.detach()
    metrics["chosen_up"] = wins(chosen_logps.detach(), ref_chosen_logps)  # is r_w above 0?
    metrics["unreachable"] = (target > headroom).float()
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    metrics.update(pair_metrics(*logps, args.beta))
    return losses, metrics


@torch.no_grad()
def evaluate(model, rows, reference, args):
    """What is logged of this process's share of the held-out pairs: a dictionary of tensors."""
    metrics = []
    for batch in pack_pairs(rows, args.tokens_per_microbatch):
        _, pairs = pair_losses(model, batch, reference, args)
        metrics.append(pairs)
    return merge(metrics, prefix="eval_")


PANELS = [  # of the figure: title, unit, metrics
    (
        "implicit rewards: does chosen end above rejected?",
        "beta log pi/pi_ref, nats",
        ["rewards/chosen", "rewards/rejected"],
    ),
    (
        "how often is chosen ahead of rejected?",
        "share of pairs",
        ["rewards/accuracies", "ranking_accuracy"],
    ),
    ("preference part of the loss", "nats per pair", ["preference_part"]),
    ("calibration part, less its constant", "squared nats per pair", ["calibration_part"]),
]
REFERENCES = [  # lines across the figure: number of the panel, value, what it is
    (0, 0.5, "target of chosen: beta times 1/(2 beta)"),
    (0, -0.5, "target of rejected"),
    (1, 0.5, "chance"),
]


def claim(record, n, data):
    """What the paper says, and what the last record of n held-out pairs shows -> two lines"""
    paper = "the reward of chosen responses stays above 0, where DPO's falls (Fig. 1)"
    sentence = "chosen responses of held-out pairs are likelier than under the reference, r_w > 0"
    return paper, share_shown(sentence, data, record["eval_chosen_up"] * n, n)


def finish(model, tokenizer, record, n, args, out):
    """The figure, table, claim and model of a run whose last record is of n held-out pairs.

    Returns the records of its metrics.jsonl.
    """
    paper, shown = claim(record, n, args.data)
    caption = f"{shown}\nCal-DPO (Xiao et al. 2024), beta {args.beta}: {setting(args)}"
    history = plot_curves(out, PANELS, caption, REFERENCES)
    print_evaluations(history)
    say_claim(paper, shown, out)
    save_model(model, tokenizer, out / "model")
    return history


RANGES = {"lam": (0, 1e9)}  # of this method's own options: least and largest value


def check(args):
    """Refuse what no run could use, before anything is loaded."""
    check_ranges(args, RANGES)
    require(args.contrast in ("dpo", "ipo", "slic"), "--contrast must be dpo, ipo or slic")


def main(args):
    check(args)
    setup(args.seed)

    # Data: token ids of the pairs that the optimiser steps will use, and of the held-out pairs.
    tokenizer = load_tokenizer(args.model)
    train = load_rows(args, "train", tokenizer)
    test = load_rows(args, "test", tokenizer)
    args, steps = plan_steps(args, len(train), len(test))
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_pairs, seed=0)
    plan_memory(args, train, steps, state=1)  # of RMSprop

    # The run folder: one that holds a run, or a flag out of range, ends the program here.
    out = start_run(args, "cal_dpo")

    # Reference: it never changes, and neither do its log-probs.
    ref_train = score_reference(args, tokenizer, train)
    ref_test = score_reference(args, tokenizer, test)

    # Model: the policy, its optimiser, and where a resumed run goes on.
    model = load_model(args.model, args.dtype, train=True, reshard=args.reshard_after_forward)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr, foreach=CUDA)
    start = 0
    clipped = 0  # steps whose gradient was clipped so far
    if args.resume:
        start, state = load_checkpoint(out, model, optimizer)
        clipped = state.get("clipped", 0)
    eval_steps = max(1, args.eval_every // args.batch_size)
    save_steps = max(1, args.save_every // args.batch_size)
    compile_layers(model, args.compile, steps - start)

    for step in progress(range(start, steps)):
        # Evaluate: before the first step, and whenever it is due.
        if step % eval_steps == 0:
            log(out, step, **evaluate(model, test, ref_test, args))

        # Step: the gradients of the micro-batches add up to that of the mean over all pairs.
        started = time.time()
        index = batch_order(len(train), args.batch_size, step, args.seed)
        rows = [train[i] for i in index]
        reference = ref_train[index]  # (len(rows), 2)
        metrics = []
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, pairs = pair_losses(model, batch, reference, args)
            # FSDP takes the mean over the processes; the loss is the mean over all their pairs.
            (losses.sum() * dist.get_world_size() / len(rows)).backward()
            metrics.append(pairs)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        clipped += (grad_norm > args.max_grad_norm).double()

        # The learning rate warms up linearly, then it is constant.
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.step()
        optimizer.zero_grad()

        # Log: means over all processes, of values from before the update.
        status = {"grad_norm": grad_norm, "clipped_steps": clipped / (step + 1)}
        status["lr"] = optimizer.param_groups[0]["lr"]
        last = log(out, step, **merge(metrics), **status, **speed(rows, started))
        stop_unless_finite(last["grad_norm"], step, rows, out)

        # Save: a checkpoint when it is due, and when the run is asked to stop.
        stop = stop_requested()
        if stop or (args.save_every > 0 and (step + 1) % save_steps == 0):
            save_checkpoint(out, step + 1, model, optimizer, clipped=float(clipped))
        if stop:
            raise SystemExit(143)  # after SIGTERM or Ctrl-C; --resume continues

    # After the last step: figure, table, claim, and the model, which marks the run as finished.
    last = log(out, steps, **evaluate(model, test, ref_test, args))
    return finish(model, tokenizer, last, len(test), args, out)


if __name__ == "__main__":
    main(args)
