from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from genretrieval.errors import RecipeError
from genretrieval.training.preference import (
    STD_FLOOR,
    BehaviourGrade,
    BehaviourReward,
    ListwiseDPOConfig,
    RewardWeights,
    TPMAConfig,
    composite_reward,
    default_position_weights,
    group_advantages,
    information_gain,
    k3_kl,
    listwise_dpo,
    marginal_rewards,
    policy_gradient_loss,
    position_rewards,
    prefix_gates,
    rank_penalty,
    shape_gain,
    tpma_advantages,
)

seeds = st.integers(0, 2**31)


def slope(loss: Tensor, of: Tensor) -> Tensor:
    (made,) = torch.autograd.grad(loss, of, retain_graph=True)
    return made


def moves(loss: Tensor, of: Tensor) -> bool:
    """Whether any gradient flows."""
    made: list[Tensor | None] = list(torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True))
    return made[0] is not None


def test_grades_are_numbers() -> None:
    assert torch.tensor(list(BehaviourGrade)).tolist() == pytest.approx([2, 1.5, 1, 0.5, 0.2, 0])
    assert torch.tensor(list(BehaviourReward)).tolist() == [4, 3, 0]


# Two lists. Chosen is entry 1 of the first, with a delta of 0.5 against -0.5 of both others; the last is padding.
POLICY = [[-2.0, -1.0, -3.0, math.nan], [-1.0, -4.0, -2.0, -2.0]]
REFERENCE = [[-1.5, -1.5, -2.5, math.nan], [-1.0, -1.0, -3.0, -2.0]]
REWARDS = [[1.0, 2.0, 0.5, 9.0], [0.2, 0.5, 0.0, 0.5]]
MASK = [[True, True, True, False], [True, True, True, True]]


