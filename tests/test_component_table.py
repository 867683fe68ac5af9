"""The table of docs/processes.md: every part of a run, killed and hung, and the tests that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = (
    "rank", "engine host", "an engine's worker", "reward worker", "process of tested code", "judge", "data",
    "server of processes", "supervisor", "the disk",
)  # fmt: skip


def test_every_part_has_a_line_and_every_test_exists() -> None:
    page = (ROOT / "docs/processes.md").read_text()
    rows = re.findall(r"^\| (?!part|-)(.*) \|$", page.partition("## What is killed")[2].partition("\n## ")[0], re.M)
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    assert [part for part in PARTS if not any(row[0].startswith(part) for row in cells)] == []
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for row in cells:
        assert len(row) == 5 and all(row[:2]), row
        named = re.findall(r"`(test_\w+)`", row[4])
        assert named and set(named) <= there, (row[0], sorted(set(named) - there))
