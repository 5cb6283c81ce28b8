"""Accuracy, as the paper prints it, over the throughput that we measured."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from figures import save
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox
from table_parts import read_paper

FORMS = {  # of a network: what the legend calls it, colour and marker
    "deployed": ("RepMLPNet, deployed", "#0072B2", "o"),
    "plain": ("RepMLPNet, straightforward", "#E69F00", "s"),
    "fused": ("others (timm)", "#555555", "^"),
}
USUAL = 120  # epochs, the longest of the paper's own runs; what was trained for longer has a hollow mark


class Point(NamedTuple):
    """A network in one form: images a second, the printed top-1, its name, and whether it was trained for longer."""

    speed: float
    top1: float
    name: str
    longer: bool


def points_of(rows: pd.DataFrame, form: str) -> list[Point]:
    """Return the networks of the paper's Tables 2 and 3 that were measured in a form.

    rows: records of inference in one setting. One top-1 a network: that of the shortest training, the authors' own run,
    where the paper has several.
    """
    paper = read_paper()
    paper = paper[paper["table"].isin(("2", "3"))]
    by_epochs = paper.sort_values("epochs", key=lambda column: column.astype(int), kind="stable")
    one_each = by_epochs.drop_duplicates(["model", "input"])
    several = set(one_each["model"][one_each["model"].duplicated()]) - {""}
    of_form = rows[rows["form"] == form].set_index(["model", "img_size"])
    found = []
    for row in one_each.itertuples():
        if (row.model, int(row.input)) in of_form.index:
            name = re.sub(r"RepMLPNet-| \(authors' run\)| \+ DeiT-train", "", row.label)
            size = f" ({row.input} px)" if row.model in several else ""
            distilled = " and distilled" if "DeiT" in row.label else ""
            longer = int(row.epochs) > USUAL
            more = f", {row.epochs} epochs{distilled}" if longer else ""
            speed = float(of_form.loc[(row.model, int(row.input))]["images_per_second"])
            found.append(Point(speed, row.top1_pct, name + size + more, longer))
    return found


def draw(rows: pd.DataFrame, title: str, stem: Path, pdf: bool = False) -> list[Path]:
    """Draw the paper's top-1 over our measured throughput, RepMLPNet deployed and plain, and its peers, if any."""
    by_form = {form: points for form in FORMS if (points := points_of(rows, form))}
    if not by_form:
        return []
    figure, axis = plt.subplots(figsize=(9, 6.2), layout="constrained")
    for form, points in by_form.items():
        words, colour, marker = FORMS[form]
        for longer, face in ((False, colour), (True, "none")):
            some = [point[:2] for point in points if point.longer is longer]
            label = f"{words}, trained for longer than {USUAL} epochs" if longer else words
            if some:
                axis.scatter(*zip(*some, strict=True), s=42, fc=face, ec=colour, marker=marker, label=label, zorder=3)
    # a network of ours in both forms has one accuracy: a line joins the two, and one name will do
    plain = {point.name: point for point in by_form.get("plain", ())}
    joins = []
    for point in by_form.get("deployed", ()):
        if point.name in plain:
            joins += axis.plot(
                [plain[point.name].speed, point.speed], [point.top1] * 2, color="#0072B2", lw=0.7, alpha=0.5
            )
    axis.set_xscale("log")
    axis.margins(x=0.22, y=0.1)
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("images a second, measured")
    axis.set_ylabel("top-1 on ImageNet as printed in the paper, %")
    axis.grid(alpha=0.3, which="both")
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    shown = {point.name: point for form in ("plain", "fused", "deployed") for point in by_form.get(form, ())}
    label_points(axis, list(shown.values()), joins)
    return save(figure, stem, pdf)


def label_points(axis: Axes, named: Sequence[Point], lines: Sequence[Line2D] = ()) -> list[Text]:
    """Write a name beside each point, in the nearest place where it is whole, hides nothing and belongs to no other.

    lines: of the figure, which a name should not cross where it can be helped. Returns the names as they stand.
    """
    figure: Any = axis.get_figure()
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    centres = [axis.transData.transform(point) for path in axis.collections for point in path.get_offsets()]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    frame, texts = axis.get_window_extent(renderer), []
    for point in sorted(named, key=lambda point: (len(point.name), point)):  # short ones are to lie nearest
        x, y = axis.transData.transform(point[:2])
        best: tuple[float, Text, Bbox] | None = None
        for distance, step in itertools.product((9, 14, 20, 27, 35, 44), range(16)):
            if best is not None and best[0] <= distance:
                break  # no place costs less than its distance
            angle = 2 * math.pi * step / 16
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            side = "left" if dx > 2 else "right" if dx < -2 else "center"
            line = {"arrowstyle": "-", "lw": 0.6, "color": "grey", "shrinkA": 0, "shrinkB": 4}
            text = axis.annotate(
                point.name, point[:2], textcoords="offset points", xytext=(dx, dy), ha=side, va="center",
                fontsize=8, arrowprops=line if distance > 9 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line
            cost = distance + _misplaced(box, (x, y), centres, taken, frame)
            cost += 12 * sum(box.overlaps(line.get_window_extent(renderer)) for line in lines)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        texts.append(best[1])
        taken.append(best[2].padded(1))
    return texts


def _misplaced(
    box: Bbox, own: tuple[float, float], centres: Sequence[Any], taken: Sequence[Bbox], frame: Bbox
) -> float:
    """Return how bad a place of a name is: it hides something, leaves the frame, or lies nearer to another point."""

    def away(point: Sequence[float]) -> float:
        return math.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))

    hidden = sum(box.overlaps(other) for other in taken)
    outside = not (frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)
    others = [away(point) for point in centres if math.hypot(point[0] - own[0], point[1] - own[1]) > 1]
    ambiguous = bool(others) and min(others) < 1.15 * away(own)
    return 1000 * hidden + 1000 * outside + 60 * ambiguous