def lists(rows: slice = slice(0, 2)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy = torch.tensor(POLICY[rows], requires_grad=True)
    return policy, torch.tensor(REFERENCE[rows]), torch.tensor(REWARDS[rows]), torch.tensor(MASK[rows])


def test_listwise_dpo_by_hand() -> None:
    # Before beta, list 1 has margins of -1. In list 2 entry 1 is chosen, the first of two that tie; its delta is -3,
    # the others' are 0 and 1, so margins are 3 and 4; the one that ties takes no part.
    first = math.log(1 + 2 * math.exp(-0.5))
    second = math.log(1 + math.exp(1.5) + math.exp(2))
    config = ListwiseDPOConfig(beta=0.5)
    assert listwise_dpo(*lists(slice(0, 1)), config).item() == pytest.approx(first)
    assert listwise_dpo(*lists(slice(1, 2)), config).item() == pytest.approx(second)
    assert listwise_dpo(*lists(), config).item() == pytest.approx((first + second) / 2)


def test_listwise_dpo_slopes_by_hand() -> None:
    policy, reference, rewards, mask = lists()
    reference.requires_grad_()
    loss = listwise_dpo(policy, reference, rewards, mask, ListwiseDPOConfig(beta=0.5))
    assert not moves(loss, reference)
    made = slope(loss, policy)
    # beta times each rejected entry's share in the sum, over two lists; the chosen has minus their total.
    share = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    assert made[0].tolist() == pytest.approx([share / 4, -share / 2, share / 4, 0])
    total = 1 + math.exp(1.5) + math.exp(2)
    near, far = math.exp(1.5) / total / 4, math.exp(2) / total / 4
    assert made[1].tolist() == pytest.approx([near, -near - far, far, 0])


def test_listwise_dpo_weights_by_hand() -> None:
    # Gaps of 1 and 1.5 in the first list; in the second, whose best reward is below 1, of 0.8 and 1.
    config = ListwiseDPOConfig(beta=0.5, gap_power=1.5)
    first = math.log(1 + math.exp(-0.5 * 2) + math.exp(-0.5 * (1.5**-1.5 + 1)))
    second = math.log(1 + math.exp(0.5 * 3 * (0.8**-1.5 + 1)) + math.exp(0.5 * 4 * 2))
    policy, reference, rewards, mask = lists()
    loss = listwise_dpo(policy, reference, rewards, mask, config)
    assert loss.item() == pytest.approx((first + second) / 2)
    # Each rejected entry's share times w_k beta; the gap of the chosen to itself, 0, is raised to no power.
    shares = [math.exp(-1) / math.exp(first), math.exp(-0.5 * (1.5**-1.5 + 1)) / math.exp(first)]
    expected = [shares[0] * 2 / 4, shares[1] * (1.5**-1.5 + 1) / 4]
    made = slope(loss, policy)[0].tolist()
    assert made == pytest.approx([expected[0], -sum(expected), expected[1], 0])


def test_listwise_dpo_added_terms_by_hand() -> None:
    plain = listwise_dpo(*lists(), ListwiseDPOConfig()).item()
    # The chosen have log-probabilities of -1 and -4; only the second is below its reference, by 3.
    made = listwise_dpo(*lists(), ListwiseDPOConfig(sft_weight=0.1, hinge_weight=0.2)).item()
    assert made == pytest.approx(plain + (0.1 * 1 + 0.1 * 4 + 0.2 * 3) / 2)


def test_lists_without_a_rejected_entry_contribute_nothing() -> None:
    policy, reference, rewards, mask = lists()
    rewards[1] = 0.5
    config = ListwiseDPOConfig(gap_power=1.5, sft_weight=1, hinge_weight=1)
    loss = listwise_dpo(policy, reference, rewards, mask, config)
    assert loss.item() == pytest.approx(listwise_dpo(*lists(slice(0, 1)), config).item())
    assert slope(loss, policy)[1].tolist() == [0, 0, 0, 0]
    nothing = listwise_dpo(policy, reference, rewards, torch.zeros_like(mask), config)
    assert nothing.item() == 0
    assert slope(nothing, policy).tolist() == [[0, 0, 0, 0]] * 2


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_listwise_dpo_of_pairs_is_dpo(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 5, 2, generator=generator)
    rewards = torch.tensor([1.0, 0.0]).expand(5, 2)
    delta = policy - reference
    expected = -logsigmoid(0.3 * (delta[:, 0] - delta[:, 1])).mean()
    made = listwise_dpo(policy, reference, rewards, torch.ones(5, 2, dtype=torch.bool), ListwiseDPOConfig(beta=0.3))
    assert made.item() == pytest.approx(expected.item(), rel=1e-5)


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_listwise_dpo_falls_as_the_chosen_rises_whatever_the_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 3, 6, generator=generator)
    grades = torch.tensor(list(BehaviourGrade))
    rewards = torch.stack([grades[torch.randperm(6, generator=generator)] for _ in range(3)])
    mask = torch.rand(3, 6, generator=generator) < 0.8
    config = ListwiseDPOConfig(gap_power=1.5)
    loss = listwise_dpo(policy, reference, rewards, mask, config)
    order = torch.randperm(6, generator=generator)
    shuffled = listwise_dpo(policy[:, order], reference[:, order], rewards[:, order], mask[:, order], config)
    assert loss.item() == pytest.approx(shuffled.item(), rel=1e-5, abs=1e-6)
    chosen = rewards.masked_fill(~mask, -1).argmax(1, keepdim=True)
    better = listwise_dpo(policy.scatter_add(1, chosen, torch.ones(3, 1)), reference, rewards, mask, config)
    assert (better < loss) == (mask.sum(1) > 1).any()


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    made = group_advantages(rewards)
    unit = 0.5 / (0.5 + STD_FLOOR)
    assert made[0].tolist() == pytest.approx([unit, -unit, -unit, unit])
    # Mean 3/4; variance (9/4 squared + 3 * 9/16) / 4 = 27/16.
    std = math.sqrt(27 / 16) + STD_FLOOR
    assert made[1].tolist() == pytest.approx([2.25 / std] + [-0.75 / std] * 3)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_group_of_equal_rewards_gives_exact_zeros(value: float, size: int) -> None:
    assert group_advantages(torch.full((2, size), value)).tolist() == [[0.0] * size] * 2


