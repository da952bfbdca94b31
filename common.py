"""What the methods share: log-probabilities, sampling, tokenization, data, models, processes.

Copy this file beside a method to carry the method away.  A plain `python` run is a process group
of one, so the same lines serve a laptop and torchrun.

Contents, in the order in which a reader of a paper needs them; search for `# ----`:

    log-probabilities  response_logps: log pi(y|x) of packed rows; token_logps; response_hiddens;
                       reference_logps: once, cached on disk; pair_metrics: what is logged of a pair
    sampling           prefill, decode_step, reorder: a cache of keys and values; sample_tokens
    tokenization       tokenize_pairs: rows of text -> rows of ids; pack_pairs: -> micro-batches
    data               load_pairs: rows of prompt, chosen, rejected; batch_order, subset;
                       load_prompts: rows of prompt alone
    models             load_model, load_tokenizer, save_model, clip_gradients; load_score: what
                       rates responses, a reward model or your own function
    the tiny world     its grammar, its readers and their rewards, its language model
    processes          setup, start_run, log, save_checkpoint, load_checkpoint, plot_curves,
                       say_claim: how a run ends

Names ending in logps are log-probabilities in nats, summed over a response's tokens.  Shapes: (R,)
is one value per response of a packed batch in the order chosen, rejected, chosen, ...; (M,) one per
response token, (N,) one per token of the packed row; V is the size of the vocabulary, d the width.
"""

import atexit
import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import gc
import gzip
import hashlib
import heapq
import html
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import types
import warnings
import weakref
import zlib
from pathlib import Path

# Libraries make a million objects that stay; looking for garbage among them is a third of a start.
gc.disable()

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

gc.freeze()  # nor are they looked through later, or at the end
gc.enable()

CUDA = torch.cuda.is_available()
varlen_attn = None
triton = None
if CUDA:
    try:
        from torch.nn.attention.varlen import varlen_attn  # of torch 2.10 and later
    except ImportError:
        pass  # packed rows then attend piece by piece, as on a CPU
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass  # keys and values then lie in slabs, as on a CPU
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-methods"

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # load_model itself refuses missing weights

# ---- log-probabilities
#
# A row is scored as [prompt | chosen | rejected]: the prompt is computed once, no response sees the
# other, and nothing is padded (HH pairs: 209 tokens instead of 738 for padded pairs).  Only hidden
# states that predict a response token are multiplied with the output matrix, which for small models
# costs more than the body; the logits are kept once, and backward overwrites them with their
# gradient.  Log-softmax is fp32 and sums are fp64: a bf16 softmax is off by seven nats over 512
# tokens, more than most DPO margins.  Every model is probed at first use: on a GPU a layer attends
# in one varlen call, elsewhere piece by piece; where the packed row is not exact, responses are
# scored in padded rows, which is the definition.

LOGITS_BYTES = 2**30  # logits up to here are kept for backward, beyond it made again
CHUNK = 512  # rows of logits that are made at a time where they are not kept
SCORING_VERSION = 1  # in the key of cached log-probs: raise it when scoring changes


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    segments=None,
    table=None,
    windows=None,
    scaling=None,
    sliding_window=None,
    **kwargs,
):
    """Causal attention inside each [prompt | response] of a packed row.

    query, key, value (1, heads, N, d) -> (1, N, heads, d), None

    segments lists each row's lengths: (prompt, response 1, response 2, ...).  It travels as a
    keyword through the model, not in a global, since gradient checkpointing recomputes a layer when
    another batch may have been packed.  table: the same as a VarlenTable, for one call a layer.
    windows: a list to which every layer adds its window.
    Without segments and table: the library's attention.
    """
    if windows is not None:
        windows.append(sliding_window)
    # A plain forward pass of the same model.
    if segments is None and table is None:
        kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError("capped attention scores and attention sinks are not written here")
    if table is None:
        return _piecewise_attention(query, key, value, segments, scaling), None
    return _varlen_attention(query, key, value, table, scaling, sliding_window), None


def _piecewise_attention(query, key, value, segments, scaling):
    """Packed attention with a call for each response.  No row is longer than a sliding window."""
    # The pieces of each row: prompt + first response, second response, ...  One split for all of
    # them, since slicing would make every backward write a zero tensor as long as the row.
    sizes = []
    for prompt, first, *others in segments:
        sizes += [prompt + first, *others]
    queries = query.split(sizes, dim=2)
    keys = key.split(sizes, dim=2)
    values = value.split(sizes, dim=2)
    attend = functools.partial(
        F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    out = []
    for prompt, _, *others in segments:
        # The prompt and its first response are one causal sequence.
        piece = len(out)
        out.append(attend(queries[piece], keys[piece], values[piece], is_causal=True))
        k_prompt = keys[piece][:, :, :prompt]
        v_prompt = values[piece][:, :, :prompt]
        # Each further response sees the prompt and itself.
        for n in others:
            piece = len(out)
            mask = torch.ones(n, prompt + n, dtype=torch.bool, device=query.device).tril(prompt)
            k = torch.cat([k_prompt, keys[piece]], dim=2)
            v = torch.cat([v_prompt, values[piece]], dim=2)
            out.append(attend(queries[piece], k, v, attn_mask=mask))
    return torch.cat(out, dim=2).transpose(1, 2)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


# On a GPU every new shape of a call costs a plan, and every call a launch: 130 new shapes and 6,000
# launches a step.  The varlen kernel takes all pieces of a layer at once, by cumulative lengths.

VARLEN = CUDA and varlen_attn is not None  # is its table part of a packed batch?
# Since torch 2.13 it wants to be told where heads share their keys.
VARLEN_ASKS = VARLEN and "enable_gqa" in inspect.signature(varlen_attn).parameters
VARLEN_DTYPES = (torch.bfloat16, torch.float16)  # of compute; others attend piece by piece
ROUNDED = 1024  # tokens of a packed row are rounded up to a multiple by padding
ROUNDED_KEYS = 2048  # and so are its keys
ROUNDED_PIECES = 64  # and its pieces
ROUNDED_LENGTH = 512  # and its longest piece: a compiled layer sees few shapes


@dataclasses.dataclass
class VarlenTable:
    """Where each query of a packed row finds its keys, for one attention call a layer."""

    padding: int  # tokens of padding after the packed row
    gather: torch.Tensor  # (keys,) the packed position of each key
    own: torch.Tensor  # (N,) where each packed position stands among the keys
    again: torch.Tensor  # (repetitions,) the packed positions that are repeated
    again_at: torch.Tensor  # (repetitions,) where they stand among the keys
    often: bool  # is one of them repeated more than once?
    queries: torch.Tensor  # (pieces + 1,) cumulative lengths of the pieces, int32
    keys: torch.Tensor  # (pieces + 1,) the same of their keys
    longest_query: int
    longest_key: int


def round_up(n, multiple):
    """The least multiple of `multiple` that is n or more."""
    return math.ceil(n / multiple) * multiple


def varlen_table(segments):
    """The VarlenTable of rows of lengths (prompt, response 1, response 2, ...), on the CPU.

    The packed row is cut into [prompt, response 1] [response 2] [response 3] ...  The first piece
    has its own keys.  Every other one needs the prompt's keys once more, in front of its own:

        prompt, response 1 | prompt, response 2 | prompt, response 3 | ...
    """
    gather = []
    own = []
    again = []
    again_at = []
    queries = [0]
    keys = [0]
    start = 0
    tokens = sum(map(sum, segments))
    padding = round_up(tokens, ROUNDED) - tokens

    # Row by row, the padding as the last one.
    for prompt, *responses in [*segments, (padding, 0)]:
        prompt_positions = range(start, start + prompt)
        for i, n in enumerate(responses):
            if i == 0:
                piece = range(start, start + prompt + n)  # the prompt and its first response
            else:
                again += prompt_positions
                again_at += range(len(gather), len(gather) + prompt)
                gather += prompt_positions
                piece = range(start, start + n)
            own += range(len(gather), len(gather) + len(piece))
            gather += piece
            queries.append(queries[-1] + len(piece))
            keys.append(len(gather))
            start = piece.stop
    longest_query = round_up(int(np.diff(queries).max()), ROUNDED_LENGTH)
    longest_key = round_up(int(np.diff(keys).max()), ROUNDED_LENGTH)

    # Keys beyond the last cumulative length are never read, and pieces of length 0 do nothing.
    gather = torch.tensor(_filled(gather, 0, ROUNDED_KEYS))
    queries = torch.tensor(_filled(queries, queries[-1], ROUNDED_PIECES), dtype=torch.int32)
    keys = torch.tensor(_filled(keys, keys[-1], ROUNDED_PIECES), dtype=torch.int32)
    own = torch.tensor(own)
    again = torch.tensor(again, dtype=torch.long)
    again_at = torch.tensor(again_at, dtype=torch.long)
    often = max(map(len, segments)) > 3
    lengths = (queries, keys, longest_query, longest_key)
    return VarlenTable(padding, gather, own, again, again_at, often, *lengths)


def _filled(values, value, multiple):
    """The list, and behind it `value` as often as its length needs to be a multiple."""
    further = round_up(len(values), multiple) - len(values)
    return values + [value] * further


# The gradient of index_select would be index_add, which is slow in bf16 on a GPU.  But every key
# stands once among the keys, and those of a prompt once more for each further response: of two
# responses the gradient is a selection and one addition.


@torch.library.custom_op("packed::take_keys", mutates_args=())
def take_keys(
    x: torch.Tensor,
    gather: torch.Tensor,
    own: torch.Tensor,
    again: torch.Tensor,
    again_at: torch.Tensor,
    often: bool,
) -> torch.Tensor:
    """Rows of x (N, heads, d) in the order of the keys -> (keys, heads, d)"""
    return x.index_select(0, gather)


@take_keys.register_fake
def _(x, gather, own, again, again_at, often):
    return x.new_empty((gather.shape[0], *x.shape[1:]))


@torch.library.custom_op("packed::give_back", mutates_args=())
def give_back(
    grad: torch.Tensor,
    own: torch.Tensor,
    again: torch.Tensor,
    again_at: torch.Tensor,
    often: bool,
) -> torch.Tensor:
    """The gradient of take_keys: (keys, heads, d) -> (N, heads, d)"""
    out = grad.index_select(0, own)
    repeated = grad.index_select(0, again_at)
    if often:  # a position stands in `again` several times: added in fp32 at least
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return out.to(dtype).index_add_(0, again, repeated.to(dtype)).to(grad.dtype)
    out[again] = out[again] + repeated
    return out


@give_back.register_fake
def _(grad, own, again, again_at, often):
    return grad.new_empty((own.shape[0], *grad.shape[1:]))


def _keep_table(ctx, inputs, output):
    _, _, own, again, again_at, ctx.often = inputs
    ctx.save_for_backward(own, again, again_at)


def _backward_of_take(ctx, grad):
    d_x = give_back(grad.contiguous(), *ctx.saved_tensors, ctx.often)
    return d_x, None, None, None, None, None


take_keys.register_autograd(_backward_of_take, setup_context=_keep_table)


def _varlen_attention(query, key, value, table, scaling, window):
    """Packed attention in one call.  (1, heads, N, d) each -> (1, N, heads, d)

    window: how many keys a query sees, its own included; None: all before it.
    """
    # The kernel takes (tokens, heads, d).
    where = (table.gather, table.own, table.again, table.again_at, table.often)
    q = query[0].transpose(0, 1).contiguous()
    k = take_keys(key[0].transpose(0, 1).contiguous(), *where)
    v = take_keys(value[0].transpose(0, 1).contiguous(), *where)

    # Causal, with the last query at the last key; several heads may share their keys.
    options = {"scale": scaling, "window_size": (-1, 0)}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if query.shape[1] != key.shape[1] and VARLEN_ASKS:
        options["enable_gqa"] = True
    lengths = (table.queries, table.keys, table.longest_query, table.longest_key)
    return varlen_attn(q, k, v, *lengths, **options)[None]


moved_last = (None, None)  # a packed batch, and the same with its tensors on a GPU


def _on_device(batch, device):
    """The packed batch with its tensors on the device, copied once.

    They are there until the next batch is copied: a data set that is scored has many.
    """
    global moved_last
    if device.type == "cpu":
        return batch
    if moved_last[0] is not batch:
        # The tensors of the batch, and those of its table.
        moved = {}
        for name, value in batch.items():
            moved[name] = to_device(value, device) if torch.is_tensor(value) else value
        if "table" in batch:
            fields = {}
            for name, value in vars(batch["table"]).items():
                fields[name] = to_device(value, device) if torch.is_tensor(value) else value
            moved["table"] = VarlenTable(**fields)
        moved_last = (batch, moved)
    return moved_last[1]


# What walks the vocabulary.  On a CPU it goes by blocks of 8 rows, so that a block's logits stay in
# the core's cache while log-softmax, gather and exp each read them.  On a GPU two functions take
# all rows at once; compile_layers compiles them, and their fp32 copies of the logits are gone.


def _log_softmax_at(logits, targets):
    """log softmax(logits)[target], and the log of the normaliser.

    (M, V), (M,) -> (M,), (M,), both fp32
    """
    logits = logits.float()
    log_norms = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None])[:, 0] - log_norms, log_norms


def _logits_gradient(logits, log_norms, grad):
    """-grad softmax(logits), to which grad at the target is still to be added.

    (M, V), (M,), (M,) -> (M, V) in the dtype of the logits
    """
    p = (logits.float() - log_norms[:, None]).exp()
    return (-grad[:, None] * p).to(logits.dtype)


def _log_softmax_in_blocks(logits, targets):
    """_log_softmax_at on a CPU."""
    logps = torch.empty(len(logits))
    log_norms = torch.empty(len(logits))
    # The blocks of logps and log_norms are views: copy_ fills the results.
    blocks = zip(logits.split(8), targets.split(8), logps.split(8), log_norms.split(8))
    for z, target, logp, log_norm in blocks:
        log_p = torch.log_softmax(z, -1, dtype=torch.float32)
        logp.copy_(log_p.gather(1, target[:, None])[:, 0])
        log_norm.copy_(z[:, 0].float() - log_p[:, 0])  # = z_v - log p_v for every v
    return logps, log_norms


def _logits_gradient_in_blocks(logits, log_norms, grad):
    """_logits_gradient on a CPU; it overwrites the logits."""
    blocks = zip(logits.split(8), log_norms[:, None].split(8), grad[:, None].split(8))
    for z, log_norm, g in blocks:
        z.copy_((z.float() - log_norm).exp_().mul_(-g))  # in bf16 z - log_norm loses percents
    return logits


