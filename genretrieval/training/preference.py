"""Learning from preferences and rewards: list-wise DPO, GRPO and its token-position form, rewards, as pure functions.

Tensor names carry their shape: B requests, K entries of a request's list, G rollouts (a group: the semantic IDs the
model wrote for one request), L levels, P positives (the IDs that were clicked or purchased). Numbers are float32 (or
float64), codes int64, masks bool and True where there is something.

A log-probability of an item is the sum over its codes; that of a code is taken among the codes that exist under its
prefix, as in `NextItemObjective`. What is a reward or an advantage is a constant: gradients flow into the policy's
log-probabilities alone.

Settings out of range raise `RecipeError`; tensors that do not belong together are faults of ours and fail an `assert`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

from genretrieval.errors import RecipeError
from genretrieval.training.distillation import check_positive, check_weight

# Added to a group's standard deviation. Rewards differ by tenths; what differs by less than this is rounding.
STD_FLOOR = 1e-4


class BehaviourGrade(float, Enum):
    """How much an item of a request is worth for list-wise training: the six grades of PARS.

    OneSearch (arXiv 2509.03236). A member is its number: ``torch.tensor([BehaviourGrade.CLICKED])`` works.
    """

    PURCHASED_IN_SEARCH = 2.0
    """Purchased from this request's results."""
    PURCHASED_ELSEWHERE = 1.5
    """Of the category asked for, purchased by the user in another place."""
    CLICKED = 1.0
    """Clicked in this request's results."""
    SHOWN = 0.5
    """Shown (an exposure) and not clicked."""
    SAME_CATEGORY = 0.2
    """Of the category asked for, not shown."""
    RANDOM = 0.0
    """Drawn from the whole catalogue."""


@dataclass(frozen=True, slots=True)
class ListwiseDPOConfig:
    """Settings of `listwise_dpo`.

    Attributes:
        beta: how far the policy may leave the reference for a preference; lower lets it go further. 0.1 is OneBar's.
        gap_power: alpha of ``w_k = (max(r_chosen, 1) - r_k)^(-alpha) + 1``, above 0 (1.5 in OneSearch's repository):
            an entry counts for more the nearer its reward is to that of the chosen. None weighs all by 1. With rewards
            that may nearly tie, the weights have no bound; the six grades keep them below 4.
        sft_weight: of ``-log pi(chosen)``, 0 or more.
        hinge_weight: of ``relu(log pi_ref(chosen) - log pi(chosen))``, 0 or more: it holds the chosen at what the
            reference gave it, which DPO alone lets decay.

    Raises:
        RecipeError: a value is out of range.
    """

    beta: float = 0.1
    gap_power: float | None = None
    sft_weight: float = 0.0
    hinge_weight: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.gap_power is not None:
            check_positive("gap_power", self.gap_power)
        check_weight("sft_weight", self.sft_weight)
        check_weight("hinge_weight", self.hinge_weight)


