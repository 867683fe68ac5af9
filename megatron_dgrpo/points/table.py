"""Every named point: what kind of operation it is, what has happened before it, and what comes after it. Data alone.

`file` is a small file written whole; `write` and `send` may stop half way; `place` is a line of code at which something
else than a system call of these kinds happens. In brackets stands who gets there: rank 0 where nobody is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["open", "write", "file", "sync", "cut", "rename", "remove", "tree", "send", "place"]


@dataclass(frozen=True)
class Point:
    kind: Kind
    where: str


_TABLE: list[tuple[str, Kind, str]] = [
    # ---- a folder that is whole or not there: checkpoints, exports (checkpoint/aside.py) ----
    ("folder.lock", "open", "the folder aside is made; its lock makes it one that somebody works on"),
    ("folder.left_over", "tree", "a folder aside that nobody holds is there; it goes"),
    ("folder.failed", "tree", "a write failed and was told; what it left goes"),
    ("folder.unlock", "remove", "everything is written and synced; the lock goes, then comes the name"),
    ("folder.name", "rename", "the folder aside is whole and synced; it gets its name"),
    ("folder.sync", "sync", "the lock is gone; the folder's names reach the disk before it has its own"),
    ("folder.parent", "sync", "the folder has its name; the name reaches the disk"),
    ("checkpoint.sync", "sync", "the manifest is written; the folder's names reach the disk"),
    ("config.sync", "sync", "config and tokenizer are copied; their names reach the disk"),
    ("tensors.sync", "sync", "index and format are written; their names reach the disk"),
    ("tensors.data_sync", "sync", "[every rank] the rank's tensors are written; they reach the disk"),
    ("export.sync", "sync", "[writing ranks] a file of the export is written; it reaches the disk"),
    ("journal.sync", "sync", "records were appended; they reach the disk before any rank uses them"),
    ("journal.folder", "sync", "the journal's file is synced; its name reaches the disk"),
    ("metrics.sync", "sync", "a save begins; lines of the steps before it reach the disk first"),
    (
        "removed.sync",
        "sync",
        "lines that come again stand in *.removed.jsonl; they reach the disk before they go from where they were",
    ),
    # ---- what is in a checkpoint ----
    ("save.snapshot", "place", "[every rank] tensors are copied in host memory; nothing of the save is on the disk"),
    ("save.hash", "place", "[every rank] all files but the manifest are written; they are read and hashed"),
    (
        "save.done",
        "place",
        "[every rank] the checkpoint has its name, old ones are gone; training does not know of it yet",
    ),
    ("config.file", "file", "a file of config or tokenizer is copied"),
    ("checkpoint.model", "file", "model.json: before the weights"),
    ("tensors.format", "file", "metadata.json: after a folder of tensors was written, before its sync"),
    ("checkpoint.trainer", "file", "trainer.json: after the weights, before the optimizer's state"),
    ("checkpoint.manifest", "file", "manifest.json: everything else is written and hashed"),
    ("export.index", "file", "the index of an export of several files"),
    ("config.new", "file", "config.yaml of the run, aside [supervisor]"),
    ("environment.new", "file", "environment.json, aside [supervisor]"),
    ("records.new", "file", "a file of records without those of steps that come again, aside"),
    ("report.new", "file", "report.html, aside [dgrpo report]"),
    ("tensors.data", "write", "[every rank] tensors, one after another, in the rank's file"),
    ("export.header", "write", "[writing ranks] the header of a file of the export"),
    ("export.block", "write", "[writing ranks] a block of weights of the export"),
    ("journal.record", "write", "a beginning, a group, an update; nobody has used it yet"),
    ("metrics.line", "write", "a step's figures; its update was made and stands in the journal"),
    ("events.line", "write", "something that happened [supervisor, too]"),
    ("removed.lines", "write", "lines of steps that come again, into *.removed.jsonl; they are still where they were"),
    ("lock.owner", "write", "who works in the folder; the lock is held [supervisor]"),
    ("tensorboard.record", "write", "a record of TensorBoard's file"),
    ("tensors.index", "rename", "the index of a folder of tensors is written and synced; torch gives it its name"),
    ("prune.name", "rename", "an old checkpoint loses its name, and is one no more"),
    ("damaged.name", "rename", "a checkpoint that is not whole is set aside"),
    ("config.name", "rename", "config.yaml gets its name [supervisor]"),
    ("environment.name", "rename", "environment.json gets its name [supervisor]"),
    ("records.name", "rename", "that file takes the place of the other"),
    ("report.name", "rename", "report.html is replaced [dgrpo report]"),
    ("prune.tree", "tree", "an old checkpoint without its name goes"),
    ("prune.left_over", "tree", "what a kill left aside goes"),
    # ---- files of the run's folder ----
    ("lock.open", "open", "the run's folder is there; its lock file [supervisor]"),
    ("journal.open", "open", "a step begins; its file may be there from before"),
    ("metrics.open", "open", "records are cut to the checkpoint; metrics.jsonl is opened to go on"),
    ("events.open", "open", "something happened; events.jsonl [supervisor, too]"),
    ("cut.open", "open", "a checkpoint was chosen; records of later steps are looked for"),
    ("removed.open", "open", "there are such records; *.removed.jsonl"),
    ("tensorboard.open", "open", "a new file for TensorBoard"),
    ("export.file", "open", "[writing ranks] a file of the export, at its full size"),
    ("lock.clear", "cut", "the lock is held; the last owner's name goes [supervisor]"),
    ("journal.torn", "cut", "a record that a kill cut short goes"),
    ("journal.undo", "cut", "a record could not be written whole; what there is of it goes"),
    ("metrics.undo", "cut", "a line had no room on the disk; what there is of it goes, and the line waits"),
    ("metrics.torn", "cut", "a line that a kill cut short goes"),
    ("records.cut", "cut", "lines of steps that come again are safe beside; they go"),
    ("export.size", "cut", "[writing ranks] a file of the export gets its size"),
    ("journal.forget", "remove", "a step begins; the file of one that is not kept goes"),
    # ---- a step ----
    ("step.begin", "place", "[every rank] a step of any stage begins"),
    (
        "step.chunk",
        "place",
        "[every rank] a chunk of the batch is in the journal, and every rank has it; it is not trained on",
    ),
    ("step.part", "place", "[every rank] a part of the batch is in the gradients"),
    ("step.update", "place", "[every rank] an update was made; it is not in the journal"),
    ("step.journal", "place", "the update is in the journal; its figures are not written"),
    ("step.end", "place", "[every rank] the step's figures are written; nobody has decided whether to save"),
    ("announce", "place", "rank 0 says something to the other ranks, in the store"),
    ("evaluate", "place", "held-out prompts are asked; nothing of it is written"),
    ("resume", "place", "[every rank] a checkpoint was found whole; nothing is loaded"),
    ("load", "place", "[every rank] weights and optimizer state are loaded; random states are not set"),
    # ---- weights on their way to engines ----
    ("transfer.file", "open", "a push begins: the file for two buckets"),
    ("inbox.file", "place", "[engine] a push over a connection begins: the engine's own file for two buckets is made"),
    ("transfer.begin", "place", "the engines have taken the manifest; no byte has moved"),
    ("transfer.box", "place", "[every rank] a part of a bucket is copied"),
    ("transfer.told", "place", "a bucket is whole and the engines are told to load it; nobody has waited for them"),
    ("transfer.end", "place", "[every rank] the engines have the new weights"),
    ("board.publish", "place", "[any rank] something is said in the ranks' store"),
    ("inbox.bytes", "place", "[engine] bytes of a bucket came; they are put into the file"),
    ("engine.bucket", "place", "[engine] a bucket is there; it is copied over the old weights"),
    ("engine.finish", "place", "[engine] all buckets are copied; the update is finished"),
    ("device.sum", "place", "[every rank] a bucket's bytes on devices are added up"),
    ("transfer.unlink", "remove", "every rank has mapped the file; its name goes"),
    ("links.unlink", "remove", "all ranks have joined; the socket's name goes"),
    ("server.unlink", "remove", "[engine] the host ends; its socket's name goes"),
    ("links.line", "send", "[other ranks] a bucket is written; rank 0 is told which boxes"),
    ("links.free", "send", "a bucket's place may be written again; the others are told"),
    ("wire.send", "send", "[client] a question to an engine host, or a part of it"),
    ("server.send", "send", "[engine] an answer, or a part of it"),
]

POINTS: dict[str, Point] = {name: Point(kind, where) for name, kind, where in _TABLE}
