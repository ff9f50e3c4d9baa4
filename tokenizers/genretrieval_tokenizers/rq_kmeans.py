"""RQ-KMeans: k-means level by level, each level on what the levels above left over.

Residual quantisation (Chen, Guan and Wang, "Approximate nearest neighbor search by residual vector
quantization", Sensors 2010), as semantic-ID tokenizer in GRID (arXiv 2507.22224) and OneSearch (arXiv
2509.03236).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds

_FORMAT = "genretrieval.rq_kmeans.1"
_BLOCK = 4096
_TIE = 1e-9
_EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class RqKMeansConfig:
    """Settings of RQ-KMeans.

    Attributes:
        codebook_sizes: codes of each level wanted; a level gets as many as it has distinct vectors where that
            is fewer.
        normalize_residuals: scale what a level leaves over to length 1 before the next one. Long residuals
            otherwise draw most codes to themselves while one code near zero holds most items.
        dedup_level: add a last level that numbers the items of one tuple, so that every item has an ID of its
            own.
        dedup_headroom: codes of the dedup level beyond the largest group, for items that are appended later.
            The generator has an output for every code, so an item can be appended without training it anew
            only while there is room.
        iterations: k-means iterations a level.
        max_points_per_centroid: vectors a code that k-means trains on; of more, a sample is drawn.
        seed: start of k-means.

    Raises:
        DataError: a setting is out of range.
    """

    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    normalize_residuals: bool = True
    dedup_level: bool = True
    dedup_headroom: int = 16
    iterations: int = 25
    max_points_per_centroid: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise DataError(f"codebook_sizes {self.codebook_sizes}: give one size of at least 1 for each level")
        if self.iterations < 1 or self.max_points_per_centroid < 1:
            raise DataError("iterations and max_points_per_centroid must be at least 1")
        if self.dedup_headroom < 0:
            raise DataError(f"dedup_headroom is {self.dedup_headroom}; it is a number of spare codes, 0 or more")


@dataclass(frozen=True, slots=True)
class RqKMeans:
    """A fitted tokenizer.

    Attributes:
        config: what it was fitted with.
        codebooks: float32 ``[codebook size, dim]`` a level.
        scales: float32 ``[n_levels]``, mean length of what each level left over in fitting, by which the next
            one was divided; ones without `normalize_residuals`. Only `decode` needs them.
    """

    config: RqKMeansConfig
    codebooks: tuple[NDArray[np.float32], ...]
    scales: NDArray[np.float32]

    @classmethod
    def fit(cls, x_ND: NDArray[np.floating], config: RqKMeansConfig | None = None) -> RqKMeans:
        """Learn the codebooks.

        A level with no more distinct vectors than codes takes these vectors as its codes, so a shop of twenty
        items passes with any setting; `notes` says where that happened. Equal input, seed and number of
        threads give equal codebooks.

        Raises:
            DataError: `x_ND` is no matrix of finite numbers, or is empty.
        """
        config = config or RqKMeansConfig()
        residual_ND = _checked(x_ND).copy()
        codebooks, scales = [], []
        for level, size in enumerate(config.codebook_sizes):
            codebook_KD = _kmeans(
                residual_ND, size, config, config.seed + level, spherical_start=config.normalize_residuals and level > 0
            )
            total = 0.0
            for rows in _blocks(len(residual_ND)):
                _, residual_ND[rows], length_N = _step(residual_ND[rows], codebook_KD, config)
                total += float(length_N.sum())
            codebooks.append(codebook_KD)
            scales.append(total / len(residual_ND))
        return cls(config, tuple(codebooks), np.array(scales, np.float32))

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it takes."""
        return int(self.codebooks[0].shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What came out different from what was asked, for the report."""
        return tuple(
            f"level {level} has {len(codebook)} codes instead of {wanted}: there are no more distinct vectors"
            for level, (wanted, codebook) in enumerate(zip(self.config.codebook_sizes, self.codebooks, strict=True))
            if len(codebook) < wanted
        )

    def encode(self, x_ND: NDArray[np.floating]) -> Codes:
        """Codes of vectors, int32 ``[N, n_levels]``, without the dedup level.

        The same vector gets the same codes whatever stands beside it and however many threads compute.

        Raises:
            DataError: the vectors are not finite or have other dimensions than the codebooks.
        """
        x_ND = _checked(x_ND, self.dim)
        codes_NL = np.empty((len(x_ND), len(self.codebooks)), np.int32)
        for rows in _blocks(len(x_ND)):
            residual = x_ND[rows]
            for level, codebook_KD in enumerate(self.codebooks):
                codes_NL[rows, level], residual, _ = _step(residual, codebook_KD, self.config)
        return codes_NL

    def decode(self, codes_NL: Codes) -> NDArray[np.float32]:
        """The vectors that codes stand for, float32 ``[N, dim]``; a dedup level, where given, is not read."""
        out = np.zeros((len(codes_NL), self.dim), np.float32)
        for level in reversed(range(len(self.codebooks))):
            out = self.codebooks[level][codes_NL[:, level]] + self.scales[level] * out
        return out

    def assign(self, x_ND: NDArray[np.floating]) -> SemanticIds:
        """Semantic IDs of a catalogue, row by row.

        With `dedup_level` the items of one tuple are numbered from 0 in row order, and the last codebook has
        the size of the largest group plus `dedup_headroom`. Without it, items of one tuple share their ID.

        Raises:
            DataError: as `encode`.
        """
        codes_NL = self.encode(x_ND)
        sizes = tuple(len(codebook) for codebook in self.codebooks)
        if not self.config.dedup_level:
            return SemanticIds(codes_NL, sizes)
        numbers_N = number_duplicates(codes_NL)
        last = int(numbers_N.max(initial=0)) + 1 + self.config.dedup_headroom
        return SemanticIds(np.column_stack([codes_NL, numbers_N]), (*sizes, last))

    def append(self, existing: SemanticIds, x_ND: NDArray[np.floating]) -> SemanticIds:
        """Add items: the published IDs first and unchanged, then those of the new rows.

        A new item continues the numbering of its tuple.

        Raises:
            DataError: as `encode`; the existing IDs are of another tokenizer; or a tuple has no code left, in
                which case nothing is appended.
        """
        sizes = tuple(len(codebook) for codebook in self.codebooks)
        levels = existing.codebook_sizes[:-1] if self.config.dedup_level else existing.codebook_sizes
        if levels != sizes:
            raise DataError(
                f"the published IDs have codebooks {existing.codebook_sizes}, this tokenizer {sizes}"
                f"{' and a dedup level' if self.config.dedup_level else ''}: they are not from it. IDs of "
                "two tokenizers name unrelated things by the same codes; load the tokenizer that published "
                "these"
            )
        codes_NL = self.encode(x_ND)
        if self.config.dedup_level:
            numbers_N = number_duplicates(codes_NL, existing.codes)
            room = existing.codebook_sizes[-1]
            if len(full := np.flatnonzero(numbers_N >= room)):
                raise DataError(
                    f"{len(full)} of {len(codes_NL)} new items find no free code in the dedup level of "
                    f"{room}, first new row {full[0]} with codes {tuple(codes_NL[full[0]].tolist())}. "
                    "Leave these items out, or tokenize the whole catalogue again with a larger "
                    "dedup_headroom; that gives every item a new ID and needs a newly trained generator"
                )
            codes_NL = np.column_stack([codes_NL, numbers_N])
        return SemanticIds(np.concatenate([existing.codes, codes_NL]), existing.codebook_sizes)

    def save(self, path: Path) -> None:
        """Write one safetensors file, the settings in its metadata; it is whole or absent."""
        tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        tensors["scales"] = self.scales
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(save(tensors, {"format": _FORMAT, "config": json.dumps(asdict(self.config))}))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> RqKMeans:
        """Read what `save` wrote; it encodes to the same IDs.

        Raises:
            DataError: the file is missing, damaged, or of another tokenizer.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error}); give the file `genretrieval tokenize` wrote"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise DataError(f"{path} is {metadata.get('format', 'no tokenizer')!r}, not {_FORMAT!r}")
        settings = json.loads(metadata["config"])
        config = RqKMeansConfig(**settings | {"codebook_sizes": tuple(settings["codebook_sizes"])})
        codebooks = tuple(tensors[f"codebook.{level}"] for level in range(len(config.codebook_sizes)))
        return cls(config, codebooks, tensors["scales"])


