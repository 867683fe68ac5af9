"""What computing a tree costs, in FLOPs (or any unit: only ratios matter).

Legend: a pair is a query and a key that it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dgrpo.packing.trees import Tree


@dataclass(frozen=True)
class Cost:
    """Of a model, and of what is done with it: forward, backward, both, a teacher's forward beside them."""

    token: float = 1.0  # linear layers
    pair: float = 0.0  # attention
    row: float = 0.0  # output head

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.token + other.token, self.pair + other.pair, self.row + other.row)

    def of(self, tree: Tree) -> float:
        length = len(tree.trunk)
        pairs = trunk_pairs(length) + sum(branch_pairs(length, 0, len(branch)) for branch in tree.branches)
        return self.token * tree.num_tokens + self.pair * pairs + self.row * tree.num_rows

    def of_copies(self, tree: Tree) -> float:
        """The same with each branch in a document of its own, its prompt repeated."""
        alone = (Tree(tree.trunk, (branch,)) for branch in tree.branches)
        return sum(self.of(one) for one in alone) if tree.branches else self.of(tree)

    def of_branch(self, trunk: int, first: int, length: int) -> float:
        """Linear layers and attention of some tokens of a branch on a trunk of so many tokens."""
        return self.token * length + self.pair * branch_pairs(trunk, first, length)

    def of_trunk(self, first: int, length: int) -> float:
        """The same for some tokens of a trunk."""
        return self.of_branch(0, first, length)


def trunk_pairs(length: int) -> int:
    return length * (length + 1) // 2


def branch_pairs(trunk: int, first: int, length: int) -> int:
    """Pairs whose query is one of the `length` tokens from `first` on of a branch."""
    return length * (trunk + first) + trunk_pairs(length)
