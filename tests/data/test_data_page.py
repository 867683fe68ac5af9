"""The examples of docs/data.md are data sections without contradictions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_dgrpo.config.data import Dataset, problems

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_an_example(number: int) -> None:
    section = Dataset.model_validate(yaml.safe_load(EXAMPLES[number])["data"])
    assert list(problems("data", section)) == []
