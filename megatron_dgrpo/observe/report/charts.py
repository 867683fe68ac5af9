"""Which figures are drawn together, and under which heading. All others are drawn under "Everything else"."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from megatron_dgrpo.observe.report.history import History


@dataclass(frozen=True)
class Chart:
    title: str
    figures: tuple[tuple[str, str], ...]
    """A pattern of keys, and a label into which its groups go."""
    scale: str = "linear"
    """log: where all values are above 0."""
    percent: bool = False


SECTIONS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    ("Learning", (
        Chart("Reward", ((r"reward/mean", "rollouts"), (r"heldout/reward", "held out"))),
        Chart("KL to the teacher", (
            (r"teacher_kl/kl", "reverse KL"), (r"teacher_forward_kl/forward_kl", "forward KL"),
            (r"teacher_jsd/jsd", "JSD"), (r"teacher_\w+/(k1|kl_topk_\w+)", "{0}"))),
        Chart("Response length in tokens", ((r"response/length", "rollouts"), (r"heldout/length", "held out"))),
        Chart("Responses cut at max_tokens", ((r"response/truncated", "share"),), percent=True),
        Chart("Entropy of the policy", ((r"policy/entropy", "nats per token"),)),
        Chart("Loss", ((r"loss", "in all"), (r"(\w+)/loss", "{0}"))),
    )),
    ("Is it sound?", (
        Chart("Mismatch of trainer and engine", (
            (r"mismatch/abs", "mean, in nats"), (r"mismatch/max", "largest")), scale="log"),
        Chart("Tokens whose gradient is clipped away", (
            (r"surrogate/clipped_(low|high|dual)", "{0}"), (r"surrogate/ratio_clamped", "beyond the clamp")),
            percent=True),
        Chart("Ratio of live to old probability", (
            (r"surrogate/ratio", "mean"), (r"surrogate/ratio_max", "largest")), scale="log"),
        Chart("Norm of the gradient", ((r"grad_norm", "before clipping"),), scale="log"),
        Chart("Learning rate", ((r"lr", "learning rate"),)),
        Chart("Groups whose rewards are all equal", ((r"equal_groups", "groups"), (r"groups", "all groups"))),
    )),
    ("Balance of the terms", (
        Chart("Norm of each term's gradient", ((r"gradient/(\w+)/norm", "{0}"),), scale="log"),
        Chart("Cosine of two terms' gradients", ((r"gradient/([\w.]+)/cosine", "{0}"),)),
        Chart("Tokens on which two terms oppose", (
            (r"gradient/([\w.]+)/rows_opposed", "gradients: {0}"), (r"disagree/([\w.]+)", "slopes: {0}")),
            percent=True),
        Chart("Factor of each term", ((r"(\w+)/factor", "{0}"),)),
    )),
)  # fmt: skip

PROFILES: tuple[tuple[str, str, str], ...] = (
    ("row/kl", "KL to the teacher", "linear"),
    ("row/entropy", "Entropy", "linear"),
    ("mismatch/abs", "Mismatch of trainer and engine", "log"),
    ("row/teacher_mass", "Teacher's probability of the sampled token", "linear"),
    ("surrogate/ratio", "Ratio of live to old probability", "linear"),
    ("surrogate/clipped_low", "Clipped at the lower bound", "linear"),
    ("surrogate/clipped_high", "Clipped at the upper bound", "linear"),
)
_ELSEWHERE = re.compile(r"time/|mixture/|tokens@")


def sections(history: History) -> list[dict[str, Any]]:
    """What the run has of the charts above, then everything else, a chart per group of names."""
    keys = history.keys()
    used: set[str] = set()
    result: list[dict[str, Any]] = []
    for title, charts in SECTIONS:
        drawn = [chart for chart in (_chart(history, chart, keys, used) for chart in charts) if chart]
        if drawn:
            result.append({"title": title, "charts": drawn})
    rest: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if key not in used and not _ELSEWHERE.match(key):
            rest[key.partition("@")[0] if "@" in key else key].append(key)
    others = [
        _drawn(history, name, [(key, key.partition("@")[2] or key) for key in found]) for name, found in rest.items()
    ]
    if others := [chart for chart in others if chart["series"]]:
        result.append({"title": "Everything else", "charts": others, "folded": True})
    return result


def _chart(history: History, chart: Chart, keys: list[str], used: set[str]) -> dict[str, Any] | None:
    found = []
    for pattern, label in chart.figures:
        for key in keys:
            if key not in used and (match := re.fullmatch(pattern, key)):
                found.append((key, label.format(*match.groups()).replace("_", " ")))
                used.add(key)
    drawn = _drawn(history, chart.title, found)
    return drawn | {"scale": chart.scale, "percent": chart.percent} if drawn["series"] else None


def _drawn(history: History, title: str, found: list[tuple[str, str]]) -> dict[str, Any]:
    series = [{"name": label, "key": key, "points": history.curve(key)} for key, label in found]
    return {"title": title, "series": [one for one in series if any(y is not None for y in one["points"][1])]}


def profiles(history: History) -> list[dict[str, Any]]:
    """Figures by position in the document: the means of the run's first, middle and last part."""
    result = []
    keys = history.keys()
    for base, title, scale in PROFILES:
        buckets = sorted({int(key.partition("@")[2]) for key in keys if re.fullmatch(rf"{re.escape(base)}@\d+", key)})
        if len(buckets) < 2:
            continue
        curves = {bucket: history.curve(f"{base}@{bucket}") for bucket in buckets}
        ends = [x for xs, _ in curves.values() for x in xs]
        low, high = min(ends), max(ends)
        lines = []
        for name, start, stop in (("first tenth", 0.0, 0.1), ("middle", 0.4, 0.6), ("last tenth", 0.9, 1.0)):
            values = []
            for bucket in buckets:
                inside = [
                    y for x, y in zip(*curves[bucket], strict=True)
                    if y is not None and low + start * (high - low) <= x <= low + stop * (high - low)
                ]  # fmt: skip
                values.append(sum(inside) / len(inside) if inside else None)
            lines.append({"name": name, "values": values})
        result.append({"title": title, "key": base, "buckets": buckets, "lines": lines, "scale": scale})
    return result