def test_rollouts_that_do_not_exist_take_no_part() -> None:
    rewards = torch.tensor([[1.0, math.nan, 0.0, 99.0], [math.inf, 5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])
    unit = 0.5 / (0.5 + STD_FLOOR)
    assert group_advantages(rewards, mask)[0].tolist() == pytest.approx([unit, 0, -unit, 0])
    assert group_advantages(rewards, mask)[1].tolist() == [0, 0, 0, 0]


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_advantages_have_mean_zero_and_no_unit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 8, generator=generator)
    made = group_advantages(rewards)
    assert made.sum(1).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert made.std(1, correction=0).tolist() == pytest.approx([1] * 3, rel=1e-3)
    assert torch.allclose(group_advantages(7 * rewards + 2), made, atol=1e-3)


# Positives (1, 2, 3) and (1, 5, 6); the third stands for none.
POSITIVES = torch.tensor([[[1, 2, 3], [1, 5, 6], [4, 2, 3]]])
POSITIVES_MASK = torch.tensor([[True, True, False]])
ROLLOUTS = torch.tensor([[[1, 2, 3], [1, 5, 3], [1, 9, 6], [4, 2, 3]]])
WEIGHTS = torch.tensor([4.0, 2.0, 1.0])


def test_position_rewards_by_hand() -> None:
    made = position_rewards(ROLLOUTS, POSITIVES, POSITIVES_MASK, WEIGHTS)
    assert made.tolist() == [[[4, 6, 7], [4, 6, 6], [4, 4, 4], [0, 0, 0]]]
    assert marginal_rewards(made).tolist() == [[[4, 2, 1], [4, 2, 0], [4, 0, 0], [0, 0, 0]]]
    # By position: (1, 5, 3) has 5 with one positive, 6 with the other; (1, 9, 6) and (4, 2, 3) match after an error.
    made = position_rewards(ROLLOUTS, POSITIVES, POSITIVES_MASK, WEIGHTS, prefix_only=False)
    assert made.tolist() == [[[4, 6, 7], [4, 6, 6], [4, 4, 5], [0, 2, 3]]]


def test_prefix_gates_by_hand() -> None:
    made = prefix_gates(ROLLOUTS, POSITIVES, POSITIVES_MASK)
    assert made.tolist() == [[[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 0, 0]]]
    made = prefix_gates(ROLLOUTS, POSITIVES, POSITIVES_MASK, prefix_only=False)
    assert made.tolist() == [[[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 0, 0.5]]]
    assert prefix_gates(ROLLOUTS[..., :1], POSITIVES[..., :1], POSITIVES_MASK).tolist() == [[[1]] * 4]


def test_a_request_without_positives_has_no_reward() -> None:
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert not position_rewards(ROLLOUTS, POSITIVES, nobody, WEIGHTS).any()
    assert prefix_gates(ROLLOUTS, POSITIVES, nobody).tolist() == [[[1, 0, 0]] * 4]


