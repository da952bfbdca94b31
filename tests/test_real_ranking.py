"""methods/ranking_accuracy.py on real text with a real small model; collects nothing where the
files are absent.

REAL_DATA and REAL_MODELS name folders with relabeled_hh_rlhf/both/test.jsonl.gz, HH-RLHF test pairs
with both the original and the relabelled choice, and stories260K, a language model of 260,032
parameters, context 512.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import ranking_accuracy as ra
import released
import torch
from ranking_accuracy import Args
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(
    os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"),
    "relabeled_hh_rlhf",
    "both",
    "test.jsonl.gz",
)
MODEL = Path(os.environ.get("REAL_MODELS", ROOT.parent / "shared" / "models"), "stories260K")

if DATA.is_file() and MODEL.is_dir():

    @pytest.fixture(scope="module")
    def pairs(tmp_path_factory):
        """A file of the pairs in their original order, chosen first, as the HH-RLHF files have
        them.
        """
        folder = tmp_path_factory.mktemp("hh")
        with (
            gzip.open(DATA, "rt", encoding="utf-8") as rows,
            open(folder / "test.jsonl", "w") as file,
        ):
            for row in map(json.loads, rows):
                texts = [
                    row["prompt"] + "\n\nAssistant: " + response for response in row["responses"]
                ]
                best = row["original_label"]
                file.write(
                    json.dumps(
                        dict(
                            chosen=texts[best], rejected=texts[1 - best], subset=row["data_subset"]
                        )
                    )
                    + "\n"
                )
        return folder / "test.jsonl"

    def test_shorter_wins_on_real_text(pairs):
        # Token counts of the chosen and the rejected reply, counted here from the file by the
        # tokenizer alone. The
        # released statistics of the harmless half (2312 pairs, GPT-2 tokens) have .549 shorter and
        # .426 both-in-prompt.
        items = ra.load_items(str(pairs), Args())
        assert len(items) == 4035  # of 4043; six empty replies, two identical pairs
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        args = Args(text="released")
        rows = ra.encode(tokenizer, items[:400], args, 10**6)
        for item, (row, *more) in zip(items, rows):
            assert not more
            whole = [
                tokenizer(item.prompt + " " + r, add_special_tokens=False)["input_ids"]
                for r in item.responses
            ]
            assert [
                row["prompt_ids"][1:] + r for r in row["responses"]
            ] == whole  # nothing lost, nothing twice
        n_w, n_l = np.array([[len(r) for r in row["responses"]] for (row,) in rows]).T
        shorter = (n_w < n_l).mean()
        assert 0.40 < shorter < 0.60  # either side of a coin: 0.5 +- 4 standard deviations of 400

    def test_scores_are_those_of_the_padded_model(pairs, tmp_path):
        # 24 real pairs against one forward pass for each text: fp32 sums of up to 400 tokens
        ra.setup(0)
        args = Args(sample=24)
        items = ra.load_items(str(pairs), args)
        found = ra.score(str(MODEL), items, tmp_path, args)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(MODEL).eval(),
            AutoTokenizer.from_pretrained(MODEL),
        )
        assert len(found) >= 15  # prompts that fill the context of 512 tokens are left out
        for i, records in found.items():
            ((row,),) = ra.encode(tokenizer, [items[i]], args, 512)
            for record, response in zip(records, row["responses"]):
                ids, n = torch.tensor([row["prompt_ids"] + response]), len(row["prompt_ids"])
                with torch.no_grad():
                    logps = model(ids).logits[0, n - 1 : -1].double().log_softmax(-1)
                expected = logps.gather(1, ids[0, n:, None]).sum().item()
                assert record.logp == pytest.approx(expected, rel=1e-5) and record.tokens == len(
                    response
                )

    def test_window_changes_what_is_measured(pairs, tmp_path):
        # In the released code the first |y| tokens of x + y are scored: where both replies are
        # shorter than the prompt, shorter wins, always.
        ra.setup(0)
        items = ra.load_items(str(pairs), Args(sample=60))
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        rows = []
        for item in items:
            (found,) = ra.encode(tokenizer, [item], Args(), 512)
            if isinstance(found, str) or len(found) > 1:
                continue
            if max(map(len, found[0]["responses"])) < len(found[0]["prompt_ids"]):
                rows.append(released.score_the_first_tokens(found[0]))
        assert len(rows) > 20
        model = ra.load_model(str(MODEL))
        for batch in ra.pack_pairs(rows, 8192, 0, 1):
            logps = ra.token_logps(model, batch).double()
            sums = logps.new_zeros(batch["responses"]).index_add(0, batch["owner"], logps)
            first, second = sums.view(-1, 2).T
            n_first, n_second = batch["counts"].view(-1, 2).T
            assert torch.equal((first - second).sign(), (n_second - n_first).sign().double())
