"""The demo shop itself: its users, their visits, the pages they saw and what they took from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.errors import RecipeError
from genretrieval.logs import writing_logs
from genretrieval_pipelines.synth.products import Products, draw_products
from genretrieval_pipelines.synth.propensity import (
    COMPLEMENT,
    NOTHING,
    SAME_LEAF,
    Truth,
    log_propensity,
    query_match,
)
from genretrieval_pipelines.synth.queries import LUCK, QueryBook
from genretrieval_pipelines.synth.words import COMPLEMENTS

DAY = 86_400
START = 1_735_689_600  # 2025-01-01 00:00 UTC
PAGE = 10
# Users are simulated in blocks so that a block's matrices stay in the processor's cache. Part of the result:
# every block has a random stream of its own.
_BLOCK = 128

N_STYLES = 12
FAVOURITES = 6
FAVOURITE_BONUS = 2.5
# How much propensity decides the choice from a page; it has already decided what the page shows.
CHOICE_FOCUS = 0.4
# How likely a user looks at each place of a page, relative to the first.
_EXAMINATION = (1.0 / np.arange(1, PAGE + 1) ** 0.6).astype(np.float32)

AGE_BANDS = ("18-24", "25-34", "35-44", "45-54", "55+")
REGIONS = ("north", "south", "east", "west", "capital")
EVENTS = ("exposure", "click", "cart", "purchase")


@dataclass(frozen=True, slots=True)
class ShopConfig:
    """Size and seed of a demo shop. Its character (tastes, habits, how people search) is not a setting.

    Attributes:
        n_items: items (variants) in the catalogue.
        n_users: users; together with `mean_history` it sets the number of positive interactions.
        days: length of the log. New items arrive and tastes drift over all of it.
        seed: same seed, same files, byte for byte.
        median_history: median positive interactions of a user.
        mean_history: their mean; history lengths are log-normal.
        search_share: share of visits that begin with a query, the others see the home page.
    """

    n_items: int = 2000
    n_users: int = 1250
    days: int = 180
    seed: int = 7
    median_history: float = 40.0
    mean_history: float = 89.0
    search_share: float = 0.4

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for name, least in (("n_items", 50), ("n_users", 2), ("days", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}={getattr(self, name)} is too small for a shop; give at least {least}.")
        if not 1 <= self.median_history < self.mean_history:
            raise RecipeError(
                f"median_history={self.median_history}, mean_history={self.mean_history}: lengths are log-normal, "
                "so the mean must be above the median and the median at least 1."
            )
        if not 0 <= self.search_share <= 1:
            raise RecipeError(f"search_share={self.search_share} is not a share; give a number from 0 to 1.")


@dataclass(frozen=True, slots=True)
class ShopSummary:
    """What `synthesize` wrote.

    Attributes:
        n_items: rows of ``items.parquet``.
        n_users: rows of ``users.parquet``.
        n_exposures: exposure rows of ``interactions.parquet``.
        n_positives: its click, cart and purchase rows.
        n_queries: distinct queries typed.
        median_history: median positives of a user.
        mean_history: mean positives of a user.
        repeat_rate: share of positives whose item the user had taken before.
        popularity_gini: Gini coefficient of positives over all items.
    """

    n_items: int
    n_users: int
    n_exposures: int
    n_positives: int
    n_queries: int
    median_history: float
    mean_history: float
    repeat_rate: float
    popularity_gini: float


@dataclass(frozen=True, slots=True)
class _Users:
    """Latent tastes (see `Truth`) and the public profile."""

    leaf_taste: NDArray[np.float32]
    brand_taste: NDArray[np.float32]
    attribute_taste: NDArray[np.float32]
    price_taste: NDArray[np.float32]
    table: pl.DataFrame


@dataclass(frozen=True, slots=True)
class _Visits:
    """All requests, user after user in time order; user u owns ``[offsets[u], offsets[u + 1])``.

    `left` marks pages that are left untouched, `searched` those that begin with a query. Filled by the simulation:
    `queries`, query rows; `pages`, item rows ``[n, PAGE]``; `taken`, the place on the page the user chose, -1 for none.
    """

    offsets: NDArray[np.int64]
    times: NDArray[np.int64]
    left: NDArray[np.bool_]
    searched: NDArray[np.bool_]
    queries: NDArray[np.int64]
    pages: NDArray[np.int32]
    taken: NDArray[np.int64]


def synthesize(output: Path, config: ShopConfig | None = None) -> ShopSummary:
    """Write a whole demo shop into the folder `output`.

    Files: ``items.parquet``, ``interactions.parquet``, ``users.parquet`` in the house contract, and ``truth.npz``
    for the `Oracle`. A request logs one exposure row for every item shown (also for the one then taken) and at
    most one positive row, the deepest event reached (click, cart or purchase) with the place the item was shown at.

    Args:
        output: folder; made when missing, a shop made there before is replaced.
        config: size and seed; the demo's own when omitted.

    Raises:
        DataError: the folder holds something else, cannot be made, or the disk is full.
    """
    config = config or ShopConfig()
    with writing_logs(output, "synthetic"):
        # Items are the sign that a shop is there, so they come last and go first.
        items = output / "items.parquet"
        items.unlink(missing_ok=True)
        streams = np.random.SeedSequence(config.seed).spawn(5)
        products = shop_products(config)
        users = _draw_users(config, products, np.random.default_rng(streams[1]))
        book = QueryBook(products)
        truth = _truth(config, products, users, book)
        visits = _plan_visits(config, np.random.default_rng(streams[2]))
        _simulate(truth, book, visits, streams[3])
        log = _interactions(truth, products, visits, np.random.default_rng(streams[4]))

        users.table.write_parquet(output / "users.parquet")
        log.write_parquet(output / "interactions.parquet")
        truth.save(output)
        partial = output / f"{items.name}.partial"
        products.table.write_parquet(partial)
        partial.rename(items)
    return _summary(config, visits)


def shop_products(config: ShopConfig) -> Products:
    """The products of a shop, which are the same each time."""
    return draw_products(config.n_items, np.random.default_rng(np.random.SeedSequence(config.seed).spawn(5)[0]))


def _draw_users(config: ShopConfig, products: Products, rng: np.random.Generator) -> _Users:
    """Tastes: a blend of two of `N_STYLES` shared styles, a few favourite leaves of one's own, some noise.

    Shared styles are what makes a stranger's log informative; two of the favourites change over the log.
    """
    n, n_leaves = config.n_users, len(products.leaves)
    departments = sorted({leaf.department for leaf in products.leaves})
    department = np.array([departments.index(leaf.department) for leaf in products.leaves])

    def styles(width: int) -> NDArray[np.float64]:
        return rng.normal(0.0, 1.0, (N_STYLES, width))

    style_leaf = styles(n_leaves) + 1.2 * styles(len(departments))[:, department]
    style_brand, style_attribute = styles(len(products.brands)), styles(len(products.attribute_values))
    style_price, style_age = styles(1), styles(len(AGE_BANDS))

    first = rng.choice(N_STYLES, n, p=rng.dirichlet(np.full(N_STYLES, 6.0)))
    second = rng.integers(N_STYLES, size=n)

    def blend(style: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
        mixed = 0.8 * style[first] + 0.3 * style[second]
        return mixed + noise * rng.normal(size=mixed.shape)

    leaf = blend(style_leaf, 0.4)
    ranked = np.argsort(-(1.5 * leaf + rng.gumbel(size=leaf.shape)), axis=1)[:, : FAVOURITES + 2]
    start, end = leaf.copy(), leaf.copy()
    everyone = np.arange(n)[:, None]
    start[everyone, ranked[:, :FAVOURITES]] += FAVOURITE_BONUS
    end[everyone, ranked[:, -FAVOURITES:]] += FAVOURITE_BONUS
    attribute = blend(style_attribute, 0.4)
    attribute[:, 0] = 0.0
    price = blend(style_price, 0.4)[:, 0]

    age = np.argmax(2.0 * style_age[first] + rng.gumbel(size=(n, len(AGE_BANDS))), axis=1)
    wealth = np.outer(price, np.linspace(-1, 1, len(REGIONS)))
    region = np.argmax(wealth + rng.gumbel(size=wealth.shape), axis=1)
    table = pl.DataFrame(
        {
            "user_id": [f"u{row:06d}" for row in range(n)],
            "age_band": [AGE_BANDS[row] for row in age],
            "region": [REGIONS[row] for row in region],
        }
    )
    return _Users(
        leaf_taste=np.stack([start, end]).astype(np.float32),
        brand_taste=blend(style_brand, 0.4).astype(np.float32),
        attribute_taste=attribute.astype(np.float32),
        price_taste=price.astype(np.float32),
        table=table,
    )


def _truth(config: ShopConfig, products: Products, users: _Users, book: QueryBook) -> Truth:
    """Everything latent in one place; the logs are drawn from this alone."""
    nouns = {leaf.noun: row for row, leaf in enumerate(products.leaves)}
    transition = np.zeros((len(nouns), len(nouns)), np.float32)
    np.fill_diagonal(transition, SAME_LEAF)
    for noun, row in nouns.items():
        for other in COMPLEMENTS.get(noun, ()):
            if other in nouns:
                transition[row, nouns[other]] = COMPLEMENT
    span = config.days * DAY
    return Truth(
        start=START,
        end=START + span,
        leaf=products.leaf,
        brand=products.brand,
        attributes=products.attributes,
        price_position=products.price_position,
        popularity=products.popularity,
        launch=START + (products.launch_share * span).astype(np.int64),
        retire=START + (products.retire_share * span).astype(np.int64),
        consumable=np.array([leaf.consumable for leaf in products.leaves]),
        transition=transition,
        user_ids=users.table["user_id"].to_numpy().astype(np.str_),
        leaf_taste=users.leaf_taste,
        brand_taste=users.brand_taste,
        attribute_taste=users.attribute_taste,
        price_taste=users.price_taste,
        queries=np.array(book.texts, np.str_),
        query_head=book.head,
        head_leaves=book.head_leaves,
        query_brand=book.brand,
        query_attribute=book.attribute,
    )


def _plan_visits(config: ShopConfig, rng: np.random.Generator) -> _Visits:
    """When each user asks for a page, whether it starts with a query, and whether the page is left untouched."""
    n = config.n_users
    sigma = np.sqrt(2 * np.log(config.mean_history / config.median_history))
    normal = NormalDist(np.log(config.median_history), float(sigma))
    # Evenly spaced quantiles: the lengths have the wanted median and mean in a shop of any size.
    quantiles = np.array([normal.inv_cdf((row + 0.5) / n) for row in range(n)])
    positives = np.maximum(np.rint(np.exp(rng.permutation(quantiles))).astype(np.int64), 1)
    left_alone = rng.binomial(positives, 0.3)
    counts = positives + left_alone
    offsets = np.concatenate([[0], np.cumsum(counts)])
    total = int(offsets[-1])
    times = np.empty(total, np.int64)
    left = np.zeros(total, np.bool_)
    for user in range(n):
        start, end = offsets[user], offsets[user + 1]
        times[start:end] = _visit_times(int(counts[user]), config.days, rng)
        # The last page is never a left one, so that every user's log ends with a choice.
        left[start + rng.permutation(counts[user] - 1)[: left_alone[user]]] = True
    return _Visits(
        offsets=offsets,
        times=times,
        left=left,
        searched=rng.random(total) < config.search_share,
        queries=np.full(total, NOTHING, np.int64),
        pages=np.full((total, PAGE), NOTHING, np.int32),
        taken=np.full(total, NOTHING, np.int64),
    )


def _visit_times(n: int, days: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Strictly increasing unix seconds of n requests in sessions of about four, mostly in the evening."""
    begins = np.cumsum(rng.random(n) < 0.25)
    n_sessions = int(begins[-1]) + 1
    first_day = rng.uniform(0.0, 0.6) * days
    day = np.sort(rng.uniform(first_day, days, n_sessions)).astype(np.int64)
    hour = np.clip(rng.normal(17.5, 4.0, n_sessions), 0.0, 22.0)
    session_start = np.sort(day * DAY + (hour * 3600).astype(np.int64))
    step = rng.integers(30, 180, n)
    inside = np.cumsum(step) - step
    first = np.searchsorted(begins, np.arange(n_sessions))
    inside -= inside[np.minimum(first, n - 1)][begins]
    times = session_start[begins] + inside
    # Sessions that would overlap follow each other.
    order = np.arange(n) * 30
    packed: NDArray[np.int64] = START + np.maximum.accumulate(times - order) + order
    return packed


