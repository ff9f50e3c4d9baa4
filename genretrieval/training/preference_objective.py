"""Preference training of the generator: list-wise DPO, GRPO and TPMA as losses of a batch.

Some targets of a batch are drawn. What the model says of several items for the request that each target answered is
compared with what those items are worth: `PreferredLists` takes items that were graded beforehand, `RewardedRollouts`
what the current weights write themselves, rewarded by whoever is asked. The losses are those of
`genretrieval.training.preference`; beside them stands the supervised loss of the whole batch, with a weight, as what
is not rewarded is forgotten otherwise.

What is served orders items by the log-probability of their codes plus that of the dense head. So an item's
log-probability here has one part a code and, where there is a dense head, one more: its softmax over the items that are
compared. Both learn from the same preferences, or the head would put back in order what the codes have unlearnt.

Positions are those of the flat arrays of `Histories`; N are drawn targets, G rollouts or entries of a list, L levels,
J = L parts of a log-probability, or L + 1 with a dense head; the rest as in `genretrieval.model.layers`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from genretrieval.catalogue import CatalogueIndex
from genretrieval.errors import RecipeError
from genretrieval.model import Generator
from genretrieval.model.generator import Context
from genretrieval.training.distillation import check_weight
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.preference import (
    ListwiseDPOConfig,
    TPMAConfig,
    group_advantages,
    information_gain,
    k3_kl,
    listwise_dpo,
    policy_gradient_loss,
    prefix_gates,
    shape_gain,
    tpma_advantages,
)
from genretrieval.training.rollouts import RolloutSearch

NOTHING = -1  # in place of an item row

# IG-Search gives none of these: below a tenth of a nat is noise, and no code counts for more than an advantage does.
_DEAD_ZONE, _NEGATIVE_SCALE, _GAIN_CLIP = 0.1, 0.5, 1.0


@dataclass(frozen=True, slots=True)
class PreferenceConfig:
    """Settings of preference training.

    Attributes:
        method: ``listwise_dpo`` over graded lists, or ``grpo`` or ``tpma`` over rollouts.
        requests: targets of a batch that are learnt from.
        supervised_weight: of the supervised loss of the batch beside that of preferences; 0 or more.
        rollouts: G, of a request; 2 or more.
        kl_weight: of the k3 estimate of the divergence of rollouts from the reference, a mean over their parts; 0 or
            more. Near the reference k3 is half the square of what a log-probability has moved by, so a part comes to
            rest about its advantage over `kl_weight` away, advantages having a deviation of 1. List-wise DPO holds the
            reference by its beta.
        gain_weight: of IG-Search's `information_gain` of each code about the target, added to its advantage; 0 or more.
        dpo: settings of `listwise_dpo`.
        tpma: settings of `tpma_advantages`.

    Raises:
        RecipeError: a value is out of range.
    """

    method: Literal["listwise_dpo", "grpo", "tpma"] = "grpo"
    requests: int = 16
    supervised_weight: float = 1.0
    rollouts: int = 16
    kl_weight: float = 3.0
    gain_weight: float = 0.0
    dpo: ListwiseDPOConfig = field(default_factory=ListwiseDPOConfig)
    tpma: TPMAConfig = field(default_factory=TPMAConfig)

    def __post_init__(self) -> None:
        if self.method not in ("listwise_dpo", "grpo", "tpma"):
            raise RecipeError(f"method is {self.method!r}; give listwise_dpo, grpo or tpma")
        if self.requests < 1:
            raise RecipeError(f"requests is {self.requests}; it must be 1 or more")
        if self.rollouts < 2:
            raise RecipeError(f"rollouts is {self.rollouts}; nothing can be preferred among fewer than 2")
        check_weight("supervised_weight", self.supervised_weight)
        check_weight("kl_weight", self.kl_weight)
        check_weight("gain_weight", self.gain_weight)


class Judged(NamedTuple):
    """What rollouts of N requests are worth.

    Attributes:
        rewards_NG: float, of each item; any where there is none.
        positives_NP: int64, rows of the items that the user took, `NOTHING` for fewer than P >= 1.
    """

    rewards_NG: Tensor
    positives_NP: Tensor


class Graded(NamedTuple):
    """Lists of N requests.

    Attributes:
        items_NG: int64, item rows, `NOTHING` where a list ends.
        grades_NG: float, for example `genretrieval.training.preference.BehaviourGrade`.
    """

    items_NG: Tensor
    grades_NG: Tensor


Reward = Callable[[Tensor, Tensor], Judged]
"""Of positions int64 ``[N]`` and item rows int64 ``[N, G]``, `NOTHING` where there is none."""

Lists = Callable[[Tensor], Graded]
"""Of positions int64 ``[N]``."""


class Preference(nn.Module):
    """What the losses have in common: drawing of targets, log-probabilities, the reference, what was measured.

    The reference is a copy of the model at the start; `sync` makes it one of the current weights. Log-probabilities are
    taken without dropout, as what the model writes is searched without it.

    Args:
        model: at the start of the stage.
        next_item: the supervised loss.
        index: the catalogue.
        learners: bool ``[n_positions]``, positions whose requests may be drawn.
        config: settings.

    Attributes:
        measured: sums over steps since `report`, and their number as ``steps``.
        last_kl: k3 estimate of the divergence from the reference in the last step, in nats an item, mean of all
            processes.
    """

    learners_X: Tensor
    codes_IL: Tensor

    def __init__(
        self,
        model: Generator,
        next_item: NextItemObjective,
        index: CatalogueIndex,
        learners: Tensor,
        config: PreferenceConfig,
    ) -> None:
        super().__init__()
        self.next_item = next_item
        self.config = config
        self.reference = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()
        self.register_buffer("learners_X", learners)
        nodes_IL = next_item.item_nodes
        codes = [torch.from_numpy(index.tokens[level]).long()[nodes_IL[:, level]] for level in range(index.n_levels)]
        self.register_buffer("codes_IL", torch.stack(codes, 1))
        self.measured: dict[str, float] = {}
        self.last_kl = 0.0

    def sync(self, model: Generator) -> None:
        """Make the current weights the reference."""
        self.reference.load_state_dict(model.state_dict())

    def report(self) -> dict[str, float]:
        """Means over the steps since the last call; empty if there were none."""
        steps = self.measured.pop("steps", 0.0)
        means = {name: value / steps for name, value in self.measured.items()}
        self.measured = {}
        return means

    def forward(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch."""
        loss = model.head.weight.new_zeros(())
        if self.config.supervised_weight:
            loss = loss + self.config.supervised_weight * self.next_item(model, batch)
        drawn_N2 = self.draw(batch)
        if not len(drawn_N2):
            # Of all parameters, so that data-parallel processes agree on what has a gradient.
            return loss + 0 * model.head.weight.sum()
        training = model.training
        model.eval()
        try:
            return loss + self.preference(model, batch, drawn_N2)
        finally:
            model.train(training)

    def preference(self, model: Generator, batch: dict[str, Tensor], drawn_N2: Tensor) -> Tensor:
        """Loss of the drawn targets."""
        raise NotImplementedError

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        """Rows and targets of the batch to learn from, int64 ``[N, 2]``."""
        may_BT = batch["learn"] & self.learners_X[batch["target_positions"]]
        found_X2 = may_BT.nonzero()
        # Drawn on the CPU, whose state a checkpoint keeps whatever the device.
        chosen = torch.randperm(len(found_X2))[: self.config.requests].sort().values
        return found_X2[chosen.to(found_X2.device)]

    def log_probabilities(self, model: Generator, context: Context, items_NG: Tensor) -> Tensor:
        """Parts of the log-probability of given items, float32 ``[N, G, J]``; 0 where there is no item.

        The first L are those of the codes, each among the codes that exist under its prefix; the last, of a model with
        a dense head, that of the item among those of its row.
        """
        there_NG, items_NG = items_NG != NOTHING, items_NG.clamp(min=0)
        codes_NGL, n_items = self.codes_IL[items_NG], items_NG.shape[1]
        start_ND = context.start_BD + model.context.codes.weight[0]
        start_NG1D = start_ND[:, None, None].expand(-1, n_items, -1, -1)
        x_NGLD = torch.cat([start_NG1D, model.context.embed(codes_NGL[..., :-1])], 2)
        # Each item is a target of its own to the decoder, and all see the whole request.
        states_NGLD = model.decoder(x_NGLD, context.memory_BSD, context.mask_BS[:, None].expand(-1, n_items, -1))
        logits = self.next_item.existing_logits(model, states_NGLD.flatten(0, 1), items_NG.flatten())
        codes_XL = codes_NGL.flatten(0, 1)
        parts = [
            logits_XV.log_softmax(-1).gather(1, codes_XL[:, level, None]).view(items_NG.shape)
            for level, logits_XV in enumerate(logits)
        ]
        if model.dense is not None:
            user_ND = model.dense.user_vectors(states_NGLD[:, 0, 0], context.seen_BE)
            scores_NG = (model.dense.rank(items_NG) @ user_ND[..., None])[..., 0].float()
            parts.append(scores_NG.masked_fill(~there_NG, torch.finfo(scores_NG.dtype).min).log_softmax(-1))
        return torch.stack(parts, -1) * there_NG[..., None]

    def measure(self, kl: Tensor, **values: Tensor) -> None:
        """Add up what a step was like."""
        kl = kl.detach().clone()
        if distributed.is_available() and distributed.is_initialized():
            # All processes stop at the same step, or none does.
            distributed.all_reduce(kl)
            kl = kl / distributed.get_world_size()
        self.last_kl = float(kl)
        self.measured["steps"] = self.measured.get("steps", 0.0) + 1
        for name, value in {"kl": kl, **values}.items():
            self.measured[name] = self.measured.get(name, 0.0) + float(value.detach())


