"""A real language model (REAL_MODELS/stories260K) and real prompts (REAL_DATA).

Where the environment names them or ../shared beside the repository holds them; elsewhere nothing is
collected.
"""

import math
import os
from pathlib import Path

import imh_adaptors as imh
import numpy as np
import pytest
import torch

import common

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = Path(os.environ.get("REAL_MODELS", SHARED / "models")) / "stories260K"
DATA = (
    Path(os.environ.get("REAL_DATA", SHARED / "data")) / "relabeled_hh_rlhf/helpful/test.jsonl.gz"
)

if MODEL.exists() and DATA.exists():

    @pytest.fixture(scope="module")
    def run(tmp_path_factory):
        """Four settings, 12 prompts, 16 responses; a warmer copy of the model is p_+."""
        aligned = tmp_path_factory.mktemp("aligned")
        model = common.AutoModelForCausalLM.from_pretrained(MODEL)
        model.model.norm.weight.data *= (
            0.8  # all logits divided by 1.25: p_+ is the prior at temperature 1.25
        )
        model.save_pretrained(aligned)
        common.load_tokenizer(str(MODEL)).save_pretrained(aligned)
        args = imh.Args(
            model=str(aligned),
            ref_model=str(MODEL),
            data=str(DATA),
            template="Human: {} Assistant:",
            sampling_types=("ancestral_strict", "top_p090"),
            temperatures=(0.8, 1.0),
            prompts=12,
            samples=16,
            max_length=72,
            max_prompt_length=48,
            reward="implicit",
            out=str(tmp_path_factory.mktemp("r") / "r"),
        )
        imh.generate(args)
        imh.score(args)
        return args

    def test_real_model(run):
        corpora = imh.read_corpora(run)
        assert {len(corpus.prompts) for corpus in corpora.values()} == {192}
        records = {x.setting: x for x in imh.imh(run)}
        for spec, corpus in corpora.items():
            assert 1 / 16 <= records[spec].ess <= 1
            # 40 tokens, float32, two passes: log a / q = sum_t log Z_t
            T = imh.parse_adaptor(spec).get("temperature", 1)
            check = corpus.log_aligned / T - corpus.log_q - corpus.log_kept
            assert abs(check).max() < 2e-3
        # At temperature 0.8 the warmer model is the prior again, token by token.
        same = corpora["ancestral_strict,temperature=0.8"]
        assert same.log_q == pytest.approx(same.log_prior, abs=5e-3)
        assert records["top_p090,temperature=1"].log_Z < 0  # log of a kept mass

    def test_posterior_without_a_reward(run, tmp_path):
        """With the prior as sampler and r = 0, Eq. 1 is the prior: equal weights."""
        args = imh.replace(
            run,
            model=str(MODEL),
            reward="implicit",
            sampling_types=("ancestral_strict",),
            temperatures=(1.0,),
            out=str(tmp_path / "r"),
        )
        imh.generate(args)
        imh.score(args)
        corpus = imh.read_corpora(args)["ancestral_strict,temperature=1"]
        assert abs(corpus.implicit).max() < 1e-3  # p_+ = p
        x = imh.imh(imh.replace(args, target="posterior"))[0]
        assert x.accept == pytest.approx(1, abs=1e-3)
        assert x.log_Z == pytest.approx(0, abs=1e-3)

    def test_two_tokens_by_enumeration(run):
        """All 512 x 512 continuations of two tokens: Z_g by summation and as E_q prod Z_t.

        4000 draws, 5 standard errors (seeded; a false alarm has probability below 1e-6).
        """
        model, tokenizer = common.load_model(str(MODEL)), common.load_tokenizer(str(MODEL))
        prompt, V = tokenizer("Once upon a time").input_ids, len(tokenizer)
        logits = model(torch.tensor([prompt + [v] for v in range(V)])).logits[:, -2:].double()
        adaptor = "top_p=0.9,temperature=1.5"
        (first, Z_1), (second, Z_2) = (
            imh.adapt(logits[0, 0], adaptor),
            imh.adapt(logits[:, 1], adaptor),
        )
        q = (first[:, None] + second).exp()
        assert q.sum().item() == pytest.approx(1)
        log_Z = ((first + Z_1 + Z_2).logsumexp(0)).item()
        uniforms = torch.tensor(np.random.default_rng(0).random((4000, 2)))
        drawn = imh.sample(model, [prompt], 4000, adaptor, uniforms, tokenizer)
        log_w = torch.tensor(
            [sum(one.log_kept) for one in drawn if len(one.ids) == 2], dtype=torch.float64
        )
        assert len(log_w) == 4000  # no end of text in this model's first two tokens
        error = log_w.exp().std().item() / math.exp(log_Z) / math.sqrt(4000)
        assert (log_w.logsumexp(0) - math.log(4000)).item() == pytest.approx(log_Z, abs=5 * error)
        for one in drawn[:200]:
            assert sum(one.log_q) == pytest.approx(q[tuple(one.ids)].log().item(), abs=1e-3)
