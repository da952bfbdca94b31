"""Simple Preference Optimization (SimPO), as an example of a method that is added.

Meng, Xia, Chen 2024, https://arxiv.org/abs/2405.14734

A reward is beta times the mean log-prob of a token (Eq. 4); they differ by a margin gamma (Eq. 6):

    L = -log sigmoid( beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma )

    python methods/simpo.py --model results/sft --gamma 0.5     from your own SFT run
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 2.0  # factor of the mean log-prob, Eq. 4
    gamma: float = 1.0  # margin of the rewards, Eq. 6; the paper searches 0.3 to 1.6

    model: str = "tiny"  # initial policy: tiny, a local or run folder, or a hub id
    data: str = "tiny"  # tiny, hh, tldr, shp, se, ultrafeedback, a file, a folder or a hub id
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to if the row exceeds max_length

    lr: float = 5e-5  # of RMSprop, after warm-up
    batch_size: int = 32  # pairs per optimiser step, over all processes
    max_steps: int = 0  # optimiser steps; 0: one pass over the training pairs
    warmup_steps: int = 10  # of linear warm-up, then lr is constant
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights and sums are float32
    seed: int = 0  # of the order of the data

    eval_pairs: int = 256  # held-out pairs, before the first and after the last step
    out: str = "results/simpo"  # run folder
    overwrite: bool = False  # delete the run that is in the run folder


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    args = tyro.cli(Args, description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F

# common.py is beside this file, or one folder up.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
# isort: off
from common import response_logps  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import batch_order, load_pairs, optimiser_steps, subset  # data
from common import clip_gradients, load_model, load_tokenizer, save_model  # models
from common import check_ranges, log, merge, plot_curves, print_evaluations  # processes
from common import setting, setup, start_run, stop_requested, stop_unless_finite  # processes
# isort: on


def simpo_loss(chosen_logps, rejected_logps, chosen_tokens, rejected_tokens, beta, gamma):
    """The loss of each pair, Eq. 6.  Two (B,) summed log-probs, two (B,) counts -> (B,) losses."""
    chosen_reward = beta * chosen_logps / chosen_tokens  # Eq. 4
    rejected_reward = beta * rejected_logps / rejected_tokens
    return -F.logsigmoid(chosen_reward - rejected_reward - gamma)


def pair_losses(model, batch, args):
    """The losses of a micro-batch, with gradient, and what is logged of each of its B pairs.

    Returns (B,) losses and a dictionary of (B,) tensors.
    """
    # The responses of a batch are chosen, rejected, chosen, rejected, ...
    logps, tokens = response_logps(model, batch)
    chosen_logps, rejected_logps = logps.view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = tokens.view(-1, 2).unbind(1)
    logps_and_tokens = (chosen_logps, rejected_logps, chosen_tokens, rejected_tokens)
    losses = simpo_loss(*logps_and_tokens, args.beta, args.gamma)

    # What is logged: the loss, the rewards of Eq. 4, and how often the chosen one is larger.
    metrics = {"loss": losses.detach()}
    metrics["rewards/chosen"] = args.beta * chosen_logps.detach() / chosen_tokens
    metrics["rewards/rejected"] = args.beta * rejected_logps.detach() / rejected_tokens
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = (margin > 0).float()
    return losses, metrics


@torch.no_grad()
def evaluate(model, rows, args):
    """What is logged of this process's share of the held-out pairs: a dictionary of tensors."""
    metrics = []
    for batch in pack_pairs(rows, args.tokens_per_microbatch):
        metrics.append(pair_losses(model, batch, args)[1])
    return merge(metrics, prefix="eval_")


PANELS = [  # of the figure: title, unit, metrics
    ("rewards", "beta log pi per token, nats", ["rewards/chosen", "rewards/rejected"]),
    ("loss", "nats per pair", ["loss"]),
]


def main(args):
    check_ranges(args, {"gamma": (0, 100)})
    setup(args.seed)

    # Data: token ids of the pairs that the optimiser steps will use, and of the held-out pairs.
    tokenizer = load_tokenizer(args.model)
    lengths = (args.max_length, args.max_prompt_length)
    train = tokenize_pairs(load_pairs(args.data, "train"), tokenizer, *lengths)
    test = tokenize_pairs(load_pairs(args.data, "test"), tokenizer, *lengths)
    steps = optimiser_steps(len(train), args.batch_size, 1, args.max_steps)
    test = subset(test, args.eval_pairs, seed=0)

    # The run folder and the model.
    out = start_run(args, "simpo")
    model = load_model(args.model, args.dtype, train=True)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr)
    log(out, 0, **evaluate(model, test, args))

    for step in range(steps):
        # Step: the gradients of the micro-batches add up to that of the mean over all pairs.
        rows = [train[i] for i in batch_order(len(train), args.batch_size, step, args.seed)]
        metrics = []
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, pairs = pair_losses(model, batch, args)
            # FSDP takes the mean over the processes; the loss is the mean over all their pairs.
            (losses.sum() * dist.get_world_size() / len(rows)).backward()
            metrics.append(pairs)
        grad_norm = clip_gradients(model, 10.0)
        stop_unless_finite(grad_norm, step, rows, out)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.step()
        optimizer.zero_grad()
        log(out, step, **merge(metrics), grad_norm=grad_norm)
        if stop_requested():
            raise SystemExit(143)  # after SIGTERM or Ctrl-C

    # After the last step: the model, the figure, and a table of the held-out metrics.
    log(out, steps, **evaluate(model, test, args))
    save_model(model, tokenizer, out / "model")
    history = plot_curves(out, PANELS, f"SimPO (Meng et al. 2024): {setting(args)}")
    print_evaluations(history)
    return history


if __name__ == "__main__":
    main(args)
