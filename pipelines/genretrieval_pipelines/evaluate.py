"""Quality of a retriever beside its baselines, on the same cases in the same run.

A retriever is measured through requests, the way a shop asks it: offline through `Retriever.retrieve`, and with
``--endpoint`` through the client of a live server, which must return the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from genretrieval.figures import Figure
from genretrieval.histories import NO_TIME, Exposures, Histories, LeaveOneOut, Split, past_before
from genretrieval.item_texts import item_texts
from genretrieval.metrics import (
    NOTHING,
    SidGroups,
    catalogue_coverage,
    cohorts,
    exposure_gini,
    invalid_rate,
    mean_with_interval,
    popularity_buckets,
    recall,
    recall_and_ndcg,
    unfilled_rate,
)
from genretrieval.request import HistoryEvent, RetrieveRequest, RetrieveResponse
from genretrieval.schemas import EXPOSURE
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines.baselines.blend import blend, choose_weight
from genretrieval_pipelines.baselines.counts import (
    Markov,
    Popularity,
    PopularityPerQuery,
    Transitions,
    training_queries,
)
from genretrieval_pipelines.baselines.ranking import Baseline, Ranked, history_items, top_items
from genretrieval_pipelines.baselines.sasrec import Sasrec, SasrecConfig
from genretrieval_pipelines.baselines.search import BM25, DenseRetrieval
from genretrieval_pipelines.cases import Cases
from genretrieval_pipelines.embed import EmbeddingPart, text_embedder
from genretrieval_pipelines.quality_report import Protocol, QualityReport, Row
from genretrieval_pipelines.shop import Shop
from genretrieval_pipelines.synth import Oracle
from genretrieval_pipelines.synth.propensity import TRUTH_FILE

Answer = Callable[[list[RetrieveRequest]], list[RetrieveResponse]]

K = 10
BOOTSTRAP_SEED = 0
_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class Reads:
    """What a model reads of a history, so that requests carry that and no more.

    Attributes:
        history: interactions that are read in full.
        past: events before them.
        exposures: what users were shown, where the past has exposures.
    """

    history: int
    past: int = 0
    exposures: Exposures | None = None


def requests(shop: Shop, cases: Cases, reads: Reads, beam_width: int) -> Iterator[RetrieveRequest]:
    """Each case as the request that a shop would send; as many items are asked for as there are beams."""
    h = shop.histories
    item_ids = shop.items["item_id"].to_list()
    names = [*h.event_names, EXPOSURE]
    for i, query in enumerate(cases.queries):
        first, end, user = int(cases.starts[i]), int(cases.ends[i]), int(cases.user_rows[i])
        start = max(first, end - reads.history)
        past = past_before(h, reads.exposures, user, start, first, reads.past)
        items = np.append(past.items, h.items[start:end]).tolist()
        events = np.append(past.events, h.events[start:end]).tolist()
        times = np.append(past.times, h.times[start:end]).tolist()
        history = [
            HistoryEvent(item_id=item_ids[item], event=names[event], timestamp=None if time == NO_TIME else time)
            for item, event, time in zip(items, events, times, strict=True)
        ]
        # Without the user's id: a live server would add what it has stored of the user.
        yield RetrieveRequest(
            query=query,
            history=history,
            profile=shop.profile(user),
            scenario=cases.scenarios[i],
            top_k=beam_width,
            beam_width=beam_width,
        )


@dataclass(frozen=True)
class Answers:
    """What a retriever returned for cases.

    Attributes:
        items: int32 ``[n_cases, beam_width]``, item rows, `NOTHING` where it returned fewer.
        invalid: share of returned semantic IDs that name no item.
        scores: float32 ``[n_cases, beam_width]``, as returned.
        dense_scores: float32 ``[n_cases, beam_width]``, of the dense head; zeros for a model without one.
    """

    items: Ranked
    invalid: float
    scores: NDArray[np.float32]
    dense_scores: NDArray[np.float32]

    def reweighted(self, change: float) -> Ranked:
        """The items in the order they would have with a dense head whose weight is greater by `change`."""
        scores = np.where(self.items == NOTHING, -np.inf, self.scores + change * self.dense_scores)
        return np.take_along_axis(self.items, np.argsort(-scores, axis=1, kind="stable"), axis=1)


def ask(
    answer: Answer,
    shop: Shop,
    cases: Cases,
    ids: SemanticIds,
    reads: Reads,
    beam_width: int,
    console: Console,
) -> Answers:
    """Send every case, a few at a time."""
    rows = {item: row for row, item in enumerate(shop.items["item_id"])}
    found = np.full((len(cases), beam_width), NOTHING, np.int32)
    scores, dense = (np.zeros((len(cases), beam_width), np.float32) for _ in range(2))
    generated: list[list[int]] = []
    # Requests of like length travel together: less padding.
    order = np.argsort(cases.ends - cases.starts, kind="stable")
    pending = requests(shop, cases.take(order), reads, beam_width)
    starts = range(0, len(cases), _REQUESTS)
    for start in track(starts, "retrieving", console=console, transient=True, disable=not console.is_terminal):
        part = order[start : start + _REQUESTS]
        for case, response in zip(part, answer([next(pending) for _ in part]), strict=True):
            n = len(response.items)
            found[case, :n] = [rows[item.item_id] for item in response.items]
            scores[case, :n] = [item.score for item in response.items]
            dense[case, :n] = [item.dense_score or 0.0 for item in response.items]
            generated.extend(item.semantic_id for item in response.items[:K])
    codes = np.asarray(generated, np.int32).reshape(-1, ids.n_levels)
    return Answers(found, invalid_rate(codes, ids.codes) if len(codes) else 0.0, scores, dense)


def without_seen(ranked: Ranked, histories: Histories, cases: Cases) -> Ranked:
    """Remove the items of each case's own history and close the gaps."""
    case, item = history_items(histories, cases)
    seen = np.unique(case << 32 | item.astype(np.int64))
    keys = np.arange(len(ranked), dtype=np.int64)[:, None] << 32 | np.maximum(ranked, 0)
    dropped = np.isin(keys, seen) | (ranked == NOTHING)
    order = np.argsort(dropped, axis=1, kind="stable")
    return np.take_along_axis(np.where(dropped, NOTHING, ranked), order, axis=1).astype(np.int32)


