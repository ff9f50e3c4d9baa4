"""Self-distillation: the generator learns from itself when it knows more than a request says.

One set of weights reads every target twice. The student reads the request as it is served; the teacher reads it with
something that no request has. What the teacher then says of the codes teaches the student, and no gradient flows back
into the teacher's words:

    ``L = L_student + teacher_weight * L_teacher + weight * divergence(teacher || student)``

``L`` alone is the loss of `NextItemObjective`, dense head included, and ``L_teacher`` teaches the weights to read what
the teacher is told. The divergence is the mean over targets and levels; a dense head's choice among all
items is added to it with the weight that it has in ``L``. Three teachers, one interface:

=============  ==============================================  ==========================================
privileged     the target's keywords, behind the query         KL at a temperature
               (OneSearch-V2, arXiv 2603.24422)
sibling        the best of the model's own rollouts            forward KL, clipped entry by entry
               (Search-E1, arXiv 2605.22511)
hindsight      all of its rollouts, and how far each was       Jensen-Shannon divergence
               right (SD-Search, arXiv 2605.18299)
=============  ==============================================  ==========================================

The last two were published for language models that write search calls, whose better attempt shows a way to an answer.
Here a better attempt could be the answer itself, and a teacher that reads it has nothing to say that the label does not
say. So a rollout that is the target is hidden from the teacher; and all divergences are taken along the target's own
codes, as a teacher knows nothing of a path that the target is not on.

Shape suffixes: N targets, G rollouts, L levels, V codes of a level; the rest as in `genretrieval.model.layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from genretrieval.catalogue import CatalogueIndex
from genretrieval.errors import RecipeError
from genretrieval.model import Generator
from genretrieval.model.generator import Context
from genretrieval.training.distillation import (
    check_positive,
    check_weight,
    clipped_forward_kl,
    fgm_perturbation,
    focal_cross_entropy,
    jensen_shannon,
    symmetric_kl,
    temperature_kl,
)
from genretrieval.training.full_softmax import LOSS_ROWS, full_softmax_loss
from genretrieval.training.objectives import Candidates, NextItemObjective
from genretrieval.training.rollouts import RolloutSearch

Batch = dict[str, Tensor]
TeacherName = Literal["privileged", "sibling", "hindsight"]
CODES = "context.codes.weight"
MARK_SEED = 0


@dataclass(frozen=True, slots=True)
class SelfDistillationConfig:
    """Settings of `SelfDistillationObjective`.

    Attributes:
        teacher: what the teacher is told; see the module.
        weight: of the divergence, above 0. 1 is what was measured (docs/decisions/0005-self-distillation.md);
            OneSearch-V2 has 0.1, Search-E1 and SD-Search do not say.
        teacher_weight: of the teacher's own loss, 0 or more (1 in OneSearch-V2's repository).
        temperature: of the privileged teacher's KL, above 0 (1 in OneSearch-V2).
        clip: most that one code may add to the sibling teacher's KL, above 0, in nats. Search-E1 does not say.
        rollouts: semantic IDs that the model writes for every target, for the sibling and the hindsight teacher; 2 or
            more. Search-E1 has 5.
        rdrop_weight: of R-Drop, 0 or more: the student reads twice, with dropout of its own each time, and is to say
            the same. OneSearch-V2 has 0.5.
        fgm_epsilon: length of the step on the embeddings of codes, 0 or more, that raises the student's loss fastest;
            the loss after it is learnt too. OneSearch-V2 has 0.6.
        focal_alpha: of the student's focal loss, above 0; 1 with `focal_gamma` 0 is cross-entropy. OneSearch-V2 has 2.
        focal_gamma: 0 or more. OneSearch-V2 has 3.

    Raises:
        RecipeError: a value is out of range.
    """

    teacher: TeacherName = "privileged"
    weight: float = 1.0
    teacher_weight: float = 1.0
    temperature: float = 1.0
    clip: float = 1.0
    rollouts: int = 5
    rdrop_weight: float = 0.0
    fgm_epsilon: float = 0.0
    focal_alpha: float = 1.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with before anything is spent on it."""
        if self.rollouts < 2:
            raise RecipeError(f"rollouts is {self.rollouts}; give 2 or more, as one may be the target, which is hidden")
        for name in ("weight", "temperature", "clip", "focal_alpha"):
            check_positive(name, getattr(self, name))
        for name in ("teacher_weight", "rdrop_weight", "fgm_epsilon", "focal_gamma"):
            check_weight(name, getattr(self, name))


