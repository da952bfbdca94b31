"""The relabelled HH-RLHF test pairs and real tokenizers; collects nothing where the files are absent."""
import os
from pathlib import Path

from common import load_pairs, tokenize_pairs
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
DATA = DATA / "relabeled_hh_rlhf" / "both" / "test.jsonl.gz"
MODELS = Path(os.environ.get("REAL_MODELS", ROOT.parent / "shared" / "models"))

if DATA.exists():
    def test_all_real_pairs_load():
        rows = load_pairs(str(DATA), "test")
        assert len(rows) == 4043 - 8  # two pairs have chosen == rejected, six an answer of white space
        for row in rows:
            assert row["prompt"].startswith("Human: ") and row["prompt"].endswith("\n\nAssistant:")
            assert row["chosen"] == " " + row["responses"][row["label"]]
            assert row["rejected"] == " " + row["responses"][1 - row["label"]]

if DATA.exists() and MODELS.exists():
    def test_all_real_pairs_tokenise():
        rows = load_pairs(str(DATA), "test")
        for folder, bos, count in (("pythia-tokenizer", [], len(rows)), ("stories260K", [1], 300)):
            rows = rows[:count]
            fast = AutoTokenizer.from_pretrained(MODELS / folder)
            found = tokenize_pairs(rows, fast, max_length=100_000, max_prompt_length=50_000)
            assert [row["row"] for row in found] == list(range(len(rows)))
            for row, ids in zip(rows[:300], found):
                assert ids["prompt_ids"][:1] == bos or not bos
                for key, response in zip(("chosen", "rejected"), ids["responses"]):
                    text = fast.decode(ids["prompt_ids"][len(bos):] + response[:-1],
                                       clean_up_tokenization_spaces=False)
                    assert text == row["prompt"] + row[key] and response[-1] == fast.eos_token_id
            short = tokenize_pairs(rows, fast, max_length=64, max_prompt_length=32)
            assert len(short) == len(rows)
            assert all(len(row["prompt_ids"]) + max(map(len, row["responses"])) <= 64 for row in short)
