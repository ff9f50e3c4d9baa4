"""Words that did not exist when the model was trained, bound to items while it is served: are the items found?

Words (brands, product types) are struck from every text of a shop, and a model is trained on what is left; the items
stay. A server is started on it, the words are bound through its admin API to the items that had them, as many at a
time as there are reserved slots, and each word is asked for. Beside it stand models with closed codebooks on the same
texts, BM25, and the same dictionary as a filter over a model with RQ-KMeans codes.

The protocol is OneRetrieval's (arXiv 2606.13533, section on interventions): IHR@K is the share of words of which the
first K results hold an item.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import hypergeom

from genretrieval.bundle import GRAPH, MANIFEST, load_bundle
from genretrieval.edits import BoundKeyword, Edits
from genretrieval.errors import DataError
from genretrieval.figures import Figure
from genretrieval.item_texts import item_texts
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary, normalise
from genretrieval.metrics import mean_with_interval
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval_pipelines.baselines.search import BM25
from genretrieval_pipelines.cases import query_cases
from genretrieval_pipelines.draft import reads
from genretrieval_pipelines.embed.keywords import mine_keywords
from genretrieval_pipelines.evaluate import requests
from genretrieval_pipelines.importers import import_logs
from genretrieval_pipelines.recipe import Recipe, content_hash
from genretrieval_pipelines.run import OpenBackend, run
from genretrieval_pipelines.shop import Shop, open_shop

HELD_OUT_TYPES = (AttributeType.BRAND, AttributeType.ENTITY)
K = 10
SHARE = 0.001  # of the catalogue: the other K of the hit rates
# Closed codebooks: the recipe's own model and training on codes that no keyword can be bound to.
CLOSED: dict[str, dict[str, Any]] = {
    "rq_kmeans": {"method": "rq_kmeans", "codebook_sizes": [256, 256, 256]},
    "rq_opq": {"method": "rq_opq", "codebook_sizes": [256, 256, 256]},
}
_BATCH = 16

Rows = NDArray[np.int64]
Ask = Callable[[Sequence[RetrieveRequest]], list[RetrieveResponse]]


class LiveServer(Protocol):
    """A running server, and its admin API."""

    @property
    def n_slots(self) -> int:
        """Keywords that can be bound at a time."""
        ...

    def bind(self, words: Mapping[str, Sequence[str]]) -> None:
        """Bind each word to items, in place of those that were bound; answers from then on show it."""
        ...

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        """Ask."""
        ...


ServeLive = Callable[[Path], AbstractContextManager[LiveServer]]


@dataclass(frozen=True, slots=True)
class InterventionConfig:
    """Settings of the bench.

    Attributes:
        n_words: words held out, at most; those of the catalogue that fit are drawn at random.
        min_items: fewest items of a word.
        max_share: most items of a word, of the catalogue.
        n_untouched: requests without a bound word that are compared before and after.
        n_cases: most held-out purchases whose place among the bound items is measured.
        seed: of the draws.

    Raises:
        DataError: a setting is out of range.
    """

    n_words: int = 650
    min_items: int = 5
    max_share: float = 0.005
    n_untouched: int = 200
    n_cases: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if self.n_words < 1 or self.min_items < 1 or not 0 < self.max_share < 1:
            raise DataError("n_words and min_items must be at least 1, max_share between 0 and 1")


@dataclass(frozen=True)
class HeldOut:
    """Words and their items.

    Attributes:
        words: normalised.
        rows: int64, item rows that had each word.
    """

    words: list[str]
    rows: list[Rows]

    def batches(self, size: int) -> Iterator[HeldOut]:
        """The words, `size` at a time."""
        for start in range(0, len(self.words), size):
            yield HeldOut(self.words[start : start + size], self.rows[start : start + size])


def hold_out(items: pl.DataFrame, config: InterventionConfig) -> HeldOut:
    """Draw brands and product types that neither name a handful of items nor a tenth of the shop.

    Raises:
        DataError: no word fits.
    """
    mined = mine_keywords(items, min_items=config.min_items)
    dictionary = KeywordDictionary(tuple(k for k in mined.keywords if k.type in HELD_OUT_TYPES), "brands and types")
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(_joined_texts(items)):
        for word in {normalise(match.keyword.text) for match in dictionary.match(text)}:
            rows.setdefault(word, []).append(row)
    most = max(config.min_items, int(config.max_share * len(items)))
    fitting = sorted(word for word, found in rows.items() if config.min_items <= len(found) <= most)
    if not fitting:
        raise DataError(
            f"no brand or product type names {config.min_items} to {most} of the {len(items)} items; there is nothing "
            "to hold out"
        )
    drawn = np.random.default_rng(config.seed).permutation(len(fitting))[: config.n_words]
    words = [fitting[i] for i in sorted(drawn.tolist())]
    of_word = dict(zip(words, _rows_with(items, words), strict=True))
    # With the longer words that hold it, a word may name more than was counted.
    words = [word for word in words if len(of_word[word]) <= most]
    return HeldOut(words, [of_word[word] for word in words])


def _rows_with(items: pl.DataFrame, words: Sequence[str]) -> list[Rows]:
    """Items that say each word, also within a longer one: a visitor who asks for "jason" means "jason natural" too."""
    within = {word: [other for other in words if f" {other} " in f" {word} "] for word in words}
    dictionary = KeywordDictionary(tuple(Keyword(word, AttributeType.ENTITY) for word in words), "held out")
    rows: dict[str, set[int]] = {word: set() for word in words}
    for row, text in enumerate(_joined_texts(items)):
        for match in dictionary.match(text):
            for word in within[match.keyword.text]:
                rows[word].add(row)
    return [np.asarray(sorted(rows[word]), np.int64) for word in words]


def _joined_texts(items: pl.DataFrame) -> list[str]:
    columns = [name for name in ("title", "brand", "categories") if name in items.columns]
    parts = [
        pl.col(name).list.join(" . ") if isinstance(items.schema[name], pl.List) else pl.col(name) for name in columns
    ]
    return items.select(pl.concat_str(parts, separator=" . ", ignore_nulls=True).fill_null(""))[:, 0].to_list()


def strike(source: Path, target: Path, words: Sequence[str]) -> None:
    """Copy a log folder without `words`: they are gone from every text of the items and from every query."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    dictionary = KeywordDictionary(tuple(Keyword(word, AttributeType.ENTITY) for word in words), "held out")

    def struck(text: str | None) -> str | None:
        if text is None:
            return None
        left = normalise(text)
        # Again, because a longer match hides what overlaps it.
        while matches := dictionary.match(left):
            start, end = matches[0].start, matches[0].end
            left = normalise(f"{left[:start]} {left[end:]}")
        return left or None

    items = pl.read_parquet(source / "items.parquet")
    kept = {"item_id", "parent_id"}
    items = items.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    for name, dtype in items.schema.items():
        if dtype == pl.String and name not in kept:
            items = items.with_columns(pl.Series(name, map(struck, items[name]), pl.String))
        elif isinstance(dtype, pl.List) and dtype.inner in (pl.String, pl.Categorical, pl.Enum):
            lists = [None if v is None else [t for t in map(struck, v) if t] for v in items[name].to_list()]
            items = items.with_columns(pl.Series(name, lists, pl.List(pl.String)))
    if "title" in items.columns:
        items = items.with_columns(pl.col("title").fill_null("item"))
    items.write_parquet(target / "items.parquet")
    for table in ("interactions", "queries"):
        if (file := source / f"{table}.parquet").is_file():
            rows = pl.read_parquet(file)
            if "query" in rows.columns:
                renamed = {
                    query: struck(query) for query in rows["query"].cast(pl.String).unique() if query is not None
                }
                rows = rows.with_columns(pl.col("query").cast(pl.String).replace_strict(renamed, default=None))
            if table == "queries":
                rows = rows.with_columns(pl.col("query").fill_null("item"))
            rows.write_parquet(target / file.name)


