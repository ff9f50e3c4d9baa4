from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from genretrieval.errors import DataError, RecipeError
from genretrieval.figures import Figure, lines
from genretrieval.histories import NO_QUERY, NO_TIME, LeaveOneOut
from genretrieval.logs import PreparedLogs, load_prepared
from genretrieval.metrics import NOTHING
from genretrieval.model.ranking import NO_PLACE, RankingConfig
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.ranking import RankingTrainingConfig
from genretrieval_pipelines import ranking
from genretrieval_pipelines.embed import EmbeddingPart, embed_items
from genretrieval_pipelines.ranking import RankingExamples, RankingRunConfig, ranking_examples
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize

SMALL = RankingRunConfig(
    RankingConfig(d_model=16, n_heads=2, d_hidden=16, max_history=10, n_places=10, query_vocab_size=500),
    RankingTrainingConfig(epochs=1, batch_size=128, learning_rate=1e-2),
)
# Large enough to learn what the shop is about.
LEARNS = RankingRunConfig(
    RankingConfig(d_model=32, d_hidden=64, max_history=20, n_places=10, query_vocab_size=500),
    RankingTrainingConfig(epochs=4, batch_size=64, learning_rate=1e-2),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def logs_of(folder: Path, rows: list[tuple[Any, ...]], columns: str, n_items: int = 10) -> tuple[Shop, PreparedLogs]:
    """A shop of items a, b, ... with these interactions."""
    data = folder / "shop"
    data.mkdir()
    items = [chr(ord("a") + row) for row in range(n_items)]
    pl.DataFrame({"item_id": items, "title": items}).write_parquet(data / "items.parquet")
    pl.DataFrame(rows, columns.split(), orient="row").write_parquet(data / "interactions.parquet")
    return open_shop(data, folder / "work"), load_prepared(folder / "work" / "logs")


TIMED = "user_id request_id item_id event timestamp rank_shown query"
# u: request 1 is clicked and, much later, purchased from; 2 is left alone; 3 is the validation target's, 5 the test
# target's, 4 lies between them and 6 after everything. v is too short to be evaluated. w has no history at all.
LOG: list[tuple[Any, ...]] = [
    ("u", None, "a", "review", 50, None, None),
    ("u", "1", "a", "exposure", 100, 0, None),
    ("u", "1", "b", "exposure", 100, 1, None),
    ("u", "1", "b", "click", 110, 1, None),
    ("u", "2", "c", "exposure", 200, 0, "red"),
    ("u", "2", "b", "exposure", 200, 2, "red"),
    ("u", "1", "b", "purchase", 210, 1, None),
    ("u", "3", "d", "exposure", 300, 0, "blue"),
    ("u", "3", "e", "exposure", 300, 1, "blue"),
    ("u", "3", "e", "cart", 310, 1, "blue"),
    ("u", "4", "f", "exposure", 400, 0, None),
    ("u", "5", "g", "exposure", 500, 0, None),
    ("u", "5", "g", "click", 510, 0, None),
    ("u", "6", "h", "exposure", 600, 0, None),
    ("v", "1", "a", "exposure", 100, 0, None),
    ("v", "1", "a", "click", 105, 0, None),
    ("w", "1", "b", "exposure", 100, None, None),
    ("w", None, "b", "exposure", 100, 0, None),
    ("v", "9", "b", "purchase", 900, 0, None),
]


def test_examples_of_a_log_by_hand(tmp_path: Path) -> None:
    shop, logs = logs_of(tmp_path, LOG, TIMED)
    e = ranking_examples(shop, logs, n_drawn=4)
    assert e.behaviours == ("exposure", "click", "cart", "purchase")
    assert [shop.users["user_id"][user] for user in e.users.tolist()] == ["u"] * 6 + ["v", "w"]
    # History of u: review, click, purchase, cart, click at 0 .. 4; of v: 5 and 6.
    assert e.starts.tolist() == [0] * 6 + [5, 7]
    assert e.ends.tolist() == [1, 2, 3, 4, 4, 5, 5, 7]
    # Request 1 is trained on: its last event, the purchase at 2, lies before the validation target at 3.
    assert e.splits.tolist() == [0, 0, 1, 2, 2, 2, 0, 0]
    assert e.times.tolist() == [100, 200, 300, 400, 500, 600, 100, 100]
    assert e.query_texts(np.arange(8)) == [None, "red", "blue", None, None, None, None, None]
    shown = [
        list(zip(e.items[a:b].tolist(), e.places[a:b].tolist(), e.depths[a:b].tolist(), strict=True))
        for a, b in zip(e.offsets[:-1], e.offsets[1:], strict=True)
    ]
    assert shown == [
        [(0, 0, 1), (1, 1, 4)],  # the deepest of click and purchase
        [(2, 0, 1), (1, 2, 1)],
        [(3, 0, 1), (4, 1, 3)],
        [(5, 0, 1)],
        [(6, 0, 2)],
        [(7, 0, 1)],
        [(0, 0, 2)],  # the purchase of request 9, which logged no exposure, is none of its own
        [(1, NO_PLACE, 1)],  # neither is the exposure without a request
    ]
    for row in range(8):
        drawn = set(e.drawn[row].tolist()) - {NOTHING}
        assert drawn <= set(range(10))
        assert not drawn & {item for item, _, _ in shown[row]}


def test_a_late_event_of_a_request_decides_its_split(tmp_path: Path) -> None:
    rows = [(*row[:4], 320 if row[3] == "purchase" and row[0] == "u" else row[4], *row[5:]) for row in LOG]
    shop, logs = logs_of(tmp_path, rows, TIMED)
    e = ranking_examples(shop, logs)
    # Now u's order is review, click, cart, purchase, click: request 1 knows of the validation target, the purchase, and
    # request 3, the cart's, comes before it.
    assert e.ends.tolist()[:6] == [1, 2, 2, 4, 4, 5]
    assert e.splits.tolist()[:6] == [1, 0, 0, 2, 2, 2]


def test_a_log_ordered_by_index_and_without_times(tmp_path: Path) -> None:
    rows = [(*row[:4], None, *row[5:], index) for index, row in enumerate(LOG)]
    shop, logs = logs_of(tmp_path, rows, f"{TIMED} history_index")
    e = ranking_examples(shop, logs)
    assert e.ends.tolist()[:6] == [1, 2, 3, 4, 4, 5]
    assert e.splits.tolist()[:6] == [0, 0, 1, 2, 2, 2]
    assert (e.times == NO_TIME).all()


def test_a_log_without_queries(tmp_path: Path) -> None:
    shop, logs = logs_of(tmp_path, [row[:-1] for row in LOG], TIMED.removesuffix(" query"))
    e = ranking_examples(shop, logs)
    assert e.queries == []
    assert e.query_texts(np.arange(8)) == [None] * 8


def test_what_shares_a_second_with_a_request_is_not_before_it(tmp_path: Path) -> None:
    rows = [(*row[:4], {50: 100, 110: 200}.get(row[4], row[4]), *row[5:]) for row in LOG]
    shop, logs = logs_of(tmp_path, rows, TIMED)
    # The review stands before request 1 in the file, and the click before request 2, each in the same second.
    assert ranking_examples(shop, logs).ends.tolist()[:3] == [0, 1, 3]


def test_a_shop_without_exposures_draws_negatives_by_popularity(tmp_path: Path) -> None:
    rows = [(user, item, "review", time) for user in "uvwxyz" for time, item in enumerate("aaabcad")]
    shop, logs = logs_of(tmp_path, rows, "user_id item_id event timestamp")
    e = ranking_examples(shop, logs, n_drawn=50)
    assert e.behaviours == ("click",)
    assert len(e) == 6 * 6
    assert e.ends.tolist()[:6] == [1, 2, 3, 4, 5, 6]
    assert e.splits.tolist()[:6] == [0, 0, 0, 0, 1, 2]
    assert e.items.tolist()[:6] == [0, 0, 1, 2, 0, 3]
    assert (e.depths == 1).all()
    drawn = np.bincount(e.drawn[e.drawn != NOTHING], minlength=10)
    assert drawn[3:].sum() == 0  # d is taken in the test split alone
    # a is drawn three times as often, but is no negative where it is what was taken: half of the rows.
    assert drawn[0] / drawn[1] == pytest.approx(3 * 3 / 5, rel=0.15)
    assert not (e.drawn == e.items[:, None]).any()
    assert ranking_examples(shop, logs, n_drawn=50, seed=1).drawn.tolist() != e.drawn.tolist()


def test_logs_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    shop, logs = logs_of(tmp_path, [row for row in LOG if row[0] != "u"], TIMED)
    with pytest.raises(DataError, match="0 to calibrate"):
        ranking_examples(shop, logs)
    with pytest.raises(DataError, match="another shop"):
        ranking_examples(replace(shop, fingerprint="0"), logs)


@dataclass(frozen=True)
class Made:
    shop: Shop
    logs: PreparedLogs
    examples: RankingExamples
    ids: SemanticIds
    content: np.ndarray
    cache: Path

    def fit(self, config: RankingRunConfig, part: ranking.Part = "train") -> ranking.FittedRankingModel:
        return ranking.fit_ranking_model(
            self.shop, self.examples, self.ids, self.content, config, self.cache, part=part
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    synthesize(folder / "shop", ShopConfig(n_items=300, n_users=200, mean_history=50.0, median_history=30.0))
    shop = open_shop(folder / "shop", folder / "work")
    leaf = shop.items["categories"].list.last().rank("dense").to_numpy() - 1
    brand = shop.items["brand"].rank("dense").to_numpy() - 1
    codes = np.column_stack([leaf, brand, np.arange(300)]).astype(np.int32)
    ids = SemanticIds(codes, (int(leaf.max()) + 1, int(brand.max()) + 1, 300))
    logs = load_prepared(folder / "work" / "logs")
    content = embed_items(shop.items, [EmbeddingPart(name="hashing")], shop.histories, folder / "work")
    return Made(shop, logs, ranking_examples(shop, logs), ids, content, folder / "cache")


@pytest.fixture(scope="module")
def fitted(made: Made) -> ranking.FittedRankingModel:
    return made.fit(LEARNS)


@pytest.fixture(scope="module")
def figures(made: Made, fitted: ranking.FittedRankingModel) -> dict[str, Figure]:
    """Measured on all requests of the other half of the users, where the validation requests are too few to tell."""
    e = made.examples
    unseen = ranking.part_of_users(made.shop.users["user_id"].to_list())[e.users]
    every = replace(e, splits=np.where(unseen, 1, e.splits).astype(np.int8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_RESAMPLES", 4)
        return ranking.evaluate_ranking_model(fitted, made.shop, every)


def test_nothing_of_the_future_is_in_a_history_or_in_training(made: Made) -> None:
    """Checked against the raw log, whose requests are told apart by their names alone."""
    e, h = made.examples, made.shop.histories
    raw = pl.read_parquet(made.shop.data / "interactions.parquet")
    spans = raw.group_by("user_id", "request_id").agg(
        pl.col("timestamp").min().alias("begin"), pl.col("timestamp").max().alias("end")
    )
    ends = {(user, begin): end for user, _, begin, end in spans.iter_rows()}
    assert len(ends) == len(spans) == len(e)
    users = made.shop.users["user_id"].to_list()
    target_of, positions = LeaveOneOut(h).targets("validation")
    target_time = dict(zip(target_of.tolist(), h.times[positions].tolist(), strict=True))
    n_train = 0
    for r in range(len(e)):
        user, begin = int(e.users[r]), int(e.times[r])
        history = np.arange(h.offsets[user], h.offsets[user + 1])
        # All of the past, in its order, and nothing else.
        assert (e.starts[r], e.ends[r]) == (history[0], history[0] + (h.times[history] < begin).sum())
        if e.splits[r] == 0:
            n_train += 1
            assert ends[users[user], begin] < target_time.get(user, np.inf)
        else:
            assert ends[users[user], begin] >= h.times[positions[target_of == user] - 1][0]
    assert n_train == len(e.of_split("train")) > 0.9 * len(e)
    # Every user's target is an example of its split.
    for split in ("validation", "test"):
        rows = e.of_split(split)
        taken = {(int(e.users[r]), int(item)) for r in rows for item in e.items[e.grid(rows[rows == r])[0][0]]}
        for user, position in zip(*LeaveOneOut(h).targets(split), strict=True):
            assert (int(user), int(h.items[position])) in taken


def test_what_was_shown_is_what_was_logged(made: Made) -> None:
    e = made.examples
    raw = pl.read_parquet(made.shop.data / "interactions.parquet")
    assert len(e.items) == raw.filter(pl.col("event") == "exposure").height
    assert (np.diff(e.offsets) == 10).all()
    assert (e.places.reshape(-1, 10) == np.arange(10)).all()
    for level, name in enumerate(e.behaviours[1:], 2):
        assert (e.depths == level).sum() == raw.filter(pl.col("event") == name).height
    asked = [text for text in e.query_texts(np.arange(len(e))) if text is not None]
    assert (
        len(asked)
        == (e.query_rows != NO_QUERY).sum()
        == raw["query"].is_not_null().sum()
        - sum(raw.filter(pl.col("event") != "exposure")["query"].is_not_null())
        - 9 * len(asked)
    )


def test_the_halves_share_no_user(made: Made) -> None:
    users = made.shop.users["user_id"].to_list()
    holdout = ranking.part_of_users(users)
    assert 0.4 < holdout.mean() < 0.6
    assert ranking.part_of_users(users[::-1]).tolist() == holdout.tolist()[::-1]
    seen: dict[ranking.Part, set[int]] = {"train": set(), "holdout": set()}

    def spy(model: Any, fetch: Any, train: np.ndarray, validation: np.ndarray, config: Any) -> list[Any]:
        seen[part] |= set(made.examples.users[np.concatenate([train, validation])].tolist())
        assert (made.examples.splits[train] == 0).all()
        assert (made.examples.splits[validation] == 1).all()
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "train_ranking_model", spy)
        for part in seen:
            ranking.fit_ranking_model(made.shop, made.examples, made.ids, None, SMALL, part=part)
    assert seen["train"] | seen["holdout"] == set(made.examples.users.tolist())
    assert not seen["train"] & seen["holdout"]


def test_it_orders_better_than_popularity(figures: dict[str, Figure]) -> None:
    for behaviour in ("exposure", "click"):
        for kind in ("auc", "gauc"):
            ours, popular = (figures[f"ranking.{name}{behaviour}.{kind}"] for name in ("", "popularity."))
            assert ours.value > popular.value
    assert figures["ranking.oracle.shown"].value > figures["ranking.oracle.shown_by_popularity"].value
    assert figures["ranking.oracle.drawn"].value > figures["ranking.oracle.drawn_by_popularity"].value
    # No ranker is better than the truth.
    assert figures["ranking.oracle.click.gauc"].value > figures["ranking.click.gauc"].value


def test_calibration_lowers_the_error_or_leaves_it(figures: dict[str, Figure]) -> None:
    for behaviour in ("click", "cart", "purchase"):
        before, after = (figures[f"ranking.{behaviour}.{name}"] for name in ("ece_uncalibrated", "ece"))
        assert after.unit == "share"
        assert after.value <= before.value + 0.002
        assert after.value < 0.02


def test_figures_have_names_and_intervals(made: Made, fitted: ranking.FittedRankingModel) -> None:
    uncorrected = made.fit(replace(SMALL, model=replace(SMALL.model, position_bias=False)))
    figures = ranking.evaluate_ranking_model(fitted, made.shop, made.examples, uncorrected=uncorrected)
    assert lines(figures)
    for name, figure in figures.items():
        if figure.unit == "share" and "ece" not in name:  # the error of a resample is above that of the whole
            assert figure.spread is not None
            assert figure.spread[0] <= figure.value <= figure.spread[1], name
    assert figures["ranking.requests"].value * 10 == figures["ranking.impressions"].value
    for kind in ("shown", "drawn"):
        difference = figures[f"ranking.oracle.{kind}"].value - figures[f"ranking.oracle.{kind}_uncorrected"].value
        assert figures[f"ranking.oracle.{kind}_correction"].value == pytest.approx(difference)


def test_the_learned_bias_falls_with_the_place(fitted: ranking.FittedRankingModel, figures: dict[str, Figure]) -> None:
    biases = fitted.model.place_biases().tolist()
    assert biases[0] == 0
    assert biases[0] > biases[2] > biases[5] > biases[9]
    # The truth falls by 0.6 ln(place + 1).
    assert -1.0 < figures["ranking.place_bias.slope"].value < -0.4


def test_a_score_knows_nothing_of_where_items_were_shown(made: Made, fitted: ranking.FittedRankingModel) -> None:
    e, rows = made.examples, made.examples.of_split("validation")[:20]
    moved = replace(e, places=np.flip(e.places.reshape(-1, 10), 1).ravel())
    for examples in (e, moved):
        batch = fitted.batch(made.shop.histories, examples, rows)
        with torch.inference_mode():
            scores = fitted.model.score(batch.requests, batch.items_BK[:, :10])
        relevance, probabilities = fitted.score(
            made.shop.histories, e.starts[rows], e.ends[rows], e.query_texts(rows), e.items.reshape(-1, 10)[rows]
        )
        assert relevance == pytest.approx(scores.relevance_BK.numpy(), abs=1e-5)
        assert probabilities == pytest.approx(scores.probabilities_BKM.numpy(), abs=1e-6)


def test_an_item_that_nobody_met_is_scored(made: Made, fitted: ranking.FittedRankingModel) -> None:
    e = made.examples
    never = np.setdiff1d(np.arange(300), e.items)
    items = np.resize(never if len(never) else np.arange(300), (1, 5))
    relevance, probabilities = fitted.score(made.shop.histories, e.starts[:1], e.ends[:1], [None], items)
    assert relevance.shape == (1, 5)
    assert probabilities.shape == (1, 5, 3)
    assert np.isfinite(relevance).all()
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert (np.diff(probabilities, axis=2) <= 0).all()


def test_a_score_is_the_same_within_the_autocast_of_a_training_step(
    made: Made, fitted: ranking.FittedRankingModel
) -> None:
    e = made.examples
    items = np.arange(12, dtype=np.int32)[None]
    plain = fitted.score(made.shop.histories, e.starts[:1], e.ends[:1], [None], items)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fitted.score(made.shop.histories, e.starts[:1], e.ends[:1], [None], items)
    for one, other in zip(plain, inside, strict=True):
        assert np.array_equal(one, other)


def test_a_query_and_a_history_change_scores(made: Made, fitted: ranking.FittedRankingModel) -> None:
    e, h = made.examples, made.shop.histories
    row = e.of_split("validation")[:1]
    items = np.arange(50)[None]
    plain, _ = fitted.score(h, e.starts[row], e.ends[row], [None], items)
    asked, _ = fitted.score(h, e.starts[row], e.ends[row], [e.queries[0]], items)
    nobody, _ = fitted.score(h, e.starts[row], e.starts[row], [None], items)
    assert np.abs(plain - asked).max() > 0.1
    assert np.abs(plain - nobody).max() > 0.1


def test_equal_seeds_give_equal_models_and_finished_ones_are_read_back(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    first = made.fit(SMALL)
    again = ranking.fit_ranking_model(made.shop, made.examples, made.ids, made.content, SMALL, part="train")
    monkeypatch.setattr(ranking, "train_ranking_model", lambda *_: pytest.fail("trained again"))
    read_back = made.fit(SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert first.log == again.log == read_back.log
    assert first.features == again.features == read_back.features
    for other in (again, read_back):
        for name, value in first.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_training_that_diverges_is_told_and_not_kept(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    log = [{"loss": 0.5, "validation_loss": 0.5}, {"loss": float("nan"), "validation_loss": float("nan")}]
    monkeypatch.setattr(ranking, "train_ranking_model", lambda *_: log)
    config, kept = replace(SMALL, training=replace(SMALL.training, learning_rate=1e30)), set(made.cache.glob("*"))
    with pytest.raises(RecipeError, match=r"ranking_model: .* lower training\.learning_rate of the stage, .* 1e\+30"):
        made.fit(config)
    assert {path.suffix for path in set(made.cache.glob("*")) - kept} <= {".lock"}


def test_another_setting_or_part_is_another_model(made: Made) -> None:
    def key(examples: RankingExamples, config: RankingRunConfig, part: ranking.Part) -> str:
        return ranking._key(made.shop, examples, made.ids, made.content, config, part)

    base = key(made.examples, SMALL, "train")
    assert base == key(replace(made.examples, items=made.examples.items.copy()), SMALL, "train")
    assert base != key(made.examples, SMALL, "holdout")
    assert base != key(made.examples, replace(SMALL, training=replace(SMALL.training, seed=1)), "train")
    assert base != key(replace(made.examples, drawn=made.examples.drawn[:, ::-1]), SMALL, "train")


def test_a_public_shop_is_measured_against_draws(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", chr(ord("a") + 5 * (user % 2) + int(rng.integers(5))), "review", time)
        for user in range(80)
        for time in range(8)
    ]
    shop, logs = logs_of(tmp_path, rows, "user_id item_id event timestamp")
    examples = ranking_examples(shop, logs)
    ids = SemanticIds(np.column_stack([np.arange(10) // 5, np.arange(10)]).astype(np.int32), (2, 10))
    config = replace(SMALL, training=replace(SMALL.training, epochs=4, batch_size=16))
    fitted = ranking.fit_ranking_model(shop, examples, ids, None, config, part="holdout")
    figures = ranking.evaluate_ranking_model(fitted, shop, examples, split="test")
    assert figures["ranking.click.gauc"].value > 0.65  # a user takes one half of the items
    assert figures["ranking.click.gauc"].value > figures["ranking.popularity.click.gauc"].value
    assert "means nothing" in figures["ranking.click.ece"].unit
    assert not any("oracle" in name or "place_bias" in name for name in figures)


def test_what_does_not_fit_the_catalogue_is_refused(made: Made) -> None:
    ids = SemanticIds(made.ids.codes[:10], made.ids.codebook_sizes)
    with pytest.raises(DataError, match="10 semantic IDs"):
        ranking.fit_ranking_model(made.shop, made.examples, ids, None, SMALL, part="train")
    with pytest.raises(DataError, match="7 content vectors"):
        ranking.fit_ranking_model(made.shop, made.examples, made.ids, made.content[:7], SMALL, part="train")


def test_concordance_by_hand() -> None:
    # Truth 3 > 2 > 1: scores order (3, 2) wrongly, (3, 1) level, (2, 1) rightly. Nothing to order in the second row.
    found = ranking._concordance(np.array([[1, 2, 1], [1, 2, 3]]), np.array([[3.0, 2, 1], [1, 1, 1]]))
    assert found[0] == 1.5 / 3
    assert np.isnan(found[1])
