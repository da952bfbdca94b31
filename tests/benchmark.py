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
import twisted_smc
from common import (
    decode_step,
    pack_pairs,
    prefill,
    reorder,
    response_hiddens,
    response_logps,
    sample_tokens,
    setup,
)
from dpl import add_head, base_loss
from dpo import dpo_loss
from generate import respond
from imh_adaptors import adaptor_logps, imh_chain, sample

SHAPES = {"14m": (128, 6, 4), "70m": (512, 6, 8), "160m": (768, 12, 12)}  # width, layers, heads


def pythia(shape, seed=0):
    """A GPT-NeoX of a Pythia shape with random weights, fp32."""
    width, layers, heads = SHAPES[shape]
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=2048,
            rotary_pct=0.25,
        )
    ).train()


def hh_pairs(n, seed):
    """Random token ids with the lengths of HH pairs: log-normal with the medians and means above, cut to 512."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        draw = rng.normal(size=3)
        draw[2] = 0.6 * draw[1] + 0.8 * draw[2]  # the two responses of a pair are of similar length
        p, c, r = (
            int(np.clip(m * np.exp(s * z), 2, hi))
            for m, s, z, hi in zip((86, 36, 33), (0.72, 0.85, 0.87), draw, (256, 256, 256))
        )
        ids = rng.integers(2, 50000, p + c + r).tolist()
        rows.append(dict(prompt_ids=ids[:p], responses=[ids[p : p + c], ids[p + c :]]))
    return rows


def naive_logps(model, rows):
    """The definition: one right-padded row per response, fp32 log-softmax of all logits.  -> (2 * rows,)"""
    texts = [(row["prompt_ids"], r) for row in rows for r in row["responses"]]
    ids = torch.zeros(len(texts), max(len(p) + len(r) for p, r in texts), dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(texts):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, : len(p) + len(r)] = 1
        scored[i, len(p) : len(p) + len(r)] = True
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~scored[:, 1:], 0).sum(-1)


def shard_bf16(model):
    """bf16 compute on fp32 weights, as load_model does for training in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (1,))
    for unit in [*model.base_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def naive_loss(model, rows, ref_model, reference=None):
    """Mean DPO loss of padded two-row batches with a live reference, or with reference log-probs if given."""
    if reference is None:
        with torch.no_grad():
            reference = naive_logps(ref_model, rows).view(-1, 2)
    return dpo_loss(
        *naive_logps(model, rows).view(-1, 2).unbind(1), *reference.unbind(1), 0.1
    ).mean()


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


def finish(model, optimizer):
    """Clip, update, clear -> the gradient norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


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


def agree(results, a, b, what="loss and gradient norm"):
    """The largest relative difference between two systems' results, as text."""
    worst = max(
        abs(x - y) / max(abs(x), 1e-9) for u, v in zip(results[a], results[b]) for x, y in zip(u, v)
    )
    return f"{what} agree to {worst:.0e}"


def dpo_step(pairs=(4, 12), rounds=2):
    """Pythia-70M shape; weights do not move (learning rate 0), so that the systems' steps compare all along."""
    for n in pairs:
        dpo_step_of(n, rounds)


def dpo_step_of(pairs, rounds):
    """The line of one number of pairs per step."""
    batches = [hh_pairs(pairs, seed) for seed in range(rounds + 1)]
    ref_model = pythia("70m").eval()
    with torch.no_grad():
        references = [naive_logps(ref_model, rows).view(-1, 2) for rows in batches]
    models = {"naive": pythia("70m"), "ours": pythia("70m"), "ours bf16": shard_bf16(pythia("70m"))}
    optimizers = {name: torch.optim.RMSprop(m.parameters(), lr=0.0) for name, m in models.items()}
    ours = lambda name: (
        lambda i: our_step(models[name], optimizers[name], batches[i], references[i])
    )
    naive = lambda bf16: (
        lambda i: naive_step(models["naive"], optimizers["naive"], batches[i], ref_model, bf16)
    )
    seconds, results = interleave(
        {
            "naive": naive(False),
            "ours": ours("ours"),
            "naive bf16": naive(True),
            "ours bf16": ours("ours bf16"),
        },
        rounds,
    )
    real = sum(
        2 * len(r["prompt_ids"]) + sum(map(len, r["responses"])) for b in batches[1:] for r in b
    )
    for name, baseline in (("ours", "naive"), ("ours bf16", "naive"), ("ours bf16", "naive bf16")):
        print(
            f"dpo_step   70m, {pairs:2d} pairs: {name:9} against {baseline:10} {ratio(seconds, baseline, name)}  "
            f"{real / sum(seconds[name]):6.0f} real tokens/s  {agree(results, baseline, name)}",
            flush=True,
        )


def peak_of(system, pairs):
    """In a fresh process: MiB that one step adds at its peak, optimiser state already there, and the loss."""
    setup(0)
    torch.set_num_threads(1)
    warm, rows = hh_pairs(2, 1), hh_pairs(pairs, 0)
    model, ref_model = pythia("70m"), pythia("70m") if system.startswith("naive") else None
    model = shard_bf16(model) if system == "ours bf16" else model
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
    for chosen in (warm, rows):
        if system.startswith("naive"):
            step = lambda r=chosen: naive_step(model, optimizer, r, ref_model, "bf16" in system)
        else:  # the reference comes from the cache; its values do not matter for memory
            step = lambda r=chosen: our_step(model, optimizer, r, torch.zeros(len(r), 2))
        if chosen is rows:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # from here on the high-water mark counts
            before = memory("VmRSS")
        step()
    print(memory("VmHWM") - before)


def memory(field):
    """A field of /proc/self/status in MiB."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) / 1024


def dpo_memory(pairs=8):
    """What a step of 8 pairs adds at its peak; one fresh process per system.  268 MiB are the gradients."""
    added = {}
    for system in ("naive", "ours", "naive bf16", "ours bf16"):
        done = subprocess.run(
            [sys.executable, __file__, "peak_of", system, str(pairs)],
            capture_output=True,
            text=True,
            check=True,
        )
        added[system] = float(done.stdout.split()[-1])
    for name in ("", " bf16"):
        naive, ours = added["naive" + name], added["ours" + name]
        print(
            f"dpo_memory 70m, {pairs} pairs: naive{name} adds {naive:.0f} MiB, ours{name} {ours:.0f} MiB: "
            f"{naive / ours:.1f}x raw, {(naive - 268) / (ours - 268):.1f}x net of the gradients",
            flush=True,
        )


def sweep(rounds=1, values=5, pairs=16):
    """Five values of beta over the same pairs: one reference pass for all, against a live reference in every step."""
    rows = hh_pairs(pairs, 0)
    chunks = [rows[i : i + 4] for i in range(0, pairs, 4)]
    ref_model, models = (
        pythia("70m").eval().requires_grad_(False),
        {n: pythia("70m") for n in ("live", "cached")},
    )
    optimizers = {name: torch.optim.RMSprop(m.parameters(), lr=0.0) for name, m in models.items()}

    @torch.no_grad()
    def reference(chunk):
        (batch,) = pack_pairs(chunk, 10**6)
        return response_logps(ref_model, batch)[0].view(-1, 2)

    def cached(_):
        references = [reference(chunk) for chunk in chunks]
        return [
            our_step(models["cached"], optimizers["cached"], chunk, ref)[0]
            for _ in range(values)
            for chunk, ref in zip(chunks, references)
        ]

    def live(_):
        return [
            our_step(models["live"], optimizers["live"], chunk, reference(chunk))[0]
            for _ in range(values)
            for chunk in chunks
        ]

    seconds, results = interleave({"live": live, "cached": cached}, rounds)
    print(
        f"sweep      70m, {pairs} pairs, {values} values of beta: one cached reference pass against live "
        f"{ratio(seconds, 'live', 'cached')}  {agree(results, 'live', 'cached', 'losses')}",
        flush=True,
    )


def dpl_step(pairs=8, rounds=2):
    """A reward model's step and scoring, 70M shape, against the released form: micro-batches of two pairs, each side a
    sequence of its own, padded to a multiple of 64.  All in fp32, or all in bf16 with fp32 losses."""
    batches = [hh_pairs(pairs, seed) for seed in range(rounds + 1)]

    def models(dtype):
        body = pythia("70m")
        add_head(body, 0.0002 * torch.randn(1, 512, generator=torch.Generator().manual_seed(0)))
        body.get_output_embeddings().requires_grad_(False)
        whole = GPTNeoXForSequenceClassification(
            GPTNeoXConfig(**body.config.to_dict() | dict(num_labels=1, pad_token_id=0))
        )
        whole.gpt_neox.load_state_dict(body.gpt_neox.state_dict())
        whole.score.load_state_dict(body.score.state_dict())
        return whole.to(dtype), body.to(dtype)

    def naive(model, optimizer, rows):
        total = 0.0
        for i in range(0, len(rows), 2):
            sides = [
                row["prompt_ids"] + row["responses"][k] for k in (0, 1) for row in rows[i : i + 2]
            ]
            width = -(-max(map(len, sides)) // 64) * 64
            ids = torch.tensor([side + [0] * (width - len(side)) for side in sides])
            rewards = model(ids, attention_mask=(ids > 0).long()).logits.float()
            total += reward_step(rewards[:2], rewards[2:], optimizer, len(rows))
        return (total, finish(model, optimizer)) if optimizer else (total,)

    def ours(model, optimizer, rows):
        total = 0.0
        for batch in pack_pairs(rows, 8192):
            rewards = (
                model.score(response_hiddens(model, batch).to(model.score.weight))
                .float()
                .view(-1, 2, 1)
            )
            total += reward_step(*rewards.unbind(1), optimizer, len(rows))
        return (total, finish(model, optimizer)) if optimizer else (total,)

    for dtype in (torch.float32, torch.bfloat16):
        both, systems = models(dtype), {}
        for name, function, model in (("naive", naive, both[0]), ("ours", ours, both[1])):
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=0.0
            )
            systems[name] = lambda i, f=function, m=model, o=optimizer: f(m, o, batches[i])
            systems[name + " scoring"] = torch.no_grad()(
                lambda i, f=function, m=model: f(m, None, batches[i])
            )
        seconds, results = interleave(systems, rounds)
        for kind, unit, per in (("", "pairs", 1), (" scoring", "responses", 2)):
            ours_kind, done = "ours" + kind, per * pairs * rounds
            print(
                f"dpl_step   70m, {pairs} pairs, {str(dtype)[6:]}:{kind:8} {ratio(seconds, 'naive' + kind, ours_kind)}  "
                f"{done / sum(seconds[ours_kind]):6.1f} {unit}/s  "
                f"{agree(results, 'naive' + kind, ours_kind, 'losses')}",
                flush=True,
            )


def reward_step(chosen, rejected, optimizer, n):
    """Loss of a micro-batch as its share of n pairs, with backward where there is an optimizer -> float"""
    loss = base_loss(chosen, rejected).sum() / n
    if optimizer:
        loss.backward()
    return loss.item()


@torch.no_grad()
def score_sums(model, rows, system):
    """Summed log-probs of all responses: one forward each, padded batches of 16 in file order, or ours.  -> list"""
    if system == "ours":
        batches = pack_pairs(rows, 8192)
        sums = torch.cat([response_logps(model, batch)[0] for batch in batches]).view(-1, 2)
        return sums[np.argsort([i for batch in batches for i in batch["index"]])].flatten().tolist()
    singles = [
        dict(prompt_ids=row["prompt_ids"], responses=[r]) for row in rows for r in row["responses"]
    ]
    size = 1 if system == "loop" else 16
    return [
        x
        for i in range(0, len(singles), size)
        for x in naive_logps(model, singles[i : i + size]).tolist()
    ]


def score(rounds=1):
    """Scoring HH-like pairs, as methods/ranking_accuracy.py does, against the loop and against padded batches of 16."""
    for shape, pairs, systems in (
        ("70m", 24, ("loop", "ours")),
        ("14m", 16, ("loop", "padded", "ours")),
    ):
        rows, model = hh_pairs(pairs, 0), pythia(shape).eval().requires_grad_(False)
        half = pythia(shape).eval().requires_grad_(False).bfloat16()
        seconds, results = interleave(
            {
                name + kind: lambda _, m=m, name=name: score_sums(m, rows, name)
                for name in systems
                for kind, m in (("", model), (" bf16", half))
            },
            rounds,
        )
        real = rounds * sum(
            2 * len(row["prompt_ids"]) + sum(map(len, row["responses"])) for row in rows
        )
        for naive in systems[:-1]:
            for kind in ("", " bf16"):
                ours = "ours" + kind
                print(
                    f"score      {shape}, {pairs} pairs: {ours:9} against {naive + kind:11} "
                    f"{ratio(seconds, naive + kind, ours)}  {real / sum(seconds[ours]):6.0f} real tokens/s  "
                    f"{agree(results, 'loop', ours, 'log-probs')} with the loop in fp32",
                    flush=True,
                )
    for name, pairs in ("loop", 64), ("padded", 64), ("ours", 64), ("ours", 256):
        done = subprocess.run(
            [sys.executable, __file__, "score_peak_of", name, str(pairs)],
            capture_output=True,
            text=True,
            check=True,
        )
        print(
            f"score      14m, {pairs} pairs: {name} adds {float(done.stdout.split()[-1]):.0f} MiB",
            flush=True,
        )


def score_peak_of(system, pairs):
    """In a fresh process: MiB that scoring adds at its peak."""
    setup(0)
    torch.set_num_threads(1)
    model = pythia("14m").eval().requires_grad_(False)
    score_sums(model, hh_pairs(1, 1), system)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    score_sums(model, hh_pairs(pairs, 0), system)
    print(memory("VmHWM") - before)


def generate(rounds=1, new=32):
    """Pythia-14M shape, sampling without adaptor: 32 prompts at once, against the library's batch and one by one."""
    model, prompts = pythia("14m").eval(), [row["prompt_ids"][:20] for row in hh_pairs(200, 0)]
    prompts = [ids for ids in prompts if len(ids) == 20][:32]
    settings = dict(do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    library = lambda ids: model.generate(
        torch.tensor(ids), attention_mask=torch.ones(len(ids), 20).long(), **settings
    )

    def ours(i):
        uniforms = torch.rand(32, new, generator=torch.Generator().manual_seed(i))
        return len(respond(model, prompts, uniforms, lambda logits: logits, -1, None))

    with torch.no_grad():
        seconds, _ = interleave(
            {
                "ours": ours,
                "batch": lambda i: len(library(prompts)),
                "one by one": lambda i: [library([ids]) for ids in prompts[:8]] and 8,
            },
            rounds,
        )
    seconds["one by one"] = [
        4 * t for t in seconds["one by one"]
    ]  # a quarter of the prompts is run
    for name in ("batch", "one by one"):
        print(
            f"generate   14m, 32 prompts x {new} tokens: ours against the library, {name:10} "
            f"{ratio(seconds, name, 'ours')}  {32 * new * rounds / sum(seconds['ours']):6.0f} tokens/s",
            flush=True,
        )


@torch.no_grad()
def smc(sizes=((20, 100), (50, 100), (100, 100), (20, 500))):
    """Twisted SMC, 14M shape, prompt of 10 tokens, a linear twist on the model's states, resampling at every step: one
    token on a reordered cache against the whole prefix at every step.  The same uniforms, so the same log Z."""
    model, prompt = pythia("14m").eval().requires_grad_(False), torch.arange(3, 13)
    twist = 0.02 * torch.randn(50304, 128, generator=torch.Generator().manual_seed(0))
    hiddens = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, x: hiddens.append(x[0][:, -1])
    )

    def run(T, K, make):
        torch.manual_seed(1)
        S = twisted_smc.smc(make(T, K), lambda s: 3.0 * (s % 2 == 0).double().mean(-1), T, K)
        return S.log_Z.tolist()

    def ours(T, K):
        cache = None

        def scores(last, ancestors):
            nonlocal cache
            if last is None:
                cache, h, logits = prefill(model, [prompt.tolist()], T, copies=K)
            else:
                reorder(cache, ancestors) if ancestors is not None else None
                h, logits = decode_step(model, cache, last)
            return logits, h @ twist.T

        return scores

    def recompute(T, K):
        ids = prompt.expand(K, -1)

        def scores(last, ancestors):
            nonlocal ids
            if last is not None:
                ids = torch.cat([ids if ancestors is None else ids[ancestors], last[:, None]], 1)
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits, hiddens.pop() @ twist.T

        return scores

    spent = {}
    for T, K in sizes:
        systems = {
            "recompute": lambda _, T=T, K=K: run(T, K, recompute),
            "ours": lambda _, T=T, K=K: run(T, K, ours),
        }
        seconds, results = interleave(systems, 1)
        spent[T, K] = seconds["ours"][0]
        print(
            f"smc        14m, T = {T:3d}, K = {K}: cache against recomputing {ratio(seconds, 'recompute', 'ours')}  "
            f"{T * K / spent[T, K]:6.0f} particle-tokens/s  {agree(results, 'recompute', 'ours', 'log Z')}",
            flush=True,
        )
        hiddens.clear()
    cache = 2 * 6 * 128 * 4  # keys and values, layers, width, bytes
    print(
        f"smc        14m: time grows {spent[100, 100] / spent[20, 100]:.1f}x from T = 20 to 100; a particle's token takes "
        f"{cache} bytes of cache (fp32)",
        flush=True,
    )


class Ids:
    """Stands in for a tokenizer: sample() asks for the size of the vocabulary and the end token."""

    eos_token_id = -1  # no response ends early, so that all systems make the same number of tokens

    def __len__(self):
        return 50304

    def __call__(self, text):  # the prompt of ctl_update
        return types.SimpleNamespace(input_ids=list(range(3, 11)))

    def batch_decode(self, ids, **_):
        return [""] * len(ids)


def ctl_update(K=25, T=20, rounds=2):
    """One CTL update, 14M shape, prompt of 8 tokens, T = 20, the twist a body of its own: a cache, gradients through one
    teacher-forced pass, against the released cost model: both models over all P + T positions at every step, gradients
    through each of them.  Generous to it: only the last position's logits.  Token-forwards count a backward as two."""
    base, args = (
        pythia("14m").eval().requires_grad_(False),
        twisted_smc.Args(T=T, K=K, twist="body"),
    )
    torch.manual_seed(1)
    world = twisted_smc.lm_world(base, Ids(), args)
    world.log_phi = lambda s, o=None: 3.0 * (s % 2 == 0).double().mean(-1)
    twist = twisted_smc.make_twist(args, "ctl", world, base)
    weights, prompt, tokens = (
        [p for p in twist.parameters() if p.requires_grad],
        torch.arange(3, 11),
        {},
    )
    twist.load_state_dict(
        {name: x + 0.1 * torch.randn_like(x) for name, x in twist.state_dict().items()}
    )
    for model in (base, twist.body):
        model.gpt_neox.layers[0].register_forward_pre_hook(
            lambda _, x: tokens.update(
                {x[0].requires_grad: tokens[x[0].requires_grad] + x[0].shape[0] * x[0].shape[1]}
            )
        )

    def update(i, of):
        tokens.update({True: 0, False: 0})
        torch.manual_seed(i)
        loss = of()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        twist.zero_grad()
        return loss.item(), norm.item()

    def released():
        ids, log_p, log_q, log_psi = prompt.repeat(K, 1), [], [], []
        for t in range(T):
            buffer = torch.cat([ids, ids.new_zeros(K, T - t)], 1)
            with torch.no_grad():
                logits = base(buffer, use_cache=False, logits_to_keep=torch.tensor([7 + t])).logits[
                    :, 0
                ]
            psi = twist(twist.body.base_model(buffer, use_cache=False).last_hidden_state[:, 7 + t])
            joint = (logits + psi).log_softmax(-1)
            s = sample_tokens(joint.detach(), torch.rand(K, dtype=torch.float64))[0][
                :, None
            ]  # our uniforms
            log_p.append(logits.log_softmax(-1).gather(1, s)[:, 0].double())
            log_q.append(joint.gather(1, s)[:, 0].detach().double())
            log_psi.append(psi.gather(1, s)[:, 0])
            ids = torch.cat([ids, s], 1)
        h = twist.body.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, -T:]
        again, log_psi = twist(h, tokens=ids[:, 8:]), torch.stack(log_psi, -1)
        ratio = torch.stack(log_p, -1) - torch.stack(log_q, -1)
        W = (ratio.sum(-1) + world.log_phi(ids[:, 8:])).softmax(0)
        w_neg = (ratio.cumsum(-1) + log_psi.detach()).softmax(0)
        return twisted_smc.ctl_loss(again, W, log_psi, w_neg)

    counts, ours = {}, lambda: twisted_smc.learner_loss("ctl", world, twist, K)()

    def counted(name, of):
        def run(i):
            out = update(i, of)
            counts[name] = tokens[False] + 3 * tokens[True]
            return out

        return run

    seconds, results = interleave(
        {"ours": counted("ours", ours), "released": counted("released", released)}, rounds
    )
    print(
        f"ctl_update 14m, T = {T}, K = {K}: {ratio(seconds, 'released', 'ours')}, token-forwards {counts['released']:,} "
        f"against {counts['ours']:,}: {counts['released'] / counts['ours']:.1f}x  {agree(results, 'released', 'ours')}",
        flush=True,
    )


