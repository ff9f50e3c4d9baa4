"""The stages that learn from what items are worth: the ranking models, and preference training by them and by logs.

The users fall into two halves (`genretrieval_pipelines.ranking.part_of_users`), each with a ranking model of its own.
The generator is rewarded by the one of the half "train" for requests of the *other* users: what a model says of those
whose behaviour it has learnt is partly what they did. The second model, which nothing is ever learnt from, judges by
requests of the half "train", which the generator was not rewarded for: whether what was rewarded is liked by others
too, or whether the generator has merely found what its reward overrates.

Tensor names carry the shapes of `genretrieval.training.preference_objective`; X is everything that was shown.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from genretrieval.figures import Figure, lines
from genretrieval.histories import NO_QUERY, Histories, LeaveOneOut
from genretrieval.metrics import recall
from genretrieval.model import Generator
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.preference import BehaviourGrade, BehaviourReward, RewardWeights, composite_reward
from genretrieval.training.preference_objective import (
    NOTHING,
    Graded,
    Judged,
    Preference,
    PreferredLists,
    RewardedRollouts,
)
from genretrieval_pipelines.draft import Trained
from genretrieval_pipelines.ranking import (
    FittedRankingModel,
    RankingExamples,
    RankingRunConfig,
    evaluate_ranking_model,
    fit_ranking_model,
    part_of_users,
    ranking_examples,
)
from genretrieval_pipelines.recipe import PreferenceStage, RankingModelStage
from genretrieval_pipelines.stages import (
    JUDGING_DENSE_WEIGHT,
    VALIDATION_BEAMS,
    StageInputs,
    StageRun,
    mean_at_10,
    training_set,
    validate,
)

Rows = NDArray[np.int64]

FORMAT = 2  # raise when a change of this file changes what equal settings train
PURCHASE = "purchase"
DISQUALIFIED = -float("inf")
REFERENCE = "reference.safetensors"

_K = 10
_SAME_CATEGORY, _RANDOM = 4, 4  # entries of a list beside what was shown
_RELEVANCE_TIERS = 3.0
_KL_MEMORY = 0.9  # of the running mean that is held against the bound


def fit_both(
    inputs: StageInputs, stage: RankingModelStage, examples: RankingExamples
) -> tuple[FittedRankingModel, FittedRankingModel]:
    """The ranking models of the halves "train" and "holdout", trained or read back."""
    config, cache = RankingRunConfig(stage.model, stage.training), inputs.work / "ranking"
    given = (inputs.shop, examples, inputs.ids, inputs.content, config, cache)
    return fit_ranking_model(*given, part="train"), fit_ranking_model(*given, part="holdout")


def fit_ranking_stage(inputs: StageInputs, stage: RankingModelStage, folder: Path) -> None:
    """Fit the ranking models and print what they are worth, or print it again if they are there; weights stay.

    Args:
        inputs: of the run.
        stage: settings.
        folder: of this stage, named by all that it depends on.
    """
    stored = folder / "figures.json"
    if not stored.exists():
        examples = ranking_examples(inputs.shop, inputs.shop.logs)
        figures: dict[str, Figure] = {}
        for fitted in fit_both(inputs, stage, examples):
            measured = evaluate_ranking_model(fitted, inputs.shop, examples)
            figures |= {f"{fitted.part}.{name}": figure for name, figure in measured.items()}
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = stored.with_suffix(".partial")
        partial_file.write_text(json.dumps({name: [f.value, f.unit, f.spread] for name, f in figures.items()}), "utf-8")
        os.replace(partial_file, stored)
    for name, (value, unit, spread) in json.loads(stored.read_text("utf-8")).items():
        if name.endswith((".auc", ".gauc", ".ece", ".ece_uncalibrated")):
            [line] = lines({name: Figure(value, unit, tuple(spread) if spread else None)})
            inputs.console.print(f"stage {stage.objective}: {line}", style="dim", highlight=False, markup=False)


class RequestLog:
    """What came of the request that each interaction belongs to.

    Attributes:
        request_at: int64 ``[n]``, over the flat arrays of `Histories`: the request whose own next interaction it is,
            -1 where the log holds none.
    """

    def __init__(self, histories: Histories, examples: RankingExamples) -> None:
        self.histories = histories
        self.examples = examples
        self.first_positive = int(examples.behaviours[0] == "exposure")
        request_X = np.repeat(np.arange(len(examples)), np.diff(examples.offsets))
        positions_X = examples.ends[request_X]
        taken_X = (examples.depths > self.first_positive) & (positions_X < len(histories.items))
        request_X, positions_X = request_X[taken_X], positions_X[taken_X]
        # The interaction that follows a request's history is its own if it is of that user and of what was taken.
        own_X = positions_X < histories.offsets[np.minimum(examples.users[request_X], histories.n_users - 1) + 1]
        own_X &= histories.items[positions_X] == examples.items[taken_X]
        self.request_at = np.full(len(histories.items), -1, np.int64)
        self.request_at[positions_X[own_X]] = request_X[own_X]
        self.users = np.repeat(np.arange(histories.n_users, dtype=np.int64), histories.lengths())

    def shown(self, positions_N: Rows) -> tuple[Rows, NDArray[np.int8]]:
        """What was shown, int64 ``[N, K]`` with `NOTHING` behind its end, and the depth of what came of it.

        An interaction of no logged request stands alone, as one that was taken.
        """
        e, h = self.examples, self.histories
        requests_N = self.request_at[positions_N]
        found_N = requests_N >= 0
        at_NK, real_NK = e.grid(np.where(found_N, requests_N, 0))
        real_NK &= found_N[:, None]
        items_NK = np.where(real_NK, e.items[at_NK], NOTHING).astype(np.int64)
        depths_NK = np.where(real_NK, e.depths[at_NK], 0).astype(np.int8)
        deepest = [
            len(e.behaviours) if h.event_names[event] == PURCHASE else self.first_positive + 1
            for event in h.events[positions_N].tolist()
        ]
        target_N1 = h.items[positions_N].astype(np.int64)[:, None]
        is_target_NK = items_NK == target_N1
        # The target's own event may say more than the depth of its request, or less.
        own_N = np.maximum(np.asarray(deepest), (depths_NK * is_target_NK).max(1, initial=0))
        items_NK = np.concatenate([target_N1, np.where(is_target_NK, NOTHING, items_NK)], 1)
        return items_NK, np.concatenate([own_N[:, None], np.where(is_target_NK, 0, depths_NK)], 1).astype(np.int8)

    def taken(self, depths_NK: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Which items the user did something with."""
        return depths_NK > self.first_positive

    def purchased(self, depths_NK: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Which of them were purchased."""
        if PURCHASE not in self.examples.behaviours:
            return np.zeros_like(depths_NK, bool)
        return depths_NK > self.examples.behaviours.index(PURCHASE)


@dataclass(frozen=True)
class Worth:
    """What a ranking model says of items, as the composite reward weighs it.

    Attributes:
        fitted: the ranking model.
        histories: of the shop.
        weights: of the parts.
    """

    fitted: FittedRankingModel
    histories: Histories
    weights: RewardWeights

    def __call__(
        self, starts_N: Rows, ends_N: Rows, queries: list[str | None], items_NG: Rows, behaviour_NG: Tensor
    ) -> Tensor:
        """`composite_reward`, float32 ``[N, G]``; of `NOTHING` any.

        R_CTR is the calibrated probability of the first outcome. R_Rel is half the relevance, which is a logarithm of
        how much more often an item is shown than by chance, cut to the range of the paper's tiers: what a generator
        writes is shown 6 to 600 times as often on the demo shop, which uncut halves tell apart and whole ones do not.
        """
        items_NG = np.maximum(items_NG, 0)
        relevance_NG, outcomes_NGM = self.fitted.score(self.histories, starts_N, ends_N, queries, items_NG)
        relevance = (torch.from_numpy(relevance_NG) / 2).clamp(0, _RELEVANCE_TIERS)
        return composite_reward(behaviour_NG, torch.from_numpy(outcomes_NGM[..., 0]), relevance, self.weights)


class LoggedReward:
    """Composite reward of rollouts: what the user did with them, and what the ranking model expects.

    Args:
        log: what the user did.
        worth: the ranking model; None where neither CTR nor relevance has a weight.
        weights: of the parts.
    """

    def __init__(self, log: RequestLog, worth: Worth | None, weights: RewardWeights) -> None:
        self.log = log
        self.worth = worth
        self.weights = weights

    def __call__(self, positions: Tensor, items: Tensor) -> Judged:
        """See `genretrieval.training.preference_objective.Reward`."""
        h, log = self.log.histories, self.log
        positions_N, items_NG = positions.cpu().numpy(), items.cpu().numpy()
        shown_NK, depths_NK = log.shown(positions_N)
        value_NK = np.where(log.taken(depths_NK), BehaviourReward.CLICKED.value, BehaviourReward.NONE.value)
        value_NK = np.where(log.purchased(depths_NK), BehaviourReward.PURCHASED.value, value_NK)
        same_NGK = (items_NG[:, :, None] == shown_NK[:, None]) & (shown_NK != NOTHING)[:, None]
        behaviour_NG = torch.from_numpy((same_NGK * value_NK[:, None]).max(-1)).float()
        if self.worth is None:
            rewards_NG = self.weights.behaviour * behaviour_NG
        else:
            starts_N, queries = h.offsets[log.users[positions_N]], _queries(h, positions_N)
            rewards_NG = self.worth(starts_N, positions_N, queries, items_NG, behaviour_NG)
        positives_NK = torch.from_numpy(np.where(log.taken(depths_NK), shown_NK, NOTHING))
        return Judged(rewards_NG.to(items.device), positives_NK.to(items.device))


class LoggedLists:
    """Lists of the six `BehaviourGrade` for list-wise DPO: what was shown, and items drawn beside it.

    An item that comes in twice keeps its highest grade. What the user purchased elsewhere is the newest purchase of
    the target's category in the training part of the history.

    Args:
        log: what was shown and what came of it.
        categories: int64 ``[n_items]``, the category of each item, -1 where it has none.
    """

    def __init__(self, log: RequestLog, categories: Rows) -> None:
        self.log = log
        self.categories = categories
        h = log.histories
        by_category = np.argsort(categories, kind="stable")
        n_categories = int(categories.max(initial=-1)) + 1
        starts = np.searchsorted(categories[by_category], np.arange(n_categories + 1))
        self.members = [by_category[starts[c] : starts[c + 1]] for c in range(n_categories)]
        bought = np.asarray([name == PURCHASE for name in h.event_names] + [False])[h.events]
        self.bought = np.flatnonzero(bought & LeaveOneOut(h).trained())

    def __call__(self, positions: Tensor) -> Graded:
        """See `genretrieval.training.preference_objective.Lists`."""
        log, positions_N = self.log, positions.cpu().numpy()
        shown_NK, depths_NK = log.shown(positions_N)
        grades_NK = np.where(log.taken(depths_NK), BehaviourGrade.CLICKED.value, BehaviourGrade.SHOWN.value)
        grades_NK = np.where(log.purchased(depths_NK), BehaviourGrade.PURCHASED_IN_SEARCH.value, grades_NK)
        target_N = shown_NK[:, 0]
        drawn = [self._beside(position, item) for position, item in zip(positions_N, target_N, strict=True)]
        items_NG = np.concatenate([shown_NK, np.asarray(drawn, np.int64)], 1)
        n_drawn = [1, _SAME_CATEGORY, _RANDOM]
        grades = (BehaviourGrade.PURCHASED_ELSEWHERE, BehaviourGrade.SAME_CATEGORY, BehaviourGrade.RANDOM)
        beside = np.repeat([grade.value for grade in grades], n_drawn)
        grades_NG = np.concatenate([grades_NK, np.broadcast_to(beside, (len(positions_N), len(beside)))], 1)
        better_NGG = (grades_NG[:, None] > grades_NG[..., None]) | (
            (grades_NG[:, None] == grades_NG[..., None]) & np.tri(items_NG.shape[1], k=-1, dtype=bool)
        )
        twice_NG = ((items_NG[:, None] == items_NG[..., None]) & better_NGG).any(-1)
        items_NG = np.where(twice_NG, NOTHING, items_NG)
        device = positions.device
        return Graded(torch.from_numpy(items_NG).to(device), torch.from_numpy(grades_NG).float().to(device))

    def _beside(self, position: int, target: int) -> list[int]:
        """A purchase elsewhere, items of the category, items of the catalogue; `NOTHING` where there is none."""
        h, category = self.log.histories, int(self.categories[target])
        random = torch.randint(len(self.categories), (_RANDOM,)).tolist()
        if category < 0:
            return [NOTHING] * (1 + _SAME_CATEGORY) + random
        user = self.log.users[position]
        first, last = np.searchsorted(self.bought, h.offsets[user : user + 2])
        own = self.bought[first:last]
        own = own[(own != position) & (self.categories[h.items[own]] == category)]
        members = self.members[category]
        same = members[torch.randint(len(members), (_SAME_CATEGORY,)).numpy()].tolist()
        return [int(h.items[own[-1]]) if len(own) else NOTHING, *same, *random]


def _queries(histories: Histories, positions_N: Rows) -> list[str | None]:
    """What was typed at each position."""
    rows = histories.query_rows[positions_N].tolist()
    return [None if row == NO_QUERY else histories.queries[row] for row in rows]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is served on validation cases.

    Attributes:
        recall10: on all of them.
        reward: mean worth of the top 10 by the ranking model that rewards, of cases of the users of "train".
        holdout_reward: of the same by the ranking model of the other half.
    """

    recall10: float
    reward: float
    holdout_reward: float

    def __str__(self) -> str:
        return (
            f"reward {self.reward:.4f}, by the hold-out model {self.holdout_reward:.4f}, "
            f"validation Recall@10 {self.recall10:.4f}"
        )


class Judge:
    """Whether a checkpoint is better than the start: by the hold-out reward, among those that keep their recall.

    Args:
        inputs: of the run.
        worths: by the ranking models of "train" and of "holdout"; None judges by recall alone.
        tolerance: that Recall@10 may fall by.
        start: the model at the start of the stage.

    Attributes:
        parted: whether the last checkpoint had more hold-out reward and less recall than is tolerated, from where on a
            policy learns what its reward overrates.
    """

    def __init__(
        self, inputs: StageInputs, worths: tuple[Worth, Worth] | None, tolerance: float, start: Generator
    ) -> None:
        self.inputs = inputs
        self.worths = worths
        self.tolerance = tolerance
        self.parted = False
        self.start = self.verdict(start)
        _say(inputs.console, f"at the start: {self.start}")

    def __call__(self, model: Generator) -> float:
        """By how much the hold-out reward (or recall) exceeds the start's; minus infinity if recall fell."""
        now = self.verdict(model)
        kept = now.recall10 >= self.start.recall10 - self.tolerance
        self.parted = not kept and now.holdout_reward > self.start.holdout_reward
        _say(self.inputs.console, str(now) + ("" if kept else ": no candidate, as recall fell"))
        if not kept:
            return DISQUALIFIED
        if self.worths is None:
            return now.recall10 - self.start.recall10
        return now.holdout_reward - self.start.holdout_reward

    def verdict(self, model: Generator) -> Verdict:
        """Ask the validation cases."""
        shop, training = self.inputs.shop, model.training
        trained = Trained(model.eval(), JUDGING_DENSE_WEIGHT if model.dense is not None else 0.0)
        cases, answers = validate(self.inputs, trained, VALIDATION_BEAMS)
        model.train(training)
        recall10 = mean_at_10(recall, shop, cases, answers.items)
        if self.worths is None or not len(cases):
            return Verdict(recall10, 0.0, 0.0)
        unrewarded = ~part_of_users(shop.users["user_id"].to_list())[cases.user_rows]
        asked = cases.take(np.flatnonzero(unrewarded))
        items_NG = answers.items[unrewarded, :_K].astype(np.int64)
        nothing = torch.zeros(items_NG.shape)
        rewards = [
            worth(asked.starts, asked.ends, asked.queries, items_NG, nothing) * torch.from_numpy(items_NG != NOTHING)
            for worth in self.worths
        ]
        reward, holdout = (float(values.mean()) for values in rewards)
        return Verdict(recall10, reward, holdout)


class Guard(TrainerCallback):
    """Renews the reference, stops a policy that has left it too far or games its reward, and undoes what was no gain.

    Args:
        objective: what is trained.
        judge: of its checkpoints.
        start: the model at the start of the stage.
        max_kl: bound of the running mean of the divergence, in nats an item; None for none.
        sync_every: steps after which the current weights become the reference; None keeps the start's.
        console: progress.
    """

    def __init__(
        self,
        objective: Preference,
        judge: Judge,
        start: Generator,
        max_kl: float | None,
        sync_every: int | None,
        console: Console,
    ) -> None:
        self.objective = objective
        self.judge = judge
        self.start = {name: tensor.clone() for name, tensor in start.state_dict().items()}
        self.max_kl = max_kl
        self.sync_every = sync_every
        self.console = console
        self.kl = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on with the reference of the checkpoint that training goes on from."""
        stored = Path(args.output_dir) / f"checkpoint-{state.global_step}" / REFERENCE
        if stored.exists():
            self.objective.reference.load_state_dict(load_file(stored))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Renew the reference; stop, with a last judgement, beyond the bound."""
        self.kl = _KL_MEMORY * self.kl + (1 - _KL_MEMORY) * self.objective.last_kl
        if self.sync_every is not None and state.global_step % self.sync_every == 0:
            self.objective.sync(kwargs["model"])
            self.kl = 0.0
        if self.max_kl is not None and self.kl > self.max_kl:
            _say(self.console, f"stopped at step {state.global_step}: {self.kl:.3f} nats an item from the reference")
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say what the steps since the last judgement were like; stop where hold-out reward and recall part ways."""
        if self.judge.parted:
            _say(self.console, f"stopped at step {state.global_step}: hold-out reward rises and recall falls")
            control.should_training_stop = True
        means = [f"{name} {value:.4f}" for name, value in self.objective.report().items()]
        if means:
            _say(self.console, "training, mean of its steps: " + ", ".join(means))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep a reference that is not the start's with the checkpoint."""
        if self.sync_every is not None and state.is_world_process_zero:
            weights = {name: tensor.contiguous() for name, tensor in self.objective.reference.state_dict().items()}
            save_file(weights, Path(args.output_dir) / f"checkpoint-{state.global_step}" / REFERENCE)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the best by the judge: what was trained, its mean with the start, or the start.

        The mean of both forgets less of what the start knew and has much of what was learnt (WiSE-FT, arXiv 2109.01903;
        for rewarded policies WARP, arXiv 2406.16768).
        """
        model: Generator = kwargs["model"]
        gain = DISQUALIFIED if state.best_metric is None else state.best_metric
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: _mean(self.start[name], tensor) for name, tensor in trained.items()})
        of_mean = self.judge(model)
        if max(gain, of_mean) <= 0:
            model.load_state_dict(self.start)
            _say(self.console, "nothing is better than the start without losing recall: its weights are kept")
        elif of_mean > gain:
            _say(self.console, "the mean of the start's weights and the trained ones is best, and kept")
        else:
            model.load_state_dict(trained)


def _mean(a: Tensor, b: Tensor) -> Tensor:
    """Of weights, where `b` is; what is counted stays."""
    return (a.to(b.device) + b) / 2 if a.is_floating_point() else a


def _say(console: Console, text: str) -> None:
    console.print(f"stage preference: {text}", style="dim", highlight=False, markup=False)


def stage_run(inputs: StageInputs, stage: PreferenceStage, model: Generator) -> StageRun:
    """Make preference training ready: data, loss, judge and guard.

    The supervised loss is of all histories, as in `next_item`; preferences are learnt from requests of the users that
    are not of the half "train".

    Args:
        inputs: of the run.
        stage: settings.
        model: at the start of the stage.
    """
    shop, config = inputs.shop, stage.preference
    dataset = training_set(inputs.recipe, shop, inputs.ids, inputs.draft.request_features)
    next_item = NextItemObjective(inputs.index, dataset.trained_items())
    examples = ranking_examples(shop, shop.logs)
    log = RequestLog(shop.histories, examples)
    ranking = inputs.recipe.ranking_model_before(stage)
    worths: tuple[Worth, Worth] | None = None
    if ranking is not None:
        train, holdout = (Worth(m, shop.histories, stage.reward) for m in fit_both(inputs, ranking, examples))
        worths = train, holdout
    rewarded_U = part_of_users(shop.users["user_id"].to_list())
    # Positions behind those of users are of queries that stand alone, which no ranking model was asked about.
    learners = np.zeros(len(dataset.histories.items), bool)
    learners[: len(log.users)] = rewarded_U[log.users] & LeaveOneOut(shop.histories).trained()
    common = (model, next_item, inputs.index, torch.from_numpy(learners), config)
    objective: Preference
    if config.method == "listwise_dpo":
        objective = PreferredLists(*common, LoggedLists(log, item_categories(inputs)))
    else:
        reward = LoggedReward(log, worths[0] if worths else None, stage.reward)
        objective = RewardedRollouts(*common, reward)
    judge = Judge(inputs, worths, stage.recall_tolerance, model)
    guard = Guard(objective, judge, model, stage.max_kl, stage.sync_every, inputs.console)
    return StageRun(objective, dataset, judge, (guard,), "gain over the start")


def item_categories(inputs: StageInputs) -> Rows:
    """The full category path of each item as a number, int64 ``[n_items]``; -1 for items without one."""
    items = inputs.shop.items
    if "categories" not in items.columns:
        return np.full(len(items), -1)
    paths = [None if not path else "\0".join(path) for path in items["categories"].to_list()]
    numbers = {path: number for number, path in enumerate(dict.fromkeys(p for p in paths if p is not None))}
    return np.asarray([-1 if path is None else numbers[path] for path in paths], np.int64)