def bench_intervention(
    recipe: Recipe,
    data: Path,
    work: Path,
    *,
    open_backend: OpenBackend,
    serve_live: ServeLive,
    console: Console,
    config: InterventionConfig | None = None,
) -> dict[str, Figure]:
    """Hold words out, train, bind, ask.

    Args:
        recipe: with the tokenizer `keyword_aligned`.
        data: a folder of house Parquet.
        work: everything that takes long is kept here and found again.
        open_backend: opens an exported graph.
        serve_live: starts a server on a bundle.
        console: progress and the table.
        config: settings.

    Raises:
        DataError: the recipe has no reserved slots, or no word can be held out.
    """
    config = config or InterventionConfig()
    if recipe.tokenizer.method != "keyword_aligned":
        raise DataError(f"the recipe's tokenizer is {recipe.tokenizer.method}; keyword_aligned has slots to bind to")
    work.mkdir(parents=True, exist_ok=True)
    import_logs("house", data, work / "logs")
    held_out = hold_out(pl.read_parquet(work / "logs" / "items.parquet"), config)
    strike(work / "logs", work / "struck", held_out.words)
    shop = open_shop(work / "struck", work / "struck.work")
    # Rows are those of the prepared logs, which may be in another order.
    held_out = _in_rows_of(shop, pl.read_parquet(work / "logs" / "items.parquet"), held_out)
    sizes = [len(rows) for rows in held_out.rows]
    console.print(
        f"{len(held_out.words)} words held out of {len(shop.items):,} items; items a word: median "
        f"{np.median(sizes):g}, {min(sizes)} to {max(sizes)}",
        highlight=False,
    )
    bundles = {}
    for name, variant in _variants(recipe).items():
        # Other words were struck from other texts: a model of those has met what is asked for here.
        folder = work / f"{name}-{content_hash(variant.dump(), held_out.words, shop.fingerprint)}"
        bundles[name] = _bundle(variant, work / "struck", folder, open_backend, console)
    top_k = max(_depths(shop).values())
    asked = [RetrieveRequest(query=word, top_k=top_k) for word in held_out.words]
    hits: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name in CLOSED:
        retriever = Retriever(load_bundle(bundles[name]), open_backend(bundles[name] / GRAPH))
        hits[f"{name}.closed"] = _hits(_ask(retriever.retrieve, asked), held_out, shop)
    hits["bm25.closed"] = _bm25(shop, held_out, top_k)
    hits["random.expected"] = _random(held_out, shop)
    control = Retriever(load_bundle(bundles["rq_kmeans"]), open_backend(bundles["rq_kmeans"] / GRAPH))
    filtered = control.retrieve(asked, [Edits(bound=(_as_filter(rows),)) for rows in held_out.rows])
    hits["control.bound"] = _hits(filtered, held_out, shop)

    cases = _purchases(shop, held_out, recipe, config)
    inside = {name: np.zeros(len(cases)) for name in ("kae.bound", "control.bound", "control.struck")}
    with serve_live(bundles["kae"]) as server:
        untouched = _untouched(shop, recipe, config)
        before = _ask(server.retrieve, untouched)
        hits["kae.unbound"] = _hits(_ask(server.retrieve, asked), held_out, shop)
        routed, bound = [], []
        equal = 0
        n_batches = 0
        for batch in held_out.batches(server.n_slots):
            item_ids = shop.items["item_id"].to_list()
            server.bind({w: [item_ids[row] for row in rows] for w, rows in zip(batch.words, batch.rows, strict=True)})
            of_batch = [RetrieveRequest(query=word, top_k=top_k) for word in batch.words]
            routed += _ask(server.retrieve, [r.model_copy(update={"bindings": "routed"}) for r in of_batch])
            bound += _ask(server.retrieve, of_batch)
            after = _ask(server.retrieve, untouched)
            equal += sum(_same(a, b) for a, b in zip(before, after, strict=True))
            n_batches += 1
            _rank_purchases(cases, inside, batch, server.retrieve, control, held_out)
        hits["kae.routed"] = _hits(routed, held_out, shop)
        hits["kae.bound"] = _hits(bound, held_out, shop)
    figures = _figures(hits, inside, len(cases), equal / max(1, n_batches * len(untouched)), held_out, config)
    _print(hits, inside, console)
    return figures


