"""docs/config.md is what the schema says today, and has all of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from megatron_dgrpo.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "tools/config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.reference(), "run `python tools/config_reference.py`"


def test_the_page_has_every_section_once_and_every_link_leads_somewhere(tool: ModuleType) -> None:
    text = tool.reference()
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)), "two sections of one name: links would lead to the first"
    assert {"Config", "Model", "Layout", "Engine", "SFT", "DGRPO", "Judge", "Source"} <= set(headings)
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {heading.lower() for heading in headings}


def test_every_key_of_every_section_is_described(tool: ModuleType) -> None:
    found: list[type[BaseModel]] = tool.models(Config)
    plain = {"kind", "weight", "betas", "eps", "weight_decay", "seed", "layout", "run_dir", "student", "model"}
    bare = {
        f"{model.__name__}.{name}"
        for model in found
        for name, field in model.model_fields.items()
        if not field.description and name not in plain and not tool.models_in(field.annotation)
    }
    assert bare <= {"Constant.value", "DGRPO.engine", "Evaluation.engine"}


def test_types_in_words(tool: ModuleType) -> None:
    from megatron_dgrpo.config.schema import DGRPO, Adam, Layout, Sampling

    def row(model: type[BaseModel], key: str) -> str:
        return next(line for line in tool.section(model).splitlines() if line.startswith(f"| `{key}` "))

    assert row(Layout, "tp").startswith("| `tp` | whole number > 0 | `1` | Tensor-parallel size")
    assert row(Layout, "sequence_parallel").startswith("| `sequence_parallel` | true or false | `false` |")
    assert row(Adam, "lr").startswith("| `lr` | number >= 0 |  |")
    assert row(Sampling, "temperature").startswith("| `temperature` | number >= 0.01, <= 2.0 | `1.0` |")
    assert row(DGRPO, "group_size").startswith("| `group_size` | whole number >= 2 |  | Responses")
    assert "list of [exact_match](#exactmatch) or" in row(DGRPO, "rewards")
