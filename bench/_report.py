"""A row of results, and the table, JSON and figures made of rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, EAGER, COMPILE, FLOOR = "ours", "eager", "compile", "bare products"
MEMORY = "memory"  # what a row misses that is no implementation's time
LABELS = {OURS: "lossops", EAGER: "torch eager", COMPILE: "torch.compile"}
COLOURS = {OURS: "#228833", EAGER: "#4477aa", COMPILE: "#dd7744", FLOOR: "#999999"}
OTHER_COLOURS = ["#aa3377", "#ccbb44", "#66ccee", "#332288"]

GAP = 0.6  # between a figure's groups of bars, in bars

# Below it a step is calls, not kernels, and torch.compile's own overhead decides.
COMPILE_COUNTS_FROM = 100_000
# Below it (input bytes) the measurement's own error, about 1 MB, is too large a part.
MEMORY_COUNTS_FROM = 2**23


@dataclass(kw_only=True)
class Row:
    """What was measured of one case in one mode, by implementation; a missing one did not run."""

    loss: str
    case: str
    backward: bool
    elements: int
    input_bytes: int  # for a linear head, the logits'
    bytes_moved: int
    flops: int = 0
    # By contender: what `ratio` is to be at least, and at most over the floor.
    targets: dict[str, float] = field(default_factory=dict)
    memory: int | None = None  # peak bytes of ours, at most
    host_bound: bool = False  # the wall clock's seconds, on a device whose other rows are device time
    rounds: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.case}, wall time" if self.host_bound else self.case

    @property
    def mode(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    def median(self, name: str) -> float | None:
        return statistics.median(self.seconds[name]) if name in self.seconds else None

    def speedup(self, name: str) -> float | None:
        """How many times as long as ours the implementation takes."""
        theirs, ours = self.median(name), self.median(OURS)
        return None if theirs is None or ours is None else theirs / ours

    def ratio(self, name: str) -> float | None:
        """The same, but of the floor: how many times as long as it ours takes."""
        speedup = self.speedup(name)
        return 1 / speedup if speedup and name == FLOOR else speedup

    def rate(self) -> float | None:
        """Bytes per second of ours, of those that must move, where it is they that take the time."""
        ours = self.median(OURS)
        return None if ours is None or self.host_bound or not self.bytes_moved else self.bytes_moved / ours

    def flop_rate(self) -> float | None:
        """Operations per second of ours, of those of its matrix products."""
        ours = self.median(OURS)
        return None if ours is None or not self.flops else self.flops / ours

    def aims(self) -> str:
        """What there is to reach, in words."""
        aims = [f"{name} {target:g}" for name, target in self.targets.items()]
        if self.memory is not None:
            aims.append(f"{_cell(self.memory * 1e-6, 0)} MB")
        return ", ".join(aims) or "-"

    def peak(self, name: str) -> int | None:
        """Peak memory, where the case is large enough to tell."""
        return self.peak_bytes.get(name) if self.input_bytes >= MEMORY_COUNTS_FROM else None

    def misses(self, *names: str) -> list[str]:
        """What the row should have reached, over any or the named implementations, and did not."""
        misses = [] if OURS in self.seconds else [(OURS, "no result")]
        for name, target in self.targets.items():
            ratio = self.ratio(name)
            if ratio is not None and (ratio > target if name == FLOOR else ratio < target):
                where = "above" if name == FLOOR else "below"
                misses.append((name, f"{ratio_name(name)} {where} {target:g}"))
        peak, compiled = self.peak(OURS), self.ratio(COMPILE)
        if self.memory is not None and peak is not None and peak > self.memory:
            misses.append((MEMORY, f"above {_cell(self.memory * 1e-6, 0)} MB"))
        if self.elements > COMPILE_COUNTS_FROM and compiled is not None and compiled < 1:
            misses.append((COMPILE, "slower than compile"))
        return [miss for name, miss in misses if not names or name in names]

    def verdict(self) -> str:
        """Whether all was reached; what has a target and no result is named."""
        untold = [f"no {name}" for name in self.targets if OURS in self.seconds and name not in self.seconds]
        if self.misses():
            return "FAIL: " + ", ".join([*self.misses(), *untold])
        return f"pass, but {', '.join(untold)}" if untold else "pass"


def ratio_name(name: str) -> str:
    """What is over what in a row's ratio."""
    return f"{OURS}/{name}" if name == FLOOR else f"{name}/{OURS}"