def listwise_dpo(
    policy_logp_BK: Tensor, reference_logp_BK: Tensor, rewards_BK: Tensor, mask_BK: Tensor, config: ListwiseDPOConfig
) -> Tensor:
    """List-wise (softmax) DPO: the best entry of each list against all that are worse.

    ``L = -log sigma( -log sum_{k in rejected} exp( w_k beta (Delta_k - Delta_chosen) ) )``, ``Delta = log pi - log
    pi_ref``; the form of S-DPO (arXiv 2406.09215), the weights of OneSearch (arXiv 2509.03236). It is ``log(1 + sum
    exp(...))``, which falls as ``Delta_chosen`` rises. With one rejected entry and no weights it is DPO.

    The chosen is the entry of highest reward (of equal ones the first); the rejected are those of strictly lower
    reward, so that entries that tie with the chosen take no part. The mean is over lists with a rejected entry, the
    two added terms included; other lists contribute nothing, and 0 is returned if there are no others.

    Args:
        policy_logp_BK: log-probabilities of the items by the model in training, float ``[B, K]``.
        reference_logp_BK: the same by the frozen model; no gradient flows into them.
        rewards_BK: float ``[B, K]``, for example `BehaviourGrade`.
        mask_BK: bool ``[B, K]``; what stands at masked entries is never read.
        config: settings.

    Returns:
        Float scalar, 0 or more.
    """
    assert policy_logp_BK.shape == reference_logp_BK.shape == rewards_BK.shape == mask_BK.shape
    policy_BK = policy_logp_BK.masked_fill(~mask_BK, 0)
    reference_BK = reference_logp_BK.detach().masked_fill(~mask_BK, 0)
    rewards_BK = rewards_BK.detach().masked_fill(~mask_BK, -math.inf)
    chosen_B1 = rewards_BK.argmax(1, keepdim=True)
    best_B1 = rewards_BK.gather(1, chosen_B1)
    rejected_BK = mask_BK & (rewards_BK < best_B1)

    delta_BK = policy_BK - reference_BK
    margin_BK = config.beta * (delta_BK - delta_BK.gather(1, chosen_B1))
    if config.gap_power is not None:
        gap_BK = (best_B1.clamp(min=1) - rewards_BK).where(rejected_BK, 1)
        margin_BK = margin_BK * (gap_BK**-config.gap_power + 1)
    # A 0 beside the margins is the 1 of log(1 + sum exp).
    loss_B = pad(margin_BK.masked_fill(~rejected_BK, -math.inf), (1, 0)).logsumexp(1)

    policy_B, reference_B = (logp_BK.gather(1, chosen_B1)[:, 0] for logp_BK in (policy_BK, reference_BK))
    loss_B = loss_B - config.sft_weight * policy_B + config.hinge_weight * (reference_B - policy_B).relu()
    usable_B = rejected_BK.any(1)
    return (loss_B * usable_B).sum() / usable_B.sum().clamp(min=1)


def group_advantages(rewards_BG: Tensor, mask_BG: Tensor | None = None) -> Tensor:
    """GRPO's advantage (arXiv 2402.03300): ``(r - mean) / (std + 1e-4)`` over each group.

    The standard deviation is the population's (divided by the count), so that a group of one has an advantage of 0.
    A group of equal rewards gives exact zeros.

    Args:
        rewards_BG: float ``[..., G]``; the last dimension is the group.
        mask_BG: bool of the same shape: rollouts that exist. A beam may return fewer than asked for. Others neither
            count in the mean nor get an advantage, and what stands there is never read.

    Returns:
        Float of the same shape, without gradient.
    """
    mask_BG = torch.ones_like(rewards_BG, dtype=torch.bool) if mask_BG is None else mask_BG
    assert mask_BG.shape == rewards_BG.shape
    count_B1 = mask_BG.sum(-1, keepdim=True).clamp(min=1)
    rewards_BG = rewards_BG.detach()
    # From the best down: equal rewards become 0, whose mean has no rounding error to divide by a tiny deviation.
    best_B1 = rewards_BG.masked_fill(~mask_BG, -math.inf).amax(-1, keepdim=True)
    shifted_BG = (rewards_BG - best_B1).masked_fill(~mask_BG, 0)
    centred_BG = (shifted_BG - shifted_BG.sum(-1, keepdim=True) / count_B1).masked_fill(~mask_BG, 0)
    std_B1 = ((centred_BG**2).sum(-1, keepdim=True) / count_B1).sqrt()
    return centred_BG / (std_B1 + STD_FLOOR)


@dataclass(frozen=True, slots=True)
class TPMAConfig:
    """Settings of `tpma_advantages`.

    Attributes:
        item_weight: w_item, of the item reward's advantage beside that of the positions; 0 or more. The paper does not
            give its value.
        position_weights: one a level, 0 or more and one above 0; None takes `default_position_weights`.
        prefix_only: whether a code matches only if all before it do; see `position_rewards`.

    Raises:
        RecipeError: a value is out of range.
    """

    item_weight: float = 1.0
    position_weights: tuple[float, ...] | None = None
    prefix_only: bool = True

    def __post_init__(self) -> None:
        check_weight("item_weight", self.item_weight)
        if self.position_weights is not None:
            for weight in self.position_weights:
                check_weight("position_weights", weight)
            if not any(self.position_weights):
                raise RecipeError(
                    f"position_weights are {list(self.position_weights)}; give one level or more a weight"
                )