def oracle_scores(shop: Shop, cases: Cases) -> Iterator[NDArray[np.float64]] | None:
    """Of each case what every item is truly worth, float64 ``[n_items]``, the best 1; None for a shop without truth."""
    if not (shop.data / TRUTH_FILE).exists():
        return None
    oracle, h = Oracle.load(shop.data), shop.histories
    return (
        oracle.scores(
            h.user_ids[int(cases.user_rows[i])],
            int(h.times[int(cases.ends[i])]),
            cases.queries[i],
            h.items[int(cases.starts[i]) : int(cases.ends[i])],
        )
        for i in range(len(cases))
    )


def utility(shop: Shop, cases: Cases, ranked: Ranked) -> float | None:
    """What the first ten items of a list are truly worth on average, where a made shop knows it.

    The best item of a case is worth 1, and a place that is not filled nothing.
    """
    scores = oracle_scores(shop, cases)
    if scores is None or not len(cases):
        return None
    lists = (row[row != NOTHING] for row in ranked[:, :K])
    return float(np.mean([of_case[items].sum() / K for of_case, items in zip(scores, lists, strict=True)]))


class Evaluation:
    """One quality table: our answers, their blend with Markov, and every baseline that the data allows.

    Args:
        shop: the data.
        ids: semantic IDs of its items.
        dedup_level: whether the last level only numbers colliding items; it is left out of SID-level figures.
        sasrec: settings of the SASRec baseline.
        text: embedding that dense retrieval searches with.
        cache: folder of trained baselines.
        console: where progress is drawn.
    """

    def __init__(
        self,
        shop: Shop,
        ids: SemanticIds,
        *,
        dedup_level: bool,
        sasrec: SasrecConfig,
        text: EmbeddingPart,
        cache: Path,
        console: Console,
    ) -> None:
        self.shop = shop
        self.ids = ids
        self.groups = SidGroups.from_codes(ids.codes[:, :-1] if dedup_level else ids.codes)
        self.sasrec = sasrec
        self.text = text
        self.cache = cache
        self.console = console
        split = LeaveOneOut(shop.histories)
        self.train_ends = split.train_ends()
        n_items = len(shop.items)
        self.popularity = Popularity.fit(shop.histories, self.train_ends, n_items)
        self.has_histories = bool((shop.histories.lengths() >= split.min_length).any())

    def report(self, ask_for: Callable[[Cases], Answers], split: Split, *, seed: int, beam_width: int) -> QualityReport:
        """Measure.

        Args:
            ask_for: gets our answers for cases; asked for validation too when the blend's weight is chosen.
            split: what to measure on.
            seed: seed of the generator, printed.
            beam_width: printed.
        """
        cases = self.shop.cases(split)
        answers = ask_for(cases)
        ours = self._filtered(answers.items, cases)
        rows = [self._row("quality", "generator", ours, cases)]
        if self.has_histories:
            rows.append(self._blended(ours, ask_for, cases, split))
        rows += [self._baseline(key, baseline, cases) for key, baseline in self._baselines(split)]
        searches = np.asarray([query is not None for query in cases.queries])
        if searches.any():
            asked = cases.take(np.flatnonzero(searches))
            only = "" if searches.all() else f", {len(asked):,} searches"
            rows += [self._baseline(key, b, asked, only) for key, b in self._search_baselines(asked)]
        oracle = self._oracle(cases)
        rows += [oracle] if oracle else []
        protocol = Protocol(
            dataset=self.shop.name,
            split=split,
            order_rule=self.shop.histories.order_rule,
            exclude_seen=self.shop.exclude_seen,
            n_cases=len(cases),
            n_items=len(self.shop.items),
            beam_width=beam_width,
            markov_transitions=self._transitions(split),
            seeds=[seed],
        )
        return QualityReport(
            protocol=protocol,
            rows=rows,
            extra=self._extra(answers, ours, cases, searches),
            by_popularity=self._by_popularity(ours, cases) if self.has_histories else {},
        )

    def _filtered(self, ranked: Ranked, cases: Cases) -> Ranked:
        return without_seen(ranked, self.shop.histories, cases) if self.shop.exclude_seen else ranked

    def _row(self, key: str, name: str, ranked: Ranked, cases: Cases) -> Row:
        metrics = recall_and_ndcg(ranked, cases.relevant, cases.relevant_offsets, seed=BOOTSTRAP_SEED)
        sids, relevant = self.groups.ranked(ranked[:, :K]), self.groups.relevant(cases.relevant)
        at_sid = recall(sids, relevant, cases.relevant_offsets, K)
        metrics["sid_recall10"] = mean_with_interval(at_sid, seed=BOOTSTRAP_SEED)
        return Row(key=key, name=name, metrics=metrics)

    def _baseline(self, key: str, baseline: Baseline, cases: Cases, only: str = "") -> Row:
        ranked = baseline.rank(self.shop.histories, cases, K, exclude_seen=self.shop.exclude_seen)
        return self._row(key, baseline.name + only, ranked, cases)

    @staticmethod
    def _transitions(split: Split) -> Transitions:
        return "training + validation" if split == "test" else "training"

    def _markov(self, split: Split) -> Markov:
        return Markov.fit(self.shop.histories, len(self.shop.items), transitions=self._transitions(split))

    def _baselines(self, split: Split) -> Iterator[tuple[str, Baseline]]:
        if not self.has_histories:
            return
        yield "baseline.popularity", self.popularity
        yield "baseline.markov", self._markov(split)
        yield (
            "baseline.sasrec",
            Sasrec.fit(
                self.shop.histories,
                len(self.shop.items),
                config=self.sasrec,
                cache=self.cache,
                console=self.console,
            ),
        )

    def _search_baselines(self, cases: Cases) -> Iterator[tuple[str, Baseline]]:
        texts = item_texts(self.shop.items)
        yield "baseline.bm25", BM25.fit(texts)
        queries = sorted({query for query in cases.queries if query is not None})
        embedder = text_embedder(self.text.name, self.text.dim, self.text.revision).fit(texts)
        yield "baseline.dense", DenseRetrieval(embedder.embed(texts), queries, embedder.embed(queries))
        seen, items = training_queries(self.shop.histories, self.train_ends)
        trained = self.shop.pairs.filter(pl.col("split") == "train")
        seen += trained["query"].to_list()
        items = np.concatenate([items, trained["item_row"].to_numpy().astype(np.int32)])
        yield "baseline.popularity_per_query", PopularityPerQuery.fit(seen, items, len(self.shop.items))

    def _blended(self, ours: Ranked, ask_for: Callable[[Cases], Answers], cases: Cases, split: Split) -> Row:
        """Our list and Markov's, fused by rank with the weight that is best on validation."""
        validation = self.shop.cases("validation")
        on_validation = ours if split == "validation" else self._filtered(ask_for(validation).items, validation)
        exclude, histories = self.shop.exclude_seen, self.shop.histories
        width = ours.shape[1]
        markov = self._markov("validation").rank(histories, validation, width, exclude_seen=exclude)
        weight = choose_weight(on_validation, markov, validation)
        here = self._markov(split).rank(histories, cases, width, exclude_seen=exclude)
        ranked = blend([ours, here], [1 - weight, weight], K)
        return self._row("quality.blend_markov", f"generator blended with Markov ({weight:g} of it)", ranked, cases)

    def _oracle(self, cases: Cases) -> Row | None:
        """A ranker that knows the truth behind a made shop."""
        scores = oracle_scores(self.shop, cases)
        if scores is None:
            return None
        ranked = np.full((len(cases), K), NOTHING, np.int32)
        for i, of_case in enumerate(scores):
            ranked[i] = top_items(of_case[None].astype(np.float32), K)[0]
        return self._row("oracle", "oracle (knows the truth)", ranked, cases)

    def _extra(self, answers: Answers, ours: Ranked, cases: Cases, searches: NDArray[np.bool_]) -> dict[str, Figure]:
        n_items = len(self.shop.items)
        extra = {
            "quality.collision_rate": Figure(self.groups.collision_rate(), "share of items"),
            "quality.invalid_rate": Figure(answers.invalid, "share of IDs"),
            "quality.unfilled_rate": Figure(unfilled_rate(ours, K), "share of places"),
            "quality.coverage10": Figure(catalogue_coverage(ours, n_items, K), "share of items"),
            "quality.exposure_gini10": Figure(exposure_gini(ours, n_items, K), "Gini"),
        }
        per_case = recall(ours, cases.relevant, cases.relevant_offsets, K)
        if searches.any() and not searches.all():
            for name, part in (("search", searches), ("recommendation", ~searches)):
                extra[f"quality.{name}.recall10"] = mean_with_interval(per_case[part], seed=BOOTSTRAP_SEED)
        if self.has_histories:
            for name, part in cohorts(cases.relevant, cases.relevant_offsets, self.popularity.counts).items():
                extra[f"quality.cohort.{name}.cases"] = Figure(float(part.sum()), "cases")
                if part.any():
                    figure = mean_with_interval(per_case[part], seed=BOOTSTRAP_SEED)
                    extra[f"quality.cohort.{name}.recall10"] = figure
            other = answers.items if self.shop.exclude_seen else without_seen(ours, self.shop.histories, cases)
            figure = mean_with_interval(recall(other, cases.relevant, cases.relevant_offsets, K), seed=BOOTSTRAP_SEED)
            kept = "kept" if self.shop.exclude_seen else "removed"
            extra[f"quality.seen_{kept}.recall10"] = figure
        return extra

    def _by_popularity(self, ours: Ranked, cases: Cases) -> dict[str, dict[str, Figure]]:
        per_case = recall(ours, cases.relevant, cases.relevant_offsets, K)
        buckets = popularity_buckets(cases.relevant, cases.relevant_offsets, self.popularity.counts)
        return {
            "generator": {
                name: mean_with_interval(per_case[part], seed=BOOTSTRAP_SEED)
                for name, part in buckets.items()
                if part.any()
            }
        }
