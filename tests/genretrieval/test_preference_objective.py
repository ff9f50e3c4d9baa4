"""Preference training as losses of a batch, against exhaustive scoring and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from genretrieval.catalogue import CatalogueIndex, build_index
from genretrieval.errors import RecipeError
from genretrieval.features import RequestFeatures
from genretrieval.model import Generator
from genretrieval.training.data import HistoryDataset, collate, cut_windows
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.preference import ListwiseDPOConfig, TPMAConfig
from genretrieval.training.preference_objective import (
    NOTHING,
    Graded,
    Judged,
    Preference,
    PreferenceConfig,
    PreferredLists,
    RewardedRollouts,
    code_gains,
    encode,
)

ALONE = PreferenceConfig(requests=6, supervised_weight=0.0, kl_weight=0.0)
EVERYWHERE = replace(ALONE, requests=1000)
N_ITEMS = 30


@pytest.fixture
def generator(make_generator: Any) -> Generator:
    made: Generator = make_generator(2, n_gaps=64, n_profile_buckets=16)
    return made


@pytest.fixture(scope="module")
def index(make_ids: Any) -> CatalogueIndex:
    return build_index(make_ids(N_ITEMS))


@pytest.fixture
def batch(make_ids: Any, make_histories: Any) -> dict[str, Tensor]:
    """Windows of all lengths, some of whose targets have a query and some a past."""
    histories = make_histories(20)
    windows = cut_windows(histories.offsets, histories.offsets[1:], 4)
    features = RequestFeatures(events=("click", "purchase"))
    profiles = np.arange(40).reshape(20, 2) % 16
    dataset = HistoryDataset(histories, windows, make_ids(N_ITEMS), features, profiles, max_past=6)
    dataset.query_tokens = [np.array([4, 5]), np.array([6]), np.empty(0, np.int64)]
    return collate([dataset[row] for row in range(len(dataset))])


def everyone(batch: dict[str, Tensor]) -> Tensor:
    return torch.ones(int(batch["target_positions"].max()) + 1, dtype=torch.bool)


def parts(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> tuple[Preference, NextItemObjective]:
    next_item = NextItemObjective(index)
    return Preference(generator, next_item, index, everyone(batch), ALONE), next_item


@torch.no_grad()
def test_a_drawn_target_is_scored_as_in_the_pass_over_its_history(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    preference, next_item = parts(generator, index, batch)
    drawn = batch["learn"].nonzero()
    items = batch["target_items"][batch["learn"]]
    logp = preference.log_probabilities(generator, encode(generator, batch, drawn), items[:, None])
    assert logp.shape == (len(items), 1, 4)
    decoded = next_item.decode(generator, batch)
    states = decoded.states_BTLD[batch["learn"]]
    for level in range(3):
        logits = generator.level_logits(states[:, level], level)
        logits = logits.masked_fill(~next_item.existing_codes(items, level), -math.inf)
        codes = batch["target_codes"][batch["learn"]][:, level, None]
        torch.testing.assert_close(logp[:, 0, level], logits.log_softmax(-1).gather(1, codes)[:, 0])
    # Queries and a past were among what was read.
    assert len(batch["query_rows"])
    assert batch["past_mask"].any()


@torch.no_grad()
def test_the_dense_head_is_a_softmax_over_the_items_that_are_there(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    preference, next_item = parts(generator, index, batch)
    assert generator.dense is not None
    drawn = batch["learn"].nonzero()[:3]
    items = torch.tensor([[1, 2, NOTHING], [3, 4, 5], [6, NOTHING, NOTHING]])
    logp = preference.log_probabilities(generator, encode(generator, batch, drawn), items)
    decoded = next_item.decode(generator, batch)
    for row, (b, t) in enumerate(drawn.tolist()):
        user = generator.dense.user_vectors(decoded.states_BTLD[b, t, 0], decoded.seen_BTE[b, t])
        there = items[row] != NOTHING
        expected = (generator.dense.rank(items[row][there]) @ user).log_softmax(0)
        torch.testing.assert_close(logp[row, there, -1], expected)
    assert (logp[items == NOTHING] == 0).all()


def rewarding(favourite: Tensor) -> Any:
    """1 for the favourite of each position, else 0; the positives are the favourites."""

    def judge(positions: Tensor, items: Tensor) -> Judged:
        return Judged((items == favourite[positions][:, None]).float(), favourite[positions][:, None])

    return judge


def rollouts_of(generator: Generator, preference: RewardedRollouts, batch: dict[str, Tensor], drawn: Tensor) -> Tensor:
    with torch.no_grad():
        items: Tensor = preference.search(generator, encode(generator, batch, drawn)).items_NG
        return items


@pytest.mark.parametrize("method", ["grpo", "tpma"])
def test_a_step_makes_the_rewarded_rollout_likelier(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor], method: Any
) -> None:
    favourite = torch.zeros(len(everyone(batch)), dtype=torch.long)
    config = replace(EVERYWHERE, method=method, rollouts=5, tpma=TPMAConfig(position_weights=(1.0, 1.0, 1.0)))
    objective = RewardedRollouts(
        generator, NextItemObjective(index), index, everyone(batch), config, rewarding(favourite)
    )
    drawn = batch["learn"].nonzero()
    positions = batch["target_positions"][batch["learn"]]
    # Each request favours what stands last among its own rollouts.
    favourite[positions] = rollouts_of(generator, objective, batch, drawn)[:, -1]

    def favoured() -> Tensor:
        with torch.no_grad():
            context = encode(generator, batch, drawn)
            return objective.log_probabilities(generator, context, favourite[positions][:, None])[..., :3].sum()

    before = favoured()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        objective(generator, batch).backward()
        optimizer.step()
    assert favoured() > before + 0.1
    report = objective.report()
    assert report["kl"] > 0
    assert 0 < report["reward"] <= 1
    assert objective.report() == {}


def test_the_gradient_of_grpo_by_hand(generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]) -> None:
    """``-1/(G J) sum_i A_i grad log pi_i``, and the k3 penalty has none where model and reference are one."""
    favourite = torch.zeros(len(everyone(batch)), dtype=torch.long)
    config = replace(ALONE, requests=1, rollouts=4, kl_weight=1.0)
    learners = torch.zeros_like(everyone(batch))
    b, t = batch["learn"].nonzero()[-1].tolist()
    learners[batch["target_positions"][b, t]] = True
    objective = RewardedRollouts(generator, NextItemObjective(index), index, learners, config, rewarding(favourite))
    drawn = torch.tensor([[b, t]])
    items = rollouts_of(generator, objective, batch, drawn)
    favourite[:] = items[0, 1]
    loss = objective(generator, batch)
    # Its value says nothing: minus the mean advantage.
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    found = generator.head.weight.grad
    assert found is not None
    generator.zero_grad()
    # Rewards 0 1 0 0: mean 1/4, deviation sqrt(3)/4.
    deviation = math.sqrt(3) / 4 + 1e-4
    advantages = torch.tensor([-0.25, 0.75, -0.25, -0.25]) / deviation
    logp = objective.log_probabilities(generator, encode(generator, batch, drawn), items)
    torch.autograd.backward(-(advantages[:, None] * logp[0]).sum() / (4 * 4))
    assert generator.head.weight.grad is not None
    torch.testing.assert_close(found, generator.head.weight.grad)


def test_the_value_of_listwise_dpo_by_hand(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    items, grades = torch.tensor([1, 2, 3, NOTHING]), torch.tensor([1.0, 0.5, 0.0, 9.0])

    def lists(positions: Tensor) -> Graded:
        return Graded(items.expand(len(positions), -1), grades.expand(len(positions), -1))

    config = replace(ALONE, method="listwise_dpo", dpo=ListwiseDPOConfig(beta=0.5))
    objective = PreferredLists(generator, NextItemObjective(index), index, everyone(batch), config, lists)
    # Where model and reference are one, both rejected entries have a margin of 0.
    assert float(objective(generator, batch).detach()) == pytest.approx(math.log(3), abs=1e-5)
    with torch.no_grad():
        generator.head.weight.add_(torch.randn_like(generator.head.weight), alpha=0.3)
    torch.manual_seed(5)
    found = float(objective(generator, batch).detach())
    torch.manual_seed(5)
    drawn = objective.draw(batch)
    with torch.no_grad():
        asked = items.expand(len(drawn), -1)
        now = objective.log_probabilities(generator, encode(generator, batch, drawn), asked).sum(-1)
        old = objective.log_probabilities(objective.reference, encode(objective.reference, batch, drawn), asked).sum(-1)
    delta = (now - old).double()
    expected = torch.log1p((0.5 * (delta[:, 1:3] - delta[:, :1])).exp().sum(1)).mean()
    assert found == pytest.approx(float(expected), abs=1e-5)
    assert abs(found - math.log(3)) > 1e-3


def test_only_learners_are_drawn_and_without_one_the_supervised_loss_is_left(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    learners = torch.zeros_like(everyone(batch))
    learners[::3] = True
    next_item = NextItemObjective(index)
    preference = Preference(generator, next_item, index, learners, PreferenceConfig(requests=5))
    drawn = preference.draw(batch)
    positions = batch["target_positions"][drawn[:, 0], drawn[:, 1]]
    assert len(drawn) == 5
    assert (positions % 3 == 0).all()
    assert batch["learn"][drawn[:, 0], drawn[:, 1]].all()
    nobody = Preference(generator, next_item, index, torch.zeros_like(learners), PreferenceConfig(requests=5))
    torch.testing.assert_close(nobody(generator, batch), next_item(generator, batch))
    assert nobody.report() == {}


def test_preferences_are_measured_without_dropout_and_the_reference_can_be_renewed(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    generator.train()
    favourite = torch.zeros(len(everyone(batch)), dtype=torch.long)
    objective = RewardedRollouts(
        generator,
        NextItemObjective(index),
        index,
        everyone(batch),
        replace(ALONE, rollouts=4),
        rewarding(favourite),
    )
    objective(generator, batch)
    assert generator.training
    assert objective.report()["kl"] == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        generator.head.weight.mul_(1.5)
    objective(generator, batch)
    assert objective.report()["kl"] > 1e-3
    objective.sync(generator)
    objective(generator, batch)
    assert objective.report()["kl"] == pytest.approx(0.0, abs=1e-7)
    assert not any(parameter.requires_grad for parameter in objective.reference.parameters())


def test_the_gain_of_a_code_by_hand() -> None:
    """The target is (1, 2); its codes have log-probabilities -1 and -3."""
    codes = torch.tensor([[[1, 2], [1, 0], [0, 2]]])
    logp = torch.tensor([[-1.0, -3.0]])
    found = code_gains(codes, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1, 2]]), logp)
    far = -20.0
    expected = [
        # Right, when one of the other two had it right; right again, when (1, 2) is what the third would write.
        [-3 - (-3 + far) / 2, 0 - (far + 0) / 2],
        # Right like the first; wrong, when both others would have been right.
        [-3 - (-3 + far) / 2, far - 0],
        # Wrong, when both others were right; nothing to be lost after it.
        [far - -3, 0],
    ]
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
    # A rollout that is not there never finds the target.
    found = code_gains(codes, torch.tensor([[True, False, True]]), torch.tensor([[1, 2]]), logp)
    np.testing.assert_allclose(found[0, 0].numpy(), [-3 - far, 0 - (far + 0) / 2], atol=1e-5)


def test_gains_join_the_advantages_of_codes(
    generator: Generator, index: CatalogueIndex, batch: dict[str, Tensor]
) -> None:
    favourite = torch.zeros(len(everyone(batch)), dtype=torch.long)
    losses = []
    for weight in (0.0, 1.0):
        objective = RewardedRollouts(
            generator,
            NextItemObjective(index),
            index,
            everyone(batch),
            replace(EVERYWHERE, rollouts=N_ITEMS, gain_weight=weight),
            rewarding(favourite),
        )
        losses.append(float(objective(generator, batch).detach()))
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceConfig(requests=0), "requests is 0"),
        (lambda: PreferenceConfig(supervised_weight=-1.0), "supervised_weight"),
        (lambda: PreferenceConfig(method=cast(Any, "ppo")), "method is 'ppo'"),
        (lambda: PreferenceConfig(rollouts=1), "rollouts is 1"),
        (lambda: PreferenceConfig(kl_weight=-0.1), "kl_weight"),
        (lambda: PreferenceConfig(gain_weight=math.nan), "gain_weight"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
