"""Speed and memory against the naive form, as ratios measured in one interleaved run.

    python tests/benchmark.py                    everything, about ten minutes on two cores
    python tests/benchmark.py dpo_step score     some of it
    python tests/benchmark.py --device cuda      the rows of a card, see benchmark_cuda.py

Models are Pythia shapes with random weights (vocabulary 50,304), token ids are random, lengths
follow HH: medians of prompt, chosen and rejected are 86, 36 and 33 tokens, means 111, 50 and 48.
Systems take turns on the same batches; the first round is dropped; a ratio is the median over
rounds of naive time / our time, with its range.  The agreement of both results stands on the same
line: a ratio whose results disagree means nothing.  Times are process CPU time, so that other
programs on the machine disturb them less.
"""

import gc
import os
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    TopPLogitsWarper,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import dpo
import twisted_smc
from dpl import add_head, base_loss
from dpo import dpo_loss
from generate import respond, sampler
from imh_adaptors import adaptor_logps, imh_chain, sample

from common import (
    _why_unusable,
    check_ranges,
    decode_step,
    is_empty,
    load_pairs,
    load_tokenizer,
    pack_pairs,
    prefill,
    read_rows,
    reorder,
    require,
    require_text,
    response_hiddens,
    response_logps,
    sample_tokens,
    setup,
    tokenize_pairs,
)

SHAPES = {"14m": (128, 6, 4), "70m": (512, 6, 8), "160m": (768, 12, 12)}  # width, layers, heads
V = 50304

# ---- models, rows and the naive form


def pythia_config(shape, **more):
    width, layers, heads = SHAPES[shape]
    return GPTNeoXConfig(
        vocab_size=V,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        **more,
    )


def pythia(shape, seed=0):
    """A GPT-NeoX of a Pythia shape with random weights, fp32."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(pythia_config(shape)).train()


def frozen(shape, seed=0):
    return pythia(shape, seed).eval().requires_grad_(False)


def peaked(shape):
    """The head scaled, so that a next-token distribution is about as peaked as a real one's."""
    model = frozen(shape)
    model.get_output_embeddings().weight.data *= 25
    return model


def hh_pairs(n, seed):
    """Random token ids with the lengths of HH pairs: log-normal, medians as above, cut to 512."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        draw = rng.normal(size=3)
        draw[2] = 0.6 * draw[1] + 0.8 * draw[2]  # the two responses of a pair are of similar length
        lengths = []
        for median, sigma, z in zip((86, 36, 33), (0.72, 0.85, 0.87), draw):
            lengths.append(int(np.clip(median * np.exp(sigma * z), 2, 256)))
        p, c, r = lengths
        ids = rng.integers(2, 50000, p + c + r).tolist()
        rows.append(dict(prompt_ids=ids[:p], responses=[ids[p : p + c], ids[p + c :]]))
    return rows


def short_prompts(n, seed=0):
    """n prompts of 20 tokens."""
    long = [row["prompt_ids"] for row in hh_pairs(8 * n, seed)]
    return [ids[:20] for ids in long if len(ids) >= 20][:n]


def real_tokens(rows):
    """A prompt counts once for each response; padding never counts."""
    responses = sum(len(response) for row in rows for response in row["responses"])
    return responses + sum(2 * len(row["prompt_ids"]) for row in rows)


def naive_logps(model, rows):
    """The definition: one right-padded row per response, fp32 log-softmax of all.  -> (2 rows,)"""
    texts = [(row["prompt_ids"], r) for row in rows for r in row["responses"]]
    ids = torch.zeros(len(texts), max(len(p) + len(r) for p, r in texts), dtype=torch.long)
    mask = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(texts):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, : len(p) + len(r)] = 1
        scored[i, len(p) : len(p) + len(r)] = True
    ids, mask, scored = (one.to(model.device) for one in (ids, mask, scored))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~scored[:, 1:], 0).sum(-1)


def shard_bf16(model):
    """bf16 compute on fp32 weights, as load_model does for training in bfloat16."""
    model.compute_dtype = torch.bfloat16  # for the tolerance of the packing probe
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (1,))
    for unit in [*model.base_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def finish(model, optimizer):
    """Clip, update, clear -> the gradient norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ---- measuring


def interleave(systems, rounds):
    """systems: name -> function of the round.

    -> name -> CPU seconds of each round but the first, and name -> results of the same rounds.
    """
    seconds = {name: [] for name in systems}
    results = {name: [] for name in systems}
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


def worst_difference(a, b):
    """The largest relative difference of two lists of numbers."""
    return max(abs(x - y) / max(abs(x), 1e-9) for x, y in zip(a, b))


