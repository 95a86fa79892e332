"""``codecs.png`` shows speed against ratio, in one panel a group, late in training. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from benchmarks.suites.codecs.contenders import OURS, OWN
from benchmarks.suites.codecs.groups import NAMES
from benchmarks.suites.codecs.measure import GroupResult, Measured, Results

_OURS_COLOUR: Final = "#d62728"
_OWN_COLOUR: Final = "#1f77b4"
_PEER_COLOUR: Final = "#555555"
_MARKER_PIXELS: Final = 8
_LINE_PIXELS: Final = 3
#: A label may stand here round its marker, in points: the sides come first, then places farther and farther away.
_PLACES: Final = tuple(
    (x * distance, y * distance)
    for distance in (8, 14, 22, 32, 44, 58, 74, 92)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.7), (0.8, -0.7), (-0.8, 0.7), (-0.8, -0.7))
)
#: From this distance on, a line shows which marker a label belongs to.
_FAR_POINTS: Final = 14
_TICKS: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


def draw(results: Results, path: Path) -> None:
    """Draw into the file ``path``; its ending says the kind."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        # without being told otherwise, this is Agg, which needs no display
        figure = Figure(figsize=(15, 10.5), dpi=110, layout="constrained")
        panels: Sequence[Axes] = list(figure.subplots(2, 2).flat)
        for axes, name in zip(panels, NAMES, strict=True):
            _panel(axes, results.of(name, "late"))
        figure.suptitle(
            "Lossless codecs on a trained GPT, late in training; up and to the right is better. "
            "Red and blue: asyncckpt's own; grey: peers"
        )
        figure.draw_without_rendering()  # this settles the layout, so that labels can be placed by pixels
        figure.set_layout_engine("none")
        for axes, name in zip(panels, NAMES, strict=True):
            _label(axes, results.of(name, "late"))
        figure.savefig(path)


def _panel(axes: Axes, group: GroupResult) -> None:
    for found in group.measured:
        axes.scatter(*_point(found), s=50, color=_colour(found.label), zorder=3)
    axes.axhline(group.bound, color="black", lw=1, ls="--", zorder=1)
    speeds = [found.encode.median / 1e6 for found in group.measured]
    ratios = [group.bound, *(found.ratio for found in group.measured)]
    margin = 0.12 * (max(ratios) - min(ratios))
    axes.set_xscale("log")
    axes.set_xlim(min(speeds) / 2, max(speeds) * 2)
    axes.set_ylim(min(ratios) - margin, max(ratios) + margin)
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.minorticks_off()
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(color="#eeeeee", zorder=0)
    axes.set_title(f"{group.name} (dashed: order-0 bound of the byte planes, {group.bound:.3f})", loc="left")
    axes.set_xlabel("encode, MB/s a core")
    axes.set_ylabel("ratio")


def _label(axes: Axes, group: GroupResult) -> None:
    """Put a name beside each marker, at the nearest place where it covers neither another name, a marker nor the
    bound."""
    pixels = [axes.transData.transform(_point(found)) for found in group.measured]
    bound = float(axes.transData.transform((1.0, group.bound))[1])
    inside = axes.get_window_extent()
    taken = [_square(x, y, _MARKER_PIXELS) for x, y in pixels]
    taken.append(Bbox.from_extents(inside.x0, bound - _LINE_PIXELS, inside.x1, bound + _LINE_PIXELS))
    # the most crowded one goes first, as it has the fewest places to go to
    crowding = [sum(abs(x - u) + abs(y - v) < 20 * _MARKER_PIXELS for u, v in pixels) for x, y in pixels]
    for index in sorted(range(len(pixels)), key=lambda index: -crowding[index]):
        found = group.measured[index]
        for x, y in _PLACES:
            text = _annotate(axes, found, x, y)
            box = text.get_window_extent()
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
        else:  # covering something is better than no name at all
            _annotate(axes, found, *_PLACES[0])


def _annotate(axes: Axes, found: Measured, x: float, y: float) -> Annotation:
    far = max(abs(x), abs(y)) > _FAR_POINTS
    return axes.annotate(
        found.label,
        _point(found),
        (x, y),
        textcoords="offset points",
        ha="center" if x == 0 else "left" if x > 0 else "right",
        va="center" if y == 0 else "bottom" if y > 0 else "top",
        color=_colour(found.label),
        fontweight="bold" if found.label == OURS else "normal",
        arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#999999", "shrinkA": 0, "shrinkB": 4} if far else None,
    )


def _square(x: float, y: float, half: float) -> Bbox:
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _point(found: Measured) -> tuple[float, float]:
    return found.encode.median / 1e6, found.ratio


def _colour(label: str) -> str:
    if label == OURS:
        return _OURS_COLOUR
    return _OWN_COLOUR if label in OWN else _PEER_COLOUR
