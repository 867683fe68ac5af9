"""How evenly packing spreads FLOPs, on drawn lengths. One JSON line per case; status 1 when a target is missed.

    python tools/bench/balance.py [--quick]

`ratio` is the greatest load over the mean; `bound` is the least that this draw allows, since a tree is on one
data-parallel rank; `filled` is tokens over the room of all micro-batches.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_dgrpo.model.flops import training_cost
from megatron_dgrpo.packing.balance import balance
from megatron_dgrpo.packing.layout import Span
from megatron_dgrpo.packing.shards import TRUNK, deal, spans_of
from megatron_dgrpo.packing.trees import Tree, cut_to_fit
from megatron_dgrpo.testing.long_context import BUDGET, QWEN3_8B, long_context_trees

COST = training_cost(QWEN3_8B)
DP = 8


def over_dp(trees: list[Tree]) -> tuple[dict[str, float], list[list[list[Tree]]]]:
    trees = cut_to_fit(trees, BUDGET, setting="")
    ranks = balance(trees, num_ranks=DP, room=BUDGET, cost=COST)
    loads = [sum(COST.of(tree) for batch in rank for tree in batch) for rank in ranks]
    mean = sum(loads) / DP
    count = sum(len(rank) for rank in ranks)
    values = {
        "ratio": max(loads) / mean,
        "bound": max(1.0, max(COST.of(tree) for tree in trees) / mean),
        "filled": sum(tree.num_tokens for tree in trees) / (count * BUDGET),
        "micro_batches": count,
    }
    return values, ranks


def over_cp(trees: list[Tree], cp: int) -> float:
    """The greatest load over the mean, of one micro-batch."""
    spans = spans_of(trees)
    loads = [0.0] * cp
    for segment in deal(spans, cp=cp, unit=1, cost=COST):
        tree = spans[segment.tree]
        run: Span = tree.trunk if segment.branch == TRUNK else tree.branches[segment.branch]
        seen = 0 if segment.branch == TRUNK else tree.trunk.length
        loads[segment.rank] += COST.of_branch(seen, segment.place.start - run.start, segment.place.length)
    return max(loads) * cp / sum(loads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 draws instead of 20")
    draws = 5 if parser.parse_args().quick else 20
    failed = False
    for groups, target in ((256, 1.10), (128, None), (64, None)):
        results = [over_dp(long_context_trees(groups, seed)) for seed in range(draws)]
        worst = max((values for values, _ in results), key=lambda values: values["ratio"])
        filled = min(values["filled"] for values, _ in results)
        ok = target is None or (worst["ratio"] <= target and filled >= 0.95)
        failed |= not ok
        above = max(values["ratio"] / values["bound"] for values, _ in results)
        print(json.dumps({
            "name": f"dp{DP}, {groups} groups, the worst of {draws} draws", "ratio": round(worst["ratio"], 4),
            "bound": round(worst["bound"], 4), "ratio_over_bound": round(above, 4), "filled": round(filled, 4),
            "target": target, "ok": ok,
        }), flush=True)  # fmt: skip
        for cp in (2, 4, 8) if groups == 256 else ():
            batches = [batch for _, ranks in results[:5] for rank in ranks for batch in rank]
            ratio = max(over_cp(batch, cp) for batch in batches)
            failed |= ratio > 1.05
            print(json.dumps({
                "name": f"cp{cp}, the worst of {len(batches)} micro-batches", "ratio": round(ratio, 4),
                "target": 1.05, "ok": ratio <= 1.05,
            }), flush=True)  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