def agree(results, a, b, what="loss and gradient norm"):
    """The largest relative difference between two systems' results, as text."""
    worst = max(worst_difference(u, v) for u, v in zip(results[a], results[b]))
    return f"{what} agree to {worst:.0e}"


def memory(field):
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(x for x in lines if x.startswith(field))
    return int(line.split()[1]) / 1024


def count_from_here():
    """Start the high-water mark of resident memory anew -> MiB that are resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def in_fresh_process(*command):
    """The last number that this script prints when it is run with these arguments."""
    arguments = [sys.executable, __file__, *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# ---- a DPO step


def naive_loss(model, rows, ref_model):
    """Mean DPO loss of padded two-row batches with a live reference."""
    with torch.no_grad():
        reference = naive_logps(ref_model, rows).view(-1, 2)
    policy = naive_logps(model, rows).view(-1, 2)
    return dpo_loss(*policy.unbind(1), *reference.unbind(1), 0.1).mean()


def naive_step(model, optimizer, rows, ref_model, bf16=False):
    """One DPO step: padded rows, all logits in fp32, live reference -> (loss, gradient norm)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = naive_loss(model, rows, ref_model)
    loss.backward()
    return loss.item(), finish(model, optimizer)


def our_step(model, optimizer, rows, reference):
    """One DPO step as in methods/dpo.py: packed, prompt shared, reference from the cache."""
    total = 0.0
    for batch in pack_pairs(rows, 8192):
        logps = response_logps(model, batch)[0].view(-1, 2)
        losses = dpo_loss(*logps.unbind(1), *reference[batch["index"]].unbind(1), 0.1)
        (losses.sum() / len(rows)).backward()
        total += losses.sum().item() / len(rows)
    return total, finish(model, optimizer)


def dpo_step(pairs=(4, 12), rounds=2):
    """Pythia-70M shape; weights do not move (learning rate 0), so that all steps compare."""
    for n in pairs:
        dpo_step_of(n, rounds)


def dpo_step_of(pairs, rounds):
    """The lines of one number of pairs per step."""
    batches = [hh_pairs(pairs, seed) for seed in range(rounds + 1)]
    ref_model = pythia("70m").eval()
    with torch.no_grad():
        references = [naive_logps(ref_model, rows).view(-1, 2) for rows in batches]
    models = {"naive": pythia("70m"), "ours": pythia("70m"), "ours bf16": shard_bf16(pythia("70m"))}
    optimizers = {n: torch.optim.RMSprop(m.parameters(), lr=0.0) for n, m in models.items()}

    def ours(name):
        model, optimizer = models[name], optimizers[name]
        return lambda i: our_step(model, optimizer, batches[i], references[i])

    def naive(bf16):
        model, optimizer = models["naive"], optimizers["naive"]
        return lambda i: naive_step(model, optimizer, batches[i], ref_model, bf16)

    systems = {
        "naive": naive(False),
        "ours": ours("ours"),
        "naive bf16": naive(True),
        "ours bf16": ours("ours bf16"),
    }
    seconds, results = interleave(systems, rounds)
    real = sum(map(real_tokens, batches[1:]))
    compared = (("ours", "naive"), ("ours bf16", "naive"), ("ours bf16", "naive bf16"))
    for name, baseline in compared:
        print(
            f"dpo_step   70m, {pairs:2d} pairs: {name:9} against {baseline:10} "
            f"{ratio(seconds, baseline, name)}  {real / sum(seconds[name]):6.0f} real tokens/s  "
            f"{agree(results, baseline, name)}",
            flush=True,
        )


