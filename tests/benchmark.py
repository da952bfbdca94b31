"""Speed and memory against the naive form, as ratios measured in one interleaved run.

    python tests/benchmark.py                    everything, about ten minutes on two cores
    python tests/benchmark.py dpo_step score     some of it

Models are Pythia shapes with random weights (vocabulary 50,304), token ids are random, lengths follow HH:
medians of prompt, chosen and rejected are 86, 36 and 33 tokens, means 111, 50 and 48.  Systems take turns on
the same batches; the first round is dropped; a ratio is the median over rounds of naive time / our time, with
its range.  The agreement of both results stands on the same line: a ratio whose results disagree means
nothing.  Times are process CPU time, so that other programs on the machine disturb them less.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "methods")]
from common import pack_pairs, response_logps
from dpo import dpo_loss

SHAPES = {"14m": (128, 6, 4), "70m": (512, 6, 8), "160m": (768, 12, 12)}  # width, layers, heads


def pythia(shape, seed=0):
    """A GPT-NeoX of a Pythia shape with random weights, fp32."""
    width, layers, heads = SHAPES[shape]
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=50304, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=2048, rotary_pct=0.25)).train()


def hh_pairs(n, seed):
    """Random token ids with the lengths of HH pairs: log-normal with the medians and means above, cut to 512."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        draw = rng.normal(size=3)
        draw[2] = 0.6 * draw[1] + 0.8 * draw[2]  # the two responses of a pair are of similar length
        p, c, r = (int(np.clip(m * np.exp(s * z), 2, hi)) for m, s, z, hi in
                   zip((86, 36, 33), (0.72, 0.85, 0.87), draw, (256, 256, 256)))
        ids = rng.integers(2, 50000, p + c + r).tolist()
        rows.append(dict(prompt_ids=ids[:p], responses=[ids[p:p + c], ids[p + c:]]))
    return rows


def naive_logps(model, rows):
    """The definition: one right-padded row per response, fp32 log-softmax of all logits.  -> (2 * rows,)"""
    texts = [(row["prompt_ids"], r) for row in rows for r in row["responses"]]
    ids = torch.zeros(len(texts), max(len(p) + len(r) for p, r in texts), dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(texts):
        ids[i, :len(p) + len(r)] = torch.tensor(p + r)
        mask[i, :len(p) + len(r)] = 1
        scored[i, len(p):len(p) + len(r)] = True
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~scored[:, 1:], 0).sum(-1)


def naive_step(model, optimizer, rows, reference, ref_model, bf16=False):
    """One DPO step with a live reference."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logps = naive_logps(model, rows)
        with torch.no_grad():
            ref_logps = naive_logps(ref_model, rows)
    loss = dpo_loss(*logps.view(-1, 2).unbind(1), *ref_logps.view(-1, 2).unbind(1), 0.1).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def our_step(model, optimizer, rows, reference, ref_model, bf16=False):
    """One DPO step as in methods/dpo.py: packed, prompt shared, reference from the cache."""
    loss = 0.0
    for batch in pack_pairs(rows, 8192):
        logps = response_logps(model, batch)[0].view(-1, 2)
        losses = dpo_loss(*logps.unbind(1), *reference[batch["index"]].unbind(1), 0.1)
        (losses.sum() / len(rows)).backward()
        loss += losses.sum().item() / len(rows)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def interleave(systems, rounds):
    """systems: name -> function of the round.  -> name -> CPU seconds of each round but the first, and last result."""
    seconds, results = {name: [] for name in systems}, {name: [] for name in systems}
    for i in range(rounds + 1):
        for name, function in systems.items():
            gc.collect()
            start = time.process_time()
            result = function(i)
            if i:
                seconds[name].append(time.process_time() - start)
                results[name].append(result)
    return seconds, results


def ratio(seconds, naive, ours):
    """Median over rounds of naive / ours, with the range, as text."""
    ratios = sorted(a / b for a, b in zip(seconds[naive], seconds[ours]))
    return f"{statistics.median(ratios):5.1f}x [{ratios[0]:.1f} .. {ratios[-1]:.1f}]"
