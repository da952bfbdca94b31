"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

import torch
import twisted_smc

# ---- DPO, Cal-DPO: loss, truncation, labels


# ---- ranking accuracy and DPO^gamma


# ---- distributional preference learning


# ---- twisted SMC


def fudge_labels(world, exact, o=None):
    """FUDGE's labels (N, T) of exact samples (N, T), where the released code is off by one.

    The label of s_{1:t} is phi of a continuation of s_{1:t-1}, so it forgets s_t, and phi(s_{1:T})
    itself is never used.  methods/twisted_smc.py continues s_{1:t}.
    """
    labels = []
    for t in range(exact.shape[1]):
        prefix = exact.clone()
        prefix[:, t:] = -1  # drawn anew, and with them s_t
        S = twisted_smc.sample(
            world, None, 1, len(exact), o, proposal="base", tau=0.0, retained=prefix[:, None]
        )
        labels.append(S.log_phi[:, 0].exp())
    return torch.stack(labels, -1)


# ---- sampling adaptors and IMH