class Teacher(Protocol):
    """What a teacher is told, and how its words are compared with the student's."""

    def read(self, model: Generator, batch: Batch) -> Batch:
        """The batch as the teacher reads it: the same targets, and more to go by.

        Args:
            model: the generator, as it is now.
            batch: as the student reads it, item vectors included.
        """
        ...

    def divergence(self, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        """Scalar, from the logits of one level; no gradient flows into the teacher's."""
        ...


class PrivilegedTeacher(nn.Module):
    """OneSearch-V2 (arXiv 2603.24422): it reads keywords of the target behind the query, or in place of one.

    The paper's keywords are a language model's thoughts about query and user. Here they are what the target is: words
    that it shares with other items, so that they narrow the choice and do not make it.

    Args:
        keywords_IW: int64 ``[n_items, W]``, query tokens of every item's keywords, zeros on the right.
        temperature: of the KL.
    """

    keywords_IW: Tensor

    def __init__(self, keywords_IW: Tensor, temperature: float) -> None:
        super().__init__()
        self.register_buffer("keywords_IW", keywords_IW)
        self.temperature = temperature

    def read(self, model: Generator, batch: Batch) -> Batch:
        """Every learnt target has a query: its own, if any, and the keywords; empty if it has neither."""
        del model
        learn, own_NQ = batch["learn"], batch["query_tokens"]
        rows_N = learn.flatten().nonzero()[:, 0]
        asked_XQ = own_NQ.new_zeros(learn.numel(), own_NQ.shape[1]).index_copy(0, batch["query_rows"], own_NQ)
        tokens_NQ = torch.cat([asked_XQ[rows_N], self.keywords_IW[batch["target_items"][learn]]], 1)
        # Padding between the two moves to the right, where the rest of it is.
        order_NQ = (tokens_NQ == 0).long().sort(stable=True, dim=1).indices
        tokens_NQ = tokens_NQ.gather(1, order_NQ)
        longest = max(1, int((tokens_NQ != 0).sum(1).max()))
        tokens_NQ = tokens_NQ[:, :longest]
        return {**batch, "query_rows": rows_N, "query_tokens": tokens_NQ, "query_mask": tokens_NQ != 0}

    def divergence(self, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        """See `temperature_kl`."""
        return temperature_kl(teacher_NV, student_NV, self.temperature)


class SiblingTeacher(nn.Module):
    """Search-E1 (arXiv 2605.22511): it reads the best rollout, the one that shares most leading codes with the target.

    Of equal ones the likeliest. There is none where the model has written the target and nothing else.

    Args:
        search: writes the rollouts.
        clip: of the KL.
    """

    def __init__(self, search: RolloutSearch, clip: float) -> None:
        super().__init__()
        self.search = search
        self.clip = clip

    def read(self, model: Generator, batch: Batch) -> Batch:
        """The sibling is one more state that the decoder attends to."""
        rollouts = self.search(model, target_contexts(model, batch))
        right_NG = right_codes(rollouts.codes_NGL, batch["target_codes"][batch["learn"]])
        shown_NG = rollouts.mask_NG & (right_NG < rollouts.codes_NGL.shape[-1])
        # `max` may return any of equal ones; the likelier stands before.
        rank_G = torch.arange(right_NG.shape[1], device=right_NG.device)
        best_N = (right_NG * len(rank_G) - rank_G).masked_fill(~shown_NG, -len(rank_G)).argmax(1)
        codes_NL = rollouts.codes_NGL[torch.arange(len(best_N), device=best_N.device), best_N]
        return with_hints(batch, model.context.embed(codes_NL[:, None]).sum(-2), shown_NG.any(1)[:, None])

    def divergence(self, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        """See `clipped_forward_kl`."""
        return clipped_forward_kl(teacher_NV, student_NV, self.clip)


class HindsightTeacher(nn.Module):
    """SD-Search (arXiv 2605.18299): it reads all rollouts, each with a mark that says how many codes were right.

    A mark is a fixed random vector for each number of codes, as wide as an embedding of a code and added to the
    rollout's: the generator learns to read them and needs no weights of its own for it.

    Args:
        search: writes the rollouts.
        n_levels: L.
        d_model: D.
    """

    marks_LD: Tensor

    def __init__(self, search: RolloutSearch, n_levels: int, d_model: int) -> None:
        super().__init__()
        self.search = search
        drawn = torch.randn(n_levels, d_model, generator=torch.Generator().manual_seed(MARK_SEED))
        self.register_buffer("marks_LD", drawn)

    def read(self, model: Generator, batch: Batch) -> Batch:
        """The rollouts are further states that the decoder attends to."""
        rollouts = self.search(model, target_contexts(model, batch))
        right_NG = right_codes(rollouts.codes_NGL, batch["target_codes"][batch["learn"]])
        n_levels = rollouts.codes_NGL.shape[-1]
        shown_NG = rollouts.mask_NG & (right_NG < n_levels)
        marks_NGD = self.marks_LD[right_NG.clamp(max=n_levels - 1)]
        return with_hints(batch, model.context.embed(rollouts.codes_NGL).sum(-2) + marks_NGD, shown_NG)

    def divergence(self, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        """See `jensen_shannon`."""
        return jensen_shannon(teacher_NV, student_NV)


def right_codes(codes_NGL: Tensor, target_codes_NL: Tensor) -> Tensor:
    """int64 ``[N, G]``: how many leading codes of each rollout are the target's."""
    return (codes_NGL == target_codes_NL[:, None]).long().cumprod(-1).sum(-1)


def with_hints(batch: Batch, hints_NHD: Tensor, mask_NH: Tensor) -> Batch:
    """The batch, each learnt target told H states, which are scaled as encoded ones are; see `decode_targets`."""
    states_NHD = nn.functional.rms_norm(hints_NHD, hints_NHD.shape[-1:], eps=1e-6)
    rows_N = batch["learn"].flatten().nonzero()[:, 0]
    return {**batch, "hint_rows": rows_N, "hint_states": states_NHD, "hint_mask": mask_NH}


@torch.no_grad()
def target_contexts(model: Generator, batch: Batch) -> Context:
    """The request behind every learnt target, as it would be asked alone; without dropout and without gradient.

    Args:
        model: the generator.
        batch: as the student reads it, item vectors included.

    Returns:
        N contexts, in the order of ``batch["target_items"][batch["learn"]]``.
    """
    context, learn = model.context, batch["learn"]
    row_N, place_N = learn.nonzero(as_tuple=True)
    n_targets = learn.shape[1]
    with evaluating(model):
        seen_BTD = context.history(batch)
        seen_ND = seen_BTD[row_N, place_N]
        scenarios = batch.get("target_scenarios")
        start_ND = context.starts(seen_ND, None if scenarios is None else scenarios[row_N, place_N])
        states = [seen_BTD[row_N]]
        masks = [torch.arange(n_targets, device=learn.device) <= place_N[:, None]]
        past = context.past(batch)
        if past is not None:
            states.append(past[0][row_N])
            masks.append(past[1][row_N])
        if context.query_encoder is not None and len(batch["query_rows"]):
            encoded_MQD = context.query(batch["query_tokens"], batch["query_mask"])
            # Which query belongs to each target; those without one read the first, masked.
            asked_X = batch["query_rows"].new_full((learn.numel(),), -1)
            asked_X[batch["query_rows"]] = torch.arange(len(encoded_MQD), device=learn.device)
            asked_N = asked_X[row_N * n_targets + place_N]
            states.append(encoded_MQD[asked_N.clamp(min=0)])
            masks.append(batch["query_mask"][asked_N.clamp(min=0)] & (asked_N >= 0)[:, None])
    seen_NE = context.seen(seen_BTD, batch)[row_N, place_N]
    return Context(torch.cat(states, 1), torch.cat(masks, 1), start_ND, seen_NE)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; afterwards as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Reading(NamedTuple):
    """What the generator says of N targets.

    Attributes:
        logits: by level, float32 ``[N, V]``, -inf for codes that do not exist under the target's prefix.
        user_ND: what its dense head compares item vectors with; None without one.
    """

    logits: list[Tensor]
    user_ND: Tensor | None


class SelfDistillationObjective(nn.Module):
    """The loss of the module's docstring, and what may be added to it.

    Args:
        next_item: what student and teacher learn by themselves.
        teacher: one of the three.
        config: settings.
    """

    def __init__(self, next_item: NextItemObjective, teacher: Teacher, config: SelfDistillationConfig) -> None:
        super().__init__()
        self.next_item = next_item
        self.teacher = teacher
        self.config = config

    def forward(self, model: Generator, batch: Batch) -> Tensor:
        """Loss over the targets that ``batch["learn"]`` marks."""
        c = self.config
        candidates = self.next_item.candidates(model, batch) if model.dense is not None else None
        batch = self.next_item.with_vectors(model, batch)
        student = self.read(model, batch, candidates)
        loss = served = self.supervised(student, batch, candidates, focal=True)
        if c.rdrop_weight:
            again = self.read(model, batch, candidates)
            pairs = zip(student.logits, again.logits, strict=True)
            consistency = torch.stack([symmetric_kl(*pair) for pair in pairs]).mean()
            loss = (loss + self.supervised(again, batch, candidates, focal=True)) / 2 + c.rdrop_weight * consistency
        teacher = self.read(model, self.teacher.read(model, batch), candidates)
        if c.teacher_weight:
            loss = loss + c.teacher_weight * self.supervised(teacher, batch, candidates, focal=False)
        pairs = zip(teacher.logits, student.logits, strict=True)
        apart = torch.stack([self.teacher.divergence(*pair) for pair in pairs]).mean()
        if candidates is not None:
            apart = apart + self.next_item.dense_weight * self.dense_divergence(teacher, student, candidates)
        loss = loss + c.weight * apart
        if c.fgm_epsilon:
            loss = loss + self._after_a_step_uphill(model, batch, candidates, served)
        return loss

    def read(self, model: Generator, batch: Batch, candidates: Candidates | None) -> Reading:
        """One pass over the learnt targets of a batch that has its item vectors."""
        learn = batch["learn"]
        decoded = model.decode_targets(batch)
        states_NLD = decoded.states_BTLD[learn]
        logits = self.next_item.existing_logits(model, states_NLD, batch["target_items"][learn])
        if candidates is None or model.dense is None:
            return Reading(logits, None)
        return Reading(logits, model.dense.user_vectors(states_NLD[:, 0], decoded.seen_BTE[learn]))

    def supervised(self, reading: Reading, batch: Batch, candidates: Candidates | None, *, focal: bool) -> Tensor:
        """The loss of `NextItemObjective`, its cross-entropy of codes made focal where that is asked for."""
        codes_NL = batch["target_codes"][batch["learn"]]
        alpha, gamma = (self.config.focal_alpha, self.config.focal_gamma) if focal else (1.0, 0.0)
        losses = [
            focal_cross_entropy(z_NV, codes_NL[:, level], alpha, gamma)
            if gamma or alpha != 1
            else nn.functional.cross_entropy(z_NV, codes_NL[:, level])
            for level, z_NV in enumerate(reading.logits)
        ]
        loss = torch.stack(losses).mean()
        if candidates is None or reading.user_ND is None:
            return loss
        places_N = candidates.places(batch["target_items"][batch["learn"]])
        dense = full_softmax_loss(reading.user_ND, candidates.ranked, places_N, candidates.bias)
        return loss + self.next_item.dense_weight * dense

    def dense_divergence(self, teacher: Reading, student: Reading, candidates: Candidates) -> Tensor:
        """Mean divergence of the two choices among items.

        Logits are ``[LOSS_ROWS, M]`` at a time and made again for the gradient, as M may be a whole catalogue.
        """
        assert teacher.user_ND is not None
        assert student.user_ND is not None
        parts, n = [], len(student.user_ND)
        for told_ND, user_ND in zip(teacher.user_ND.split(LOSS_ROWS), student.user_ND.split(LOSS_ROWS), strict=True):
            apart = checkpoint(self._dense_divergence, told_ND, user_ND, candidates, use_reentrant=False)
            parts.append(apart * (len(user_ND) / n))
        return torch.stack(parts).sum()

    def _dense_divergence(self, told_ND: Tensor, user_ND: Tensor, candidates: Candidates) -> Tensor:
        """Of some targets, from the user vectors of teacher and student."""
        said = [(vectors_ND @ candidates.ranked.T).float() + candidates.bias for vectors_ND in (told_ND, user_ND)]
        return self.teacher.divergence(*said)

    def _after_a_step_uphill(
        self, model: Generator, batch: Batch, candidates: Candidates | None, loss: Tensor
    ) -> Tensor:
        """The student's loss with the embeddings of codes moved to where it is worse (FGM)."""
        weight = model.get_parameter(CODES)
        (slope,) = torch.autograd.grad(loss, weight, retain_graph=True)
        moved = {CODES: weight + fgm_perturbation(slope, self.config.fgm_epsilon)}

        def student(perturbed: Generator, batch: Batch) -> Tensor:
            return self.supervised(self.read(perturbed, batch, candidates), batch, candidates, focal=True)

        return cast(Tensor, functional_call(model, moved, kwargs={"objective": student, "batch": batch}))


def make_teacher(
    config: SelfDistillationConfig, index: CatalogueIndex, d_model: int, keywords_IW: Tensor | None
) -> Teacher:
    """The teacher of a recipe.

    Raises:
        RecipeError: a privileged teacher without keywords.
    """
    if config.teacher == "privileged":
        if keywords_IW is None:
            raise RecipeError(
                "a privileged teacher reads keywords of items, and there are none; choose another teacher"
            )
        return PrivilegedTeacher(keywords_IW, config.temperature)
    search = RolloutSearch(index, config.rollouts)
    if config.teacher == "sibling":
        return SiblingTeacher(search, config.clip)
    return HindsightTeacher(search, index.n_levels, d_model)
