"""README's commands for own data, on 200 real HH-RLHF pairs and a real small model, if present."""

import json
import re
import shlex

import pytest
from conftest import ROOT, records, run_all
from test_readme import write_own_files
from test_real import DATA, MODELS

from common import load_pairs

MODEL = MODELS / "stories260K"


def own_data_commands():
    """The five commands of README, from pairs to win rates."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Your own data") :]
    (block, *_) = re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S)
    return block.splitlines()


if DATA.exists() and MODEL.exists():

    @pytest.fixture(scope="module")
    def done(tmp_path_factory):
        """The folder in which all of them were typed, and what each printed."""
        folder = tmp_path_factory.mktemp("own")
        rows = []
        for row in load_pairs(str(DATA), "test"):
            row = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            if sum(map(len, row.values())) < 400 and len(rows) < 200:  # 512 tokens of few letters
                rows.append(row)
        (folder / "real.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_own_files(folder, folder / "real.jsonl")
        (folder / "M").symlink_to(MODEL)
        jobs = []
        for command in own_data_commands():
            words = shlex.split(command)[1:]
            words[0] = str(ROOT / words[0])
            jobs.append((folder, words))
        return folder, run_all(jobs, folder)

    def test_each_command_works_at_the_first_try(done):
        _, outcomes = done
        assert len(outcomes) == 5
        for outcome in outcomes:
            assert outcome["code"] == 0 and not outcome["traceback"], outcome

    def test_what_was_trained_is_said_and_done(done):
        folder, outcomes = done
        for name, outcome in zip(("my-sft", "my-dpo"), outcomes):
            (line,) = re.findall(r"^to train: .*$", outcome["stdout"], re.M)
            steps = len([r for r in records(folder / "results" / name) if "loss" in r])
            assert f" in {steps} steps of " in line and steps >= 20
            claim = (folder / "results" / name / "claim.txt").read_text().splitlines()
            assert [one.partition(":")[0] for one in claim] == ["paper", "here"]
