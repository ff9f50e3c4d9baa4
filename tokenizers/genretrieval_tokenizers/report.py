"""How good semantic IDs are, before anything is trained on them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds

DEFINITIONS = {
    "n_items": "items that have an ID",
    "distinct": "different IDs",
    "collision_rate_before_dedup": "share of items that share their codes, dedup level left out",
    "collision_rate": "share of items that share their whole ID",
    "largest_group": "most items with the same codes, the dedup level left out",
    "reconstruction_error": "squared distance of embeddings to their reconstruction, over their squared length",
}
"""One line a figure, in the order they are printed."""

LEVEL_DEFINITIONS = {
    "codebook_size": "codes of the level",
    "used": "codes that at least one item has",
    "entropy": "bits, of the distribution of items over codes; at most log2 of the codebook size",
    "perplexity": "2^entropy: how many codes, evenly used, would be as spread out",
    "gini": "inequality of the codes' loads, unused codes included: 0 equal, near 1 all items on one code",
}
"""One line a figure of a level."""


@dataclass(frozen=True, slots=True)
class LevelReport:
    """Use of one codebook; `LEVEL_DEFINITIONS` says what each figure is."""

    codebook_size: int
    used: int
    entropy: float
    perplexity: float
    gini: float


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """Figures of an assignment; `DEFINITIONS` says what each is.

    `reconstruction_error` is None where no embeddings were given.
    """

    n_items: int
    distinct: int
    collision_rate_before_dedup: float
    collision_rate: float
    largest_group: int
    reconstruction_error: float | None
    levels: tuple[LevelReport, ...]
    dedup_level: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        """Tables of the figures with their definitions, for a report or model card."""
        lines = ["| figure | value | what it is |", "|---|---|---|"]
        lines += [f"| {name} | {_show(getattr(self, name))} | {what} |" for name, what in DEFINITIONS.items()]
        names = [field.name for field in fields(LevelReport)]
        lines += ["", f"| level | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for number, level in enumerate(self.levels):
            label = f"{number} (dedup)" if self.dedup_level and number == len(self.levels) - 1 else str(number)
            lines.append(f"| {label} | {' | '.join(_show(getattr(level, name)) for name in names)} |")
        lines += ["", *(f"- {name}: {what}" for name, what in LEVEL_DEFINITIONS.items())]
        lines += ["", *(f"Note: {note}." for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def report(
    ids: SemanticIds,
    embeddings: NDArray[np.floating] | None = None,
    reconstruction: NDArray[np.floating] | None = None,
    *,
    dedup_level: bool = True,
    notes: tuple[str, ...] = (),
) -> TokenizerReport:
    """Measure an assignment.

    Args:
        ids: the assignment.
        embeddings: float ``[n_items, dim]``, what was quantised.
        reconstruction: float ``[n_items, dim]``, what the codes stand for; given with `embeddings` or not at
            all.
        dedup_level: whether the last level numbers the items of one tuple instead of describing them.
        notes: the tokenizer's remarks.

    Raises:
        DataError: there are no items, or the two matrices do not belong to them.
    """
    if not ids.n_items:
        raise DataError("there are no items to report on")
    described = ids.codes[:, :-1] if dedup_level else ids.codes
    group_sizes, distinct = _group_sizes(described), _group_sizes(ids.codes)
    return TokenizerReport(
        n_items=ids.n_items,
        distinct=len(distinct),
        collision_rate_before_dedup=_shared(group_sizes),
        collision_rate=_shared(distinct),
        largest_group=int(group_sizes.max()),
        reconstruction_error=_reconstruction_error(ids.n_items, embeddings, reconstruction),
        levels=tuple(
            _level(np.bincount(ids.codes[:, level], minlength=size)) for level, size in enumerate(ids.codebook_sizes)
        ),
        dedup_level=dedup_level,
        notes=notes,
    )


def gini(loads: NDArray[np.integer]) -> float:
    """Gini coefficient of loads: half the mean absolute difference over the mean; 0 without load."""
    n, total = len(loads), int(loads.sum())
    if not total:
        return 0.0
    ranks = np.arange(1, n + 1)
    return float((2 * ranks - n - 1) @ np.sort(loads) / (n * total))


def _group_sizes(codes_NL: Codes) -> NDArray[np.int64]:
    """Items of each distinct row."""
    if not codes_NL.shape[1]:
        return np.array([len(codes_NL)], np.int64)
    _, counts = np.unique(codes_NL, axis=0, return_counts=True)
    return counts.astype(np.int64)


def _shared(group_sizes: NDArray[np.int64]) -> float:
    return float(group_sizes[group_sizes > 1].sum() / group_sizes.sum())


def _level(loads: NDArray[np.int64]) -> LevelReport:
    share = loads[loads > 0] / loads.sum()
    entropy = float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: one used code gives 0, not -0
    return LevelReport(
        codebook_size=len(loads),
        used=len(share),
        entropy=entropy,
        perplexity=2.0**entropy,
        gini=gini(loads),
    )


def _reconstruction_error(
    n_items: int, embeddings: NDArray[np.floating] | None, reconstruction: NDArray[np.floating] | None
) -> float | None:
    if embeddings is None and reconstruction is None:
        return None
    if embeddings is None or reconstruction is None:
        raise DataError("the reconstruction error needs both the embeddings and their reconstruction; one is missing")
    if embeddings.shape != reconstruction.shape or len(embeddings) != n_items:
        raise DataError(
            f"{n_items} items, embeddings {embeddings.shape}, reconstruction {reconstruction.shape}: they "
            "do not belong together"
        )
    x = embeddings.astype(np.float64)
    length = np.square(x).sum()
    return float(np.square(x - reconstruction).sum() / length) if length else 0.0


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