@given(seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_position_rewards_and_gates_are_those_of_slow_loops(seed: int, prefix_only: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rollouts = torch.randint(3, (2, 4, 5), generator=generator)
    positives = torch.randint(3, (2, 3, 5), generator=generator)
    mask = torch.rand(2, 3, generator=generator) < 0.7
    weights = torch.randint(4, (5,), generator=generator).float()
    rewards = position_rewards(rollouts, positives, mask, weights, prefix_only=prefix_only)
    gates = prefix_gates(rollouts, positives, mask, prefix_only=prefix_only)
    for b in range(2):
        known = [positives[b, p].tolist() for p in range(3) if mask[b, p]]
        for g, codes in enumerate(rollouts[b].tolist()):
            for level in range(5):
                sums, counts = [0.0], [0]
                for positive in known:
                    matched = [
                        codes[: j + 1] == positive[: j + 1] if prefix_only else codes[j] == positive[j]
                        for j in range(5)
                    ]
                    sums.append(sum(weights[j].item() for j in range(level + 1) if matched[j]))
                    counts.append(sum(matched[:level]))
                assert rewards[b, g, level].item() == max(sums)
                assert gates[b, g, level].item() == pytest.approx(max(counts) / level if level else 1)


def test_default_position_weights() -> None:
    expected = [(2,), (2, 0), (2, 2, 0), (2, 2, 1, 0), (2, 2, 1, 1, 0)]
    assert [default_position_weights(n) for n in range(1, 6)] == expected


def unit(*values: float) -> list[float]:
    """The group's advantages, in float64."""
    return group_advantages(torch.tensor(values, dtype=torch.float64)).tolist()


def test_tpma_advantages_by_hand() -> None:
    item_rewards = torch.tensor([[7.0, 0.0, 3.0, 0.0]])
    config = TPMAConfig(item_weight=0.5, position_weights=(4.0, 2.0, 1.0))
    made = tpma_advantages(ROLLOUTS, POSITIVES, POSITIVES_MASK, item_rewards, config)
    items = unit(7, 0, 3, 0)
    for level, added in enumerate([(4, 4, 4, 0), (2, 2, 0, 0), (1, 0, 0, 0)]):
        expected = [position + 0.5 * item for position, item in zip(unit(*added), items, strict=True)]
        assert made[0, :, level].tolist() == pytest.approx(expected, rel=1e-5)


def test_tpma_advantages_take_the_papers_weights() -> None:
    item_rewards = torch.zeros(1, 4)
    made = tpma_advantages(ROLLOUTS, POSITIVES, POSITIVES_MASK, item_rewards, TPMAConfig())
    assert made[0, :, 1].tolist() == pytest.approx(unit(2, 2, 0, 0), rel=1e-5)
    assert made[0, :, 2].tolist() == [0, 0, 0, 0]
    by_position = tpma_advantages(ROLLOUTS, POSITIVES, POSITIVES_MASK, item_rewards, TPMAConfig(prefix_only=False))
    assert by_position[0, :, 1].tolist() == pytest.approx(unit(2, 2, 0, 2), rel=1e-5)


def test_tpma_advantages_of_rollouts_that_exist() -> None:
    item_rewards = torch.tensor([[7.0, 0.0, 3.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    made = tpma_advantages(ROLLOUTS, POSITIVES, POSITIVES_MASK, item_rewards, TPMAConfig(), mask)
    shorter = tpma_advantages(ROLLOUTS[:, :3], POSITIVES, POSITIVES_MASK, item_rewards[:, :3], TPMAConfig())
    assert torch.equal(made[:, :3], shorter)
    assert made[0, 3].tolist() == [0, 0, 0]


def test_policy_gradient_by_hand() -> None:
    # Ratios of 2 and 1/2; a gate of 1/4 on the second code.
    logp = torch.tensor([[[math.log(0.4), math.log(0.1)]]], requires_grad=True)
    old = torch.tensor([[[math.log(0.2), math.log(0.2)]]], requires_grad=True)
    advantages = torch.tensor([[[3.0, -1.0]]], requires_grad=True)
    loss = policy_gradient_loss(logp, old, advantages, torch.tensor([[[1.0, 0.25]]]))
    assert loss.item() == pytest.approx(-(2 * 3 - 0.5 / 4) / 2)
    assert slope(loss, logp).flatten().tolist() == pytest.approx([-3, 0.0625])
    assert not moves(loss, old)
    assert not moves(loss, advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "by_logp"),
    [
        # Inside the clip; above and below it. PPO stops what already went too far in the wanted direction.
        (1.1, 1.0, 1.1, 1.1),
        (1.5, 1.0, 1.2, 0.0),
        (0.5, 1.0, 0.5, 0.5),
        (0.5, -1.0, -0.8, 0.0),
        (1.5, -1.0, -1.5, -1.5),
    ],
)
def test_clip_by_hand(ratio: float, advantage: float, value: float, by_logp: float) -> None:
    logp = torch.full((1, 1, 1), math.log(0.1 * ratio), requires_grad=True)
    old, advantages = torch.full((1, 1, 1), math.log(0.1)), torch.full((1, 1, 1), advantage)
    loss = policy_gradient_loss(logp, old, advantages, clip=0.2)
    assert loss.item() == pytest.approx(-value)
    assert slope(loss, logp).item() == pytest.approx(-by_logp)
    # ECPO bounds the ratio at 1.3 where the advantage is negative, and changes nothing else.
    early = policy_gradient_loss(logp, old, advantages, clip=0.2, ecpo_delta=0.1)
    bounded = (ratio, advantage) == (1.5, -1.0)
    assert early.item() == pytest.approx(1.3 if bounded else -value)
    assert slope(early, logp).item() == pytest.approx(1.3 if bounded else -by_logp)


@pytest.mark.parametrize(("clip", "ecpo_delta"), [(None, None), (0.2, None), (0.2, 0.1)])
def test_the_first_step_is_reinforce(clip: float | None, ecpo_delta: float | None) -> None:
    logp = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(1))
    loss = policy_gradient_loss(logp, logp, advantages, clip=clip, ecpo_delta=ecpo_delta)
    assert torch.allclose(slope(loss, logp), -advantages.expand(2, 3, 4) / 24)


def test_policy_gradient_of_rollouts_that_exist() -> None:
    logp = torch.tensor([[[-1.0, -2.0], [math.nan, -math.inf]]], requires_grad=True)
    advantages = torch.tensor([[[1.0, 2.0], [math.nan, math.inf]]])
    gates = torch.tensor([[[1.0, 1.0], [math.nan, 1.0]]])
    mask = torch.tensor([[True, False]])
    loss = policy_gradient_loss(logp, logp.detach(), advantages, gates, mask, clip=0.2, ecpo_delta=0.1)
    assert loss.item() == pytest.approx(-1.5)
    assert slope(loss, logp).tolist() == [[[-0.5, -1], [0, 0]]]
    assert policy_gradient_loss(logp, logp, advantages, gates, torch.zeros_like(mask)).item() == 0


def test_k3_by_hand() -> None:
    logp = torch.tensor([math.log(0.5), math.log(0.25)], requires_grad=True)
    reference = torch.tensor([math.log(0.25), math.log(0.25)], requires_grad=True)
    made = k3_kl(logp, reference)
    assert made.tolist() == pytest.approx([0.5 + math.log(2) - 1, 0])
    assert slope(made.sum(), logp).tolist() == pytest.approx([1 - 0.5, 0])
    assert not moves(made.sum(), reference)


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_k3_is_not_negative_and_its_mean_is_the_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp, reference = torch.randn(2, 6, generator=generator).log_softmax(1)
    made = k3_kl(logp, reference)
    assert (made >= 0).all()
    # Close models, where rounding is all there is.
    assert (k3_kl(logp, logp + 1e-6 * reference) >= 0).all()
    p = logp.exp()
    assert (p * made).sum().item() == pytest.approx((p * (logp - reference)).sum().item(), rel=1e-4, abs=1e-6)


def test_composite_reward_by_hand() -> None:
    behaviour = torch.tensor([BehaviourReward.PURCHASED, BehaviourReward.CLICKED, BehaviourReward.NONE])
    ctr, relevance = torch.tensor([0.25, 1.7, -0.1]), torch.tensor([3.0, 2.0, 0.0])
    assert composite_reward(behaviour, ctr, relevance, RewardWeights()).tolist() == [7.25, 6, 0]
    assert composite_reward(behaviour, ctr, relevance, RewardWeights(0.5, 2, 0)).tolist() == [2.5, 3.5, 0]


def test_rank_penalty_by_hand() -> None:
    hits = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
    # 1, 0.630930 and 0.5, of a sum of 2.130930.
    made = rank_penalty(hits)
    assert made[0].tolist() == pytest.approx([-1 / 2.130930, 1, -0.5 / 2.130930], rel=1e-5)
    assert made[1].tolist() == [0, 0, 0]
    assert made[2].tolist() == pytest.approx([1, -0.630930 / 2.130930, 1], rel=1e-5)


def test_information_gain_by_hand() -> None:
    reached = torch.tensor([[[-3.0, -1.0, -math.inf]]], requires_grad=True)
    instead = torch.tensor([[[[-4.0, -2.0], [-5.0, -math.inf], [-math.inf, -math.inf]]]])
    made = information_gain(reached, instead)
    assert made.tolist() == [[[0, 11.5, 0]]]
    assert information_gain(reached, instead, floor=-9).tolist() == [[[0, 6, 0]]]
    assert not made.requires_grad


def test_shape_gain_by_hand() -> None:
    gain = torch.tensor([0.09, -0.09, 0.1, -0.4, 2.0, -99.0, math.inf])
    made = shape_gain(gain, dead_zone=0.1, negative_scale=0.5, clip=2.0)
    small, loss, large = 2 * math.tanh(0.05), -2 * math.tanh(0.1), 2 * math.tanh(1)
    assert made.tolist() == pytest.approx([0, 0, small, loss, large, -2, 2])
    # A scale of 0 leaves no losses.
    assert shape_gain(gain, 0, 0, 2.0).min().item() == 0


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=8), st.floats(0, 2), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_shaping_keeps_the_order(gains: list[float], dead_zone: float, negative_scale: float) -> None:
    made = shape_gain(torch.tensor(sorted(gains)), dead_zone, negative_scale, 3.0)
    assert (made.diff() >= 0).all()
    assert (made.abs() <= 3).all()


BAD: dict[str, Callable[[], object]] = {
    "beta is 0": lambda: ListwiseDPOConfig(beta=0),
    "gap_power is -1": lambda: ListwiseDPOConfig(gap_power=-1),
    "sft_weight is -1": lambda: ListwiseDPOConfig(sft_weight=-1),
    "hinge_weight is nan": lambda: ListwiseDPOConfig(hinge_weight=math.nan),
    "item_weight is -1": lambda: TPMAConfig(item_weight=-1),
    "position_weights is -1": lambda: TPMAConfig(position_weights=(2, -1)),
    r"position_weights are \[0, 0\]": lambda: TPMAConfig(position_weights=(0, 0)),
    "position_weights has 2 numbers, and semantic IDs 3 levels": lambda: tpma_advantages(
        ROLLOUTS, POSITIVES, POSITIVES_MASK, torch.zeros(1, 4), TPMAConfig(position_weights=(2, 1))
    ),
    "clip is 1": lambda: policy_gradient_loss(*[torch.zeros(1, 1, 1)] * 3, clip=1),
    "ecpo_delta is -1": lambda: policy_gradient_loss(*[torch.zeros(1, 1, 1)] * 3, clip=0.2, ecpo_delta=-1),
    "ecpo_delta is 0.1 without clip": lambda: policy_gradient_loss(*[torch.zeros(1, 1, 1)] * 3, ecpo_delta=0.1),
    "ctr is -1": lambda: RewardWeights(ctr=-1),
    "rewards nothing": lambda: RewardWeights(0, 0, 0),
    "floor is 0": lambda: information_gain(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 2), floor=0),
    "dead_zone is -1": lambda: shape_gain(torch.zeros(1), -1, 1, 1),
    "negative_scale is 2": lambda: shape_gain(torch.zeros(1), 0, 2, 1),
    "clip is 0": lambda: shape_gain(torch.zeros(1), 0, 1, 0),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_out_of_range(message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BAD[message]()
