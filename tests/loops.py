"""What the kernels for a GPU compute, in plain loops: the truth for tests of the kernels, and what
stands in for them on a CPU.
"""

import torch


def attend_reference(q, keys, values, table, used, scale):
    """common.attend_by_table, a slot at a time: gather by the table, softmax, sum."""
    assert keys.shape == values.shape and table.dtype == used.dtype == torch.int32
    out = []
    for slot in range(len(q)):
        rows = table[slot, : used[slot]].long()
        group = q.shape[1] // keys.shape[1]
        k = keys[rows].repeat_interleave(group, dim=1).float()  # (tokens, heads, d)
        v = values[rows].repeat_interleave(group, dim=1).float()
        scores = torch.einsum("hd,thd->ht", q[slot].float(), k) * scale
        out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
    return torch.stack(out).to(q.dtype)


def varlen_reference(
    q, k, v, queries, keys, longest_query, longest_key,
    *, scale=None, window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn of torch 2.13, a piece at a time.

    q (N, heads, d), k and v (keys, fewer heads, d), cumulative lengths -> (N, heads, d)
    """
    assert queries.dtype == keys.dtype == torch.int32 and len(queries) == len(keys)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    copies = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    left, right = window_size
    assert right == 0
    out = []
    for i in range(len(queries) - 1):
        a, b = queries[i], queries[i + 1]
        c, d = keys[i], keys[i + 1]
        n, m = int(b - a), int(d - c)
        assert n <= longest_query and m <= longest_key
        scores = torch.einsum("nhd,mhd->hnm", q[a:b], k[c:d]) * (scale or q.shape[2] ** -0.5)
        # The last query stands at the last key.
        at_query = torch.arange(n, device=q.device)[:, None] + m - n
        at_key = torch.arange(m, device=q.device)[None]
        seen = at_key <= at_query
        if left >= 0:
            seen &= at_key >= at_query - left
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hnm,mhd->nhd", weights, v[c:d]))
    assert queries[-1] == len(q) and keys[-1] <= len(k)
    return torch.cat(out)
