"""DPO^gamma: Direct Preference Optimization with the reference to the power gamma.

Chen, Malladi, Zhang, Chen, Zhang, Ranganath, Cho 2024, https://arxiv.org/abs/2405.19534

Loss (Eq. 4); gamma = 1 is DPO, gamma = 0 forgets the reference:

    L = -log sigmoid( beta [ log pi(y_w|x)/pi(y_l|x) - gamma log pi_ref(y_w|x)/pi_ref(y_l|x) ] )

    python methods/dpo_gamma.py                             tiny world, gamma 0, 1 and 2, about a minute
    python methods/dpo_gamma.py --gamma 0 0.25 0.5 0.75 1   a sweep that shares one cached reference pass
    torchrun --standalone --nproc-per-node 4 methods/dpo_gamma.py hh --gamma 0.5 --model results/sft-hh

Presets: tiny (default) | hh: nine gammas, Pythia-2.8B on Anthropic HH, from an SFT on its chosen side.

A pair is ranked right if pi(y_w|x) > pi(y_l|x), that is if L < -log sigmoid(beta gamma c) with c = log
pi_ref(y_l|x)/pi_ref(y_w|x) (Theorem 4.1 for gamma = 1): the larger c, the smaller the loss must become.
Every evaluation logs, of held-out pairs, the ranking accuracy; the shares that were right under the reference
and are right (kept) or wrong (lost), or were wrong and are right (fixed) or wrong (missed), as in Fig. 2; the
squared distance of the weights from their start.  figures/ranking.png has Fig. 3 for each gamma, and accuracy
against distance as in Fig. 4.  A run of a sweep resumes with --gamma 1 --out .../gamma-1 --resume.

Differs from the released code: gamma is called alpha there (its --gamma is unused, its default loss is DPO),
the learning rate decays, its weight norm is not of the change.  Rewards are beta log pi/pi_ref throughout.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # strength of the KL constraint, Def. 2.2; 0.1 fits Fig. 3
    gamma: tuple[float, ...] = (0.0, 1.0, 2.0)  # weight of the reference, Eq. 4; several: a run for each
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
    out: str = "results/dpo_gamma"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder


PAPER = dict(  # README and App. D.1; lr is the least of four searched, batch 64 fits the steps of Fig. 2
    model="EleutherAI/pythia-2.8b", lr=5e-7, batch_size=64, epochs=5, warmup_steps=150, max_grad_norm=1.0,
    dtype="bfloat16", max_length=512, max_prompt_length=256, eval_every=32000, eval_pairs=1000,
    save_every=160000, tokens_per_microbatch=16384)
PRESETS = {
    "tiny": Args(),
    "hh": Args(data="hh", out="results/dpo_gamma-hh", gamma=tuple(k / 4 for k in range(9)), **PAPER),
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


def dpo_gamma_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, gamma,
                   label_smoothing=0.0):
    """Eq. 4 for each pair; gamma = 1 is DPO to the bit.  Four (B,) summed log-probs -> (B,) losses.

    With label_smoothing = eps, the expected loss when a label is flipped with probability eps; 1/2 has no
    slope at 0.
    """
    chosen_reward = beta * (chosen_logps - gamma * ref_chosen_logps)  # the reference is pi_ref^gamma
    rejected_reward = beta * (rejected_logps - gamma * ref_rejected_logps)
    margin = chosen_reward - rejected_reward  # where Z(x) cancels
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def pair_losses(model, batch, reference, args):
    """The packed batch's losses with gradient (B,), and what is logged of each pair, a dictionary of (B,)."""
    chosen_logps, rejected_logps = response_logps(model, batch)[0].view(-1, 2).unbind(1)
    ref_chosen_logps, ref_rejected_logps = reference[batch["index"]].to(chosen_logps.device).unbind(1)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = dpo_gamma_loss(*logps, args.beta, args.gamma, args.label_smoothing)
    c = ref_rejected_logps - ref_chosen_logps  # of Theorem 4.1
    return losses, {"loss": losses.detach(), **pair_metrics(*logps, args.beta), "c": c}


