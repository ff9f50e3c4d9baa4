from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genretrieval.catalogue import build_index
from genretrieval.features import RequestFeatures
from genretrieval.model.generator import Decoded
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training import objectives
from genretrieval.training.data import HistoryDataset, collate, cut_windows
from genretrieval.training.full_softmax import full_softmax_loss
from genretrieval.training.objectives import NextItemObjective

# Code 1 of level 0 names nothing. Under (0,) exist (0, 1) and (0, 2); under (2,) only (2, 0).
IDS = SemanticIds(np.array([[0, 1], [0, 2], [2, 0]], np.int32), (3, 4))
LOGITS = {
    0: [math.log(2.0), 50.0, math.log(3.0)],
    1: [math.log(7.0), math.log(4.0), math.log(5.0), 50.0],
}


class ByHand(nn.Module):
    """A model whose every state is zero and whose logits are given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.ParameterList([nn.Parameter(torch.tensor(LOGITS[level])) for level in range(2)])
        self.dense = None

    def decode_targets(self, batch: dict[str, Tensor]) -> Decoded:
        shape = batch["target_codes"].shape
        return Decoded(torch.zeros(*shape, 1), torch.zeros(*shape[:2], 1))

    def level_logits(self, states: Tensor, level: int) -> Tensor:
        return self.logits[level] + states


def batch(items: list[list[int]], learn: list[list[bool]]) -> dict[str, Tensor]:
    rows = torch.tensor(items)
    codes = torch.from_numpy(IDS.codes).long()[rows]
    empty = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.long)
    return {
        "target_items": rows,
        "target_codes": codes,
        "learn": torch.tensor(learn),
        "history_codes": codes[:, :-1],
        "history_events": empty,
        "history_gaps": empty,
        "history_mask": empty.bool(),
        "profile": torch.zeros(rows.shape[0], 0, dtype=torch.long),
        "query_rows": torch.empty(0, dtype=torch.long),
        "query_tokens": torch.zeros(0, 1, dtype=torch.long),
        "query_mask": torch.zeros(0, 1, dtype=torch.bool),
    }


def item_losses() -> list[float]:
    """Level 0 chooses between weights 2 and 3; level 1 between 4 and 5, or has one choice."""
    return [
        (-math.log(2 / 5) - math.log(4 / 9)) / 2,
        (-math.log(2 / 5) - math.log(5 / 9)) / 2,
        (-math.log(3 / 5) - math.log(1.0)) / 2,
    ]


@pytest.mark.parametrize("item", [0, 1, 2])
def test_the_loss_of_one_item_by_hand(item: int) -> None:
    loss = NextItemObjective(build_index(IDS))(ByHand(), batch([[item]], [[True]]))
    assert float(loss.detach()) == pytest.approx(item_losses()[item], abs=1e-6)


def test_the_loss_is_the_mean_over_what_is_to_be_learnt() -> None:
    made = batch([[0, 1, 2], [2, 0, 0]], [[True, True, False], [True, False, False]])
    loss = NextItemObjective(build_index(IDS))(ByHand(), made)
    expected = np.mean([item_losses()[item] for item in (0, 1, 2)])
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)


def test_only_codes_that_exist_get_gradient() -> None:
    model = ByHand()
    NextItemObjective(build_index(IDS))(model, batch([[0]], [[True]])).backward()
    first, second = (parameter.grad for parameter in model.logits)
    assert first is not None
    assert second is not None
    # Half the softmax minus the target, as the mean is over two levels.
    assert first.tolist() == pytest.approx([(2 / 5 - 1) / 2, 0.0, (3 / 5) / 2], abs=1e-6)
    assert second.tolist() == pytest.approx([0.0, (4 / 9 - 1) / 2, (5 / 9) / 2, 0.0], abs=1e-6)


def test_existing_codes_are_those_of_a_dict_trie(make_ids: Any) -> None:
    ids = make_ids(60, seed=4)
    objective = NextItemObjective(build_index(ids))
    items = torch.arange(60)
    for level, size in enumerate(ids.codebook_sizes):
        expected = np.zeros((60, size), bool)
        for row, codes in enumerate(ids.codes):
            siblings = (ids.codes[:, :level] == codes[:level]).all(1)
            expected[row, ids.codes[siblings, level]] = True
        assert np.array_equal(objective.existing_codes(items, level).numpy(), expected)


def test_it_reads_the_model_as_it_is_asked(make_generator: Any, make_histories: Any, make_ids: Any) -> None:
    """The loss is the mean, over targets and levels, of what beam search adds up for the target's own leaf."""
    generator, ids, histories = (
        make_generator(query_vocab_size=0, n_scenarios=0, n_past_tokens=0, max_past=0),
        make_ids(30),
        make_histories(5),
    )
    windows = cut_windows(histories.offsets, histories.offsets[1:], 8)
    profiles = np.arange(10).reshape(5, 2) % 7
    dataset = HistoryDataset(histories, windows, ids, RequestFeatures(events=("purchase",)), profiles)
    made = collate([dataset[row] for row in range(len(dataset))])
    # The tiny model knows four gaps.
    made["history_gaps"] %= 4
    index = build_index(ids)
    with torch.no_grad():
        loss = generator(objective=NextItemObjective(index, dense_weight=0.0), batch=made)
        parts = []
        for row, target in torch.argwhere(made["learn"]).tolist():
            past = {name: made[name][row : row + 1, :target] for name in made if name.startswith("history_")}
            past["history_vectors"] = generator.dense.read(made["target_items"][row : row + 1, :target])
            codes = made["target_codes"][row, target]
            flat = torch.cat([torch.zeros(1).long(), codes[:-1] + generator.context.level_offsets[:-1]])[None]
            logits = generator(**past, profile=made["profile"][row : row + 1], decoder_input_ids=flat).logits[0]
            for level in range(3):
                siblings = ids.codes[(ids.codes[:, :level] == codes[:level].numpy()).all(1), level]
                offset = generator.config.level_offsets[level]
                among = logits[level, np.unique(siblings) + offset]
                parts.append(float(among.logsumexp(0) - logits[level, codes[level] + offset]))
    assert float(loss) == pytest.approx(np.mean(parts), abs=1e-5)


