"""A small bundle, a graph that scores by arithmetic, and servers on free ports."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import polars as pl
import pytest
import structlog
import uvloop
from numpy.typing import NDArray

from genretrieval.bundle import CATALOGUE, GRAPH, KEYWORDS, Bundle, Manifest, load_bundle, write_bundle
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Leaves, Retriever
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.app import Server, Settings
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.observability import configure_logging
from genretrieval_serving.rollout import Followed

N_ITEMS = 24
POISON = "item-23"
GRAPH_INPUTS = ("history_codes", "history_mask", "beams", "mask_row", "allowed_2")

# Leaf k has score -k - 0.01 * (sum of the history's codes); what the mask closes has -2e9.
MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
retriever (int64[B, T, 3] history_codes, bool[B, T] history_mask, int64[K] beams, int64[B] mask_row,
           bool[R, N] allowed_2)
    => (int64[B, K] leaves, float[B, K] scores, float[B, K, 3] level_scores)
<float closed = {-2e9}, float small = {-0.01}, float three = {3.0}, int64[1] level = {2},
 int64[3] levels = {1, 1, 3}, int64[2] time_and_level = {1, 2}, int64[1] last = {1}>
{
    size = Shape <start: int = 1, end: int = 2> (allowed_2)
    safe = Mod (beams, size)
    inside = Less (beams, size)
    rows = Gather <axis: int = 0> (allowed_2, mask_row)
    picked = Gather <axis: int = 1> (rows, safe)
    open = And (picked, inside)
    sums = ReduceSum <keepdims: int = 0> (history_codes, time_and_level)
    one = Unsqueeze (sums, last)
    shift = Cast <to: int = 1> (one)
    shifted = Mul (shift, small)
    rank = Cast <to: int = 1> (beams)
    base = Sub (shifted, rank)
    scores = Where (open, base, closed)
    wide = Unsqueeze (scores, level)
    third = Div (wide, three)
    level_scores = Expand (third, levels)
    batch = Shape (scores)
    leaves = Expand (safe, batch)
}
"""


