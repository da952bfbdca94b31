"""Calibrated Direct Preference Optimization (Cal-DPO).

Xiao, Yuan, Zhu, Li, Honavar 2024, https://arxiv.org/abs/2412.14516

Loss (Eq. 10), r = log pi/pi_ref: DPO with beta = 1, and a pull of r to rho/beta (Eq. 9); here rho = +-1/2:

    L = -log sigmoid( r_w - r_l ) + lam [ (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2 ],  lam = 1

    python methods/cal_dpo.py                             tiny world, about a minute on a laptop
    torchrun --standalone --nproc-per-node 4 methods/cal_dpo.py hh --model results/sft-hh
Presets: tiny (default) | hh, tldr: Pythia-2.8B on Anthropic HH, on TL;DR | ultrafeedback: Zephyr-7B.

Does the chosen reward stay positive?  If 1/(2 beta) is below its ceiling, the headroom -log pi_ref(y_w|x), a
pair's minimiser has r_w > 0; labels that disagree, and pi adding up to 1, lower it: in the tiny world r_w is
near 0, where DPO loses 11 nats.  If above (logged: unreachable), as at beta = 0.001, r_w can fall as in DPO:
while |r| << 1/(2 beta) both pulls are nearly equal (there the sigmoid is 0.05 %, and every step is clipped).

Differs from the released code: there the README's commands say loss=dpo and run DPO; lam is 0.5 in its last
version.  App. B.1 misprints the target as 0.5 beta.  calibration_part is logged without lam/(2 beta^2).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # the log-ratios' targets are rho/beta; App. B.1 searches 0.001 to 0.1
    lam: float = 1.0  # weight of the calibration term; 0 is DPO at beta = 1
    shift: float = 0.5  # s of rho = 1-s for chosen and -s for rejected responses
    targets: Literal["labels", "scores"] = "labels"  # rho by label, or the data's own scores (Eq. 9)
    average: bool = False  # log-probs per token in the loss, instead of per response
    contrast: Literal["dpo", "ipo", "slic"] = "dpo"  # the loss that is calibrated
    label_smoothing: float = 0.0  # probability that a label is flipped (conservative DPO)

    model: str = "tiny"  # initial policy: tiny, a local or run folder, or a hub id
    ref_model: str = ""  # frozen reference; empty: the initial policy
    data: str = "tiny"  # tiny, hh, tldr, shp, se, ultrafeedback, a file, a folder or a hub id
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to when the row is longer than max_length
    truncation: Literal["auto", "keep_end", "keep_start"] = "auto"  # of long prompts; auto: end and cue

    lr: float = 5e-5  # of RMSprop, after warm-up
    batch_size: int = 32  # pairs per optimiser step, over all processes
    epochs: int = 1  # passes over the training pairs
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    warmup_steps: int = 10  # of linear warm-up, then lr is constant
    max_grad_norm: float = 10.0  # longer gradients are cut to this norm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights, sums and loss are float32
    seed: int = 0

    eval_every: int = 320  # training pairs between evaluations, rounded down to whole steps
    eval_pairs: int = 256  # held-out pairs, the same at every evaluation
    save_every: int = 0  # training pairs between checkpoints; 0: none
    out: str = "results/cal_dpo"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder


PAPER = dict(  # the released commands; App. B.1: RMSprop, batch 128, 150 warm-up steps, lr 5e-6
    model="EleutherAI/pythia-2.8b", lr=5e-7, batch_size=64, warmup_steps=150, dtype="bfloat16",
    eval_every=5000, save_every=20000, tokens_per_microbatch=16384)
PRESETS = {
    "tiny": Args(),
    "hh": Args(data="hh", beta=0.1, out="results/cal_dpo-hh", **PAPER),  # with --model results/sft-hh
    "tldr": Args(data="tldr", beta=0.001, out="results/cal_dpo-tldr", **PAPER),
    "ultrafeedback": Args(**PAPER | dict(data="ultrafeedback", out="results/cal_dpo-ultrafeedback",
        beta=0.001, model="alignment-handbook/zephyr-7b-sft-full", max_length=1024, max_prompt_length=512)),
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else "tiny"
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (
    batch_order, clip_gradients, load_checkpoint, load_model, load_pairs, load_tokenizer, log, merge,
    optimiser_steps, pack_pairs, pair_metrics, plot_curves, print_evaluations, progress,
    reference_logps, response_logps, save_checkpoint, save_model, setting, setup, speed, start_run,
    stop_requested, stop_unless_finite, subset, tokenize_pairs
)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """Eq. 7 for each pair.  Four (B,) summed log-probs -> (B,) losses.

    With label_smoothing = eps, the expected loss when a label is flipped with probability eps; 1/2 has no
    slope at 0.
    """
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # Eq. 5, without beta log Z(x)
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)
    margin = chosen_reward - rejected_reward  # where Z(x) cancels
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def cal_dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, lam=1.0,
                 rho=(0.5, -0.5), contrast="dpo", label_smoothing=0.0):
    """Eq. 10 for each pair; with rewards rho, Eq. 9.  Four (B,) log-probs -> (B,) losses."""
    r_w, r_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    phi = {"dpo": dpo_loss(r_w, r_l, 0, 0, 1, label_smoothing),  # no beta in the sigmoid
           "ipo": (r_w - r_l - 1 / (2 * beta)) ** 2, "slic": F.relu(1 - (r_w - r_l))}[contrast]
    return phi + lam * ((r_w - rho[0] / beta) ** 2 + (r_l - rho[1] / beta) ** 2)


def with_rho(rows, pairs, args):
    """Tokenised rows with "rho": rewards of both responses by label, or the scores in the data."""
    for row in rows:
        pair, row["rho"] = pairs[row["row"]], [1 - args.shift, -args.shift]
        if args.targets == "scores":  # columns of UltraFeedback, or of the tiny world
            scores = dict(zip(map(str, pair.get("responses", ())), pair.get("rewards", ())))
            rho = [pair.get(f"score_{side}", scores.get(str(pair[side]))) for side in ("chosen", "rejected")]
            if None in rho:
                raise SystemExit(f"{args.data}: row {row['row'] + 1} has no scores; use --targets labels")
            row["rho"] = [float(x) for x in rho]
    return rows


def pair_losses(model, batch, reference, args):
    """The packed batch's losses with gradient (B,), and what is logged of each pair, a dictionary of (B,)."""
    chosen_logps, rejected_logps = response_logps(model, batch)[0].view(-1, 2).unbind(1)
    ref_chosen_logps, ref_rejected_logps = reference[batch["index"]].to(chosen_logps.device).unbind(1)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    lengths = batch["counts"].view(-1, 2).to(chosen_logps).unbind(1) if args.average else (1, 1)
    scaled = [x.double() / n for x, n in zip(logps, lengths * 2)]  # double, since the constant is large
    rho = torch.tensor([row["rho"] for row in batch["rows"]]).to(scaled[0]).unbind(1)
    losses, phi = (cal_dpo_loss(*scaled, args.beta, lam, rho, args.contrast, args.label_smoothing)
                   for lam in (args.lam, 0))
    parts = {"loss": losses, "dpo_part": phi,
             "calibration_part": losses - phi - args.lam * (rho[0] ** 2 + rho[1] ** 2) / args.beta**2,
             "log_ratios/chosen": scaled[0] - scaled[2], "log_ratios/rejected": scaled[1] - scaled[3],
             "unreachable": ((rho[0] > -args.beta * scaled[2]) | (rho[1] > -args.beta * scaled[3])).float()}
    return losses, {name: x.detach() for name, x in (parts | pair_metrics(*logps, args.beta)).items()}