class ByHandDense(ByHand):
    """The same, with three item vectors and one user vector."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = torch.tensor([[0.0], [math.log(2.0)], [math.log(5.0)]])
        self.dense = self

    def read(self, rows: Tensor) -> Tensor:
        return torch.zeros(*rows.shape, 1)

    def rank(self) -> Tensor:
        return self.vectors

    def user_vectors(self, states_ND: Tensor, seen_ND: Tensor) -> Tensor:
        return torch.ones_like(states_ND + seen_ND)


@pytest.mark.parametrize(("trained", "expected"), [([0, 1, 2], math.log(8 / 2)), ([0, 1], math.log(3 / 2))])
def test_the_dense_loss_runs_over_the_items_of_training(trained: list[int], expected: float) -> None:
    """exp of the logits is 1, 2 and 5; item 1 is the target."""
    made, index = batch([[1]], [[True]]), build_index(IDS)
    rows = np.asarray(trained)
    codes = NextItemObjective(index)(ByHand(), made)
    for weight in (1.0, 0.25):
        both = NextItemObjective(index, rows, dense_weight=weight)(ByHandDense(), made)
        assert float((both - codes).detach()) == pytest.approx(weight * expected, rel=1e-2)


def test_a_sampled_softmax_estimates_the_whole_one(monkeypatch: Any, make_generator: Any, make_ids: Any) -> None:
    """The mean of many samples of a third of the items comes near the loss over all of them."""
    ids, generator = make_ids(30), make_generator()
    objective = NextItemObjective(build_index(ids), np.arange(1, 30))
    items, user = torch.tensor([3, 7, 7]), torch.randn(3, 32)

    def loss() -> float:
        chosen = objective.candidates(generator, {"target_items": torch.tensor([[3, 7, 7, 0]])})
        assert {3, 7, 0} <= set(chosen.rows.tolist())
        # One that training never saw is no candidate.
        assert chosen.bias[chosen.places(torch.tensor([0]))].item() == -torch.inf
        assert torch.equal(chosen.rows[chosen.places(items)], items)
        return float(full_softmax_loss(0.1 * user, chosen.ranked, chosen.places(items), chosen.bias).detach())

    whole = loss()
    monkeypatch.setattr(objectives, "MAX_SOFTMAX_ITEMS", 12)
    assert np.mean([loss() for _ in range(300)]) == pytest.approx(whole, rel=0.03)


def test_the_full_softmax_has_the_gradients_of_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, vectors = torch.randn(600, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    target, bias = torch.randint(40, (600,)), torch.randn(40)
    ours = full_softmax_loss(hidden, vectors, target, bias)
    theirs = nn.functional.cross_entropy(hidden @ vectors.T + bias, target)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-2)
    gradients = zip(*(torch.autograd.grad(2 * loss, (hidden, vectors)) for loss in (ours, theirs)), strict=True)
    for one, other in gradients:
        assert (one - other).norm() < 0.01 * other.norm()
