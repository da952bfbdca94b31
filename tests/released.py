"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

import math

# ---- DPO, Cal-DPO: loss, truncation, labels


# ---- ranking accuracy and DPO^gamma


# ---- distributional preference learning


# ---- twisted SMC


# ---- sampling adaptors and IMH


def imh_accepts(log_w_proposed, log_w_held, u):
    """Accept with probability min(1, w' / w); the comma makes a tuple of one, which is true."""
    accept = (u < min(1.0, math.exp(log_w_proposed - log_w_held)),)
    return bool(accept)


def imh_states(log_w, u):
    """Indices of the draws held, one chain of N draws in turn; the first is where it starts."""
    states = [0]
    for i in range(1, len(log_w)):
        if imh_accepts(log_w[i], log_w[states[-1]], u[i]):
            states.append(i)
        else:
            states.append(states[-1])
    return states


def secret_reward(log_p, log_p_plus):
    """The implicit reward at beta = 1, with the opposite sign."""
    return log_p - log_p_plus


def unconditional_ids(prompt_ids, response_ids, start):
    """What the prior reads: the start token and the response, without the prompt."""
    return [start, *response_ids]


def clamped_log_q(token_logps):
    """log q of a response; each token counts -25 at least, also one outside the kept set."""
    return sum(max(logp, -25.0) for logp in token_logps)