PANELS = [  # of the figure: title, unit, metrics
    ("implicit rewards", "beta log pi/pi_ref, nats", ["rewards/chosen", "rewards/rejected"]),
    ("accuracy", "share of pairs", ["rewards/accuracies", "ranking_accuracy"]),
    ("DPO part of the loss", "nats per pair", ["dpo_part"]),
    ("calibration part, less its constant", "squared nats per pair", ["calibration_part"])]


@torch.no_grad()
def evaluate(model, rows, reference, args):
    """What is logged of each of this process's held-out pairs, before the update that follows."""
    batches = pack_pairs(rows, args.tokens_per_microbatch)
    return merge([pair_losses(model, batch, reference, args)[1] for batch in batches], prefix="eval_")


def main(args):
    smooth = 0 <= args.label_smoothing < 0.5 and (args.contrast == "dpo" or not args.label_smoothing)
    if not (args.beta > 0 and args.lam >= 0 and smooth):
        raise SystemExit("--beta must be positive, --lam not negative, --label-smoothing in [0, 0.5) of dpo")
    setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    limits = args.max_length, args.max_prompt_length, args.truncation
    train, test = (with_rho(tokenize_pairs(pairs, tokenizer, *limits), pairs, args)
                   for pairs in [load_pairs(args.data, split) for split in ("train", "test")])
    steps = optimiser_steps(len(train), args.batch_size, args.epochs, args.max_steps)
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_pairs, seed=0)
    out = start_run(args, "cal_dpo")

    ref_train, ref_test = (reference_logps(args.ref_model or args.model, tokenizer, rows, args.dtype,
                                           args.tokens_per_microbatch) for rows in (train, test))

    model = load_model(args.model, args.dtype, train=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr)
    start, state = load_checkpoint(out, model, optimizer) if args.resume else (0, {})
    clipped = state.get("clipped", 0)  # steps whose gradient was clipped so far
    eval_steps, save_steps = (max(1, n // args.batch_size) for n in (args.eval_every, args.save_every))

    for step in progress(range(start, steps)):
        if step % eval_steps == 0:
            log(out, step, **evaluate(model, test, ref_test, args))
        started, metrics = time.time(), []
        index = batch_order(len(train), args.batch_size, step, args.seed)
        rows, reference = [train[i] for i in index], ref_train[index]
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, pairs = pair_losses(model, batch, reference, args)
            (losses.sum() * dist.get_world_size() / len(rows)).backward()  # FSDP averages over the processes
            metrics.append(pairs)

        grad_norm = clip_gradients(model, args.max_grad_norm)
        stop_unless_finite(grad_norm, step, rows, out)
        clipped += grad_norm > args.max_grad_norm
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.step()
        optimizer.zero_grad()
        log(out, step, **merge(metrics), grad_norm=grad_norm, clipped_steps=clipped / (step + 1), lr=lr,
            **speed(rows, time.time() - started))
        stop = stop_requested()
        if stop or args.save_every and (step + 1) % save_steps == 0:
            save_checkpoint(out, step + 1, model, optimizer, clipped=clipped)
        if stop:
            raise SystemExit(143)  # SIGTERM or Ctrl-C: --resume continues

    log(out, steps, **evaluate(model, test, ref_test, args))
    save_model(model, tokenizer, out / "model")
    history = plot_curves(out, PANELS, f"Cal-DPO (Xiao et al. 2024), beta {args.beta}: {setting(args)}")
    print_evaluations(history)
    return history


if __name__ == "__main__":
    main(args)
