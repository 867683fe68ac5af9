"""The report's rollouts out of a journal, by the code that writes and the code that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.cli import main
from megatron_dgrpo.launch.report import kept_rollouts
from megatron_dgrpo.packing.trajectory import Segment
from megatron_dgrpo.rollout.journal import Began, Journal
from megatron_dgrpo.rollout.messages import Group, Response


def journal_of(folder: Path, steps: int) -> None:
    journal = Journal(folder)
    for step in range(1, steps + 1):
        journal.begin(Began(1, step, 0, ("p",), 8, 1))
        responses = []
        for sample in range(8):
            ids = np.asarray([3, 4 + sample], np.int32)
            segment = Segment(ids, True, behaviour_logprobs=np.zeros(2, np.float32))
            responses.append(Response(sample, 7, (segment,), "stop", {"exact_match": float(sample == 7)}))
        journal.append(Group("p", np.asarray([1, 2], np.int32), tuple(responses)))
    journal.close()


def test_samples_are_spread_over_the_run_and_over_the_rewards(tmp_path: Path) -> None:
    journal_of(tmp_path / "rollouts", 200)
    found = kept_rollouts(tmp_path)
    steps = sorted({item.step for item in found.items})
    assert steps[0] == 1 and steps[-1] == 200 and len(steps) == 60 and len(found.items) == 240
    of_one = [item for item in found.items if item.step == 1]
    assert [item.rewards["exact_match"] for item in of_one][0] == 0.0 and of_one[-1].rewards["exact_match"] == 1.0
    assert of_one[0].prompt == "1 2" and "ids are shown" in found.note
    assert of_one[0].name == "p, sample 0" and of_one[0].num_tokens == 2


def test_texts_are_the_students_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(20)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.decoder = tokenizers.decoders.WordPiece(prefix="##")
    (tmp_path / "hf").mkdir()
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    journal_of(tmp_path / "rollouts", 2)
    found = kept_rollouts(tmp_path)
    assert found.note == "" and found.items[0].prompt == "w1 w2" and found.items[0].response == "w3 w4"


def test_a_damaged_step_is_said_and_the_page_has_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal_of(tmp_path / "rollouts", 3)
    (tmp_path / "config.yaml").write_text("stages: [{kind: sft, steps: 1}, {kind: dgrpo, steps: 3}]\n")
    path = sorted((tmp_path / "rollouts").iterdir())[1]
    path.write_bytes(b"x" * 100)
    assert main(["report", str(tmp_path)]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert {item["step"] for item in data["rollouts"]["items"]} == {1, 3}
    assert "rollouts of 1 steps can't be read" in data["rollouts"]["note"]


def test_a_run_without_rollouts_says_so(tmp_path: Path) -> None:
    assert "keeps no rollouts" in kept_rollouts(tmp_path).note
