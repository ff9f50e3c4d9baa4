"""Tokenizers side by side: what their IDs look like, and what a generator makes of them.

The diagnostics cost nothing and explain; the downstream table decides. A lower collision rate or a higher entropy has
been measured to go with a worse recommendation as well as with a better one (methods 4a, 5), so the page shows both
tables and ranks by neither.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from genretrieval.errors import DataError
from genretrieval.figures import write_json_document
from genretrieval.semantic_ids import Codes
from genretrieval_tokenizers.report import TokenizerReport

LEVEL = 0.95
"""Coverage of the intervals."""

MAP_POINTS = 5000
"""Items drawn in the map; of more, a sample."""

_OF_VECTORS = ("unlike collisions", "error")
"""Columns that go by the vectors that a tokenizer quantised."""

_COLUMNS = {
    "levels": "codebook sizes; `+n` is a dedup level of n codes, which numbers items of equal codes",
    "codes used": "share of the codes, dedup level left out, that at least one item has; unused ones are wasted",
    "min perplexity": "of the level that is worst spread: so many evenly used codes would be as spread out",
    "collisions before": "share of items that share the codes they were encoded to",
    "after": "share of items that share their published ID",
    "largest group": "most items with the same codes, dedup level left out",
    "ICR": "share of items whose ID no other item has, dedup level left out",
    "CUR_total": "different IDs over all that the levels could name, dedup level left out",
    "SID entropy": "in bits, and in nats as QuaSID prints it; at most the logarithm of the number of items",
    "unlike collisions": "share of colliding pairs whose items are not alike (cosine below the threshold)",
    "error": "reconstruction error: squared distance to the embedding over its squared length",
    "fit": "seconds that fitting took",
}


@dataclass(frozen=True, slots=True)
class DownstreamRow:
    """What a generator trained on a tokenizer's IDs reached.

    Attributes:
        metrics: values by name ("recall10"), one a seed, in the order of `Comparison.seeds`.
        reference: the tokenizer that the gains of this row are over; None for that of the comparison.
        published_gain: relative gains that the method's paper prints, by metric: 0.05 is 5 %.
        published_source: where they are printed, and over which tokenizer.

    Raises:
        DataError: metrics have unequal numbers of seeds or a value that is not finite, or a gain has no source.
    """

    metrics: dict[str, tuple[float, ...]]
    reference: str | None = None
    published_gain: dict[str, float] | None = None
    published_source: str = ""

    def __post_init__(self) -> None:
        if len({len(values) for values in self.metrics.values()}) > 1:
            raise DataError("metrics of a tokenizer have unequal numbers of seeds; finish the missing cells first")
        if not all(math.isfinite(value) for values in self.metrics.values() for value in values):
            raise DataError("a metric is not finite; measure that cell again")
        if self.published_gain and not self.published_source:
            raise DataError("published gains need their source: say which table, and over which tokenizer")


class Gain(NamedTuple):
    """A relative difference and its interval, as shares: 0.05 is 5 %; None where one seed gives no interval."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_gain(values: tuple[float, ...], reference: tuple[float, ...]) -> Gain:
    """Relative gain over a reference that was measured with the same seeds.

    With the differences ``d_i = values_i - reference_i`` of n seeds, their mean ``m`` and their standard deviation
    ``s`` (n - 1), the interval of the difference is ``m ± t(0.975, n - 1) s / sqrt(n)``; all three are divided by the
    mean of the reference. What a seed does alike to both sides cancels out; generators that start from other weights
    share only the order of their data, and then little does. The division takes the reference's mean as known.

    Raises:
        DataError: the seeds do not pair, there is none, or the reference is zero on average.
    """
    n = len(values)
    if n != len(reference) or not n:
        raise DataError(f"{n} and {len(reference)} seeds do not pair; measure both tokenizers with the same seeds")
    base = statistics.fmean(reference)
    if base == 0:
        raise DataError("the reference is 0, so a gain relative to it has no meaning; compare the values themselves")
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    mean = statistics.fmean(differences) / base
    if n == 1:
        return Gain(mean, None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n) / abs(base)
    return Gain(mean, mean - half, mean + half)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reports of several tokenizers on the same items, and what was made of them downstream.

    Attributes:
        rows: report by tokenizer name, in the order of the tables.
        downstream: results by tokenizer name, for some of `rows` or all; None where nothing was trained.
        reference: the tokenizer that gains are over where a row names no other.
        seeds: seeds of the downstream runs, in the order of their values.
        protocol: one line: data, split, generator, budget, and what was done with seen items and ties.
        impossible: why there are no figures, by name of a tokenizer that could not be fitted to these items.
        own_vectors: those of `rows` that quantised other vectors than the rest; figures that go by vectors are marked.
        baselines: metrics by name of a ranking that has neither IDs nor seeds, on the cases of `downstream`.
        test_evaluations: how often the test split was measured for this table, also before.

    Raises:
        DataError: names or numbers of seeds do not fit together, or reports are of different numbers of items.
    """

    rows: dict[str, TokenizerReport]
    downstream: dict[str, DownstreamRow] | None = None
    reference: str = ""
    seeds: tuple[int, ...] = ()
    protocol: str = ""
    impossible: dict[str, str] = field(default_factory=dict)
    own_vectors: tuple[str, ...] = ()
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    test_evaluations: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError("there is no tokenizer to compare; name at least one")
        if len(set((counts := {name: row.n_items for name, row in self.rows.items()}).values())) > 1:
            raise DataError(f"the reports are of different numbers of items ({counts}); tokenize the same items")
        if self.downstream is None:
            return
        if unknown := set(self.downstream) - set(self.rows):
            raise DataError(f"downstream results of {sorted(unknown)} have no report; report on these tokenizers too")
        for reference in {self.reference, *map(self._reference_of, self.downstream)}:
            if reference not in self.downstream and reference not in self.impossible:
                raise DataError(f"the reference {reference!r} has no downstream results; choose a tokenizer that has")
        if not self.protocol:
            raise DataError("a downstream table needs its protocol: say on which data, split and generator it was made")
        for name, row in self.downstream.items():
            if any(len(values) != len(self.seeds) for values in row.metrics.values()):
                raise DataError(
                    f"{name} has not one value for each of the seeds {list(self.seeds)}; without pairs there is no "
                    "interval, so finish the missing cells first"
                )

    def gain(self, name: str, metric: str) -> Gain | None:
        """Gain of a tokenizer over its reference; None for the reference, or where either has no such value."""
        downstream = self.downstream or {}
        if name not in downstream or (over := self._reference_of(name)) == name or over not in downstream:
            return None
        values, reference = downstream[name].metrics.get(metric), downstream[over].metrics.get(metric)
        return paired_gain(values, reference) if values and reference and any(reference) else None

    def _reference_of(self, name: str) -> str:
        row = (self.downstream or {}).get(name)
        return (row.reference if row else None) or self.reference

    def document(self) -> dict[str, Any]:
        """Everything in plain types, gains worked out; ``comparison.json``."""
        content: dict[str, Any] = {
            "diagnostics": {name: asdict(row) for name, row in self.rows.items()},
            "impossible": self.impossible,
            "own_vectors": list(self.own_vectors),
            "test_evaluations": self.test_evaluations,
        }
        if self.downstream is not None:
            content |= {"protocol": self.protocol, "seeds": list(self.seeds), "reference": self.reference}
            content["baselines"] = self.baselines
            content["downstream"] = {
                name: asdict(row)
                | {"reference": self._reference_of(name)}
                | {"gain": {metric: _plain(self.gain(name, metric)) for metric in row.metrics}}
                for name, row in self.downstream.items()
            }
        return content

    def to_json(self) -> str:
        """`document` as JSON."""
        return json.dumps(self.document(), indent=2)

    def to_markdown(self) -> str:
        """The diagnostics of all tokenizers, then the downstream tables, each with what its columns mean."""
        n_items = next(iter(self.rows.values())).n_items
        text = ["# Tokenizers compared", "", f"## Semantic IDs of {n_items:,} items", "", *self._diagnostics()]
        if self.downstream is not None:
            text += ["", "## Downstream", "", *self._downstream(self.downstream)]
        return "\n".join(text) + "\n"

    def write(
        self, folder: Path, codes: Mapping[str, Codes] | None = None, embeddings: NDArray[np.floating] | None = None
    ) -> None:
        """Write ``comparison.md``, ``comparison.json`` and the plots.

        ``collisions.png`` is always drawn, ``code_usage.png`` where codes are given, ``items_by_first_code.png`` where
        embeddings are too.

        Args:
            folder: made where missing.
            codes: int32 ``[n_items, n_levels]`` by tokenizer name, for some of `rows` or all; a dedup level is not
                drawn.
            embeddings: float ``[n_items, dim]``.

        Raises:
            DataError: codes or embeddings are not of these tokenizers and items.
        """
        codes = codes or {}
        self._check_drawn(codes, embeddings)
        plots = {"collisions": _collisions_plot(self.rows)}
        if codes:
            plots["code_usage"] = _usage_plot({name: self.rows[name] for name in codes}, codes)
        if codes and embeddings is not None:
            plots["items_by_first_code"] = _map_plot(codes, embeddings)
        folder.mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            FigureCanvasAgg(plot).print_png(folder / f"{name}.png")  # type: ignore[no-untyped-call]
        images = "".join(f"\n![{name.replace('_', ' ')}]({name}.png)\n" for name in plots)
        (folder / "comparison.md").write_text(self.to_markdown() + images, "utf-8")
        write_json_document(folder / "comparison.json", self.document())

    def _check_drawn(self, codes: Mapping[str, Codes], embeddings: NDArray[np.floating] | None) -> None:
        n_items = next(iter(self.rows.values())).n_items
        for name, codes_NL in codes.items():
            if name not in self.rows:
                raise DataError(f"codes of {name!r} have no report; report on this tokenizer too")
            if codes_NL.shape[0] != n_items or codes_NL.shape[1] < len(self.rows[name].described):
                raise DataError(f"codes of {name!r} have shape {codes_NL.shape}; its report is of {n_items} items")
        if embeddings is not None and len(embeddings) != n_items:
            raise DataError(f"{len(embeddings)} embeddings for {n_items} items: they do not belong together")

    def _diagnostics(self) -> list[str]:
        table = {name: _diagnostic_cells(row) for name, row in self.rows.items()}
        marked = [
            (name, column) for name in self.own_vectors for column in _OF_VECTORS if column in table.get(name, {})
        ]
        for name, column in marked:
            table[name][column] += " \\*"
        columns = [column for column in _COLUMNS if any(column in cells for cells in table.values())]
        lines = ["| " + " | ".join(["tokenizer", *columns]) + " |", "|---|---|" + "---:|" * (len(columns) - 1)]
        for name, cells in table.items():
            lines.append(f"| {name} | " + " | ".join(cells.get(column, "-") for column in columns) + " |")
        for name, why in self.impossible.items():
            reason = f"not possible: {' '.join(why.split())}".replace("|", "\\|")
            lines.append(f"| {name} | {reason} |" + " - |" * (len(columns) - 1))
        lines += ["", *(f"- {column}: {_COLUMNS[column]}" for column in columns)]
        if marked:
            lines.append("- \\*: measured on vectors of its own, so not to be compared with the other rows")
        notes = [f"- {name}: {note}" for name, row in self.rows.items() for note in row.notes]
        return [*lines, "", "Notes:", "", *notes] if notes else lines

    def _downstream(self, downstream: dict[str, DownstreamRow]) -> list[str]:
        metrics = _metrics(downstream)
        lines = [f"Protocol: {self.protocol}. Seeds: {', '.join(map(str, self.seeds))}."]
        if self.test_evaluations:
            lines += ["", f"Evaluations on test that were written to this folder so far: {self.test_evaluations}."]
        lines += ["", "Mean over seeds ± standard deviation; baselines have no seeds:", ""]
        lines += _head(["tokenizer"], metrics)
        for name, row in downstream.items():
            label = f"{name} (reference)" if name == self.reference else name
            lines.append(f"| {label} | " + " | ".join(_spread(row.metrics.get(metric)) for metric in metrics) + " |")
        for name, values in self.baselines.items():
            cells = (f"{values[metric]:.4f}" if metric in values else "-" for metric in metrics)
            lines.append(f"| baseline: {name} | " + " | ".join(cells) + " |")
        return [*lines, *self._gains(downstream)]

    def _gains(self, downstream: dict[str, DownstreamRow]) -> list[str]:
        compared = {name: row for name, row in downstream.items() if name != self._reference_of(name)}
        if not compared:
            return []
        cells = {
            name: {metric: self._gain_cell(name, row, metric) for metric in row.metrics}
            for name, row in compared.items()
        }
        metrics = [m for m in _metrics(downstream) if any(row.get(m, "-") != "-" for row in cells.values())]
        lines = [
            "",
            f"Gain over the reference that the second column names, paired by seed, with its {LEVEL:.0%} t-interval. "
            "**Bold**: the interval excludes 0. Each interval stands for itself: of twenty that compare equals, one "
            "excludes 0 by chance. It covers seeds alone, for one fixed sample of users: how other users would have "
            f"fared is not in it, and the best of these {len(downstream)} was chosen on this very sample, so expect "
            "less of it on another. Equal seeds share the order of the training data; initial weights they share only "
            "where codebook sizes are equal.",
            "",
            *_head(["tokenizer", "over"], metrics),
        ]
        for name, row in cells.items():
            over = self._reference_of(name)
            lines.append(f"| {name} | {over} | " + " | ".join(row.get(metric, "-") for metric in metrics) + " |")
        sources = [
            f"- published, {name}: {row.published_source}" for name, row in compared.items() if row.published_gain
        ]
        return [*lines, "", *sources] if sources else lines

    def _gain_cell(self, name: str, row: DownstreamRow, metric: str) -> str:
        published = (row.published_gain or {}).get(metric)
        return _gain(self.gain(name, metric)) + ("" if published is None else f"; published {_percent(published)}")


def _metrics(downstream: Mapping[str, DownstreamRow]) -> list[str]:
    """Names of all metrics, in the order in which they are met."""
    return list(dict.fromkeys(metric for row in downstream.values() for metric in row.metrics))


def _head(labels: list[str], metrics: list[str]) -> list[str]:
    """First two lines of a table: words on the left, figures on the right."""
    return ["| " + " | ".join([*labels, *metrics]) + " |", "|" + "---|" * len(labels) + "---:|" * len(metrics)]


def _diagnostic_cells(row: TokenizerReport) -> dict[str, str]:
    """A tokenizer's cells by column; a figure that was not measured has none."""
    described = row.described
    sizes = "-".join(str(level.codebook_size) for level in described) or "none"
    available = sum(level.codebook_size for level in described)
    cells = {
        "levels": sizes + (f" +{row.levels[-1].codebook_size}" if row.dedup_level else ""),
        "codes used": f"{sum(level.used for level in described) / available:.1%}" if available else "-",
        "min perplexity": f"{row.min_perplexity:.1f}",
        "collisions before": f"{row.collision_rate_before_dedup:.2%}",
        "after": f"{row.collision_rate:.2%}",
        "largest group": f"{row.largest_group:,}",
        "ICR": f"{row.icr:.2%}",
        "CUR_total": f"{row.cur_total:.2e}" if row.cur_total < 1e-3 else f"{row.cur_total:.4f}",
        "SID entropy": f"{row.sid_entropy_bits:.3f} bits, {row.sid_entropy_nats:.4f} nats",
    }
    if row.qualified_collision_rate is not None:
        cells["unlike collisions"] = f"{row.qualified_collision_rate:.1%} (<{row.similarity_threshold:g})"
    if row.reconstruction_error is not None:
        cells["error"] = f"{row.reconstruction_error:.4f}"
    if row.fit_seconds is not None:
        cells["fit"] = f"{row.fit_seconds:.1f} s"
    return cells


