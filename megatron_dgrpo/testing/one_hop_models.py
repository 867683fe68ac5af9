"""The demo's files: the one-hop task, an untrained teacher and an untrained, smaller student.

python -m megatron_dgrpo.testing.one_hop_models FOLDER SEED
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatron_dgrpo.testing.one_hop import write_one_hop
from megatron_dgrpo.testing.tiny import save_tiny_qwen3


def write_models(folder: Path, seed: int, *, num_train: int = 8192, num_heldout: int = 512) -> None:
    """`task/`, `teacher/`, `student/`. The seed varies the task; the models start from the same weights for all."""
    files = write_one_hop(folder / "task", num_train=num_train, num_heldout=num_heldout, seed=seed)
    sizes = {"teacher": (128, 4, 2, 1), "student": (64, 2, 1, 4)}
    for name, (hidden, heads, kv_heads, model_seed) in sizes.items():
        save_tiny_qwen3(
            folder / name,
            vocab_size=files.vocab_size,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            seed=model_seed,
            special_ids=files.special_ids,
        )
        for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / "task" / tokenizer, folder / name / tokenizer)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_models(Path(sys.argv[1]), int(sys.argv[2]))
