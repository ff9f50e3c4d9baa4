"""A published tokenization: the semantic IDs that a shop lives on, and what alone may add to them.

A folder of three files::

    codebooks.safetensors   the tokenizer
    semantic_ids.parquet    item_id string, semantic_id list<int32>, in the order of publication
    published.json          codebook sizes, collision settings, fingerprint of the codebooks, counts

Each file appears by rename and ``published.json`` comes last, so that its presence means complete. Appending writes
the IDs anew, with the published ones as their first rows, then the manifest: a reader takes as many rows as the
manifest counts, so that an append that was cut off has not happened. One process writes at a time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genretrieval.bundle import CODEBOOKS
from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval_tokenizers.collisions import CollisionConfig, Costs, Resolved, append_codes, resolve
from genretrieval_tokenizers.storage import fingerprint, read_format, read_tokenizer
from genretrieval_tokenizers.tokenizer import Codebooks, Tokenizer

SEMANTIC_IDS = "semantic_ids.parquet"
PUBLISHED = "published.json"
_FORMAT = "genretrieval.published.1"


@dataclass(frozen=True, slots=True)
class Published:
    """What a folder holds.

    Attributes:
        item_ids: Arrow string array ``[n_items]``, in the order of `ids`.
        ids: their semantic IDs.
        collisions: what became of items with equal codes.
        fingerprint: sha256 of ``codebooks.safetensors``.
        moved: items whose last code is not their nearest; see `collisions.Resolved`.
        added_cost: squared distance that this added, mean over all items.
        notes: remarks of the call that returned this; not stored, so empty from `open_published`.
    """

    item_ids: pa.StringArray
    ids: SemanticIds
    collisions: CollisionConfig
    fingerprint: str
    moved: int = 0
    added_cost: float = 0.0
    notes: tuple[str, ...] = ()


def publish(
    folder: Path,
    tokenizer: Tokenizer,
    collisions: CollisionConfig,
    item_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
    x_ND: NDArray[np.floating],
) -> Published:
    """Give every item of a catalogue its semantic ID, for good.

    Args:
        folder: made where missing; must hold no published IDs.
        tokenizer: a fitted tokenizer.
        collisions: what becomes of items with equal codes.
        item_ids: ids of the items, each once.
        x_ND: float ``[n_items, dim]``, their embeddings.

    Raises:
        DataError: the folder holds published IDs, an item id is missing or repeated, or the embeddings are not of
            these items or this tokenizer; also as `collisions.resolve`.
    """
    item_ids = checked_ids(item_ids, len(x_ND))
    check_unpublished(folder)
    codes_NL = tokenizer.encode(x_ND)
    return publish_codes(folder, tokenizer, collisions, item_ids, codes_NL, _costs(tokenizer, x_ND))


def publish_codes(
    folder: Path,
    tokenizer: Codebooks,
    collisions: CollisionConfig,
    item_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
    codes_NL: Codes,
    costs: Costs | None = None,
) -> Published:
    """`publish` with codes that are there already, as when embeddings came as a stream.

    Args:
        folder: as `publish`.
        tokenizer: the one that made the codes.
        collisions: as `publish`.
        item_ids: as `publish`.
        codes_NL: int32 ``[n_items, n_levels]``.
        costs: needed to reassign; see `collisions.resolve`.

    Raises:
        DataError: as `publish`.
    """
    item_ids = checked_ids(item_ids, len(codes_NL))
    check_unpublished(folder)
    resolved = resolve(codes_NL, tokenizer.codebook_sizes, collisions, costs)
    folder.mkdir(parents=True, exist_ok=True)
    with _appearing(folder / CODEBOOKS) as partial:
        tokenizer.save(partial)
    published = Published(
        item_ids,
        resolved.ids,
        collisions,
        fingerprint(folder / CODEBOOKS),
        resolved.moved,
        resolved.added_cost,
        resolved.notes,
    )
    _write(folder, published)
    return published


def open_published(folder: Path) -> Published:
    """Read what `publish` wrote and `append` added to.

    Raises:
        DataError: the folder is incomplete or damaged, or its codebooks are not those that made the IDs.
    """
    manifest = _read_manifest(folder)
    try:
        collisions = CollisionConfig(**manifest["collisions"])
        sizes, n_items = tuple(manifest["codebook_sizes"]), int(manifest["n_items"])
        moved, added_cost = int(manifest["moved"]), float(manifest["added_cost"])
        expected = str(manifest["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / PUBLISHED} is damaged ({error!r}); restore the folder from a copy") from error
    if _fingerprint(folder / CODEBOOKS) != expected:
        raise _other_tokenizer(str(folder / CODEBOOKS), n_items)
    item_ids, codes_NL = _read_ids(folder / SEMANTIC_IDS, n_items, len(sizes))
    return Published(item_ids, SemanticIds(codes_NL, sizes), collisions, expected, moved, added_cost)


def append(
    folder: Path,
    tokenizer: Tokenizer,
    item_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
    x_ND: NDArray[np.floating],
) -> Published:
    """Add items to a published catalogue; no published ID moves.

    An item that is published already keeps its ID, whatever its embedding is now; `Published.notes` counts these
    and says for how many the codes would differ today.

    Args:
        folder: what `publish` wrote.
        tokenizer: the one that published; any other is refused.
        item_ids: ids of the items to add, each once.
        x_ND: float ``[n_new, dim]``, their embeddings.

    Raises:
        DataError: as `open_published`, `publish` and `collisions.append_codes`; the folder is then as it was.
    """
    return append_encoded(folder, tokenizer, item_ids, tokenizer.encode(x_ND), _costs(tokenizer, x_ND))


def append_encoded(
    folder: Path,
    tokenizer: Codebooks,
    item_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
    codes_NL: Codes,
    costs: Costs | None = None,
) -> Published:
    """`append` with codes that are there already, as where they come from words.

    Args:
        folder: as `append`.
        tokenizer: the one that made the codes.
        item_ids: as `append`.
        codes_NL: int32 ``[n_new, n_levels]``.
        costs: needed where collisions are reassigned; see `collisions.append_codes`.

    Raises:
        DataError: as `append`.
    """
    item_ids = checked_ids(item_ids, len(codes_NL))
    before = open_published(folder)
    if not _same_tokenizer(tokenizer, folder / CODEBOOKS):
        raise _other_tokenizer("the tokenizer given", before.ids.n_items)
    row_before = pc.index_in(item_ids, value_set=before.item_ids)
    new = np.flatnonzero(pc.is_null(row_before).to_numpy(zero_copy_only=False))
    new_costs: Costs | None = None if costs is None else lambda rows: costs(new[rows])
    resolved = append_codes(before.ids, codes_NL[new], before.collisions, new_costs)
    after = Published(
        pa.concat_arrays([before.item_ids, item_ids.take(pa.array(new))]),
        resolved.ids,
        before.collisions,
        before.fingerprint,
        before.moved + resolved.moved,
        _joint_cost(before, resolved, len(new)),
        (*_kept(before, codes_NL, row_before), *resolved.notes),
    )
    if len(new):
        _write(folder, after)
    return after


def _costs(tokenizer: Tokenizer, x_ND: NDArray[np.floating]) -> Costs:
    return lambda rows: tokenizer.last_level_costs(x_ND[rows])


def checked_ids(item_ids: Sequence[str] | pa.Array | pa.ChunkedArray, n_items: int) -> pa.StringArray:
    """`item_ids` as one Arrow string array.

    Raises:
        DataError: one is no string, missing or repeated, or they are not `n_items`.
    """
    try:
        array = pa.array(item_ids, pa.string()) if isinstance(item_ids, Sequence) else item_ids.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"item ids must be strings ({error}); give the item_id column of items.parquet") from error
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if len(array) != n_items:
        raise DataError(f"{len(array)} item ids for {n_items} embeddings: they do not belong together")
    if array.null_count:
        raise DataError(f"{array.null_count} item ids are missing; every item needs one to be found again by")
    if pc.count_distinct(array).as_py() != n_items:
        counts = pc.value_counts(array)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise DataError(
            f"{len(repeated)} item ids occur more than once, first {repeated[0].as_py()!r}: an item has one semantic "
            "ID; leave one row of each"
        )
    return array


def check_unpublished(folder: Path) -> None:
    """Refuse to publish where IDs are published already.

    Raises:
        DataError: the folder holds published IDs.
    """
    if (folder / PUBLISHED).exists():
        raise DataError(
            f"{folder} holds published IDs already; publishing there again would re-key every published ID, and a "
            "generator trained on them would name other items. Use `append` for new items, or give a new folder"
        )


def _same_tokenizer(tokenizer: Codebooks, path: Path) -> bool:
    """Whether `tokenizer` is what `path` holds: method, settings and every number.

    Not by the bytes of a file: another version of safetensors may order a header differently.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / CODEBOOKS
        tokenizer.save(given)
        if read_format(given) != (method := read_format(path)):
            return False
        given_config, given_tensors = read_tokenizer(given, method)
    config, tensors = read_tokenizer(path, method)
    return (
        given_config == config
        and given_tensors.keys() == tensors.keys()
        and all(np.array_equal(given_tensors[name], tensor) for name, tensor in tensors.items())
    )


