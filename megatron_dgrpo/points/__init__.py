"""The one way in which this project writes, renames, syncs, removes and sends: through points that have names.

A point (table.py) is a place in the code at which a process may die, hang or find the disk full, and at which that has
to make no difference later. In production a point is a test of one variable. Under a plan of faults (plan.py), which
only tests give, it is where a fault strikes: before the operation, in the middle of what is written, or after it.

A test refuses every other write, rename, removal and send in this project, apart from a few with reasons. No torch.
"""

from megatron_dgrpo.points.acts import (
    cut,
    open_file,
    reached,
    remove,
    remove_tree,
    rename,
    send,
    send_all,
    stream,
    sync,
    sync_folder,
    write,
    write_at,
    write_file,
)

__all__ = [
    "cut",
    "open_file",
    "reached",
    "remove",
    "remove_tree",
    "rename",
    "send",
    "send_all",
    "stream",
    "sync",
    "sync_folder",
    "write",
    "write_at",
    "write_file",
]
