"""Writes a quality table: no figure without its protocol, its interval and the baselines of its run.

`write` leaves ``metrics.json`` (dotted names, see `genretrieval.figures`), ``quality.md`` and two plots in a
folder; `print_table` and `print_figures` show the same on a console.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table

from genretrieval.errors import DataError, InvalidInputError
from genretrieval.figures import Figure, document, lines, write_json_document
from genretrieval.histories import Split

PLOTTED = "recall10"
_TITLES = {
    "recall5": "Recall@5",
    "ndcg5": "NDCG@5",
    "recall10": "Recall@10",
    "ndcg10": "NDCG@10",
    "sid_recall10": "SID Recall@10",
    "sid_ndcg10": "SID NDCG@10",
}


class Protocol(TypedDict):
    """What has to be equal before two tables may be compared.

    Attributes:
        dataset: name and edition, e.g. "Amazon Beauty 2014, 5-core".
        split: "validation" or "test"; test evaluations are counted in ``metrics.json``.
        order_rule: how ties in a history are ordered, `Histories.order_rule`.
        exclude_seen: whether items of a case's history are removed from every row's lists.
        n_cases: cases measured.
        n_items: items of the catalogue that is ranked.
        beam_width: beam of our rows, None where there is no beam.
        markov_transitions: what the Markov row has counted.
        seeds: seeds of the runs behind our rows.
    """

    dataset: str
    split: Split
    order_rule: str
    exclude_seen: bool
    n_cases: int
    n_items: int
    beam_width: int | None
    markov_transitions: str
    seeds: list[int]


class Row(TypedDict):
    """One ranking: `metrics` by short name ("recall10") become the figures ``key.recall10``.

    Attributes:
        key: dotted prefix that stays stable: "quality", "oracle", "baseline.sasrec", ...
        name: what a reader sees.
        metrics: figures by short name; `metrics.recall_and_ndcg` makes them.
    """

    key: str
    name: str
    metrics: Mapping[str, Figure]


class QualityReport(TypedDict):
    """All of one evaluation.

    Attributes:
        protocol: see `Protocol`.
        rows: in the order of the table.
        extra: further figures by dotted name, e.g. "quality.collision_rate", "quality.cohort.cold.recall10".
        by_popularity: Recall@10 by row name and popularity bucket, for the plot; empty leaves the plot out.
    """

    protocol: Protocol
    rows: list[Row]
    extra: Mapping[str, Figure]
    by_popularity: Mapping[str, Mapping[str, Figure]]


def figures(report: QualityReport) -> dict[str, Figure]:
    """Every figure of the report under its dotted name, rows first.

    Raises:
        InvalidInputError: if two figures claim one name, which would hide one of them.
    """
    named: dict[str, Figure] = {}
    of_rows = [(f"{row['key']}.{metric}", value) for row in report["rows"] for metric, value in row["metrics"].items()]
    for name, value in [*of_rows, *report["extra"].items()]:
        if name in named:
            raise InvalidInputError(f"two figures of the report are named {name!r}; give each row a key of its own")
        named[name] = value
    return named


def print_figures(figures: Mapping[str, Figure]) -> None:
    """One line a figure on standard output: ``dotted.name: value unit``."""
    print("\n".join(lines(figures)))


def print_table(report: QualityReport, console: Console) -> None:
    """The table, over its protocol, on `console`."""
    table = Table(title=report["protocol"]["dataset"], caption=protocol_line(report["protocol"]))
    columns = _columns(report)
    table.add_column("")
    for column in columns:
        table.add_column(_TITLES.get(column, column), justify="right")
    for row in report["rows"]:
        table.add_row(row["name"], *(_cell(row["metrics"].get(column)) for column in columns))
    console.print(table)


def protocol_line(protocol: Protocol) -> str:
    """The protocol in one line, printed with every table."""
    beam = f"beam {protocol['beam_width']}; " if protocol["beam_width"] is not None else ""
    return (
        f"{protocol['split']} split, {protocol['n_cases']:,} cases, {protocol['n_items']:,} items ranked; "
        f"seen items {'removed' if protocol['exclude_seen'] else 'kept'}; "
        f"order: {protocol['order_rule']}; {beam}"
        f"Markov counted {protocol['markov_transitions']} transitions; "
        f"seeds {', '.join(map(str, protocol['seeds'])) or 'none'}; intervals: 95 %, bootstrap over cases"
    )


def markdown(report: QualityReport) -> str:
    """The protocol, the table and the further figures as Markdown."""
    columns = _columns(report)
    text = [
        f"# Quality on {report['protocol']['dataset']}",
        "",
        protocol_line(report["protocol"]) + ".",
        "",
        "| | " + " | ".join(_TITLES.get(column, column) for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in report["rows"]:
        cells = (_cell(row["metrics"].get(column)) for column in columns)
        text.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    if report["extra"]:
        text += ["", "| figure | value | unit |", "|---|---:|---|"]
        text += [f"| {name} | {_cell(figure)} | {figure.unit} |" for name, figure in report["extra"].items()]
    return "\n".join(text) + "\n"


def write(report: QualityReport, folder: Path) -> dict[str, Figure]:
    """Write ``metrics.json``, ``quality.md``, ``recall10.png`` and, if given, ``recall10_by_popularity.png``.

    ``metrics.json`` carries ``test_evaluations``: how often this folder's table was made on the test split,
    over all earlier writes, so that choosing by test does not go unseen.

    Returns:
        The figures, for `print_figures`.

    Raises:
        InvalidInputError: if a figure's name is malformed or taken twice, or a value is not finite.
        DataError: if the folder holds a ``metrics.json`` that cannot be read.
    """
    named = figures(report)
    path = folder / "metrics.json"
    content: dict[str, Any] = document(named)
    content["protocol"] = dict(report["protocol"])
    content["rows"] = {row["key"]: row["name"] for row in report["rows"]}
    content["test_evaluations"] = counted_test_evaluations(path) + (report["protocol"]["split"] == "test")
    write_json_document(path, content)
    (folder / "quality.md").write_text(markdown(report), encoding="utf-8")
    _save(recall_plot(report), folder / "recall10.png")
    if report["by_popularity"]:
        _save(popularity_plot(report), folder / "recall10_by_popularity.png")
    return named


def counted_test_evaluations(path: Path) -> int:
    """How many test evaluations the ``metrics.json`` at `path` counts; 0 where there is none yet.

    Raises:
        DataError: if the file is not one of ours.
    """
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["test_evaluations"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say how often test was evaluated ({error!r}); move it away to start a new count"
        ) from error


def recall_plot(report: QualityReport) -> Plot:
    """Bars of Recall@10 with their intervals, one a row, best on top."""
    rows = [(row["name"], row["metrics"][PLOTTED]) for row in report["rows"] if PLOTTED in row["metrics"]]
    rows.sort(key=lambda row: row[1].value)
    plot = Plot(figsize=(8, 1.2 + 0.45 * max(1, len(rows))), layout="constrained")
    axes = plot.subplots()
    axes.barh(
        [name for name, _ in rows],
        [figure.value for _, figure in rows],
        xerr=_errors([f for _, f in rows]),
        capsize=3,
    )
    axes.set_xlabel(f"{_TITLES[PLOTTED]}, {report['protocol']['split']} split, 95 % interval")
    axes.set_title(report["protocol"]["dataset"])
    return plot


def popularity_plot(report: QualityReport) -> Plot:
    """Recall@10 by training interactions of the target, one line a row."""
    plot = Plot(figsize=(8, 4.5), layout="constrained")
    axes = plot.subplots()
    for name, buckets in report["by_popularity"].items():
        values = list(buckets.values())
        axes.errorbar(list(buckets), [f.value for f in values], yerr=_errors(values), marker="o", capsize=3, label=name)
    axes.set_xlabel("training interactions of the target")
    axes.set_ylabel(f"{_TITLES[PLOTTED]}, {report['protocol']['split']} split")
    axes.set_title(report["protocol"]["dataset"])
    axes.legend()
    return plot


def _columns(report: QualityReport) -> list[str]:
    """Metrics that any row has: the known ones in reading order, then others as they come."""
    present = list(dict.fromkeys(metric for row in report["rows"] for metric in row["metrics"]))
    return [m for m in _TITLES if m in present] + [m for m in present if m not in _TITLES]


def _cell(figure: Figure | None) -> str:
    """``.0749 [.0716, .0783]``, without the interval where there is none."""
    if figure is None:
        return "-"
    spread = "" if figure.spread is None else f" [{_short(figure.spread[0])}, {_short(figure.spread[1])}]"
    return _short(figure.value) + spread


def _short(value: float) -> str:
    """Four places below one, as the field prints recall; six significant digits from there on."""
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.6g}"


def _errors(values: list[Figure]) -> list[list[float]]:
    """Distances from each value down and up to its interval; 0 where it has none."""
    spreads = [(figure.value, figure.spread or (figure.value, figure.value)) for figure in values]
    return [[max(0.0, v - low) for v, (low, _) in spreads], [max(0.0, high - v) for v, (_, high) in spreads]]


def _save(plot: Plot, path: Path) -> None:
    """Draw without a display and without pyplot's global state."""
    FigureCanvasAgg(plot).print_png(path)  # type: ignore[no-untyped-call]