def peak_of(system, pairs):
    """In a fresh process: MiB that one step adds at its peak, the optimiser's state being there."""
    setup(0)
    torch.set_num_threads(1)
    model = pythia("70m")
    ref_model = pythia("70m") if system.startswith("naive") else None
    if system == "ours bf16":
        model = shard_bf16(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
    before = 0.0
    for rows in (hh_pairs(2, 1), hh_pairs(pairs, 0)):  # the first makes the optimiser's state
        before = count_from_here()
        if system.startswith("naive"):
            naive_step(model, optimizer, rows, ref_model, "bf16" in system)
        else:  # the reference comes from the cache; its values do not matter for memory
            our_step(model, optimizer, rows, torch.zeros(len(rows), 2))
    print(memory("VmHWM") - before)


def dpo_memory(pairs=8):
    """What a step of 8 pairs adds at its peak, a process each.  268 MiB are the gradients."""
    systems = ("naive", "ours", "naive bf16", "ours bf16")
    added = {system: in_fresh_process("peak_of", system, pairs) for system in systems}
    for kind in ("", " bf16"):
        naive, ours = added["naive" + kind], added["ours" + kind]
        print(
            f"dpo_memory 70m, {pairs} pairs: naive{kind} adds {naive:.0f} MiB, "
            f"ours{kind} {ours:.0f} MiB: {naive / ours:.1f}x raw, "
            f"{(naive - 268) / (ours - 268):.1f}x net of the gradients",
            flush=True,
        )


def sweep(rounds=1, values=5, pairs=16):
    """Five values of beta over the same pairs: one reference pass for all, or one in every step."""
    rows = hh_pairs(pairs, 0)
    chunks = [rows[i : i + 4] for i in range(0, pairs, 4)]
    ref_model = frozen("70m")
    models = {name: pythia("70m") for name in ("live", "cached")}
    optimizers = {n: torch.optim.RMSprop(m.parameters(), lr=0.0) for n, m in models.items()}

    @torch.no_grad()
    def reference(chunk):
        (batch,) = pack_pairs(chunk, 10**6)
        return response_logps(ref_model, batch)[0].view(-1, 2)

    def losses(name, references):
        found = []
        for _ in range(values):
            for i, chunk in enumerate(chunks):
                given = reference(chunk) if references is None else references[i]
                found.append(our_step(models[name], optimizers[name], chunk, given)[0])
        return found

    def cached(_):
        return losses("cached", [reference(chunk) for chunk in chunks])

    def live(_):
        return losses("live", None)

    seconds, results = interleave({"live": live, "cached": cached}, rounds)
    print(
        f"sweep      70m, {pairs} pairs, {values} values of beta: one cached reference pass "
        f"against live {ratio(seconds, 'live', 'cached')}  "
        f"{agree(results, 'live', 'cached', 'losses')}",
        flush=True,
    )


# ---- a reward model's step


def reward_step(chosen, rejected, optimizer, n):
    """A micro-batch's share of the loss of n pairs, backward where there is an optimizer."""
    loss = base_loss(chosen, rejected).sum() / n
    if optimizer:
        loss.backward()
    return loss.item()


def naive_rewards(model, optimizer, rows):
    """As released: micro-batches of two pairs, each side a sequence, padded to a multiple of 64."""
    total = 0.0
    for i in range(0, len(rows), 2):
        pairs = rows[i : i + 2]
        sides = [row["prompt_ids"] + row["responses"][k] for k in (0, 1) for row in pairs]
        width = -(-max(map(len, sides)) // 64) * 64
        ids = torch.tensor([side + [0] * (width - len(side)) for side in sides])
        rewards = model(ids, attention_mask=(ids > 0).long()).logits.float()
        total += reward_step(rewards[:2], rewards[2:], optimizer, len(rows))
    return (total, finish(model, optimizer)) if optimizer else (total,)


def our_rewards(model, optimizer, rows):
    """As methods/dpl.py: packed, the prompt shared, the head on the last token's state."""
    total = 0.0
    for batch in pack_pairs(rows, 8192):
        hidden = response_hiddens(model, batch).to(model.score.weight)
        rewards = model.score(hidden).float().view(-1, 2, 1)
        total += reward_step(*rewards.unbind(1), optimizer, len(rows))
    return (total, finish(model, optimizer)) if optimizer else (total,)


def reward_models(dtype):
    """The same weights as a sequence classifier of the library, and as ours."""
    body = pythia("70m")
    add_head(body, 0.0002 * torch.randn(1, 512, generator=torch.Generator().manual_seed(0)))
    body.get_output_embeddings().requires_grad_(False)
    config = pythia_config("70m", num_labels=1, pad_token_id=0)
    whole = GPTNeoXForSequenceClassification(config)
    whole.gpt_neox.load_state_dict(body.gpt_neox.state_dict())
    whole.score.load_state_dict(body.score.state_dict())
    return whole.to(dtype), body.to(dtype)


def dpl_step(pairs=8, rounds=2):
    """Step and scoring, 70M shape.  All in fp32, or all in bf16 with fp32 losses."""
    batches = [hh_pairs(pairs, seed) for seed in range(rounds + 1)]
    for dtype in (torch.float32, torch.bfloat16):
        whole, body = reward_models(dtype)
        systems = {}
        for name, function, model in (("naive", naive_rewards, whole), ("ours", our_rewards, body)):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.0)

            def step(i, function=function, model=model, optimizer=optimizer):
                return function(model, optimizer, batches[i])

            @torch.no_grad()
            def scoring(i, function=function, model=model):
                return function(model, None, batches[i])

            systems[name] = step
            systems[name + " scoring"] = scoring
        seconds, results = interleave(systems, rounds)
        for kind, unit, per_pair in (("", "pairs", 1), (" scoring", "responses", 2)):
            naive, ours = "naive" + kind, "ours" + kind
            done = per_pair * pairs * rounds
            print(
                f"dpl_step   70m, {pairs} pairs, {str(dtype)[6:]}:{kind:8} "
                f"{ratio(seconds, naive, ours)}  {done / sum(seconds[ours]):6.1f} {unit}/s  "
                f"{agree(results, naive, ours, 'losses')}",
                flush=True,
            )


# ---- scoring


@torch.no_grad()
def score_sums(model, rows, system):
    """Summed log-probs of all responses: one forward each, padded batches of 16, or ours."""
    if system == "ours":
        batches = pack_pairs(rows, 8192)
        sums = torch.cat([response_logps(model, batch)[0] for batch in batches]).view(-1, 2)
        order = [i for batch in batches for i in batch["index"]]
        return sums[np.argsort(order)].flatten().tolist()
    singles = []
    for row in rows:
        for response in row["responses"]:
            singles.append(dict(prompt_ids=row["prompt_ids"], responses=[response]))
    size = 1 if system == "loop" else 16
    found = []
    for i in range(0, len(singles), size):
        found += naive_logps(model, singles[i : i + size]).tolist()
    return found


def score(rounds=1):
    """HH-like pairs, as methods/ranking_accuracy.py scores them."""
    for shape, pairs, names in (
        ("70m", 24, ("loop", "ours")),
        ("14m", 16, ("loop", "padded", "ours")),
    ):
        rows = hh_pairs(pairs, 0)
        models = {"": frozen(shape), " bf16": frozen(shape).bfloat16()}
        systems = {}
        for name in names:
            for kind, model in models.items():

                def run(_, name=name, model=model, rows=rows):
                    return score_sums(model, rows, name)

                systems[name + kind] = run
        seconds, results = interleave(systems, rounds)
        real = rounds * real_tokens(rows)
        for naive in names[:-1]:
            for kind in models:
                ours = "ours" + kind
                print(
                    f"score      {shape}, {pairs} pairs: {ours:9} against {naive + kind:11} "
                    f"{ratio(seconds, naive + kind, ours)}  "
                    f"{real / sum(seconds[ours]):6.0f} real tokens/s  "
                    f"{agree(results, 'loop', ours, 'log-probs')} with the loop in fp32",
                    flush=True,
                )
    for name, pairs in (("loop", 64), ("padded", 64), ("ours", 64), ("ours", 256)):
        added = in_fresh_process("score_peak_of", name, pairs)
        print(f"score      14m, {pairs} pairs: {name} adds {added:.0f} MiB", flush=True)


def score_peak_of(system, pairs):
    """In a fresh process: MiB that scoring adds at its peak."""
    setup(0)
    torch.set_num_threads(1)
    model = frozen("14m")
    score_sums(model, hh_pairs(1, 1), system)
    before = count_from_here()
    score_sums(model, hh_pairs(pairs, 0), system)
    print(memory("VmHWM") - before)


# ---- text to ids


def text_rows(n, seed=0):
    """n pairs of random words, as long as HH's."""
    rng = np.random.default_rng(seed)
    words = (
        "the fox and owl found a bright old lamp near silver lakes , then they went home .".split()
    )
    rows = []
    for row in hh_pairs(n, seed):
        texts = []
        for ids in (row["prompt_ids"], *row["responses"]):
            texts.append(" " + " ".join(rng.choice(words, len(ids))))
        prompt = f"\n\nHuman:{texts[0]}\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": texts[1], "rejected": texts[2] + "!"})
    return rows