def peaked(shape):
    """Random weights with the head scaled, so that a next-token distribution is about as peaked as a real one's."""
    model = pythia(shape).eval().requires_grad_(False)
    model.get_output_embeddings().weight.data *= 25
    return model


@torch.no_grad()
def imh_generate(rounds=1, new=32, n=64):
    """Pythia-14M shape, 64 prompts of 20 tokens: ours in one batch, the library's generate in one batch, and as in the
    released code, two copies of one prompt per call.  Agreement: log q of the drawn tokens against the library's
    processors on teacher-forced logits."""
    prompts = [row["prompt_ids"][:20] for row in hh_pairs(400, 0) if len(row["prompt_ids"]) >= 20][
        :n
    ]
    for head, model in (
        ("peaked", peaked("14m")),
        ("flat", pythia("14m").eval().requires_grad_(False)),
    ):
        for name, adaptor in (("none", {}), ("top-p 0.9", dict(top_p=0.9))):
            if (head, name) == ("flat", "none"):
                continue  # as with the peaked head
            drawn = []

            def ours(i, adaptor=adaptor, model=model, drawn=drawn):
                u = torch.rand(
                    n, new, generator=torch.Generator().manual_seed(i), dtype=torch.float64
                )
                drawn[:] = sample(model, prompts, 1, adaptor, u, Ids())

            def library(rows, adaptor=adaptor, model=model):
                ids = torch.tensor(rows)
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    **({"top_k": 0} | adaptor),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=0,
                )

            seconds, _ = interleave(
                {
                    "ours": ours,
                    "batch": lambda _, f=library: f(prompts),
                    "released": lambda _, f=library: [f([ids, ids]) for ids in prompts[:2]],
                },
                rounds,
            )
            seconds["released"] = [
                n / 4 * t for t in seconds["released"]
            ]  # 4 of n responses are made
            worst = 0.0
            for prompt, (ids, log_q, _) in list(zip(prompts, drawn))[:4]:
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                for value in adaptor.values():
                    logits = TopPLogitsWarper(value)(None, logits)
                exact = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                worst = max(worst, (exact - torch.tensor(log_q)).abs().max().item())
            for other in ("batch", "released"):
                print(
                    f"imh_generate 14m, {head:6} head, {name:9}: ours against generate, {other:8} "
                    f"{ratio(seconds, other, 'ours')}  {n * new * rounds / sum(seconds['ours']):6.0f} tokens/s  "
                    f"log q agree to {worst:.0e}",
                    flush=True,
                )


