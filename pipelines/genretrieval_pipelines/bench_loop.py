"""The loop closed: does a bundle become better by what came back from those whom the one before it served?

A made shop's log is cut in two. The first bundle is trained on the part before; a server shows it to the shop's
visitors at the times of the part after. They type and take by the shop's truth, as they do in its own log, and what
they saw and took goes back to the server. Its logs are imported beside the earlier ones and the recipe is trained
again. Both bundles then answer the same requests of every user, and the truth says what the items are worth.

A share of the users never meets the server. And the same recipe is trained on what the shop itself logged of the same
visits: its pages are drawn by the truth, which no server knows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import GRAPH, load_bundle
from genretrieval.errors import DataError
from genretrieval.figures import Figure
from genretrieval.metrics import NOTHING, mean_with_interval
from genretrieval.request import HistoryEvent, RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval.schemas import EXPOSURE
from genretrieval.served_logs import UserKeys
from genretrieval_pipelines.importers import SERVED_LOGS, import_logs
from genretrieval_pipelines.importers.served import ServedOptions
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.run import OpenBackend, run
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.synth.propensity import Truth
from genretrieval_pipelines.synth.shop import EVENTS, PAGE
from genretrieval_pipelines.synth.visitors import Visitors

_BATCH = 32
_HISTORY = 50
_DWELL = 10  # seconds from a page to what is taken from it
_UNIT = "of the best item's worth"
# Of this bench alone: what it logs is of nobody.
_SECRET = b"users of a made shop have no secrets"

Rows = NDArray[np.int64]


class VisitedServer(Protocol):
    """A running server that keeps histories, and logs what it answers and is told."""

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        """Ask."""
        ...

    def record(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Tell what was seen and taken."""
        ...


