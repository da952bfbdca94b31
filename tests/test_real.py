"""Real HH-RLHF pairs, tokenizers and a small model; collects nothing where they are absent."""

import json
import math
import os
from pathlib import Path

import dpo
from transformers import AutoTokenizer

from common import load_pairs, tokenize_pairs

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
DATA = DATA / "relabeled_hh_rlhf" / "both" / "test.jsonl.gz"
MODELS = Path(os.environ.get("REAL_MODELS", ROOT.parent / "shared" / "models"))

if DATA.exists():

    def test_all_real_pairs_load():
        rows = load_pairs(str(DATA), "test")
        assert (
            len(rows) == 4043 - 8
        )  # two pairs have chosen == rejected, six an answer of white space
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
                    text = fast.decode(
                        ids["prompt_ids"][len(bos) :] + response[:-1],
                        clean_up_tokenization_spaces=False,
                    )
                    assert text == row["prompt"] + row[key] and response[-1] == fast.eos_token_id
            short = tokenize_pairs(rows, fast, max_length=64, max_prompt_length=32)
            assert len(short) == len(rows)
            assert all(
                len(row["prompt_ids"]) + max(map(len, row["responses"])) <= 64 for row in short
            )

    def test_report_counts(capsys):
        load_pairs(str(DATA), "test")
        report = capsys.readouterr().out
        assert "kept 4035, dropped 8" in report
        assert "empty response: 6" in report and "chosen equals rejected: 2" in report

    def test_dpo_on_real_pairs(tmp_path):
        rows = load_pairs(str(DATA), "test")
        short = [
            r for r in rows if len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) < 700
        ]
        for split, part in (("train", short[:256]), ("test", short[256:320])):
            keep = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in part]
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in keep)
            )
        history = dpo.main(
            dpo.Args(
                model=str(MODELS / "stories260K"),
                data=str(tmp_path),
                out=str(tmp_path / "run"),
                max_steps=20,
                lr=1e-4,
                batch_size=16,
                epochs=2,
                eval_every=10**6,
                eval_pairs=64,
            )
        )
        training = [r for r in history if "loss" in r]
        assert abs(training[0]["loss"] - math.log(2)) < 1e-6 and len(training) == 20
        second_epoch = sum(r["loss"] for r in training[16:]) / 4
        assert second_epoch < math.log(2)  # pairs seen before
        assert all(math.isfinite(r["eval_loss"]) for r in history if "eval_loss" in r)