@torch.no_grad()
def imh_score(rounds=1):
    """16 HH-like texts under prior, p_+ and p_+ with an adaptor: the released way (three forwards, a warper call per
    position) against ours; and four adaptors in one pass against one pass each."""
    prior, model = pythia("14m", seed=1).eval().requires_grad_(False), peaked("14m")
    rows = [dict(row, responses=row["responses"]) for row in hh_pairs(8, 0)]
    warper = TopPLogitsWarper(0.9)

    def released(_):
        sums = []
        for row in rows:
            for y in row["responses"]:
                ids, at = torch.tensor([row["prompt_ids"] + y]), torch.tensor(y)[:, None]
                for m, warped in ((prior, False), (model, False), (model, True)):
                    logits = m(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
                    if warped:
                        logits = torch.cat([warper(None, z[None]) for z in logits])
                    sums.append(
                        logits.log_softmax(-1).gather(1, at).clamp(min=-25).double().sum().item()
                    )
        return sums

    def ours(_, adaptors=({"top_p": 0.9},)):
        (batch,) = pack_pairs(rows, 10**6)
        before = response_logps(prior, batch)[0].double()
        tokens = adaptor_logps(model, batch, adaptors, 50304).clamp(min=-25)
        sums = tokens.new_zeros(len(tokens), len(before)).index_add(1, batch["owner"], tokens)
        return torch.cat([before[None], sums]).T.flatten().tolist()

    several = [dict(top_p=0.9), dict(top_k=50), dict(typical_p=0.9), dict(eta_cutoff=0.0009)]
    seconds, results = interleave(
        {
            "released": released,
            "ours": ours,
            "four at once": lambda i: ours(i, several),
            "one each": lambda i: [ours(i, [a]) for a in several],
        },
        rounds,
    )
    print(
        f"imh_score    14m, 16 texts, 3 distributions: ours against the released way {ratio(seconds, 'released', 'ours')}  "
        f"{agree(results, 'released', 'ours', 'log-probs')}"
    )
    each = [
        [x for one in zip(*([r[i::3] for i in (0, 1)] + [s[2::3] for s in rs])) for x in one]
        for rs in results["one each"]
        for r in rs[:1]
    ]
    worst = max(
        abs(a - b) / max(abs(a), 1e-9)
        for u, v in zip(each, results["four at once"])
        for a, b in zip(u, v)
    )
    print(
        f"imh_score    14m, 4 adaptors: one pass against one pass each {ratio(seconds, 'one each', 'four at once')}  "
        f"log-probs agree to {worst:.0e}",
        flush=True,
    )


def imh_chains():
    """Chains side by side against a Python loop over floats, over numpy elements and over tensor elements (each of a
    few chains, scaled up); the same indices."""
    for P, N in ((1000, 100), (10_000, 1000), (10_000, 10_000)):
        g = torch.Generator().manual_seed(0)
        log_w, log_u = torch.randn(N, P, generator=g).T, torch.rand(N, P, generator=g).log_().T
        times = []
        for _ in range(max(1, 3 * 10**6 // (P * N)) + 1):
            start = time.process_time()
            held = imh_chain(log_w, log_u)
            times.append(time.process_time() - start)
        ours, line = min(times), []
        for name, few, kind in (
            ("floats", 20_000 * 20 // N, torch.Tensor.tolist),
            ("numpy", 20_000 * 5 // N, torch.Tensor.numpy),
            ("tensors", 20_000 // N, list),
        ):
            few = min(P, max(1, few))
            start, found = time.process_time(), []
            for w, u in zip(kind(log_w[:few]), kind(log_u[:few])):
                states = [0]
                for i in range(1, N):
                    states.append(i if u[i] < w[i] - w[states[-1]] else states[-1])
                found.append(states)
            line.append(f"{name} {(time.process_time() - start) * P / few / ours:.0f}x")
            same = (torch.tensor(found) == held[:few]).double().mean().item()
            assert same == 1 or name == "floats" and same > 0.999, (
                same
            )  # float64 arithmetic may tip a comparison
        print(
            f"imh_chains   {P} x {N} steps: {ours:.3f} s, {ours / P / N * 1e9:.1f} ns a step; against a loop over "
            + ", over ".join(line)
            + ", same indices",
            flush=True,
        )


BENCHMARKS = {
    f.__name__: f
    for f in (
        dpo_step,
        dpo_memory,
        sweep,
        dpl_step,
        score,
        generate,
        smc,
        ctl_update,
        imh_generate,
        imh_score,
        imh_chains,
    )
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak_of"]:
        peak_of(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["score_peak_of"]:
        score_peak_of(sys.argv[2], int(sys.argv[3]))
    else:
        setup(0)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # setup's handlers wait for a training loop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        print(
            f"torch {torch.__version__}, one thread; ratios are medians over rounds, with the range"
        )
        for name in sys.argv[1:] or BENCHMARKS:
            BENCHMARKS[name]()
