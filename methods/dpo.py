"""Direct Preference Optimization (DPO).

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn 2023, https://arxiv.org/abs/2305.18290

Loss (Eq. 7), with implicit rewards beta log pi/pi_ref (Eq. 5, whose beta log Z(x) cancels in the difference):

    L = -log sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

    python methods/dpo.py                                     tiny world, about a minute on a laptop
    python methods/dpo.py --model results/sft --beta 0.5      from your own SFT run
    torchrun --standalone --nproc-per-node 4 methods/dpo.py hh --model results/sft-hh

Presets: tiny (default) | hh: Pythia-2.8B on Anthropic HH | tldr: Pythia-2.8B on TL;DR comparisons.

Log-probs are summed over the response's tokens, its end-of-text token included, and never over the prompt.
Differs from the released code of the paper (eric-mitchell/direct-preference-optimization):
- policy and reference compute in the same dtype, so that every reward is exactly 0 at step 0;
- --seed reaches the order of the data; partial batches carry over into the next epoch and are not dropped;
- the rejected transcript must share the chosen one's prompt, else the row is dropped and counted.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # strength of the KL constraint, Eq. 3; 0.1 in App. B
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
    out: str = "results/dpo"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder


PAPER = dict(  # the released commands for Pythia-2.8B; App. B: RMSprop, batch 64, 150 warm-up steps, lr 1e-6
    model="EleutherAI/pythia-2.8b", lr=5e-7, batch_size=64, warmup_steps=150, max_grad_norm=10.0,
    dtype="bfloat16", max_length=512, max_prompt_length=256, eval_every=5000, eval_pairs=256,
    save_every=20000, tokens_per_microbatch=16384)
PRESETS = {
    "tiny": Args(),
    "hh": Args(data="hh", beta=0.1, out="results/dpo-hh", **PAPER),  # with --model results/sft-hh
    "tldr": Args(data="tldr", beta=0.5, out="results/dpo-tldr", **PAPER),  # 0.5 for summaries, App. B
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


def pair_losses(model, batch, reference, args):
    """The packed batch's losses with gradient (B,), and what is logged of each pair, a dictionary of (B,)."""
    chosen_logps, rejected_logps = response_logps(model, batch)[0].view(-1, 2).unbind(1)
    ref_chosen_logps, ref_rejected_logps = reference[batch["index"]].to(chosen_logps.device).unbind(1)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = dpo_loss(*logps, args.beta, args.label_smoothing)
    return losses, {"loss": losses.detach(), **pair_metrics(*logps, args.beta)}


PANELS = [  # of the figure: title, unit, metrics
    ("implicit rewards", "beta log pi/pi_ref, nats", ["rewards/chosen", "rewards/rejected"]),
    ("accuracy", "share of pairs", ["rewards/accuracies", "ranking_accuracy"]),
    ("loss", "nats per pair", ["loss"]),
]


@torch.no_grad()
def evaluate(model, rows, reference, args):
    """What is logged of each of this process's held-out pairs, before the update that follows."""
    batches = pack_pairs(rows, args.tokens_per_microbatch)
    return merge([pair_losses(model, batch, reference, args)[1] for batch in batches], prefix="eval_")


def main(args):
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
    out = start_run(args, "dpo")

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
    history = plot_curves(out, PANELS, f"DPO (Rafailov et al. 2023), beta {args.beta}: {setting(args)}")
    print_evaluations(history)
    return history


if __name__ == "__main__":
    main(args)