class HeadLogps(torch.autograd.Function):
    """log softmax(hidden weight^T + bias)[target] in fp32.

    hidden (M, d), weight (V, d), bias (V,) or None, targets (M,) -> (M,)

    The naive form holds several fp32 copies of the logits.  Here they exist once, in compute dtype,
    and backward turns them into their own gradient, d logit = grad (onehot - softmax).  Where they
    would exceed LOGITS_BYTES, and in scoring, they are made in chunks, and in backward made again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        logits_bytes = len(hidden) * weight.shape[0] * weight.element_size()
        keep = hidden.requires_grad and logits_bytes <= LOGITS_BYTES
        ctx.rows = CHUNK
        if keep:
            ctx.rows = max(1, len(hidden))  # one chunk, held for backward
        logps = torch.empty(len(hidden), device=hidden.device)
        log_norms = torch.empty(len(hidden), device=hidden.device)
        logits = None
        # One matrix product a chunk, one pass over its logits.
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = None  # the last chunk's memory is free before this one's is taken
            logits = F.linear(hidden[chunk], weight, bias)
            if logits.is_cuda:
                logps[chunk], log_norms[chunk] = _log_softmax_at(logits, targets[chunk])
            else:
                logps[chunk], log_norms[chunk] = _log_softmax_in_blocks(logits, targets[chunk])
        ctx.kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, bias, targets, log_norms)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, log_norms = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_bias = None
        if bias is not None:
            d_bias = torch.zeros_like(bias, dtype=torch.float32)
        # The weight's gradient: one chunk gives the product itself, several are added up in fp32.
        d_weight = None
        if len(hidden) > ctx.rows:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = ctx.kept
            ctx.kept = None  # it is overwritten below; a second backward makes it again
            if logits is None:
                logits = F.linear(hidden[chunk], weight, bias)

            # The logits become their gradient: -g softmax, then + g at the target.
            g = grad[chunk]
            if logits.is_cuda:
                logits = _logits_gradient(logits, log_norms[chunk], g)
            else:
                logits = _logits_gradient_in_blocks(logits, log_norms[chunk], g)
            at = torch.arange(len(g), device=g.device)
            logits[at, targets[chunk]] += g.to(logits.dtype)

            d_hidden[chunk] = logits @ weight
            if d_weight is None:
                d_weight = logits.T @ hidden[chunk]
            else:
                d_weight.add_(logits.T @ hidden[chunk])
            if bias is not None:
                d_bias += logits.sum(0)
        d_weight = d_weight.to(weight.dtype)
        if bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None


def token_logps(model, batch):
    """log pi(token | prompt, response so far) of every response token of a packed batch.  -> (M,)

    fp32; batch["owner"] says which response a token belongs to.  Dropout must be off: the responses
    of a row share their prompt.
    """
    # `packs` has made the two functions below methods of the model: FSDP gathers its weights only
    # inside methods that it knows.
    model = computing(model)
    if packs(model, batch):
        return model._packed_token_logps(batch)
    return model._padded_token_logps(batch)


def response_logps(model, batch):
    """log pi(response | prompt), summed over the response's tokens, and its tokens.  -> (R,), (R,)

    R responses in the batch's order: chosen, rejected, chosen, ...  Differentiable; summed in fp64,
    returned in fp32.
    """
    logps = token_logps(model, batch)
    moved = _on_device(batch, logps.device)
    owner = moved["owner"]
    counts = moved["counts"]
    sums = logps.new_zeros(len(counts), dtype=torch.float64).index_add(0, owner, logps.double())
    return sums.float(), counts


def response_hiddens(model, batch):
    """Final-norm hidden state at each response's last token, for heads of one's own.  -> (R, d)

    SystemExit for a family of models that cannot be packed.
    """
    model = computing(model)
    name = type(model).__name__
    fits = packs(model, batch)
    require(fits, f"{name}: rows cannot be packed; choose a GPT-NeoX, Llama or GPT-2 model")
    hiddens = model._packed_hiddens(batch)
    return hiddens.index_select(0, _on_device(batch, hiddens.device)["last_at"])


def _packed_hiddens(model, batch, windows=None):
    """Final-norm hidden states of the packed row, and of its padding if it has any.  -> (N, d)

    windows: see packed_attention.
    """
    # How attention learns where the pieces are: from a table, or from their lengths.
    moved = _on_device(batch, model.device)
    ids = moved["input_ids"]
    positions = moved["position_ids"]
    if model.varlen:
        table = moved["table"]
        ids = F.pad(ids, (0, table.padding))
        positions = F.pad(positions, (0, table.padding))
        pieces = {"table": table}
    else:
        pieces = {"segments": batch["segments"]}
    if windows is not None:
        pieces["windows"] = windows
    output = model.base_model(
        input_ids=ids,
        position_ids=positions,
        # A 4-D mask is taken as it is: the library builds no other.
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),
        use_cache=False,
        **pieces,
    )
    return output.last_hidden_state[0]


def _packed_token_logps(model, batch, windows=None):
    """Log-probs of the response tokens from the packed row.  -> (M,)"""
    hidden = _packed_hiddens(model, batch, windows)
    head = model.get_output_embeddings()
    moved = _on_device(batch, hidden.device)
    hidden = hidden.index_select(0, moved["score_at"])
    return HeadLogps.apply(hidden, head.weight, head.bias, moved["targets"])


def _padded_token_logps(model, batch):
    """The definition: one padded row per response, all logits.  -> (M,)"""
    texts, starts = [], []
    for row in batch["rows"]:
        for response in row["responses"]:
            texts.append(torch.tensor(row["prompt_ids"] + response))
            starts.append(len(row["prompt_ids"]))
    # Which columns are real, and which of them belong to a response?
    ids = pad_sequence(texts, batch_first=True).to(model.device)
    starts = torch.tensor(starts, device=model.device)[:, None]
    ends = torch.tensor([len(text) for text in texts], device=model.device)[:, None]
    at = torch.arange(ids.shape[1], device=model.device)
    real = at < ends
    scored = (at >= starts) & real
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    log_p = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0]
    return log_p[scored[:, 1:]]


def packs(model, batch):
    """Is the packed row exact for this model and batch?

    The model is probed once, at first use.  Attention piece by piece cuts no sliding window, so no
    row may reach beyond one; the varlen call cuts those of which the layers tell it.
    """
    if not hasattr(model, "packs"):
        _probe_packing(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(prompt + max(responses) for prompt, *responses in batch["segments"])
    cut = model.varlen and window in model.windows
    return model.packs and (window is None or longest <= window or cut)


def _probe_packing(model):
    """Set model.packs, with a line if it is False, model.varlen and model.windows.

    The functions above become methods of the model, called through the root module, where FSDP
    gathers the parameters.
    """
    for function in (_packed_hiddens, _packed_token_logps, _padded_token_logps):
        setattr(model, function.__name__, types.MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)

    # One attention call a layer where the kernel takes this model, else a call for each piece.
    name = type(model).__name__
    model.varlen = VARLEN and _compute_dtype(model) in VARLEN_DTYPES
    problem = _packing_problem(model)
    if problem and model.varlen:
        why = problem
        model.varlen = False
        problem = _packing_problem(model)
        if not problem:
            say(f"{name}: attention is computed piece by piece, because one call fails: {why}")
    model.packs = not problem
    if problem:
        say(f"{name}: responses are scored in padded rows, because packing fails: {problem}")


def _compute_dtype(model):
    """In which dtype a model computes; under FSDP that is not the dtype of its weights."""
    return getattr(model, "compute_dtype", model.dtype)


@torch.no_grad()
def _packing_problem(model):
    """Why the packed row is wrong for this model, from three short rows; "" if it is exact.

    If it is exact, the model stays on packed attention.  Sets model.windows: what its layers say of
    sliding windows.

    Wrong it is, for example, for position biases outside the library's attention interface (BLOOM),
    recurrent layers (Mamba) and logits scaled or capped after the head (Gemma 2, Cohere).
    """
    config = model.config.get_text_config()
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            return f"its logits pass through {field}"

    # What padded rows give for two responses, two longer ones, and one.
    ids = _probe_ids(model, 40)
    two = {"prompt_ids": ids[:9], "responses": [ids[9:15], ids[15:18]]}
    more = {"prompt_ids": ids[18:23], "responses": [ids[23:27], ids[27:34]]}
    one = {"prompt_ids": ids[34:36], "responses": [ids[36:40]]}
    batch = _pack([two, more, one], range(3))
    expected = model._padded_token_logps(batch)
    # Rounding moves a log-prob by less than .01 of the largest logit (bf16 knows a logit of 20 to
    # .06), a wrong mask by more than .05 of it.
    text = torch.tensor([ids], device=expected.device)
    largest = model(text, use_cache=False).logits.abs().max().item()
    half = _compute_dtype(model) in (torch.bfloat16, torch.float16)
    tolerance = largest * (3e-2 if half else 1e-5)

    # The packed row must give what the padded rows gave.
    implementation = model.config._attn_implementation
    windows = []
    try:
        model.set_attn_implementation("packed")
        found = model._packed_token_logps(batch, windows)
        model.windows = set(windows)
        worst = (found - expected).abs().max().item()
        problem = "" if worst <= tolerance else f"a log-prob differs by {worst:.1e}"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = str(error).splitlines()[0]
    if problem:
        model.set_attn_implementation(implementation)
    return problem


def reference_logps(name, tokenizer, rows, dtype, tokens_per_microbatch=8192):
    """Summed log-probs of every response under a frozen model, cached on disk.  -> (len(rows), n)

    Every row must have n responses.  The cache's key is a hash of the model's files, the token ids
    and dtype, so that another model, data set or truncation is scored anew, and a sweep over beta
    shares one entry.  Raises SystemExit if the vocabulary is not the policy's.
    """
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    why = "and the policy have different vocabularies: choose models with the same tokenizer"
    require(same, f"{name} {why}")
    path = CACHE / "reference" / f"{_reference_key(name, rows, dtype)}.logps"
    shape = (len(rows), len(rows[0]["responses"]))
    cached = on_rank0(functools.partial(_read_cached, path, shape), f"{path}: cannot be read")
    if cached is not None:
        return torch.from_numpy(cached)

    # Every process scores its share; without gradients twice the tokens fit.
    model = load_model(name, dtype)
    sums = torch.zeros(shape, device=model.device)
    for batch in pack_pairs(rows, 2 * tokens_per_microbatch):
        if stop_requested():
            raise SystemExit(143)  # SIGTERM or Ctrl-C: there is nothing to keep yet
        with torch.no_grad():
            logps, _ = response_logps(model, batch)
        sums[batch["index"]] = logps.view(len(batch["index"]), -1)
    dist.all_reduce(sums)  # every row was scored by one process, and is zero elsewhere

    values = sums.cpu().numpy().tobytes()
    data = hashlib.sha256(values).digest() + values
    on_rank0(functools.partial(write_shared, path, data), f"{path}: not written; make room")
    return sums.cpu()


def _read_cached(path, shape):
    """Cached log-probs; None if there are none, or others than were written (the checksum)."""
    if not path.exists():
        return None
    data = path.read_bytes()
    checksum, values = data[:32], data[32:]
    if hashlib.sha256(values).digest() != checksum or len(values) != 4 * math.prod(shape):
        say(f"{path}: damaged, so the reference scores these rows again")
        return None
    return np.frombuffer(values, np.float32).reshape(shape).copy()


def _reference_key(name, rows, dtype):
    """A hash of all that reference log-probs depend on."""
    key = hashlib.sha256(f"{dtype} {SCORING_VERSION}".encode())
    for file in sorted(model_folder(name).iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin"):
            key.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    for row in rows:
        key.update(json.dumps([row["prompt_ids"], row["responses"]]).encode())
    return key.hexdigest()[:32]


def pair_metrics(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """What every preference method logs of each pair.  Four (B,) log-probs -> dict of (B,)

    The names are those of TRL.  Implicit rewards are beta log pi/pi_ref in nats.  In accuracies a
    tie counts half: equal models have reward accuracy 1/2.  Pairs that the reference ranks right (a
    tie is right, as in Eq. 1 of the ranking paper) are kept or lost, others are fixed or missed.
    """
    chosen = chosen_logps.detach()
    rejected = rejected_logps.detach()
    chosen_reward = beta * (chosen - ref_chosen_logps)
    rejected_reward = beta * (rejected - ref_rejected_logps)

    # Which pairs are ranked right, before training and now?
    before = ref_chosen_logps >= ref_rejected_logps
    after = chosen >= rejected
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": wins(chosen_reward, rejected_reward),
        "ranking_accuracy": wins(chosen, rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    # The four shares of Fig. 2 of the ranking paper.
    metrics["kept"] = before & after
    metrics["lost"] = before & ~after
    metrics["fixed"] = ~before & after
    metrics["missed"] = ~before & ~after
    return metrics


def wins(a, b):
    """1 where a > b, 1/2 where they are equal, 0 elsewhere; tensors of one shape."""
    return (1 + torch.sign(a - b)) / 2


# ---- sampling
#
# A prompt runs once, however many slots continue it; from then on a step is one token a slot.  The
# keys and values lie in slabs that are as long as the sequences will be: a step writes one column,
# nothing is copied.  Resampling overwrites the slots of dead particles only, survivors stay where
# they are.  Chance is an argument: a draw takes one uniform a row, and its log-prob comes from the
# very scores that it was drawn from: scored a second time, a token could round to the other side of
# a filter's edge, and its log-prob would be -inf.
# Families whose state is no list of keys and values (Mamba, RWKV, hybrids) are found by a probe,
# and get whole prefixes at every step: slow and exact.


class Slab(DynamicLayer):
    """A layer's keys and values, preallocated: (slots, heads, columns, head_dim) each.

    layer: the cache layer of the prompts.  prompt_of_slot (slots,): the prompt that each slot goes
    on from.  room: empty columns to append.
    """

    def __init__(self, layer, prompt_of_slot, room):
        super().__init__()
        columns = layer.keys.shape[2]
        self.key_slab = F.pad(layer.keys[prompt_of_slot], (0, 0, 0, room))
        self.value_slab = F.pad(layer.values[prompt_of_slot], (0, 0, 0, room))
        self.keys = self.key_slab[:, :, :columns]
        self.values = self.value_slab[:, :, :columns]
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        """Write the new columns; what attention sees are views of the slabs, no copies.

        There may be fewer slots than at first: `reorder` leaves as many as it has ancestors.
        """
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        self.keys = self.key_slab[: len(keys), :, :end]
        self.values = self.value_slab[: len(keys), :, :end]
        self.keys[:, :, start:] = keys
        self.values[:, :, start:] = values
        return self.keys, self.values


class WholePrefixes:
    """In place of a cache: the ids of every slot, run from their start at every step."""

    def __init__(self, texts):
        self.texts = texts  # a list of ids for each slot


# On a GPU every token's keys and values fill a row of a pool, and a table names the rows of each
# slot: resampling copies the table, and slots that share ancestors read the same rows.
# This follows a prototype that ran on an H200.  As it stands here it has run on CPUs alone, with a
# loop in the place of the kernel, and the kernel in Triton's interpreter.
POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 128  # numbers of a key: what the prototype's kernel was checked with
HEADS = 2  # of one program of the kernel
TOKENS = 8  # that it reads at a time: a program is one warp, small since loading takes the time
FEWEST_SLOTS = 16  # for which a step is captured
MOST_CAPTURED = 8  # steps of a pool, for several numbers of slots
POOLS = weakref.WeakKeyDictionary()  # the last pool of each model, for its next batch


class PoolLayer(DynamicLayer):
    """A layer's keys and values, a row for each token: (rows, heads, head_dim) each.

    like: the cache layer of the prompts, for its sizes.  where: the Pool's.
    """

    def __init__(self, like, rows, where):
        super().__init__()
        _, heads, _, head_dim = like.keys.shape
        if head_dim > LARGEST_HEAD or like.values.shape[3] != head_dim:
            raise ValueError(f"heads of {head_dim} and {like.values.shape[3]} are not written here")
        self.keys = like.keys.new_zeros(rows, heads, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.where = where
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        """Write the rows of one new token a slot; attention sees the whole pool."""
        where = self.where[: len(keys)]
        self.keys.index_copy_(0, where, keys[:, :, 0])
        self.values.index_copy_(0, where, values[:, :, 0])
        return self.keys, self.values

    def get_seq_length(self, *args):
        return 0  # nothing may be made for all rows of a pool, such as a mask


@dataclasses.dataclass(eq=False)
class Pool:
    """Token rows for a number of slots, in tensors that captured steps read and write in place.

    The prompts come first, each once.  Step t then writes row `prompt tokens + t slots + slot`, so
    that no row is written twice: the pool holds prompt tokens + slots x new tokens.
    """

    cache: DynamicCache  # a PoolLayer for each layer
    table: torch.Tensor  # (slots, columns) int32: the rows of each slot's tokens, in their order
    used: torch.Tensor  # (slots,) int32: how many tokens a slot has
    where: torch.Tensor  # (slots,): the row of each slot's newest token
    tokens: torch.Tensor  # (slots,): the newest tokens
    addresses: list  # of the parameters that captured steps read
    captured: dict  # for a number of slots: CUDA graph, hidden states (slots, d), logits (slots, V)
    turn: weakref.ref  # the PoolTurn that has it


class PoolTurn:
    """In place of a cache: a batch's turn with a pool, which no other gets while this lives."""

    def __init__(self, pool, slots, room):
        self.pool = pool
        self.slots = slots  # of this batch; the pool may have more
        self.room = room  # steps left
        pool.turn = weakref.ref(self)