def catalogue_table() -> pl.DataFrame:
    """24 items, two to a leaf for the first eight; item 23 is the one that breaks the fake graph."""
    rows = np.arange(N_ITEMS)
    pairs = np.where(rows < 8, rows // 2, rows - 4)
    codes = np.stack([pairs % 3, pairs // 3, np.zeros(N_ITEMS, int)], axis=1)
    return pl.DataFrame(
        {
            "item_id": [f"item-{row}" for row in rows],
            "semantic_id": pl.Series(codes.tolist(), dtype=pl.List(pl.Int32)),
            "popularity": (rows * 7) % N_ITEMS,
            "brand": [("acme", "umbra", None)[row % 3] for row in rows],
            "categories": [["shoes", f"size {row % 2}"] for row in rows],
            "price": [float(row) for row in rows],
            "in_stock": [row % 4 != 0 for row in rows],
        }
    )


def save_bundle(
    path: Path,
    keywords: KeywordCodebook | None = None,
    *,
    uuid: str = "5f0c4f86-7f3e-4a3b-9a53-0d6f5b3c1d2e",
    prefix: str = "",
    model: str = MODEL,
) -> Path:
    """Write the bundle; with `keywords` its first level is theirs, and with a `prefix` all item ids begin with it."""
    manifest = Manifest(
        uuid=uuid,
        created=datetime(2026, 1, 2, tzinfo=UTC),
        genretrieval_version="0.1.0",
        n_items=N_ITEMS,
        codebook_sizes=(8, 8, 8),
        reserved_slots=(*keywords.reserved, 0, 0) if keywords else (),
        opset=18,
        minimum_onnxruntime="1.20",
        graph_inputs=GRAPH_INPUTS,
        events=("click", "purchase"),
        max_history=5,
        max_query_tokens=4,
        reads_queries=False,
        beam_width=12,
        exclude_seen=False,
    )
    with write_bundle(path, manifest) as folder:
        table = catalogue_table().with_columns(item_id=prefix + pl.col("item_id"))
        table.write_parquet(folder / CATALOGUE)
        onnx.save(onnx.parser.parse_model(model), folder / GRAPH)
        if keywords:
            keywords.save(folder / KEYWORDS)
    return path


def keyword_codebook(reserved: int) -> KeywordCodebook:
    """Two brands, and slots for bindings."""
    dictionary = KeywordDictionary(tuple(Keyword(brand, AttributeType.BRAND) for brand in ("acme", "umbra")))
    return KeywordCodebook(dictionary, ((AttributeType.BRAND,),), np.asarray([1, 2], np.int32), (8,), (reserved,))


@pytest.fixture(scope="session", name="save_bundle")
def _save_bundle() -> Callable[..., Path]:
    return save_bundle


@pytest.fixture(scope="session", name="keyword_codebook")
def _keyword_codebook() -> Callable[[int], KeywordCodebook]:
    return keyword_codebook


@pytest.fixture(scope="session")
def model() -> str:
    """The graph as text."""
    return MODEL


@pytest.fixture(scope="session")
def fake_backend() -> type[FakeBackend]:
    return FakeBackend


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundles") / "shop")


@pytest.fixture(scope="session")
def keyword_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shop with three slots for bindings."""
    return save_bundle(tmp_path_factory.mktemp("bundles") / "keyword-shop", keyword_codebook(3))


@pytest.fixture(scope="session")
def keyword_bundle(keyword_bundle_path: Path) -> Bundle:
    return load_bundle(keyword_bundle_path)


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return load_bundle(bundle_path)


@dataclass
class FakeBackend:
    """Scores every leaf by a hash of the history. Waits for `gate`, and fails on a history with `POISON`."""

    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        self.batches.append(len(inputs["mask_row"]))
        self.entered.release()
        assert self.gate.wait(20)
        codes, mask, beams = inputs["history_codes"], inputs["history_mask"], inputs["beams"]
        allowed = inputs["allowed_2"][inputs["mask_row"]]
        poison = catalogue_table()["semantic_id"][N_ITEMS - 1].to_numpy()
        if (mask & (codes == poison).all(-1)).any():
            raise ValueError("poisoned")
        leaves = np.zeros((len(codes), len(beams)), np.int64)
        scores = np.full((len(codes), len(beams)), -2e9, np.float32)
        for i, history in enumerate(codes):
            digest = hashlib.blake2b(history[mask[i]].tobytes(), digest_size=8).digest()
            rng = np.random.default_rng(int.from_bytes(digest, "big"))
            row = np.where(allowed[i], -rng.random(allowed.shape[1]), -2e9)
            order = np.argsort(-row, kind="stable")[: len(beams)]
            leaves[i, : len(order)], scores[i, : len(order)] = order, row[order]
        return Leaves(leaves, scores, np.repeat(scores[..., None] / 3, 3, axis=-1).astype(np.float32))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@dataclass
class Running:
    """A server in a thread."""

    server: Server
    retriever: Retriever
    backend: FakeBackend
    loop: asyncio.AbstractEventLoop

    @property
    def batcher(self) -> Batcher:
        return self.server._batcher

    def metric(self, name: str, **labels: str) -> float | None:
        return self.server.service.metrics.registry.get_sample_value(name, labels)

    @property
    def http(self) -> str:
        return self.server.http_url

    @property
    def admin(self) -> str:
        return self.server.admin_url

    @property
    def grpc(self) -> str:
        return self.server.grpc_url

    @property
    def grpc_address(self) -> str:
        return self.grpc.removeprefix("grpc://")

    def begin_to_stop(self) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)


Start = Callable[..., AbstractContextManager[Running]]


@contextmanager
def start_server(
    bundle: Bundle | Followed,
    backend: FakeBackend,
    *,
    load: bool = True,
    store: SqlStore | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve on free ports while the block runs; without `load` the model never becomes ready.

    What an alias says has backends of its own, see `Followed.folder`.
    """
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": None if store is None else 0}
    chosen = Settings(**ports | {"quiet": True, "drain_seconds": 5.0} | settings)
    retriever = None if isinstance(bundle, Followed) else Retriever(bundle, backend)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def create() -> Server:
        return Server(bundle if isinstance(bundle, Followed) else lambda: retriever, chosen, store)

    try:
        server = wait_for(create())
        wait_for(server.listen())
        try:
            if load:
                wait_for(server.load())
                backend.batches.clear()
                while backend.entered.acquire(blocking=False):
                    pass
            yield Running(server, retriever, backend, loop)
        finally:
            backend.gate.set()
            wait_for(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture
def start(bundle: Bundle, backend: FakeBackend) -> Start:
    """Start a server with settings of its own: ``with start(max_batch=1) as running``."""

    def starter(**settings: Any) -> AbstractContextManager[Running]:
        return start_server(bundle, backend, **settings)

    return starter


@pytest.fixture(scope="session")
def serving() -> Start:
    """Start a server of any bundle, for fixtures that outlive a test: ``with serving(bundle, store=store) as it``."""

    def starter(bundle: Bundle, **settings: Any) -> AbstractContextManager[Running]:
        return start_server(bundle, FakeBackend(), **settings)

    return starter


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[Running]:
    """A server with default limits for tests that leave it as it is."""
    with start_server(bundle, FakeBackend()) as server:
        yield server


@pytest.fixture(autouse=True)
def logging_by_default() -> None:
    """A command that ran before in this process may have chosen a level, and a stream that is closed by now."""
    structlog.reset_defaults()


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What is logged meanwhile, as a server prints it; whatever a command that ran before has set up."""
    root = logging.getLogger()
    handlers, level, stream = root.handlers[:], root.level, io.StringIO()
    configure_logging("info", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def example() -> RetrieveRequest:
    """A request that uses every field the service has."""
    return RetrieveRequest.model_validate(
        {
            "user_id": "u",
            "query": "red shoes",
            "history": [
                {"item_id": "item-1", "event": "purchase", "timestamp": 1_700_000_000},
                {"item_id": "gone", "event": "click"},
                {"item_id": "item-9"},
            ],
            "profile": {"country": "NL", "age": "30"},
            "scenario": "home",
            "filters": {
                "attributes": {"category": ["shoes"], "brand": ["umbra", "acme"]},
                "min_price": 1.5,
                "max_price": 20,
                "in_stock": True,
            },
            "exclude_item_ids": ["item-2", "unknown"],
            "exclude_history": "purchased",
            "top_k": 4,
            "beam_width": 20,
        }
    )
