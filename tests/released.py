"""What the code released with the papers computes, where it differs from the equation.

A few plain lines for each difference; the tests print both values side by side.
"""

# ---- DPO, Cal-DPO: loss, truncation, labels


# ---- ranking accuracy and DPO^gamma


# ---- distributional preference learning


# ---- twisted SMC


# ---- sampling adaptors and IMH
