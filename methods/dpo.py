"""Direct Preference Optimization (DPO).

Rafailov, Sharma, Mitchell, Ermon, Manning, Finn 2023, https://arxiv.org/abs/2305.18290

The loss of a prompt x with a chosen response y_w and a rejected response y_l (Eq. 7):

    L = -log sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

Its two terms are the implicit rewards of the responses (Eq. 5). The reward that a policy is optimal
for has a further term, beta log Z(x), which is the same for both responses and cancels.

    python methods/dpo.py                                     tiny world, a minute on a laptop
    python methods/dpo.py --model results/sft --beta 0.5      from your own SFT run
    torchrun --standalone --nproc-per-node 4 methods/dpo.py hh --model results/sft-hh

Presets: tiny (default) | hh: Pythia-2.8B on Anthropic HH | tldr: Pythia-2.8B on TL;DR comparisons.

The log-probability of a response is the sum over its tokens. Its end-of-text token counts, and the
tokens of the prompt never do. Before the first step the policy is the reference, and every loss is
log 2.

Three things differ from the released code (eric-mitchell/direct-preference-optimization):
- The policy and the reference compute in the same dtype, so that all rewards are 0 at step 0.
- The order of the data follows --seed, and no epoch drops its last rows.
- A rejected transcript has the same prompt as the chosen one; other rows are dropped and counted.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
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
    out: str = "results/dpo"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder
    plan: bool = False  # print what the run needs of memory, and leave; needs no weights, no GPU


PYTHIA = Args(  # the released commands for Pythia-2.8B
    model="EleutherAI/pythia-2.8b",  # give the SFT run: --model results/sft-hh
    lr=5e-7,  # as released; App. B has 1e-6
    batch_size=64,  # App. B
    warmup_steps=150,  # App. B
    max_grad_norm=10.0,
    dtype="bfloat16",
    max_length=512,
    max_prompt_length=256,
    tokens_per_microbatch=16384,
    eval_every=5000,
    eval_pairs=256,
    save_every=20000,
)
PRESETS = {
    "tiny": Args(),
    "hh": replace(PYTHIA, data="hh", beta=0.1, out="results/dpo-hh"),
    "tldr": replace(PYTHIA, data="tldr", beta=0.5, out="results/dpo-tldr"),  # beta: App. B
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
from common import pair_metrics, reference_logps, response_logps  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import batch_order, load_split, plan_steps, subset  # data
from common import CUDA, clip_gradients, compile_layers, load_model, load_tokenizer  # models
from common import plan_memory, save_model  # models
from common import check_ranges, log, merge, progress, setup  # processes
from common import speed, start_run, to_device  # processes
from common import load_checkpoint, save_checkpoint, stop_requested, stop_unless_finite  # processes
from common import plot_curves, print_evaluations, say_claim, setting, share_shown  # processes
# isort: on


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0
):
    """The loss of each pair, Eq. 7.  Four (B,) summed log-probs -> (B,) losses.

    label_smoothing is the probability that a label is wrong; the loss is the expectation over the
    label.  At 1/2 there would be nothing to learn.
    """
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # Eq. 5, without beta log Z(x)
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)
    margin = chosen_reward - rejected_reward  # beta log Z(x) cancels
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


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

    # The loss, and the metrics that all preference methods have.
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = dpo_loss(*logps, args.beta, args.label_smoothing)
    metrics = {"loss": losses.detach()}
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
    ("loss: does the held-out loss fall too?", "nats per pair", ["loss"]),
]
REFERENCES = [  # lines across the figure: number of the panel, value, what it is
    (1, 0.5, "chance"),
    (2, math.log(2), "log 2: no preference learned"),
]


def claim(record, n, data):
    """What the paper says, and what the last record of n held-out pairs shows -> two lines"""
    paper = "the policy's implicit reward, Eq. 5, learns what people prefer, without a reward model"
    sentence = "the implicit reward of held-out pairs is higher for the chosen response"
    return paper, share_shown(sentence, data, record["eval_rewards/accuracies"] * n, n)


def finish(model, tokenizer, record, n, args, out):
    """The figure, table, claim and model of a run whose last record is of n held-out pairs.

    Returns the records of its metrics.jsonl.
    """
    paper, shown = claim(record, n, args.data)
    caption = f"{shown}\nDPO (Rafailov et al. 2023), beta {args.beta}: {setting(args)}"
    history = plot_curves(out, PANELS, caption, REFERENCES)
    print_evaluations(history)
    say_claim(paper, shown, out)
    save_model(model, tokenizer, out / "model")
    return history


RANGES = {"label_smoothing": (0, 0.499)}  # of this method's own options: least and largest value


def check(args):
    """Refuse what no run could use, before anything is loaded."""
    check_ranges(args, RANGES)


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
    out = start_run(args, "dpo")

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
