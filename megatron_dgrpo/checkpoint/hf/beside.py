"""What stands beside the weights in a Hugging Face folder: config, generation config, tokenizer, chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.hf.families import read_spec, rope_parameters
from megatron_dgrpo.errors import ConversionError
from megatron_dgrpo.model.spec import ModelSpec

_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
_TEMPLATES = "additional_chat_templates"


def copy_beside(source: Path, target: Path, dtype: str, spec: ModelSpec) -> None:
    """Write all of it into `target`, with the weights' type in the config. Code is never copied.

    A model that was trained with other rotary embeddings than its folder's is described with those.
    """
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        contents = {str(path.relative_to(source)): path.read_bytes() for path in _files(source)}
    except (OSError, ValueError) as error:
        raise ConversionError(f"the config and tokenizer of {source} can't be read ({error})") from error
    config.pop("torch_dtype", None)  # the name that transformers 4 used
    config["dtype"] = dtype
    found = read_spec(source)
    if (found.rope, found.max_positions) != (spec.rope, spec.max_positions):
        for name in ("rope_theta", "rope_scaling"):  # where transformers 4 kept them
            config.pop(name, None)
        config |= {"rope_parameters": rope_parameters(spec.rope), "max_position_embeddings": spec.max_positions}
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    points.write_file("config.file", target / "config.json", content)
    for name, content in contents.items():
        (target / name).parent.mkdir(exist_ok=True)
        points.write_file("config.file", target / name, content)


def _files(source: Path) -> Iterator[Path]:
    yield from (source / name for name in _NAMES if (source / name).is_file())
    yield from sorted((source / _TEMPLATES).glob("*.jinja"))