def tokenise(n=4043, rounds=3):
    """Pairs of text to ids, every row checked, against a call of the tokenizer for each text."""
    tokenizer = load_tokenizer("tiny")
    rows = text_rows(n)

    def naive(_):
        ids = []
        for row in rows:
            for name in ("prompt", "chosen", "rejected"):
                ids.append(tokenizer(row[name], add_special_tokens=False).input_ids)
        return [sum(map(len, ids)) + 2 * n]

    def ours(_):
        found = tokenize_pairs(rows, tokenizer, 10**6, 10**5, what=None)
        responses = sum(len(ids) for row in found for ids in row["responses"])
        return [responses + sum(len(row["prompt_ids"]) for row in found)]

    tokenizer.model_max_length = 10**6  # no model reads these rows
    seconds, results = interleave({"naive": naive, "ours": ours}, rounds)
    print(
        f"tokenise   {n} pairs of HH's lengths: {ratio(seconds, 'naive', 'ours')}  "
        f"{n * rounds / sum(seconds['ours']):6.0f} rows/s  "
        f"{agree(results, 'naive', 'ours', 'numbers of tokens')}",
        flush=True,
    )


def validation(rounds=5):
    """What the checks of rows and flags cost, as a share of reading and tokenising real pairs."""
    data = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
    path = data / "relabeled_hh_rlhf" / "both" / "test.jsonl.gz"
    if not path.is_file():
        print(f"validation   skipped: no {path}; set REAL_DATA")
        return
    tokenizer = load_tokenizer("tiny")
    tokenizer.model_max_length = 10**6  # no model reads these rows
    raw = read_rows(path)
    loads, checks = [], []
    for _ in range(rounds):
        start = time.process_time()
        rows = load_pairs(str(path), "test")
        tokenize_pairs(rows, tokenizer, what=None)
        loads.append(time.process_time() - start)

        # Once more the checks of load_pairs alone: of the answers as they come, then of each row.
        start = time.process_time()
        for row in raw:
            for answer in (row["chosen"], row["rejected"]):
                require_text(answer)
                is_empty(answer)
        for row in rows:
            _why_unusable(row)
        check_ranges(dpo.Args(), dpo.RANGES)
        checks.append(time.process_time() - start)
    load = statistics.median(loads)
    check = statistics.median(checks)
    print(
        f"validation   {len(raw)} real pairs: {1000 * check:.0f} ms of {load:.2f} s of reading and "
        f"tokenising, {check / load:.2%}",
        flush=True,
    )


