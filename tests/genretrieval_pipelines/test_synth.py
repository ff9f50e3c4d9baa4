"""The demo shop: same seed same bytes, nothing impossible in its log, real-looking figures, a truth worth learning."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from genretrieval.errors import DataError, RecipeError
from genretrieval.histories import NO_QUERY, Histories
from genretrieval_pipelines.cases import Cases, leave_one_out_cases
from genretrieval_pipelines.synth import Oracle, ShopConfig, ShopSummary, gini, synthesize
from genretrieval_pipelines.synth.propensity import NOTHING, Truth, log_propensity, query_match
from genretrieval_pipelines.synth.words import COMPLEMENTS, LEAVES

FILES = ("items.parquet", "users.parquet", "interactions.parquet", "truth.npz")
SMALL = ShopConfig(n_items=200, n_users=80)

# Online Retail (UCI, doi 10.24432/C5BW33), known customers' purchases, one row per (user, invoice, item): 386,326
# rows, 4,334 users, 3,659 items. Repeat rate: share of rows that are not the first of their (user, item); Gini over
# the rows of each item. `test_the_real_shop_has_these_figures` computes them again.
REAL = {"median_history": 40.0, "mean_history": 89.138, "repeat_rate": 0.31089, "popularity_gini": 0.63833}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    synthesize(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShopSummary]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, synthesize(folder)


def positives(folder: Path) -> pl.DataFrame:
    log = pl.read_parquet(folder / "interactions.parquet").filter(pl.col("event") != "exposure")
    items = pl.read_parquet(folder / "items.parquet", columns=["item_id"]).with_row_index("item")
    return log.join(items, on="item_id", maintain_order="left").sort("user_id", "timestamp", maintain_order=True)


def histories(folder: Path) -> Histories:
    log = positives(folder)
    counts = log.group_by("user_id", maintain_order=True).len()
    queries = log["query"].drop_nulls().unique().sort().to_list()
    rows = {query: row for row, query in enumerate(queries)}
    return Histories(
        user_ids=counts["user_id"].to_list(),
        offsets=np.concatenate([[0], np.cumsum(counts["len"].to_numpy())]).astype(np.int64),
        items=log["item"].to_numpy().astype(np.int32),
        events=np.zeros(len(log), np.int16),
        times=log["timestamp"].to_numpy(),
        query_rows=np.array([NO_QUERY if q is None else rows[q] for q in log["query"]], np.int32),
        event_names=("positive",),
        queries=queries,
        order_rule="timestamp, then file order",
    )


def test_same_seed_same_bytes_at_any_thread_count(small: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from genretrieval_pipelines.synth import ShopConfig, synthesize;"
        "synthesize(Path(sys.argv[1]), ShopConfig(n_items=200, n_users=80))"
    )
    environment = {**os.environ, "POLARS_MAX_THREADS": "3", "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "99"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name


def test_another_seed_another_shop(small: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, ShopConfig(n_items=200, n_users=80, seed=8))
    assert (tmp_path / "items.parquet").read_bytes() != (small / "items.parquet").read_bytes()


def test_a_shop_is_made_again_in_its_folder(small: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, ShopConfig(n_items=100, n_users=20))

    synthesize(tmp_path, SMALL)

    for path in small.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_logs_of_another_shop_are_left_alone(tmp_path: Path) -> None:
    for name in ("items", "queries"):
        (tmp_path / f"{name}.parquet").write_text(name)

    with pytest.raises(DataError, match=r"holds items\.parquet, queries\.parquet, .*nothing was touched"):
        synthesize(tmp_path, SMALL)

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "items.parquet": "items",
        "queries.parquet": "queries",
    }
    with pytest.raises(DataError, match="cannot be made a folder"):
        synthesize(tmp_path / "items.parquet", SMALL)


def test_a_shop_that_was_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Truth, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path, SMALL)
    assert not (tmp_path / "items.parquet").exists()

    synthesize(tmp_path, SMALL)

    assert (tmp_path / "items.parquet").exists()


def test_items_are_complete_and_unique(demo: tuple[Path, ShopSummary]) -> None:
    items = pl.read_parquet(demo[0] / "items.parquet")
    assert len(items) == items["item_id"].n_unique() == ShopConfig().n_items
    assert items["title"].n_unique() == len(items)
    assert items.select("title", "brand", "price", "parent_id", "in_stock").null_count().sum_horizontal().item() == 0
    assert (items["categories"].list.len() == 3).all()
    assert items["price"].min() > 0
    variants = items.group_by("parent_id").agg(pl.col("brand", "style", "material", "audience").n_unique(), pl.len())
    assert (variants.select("brand", "style", "material", "audience") == 1).to_numpy().all()
    assert variants["len"].max() > 1
    assert 0.9 < items["in_stock"].mean() < 1.0


def test_a_request_shows_ten_items_and_logs_at_most_one_choice_among_them(small: Path) -> None:
    log = pl.read_parquet(small / "interactions.parquet")
    assert log["timestamp"].is_sorted()
    shown, chosen = log.filter(event="exposure"), log.filter(pl.col("event") != "exposure")
    pages = shown.group_by("request_id").agg(pl.col("rank_shown").sort(), pl.col("item_id").n_unique())
    assert pages["rank_shown"].to_list() == [list(range(10))] * len(pages)
    assert (pages["item_id"] == 10).all()
    assert chosen["request_id"].is_unique().all()
    keys = ["request_id", "user_id", "item_id", "rank_shown", "scenario"]
    joined = chosen.join(shown.select(*keys, shown="timestamp"), on=keys)
    assert len(joined) == len(chosen) < len(pages)
    assert (joined["timestamp"] > joined["shown"]).all()
    assert set(chosen["event"]) == {"click", "cart", "purchase"}
    assert (chosen["value"].is_null() == (chosen["event"] != "purchase")).all()
    assert (log["query"].is_null() == (log["scenario"] == "home")).all()
    per_user = chosen.select("user_id", "timestamp")
    assert len(per_user.unique()) == len(per_user)  # no ties: a history has one order


def test_nothing_is_shown_before_its_launch_or_after_it_is_sold_out(small: Path) -> None:
    truth = Truth.load(small)
    log = pl.read_parquet(small / "interactions.parquet").filter(event="exposure")
    ids = pl.read_parquet(small / "items.parquet")["item_id"].to_list()
    row = log["item_id"].replace_strict({item: row for row, item in enumerate(ids)}).to_numpy()
    times = log["timestamp"].to_numpy()
    assert (truth.launch > truth.start).any()
    assert (truth.retire < truth.end).any()
    assert (truth.launch[row] <= times).all()
    assert (times < truth.retire[row]).all()


def test_the_first_places_are_taken_more_often(demo: tuple[Path, ShopSummary]) -> None:
    taken = np.bincount(positives(demo[0])["rank_shown"].to_numpy(), minlength=10)
    assert (np.diff(taken) < 0).sum() >= 8
    assert taken[0] > 3 * taken[9]


def test_profiles_tell_something_about_taste(demo: tuple[Path, ShopSummary]) -> None:
    users, truth = pl.read_parquet(demo[0] / "users.parquet"), Truth.load(demo[0])
    price = truth.price_taste
    by_region = [price[(users["region"] == region).to_numpy()].mean() for region in ("north", "capital")]
    assert by_region[1] - by_region[0] > 0.5
    bands = [truth.leaf_taste[0, (users["age_band"] == band).to_numpy()].mean(0) for band in set(users["age_band"])]
    assert np.std(bands, axis=0).mean() > 0.2


def test_words_are_sound() -> None:
    nouns = [leaf.noun for leaf in LEAVES]
    assert len(set(nouns)) == len(nouns)
    assert {noun for left, right in COMPLEMENTS.items() for noun in (left, *right)} <= set(nouns)
    departments = [leaf.department for leaf in LEAVES]
    assert set(departments[:16]) == set(departments)


def test_complements_follow_each_other_more_often_than_chance(demo: tuple[Path, ShopSummary]) -> None:
    truth, flat = Truth.load(demo[0]), histories(demo[0])
    leaf = truth.leaf[flat.items]
    inside = np.ones(len(leaf) - 1, np.bool_)
    inside[flat.offsets[1:-1] - 1] = False
    nouns = [leaf.noun for leaf in LEAVES]
    phone, case = nouns.index("smartphone"), nouns.index("phone case")
    after_phone = (leaf[1:] == case)[inside & (leaf[:-1] == phone)].mean()
    assert after_phone > 2 * (leaf == case).mean()


def tiny_truth() -> Truth:
    """Three items (leaves 0, 0, 1; leaf 1 is a consumable; item 2 launches half-way), one user without tastes."""
    none = np.full(3, NOTHING, np.int64)
    return Truth(
        start=0,
        end=100,
        leaf=np.array([0, 0, 1]),
        brand=np.array([0, 1, 0]),
        attributes=np.array([[1], [0], [2]]),
        price_position=np.array([0.0, 1.0, 0.0], np.float32),
        popularity=np.zeros(3, np.float32),
        launch=np.array([0, 0, 50]),
        retire=np.array([200, 80, 200]),
        consumable=np.array([False, True]),
        transition=np.array([[0.0, 2.0], [0.0, 0.0]], np.float32),
        user_ids=np.array(["u"]),
        leaf_taste=np.array([[[0.0, 0.0]], [[0.0, 4.0]]], np.float32),
        brand_taste=np.zeros((1, 2), np.float32),
        attribute_taste=np.zeros((1, 3), np.float32),
        price_taste=np.zeros(1, np.float32),
        queries=np.array(["any", "second brand", "red"]),
        query_head=np.zeros(3, np.int64),
        head_leaves=np.array([[True, False]]),
        query_brand=np.where([False, True, False], 1, none),
        query_attribute=np.where([False, False, True], 1, none),
    )


def tiny_scores(time: int, query: int = -1, last: int = NOTHING, ages: tuple[int, ...] = (0, 0, 0)) -> list[float]:
    truth, user = tiny_truth(), np.array([0])
    rows = np.array([ages], np.int32)
    score = log_propensity(truth, truth.affinity(user), user, np.array([time]), np.array([last]), rows)
    if query >= 0:
        score += query_match(truth, np.array([query]))
    return [round(float(value), 4) for value in score[0]]


def test_propensity_by_hand() -> None:
    gone = float("-inf")
    # Price: item 1 is one deviation dearer than liked, -0.3. Drift: 0.75 x 4 x phase on leaf 1.
    assert tiny_scores(49) == [0.0, -0.3, gone]
    assert tiny_scores(50) == [0.0, -0.3, 1.5]
    assert tiny_scores(80) == [0.0, gone, 2.4]
    assert tiny_scores(50, last=0) == [0.0, -0.3, 3.5]  # leaf 0 -> leaf 1: +2
    assert tiny_scores(50, ages=(1, 30, 2)) == [-1.0, -4.3, -1.0]  # in hand, settled, still in the cupboard
    assert tiny_scores(50, query=0) == [0.0, -0.3, -10.5]  # leaf 1 is not meant: -12
    assert tiny_scores(50, query=1) == [0.0, 3.7, -10.5]  # brand 1 named: +4
    assert tiny_scores(50, query=2) == [3.0, -0.3, -10.5]  # attribute 1 named: +3


def test_oracle_uses_the_same_function() -> None:
    scores = Oracle(tiny_truth()).scores("u", 50, None, np.array([1, 0, 1, 0]))
    # Item 1 two interactions ago, item 0 just now: -1 each; item 2 gains 2 from the transition.
    np.testing.assert_allclose(scores, np.exp(np.array([-1.0, -1.3, 3.5]) - 3.5), rtol=1e-6)
    assert scores.dtype == np.float64


def test_oracle_refuses_strangers(small: Path, tmp_path: Path) -> None:
    oracle = Oracle.load(small)
    with pytest.raises(DataError, match="'nobody' is not in this shop"):
        oracle.scores("nobody", 0, None, np.empty(0, np.int64))
    with pytest.raises(DataError, match="'flying carpet' has no meaning"):
        oracle.scores("u000000", 0, "flying carpet", np.empty(0, np.int64))
    with pytest.raises(DataError, match=r"truth\.npz does not exist"):
        Oracle.load(tmp_path)


@pytest.mark.parametrize(
    "setting", [{"n_items": 10}, {"days": 0}, {"seed": -1}, {"median_history": 90.0}, {"search_share": 1.5}]
)
def test_a_shop_that_cannot_be_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=next(iter(setting))):
        ShopConfig(**setting)  # type: ignore[arg-type]


def test_gini_by_hand() -> None:
    assert gini(np.array([5, 5, 5])) == 0.0
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)


def test_the_demo_looks_like_a_real_shop(demo: tuple[Path, ShopSummary]) -> None:
    folder, summary = demo
    flat = histories(folder)
    measured = {
        "median_history": float(np.median(flat.lengths())),
        "mean_history": float(flat.lengths().mean()),
        "repeat_rate": flat.repeat_rate(),
        "popularity_gini": gini(np.bincount(flat.items, minlength=summary.n_items)),
    }
    assert measured == pytest.approx({name: getattr(summary, name) for name in measured})
    assert measured == pytest.approx(REAL, rel=0.2)
    assert 100_000 <= summary.n_positives <= 130_000


@pytest.mark.data
def test_the_real_shop_has_these_figures() -> None:
    root = os.environ.get("GENRETRIEVAL_DATA")
    if root is None:
        if os.environ.get("REQUIRE_SHARED_DATA") == "1":
            pytest.fail("GENRETRIEVAL_DATA is not set")
        pytest.skip("GENRETRIEVAL_DATA is not set")
    folder = Path(root) / "online_retail"
    log, items = pl.read_parquet(folder / "interactions.parquet"), pl.read_parquet(folder / "items.parquet")
    lengths = log.group_by("user_id").len()["len"]
    counts = items.join(log.group_by("item_id").len(), on="item_id", how="left")["len"].fill_null(0)
    measured = {
        "median_history": lengths.median(),
        "mean_history": lengths.mean(),
        "repeat_rate": 1 - log.select("user_id", "item_id").n_unique() / len(log),
        "popularity_gini": gini(counts.to_numpy().astype(np.int64)),
    }
    assert measured == pytest.approx(REAL, rel=1e-4)


def recall_at_10(cases: Cases, scores: Callable[[int], NDArray[np.float64]]) -> NDArray[np.bool_]:
    """bool ``[n_cases]``: the target is among the ten best (fewer than ten items score higher)."""
    return np.array([(s := scores(row), (s > s[cases.relevant[row]]).sum() < 10)[1] for row in range(len(cases))])


def test_the_truth_is_worth_learning(demo: tuple[Path, ShopSummary]) -> None:
    """What acceptance of a trained model rests on: the oracle is far ahead of what needs no model."""
    folder, summary = demo
    flat, oracle = histories(folder), Oracle.load(folder)
    cases = leave_one_out_cases(flat, "test")
    n = summary.n_items
    train = np.ones(len(flat.items), np.bool_)
    train[cases.ends] = False
    popularity = np.bincount(flat.items[train], minlength=n).astype(np.float64)
    follows = train[1:] & train[:-1]
    follows[flat.offsets[1:-1] - 1] = False
    markov = np.zeros((n, n))
    np.add.at(markov, (flat.items[:-1][follows], flat.items[1:][follows]), 1.0)

    def history(row: int) -> NDArray[np.int32]:
        return flat.items[cases.starts[row] : cases.ends[row]]

    by_oracle = recall_at_10(
        cases,
        lambda row: oracle.scores(
            flat.user_ids[cases.user_rows[row]], int(flat.times[cases.ends[row]]), cases.queries[row], history(row)
        ),
    )
    by_markov = recall_at_10(cases, lambda row: markov[history(row)[-1]] + 1e-6 * popularity)
    by_popularity = recall_at_10(cases, lambda _: popularity)
    searched = np.array([query is not None for query in cases.queries])
    assert 0.35 < searched.mean() < 0.45
    assert 0.3 < by_oracle[~searched].mean() < by_oracle[searched].mean()
    assert by_oracle.mean() >= 3 * max(by_markov.mean(), by_popularity.mean())

    # Counting in a user's own last 50 interactions, and knowing the leaf a query means, is half the way.
    truth = Truth.load(folder)
    meanings = {query: truth.head_leaves[truth.query_head[row]] for row, query in enumerate(truth.queries.tolist())}

    def by_counting(row: int) -> NDArray[np.float64]:
        recent = history(row)[-50:]
        score = 0.3 * np.log1p(popularity)
        for values, weight, prior in ((truth.leaf, 1.0, 0.2), (truth.brand, 1.0, 1.0), (np.arange(n), 0.5, 0.3)):
            score += weight * np.log(np.bincount(values[recent], minlength=values.max() + 1) + prior)[values]
        query = cases.queries[row]
        return score if query is None else score + 12.0 * meanings[query][truth.leaf]

    assert recall_at_10(cases, by_counting).mean() >= 0.5 * by_oracle.mean()