def _other_tokenizer(what: str, n_items: int) -> DataError:
    return DataError(
        f"{what} is not what published these IDs. Encoding with it would re-key every published ID: {n_items:,} items, "
        "and a generator trained on their IDs would name other items by them. Use the codebooks that published, or "
        "publish into a new folder and train the generator anew"
    )


def _fingerprint(path: Path) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: without the codebooks that made the published IDs no item can be added; restore the "
            "file from a copy"
        ) from error


def _kept(before: Published, codes_NL: Codes, row_before: pa.Array) -> tuple[str, ...]:
    """What to say about items that were published before."""
    given = np.flatnonzero(pc.is_valid(row_before).to_numpy(zero_copy_only=False))
    if not len(given):
        return ()
    stored = before.ids.codes[row_before.drop_null().to_numpy()]
    # The dedup level is not encoded, and a reassigned last code is no longer the encoded one.
    described = codes_NL.shape[1] - (before.collisions.method == "reassign")
    differ = int((stored[:, :described] != codes_NL[given, :described]).any(axis=1).sum())
    return (
        f"{len(given):,} of {len(codes_NL):,} items are published already and keep their IDs; {differ:,} of them would "
        "get other codes by the embedding given now",
    )


def _joint_cost(before: Published, resolved: Resolved, n_new: int) -> float:
    """Mean of both added costs over the items of both."""
    n_before = before.ids.n_items
    total = before.added_cost * n_before + resolved.added_cost * n_new
    return total / (n_before + n_new) if n_before + n_new else 0.0


