"""How good semantic IDs are, before anything is trained on them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval_tokenizers.collisions import row_keys
from genretrieval_tokenizers.tokenizer import BLOCK

DEFINITIONS = {
    "n_items": "items that have an ID",
    "distinct": "different IDs",
    "collision_rate_before_dedup": "share of items that share the codes they were encoded to, dedup level left out",
    "collision_rate": "share of items that share their whole ID",
    "largest_group": "most items with the same codes, the dedup level left out",
    "moved": "items whose codes were changed to make IDs unique; a number in the dedup level is no change",
    "icr": "independent coding rate: share of items whose ID no other item has, dedup level left out",
    "cur_l1": "codebook utilisation: used codes of the first level over its codebook size",
    "cur_l1_l2": "used pairs of codes of the first two levels over all pairs there could be",
    "cur_total": "different IDs, dedup level left out, over all that there could be",
    "sid_entropy_bits": "of the distribution of items over IDs, dedup level left out; at most log2 of the items",
    "sid_entropy_nats": "the same with the natural logarithm, as QuaSID and AdaSID print it; at most ln of the items",
    "min_perplexity": "lowest perplexity of a level, dedup level left out",
    "mean_perplexity": "mean perplexity of the levels, dedup level left out",
    "mean_top1_load": "share of items on a level's most used code, mean of the levels, dedup level left out",
    "qualified_collision_rate": "share of colliding pairs of items that are not alike: cosine below the threshold",
    "similarity_threshold": "cosine of embeddings from which two items are alike, so that sharing codes is benign",
    "reconstruction_error": "squared distance of embeddings to their reconstruction, over their squared length",
    "fit_seconds": "time that fitting the tokenizer took",
}
"""One line a figure, in the order they are printed. ICR and CUR are OneSearch's (arXiv 2509.03236)."""

LEVEL_DEFINITIONS = {
    "codebook_size": "codes of the level",
    "used": "codes that at least one item has",
    "entropy": "bits, of the distribution of items over codes; at most log2 of the codebook size",
    "perplexity": "2^entropy: how many codes, evenly used, would be as spread out",
    "top1_load": "share of items on the most used code",
    "gini": "inequality of the codes' loads, unused codes included: 0 equal, near 1 all items on one code",
}
"""One line a figure of a level."""

PAIRED_ITEMS = 64
"""Items of a group whose pairs are compared; of a larger group so many are drawn, and stand for all its pairs."""


