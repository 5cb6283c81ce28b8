"""Make the page: Bokeh's figures, still empty, in a template with the packed numbers; page.js fills them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    CustomJS,
    CustomJSTickFormatter,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    LogColorMapper,
    Range1d,
)
from bokeh.palettes import Greys256, Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from explorer import codes

HERE = Path(__file__).resolve().parent
PANELS = {"fc": "FC alone", "branches": "Branches alone", "merged": "Merged: FC + branches"}
PROFILES = {"point": "this point", "layer": "this layer", "net": "the whole net"}
LINES = {  # label, colour, dashes, marker of the profiles' lines
    "fc": ("FC alone", "#31688e", "solid", "circle"),
    "merged": ("merged", "#c8500a", "solid", "square"),
    "flat": ("flat kernel", "#777777", "dashed", None),
}
POINT, SEEN, STRONGER = "#e8189b", "#1ea7fd", "#e3120b"  # the output point, the branches' taps, what exceeds them


@dataclass(frozen=True)
class Page:
    """Everything that a page says.

    title: of the net. source: where the weights are from. layers: from `describe_layer`, in order, and `numbers`, the
    packed texts of each. opening: the name of the layer that the page opens with. all_layers: how many the net has.
    net: the net's profile.
    """

    title: str
    source: str
    layers: list[dict[str, Any]]
    numbers: list[list[str]]
    opening: str
    all_layers: int
    net: dict[str, list[float]]

    def html(self) -> str:
        """Return the page, which needs no other file and no network."""
        figures = _figures()
        script, places = components(figures)
        scene = {
            "step": codes.STEP,
            "opening": self.opening,
            "net": self.net,
            "layers": self.layers,
        }
        template = Environment(
            loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        ).get_template("page.html")
        return template.render(
            title=self.title,
            source=self.source,
            layers=self.layers,
            all_layers=self.all_layers,
            numbers=self.numbers,
            scene=json.dumps(scene, separators=(",", ":")).replace("<", "\\u003c"),
            panels=PANELS,
            profiles=PROFILES,
            error=f"{50 * codes.STEP:.2f}",
            colours=len(Viridis256),
            places=places,
            bokeh=Resources(mode="inline", components=["bokeh"]).render(),
            figures_script=script,
            style=(HERE / "page.css").read_text(),
            program=(HERE / "page.js").read_text(),
            point=POINT,
            seen=SEEN,
            stronger=STRONGER,
        )


def _figures() -> dict[str, figure]:
    """Return all figures by the name of their place in the template; sources have names too, for page.js."""
    mappers = {
        "log": LogColorMapper(Viridis256, low=1e-3, high=1, nan_color="#ececec", name="mapper-log"),
        "linear": LinearColorMapper(Viridis256, low=0, high=1, nan_color="#ececec", name="mapper-linear"),
    }
    columns = ("x", "y", "place", *PANELS, *(f"{name}_words" for name in PANELS))
    cells = ColumnDataSource({name: [] for name in columns}, name="cells")
    outline = ColumnDataSource({"xs": [], "ys": []}, name="outline")
    point = ColumnDataSource({"x": [], "y": []}, name="point")
    figures = {name: _map(name, point) for name in (*PANELS, "picker")}
    for name in PANELS:
        chart = figures[name]
        colour = {"field": name, "transform": mappers["log"]}
        # borders in the colour of the cell, or gaps would show between the cells
        picture = chart.rect(
            "x", "y", 1, 1, source=cells, fill_color=colour, line_color=colour, level="image", name=f"picture-{name}"
        )
        lines = "".join(f"<div>{title}: <b>@{key}_words</b></div>" for key, title in PANELS.items())
        chart.add_tools(HoverTool(renderers=[picture], tooltips=f"<div>@place</div>{lines}", attachment="horizontal"))
        chart.multi_line("xs", "ys", source=outline, line_color=SEEN, line_width=2.5)
        if name != "branches":
            for kind, dash in (("strongest", "solid"), ("weakest", "dashed")):
                marked = ColumnDataSource({"x": [], "y": []}, name=f"exceed-{kind}-{name}")
                chart.rect(
                    "x", "y", 0.84, 0.84, source=marked, fill_alpha=0, line_color=STRONGER, line_width=2, line_dash=dash
                )
    near = ColumnDataSource({name: [] for name in ("x", "y", "near")}, name="near")
    shade = {"field": "near", "transform": LinearColorMapper(Greys256[::-1], low=0, high=1, name="mapper-near")}
    figures["picker"].rect("x", "y", 1, 1, source=near, fill_color=shade, line_color=shade, level="image")
    figures["colours"] = _colour_bars(mappers)
    figures |= {f"profile-{name}": _profile(name) for name in PROFILES}
    return figures


def _map(name: str, point: ColumnDataSource) -> figure:
    """Return an empty map with the output point marked; row 0 is at the top."""
    chart = figure(
        name=f"map-{name}",
        sizing_mode="stretch_width",
        aspect_ratio=1,
        x_range=Range1d(-0.5, 15.5, name=f"columns-{name}"),
        y_range=Range1d(15.5, -0.5, name=f"rows-{name}"),
        toolbar_location=None,
        tools="",
        min_border=2,
        outline_line_color="#999999",
    )
    chart.axis.visible = False
    chart.grid.visible = False
    chart.rect("x", "y", 1, 1, source=point, fill_alpha=0, line_color=POINT, line_width=3)
    for event in ("tap", "mousemove", "mouseleave"):
        chart.js_on_event(event, CustomJS(code=f"kernelExplorer.pointer({name!r}, {event!r}, cb_obj)"))
    return chart


def _colour_bars(mappers: dict[str, Any]) -> figure:
    """Return a strip with the colour bars of both scales, of which one is seen."""
    strip = figure(
        sizing_mode="stretch_width",
        height=66,
        x_range=Range1d(0, 1),
        y_range=Range1d(0, 1),
        toolbar_location=None,
        tools="",
        min_border=0,
        outline_line_color=None,
    )
    strip.axis.visible = False
    strip.grid.visible = False
    strip.scatter([], [])  # Bokeh warns of figures with nothing in them
    for scale, mapper in mappers.items():
        bar = ColorBar(
            color_mapper=mapper,
            orientation="horizontal",
            height=12,
            padding=4,
            name=f"bar-{scale}",
            visible=scale == "log",
            ticker=FixedTicker(ticks=[], name=f"ticks-{scale}"),
            formatter=CustomJSTickFormatter(code="return Number(tick.toPrecision(1)).toString()"),
            title="|weight|, the same colours for all three maps",
            title_text_font_style="normal",
            title_text_font_size="12px",
            major_label_text_font_size="12px",
        )
        strip.add_layout(bar, "below")
    return strip


def _profile(name: str) -> figure:
    """Return an empty chart of the share of weight by distance."""
    chart = figure(
        sizing_mode="stretch_width",
        height=230,
        x_range=Range1d(0, 15, name=f"distances-{name}"),
        y_range=Range1d(0, 104),
        toolbar_location=None,
        tools="",
        outline_line_color=None,
        x_axis_label="distance from the point, in cells",
        y_axis_label="share of |weight|, %",
    )
    chart.axis.axis_label_text_font_style = "normal"
    chart.axis.axis_label_text_font_size = "12px"
    chart.axis.major_label_text_font_size = "12px"
    chart.axis.minor_tick_line_color = None
    chart.yaxis.ticker = FixedTicker(ticks=[0, 25, 50, 75, 100])
    source = ColumnDataSource({"r": [], **{key: [] for key in LINES}}, name=f"profile-{name}")
    for key, (label, colour, dash, marker) in LINES.items():
        line = chart.line(
            "r", key, source=source, line_color=colour, line_dash=dash, line_width=2, **_legend(name, label)
        )
        if marker:
            chart.scatter("r", key, source=source, marker=marker, color=colour, size=5, **_legend(name, label))
        if key == "merged":
            lines = "".join(f"<div>{words[0]}: <b>@{{{each}}}{{0.0}} %</b></div>" for each, words in LINES.items())
            chart.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=f"<div>within distance @r</div>{lines}"))
    if name == "point":
        chart.legend.location = "bottom_right"
        chart.legend.label_text_font_size = "12px"
        chart.legend.background_fill_alpha = 0.8
        chart.legend.padding = 5
        chart.legend.spacing = 0
    return chart


def _legend(name: str, label: str) -> dict[str, str]:
    """Return the argument that puts a line into the legend, which the first of the charts has for all."""
    return {"legend_label": label} if name == "point" else {}
