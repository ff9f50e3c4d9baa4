"""Ranking models and preference training as stages of a recipe, on tiny shops."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import TrainerControl, TrainerState

from genretrieval.errors import RecipeError
from genretrieval.histories import LeaveOneOut
from genretrieval.logs import load_prepared
from genretrieval.model import Generator
from genretrieval.training.preference import BehaviourGrade, RewardWeights
from genretrieval.training.preference_objective import NOTHING, PreferredLists, RewardedRollouts
from genretrieval_pipelines import preference, train_generator
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.preference import (
    DISQUALIFIED,
    Guard,
    Judge,
    LoggedLists,
    LoggedReward,
    RequestLog,
    Verdict,
    fit_both,
)
from genretrieval_pipelines.ranking import part_of_users, ranking_examples
from genretrieval_pipelines.recipe import PreferenceStage, RankingModelStage, Recipe, load_recipe
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.stages import StageInputs, stage_inputs
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import tokenize

RANKING = {
    "objective": "ranking_model",
    "model": {"d_model": 16, "n_heads": 2, "d_hidden": 16, "max_history": 10, "n_places": 10, "query_vocab_size": 300},
    "training": {"epochs": 1},
}
PREFERENCE = {"objective": "preference", "preference": {"requests": 4, "rollouts": 8}, "recall_tolerance": 1.0}


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "embedding": [{"name": "hashing", "dim": 32}],
            "tokenizer": {"method": "rq_kmeans", "codebook_sizes": [8, 8, 8]},
            "generator": {
                "d_model": 16,
                "n_heads": 2,
                "d_ff": 32,
                "n_encoder_layers": 1,
                "n_decoder_layers": 1,
                "max_history": 10,
                "query_vocab_size": 300,
                "n_profile_buckets": 32,
            },
            "training": {"epochs": 1, "evaluate_every": 1, "validation_users": 40},
            "stages": [{"objective": "next_item"}, *stages],
            "evaluation": {"beam_width": 10, "sasrec": {"dim": 16, "max_epochs": 1}},
        }
    )


def inputs_of(recipe: Recipe, data: Path, work: Path, console: Console | None = None) -> StageInputs:
    shop = open_shop(data, work)
    ids = tokenize(recipe, shop, work).ids
    draft = draft_bundle(recipe, shop, ids, request_features(recipe, shop))
    return stage_inputs(recipe, shop, ids, draft, work, console or Console(quiet=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, ShopConfig(n_items=120, n_users=40, seed=3))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, so that what is trained once is read back."""
    return tmp_path_factory.mktemp("work")


def weights(generator: Generator) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in generator.state_dict().items()}