def _variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, and the same with closed codebooks."""
    stages = [
        {**stage.model_dump(exclude_none=True), "self_routing": 0.0}
        if stage.objective in ("alignment", "cooccurrence", "next_item")
        else stage.model_dump(exclude_none=True)
        for stage in recipe.stages
    ]
    closed = {
        name: Recipe.model_validate(
            {**recipe.model_dump(exclude={"ablation"}), "tokenizer": tokenizer, "stages": stages}
        )
        for name, tokenizer in CLOSED.items()
    }
    return {"kae": recipe, **closed}


def _bundle(recipe: Recipe, data: Path, output: Path, open_backend: OpenBackend, console: Console) -> Path:
    """The bundle of a variant, trained unless it is there."""
    if not (output / MANIFEST).is_file():
        console.print(f"training {output.name}", highlight=False)
        work = output.with_name(output.name + ".work")
        run(recipe, data, output, work, open_backend=open_backend, console=console, evaluate=False)
    return output


def _in_rows_of(shop: Shop, items: pl.DataFrame, held_out: HeldOut) -> HeldOut:
    """The same words with rows of the prepared shop, which may have another order."""
    place = {item: row for row, item in enumerate(shop.items["item_id"].to_list())}
    ids = items["item_id"].to_list()
    rows = [
        np.asarray(sorted(place[ids[row]] for row in found.tolist() if ids[row] in place), np.int64)
        for found in held_out.rows
    ]
    return HeldOut(held_out.words, rows)


def _ask(answer: Ask, asked: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
    found: list[RetrieveResponse] = []
    for start in range(0, len(asked), _BATCH):
        found += answer(asked[start : start + _BATCH])
    return found


def _depths(shop: Shop) -> dict[str, int]:
    """The two K of the hit rates, by their names."""
    return {"ihr10": K, "ihrK": math.ceil(SHARE * len(shop.items))}


def _hits(answers: Sequence[RetrieveResponse], held_out: HeldOut, shop: Shop) -> dict[str, NDArray[np.float64]]:
    """Of each word, whether an item of it is among the first K, for both K."""
    row_of = {item: row for row, item in enumerate(shop.items["item_id"].to_list())}
    return _hit_rates([[row_of[item.item_id] for item in answer.items] for answer in answers], held_out, shop)


def _hit_rates(ranked: Sequence[Sequence[int]], held_out: HeldOut, shop: Shop) -> dict[str, NDArray[np.float64]]:
    hits = [np.isin(rows, wanted) for rows, wanted in zip(ranked, held_out.rows, strict=True)]
    return {name: np.asarray([float(hit[:k].any()) for hit in hits]) for name, k in _depths(shop).items()}


def _bm25(shop: Shop, held_out: HeldOut, top_k: int) -> dict[str, NDArray[np.float64]]:
    """BM25 over the texts without the words."""
    pairs = pl.DataFrame({"query": held_out.words, "item_row": pl.Series([0] * len(held_out.words), dtype=pl.Int32)})
    scores = np.asarray(BM25.fit(item_texts(shop.items)).scores(shop.histories, query_cases(pairs)))
    ranked = [np.argsort(-row, kind="stable")[:top_k] for row in scores]
    found = [order[np.isfinite(row[order])].tolist() for row, order in zip(scores, ranked, strict=True)]
    return _hit_rates(found, held_out, shop)


def _random(held_out: HeldOut, shop: Shop) -> dict[str, NDArray[np.float64]]:
    """Chance that K items drawn at random hold one of the word's."""
    sizes = [len(rows) for rows in held_out.rows]
    return {name: hypergeom.sf(0, len(shop.items), sizes, k) for name, k in _depths(shop).items()}