def nearest_codes(x_ND: NDArray[np.floating], codebook_KD: NDArray[np.floating]) -> Codes:
    """Index of the nearest row of a codebook by Euclidean distance, int32 ``[N]``; at a tie the lower index.

    Distances are float64, and those closer than 1e-9 of the vectors' squared lengths are ties: rounding,
    which changes with block shape and thread count, stays far below that.
    """
    x_ND, codebook_KD = x_ND.astype(np.float64), codebook_KD.astype(np.float64)
    length_K = np.square(codebook_KD).sum(axis=1)
    scores_NK = length_K - 2 * (x_ND @ codebook_KD.T)
    scale_N = np.square(x_ND).sum(axis=1) + length_K.max()
    within_NK = scores_NK <= (scores_NK.min(axis=1) + _TIE * scale_N)[:, None]
    codes_N: Codes = within_NK.argmax(axis=1).astype(np.int32)
    return codes_N


def number_duplicates(codes_NL: Codes, published_PM: Codes | None = None) -> Codes:
    """Number the rows of equal codes 0, 1, ... in row order, int32 ``[N]``.

    Args:
        codes_NL: int32 ``[N, L]``.
        published_PM: int32 ``[P, L + 1]``, IDs whose last level holds numbers given out before; new rows
            continue after the highest one of their tuple, so the number of a deleted item in between is not
            given again.
    """
    published_PM = np.zeros((0, codes_NL.shape[1] + 1), np.int32) if published_PM is None else published_PM
    tuples = np.concatenate([published_PM[:, :-1], codes_NL])
    _, group = np.unique(tuples, axis=0, return_inverse=True)
    old, new = np.split(group.ravel(), [len(published_PM)])
    next_number = np.zeros(len(tuples), np.int64)
    np.maximum.at(next_number, old, published_PM[:, -1] + 1)
    order = np.argsort(new, kind="stable")
    rank = np.empty(len(new), np.int64)
    rank[order] = np.arange(len(new)) - np.searchsorted(new[order], new[order])
    return (next_number[new] + rank).astype(np.int32)