def default_position_weights(n_levels: int) -> tuple[float, ...]:
    """OneSearch-V2's position weights: 2 for the first two levels, 1 for those after, 0 for the last.

    The paper has five levels, ``(2, 2, 1, 1, 0)``, the last of which is the second of two parallel sub-codes. The rule
    is kept as it stands for other counts: ``(2, 2, 1, 0)``, ``(2, 2, 0)``, ``(2, 0)``; a single level has 2, as nothing
    would be learnt from 0. `tpma_advantages` normalises each position over its group, which cancels the size of a
    weight where matches are of prefixes: only which levels have 0 matters then, and such a level is taught by the item
    reward alone. Where the last level tells items apart, try a weight above 0 for it.

    Args:
        n_levels: L, 1 or more.

    Returns:
        L numbers.
    """
    assert n_levels >= 1
    weights = [2.0 if level < 2 else 1.0 for level in range(n_levels)]
    return (*weights[:-1], 0.0) if n_levels > 1 else (2.0,)


def position_rewards(
    rollouts_BGL: Tensor,
    positives_BPL: Tensor,
    positives_mask_BP: Tensor,
    weights_L: Tensor,
    *,
    prefix_only: bool = True,
) -> Tensor:
    """TPMA's reward up to each position: ``R_{i,l} = max_p sum_{j<=l} w_j 1[o_{i,j} = p_j]``.

    OneSearch-V2 (arXiv 2603.24422). In the authors' code a match is position-wise: a later code counts although an
    earlier one differs. That suits codes that mean the same under every prefix (product quantisation, keyword slots).
    A residual code means something under its own prefix only, so that the reward would be for chance; with
    `prefix_only` a match counts only while the whole prefix matches.

    Args:
        rollouts_BGL: codes the model wrote, int64 ``[B, G, L]``.
        positives_BPL: codes of the positives, int64 ``[B, P, L]`` with P >= 1.
        positives_mask_BP: bool ``[B, P]``. A request without positives has rewards of 0.
        weights_L: float ``[L]``, none negative; `default_position_weights` has the paper's.
        prefix_only: see above.

    Returns:
        Float ``[B, G, L]``, which never falls from one level to the next. ``diff`` along L, from 0, is what each code
        added: `marginal_rewards`.
    """
    matches_BGPL = _matches(rollouts_BGL, positives_BPL, positives_mask_BP, prefix_only=prefix_only)
    assert weights_L.shape == rollouts_BGL.shape[-1:]
    return (matches_BGPL * weights_L).cumsum(-1).amax(2)


def marginal_rewards(rewards_BGL: Tensor) -> Tensor:
    """What each code added: ``R_{i,l} - R_{i,l-1}`` with ``R_{i,0} = 0``; float ``[B, G, L]`` to the same."""
    return rewards_BGL.diff(dim=-1, prepend=torch.zeros_like(rewards_BGL[..., :1]))


def prefix_gates(
    rollouts_BGL: Tensor, positives_BPL: Tensor, positives_mask_BP: Tensor, *, prefix_only: bool = True
) -> Tensor:
    """TPMA's gates: how much a code counts, given what came before it.

    ``g_{i,1} = 1``, ``g_{i,l} = (max_p number of matches in the first l - 1 codes) / (l - 1)``: OneSearch-V2 (arXiv
    2603.24422). What follows a wrong prefix teaches little.

    Args:
        rollouts_BGL: as in `position_rewards`.
        positives_BPL: as there.
        positives_mask_BP: as there.
        prefix_only: as there.

    Returns:
        Float32 ``[B, G, L]`` in ``[0, 1]``.
    """
    matches_BGPL = _matches(rollouts_BGL, positives_BPL, positives_mask_BP, prefix_only=prefix_only)
    counts_BGL = matches_BGPL[..., :-1].cumsum(-1).amax(2)
    shares_BGL = counts_BGL / torch.arange(1, rollouts_BGL.shape[-1], device=rollouts_BGL.device)
    return pad(shares_BGL, (1, 0), value=1.0)