def implementations(rows: Sequence[Row]) -> list[str]:
    """Those of any row: ours first, then peers, the floor last."""
    peers = (name for row in rows for name in row.seconds if name != FLOOR)
    names = dict.fromkeys([*LABELS, *peers, FLOOR])
    return [name for name in names if any(name in row.seconds for row in rows)]


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def _fewer(row: Row, name: str) -> str:
    """In how many rounds a figure was measured, where others were in more."""
    count = len(row.seconds.get(name, ()))
    return f" ({count})" if 0 < count < row.rounds else ""


def summary(row: Row, copy_rate: float) -> str:
    """One row in a line, for those who watch."""
    names = implementations([row])
    times = [f"{name} {_cell(_scaled(row.median(name), 1e3), 4)} ms{_fewer(row, name)}" for name in names]
    ratios = [
        f"{ratio_name(name)} {_cell(row.ratio(name), 2)}"
        for name in names
        if row.ratio(name) and name != OURS
    ]
    rate, flop_rate = row.rate(), row.flop_rate()
    rates = [] if rate is None else [f"{rate * 1e-9:.0f} GB/s ({rate / copy_rate:.0%} of copy)"]
    rates += [] if flop_rate is None else [f"{flop_rate * 1e-9:.0f} GFLOP/s"]
    return f"{row.loss} {row.label} {row.mode}: " + "; ".join([*times, *ratios, *rates, row.verdict()])


