"""The probability-quality trade-off of an exact posterior on the tiny world: a table and figures, in seconds.

    python tests/exact_posterior.py [run folder]

The prior is the tiny language model, given that its response is one of 512 it drew for the prompt (8 prompts): a few
hundred strings each, so that log p, the known reward and log Z are exact sums and every token of p_+ proportional to
p exp(r / beta) has an exact probability, under every sampling adaptor.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
import imh_adaptors
from common import setup
from test_imh_adaptors import exact_posterior

if __name__ == "__main__":
    setup(0)
    settings = [f"{kind},temperature={T}" for kind in ("ancestral_strict", "top_k=5", "top_p090", "typical_p=0.5")
                for T in (0.5, 1, 1.5)]
    out = sys.argv[1] if sys.argv[1:] else "results/imh_adaptors-posterior"
    args = imh_adaptors.Args(model="exact posterior", out=out, max_length=128, samples=64)
    exact_posterior(args, settings=settings)
    imh_adaptors.imh(args)
    imh_adaptors.figures(args)
