"""Rows that the library `datasets` reads: parquet files, folders of files, what it has saved, datasets of the hub.

It keeps them in memory-mapped Arrow files, so that any row can be read at any time and none is held. Columns of text
are checked as a whole, without making Python objects of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgrpo.config.data import ROW_FILES, SAVED_DATASET, Source
from megatron_dgrpo.data.bad_rows import BadRows
from megatron_dgrpo.data.patience import Patience
from megatron_dgrpo.data.rows import messages_problem
from megatron_dgrpo.errors import DataError, UnreachableError

_FORMATS = {".jsonl": "json", ".parquet": "parquet"}


class Table:
    """Rows by their index, those without a problem; what became of the others is in `bad`."""

    def __init__(self, source: Source, *, needs_answer: bool = False) -> None:
        self._rows = open_dataset(source, streaming=False)
        self.patience = Patience(source)
        self.bad = BadRows(source.where)
        good = np.ones(len(self._rows), bool)
        for name, (problem, numbers) in self._problems(source, needs_answer):
            fresh = [n for n in numbers if good[n - 1]]
            self.bad.add_many(fresh, f"{problem} in the field {name!r}")
            good[np.asarray(fresh, np.int64) - 1] = False
        self.numbers = np.flatnonzero(good) + 1
        """The number of each row, from 1, bad ones counted."""
        self.bad.num_good = len(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.numbers[index]) - 1
        return self.patience(lambda: self._rows[number])

    def _problems(self, source: Source, needs_answer: bool) -> Iterator[tuple[str, tuple[str, list[int]]]]:
        """For each field: a problem, and the numbers of the rows that have it."""
        import pyarrow as pa
        import pyarrow.compute as pc

        check_columns(source, self._rows.column_names)
        for name in source.text_fields:
            column = self._rows.data.column(name)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise DataError(f"{source.where}: the field {name!r} holds {column.type}, not text; name another field")
            null = column.is_null().to_numpy()
            yield name, ("has nothing (null)", (np.flatnonzero(null) + 1).tolist())
            empty = pc.equal(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
            yield name, ("has nothing", (np.flatnonzero(np.where(null, False, empty).astype(bool)) + 1).tolist())
        if source.messages is not None:
            wrong: dict[str, list[int]] = {}
            for number, said in enumerate(self._rows.data.column(source.messages).to_pylist(), 1):
                for problem in messages_problem({source.messages: said}, source.messages, needs_answer)[:1]:
                    wrong.setdefault(problem.removesuffix(f" in the field {source.messages!r}"), []).append(number)
            yield from ((source.messages, found) for found in wrong.items())


def check_columns(source: Source, names: list[str] | None) -> None:
    wanted = [*source.text_fields, *([source.messages] if source.messages is not None else [])]
    if names is not None and (missing := [name for name in wanted if name not in names]):
        raise DataError(
            f"{source.where} has no field {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names))}"
        )


def open_dataset(source: Source, *, streaming: bool) -> Any:
    """As `datasets` has it: a map-style dataset, or one to iterate over."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return _open(source, streaming)
    except DataError:
        raise
    except Exception as error:  # whatever of its readers or of the network raises
        where = "the hub can be reached from here, or name a folder with its files as path" if source.hub else (
            "its files are whole"
        )  # fmt: skip
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = UnreachableError if source.hub is not None and not _is_answer(error) else DataError
        raise kind(f"{source.where} can't be read ({words}): see that {where}") from error


def _is_answer(error: Exception) -> bool:
    """Whether the hub itself said no, or gave what cannot be read."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    if isinstance(error, DatasetNotFoundError):
        return "cannot be accessed" not in str(error)
    return isinstance(error, DatasetsError | ValueError | TypeError | KeyError)


def _open(source: Source, streaming: bool) -> Any:
    import datasets

    if source.hub is not None:
        return datasets.load_dataset(
            source.hub, source.subset, split=source.split, revision=source.revision, streaming=streaming
        )
    path = Path(source.path or "")
    if any((path / name).is_file() for name in SAVED_DATASET):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if source.split not in saved:
                raise DataError(f"{path} has no split {source.split!r}; it has {', '.join(map(repr, saved))}")
            saved = saved[source.split]
        return saved.to_iterable_dataset() if streaming else saved
    files = row_files(path)
    return datasets.load_dataset(
        _FORMATS[files[0].suffix], data_files=[str(file) for file in files], split="train", streaming=streaming
    )


def row_files(path: Path) -> list[Path]:
    """The file itself, or a folder's files of rows in the order of their names."""
    if path.is_file():
        if path.suffix not in ROW_FILES:
            raise DataError(f"{path} ends in none of {', '.join(ROW_FILES)}: name a file of one of these kinds")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in ROW_FILES)
    kinds = sorted({file.suffix for file in found})
    if len(kinds) != 1:
        what = f"has files of both kinds ({', '.join(kinds)}): keep one kind in it" if kinds else (
            f"has no file that ends in {' or '.join(ROW_FILES)}, and is no folder that `datasets` has saved"
        )  # fmt: skip
        raise DataError(f"{path} {what}")
    return found