def _step(
    x_ND: NDArray[np.float32], codebook_KD: NDArray[np.float32], config: RqKMeansConfig
) -> tuple[Codes, NDArray[np.float32], NDArray[np.float32]]:
    """One level: codes ``[N]``, what they leave over ``[N, dim]``, and by what that was divided ``[N]``."""
    codes_N = nearest_codes(x_ND, codebook_KD)
    residual_ND = x_ND - codebook_KD[codes_N]
    if not config.normalize_residuals:
        return codes_N, residual_ND, np.ones(len(x_ND), np.float32)
    length_N = np.linalg.norm(residual_ND, axis=1)
    length_N[length_N <= _EXACT * np.linalg.norm(x_ND, axis=1)] = 0  # rounding noise has no direction
    inverse_N = np.divide(1, length_N, out=np.zeros_like(length_N), where=length_N > 0)
    return codes_N, inverse_N[:, None] * residual_ND, length_N


def _kmeans(
    x_ND: NDArray[np.float32], size: int, config: RqKMeansConfig, seed: int, *, spherical_start: bool
) -> NDArray[np.float32]:
    """Codebook of a level, float32 ``[at most size, dim]``."""
    distinct = _first_distinct(x_ND, size + 1)
    if len(distinct) <= size:
        return x_ND[distinct]
    start_KD = _lloyd(x_ND, size, config, seed, spherical=True, start_KD=None) if spherical_start else None
    return _lloyd(x_ND, size, config, seed, spherical=False, start_KD=start_KD)


def _lloyd(
    x_ND: NDArray[np.float32],
    size: int,
    config: RqKMeansConfig,
    seed: int,
    *,
    spherical: bool,
    start_KD: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    kmeans = faiss.Kmeans(
        x_ND.shape[1],
        size,
        niter=config.iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,  # below 39 faiss prints a warning; few items are no fault
        max_points_per_centroid=config.max_points_per_centroid,
    )
    kmeans.train(x_ND, init_centroids=start_KD)
    assert kmeans.centroids is not None
    return kmeans.centroids


def _first_distinct(x_ND: NDArray[np.float32], at_most: int) -> list[int]:
    """Rows whose vector differs from all before them; stops when there are `at_most`."""
    first: dict[bytes, int] = {}
    for row, vector in enumerate(x_ND):
        first.setdefault((vector + 0.0).tobytes(), row)  # + 0.0: -0 and 0 are one number, but not the same bytes
        if len(first) == at_most:
            break
    return list(first.values())


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, n, _BLOCK)]


def _checked(x_ND: NDArray[np.floating], dim: int | None = None) -> NDArray[np.float32]:
    if x_ND.ndim != 2 or not x_ND.shape[1] or (dim is None and not len(x_ND)):
        raise DataError(f"embeddings have shape {x_ND.shape}; expected [n_items, dim] with items and dimensions")
    if dim is not None and x_ND.shape[1] != dim:
        raise DataError(
            f"embeddings have {x_ND.shape[1]} dimensions, the codebooks {dim}: they come from another "
            "embedding, and codes would mean nothing; embed the items with the recipe that the tokenizer "
            "was fitted with"
        )
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(x_ND).all(axis=1))):
        raise DataError(f"embeddings of {len(bad)} items hold NaN or infinities, first item row {bad[0]}")
    return x_ND