ServeLogged = Callable[[Path, Path, UserKeys], AbstractContextManager[VisitedServer]]
"""Serves a bundle, and logs into a folder with users by these keys; all is written when the block ends."""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Settings of the bench.

    Attributes:
        shop: size and seed of the made shop.
        cut: share of its time that is over when the first bundle is trained.
        held_out: share of the users who never meet the server.
        old_policy: train also on what the shop itself logged of the same visits.
        seeds: trainings of each bundle, which differ in their seed; the server has the first.
        seed: of the visitors.

    Raises:
        DataError: a share is out of range, or there is no training.
    """

    shop: ShopConfig = field(default_factory=ShopConfig)
    cut: float = 0.6
    held_out: float = 0.2
    old_policy: bool = True
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if not (0 < self.cut < 1 and 0 < self.held_out < 1):
            raise DataError("cut and held_out must lie between 0 and 1")
        if self.seeds < 1:
            raise DataError(f"seeds is {self.seeds}; train at least once")


def bench_loop(
    recipe: Recipe,
    folder: Path,
    *,
    open_backend: OpenBackend,
    serve_logged: ServeLogged,
    console: Console,
    config: LoopConfig,
) -> dict[str, Figure]:
    """Train, serve, import, train again, compare.

    Args:
        recipe: of all bundles.
        folder: shop, logs and bundles; trainings are found again on the next run.
        open_backend: opens an exported graph.
        serve_logged: serves the first bundle.
        console: progress.
        config: settings.

    Returns:
        Figures ``loop.*``, means of the trainings; their spread is the 95 % interval over requests, that of ``by_seed``
        the lowest and the highest training.
    """
    keys = UserKeys(_SECRET)
    shop = folder / "shop"
    if not (shop / "items.parquet").exists():
        synthesize(shop, config.shop)
    loop = _Loop(shop, config)

    def train(name: str, logs: Path) -> list[Retriever]:
        trained = []
        for seed in range(config.seeds):
            bundle = folder / f"{name}-{seed}"
            seeded = recipe.model_copy(update={"training": replace(recipe.training, seed=seed)})
            quiet = Console(quiet=True)
            run(seeded, logs, bundle, folder / f"{name}.work", open_backend=open_backend, console=quiet, evaluate=False)
            trained.append(Retriever(load_bundle(bundle), open_backend(bundle / GRAPH)))
        return trained

    _say(console, "training on what was logged before")
    first = train("first", loop.write_logs(folder / "earlier", loop.before))
    served = folder / "served"
    if served.exists():
        shutil.rmtree(served)
    _say(console, f"{len(loop.visits):,} visits to the server")
    with serve_logged(folder / "first-0", served, keys) as server:
        n_events = loop.serve(server)
    report = import_logs(SERVED_LOGS, served, folder / "merged", ServedOptions(earlier=folder / "earlier", keys=keys))
    for line in report.lines():
        _say(console, line)
    _say(console, "training on that, too")
    retrievers = {"first": first, "second": train("second", folder / "merged")}
    if config.old_policy:
        _say(console, "training on what the shop itself logged of the same visits")
        retrievers["old_policy"] = train("old_policy", loop.write_logs(folder / "old_policy_logs", loop.before_or_met))
    return loop.compare(retrievers) | {
        "loop.visits": Figure(float(len(loop.visits)), "visits"),
        "loop.events": Figure(float(n_events), "events"),
    }


def _say(console: Console, text: str) -> None:
    console.print(f"loop: {text}", style="dim", highlight=False, markup=False)


class _Loop:
    """One shop, its visitors, and which of them meet the server."""

    def __init__(self, shop: Path, config: LoopConfig) -> None:
        self.shop = shop
        self.truth = Truth.load(shop)
        self.cut = int(self.truth.start + config.cut * (self.truth.end - self.truth.start))
        self.item_ids = pl.read_parquet(shop / "items.parquet", columns=["item_id"])["item_id"].to_list()
        self.item_rows = {item: row for row, item in enumerate(self.item_ids)}
        self.user_ids = self.truth.user_ids.tolist()
        users = pl.read_parquet(shop / "users.parquet")
        self.profiles = [{n: v for n, v in row.items() if n != "user_id"} for row in users.to_dicts()]
        rng = np.random.default_rng(config.seed)
        self.meets = rng.random(len(self.user_ids)) >= config.held_out
        met = [user for user, meets in zip(self.user_ids, self.meets.tolist(), strict=True) if meets]
        self.before = pl.col("timestamp") < self.cut
        self.before_or_met = self.before | pl.col("user_id").is_in(met)
        log = pl.scan_parquet(shop / "interactions.parquet")
        # A visit is in one part, also where the choice came a moment later.
        began = pl.col("timestamp").min().over("request_id")
        log = log.with_columns(began.alias("timestamp"), taken_at="timestamp")
        self.log = log.collect()
        past = self._past()
        self.visitors = Visitors(self.truth, config.shop, [rows for rows, _ in past], config.seed)
        self.taken = [events for _, events in past]
        self.since: list[list[HistoryEvent]] = [[] for _ in past]
        self.visits = self._visits(met)

    def write_logs(self, folder: Path, part: pl.Expr) -> Path:
        """The shop's logs of a part of its requests."""
        folder.mkdir(exist_ok=True)
        for table in ("items", "users"):
            shutil.copyfile(self.shop / f"{table}.parquet", folder / f"{table}.parquet")
        rows = self.log.filter(part).drop("timestamp").rename({"taken_at": "timestamp"})
        rows.write_parquet(folder / "interactions.parquet")
        return folder

    def _past(self) -> list[tuple[Rows, list[HistoryEvent]]]:
        """Of every user what was taken before the cut: item rows, and the newest as requests carry it."""
        taken = self.log.filter(self.before, pl.col("event") != EXPOSURE).sort("taken_at")
        by_user = {key[0]: rows for key, rows in taken.partition_by("user_id", as_dict=True).items()}
        found = []
        for user in self.user_ids:
            rows = by_user.get(user, taken.head(0))
            items = np.asarray([self.item_rows[item] for item in rows["item_id"]], np.int64)
            newest = rows.tail(_HISTORY).select("item_id", "event", timestamp="taken_at").to_dicts()
            found.append((items, [HistoryEvent.model_validate(event) for event in newest]))
        return found

    def _visits(self, met: list[str]) -> pl.DataFrame:
        """Visits after the cut of those who meet the server: user row, time, whether they search, and leave."""
        user_row = pl.col("user_id").replace_strict(self.user_ids, np.arange(len(self.user_ids)), return_dtype=pl.Int64)
        return (
            self.log.filter(~self.before, pl.col("user_id").is_in(met))
            .group_by("request_id")
            .agg(
                user_row.first().alias("user"),
                pl.col("timestamp").first().alias("time"),
                (pl.col("scenario").first() == "search").alias("searches"),
                (pl.col("event") == EXPOSURE).all().alias("leaves"),
            )
            .sort("user", "time", "request_id")
        )

    def _waves(self) -> Iterator[pl.DataFrame]:
        """Visits in parts that can be asked together: of every user one at most, and in order."""
        numbered = self.visits.with_columns(number=pl.int_range(pl.len()).over("user")).sort("number", "user")
        for wave in numbered.partition_by("number", maintain_order=True):
            yield from wave.iter_slices(_BATCH)

    def _asked(
        self, users: Rows, times: Rows, searches: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], list[str | None]]:
        """What visitors want, and what they type."""
        wanted = self.visitors.want(users, times)
        queries: list[str | None] = [None] * len(users)
        typing = np.flatnonzero(searches)
        if len(typing):
            typed, wanted[typing] = self.visitors.type(wanted[typing])
            for row, query in zip(typing.tolist(), typed, strict=True):
                queries[row] = query
        return wanted, queries

    def _request(self, user: int, time: int, query: str | None, history: list[HistoryEvent]) -> RetrieveRequest:
        """As the shop asks: it shows nothing that it does not have."""
        gone = np.flatnonzero(~self.visitors.available(time)).tolist()
        return RetrieveRequest(
            user_id=self.user_ids[user],
            query=query,
            history=history,
            profile=self.profiles[user],
            scenario="home" if query is None else "search",
            exclude_item_ids=[self.item_ids[row] for row in gone],
            top_k=PAGE,
        )

    def serve(self, server: VisitedServer) -> int:
        """Let every visit happen; the number of events that were recorded."""
        n_events = 0
        for wave in self._waves():
            users, times = wave["user"].to_numpy(), wave["time"].to_numpy()
            wanted, queries = self._asked(users, times, wave["searches"].to_numpy())
            # What was taken since the cut the server knows itself.
            carried = zip(users.tolist(), times.tolist(), queries, strict=True)
            answers = server.retrieve([self._request(u, t, q, self.taken[u]) for u, t, q in carried])
            events = list(self._seen(users, times, answers))
            stays = np.flatnonzero(~wave["leaves"].to_numpy())
            pages = _pages(answers, self.item_rows)[stays]
            places, depths = self.visitors.take(users[stays], wanted[stays], pages)
            for row, place, depth in zip(stays.tolist(), places.tolist(), depths.tolist(), strict=True):
                if place != NOTHING:
                    item, time = answers[row].items[place].item_id, int(times[row]) + _DWELL
                    events.append(self._event(answers[row], users[row], time, item, EVENTS[depth]))
                    taken = HistoryEvent(item_id=item, event=EVENTS[depth], timestamp=time)
                    self.since[users[row]].append(taken)
            server.record(events)
            n_events += len(events)
        return n_events

    def _seen(self, users: Rows, times: Rows, answers: Sequence[RetrieveResponse]) -> Iterator[dict[str, Any]]:
        for user, time, answer in zip(users, times, answers, strict=True):
            for item in answer.items:
                yield self._event(answer, user, time, item.item_id, EXPOSURE)

    def _event(self, answer: RetrieveResponse, user: int, time: int, item_id: str, event: str) -> dict[str, Any]:
        return {
            "attribution_token": answer.attribution_token,
            "user_id": self.user_ids[user],
            "item_id": item_id,
            "event": event,
            "timestamp": int(time),
        }

    def compare(self, retrievers: Mapping[str, Sequence[Retriever]]) -> dict[str, Figure]:
        """What each shows every user at the end of the log, once without and once with a query."""
        users = np.repeat(np.arange(len(self.user_ids), dtype=np.int64), 2)
        times = np.full(len(users), self.truth.end - 1, np.int64)
        searches = np.arange(len(users)) % 2 == 1
        worth = {name: np.zeros((len(trained), len(users))) for name, trained in retrievers.items()}
        for start in range(0, len(users), _BATCH):
            part = slice(start, start + _BATCH)
            wanted, queries = self._asked(users[part], times[part], searches[part])
            best = np.exp((wanted - wanted.max(axis=1, keepdims=True)).astype(np.float64))
            requests = [
                self._request(u, t, q, self._history(u))
                for u, t, q in zip(users[part].tolist(), times[part].tolist(), queries, strict=True)
            ]
            for name, trained in retrievers.items():
                for seed, retriever in enumerate(trained):
                    pages = _pages(retriever.retrieve(requests), self.item_rows)
                    of_page = np.take_along_axis(best, np.maximum(pages, 0), axis=1) * (pages != NOTHING)
                    worth[name][seed, part] = of_page.mean(axis=1)
        return self._figures(worth, self.meets[users])

    def _history(self, user: int) -> list[HistoryEvent]:
        """The newest of what a user took before the cut and at the server."""
        return [*self.taken[user], *self.since[user]][-_HISTORY:]

    def _figures(self, worth: Mapping[str, NDArray[np.float64]], met: NDArray[np.bool_]) -> dict[str, Figure]:
        def mean(values: NDArray[np.float64]) -> Figure:
            found = mean_with_interval(values, seed=0)
            return Figure(found.value, _UNIT, found.spread)

        figures = {f"loop.utility.{name}": mean(values.mean(axis=0)) for name, values in worth.items()}
        for name, values in worth.items():
            if name == "first":
                continue
            gains = values - worth["first"]
            of_request, of_seed = gains.mean(axis=0), gains.mean(axis=1)
            figures[f"loop.gain.{name}"] = mean(of_request)
            figures[f"loop.gain.{name}.met"] = mean(of_request[met])
            figures[f"loop.gain.{name}.held_out"] = mean(of_request[~met])
            spread = (float(of_seed.min()), float(of_seed.max()))
            figures[f"loop.gain.{name}.by_seed"] = Figure(float(of_seed.mean()), _UNIT, spread)
        return figures


def _pages(answers: Sequence[RetrieveResponse], item_rows: Mapping[str, int]) -> Rows:
    """Item rows of each answer, int64 ``[n, PAGE]``, `NOTHING` where there are fewer."""
    pages = np.full((len(answers), PAGE), NOTHING, np.int64)
    for row, answer in enumerate(answers):
        pages[row, : len(answer.items)] = [item_rows[item.item_id] for item in answer.items]
    return pages