def _spread(values: tuple[float, ...] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    interval = "" if gain.low is None or gain.high is None else f" [{_percent(gain.low)}, {_percent(gain.high)}]"
    text = _percent(gain.mean) + interval
    return f"**{text}**" if gain.excludes_zero else text


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _plain(gain: Gain | None) -> dict[str, float | bool | None] | None:
    return None if gain is None else gain._asdict() | {"excludes_zero": gain.excludes_zero}


def _usage_plot(rows: Mapping[str, TokenizerReport], codes: Mapping[str, Codes]) -> Figure:
    """Sorted loads of every level, a row a tokenizer: flat is evenly used, a cliff is dead codes."""
    n_levels = max(1, *(len(row.described) for row in rows.values()))
    plot = Figure(figsize=(2.6 * n_levels, 0.6 + 1.7 * len(rows)), layout="constrained")
    axes = plot.subplots(len(rows), n_levels, squeeze=False)
    for (name, row), row_axes in zip(rows.items(), axes, strict=True):
        for ax in row_axes[len(row.described) :]:
            ax.set_axis_off()
        for level, (figures, ax) in enumerate(zip(row.described, row_axes, strict=False)):
            loads = np.bincount(codes[name][:, level], minlength=figures.codebook_size)
            ax.stairs(np.sort(loads)[::-1], fill=True)
            ax.set_title(f"level {level}: {figures.used} of {figures.codebook_size} used", fontsize=7)
            ax.tick_params(labelsize=6)
        row_axes[0].set_ylabel(name, fontsize=7)
    plot.suptitle("Code usage: items of each code, most used code first", fontsize=9)
    return plot


def _map_plot(codes: Mapping[str, Codes], embeddings: NDArray[np.floating]) -> Figure:
    """Items on the two directions in which embeddings differ most, coloured by first code.

    There are more codes than colours that can be told apart, so like codes get like hues.
    """
    n_items = len(embeddings)
    drawn = np.arange(n_items)
    if n_items > MAP_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(n_items, MAP_POINTS, replace=False))
    points_M2, explained = _principal_plane(embeddings[drawn])
    columns = min(3, len(codes))
    n_rows = -(-len(codes) // columns)
    plot = Figure(figsize=(max(7, 4 * columns), 0.8 + 3.8 * n_rows), layout="constrained")  # the title needs 7
    axes = plot.subplots(n_rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for (name, codes_NL), ax in zip(codes.items(), axes, strict=False):
        hues = _directions(codes_NL[drawn, 0], points_M2)
        ax.scatter(points_M2[:, 0], points_M2[:, 1], c=colormaps["hsv"](hues), s=3, linewidths=0)
        ax.set_title(name, fontsize=8)
    of = f"{len(drawn):,} of {n_items:,} items" if len(drawn) < n_items else f"{n_items:,} items"
    plot.suptitle(
        f"Items by first code: first two principal components of the embeddings\n({explained:.0%} of their variance; "
        f"{of})\nhue: the direction in which the items of that code lie on average, so mixed hues are scattered codes",
        fontsize=9,
    )
    return plot


def _directions(codes_M: Codes, points_M2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angle of the centre of each point's code, float64 ``[M]`` in [0, 1] of a turn."""
    loads = np.maximum(np.bincount(codes_M), 1)
    x, y = (np.bincount(codes_M, weights=points) / loads for points in points_M2.T)
    angles: NDArray[np.float64] = (np.arctan2(y, x) / (2 * np.pi) + 0.5)[codes_M]
    return angles


def _principal_plane(x_MD: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """Coordinates ``[M, 2]`` on the first two principal components, and their share of the variance."""
    centred_MD = x_MD.astype(np.float64) - x_MD.mean(axis=0, dtype=np.float64)
    left, scale, _ = np.linalg.svd(centred_MD, full_matrices=False)
    points_M2 = np.zeros((len(x_MD), 2))
    found = left[:, :2] * scale[:2]
    points_M2[:, : found.shape[1]] = found
    variance = np.square(scale)
    return points_M2, float(variance[:2].sum() / variance.sum()) if variance.any() else 1.0


def _collisions_plot(rows: Mapping[str, TokenizerReport]) -> Figure:
    """How many groups of how many items with the same codes, a small plot a tokenizer on common axes."""
    columns = min(4, len(rows))
    n_rows = -(-len(rows) // columns)
    plot = Figure(figsize=(3 * columns, 0.6 + 2.2 * n_rows), layout="constrained")
    axes = plot.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for (name, row), ax in zip(rows.items(), axes, strict=False):
        _draw_histogram(ax, row.group_sizes)
        ax.set_title(f"{name}: largest {row.largest_group}", fontsize=8)
    plot.suptitle("Collisions: groups (log) by items with the same codes, dedup level left out", fontsize=9)
    return plot


def _draw_histogram(ax: Axes, group_sizes: Mapping[int, int]) -> None:
    ax.bar(list(group_sizes), list(group_sizes.values()), width=0.9)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    ax.tick_params(labelsize=6, labelbottom=True)