# ---- sampling


class Ids:
    """Stands in for a tokenizer: its size, the end token, and the prompt of ctl_update."""

    eos_token_id = -1  # no response ends early, so that all systems make the same number of tokens
    chat_template = None

    def __len__(self):
        return V

    def __call__(self, text, **_):
        return types.SimpleNamespace(input_ids=list(range(3, 11)))

    def batch_decode(self, ids, **_):
        return [""] * len(ids)


@torch.no_grad()
def library_generate(model, rows, new, **settings):
    """The library's own batch.  No end token, so nothing watches for one or keeps it from coming;
    and weights as they are after loading, since frozen ones would slow its prefill.
    """
    ids = torch.tensor(rows)
    model.generation_config.eos_token_id = None
    model.requires_grad_(True)
    settings = {"top_k": 0, "do_sample": True, "pad_token_id": 0} | settings
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
    model.requires_grad_(False)
    assert found.shape[1] == ids.shape[1] + new
    return found


def generate(rounds=1):
    """generate.py, no adaptor and top-p: n prompts at once against the library's batch.

    And one by one at the 14M shape; flat heads as made, peaked ones as a trained model's.
    """
    for shape, n, new in (("14m", 32, 32), ("70m", 16, 16)):
        for head, make in (("flat", frozen), ("peaked", peaked)):
            model = make(shape)
            for top_p in (1.0, 0.9):
                generate_of(model, f"{shape}, {head:6} head, top-p {top_p}", n, new, top_p, rounds)


def generate_of(model, name, n, new, top_p, rounds):
    prompts = short_prompts(n)
    how = sampler(top_p=top_p)

    def ours(i):
        uniforms = torch.rand(n, new, generator=torch.Generator().manual_seed(i))
        return len(respond(model, prompts, uniforms, how, [-1], V))

    def batch(_):
        return len(library_generate(model, prompts, new, top_p=top_p))

    def one_by_one(_):
        return sum(len(library_generate(model, [ids], new, top_p=top_p)) for ids in prompts[:4])

    systems = {"ours": ours, "batch": batch, "one by one": one_by_one}
    seconds, _ = interleave(systems, rounds)
    seconds["one by one"] = [n / 4 * t for t in seconds["one by one"]]  # 4 of n were run
    for other in ("batch", "one by one"):
        print(
            f"generate   {name}, {n} prompts x {new} tokens: ours against the library, {other:10} "
            f"{ratio(seconds, other, 'ours')}  "
            f"{n * new * rounds / sum(seconds['ours']):6.0f} tokens/s",
            flush=True,
        )


# ---- twisted SMC


def half_even(tokens):
    """A potential that costs nothing: log phi is three times the share of even ids."""
    return 3.0 * (tokens % 2 == 0).double().mean(-1)


class CachedScores:
    """p0 and a linear twist on its states, one token at a time on a reordered cache."""

    def __init__(self, model, twist, prompt, T, K):
        self.model, self.twist, self.prompt, self.T, self.K = model, twist, prompt, T, K
        self.cache = None

    def __call__(self, last, ancestors):
        if self.cache is None:
            self.cache, hidden, logits = prefill(self.model, [self.prompt], self.T, copies=self.K)
        else:
            if ancestors is not None:
                reorder(self.cache, ancestors)
            hidden, logits = decode_step(self.model, self.cache, last)
        return logits, hidden @ self.twist.T