def _write(folder: Path, published: Published) -> None:
    """The IDs, then the manifest that makes them count."""
    n_items, n_levels = published.ids.codes.shape
    offsets = pa.array(np.arange(n_items + 1, dtype=np.int32) * np.int32(n_levels))
    codes = pa.ListArray.from_arrays(offsets, pa.array(published.ids.codes.reshape(-1)))
    table = pa.table({"item_id": published.item_ids, "semantic_id": codes})
    with _appearing(folder / SEMANTIC_IDS) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    manifest = {
        "format": _FORMAT,
        "codebook_sizes": published.ids.codebook_sizes,
        "collisions": asdict(published.collisions),
        "fingerprint": published.fingerprint,
        "n_items": n_items,
        "moved": published.moved,
        "added_cost": published.added_cost,
    }
    with _appearing(folder / PUBLISHED) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A neighbour to write to, which then reaches the disk and takes the name `path`."""
    partial = path.with_name(path.name + ".new")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / PUBLISHED
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {PUBLISHED}: it is written last, so publishing never finished here; publish again"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); restore the folder from a copy") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DataError(f"{path} is not of this version ({_FORMAT}); publish into a new folder")
    return manifest


def _read_ids(path: Path, n_items: int, n_levels: int) -> tuple[pa.StringArray, Codes]:
    """The first `n_items` rows: those beyond are of an append that never finished."""
    try:
        table = pq.read_table(path, columns=["item_id", "semantic_id"], page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); restore the folder from a copy") from error
    table = table.slice(0, n_items)
    fits = pc.equal(pc.list_value_length(table["semantic_id"]), n_levels)
    whole = pc.all(fits, skip_nulls=False, min_count=0).as_py()
    if table.num_rows != n_items or table["item_id"].null_count or not whole:
        raise DataError(
            f"{path} does not hold the {n_items} IDs of {n_levels} codes that {PUBLISHED} counts; restore the folder "
            "from a copy"
        )
    codes = pc.list_flatten(table["semantic_id"]).to_numpy()
    return table["item_id"].combine_chunks(), codes.astype(np.int32, copy=False).reshape(n_items, n_levels)