PANELS = [  # of the figure: title, unit, metrics
    ("implicit rewards", "beta log pi/pi_ref, nats", ["rewards/chosen", "rewards/rejected"]),
    ("accuracy", "share of pairs", ["rewards/accuracies", "ranking_accuracy"]),
    ("loss", "nats per pair", ["loss"]),
    ("ranking of the reference, and now", "share of pairs", ["kept", "lost", "fixed", "missed"]),
]


@torch.no_grad()
def evaluate(model, rows, reference, args):
    """What is logged of each of this process's held-out pairs, before the update that follows."""
    batches = pack_pairs(rows, args.tokens_per_microbatch)
    metrics = merge([pair_losses(model, batch, reference, args)[1] for batch in batches], prefix="eval_")
    torch.save(metrics, Path(args.out, f"pairs-{dist.get_rank()}-{dist.get_world_size()}.pt"))
    distance = sum((p - start).square().sum() for p, start in zip(model.parameters(), model.start))
    return metrics | {"eval_distance": getattr(distance, "full_tensor", lambda: distance)()}


def run(args):
    """One gamma, a float in args -> the records of its metrics.jsonl."""
    if not args.beta > 0 or not 0 <= args.label_smoothing < 0.5:
        raise SystemExit("--beta must be positive and --label-smoothing in [0, 0.5)")
    setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    limits = args.max_length, args.max_prompt_length, args.truncation
    train = tokenize_pairs(load_pairs(args.data, "train"), tokenizer, *limits)
    test = tokenize_pairs(load_pairs(args.data, "test"), tokenizer, *limits)
    steps = optimiser_steps(len(train), args.batch_size, args.epochs, args.max_steps)
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_pairs, seed=0)
    out = start_run(args, "dpo_gamma")

    ref_train, ref_test = (reference_logps(args.ref_model or args.model, tokenizer, rows, args.dtype,
                                           args.tokens_per_microbatch) for rows in (train, test))

    model = load_model(args.model, args.dtype, train=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.start = [p.detach().clone() for p in model.parameters()]
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
    history = plot_curves(out, PANELS, f"DPO^{args.gamma} (Chen et al.), beta {args.beta}: {setting(args)}")
    print_evaluations(history)
    return history


def main(args):
    if not args.gamma or not all(abs(gamma) < float("inf") for gamma in args.gamma):
        raise SystemExit("--gamma must be one or more finite numbers")
    from matplotlib.figure import Figure
    figure, records = Figure((4 * len(args.gamma) + 4, 4), layout="constrained"), []
    *axes, fig4 = figure.subplots(1, len(args.gamma) + 1)
    for axis, gamma in zip(axes, args.gamma):
        out = Path(args.out, f"gamma-{gamma:g}" if len(args.gamma) > 1 else "")
        records += (history := run(Args(**vars(args) | {"gamma": gamma, "out": str(out)})))
        pairs = merge([torch.load(file, "cpu") for file in out.glob(f"pairs-*-{dist.get_world_size()}.pt")])
        c, loss, right = (pairs[f"eval_{name}"] for name in ("c", "loss", "ranking_accuracy"))
        axis.scatter(c, loss, 9, right, cmap="coolwarm_r", vmin=0, vmax=1)  # and the line of Theorem 4.1:
        axis.plot(x := c.sort()[0], dpo_gamma_loss(0, 0, 0, x, args.beta, gamma, args.label_smoothing), "k--")
        axis.set(title=f"gamma {gamma:g}", ylabel="loss, nats",
                 xlabel="c = log pi_ref(y_l)/pi_ref(y_w), nats")
        points = [(r["eval_distance"], r["eval_ranking_accuracy"]) for r in history if "eval_loss" in r]
        fig4.plot(*zip(*points), "o-", label=f"gamma {gamma:g}")
    fig4.set(xlabel="squared distance of the weights from their start", ylabel="ranking accuracy")
    fig4.legend()
    figure.suptitle(f"DPO^gamma (Chen et al.), blue: ranked right, beta {args.beta}, {setting(args)}", size=9)
    Path(args.out, "figures").mkdir(exist_ok=True)
    figure.savefig(Path(args.out, "figures", "ranking.png"), dpi=120)  # the same bytes from all processes
    return records


if __name__ == "__main__":
    main(args)
