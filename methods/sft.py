"""Supervised fine-tuning (SFT), the stage before preference learning.

The reference policy of Rafailov et al. 2023 (DPO), https://arxiv.org/abs/2305.18290, App. B: maximum
likelihood of the chosen responses, given their prompts.

    L = - sum_t log pi(y_t | x, y_<t)    over the response's tokens and its end-of-text; mean over examples

    python methods/sft.py                                       tiny world, half a minute on a laptop
    python methods/sft.py --data my_rows.jsonl --objective mean
    torchrun --standalone --nproc-per-node 4 methods/sft.py hh

Presets: tiny (default) | hh: Pythia-2.8B on the chosen side of Anthropic HH | tldr: on filtered TL;DR.

The sum gives long responses more weight than short ones.  It is the default and the objective of the paper's
released code; --objective mean divides by the scored tokens of the whole optimiser step, the usual loss of
language modelling.  Prompts are never scored; --all-turns scores every assistant turn of a dialogue.
Differs from the released code: TL;DR summaries start with a space, as they do in the preference data.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    objective: Literal["sum", "mean"] = "sum"  # over a response's tokens, as released; mean: over the batch's
    all_turns: bool = False  # score every assistant turn of a dialogue, not only the last
    one_per_prompt: bool = False  # keep the last row of each prompt; the released code does so for HH

    model: str = "tiny"  # initial policy: tiny, a local or run folder, or a hub id
    data: str = "tiny"  # tiny, hh, tldr-sft, shp, se, ultrafeedback, a file, a folder or a hub id
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to when the row is longer than max_length
    truncation: Literal["auto", "keep_end", "keep_start"] = "auto"  # of long prompts; auto: end and cue

    lr: float = 1e-4  # of RMSprop, after warm-up
    batch_size: int = 32  # examples per optimiser step, over all processes
    epochs: int = 1  # passes over the training examples
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    warmup_steps: int = 10  # of linear warm-up, then lr is constant
    max_grad_norm: float = 10.0  # longer gradients are cut to this norm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights, sums and loss are float32
    seed: int = 0

    eval_every: int = 320  # training examples between evaluations, rounded down to whole steps
    eval_examples: int = 256  # held-out examples, the same at every evaluation
    save_every: int = 0  # training examples between checkpoints; 0: none
    out: str = "results/sft"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder



PAPER = dict(  # the released commands for Pythia-2.8B: RMSprop, batch 64, 150 warm-up steps, lr 5e-7
    model="EleutherAI/pythia-2.8b", lr=5e-7, batch_size=64, warmup_steps=150, max_grad_norm=10.0,
    dtype="bfloat16", max_length=512, max_prompt_length=256, eval_every=5000, eval_examples=256,
    save_every=20000, tokens_per_microbatch=16384)
PRESETS = {
    "tiny": Args(),
    "hh": Args(out="results/sft-hh", data="hh", one_per_prompt=True, **PAPER),
    "tldr": Args(out="results/sft-tldr", data="tldr-sft", **PAPER),
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else "tiny"
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import torch
import torch.distributed as dist

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (
    batch_order, clip_gradients, every_turn, load_checkpoint, load_model, load_pairs, load_tokenizer, log,
    merge, optimiser_steps, pack_pairs, plot_curves, print_evaluations, progress, response_logps,
    save_checkpoint, save_model, setting, setup, speed, start_run, stop_requested, stop_unless_finite, subset,
    tokenize_pairs
)


def sft_loss(chosen_logps):
    """Negative log-likelihood of each response.  (B,) summed log-probs -> (B,) losses"""
    return -chosen_logps


def example_losses(model, batch):
    """The packed batch's losses with gradient (B,), and what is logged of each example, a dictionary."""
    chosen_logps, tokens = response_logps(model, batch)
    losses = sft_loss(chosen_logps)
    return losses, {"loss": losses.detach(), "loss_per_token": losses.detach() / tokens, "tokens": tokens}


PANELS = [  # of the figure: title, unit, metrics
    ("loss per response", "nats", ["loss"]),
    ("loss per token", "nats per token, mean over responses", ["loss_per_token"]),
]


@torch.no_grad()
def evaluate(model, rows, args):
    """What is logged of each of this process's held-out examples, before the update that follows."""
    batches = pack_pairs(rows, args.tokens_per_microbatch)
    return merge([example_losses(model, batch)[1] for batch in batches], prefix="eval_")


def load_examples(args, split, tokenizer):
    """Tokenised rows with the chosen response only."""
    rows = load_pairs(args.data, split, pairs=False)
    if not all("chosen" in row for row in rows):
        raise SystemExit(f"{args.data}: {split} rows need chosen, the response to learn")
    if args.one_per_prompt:
        rows = list({str(row["prompt"]): row for row in rows}.values())
    if args.all_turns:
        rows = [turn for row in rows for turn in every_turn(row)]
    rows = [{name: value for name, value in row.items() if name != "rejected"} for row in rows]
    return tokenize_pairs(rows, tokenizer, args.max_length, args.max_prompt_length, args.truncation)


def main(args):
    setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    train, test = (load_examples(args, split, tokenizer) for split in ("train", "test"))
    steps = optimiser_steps(len(train), args.batch_size, args.epochs, args.max_steps)
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_examples, seed=0)
    out = start_run(args, "sft")

    model = load_model(args.model, args.dtype, train=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr)
    start, state = load_checkpoint(out, model, optimizer) if args.resume else (0, {})
    clipped = state.get("clipped", 0)  # steps whose gradient was clipped so far
    eval_steps, save_steps = (max(1, n // args.batch_size) for n in (args.eval_every, args.save_every))

    for step in progress(range(start, steps)):
        if step % eval_steps == 0:
            log(out, step, **evaluate(model, test, args))
        started, metrics = time.time(), []
        index = batch_order(len(train), args.batch_size, step, args.seed)
        rows = [train[i] for i in index]
        # "mean" divides by the tokens of the whole step on all processes: no micro-batch has its own mean.
        items = len(rows) if args.objective == "sum" else sum(len(row["responses"][0]) for row in rows)
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, examples = example_losses(model, batch)
            (losses.sum() * dist.get_world_size() / items).backward()  # FSDP averages over the processes
            metrics.append(examples)

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

    log(out, steps, **evaluate(model, test, args))
    save_model(model, tokenizer, out / "model")
    history = plot_curves(out, PANELS, f"SFT: {setting(args)}")
    print_evaluations(history)
    return history


if __name__ == "__main__":
    main(args)