def table(rows: Sequence[Row], copy_rate: float) -> list[list[str]]:
    """Header and lines: case, ratios, milliseconds, rate, memory, verdict."""
    names = implementations(rows)
    others = [name for name in names if name != OURS]
    own_memory = [name for name in names if name != FLOOR]
    flops = ["GFLOP/s"] if any(row.flops for row in rows) else []
    lines = [
        [
            *("loss", "case", "pass"),
            *map(ratio_name, others),
            *(f"{name} ms" for name in names),
            *("GB/s", "% of copy", *flops),
            *(f"{name} MB" for name in own_memory),
            *("target", "verdict"),
        ]
    ]
    for row in rows:
        milliseconds = {name: _scaled(row.median(name), 1e3) for name in names}
        lines.append(
            [
                *(row.loss, row.label, row.mode),
                *(_cell(row.ratio(name), 2) for name in others),
                *(
                    _cell(ms, 2 if ms is None or ms >= 1 else 4) + _fewer(row, name)
                    for name, ms in milliseconds.items()
                ),
                _cell(_scaled(row.rate(), 1e-9), 1),
                _cell(_scaled(row.rate(), 100 / copy_rate), 0),
                *(_cell(_scaled(row.flop_rate(), 1e-9), 0) for _ in flops),
                *(_cell(_scaled(row.peak(name), 1e-6), 1) for name in own_memory),
                *(row.aims(), row.verdict()),
            ]
        )
    return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 1, 2, len(widths) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if k < 3 or k == len(lines[0]) - 1 else "--:" for k in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def notes(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the columns mean, on which machine."""
    if machine["device"] == "cuda":
        where = f"{machine['gpu']}, driver {machine['driver']}"
        build = machine["cuda"]
        last = (
            " Times are the device's, from a cold L2 and without the host's part, which is hidden; those of "
            "rows marked `wall time`, which are all launches, are the wall clock's for each of many steps in "
            "a row. Liger writes its gradient over the logits, in its forward pass, and waits for the "
            "device there; it has logits of its own, copied outside the time."
        )
    else:
        where = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
        build = machine["isa"]
        # The copy rate, measured just before, adds a little to the load of an idle machine.
        last = f" The machine was busy (load {machine['load']:.1f})." if machine["load"] > 0.5 else ""
    fewer = products = most = ""
    if any(_fewer(row, name) for row in rows for name in row.seconds):
        fewer = ", slow steps in as few as the number in brackets says"
    if any(row.flops for row in rows):
        products = (
            "`GFLOP/s` counts the three products of a linear head, forward and backward, over the time of "
            f"ours; `{FLOOR}` are these alone, into memory in place: no loss. "
        )
        most = f", but of {FLOOR} ours over theirs at most, and of ours MB at most"
    return (
        f"{where}; torch {machine['torch']}, lossops {machine['lossops']} ({build}); "
        f"{machine['date']}. Medians of {machine['rounds']} or more interleaved rounds{fewer}. "
        "`GB/s` counts what two passes must move at least (see the cases' byte counts; in a loop on the CPU "
        "our plain losses read their operands once), over the time of ours; "
        f"`% of copy` sets it against a large copy into memory in use: {machine['copy_gb_s']:.1f} GB/s here. "
        "Small cases live in the caches and may exceed it; a pass that only reads may too. "
        + products
        + "`MB` is the peak of memory during the step beyond inputs and gradients, where the input is large "
        "enough to tell. "
        f"`target`: their time over ours at least{most}; above 100 000 elements ours must not be slower than "
        "compile either." + last
    )


def write_json(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    def record(row: Row) -> dict[str, Any]:
        return {
            **{
                key: getattr(row, key)
                for key in (
                    *("loss", "case", "mode", "host_bound"),
                    *("elements", "input_bytes", "bytes_moved", "flops", "targets", "memory"),
                )
            },
            "ratio": {name: row.ratio(name) for name in row.seconds if name != OURS},
            "ms": {name: statistics.median(seconds) * 1e3 for name, seconds in row.seconds.items()},
            "gb_s": _scaled(row.rate(), 1e-9),
            "gflop_s": _scaled(row.flop_rate(), 1e-9),
            "peak_bytes": row.peak_bytes,
            "verdict": row.verdict(),
            "rounds_ms": {name: [s * 1e3 for s in seconds] for name, seconds in row.seconds.items()},
        }

    path.write_text(json.dumps({"machine": machine, "rows": [record(row) for row in rows]}, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# Figures


def _colour(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in COLOURS]
    return COLOURS.get(name) or OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]


Groups = dict[tuple[str, str], list[str]]  # by loss and case, who has a bar


def _groups(rows: Sequence[Row], names: Sequence[str], value: Callable[[Row, str], float | None]) -> Groups:
    groups: Groups = {(row.loss, row.label): [] for row in rows}
    for row in rows:
        have = groups[row.loss, row.label]
        have[:] = [name for name in names if name in have or value(row, name) is not None]
    return groups


def _bars(
    axes: Any,
    rows: Sequence[Row],
    groups: Groups,
    value: Callable[[Row, str], float | None],
    label: Callable[[Row, str], dict[str, Any]],
    colours: dict[str, str],
) -> None:
    """Horizontal bars of the same height, a group for each case, first case on top."""
    by_case = {(row.loss, row.label): row for row in rows}
    bars: dict[str, list[tuple[float, float]]] = {name: [] for name in colours}
    top, ticks = 0.0, []
    for case, names in groups.items():
        for k, name in enumerate(names):
            row = by_case.get(case)
            v = None if row is None else value(row, name)
            if row is not None and v is not None:
                place = top + k + 0.5
                bars[name].append((place, v))
                style = {"fontsize": 8, "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
                style |= label(row, name)
                axes.annotate(xy=(v, place), xytext=(4, 0), textcoords="offset points", **style)
        ticks.append(top + max(1, len(names)) / 2)
        top += max(1, len(names)) + GAP
    for name, placed in bars.items():
        places, values = zip(*placed, strict=True) if placed else ((), ())
        axes.barh(places, values, 1.0, color=colours[name]).set_label(LABELS.get(name, name))
    axes.set_yticks(ticks, [f"{loss.replace('_', '-')}  {case}" for loss, case in groups])
    axes.set_ylim(top - GAP / 2, -GAP / 2)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.xaxis.grid(True, color="#dddddd")
    axes.set_axisbelow(True)
    axes.margins(x=0.15)


def _figure(groups: Groups, panels: int, title: str) -> tuple[Any, list[Any]]:
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    bars = sum(max(1, len(names)) + GAP for names in groups.values())
    figure = Figure(figsize=(4 + 5 * panels, 2 + 0.17 * max(bars, 5)), layout=layout)
    figure.suptitle(title)
    return figure, list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])


def plot_speed(path: Path, rows: Sequence[Row], where: str) -> None:
    names = [name for name in implementations(rows) if name != OURS]
    colours = {name: _colour(name, names) for name in names}
    groups = _groups(rows, names, Row.speedup)
    by_mode = {
        title: [row for row in rows if row.backward is backward]
        for title, backward in (("forward + backward", True), ("forward only, no_grad", False))
    }
    by_mode = {title: chosen for title, chosen in by_mode.items() if chosen}

    def label(row: Row, name: str) -> dict[str, Any]:
        target = row.targets.get(name)
        if name == FLOOR:
            aimed = "" if target is None else f" (target 1/{target:g})"
            text = f"1/{row.ratio(name):.2f}{aimed}"
        else:
            aimed = "" if target is None else f" (target {target:g})"
            text = f"{row.ratio(name):.1f}{aimed}"
        missed = {"color": "#cc0000", "weight": "bold"} if row.misses(name) else {}
        return {"text": text, **missed}

    ratios = [ratio for row in rows for name in names if (ratio := row.speedup(name)) is not None]
    far_apart = max(ratios, default=1) > 40  # then on a linear axis the others would be one bar

    figure, panels = _figure(groups, len(by_mode), f"How many times as fast lossops is\n{where}")
    for axes, (title, chosen) in zip(panels, by_mode.items(), strict=True):
        _bars(axes, chosen, groups, Row.speedup, label, colours)
        axes.axvline(1, color="black", linewidth=1)
        if far_apart:
            axes.set_xscale("log")
            axes.set_xlim(left=min(ratios) / 1.5)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("their time / ours (line: equal)")
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [f"over {label}" for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


def plot_memory(path: Path, rows: Sequence[Row], where: str) -> None:
    """Peaks in units of the input, so that cases of every size share an axis that starts at 0."""
    names = [name for name in implementations(rows) if name != FLOOR]
    colours = {name: _colour(name, names) for name in names}
    chosen = [row for row in rows if row.backward and any(row.peak(name) is not None for name in names)]
    groups = _groups(chosen, names, Row.peak)

    def multiple(row: Row, name: str) -> float | None:
        return _scaled(row.peak(name), 1 / row.input_bytes)

    def label(row: Row, name: str) -> dict[str, Any]:
        text = f"{_cell(_scaled(row.peak(name), 1e-6), 1)} MB"
        if name == OURS and row.memory is not None:
            text += f" (at most {_cell(row.memory * 1e-6, 0)})"
            if row.misses(MEMORY):
                return {"text": text, "color": "#cc0000", "weight": "bold"}
        # In the bar's colour: what takes nothing has no bar to see.
        return {"text": text, "color": colours[name]}

    figure, (axes,) = _figure(groups, 1, f"Extra memory of forward + backward\n{where}")
    if chosen:
        _bars(axes, chosen, groups, multiple, label, colours)
        logits = "\n(linear: of the logits)" if any(row.flops for row in chosen) else ""
        axes.set_xlabel(f"peak beyond inputs and gradients / size of the input{logits}", fontsize=9)
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No case here is large enough to tell.", ha="center", va="center")
    figure.savefig(path, dpi=120)
