"""What a catalogue costs as it grows; what filters, exclusions and a long history of a request cost beside none.

The model that is trained by default, with random weights, answers one request at a time on one thread with 50 beams;
its answers mean nothing, and take as long as others. Contenders take turns within one process, each with requests that
it has not just answered. Times are CPU time, which what else the machine does stretches least; a ratio is the median
over turns, with its 10th and 90th percentile.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import GRAPH
from genretrieval.catalogue import build_index, graph_inputs
from genretrieval.errors import GenRetrievalError
from genretrieval.figures import Figure
from genretrieval.masks import MASK_ROWS, Mask, MaskRows
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.retrieval import Backend, Retriever
from genretrieval.schemas import EXPOSURE
from genretrieval_pipelines.random_bundle import EVENTS, SHAPES, Shape, random_bundle

BEAMS = 50
LATENCY_SHAPE: Shape = "4x256"
N_EXCLUDED = 500
N_FILTERS = 8
N_SELECTED = 10
# Events of the histories that are compared: those that are read in full, and with as long a past as a request may have.
HISTORY_LENGTHS = (50, 1000)
_HISTORY = 20
_USERS = 16
_REBUILDS = 5
Times = NDArray[np.float64]


class WrongAnswerError(GenRetrievalError):
    """An answer held what it must not, or too little; the speed of a wrong answer is not reported."""


@dataclass(frozen=True)
class Contender:
    """Batches that are timed.

    Attributes:
        retriever: what answers.
        batches: a batch of requests for each turn, again and again from the first.
    """

    retriever: Retriever
    batches: Sequence[Sequence[RetrieveRequest]]


def bench_scale(
    sizes: Sequence[int], rounds: int, open_backend: Callable[[Path], Backend], console: Console
) -> dict[str, Figure]:
    """Measure.

    Args:
        sizes: items of the catalogues; rebuilds, filters, exclusions and histories are measured on the largest up to a
            million.
        rounds: turns of each contender.
        open_backend: opens a graph on one thread.
        console: progress.

    Returns:
        Figures by name.

    Raises:
        WrongAnswerError: an exclusion or a filter did not hold.
    """
    sizes = sorted(sizes)
    middle = max([size for size in sizes if size <= 1_000_000], default=sizes[0])
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        with console.status("exporting"):
            random_bundle(100, LATENCY_SHAPE, d_model=128).export(Path(folder) / GRAPH)
        backend = open_backend(Path(folder) / GRAPH)
    retrievers: dict[int, Retriever] = {}
    for size in sizes:
        with console.status(f"making {size:,} items"):
            before = _resident_bytes()
            retrievers[size] = Retriever(random_bundle(size, LATENCY_SHAPE, d_model=128), backend)
            gc.collect()
        figures |= _bytes(LATENCY_SHAPE, size, retrievers[size])
        grown = (_resident_bytes() - before) / size
        figures[f"scale.resident_bytes_per_item.{_named(LATENCY_SHAPE, size)}"] = Figure(grown, "bytes")
    for shape in SHAPES:
        if shape != LATENCY_SHAPE:
            figures |= _bytes(shape, middle, Retriever(random_bundle(middle, shape), backend))
    figures["scale.mask_rows"] = Figure(MASK_ROWS, "rows")
    figures[f"scale.rebuild_s.n{middle}"] = _rebuild(retrievers[middle])
    with console.status("asking"):
        figures |= _latency(retrievers, rounds)
        figures |= _exclusions(retrievers[middle], rounds)
        figures |= _filters(retrievers[middle], rounds)
        figures |= _histories(middle, rounds, open_backend)
    return figures


def _named(shape: Shape, size: int) -> str:
    return f"{shape}.n{size}"


def _bytes(shape: Shape, size: int, retriever: Retriever) -> dict[str, Figure]:
    """What the index and the mask of every item take, and what each further filter does."""
    index, row = retriever.catalogue.index, retriever.masks.row_bytes
    return {
        f"scale.index_bytes_per_item.{_named(shape, size)}": Figure((index.nbytes + row) / size, "bytes"),
        f"scale.filter_bytes_per_item.{_named(shape, size)}": Figure(row / size, "bytes"),
    }


def _rebuild(retriever: Retriever) -> Figure:
    """Seconds from semantic IDs to inputs of the graph and the mask of every item."""
    catalogue, seconds = retriever.catalogue, []
    order = -catalogue.table["popularity"].to_numpy()
    for _ in range(_REBUILDS):
        started = time.process_time()
        graph_inputs(build_index(catalogue.ids, order))
        MaskRows(catalogue)
        seconds.append(time.process_time() - started)
    return Figure(float(np.median(seconds)), "s", (min(seconds), max(seconds)))


def _latency(retrievers: dict[int, Retriever], rounds: int) -> dict[str, Figure]:
    """Of each size, and over the smallest one's."""
    times = take_turns(
        {str(size): Contender(retriever, _batches(retriever)) for size, retriever in retrievers.items()}, rounds
    )
    figures = {f"scale.latency_ms.n{size}": _spread(times[str(size)] * 1e3, "ms") for size in retrievers}
    smallest, *others = retrievers
    for size in others:
        ratios = times[str(size)] / times[str(smallest)]
        figures[f"scale.latency_ratio.n{size}_over_n{smallest}"] = _spread(ratios, "ratio")
    return figures