def _simulate(truth: Truth, book: QueryBook, visits: _Visits, stream: np.random.SeedSequence) -> None:
    """Fill in queries, pages and choices, for all users of a block at once, one request after another."""
    counts = np.diff(visits.offsets)
    by_length = np.argsort(-counts, kind="stable")
    blocks = [by_length[start : start + _BLOCK] for start in range(0, len(by_length), _BLOCK)]
    for users, block_stream in zip(blocks, stream.spawn(len(blocks)), strict=True):
        _simulate_block(truth, book, visits, users, np.random.default_rng(block_stream))


def _simulate_block(
    truth: Truth, book: QueryBook, visits: _Visits, block: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """Simulate the users in `block`, which are in order of falling number of requests."""
    counts = np.diff(visits.offsets)[block]
    affinity = truth.affinity(block)
    last_seen = np.zeros(affinity.shape, np.int32)  # 1 + position of the last interaction with the item, 0: none
    n_taken = np.zeros(len(block), np.int32)
    last_items = np.full(len(block), NOTHING, np.int64)
    for step in range(int(counts[0])):
        active = int(np.searchsorted(-counts, -step))
        users = block[:active]
        requests = visits.offsets[users] + step
        seen = last_seen[:active]
        ages = (n_taken[:active, None] + 1 - seen) * (seen > 0)
        scores = log_propensity(truth, affinity[:active], users, visits.times[requests], last_items[:active], ages)

        searching = np.flatnonzero(visits.searched[requests])
        if len(searching):
            intents = _draw(scores[searching], 1, rng)[:, 0]
            luck = rng.random((len(searching), LUCK))
            typed = [book.verbalize(int(item), chance) for item, chance in zip(intents, luck, strict=True)]
            visits.queries[requests[searching]] = typed
            scores[searching] += query_match(truth, np.array(typed))
        pages = _draw(scores, PAGE, rng)
        visits.pages[requests] = pages

        chooses = np.flatnonzero(~visits.left[requests])
        shown = np.take_along_axis(scores[chooses], pages[chooses], axis=1)
        places = choose(shown, rng)
        visits.taken[requests[chooses]] = places
        items = pages[chooses, places]
        n_taken[chooses] += 1
        last_seen[chooses, items] = n_taken[chooses]
        last_items[chooses] = items


def choose(shown: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """The place on each page that is taken, int64 ``[n]``.

    Args:
        shown: float32 ``[n, PAGE]``, log-propensity of what is shown; minus infinity where nothing is.
        rng: draws.
    """
    attraction = CHOICE_FOCUS * shown + np.log(_EXAMINATION)
    places: NDArray[np.int64] = np.argmax(attraction + rng.gumbel(size=attraction.shape), axis=1)
    return places


def _draw(scores: NDArray[np.float32], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sample n items a row without replacement, Plackett-Luce over ``exp(scores)``; int64 ``[rows, n]``, in order.

    Exponential races: the n smallest of ``E / weight`` with independent standard exponentials E. Weights are kept
    above zero, so that unavailable items come last and no race is infinite.
    """
    slowness = np.subtract(scores.max(axis=1, keepdims=True), scores)
    races = np.exp(np.minimum(slowness, np.float32(80.0), out=slowness), out=slowness)
    races *= rng.standard_exponential(scores.shape, dtype=np.float32)
    best = np.argpartition(races, n - 1, axis=1)[:, :n]
    order = np.argsort(np.take_along_axis(races, best, axis=1), axis=1, kind="stable")
    drawn: NDArray[np.int64] = np.take_along_axis(best, order, axis=1)
    return drawn


def _interactions(truth: Truth, products: Products, visits: _Visits, rng: np.random.Generator) -> pl.DataFrame:
    """``interactions.parquet``: every exposure, and the deepest event of every choice, in time order."""
    n = len(visits.times)
    users = np.repeat(np.arange(len(truth.user_ids)), np.diff(visits.offsets))
    request_number = np.empty(n, np.int64)
    request_number[np.lexsort((users, visits.times))] = np.arange(n)
    chosen = np.flatnonzero(visits.taken != NOTHING)
    places = visits.taken[chosen]
    items = visits.pages[chosen, places]
    depth = reached(truth, items, rng)
    dwell = rng.integers(3, 26, len(chosen))

    request = np.concatenate([np.repeat(np.arange(n), PAGE), chosen])
    item = np.concatenate([visits.pages.ravel(), items]).astype(np.int64)
    rank = np.concatenate([np.tile(np.arange(PAGE), n), places])
    event = np.concatenate([np.zeros(n * PAGE, np.int64), depth])
    time = visits.times[request] + np.concatenate([np.zeros(n * PAGE, np.int64), dwell])
    order = np.lexsort((rank, event > 0, request_number[request], time))
    request, item, rank, event = request[order], item[order], rank[order], event[order]

    table = products.table
    names = pl.Series("event", EVENTS)
    queries = pl.Series("query", truth.queries.tolist())
    price = table["price"].to_numpy()[item]
    return pl.DataFrame(
        {
            "user_id": pl.Series(truth.user_ids.tolist()).gather(users[request]),
            "item_id": table["item_id"].gather(item),
            "event": names.gather(event),
            "timestamp": time[order],
            "query": queries.gather(pl.Series(visits.queries[request]).replace(NOTHING, None)),
            "request_id": pl.Series([f"r{row:08d}" for row in range(n)]).gather(request_number[request]),
            "rank_shown": rank.astype(np.int32),
            "scenario": pl.Series(["home", "search"]).gather(visits.searched[request].astype(np.int64)),
            "value": pl.Series(price).set(pl.Series(event != EVENTS.index("purchase")), None),
        }
    )


def reached(truth: Truth, items: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.int64]:
    """The deepest event of each choice, int64 ``[n]``, positions in `EVENTS`.

    Args:
        truth: the shop.
        items: int ``[n]``, item rows that were taken.
        rng: draws.
    """
    eager = np.where(truth.consumable[truth.leaf[items]], 0.6, 0.4)
    return 1 + (rng.random(len(items)) < eager) * (1 + (rng.random(len(items)) < 0.55))


def _summary(config: ShopConfig, visits: _Visits) -> ShopSummary:
    """The figures that say whether the shop looks like a real one."""
    chosen = visits.taken != NOTHING
    users = np.repeat(np.arange(config.n_users), np.diff(visits.offsets))[chosen]
    items = visits.pages[chosen, visits.taken[chosen]].astype(np.int64)
    lengths = np.bincount(users, minlength=config.n_users)
    return ShopSummary(
        n_items=config.n_items,
        n_users=config.n_users,
        n_exposures=visits.pages.size,
        n_positives=len(items),
        n_queries=len(np.unique(visits.queries[visits.queries != NOTHING])),
        median_history=float(np.median(lengths)),
        mean_history=float(lengths.mean()),
        repeat_rate=1.0 - len(np.unique(users << 32 | items)) / len(items),
        popularity_gini=gini(np.bincount(items, minlength=config.n_items)),
    )


def gini(counts: NDArray[np.integer]) -> float:
    """Gini coefficient of non-negative counts: 0 when all are equal, towards 1 when one item has everything."""
    ordered = np.sort(counts).astype(np.float64)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))
