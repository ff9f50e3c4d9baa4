"""From a request to a response: everything around the graph, in NumPy, for evaluation and the server."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from genretrieval.candidates import Candidates, Rows, batches, collapsed, contains, in_order, with_blocks, with_pins
from genretrieval.catalogue import closed_inputs, graph_inputs, reserved_paths, runs
from genretrieval.collapse import CollapseValues
from genretrieval.edits import NO_EDITS, BoundKeyword, Edits, Pin
from genretrieval.histories import NO_TIME
from genretrieval.item_vectors import ItemVectors, Products, relatives_of
from genretrieval.keywords import without_words
from genretrieval.masks import Mask, MaskRows
from genretrieval.request import MAX_BEAM_WIDTH, HistoryEvent, RetrievedItem, RetrieveRequest, RetrieveResponse, Timings
from genretrieval.schemas import EXPOSURE
from genretrieval.servable import Catalogue, Servable

# A closed beam ends under this; a real one cannot (see genretrieval.model.search.CLOSED).
CLOSED_BELOW = -1e9
# Items that the dense head compares one by one; above, only those that the search found and those it cannot find.
COMPARED_ITEMS = 50_000
PURCHASE = "purchase"
# Beams of a search, times as many as of the last one, that may fill what collapsing left.
WIDER = 4
# Item rows, and sorted ones that are excluded besides: which of the former may be returned.
Lets = Callable[[Rows, Rows], NDArray[np.bool_]]
_ITEM_ID, _EVENT, _TIMESTAMP = attrgetter("item_id"), attrgetter("event"), attrgetter("timestamp")


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
        read: by which items are read in a history, memory-mapped.
        ranked: by which they are ranked; memory-mapped where not all are compared.
        candidates: int64, rows of the items that are compared beside what the search found. It hardly ever writes the
            IDs of items that training never saw (LIGER, arXiv 2411.18814), so those are always among them. In a
            catalogue of up to `COMPARED_ITEMS`, all items are.
    """

    read: ItemVectors
    ranked: ItemVectors
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
        candidates = np.flatnonzero((popularity == 0) | every)
        return cls(ItemVectors.open(vectors[:, 0]), ItemVectors.open(ranked), candidates)

    def on(self, catalogue: Catalogue) -> DenseItems:
        """With the items that came after the bundle, which training never saw and which are always compared.

        Each has the mean vectors of those that share most of its semantic ID.
        """
        n_bundle = len(self.read.of_bundle)
        later = np.arange(n_bundle, len(catalogue.item_ids))
        if not len(later) and not len(self.read.of_later):
            return self
        relatives = relatives_of(catalogue, n_bundle)
        of_bundle = self.candidates[self.candidates < n_bundle]
        candidates = np.concatenate([of_bundle, later])
        return DenseItems(self.read.with_later(relatives), self.ranked.with_later(relatives), candidates)


