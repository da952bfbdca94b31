"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

# ---- DPO, Cal-DPO: loss, truncation, labels


def cut_prompt(prompt, room, keep):
    """A prompt that is too long: its last `room` tokens for HH, its first for all other data."""
    if keep == "end":
        return prompt[-room:]
    return prompt[:room]


# ---- ranking accuracy and DPO^gamma


# ---- distributional preference learning


# ---- twisted SMC


# ---- sampling adaptors and IMH