class PreferredLists(Preference):
    """List-wise DPO (S-DPO, arXiv 2406.09215; OneSearch, arXiv 2509.03236) over lists graded beforehand.

    An item's log-probability is the sum of its parts.

    Args:
        lists: gives each drawn position its list.
        model, next_item, index, learners, config: as of `Preference`.
    """

    def __init__(
        self,
        model: Generator,
        next_item: NextItemObjective,
        index: CatalogueIndex,
        learners: Tensor,
        config: PreferenceConfig,
        lists: Lists,
    ) -> None:
        super().__init__(model, next_item, index, learners, config)
        self.lists = lists

    def preference(self, model: Generator, batch: dict[str, Tensor], drawn_N2: Tensor) -> Tensor:
        """Loss of the lists of the drawn targets."""
        items_NG, grades_NG = self.lists(batch["target_positions"][drawn_N2[:, 0], drawn_N2[:, 1]])
        logp_NGJ = self.log_probabilities(model, encode(model, batch, drawn_N2), items_NG)
        with torch.no_grad():
            context = encode(self.reference, batch, drawn_N2)
            reference_NGJ = self.log_probabilities(self.reference, context, items_NG)
        there_NG = items_NG != NOTHING
        loss = listwise_dpo(logp_NGJ.sum(-1), reference_NGJ.sum(-1), grades_NG, there_NG, self.config.dpo)
        self.measure(kl=_per_item(k3_kl(logp_NGJ, reference_NGJ), there_NG), loss=loss)
        return loss


