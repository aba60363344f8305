"""More data or better data: the domain's score against the number of pairs, curated and uncurated.

    python benchmarks/data_scaling.py             five sizes, three seeds; about a quarter of an hour on one core
    python benchmarks/data_scaling.py --quick     one seed, half the steps; a few minutes
    python benchmarks/data_scaling.py --work DIR  keep everything in DIR; takes what curation_gain.py left there

The crawl, the CLIP, the training and the figure of curation_gain.py (70 % of the rows are junk). Of the crawl an
eighth, a quarter, half, three quarters and all are taken, each a part of the next, drawn anew for each seed;
`uncurated` trains on all that arrived of it, `curated` on what `curate build` keeps of that. Every training sees the
same number of samples: with fewer pairs, each more often. `worth`: as many uncurated pairs reach what the curated ones
of a size do, by a line between the sizes; null where no number of them does. The last line is one JSON object, with the
two curves: [pairs, recall@1, standard deviation over the seeds or null].
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import random
from statistics import mean, stdev

from benchmarks.curation_gain import TYPICAL, Crawl, Setting, arguments, benchmark, crawl, keys, score

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # the least is still a batch of curated pairs
ARMS = ("curated", "uncurated")
WIDTH = 50  # characters of the chart
Curve = list[tuple[float, float, float | None]]  # pairs, recall@1, its standard deviation where there are several seeds


def main() -> None:
    with benchmark(arguments(__doc__).parse_args(), seeds=3) as setting:
        crawled = crawl(setting, TYPICAL)
        curves = {arm: curve(setting, crawled, arm) for arm in ARMS}
        before = score(setting, crawled, "curated", [], 0, "before")
    print(f"{setting.samples:,} samples seen, seeds: {setting.seeds}; the start: {before:.1%}\n")
    print("| part of the crawl | curated pairs | recall@1 | uncurated pairs | recall@1 |\n|---|---|---|---|---|")
    for fraction, *points in zip(FRACTIONS, *curves.values(), strict=True):
        cells = [f"{pairs:,.0f} | {value:.1%}{'' if off is None else f' ± {off:.1%}'}" for pairs, value, off in points]
        print(f"| {fraction} | {' | '.join(cells)} |")
    print(f"\n{chart(curves)}\n")
    worth = {f"{pairs:.0f}": equal(value, curves["uncurated"]) for pairs, value, _ in curves["curated"]}
    print(json.dumps({"seeds": setting.seeds, "start": round(before, 4), **curves, "worth": worth}))


def curve(setting: Setting, crawled: Crawl, arm: str) -> Curve:
    """Pairs and score of an arm at each size, means over the seeds."""
    points = []
    for fraction in FRACTIONS:
        sizes, scores = [], []
        for seed in range(setting.seeds):
            chosen = part(crawled, arm, fraction, seed)
            name = arm if fraction == 1 else f"{arm}, {fraction}"
            sizes.append(len(chosen))
            scores.append(score(setting, crawled, name, chosen, seed))
        points.append((mean(sizes), round(mean(scores), 4), round(stdev(scores), 4) if len(scores) > 1 else None))
        print(f"{arm}, {points[-1][0]:,.0f} pairs: {points[-1][1]:.1%}", file=sys.stderr, flush=True)
    return points


def part(crawled: Crawl, arm: str, fraction: float, seed: int) -> list[str]:
    """The pairs of an arm in a part of the crawl; a smaller part lies within a larger one."""
    arrived = crawled.arrived()
    order = random.Random(seed).sample(arrived, len(arrived))
    within = set(order[: round(fraction * len(order))])
    return [key for key in keys(crawled, arm, seed) if key in within]


def equal(value: float, uncurated: Curve) -> int | None:
    """So many uncurated pairs score the same, by a line between the sizes; None: more than there are."""
    low_pairs, low = 0.0, float("-inf")
    for pairs, high, _ in uncurated:
        if high >= value:
            share = (value - low) / (high - low) if low > float("-inf") else 1.0
            return round(low_pairs + share * (pairs - low_pairs))
        low_pairs, low = pairs, high
    return None


def chart(curves: dict[str, Curve]) -> str:
    """Each size a line, its length the score from 0 to the best."""
    best = max(value for points in curves.values() for _, value, _ in points)
    lines = []
    for arm, points in curves.items():
        for number, (pairs, value, _) in enumerate(points):
            bar = "#" * round(WIDTH * value / best)
            lines.append(f"{'' if number else arm:<10} {pairs:>6,.0f} {bar} {value:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
