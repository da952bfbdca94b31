"""The released outputs of dpl.py's paper give its published numbers; no tests without the files."""

import os
from pathlib import Path

import dpl
import pytest
import scipy.stats
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
# Of 187 jailbroken responses, those rated no lower than the safe one: by mean, then by quantile.
COUNTS = {
    "helpful_mean_and_variance": "111 91 101 102 103 104 106 106 106 107 107 111 117 121 129",
    "harmless_mean_and_variance": "3 12 10 9 6 5 4 4 5 5 5 3 5 12 22",
    "both_mean_and_variance": "57 32 37 38 40 48 52 54 54 54 55 57 60 62 67",
    "helpful_categorical": "114 108 108 109 109 113 113 112 113 114 114 115 114 115 115",
    "harmless_categorical": "8 8 8 8 8 8 8 8 8 8 8 8 7 7 7",
    "both_categorical": "60 25 25 25 26 38 54 61 61 61 63 63 64 64 64",
}
R2 = {
    "helpful_mean_and_variance": 0.6344175995,
    "harmless_mean_and_variance": 0.4905061294,
    "both_mean_and_variance": 0.5320656487,
    "helpful_categorical": 0.3033830872,
    "harmless_categorical": 0.3321168439,
    "both_categorical": 0.3863719399,
}
NLL = {
    "helpful": 0.6142537676,
    "harmless": 0.2430059765,
    "both": 0.4339858360,
    "helpful_mean_and_variance": 1.8227080611,
    "harmless_mean_and_variance": 0.1342261284,
    "both_mean_and_variance": 0.5893786117,
    "helpful_categorical": 0.6779478946,
    "harmless_categorical": 0.3541133227,
    "both_categorical": 0.4885218901,
}
FILES = [
    DATA / f"jailbroken_evaluations_{type}.jsonl"
    for type in ("base", "mean_and_variance", "categorical")
]

if all(path.exists() for path in FILES):

    def test_published_jailbreak_rates_and_all_quantiles(capsys):
        results = dpl.main(dpl.SummarizeArgs(files=tuple(map(str, FILES))))
        for name, k, ties in (
            ("helpful", 98, 7),
            ("harmless", 7, 1),
            ("both", 47, 1),
        ):  # Table 1, Standard
            assert results[name].mean == dpl.Rate(k, ties, 187)
        for name, counts in COUNTS.items():
            mean, *quantiles = map(int, counts.split())
            found = results[name]
            assert found.mean == dpl.Rate(mean, 0, 187)
            expected = [dpl.Rate(k, 0, 187) for k in quantiles]
            assert [found.quantiles[alpha] for alpha in dpl.ALPHAS] == expected
            assert found.quantile == found.quantiles[0.01]
            assert found.r_squared == pytest.approx(R2[name], abs=1e-9)
        printed = capsys.readouterr().out
        assert "98/187  0.5241  ties 7; ties half: 0.5053 [0.4343, 0.5762]" in printed
        assert "25/187  0.1337  ties 0; ties half: 0.1337 [0.0922, 0.1899]" in printed

    def scored(path):
        return {one.name: one for one in dpl.read_outputs(path)}

    def test_other_measures_of_risk():
        """The 1 % quantile under 2 / pi times sigma, the slope-matched scale; and mean - sd."""
        models = scored(FILES[1])
        z = scipy.stats.norm.ppf(0.01)
        for name, expected in (("both", 51), ("helpful", 106), ("harmless", 5)):
            outputs = models[f"{name}_mean_and_variance"].outputs
            mean = dpl.utility(outputs, "mean_and_variance", "mean")
            sd = dpl.utility(outputs, "mean_and_variance", "sd")
            assert dpl.rate(mean + z * 2 / torch.pi * sd).hits == expected
        outputs = scored(FILES[2])["both_categorical"].outputs
        mean, sd = (dpl.utility(outputs, "categorical", measure) for measure in ("mean", "sd"))
        assert dpl.rate(mean - sd).hits == 53

    def test_published_outputs_have_the_expected_likelihood():
        for path in FILES:
            for name, one in scored(path).items():
                safe, jailbroken = one.outputs.unbind(1)
                losses = dpl.pair_losses(safe, jailbroken, one.reward_type)
                assert losses.mean() == pytest.approx(NLL[name], abs=1e-9)
        base, mv, cat = (dpl.read_outputs(path)[-1] for path in FILES)
        for one, measure, expected in (
            (base, "mean", (1.6321753844, 0.5941090303)),
            (mv, "mean", (0.2719058685, 0.1155739851)),
            (mv, "sd", (0.1837016699, 0.2157973808)),
            (cat, "mean", (0.7369117038, 0.5805991187)),
            (cat, "sd", (0.2128340599, 0.2364783686)),
        ):
            found = dpl.utility(one.outputs, one.reward_type, measure).mean(0)
            assert found.tolist() == pytest.approx(expected, abs=1e-9)
