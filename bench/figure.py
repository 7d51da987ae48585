"""The benchmark as one picture: peers by size as bars, and how the lead scales beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.report import group, name

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "TorchRL rollout": "#0072B2",
    "TensorDictModule loop": "#56B4E9",
    "mbrl-lib ModelEnv": "#009E73",
    "JAX jit(scan)": "#D55E00",
    "torch.compile": "#E69F00",
    "CUDA graph": "#F0E442",
    "sample_traces, eager": "#CC79A7",
    "sample_traces, tf32": "#999999",
    "sample_traces, float16": "#666666",
}
# And marks, which greyscale keeps.
HATCHES = {
    "TensorDictModule loop": "////",
    "mbrl-lib ModelEnv": "....",
    "torch.compile": "xxxx",
    "CUDA graph": "----",
    "sample_traces, eager": "\\\\\\\\",
    "sample_traces, tf32": "++++",
    "sample_traces, float16": "oo",
}
MARKERS = {"TorchRL rollout": "o", "JAX jit(scan)": "s"}
AXES = {"B": "traces B", "T": "steps T", "D": "observations D", "h": "width h"}
FONT: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the results of one machine.

    Args:
        content (dict): what a result file holds.
        path (Path): the picture to write.
    """
    with plt.rc_context(FONT):
        figure = plt.figure(figsize=(9, 5.6), layout="constrained")
        sides: Any = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        left, right = sides
        bars = left.subplots()
        _bars(bars, [record for record in content["records"] if group(record) == "traces"])
        handles, labels = bars.get_legend_handles_labels()
        left.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        scaling = [record for record in content["records"] if group(record) == "scaling"]
        right.suptitle("Around M, one size changed at a time", fontsize=9)
        panels = right.subplots(2, 2, sharey=True)
        for axes, axis in zip(panels.flat, AXES, strict=True):
            _curves(axes, axis, [record for record in scaling if record["axis"] == axis])
        lines, peers = panels[0, 0].get_legend_handles_labels()
        right.legend(lines, peers, loc="outside lower center", ncols=2, frameon=False)
        right.supylabel("time / sample_traces", fontsize=9)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _bars(axes: Axes, records: list[dict[str, Any]]) -> None:
    names = [other for other in COLOURS if any(other in r["ratios"] for r in records)]
    height, ticks, y = 0.8, [], 0.0
    seen: set[str] = set()
    for record in records:
        present = [other for other in names if other in record["ratios"]]
        for row, other in enumerate(present):
            ratio = record["ratios"][other]
            low, high = record.get("intervals", {}).get(other, [ratio, ratio])
            axes.barh(
                y + row,
                ratio - 1,
                height,
                left=1,
                color=COLOURS[other],
                hatch=HATCHES.get(other),
                edgecolor="white",
                linewidth=0,
                label=None if other in seen else other,
                xerr=[[max(ratio - low, 0)], [max(high - ratio, 0)]],
                error_kw={"elinewidth": 0.8},
            )
            seen.add(other)
            axes.annotate(
                f"{ratio:#.2g}" if ratio < 10 else f"{ratio:.0f}",
                (max(ratio, high, 1), y + row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        if "floor" in record:
            floor = 1 / record["floor"]["ours"]
            # Matplotlib leaves names that begin so out of the legend.
            label = "_floor" if "floor" in seen else "the floor"
            axes.vlines(
                floor,
                y - 0.5,
                y + len(present) - 0.5,
                "black",
                "dotted",
                linewidth=1.4,
                label=label,
            )
            seen.add("floor")
        ticks.append((y + (len(present) - 1) / 2, name(record).replace(" ", "\n")))
        y += len(present) + 0.9
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("time / sample_traces (log scale; 1 is ours)")
    axes.margins(x=0.12, y=0.02)


def _curves(axes: Axes, axis: str, records: list[dict[str, Any]]) -> None:
    values = [record["value"] for record in records]
    for other, marker in MARKERS.items():
        points = [(r["value"], r["ratios"][other]) for r in records if other in r["ratios"]]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker, ls="-", ms=4, color=COLOURS[other], label=other
            )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(AXES[axis])