class _Search(NamedTuple):
    """One search of a batch.

    Attributes:
        found: what it found.
        says: what the dense head says of item rows, float32 of the same length; zeros without one.
    """

    found: Leaves
    says: Callable[[NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class _Asked:
    """A request with what operators changed for it.

    Attributes:
        request: as it came.
        edits: see `genretrieval.edits`.
        bound: keywords of the query whose binding the request wants.
        known: events of the history whose item the catalogue has.
        excluded: int64, sorted item rows that the request itself leaves out.
        missing: ids of the request that the catalogue does not have, as they came.
    """

    request: RetrieveRequest
    edits: Edits
    bound: tuple[BoundKeyword, ...]
    known: KnownEvents
    excluded: NDArray[np.int64]
    missing: list[str]

    @property
    def query(self) -> str | None:
        """What the model reads."""
        return self.edits.query if self.edits.query is not None else self.request.query

    @property
    def blocked(self) -> NDArray[np.int64] | None:
        """int64, item rows that are never returned; None for none."""
        return self.edits.blocked if len(self.edits.blocked) else None

    @property
    def rest(self) -> str:
        """The query without its bound keywords, by which their items are ordered."""
        return without_words(self.query or "", [keyword.text for keyword in self.bound])

    @property
    def slots(self) -> dict[int, int]:
        """Level to the reserved slot that stands in the query there, of two keywords the first one's."""
        return {keyword.level: keyword.slot for keyword in reversed(self.bound)}

    @property
    def edited(self) -> bool:
        """Whether anything stands for an item, or moves it."""
        return bool(self.bound or self.edits.boosts or self.edits.pins)

    def touched(self, row: int) -> list[str]:
        """Names of the bindings and rules that stand for an item, or move it."""
        sets = [(keyword.name, keyword.rows) for keyword in self.bound]
        sets += [(boost.name, boost.rows) for boost in self.edits.boosts]
        names = [name for name, rows in sets if contains(rows, np.asarray([row]))[0]]
        return names + [pin.name for pin in self.edits.pins if pin.row == row]

    @property
    def n_searches(self) -> int:
        """Among all items, and among what its keywords stand for."""
        return 2 if self.bound else 1


class _Answer(NamedTuple):
    """A response, and whether a wider search might fill it: it has fewer than `top_k` items, and was cut off."""

    response: RetrieveResponse
    cut_short: bool


class Retriever:
    """Answers requests from one bundle. Thread-safe when its backend is."""

    def __init__(self, bundle: Servable, backend: Backend) -> None:
        """Open the bundle's catalogue; `backend` runs its graph."""
        self.bundle = bundle
        self.backend = backend
        self.features = bundle.features()
        self.catalogue = Catalogue.open(bundle)
        self.masks = MaskRows(self.catalogue)
        self.collapse = CollapseValues(self.catalogue)
        self.dense = DenseItems.open(bundle, self.catalogue)
        self._index_inputs = graph_inputs(self.catalogue.index)
        paths = reserved_paths(bundle.manifest.codebook_sizes, bundle.manifest.reserved_slots)
        self._keyword_places = {(int(p.argmax()), int(p.max())): place for place, p in enumerate(paths)}

    def on(self, catalogue: Catalogue) -> Retriever:
        """The same model on another state of its catalogue, which is one of this bundle; this one stays as it is."""
        other = copy.copy(self)
        other.catalogue = catalogue
        other.masks = MaskRows(catalogue)
        other.collapse = CollapseValues(catalogue)
        if catalogue.index is not self.catalogue.index:
            other._index_inputs = graph_inputs(catalogue.index)
            other.dense = None if self.dense is None else self.dense.on(catalogue)
        return other

    def retrieve(
        self, requests: Sequence[RetrieveRequest], edits: Sequence[Edits] | None = None
    ) -> list[RetrieveResponse]:
        """Answer a batch; each answer is, but for rounding, the one the request would get alone.

        Args:
            requests: what is asked.
            edits: what operators changed for each of them; nothing by default.

        Raises:
            RequestError: a request cannot be answered as asked.
        """
        started = time.perf_counter()
        edits = edits or [NO_EDITS] * len(requests)
        asked = [self._asked(request, edit) for request, edit in zip(requests, edits, strict=True)]
        responses: dict[int, RetrieveResponse] = {}
        # The leaf of a keyword takes a beam, and is no item.
        widths = {
            i: max(self.beam_width(ask.request), ask.request.top_k + len(self._places(ask.bound)))
            for i, ask in enumerate(asked)
        }
        while widths:
            wider: dict[int, int] = {}
            for width in sorted(set(widths.values())):
                same = [i for i, w in widths.items() if w == width]
                for rows in batches(same, [asked[i].n_searches for i in same], self.masks.n_rows - 1):
                    answers = self._retrieve([asked[i] for i in rows], width, started)
                    for i, answer in zip(rows, answers, strict=True):
                        responses[i] = answer.response
                        if answer.cut_short and width < MAX_BEAM_WIDTH:
                            wider[i] = min(WIDER * width, MAX_BEAM_WIDTH)
            widths = wider
        return [responses[i] for i in range(len(requests))]

    def check(self, request: RetrieveRequest) -> None:
        """Find what is wrong with a request before it joins a batch, which one bad request would fail.

        Raises:
            RequestError: the request cannot be answered as asked.
        """
        if request.filters is not None:
            self.catalogue.conditions(request.filters)
        if request.collapse_by is not None:
            self.collapse.column(request.collapse_by)

    def history_read(self, request: RetrieveRequest) -> list[HistoryEvent]:
        """The events of a request's history that the model reads: of the compressed past, then those in full."""
        known, manifest = self._known(request), self.bundle.manifest
        read = known.interactions[-manifest.max_history :]
        past = known.before(read, manifest.max_past)
        rows = self.catalogue.item_ids.rows_of(list(map(_ITEM_ID, request.history)))
        events = [request.history[i] for i in (rows >= 0).nonzero()[0].tolist()]
        return [events[position] for position in (*past.tolist(), *read.tolist())]

    def beam_width(self, request: RetrieveRequest) -> int:
        """Beams that `request` is searched with."""
        return max(request.beam_width or self.bundle.manifest.beam_width, request.top_k)

    def _asked(self, request: RetrieveRequest, edits: Edits) -> _Asked:
        """A request as this catalogue knows it."""
        bound = () if request.bindings == "off" else tuple(k for k in edits.bound if len(k.rows))
        known, asked = self._known(request), request.exclude_item_ids
        named = self.catalogue.item_ids.rows_of(asked)
        missing: list[str] = []
        if named.min(initial=0) < 0:
            missing = [asked[i] for i in np.flatnonzero(named < 0).tolist()]
            named = named[named >= 0]
        if request.exclude_history != "off":
            past = known.rows if request.exclude_history == "all" else known.rows[known.purchased]
            named = np.concatenate([named, past])
        return _Asked(request, edits, bound, known, _unique(named), known.missing + missing)

    def _retrieve(self, asked: Sequence[_Asked], width: int, started: float) -> list[_Answer]:
        """Answer requests by one run of the graph: a search for each, and one more among what its keywords bind."""
        bound = [ask for ask in asked if ask.bound]
        masks = [Mask(ask.request.filters, tuple(self._places(ask.bound)), None, ask.blocked) for ask in asked]
        masks += [
            Mask(ask.request.filters, (), tuple(keyword.rows for keyword in ask.bound), ask.blocked) for ask in bound
        ]
        tokens = [self.features.query_tokens(ask.query, ask.slots) for ask in asked]
        tokens += [self.features.query_tokens(ask.rest) for ask in bound]
        with self.masks.hold(masks) as mask_rows:
            inputs = self._graph_inputs([*asked, *bound], tokens, mask_rows, width)
            begun = time.perf_counter()
            found = self.backend.run(inputs)
            inference_ms = (time.perf_counter() - begun) * 1e3
            searches = self._searches(found)
            seconds = iter(searches[len(asked) :])
            answers = []
            for i, (ask, row) in enumerate(zip(asked, mask_rows, strict=False)):
                own = [searches[i], *(next(seconds) for _ in ask.bound[:1])]
                items = self._items(ask, own, partial(self.masks.lets, row))
                timings = Timings(inference_ms=inference_ms, total_ms=(time.perf_counter() - started) * 1e3)
                cut_off = any(_real(search.found).all() for search in own)
                short = len(items) < ask.request.top_k
                answers.append(_Answer(self._response(ask, items, timings), short and cut_off))
        return answers

    def _places(self, keywords: Sequence[BoundKeyword]) -> list[int]:
        """Where the leaves of `keywords` stand among the index's keyword leaves; a bundle without slots has none."""
        found = (self._keyword_places.get((keyword.level, keyword.slot)) for keyword in keywords)
        return [place for place in found if place is not None]

    def _known(self, request: RetrieveRequest) -> KnownEvents:
        """The events of a request's history whose item the catalogue has.

        A history has up to 1,000 events, so no line of Python runs for each: columns are read by `map` and looked up
        at once, and what depends on the behaviour alone is found once for each behaviour.
        """
        history, n = request.history, len(request.history)
        item_ids = list(map(_ITEM_ID, history))
        rows = self.catalogue.item_ids.rows_of(item_ids)
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
        asked: Sequence[_Asked],
        tokens: Sequence[NDArray[np.int64]],
        mask_rows: list[int],
        width: int,
    ) -> dict[str, NDArray[Any]]:
        """Inputs of the graph for a batch of searches; of those made here, the ones this bundle's graph has."""
        manifest = self.bundle.manifest
        requests, known = [ask.request for ask in asked], [ask.known for ask in asked]
        closed = [self.masks.closed(row, ask.excluded) for row, ask in zip(mask_rows, asked, strict=True)]
        read = [events.interactions[-manifest.max_history :] for events in known]
        query = _stack(tokens)
        gaps = [self.features.gap_buckets(events.times[rows]) for events, rows in zip(known, read, strict=True)]
        made: dict[str, NDArray[Any]] = {
            **self._event_inputs("history", known, read),
            "history_gaps": _stack(gaps),
            "query_tokens": query,
            "query_mask": query != 0,
            "profile": np.stack([self.features.profile_ids(request.profile) for request in requests]),
            "scenario": np.asarray([self.features.scenario_id(request.scenario) for request in requests], np.int64),
            "beams": np.arange(width, dtype=np.int64),
            "mask_row": np.asarray(mask_rows, np.int64),
            **self._index_inputs,
            **self.masks.arrays,
            **closed_inputs(closed),
        }
        if manifest.max_past:
            past = [events.before(first, manifest.max_past) for events, first in zip(known, read, strict=True)]
            made.update(self._event_inputs("past", known, past))
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

    def _searches(self, found: Leaves) -> list[_Search]:
        each = map(found.of, range(len(found.leaves)))
        if self.dense is None:
            return [_Search(one, lambda rows: np.zeros(len(rows), np.float32)) for one in each]
        assert found.user is not None
        products = Products(self.dense.ranked, found.user)
        return [_Search(one, partial(products.of, row)) for row, one in enumerate(each)]

    def _items(self, ask: _Asked, searches: Sequence[_Search], lets: Lets) -> list[RetrievedItem]:
        """The best items, in the order that `genretrieval.edits` defines; a dense head has its say in every score.

        Args:
            ask: the request.
            searches: among all that the request may get, and for one with keywords among what those stand for.
            lets: which items its mask lets through.
        """
        first, *second = searches
        found = first.found
        candidates, dense = self._candidates(first, ask.excluded, lets)
        blocks = self._blocks(ask, found, candidates)
        if blocks and second:
            # What a keyword stands for is scored by the search among it alone, which reads the query without the word.
            def lets_inside(rows: Rows, excluded: Rows) -> NDArray[np.bool_]:
                allowed = lets(rows, excluded)
                allowed &= np.any([contains(block, rows) for _, block in blocks], axis=0)
                return allowed

            bound, bound_dense = self._candidates(second[0], ask.excluded, lets_inside)
            dense = np.concatenate([bound_dense, dense[~np.isin(candidates.rows, bound.rows)]])
            candidates = bound.joined(candidates)
        pins: list[Pin] = []
        if ask.edits.pins:
            pinned = np.asarray([pin.row for pin in ask.edits.pins], np.int64)
            pins = [pin for pin, ok in zip(ask.edits.pins, lets(pinned, ask.excluded), strict=True) if ok]
        if pins:
            unwritten = np.setdiff1d(np.asarray([pin.row for pin in pins], np.int64), candidates.rows)
            candidates = candidates.with_unwritten(unwritten, float(found.scores.min(where=_real(found), initial=0.0)))
            dense = np.concatenate([dense, first.says(unwritten)])
        scores = candidates.logp + self.bundle.manifest.dense_weight * dense
        for boost in ask.edits.boosts:
            scores = scores + np.where(contains(boost.rows, candidates.rows), boost.amount, 0.0)
        whole = blocks or pins or ask.request.collapse_by is not None
        order = in_order(scores, None if whole else ask.request.top_k)
        order = with_blocks(order, [(place, contains(rows, candidates.rows)) for place, rows in blocks])
        if ask.request.collapse_by is not None:
            values = self.collapse.of(ask.request.collapse_by, candidates.rows)
            order, pins = collapsed(
                order, candidates.rows, pins, values, cap=ask.request.collapse_cap, top_k=ask.request.top_k
            )
        best = with_pins(order, candidates.rows, pins, ask.request.top_k)
        return self._told(ask, candidates, np.asarray(best, np.int64), scores, dense)

    def _candidates(self, search: _Search, excluded: Rows, lets: Lets) -> tuple[Candidates, NDArray[np.float32]]:
        """Items of the found leaves, best leaf first, that may be returned, and what the dense head says of each.

        Of a leaf of several items the most popular ones are listed, as many as the bundle's `leaf_cap` allows. A dense
        head's own candidates join them.
        """
        found = search.found
        # Closed beams have the lowest scores.
        beams = np.lexsort((found.leaves, -found.scores))[: np.count_nonzero(_real(found))]
        under, of_beam = self.catalogue.index.items_under(found.leaves[beams])
        allowed = lets(under, excluded)
        rows, of_beam = under[allowed].astype(np.int64), of_beam[allowed]
        if (cap := self.bundle.manifest.leaf_cap) is not None:
            # Rows of a leaf stand side by side: each counts from the first of its leaf on.
            listed = np.arange(len(rows)) - np.searchsorted(of_beam, of_beam) < cap
            rows, of_beam = rows[listed], of_beam[listed]
        of_beam = beams[of_beam]
        candidates = Candidates(rows, found.scores[of_beam], of_beam, found.level_scores)
        if self.dense is not None and len(beams) == len(found.scores):
            # The search was cut off: what it did not reach is at best as probable as the last that it did.
            further = self.dense.candidates
            further = further[lets(further, np.union1d(excluded, rows))]
            candidates = candidates.with_unwritten(further, float(found.scores[beams[-1]]))
        return candidates, search.says(candidates.rows)

    def _blocks(self, ask: _Asked, found: Leaves, candidates: Candidates) -> list[tuple[int, NDArray[np.int64]]]:
        """Where the items of each bound keyword go: to the front, or to the place at which the search wrote its leaf.

        The leaf has no vector, so a dense head orders what stands within it and not where it stands.
        """
        if ask.request.bindings == "first":
            return [(0, keyword.rows) for keyword in ask.bound]
        logp = candidates.logp[candidates.beams >= 0]
        blocks = []
        for keyword in ask.bound:
            for place in self._places([keyword]):
                written = _real(found) & (found.leaves == self.catalogue.index.keyword_leaves[place])
                if written.any():
                    before = int((logp > found.scores[written].max()).sum())
                    blocks.append((before, keyword.rows))
        return blocks

    def _told(
        self,
        ask: _Asked,
        candidates: Candidates,
        best: NDArray[np.int64],
        scores: NDArray[np.float64],
        dense: NDArray[np.float32],
    ) -> list[RetrievedItem]:
        """Candidates as they are returned, those at the positions `best`; what NumPy holds is read at once."""
        rows, beams = candidates.rows[best], candidates.beams[best]
        codes = self.catalogue.ids.codes[rows].tolist()
        level_scores = candidates.level_scores[beams].tolist()
        codebook, edited = self.features.keywords, ask.edited
        return [
            RetrievedItem(
                item_id=self.catalogue.item_ids[row],
                score=score,
                semantic_id=of_row,
                level_scores=[] if beam < 0 else of_beam,
                dense_score=None if self.dense is None else said,
                keyword_path=[codebook.words(level, of_row[level]) for level in range(codebook.n_groups)]
                if codebook
                else [],
                touched_by=ask.touched(row) if edited else [],
            )
            for row, beam, score, said, of_row, of_beam in zip(
                rows.tolist(),
                beams.tolist(),
                scores[best].tolist(),
                dense[best].tolist(),
                codes,
                level_scores,
                strict=True,
            )
        ]

    def _response(self, ask: _Asked, items: list[RetrievedItem], timings: Timings) -> RetrieveResponse:
        request, manifest, known = ask.request, self.bundle.manifest, ask.known
        degraded = []
        if len(items) < request.top_k:
            degraded.append("fewer_than_top_k")
        if ask.query and not self.features.query_tokens(ask.query, ask.slots).size:
            degraded.append("query_ignored")
        if len(known.interactions) > manifest.max_history + manifest.max_past:
            degraded.append("history_truncated")
        return RetrieveResponse(
            items=items,
            missing_ids=list(dict.fromkeys(ask.missing)),
            degraded=degraded,
            revision=ask.edits.revision,
            applied=list(ask.edits.applied),
            bundle_version=manifest.version,
            catalogue_revision=self.catalogue.revision,
            timings=timings,
        )


def _unique(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted, each once; for few rows a fraction of the time of `np.unique`."""
    if not len(rows):
        return rows
    rows = np.sort(rows)
    return rows[runs(rows)[0]]


def _real(found: Leaves) -> NDArray[np.bool_]:
    """Which beams ended in a leaf."""
    return found.scores >= CLOSED_BELOW