class RewardedRollouts(Preference):
    """GRPO (arXiv 2402.03300) or TPMA (OneSearch-V2, arXiv 2603.24422), on policy.

    Every step searches with the current weights, so that the gradient is REINFORCE's and no ratio needs a clip. The
    rollouts are what would be served, the best of a beam search, and not draws: all count alike, and learning is about
    their order. With TPMA the dense head has the item's advantage alone, and no gate.

    Args:
        reward: judges rollouts.
        model, next_item, index, learners, config: as of `Preference`.
    """

    def __init__(
        self,
        model: Generator,
        next_item: NextItemObjective,
        index: CatalogueIndex,
        learners: Tensor,
        config: PreferenceConfig,
        reward: Reward,
    ) -> None:
        super().__init__(model, next_item, index, learners, config)
        self.reward = reward
        self.search = RolloutSearch(index, config.rollouts)

    def preference(self, model: Generator, batch: dict[str, Tensor], drawn_N2: Tensor) -> Tensor:
        """Loss of the rollouts of the drawn targets."""
        context = encode(model, batch, drawn_N2)
        rollouts = self.search(model, context)
        items_NG, mask_NG = rollouts.items_NG, rollouts.mask_NG
        judged = self.reward(batch["target_positions"][drawn_N2[:, 0], drawn_N2[:, 1]], items_NG)
        logp_NGJ = self.log_probabilities(model, context, items_NG)
        with torch.no_grad():
            reference_context = encode(self.reference, batch, drawn_N2)
            reference_NGJ = self.log_probabilities(self.reference, reference_context, items_NG)
            targets_N = batch["target_items"][drawn_N2[:, 0], drawn_N2[:, 1]]
            advantages_NGJ, gates_NGJ = self.advantages(model, context, rollouts.codes_NGL, mask_NG, judged, targets_N)
        loss = policy_gradient_loss(logp_NGJ, logp_NGJ.detach(), advantages_NGJ, gates_NGJ, mask_NG)
        divergence_NGJ = k3_kl(logp_NGJ, reference_NGJ)
        kl = _per_item(divergence_NGJ, mask_NG)
        self.measure(kl=kl, reward=_per_item(judged.rewards_NG[..., None], mask_NG))
        return loss + self.config.kl_weight * kl / divergence_NGJ.shape[-1]

    def advantages(
        self,
        model: Generator,
        context: Context,
        codes_NGL: Tensor,
        mask_NG: Tensor,
        judged: Judged,
        targets_N: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Advantage of every part of every rollout, float ``[N, G, J]``, and its gate."""
        n_parts = codes_NGL.shape[-1] + (model.dense is not None)
        item_NG1 = group_advantages(judged.rewards_NG, mask_NG)[..., None]
        advantages_NGJ, gates_NGJ = item_NG1.expand(-1, -1, n_parts), None
        if self.config.method == "tpma":
            found_NP = judged.positives_NP != NOTHING
            positives_NPL, prefix_only = self.codes_IL[judged.positives_NP.clamp(min=0)], self.config.tpma.prefix_only
            by_code_NGL = tpma_advantages(
                codes_NGL, positives_NPL, found_NP, judged.rewards_NG, self.config.tpma, mask_NG
            )
            gates_NGL = prefix_gates(codes_NGL, positives_NPL, found_NP, prefix_only=prefix_only)
            n_dense = n_parts - codes_NGL.shape[-1]
            advantages_NGJ = torch.cat([by_code_NGL, item_NG1.expand(-1, -1, n_dense)], -1)
            gates_NGJ = pad(gates_NGL, (0, n_dense), value=1.0)
        if self.config.gain_weight:
            target_NL = self.log_probabilities(model, context, targets_N[:, None])[:, 0, : codes_NGL.shape[-1]]
            gain_NGL = code_gains(codes_NGL, mask_NG, self.codes_IL[targets_N], target_NL)
            gain_NGL = self.config.gain_weight * shape_gain(gain_NGL, _DEAD_ZONE, _NEGATIVE_SCALE, _GAIN_CLIP)
            advantages_NGJ = advantages_NGJ + pad(gain_NGL, (0, n_parts - codes_NGL.shape[-1]))
        return advantages_NGJ, gates_NGJ


def code_gains(codes_NGL: Tensor, mask_NG: Tensor, target_NL: Tensor, target_logp_NL: Tensor) -> Tensor:
    """`information_gain` of every code of rollouts about the target, the codes of the other rollouts in its place.

    After a prefix of the target's own codes its log-probability is the sum of those of its codes that are still to
    come; after any other it cannot be written any more.

    Args:
        codes_NGL: int64, G >= 2 rollouts.
        mask_NG: bool, rollouts that exist. In the place of one that does not, a counterfactual never finds the target.
        target_NL: int64, codes of the target.
        target_logp_NL: float, log-probability of each of them, given those before it.

    Returns:
        Float ``[N, G, L]``.
    """
    n_rollouts = codes_NGL.shape[1]
    same_NGL = (codes_NGL == target_NL[:, None]) & mask_NG[..., None]
    on_path_NGL = pad(same_NGL[..., :-1].long().cumprod(-1), (1, 0), value=1).bool()
    to_come_NL = target_logp_NL.flip(-1).cumsum(-1).flip(-1) - target_logp_NL
    found_NG1L, nowhere = to_come_NL[:, None], -math.inf
    with_NGL = found_NG1L.where(on_path_NGL & same_NGL, nowhere)
    others_GK = ~torch.eye(n_rollouts, dtype=torch.bool, device=codes_NGL.device)
    others_GK = others_GK.nonzero()[:, 1].view(n_rollouts, n_rollouts - 1)
    exchanged_NGKL = on_path_NGL[:, :, None] & same_NGL[:, others_GK]
    without_NGKL = to_come_NL[:, None, None].where(exchanged_NGKL, nowhere)
    return information_gain(with_NGL, without_NGKL.transpose(2, 3))


def encode(model: Generator, batch: dict[str, Tensor], drawn_N2: Tensor) -> Context:
    """Encode the requests that some targets of a batch answered, as they would be served.

    Args:
        model: what reads them.
        batch: as `genretrieval.training.data.collate` makes it.
        drawn_N2: int64, row and target of each.
    """
    row_N, target_N = drawn_N2.T
    length = int(target_N.max())
    own = ("past_rows", "past_events", "past_mask", "profile")
    request = {name: batch[name][row_N] for name in own if name in batch}
    if "past_codes" in batch:
        request["past_codes"] = batch["past_codes"]
    for name in ("history_codes", "history_events", "history_gaps", "history_mask"):
        request[name] = batch[name][row_N, :length]
    request["history_mask"] = request["history_mask"] & (torch.arange(length, device=row_N.device) < target_N[:, None])
    request["scenario"] = batch["target_scenarios"][row_N, target_N]
    if model.context.query_encoder is not None:
        n_targets = batch["target_items"].shape[1]
        # Targets without a query have the row of zeros behind all others.
        query_X = row_N.new_full((batch["target_items"].numel(),), len(batch["query_rows"]))
        query_X[batch["query_rows"]] = torch.arange(len(batch["query_rows"]), device=row_N.device)
        request["query_tokens"] = pad(batch["query_tokens"], (0, 0, 0, 1))[query_X[row_N * n_targets + target_N]]
        request["query_mask"] = request["query_tokens"] != 0
    if model.dense is not None:
        request["history_vectors"] = model.dense.read(batch["target_items"][row_N, :length])
        if "past_items" in batch:
            request["past_vectors"] = model.dense.read(batch["past_items"])
    return cast(Context, model.context(request))


def _per_item(values_NGJ: Tensor, there_NG: Tensor) -> Tensor:
    """Mean over the items that are there of the sum over the last dimension."""
    return (values_NGJ.sum(-1) * there_NG).sum() / there_NG.sum().clamp(min=1)
