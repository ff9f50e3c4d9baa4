from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genretrieval.catalogue import build_index
from genretrieval.errors import RecipeError
from genretrieval.features import RequestFeatures
from genretrieval.model.generator import Decoded
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training import self_distillation
from genretrieval.training.data import HistoryDataset, collate, cut_windows
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.rollouts import Rollouts, RolloutSearch
from genretrieval.training.self_distillation import (
    HindsightTeacher,
    PrivilegedTeacher,
    SelfDistillationConfig,
    SelfDistillationObjective,
    SiblingTeacher,
    make_teacher,
    target_contexts,
)

# Under (0,) exist (0, 0) and (0, 1); under (1,) only (1, 0): of it level 1 has nothing to say.
IDS = SemanticIds(np.array([[0, 0], [0, 1], [1, 0]], np.int32), (2, 2))
KEYWORDS = torch.tensor([[7, 0], [8, 9], [0, 0]])
# Embeddings of codes 0 and 1 of level 0, then of level 1.
CODES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 4.0]])


class ByHand(nn.Module):
    """A model of two codes a level, evenly likely; what it is told makes the first three times as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 2))
        self.told = nn.Parameter(torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]]))
        self.dense: Any = None
        self.context = self
        self.batches: list[dict[str, Tensor]] = []

    def embed(self, codes: Tensor) -> Tensor:
        return CODES[codes + torch.tensor([0, 2])]

    def decode_targets(self, batch: dict[str, Tensor]) -> Decoded:
        self.batches.append(batch)
        shape = batch["target_codes"].shape
        told = torch.zeros(shape[:2]).flatten()
        told[batch["query_rows"]] = batch["query_mask"].any(1).float()
        if "hint_rows" in batch:
            told[batch["hint_rows"]] = batch["hint_mask"].any(1).float()
        states = told.view(*shape[:2], 1, 1).expand(*shape, 1)
        return Decoded(states, torch.zeros(*shape[:2], 1))

    def level_logits(self, states: Tensor, level: int) -> Tensor:
        return self.logits[level] + states * self.told[level]


def batch(items: list[list[int]], learn: list[list[bool]] | None = None) -> dict[str, Tensor]:
    rows = torch.tensor(items)
    codes = torch.from_numpy(IDS.codes).long()[rows]
    return {
        "target_items": rows,
        "target_codes": codes,
        "learn": torch.ones_like(rows, dtype=torch.bool) if learn is None else torch.tensor(learn),
        "query_rows": torch.empty(0, dtype=torch.long),
        "query_tokens": torch.zeros(0, 1, dtype=torch.long),
        "query_mask": torch.zeros(0, 1, dtype=torch.bool),
    }


def rollouts(*codes: list[tuple[int, int]], short: int = 0) -> Rollouts:
    """Rollouts of each target, the last `short` of which ended short."""
    codes_NGL = torch.tensor(codes)
    mask = torch.arange(codes_NGL.shape[1]) < codes_NGL.shape[1] - short
    return Rollouts(
        torch.zeros(codes_NGL.shape[:2]).long(),
        codes_NGL,
        torch.zeros(codes_NGL.shape),
        mask.expand(codes_NGL.shape[:2]),
    )


def teacher_of(name: str, monkeypatch: pytest.MonkeyPatch, found: Rollouts | None = None, clip: float = 0.2) -> Any:
    monkeypatch.setattr(self_distillation, "target_contexts", lambda *_: None)

    class Search(nn.Module):
        def forward(self, *_: object) -> Rollouts | None:
            return found

    search: Any = Search()
    if name == "privileged":
        return PrivilegedTeacher(KEYWORDS, 1.0)
    return SiblingTeacher(search, clip) if name == "sibling" else HindsightTeacher(search, 2, 2)


def loss_of(model: Any, teacher: Any, made: dict[str, Tensor], **settings: Any) -> Tensor:
    objective = SelfDistillationObjective(
        NextItemObjective(build_index(IDS)), teacher, SelfDistillationConfig(**settings)
    )
    loss: Tensor = objective(model, made)
    return loss


# Both levels of item 0: the student says 1/2 and 1/2, the teacher 3/4 and 1/4; the true code is the first.
STUDENT, TEACHER = math.log(2), math.log(4 / 3)
SHARES = (3 / 4 * math.log(3 / 2), 1 / 4 * math.log(1 / 2))
MIDDLE = (3 / 4 * math.log(6 / 5) + 1 / 4 * math.log(2 / 3) + 1 / 2 * math.log(4 / 5) + 1 / 2 * math.log(4 / 3)) / 2
DIVERGENCES = {"privileged": sum(SHARES), "sibling": min(0.2, SHARES[0]) + SHARES[1], "hindsight": MIDDLE}


@pytest.mark.parametrize(("name", "divergence"), DIVERGENCES.items())
def test_the_loss_of_each_teacher_by_hand(name: str, divergence: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rollouts([(0, 1), (1, 0)])
    model = ByHand()
    loss = loss_of(model, teacher_of(name, monkeypatch, found), batch([[0]]), teacher_weight=0.5, weight=2.0)
    assert loss.item() == pytest.approx(STUDENT + 0.5 * TEACHER + 2 * divergence, abs=1e-6)


class ByHandDense(ByHand):
    """The same with three item vectors; what it is told doubles its user vector, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = self

    def read(self, rows: Tensor) -> Tensor:
        return torch.zeros(*rows.shape, 1)

    def rank(self) -> Tensor:
        return torch.tensor([[0.0], [math.log(2)], [math.log(5)]])

    def user_vectors(self, states_ND: Tensor, _: Tensor) -> Tensor:
        return 1 + states_ND