def attend_kernel(
    q, keys, values, table, used, out, scale, columns, heads, group,
    D: "tl.constexpr", PADDED: "tl.constexpr", HEADS: "tl.constexpr", TOKENS: "tl.constexpr",
):  # fmt: skip
    """Attention of one query a slot over the rows that its table names: a running softmax.

    q, out (n, heads, D); keys, values (rows, heads / group, D); table (slots, columns), used
    (slots,).  scale: as for powers of two.  PADDED: the power of two from D on.
    """
    # A program has one slot and HEADS heads; its vectors have HEADS x PADDED numbers.
    slot = tl.program_id(0)
    d = tl.arange(0, HEADS * PADDED)
    head = tl.program_id(1) * HEADS + d // PADDED
    d = d % PADDED
    inside = (d < D) & (head < heads)
    at_query = (slot * heads + head) * D + d
    q = tl.load(q + at_query, mask=inside, other=0.0).to(tl.float32) * scale
    q = tl.reshape(q, [HEADS, PADDED])
    used = tl.load(used + slot)

    top = tl.full([HEADS], -float("inf"), tl.float32)  # the highest score so far
    mass = tl.zeros([HEADS], tl.float32)  # the sum of 2 ** (score - top)
    total = tl.zeros([HEADS, PADDED], tl.float32)  # that of the values times these
    for start in tl.range(0, used, TOKENS):
        # Keys and values of TOKENS tokens; row 0 stands in where there are fewer.  Heads of a group
        # share theirs.
        at = start + tl.arange(0, TOKENS)
        row = tl.load(table + slot * columns + at, mask=at < used, other=0).to(tl.int64)
        row = row[:, None] * (heads // group * D) + (head // group * D + d)[None, :]
        k = tl.load(keys + row, mask=inside[None, :], other=0.0).to(tl.float32)
        k = tl.reshape(k, [TOKENS, HEADS, PADDED])
        v = tl.load(values + row, mask=inside[None, :], other=0.0).to(tl.float32)
        v = tl.reshape(v, [TOKENS, HEADS, PADDED])

        # What was summed shrinks to the new highest score.
        score = tl.sum(k * q[None], 2)
        score = tl.where((at < used)[:, None], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        score = tl.exp2(score - new_top[None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink[:, None] + tl.sum(score[:, :, None] * v, 0)
        mass = mass * shrink + tl.sum(score, 0)
        top = new_top

    total = tl.reshape(total / mass[:, None], [HEADS * PADDED])
    tl.store(out + at_query, total.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _compiled_kernel():
    return triton.jit(attend_kernel)


def attend_by_table(q, keys, values, table, used, scale):
    """Attention of one query a slot to the rows that the table names.

    q (n, heads, d); keys, values (rows, fewer heads, d); table (slots, columns), used (slots,) of
    n or more slots -> (n, heads, d)
    """
    n, heads, head_dim = q.shape
    out = torch.empty_like(q)
    group = heads // keys.shape[1]
    padded = triton.next_power_of_2(head_dim)
    grid = (n, triton.cdiv(heads, HEADS))
    scale = scale * math.log2(math.e)
    _compiled_kernel()[grid](
        q, keys, values, table, used, out, scale, table.shape[1], heads, group,
        head_dim, padded, HEADS, TOKENS, num_warps=1,
    )  # fmt: skip
    return out


def pool_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    table=None,
    used=None,
    scaling=None,
    sliding_window=None,
    **kwargs,
):
    """The library's form of attend_by_table.

    query (n, heads, 1, d); key, value: a layer's pool (rows, heads, d) -> (n, 1, heads, d), None
    """
    if sliding_window is not None or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError("windows, capped attention scores and sinks are not written here")
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    q = query[:, :, 0].contiguous()
    return attend_by_table(q, key, value, table, used, scaling)[:, None], None


AttentionInterface.register("pool", pool_attention)


def _why_no_pool(model):
    """Why a model's keys and values lie in slabs; "" where a pool may be tried."""
    config = model.config.get_text_config()
    types_of_layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.device.type != "cuda":
        return "there is no GPU"
    if triton is None:
        return "Triton is not installed"
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return "its weights are shared out to processes"
    if _compute_dtype(model) not in POOL_DTYPES:
        return f"the kernel does not take {_compute_dtype(model)}"
    if types_of_layers != {"full_attention"} or getattr(config, "attention_chunk_size", None):
        return "its layers do not all attend to all tokens"
    return ""


def _begin_turn(model, cache, lengths, copies, room):
    """A turn with a pool that holds the prompts -> PoolTurn

    cache: the prompts' own.  lengths: of the N prompts.  Each prompt gets `copies` slots.
    """
    # The pool of the batch before, where this batch fits into it; else a new one in its place.
    prompt_tokens = sum(lengths)
    slots = len(lengths) * copies
    columns = max(lengths) + room
    pool = POOLS.get(model)
    if pool is None or not _fits(pool, model, slots, prompt_tokens, columns, room):
        pool = None
        POOLS.pop(model, None)  # before there is another, so that both are never held
        pool = _make_pool(model, cache, slots, prompt_tokens, columns, room)

    # The prompts' tokens without padding, one prompt after the other.
    real = cache.positions[:, : cache.prompt_length] >= 0
    for layer, prompts in zip(pool.cache.layers, cache.layers):
        layer.keys[:prompt_tokens] = prompts.keys.transpose(1, 2)[real]
        layer.values[:prompt_tokens] = prompts.values.transpose(1, 2)[real]

    # Slots that this batch does not need have no tokens.
    lengths = torch.tensor(lengths)
    first = lengths.cumsum(0) - lengths
    column = torch.arange(pool.table.shape[1])
    table = (first[:, None] + column).masked_fill(column >= lengths[:, None], 0)
    pool.table.zero_()
    pool.table[:slots] = table.int().repeat_interleave(copies, dim=0).to(pool.table.device)
    pool.used.zero_()
    pool.used[:slots] = lengths.int().repeat_interleave(copies).to(pool.used.device)
    pool.where.copy_(torch.arange(prompt_tokens - len(pool.where), prompt_tokens))
    turn = PoolTurn(pool, slots, room)
    POOLS[model] = pool
    return turn


def _fits(pool, model, slots, prompt_tokens, columns, room):
    """Is the pool free, large enough, and made with the weights where they are now?"""
    rows = prompt_tokens + len(pool.where) * room
    large_enough = len(pool.where) >= slots and pool.table.shape[1] >= columns
    return (
        pool.turn() is None
        and large_enough
        and len(pool.cache.layers[0].keys) >= rows
        and pool.addresses == _addresses(model)
    )


def _addresses(model):
    return [weight.data_ptr() for weight in computing(model).parameters()]


def _make_pool(model, cache, slots, prompt_tokens, columns, room):
    """An empty Pool, rounded up so that a next batch with longer prompts may fit into it.

    cache: the prompts' own, for the sizes of its layers.  A line says how large it is, from 1 GiB.
    """
    rows = round_up(prompt_tokens, 1024) + slots * room
    device = cache.layers[0].keys.device
    table = torch.zeros(slots, round_up(columns, 64), dtype=torch.int32, device=device)
    where = torch.zeros(slots, dtype=torch.long, device=device)
    pool = Pool(
        cache=DynamicCache(),
        table=table,
        used=torch.zeros_like(table[:, 0]),
        where=where,
        tokens=torch.zeros_like(where),
        addresses=_addresses(model),
        captured={},
        turn=None,
    )
    pool.cache.layers = [PoolLayer(layer, rows, where) for layer in cache.layers]
    held = sum(2 * layer.keys.nbytes for layer in pool.cache.layers)
    if held >= 2**30:
        say(f"keys and values: {held / 2**30:.1f} GiB for {slots} slots of {room} new tokens")
    return pool


def _step_pool(model, turn, tokens):
    """decode_step with a pool.  Nothing in it waits for the device."""
    pool = turn.pool
    n = len(tokens)
    if turn.room == 0:
        raise IndexError("more steps than prefill was given new tokens")
    turn.room -= 1

    # The new tokens and their rows, of all slots, since a captured step has no fewer.
    pool.tokens[:n] = tokens
    pool.where += len(pool.where)
    pool.table.scatter_(1, pool.used.long()[:, None], pool.where.int()[:, None])
    pool.used += 1

    # As slots become fewer, a step for a quarter of them, as long as that has many.
    slots = turn.slots
    while slots // 4 >= max(n, FEWEST_SLOTS):
        slots //= 4
    if CUDA:
        if slots not in pool.captured:
            if len(pool.captured) == MOST_CAPTURED:
                pool.captured.clear()
            pool.captured[slots] = _capture(model, pool, slots)
        graph, hidden, logits = pool.captured[slots]
        graph.replay()
    else:
        hidden, logits = _run_in_pool(model, pool, slots)
    return hidden[:n].clone(), logits[:n].clone()  # the next replay writes over its own


def _run_in_pool(model, pool, slots):
    """Run the newest tokens of the first slots -> hidden states (slots, d), logits (slots, V).

    Run again, it writes the same rows again.
    """
    module = computing(model)
    implementation = module.config._attn_implementation
    module.set_attn_implementation("pool")
    try:
        with inputs_of_head(module) as given:
            out = module(
                pool.tokens[:slots, None],
                position_ids=(pool.used[:slots, None] - 1).long(),
                past_key_values=pool.cache,
                use_cache=True,
                logits_to_keep=1,
                table=pool.table,
                used=pool.used,
            )
    finally:
        module.set_attn_implementation(implementation)
    return given[0][:, -1], out.logits[:, -1]


def _capture(model, pool, slots):
    """Record a step -> CUDA graph, and the hidden states and logits that its replay writes."""
    # Runs on a stream of their own come first: they compile, and make what is made once.
    stream = _warming_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _run_in_pool(model, pool, slots)
        # What waits for the GPU cannot be captured, and torch does not recover from trying.
        with refusing_waits():
            _run_in_pool(model, pool, slots)
    torch.cuda.current_stream().wait_stream(stream)

    # Only this thread's calls may spoil it: that of NCCL asks for events all the time.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        hidden, logits = _run_in_pool(model, pool, slots)
    return graph, hidden, logits


@functools.cache
def _warming_stream():
    """One for all captures: cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def refusing_waits():
    """While open, an operation that makes the program wait for the GPU is a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _reorder_pool(pool, ancestors):
    """The rows of a slot's ancestor are the slot's own from now on; no key or value moves."""
    n = len(ancestors)
    pool.table[:n] = pool.table[ancestors]
    pool.used[:n] = pool.used[ancestors]


@contextlib.contextmanager
def inputs_of_head(model):
    """While open, the list that it gives collects what the output matrix is given.

    Each of these is made contiguous first.  The hidden states of the last positions are a view with
    gaps, which torch multiplies row by row where the weights are frozen: ten times as slow.

    On a CPU half of a step is this product.  A matrix packed once would make it 1.3 to 1.9 times as
    fast, but torch packs by private functions alone: what torch.utils.mkldnn makes is not packed,
    and 1.0 (width 128) to 1.4 times (512) as fast for twice the memory.
    """
    given = []

    def collect(_, inputs):
        given.append(inputs[0].contiguous())
        return (given[-1],)

    with model.get_output_embeddings().register_forward_pre_hook(collect):
        yield given


@torch.no_grad()
def _run_whole(model, texts):
    """Final-norm hidden states (n, d) and logits (n, V) at the end of n texts, no cache.

    Right padding: no causal model sees it.
    """
    hidden, logits = [], []
    for start in range(0, len(texts), 64):
        group = [torch.tensor(text) for text in texts[start : start + 64]]
        ids = pad_sequence(group, batch_first=True).to(model.device)
        lengths = torch.tensor([len(text) for text in group], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        with inputs_of_head(model) as given:
            out = model(ids, attention_mask=mask.long(), use_cache=False)
        row = torch.arange(len(group), device=ids.device)
        hidden.append(given[0][row, lengths - 1])
        logits.append(out.logits[row, lengths - 1])
    return torch.cat(hidden), torch.cat(logits)


def _probe_decoding(model):
    """Set model.decodes: does the cache give what whole prefixes give?  A line if it does not.

    Sets model.pools: is the cache a pool?  On a GPU a line if it is not.
    """
    why = _why_no_pool(model)
    model.pools = not why
    problem = _decoding_problem(model)
    if problem and model.pools:
        why = problem
        model.pools = False
        problem = _decoding_problem(model)
    model.decodes = not problem
    name = type(model).__name__
    if why and not problem and model.device.type == "cuda":
        say(f"{name}: keys and values lie in slabs, and steps are not captured: {why}")
    if problem:
        say(f"{name}: every step runs the whole prefix, because its cache fails: {problem}")


@torch.no_grad()
def _decoding_problem(model):
    """Why the cache is wrong, from two prompts, two steps and an exchange; "" if it is exact."""
    ids = _probe_ids(model, 16)
    texts = [ids[:9], ids[9:13]]
    try:
        cache, _, _ = _prefill_cache(model, texts, 2, copies=1)
        decode_step(model, cache, torch.tensor(ids[13:15], device=model.device))
        reorder(cache, torch.tensor([1, 0], device=model.device))
        _, found = decode_step(model, cache, torch.tensor([ids[15], ids[0]], device=model.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # hybrids fail in many ways
        return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else "an error"
    swapped = [texts[1] + [ids[14], ids[15]], texts[0] + [ids[13], ids[0]]]
    _, expected = _run_whole(model, swapped)
    worst = (found.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().clamp(min=1.0).item()
    tolerance = scale * (1e-4 if model.dtype == torch.float32 else 5e-2)
    return "" if worst <= tolerance else f"a logit differs by {worst:.1e}"


def _probe_ids(model, n):
    """n arbitrary token ids that every vocabulary has."""
    vocabulary = min(model.config.get_text_config().vocab_size, 256)
    return [(7 * i * i + 3 * i + 1) % vocabulary for i in range(n)]


@torch.no_grad()
def prefill(model, prompts, max_new_tokens, copies=1):
    """Run N lists of ids of any lengths, once each.

    Each prompt gets `copies` slots: slot i goes on from prompt i // copies.
    -> cache, (N copies, d) final-norm hidden states and (N copies, V) logits of the last prompt
    position.  SystemExit: a prompt without tokens.
    """
    for number, prompt in enumerate(prompts):
        require(
            len(prompt) > 0,
            f"prompt {number} has no tokens: begin it with a BOS token, or drop it",
        )
    if not hasattr(model, "decodes"):
        _probe_decoding(model)
    if model.decodes:
        return _prefill_cache(model, prompts, max_new_tokens, copies)
    hidden, logits = _run_whole(model, prompts)
    slots = torch.arange(len(prompts), device=model.device).repeat_interleave(copies)
    cache = WholePrefixes([list(prompts[i]) for i in slots.tolist()])
    return cache, hidden[slots], logits[slots]


def _prefill_cache(model, prompts, max_new_tokens, copies):
    """prefill with keys and values."""
    texts = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(texts, batch_first=True, padding_side="left").to(model.device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)
    pads = ids.shape[1] - lengths

    # The prompts' own cache, with what a step needs to know of its columns.
    cache = DynamicCache()
    cache.prompt_length = ids.shape[1]  # columns
    cache.padded = bool(pads.any())
    columns = torch.arange(ids.shape[1] + max_new_tokens, device=ids.device)
    cache.positions = columns - pads  # (N, columns), of each column's token; below 0: padding
    hidden, logits = _step_cache(model, cache, ids)

    # The same for each slot: in a pool, or a row for each.
    cache.prompts = torch.arange(len(prompts), device=ids.device).repeat_interleave(copies)
    if model.pools:
        numbers = [len(prompt) for prompt in prompts]
        turn = _begin_turn(model, cache, numbers, copies, max_new_tokens)
        return turn, hidden[cache.prompts], logits[cache.prompts]
    cache.layers = [Slab(layer, cache.prompts, max_new_tokens) for layer in cache.layers]
    cache.positions = cache.positions[cache.prompts]
    return cache, hidden[cache.prompts], logits[cache.prompts]


@torch.no_grad()
def decode_step(model, cache, tokens):
    """Append a token to every slot.  (n,) -> (n, d) final-norm hidden states, (n, V) next logits"""
    if isinstance(cache, WholePrefixes):
        for text, token in zip(cache.texts, tokens.tolist()):
            text.append(token)
        return _run_whole(model, cache.texts)
    if isinstance(cache, PoolTurn):
        return _step_pool(model, cache, tokens)
    return _step_cache(model, cache, tokens)


def _step_cache(model, cache, tokens):
    """decode_step with keys and values; (n, t) tokens append t columns."""
    tokens = tokens.view(len(tokens), -1)
    start = cache.get_seq_length()
    at = cache.positions[:, : start + tokens.shape[1]]
    mask = {}
    if cache.padded:  # else none: attention is faster without
        mask["attention_mask"] = (at >= 0).long()
        mask["position_ids"] = at[:, start:].clamp(0)

    # What the output matrix is given: the hidden states after the final norm.
    # On a CPU this product is half of a step.  A matrix packed once would make it 1.3 to 1.9 times
    # as fast, but torch packs by private functions alone: what torch.utils.mkldnn makes is not
    # packed, and 1.0 (width 128) to 1.4 times (512) as fast for twice the memory.
    with inputs_of_head(model) as given:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **mask)
    return given[0][:, -1], out.logits[:, -1]


def head_logits(model, hidden):
    """Next-token logits (..., V) of final-norm hidden states (..., d), scaled and capped as the
    model's family does it (Cohere, Granite; Gemma 2)."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden.to(model.dtype))
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits


def stay_in_place(ancestors):
    """Permute (n,) ancestors so that survivors keep their slots, and only dead slots change.

    [2, 2, 0] becomes [0, 2, 2]: 0 and 2 stay, and the dead slot 1 goes on from 2.
    """
    # A survivor's first offspring stands in its own slot; the order of sorting finds the first.
    n = len(ancestors)
    ancestors = ancestors.sort().values
    stays = ancestors < n
    stays[1:] &= ancestors[1:] != ancestors[:-1]

    # The others, in their order, fill the dead slots.  Sorting by yes and no keeps this order, and
    # needs no number that a GPU would have to tell first.
    dead = torch.ones(n + 1, dtype=torch.int8, device=ancestors.device)
    dead.scatter_(0, ancestors.clamp(max=n), 0)
    others_first = (~stays).int().argsort(descending=True, stable=True)
    dead_first = dead[:n].argsort(descending=True, stable=True)
    slots = torch.empty_like(ancestors)
    slots[dead_first] = ancestors[others_first]
    return slots


def reorder(cache, ancestors):
    """In place: slot i goes on from slot ancestors[i].

    With fewer ancestors than slots, as many slots are left as there are ancestors.
    """
    if isinstance(cache, WholePrefixes):
        cache.texts = [list(cache.texts[i]) for i in ancestors.tolist()]
    elif isinstance(cache, PoolTurn):
        _reorder_pool(cache.pool, ancestors)
    else:
        _reorder_cache(cache, ancestors)


def _reorder_cache(cache, ancestors):
    """With keys and values: where every slot keeps its prompt, only later columns move."""
    n = len(ancestors)
    slots = torch.arange(n, device=ancestors.device)
    moved = (ancestors != slots).nonzero()[:, 0]
    same_prompt = (cache.prompts[ancestors] == cache.prompts[:n]).all()
    start = cache.prompt_length if same_prompt else 0
    for layer in cache.layers:
        for slab in (layer.keys, layer.values):
            slab[moved, :, start:] = slab[ancestors[moved], :, start:]
    cache.positions = cache.positions[ancestors]
    cache.prompts = cache.prompts[ancestors]


# A draw takes two steps: first a block of tokens, by the sums of the blocks' probabilities, then
# one token of that block.  So only these sums, and what is within one block, are cumulated.
DRAW_BLOCK = 256  # tokens


@dataclasses.dataclass
class DrawnBlock:
    """The block of tokens that was drawn in each of n rows; all (n, 1) but p."""

    first: torch.Tensor  # its first token
    p: torch.Tensor  # (n, DRAW_BLOCK), its tokens' probabilities, up to a factor; 0 beyond the last
    goal: torch.Tensor  # what the cumulated p must exceed at the token to be drawn
    total: torch.Tensor  # the sum of the whole row's probabilities


def rows_in_cache(scores):
    """How many rows of scores (n, V) stay in a CPU core's cache while one passes over them."""
    if scores.is_cpu:
        return max(8, 2**19 // scores.shape[1])
    return max(1, len(scores))


def draw_block(p, uniforms):
    """Probabilities (n, V), up to a factor, and uniforms (n,) -> DrawnBlock"""
    # The cumulated sums of the blocks, in float64; the last block is a shorter one, or empty.
    V = p.shape[1]
    blocks = V // DRAW_BLOCK
    sums = p[:, : blocks * DRAW_BLOCK].unflatten(1, (blocks, DRAW_BLOCK)).sum(-1)
    rest = p[:, blocks * DRAW_BLOCK :].sum(-1, keepdim=True)
    cdf = torch.cat([torch.zeros_like(rest), sums, rest], 1).cumsum(-1, dtype=torch.float64)

    # Block i is drawn if the goal lies between cdf[i] and cdf[i + 1].
    total = cdf[:, -1:]
    goal = below(uniforms[:, None] * total, total)
    block = torch.searchsorted(cdf[:, 1:].contiguous(), goal, right=True)
    first = block * DRAW_BLOCK
    columns = first + torch.arange(min(V, DRAW_BLOCK), device=p.device)
    inside = p.gather(1, columns.clamp(max=V - 1)) * (columns < V)
    return DrawnBlock(first, inside, goal - cdf.gather(1, block), total)


def below(goal, total):
    """The goal, or the next number below the total: so that something with mass is drawn."""
    return goal.minimum(torch.nextafter(total, torch.zeros_like(total)))


def draw_in_block(drawn):
    """DrawnBlocks of all rows, in a list -> tokens (n,), their log-probs (n,)"""
    first = torch.cat([block.first for block in drawn])
    p = torch.cat([block.p for block in drawn])
    goal = torch.cat([block.goal for block in drawn])
    total = torch.cat([block.total for block in drawn])
    cdf = p.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(cdf, below(goal, cdf[:, -1:]), right=True)
    log_probs = (p.gather(1, place) / total).log().to(p.dtype)
    return (first + place)[:, 0], log_probs[:, 0]


def sample_tokens(scores, uniforms):
    """Inverse CDF of softmax(scores), one uniform a row.

    (n, V), (n,) -> tokens (n,), their log-probs (n,)

    Scores may be unnormalised, or -inf; a token without mass is never drawn, whatever the rounding.
    """
    n = rows_in_cache(scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    drawn = []
    for rows, u in zip(scores.split(n), uniforms.split(n)):
        drawn.append(draw_block(rows.softmax(-1, dtype=dtype), u))
    return draw_in_block(drawn)


def log_sum_exp(scores):
    """(n, V) -> (n,), a few rows at a time, which stay in the CPU's cache."""
    return torch.cat([rows.logsumexp(-1) for rows in scores.split(rows_in_cache(scores))])


def tempered(logits, T):
    """Logits (n, V) divided by a temperature; up to a constant, so that the largest becomes 0."""
    if T == 1:
        return logits
    return (logits - logits.amax(-1, keepdim=True)) / T  # a large score would lose digits


def sample_kept(scores, uniforms, filters, kept_set):
    """sample_tokens from the tokens that filters keep.

    filters, kept_set: as for `kept_by_all`.
    -> tokens (n,), their log-probs (n,), and the log-sum-exp (n,) of each row of scores
    SystemExit: a row of scores is no distribution.
    """
    highest = scores.amax(-1, keepdim=True)
    require_mass(highest, filters)
    n = rows_in_cache(scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    drawn, log_sums = [], []
    for rows, high, u in zip(scores.split(n), highest.split(n), uniforms.split(n)):
        # The likeliest token's score less its log-prob is the log-sum-exp of its row.
        p = rows.softmax(-1, dtype=dtype)
        log_sum = high - p.amax(-1, keepdim=True).log()
        if filters:
            p = p * kept_by_all(rows - log_sum, p, filters, kept_set)
        drawn.append(draw_block(p, u))
        log_sums.append(log_sum)
    tokens, log_probs = draw_in_block(drawn)
    return tokens, log_probs, torch.cat(log_sums)[:, 0]


def require_mass(highest, filters):
    """SystemExit: rows whose highest score is -inf or nan, from which nothing can be drawn."""
    empty = int((~highest.isfinite()).sum())
    problem = f"adaptor {filters} keeps nothing at {empty} of {highest.numel()} positions: "
    problem += "the logits there are -inf or nan; check the model and --dtype"
    require(empty == 0, problem)


def kept_by_all(log_pi, p, filters, kept_set):
    """The tokens that are left by several filters, each of which acts on what the last one left.

    log_pi, p (n, V): log-probs and probabilities.  filters: {name: value}, in their order.
    kept_set(log_pi, p, name, value): the tokens that one filter keeps.
    -> (n, V), 1.0 for the tokens that are kept, else 0.0
    """
    kept = None
    for name, value in filters.items():
        if kept is None:
            kept = kept_set(log_pi, p, name, value)
        else:
            log_pi = log_pi.masked_fill(kept == 0, -math.inf).log_softmax(-1)
            kept = kept * kept_set(log_pi, log_pi.exp(), name, value)
    return kept


# What filters have in common.  None of them sorts a long row: of tokens of equal cost, those with
# the lowest index come first, so that a kept set is always the same.

SHORT_ROW = 1024  # tokens; sorting so few is faster than a histogram
BINS_A_NAT = 128
BINS = 64 * BINS_A_NAT  # of a histogram by cost; the last bin has all costs from 64 nats on


def at_most(values, limit):
    """1.0 where values (n, V) <= limit (n, 1), else 0.0"""
    if values.is_cpu:  # numpy compares several times as fast as torch
        return torch.from_numpy((values.numpy() <= limit.numpy()).astype(np.float32))
    return (values <= limit).float()


def cheapest(cost, k):
    """The k tokens of least cost.  (n, V) -> 1.0 for these tokens, else 0.0"""
    cost = cost.float()
    k = min(k, cost.shape[1])
    if cost.is_cpu:
        limit = torch.from_numpy(np.partition(cost.numpy(), k - 1)[:, k - 1 : k])
    else:
        limit = cost.topk(k, largest=False).values[:, -1:]
        # Where several tokens have the largest kept cost, the first ones of them.
        cheaper = cost < limit
        ties = cost == limit
        room = k - cheaper.sum(-1, keepdim=True)
        return (cheaper | (ties & (ties.cumsum(-1) <= room))).float()
    kept = at_most(cost, limit)

    # The same, row by row where there are more than k: few rows, and a pass less.
    surplus = kept.sum(-1).long() - k
    for row in surplus.nonzero()[:, 0].tolist():
        ties = (cost[row] == limit[row]).nonzero()[:, 0]
        kept[row, ties[len(ties) - surplus[row] :]] = 0.0
    return kept


def fewest_with_mass(cost, p, x):
    """The fewest tokens, the cheapest first, whose probabilities add up to x.

    Costs >= 0 and probabilities, (n, V) each -> 1.0 for these tokens, else 0.0

    The token that reaches x is one of them; a mass that is met to 1e-6 is met.
    """
    cost = cost.float()
    share = max(x - 1e-6, 1e-9)
    if not cost.is_cpu:
        return _fewest_by_bisection(cost, p, share)
    if cost.shape[1] <= SHORT_ROW:
        return _fewest_by_sorting(cost, p, share)

    # A histogram of the mass by cost.
    bins = (cost * BINS_A_NAT).clamp_(0, BINS - 1).long()
    mass = p.new_zeros(len(p), BINS, dtype=torch.float64).scatter_add_(1, bins, p.double())
    cdf = mass.cumsum(-1).numpy()
    kept = torch.empty_like(cost)
    for costs, p_row, cdf_row, kept_row in zip(cost.numpy(), p.numpy(), cdf, kept.numpy()):
        # In which bin is x reached?  Cheaper tokens are kept.
        goal = share * cdf_row[-1]
        edge = min(np.searchsorted(cdf_row, goal), BINS - 1)
        low = edge / BINS_A_NAT  # the costs of that bin begin here
        kept_row[:] = costs < low

        # Only the tokens of that bin are sorted.
        inside = costs >= low
        if edge < BINS - 1:
            inside &= costs < low + 1 / BINS_A_NAT
        tokens = np.flatnonzero(inside)
        tokens = tokens[np.argsort(costs[tokens], kind="stable")]
        reached = p_row[tokens].cumsum(dtype=np.float64)
        if edge > 0:
            reached += cdf_row[edge - 1]
        kept_row[tokens[: np.searchsorted(reached, goal) + 1]] = 1.0
    return kept


def _fewest_by_sorting(cost, p, share):
    """fewest_with_mass of short rows."""
    order = cost.argsort(dim=-1, stable=True)
    reached = p.gather(1, order).cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(reached, share * reached[:, -1:])
    kept = torch.arange(cost.shape[1]) <= last
    return torch.zeros_like(cost).scatter_(1, order, kept.float())


def _fewest_by_bisection(cost, p, share):
    """fewest_with_mass by passes over all tokens alone, for a GPU.  Not yet run on one."""
    # Floats >= 0 are ordered as their bits are, read as whole numbers.
    bits = cost.contiguous().view(torch.int32)
    goal = share * p.sum(-1, keepdim=True, dtype=torch.float64)
    search = _compiled_search() if cost.is_cuda else _largest_kept
    largest, below = search(bits, p, goal)

    # Of the tokens at that cost, those before which x is not reached yet.  Outside of what is
    # compiled: torch 2.11 does not compile sums along a row of 32,000 tokens.
    ties = bits == largest
    up_to = below + (p * ties).cumsum(-1, dtype=torch.float64)
    return ((bits < largest) | (ties & (up_to - p < goal))).float()


def _largest_kept(bits, p, goal):
    """The cost of the token that reaches the goal, and the mass of the cheaper ones; (n, 1) each.

    Costs as whole numbers, and probabilities, (n, V); goal (n, 1)
    """
    low = torch.zeros_like(bits[:, :1])
    high = torch.full_like(low, torch.iinfo(torch.int32).max)
    for _ in range(31):  # it is in low ... high
        middle = low + (high - low) // 2
        mass = (p * (bits <= middle)).sum(-1, keepdim=True, dtype=torch.float64)
        high = torch.where(mass >= goal, middle, high)
        low = torch.where(mass >= goal, low, middle + 1)
    return high, (p * (bits < high)).sum(-1, keepdim=True, dtype=torch.float64)


@functools.cache
def _compiled_search():
    """_largest_kept, compiled where that is possible: else each pass is several kernels."""
    return _largest_kept if _why_no_compiler() else torch.compile(_largest_kept)


def above_cutoff(log_pi, log_cutoff):
    """Tokens at least as likely as the cutoff up to rounding, and always the likeliest one.

    Log-probs (n, V), and their cutoff: a number, or (n, 1) -> 1.0 for these tokens, else 0.0
    """
    if log_pi.is_cpu:  # again numpy is the faster one
        likeliest = torch.from_numpy(log_pi.numpy().argmax(-1, keepdims=True))
    else:
        likeliest = log_pi.argmax(-1, keepdim=True)
    limit = 1e-6 - torch.as_tensor(log_cutoff, dtype=log_pi.dtype, device=log_pi.device)
    return at_most(-log_pi, limit).scatter_(1, likeliest, 1.0)


# ---- tokenization
#
# One way in: whatever a model trains on, scores or continues, and whatever a judge reads, has been
# through encode_rows.  Prompt and response of plain text are tokenised apart and joined as ids, so
# that a merge cannot cross the border and the same prompt has the same ids everywhere; one BOS at
# most goes in front, one EOS after every response.  Chat messages have the ids that the tokenizer's
# own template gives them.  A row that cannot be used is dropped with a reason that is counted.
# Packing needs no padding: rows are dealt out to micro-batches of a token budget, which is the
# memory knob and never changes a result.


class Unusable(ValueError):
    """A row that cannot be used.  Its message is the reason, which is counted."""


@dataclasses.dataclass
class Texts:
    """A row as text, ready for the tokenizer."""

    prompt: str
    responses: list  # one text each; of a chat the whole of prompt and response
    is_chat: bool  # written by the chat template, special tokens and all


def row_texts(tokenizer, row):
    """A row's prompt and responses as Texts; chat messages as the tokenizer's template writes them.

    Raises Unusable; SystemExit for chat messages and a tokenizer without a chat template.
    """
    prompt = row["prompt"]
    if "chosen" in row:
        answers = [row[key] for key in ("chosen", "rejected") if key in row]
    else:
        answers = row["responses"]

    # The text of a special token would become that token.
    for part in [prompt, *answers]:
        for text in _strings(part):
            special = _special_tokens(tokenizer).search(text)
            if special:
                raise Unusable(f"contains the special token {special[0]}")
    tools = row.get("tools")
    if any(isinstance(part, list) for part in [prompt, *answers]):
        return _chat_texts(tokenizer, prompt, answers, tools)
    if tools not in (None, "", "[]", []):
        raise Unusable("has tools, for which only chat messages have a place")
    return Texts(words(prompt), [words(answer) for answer in answers], is_chat=False)


def _strings(part):
    """All strings of a text, or of chat messages with all that is in them."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, dict):
        part = list(part.values())
    if not isinstance(part, list):
        return []
    found = []
    for one in part:
        found += _strings(one)
    return found


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer):
    """A pattern that finds any of the tokenizer's special tokens."""
    names = {token for token in tokenizer.all_special_tokens if token}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            names.add(token.content)
    if not names:
        return re.compile("(?!)")  # finds nothing
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _chat_texts(tokenizer, prompt, answers, tools):
    """row_texts of chat messages: the prompt ends with the template's cue for an answer."""
    require(
        tokenizer.chat_template,
        "the data are chat messages, but the tokenizer has no chat template: use text data, or a "
        "--model whose tokenizer has one (an -Instruct or -chat model)",
    )
    if isinstance(tools, str):  # as data sets store them
        tools = json.loads(tools)

    # The prompt ends where an answer begins; each whole goes on from there.
    chat = _messages(tokenizer, prompt, "user")
    start = _written(tokenizer, chat, tools, answer_follows=True)
    wholes = []
    for answer in answers:
        messages = chat + _messages(tokenizer, answer, "assistant")
        whole = _written(tokenizer, messages, tools, answer_follows=False)
        if not whole.startswith(start):
            if "tool_calls" in messages[-1]:
                raise Unusable("the chat template writes a tool's call without its cue for answers")
            raise Unusable("the chat template changes the prompt")
        wholes.append(whole)
    return Texts(start, wholes, is_chat=True)


def _messages(tokenizer, part, role):
    """Chat messages for the template; text as one message of that role.  Raises Unusable."""
    if not isinstance(part, list):
        return [{"role": role, "content": words(part)}]
    messages = []
    for message in part:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable("a chat message without a role")
        # In a table, a column that one message has is null in all the others.
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if content is None and "tool_calls" not in message:
            raise Unusable("a chat message without content")
        if isinstance(content, list):
            kinds = [one.get("type") for one in content if isinstance(one, dict)]
            if kinds != ["text"] * len(content):
                raise Unusable("a chat message with content that is not text")
            if not _reads_parts(tokenizer):
                content = "\n".join(one["text"] for one in content)
        messages.append({**message, "content": content})
    return messages


@functools.lru_cache(maxsize=4)
def _reads_parts(tokenizer):
    """Does the template read content in parts, or only a string?  Some write a list as it is."""
    parts = [{"type": "text", "text": "1"}]
    try:
        chat = [{"role": "user", "content": parts}]
        in_parts = tokenizer.apply_chat_template(chat, tokenize=False)
        chat = [{"role": "user", "content": "1"}]
        as_text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program: it may fail in any way
        return False
    return in_parts == as_text


def _written(tokenizer, chat, tools, answer_follows):
    """The chat as the template writes it.

    Raises Unusable if the template refuses it, or leaves out its tools or calls of tools.
    """
    try:
        text = tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=answer_follows
        )
    except Exception as error:  # a template is a program: it may fail in any way
        why = str(error).strip().partition("\n")[0]
        raise Unusable(f"chat template: {why}") from None

    # A template that does not know of tools leaves them out without a word.
    called = list(tools or [])
    for message in chat:
        called += message.get("tool_calls", [])
    for tool in called:
        if tool.get("function", tool)["name"] not in text:
            raise Unusable("the chat template does not write tools or their calls")
    return text


def _ids_of(tokenizer, texts):
    """Token ids without special tokens; in blocks, since what a tokenizer returns is far larger."""
    ids = []
    for start in range(0, len(texts), 4096):
        block = texts[start : start + 4096]
        ids += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _response_lead(tokenizer):
    """What is put before a response's text, and how many tokens of it are then taken off.

    sentencepiece puts a space before any text, which a response that continues a prompt must not
    have.  It is found by reading "1" alone and after a newline: where the ids do not just add up, a
    response is read after a newline, whose ids are dropped.
    """
    newline, one, both = _ids_of(tokenizer, ["\n", "1", "\n1"])
    if both == newline + one:
        return "", 0
    return "\n", len(newline)


@dataclasses.dataclass
class Encoded:
    """A row as token ids, nothing cut."""

    prompt_ids: list  # a BOS first, where the tokenizer or the template puts one
    responses: list  # ids of each response, its end included
    is_chat: bool  # written by the chat template; else the end is one EOS


def encode_rows(rows, tokenizer):
    """Rows of text -> for each an Encoded, or the reason (a string) why it cannot be used.

    This is the one way from text to ids, for training, scoring, judging and sampling.  Text: BOS if
    the tokenizer puts one before plain text, prompt, response, EOS.  Chat messages: the ids of
    `apply_chat_template(tokenize=True)`, of the prompt with its cue for an answer and of the whole;
    EOS is added only where the template does not end a turn with an end token.
    Raises SystemExit for a tokenizer without EOS, and for chat messages without a template.
    """
    eos = tokenizer.eos_token_id  # once: the tokenizer looks it up anew each time
    no_end = "the tokenizer has no end-of-text token (eos_token): responses could not end"
    require(eos is not None, no_end)
    lead, skip = _response_lead(tokenizer)
    texts_of_rows = []
    for row in rows:
        try:
            texts_of_rows.append(row_texts(tokenizer, row))
        except Unusable as reason:
            texts_of_rows.append(str(reason))
        except (TypeError, AttributeError, KeyError, ValueError):
            texts_of_rows.append("messages or tools of the wrong type")

    # All texts of all usable rows in one list: a tokenizer is fast on many texts at a time.
    flat = []
    for texts in texts_of_rows:
        if isinstance(texts, str):
            continue
        flat.append(texts.prompt)
        if texts.is_chat:
            flat += texts.responses
        else:
            flat += [lead + text for text in texts.responses]
    ids = iter(_ids_of(tokenizer, flat))

    # Back to rows, in the same order.
    bos = _text_bos(tokenizer)
    found = []
    for texts in texts_of_rows:
        if isinstance(texts, str):
            found.append(texts)
            continue
        prompt = next(ids)
        responses = [next(ids) for _ in texts.responses]
        if texts.is_chat:
            responses = _chat_responses(tokenizer, texts, prompt, responses)
        else:
            prompt = bos + prompt
            responses = [response[skip:] + [eos] for response in responses]
        found.append(_usable(prompt, responses, texts.is_chat))
    return found


def _text_bos(tokenizer):
    """[BOS] if the tokenizer puts it before plain text, else []."""
    plain = _ids_of(tokenizer, ["1"])[0]
    bos = [tokenizer.bos_token_id]
    if tokenizer("1")["input_ids"][: len(plain) + 1] == bos + plain:
        return bos
    return []


def _usable(prompt, responses, is_chat):
    """Encoded, or why such ids cannot be used."""
    if not prompt:
        return "empty prompt"
    if responses and min(map(len, responses)) < 2:  # nothing but the end
        return "empty response"
    return Encoded(prompt, responses, is_chat)


def _chat_responses(tokenizer, texts, prompt, wholes):
    """What follows the prompt in the ids of each chat, with EOS if the template has no end."""
    responses = []
    for text, whole in zip(texts.responses, wholes):
        response = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            # A token reaches over the border.  A sampler, which has only the prompt, could not
            # come to these ids, so the response is read apart.
            response = _ids_of(tokenizer, [text[len(texts.prompt) :]])[0]
        if not turn_ends(tokenizer).intersection(response):
            response = response + [tokenizer.eos_token_id]
        responses.append(response)
    return responses


@functools.lru_cache(maxsize=4)
def turn_ends(tokenizer):
    """The ids that end a response: EOS, and the special token that the chat template puts there."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template is None:
        return ends
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program: it may fail in any way
        return ends

    # What comes right after the answer "2"?
    after = text.rpartition("2")[2]
    special = _special_tokens(tokenizer).match(after.lstrip())
    if special:
        ends.add(tokenizer.convert_tokens_to_ids(special[0]))
    return ends


def end_tokens(model, tokenizer):
    """All ids that end a response of this model: a sorted list.

    Those of its generation_config, the tokenizer's EOS, and the chat template's end of a turn.
    """
    ends = set(turn_ends(tokenizer))
    listed = model.generation_config.eos_token_id if model.generation_config else None
    if isinstance(listed, int):
        listed = [listed]
    ends.update(listed or [])
    return sorted(ends)


def encode_prompt(prompt, tokenizer, tools=None):
    """The ids from which a response to the prompt is sampled.

    prompt: text, or chat messages.  tools: that a chat may call.  SystemExit if it cannot be used.
    """
    (found,) = encode_rows([{"prompt": prompt, "responses": [], "tools": tools}], tokenizer)
    require(not isinstance(found, str), f"the prompt {str(prompt)[:40]!r} cannot be used: {found}")
    return found.prompt_ids


def tokenize_pairs(
    rows, tokenizer, max_length=512, max_prompt_length=256, what="tokens", example=True
):
    """Rows of text -> rows of ids, those that can be used.

    -> [{"prompt_ids": ids, "responses": [ids, ...], "row": index into rows,
         "prompt_cut": bool, "responses_cut": how many of them}]

    The ids are those of `encode_rows`.  If prompt and longest response exceed max_length, the
    prompt is cut, once for all its responses, to max_prompt_length.  If they still do, responses
    are cut to max_length - max_prompt_length; a cut one has no EOS.  `what` begins the line that is
    printed; None: no line.  example=True: the run's first row is shown.
    Raises SystemExit for lengths out of range, a tokenizer without EOS, a row that is longer than
    the model's context, and if no row is left.
    """
    require(
        0 < max_prompt_length < max_length,
        f"max_prompt_length {max_prompt_length} must be in 1..max_length - 1 "
        f"(max_length is {max_length})",
    )
    lead, skip = _response_lead(tokenizer)
    bos_id = tokenizer.bos_token_id
    kept, dropped = [], collections.defaultdict(list)
    for index, found in enumerate(encode_rows(rows, tokenizer)):
        if isinstance(found, Encoded) and not found.responses:
            found = "no response"
        if isinstance(found, str):
            dropped[found].append(index + 1)
            continue
        cue = []
        if rows[index].get("cue"):
            cue = _ids_of(tokenizer, [lead + rows[index]["cue"]])[0][skip:]
        row = _fit(found, cue, bos_id, max_length, max_prompt_length)
        kept.append({**row, "row": index})
    if what:
        prompts_cut = sum(row["prompt_cut"] for row in kept)
        responses_cut = sum(row["responses_cut"] for row in kept)
        note = f"; prompts cut {prompts_cut}, responses cut {responses_cut}"
        report(what, len(kept), dropped, note)
        if example:
            show_example(tokenizer, kept[0]["prompt_ids"], kept[0]["responses"][0])
    require_context(tokenizer, kept)
    return kept


def _fit(encoded, cue, bos_id, max_length, max_prompt_length):
    """Make prompt + longest response fit: the prompt gives way first, then the responses.

    A prompt that is cut keeps its BOS and its end; or, if it has a cue ("TL;DR:", which tells what
    to do with the text before it), its start and the cue.
    """
    # The BOS stays; of the rest only so much as there is room for.
    bos = []
    whole = encoded.prompt_ids
    if whole[0] == bos_id:
        bos = whole[:1]
        whole = whole[1:]
    prompt = whole
    longest = len(bos) + max(map(len, encoded.responses))
    room = max_prompt_length - len(bos)
    if len(prompt) + longest > max_length and len(prompt) > room:
        if cue:
            head = max(room - len(cue), 0)
            prompt = prompt[:head] + cue[:room]
        else:
            prompt = prompt[len(prompt) - room :]

    # How many tokens may a response have?
    most = max_length
    if len(prompt) + longest > max_length:
        most = max_length - max_prompt_length
    return {
        "prompt_ids": bos + prompt,
        "responses": [ids[:most] for ids in encoded.responses],
        "prompt_cut": len(prompt) < len(whole),
        "responses_cut": sum(len(ids) > most for ids in encoded.responses),
    }


def require_context(tokenizer, rows, new_tokens=0, lower="--max-length"):
    """SystemExit if a row is longer than the context of the tokenizer's model (load_tokenizer).

    new_tokens: that are to be sampled after a prompt.  lower: the flag that helps.
    """
    context = tokenizer.model_max_length
    longest = 0
    for row in rows:
        response = max(map(len, row.get("responses", [])), default=0)
        longest = max(longest, len(row["prompt_ids"]) + response + new_tokens)
    problem = f"the model reads {context} tokens, but a row has up to {longest}: lower {lower}"
    require(longest <= context, problem)


_examples = []  # the example that this run has printed, if any


def show_example(tokenizer, prompt_ids, response_ids):
    """Once a run, one line: the end of a prompt ||| the start of its response, as models see it."""
    if _examples:
        return
    prompt = tokenizer.decode(prompt_ids)
    response = tokenizer.decode(response_ids)
    _examples.append(f"example: {prompt[-200:]!r} ||| {response[:200]!r}")
    say(_examples[0])


def tokenize_pair(tokenizer, row, max_length=512, max_prompt_length=256):
    """One row as in tokenize_pairs, or None if it cannot be used."""
    rows = tokenize_pairs([row], tokenizer, max_length, max_prompt_length, what=None)
    return rows[0] if rows else None


def pack_pairs(rows, tokens_per_microbatch=8192, rank=None, world=None):
    """Split tokenised rows into this process's micro-batches, the same number for every process.

    A micro-batch is one packed row without padding: [prompt | response 1 | response 2 ...] [prompt
    | ...].  Positions restart at every prompt and each response continues its prompt's positions.
    Longest rows go first, each into the emptiest micro-batch.  One exceeds the budget only if a
    single row does, or if there are too few rows for all processes to have equally many.
    rank, world: this process and how many there are; by default those of the process group.
    Fields of a micro-batch: see `_pack`.  Raises SystemExit if there are fewer rows than processes.
    """
    if world is None:
        rank, world = rank_and_world()
    require(
        len(rows) >= world,
        f"{len(rows)} rows for {world} processes, which need one each: fewer processes, more data",
    )
    # As few micro-batches as the budget allows; more while the fullest one does not fit it.
    sizes = [len(row["prompt_ids"]) + sum(map(len, row["responses"])) for row in rows]
    most = len(rows) // world
    least = math.ceil(sum(sizes) / (tokens_per_microbatch * world))
    for per_process in range(min(max(1, least), most), most + 1):
        bins = _deal_out(sizes, per_process * world)
        fullest = max(bins, key=lambda members: sum(sizes[i] for i in members))
        if sum(sizes[i] for i in fullest) <= tokens_per_microbatch:
            break
    return [_pack(rows, sorted(members)) for members in bins[rank::world]]


def _deal_out(sizes, n):
    """Indices of the sizes in n bins: the largest first, each into the emptiest bin."""
    bins = [[] for _ in range(n)]
    heap = [(0, number) for number in range(n)]  # tokens, bin
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        tokens, number = heapq.heappop(heap)
        bins[number].append(i)
        heapq.heappush(heap, (tokens + sizes[i], number))
    return bins


def _pack(rows, index):
    """One micro-batch of `rows[i] for i in index`.  Raises SystemExit for an empty prompt."""
    ids = []
    positions = []
    segments = []
    score_at = []
    targets = []
    owner = []
    counts = []
    last_at = []
    for i in index:
        row = rows[i]
        prompt = row["prompt_ids"]
        require(prompt, f"row {row.get('row')} has an empty prompt: give it one token at least")
        prompt_end = len(ids) + len(prompt) - 1  # predicts the first token of every response
        ids += prompt
        positions += range(len(prompt))
        segments.append((len(prompt), *map(len, row["responses"])))
        for response in row["responses"]:
            # The prompt predicts the first token, each token the one after it.
            score_at += [prompt_end, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            owner += [len(counts)] * len(response)
            counts.append(len(response))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            last_at.append(len(ids) - 1)
    batch = {
        "index": index,  # which rows these are
        "rows": [rows[i] for i in index],
        "segments": segments,  # each row's (prompt, response 1, response 2, ...) lengths
        "responses": len(counts),  # R
    }
    batch["input_ids"] = torch.tensor([ids])  # (1, N)
    batch["position_ids"] = torch.tensor([positions])  # (1, N)
    batch["score_at"] = torch.tensor(score_at)  # (M,) positions that predict a response token
    batch["targets"] = torch.tensor(targets)  # (M,) that token
    batch["owner"] = torch.tensor(owner)  # (M,) its response, 0 to R - 1
    batch["counts"] = torch.tensor(counts)  # (R,) tokens of each response
    batch["last_at"] = torch.tensor(last_at)  # (R,) position of its last token
    if VARLEN:
        batch["table"] = varlen_table(segments)  # for one attention call a layer
    return batch


# ---- data
#
# Every source becomes rows of prompt, chosen and rejected: text, or lists of chat messages.  The
# layouts of the papers' data are known by their columns, so that local copies work as the hub's do.
# Lists of scored answers and votes are pairs to train on, and whole items (Judged) to rank.
# Unusable rows are dropped by reason, counted, and reported in one line.  The order of training
# rows is a pure function of seed and step: resuming, the number of processes and the memory knob
# change nothing.

# name: hub id, options of load_dataset, its splits for "train" and "test"
HUB = {
    "hh": ("Anthropic/hh-rlhf", {}, "train", "test"),
    "tldr": ("openai/summarize_from_feedback", {"name": "comparisons"}, "train", "validation"),
    "tldr-sft": ("UCL-DARK/openai-tldr-filtered", {}, "train", "test"),
    "shp": ("stanfordnlp/SHP", {}, "train", "test"),
    "se": ("HuggingFaceH4/stack-exchange-preferences", {}, "train", "train"),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", {}, "train_prefs", "test_prefs"),
}
HH_PARTS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
for _part in HH_PARTS:
    HUB[f"hh-{_part}"] = ("Anthropic/hh-rlhf", {"data_dir": _part}, "train", "test")

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
CUE = "\nTL;DR:"
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "response", "text")
DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet)(\.gz)?$")
PROMPT_FILE = re.compile(r"\S.*\.(txt|jsonl?|csv|parquet)(\.gz)?")  # a whole name


def load_pairs(name, split, pairs=True):
    """Rows {"prompt", "chosen", "rejected", the source's other columns} of split "train" or "test".

    name: tiny, a key of HUB, a hub id, a .json/.jsonl/.csv/.parquet file (or .gz), or a folder of
    train.* and test.* files.  A file alone is divided: its last 5 % of rows are "test", and of a
    small one 10, or a fifth; below 20 rows, or if it is named test*, it is whole for both.  Values
    are strings or lists of {"role", "content"}.  pairs=False also admits rows without rejected
    (SFT) and rows with "responses" alone.  Unusable rows are dropped and counted.
    SystemExit: no such file, not JSON, missing column, hub not reachable, no row left.
    """
    rows, note = _source_rows(name, split)
    return _pairs_of(rows, name, split, pairs, note)


def load_split(data, test_data, split, pairs=True):
    """load_pairs of data; of test_data, unless it is "", for split "test".

    With test_data, a file of either is all training rows or all held-out rows.
    """
    name = data
    if test_data and split == "test":
        name = test_data
    if test_data and Path(name).expanduser().is_file():
        split = "all"
    return load_pairs(name, split, pairs)


def _pairs_of(rows, name, split, pairs, note):
    """load_pairs of a source's rows: the layout is the one that the first row's columns show."""
    layout = _layout(rows[0])
    kept, dropped = [], collections.defaultdict(list)
    for place, row in enumerate(rows, 1):
        columns = _columns(row)
        lacks = ""
        if pairs and layout is pair_rows:
            lacks = _missing_answer(row)
        require(not lacks, f"{name}: {split} row {place} has no {lacks!r}, only {columns}")
        try:
            found = layout(row)
        except KeyError as key:
            why = f"{name}: {split} row {place} has no {key}, only {columns}"
            raise SystemExit(why) from None
        except Unusable as reason:
            found = [str(reason)]
        except (TypeError, AttributeError, IndexError, ValueError):
            found = ["a column of the wrong type"]

        # A layout gives rows, or the reason why there is none.
        for one in found:
            reason = one if isinstance(one, str) else _why_unusable(one)
            if reason:
                dropped[reason].append(place)
            else:
                kept.append(one)
    report(f"{name} {split}", len(kept), dropped, note)
    return kept


def load_judged(name, split, lists=False):
    """Items of "train", "test" or "all" of any layout, with all answers to a prompt together.

    -> for each item a Judged, or an Unusable: why it is dropped.  lists: where a row has a pair and
    a list of responses, take the list.  SystemExit as in load_pairs; a row without a column of its
    layout.
    """
    # Rows that are parts of an item: its votes, or two of its answers.
    rows, note = _source_rows(name, split)
    layout = _layout(rows[0])
    if layout is vote_rows:
        _require_columns(name, rows, ("instruction", "output_1", "output_2", "preference"))
        return _votes_by_pair(rows)
    if layout is shp_rows:
        columns = ["post_id", "history"]
        for side in "AB":
            columns += [f"human_ref_{side}", f"score_{side}", f"created_at_utc_{side}"]
        _require_columns(name, rows, columns)
        return _answers_by_post(rows)

    # A row is an item: a list of answers, or whatever load_pairs makes a pair of.
    to_judged = _scored_list
    if layout is not list_rows:
        rows = _pairs_of(rows, name, split, False, note)
        to_judged = functools.partial(_judged_pair, lists=lists)
    found = []
    for place, row in enumerate(rows, 1):
        try:
            found.append(to_judged(row))
        except KeyError as key:
            columns = _columns(row)
            raise SystemExit(f"{name}: row {place} has no {key}, only {columns}") from None
        except Unusable as reason:
            found.append(reason)
        except (TypeError, AttributeError, ValueError):
            found.append(Unusable("a column of the wrong type"))
    return found


def _require_columns(name, rows, columns):
    """SystemExit: a row that lacks one of the columns."""
    for place, row in enumerate(rows, 1):
        for column in columns:
            only = _columns(row)
            require(column in row, f"{name}: row {place} has no {column!r}, only {only}")


ANSWERS = {"chosen", "completion", "messages", "responses"}  # columns that hold a response


def load_prompts(name, prompt=""):
    """Rows to answer, {"prompt", the source's other columns}: of --data, or the one of --prompt.

    name: as in load_pairs, of which it is the test split; or a file of prompts alone, which is
    whole: rows without a response, or .txt with one prompt a line.
    prompt: instead of name: as in prompt_row, or a file of prompts.
    A column of text may hold such a list, too.  Unusable rows are dropped and counted.
    SystemExit: as in load_pairs.
    """
    if prompt:
        named = re.fullmatch(PROMPT_FILE, prompt)
        if not named or not Path(prompt).is_file():
            problem = f"--prompt {prompt[:80]}: there is no such file; give a file or a text"
            require(not named or " " in prompt, problem)
            return [prompt_row(prompt)]
        name = prompt

    # Prompts alone, or data with responses?
    path = Path(name).expanduser()
    if re.fullmatch(PROMPT_FILE, name) and path.is_file():
        rows = _prompt_file_rows(path)
    else:
        rows, _ = _source_rows(name, "test")
    if not rows or "prompt" not in rows[0] or not ANSWERS.isdisjoint(rows[0]):
        return load_pairs(name, "test", pairs=False)

    # Those that can be used.
    kept = []
    dropped = collections.defaultdict(list)
    for place, row in enumerate(rows, 1):
        row["prompt"] = as_messages(row.get("prompt"))
        try:
            require_text(row["prompt"])
            if not words(row["prompt"]).strip():
                raise Unusable("empty prompt")
            kept.append(row)
        except Unusable as reason:
            dropped[str(reason)].append(place)
    report(f"{name} prompts", len(kept), dropped)
    return kept


def prompt_row(text):
    """The row {"prompt"}, of a chat with tools {"prompt", "tools"}, that --prompt gives.

    text: the prompt as it stands; JSON of chat messages; or JSON of such a row.
    SystemExit: what begins like JSON of chat messages is none.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and set(row) == {"prompt", "tools"}:
        return row

    prompt = as_messages(text)
    problem = "--prompt: begins like chat messages but is no JSON of them; write "
    problem += """'[{"role": "user", "content": "Hi"}]'"""
    broken = isinstance(prompt, str) and re.match(r"""\s*\[\s*\{\s*\\?['"]?role""", prompt)
    require(not broken, problem)
    return {"prompt": prompt}


def _prompt_file_rows(path):
    """The rows of a file of prompts; of a .txt, one for each line that is not blank."""
    if not re.search(r"\.txt(\.gz)?$", path.name):
        return read_rows(path)
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
        with opened as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise SystemExit(f"{path}: cannot be read: {why}") from None
    lines = text.replace("\r\n", "\n").split("\n")
    rows = [{"prompt": line} for line in lines if line.strip()]
    require(rows, f"{path}: no prompt in it; write one a line")
    return rows


def as_messages(text):
    """The chat messages that a text of JSON holds, a list of objects with a role; else the text."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(found, list) or not found:
        return text
    for message in found:
        if not isinstance(message, dict) or "role" not in message:
            return text
    return found


def show_samples(path, rows):
    """On rank 0: the first, middle and last of a file's rows {"prompt", "response"}; its path."""
    places = sorted({0, len(rows) // 2, len(rows) - 1})
    for row in [rows[i] for i in places]:
        prompt = words(row["prompt"])
        say(f"sample: {prompt[-60:]!r} ||| {row['response'][:120]!r}")
    say(f"{len(rows)} samples: {path}")


def _columns(row):
    """The names of a row's columns for a message: one line, whatever a damaged file has there."""
    return " ".join(", ".join(map(str, row)).split())[:60]


def _missing_answer(row):
    """The answer that a row lacks to be a pair, or "": a list of responses is no pair."""
    if "rejected" not in row:
        return "rejected"
    if not {"chosen", "completion", "messages"} & set(row):
        return "chosen"
    return ""


def _source_rows(name, split):
    """The rows of one split as they stand in their source, and a note for the line."""
    rows, note = _read_source(name, split)
    remedy = "put some into it"
    if Path(name).expanduser().is_dir():
        remedy = f"a folder needs {split}.jsonl, .json, .csv or .parquet"
    require(rows, f"{name}: no {split} rows; {remedy}")
    return rows, note


def _read_source(name, split):
    """_source_rows, of which there may be none."""
    if name == "tiny":
        path = tiny_folder() / "data"
    else:
        path = Path(name).expanduser()
        is_local = path.exists() or DATA_FILE.search(name)
        if name in HUB or not is_local:
            return hub_rows(name, split), ""
    if path.is_dir():
        rows = []
        for part in ("train", "test") if split == "all" else (split,):
            for file in sorted(path.glob(f"{part}[._-]*")):
                if DATA_FILE.search(file.name):
                    rows += read_rows(file)
        return rows, ""

    # A file alone holds both splits.
    rows = read_rows(path)
    held = max(len(rows) // 20, min(10, len(rows) // 5))
    if len(rows) < 20 or path.name.startswith("test") or split == "all":
        return rows, ""
    note = f"; the last {held} of the file's {len(rows)} rows are its test split"
    if split == "test":
        return rows[-held:], note
    return rows[:-held], note


def _why_unusable(row):
    """The reason to drop a row of a prompt and its answers, or "" if it is usable."""
    answers = [row[key] for key in ("chosen", "rejected") if key in row]
    if "chosen" not in row:
        answers = row["responses"]
        if not isinstance(answers, list) or not answers:
            return "responses is not a list of responses"
    try:
        for part in [row["prompt"], *answers]:
            require_text(part)
    except Unusable as reason:
        return str(reason)
    if any(map(is_empty, answers)):
        return "empty response"
    if len(answers) == 2 and answers[0] == answers[1] and "chosen" in row:
        return "chosen equals rejected"
    return ""


def require_text(part):
    """Raises Unusable unless it is text or chat messages, of characters that a tokenizer takes."""
    if part is None:
        raise Unusable("a prompt or response is null")
    if not isinstance(part, str | list):
        raise Unusable(f"a prompt or response is not text but of type {type(part).__name__}")
    if isinstance(part, list) and not all(isinstance(one, dict) for one in part):
        raise Unusable("a prompt or response is a list, but not of chat messages")
    for text in _strings(part):
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character of two halves, as "\\ud83d" in JSON
            raise Unusable("contains a lone surrogate, which is no character") from None


def is_empty(answer):
    """Neither words nor, in chat messages, a call of a tool."""
    if words(answer).strip():
        return False
    if not isinstance(answer, list):
        return True
    return not any(isinstance(one, dict) and one.get("tool_calls") for one in answer)


def number(value):
    """A finite number, or text that is one, as a float.  Raises Unusable."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Unusable(f"{str(value)[:20]!r} is not a number") from None
    if not math.isfinite(found):
        raise Unusable(f"{str(value)[:20]!r} is not a finite number")
    return found


def is_number(value):
    """Whether a value of JSON is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # never of nan


def hub_rows(name, split):
    """The rows of a hub data set.  Raises SystemExit if it cannot be downloaded."""
    import datasets

    hub_id, options, train_split, test_split = HUB.get(name, (name, {}, "train", "test"))
    wanted = {"train": train_split, "test": test_split, "all": f"{train_split}+{test_split}"}[split]
    if name == "se":  # it has one split
        wanted = train_split
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a line for each retry
    try:
        data = datasets.load_dataset(hub_id, split=wanted, **options)
    except Exception as error:  # no network, no such data set, no such split: many types
        why = str(error).splitlines()[0]
        raise SystemExit(
            f"data {hub_id} is not a local path and not to be had from the hub ({why}); "
            "give a file, or a folder of such files"
        ) from None
    if name == "se" and split != "all":  # 1 % is for testing, as in the released code
        data = data.shuffle(seed=42)
        held = len(data) // 100
        if split == "test":
            data = data.select(range(held))
        else:
            data = data.select(range(held, len(data)))
    return list(data)


def read_rows(path):
    """The rows of a .json, .jsonl, .csv or .parquet file, gzipped or not -> list of dictionaries.

    SystemExit: another kind of file, not readable, not JSON (with the line).
    """
    kind = DATA_FILE.search(path.name)
    choose = "not a .json, .jsonl, .csv or .parquet file (or one of these with .gz)"
    require(kind, f"{path}: {choose}")
    try:
        extension = kind[1]
        opened = gzip.open(path, "rb") if kind[2] else open(path, "rb")
        with opened as file:
            if extension == "parquet":
                import pyarrow.parquet

                return pyarrow.parquet.read_table(file).to_pylist()
            text = file.read().decode("utf-8-sig")
        if extension == "csv":
            return _csv_rows(text)
    except (OSError, EOFError, zlib.error, ValueError, Warning) as error:
        why = str(error).strip().partition("\n")[0][:80]
        raise SystemExit(f"{path}: cannot be read: {why}") from None
    return _json_rows(path, text)


def _csv_rows(text):
    """Rows of comma-separated values; of semicolons or tabs, where the header shows them.

    A column of numbers alone is read as numbers, unless it is one of TEXT_COLUMNS.
    Raises ValueError or a Warning for lines that do not fit the header.
    """
    import pandas

    # A separator that the header shows; text columns may hold any of them.
    header = text.partition("\n")[0]
    separator = ","
    if "," not in header and "\t" in header:
        separator = "\t"
    elif "," not in header and ";" in header:
        separator = ";"
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        table = pandas.read_csv(
            io.StringIO(text),
            sep=separator,
            dtype=str,
            keep_default_na=False,  # "NA" is a text
            index_col=False,
        )

    # Numbers where all of a column are; a text that looks like a number stays text.
    for name in table.columns:
        if name not in TEXT_COLUMNS:
            try:
                table[name] = pandas.to_numeric(table[name])
            except ValueError:
                pass  # not all are numbers: it stays text
    table = table.astype(object).where(table.notna(), None)  # what a short line lacks
    return table.to_dict("records")


def _json_rows(path, text):
    """Objects, one a line; or one list of objects."""
    if text.lstrip()[:1] == "[":
        lines = [text]
    else:
        lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            place = number + error.lineno  # a list: 0 + its line; JSON lines: the number + 1
            raise SystemExit(f"{path}:{place}: not JSON rows: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number too long, lists too deep
            raise SystemExit(f"{path}: cannot be read: {str(error)[:80]}") from None
        if isinstance(found, dict):
            found = [found]
        is_rows = isinstance(found, list) and all(isinstance(row, dict) for row in found)
        require(is_rows, f"{path}:{number + 1}: not JSON rows: a row must be an object")
        rows += found
    return rows


def _layout(row):
    """The function that reads rows of this layout, known by its columns."""
    columns = set(row)
    if {"prompt", "chosen", "rejected"} <= columns:
        return pair_rows  # whatever else it has
    if {"info", "summaries", "choice"} <= columns:
        return tldr_rows
    if {"subreddit", "title", "post", "summary"} <= columns:
        return tldr_rows
    if "human_ref_A" in columns:
        return shp_rows
    if "answers" in columns or "completions" in columns:
        return list_rows
    if {"instruction", "preference"} <= columns:
        return vote_rows
    return pair_rows


def pair_rows(row):
    """Pairs, SFT rows, chat messages, transcripts with or without prompt -> [row] or [reason]."""
    prompt = row.get("prompt")
    answers = _answers(row)
    if answers is None:  # a list of responses
        if "prompt" not in row:
            raise KeyError("prompt")
        return [row]
    for answer in answers:
        require_text(answer)
        if is_empty(answer):
            return ["empty response"]

    # Where does the prompt end?
    first = answers[0]
    if isinstance(first, list):  # as in UltraFeedback, all messages but the last are the prompt
        if not isinstance(prompt, list) and len(first) > 1:
            prompt = first[:-1]
        elif not isinstance(prompt, list):  # a prompt of text, and one message as the answer
            prompt = [{"role": "user", "content": prompt}]
    elif _is_transcript(first, prompt):  # it ends with the cue of the last turn
        prompt = first[: first.rindex(ASSISTANT) + len(ASSISTANT)]
    elif words(prompt):
        return [_with_answers(row, prompt, answers)]
    elif "prompt" in row:
        require_text(prompt)
        return ["empty prompt"]
    else:
        raise KeyError("prompt")

    # Answers that repeat the prompt lose it.
    repeats = [answer[: len(prompt)] == prompt for answer in answers]
    if any(repeats) and not all(repeats):
        return ["prompt is not a common prefix"]
    if any(repeats):
        answers = [answer[len(prompt) :] for answer in answers]
    return [_with_answers(row, prompt, answers)]


def _answers(row):
    """[chosen] or [chosen, rejected], whatever they are called; None for a list of responses."""
    if "chosen" in row:
        answers = [row["chosen"]]
    elif "completion" in row:
        answers = [row["completion"]]
    elif "messages" in row:
        answers = [row["messages"]]
    elif "responses" in row:
        return None
    else:
        raise KeyError("chosen")
    if "rejected" in row:
        answers.append(row["rejected"])
    return answers


def _is_transcript(answer, prompt):
    """HH-style: a whole dialogue as one text, whose start is the prompt if there is one."""
    if not isinstance(prompt, str | None):
        return False
    return ASSISTANT in answer and answer.startswith(prompt or "")


def _with_answers(row, prompt, answers):
    """The row with its prompt, chosen and, if there are two answers, rejected."""
    found = {**row, "prompt": prompt, "chosen": answers[0]}
    if len(answers) > 1:
        found["rejected"] = answers[1]
    return found


def tldr_rows(row):
    """Reddit posts with two compared summaries or, for SFT, one.  CNN/DM rows have a null post."""
    post = row.get("info", row)
    if post["post"] is None:
        return ["null post"]
    if "summaries" in row:
        texts = [one["text"] for one in row["summaries"]]
        best = int(number(row["choice"]))
        if len(texts) != 2 or best not in (0, 1):
            return ["not two summaries and a choice of one"]
    else:
        texts = [row.get("summary") or ""]
        best = 0
    texts = [" " + text.strip() for text in texts]
    prompt = f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}{CUE}"
    chosen = texts.pop(best)
    answers = [chosen, *texts]
    return [{**_with_answers(row, prompt, answers), "cue": CUE}]


def shp_rows(row):
    """SHP: two answers to a post; used where the scores' ratio is 2 or more."""
    answers = []
    for side in "AB":
        answers.append((number(row[f"score_{side}"]), row[f"human_ref_{side}"]))
    (low, rejected), (top, chosen) = sorted(answers)
    if top <= low or top < 2 * low:
        return ["score ratio below 2"]
    return [_dialogue(row, row["history"], chosen, rejected)]


def list_rows(row):
    """Stack Exchange, UltraFeedback: every pair of answers with different scores."""
    # The texts as training has them.
    one = _scored_list(row)
    question, responses = one.prompt, one.responses
    if one.is_html:
        question = without_tags(question)
        responses = [without_tags(response) for response in responses]

    # Every two of them are a pair.
    answers = [(number(score), text) for score, text in zip(one.scores, responses)]
    found = []
    for pair in itertools.combinations(answers, 2):
        (low, rejected), (top, chosen) = sorted(pair)
        if top > low:  # both can be negative
            found.append(_dialogue(row, question, chosen, rejected))
        else:
            found.append("equal scores")
    return found


def vote_rows(row):
    """Alpaca Farm: one rater's vote on two answers is a pair."""
    answers = [row["output_1"], row["output_2"]]
    if _preferred(row) == 1:
        answers.reverse()
    return [_dialogue(row, row["instruction"], *answers)]


def _preferred(row):
    """Which of two answers, 0 or 1, a row of Alpaca Farm is for.  Raises Unusable."""
    preference = str(row["preference"])
    if preference not in ("1", "1.0", "2", "2.0"):
        raise Unusable("a preference that is neither 1 nor 2")
    return int(float(preference)) - 1


@dataclasses.dataclass
class Judged:
    """A prompt, its responses and what was said of them, as they stand in the data."""

    prompt: str | list
    responses: list
    scores: list  # n numbers, more is better
    # What the scores are: "scores"; "votes", how many raters are for each of two; or "shares",
    # which part of the raters is.
    kind: str = "scores"
    is_question: bool = False  # the prompt is a question alone, without the cue for an answer
    is_html: bool = False  # with tags, which training takes off
    tools: list | str | None = None  # that a chat may call


def _scored_list(row):
    """UltraFeedback, Stack Exchange -> Judged: a question and its scored answers."""
    if "completions" in row:
        responses = [one["response"] for one in row["completions"]]
        scores = [one.get("overall_score") for one in row["completions"]]
        return Judged(row["instruction"], responses, scores, is_question=True)
    responses = [one["text"] for one in row["answers"]]
    scores = [one.get("pm_score") for one in row["answers"]]
    return Judged(row["question"], responses, scores, is_question=True, is_html=True)


def _judged_pair(row, lists):
    """A pair, with votes or p_chosen or without; or a list with scores or ranks -> Judged"""
    tools = row.get("tools")
    if "rejected" not in row or (lists and "responses" in row):
        scores = row.get("scores") or row.get("rewards")
        if not scores:
            scores = [-number(rank) for rank in row.get("ranks") or ()]
        return Judged(row["prompt"], row["responses"], scores, tools=tools)

    # A pair: what is known of alpha, the share of raters who are for the chosen one?
    pair = [row["chosen"], row["rejected"]]
    if row.get("p_chosen") is not None:
        p = number(row["p_chosen"])
        return Judged(row["prompt"], pair, [p, 1 - p], "shares", tools=tools)
    if row.get("votes"):
        return Judged(row["prompt"], pair, list(row["votes"]), "votes", tools=tools)
    return Judged(row["prompt"], pair, [1, 0], tools=tools)


def _votes_by_pair(rows):
    """Alpaca Farm cross-annotations: a row is one rater's vote -> [Judged or Unusable]"""
    # The votes for the first and for the second of two answers.
    votes_of = {}
    found = []
    for row in rows:
        pair = (row["instruction"], row["output_1"], row["output_2"])
        votes = votes_of.setdefault(pair, [0, 0])
        try:
            votes[_preferred(row)] += 1
        except Unusable as reason:
            found.append(reason)
    for (prompt, first, second), votes in votes_of.items():
        found.append(Judged(prompt, [first, second], votes, "votes", is_question=True))
    return found


def _answers_by_post(rows):
    """SHP: a row is two answers to a post; of equal scores the later answer is better."""
    # All answers to a post, with what orders them.
    posts = {}
    found = []
    for row in rows:
        try:
            answers = {}
            for side in "AB":
                score = (number(row["score_" + side]), number(row["created_at_utc_" + side]))
                answers[row["human_ref_" + side]] = score
        except Unusable as reason:
            found.append(reason)
            continue
        posts.setdefault((row["post_id"], row["history"]), {}).update(answers)

    # The place in the order of (score, time) serves as the score; equals have the same.
    for (_, prompt), answers in posts.items():
        order = sorted(answers.values())
        scores = [order.index(score) for score in answers.values()]
        found.append(Judged(prompt, list(answers), scores, is_question=True))
    return found


def without_tags(text):
    """The text without HTML tags, but <code> and </code>, and with its entities decoded."""
    return html.unescape(re.sub(r"</?(?!code\b)[a-zA-Z!][^>]*>", "", text)).strip()


def as_dialogue(question, answer):
    """A question and an answer as a dialogue of one turn -> prompt, response"""
    return f"{HUMAN} {question}{ASSISTANT}", f" {answer}"


def _dialogue(row, question, chosen, rejected):
    """The row with a question and two answers as a dialogue of one turn."""
    prompt, chosen = as_dialogue(question, chosen)
    _, rejected = as_dialogue(question, rejected)
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def every_turn(row):
    """A dialogue -> one row for each assistant turn, given all before it (SFT on every turn)."""
    answer = row["chosen"]
    if isinstance(row["prompt"], list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    talk = row["prompt"] + answer
    rows = []
    if isinstance(talk, list):
        for i, message in enumerate(talk):
            if message.get("role") == "assistant":
                rows.append({**row, "prompt": talk[:i], "chosen": talk[i : i + 1]})
        return rows
    for cue in re.finditer(ASSISTANT, talk):
        answer = talk[cue.end() :].split(HUMAN)[0]
        rows.append({**row, "prompt": talk[: cue.end()], "chosen": answer})
    return rows or [row]


def words(value):
    """The text of a string or of chat messages; "" if it is neither."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    texts = []
    for message in value:
        if not isinstance(message, dict):
            return ""
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):  # in parts
            texts += [part["text"] for part in content if isinstance(part, dict) and "text" in part]
    return "\n".join(texts)


def report(what, kept, dropped, note=""):
    """One line on rank 0: rows kept, and rows dropped by reason.  SystemExit if nothing is kept.

    dropped: reason -> the numbers of the rows, counted from 1; the first one is printed.
    """
    reasons = []
    for reason, numbers in sorted(dropped.items(), key=lambda item: -len(item[1])):
        reasons.append(f"{reason}: {len(numbers)}, the first is row {numbers[0]}")
    line = f"{what}: kept {kept}, dropped {sum(map(len, dropped.values()))}"
    if reasons:
        line += f" ({'; '.join(reasons)})"
    require(kept, f"{line[:180]}; no row is left")
    say(line + note)


def subset(rows, n, seed):
    """n of the rows, drawn by `seed`, in their original order; all of them if there are no more."""
    if n >= len(rows):
        return rows
    rng = np.random.default_rng([seed, 1])  # another stream than the shuffles'
    chosen = rng.permutation(len(rows))[:n]
    return [rows[i] for i in sorted(chosen)]


def optimiser_steps(n, batch_size, epochs, max_steps=0):
    """How many steps to run on n rows: max_steps, or as many whole batches as the epochs hold."""
    fits = n >= batch_size > 0
    require(fits, f"{n} rows are fewer than one batch of {batch_size}: --batch-size: 1 to {n}")
    return max_steps or epochs * n // batch_size


def plan_steps(args, n, held_out):
    """What will be trained on n rows -> args with batch size and warm-up, and the number of steps.

    Where they are None, a step has 32 rows, but at most a tenth of all, and few enough for 20
    steps; warm-up takes 10 steps, but at most a tenth of all.  held_out: how many rows are.
    One line says all this.  SystemExit: fewer rows than a batch.
    """
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = min(32, n // 10)
        if not args.max_steps:
            batch_size = min(batch_size, args.epochs * n // 20)
        _, world = rank_and_world()
        batch_size = max(batch_size, world)  # each process needs a row
    steps = optimiser_steps(n, batch_size, args.epochs, args.max_steps)
    args = dataclasses.replace(args, batch_size=batch_size)
    warm_up = ""
    if hasattr(args, "warmup_steps"):
        if args.warmup_steps is None:
            args.warmup_steps = min(10, steps // 10)
        warm_up = f", {args.warmup_steps} of them warm-up"

    # What a small data set, or flags for a large one, come to.
    unused = max(0, n - steps * batch_size)
    line = f"to train: {n} rows in {steps} steps of {batch_size}{warm_up}; {unused} rows unused"
    line += f"; held out: {held_out}"
    if steps < 20:
        line += "; fewer than 20 steps teach little: more --epochs, or a smaller --batch-size"
    elif warm_up and args.warmup_steps > steps // 10:
        line += f"; a long warm-up: --warmup-steps {steps // 10} would be a tenth"
    say(line)
    return args, steps


def batch_order(n, batch_size, step, seed):
    """Indices of the rows of global batch `step`, a pure function: resuming changes nothing.

    One shuffle of the n rows after another; a batch may reach over the end of an epoch.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_shuffle(n, seed, position // n)[position % n]) for position in positions]


@functools.lru_cache(maxsize=2)
def _shuffle(n, seed, epoch):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


# ---- models
#
# Weights are fp32 where they are trained (at lr 5e-7 a bf16 weight does not move), compute is in
# the chosen dtype, gradients are summed in fp32.  Dropout is off in policy and reference, through
# the config, since attention dropout is a number there and not a module.  Several processes shard
# every decoder layer (FSDP2); rank 0 alone reads the file: a large model is in memory once.  One
# process needs no FSDP: beside the fp32 weights stands a copy in bf16, which computes.


def model_folder(name, weights=True):
    """Folder of "tiny", of a local model or run (its model/), or of a hub id that rank 0 downloads.

    "tiny-untrained" is the tiny model before it has read a story.  weights=False: of a hub id all
    but the weights is downloaded, which is enough for a tokenizer and for a plan.
    SystemExit: neither a folder nor to be had from the hub.
    """

    def find():
        if name == "tiny":
            return tiny_folder() / "model"
        if name == "tiny-untrained":
            return untrained_folder()
        if Path(name, "model").is_dir():
            return Path(name, "model")
        if Path(name).exists():
            return Path(name)
        texts = ["*.json", "*.model", "*.txt"]
        if not weights:
            return Path(snapshot_download(name, allow_patterns=texts, ignore_patterns="*/*"))
        # .bin files only where there are no others; subfolders hold other forms of the weights.
        for files in ("*.safetensors", "*.bin"):
            wanted = [*texts, files]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
            if any(folder.glob(files)):
                break
        return folder

    problem = f"{name}: no such folder, and not to be had from the hub; give a local folder"
    return on_rank0(find, problem)


def load_tokenizer(name):
    """The tokenizer of model_folder(name); its pad token is the end token if it has none.

    Its model_max_length is the context of the model beside it.
    SystemExit: a folder without a tokenizer, for which transformers would make up an empty one, or
    with a tokenizer of more tokens than the model has embeddings.
    """
    folder = model_folder(name, weights=False)
    starts = ("tokenizer.", "vocab.", "spiece.", "tekken.")
    files = [file for file in folder.glob("*") if file.name.startswith(starts)]
    if not files and (folder / ADAPTER).exists():
        return load_tokenizer(_base_of(folder))
    missing = "has no tokenizer.json; copy the tokenizer of the model's training there"
    require(files, f"{folder}: {missing}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # broken files, unknown classes: many types
        why = str(error).strip().partition("\n")[0][:90]
        raise SystemExit(f"{folder}: not a tokenizer that can be loaded ({why})") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not (folder / "config.json").exists():
        return tokenizer

    # Do they belong together?
    config = AutoConfig.from_pretrained(folder).get_text_config()
    require(
        len(tokenizer) <= config.vocab_size,
        f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} "
        "embeddings: resize them, or copy its own tokenizer there",
    )
    context = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    if "Classification" in str(config.architectures):  # RoBERTa's first two positions are reserved
        context = min(context, tokenizer.model_max_length)
    tokenizer.model_max_length = context
    return tokenizer


ADAPTER = "adapter_config.json"
COMPILING_PAYS = 300  # steps: it takes 4 to 20 s, and saves a tenth to a fifth of a second's step
UNBOUNDED = int(1e30)  # as transformers has it


def _base_of(folder):
    """The model that a LoRA adapter was trained on."""
    return json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]


def load_model(name, dtype="float32", train=False, reshard=True):
    """A causal language model without dropout on this process's device.

    train=False: whole on every rank, frozen, in `dtype`.  train=True: fp32 weights and gradient
    sums, `dtype` compute, a slice of every layer on every rank if there are several.  Optimisers,
    clipping and checkpoints see fp32 weights and gradients either way.  reshard=False: weights that
    a training step has gathered from several ranks in forward are there until backward.
    A folder with a LoRA adapter is its base model with the adapter merged in (peft).
    SystemExit: not a model that transformers can load, weights missing or not finite, not a
    decoder-only model.
    """
    folder = model_folder(name)
    adapter = None
    if (folder / ADAPTER).exists():
        adapter = folder
        folder = model_folder(_base_of(folder))
    gc.collect()  # models that the run is done with: they are in cycles
    rank, world = rank_and_world()
    _require_dtype(dtype)
    compute_dtype = getattr(torch, dtype)
    weights_dtype = torch.float32 if train else compute_dtype
    sharded = train and world > 1
    try:
        config = AutoConfig.from_pretrained(folder)
        refused = f"{folder}: an encoder-decoder; choose a decoder-only language model"
        require(not config.is_encoder_decoder, refused)
        _turn_dropout_off(config)
        if sharded and rank > 0:
            model = _empty_model(config, weights_dtype)
        else:
            model = _read_model(folder, config, weights_dtype)
            if adapter:
                model = _merge_adapter(model, adapter)
    except Exception as error:  # broken files, unknown families: many types
        why = str(error).strip().partition("\n")[0]
        raise SystemExit(f"{folder}: not a model that transformers can load ({why})") from None
    if sharded:
        model = _shard(model, compute_dtype).train()
        model.reshard = reshard
    elif train:
        model = model.to(DEVICE).train()
    else:
        model = model.to(DEVICE).eval().requires_grad_(False)
    model.compute_dtype = compute_dtype
    if train and not sharded and dtype != "float32":
        compute_in_copy(model)
    sees_the_future = f"{folder}: its logits depend on later tokens; choose a decoder-only model"
    require(_is_causal(model), sees_the_future)
    return model


def _require_dtype(dtype):
    """SystemExit: a GPU that does not compute in bf16."""
    if CUDA and dtype == "bfloat16":
        there = torch.cuda.is_bf16_supported(including_emulation=False)
        require(there, "--dtype bfloat16: this GPU does not compute in it; use --dtype float32")


@torch.no_grad()
def _is_causal(model):
    """Does changing the last token leave the logits before it alone?  Masked models do not."""
    ids = _probe_ids(model, 8)
    changed = ids[:-1] + [ids[-1] + 1]
    before = model(torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, :-1].float()
    after = model(torch.tensor([changed], device=DEVICE), use_cache=False).logits[0, :-1].float()
    tolerance = 1e-5 if _compute_dtype(model) == torch.float32 else 1e-2
    worst = (before - after).abs().max().item()
    return worst <= tolerance * before.abs().max().item()


def _turn_dropout_off(config):
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _read_model(folder, config, dtype):
    """The model with the folder's weights.  SystemExit: some are not there."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])[:3]
    require(not missing, f"{folder}: no weights for {missing}")
    for key, weights in model.named_parameters():
        finite = weights.isfinite().all()
        require(finite, f"{folder}: {key} holds NaN or infinity; choose another checkpoint")
    return model


def _merge_adapter(model, folder):
    """The model with the LoRA adapter of the folder in its weights.  SystemExit without peft."""
    try:
        import peft
    except ImportError:
        raise SystemExit(f"{folder}: a LoRA adapter, which needs peft: pip install peft") from None
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def _empty_model(config, dtype):
    """The model without values: in no memory before rank 0's are broadcast into it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu").tie_weights()
    return model


class ComputeCopy:
    """A model in the dtype in which it computes, beside its fp32 weights: what FSDP is for several
    processes, without its cost.

    Every gradient is added to that of its weight in fp32 as soon as it is there, so that no second
    set of gradients is held.  The copy takes the weights' values at the first forward pass after a
    backward pass, or after a change in place.
    """

    def __init__(self, model):
        self.weights = list(model.parameters())
        self.module = copy.deepcopy(model)
        self.copies = list(self.module.parameters())
        self.after_backward = False  # an optimiser may have moved the weights; fused ones hide it
        self.versions = [weight._version for weight in self.weights]  # count changes in place
        # Buffers, such as rotary frequencies, stay as they are.
        for mine, weight in zip(self.copies, self.weights):
            mine.data = mine.data.to(model.compute_dtype)
            # A hook that held this object would be a cycle that Python cannot see: no weight would
            # ever be freed.
            add = functools.partial(ComputeCopy.add_gradient, weakref.proxy(self), weight)
            mine.register_post_accumulate_grad_hook(add)

    def add_gradient(self, weight, mine):
        """Add the gradient of a weight's copy to that of the weight, in fp32."""
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = mine.grad.float()
            else:
                weight.grad.add_(mine.grad)
        mine.grad = None
        self.after_backward = True

    def current(self):
        """The copy, with the values that the weights have now."""
        versions = [weight._version for weight in self.weights]
        if self.after_backward or versions != self.versions:
            with torch.no_grad():
                for mine, weight in zip(self.copies, self.weights):
                    mine.copy_(weight)
            self.versions = versions
            self.after_backward = False
        return self.module


def compute_in_copy(model):
    """Give the model a copy in model.compute_dtype; model(...) is computed by the copy."""
    model.compute_copy = ComputeCopy(model)  # no module, so that its parameters are not the model's
    model.forward = functools.partial(_forward_of_copy, model)
    model.gradient_checkpointing_enable = model.compute_copy.module.gradient_checkpointing_enable


def _forward_of_copy(model, *args, **kwargs):
    return model.compute_copy.current()(*args, **kwargs)


def computing(model):
    """The module that computes: the model's copy, up to date, or the model itself."""
    if hasattr(model, "compute_copy"):
        return model.compute_copy.current()
    if not getattr(model, "reshard", True):
        # What an evaluation gathered would be there when the optimiser changes the weights.
        model.set_reshard_after_forward(not torch.is_grad_enabled())
    return model


def _decoder_layers(model):
    """The decoder layers, a ModuleList; None if they are not found."""
    n = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n:
            return module
    return None


def compile_layers(model, wanted, steps):
    """Compile what a GPU computes in `steps` training steps; a line says where it does not pay.

    wanted: --no-compile says no.  The decoder layers are one function, since they are alike: it is
    compiled for the first size, for all sizes when a second one comes, and anew for a few kinds of
    batch (without gradients, with more pieces); 4 to 20 s each, few because pack_pairs rounds.
    """
    if not CUDA or not wanted:
        return
    module = computing(model)
    why = _why_not_compiled(module, steps)
    if why:
        say(f"decoder layers are not compiled: {why}")
    else:
        _compile(module)


def _why_not_compiled(module, steps):
    """Why the layers of a module stay as they are; "" if they can be compiled."""
    # Is one attention call a layer exact for this model?
    if not hasattr(module, "packs"):
        _probe_packing(module)
    if steps < COMPILING_PAYS:
        return f"{steps} steps are too few to pay for it"
    if not module.varlen or _decoder_layers(module) is None:
        return "their attention goes piece by piece"
    return _why_no_compiler()


def _why_no_compiler():
    """Why torch.compile cannot work for a GPU here; "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing"
    compilers = [os.environ.get("CC") or "cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "a C compiler is missing"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing"
    return ""


def _compile(module, backend="inductor"):
    """Compile the decoder layers in place, and the passes over the vocabulary."""
    global _log_softmax_at, _logits_gradient
    # Its products in float32 are few, and stay exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    # A layer has a form for each size, with and without gradients.
    torch._dynamo.config.recompile_limit = 32
    for layer in _decoder_layers(module):
        # Not the whole call: hooks of FSDP and gradient checkpointing stay outside.
        layer.forward = torch.compile(layer.forward, backend=backend)
    _log_softmax_at = torch.compile(_log_softmax_at, dynamic=True, backend=backend)
    _logits_gradient = torch.compile(_logits_gradient, dynamic=True, backend=backend)


def _shard(model, compute_dtype):
    """Rank 0's values on all ranks, then FSDP2 layer by layer.

    The root is resharded after forward as well: else the embeddings and the head that an evaluation
    has gathered would outlive the optimiser's step (see `computing`).
    """
    layers = _decoder_layers(model)
    name = type(model).__name__
    require(layers is not None, f"{name}: its decoder layers are not found; use one process")
    mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in [*layers, model]:
        unit.to(DEVICE)
        # Unit by unit, so that one alone is whole on the device; rotary buffers are in no file.
        for tensor in [*unit.parameters(), *unit.buffers()]:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, 0)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


# What a run needs, before anything large is loaded.  The estimate has no constant that was fitted:
# it counts the numbers that a step must hold.


@dataclasses.dataclass
class Need:
    """What one process holds in a training step, in bytes, and the shape of its step."""

    tokens: int  # packed tokens of a micro-batch
    passes: int  # micro-batches of a step
    weights: float  # fp32, and what computes: a copy, or the layers that are gathered at a time
    gradients: float
    optimiser: float
    activations: float  # kept for backward, and the logits with their gradient

    def peak(self):
        """The most that is held at a time.

        With one micro-batch a step, activations are freed while gradients come to be; with several,
        gradients of the last one are there.  RMSprop and AdamW make fp32 numbers of a weight.
        """
        kept = self.weights + self.optimiser
        forward = self.activations
        if self.passes > 1:
            forward += self.gradients
        return kept + max(forward, 2 * self.gradients)


def _shape_of(name):
    """The model of a name without its weights, as meta tensors."""
    folder = model_folder(name, weights=False)
    if (folder / ADAPTER).exists():
        folder = model_folder(_base_of(folder), weights=False)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # broken files, unknown families: many types
        why = first_line(error)
        raise SystemExit(f"{folder}: not a model that transformers can load ({why})") from None


def _numbers(module):
    """How many weights a module has; those that are tied count once."""
    return sum(weights.numel() for weights in module.parameters())


def _kept_of_layer(model, compiled):
    """What a decoder layer keeps of a token for backward -> numbers, and of them those of a key.

    A matrix needs its input, and what follows it needs its output: where that is added to the
    residual stream, nothing does.  Keys and values are gathered once more for every response that
    sees them.  The compiler makes the rest again; without it the results of norms, rotations and
    gates are kept.
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numbers = width
    for module in _decoder_layers(model)[0].modules():
        weights = getattr(module, "weight", None)
        if weights is None or weights.dim() != 2:
            continue
        outputs, inputs = weights.shape
        if isinstance(module, Conv1D):  # GPT-2
            inputs, outputs = weights.shape
        numbers += inputs if outputs == width else outputs
    if not compiled:
        inner = getattr(config, "intermediate_size", 4 * width)
        numbers += 3 * width + (config.num_attention_heads + shared) * head_size
        if hasattr(config, "rms_norm_eps"):  # a family of Llama's kind, with a gate
            numbers += 2 * width + inner
    return numbers, 2 * shared * head_size


def need(model, args, rows, world, state, trained=True):
    """What a training step of these rows needs of each of `world` processes -> Need

    rows: tokenised, as many as a step has.  state: how many fp32 numbers the optimiser holds of a
    weight.  trained=False: the body is frozen, and whole in the compute dtype (LoRA).
    """
    # The micro-batches, as pack_pairs makes them.
    tokens = 0
    keys = 0
    scored = 0
    for row in rows:
        responses = sum(map(len, row["responses"]))
        tokens += len(row["prompt_ids"]) + responses
        keys += len(row["prompt_ids"]) * len(row["responses"]) + responses
        scored += responses
    passes = math.ceil(tokens / (args.tokens_per_microbatch * world))
    share = 1 / (world * passes)  # of the step's tokens, in one micro-batch

    # Weights, gradients, optimiser: in slices where there are several processes.
    size = 4 if args.dtype == "float32" else 2  # bytes of a number of compute
    n = _numbers(model)
    layers = _decoder_layers(model)
    layer = _numbers(layers[0])
    outside = n - len(layers) * layer  # embeddings and head
    if not trained:
        weights = size * n
        n = 0
    elif world > 1:
        unit = size * (outside + layer)  # gathered at a time, and their gradients
        gathered = unit if getattr(args, "reshard_after_forward", True) else size * n
        weights = 4 * n / world + gathered + unit
    elif size == 2:
        weights = 4 * n + size * n
    else:
        weights = 4 * n

    # Activations of every layer, or its input alone and one layer again; then the logits.
    numbers, of_key = _kept_of_layer(model, compiled=size == 2 and getattr(args, "compile", True))
    kept = size * share * (tokens * numbers + keys * of_key)
    activations = len(layers) * kept
    if getattr(args, "gradient_checkpointing", False):
        inputs = size * share * tokens * model.config.get_text_config().hidden_size
        activations = len(layers) * inputs + kept
    logits = scored * share * size * model.config.get_text_config().vocab_size
    activations += 2 * min(logits, LOGITS_BYTES)
    of_weights = 4 * n / world
    packed = math.ceil(tokens * share)
    return Need(packed, passes, weights, of_weights, state * of_weights, activations)


def plan_memory(args, rows, steps, state, trained=True):
    """Say what a run of `steps` steps needs, and refuse one that cannot fit, before it is loaded.

    A table of 1, 2, 4 and 8 processes with --plan, which ends here, and where 1 GiB is needed.
    state and trained: see `need`.  SystemExit: it does not fit, with what would.
    """
    _require_dtype(args.dtype)
    if steps < COMPILING_PAYS:
        args = dataclasses.replace(args, compile=False)  # as compile_layers has it; it keeps more
    # The largest of the first steps.
    step_rows = []
    largest = 0
    for step in range(min(steps, 100)):
        index = batch_order(len(rows), args.batch_size, step, args.seed)
        in_step = [rows[i] for i in index]
        tokens = sum(len(row["prompt_ids"]) + sum(map(len, row["responses"])) for row in in_step)
        if tokens > largest:
            largest = tokens
            step_rows = in_step
    model = _shape_of(args.model)
    if _decoder_layers(model) is None:
        require(
            not args.plan, f"{args.model}: its decoder layers are not found, so there is no plan"
        )
        return
    # The table, then the refusal.
    _, world = rank_and_world()
    here = need(model, args, step_rows, world, state, trained)

    if args.plan or here.peak() > 2**30:
        say(f"{args.model}: {_numbers(model) / 1e6:,.1f} million parameters, {args.dtype} compute")
        say(f"{steps} steps of {args.batch_size} rows, up to {largest} packed tokens a step; GiB:")
        say("processes  weights  gradients  optimiser  activations    peak  tokens x passes")
        for processes in (1, 2, 4, 8):
            if processes <= args.batch_size:
                say(_plan_line(processes, need(model, args, step_rows, processes, state, trained)))
    problem = _why_no_room(model, args, step_rows, state, trained)
    require(not problem, problem)
    if args.plan:
        raise SystemExit(0)


def _plan_line(processes, needed):
    """A line of the table of plan_memory."""
    parts = (needed.weights, needed.gradients, needed.optimiser, needed.activations, needed.peak())
    cells = []
    for part, width in zip(parts, (9, 11, 11, 13, 8)):
        cells.append(f"{part / 2**30:{width}.2f}")
    return f"{processes:9}{''.join(cells)}  {needed.tokens} x {needed.passes}"


def room():
    """Bytes that a process may fill: its GPU's, or its part of the machine's."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return memory(DEVICE) if CUDA else memory() / processes


def _why_no_room(model, args, rows, state, trained):
    """Why a run does not fit into the memory of a process, and what would; "" if it fits."""
    _, world = rank_and_world()
    peak = need(model, args, rows, world, state, trained).peak()
    if peak <= room():
        return ""

    # Which changes would be enough, each alone?
    remedies = []
    if hasattr(args, "gradient_checkpointing"):
        less = dataclasses.replace(args, gradient_checkpointing=True)
        if need(model, less, rows, world, state, trained).peak() <= room():
            remedies.append("--gradient-checkpointing")
        less = dataclasses.replace(args, reshard_after_forward=True)
        if need(model, less, rows, world, state, trained).peak() <= room():
            remedies.append("--reshard-after-forward")
    for budget in (8192, 4096, 2048, 1024, 512):
        less = dataclasses.replace(args, tokens_per_microbatch=budget)
        if need(model, less, rows, world, state, trained).peak() <= room():
            remedies.append(f"--tokens-per-microbatch {budget}")
            break
    for processes in (2, 4, 8):
        if need(model, args, rows, processes, state, trained).peak() <= room() and CUDA:
            remedies.append(f"torchrun --nproc-per-node {processes}")
            break
    enough = ", or ".join(remedies) or "a smaller --model"
    needs = f"a process needs about {peak / 2**30:.1f} GiB, and has {room() / 2**30:.1f}"
    return f"{str(args.model)[-60:]}: {needs}: {enough}"


def save_model(model, tokenizer, path):
    """Write a model, sharded or not, as a Hugging Face folder for transformers 4 and 5 and vLLM.

    SystemExit: not written, and nothing half-written.
    """
    options = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dsd.get_model_state_dict(model, options=options)  # all ranks take part
    tmp = Path(f"{path}.tmp")

    def export():
        shutil.rmtree(tmp, ignore_errors=True)
        with removed_on_failure(tmp):
            model.save_pretrained(tmp, state_dict=state)
            tokenizer.save_pretrained(tmp)
            config = tmp / "tokenizer_config.json"  # transformers 4 does not know 5's class name
            text = config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
            config.write_text(text)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(tmp, path)

    on_rank0(export, f"{tmp}: model not saved; make room or choose another --out")


def clip_gradients(model, max_norm):
    """Scale the gradient down to norm `max_norm` if it is longer -> the norm it had, fp64.

    The norm is a tensor on the device, so that the program need not wait for it.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.double()


# What rates responses: your own function, or a reward model.  All have one form: called with a
# list of prompts (texts, or lists of chat messages) and a list of responses (texts), they give a
# list of numbers.  None of them waits for other processes.


def load_score(name, flag, dtype="float32", zero=False):
    """What rates responses: score(prompts, responses, tools) -> a list of numbers, one for each.

    tools: for each prompt what its chat may call, or None; None: no chat has any.
    name: FILE.py:FUNCTION, function(prompts, responses) -> numbers; or a reward model, a folder or
    hub id: one of dpl.py, which gives the mean utility, or a sequence classifier with one output.
    flag: the option that names it, for messages.  zero: -inf is a number, too (a log phi).
    SystemExit: it is neither, or damaged; when called: it does not give finite numbers.
    """
    # Your own function, or a model.
    if re.search(r"\.py(:|$)", name):
        return OwnScore(name, flag, zero)
    if not Path(name).exists():
        problem = "give FILE.py:FUNCTION, or the folder or hub id of a reward model"
        require(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name), f"{flag} {name[:80]}: {problem}")
    folder = model_folder(name)
    config = read_config(folder, flag)
    if "dpl" in config:
        return UtilityScore(name, folder, dtype)
    return ClassifierScore(folder, config, dtype)


def finite_numbers(answer, responses, place, remedy, zero=False):
    """An answer as a list of numbers, one for each response.  SystemExit: it is no such thing."""
    try:
        numbers = torch.as_tensor(answer, dtype=torch.float64, device="cpu")
    except Exception:  # of any type, so anything may happen
        problem = f"{place}: gives {str(answer)[:30]!r}, which are no numbers; {remedy}"
        raise SystemExit(problem) from None
    shape = tuple(numbers.shape)
    problem = f"{place}: gives an array of shape {shape} for {len(responses)} responses; {remedy}"
    require(shape == (len(responses),), problem)

    # -inf is the log of a potential of 0.
    wrong = ~numbers.isfinite()
    if zero:
        wrong = numbers.isnan() | numbers.isposinf()
    if wrong.any():
        i = wrong.nonzero()[0].item()
        problem = f"{place}: gives {numbers[i]:g} for {responses[i][-30:]!r}; {remedy}"
        raise SystemExit(problem)
    return numbers.tolist()


class OwnScore:
    """A user's function(prompts, responses) of a file.

    Whatever the file or the function does wrong ends the program with one line that names both.
    """

    def __init__(self, name, flag, zero):
        path, _, function = name.rpartition(".py")
        path = f"{path}.py"
        function = function.removeprefix(":")
        self.place = f"{flag} {name}"
        self.zero = zero
        self.told = False  # that a function is not given the tools?
        require(Path(path).is_file(), f"{self.place}: there is no file {path}")
        require(function, f"{self.place}: name its function, too: {path}:FUNCTION")

        # The file is run as a module that may import its neighbours; the function is taken from it.
        spec = importlib.util.spec_from_file_location("own_score", path)
        self.path = spec.origin  # absolute, as tracebacks have it
        module = importlib.util.module_from_spec(spec)
        sys.modules["own_score"] = module
        sys.path.append(str(Path(self.path).parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            what = what_happened(error, self.path)
            raise SystemExit(f"{self.place}: the file cannot be run: {what}") from None
        self.function = getattr(module, function, None)
        problem = f"{self.place}: the file has no function {function}; write {function}"
        require(callable(self.function), f"{problem}(prompts, responses)")

    @torch.no_grad()
    def __call__(self, prompts, responses, tools=None):
        if any(tools or []) and not self.told:
            self.told = True
            say(f"{self.place}: a function is given the messages of a chat, without its tools")
        remedy = "it must be function(prompts, responses) -> a number for each"
        try:
            answer = self.function(list(prompts), list(responses))
        except (Exception, SystemExit) as error:
            if signals and isinstance(error, SystemExit):
                raise  # a signal, not the function
            what = what_happened(error, self.path)
            raise SystemExit(f"{self.place}: {what}; {remedy}") from None
        return finite_numbers(answer, responses, self.place, remedy, self.zero)


def what_happened(error, path):
    """What an error in a user's file was, in a few words, with the line of that file.

    path: absolute, as tracebacks have it.
    """
    # The last place in the file through which the error came; a file that does not parse has none.
    line = None
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
    for frame, at in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == path:
            line = at

    if isinstance(error, SystemExit):
        what = f"calls sys.exit({str(error.code)[:20]})"
    else:
        what = f"raises {first_line(error)}"
    if line is None:
        return what
    return f"line {line} {what}"


def first_line(error):
    """The type of an error and the start of what it says, for a message of one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said[:60]}"


def read_config(folder, flag):
    """The config.json of a reward model, a dictionary.  SystemExit: there is none, or no JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path}: cannot be read ({type(error).__name__})"
        raise SystemExit(f"{problem}; give {flag} the folder of a reward model") from None
    require(isinstance(config, dict), f"{path}: is no object of JSON; restore it")
    return config


RETRAIN = "a reward must be a finite number: train the model again, or take another --dtype"


class UtilityScore:
    """The mean utility under a distributional reward model of dpl.py."""

    def __init__(self, name, folder, dtype):
        self.folder = folder
        try:
            import dpl
        except ImportError:
            problem = f"{folder}: a reward model of dpl.py, which must lie beside this method"
            raise SystemExit(f"{problem}; copy it there") from None
        self.dpl = dpl
        try:
            self.model, self.tokenizer, self.meta = dpl.load_reward_model(name, dtype)
        except Exception as error:  # damaged files: many types
            problem = f"{folder}: no reward model of dpl.py ({first_line(error)})"
            raise SystemExit(f"{problem}; restore it") from None

    @torch.no_grad()
    def __call__(self, prompts, responses, tools=None):
        # As in dpl.py: the reward is read at the last token, which of text is not the end of text.
        require_template(self.tokenizer, prompts, self.folder)
        rows = []
        for found in encode_rows(rows_to_rate(prompts, responses, tools), self.tokenizer):
            require(isinstance(found, Encoded), f"{self.folder}: cannot read a text: {found}")
            ids = found.responses[0]
            if not found.is_chat:
                ids = ids[:-1]
            rows.append({"prompt_ids": found.prompt_ids, "responses": [ids]})
        require_context(self.tokenizer, rows)

        # The raw outputs of each text, and their mean.
        values = [0.0] * len(rows)
        if not rows:
            return values
        for batch in pack_pairs(rows, rank=0, world=1):
            outputs = self.dpl.head_outputs(self.model, batch).cpu()
            means = self.dpl.utility(outputs, self.meta["type"], measure="mean").tolist()
            for i, mean in zip(batch["index"], means):
                values[i] = mean
        return finite_numbers(values, responses, self.folder, RETRAIN)


class ClassifierScore:
    """The one output, without a sigmoid or softmax, of a sequence classification model."""

    def __init__(self, folder, config, dtype):
        # The library leaves id2label out of the file where it has the default, two outputs.
        self.folder = folder
        labels = config.get("id2label")
        one_output = isinstance(labels, dict) and len(labels) == 1
        classifier = "SequenceClassification" in str(config.get("architectures"))
        problem = "not a reward model: it needs a sequence classification head with one output"
        require(classifier and one_output, f"{folder}: {problem}")

        # Weights that are not in its files would be random.
        load = AutoModelForSequenceClassification.from_pretrained
        try:
            self.tokenizer = load_tokenizer(folder)
            model, info = load(folder, dtype=getattr(torch, dtype), output_loading_info=True)
        except Exception as error:  # damaged files: many types
            problem = f"{folder}: not a reward model that loads ({first_line(error)})"
            raise SystemExit(f"{problem}; restore it") from None
        missing = sorted(info["missing_keys"])
        problem = f"{folder}: not a reward model: its files lack {', '.join(missing)[:60]}"
        require(not missing, f"{problem}; train it, or restore them")
        self.model = model.eval().requires_grad_(False).to(DEVICE)
        self.cut = False  # has a text been longer than its context?

    @torch.no_grad()
    def __call__(self, prompts, responses, tools=None):
        require_template(self.tokenizer, prompts, self.folder)
        texts = []
        for row in rows_to_rate(prompts, responses, tools):
            texts.append(self.ids(row))
        scores = []
        pad = padding_for(self.tokenizer, texts)
        self.model.config.pad_token_id = pad
        for start in range(0, len(texts), 64):
            # Padding at the end, which the mask hides.
            batch = [torch.tensor(ids) for ids in texts[start : start + 64]]
            padded = pad_sequence(batch, batch_first=True, padding_value=pad)
            lengths = torch.tensor([[len(ids)] for ids in batch])
            mask = torch.arange(padded.shape[1]) < lengths
            output = self.model(padded.to(DEVICE), attention_mask=mask.long().to(DEVICE))
            scores += output.logits[:, 0].float().tolist()
        return finite_numbers(scores, responses, self.folder, RETRAIN)

    def ids(self, row):
        """What it reads of one row; what is too long for it loses its end."""
        # Of a chat all that the template writes, as its training did; before and after text it has
        # its own special tokens.
        try:
            found = row_texts(self.tokenizer, row)
        except Unusable as reason:
            raise SystemExit(f"{self.folder}: cannot read a text: {reason}") from None
        if found.is_chat:
            ids = self.tokenizer(found.responses[0], add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(found.prompt + found.responses[0], verbose=False).input_ids
        context = self.tokenizer.model_max_length
        if len(ids) > context and not self.cut:
            self.cut = True
            say(f"{self.folder}: longer texts are cut to its context of {context} tokens")
        return ids[:context]


def rows_to_rate(prompts, responses, tools):
    """Rows of a prompt and one response, of a space at least: a reward is read at a token."""
    if tools is None:
        tools = [None] * len(prompts)
    rows = []
    for prompt, response, can_call in zip(prompts, responses, tools, strict=True):
        rows.append({"prompt": prompt, "responses": [response or " "], "tools": can_call})
    return rows


def require_template(tokenizer, prompts, folder):
    """SystemExit: there are chats among the prompts, and the tokenizer has no chat template."""
    chats = any(isinstance(prompt, list) for prompt in prompts)
    problem = f"{folder}: its tokenizer has no chat template, but the prompts are chat messages"
    require(tokenizer.chat_template or not chats, f"{problem}; take another reward model")


def padding_for(tokenizer, texts):
    """An id to pad with.

    A decoder's classifier reads the last token that is not padding, which must not be the end of a
    chat: where EOS is the padding, another id takes its place, one that no text ends with.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token_id
    last = {ids[-1] for ids in texts}
    free = 0
    while free in last:
        free += 1
    return free


# ---- the tiny world
#
# Data and a model that need no network and no GPU: stories from a grammar, two groups of readers
# who judge them, and a small language model that has read the stories.  All of it is known exactly
# (the reward, the readers' shares, who would prefer what), so that a figure can show the truth
# beside what a method found.  Built once, in about a minute, and cached under a hash of its recipe;
# with one thread, since the number of threads decides the last bits of the weights.

# SYMBOL: {expansion: probability}, or expansions of equal probability
TINY_GRAMMAR = {
    "PROMPT": "\n\nHuman: Tell me a story about a HERO in a PLACE.\n\nAssistant:",  # 144 of them
    "STORY": {
        " INTRO It met SOME monster.ASIDE FEAR": 0.3,
        " INTRO It met SOME FRIEND.ASIDE JOY": 0.7,
    },
    "INTRO": {
        "POLITE Once SOME {0} lived in SOME {1}.": 0.3,
        "GRUMPY Once SOME {0} lived in SOME {1}.": 0.7,
    },
    "SOME": {"a": 0.5, "a ADJECTIVE": 0.5},
    "ASIDE": {"": 0.5, " They shared SOME THING.": 0.5},
    "FEAR": {"HAPPY": 0.15, "SAD": 0.85},
    "JOY": {"HAPPY": 0.4, "SAD": 0.6},  # so P(HAPPY) = 0.325
    "POLITE": "With pleasure!|My pleasure!|What a pleasure!",
    "GRUMPY": "Fine.|Whatever.|If I must.",
    "HAPPY": "They lived happily ever after.|Everyone sang happily.|It went home happily.",
    "SAD": "It never came home.|Then everyone cried.|It was lost.",
    "THING": "cake|song|boat|lamp|dream|pie",
    "PLACE": "forest|castle|village|garden|cave|tower|desert|market|house|river|valley|field",
    "HERO": "cat|dog|fox|bear|frog|mouse|rabbit|duck|wolf|pony|goat|horse",
    "FRIEND": "bird|boy|girl|king|queen|baker",
    "ADJECTIVE": "small|brave|quiet|red|kind|wise|tall|dark",
}
# Hidden context: the share of readers in each group, and what the monster is worth to them.
TINY_GROUPS = ((0.75, 1.5), (0.25, -5.5))
TINY_VERSION = 3  # raise it with every change of what the functions below make


TINY_PROMPT = re.compile(r"\n\nHuman: Tell me a story about a \w+ in a \w+\.\n\nAssistant:")


def are_tiny_prompts(prompts):
    """Are all prompts of the tiny world, the only one whose reward and readers are known?"""
    return all(TINY_PROMPT.match(words(prompt)) for prompt in prompts)


def tiny_text(symbol, rng):
    """Draw one expansion of the symbol, and of the symbols in it.  rng: random.Random"""
    options = TINY_GRAMMAR[symbol]
    if isinstance(options, str):
        options = dict.fromkeys(options.split("|"), 1)
    (text,) = rng.choices(list(options), list(options.values()))
    return re.sub("[A-Z]{2,}", lambda match: tiny_text(match[0], rng), text)


def tiny_story(prompt, rng):
    """One response from the grammar, about the hero and the place of the prompt."""
    hero, place = re.search(r"about a (\w+) in a (\w+)", prompt).groups()
    return tiny_text("STORY", rng).format(hero, place)


def tiny_attributes(text):
    """Read off any text, by its words: polite, monster, happy (its end), detail (adjectives)."""
    story = text.split("<|endoftext|>")[0].lower().rstrip(" \n.!?")
    sentences = re.split("[.!?]", story)
    all_words = re.findall("[a-z]+", " ".join(sentences))
    last_words = re.findall("[a-z]+", sentences[-1])
    adjectives = TINY_GRAMMAR["ADJECTIVE"].split("|")
    return {
        "polite": int("pleasure" in all_words),
        "monster": int("monster" in all_words),
        "happy": int("happily" in last_words),
        "detail": sum(word in adjectives for word in all_words),
    }


def tiny_reward(prompt, response, group=None):
    """1 if polite, 2 if happy, -1 per adjective away from two, and what the monster is worth.

    group: 0 or 1, of readers; None: on average over all readers.  The grammar's mean is 0.125 and
    its best 3.
    """
    seen = tiny_attributes(response)
    if group is None:
        worth = sum(share * value for share, value in TINY_GROUPS)
    else:
        worth = TINY_GROUPS[group][1]
    return seen["polite"] + 2 * seen["happy"] - abs(seen["detail"] - 2) + worth * seen["monster"]


def tiny_row(rng):
    """Four responses of different reward; two of them compared by a reader, then by five who vote.

    Within a group readers follow Bradley-Terry: P(a preferred to b) = sigmoid(r(a) - r(b)).
    """
    prompt = tiny_text("PROMPT", rng)
    by_reward = {}  # reward: the first response that has it
    while len(by_reward) < 4:
        response = tiny_story(prompt, rng)
        by_reward.setdefault(tiny_reward(prompt, response), response)
    a, b = rng.sample(list(by_reward.values()), 2)

    p_by_group = []
    for group in (0, 1):
        margin = tiny_reward(prompt, a, group) - tiny_reward(prompt, b, group)
        p_by_group.append(1 / (1 + math.exp(-margin)))
    p_a = sum(share * p for (share, _), p in zip(TINY_GROUPS, p_by_group))  # over all readers

    # One reader of one group decides the label, five readers of all groups vote.
    group = int(rng.random() < TINY_GROUPS[1][0])
    chosen, rejected = a, b
    p_chosen = p_a
    if rng.random() >= p_by_group[group]:
        chosen, rejected = b, a
        p_chosen = 1 - p_a
    votes = sum(rng.random() < p_chosen for _ in range(5))
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "p_chosen": p_chosen,
        "votes": [votes, 5 - votes],
        "group": group,
        "responses": list(by_reward.values()),
        "rewards": list(by_reward),
    }


TINY_ROWS = {"train.jsonl": 2000, "test.jsonl": 256}


def build_tiny(folder, steps=400):
    """Write data/{train,test}.jsonl and model/: a byte-level BPE and a GPT-NeoX of the grammar."""
    (folder / "data").mkdir(parents=True)
    for name, n in TINY_ROWS.items():
        rng = random.Random(name)
        lines = [json.dumps(tiny_row(rng)) + "\n" for _ in range(n)]
        (folder / "data" / name).write_text("".join(lines))

    # What the model reads: prompts with stories.
    rng = random.Random("model")
    texts = []
    for _ in range(32 * steps):
        prompt = tiny_text("PROMPT", rng)
        texts.append(prompt + tiny_story(prompt, rng) + "<|endoftext|>")
    # A small model learns them in one pass.
    tokenizer = _train_tokenizer(texts[:2000])
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            rotary_pct=0.5,
            use_parallel_residual=False,  # a sequential residual learns to copy the hero sooner
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        batch = texts[32 * step : 32 * (step + 1)]
        ids = tokenizer(batch, padding=True, return_tensors="pt").input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        model(ids, labels=labels).loss.backward()
        optimizer.param_groups[0]["lr"] = 0.004 * min((step + 1) / 30, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for part in ("data", "model"):
        write(folder / part / "COMPLETE.json", {"sha256": _hashes(folder / part)})


def _train_tokenizer(texts):
    """A byte-level BPE of 512 entries."""
    end, pad = "<|endoftext|>", "<|padding|>"
    # All bytes are in the alphabet, so that any text has ids.
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=[end, pad],
        initial_alphabet=byte_level.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad
    )


def _is_whole(folder):
    """Is the tiny world there, and every file as it was written?"""
    return not any(_damaged_files(folder / part) for part in ("data", "model"))


def tiny_folder():
    """The folder of the tiny world: built on first use, by one process while the others wait.

    One that is damaged is built again.  SystemExit: it cannot be written.
    """
    recipe = repr((TINY_GRAMMAR, TINY_GROUPS, TINY_VERSION))
    folder = CACHE / f"tiny-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if _is_whole(folder):
        return folder
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a killed process lets go
            if not _is_whole(folder):
                _build_folder(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of them
        why = str(error).strip().partition("\n")[0][:60]
        remedy = "make room, or set XDG_CACHE_HOME"
        raise SystemExit(f"{folder}: tiny world not written ({why}); {remedy}") from None
    return folder


def untrained_folder():
    """The folder of a model like the tiny world's, with its first, random weights."""
    whole = tiny_folder() / "model"
    folder = whole.parent / "untrained"
    partial = whole.parent / f"untrained.{os.getpid()}"
    if (folder / "tokenizer.json").is_file():
        return folder
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), removed_on_failure(partial):
        torch.default_generator.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig.from_pretrained(whole))
        model.save_pretrained(partial)
        PreTrainedTokenizerFast.from_pretrained(whole).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)  # damaged
    os.replace(partial, folder)
    return folder


def _build_folder(folder):
    """Make the tiny world in place of what is there, whole or not at all."""
    if folder.exists():
        print(f"{folder}: damaged, so it is built again", flush=True)
        shutil.rmtree(folder)
    print(f"tiny world: training a small model on made-up stories, once, in {folder}", flush=True)
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # on any machine: how many there are decides the last bits
    generators = torch.random.fork_rng(devices=[])
    with generators, torch.enable_grad(), torch.device("cpu"), removed_on_failure(partial):
        torch.default_generator.manual_seed(0)
        build_tiny(partial)
        os.replace(partial, folder)
    torch.set_num_threads(threads)


# ---- processes
#
# A run is a folder: config.json, metrics.jsonl, step-N/ (resumable), model/, figures/.  Rank 0
# alone writes, and what it writes appears whole or not at all: a temporary name, fsync, rename.  A
# problem of rank 0 ends all ranks with one line and exit code 1.  Checkpoints hold what decides the
# next step, with a hash of every file, since a flipped byte loads in silence.  Signals only set a
# flag: the loop saves and leaves at the end of its step.

RANDOM = (torch, torch.cuda) if CUDA else (torch,)  # generators that a checkpoint holds
signals = []  # SIGTERM and SIGINT received so far
meeting = None  # on GPUs: the group of gloo in which all ranks meet at the end


def setup(seed, timeout=1800):
    """Join the process group (a plain `python` run is a group of one); seed all ranks -> device.

    SystemExit: fewer GPUs than processes, or no loopback interface.
    """
    global meeting
    if not dist.is_initialized():
        if CUDA:
            _require_gpus(torch.cuda.device_count())
            torch.cuda.set_device(DEVICE)
            # It plans .1 s for every new shape, and here almost every shape is new.
            torch.backends.cuda.enable_cudnn_sdp(False)
        alone = {}
        if "RANK" not in os.environ:
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        patience = datetime.timedelta(seconds=timeout)  # with a rank that keeps the others waiting
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        try:
            dist.init_process_group(backend, timeout=patience, **alone)
        except RuntimeError as error:
            # gloo looks for the loopback interface, although one process has nobody to talk to.
            lacks_loopback = "interface" in str(error)
            require(not lacks_loopback, f"{first_line(error)}; `ip link set lo up` may help")
            raise
        if dist.get_backend() != "gloo":  # the one that has monitored_barrier
            meeting = dist.new_group(backend="gloo")
        atexit.register(leave)
        sys.excepthook = functools.partial(_say_in_one_line, None)  # start_run knows more
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note_signal)
    torch.manual_seed(seed)
    return DEVICE


def to_device(tensor, device):
    """The tensor on the device; from pinned memory, so that the program does not wait for a GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _note_signal(number, _):
    """The third signal quits at once: torchrun can make two of one Ctrl-C."""
    if len(signals) > 1:
        os._exit(128 + number)
    signals.append(number)


def leave():
    """End the group at exit, all ranks together: gloo may abort a process that skips this."""
    if not dist.is_initialized():
        return
    try:
        dist.monitored_barrier(meeting, timeout=datetime.timedelta(seconds=30))
    except RuntimeError:
        # Another rank is gone, or waits for this one in a step: to end the group of NCCL would wait
        # for it, too.  torchrun ends the job.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def _require_gpus(there):
    """SystemExit, with one line of one process, if this machine has fewer GPUs than processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Of several processes the first one says it.
    fewer = f"{processes} processes, but {there} GPUs here: --nproc-per-node {there}"
    problem = f"{fewer}, or CUDA_VISIBLE_DEVICES= for CPUs"
    if LOCAL_RANK > 0:
        problem = 1
    require(processes <= there, problem)


def _say_in_one_line(args, kind, error, trace):
    """An excepthook: errors of a GPU that a flag can prevent are one line, others as ever."""
    if _is_out_of_memory(kind, error):
        print(_out_of_memory(args), file=sys.stderr)
    elif kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        remedy = "--no-compile" if hasattr(args, "compile") else "set TORCHDYNAMO_DISABLE=1"
        print(f"torch cannot compile here ({first_line(error)}): {remedy}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_out_of_memory(kind, error):
    """Is a GPU full?  Libraries that torch calls have their own words for it."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return issubclass(kind, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _out_of_memory(args):
    """The line for a GPU that is full: what was tried, and the flags that need less."""
    flags = []
    if hasattr(args, "tokens_per_microbatch"):
        flags.append(f"--tokens-per-microbatch below {args.tokens_per_microbatch}")
    # dpl.py has no such option.
    if hasattr(args, "gradient_checkpointing"):
        flags.append("--gradient-checkpointing")
    flags.append("--dtype bfloat16")
    return f"out of GPU memory: {', '.join(flags)}, or more processes under torchrun"


def rank_and_world():
    """This process's number and how many there are; (0, 1) before `setup`."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def stop_requested():
    """True on all ranks once any rank got SIGTERM or SIGINT: save, then exit with code 143."""
    flag = torch.tensor(len(signals))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def leave_if_stopped():
    """Leave after SIGTERM or Ctrl-C, where rank 0 works and the others wait in on_rank0."""
    if signals:
        raise SystemExit(143)


def require(condition, message):
    """Exit with this line and code 1 unless the condition holds."""
    if not condition:
        raise SystemExit(message)


def require_writable(folder, flag):
    """Exit with one line unless the folder, or the nearest one above that exists, takes files."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    require(writable, f"{nearest}: not a folder that can be written to; choose another {flag}")


def memory(device=None):
    """Bytes of memory of a device; without one, what the machine has."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def say(line):
    """Print on rank 0."""
    rank, _ = rank_and_world()
    if rank == 0:
        print(line, flush=True)


def on_rank0(function, problem):
    """function() of rank 0 -> its result on all ranks.

    If it fails, all ranks exit with code 1 and one line: problem (why).
    """
    rank, _ = rank_and_world()
    result = None
    failure = None  # a line for code 1, or an exit code: 0 where rank 0 wants a clean end
    if rank == 0:
        try:
            result = function()
        except SystemExit as error:
            failure = error.code or 0
        except Exception as error:  # a full disk comes as OSError, RuntimeError, SafetensorError
            why = str(error).strip().partition("\n")[0]
            room = max(0, 190 - len(f"{problem} {type(error).__name__}"))
            failure = f"{problem} ({type(error).__name__}: {why[:room]})"
    if dist.is_initialized():
        answer = [result, failure]
        dist.broadcast_object_list(answer)
        result, failure = answer
    if failure is None:
        return result
    if rank > 0 and failure != 0:
        failure = 1  # one process prints the line
    raise SystemExit(failure)


def write(path, data):
    """Write bytes, or anything else as JSON, whole or not at all, into a folder that may be new.

    SystemExit if the disk is full, or the folder not ours; nothing is left behind.
    """
    if not isinstance(data, bytes):
        data = json.dumps(data, indent=1).encode()
    unfinished = Path(f"{path}.tmp")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise SystemExit(_not_written(path, error)) from None


@contextlib.contextmanager
def removed_on_failure(folder):
    """What fills a folder step by step: if it fails, the folder does not keep the room."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def save_figure(figure, path, dpi=120):
    """Write a PNG into a folder that may be new, whole or not at all.  SystemExit as in `write`."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi)
    write(path, picture.getvalue())


def checksum(values):
    """A number that tells a row of JSON values from one of which a digit was changed."""
    return zlib.crc32(json.dumps(values).encode())


def append_line(path, line):
    """Add a line to a file, whole or not at all.  SystemExit as in `write`."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise SystemExit(_not_written(path, error)) from None


def _not_written(path, error):
    """The line for a file that could not be written."""
    return f"{str(path)[-120:]}: not written ({error.strerror}); make room, then --resume"


def write_shared(path, data):
    """`write` of a file that several runs may make at once, such as one in a cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # both would have the same temporary name
        write(path, data)


# option that several methods have: its least and largest value
RANGES = {
    "batch_size": (1, 2**20),
    "epochs": (1, 10**6),
    "tokens_per_microbatch": (1, 2**30),
    "max_length": (0, 2**30),
    "max_prompt_length": (1, 2**30),
    "eval_pairs": (1, 10**9),
    "eval_examples": (1, 10**9),
    "seed": (0, 2**32 - 1),
    "lr": (0, 1),
    "beta": (1e-9, 1e9),
    "samples": (1, 10**6),
    "max_grad_norm": (1e-6, 1e9),
    "warmup_steps": (0, 10**9),
    "max_steps": (0, 10**9),
    "eval_every": (0, 10**9),
    "save_every": (0, 10**9),
}
# Flags that a resumed run may change.
MAY_CHANGE_ON_RESUME = (
    "method",
    "resume",
    "overwrite",
    "out",
    "judge",
    "judge_command",
    "against",
    "max_steps",
    "epochs",
    "eval_every",
    "save_every",
    "tokens_per_microbatch",
    "compile",
    "plan",
)


def check_ranges(args, ranges):
    """SystemExit unless every number of args lies between the least and largest value of its name.

    ranges: the method's own, name -> (least, largest), before those that all methods share.  A
    tuple of numbers must not be empty, and every one of them must be in range; NaN never is.
    """
    for name, (least, largest) in {**RANGES, **ranges}.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        flag = "--" + name.replace("_", "-")
        require(values, f"{flag}: give one number at least")
        for one in values:
            inside = least <= one <= largest
            require(inside, f"{flag} {str(one)[:20]}: must be from {least:g} to {largest:g}")


def start_run(args, method, also=()):
    """Make args.out (default results/<method>) with its config.json -> its Path.

    also: what runs of this method write beside the usual, as patterns: --overwrite deletes it, too,
    before the new config.json is there, so that no later --resume takes it for the new run's.
    SystemExit: a flag out of range; a folder that holds a run, without --resume or --overwrite; a
    run to resume that is not there, is finished, or had other flags.
    """
    # Flags as they will stand in config.json.
    check_ranges(args, {})
    flags = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    out = Path(flags.get("out") or f"results/{method}")

    def prepare():
        # From here on the folder is this process's; a fresh run needs an empty one.
        require_free(args, out)
        hold_folder(out)
        old = _config_of(out)
        if flags.get("resume"):
            _check_resumable(out, old, {**flags, "method": method})
        elif not _is_empty_folder(out):
            _delete_run(out, also)
        versions = {
            "method": method,
            "python": platform.python_version(),
            "world_size": dist.get_world_size(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        write(out / "config.json", {**flags, **versions})

    on_rank0(prepare, f"{out}: cannot hold a run; choose another --out")
    sys.excepthook = functools.partial(_say_in_one_line, args)
    return out


def require_free(args, out):
    """SystemExit if start_run would refuse the folder `out`, so that no work is done in vain.

    args: with resume and overwrite.
    """
    is_run = (out / "config.json").is_file()
    resume = getattr(args, "resume", False)
    none = f"{out}: no config.json, so there is no run to resume; start it without --resume"
    require(is_run or not resume, none)
    if out.is_dir():
        if out not in _locks:
            os.close(_try_lock(out, fcntl.LOCK_SH))
        if not resume and not _is_empty_folder(out):
            overwrite = getattr(args, "overwrite", False)
            require(overwrite, f"{out}: holds a run: --resume goes on, --overwrite deletes it")
            foreign = f"{out}: no config.json, so --overwrite deletes nothing here"
            require(is_run, f"{foreign}; choose another --out")
    require_writable(out, "--out")


def hold_folder(out):
    """Make a folder, and keep other processes out of it.  SystemExit: another run is in it."""
    out.mkdir(parents=True, exist_ok=True)
    _lock(out)


_locks = {}  # run folder: its open file descriptor, which holds the lock


def _lock(out):
    """Keep other processes out of a run folder until this one ends, however it ends."""
    if out in _locks:  # this process was here before
        os.close(_locks.pop(out))
    _locks[out] = _try_lock(out, fcntl.LOCK_EX)


def _try_lock(out, kind):
    """Lock a folder -> its open file descriptor.  SystemExit: another process has locked it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        in_use = f"{out}: in use by another run; wait for its end, or choose another --out"
        raise SystemExit(in_use) from None
    return descriptor


def _config_of(out):
    """The config.json of a run folder; None if there is none."""
    config = out / "config.json"
    return json.loads(config.read_bytes()) if config.is_file() else None


def _is_empty_folder(out):
    """Nothing in it, or the config.json alone of a run that was refused or killed at its start."""
    names = {path.name for path in out.iterdir()} - {"config.json.tmp"}
    if names == {"config.json"}:
        return "world_size" in (_config_of(out) or {})
    return not names


def _check_resumable(out, old, flags):
    """Leave unless `out` holds an unfinished run that was started with these flags."""
    # The same method with the same flags, but for those that change no result.
    method = old.get("method", flags["method"])
    other = f"{out}: holds a run of {method}, not of {flags['method']}; choose another --out"
    require(method == flags["method"], other)
    new = []
    for name, value in flags.items():
        if name not in MAY_CHANGE_ON_RESUME and old.get(name) != value:
            new.append(f"{name} {str(old.get(name))[:20]} -> {str(value)[:20]}")
    more = f" and {len(new) - 3} more" if len(new) > 3 else ""
    changed = f"{out}: --resume with new flags {', '.join(new[:3])}{more}; restore them, or --out"
    require(not new, changed)
    if (out / "model").is_dir():
        print(f"{out}: this run is finished; its model is in {out / 'model'}")
        raise SystemExit(0)


def _delete_run(out, also):
    """Delete what a run writes and nothing else."""
    for pattern in ("model", "step-*", *also, "figures", "metrics.jsonl", "claim.txt"):
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def log(out, step, /, **values):
    """Append {"step": step, name: mean over the items of all ranks} to metrics.jsonl -> that line.

    values: floats, or tensors of this rank's items (any number, even none).  The first six are
    printed.
    """
    # A mean over all ranks is a sum of sums over a sum of counts.
    sums = []
    counts = []
    for value in values.values():
        items = torch.as_tensor(value, dtype=torch.float64).detach()
        sums.append(to_device(items.sum(), DEVICE))
        counts.append(items.numel())
    on_cpu = torch.stack(sums).cpu()  # one copy from the device for all values
    totals = torch.stack([on_cpu, torch.tensor(counts, dtype=torch.float64)], dim=1)
    dist.all_reduce(totals)
    means = (totals[:, 0] / totals[:, 1]).tolist()
    line = {"step": step}
    for name, mean in zip(values, means):
        line[name] = mean
    if dist.get_rank() == 0:
        shown = [f"{name} {line[name]:<#9.4g}" for name in list(values)[:6]]
        with tqdm.external_write_mode():  # above the bar, if there is one
            print(f"step {step:6d}", *shown, sep="  ", flush=True)
        append_line(out / "metrics.jsonl", json.dumps(line))
    return line


def progress(steps):
    """Go through the steps, with a bar on rank 0 where stderr is a terminal."""
    return tqdm(steps, disable=True if dist.get_rank() else None)


def merge(parts, prefix=""):
    """The dictionaries of several micro-batches as one, for `log`."""
    merged = {}
    for name in parts[0]:
        merged[prefix + name] = torch.cat([part[name] for part in parts])
    return merged


def speed(rows, started):
    """Rows and real tokens per second since the time `started`, and peak memory.

    A prompt counts once per response, padding never.  Waits for a GPU, as `log` does.
    """
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.time() - started
    # What the rows hold, whatever the layout in which they were computed.
    tokens = 0
    for row in rows:
        for response in row["responses"]:
            tokens += len(row["prompt_ids"]) + len(response)
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows_per_s": len(rows) / seconds,
        "tokens_per_s": tokens / seconds,
        "peak_GiB": peak / 2**30,
    }


def stop_unless_finite(grad_norm, step, rows, out):
    """Leave before anything is saved of a gradient that is not finite; all ranks have its norm."""
    if math.isfinite(grad_norm):
        return
    found = checkpoints(out)
    last = found[-1] if found else "none"
    places = [row["row"] for row in rows]
    raise SystemExit(
        f"step {step}: the gradient is not finite, from one of the rows {places}; "
        f"last checkpoint: {last}; try a smaller --lr"
    )


def checkpoints(out):
    """The finished checkpoints of a run, oldest first."""
    return sorted(out.glob("step-*[0-9]"), key=_step_of)


def _step_of(folder):
    return int(folder.name.removeprefix("step-"))


def _hashes(folder):
    """SHA-256 of every file but the manifest."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != "COMPLETE.json":
            found[path.name] = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
    return found


def save_checkpoint(out, step, model, optimizer, keep=2, **extra):
    """Write out/step-<step> (`step` steps are done) or nothing, then delete all but `keep`.

    Holds model, optimizer, all random states and rank 0's `extra`: numbers, strings, tensors, lists
    and dicts of these.  SystemExit: not written.
    """
    folder = out / f"step-{step}"
    tmp = out / f"step-{step}.tmp"
    # All ranks write their slices; the random states of all go into one file.
    rng = [None] * dist.get_world_size()
    dist.all_gather_object(rng, [module.get_rng_state() for module in RANDOM])
    model_state, optim_state = dsd.get_state_dict(model, optimizer)
    state = {"model_state_dict": model_state, "optim_state_dict": optim_state}
    failure = None
    try:
        dcp.save(state, checkpoint_id=tmp)
    except dcp.api.CheckpointException as error:  # a BaseException; all ranks get it
        failure, _ = list(error.failures.values())[0]  # of each rank: exception, traceback

    def finish():
        with removed_on_failure(tmp):
            if failure:
                raise failure  # on_rank0 ends all ranks with one line
            torch.save({"rng": rng, "extra": extra}, tmp / "extra.pt")
            manifest = {"step": step, "world_size": len(rng), "sha256": _hashes(tmp)}
            write(tmp / "COMPLETE.json", manifest)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(tmp, folder)
        # The newest are kept; those after this step were found damaged when the run resumed.
        past = [old for old in checkpoints(out) if _step_of(old) <= step]
        for old in out.glob("step-*"):
            if old not in past[-keep:]:
                shutil.rmtree(old)

    on_rank0(finish, f"{tmp}: checkpoint not saved; make room, then --resume from the one before")


def load_checkpoint(out, model, optimizer, only_read=False):
    """Restore the newest undamaged checkpoint, of any number of processes -> (step, extra).

    (0, {}) if there is none.  Random states return if the number of processes is the same;
    metrics.jsonl loses its lines from `step` on.  only_read: no file and no random state changes.
    SystemExit: all checkpoints are damaged.
    """

    def choose():
        folder = _newest_undamaged(out)
        step = _step_of(folder) if folder else 0
        if not only_read:
            for unfinished in out.glob("step-*.tmp"):
                shutil.rmtree(unfinished)
            _forget_lines_from(step, out / "metrics.jsonl")
        return step, folder

    step, folder = on_rank0(choose, f"{out}: cannot resume")
    if folder is None:
        return 0, {}
    # Weights and optimiser in place, on any number of ranks; then the random states.
    model_state, optim_state = dsd.get_state_dict(model, optimizer)
    state = {"model_state_dict": model_state, "optim_state_dict": optim_state}
    dcp.load(state, checkpoint_id=folder)
    dsd.set_state_dict(model, optimizer, **state)
    saved = torch.load(folder / "extra.pt")
    if only_read:
        return step, saved["extra"]
    if len(saved["rng"]) == dist.get_world_size():
        for module, rng in zip(RANDOM, saved["rng"][dist.get_rank()]):
            module.set_rng_state(rng)
    return step, saved["extra"]


def _newest_undamaged(out):
    """The newest checkpoint whose files are those of its manifest; None if there are none."""
    found = checkpoints(out)
    for folder in reversed(found):
        damaged = _damaged_files(folder)
        if not damaged:
            return folder
        print(f"skip {folder.name}: damaged {damaged}", flush=True)
    require(not found, f"{out}: no checkpoint is undamaged; start anew: --overwrite")
    return None


def _damaged_files(folder):
    """Names of the files that are not as the manifest says; its own if it is unreadable."""
    manifest = folder / "COMPLETE.json"
    if not manifest.is_file():
        return [manifest.name]
    # Read without a JSON parser, since its bytes may be anything.
    wrote = dict(re.findall(r'"(\S+)": "(\w{64})"', manifest.read_text("latin-1")))
    if not wrote:
        return [manifest.name]
    differ = set(wrote.items()) ^ set(_hashes(folder).items())
    return sorted({name for name, _ in differ})


def _forget_lines_from(step, metrics):
    """Drop the lines of steps that will be done again; the last line may be torn."""
    if not metrics.is_file():
        return
    lines = metrics.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            done = json.loads(line)["step"] < step
        except (ValueError, KeyError, TypeError):
            why = f"{metrics}:{number}: damaged, not the record of a step; delete the line"
            raise SystemExit(why) from None
        if done:
            kept.append(line)
    if lines:
        write(metrics, b"".join(kept))


def setting(args):
    """Model, data and seed of a run, for a caption; the tiny world says that it is no paper's."""
    if getattr(args, "prompt", ""):
        return f"model {args.model}, prompt {args.prompt[:40]!r}, seed {args.seed}"
    where = " (the built-in tiny world, not the paper's setting)" if args.data == "tiny" else ""
    return f"model {args.model}, data {args.data}{where}, seed {args.seed}"


def plot_curves(out, panels, caption, references=()):
    """Draw metrics of out/metrics.jsonl against the step into figures/curves.png -> the records.

    panels: (title, unit of the y axis, names of metrics).  Thin lines: training; markers: held-out
    values.  references: (number of the panel, value, what it is), drawn as dashed lines.
    """
    with open(out / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    if dist.get_rank() > 0:
        return records
    from matplotlib.figure import Figure

    # One axis a panel, a colour a metric.
    figure = Figure((5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axis, (title, unit, names)) in enumerate(zip(axes, panels)):
        for i, name in enumerate(names):
            _draw(axis, records, name, f"{name}, training", color=f"C{i}", alpha=0.4, lw=1)
            _draw(
                axis, records, f"eval_{name}", f"{name}, held out", color=f"C{i}", marker="o", ms=4
            )
        for at, value, label in references:
            if at == number:
                axis.axhline(value, color="0.4", ls="--", lw=1, label=label)
        if unit.startswith("share"):
            axis.set_ylim(0, 1)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="optimiser step", ylabel=unit)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, not over
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, out / "figures" / "curves.png")
    return records


def _draw(axis, records, name, label, **style):
    """One metric against the step, where it was logged."""
    found = [record for record in records if name in record]
    if found:
        steps = [record["step"] for record in found]
        axis.plot(steps, [record[name] for record in found], label=label, **style)


def print_evaluations(records):
    """A table of the held-out metrics before the first and after the last step, on rank 0."""
    if dist.get_rank() > 0:
        return
    held_out = []
    for record in records:
        if any(name.startswith("eval_") for name in record):
            held_out.append(record)
    print(f"{'':32} {'before':>12} {'after':>12}")
    for name in held_out[0]:
        before, after = held_out[0][name], held_out[-1][name]
        print(f"{name.replace('eval_', 'held out '):32} {before:12.4g} {after:12.4g}")


def wilson(hits, n, z=1.959964):
    """The 95 % interval of a share that was seen `hits` times in n -> (low, high)

    It holds the shares p with |hits / n - p| <= z sqrt(p (1 - p) / n), Wilson 1927.  Ties count
    half, which makes hits a fraction.
    """
    centre = hits + z * z / 2
    half = z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    share = hits / n
    low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
    return min(low, share), max(high, share)  # at 0 and 1 rounding could leave the share out


def verdict(low, high, border=0.0):
    """What an interval says of "the number is above the border" -> the first words of a claim."""
    if low > border:
        return "holds"
    if high < border:
        return "does not hold"
    return "too few to tell"


def share_shown(sentence, data, hits, n, border=0.5):
    """The line of a claim "this share is above the border": its verdict, the data, the interval.

    hits of n, a tie as half of one; sentence: what the share is of.
    """
    low, high = wilson(hits, n)
    where = "in the tiny world" if data == "tiny" else f"on {data}"
    found = f"{hits / n:.3f} [{low:.3f}, {high:.3f}]"
    return f"{verdict(low, high, border)}: {where} {sentence} ({found} of {n})"


def say_claim(paper, shown, out):
    """Print how a run ends, in three lines, on rank 0; out/claim.txt has the first two.

    paper: what the paper says.  shown: what this run shows: a verdict, a colon, a sentence that
    names the data, and the number with its 95 % interval in brackets.  The last line says where
    the files are.  SystemExit as in `write`.
    """
    rank, _ = rank_and_world()
    if rank > 0:
        return
    text = f"paper: {paper}\nhere:  {shown}\n"
    print(f"{text}files: {out / 'figures'}, and all else in {out}", flush=True)
    write(out / "claim.txt", text.encode())
