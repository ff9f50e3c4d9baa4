"""From a request to a response: everything around the graph, in NumPy, for evaluation and the server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.bundle import Manifest
from genretrieval.catalogue import CatalogueIndex, build_index, graph_inputs
from genretrieval.errors import RequestError
from genretrieval.features import RequestFeatures
from genretrieval.histories import NO_TIME
from genretrieval.request import Filters, RetrievedItem, RetrieveRequest, RetrieveResponse, Timings
from genretrieval.schemas import EXPOSURE
from genretrieval.semantic_ids import SemanticIds

# A closed beam ends under this; a real one cannot (see genretrieval.model.search.CLOSED).
CLOSED_BELOW = -1e9
# Items that the dense head compares one by one; above, only those that the search found and those it cannot find.
COMPARED_ITEMS = 50_000
PURCHASE = "purchase"
_ITEM_ID, _EVENT, _TIMESTAMP = attrgetter("item_id"), attrgetter("event"), attrgetter("timestamp")
# Columns of a catalogue that are no attributes.
_NOT_FILTERED = frozenset({"item_id", "semantic_id", "popularity"})
# Row 0 is always open: 32 requests of one batch may carry 32 different filters.
MASK_ROWS = 33


class Leaves(NamedTuple):
    """What the graph returns for a batch; see `genretrieval.model.search.Retrieved`."""

    leaves: NDArray[np.int64]
    scores: NDArray[np.float32]
    level_scores: NDArray[np.float32]
    user: NDArray[np.float32] | None = None

    def of(self, row: int) -> Leaves:
        """What it returned for one request of the batch."""
        user = None if self.user is None else self.user[row]
        return Leaves(self.leaves[row], self.scores[row], self.level_scores[row], user)


class Backend(Protocol):
    """Runs the retrieval graph."""

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch; `inputs` are named as the graph's."""
        ...


class Servable(Protocol):
    """What a `Retriever` answers from: a `genretrieval.bundle.Bundle`, or one that is still being trained."""

    @property
    def manifest(self) -> Manifest:
        """What it is."""
        ...

    def features(self) -> RequestFeatures:
        """How requests are turned into model inputs."""
        ...

    def catalogue(self) -> pl.DataFrame:
        """Items in row order, see `genretrieval.bundle.Bundle.catalogue`."""
        ...

    def item_vectors(self) -> NDArray[np.float32] | None:
        """Item vectors of a model that has them, see `genretrieval.bundle.Bundle.item_vectors`."""
        ...


@dataclass(frozen=True)
class Catalogue:
    """Items that can be retrieved: an immutable snapshot, kept by a request from its beginning to its end.

    Attributes:
        table: the bundle's ``catalogue.parquet``.
        ids: semantic IDs by item row.
        index: the trie over them; items of a leaf are listed by falling popularity.
        rows: item id to item row.
        item_ids: item row to item id; the table's column gives single ones out slowly.
    """

    table: pl.DataFrame
    ids: SemanticIds
    index: CatalogueIndex
    rows: dict[str, int]
    item_ids: list[str]

    @classmethod
    def open(cls, bundle: Servable) -> Catalogue:
        """Read a bundle's catalogue and index it."""
        table = bundle.catalogue()
        codes = table["semantic_id"].explode().to_numpy().astype(np.int32).reshape(len(table), -1)
        ids = SemanticIds(codes, bundle.manifest.codebook_sizes)
        index = build_index(ids, order=-table["popularity"].to_numpy().astype(np.int64))
        item_ids = table["item_id"].to_list()
        return cls(table, ids, index, {item: row for row, item in enumerate(item_ids)}, item_ids)

    def matching(self, filters: Filters) -> NDArray[np.bool_]:
        """Which items satisfy `filters`, bool ``[n_items]``.

        Raises:
            RequestError: see `conditions`.
        """
        everything = pl.repeat(value=True, n=pl.len())
        matches = self.table.select(match=pl.all_horizontal(everything, *self.conditions(filters)))["match"]
        return matches.fill_null(value=False).to_numpy().astype(bool)

    def conditions(self, filters: Filters) -> list[pl.Expr]:
        """What `filters` ask of a row of the table.

        Raises:
            RequestError: a condition names an attribute that the catalogue does not have, or cannot compare.
        """
        conditions: list[pl.Expr] = []
        schema = {name: type_ for name, type_ in self.table.schema.items() if name not in _NOT_FILTERED}
        for name, values in filters.attributes.items():
            column = "categories" if name == "category" else name
            if column not in schema:
                raise RequestError(
                    f"filter on unknown attribute {name!r}; the catalogue has {', '.join(sorted(schema))}"
                )
            if isinstance(schema[column], pl.List):
                accepted = pl.element().cast(pl.String).is_in(values)
                conditions.append(pl.col(column).list.eval(accepted).list.any())
            else:
                conditions.append(pl.col(column).cast(pl.String).is_in(values))
        if filters.min_price is not None or filters.max_price is not None:
            if not schema.get("price", pl.String()).is_numeric():
                raise RequestError("filter on a price range, but this catalogue has no numeric attribute 'price'")
            low = -np.inf if filters.min_price is None else filters.min_price
            high = np.inf if filters.max_price is None else filters.max_price
            conditions.append(pl.col("price").is_between(low, high))
        if filters.in_stock is not None:
            if schema.get("in_stock") != pl.Boolean:
                raise RequestError("filter on in_stock, but this catalogue has no boolean attribute 'in_stock'")
            conditions.append(pl.col("in_stock") == filters.in_stock)
        return conditions