class RecomputedScores:
    """The same from the whole prefix at every step."""

    def __init__(self, model, twist, prompt, T, K):
        self.model, self.twist = model, twist
        self.ids = torch.tensor(prompt).expand(K, -1)
        self.hidden = None

    def catch(self, _, inputs):
        self.hidden = inputs[0][:, -1]

    def __call__(self, last, ancestors):
        if ancestors is not None:
            self.ids = self.ids[ancestors]
        if last is not None:
            self.ids = torch.cat([self.ids, last[:, None]], 1)
        head = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(self.catch):
            logits = self.model(self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits, self.hidden @ self.twist.T


@torch.no_grad()
def smc(sizes=((20, 100), (50, 100), (100, 100), (20, 500))):
    """14M shape, prompt of 10 tokens, resampling at every step; same uniforms, so the same Z."""
    model = frozen("14m")
    prompt = list(range(3, 13))
    twist = 0.02 * torch.randn(V, 128, generator=torch.Generator().manual_seed(0))
    spent = {}
    for T, K in sizes:

        def run(kind, T=T, K=K):
            torch.manual_seed(1)
            scores = kind(model, twist, prompt, T, K)
            return twisted_smc.smc(scores, half_even, T, K).log_Z.tolist()

        def ours(_, run=run):
            return run(CachedScores)

        def recompute(_, run=run):
            return run(RecomputedScores)

        seconds, results = interleave({"recompute": recompute, "ours": ours}, 1)
        spent[T, K] = seconds["ours"][0]
        print(
            f"smc        14m, T = {T:3d}, K = {K}: cache against recomputing "
            f"{ratio(seconds, 'recompute', 'ours')}  {T * K / spent[T, K]:6.0f} particle-tokens/s  "
            f"{agree(results, 'recompute', 'ours', 'log Z')}",
            flush=True,
        )
    cache = 2 * 6 * 128 * 4  # keys and values, layers, width, bytes
    print(
        f"smc        14m: time grows {spent[100, 100] / spent[20, 100]:.1f}x from T = 20 to 100; "
        f"a particle's token takes {cache} bytes of cache (fp32)",
        flush=True,
    )


def released_ctl_loss(world, twist, base, K, T):
    """CTL by the released cost model: both models over all P + T positions at every step.

    Gradients go through each of them.  Generous to it: only the last position's logits are made.
    """
    prompt = torch.arange(3, 11)
    ids = prompt.repeat(K, 1)
    log_p, log_q, log_psi = [], [], []
    for t in range(T):
        buffer = torch.cat([ids, ids.new_zeros(K, T - t)], 1)
        with torch.no_grad():
            at = torch.tensor([7 + t])
            logits = base(buffer, use_cache=False, logits_to_keep=at).logits[:, 0]
        states = twist.body.base_model(buffer, use_cache=False).last_hidden_state
        psi = twist(states[:, 7 + t])
        joint = (logits + psi).log_softmax(-1)
        uniforms = torch.rand(K, dtype=torch.float64)  # ours
        s = sample_tokens(joint.detach(), uniforms)[0][:, None]
        log_p.append(logits.log_softmax(-1).gather(1, s)[:, 0].double())
        log_q.append(joint.gather(1, s)[:, 0].detach().double())
        log_psi.append(psi.gather(1, s)[:, 0])
        ids = torch.cat([ids, s], 1)
    states = twist.body.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, -T:]
    again = twist.log_psi_of(ids[:, 8:], states)
    log_psi = torch.stack(log_psi, -1)
    log_ratio = torch.stack(log_p, -1) - torch.stack(log_q, -1)
    W = (log_ratio.sum(-1) + half_even(ids[:, 8:])).softmax(0)
    w_neg = (log_ratio.cumsum(-1) + log_psi.detach()).softmax(0)
    return twisted_smc.ctl_loss(again, W, log_psi, w_neg)