def _as_filter(rows: Rows, struck: str = "") -> BoundKeyword:
    """The items of a word as a filter: a bundle without slots ranks them first by its own scores.

    The model reads the query with the word, as it would behind a filter, or without what is `struck`.
    """
    return BoundKeyword("control", struck, -1, -1, rows)


def _same(one: RetrieveResponse, other: RetrieveResponse) -> bool:
    """Whether items and scores are the same to the bit."""
    return [(i.item_id, i.score) for i in one.items] == [(i.item_id, i.score) for i in other.items]


def _untouched(shop: Shop, recipe: Recipe, config: InterventionConfig) -> list[RetrieveRequest]:
    """Requests of validation users, without a query."""
    cases = shop.cases("validation")
    drawn = np.random.default_rng(config.seed).permutation(len(cases))[: config.n_untouched]
    asked = requests(shop, cases.take(np.sort(drawn)), reads(recipe, shop), recipe.evaluation.beam_width)
    return [request.model_copy(update={"query": None}) for request in asked]


@dataclass(frozen=True)
class Purchase:
    """A held-out purchase of a bound item: who took it knows the word, and asks for it.

    Attributes:
        word: position among the held-out words.
        row: item row that was taken.
        item_id: the same.
        request: with the visitor's history and the word as query.
    """

    word: int
    row: int
    item_id: str
    request: RetrieveRequest


