"""What dGRPO alone adds in the demo, over seeds that share their warm starts, beside controls at learning rate 0.

    .venv/bin/python tools/demo_table.py [--out runs/demo-table] [--seeds 3]

Prints a Markdown table of held-out rewards (512 prompts, one sampled answer each). Exit status 1 when the mean gain is
below 0.15, a seed gains 0.05 or less, or a control moves by more than 0.05.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dgrpo.train import demo

MEAN_GAIN, LEAST_GAIN, CONTROL = 0.15, 0.05, 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-table"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    out: Path = options.out
    demo.make_files(out, 0)
    demo.run_config(demo.write_config(out, "teacher", demo.teacher_config(out, 0)))
    demo.run_config(demo.write_config(out, "student", demo.student_config(out, 0)))
    rows = []
    for seed in range(1, options.seeds + 1):
        for kind, lr in (("dGRPO", 2e-3), ("learning rate 0", 0.0)):
            name = f"{'dgrpo' if lr else 'control'}-{seed}"
            demo.run_config(demo.write_config(out, name, demo.dgrpo_config(out, seed, lr=lr)))
            before, *_, after = demo.heldout(out / "runs" / name)
            rows.append((kind, seed, before, after))
    print("\n| run | seed | before | after | gain |\n|---|---|---|---|---|")
    for kind, seed, before, after in rows:
        print(f"| {kind} | {seed} | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    gains = [after - before for kind, _, before, after in rows if kind == "dGRPO"]
    moves = [abs(after - before) for kind, _, before, after in rows if kind != "dGRPO"]
    mean = sum(gains) / len(gains)
    good = mean >= MEAN_GAIN and min(gains) > LEAST_GAIN and max(moves) <= CONTROL
    verdict = "ok" if good else "MISSED"
    print(f"\nmean gain {mean:+.3f}, least {min(gains):+.3f}; controls move by at most {max(moves):.3f}: {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