def ctl_update(K=25, T=20, rounds=2):
    """One CTL update, 14M shape, prompt of 8 tokens, the twist a body of its own.

    A cache, gradients through one teacher-forced pass, against the released cost model.
    Token-forwards count a backward as two.
    """
    base = frozen("14m")
    args = twisted_smc.Args(T=T, K=K, twist="body")
    torch.manual_seed(1)
    world = twisted_smc.lm_world(base, Ids(), args)
    world.log_phi = lambda tokens, o=None: half_even(tokens)
    twist = twisted_smc.make_twist(args, "ctl", world, base)
    noisy = {name: x + 0.1 * torch.randn_like(x) for name, x in twist.state_dict().items()}
    twist.load_state_dict(noisy)
    weights = [p for p in twist.parameters() if p.requires_grad]
    tokens = {True: 0, False: 0}  # with and without gradient

    def count(_, inputs):
        x = inputs[0]
        tokens[x.requires_grad] += x.shape[0] * x.shape[1]

    for model in (base, twist.body):
        model.gpt_neox.layers[0].register_forward_pre_hook(count)
    counts = {}

    def update(name, i):
        tokens.update({True: 0, False: 0})
        torch.manual_seed(i)
        if name == "ours":
            batch = twisted_smc.draw_batch("ctl", world, twist, K)
            loss = twisted_smc.batch_loss("ctl", world, twist, batch)
        else:
            loss = released_ctl_loss(world, twist, base, K, T)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        twist.zero_grad()
        counts[name] = tokens[False] + 3 * tokens[True]
        return loss.item(), norm.item()

    def ours(i):
        return update("ours", i)

    def released(i):
        return update("released", i)

    seconds, results = interleave({"ours": ours, "released": released}, rounds)
    fewer = counts["released"] / counts["ours"]
    print(
        f"ctl_update 14m, T = {T}, K = {K}: {ratio(seconds, 'released', 'ours')}, token-forwards "
        f"{counts['released']:,} against {counts['ours']:,}: {fewer:.1f}x  "
        f"{agree(results, 'released', 'ours')}",
        flush=True,
    )


# ---- sampling adaptors and chains


def worst_log_q(model, prompts, drawn, adaptor):
    """log q of the drawn tokens against the library's processors on teacher-forced logits."""
    worst = 0.0
    for prompt, response in list(zip(prompts, drawn))[:4]:
        ids = torch.tensor([prompt + response.ids])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        for value in adaptor.values():
            logits = TopPLogitsWarper(value)(None, logits)
        tokens = torch.tensor(response.ids)[:, None]
        exact = logits.log_softmax(-1).gather(1, tokens)[:, 0]
        difference = exact - torch.tensor(response.log_q)
        worst = max(worst, difference.abs().max().item())
    return worst


@torch.no_grad()
def imh_generate(rounds=1):
    """imh_adaptors.sample: n prompts of 20 tokens in one batch, against generate in one batch.

    And as in the released code: two copies of one prompt per call.
    """
    for shape, n, new in (("14m", 64, 32), ("70m", 16, 16)):
        for head, make in (("flat", frozen), ("peaked", peaked)):
            model = make(shape)
            for name, adaptor in (("none", {}), ("top-p 0.9", {"top_p": 0.9})):
                label = f"{shape}, {head:6} head, {name:9}"
                imh_generate_of(model, label, adaptor, n, new, rounds)


def imh_generate_of(model, label, adaptor, n, new, rounds):
    prompts = short_prompts(n)
    drawn = []

    def ours(i):
        generator = torch.Generator().manual_seed(i)
        u = torch.rand(n, new, generator=generator, dtype=torch.float64)
        drawn[:] = sample(model, prompts, 1, adaptor, u, Ids())

    def batch(_):
        library_generate(model, prompts, new, **adaptor)

    def released(_):
        for ids in prompts[:2]:
            library_generate(model, [ids, ids], new, **adaptor)

    seconds, _ = interleave({"ours": ours, "batch": batch, "released": released}, rounds)
    seconds["released"] = [n / 4 * t for t in seconds["released"]]  # 4 of n responses are made
    worst = worst_log_q(model, prompts, drawn, adaptor)
    for other in ("batch", "released"):
        print(
            f"imh_generate {label}: ours against generate, {other:8} "
            f"{ratio(seconds, other, 'ours')}  "
            f"{n * new * rounds / sum(seconds['ours']):6.0f} tokens/s  "
            f"log q agree to {worst:.0e}",
            flush=True,
        )