def _canonical(message: RetrieveRequest | Filters) -> bytes:
    """The same text for equal messages; mappings have no order, and gRPC does not keep one."""
    if isinstance(message, Filters):
        return (
            message.model_copy(update={"attributes": dict(sorted(message.attributes.items()))})
            .model_dump_json()
            .encode()
        )
    filters = _canonical(message.filters) if message.filters else b""
    rest = message.model_copy(update={"profile": dict(sorted(message.profile.items())), "filters": None})
    return rest.model_dump_json().encode() + filters


class MaskRows:
    """Masks of distinct filters in preallocated rows, which the graph takes whole; row 0 allows everything.

    A row is not reused while a batch holds it. When all rows are held, a batch with new filters waits.
    """

    def __init__(self, catalogue: Catalogue, n_rows: int = MASK_ROWS) -> None:
        """Allocate ``n_rows`` rows for every level of the index (`arrays`) and for its items (`items`)."""
        self.catalogue = catalogue
        self.n_rows = n_rows
        widths = [max(2, len(tokens)) for tokens in catalogue.index.tokens]
        self.arrays = {f"allowed_{level}": np.ones((n_rows, width), bool) for level, width in enumerate(widths)}
        self.items = np.ones((n_rows, len(catalogue.table)), bool)
        self._free = list(range(n_rows - 1, 0, -1))
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._holders = [0] * n_rows
        self._changed = threading.Condition()
        # Batches take their rows one after another, so that no two half-served ones wait for each other.
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, filters: Sequence[Filters | None]) -> Iterator[list[int]]:
        """Mask rows of a batch, fewer than `n_rows` distinct ones, held until the block ends."""
        rows: list[int] = []
        try:
            with self._turn:
                # One by one: what was acquired is released below even if a later filter is refused.
                for condition in filters:
                    rows.append(self._acquire(condition) if condition is not None else 0)  # noqa: PERF401
            yield rows
        finally:
            with self._changed:
                for row in rows:
                    self._holders[row] -= 1 if row else 0
                self._changed.notify()

    def _acquire(self, filters: Filters) -> int:
        key = _canonical(filters)
        with self._changed:
            if key not in self._rows:
                index = self.catalogue.index
                matching = self.catalogue.matching(filters)
                allowed = index.allowed_nodes(index.allowed_leaves(matching))
                while (row := self._take_row()) is None:
                    self._changed.wait()
                for level, nodes in enumerate(allowed):
                    self.arrays[f"allowed_{level}"][row, : len(nodes)] = nodes
                self.items[row] = matching
                self._rows[key] = row
            self._rows.move_to_end(key)
            self._holders[self._rows[key]] += 1
            return self._rows[key]

    def _take_row(self) -> int | None:
        """A row that nobody holds: a fresh one, else the least recently used."""
        if self._free:
            return self._free.pop()
        for key, row in self._rows.items():
            if not self._holders[row]:
                del self._rows[key]
                return row
        return None


