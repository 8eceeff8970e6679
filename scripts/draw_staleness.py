# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Draw what ``benchmarks/staleness.py`` or ``staleness_libero.py`` wrote with ``--csv``.

    python scripts/draw_staleness.py staleness.csv staleness.svg

Left: median greedy success by update, where the lag was made to be its bound. Right: by seconds,
of the synchronous loop and of one with a bound of 1. Bands are the range over seeds.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {0: "#4a4a4a", 1: "#3b7dd8", 2: "#e08a1e", 4: "#c23b5a"}


def main(source: str, picture: str) -> None:
    """Draw the figures of ``source`` as ``picture``."""
    points = defaultdict(list)
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            kind = int(row["max_policy_lag"]), row["loss"], row["forced"] == "True"
            point = float(row["seconds"]), 100 * float(row["success"])
            points[kind, int(row["update"])].append(point)
    figure = Figure((10, 4), layout="tight")
    by_update, by_time = figure.subplots(1, 2, sharey=True)
    for kind in dict.fromkeys(kind for kind, _ in points):
        lag, loss, is_forced = kind
        updates = sorted(update for other, update in points if other == kind)
        seconds, success = (
            [[point[k] for point in points[kind, update]] for update in updates] for k in (0, 1)
        )
        medians = [statistics.median(rates) for rates in success]
        if is_forced:
            style = "-" if loss == "behavior" else "--"
            label = f"lag {lag}" + (", decoupled loss" if loss == "decoupled" else "")
            by_update.plot(updates, medians, style, color=COLOURS[lag], label=label)
        if (lag, loss) == (0, "behavior") or not is_forced:
            at = [statistics.median(times) for times in seconds]
            label = f"{lag}" if lag else "0, the synchronous loop"
            by_time.plot(at, medians, color=COLOURS[lag], label=label)
            low, high = map(min, success), map(max, success)
            by_time.fill_between(at, list(low), list(high), color=COLOURS[lag], alpha=0.15, lw=0)
    by_update.set(xlabel="updates", ylabel="greedy success on held-out scenes, %")
    by_time.set(xlabel="seconds of sampling and learning")
    for axes, title in ((by_update, "the lag is made to be:"), (by_time, "bound on the lag:")):
        axes.legend(title=title, loc="lower right", frameon=False)
        axes.grid(color="#e0e0e0")
        axes.set_ylim(0, 102)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):  # equal figures, equal file
        figure.savefig(picture, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