@torch.no_grad()
def imh_score(rounds=1):
    """16 HH-like texts under the prior, p_+, and p_+ with an adaptor.

    The released way (three forwards, a warper call per position) against ours; and four adaptors
    in one pass against one pass each.
    """
    prior = frozen("14m", seed=1)
    model = peaked("14m")
    rows = hh_pairs(8, 0)
    warper = TopPLogitsWarper(0.9)
    several = [{"top_p": 0.9}, {"top_k": 50}, {"typical_p": 0.9}, {"eta_cutoff": 0.0009}]

    def released(_):
        sums = []
        for row in rows:
            for y in row["responses"]:
                ids = torch.tensor([row["prompt_ids"] + y])
                at = torch.tensor(y)[:, None]
                for m, warped in ((prior, False), (model, False), (model, True)):
                    logits = m(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
                    if warped:
                        logits = torch.cat([warper(None, z[None]) for z in logits])
                    logps = logits.log_softmax(-1).gather(1, at).clamp(min=-25)
                    sums.append(logps.double().sum().item())
        return sums

    def scored(adaptors):
        (batch,) = pack_pairs(rows, 10**6)
        before = response_logps(prior, batch)[0].double()
        tokens = adaptor_logps(model, batch, adaptors, V).clamp(min=-25)
        sums = tokens.new_zeros(len(tokens), len(before)).index_add(1, batch["owner"], tokens)
        return torch.cat([before[None], sums])  # prior, p_+ and each adaptor: (2 + A, 16)

    def ours(_):
        return scored([{"top_p": 0.9}]).T.flatten().tolist()

    def four_at_once(_):
        return scored(several).flatten().tolist()

    def one_each(_):
        found = [scored([adaptor]) for adaptor in several]
        return torch.cat([found[0][:2], *(one[2:] for one in found)]).flatten().tolist()

    systems = {
        "released": released,
        "ours": ours,
        "four at once": four_at_once,
        "one each": one_each,
    }
    seconds, results = interleave(systems, rounds)
    print(
        f"imh_score    14m, 16 texts, 3 distributions: ours against the released way "
        f"{ratio(seconds, 'released', 'ours')}  "
        f"{agree(results, 'released', 'ours', 'log-probs')}"
    )
    print(
        f"imh_score    14m, 4 adaptors: one pass against one pass each "
        f"{ratio(seconds, 'one each', 'four at once')}  "
        f"{agree(results, 'one each', 'four at once', 'log-probs')}",
        flush=True,
    )


def loop_chain(w, u):
    """Indices of one chain, a step at a time."""
    states = [0]
    for i in range(1, len(w)):
        accepted = u[i] < w[i] - w[states[-1]]
        states.append(i if accepted else states[-1])
    return states


def imh_chains():
    """Chains side by side against a Python loop over floats, numpy elements and tensor elements."""
    for P, N in ((1000, 100), (10_000, 1000), (10_000, 10_000)):
        generator = torch.Generator().manual_seed(0)
        log_w = torch.randn(N, P, generator=generator).T
        log_u = torch.rand(N, P, generator=generator).log_().T
        times = []
        for _ in range(max(1, 3 * 10**6 // (P * N)) + 1):
            start = time.process_time()
            held = imh_chain(log_w, log_u)
            times.append(time.process_time() - start)
        ours = min(times)

        # The loops run some of the chains; their time is scaled up.
        line = []
        loops = (
            ("floats", 400_000 // N, torch.Tensor.tolist),
            ("numpy", 100_000 // N, torch.Tensor.numpy),
            ("tensors", 20_000 // N, list),
        )
        for name, few, kind in loops:
            few = min(P, max(1, few))
            start = time.process_time()
            found = [loop_chain(w, u) for w, u in zip(kind(log_w[:few]), kind(log_u[:few]))]
            line.append(f"{name} {(time.process_time() - start) * P / few / ours:.0f}x")
            same = (torch.tensor(found) == held[:few]).double().mean().item()
            # float64 arithmetic may tip a comparison
            assert same == 1 or (name == "floats" and same > 0.999), same
        print(
            f"imh_chains   {P} x {N} steps: {ours:.3f} s, {ours / P / N * 1e9:.1f} ns a step; "
            f"against a loop over {', over '.join(line)}, same indices",
            flush=True,
        )


BENCHMARKS = {
    "dpo_step": dpo_step,
    "dpo_memory": dpo_memory,
    "sweep": sweep,
    "dpl_step": dpl_step,
    "score": score,
    "tokenise": tokenise,
    "validation": validation,
    "generate": generate,
    "smc": smc,
    "ctl_update": ctl_update,
    "imh_generate": imh_generate,
    "imh_score": imh_score,
    "imh_chains": imh_chains,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak_of"]:
        peak_of(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["score_peak_of"]:
        score_peak_of(sys.argv[2], int(sys.argv[3]))
    elif "--device" in sys.argv:
        sys.modules["benchmark"] = sys.modules["__main__"]
        import benchmark_cuda

        benchmark_cuda.main(sys.argv[1:])
    else:
        names = sys.argv[1:] or list(BENCHMARKS)
        for name in names:
            require(name in BENCHMARKS, f"{name}: no line of these: {', '.join(BENCHMARKS)}")
        setup(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # setup's wait for a training loop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        print(f"torch {torch.__version__}, one thread; ratios are medians over rounds, with range")
        for name in names:
            BENCHMARKS[name]()
