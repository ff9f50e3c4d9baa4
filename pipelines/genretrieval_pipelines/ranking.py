"""The ranking model of a shop: its examples from the logs, its training, and what it is worth.

It says how likely a user clicks, puts into the cart and purchases an item that is shown, and how much the item belongs
to what is shown, and so how good whatever a generator writes is. `genretrieval.model.ranking` is the model.

An example is a request with everything that was shown, the deepest behaviour that came of each item, and some items
drawn from the catalogue beside them. Users fall into two halves by a hash of their id. A model is trained on one half,
so that there are two that share no user: one whose scores a generator may be trained for, and one to ask afterwards
whether that was learnt or merely exploited.

Tensor names carry the shapes of `genretrieval.model.ranking`; R are the requests of a shop, X all that was shown, Z
items drawn beside a request.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from genretrieval.errors import DataError, InvalidInputError, RecipeError
from genretrieval.features import RequestFeatures
from genretrieval.figures import Figure
from genretrieval.histories import NO_QUERY, NO_TIME, Histories, LeaveOneOut, Split
from genretrieval.item_texts import item_texts
from genretrieval.logs import PreparedLogs
from genretrieval.metrics import NOTHING
from genretrieval.model.ranking import NO_PLACE, Catalogue, RankingConfig, RankingModel, RankingRequests
from genretrieval.ranking_metrics import auc, expected_calibration_error, grouped_auc
from genretrieval.schemas import EXPOSURE
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.ranking import PADDING, RankingBatch, RankingTrainingConfig, train_ranking_model
from genretrieval_pipelines.queries import train_query_tokenizer
from genretrieval_pipelines.recipe import content_hash
from genretrieval_pipelines.shop import Shop
from genretrieval_pipelines.synth import Oracle
from genretrieval_pipelines.synth.propensity import TRUTH_FILE

Part = Literal["train", "holdout"]
ExampleSplit = Literal["train", "validation", "test"]
Rows = NDArray[np.int64]

BEHAVIOURS = (EXPOSURE, "click", "cart", "purchase")
"""The chain, each behaviour presupposing those before it."""

CACHE_FORMAT = 1  # raise when a change of this project changes what equal settings train
_N_DRAWN = 10  # as many as a page shows
_SPLITS: tuple[ExampleSplit, ...] = ("train", "validation", "test")
_TIME_BITS = 40
_REQUESTS_AT_ONCE = 512
_ORACLE_REQUESTS = 2000
_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class RankingRunConfig:
    """Settings of a ranking model of a shop.

    Attributes:
        model: sizes.
        training: schedule.
    """

    model: RankingConfig = field(default_factory=RankingConfig)
    training: RankingTrainingConfig = field(default_factory=RankingTrainingConfig)


@dataclass(frozen=True, slots=True)
class RankingExamples:
    """Requests in the order of their users, and what each showed; arrays of R entries where nothing else is said.

    The history of request r is ``[starts[r], ends[r])`` of the flat arrays of `Histories`: everything of its user that
    came before it. What it showed is ``[offsets[r], offsets[r + 1])`` of `items`, `places` and `depths`.

    Attributes:
        behaviours: the part of `BEHAVIOURS` that the log has; without exposure, what was shown is not known.
        users: int64, user rows.
        starts: int64.
        ends: int64.
        times: int64, unix seconds, `NO_TIME` where unknown.
        query_rows: int32, positions in `queries`, `NO_QUERY` where nothing was typed.
        queries: every distinct query typed.
        splits: int8, positions in train, validation, test.
        offsets: int64 ``[R + 1]``.
        items: int32 ``[X]``, item rows.
        places: int32 ``[X]``, places of the page from 0, `NO_PLACE` where unknown.
        depths: int8 ``[X]``, behaviours of the chain that came of it, at least 1.
        drawn: int32 ``[R, Z]``, item rows drawn from the catalogue, none of them shown; `NOTHING` where one was.
    """

    behaviours: tuple[str, ...]
    users: Rows
    starts: Rows
    ends: Rows
    times: Rows
    query_rows: NDArray[np.int32]
    queries: list[str]
    splits: NDArray[np.int8]
    offsets: Rows
    items: NDArray[np.int32]
    places: NDArray[np.int32]
    depths: NDArray[np.int8]
    drawn: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.users)

    def of_split(self, split: ExampleSplit) -> Rows:
        """Requests of `split`, int64."""
        return np.flatnonzero(self.splits == _SPLITS.index(split))

    def query_texts(self, requests: Rows) -> list[str | None]:
        """What was typed in each of `requests`."""
        return [None if row == NO_QUERY else self.queries[row] for row in self.query_rows[requests].tolist()]

    def grid(self, requests: Rows) -> tuple[Rows, NDArray[np.bool_]]:
        """Positions in `items` of what each of `requests` showed, int64 ``[B, K]``, and a mask of what is real."""
        lengths = np.diff(self.offsets)[requests]
        within_K = np.arange(lengths.max(initial=0))
        real_BK = within_K < lengths[:, None]
        return np.where(real_BK, self.offsets[requests, None] + within_K, 0), real_BK


def ranking_examples(shop: Shop, logs: PreparedLogs, *, n_drawn: int = _N_DRAWN, seed: int = 0) -> RankingExamples:
    """Examples of a shop: of the requests it logged, or made up where it logged none.

    Logged requests are the rows with a request_id of one user that hold at least one exposure. A row without a
    request_id cannot be joined with what came of it and is no example. An item's depth is that of its deepest event,
    an event outside of `BEHAVIOURS` counting as a click, the least that it shows.

    A request's history ends before the first interaction that is one of its own, that is not before it by time, or that
    follows it in the log's order, whichever comes first.

    It belongs to validation if the user's validation target (`LeaveOneOut`) is its own, or is the next interaction
    after it; to test if that holds of the test target, or if it came later still; else, and for users who are not
    evaluated, to training. So nothing that happened at a target or after it is trained on.

    Beside each request, `n_drawn` items are drawn evenly from the catalogue. What is shown must be told from them.

    A shop without exposures (public sets such as Amazon's) has an example of every interaction, shown alone, and the
    items beside it are drawn by their number of training interactions. The first behaviour must be told from them, so
    how likely it is depends on how many are drawn: calibrated probabilities mean nothing outside of such draws, and
    figures say so.

    Args:
        shop: of `open_shop`.
        logs: the prepared logs it was opened from: ``load_prepared(work / "logs")``.
        n_drawn: items drawn beside each request.
        seed: of these draws.

    Raises:
        DataError: the logs are of another shop, or there is nothing to train on.
    """
    if logs.report.inputs_sha256 != shop.fingerprint:
        raise DataError(f"{logs.folder} holds logs of another shop than {shop.name}, or older ones; open the shop anew")
    shown, rng = _shown(logs), np.random.default_rng(seed)
    if len(shown):
        examples = _logged_examples(shop.histories, shown)
        drawn = rng.integers(0, len(shop.items), (len(examples), n_drawn), np.int32)
    else:
        examples = _unlogged_examples(shop.histories)
        popular = shop.histories.items[LeaveOneOut(shop.histories).trained()]
        drawn = popular[rng.integers(0, max(len(popular), 1), (len(examples), n_drawn))]
    examples = replace(examples, drawn=_without_shown(drawn, examples))
    if not len(examples.of_split("train")) or not len(examples.of_split("validation")):
        raise DataError(
            f"{shop.name} has {len(examples.of_split('train')):,} requests to train a ranking model on and "
            f"{len(examples.of_split('validation')):,} to calibrate it on; it needs both, which takes users with three "
            "interactions or more"
        )
    return examples


def part_of_users(user_ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which users are of the part "holdout", bool ``[n_users]``: a bit of a hash of the id, equal everywhere."""
    digests = (hashlib.blake2b(user.encode(), digest_size=1).digest() for user in user_ids)
    return np.fromiter((digest[0] & 1 for digest in digests), np.bool_, len(user_ids))


def _chain(events: Sequence[str]) -> tuple[str, ...]:
    """The behaviours that a log with these events distinguishes."""
    reached = {_level(event) for event in events}
    return tuple(name for level, name in enumerate(BEHAVIOURS) if level in reached)


def _level(event: str) -> int:
    return BEHAVIOURS.index(event if event in BEHAVIOURS else "click")


def _depths(behaviours: tuple[str, ...], events: Sequence[str]) -> dict[str, int]:
    """How many of `behaviours` each event implies."""
    return {event: sum(_level(name) <= _level(event) for name in behaviours) for event in events}


def _shown(logs: PreparedLogs) -> pl.DataFrame:
    """Rows of requests that hold an exposure, in log order, with ``place_in_history``.

    That is how many interactions that are no exposure stand before a row: of such a row its own position in the flat
    arrays of `Histories`, of an exposure that of the next one.
    """
    positive = (pl.col("event") != EXPOSURE).cast(pl.Int64)
    rows = logs.interactions().with_columns(place_in_history=positive.cum_sum() - positive)
    joined = rows.filter(pl.col("request_id").is_not_null()).collect(engine="streaming")
    return joined.filter((pl.col("event") == EXPOSURE).any().over("user_row", "request_id"))


def _logged_examples(histories: Histories, shown: pl.DataFrame) -> RankingExamples:
    """Examples of the rows of `_shown`."""
    events = [EXPOSURE, *histories.event_names]
    behaviours = _chain(events)
    depths = _depths(behaviours, events)
    own = pl.when(pl.col("event") != EXPOSURE).then(pl.col("place_in_history"))
    request = ("user_row", "request_id")
    rows = shown.with_columns(
        depth=pl.col("event").replace_strict(depths, return_dtype=pl.Int8), own=own, order=pl.int_range(pl.len())
    )
    requests = (
        rows.group_by(request)
        .agg(
            pl.col("order").min(),
            pl.col("place_in_history").min().alias("end"),
            pl.col("own").max().fill_null(-1).alias("last_own"),
            pl.col("timestamp").min().fill_null(NO_TIME).alias("time"),
            pl.col("query").drop_nulls().first(),
        )
        .sort("order")
        .with_row_index("request")
    )
    items = (
        rows.join(requests.select(*request, "request"), on=request)
        .group_by("request", "item_row")
        .agg(pl.col("order").min(), pl.col("depth").max(), pl.col("rank_shown").min().fill_null(NO_PLACE))
        .sort("request", "order")
    )
    users, times = requests["user_row"].to_numpy().astype(np.int64), requests["time"].to_numpy()
    # Users without a history come last, and theirs is the empty one after all others.
    starts = histories.offsets[np.minimum(users, histories.n_users)]
    ends = np.minimum(requests["end"].to_numpy(), _first_not_before(histories, users, times))
    queries = requests["query"].drop_nulls().unique().sort().to_list()
    query_rows = requests["query"].cast(pl.Enum(queries)).to_physical().cast(pl.Int32).fill_null(NO_QUERY)
    return RankingExamples(
        behaviours=behaviours,
        users=users,
        starts=starts,
        ends=ends,
        times=times,
        query_rows=query_rows.to_numpy(),
        queries=queries,
        splits=_splits(histories, users, np.maximum(ends, requests["last_own"].to_numpy())),
        offsets=np.searchsorted(items["request"].to_numpy(), np.arange(len(requests) + 1)).astype(np.int64),
        items=items["item_row"].to_numpy(),
        places=items["rank_shown"].to_numpy(),
        depths=items["depth"].to_numpy(),
        drawn=np.empty((len(requests), 0), np.int32),
    )


def _first_not_before(histories: Histories, users: Rows, times: Rows) -> Rows:
    """Position of the first interaction of each user at or after a time; the end of the history where it is unknown."""
    key_of_user = np.repeat(np.arange(histories.n_users, dtype=np.int64), histories.lengths()) << _TIME_BITS
    # Users stand in order, so a running maximum over all of them is one within each.
    keys = np.maximum.accumulate(key_of_user | np.maximum(histories.times, 0))
    unknown = (np.int64(1) << _TIME_BITS) - 1
    wanted = np.where(times == NO_TIME, unknown, np.maximum(times, 0))
    found = np.searchsorted(keys, users << _TIME_BITS | wanted)
    return found.astype(np.int64)


def _splits(histories: Histories, users: Rows, last: Rows) -> NDArray[np.int8]:
    """Split of each request by the last position that it knows of: its next interaction, or a later one of its own."""
    evaluated, validation = LeaveOneOut(histories).targets("validation")
    target = np.full(max(histories.n_users, int(users.max(initial=-1)) + 1), len(histories.items) + 1)
    target[evaluated] = validation
    splits: NDArray[np.int8] = np.clip(last - target[users] + 1, 0, 2).astype(np.int8)
    return splits


def _unlogged_examples(histories: Histories) -> RankingExamples:
    """An example of every interaction that has one before it, as if it alone had been shown."""
    users = np.repeat(np.arange(histories.n_users, dtype=np.int64), histories.lengths())
    positions = np.flatnonzero(np.arange(len(users)) > histories.offsets[users])
    users = users[positions]
    behaviours = _chain(histories.event_names)
    depths = _depths(behaviours, histories.event_names)
    depth_of_event = np.array([depths[name] for name in histories.event_names], np.int8)
    return RankingExamples(
        behaviours=behaviours,
        users=users,
        starts=histories.offsets[users],
        ends=positions,
        times=histories.times[positions],
        query_rows=histories.query_rows[positions],
        queries=histories.queries,
        splits=_splits(histories, users, positions),
        offsets=np.arange(len(positions) + 1, dtype=np.int64),
        items=histories.items[positions],
        places=np.full(len(positions), NO_PLACE, np.int32),
        depths=depth_of_event[histories.events[positions]],
        drawn=np.empty((len(positions), 0), np.int32),
    )


def _without_shown(drawn_RZ: NDArray[np.int32], examples: RankingExamples) -> NDArray[np.int32]:
    """The draws, `NOTHING` in place of an item that its request showed."""
    request = np.repeat(np.arange(len(examples), dtype=np.int64), np.diff(examples.offsets))
    keys_RZ = np.arange(len(examples), dtype=np.int64)[:, None] << 32 | drawn_RZ
    return np.where(np.isin(keys_RZ, request << 32 | examples.items), NOTHING, drawn_RZ).astype(np.int32)


@dataclass(frozen=True)
class FittedRankingModel:
    """A trained and calibrated ranking model with all it needs to read a request.

    Attributes:
        model: in evaluation mode.
        features: turns events and queries into what the model reads.
        part: half of the users that it was trained on.
        log: of each epoch ``loss`` and ``validation_loss``.
    """

    model: RankingModel
    features: RequestFeatures
    part: Part
    log: list[dict[str, float]]

    @property
    def outcomes(self) -> tuple[str, ...]:
        """What the last axis of probabilities is about."""
        return self.model.outcomes

    def requests(
        self, histories: Histories, starts_B: Rows, ends_B: Rows, queries: Sequence[str | None]
    ) -> RankingRequests:
        """What the model reads of B requests.

        Args:
            histories: of the shop.
            starts_B: int64, where each request's history begins in the flat arrays.
            ends_B: int64, where it stops.
            queries: what was typed, or None, of each request.
        """
        device = self.model.codes.device
        at_BS = ends_B[:, None] - 1 - np.arange(self.model.config.max_history)
        mask_BS = at_BS >= starts_B[:, None]
        mask_BS = mask_BS[:, : int(mask_BS.sum(axis=1).max(initial=0))]
        at_BS = np.where(mask_BS, at_BS[:, : mask_BS.shape[1]], 0)
        event_ids = self.features.event_ids(histories.event_names)
        tokens = [self.features.query_tokens(query) for query in queries]
        query_BQ = np.zeros((len(queries), max(map(len, tokens), default=0)), np.int64)
        for row, own in zip(query_BQ, tokens, strict=True):
            row[: len(own)] = own
        arrays = (histories.items[at_BS].astype(np.int64), event_ids[histories.events[at_BS]], mask_BS, query_BQ)
        return RankingRequests(*(torch.from_numpy(array).to(device) for array in arrays))

    @torch.inference_mode()
    def score(
        self,
        histories: Histories,
        starts_B: Rows,
        ends_B: Rows,
        queries: Sequence[str | None],
        items_BK: NDArray[np.integer],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What each candidate is worth, were it shown on the first place.

        Args:
            histories: of the shop.
            starts_B: int64, where each request's history begins in the flat arrays.
            ends_B: int64, where it stops.
            queries: what was typed, or None, of each request.
            items_BK: int, item rows of K candidates for each.

        Returns:
            float32 ``[B, K]``, relevance (see `RankingScores`), and float32 ``[B, K, n_outcomes]``, calibrated
            probability of each of `outcomes`.
        """
        n_outcomes = len(self.outcomes)
        relevance_BK = np.empty(items_BK.shape, np.float32)
        probabilities_BKM = np.empty((*items_BK.shape, n_outcomes), np.float32)
        for start in range(0, len(items_BK), _REQUESTS_AT_ONCE):
            rows = slice(start, start + _REQUESTS_AT_ONCE)
            requests = self.requests(histories, starts_B[rows], ends_B[rows], queries[rows])
            items = torch.from_numpy(items_BK[rows].astype(np.int64)).to(self.model.codes.device)
            # A reward is judged in float32, also within the autocast of a policy's training step.
            with torch.autocast(items.device.type, enabled=False):
                scores = self.model.score(requests, items)
            relevance_BK[rows] = scores.relevance_BK.cpu().numpy()
            probabilities_BKM[rows] = scores.probabilities_BKM.cpu().numpy()
        return relevance_BK, probabilities_BKM

    def batch(self, histories: Histories, examples: RankingExamples, requests: Rows) -> RankingBatch:
        """Examples `requests` as tensors: what was shown, then what was drawn."""
        device = self.model.codes.device
        at_BK, real_BK = examples.grid(requests)
        drawn_BZ = examples.drawn[requests]
        arrays = (
            np.column_stack([examples.items[at_BK], np.maximum(drawn_BZ, 0)]),
            np.column_stack([examples.places[at_BK], np.full_like(drawn_BZ, NO_PLACE)]),
            np.column_stack(
                [np.where(real_BK, examples.depths[at_BK], PADDING), np.where(drawn_BZ == NOTHING, PADDING, 0)]
            ),
        )
        return RankingBatch(
            self.requests(
                histories, examples.starts[requests], examples.ends[requests], examples.query_texts(requests)
            ),
            *(torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays),
        )


def fit_ranking_model(
    shop: Shop,
    examples: RankingExamples,
    ids: SemanticIds,
    content_vectors: NDArray[np.float32] | None,
    config: RankingRunConfig | None = None,
    cache: Path | None = None,
    *,
    part: Part,
) -> FittedRankingModel:
    """Train and calibrate a ranking model on one half of the users, or read back the same one.

    Its validation requests choose the epoch and the calibration. Equal seed, data and thread count give equal weights.

    Args:
        shop: of `open_shop`.
        examples: of `ranking_examples`.
        ids: semantic IDs of the catalogue.
        content_vectors: float32 ``[n_items, dim]``, what else is known of items; None to do with their IDs.
        config: settings, or None for the defaults.
        cache: folder of finished models, named by the hash of data and settings.
        part: "train", or "holdout" for a model that shares no user with it (`part_of_users`).

    Raises:
        DataError: IDs or vectors are of another catalogue, or this half of the users has nothing to train on.
        RecipeError: the loss is no longer finite.
    """
    config = config or RankingRunConfig()
    _check_rows("semantic IDs", ids.n_items, shop)
    if content_vectors is not None:
        _check_rows("content vectors", len(content_vectors), shop)
    mine = part_of_users(shop.users["user_id"].to_list())[examples.users] == (part == "holdout")
    train, validation = (rows[mine[rows]] for rows in (examples.of_split("train"), examples.of_split("validation")))
    if not len(train) or not len(validation):
        raise DataError(
            f"the part {part!r} of the users of {shop.name} has {len(train):,} requests to train on and "
            f"{len(validation):,} to calibrate on; a shop this small cannot be halved"
        )

    def trained() -> FittedRankingModel:
        features = _features(shop, examples, train, config.model)
        fitted = FittedRankingModel(_new_model(examples, ids, content_vectors, features, config), features, part, [])
        fetch = partial(fitted.batch, shop.histories, examples)
        with torch.random.fork_rng(devices=[]):
            fitted.log.extend(train_ranking_model(fitted.model, fetch, train, validation, config.training))
        if not np.isfinite([list(epoch.values()) for epoch in fitted.log]).all():
            raise RecipeError(
                "stage ranking_model: the loss is no longer finite: the training has diverged; lower "
                f"training.learning_rate of the stage, which is {config.training.learning_rate:g}"
            )
        return fitted

    if cache is None:
        return trained()
    cache.mkdir(parents=True, exist_ok=True)
    stored = cache / f"ranking-{_key(shop, examples, ids, content_vectors, config, part)}"
    with FileLock(stored.with_suffix(".lock")):  # trainings side by side ask for the same one
        if not stored.with_suffix(".json").exists():  # written last: its presence means complete
            fitted = trained()
            _store(fitted, stored)
            return fitted
    record = json.loads(stored.with_suffix(".json").read_text("utf-8"))
    features = RequestFeatures(**{**record["features"], "events": tuple(record["features"]["events"])})
    model = _new_model(examples, ids, content_vectors, features, config)
    model.load_state_dict(load_file(stored.with_suffix(".safetensors")))
    return FittedRankingModel(model.eval(), features, part, record["log"])


def _check_rows(what: str, n: int, shop: Shop) -> None:
    if n != len(shop.items):
        raise DataError(f"{n:,} {what} are given for the {len(shop.items):,} items of {shop.name}; make them anew")


def _new_model(
    examples: RankingExamples,
    ids: SemanticIds,
    content_vectors: NDArray[np.float32] | None,
    features: RequestFeatures,
    config: RankingRunConfig,
) -> RankingModel:
    content = None if content_vectors is None else torch.tensor(content_vectors)
    with torch.random.fork_rng(devices=[]):  # drawing weights is no caller's business
        torch.manual_seed(config.training.seed)
        return RankingModel(
            Catalogue(torch.tensor(ids.codes, dtype=torch.int64), content),
            ids.codebook_sizes,
            examples.behaviours,
            int(examples.behaviours[0] == EXPOSURE),
            features.n_events,
            features.query_vocab_size,
            config.model,
        )


def _features(shop: Shop, examples: RankingExamples, train: Rows, config: RankingConfig) -> RequestFeatures:
    """The shop's behaviours, and a tokenizer of the words of its items and its training queries."""
    tokenizer = ""
    asked = np.unique(examples.query_rows[train])
    if config.query_vocab_size and (asked != NO_QUERY).any():
        corpus = [*item_texts(shop.items), *(examples.queries[row] for row in asked if row != NO_QUERY)]
        tokenizer = train_query_tokenizer(corpus, config.query_vocab_size).to_str()
    return RequestFeatures(
        events=shop.histories.event_names, query_tokenizer=tokenizer, max_query_tokens=config.max_query_tokens
    )


def _key(
    shop: Shop,
    examples: RankingExamples,
    ids: SemanticIds,
    content_vectors: NDArray[np.float32] | None,
    config: RankingRunConfig,
    part: Part,
) -> str:
    """Name of a model: everything its weights depend on but the versions of the libraries."""
    e, h = examples, shop.histories
    arrays = [e.users, e.starts, e.ends, e.query_rows, e.splits, e.offsets, e.items, e.places, e.depths, e.drawn]
    arrays += [h.items, h.events, ids.codes]
    if content_vectors is not None:
        arrays.append(content_vectors)
    plain = (CACHE_FORMAT, asdict(config), part, e.behaviours, e.queries, h.event_names, ids.codebook_sizes)
    return content_hash(*plain, shop.fingerprint, *(np.ascontiguousarray(array).data for array in arrays))


def _store(fitted: FittedRankingModel, stored: Path) -> None:
    """Write the weights, and then what makes them complete."""
    save_file(fitted.model.state_dict(), stored.with_suffix(".safetensors"))
    f = fitted.features
    features = {"events": f.events, "query_tokenizer": f.query_tokenizer, "max_query_tokens": f.max_query_tokens}
    partial_file = stored.with_suffix(".json.part")
    partial_file.write_text(json.dumps({"features": features, "log": fitted.log}, ensure_ascii=False), "utf-8")
    os.replace(partial_file, stored.with_suffix(".json"))


def evaluate_ranking_model(
    fitted: FittedRankingModel,
    shop: Shop,
    examples: RankingExamples,
    *,
    uncorrected: FittedRankingModel | None = None,
    split: Split = "validation",
) -> dict[str, Figure]:
    """Measure on the requests of `split` of the users that the model was neither trained nor calibrated on.

    Args:
        fitted: what is measured.
        shop: of `open_shop`.
        examples: of `ranking_examples`.
        uncorrected: the same trained with ``position_bias=False``; measured where the shop's truth is known.
        split: whose requests. Settings were chosen on validation.

    Returns:
        With percentile intervals of a bootstrap over users; what cannot be measured here is left out:

        ``ranking.<behaviour>.auc`` and ``.gauc``, a group being a request: of the probabilities on the first place,
        which never say where an item stood, over what was shown. ``.ece`` and ``.ece_uncalibrated``: of the
        probabilities where items were shown, since only there it is known what came of them.

        ``ranking.exposure.auc`` and ``.gauc``: of the relevance, over what was shown and what was drawn.

        ``ranking.popularity.<behaviour>.auc`` and ``.gauc``: the same of an item's number of training interactions, of
        the users that the model was trained on.

        Of a shop without exposures, outcomes are measured over interactions and drawn items.

        ``ranking.place_bias.slope``: how steeply the learned bias changes with ``ln(place + 1)``, places weighted by
        impressions.

        Of a demo shop, by its truth (`Oracle`): ``ranking.oracle.<outcome>.gauc``, what the truth itself reaches, and
        the share of pairs of a request's items that the probability of the first outcome orders as what the user wants
        does: ``ranking.oracle.shown`` of items that were shown, ``ranking.oracle.drawn`` of items drawn evenly from
        the catalogue. With ``_by_relevance`` and ``_by_popularity`` the same of these scores, with ``_uncorrected`` of
        that model, and with ``_correction`` the paired difference to it.

        ``ranking.requests`` and ``ranking.impressions`` are what was measured on.

    Raises:
        DataError: no user of the other part has a request in the split.
    """
    mine = part_of_users(shop.users["user_id"].to_list()) == (fitted.part == "holdout")
    requests = examples.of_split(split)
    requests = requests[~mine[examples.users[requests]]]
    if not len(requests):
        raise DataError(f"{shop.name} has no {split} request of users that this ranking model was not trained on")
    h = shop.histories
    trained = LeaveOneOut(h).trained() & np.repeat(mine[: h.n_users], h.lengths())
    popularity = np.bincount(h.items[trained], minlength=len(shop.items))
    seen = _Scored.of(fitted, shop.histories, examples, requests)
    figures = {
        "ranking.requests": Figure(len(requests), "requests"),
        "ranking.impressions": Figure(int(np.diff(examples.offsets)[requests].sum()), "impressions"),
        **_outcome_figures(seen, fitted.model, popularity),
        **_place_bias(fitted.model, examples),
    }
    if (shop.data / TRUTH_FILE).is_file() and fitted.model.n_given:
        figures |= _oracle_figures(fitted, uncorrected, shop, examples, requests, popularity)
    return figures


@dataclass(frozen=True, slots=True)
class _Scored:
    """What some requests showed and what was drawn beside it, one entry each, and what a model says of it.

    Attributes:
        users: int64.
        requests: int64.
        items: int64.
        depths: int64, as in a batch.
        relevance: float64.
        first: float64 ``[n, n_outcomes]``, probabilities on the first place.
        there: float64 ``[n, n_outcomes]``, probabilities where it was shown.
        raw: float64 ``[n, n_outcomes]``, the same without calibration.
    """

    users: Rows
    requests: Rows
    items: Rows
    depths: Rows
    relevance: NDArray[np.float64]
    first: NDArray[np.float64]
    there: NDArray[np.float64]
    raw: NDArray[np.float64]

    @classmethod
    @torch.inference_mode()
    def of(cls, fitted: FittedRankingModel, histories: Histories, examples: RankingExamples, requests: Rows) -> _Scored:
        """Score what `requests` showed."""
        model, parts = fitted.model, []
        for start in range(0, len(requests), _REQUESTS_AT_ONCE):
            rows_B = requests[start : start + _REQUESTS_AT_ONCE]
            batch = fitted.batch(histories, examples, rows_B)
            logits_BKM = model(batch.requests, batch.items_BK).double()
            there_BKM = model.at_places(logits_BKM, batch.places_BK)
            columns = (
                torch.from_numpy(rows_B)[:, None].expand(batch.items_BK.shape),
                batch.items_BK,
                batch.depth_BK,
                logits_BKM[..., 0],
                model.log_probabilities(logits_BKM).exp(),
                model.log_probabilities(there_BKM).exp(),
                torch.nn.functional.logsigmoid(there_BKM[..., model.n_given :]).cumsum(-1).exp(),
            )
            real_BK = (batch.depth_BK != PADDING).cpu()
            parts.append([column.cpu()[real_BK].numpy() for column in columns])
        request, *rest = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls(examples.users[request], request, *rest)


def _outcome_figures(seen: _Scored, model: RankingModel, popularity: Rows) -> dict[str, Figure]:
    """Order and calibration of each behaviour, beside the order of popularity."""
    figures: dict[str, Figure] = {}
    # Without exposures everything is measured against items drawn by popularity, and so is what was calibrated.
    unit = "share" if model.n_given else "share, of sampled negatives: means nothing elsewhere"
    for m, name in enumerate(model.behaviours):
        outcome = m - model.n_given
        rows = np.flatnonzero(seen.depths >= model.n_given) if outcome >= 0 else np.arange(len(seen.depths))
        labels, users, requests = seen.depths[rows] > m, seen.users[rows], seen.requests[rows]
        scores = seen.first[rows, outcome] if outcome >= 0 else seen.relevance[rows]
        for prefix, by in ((f"ranking.{name}", scores), (f"ranking.popularity.{name}", popularity[seen.items[rows]])):
            with suppress(InvalidInputError):  # the behaviour does not occur, or in no request beside others
                figures[f"{prefix}.auc"] = _with_interval(auc, users, by, labels)
                figures[f"{prefix}.gauc"] = _with_interval(grouped_auc, users, by, labels, requests)
        for ending, predicted in (("ece", seen.there), ("ece_uncalibrated", seen.raw)) if outcome >= 0 else ():
            error = _with_interval(expected_calibration_error, users, predicted[rows, outcome], labels)
            figures[f"ranking.{name}.{ending}"] = replace(error, unit=unit)
    return figures


def _with_interval(measure: Callable[..., float], users: Rows, *columns: NDArray[Any]) -> Figure:
    """`measure` of columns, with the 95 % percentile interval of a bootstrap over users.

    Raises:
        InvalidInputError: as `measure`.
    """
    value = measure(*columns)
    _, user = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(0)
    n_users = int(user.max()) + 1
    values = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users)
        rows = np.repeat(np.arange(len(user)), drawn[user])
        with suppress(InvalidInputError):  # a draw without both labels, where a behaviour is that rare
            values.append(measure(*(column[rows] for column in columns)))
    low, high = np.quantile(values, [0.025, 0.975]) if values else (value, value)
    return Figure(value, "share", (float(low), float(high)))


def _place_bias(model: RankingModel, examples: RankingExamples) -> dict[str, Figure]:
    """Slope of the learned bias over the logarithm of the place; nothing where there are not two places."""
    places = examples.places[examples.places != NO_PLACE]
    shown = np.bincount(np.minimum(places, model.config.n_places - 1), minlength=model.config.n_places)
    if np.count_nonzero(shown) < 2 or model.place_bias is None:
        return {}
    depth = np.log1p(np.arange(model.config.n_places))
    slope = np.polyfit(depth, model.place_biases().detach().cpu().double().numpy(), 1, w=np.sqrt(shown))[0]
    return {"ranking.place_bias.slope": Figure(float(slope), "logits")}


def _oracle_figures(
    fitted: FittedRankingModel,
    uncorrected: FittedRankingModel | None,
    shop: Shop,
    examples: RankingExamples,
    requests: Rows,
    popularity: Rows,
) -> dict[str, Figure]:
    """How well scores agree with what users want."""
    rng = np.random.default_rng(0)
    requests = np.sort(rng.permutation(requests)[:_ORACLE_REQUESTS])
    at_BK, real_BK = examples.grid(requests)
    whole_B = real_BK.all(axis=1)
    requests, at_BK = requests[whole_B], at_BK[whole_B]
    users, wanted_BN = examples.users[requests], _wanted(shop, examples, requests)
    candidates = {
        "shown": examples.items[at_BK].astype(np.int64),
        "drawn": rng.integers(0, len(shop.items), at_BK.shape),
    }
    truth_BK = np.take_along_axis(wanted_BN, candidates["shown"], axis=1)
    figures: dict[str, Figure] = {}
    for m, name in enumerate(fitted.outcomes, fitted.model.n_given):
        columns = (truth_BK.ravel(), examples.depths[at_BK].ravel() > m, np.repeat(requests, at_BK.shape[1]))
        with suppress(InvalidInputError):  # the behaviour does not occur
            figures[f"ranking.oracle.{name}.gauc"] = _with_interval(
                grouped_auc, np.repeat(users, at_BK.shape[1]), *columns
            )
    asked = (shop.histories, examples.starts[requests], examples.ends[requests], examples.query_texts(requests))
    for name, items_BK in candidates.items():
        truth_BK = np.take_along_axis(wanted_BN, items_BK, axis=1)
        relevance_BK, probabilities_BKM = fitted.score(*asked, items_BK)
        agreed = {
            "": _concordance(probabilities_BKM[..., 0], truth_BK),
            "_by_relevance": _concordance(relevance_BK, truth_BK),
            "_by_popularity": _concordance(popularity[items_BK], truth_BK),
        }
        if uncorrected is not None:
            _, probabilities_BKM = uncorrected.score(*asked, items_BK)
            agreed["_uncorrected"] = _concordance(probabilities_BKM[..., 0], truth_BK)
            agreed["_correction"] = agreed[""] - agreed["_uncorrected"]
        for ending, share_B in agreed.items():
            figures[f"ranking.oracle.{name}{ending}"] = _with_interval(_mean, users, share_B)
    return figures


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values))


def _wanted(shop: Shop, examples: RankingExamples, requests: Rows) -> NDArray[np.float64]:
    """What the user of each of `requests` wants, by the truth, float64 ``[B, N]``."""
    oracle, user_ids = Oracle.load(shop.data), shop.users["user_id"].to_list()
    e, queries = examples, examples.query_texts(requests)
    return np.stack(
        [
            oracle.scores(user_ids[e.users[r]], int(e.times[r]), query, shop.histories.items[e.starts[r] : e.ends[r]])
            for r, query in zip(requests.tolist(), queries, strict=True)
        ]
    )


def _concordance(scores_BK: NDArray[Any], wanted_BK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of a request's pairs, of those that are not wanted alike, that scores order alike; ties half.

    float64 ``[B]``, not a number where all are wanted alike.
    """
    more_BKK = wanted_BK[:, :, None] > wanted_BK[:, None, :]
    higher_BKK = scores_BK[:, :, None] > scores_BK[:, None, :]
    level_BKK = scores_BK[:, :, None] == scores_BK[:, None, :]
    won_B = (more_BKK * (higher_BKK + 0.5 * level_BKK)).sum(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        return np.asarray(won_B / more_BKK.sum(axis=(1, 2)), np.float64)
