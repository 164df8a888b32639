"""A dashboard as plain values, and how it becomes Grafana's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    GridPos,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Kind = Literal["lines", "areas", "number", "heatmap"]

_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = {"lines": 8, "areas": 8, "heatmap": 8, "number": 4}
_HEIGHT = {"lines": 8, "areas": 8, "heatmap": 8, "number": 4}
_COLUMNS = 24


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  # Grafana's name of it
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    doc: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    uid: str  # also the file's name
    title: str
    doc: str
    rows: tuple[Row, ...]


def to_json(board: Board) -> str:
    """Everything is placed and numbered here, so that the same board is the same text."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.doc)
        .tags(["baton"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("namespace")
            .label("Namespace")
            .datasource(_DATASOURCE)
            .query("label_values(baton_router_requests_in_flight, namespace)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )
    )
    number, top = 1, 0
    for row in board.rows:
        builder.with_row(dashboard.Row(row.title).id(number).grid_pos(GridPos(h=1, w=_COLUMNS, x=0, y=top)))
        number, top, left, row_height = number + 1, top + 1, 0, 0
        for panel in row.panels:
            width, height = _WIDTH[panel.kind], _HEIGHT[panel.kind]
            if left + width > _COLUMNS:
                left, top = 0, top + row_height
            place = GridPos(h=height, w=width, x=left, y=top)
            builder.with_panel(_build(panel).id(number).grid_pos(place))
            number, left, row_height = number + 1, left + width, height
        top += row_height
    model = builder.build()
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(model)), indent=1, sort_keys=True) + "\n"


def _build(panel: Panel) -> Any:
    builder = _BUILDERS[panel.kind](panel.title).datasource(_DATASOURCE).unit(panel.unit)
    if panel.doc:
        builder.description(panel.doc)
    for index, query in enumerate(panel.queries):
        target = (
            prometheus.Dataquery().ref_id(chr(ord("A") + index)).expr(query.expr).legend_format(query.legend)
        )
        builder.with_target(target.format(PromQueryFormat.HEATMAP) if panel.kind == "heatmap" else target)
    return builder


def _lines(title: str) -> timeseries.Panel:
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    return timeseries.Panel().title(title).legend(legend.show_legend(True)).line_width(1).min(0)


def _areas(title: str) -> timeseries.Panel:
    return _lines(title).fill_opacity(30).stacking(StackingConfig().mode(StackingMode.NORMAL))


def _number(title: str) -> stat.Panel:
    return stat.Panel().title(title).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))


def _heatmap(title: str) -> Any:
    return heatmap.Panel().title(title).calculate(False)


_BUILDERS: dict[Kind, Any] = {"lines": _lines, "areas": _areas, "number": _number, "heatmap": _heatmap}
