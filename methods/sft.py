"""Supervised fine-tuning (SFT), the stage before preference learning.

It makes the reference policy of DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290,
App. B) by maximum likelihood of the chosen responses, given their prompts. An example has the loss

    L = - sum_t log pi(y_t | x, y_<t)

over the tokens of the response, its end-of-text token included and the prompt's excluded.

    python methods/sft.py                                       tiny world, half a minute
    python methods/sft.py --data my_rows.jsonl --objective mean
    torchrun --standalone --nproc-per-node 4 methods/sft.py hh

Presets: tiny (default) | hh: Pythia-2.8B on the chosen side of Anthropic HH | tldr: on TL;DR posts.

The loss of a step is the mean of L over its examples, as in the released code. It gives long
responses more weight than short ones. With --objective mean the sum of L is divided by the number
of scored tokens, which is the usual loss of language modelling. With --all-turns every assistant
turn of a dialogue is scored, and not only the last one.

One thing differs from the released code (eric-mitchell/direct-preference-optimization): summaries
of TL;DR begin with a space here, as they do in the preference data.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    # sum: over the tokens of each response; mean: over all scored tokens of the step
    objective: Literal["sum", "mean"] = "sum"
    all_turns: bool = False  # score every assistant turn of a dialogue, not only the last
    one_per_prompt: bool = False  # keep only the last row of each prompt; as released, for HH

    model: str = "tiny-untrained"  # initial policy: tiny-untrained, tiny, a folder or a hub id
    data: str = "tiny"  # tiny, hh, tldr-sft, shp, se, ultrafeedback, a file, a folder or a hub id
    # Held-out examples: a file, a folder or a hub id; empty: the test split of --data, which is the
    # last 5 % of a file alone, or the last 10 of fewer than 200 rows.
    test_data: str = ""
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to if the row exceeds max_length

    lr: float = 3e-4  # of RMSprop, after warm-up
    batch_size: int | None = None  # examples per optimiser step, of all processes; None: 32 at most
    epochs: int = 1  # passes over the training examples
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    warmup_steps: int | None = None  # of linear warm-up, then lr is constant; None: 10 at most
    max_grad_norm: float = 10.0  # longer gradients are cut to this norm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    gradient_checkpointing: bool = False  # recompute in backward: less memory, a third more time
    reshard_after_forward: bool = True  # several GPUs; no: gathered once, 2 bytes a weight more
    compile: bool = True  # decoder layers, on a GPU, in bfloat16, in runs of 300 steps and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights and sums are float32
    seed: int = 0  # of the order of the data

    eval_every: int = 320  # training examples between evaluations, rounded down to whole steps
    eval_examples: int = 256  # held-out examples, the same at every evaluation
    save_every: int = 0  # training examples between checkpoints; 0: none
    out: str = "results/sft"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder
    plan: bool = False  # print what the run needs of memory, and leave; needs no weights, no GPU


PYTHIA = Args(  # the released commands for Pythia-2.8B
    model="EleutherAI/pythia-2.8b",
    lr=5e-7,
    batch_size=64,
    warmup_steps=150,
    max_grad_norm=10.0,
    dtype="bfloat16",
    max_length=512,
    max_prompt_length=256,
    tokens_per_microbatch=16384,
    eval_every=5000,
    eval_examples=256,
    save_every=20000,
)
PRESETS = {
    "tiny": Args(),
    "hh": replace(PYTHIA, data="hh", one_per_prompt=True, out="results/sft-hh"),
    "tldr": replace(PYTHIA, data="tldr-sft", out="results/sft-tldr"),
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

# common.py is beside this file, or one folder up.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
# isort: off
from common import reference_logps, response_logps, wins  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import batch_order, every_turn, load_split, plan_steps, subset  # data
from common import CUDA, clip_gradients, compile_layers, load_model, load_tokenizer  # models
from common import plan_memory, save_model  # models
from common import check_ranges, log, merge, progress, require, setup  # processes
from common import speed, start_run, to_device  # processes
from common import load_checkpoint, save_checkpoint, stop_requested, stop_unless_finite  # processes
from common import plot_curves, print_evaluations, say_claim, setting, share_shown  # processes
# isort: on


def sft_loss(chosen_logps):
    """The negative log-likelihood of each response.  (B,) summed log-probs -> (B,) losses."""
    return -chosen_logps


def load_rows(args, split, tokenizer):
    """Prompts and chosen responses of the split "train" or "test" as token ids."""
    rows = load_split(args.data, args.test_data, split, pairs=False)
    for row in rows:
        require("chosen" in row, f"{args.data}: {split} rows need chosen, the response to learn")
        row.pop("rejected", None)  # else it would be tokenised as a second response

    # Of rows with one prompt the last, and of each dialogue every turn, if so asked.
    if args.one_per_prompt:
        last = {}
        for row in rows:
            last[str(row["prompt"])] = row
        rows = list(last.values())
    if args.all_turns:
        turns = []
        for row in rows:
            turns += every_turn(row)
        rows = turns
    return tokenize_pairs(rows, tokenizer, args.max_length, args.max_prompt_length)


def scored_tokens(rows):
    """The number of response tokens of tokenised rows."""
    return sum(len(row["responses"][0]) for row in rows)


def example_losses(model, batch):
    """The losses of a micro-batch, with gradient, and what is logged of each of its examples.

    Returns (B,) losses and a dictionary of (B,) tensors.
    """
    chosen_logps, tokens = response_logps(model, batch)
    losses = sft_loss(chosen_logps)

    # The loss is logged per response and per token, whatever the objective.
    metrics = {"loss": losses.detach()}
    metrics["loss_per_token"] = losses.detach() / tokens
    metrics["tokens"] = tokens
    return losses, metrics


@torch.no_grad()
def evaluate(model, rows, start_logps, args):
    """What is logged of this process's share of the held-out examples: a dictionary of tensors.

    start_logps: (N, 1) log-probs of the N rows under the initial policy.
    """
    metrics = []
    for batch in pack_pairs(rows, args.tokens_per_microbatch):
        losses, examples = example_losses(model, batch)
        before = to_device(start_logps[batch["index"], 0], losses.device)
        examples["likelier"] = wins(-losses, before)
        metrics.append(examples)
    return merge(metrics, prefix="eval_")


PANELS = [  # of the figure: title, unit, metrics
    ("loss per response: does the held-out loss fall too?", "nats", ["loss"]),
    ("loss per token", "nats per token, mean over responses", ["loss_per_token"]),
]


def claim(record, n, data):
    """What SFT is for, and what the last record of n held-out examples shows -> two lines"""
    paper = "maximum likelihood makes responses like those of the data likelier (the SFT stage)"
    sentence = "held-out responses are likelier than under the initial policy"
    return paper, share_shown(sentence, data, record["eval_likelier"] * n, n)


def finish(model, tokenizer, record, n, args, out):
    """The figure, table, claim and model of a run whose last record is of n held-out examples.

    Returns the records of its metrics.jsonl.
    """
    paper, shown = claim(record, n, args.data)
    history = plot_curves(out, PANELS, f"{shown}\nSFT: {setting(args)}")
    print_evaluations(history)
    say_claim(paper, shown, out)
    save_model(model, tokenizer, out / "model")
    return history


RANGES = {}  # of this method's own options: least and largest value


def check(args):
    """Refuse what no run could use, before anything is loaded."""
    check_ranges(args, RANGES)
    require(args.objective in ("sum", "mean"), "--objective must be sum or mean")


def main(args):
    check(args)
    setup(args.seed)

    # Data: token ids of the examples that the optimiser steps will use, and of the held-out ones.
    tokenizer = load_tokenizer(args.model)
    train = load_rows(args, "train", tokenizer)
    test = load_rows(args, "test", tokenizer)
    args, steps = plan_steps(args, len(train), len(test))
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_examples, seed=0)
    plan_memory(args, train, steps, state=1)  # of RMSprop

    # The run folder: one that holds a run, or a flag out of range, ends the program here.
    out = start_run(args, "sft")

    # What held-out responses are worth before the first step; computed once, cached on disk.
    budget = args.tokens_per_microbatch
    start_logps = reference_logps(args.model, tokenizer, test, args.dtype, budget)

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
            log(out, step, **evaluate(model, test, start_logps, args))

        # Step: the gradients of the micro-batches add up to that of the whole step's loss.
        started = time.time()
        index = batch_order(len(train), args.batch_size, step, args.seed)
        rows = [train[i] for i in index]
        if args.objective == "sum":
            total = len(rows)
        else:  # of all micro-batches and processes: none has a mean of its own
            total = scored_tokens(rows)
        metrics = []
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, examples = example_losses(model, batch)
            # FSDP takes the mean over the processes; the loss is a mean over all their examples.
            (losses.sum() * dist.get_world_size() / total).backward()
            metrics.append(examples)
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
    last = log(out, steps, **evaluate(model, test, start_logps, args))
    return finish(model, tokenizer, last, len(test), args, out)


if __name__ == "__main__":
    main(args)