def _purchases(shop: Shop, held_out: HeldOut, recipe: Recipe, config: InterventionConfig) -> list[Purchase]:
    """Validation purchases of items that some word stands for; of several words, the one with most items."""
    word_of: dict[int, int] = {}
    for word in np.argsort([len(rows) for rows in held_out.rows], kind="stable").tolist():
        word_of |= dict.fromkeys(held_out.rows[word].tolist(), word)
    cases = shop.cases("validation")
    single = np.flatnonzero(np.diff(cases.relevant_offsets) == 1)
    taken = cases.relevant[cases.relevant_offsets[single]]
    fitting = single[[int(row) in word_of for row in taken]]
    drawn = np.sort(np.random.default_rng(config.seed).permutation(fitting)[: config.n_cases])
    chosen = cases.take(drawn)
    ids = shop.items["item_id"].to_list()
    found = []
    for row, request in zip(
        chosen.relevant.tolist(), requests(shop, chosen, reads(recipe, shop), recipe.evaluation.beam_width), strict=True
    ):
        word = word_of[row]
        asked = request.model_copy(update={"query": held_out.words[word], "top_k": K})
        found.append(Purchase(word, row, ids[row], asked))
    return found


def _rank_purchases(
    cases: Sequence[Purchase],
    inside: Mapping[str, NDArray[np.float64]],
    batch: HeldOut,
    live: Ask,
    control: Retriever,
    held_out: HeldOut,
) -> None:
    """NDCG@10 of each purchase whose word is bound now, among the items of the word."""
    bound = set(batch.words)
    now = [i for i, case in enumerate(cases) if held_out.words[case.word] in bound]
    for start in range(0, len(now), _BATCH):
        rows = now[start : start + _BATCH]
        asked = [cases[i].request for i in rows]
        words = [cases[i].word for i in rows]
        with_word = [Edits(bound=(_as_filter(held_out.rows[word]),)) for word in words]
        without = [Edits(bound=(_as_filter(held_out.rows[word], held_out.words[word]),)) for word in words]
        for name, answers in (
            ("kae.bound", live(asked)),
            ("control.bound", control.retrieve(asked, with_word)),
            ("control.struck", control.retrieve(asked, without)),
        ):
            for i, answer in zip(rows, answers, strict=True):
                place = [p for p, item in enumerate(answer.items[:K]) if item.item_id == cases[i].item_id]
                inside[name][i] = 1.0 / math.log2(place[0] + 2) if place else 0.0


def _figures(
    hits: Mapping[str, Mapping[str, NDArray[np.float64]]],
    inside: Mapping[str, NDArray[np.float64]],
    n_cases: int,
    equal: float,
    held_out: HeldOut,
    config: InterventionConfig,
) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for name, metrics in hits.items():
        for metric, values in metrics.items():
            found[f"intervention.{name}.{metric.lower()}"] = mean_with_interval(values, seed=config.seed)
    if n_cases:
        for name, values in inside.items():
            found[f"intervention.{name}.ndcg10_inside"] = mean_with_interval(values, seed=config.seed)
        for name in ("control.bound", "control.struck"):
            gain = inside["kae.bound"] - inside[name]
            found[f"intervention.ndcg10_inside.over_{name.replace('.', '_')}"] = mean_with_interval(
                gain, seed=config.seed
            )
    found["intervention.untouched.equal"] = Figure(equal, "share of requests")
    found["intervention.words"] = Figure(len(held_out.words), "words")
    found["intervention.items_a_word"] = Figure(float(np.median([len(rows) for rows in held_out.rows])), "items")
    found["intervention.purchases"] = Figure(n_cases, "cases")
    return found


def _print(
    hits: Mapping[str, Mapping[str, NDArray[np.float64]]],
    inside: Mapping[str, NDArray[np.float64]],
    console: Console,
) -> None:
    table = Table(title="held-out words found, share of words; 95 % bootstrap intervals over words")
    for column in ("", "IHR@10", "IHR@0.1 %", "NDCG@10 inside"):
        table.add_column(column, justify="left" if not column else "right")
    for name in dict.fromkeys([*hits, *inside]):
        cells = [_cell(hits[name][metric]) if name in hits else "" for metric in ("ihr10", "ihrK")]
        table.add_row(name, *cells, _cell(inside[name]) if name in inside and len(inside[name]) else "")
    console.print(table)


def _cell(values: NDArray[np.float64]) -> str:
    figure = mean_with_interval(values, seed=0)
    assert figure.spread is not None
    return f"{figure.value:.4f} [{figure.spread[0]:.4f}, {figure.spread[1]:.4f}]"