@dataclass(frozen=True, slots=True)
class LevelReport:
    """Use of one codebook; `LEVEL_DEFINITIONS` says what each figure is."""

    codebook_size: int
    used: int
    entropy: float
    perplexity: float
    top1_load: float
    gini: float


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """Figures of an assignment; `DEFINITIONS` says what each is.

    `reconstruction_error`, `qualified_collision_rate` and `fit_seconds` are None where what they need was not given;
    `qualified_collision_rate` also where no items collide. `group_sizes` is the collision histogram: items with the
    same codes (dedup level left out) to the number of such groups, smallest groups first.
    """

    n_items: int
    distinct: int
    collision_rate_before_dedup: float
    collision_rate: float
    largest_group: int
    moved: int
    icr: float
    cur_l1: float
    cur_l1_l2: float
    cur_total: float
    sid_entropy_bits: float
    sid_entropy_nats: float
    min_perplexity: float
    mean_perplexity: float
    mean_top1_load: float
    group_sizes: dict[int, int]
    levels: tuple[LevelReport, ...]
    dedup_level: bool
    qualified_collision_rate: float | None = None
    similarity_threshold: float | None = None
    reconstruction_error: float | None = None
    fit_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> tuple[LevelReport, ...]:
        """The levels that describe items: all but a dedup level."""
        return self.levels[:-1] if self.dedup_level else self.levels

    def to_json(self) -> str:
        """One JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TokenizerReport:
        """Read what `to_json` wrote.

        Raises:
            DataError: it is damaged, or of another version.
        """
        try:
            content = json.loads(text)
            content["levels"] = tuple(LevelReport(**level) for level in content["levels"])
            content["group_sizes"] = {int(size): groups for size, groups in content["group_sizes"].items()}
            content["notes"] = tuple(content["notes"])
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is no tokenizer report of this version ({error!r}); measure again") from error

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
        lines += ["", "| items with the same codes | groups |", "|---|---|"]
        lines += [f"| {sizes} | {groups:,} |" for sizes, groups in _binned(self.group_sizes).items()]
        lines += ["", *(f"Note: {note}." for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def report(
    ids: SemanticIds,
    embeddings: NDArray[np.floating] | None = None,
    reconstruction: NDArray[np.floating] | None = None,
    *,
    dedup_level: bool = True,
    encoded: Codes | None = None,
    similarity_threshold: float | None = None,
    fit_seconds: float | None = None,
    notes: tuple[str, ...] = (),
) -> TokenizerReport:
    """Measure an assignment.

    Args:
        ids: the assignment.
        embeddings: float ``[n_items, dim]``, what was quantised; given with what is to be compared with it.
        reconstruction: float ``[n_items, dim]``, what the codes stand for.
        dedup_level: whether the last level numbers the items of one tuple instead of describing them.
        encoded: int32 ``[n_items, levels without dedup]``, what the tokenizer encoded, where reassignment has changed
            it since; None where `ids` holds it.
        similarity_threshold: cosine of embeddings from which items are alike, for `qualified_collision_rate`; needs
            `embeddings`. Collisions are counted before reassignment, where `encoded` is given.
        fit_seconds: time that fitting took.
        notes: remarks of the tokenizer and of collision handling.

    Raises:
        DataError: there are no items, or what is given does not belong to them.
    """
    if not ids.n_items:
        raise DataError("there are no items to report on")
    described = ids.codes[:, :-1] if dedup_level else ids.codes
    encoded = described if encoded is None else encoded
    if encoded.shape != described.shape:
        raise DataError(f"encoded codes {encoded.shape} and those of the IDs {described.shape} do not belong together")
    _check_matrices(ids.n_items, embeddings, reconstruction, similarity_threshold)
    group_sizes, distinct = _group_sizes(described), _group_sizes(ids.codes)
    levels = tuple(
        _level(np.bincount(ids.codes[:, level], minlength=size)) for level, size in enumerate(ids.codebook_sizes)
    )
    describing = levels[: described.shape[1]]
    sizes = ids.codebook_sizes[: described.shape[1]]
    bits = _entropy(group_sizes)
    perplexities = [level.perplexity for level in describing] or [1.0]  # the empty tuple: one code for all
    qualified = None
    if embeddings is not None and similarity_threshold is not None:
        qualified = qualified_collision_rate(encoded, embeddings, similarity_threshold)
    return TokenizerReport(
        n_items=ids.n_items,
        distinct=len(distinct),
        collision_rate_before_dedup=_shared(_group_sizes(encoded)),
        collision_rate=_shared(distinct),
        largest_group=int(group_sizes.max()),
        moved=int((encoded != described).any(axis=1).sum()),
        icr=1 - _shared(group_sizes),
        cur_l1=_utilisation(described[:, :1], sizes[:1]),
        cur_l1_l2=_utilisation(described[:, :2], sizes[:2]),
        cur_total=_utilisation(described, sizes),
        sid_entropy_bits=bits,
        sid_entropy_nats=bits * math.log(2),
        min_perplexity=min(perplexities),
        mean_perplexity=math.fsum(perplexities) / len(perplexities),
        mean_top1_load=math.fsum(level.top1_load for level in describing) / len(describing) if describing else 1.0,
        group_sizes={int(size): int(n) for size, n in zip(*np.unique(group_sizes, return_counts=True), strict=True)},
        levels=levels,
        dedup_level=dedup_level,
        qualified_collision_rate=qualified,
        similarity_threshold=similarity_threshold,
        reconstruction_error=None
        if embeddings is None or reconstruction is None
        else _reconstruction_error(embeddings, reconstruction),
        fit_seconds=fit_seconds,
        notes=notes,
    )


def qualified_collision_rate(codes_NL: Codes, x_ND: NDArray[np.floating], threshold: float) -> float | None:
    """Share of colliding pairs whose items are not alike; the other pairs are benign overlaps.

    Collisions of items that are nearly the same thing cost little; those of unlike items make the generator unable to
    tell them apart. (QuaSID repels by what it calls qualified conflicts, arXiv 2603.00632; this is the figure for it.)

    Of a group of more than `PAIRED_ITEMS` items that many are drawn, always the same ones, and the pairs among them are
    weighted to stand for all of the group.

    Args:
        codes_NL: int32 ``[N, n_levels]`` without a dedup level.
        x_ND: float ``[N, dim]``, embeddings.
        threshold: cosine below which two items are not alike; a vector of zeros is like nothing.

    Returns:
        The share, or None where no items collide.
    """
    order = np.random.default_rng(0).permutation(len(codes_NL))
    keys = row_keys(codes_NL)[order]
    by_key = np.argsort(keys, kind="stable")
    order, keys = order[by_key], keys[by_key]
    _, starts, sizes = np.unique(keys, return_index=True, return_counts=True)
    rank = np.arange(len(keys)) - np.repeat(starts, sizes)
    kept = np.minimum(sizes, PAIRED_ITEMS)
    weight = np.repeat(sizes * (sizes - 1) / np.maximum(kept * (kept - 1), 1), sizes)
    unlike = total = 0.0
    for lag in range(1, min(PAIRED_ITEMS, int(sizes.max()))):
        later = np.flatnonzero((rank >= lag) & (rank < PAIRED_ITEMS))
        for start in range(0, len(later), BLOCK):
            pair = later[start : start + BLOCK]
            alike = _cosine(x_ND[order[pair]], x_ND[order[pair - lag]]) >= threshold
            total += float(weight[pair].sum())
            unlike += float(weight[pair][~alike].sum())
    return unlike / total if total else None


def gini(loads: NDArray[np.integer]) -> float:
    """Gini coefficient of loads: half the mean absolute difference over the mean; 0 without load."""
    n, total = len(loads), int(loads.sum())
    if not total:
        return 0.0
    ranks = np.arange(1, n + 1)
    return float((2 * ranks - n - 1) @ np.sort(loads) / (n * total))


def _group_sizes(codes_NL: Codes) -> NDArray[np.int64]:
    """Items of each distinct row."""
    return np.unique(row_keys(codes_NL), return_counts=True)[1].astype(np.int64)


def _shared(group_sizes: NDArray[np.int64]) -> float:
    return float(group_sizes[group_sizes > 1].sum() / group_sizes.sum())


def _utilisation(codes_NL: Codes, sizes: tuple[int, ...]) -> float:
    """Distinct rows over all that these codebooks could name."""
    return len(_group_sizes(codes_NL)) / math.prod(sizes)


def _entropy(loads: NDArray[np.int64]) -> float:
    """Bits of the distribution that loads make."""
    share = loads[loads > 0] / loads.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: one used code gives 0, not -0


def _level(loads: NDArray[np.int64]) -> LevelReport:
    entropy = _entropy(loads)
    return LevelReport(
        codebook_size=len(loads),
        used=int((loads > 0).sum()),
        entropy=entropy,
        perplexity=2.0**entropy,
        top1_load=float(loads.max() / loads.sum()),
        gini=gini(loads),
    )


def _cosine(a_ND: NDArray[np.floating], b_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    lengths = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosine_N = np.zeros(len(a_ND))
    np.divide((a_ND * b_ND).sum(axis=1), lengths, out=cosine_N, where=lengths > 0)
    return cosine_N


def _check_matrices(
    n_items: int,
    embeddings: NDArray[np.floating] | None,
    reconstruction: NDArray[np.floating] | None,
    similarity_threshold: float | None,
) -> None:
    if embeddings is None and similarity_threshold is not None:
        raise DataError("similarity_threshold compares embeddings, and none are given; give them or leave it out")
    if embeddings is None and reconstruction is None:
        return
    if embeddings is None or (reconstruction is None and similarity_threshold is None):
        raise DataError("the reconstruction error needs both the embeddings and their reconstruction; one is missing")
    if len(embeddings) != n_items or (reconstruction is not None and embeddings.shape != reconstruction.shape):
        shape = None if reconstruction is None else reconstruction.shape
        raise DataError(
            f"{n_items} items, embeddings {embeddings.shape}, reconstruction {shape}: they do not belong together"
        )


def _reconstruction_error(embeddings: NDArray[np.floating], reconstruction: NDArray[np.floating]) -> float:
    """In blocks: 10 million float64 rows would not fit."""
    distance = length = 0.0
    for start in range(0, len(embeddings), BLOCK):
        x = embeddings[start : start + BLOCK].astype(np.float64)
        length += float(np.square(x).sum())
        distance += float(np.square(x - reconstruction[start : start + BLOCK]).sum())
    return distance / length if length else 0.0


def _binned(group_sizes: dict[int, int]) -> dict[str, int]:
    """Groups of 1, 2, 3-4, 5-8, ... items: a long tail in few lines."""
    bins: dict[str, int] = {}
    for size, groups in group_sizes.items():
        high = 1 << (size - 1).bit_length()
        low = high // 2 + 1
        name = str(high) if low >= high else f"{low}-{high}"
        bins[name] = bins.get(name, 0) + groups
    return bins


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