def _exclusions(retriever: Retriever, rounds: int) -> dict[str, Figure]:
    """500 ids that would have been found, or drawn; and a history of 500 purchases whose items are left out."""
    rng, n_items = np.random.default_rng(1), retriever.catalogue.index.n_items
    n_excluded = min(N_EXCLUDED, n_items // 4)
    plain = _batches(retriever)
    ids = [[item.item_id for item in _answer(retriever, batch[0], top_k=n_excluded)] for batch in plain]
    drawn = [[f"item-{row}" for row in rng.integers(0, n_items, n_excluded)] for _ in plain]
    bought = [{"history": [{"item_id": item, "event": "purchase"} for item in items]} for items in ids]
    contenders = {
        "none": plain,
        "found": _changed(plain, [{"exclude_item_ids": items} for items in ids]),
        "drawn": _changed(plain, [{"exclude_item_ids": items} for items in drawn]),
        "bought": _changed(plain, bought),
        "left_out": _changed(plain, [history | {"exclude_history": "all"} for history in bought]),
    }
    for batch, items in zip(contenders["found"], ids, strict=True):
        found = {item.item_id for item in _answer(retriever, batch[0])}
        if found & set(items) or len(found) != batch[0].top_k:
            raise WrongAnswerError(
                f"of {len(items)} excluded items {len(found & set(items))} were found, and {len(found)} items of "
                f"{batch[0].top_k}: this is a bug of the search"
            )
    times = take_turns({name: Contender(retriever, batches) for name, batches in contenders.items()}, rounds)
    return {
        f"scale.exclusions_ratio.{n_excluded}_found": _spread(times["found"] / times["none"], "ratio"),
        f"scale.exclusions_ratio.{n_excluded}_drawn": _spread(times["drawn"] / times["none"], "ratio"),
        f"scale.exclusions_ratio.{n_excluded}_of_history": _spread(times["left_out"] / times["bought"], "ratio"),
    }


def _filters(retriever: Retriever, rounds: int) -> dict[str, Figure]:
    """Eight requests with a filter each, over eight with the same one; and a filter that lets ten items through."""
    users = [batch[0] for batch in _batches(retriever)][:N_FILTERS]
    prices = np.sort(retriever.catalogue.table["price"].to_numpy())
    lows = [Filters(min_price=float(low)) for low in np.linspace(10, 80, N_FILTERS)]
    few = Filters(min_price=float(prices[-N_SELECTED]))
    made = []
    for low in lows:
        started = time.process_time()
        with retriever.masks.hold([Mask(low)]):
            made.append(time.process_time() - started)
    n_few = int((prices >= prices[-N_SELECTED]).sum())
    contenders = {
        "one": [[user.model_copy(update={"filters": lows[0]}) for user in users]],
        "eight": [[user.model_copy(update={"filters": low}) for user, low in zip(users, lows, strict=True)]],
        "none": [[user] for user in users],
        "few": [[user.model_copy(update={"filters": few})] for user in users],
    }
    if (found := len(_answer(retriever, contenders["few"][0][0]))) != min(n_few, users[0].top_k):
        raise WrongAnswerError(f"{n_few} items match a filter and {found} were found: this is a bug of the search")
    times = take_turns({name: Contender(retriever, batches) for name, batches in contenders.items()}, rounds)
    return {
        f"scale.new_filter_ms.n{retriever.catalogue.index.n_items}": _spread(np.asarray(made) * 1e3, "ms"),
        "scale.filters_ratio.eight_over_one": _spread(times["eight"] / times["one"], "ratio"),
        f"scale.filters_ratio.selects_{n_few}_over_none": _spread(times["few"] / times["none"], "ratio"),
    }


def _histories(size: int, rounds: int, open_backend: Callable[[Path], Backend]) -> dict[str, Figure]:
    """A history of a thousand events over one of fifty, of the same model with a Query-Former."""
    near, far = HISTORY_LENGTHS
    made = random_bundle(size, LATENCY_SHAPE, d_model=128, max_history=near, max_past=far - near)
    with tempfile.TemporaryDirectory() as folder:
        made.export(Path(folder) / GRAPH)
        retriever = Retriever(made, open_backend(Path(folder) / GRAPH))
    rng = np.random.default_rng(2)
    histories = []
    for _ in range(_USERS):
        # Exposures are no interactions and belong to the past.
        events = [*rng.choice([*EVENTS, EXPOSURE], far - near), *rng.choice(EVENTS, near)]
        rows = rng.integers(0, size, far)
        histories.append([{"item_id": f"item-{row}", "event": event} for row, event in zip(rows, events, strict=True)])
    plain = _batches(retriever)
    contenders = {n: _changed(plain, [{"history": history[-n:]} for history in histories]) for n in HISTORY_LENGTHS}
    times = take_turns({str(n): Contender(retriever, batches) for n, batches in contenders.items()}, rounds)
    return {
        **{f"scale.history_ms.{n}": _spread(times[str(n)] * 1e3, "ms") for n in HISTORY_LENGTHS},
        f"scale.history_cost.{far}_over_{near}": _spread(times[str(far)] / times[str(near)], "ratio"),
    }


def _batches(retriever: Retriever) -> list[list[RetrieveRequest]]:
    """One request each, of different users."""
    rng, n_items = np.random.default_rng(0), retriever.catalogue.index.n_items
    return [
        [
            RetrieveRequest.model_validate(
                {
                    "query": f"brand{user + 1}",
                    "history": [
                        {"item_id": f"item-{row}", "event": "click"} for row in rng.integers(0, n_items, _HISTORY)
                    ],
                    "beam_width": BEAMS,
                    "top_k": BEAMS,
                }
            )
        ]
        for user in range(_USERS)
    ]


def _changed(
    batches: Sequence[Sequence[RetrieveRequest]], changes: Sequence[dict[str, Any]]
) -> list[list[RetrieveRequest]]:
    """The same users with other fields."""
    return [
        [RetrieveRequest.model_validate(batch[0].model_dump() | change)]
        for batch, change in zip(batches, changes, strict=True)
    ]


def _answer(retriever: Retriever, request: RetrieveRequest, **changes: Any) -> list[Any]:
    (response,) = retriever.retrieve([request.model_copy(update=changes)])
    return response.items


def take_turns(
    contenders: dict[str, Contender], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, Times]:
    """Seconds of each contender's batches, one in each round.

    An untimed batch of the same kind goes before each timed one, because the contender before it took the caches. What
    is timed was read anew from JSON, as a server reads it: its strings are at hand, and what they stand for is not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    texts = {
        name: cycle([[request.model_dump_json() for request in batch] for batch in contender.batches])
        for name, contender in contenders.items()
    }

    def following(name: str) -> list[RetrieveRequest]:
        return [RetrieveRequest.model_validate_json(text) for text in next(texts[name])]

    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            contender.retriever.retrieve(following(name))
            batch = following(name)
            started = clock()
            contender.retriever.retrieve(batch)
            if round_:
                seconds[name].append(clock() - started)
    return {name: np.asarray(taken) for name, taken in seconds.items()}


def _spread(values: Times, unit: str) -> Figure:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return Figure(float(middle), unit, (float(low), float(high)))


def _resident_bytes() -> int:
    """Memory of this process as Linux counts it."""
    pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    return int(pages) * 4096