@pytest.mark.parametrize("method", ["grpo", "tpma", "listwise_dpo"])
def test_a_recipe_with_both_stages_trains_and_is_read_back(
    demo_shop: Path, work: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    stage = {**PREFERENCE, "preference": {"method": method, "requests": 4, "rollouts": 8, "gain_weight": 0.1}}
    recipe = recipe_of(RANKING, stage)
    console = Console(record=True, width=200, file=StringIO())
    trained = train_generator.train_generator(inputs_of(recipe, demo_shop, work, console))
    printed = console.export_text()
    for figure in ("train.ranking.click.auc", "holdout.ranking.click.gauc", "train.ranking.click.ece_uncalibrated"):
        assert figure in printed
    assert "at the start: reward" in printed
    assert "training, mean of its steps: kl" in printed
    assert [result.objective for result in trained.stages] == ["next_item", "preference"]

    monkeypatch.setattr(train_generator, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(preference, "ranking_examples", lambda *_: pytest.fail("fitted again"))
    again = train_generator.train_generator(inputs_of(recipe, demo_shop, work))
    assert again.stages == trained.stages
    kept = weights(trained.generator)
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.generator.state_dict().items())


def test_a_killed_stage_ends_with_the_same_weights(
    demo_shop: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**PREFERENCE, "epochs": 2, "sync_every": 3}
    recipe = recipe_of(RANKING, stage)
    monkeypatch.setattr(Judge, "__call__", lambda judge, model: float(judge.verdict(model).holdout_reward))
    whole = train_generator.train_generator(inputs_of(recipe, demo_shop, tmp_path / "whole"))

    original = Guard.on_step_end

    def stop_in_the_second_epoch(guard: Guard, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(guard, args, state, control, **kwargs)
        if state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "on_step_end", stop_in_the_second_epoch)
        inputs = inputs_of(recipe, demo_shop, tmp_path / "killed")
        with pytest.raises(KeyboardInterrupt):
            train_generator.train_generator(inputs)
    assert list((tmp_path / "killed").glob("preference-*/checkpoint-*/reference.safetensors"))
    resumed = train_generator.train_generator(inputs_of(recipe, demo_shop, tmp_path / "killed"))
    kept = weights(whole.generator)
    assert all(torch.equal(kept[name], tensor) for name, tensor in resumed.generator.state_dict().items())


def test_without_a_better_checkpoint_the_start_is_kept(
    demo_shop: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall falls while the hold-out reward rises, which also stops the stage."""
    start = train_generator.train_generator(inputs_of(recipe_of(), demo_shop, work))
    verdicts = iter([Verdict(0.5, 0.1, 0.1), *[Verdict(0.4, 0.9, 0.9)] * 3])
    monkeypatch.setattr(Judge, "verdict", lambda *_: next(verdicts))
    console = Console(record=True, width=200, file=StringIO())
    stage = {**PREFERENCE, "epochs": 2, "recall_tolerance": 0.05, "learning_rate": 0.01}
    trained = train_generator.train_generator(inputs_of(recipe_of(RANKING, stage), demo_shop, work, console))
    printed = console.export_text()
    assert "no candidate, as recall fell" in printed
    assert "hold-out reward rises and recall falls" in printed
    assert len(list(verdicts)) == 1
    assert "its weights are kept" in printed
    kept = weights(start.generator)
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained.generator.state_dict().items())


def test_of_checkpoints_that_keep_recall_the_best_by_the_hold_out_model_is_kept(
    demo_shop: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has the best reward in training and the third less recall; the first is what both models like."""
    seen: list[dict[str, torch.Tensor]] = []
    verdicts = iter(
        [
            Verdict(0.5, 0.1, 0.1),
            Verdict(0.5, 0.2, 0.3),
            Verdict(0.5, 0.9, 0.2),
            Verdict(0.4, 0.9, 0.9),
            Verdict(0.5, 0.1, 0.2),
        ]
    )

    def verdict(_: Judge, model: Generator) -> Verdict:
        seen.append(weights(model))
        return next(verdicts)

    monkeypatch.setattr(Judge, "verdict", verdict)
    stage = {**PREFERENCE, "epochs": 3, "recall_tolerance": 0.05, "learning_rate": 0.003}
    trained = train_generator.train_generator(inputs_of(recipe_of(RANKING, stage), demo_shop, work))
    found = trained.generator.state_dict()
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in found.items())
    assert not all(torch.equal(seen[0][name], tensor) for name, tensor in found.items())


def test_half_the_way_is_kept_where_the_whole_of_it_loses_recall(
    demo_shop: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    verdicts = iter([Verdict(0.5, 0.1, 0.1), Verdict(0.4, 0.9, 0.9), Verdict(0.5, 0.3, 0.3)])

    def verdict(_: Judge, model: Generator) -> Verdict:
        seen.append(weights(model))
        return next(verdicts)

    monkeypatch.setattr(Judge, "verdict", verdict)
    stage = {**PREFERENCE, "recall_tolerance": 0.05, "learning_rate": 0.02}
    trained = train_generator.train_generator(inputs_of(recipe_of(RANKING, stage), demo_shop, work))
    start, end, mean = seen
    for name, tensor in trained.generator.state_dict().items():
        assert torch.equal(tensor, mean[name])
        assert torch.equal(tensor, (start[name] + end[name]) / 2 if tensor.is_floating_point() else start[name])


def test_a_judge_weighs_the_reward_of_others_against_recall() -> None:
    judge = cast(Any, Judge.__new__(Judge))
    judge.inputs, judge.worths, judge.tolerance = SimpleNamespace(console=Console(quiet=True)), (None, None), 0.01
    judge.start = Verdict(0.5, 1.0, 2.0)
    for now, expected, parted in (
        (Verdict(0.50, 9.0, 2.5), 0.5, False),
        (Verdict(0.495, 9.0, 1.5), -0.5, False),
        (Verdict(0.48, 9.0, 9.0), DISQUALIFIED, True),
        (Verdict(0.48, 9.0, 1.9), DISQUALIFIED, False),
    ):
        judge.verdict = lambda _, now=now: now
        assert judge(None) == pytest.approx(expected)
        assert judge.parted == parted
    judge.worths = None
    judge.verdict = lambda _: Verdict(0.6, 0.0, 0.0)
    assert judge(None) == pytest.approx(0.1)


def test_a_policy_too_far_from_its_reference_is_judged_and_stopped() -> None:
    objective = SimpleNamespace(last_kl=1.0, sync=lambda _: None)
    model = torch.nn.Linear(1, 1)
    judge = SimpleNamespace(parted=False)
    guard = Guard(cast(Any, objective), cast(Any, judge), cast(Any, model), 0.3, None, Console(quiet=True))
    control, state = TrainerControl(), TrainerState(global_step=1)
    stopped = []
    for _ in range(5):
        guard.on_step_end(None, state, control, model=model)
        stopped.append(control.should_training_stop)
    # 1 - 0.9 ** 4 is above 0.3.
    assert stopped == [False, False, False, True, True]
    assert control.should_evaluate
    assert control.should_save


def test_a_policy_is_rewarded_for_users_that_neither_its_reward_has_learnt_nor_its_judge_asks(
    demo_shop: Path, work: Path
) -> None:
    recipe = recipe_of(RANKING, PREFERENCE)
    inputs = inputs_of(recipe, demo_shop, work)
    shop = inputs.shop
    ranking, stage = recipe.stages[1:]
    assert isinstance(ranking, RankingModelStage)
    assert isinstance(stage, PreferenceStage)
    train, holdout = fit_both(inputs, ranking, ranking_examples(shop, shop.logs))
    assert (train.part, holdout.part) == ("train", "holdout")
    assert not all(torch.equal(a, b) for a, b in zip(train.model.parameters(), holdout.model.parameters(), strict=True))
    generator = train_generator.train_generator(inputs_of(recipe_of(), demo_shop, work)).generator
    run = preference.stage_run(inputs, stage, generator)
    assert isinstance(run.objective, RewardedRollouts)
    learners = run.objective.learners_X.numpy()
    h = shop.histories
    users = np.repeat(np.arange(h.n_users), h.lengths())
    other_half = part_of_users(shop.users["user_id"].to_list())[users]
    assert np.array_equal(learners, other_half & LeaveOneOut(h).trained())
    dpo = stage.model_copy(update={"preference": replace(stage.preference, method="listwise_dpo")})
    inputs = replace(inputs, recipe=recipe.model_copy(update={"stages": [*recipe.stages[:2], dpo]}))
    assert isinstance(preference.stage_run(inputs, dpo, generator).objective, PreferredLists)


COLUMNS = "user_id request_id item_id event timestamp rank_shown query"
# Of the shop below a, b, c are shoes, d and e lamps, and f has no category.
LOG: list[tuple[Any, ...]] = [
    ("u", "0", "b", "exposure", 50, 0, None),
    ("u", "0", "b", "purchase", 60, 0, None),
    ("u", "1", "a", "exposure", 100, 0, "shoe"),
    ("u", "1", "d", "exposure", 100, 1, "shoe"),
    ("u", "1", "f", "exposure", 100, 2, "shoe"),
    ("u", "1", "a", "click", 110, 0, "shoe"),
    ("u", None, "f", "purchase", 150, None, None),
    ("u", "2", "e", "exposure", 200, 0, None),
    ("u", "2", "e", "purchase", 210, 0, None),
    ("u", "3", "d", "exposure", 290, 0, None),
    ("u", "3", "d", "click", 300, 0, None),
    ("u", None, "d", "click", 400, None, None),
]


def logged(folder: Path) -> RequestLog:
    data = folder / "shop"
    data.mkdir()
    categories = [["shoes"], ["shoes"], ["shoes"], ["lamps"], ["lamps"], None]
    items = list("abcdef")
    pl.DataFrame({"item_id": items, "title": items, "categories": categories}).write_parquet(data / "items.parquet")
    pl.DataFrame(LOG, COLUMNS.split(), orient="row").write_parquet(data / "interactions.parquet")
    shop = open_shop(data, folder / "work")
    return RequestLog(shop.histories, ranking_examples(shop, load_prepared(folder / "work" / "logs"), n_drawn=1))


def test_what_came_of_a_request_by_hand(tmp_path: Path) -> None:
    log = logged(tmp_path)
    # Positions: b, a, f, e, d, d.
    assert (log.request_at >= 0).tolist() == [True, True, False, True, True, False]
    items, depths = log.shown(np.array([1, 2]))
    assert [set(row) - {NOTHING} for row in items.tolist()] == [{0, 3, 5}, {5}]
    assert items[:, 0].tolist() == [0, 5]
    taken = [set(row[mask].tolist()) for row, mask in zip(items, log.taken(depths), strict=True)]
    assert taken == [{0}, {5}]
    assert log.purchased(depths).sum(1).tolist() == [0, 1]

    reward = LoggedReward(log, None, RewardWeights(2.0, 0.0, 0.0))
    judged = reward(torch.tensor([1, 2]), torch.tensor([[3, 0, 4], [5, NOTHING, 0]]))
    assert judged.rewards_NG.tolist() == [[0.0, 6.0, 0.0], [8.0, 0.0, 0.0]]
    assert [set(row) - {NOTHING} for row in judged.positives_NP.tolist()] == [{0}, {5}]


def test_the_six_grades_by_hand(tmp_path: Path) -> None:
    log = logged(tmp_path)
    lists = LoggedLists(log, np.array([0, 0, 0, 1, 1, -1]))
    torch.manual_seed(0)
    shown = same = 0
    for _ in range(20):
        items, grades = lists(torch.tensor([1]))
        found = dict(zip(items[0].tolist(), grades[0].tolist(), strict=True))
        found.pop(NOTHING, None)
        # One entry an item: its best grade.
        assert (items[0] != NOTHING).sum() == len(found)
        assert found[0] == BehaviourGrade.CLICKED
        assert found[3] == found[5] == BehaviourGrade.SHOWN
        # b was purchased in another request and is of the category of a; e is not.
        assert found[1] == BehaviourGrade.PURCHASED_ELSEWHERE
        same += found.get(2) == pytest.approx(BehaviourGrade.SAME_CATEGORY)
        shown += found.get(4, BehaviourGrade.RANDOM) == BehaviourGrade.RANDOM
    assert same > 10
    assert shown == 20
    items, grades = lists(torch.tensor([0]))
    assert grades[0, items[0] == 1].tolist() == [BehaviourGrade.PURCHASED_IN_SEARCH]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([PREFERENCE], "put a stage `objective: ranking_model` before it"),
        ([PREFERENCE, RANKING], "put a stage `objective: ranking_model` before it"),
        ([RANKING, {**PREFERENCE, "max_kl": 0}], "max_kl"),
        ([RANKING, {**PREFERENCE, "preference": {"method": "ppo"}}], "method"),
        ([RANKING, {**PREFERENCE, "preference": {"rollouts": 1}}], "rollouts is 1"),
        ([RANKING, {**PREFERENCE, "reward": {"behaviour": 0, "ctr": 0, "relevance": 0}}], "rewards nothing"),
        ([{**RANKING, "training": {"epochs": 0}}], "epochs"),
    ],
)
def test_bad_stages_are_recipe_errors(tmp_path: Path, stages: list[dict[str, Any]], message: str) -> None:
    content = {"embedding": [{"name": "hashing"}], "stages": [{"objective": "next_item"}, *stages]}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content), "utf-8")  # JSON is YAML
    with pytest.raises((RecipeError, ValidationError), match=message):
        load_recipe(path)


def test_lists_and_logged_behaviour_need_no_ranking_model() -> None:
    dpo = {"objective": "preference", "preference": {"method": "listwise_dpo"}}
    behaviour = {"objective": "preference", "reward": {"ctr": 0, "relevance": 0}}
    recipe = recipe_of(dpo, behaviour)
    assert recipe.ranking_model_before(recipe.stages[-1]) is None