def tpma_advantages(
    rollouts_BGL: Tensor,
    positives_BPL: Tensor,
    positives_mask_BP: Tensor,
    item_rewards_BG: Tensor,
    config: TPMAConfig,
    mask_BG: Tensor | None = None,
) -> Tensor:
    """Token-position marginal advantage: ``A_{i,l} = norm_i(R_{i,l} - R_{i,l-1}) + w_item norm_i(R_item,i)``.

    OneSearch-V2 (arXiv 2603.24422). ``norm_i`` is `group_advantages` over the rollouts of a request, for each position
    by itself; R is `position_rewards`. The gates are apart, in `prefix_gates`: both go into `policy_gradient_loss`.

    Args:
        rollouts_BGL: as in `position_rewards`.
        positives_BPL: as there.
        positives_mask_BP: as there.
        item_rewards_BG: reward of each item as a whole, float ``[B, G]``, for example `composite_reward`.
        config: settings.
        mask_BG: rollouts that exist, as in `group_advantages`.

    Returns:
        Float ``[B, G, L]``, without gradient.

    Raises:
        RecipeError: there is not one position weight a level.
    """
    n_levels = rollouts_BGL.shape[-1]
    weights = config.position_weights or default_position_weights(n_levels)
    if len(weights) != n_levels:
        raise RecipeError(
            f"position_weights has {len(weights)} numbers, and semantic IDs {n_levels} levels: give one each"
        )
    weights_L = torch.tensor(weights, dtype=item_rewards_BG.dtype, device=rollouts_BGL.device)
    rewards_BGL = position_rewards(
        rollouts_BGL, positives_BPL, positives_mask_BP, weights_L, prefix_only=config.prefix_only
    )
    added_BLG = marginal_rewards(rewards_BGL).transpose(1, 2)
    mask_BLG = None if mask_BG is None else mask_BG[:, None].expand_as(added_BLG)
    item_BG = group_advantages(item_rewards_BG, mask_BG)
    return group_advantages(added_BLG, mask_BLG).transpose(1, 2) + config.item_weight * item_BG[..., None]


def policy_gradient_loss(
    logp_BGL: Tensor,
    old_logp_BGL: Tensor,
    advantages_BGL: Tensor,
    gates_BGL: Tensor | None = None,
    mask_BG: Tensor | None = None,
    *,
    clip: float | None = None,
    ecpo_delta: float | None = None,
) -> Tensor:
    """GRPO's and TPMA's loss: ``-1/(n L) sum_i sum_l g_{i,l} rho_{i,l} A_{i,l}``, ``rho = exp(log pi - log pi_old)``.

    TPMA (OneSearch-V2, arXiv 2603.24422) has gates and no clip. With `clip` each term is PPO's ``min(rho A, clamp(rho,
    1 - clip, 1 + clip) A)`` (GRPO, arXiv 2402.03300). With `ecpo_delta` also, it is ECPO (OneRec, arXiv 2506.13695):
    where A < 0, ``pi_old' = max(sg(pi) / (1 + clip + delta), pi_old)``, so that rho is no more than ``1 + clip +
    delta`` there. PPO leaves that side open, and a code that should become less likely pulls the harder the likelier
    it has become.

    Args:
        logp_BGL: log-probabilities of the rollouts' codes by the model in training, float ``[B, G, L]``.
        old_logp_BGL: the same by the model that wrote them; no gradient flows into them. In the first step after
            writing they are ``logp_BGL.detach()``, and the gradient is REINFORCE's.
        advantages_BGL: float, ``[B, G, L]``, or ``[B, G, 1]`` for one a rollout; no gradient flows into them.
        gates_BGL: float ``[B, G, L]``, 0 or more, from `prefix_gates`; None is 1 everywhere.
        mask_BG: bool ``[B, G]``: rollouts that exist; n is their number, B times G without a mask. What stands at
            others is never read.
        clip: epsilon, in ``(0, 1)``; None clips nothing.
        ecpo_delta: delta, 0 or more (nanoGenRec: 0.1 with a clip of 0.2); needs `clip`. None is plain PPO.

    Returns:
        Float scalar; 0 if no rollout exists. Its value says nothing (with equal models, minus the mean advantage); its
        gradient does.

    Raises:
        RecipeError: clip or delta is out of range, or delta is given without clip.
    """
    if clip is not None and not 0 < clip < 1:
        raise RecipeError(f"clip is {clip}; it is how far the ratio may leave 1, in (0, 1)")
    if ecpo_delta is not None:
        check_weight("ecpo_delta", ecpo_delta)
        if clip is None:
            raise RecipeError(f"ecpo_delta is {ecpo_delta} without clip; it widens the clip, so give both or neither")
    assert logp_BGL.shape == old_logp_BGL.shape
    mask_BG = torch.ones_like(logp_BGL[..., 0], dtype=torch.bool) if mask_BG is None else mask_BG
    absent_BG1 = ~mask_BG[..., None]
    advantages_BGL = advantages_BGL.detach().expand_as(logp_BGL)
    if gates_BGL is not None:
        assert gates_BGL.shape == logp_BGL.shape
        advantages_BGL = advantages_BGL * gates_BGL.detach()
    logp_BGL, old_logp_BGL, advantages_BGL = (
        x_BGL.masked_fill(absent_BG1, 0) for x_BGL in (logp_BGL, old_logp_BGL.detach(), advantages_BGL)
    )
    if clip is not None and ecpo_delta is not None:
        early_BGL = logp_BGL.detach() - math.log1p(clip + ecpo_delta)
        old_logp_BGL = old_logp_BGL.maximum(early_BGL).where(advantages_BGL < 0, old_logp_BGL)
    ratio_BGL = (logp_BGL - old_logp_BGL).exp()
    gain_BGL = ratio_BGL * advantages_BGL
    if clip is not None:
        gain_BGL = gain_BGL.minimum(ratio_BGL.clamp(1 - clip, 1 + clip) * advantages_BGL)
    return -gain_BGL.sum() / (mask_BG.sum().clamp(min=1) * logp_BGL.shape[-1])