def test_the_dense_head_is_taught_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training knows items 0 and 1: the student says 1/3 and 2/3, the teacher 1/5 and 4/5; item 1 is the target."""
    monkeypatch.setattr(self_distillation, "LOSS_ROWS", 1)
    apart = 1 / 5 * math.log(3 / 5) + 4 / 5 * math.log(6 / 5)
    made = batch([[1, 1]])
    config = SelfDistillationConfig(weight=2.0, teacher_weight=0.5)
    losses = []
    for model in (ByHand(), ByHandDense()):
        next_item = NextItemObjective(build_index(IDS), np.array([0, 1]), dense_weight=0.25)
        losses.append(SelfDistillationObjective(next_item, PrivilegedTeacher(KEYWORDS, 1.0), config)(model, made))
    added = math.log(3 / 2) + 0.5 * math.log(5 / 4) + 2 * apart
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(0.25 * added, rel=1e-2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_divergence_teaches_the_student_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ByHand()
    # What is clipped has no gradient.
    teacher = teacher_of(name, monkeypatch, rollouts([(0, 1), (1, 0)]), clip=9.0)
    loss_of(model, teacher, batch([[0]]), teacher_weight=0.0, weight=2.0).backward()  # type: ignore[no-untyped-call]
    assert model.told.grad is not None
    assert not model.told.grad.any()
    plain = ByHand()
    NextItemObjective(build_index(IDS))(plain, batch([[0]])).backward()
    assert model.logits.grad is not None
    assert plain.logits.grad is not None
    # Towards the teacher's choice, beyond what the label says.
    assert (model.logits.grad[:, 0] < plain.logits.grad[:, 0]).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_student_reads_the_request_as_it_is_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = ByHand(), batch([[0, 1]])
    before = {key: tensor.clone() for key, tensor in made.items()}
    loss_of(model, teacher_of(name, monkeypatch, rollouts([(0, 1)], [(0, 0)])), made)
    student, teacher = model.batches
    assert student.keys() == before.keys()
    assert all(torch.equal(student[key], before[key]) for key in before)
    assert set(teacher) - {"query_rows", "query_tokens", "query_mask"} >= set(before) - {
        "query_rows",
        "query_tokens",
        "query_mask",
    }
    assert all(torch.equal(teacher[key], before[key]) for key in ("target_items", "target_codes", "learn"))


def test_the_privileged_teacher_reads_keywords_behind_the_query() -> None:
    made = batch([[1, 0, 2], [1, 2, 0]], [[True, True, False], [True, True, False]])
    # Target 1 of row 0 (item 0) and target 1 of row 1 (item 2, which has no keywords) came with queries.
    made |= {"query_rows": torch.tensor([1, 4]), "query_tokens": torch.tensor([[5, 0, 0], [4, 3, 2]])}
    made["query_mask"] = made["query_tokens"] != 0
    model: Any = ByHand()
    read = PrivilegedTeacher(KEYWORDS, 1.0).read(model, made)
    assert read["query_rows"].tolist() == [0, 1, 3, 4]
    assert read["query_tokens"].tolist() == [[8, 9, 0], [5, 7, 0], [8, 9, 0], [4, 3, 2]]
    assert torch.equal(read["query_mask"], read["query_tokens"] != 0)


def scaled(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def test_the_sibling_is_the_best_rollout_that_is_not_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rollouts(
        [(1, 0), (0, 0), (0, 1)],  # for (0, 0): the second is the target, the third shares a code
        [(1, 1), (1, 0), (0, 0)],  # for (0, 1): the third
        [(1, 0), (0, 1), (0, 0)],  # for (1, 0): none shares a code, the second is likelier
    )
    model: Any = ByHand()
    teacher = teacher_of("sibling", monkeypatch, found)
    read = teacher.read(model, batch([[0, 1, 2]]))
    # (0, 1), (0, 0) and (0, 1).
    expected = scaled(torch.stack([CODES[0] + CODES[3], CODES[0] + CODES[2], CODES[0] + CODES[3]]))
    assert torch.allclose(read["hint_states"][:, 0], expected, atol=1e-5)
    assert read["hint_rows"].tolist() == [0, 1, 2]
    assert read["hint_mask"].all()


def test_without_another_rollout_the_teacher_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rollouts([(0, 0), (0, 1)], short=1)
    model: Any = ByHand()
    for name in ("sibling", "hindsight"):
        assert not teacher_of(name, monkeypatch, found).read(model, batch([[0]]))["hint_mask"].any()


def test_hindsight_marks_how_far_each_rollout_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rollouts([(1, 0), (0, 0), (0, 1), (1, 1)], short=1)
    model: Any = ByHand()
    teacher = teacher_of("hindsight", monkeypatch, found)
    read = teacher.read(model, batch([[0]]))
    assert read["hint_mask"].tolist() == [[True, False, True, False]]
    wrong, half_right = teacher.marks_LD
    expected = scaled(torch.stack([CODES[1] + CODES[2] + wrong, CODES[0] + CODES[3] + half_right]))
    assert torch.allclose(read["hint_states"][0, [0, 2]], expected, atol=1e-5)
    assert not torch.allclose(wrong, half_right)


def test_focal_changes_the_students_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("privileged", monkeypatch)
    loss = loss_of(ByHand(), teacher, batch([[0]]), weight=1.0, focal_alpha=2.0, focal_gamma=3.0)
    focal = 2 * (1 / 2) ** 3 * math.log(2)
    assert loss.item() == pytest.approx(focal + TEACHER + DIVERGENCES["privileged"], abs=1e-6)


@pytest.fixture
def made(make_histories: Any, make_ids: Any) -> tuple[dict[str, Tensor], Any]:
    """A batch in which the second half of every history is learnt, and the index of its items."""
    ids, histories = make_ids(30), make_histories(5)
    windows = cut_windows(histories.offsets, histories.offsets[1:], 8)
    dataset = HistoryDataset(histories, windows, ids, RequestFeatures(events=("purchase",)), np.zeros((5, 2), int))
    found = collate([dataset[row] for row in range(len(dataset))])
    found["history_gaps"] %= 4  # the tiny model knows four
    learnt = found["learn"].nonzero()
    found["query_rows"] = (learnt[::2, 0] * found["learn"].shape[1] + learnt[::2, 1]).contiguous()
    found["query_tokens"] = torch.arange(1, 1 + len(found["query_rows"])).remainder(10)[:, None] * torch.tensor([1, 0])
    found["query_mask"] = found["query_tokens"] != 0
    n = len(found["learn"])
    found["past_items"] = torch.arange(30)
    found["past_codes"] = torch.from_numpy(ids.codes).long()
    found["past_rows"] = torch.arange(3 * n).view(n, 3) % 30
    found["past_events"] = found["past_rows"] % 3
    found["past_mask"] = torch.arange(3) < torch.arange(n)[:, None] % 4
    return found, build_index(ids)


def with_vectors(generator: Any, index: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return NextItemObjective(index).with_vectors(generator, found)


@torch.no_grad()
def test_rollouts_are_those_of_each_request_alone(made: Any, make_generator: Any) -> None:
    found, index = made
    generator = make_generator().train()
    full = with_vectors(generator, index, found)
    search = RolloutSearch(index, 4)
    together = search(generator, target_contexts(generator, full))
    assert generator.training
    generator.eval()
    asked = {int(row): i for i, row in enumerate(full["query_rows"])}
    for n, (row, target) in enumerate(full["learn"].nonzero().tolist()):
        request = {name: full[name][row : row + 1, :target] for name in full if name.startswith("history_")}
        request |= {name: full[name][row : row + 1] for name in ("past_events", "past_mask")}
        request |= {name: full[name][full["past_rows"][row : row + 1]] for name in ("past_codes", "past_vectors")}
        query = asked.get(row * full["learn"].shape[1] + target)
        tokens = full["query_tokens"][query : query + 1] if query is not None else torch.zeros(1, 1).long()
        request |= {"query_tokens": tokens, "query_mask": tokens != 0, "profile": full["profile"][row : row + 1]}
        request["scenario"] = full["target_scenarios"][row : row + 1, target]
        alone = search(generator, generator.context(request))
        assert torch.allclose(together.logp_NGL[n], alone.logp_NGL[0], atol=1e-4)
        assert together.items_NG[n].tolist() == alone.items_NG[0].tolist()


@torch.no_grad()
def test_a_hint_is_heard_by_its_target_alone(made: Any, make_generator: Any) -> None:
    found, index = made
    generator = make_generator()
    full = with_vectors(generator, index, found)
    told = full["learn"].flatten().nonzero()[:2, 0]
    hints = {"hint_rows": told, "hint_states": torch.randn(2, 3, 16), "hint_mask": torch.ones(2, 3).bool()}
    plain = generator.decode_targets(full).states_BTLD.flatten(0, 1)
    other = generator.decode_targets({**full, **hints}).states_BTLD.flatten(0, 1)
    changed = ~torch.isclose(plain, other, atol=1e-5).flatten(1).all(1)
    assert changed.nonzero()[:, 0].tolist() == told.tolist()
    hints["hint_mask"] = torch.zeros(2, 3).bool()
    unheard = generator.decode_targets({**full, **hints}).states_BTLD.flatten(0, 1)
    assert torch.allclose(plain, unheard, atol=1e-5)


@pytest.mark.parametrize("queries", [True, False], ids=["with queries", "without"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_teacher_trains_a_whole_generator(made: Any, make_generator: Any, name: Any, queries: bool) -> None:
    found, index = made
    if name == "privileged" and not queries:
        return
    generator = make_generator(**({} if queries else {"query_vocab_size": 0})).train()
    if not queries:
        found = {**found, "query_rows": found["query_rows"][:0], "query_tokens": found["query_tokens"][:0]}
        found["query_mask"] = found["query_tokens"] != 0
    config = SelfDistillationConfig(teacher=name, rdrop_weight=0.5, fgm_epsilon=0.6, focal_alpha=2.0, focal_gamma=3.0)
    teacher = make_teacher(config, index, 16, torch.ones(30, 2).long())
    loss = generator(objective=SelfDistillationObjective(NextItemObjective(index), teacher, config), batch=found)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in generator.parameters())


def test_a_step_uphill_costs_more_and_is_taken_back(made: Any, make_generator: Any) -> None:
    found, index = made
    generator = make_generator()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}

    def loss(**settings: Any) -> float:
        config = SelfDistillationConfig(**settings)
        teacher = make_teacher(config, index, 16, torch.ones(30, 2).long())
        objective = SelfDistillationObjective(NextItemObjective(index), teacher, config)
        return float(generator(objective=objective, batch=found).detach())

    served = float(generator(objective=NextItemObjective(index), batch=found).detach())
    plain = loss()
    added = loss(fgm_epsilon=0.05) - plain
    assert added > served + 1e-4
    assert added == pytest.approx(served, rel=0.2)
    # Without dropout a second reading is the first again.
    assert loss(rdrop_weight=0.5) == pytest.approx(plain, abs=1e-5)
    after = generator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight is 0.0"),
        ({"teacher_weight": -1.0}, "teacher_weight is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"clip": math.inf}, "clip is inf"),
        ({"rollouts": 1}, "rollouts is 1"),
        ({"rdrop_weight": -0.5}, "rdrop_weight is -0.5"),
        ({"fgm_epsilon": math.nan}, "fgm_epsilon is nan"),
        ({"focal_alpha": 0.0}, "focal_alpha is 0.0"),
        ({"focal_gamma": -3.0}, "focal_gamma is -3.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SelfDistillationConfig(**settings)


def test_a_privileged_teacher_needs_keywords() -> None:
    with pytest.raises(RecipeError, match="keywords"):
        make_teacher(SelfDistillationConfig(), build_index(IDS), 4, None)