@dataclass(frozen=True)
class KnownEvents:
    """Events of a request's history whose item the catalogue has, oldest first.

    Attributes:
        rows: int64 ``[n]``, item rows.
        events: int64 ``[n]``, behaviours as the model numbers them.
        times: int64 ``[n]``, unix seconds or `NO_TIME`.
        purchased: bool ``[n]``.
        interactions: int64, positions of those that are no exposures.
        missing: ids of events whose item the catalogue does not have, as they came.
    """

    rows: NDArray[np.int64]
    events: NDArray[np.int64]
    times: NDArray[np.int64]
    purchased: NDArray[np.bool_]
    interactions: NDArray[np.int64]
    missing: list[str]

    def before(self, read: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
        """Positions of the newest events before those at `read`; of all events, where nothing is read."""
        end = int(read[0]) if len(read) else len(self.rows)
        return np.arange(max(0, end - at_most), end)


def _stack(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Vectors of different lengths as int64 ``[n, >= 2]``, zeros on the right; a graph has no dimension of one."""
    stacked = np.zeros((len(rows), max([2, *map(len, rows)])), np.int64)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
    return stacked


@dataclass(frozen=True)
class DenseItems:
    """What a dense head ranks.

    Attributes:
        read: float32 ``[n_items, E]``, memory-mapped, what items are read by in a history.
        ranked: float32 ``[n_items, E]``, what they are ranked by; memory-mapped where not all are compared.
        candidates: int64, rows of the items that are compared beside what the search found. It hardly ever writes the
            IDs of items that training never saw (LIGER, arXiv 2411.18814), so those are always among them. In a
            catalogue of up to `COMPARED_ITEMS`, all items are.
    """

    read: NDArray[np.float32]
    ranked: NDArray[np.float32]
    candidates: NDArray[np.int64]

    @classmethod
    def open(cls, bundle: Servable, catalogue: Catalogue) -> DenseItems | None:
        """Read a bundle's item vectors, if it has any."""
        vectors = bundle.item_vectors()
        if vectors is None:
            return None
        # Of a leaf with a cap no more may be listed than the search lists.
        every = len(vectors) <= COMPARED_ITEMS and bundle.manifest.leaf_cap is None
        popularity = catalogue.table["popularity"].to_numpy()
        # Where all are compared, vectors that lie side by side are read faster.
        ranked = np.ascontiguousarray(vectors[:, 1]) if every else vectors[:, 1]
        return cls(vectors[:, 0], ranked, np.flatnonzero((popularity == 0) | every))


class Retriever:
    """Answers requests from one bundle. Thread-safe when its backend is."""

    def __init__(self, bundle: Servable, backend: Backend) -> None:
        """Open the bundle's catalogue; `backend` runs its graph."""
        self.bundle = bundle
        self.backend = backend
        self.features = bundle.features()
        self.catalogue = Catalogue.open(bundle)
        self.masks = MaskRows(self.catalogue)
        self.dense = DenseItems.open(bundle, self.catalogue)
        self._index_inputs = graph_inputs(self.catalogue.index)

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        """Answer a batch; each answer is the one the request would get alone.

        Raises:
            RequestError: a request cannot be answered as asked.
        """
        responses: dict[int, RetrieveResponse] = {}
        widths = [self.beam_width(request) for request in requests]
        for width in sorted(set(widths)):
            same = [i for i, w in enumerate(widths) if w == width]
            for start in range(0, len(same), self.masks.n_rows - 1):
                rows = same[start : start + self.masks.n_rows - 1]
                answers = self._retrieve([requests[i] for i in rows], width)
                responses.update(zip(rows, answers, strict=True))
        return [responses[i] for i in range(len(requests))]

    def check(self, request: RetrieveRequest) -> None:
        """Find what is wrong with a request before it joins a batch, which one bad request would fail.

        Raises:
            RequestError: the request cannot be answered as asked.
        """
        if request.filters is not None:
            self.catalogue.conditions(request.filters)

    def beam_width(self, request: RetrieveRequest) -> int:
        """Beams that `request` is searched with."""
        return max(request.beam_width or self.bundle.manifest.beam_width, request.top_k)

    def _retrieve(self, requests: Sequence[RetrieveRequest], width: int) -> list[RetrieveResponse]:
        started = time.perf_counter()
        known = [self._known(request) for request in requests]
        with self.masks.hold([request.filters for request in requests]) as mask_rows:
            inputs = self._graph_inputs(requests, known, mask_rows, width)
            begun = time.perf_counter()
            found = self.backend.run(inputs)
            ended = time.perf_counter()
            responses = []
            for i, request in enumerate(requests):
                items = self._items(request, known[i], found.of(i), self.masks.items[mask_rows[i]])
                total = (time.perf_counter() - started) * 1e3
                timings = Timings(inference_ms=(ended - begun) * 1e3, total_ms=total)
                responses.append(self._response(request, known[i], items, timings))
        return responses

    def _known(self, request: RetrieveRequest) -> KnownEvents:
        """The events of a request's history whose item the catalogue has.

        A history has up to 1,000 events, so no line of Python runs for each: columns are read and looked up by `map`,
        and what depends on the behaviour alone is found once for each behaviour.
        """
        history, n = request.history, len(request.history)
        item_ids = list(map(_ITEM_ID, history))
        rows = np.fromiter(map(self.catalogue.rows.get, item_ids, repeat(-1)), np.int64, n)
        found = np.flatnonzero(rows >= 0)
        missing = [] if len(found) == n else [item_ids[i] for i in np.flatnonzero(rows < 0).tolist()]
        names = list(map(_EVENT, history))
        kinds = {name: kind for kind, name in enumerate(dict.fromkeys(names))}
        kind = np.fromiter(map(kinds.__getitem__, names), np.int64, n)[found]
        exposed = np.asarray([name == EXPOSURE for name in kinds], bool)
        events = np.where(exposed, self.features.exposure_id, self.features.event_ids(list(kinds)))
        times = list(map(_TIMESTAMP, history))
        if None in times:
            times = [NO_TIME if time_ is None else time_ for time_ in times]
        return KnownEvents(
            rows=rows[found],
            events=events[kind],
            times=np.asarray(times, np.int64)[found],
            purchased=np.asarray([name == PURCHASE for name in kinds], bool)[kind],
            interactions=np.flatnonzero(~exposed[kind]),
            missing=missing,
        )

    def _graph_inputs(
        self,
        requests: Sequence[RetrieveRequest],
        known: Sequence[KnownEvents],
        mask_rows: list[int],
        width: int,
    ) -> dict[str, NDArray[Any]]:
        """Inputs of the graph for a batch; of those made here, the ones this bundle's graph has."""
        manifest = self.bundle.manifest
        read = [events.interactions[-manifest.max_history :] for events in known]
        past = [events.before(first, manifest.max_past) for events, first in zip(known, read, strict=True)]
        tokens = [self.features.query_tokens(request.query) for request in requests]
        query = _stack(tokens)
        gaps = [self.features.gap_buckets(events.times[rows]) for events, rows in zip(known, read, strict=True)]
        made: dict[str, NDArray[Any]] = {
            **self._event_inputs("history", known, read),
            "history_gaps": _stack(gaps),
            **self._event_inputs("past", known, past),
            "query_tokens": query,
            "query_mask": query != 0,
            "profile": np.stack([self.features.profile_ids(request.profile) for request in requests]),
            "scenario": np.asarray([self.features.scenario_id(request.scenario) for request in requests], np.int64),
            "beams": np.arange(width, dtype=np.int64),
            "mask_row": np.asarray(mask_rows, np.int64),
            **self._index_inputs,
            **self.masks.arrays,
        }
        return {name: made[name] for name in manifest.graph_inputs}

    def _event_inputs(
        self, part: str, known: Sequence[KnownEvents], read: Sequence[NDArray[np.int64]]
    ) -> dict[str, NDArray[Any]]:
        """Codes, behaviours, mask and vectors of the events at the positions `read` of each request."""
        rows = [events.rows[positions] for events, positions in zip(known, read, strict=True)]
        stacked = _stack(rows)
        mask = np.arange(stacked.shape[1]) < np.asarray([len(r) for r in rows])[:, None]
        inputs: dict[str, NDArray[Any]] = {
            f"{part}_codes": self.catalogue.ids.codes[stacked].astype(np.int64),
            f"{part}_events": _stack([events.events[positions] for events, positions in zip(known, read, strict=True)]),
            f"{part}_mask": mask,
        }
        if self.dense:
            inputs[f"{part}_vectors"] = self.dense.read[stacked]
        return inputs

    def _items(
        self,
        request: RetrieveRequest,
        known: KnownEvents,
        found: Leaves,
        matching: NDArray[np.bool_],
    ) -> list[RetrievedItem]:
        """Items of the found leaves, best first: those that match the filters, without what is excluded.

        Of a leaf of several items the most popular ones are listed, as many as the bundle's `leaf_cap` allows. Where
        there is a dense head, it ranks them anew, and its own candidates join them.
        """
        allowed = self._allowed(request, known, matching)
        found_in = np.lexsort((found.leaves, -found.scores))
        found_in = found_in[found.scores[found_in] >= CLOSED_BELOW]
        in_order = ((row, beam) for beam in found_in.tolist() for row in self._leaf(int(found.leaves[beam]), allowed))
        if self.dense is None:
            return [self._item(row, found, beam) for row, beam in islice(in_order, request.top_k)]
        candidates = list(in_order)
        rows = np.asarray([row for row, _ in candidates], np.int64)
        beams = np.asarray([beam for _, beam in candidates], np.int64)
        if len(found_in) == len(found.scores):
            # The search was cut off: what it did not reach is at best as probable as the last that it did.
            beside = allowed.copy()
            beside[rows] = False
            further = self.dense.candidates[beside[self.dense.candidates]]
            rows = np.concatenate([rows, further])
            beams = np.concatenate([beams, np.full(len(further), found_in[-1])])
        assert found.user is not None
        # Without a copy of the vectors where most are compared.
        few = len(rows) < len(self.dense.ranked) // 4
        dense = self.dense.ranked[rows] @ found.user if few else (self.dense.ranked @ found.user)[rows]
        scores = found.scores[beams] + self.bundle.manifest.dense_weight * dense
        best = np.argsort(-scores, kind="stable")[: request.top_k]
        return [
            self._item(int(rows[i]), found, int(beams[i]), float(dense[i]), reached=i < len(candidates))
            for i in best.tolist()
        ]

    def _allowed(self, request: RetrieveRequest, known: KnownEvents, matching: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which items may be returned, bool ``[n_items]``: those that match the filters and are not excluded."""
        rows = self.catalogue.rows
        excluded = [rows[item] for item in request.exclude_item_ids if item in rows]
        if request.exclude_history != "off":
            gone = known.rows if request.exclude_history == "all" else known.rows[known.purchased]
            excluded += gone.tolist()
        if not excluded:
            return matching
        allowed = matching.copy()
        allowed[excluded] = False
        return allowed

    def _leaf(self, leaf: int, allowed: NDArray[np.bool_]) -> list[int]:
        """Items of a leaf that may be returned, in listing order, as many as the cap lets through."""
        rows = self.catalogue.index.items_of(leaf)
        listed: list[int] = rows[allowed[rows]].tolist()
        return listed[: self.bundle.manifest.leaf_cap]

    def _item(
        self, row: int, found: Leaves, beam: int, dense: float | None = None, *, reached: bool = True
    ) -> RetrievedItem:
        """An item as it is returned."""
        score = float(found.scores[beam])
        return RetrievedItem(
            item_id=self.catalogue.item_ids[row],
            score=score if dense is None else score + self.bundle.manifest.dense_weight * dense,
            semantic_id=self.catalogue.ids.codes[row].tolist(),
            level_scores=found.level_scores[beam].tolist() if reached else [],
            dense_score=dense,
        )

    def _response(
        self, request: RetrieveRequest, known: KnownEvents, items: list[RetrievedItem], timings: Timings
    ) -> RetrieveResponse:
        rows, manifest = self.catalogue.rows, self.bundle.manifest
        missing = known.missing + [item for item in request.exclude_item_ids if item not in rows]
        degraded = []
        if len(items) < request.top_k:
            degraded.append("fewer_than_top_k")
        if request.query and not self.features.query_tokens(request.query).size:
            degraded.append("query_ignored")
        if len(known.interactions) > manifest.max_history + manifest.max_past:
            degraded.append("history_truncated")
        digest = hashlib.blake2b(_canonical(request), digest_size=8).hexdigest()
        return RetrieveResponse(
            items=items,
            missing_ids=list(dict.fromkeys(missing)),
            degraded=degraded,
            bundle_version=manifest.version,
            attribution_token=f"{manifest.version}.0.{digest}",
            timings=timings,
        )