def k3_kl(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Estimate of ``KL(pi || pi_ref)`` from samples of pi: ``exp(r - p) - (r - p) - 1``, r and p log-probabilities.

    Schulman's k3, the penalty of GRPO (arXiv 2402.03300). Each term is 0 or more and their mean is unbiased.

    Args:
        logp: by the model in training, of what it drew; float, any shape.
        reference_logp: the same by the frozen model; no gradient flows into them.

    Returns:
        Float of the same shape, 0 or more; the caller takes the mean.
    """
    difference = reference_logp.detach() - logp
    return (difference.expm1() - difference).clamp(min=0)


class BehaviourReward(float, Enum):
    """R_C&O of `composite_reward`: what the user did with the item in the logs; a member is its number."""

    PURCHASED = 4.0
    CLICKED = 3.0
    NONE = 0.0


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """Weights of the parts of `composite_reward`, each 0 or more and one above 0; OneSearch-V2 adds up the bare parts.

    Attributes:
        behaviour: of R_C&O, which is 0 to 4.
        ctr: of R_CTR, which is 0 to 1.
        relevance: of R_Rel, which is 0 to 3.

    Raises:
        RecipeError: a value is out of range.
    """

    behaviour: float = 1.0
    ctr: float = 1.0
    relevance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("behaviour", "ctr", "relevance"):
            check_weight(name, getattr(self, name))
        if not (self.behaviour or self.ctr or self.relevance):
            raise RecipeError(
                "behaviour, ctr and relevance are all 0, which rewards nothing; give one of them a weight"
            )


def composite_reward(behaviour: Tensor, ctr: Tensor, relevance: Tensor, weights: RewardWeights) -> Tensor:
    """OneSearch-V2's item reward ``R_item = R_C&O + R_CTR + R_Rel`` (arXiv 2603.24422), each part weighted.

    Args:
        behaviour: R_C&O, float, any shape: 4 purchased, 3 clicked, 0 neither (`BehaviourReward`).
        ctr: predicted or calibrated click-through rate, float of the same shape; clipped to ``[0, 1]``.
        relevance: R_Rel, float of the same shape: tiers 3 (what was asked for), 2, 1, 0 (has nothing to do with it).
        weights: of the three parts.

    Returns:
        Float of the same shape.
    """
    assert behaviour.shape == ctr.shape == relevance.shape
    return weights.behaviour * behaviour + weights.ctr * ctr.clamp(0, 1) + weights.relevance * relevance


def rank_penalty(hits_BG: Tensor) -> Tensor:
    """MiniOneRec's reward (arXiv 2510.24431): 1 for a hit; a wrong item costs more the higher it is ranked.

    The wrong item of rank i (from 0) gets ``-(1 / log2(i + 2)) / sum_{j < G} 1 / log2(j + 2)``, in groups with a hit;
    in a group without one all get 0, as no order of wrong items is better than another. Divided by the sum, all places
    together cost 1, as much as a hit gains.

    Args:
        hits_BG: bool ``[B, G]``, whether the rollout is the target; rollouts in the order of the beam, best first.

    Returns:
        Float32 ``[B, G]``.
    """
    assert hits_BG.dtype == torch.bool
    discount_G = 1 / torch.arange(2, hits_BG.shape[1] + 2, device=hits_BG.device).log2()
    penalty_BG = -(discount_G / discount_G.sum()) * hits_BG.any(1, keepdim=True)
    return penalty_BG.masked_fill(hits_BG, 1.0)


def information_gain(
    target_logp_with_BGL: Tensor, target_logp_counterfactual_BGLK: Tensor, *, floor: float = -20.0
) -> Tensor:
    """What each code told about the target: ``IG_l = log p(t | o_<=l) - mean_k log p(t | o_<l, c_k)``.

    IG-Search (arXiv 2604.15148) does this for search steps, with the documents of other questions as counterfactuals.
    A step here is a code, and a counterfactual another code c_k in its place. It tells rollouts apart even if none
    reaches the target. Shaped by `shape_gain` it is added to the advantage of its code, with a weight.

    Args:
        target_logp_with_BGL: log-probability of the target after the rollout's codes up to and with l, float
            ``[B, G, L]``.
        target_logp_counterfactual_BGLK: the same with code l exchanged, for K >= 1 exchanges, float ``[B, G, L, K]``.
        floor: lower log-probabilities count as this, below 0. A prefix under which the target does not exist has
            -inf, which would make a mean, or a difference of two, useless. -20 is less than a uniform guess among
            10^8 items.

    Returns:
        Float ``[B, G, L]``, within ``[floor, -floor]``, without gradient.

    Raises:
        RecipeError: the floor is not a finite number below 0.
    """
    if not -math.inf < floor < 0:
        raise RecipeError(f"floor is {floor}; it is a log-probability, so give a finite number below 0")
    assert target_logp_counterfactual_BGLK.shape[:-1] == target_logp_with_BGL.shape
    with_BGL, without_BGLK = (
        logp.detach().clamp(min=floor) for logp in (target_logp_with_BGL, target_logp_counterfactual_BGLK)
    )
    return with_BGL - without_BGLK.mean(-1)


def shape_gain(gain: Tensor, dead_zone: float, negative_scale: float, clip: float) -> Tensor:
    """IG-Search's shaping of `information_gain`: small gains are noise, losses count less, large ones saturate.

    ``|g| < dead_zone`` becomes 0; then negatives are multiplied by `negative_scale`; then ``clip * tanh(g / clip)``.
    The paper (arXiv 2604.15148) has "a soft clip" and gives no number: tanh is our choice.

    Args:
        gain: float, any shape, in nats.
        dead_zone: delta, 0 or more.
        negative_scale: lambda, in ``[0, 1]``: how much a code that hid the target counts against one that showed it.
        clip: above 0; what is small against it stays as it is, and nothing exceeds it.

    Returns:
        Float of the same shape, within ``[-clip, clip]``.

    Raises:
        RecipeError: a setting is out of range.
    """
    check_weight("dead_zone", dead_zone)
    if not 0 <= negative_scale <= 1:
        raise RecipeError(f"negative_scale is {negative_scale}; it is a share, in [0, 1]")
    check_positive("clip", clip)
    gain = gain.masked_fill(gain.abs() < dead_zone, 0)
    gain = gain.where(gain >= 0, negative_scale * gain)
    return clip * (gain / clip).tanh()


def _matches(codes_BGL: Tensor, positives_BPL: Tensor, mask_BP: Tensor, *, prefix_only: bool) -> Tensor:
    """Int64 ``[B, G, P, L]``: 1 where a code is that of a positive, and with `prefix_only` all before it are, too."""
    assert positives_BPL.shape[:-1] == mask_BP.shape
    assert positives_BPL.shape[1] >= 1
    matches_BGPL = (codes_BGL[:, :, None] == positives_BPL[:, None]) & mask_BP[:, None, :, None]
    return matches_BGPL.long().cumprod(-1) if prefix_only else matches_BGPL.long()
