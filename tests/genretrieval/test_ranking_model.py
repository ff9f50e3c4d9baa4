from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genretrieval.errors import RecipeError
from genretrieval.model.ranking import (
    NO_PLACE,
    Catalogue,
    RankingConfig,
    RankingModel,
    RankingRequests,
    TargetAttention,
)
from genretrieval.training.ranking import (
    PADDING,
    RankingBatch,
    RankingTrainingConfig,
    Rows,
    calibrate,
    chain_loss,
    fit_platt,
    train_ranking_model,
)

CODES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]])
SIZES = (3, 4)
SMALL = RankingConfig(d_model=8, n_heads=2, d_hidden=16, max_history=4, n_places=3)
CHAIN = ("exposure", "click", "purchase")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(
    config: RankingConfig = SMALL,
    behaviours: Sequence[str] = CHAIN,
    catalogue: Catalogue = Catalogue(CODES),
    seed: int = 0,
) -> RankingModel:
    torch.manual_seed(seed)
    n_given = int(behaviours[0] == "exposure")
    return RankingModel(catalogue, SIZES, behaviours, n_given, n_events=3, query_vocab_size=6, config=config).eval()


def requests(history: Sequence[Sequence[int]], queries: Sequence[Sequence[int]] = ()) -> RankingRequests:
    """Histories, newest first, and queries; padded with what must not matter."""
    length = max(map(len, history))
    items = torch.tensor([[*row, *[3] * (length - len(row))] for row in history]).long()
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in history])
    words = max(map(len, queries), default=0)
    tokens = [[*query, *[0] * (words - len(query))] for query in queries or [[]] * len(history)]
    return RankingRequests(items, items % 3, mask, torch.tensor(tokens).long().reshape(len(history), words))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_by_hand() -> None:
    # Never shown; shown and clicked, not purchased; purchased, where nothing is left to decide; and padding.
    logits = torch.tensor([[[0.5, 9.0, 9.0], [1.0, -2.0, 0.3], [0.0, 1.0, 2.0], [7.0, 7.0, 7.0]]])
    depth = torch.tensor([[0, 2, 3, PADDING]])
    expected = -(
        math.log(sigmoid(-0.5))
        + math.log(sigmoid(1.0) * sigmoid(-2.0) * sigmoid(-0.3))
        + math.log(sigmoid(0.0) * sigmoid(1.0) * sigmoid(2.0))
    )
    assert chain_loss(logits, depth).item() == pytest.approx(expected / 3, rel=1e-6)
    assert chain_loss(logits, torch.full((1, 4), PADDING)).item() == 0


def test_what_is_not_decided_teaches_nothing() -> None:
    logits = torch.zeros(1, 3, 3, requires_grad=True)
    chain_loss(logits, torch.tensor([[0, 1, PADDING]])).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    # Halves of sigmoid(0) - label, for two items.
    assert logits.grad[0].tolist() == [[0.25, 0, 0], [-0.25, 0.25, 0], [0, 0, 0]]


def test_probabilities_are_products_of_the_chain_given_an_exposure() -> None:
    ranker = model()
    ranker.calibrate(torch.tensor([5.0, 2.0, 0.5]), torch.tensor([5.0, 1.0, -1.0]))
    found = ranker.log_probabilities(torch.tensor([[[3.0, 0.5, 4.0]]])).exp()
    click = sigmoid(2 * 0.5 + 1)
    assert found[0, 0].tolist() == pytest.approx([click, click * sigmoid(0.5 * 4 - 1)], rel=1e-6)
    assert ranker.outcomes == ("click", "purchase")
    assert model(behaviours=CHAIN[1:]).outcomes == ("click", "purchase")


def test_scores_of_a_chain_without_exposure() -> None:
    ranker = model(behaviours=("click",))
    asked, items = requests([[0, 1]]), torch.tensor([[2, 3]])
    scores = ranker.score(asked, items)
    assert scores.relevance_BK.tolist() == [[0, 0]]
    torch.testing.assert_close(scores.probabilities_BKM, ranker(asked, items).sigmoid())


def test_a_batch_scores_as_its_requests_do_alone() -> None:
    ranker = model()
    history, queries = [[0, 1, 2], [], [4]], [[1, 2], [], [5]]
    items = torch.tensor([[0, 1, 2, 4], [3, 3, 0, 1], [2, 1, 4, 4]])
    together = ranker(requests(history, queries), items)
    for row in range(3):
        for k in range(4):
            alone = ranker(requests([history[row]], [queries[row]]), items[row : row + 1, k : k + 1])
            assert torch.allclose(together[row, k], alone[0, 0], atol=1e-6)


def test_an_empty_history_brings_nothing_and_more_of_it_more() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(8, 2, 4)
    candidates, history = torch.randn(1, 3, 8), torch.ones(1, 4, 8)
    norms = [attention(candidates, history, torch.arange(4)[None] < n).norm(dim=-1).tolist()[0] for n in range(5)]
    assert norms[0] == [0, 0, 0]
    assert all((np.diff([norm[k] for norm in norms]) > 0).all() for k in range(3))
    assert attention(candidates, history[:, :0], torch.ones(1, 0, dtype=torch.bool)).norm() == 0


def test_attention_by_hand() -> None:
    # One head of width 1, all maps 1: candidate 2 and history (1, 3), logits 2 and 6, and 0 for nothing.
    attention = TargetAttention(1, 1, 2)
    for linear in (attention.query, attention.key, attention.value, attention.output):
        torch.nn.init.ones_(linear.weight)
    torch.nn.init.constant_(attention.recency, 0.5)
    found = attention(torch.tensor([[[2.0]]]), torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2, dtype=torch.bool))
    near, far = math.exp(2.5), math.exp(6.5)
    assert found.item() == pytest.approx((near * 1 + far * 3) / (near + far + 1), rel=1e-6)


def test_a_query_is_the_mean_of_its_tokens() -> None:
    ranker = model()
    assert ranker.query_embedding is not None
    found = ranker.query(torch.tensor([[1, 4, 0], [0, 0, 0]]))
    assert torch.allclose(found[0], (ranker.query_embedding.weight[1] + ranker.query_embedding.weight[4]) / 2)
    assert found[1].abs().sum() == 0


def test_an_item_is_its_codes_and_its_content() -> None:
    content = torch.tensor([[1.0, 0], [0, 2], [3, 3], [0, 0], [5, 0]])
    ranker = model(catalogue=Catalogue(CODES, content))
    assert ranker.content_map is not None
    table, projection = ranker.code_embedding.weight, ranker.content_map.weight
    # Row 1: code 0 of level 0 and code 1 of level 1, which begins at 3; its content points along the second axis.
    expected = table[0] + table[3 + 1] + projection[:, 1] * math.sqrt(2)
    assert torch.allclose(ranker.items(torch.tensor([[1]]))[0, 0], expected, atol=1e-6)
    # Row 3 has no content.
    assert torch.allclose(ranker.items(torch.tensor([3]))[0], table[1] + table[3 + 1], atol=1e-6)


def test_items_that_training_never_saw_are_scored_by_equal_weights() -> None:
    content = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    old = model(catalogue=Catalogue(CODES, content))
    grown = Catalogue(torch.cat([CODES, torch.tensor([[2, 3], [0, 1]])]), torch.cat([content, content[[4, 1]]]))
    new = model(catalogue=grown, seed=1)
    new.load_state_dict(old.state_dict())
    asked = requests([[0, 1]], [[2]])
    found = new(asked, torch.tensor([[0, 1, 5, 6]]))
    assert torch.allclose(found[:, :2], old(asked, torch.tensor([[0, 1]])))
    assert torch.allclose(found[0, 3], found[0, 1])  # the very same item under another row
    assert found[0, 2].isfinite().all()
    assert not torch.allclose(found[0, 2], found[0, 1])


def test_a_place_moves_the_click_alone_and_no_score() -> None:
    ranker = model()
    assert ranker.place_bias is not None
    with torch.no_grad():
        ranker.place_bias.copy_(torch.tensor([-1.0, -2.0]))
    logits = torch.randn(1, 5, 3)
    moved = ranker.at_places(logits, torch.tensor([[0, 1, 2, 7, NO_PLACE]])) - logits
    assert moved[0, :, 1].tolist() == pytest.approx([0, -1, -2, -2, 0])
    assert moved[..., [0, 2]].abs().max() == 0
    without = model(RankingConfig(d_model=8, n_heads=2, d_hidden=16, position_bias=False))
    assert torch.equal(without.at_places(logits, torch.tensor([[0, 1, 2, 7, NO_PLACE]])), logits)


def test_its_size_besides_tables() -> None:
    torch.manual_seed(0)
    config = RankingConfig()
    catalogue = Catalogue(CODES, torch.ones(5, 384))
    ranker = RankingModel(catalogue, SIZES, ("exposure", "click", "cart", "purchase"), 1, 4, 4096, config)
    tables = sum(p.numel() for name, p in ranker.named_parameters() if "embedding" in name)
    assert sum(p.numel() for p in ranker.parameters()) - tables < 300_000


@pytest.mark.parametrize(
    "wrong", [{"d_model": 0}, {"n_heads": 3}, {"dropout": 1.0}, {"query_vocab_size": -1}, {"n_places": 0}]
)
def test_sizes_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong)) if "n_heads" not in wrong else "heads"):
        RankingConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}])
def test_schedules_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="above 0"):
        RankingTrainingConfig(**wrong)  # type: ignore[arg-type]


def test_platt_by_hand() -> None:
    # Symmetric: nothing to change.
    assert fit_platt(np.zeros(2), np.array([True, False])) == (1, 0)
    # Equal logits say nothing of the slope; 2 log(1 + e^-(2 + b)) + 50 b^2 is least where 50 b = sigmoid(-2 - b).
    slope, intercept = fit_platt(np.full(2, 2.0), np.array([True, True]))
    assert slope == 1
    assert 50 * intercept == pytest.approx(sigmoid(-2 - intercept))
    # Logits 0 and 2 are -1 and 1 about their mean: both derivatives are 0, that by a and that by b.
    slope, intercept = fit_platt(np.array([0.0, 2.0]), np.array([False, True]))
    shift = intercept - (1 - slope)
    low, high = sigmoid(1 - slope + shift), sigmoid(1 + slope + shift)
    assert 100 * (slope - 1) == pytest.approx(low + (1 - high))
    assert 100 * shift == pytest.approx((1 - high) - low)
    assert fit_platt(np.empty(0), np.empty(0, np.bool_)) == (1, 0)


def test_platt_undoes_a_distortion() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(-2, 1.5, 40_000)
    labels = rng.random(len(true)) < 1 / (1 + np.exp(-true))
    slope, intercept = fit_platt((true - 0.5) / 0.8, labels)
    assert slope == pytest.approx(0.8, abs=0.03)
    assert intercept == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_platt_stays_finite_where_labels_are_separated(scale: float) -> None:
    logits = scale * np.linspace(-1, 1, 50)
    slope, intercept = fit_platt(logits, logits > 0)
    assert np.isfinite([slope, intercept]).all()
    assert slope > 0


class Log:
    """Clicks on made pages: places 0 and 1 are looked at with odds that differ, items 0 and 1 are equally liked.

    Item 0 has stood on the first place four times of five.
    """

    def __init__(self, n: int, bias: float = -1.5) -> None:
        rng = np.random.default_rng(0)
        first = (rng.random(n) < 0.2).astype(np.int64)
        self.items = np.column_stack([first, 1 - first])
        logits = np.array([0.3, -1.0, 0.0])
        shown = rng.random((n, 2)) < 1 / (1 + np.exp(-(logits[0] + np.array([0.0, bias]))))
        bought = rng.random((n, 2)) < 1 / (1 + np.exp(-logits[1]))
        self.depths = 1 + shown + (shown & bought)

    def __call__(self, rows: Rows) -> RankingBatch:
        places = torch.arange(2).expand(len(rows), 2)
        items, depths = torch.from_numpy(self.items[rows]), torch.from_numpy(self.depths[rows])
        return RankingBatch(requests([[]] * len(rows)), items, places, depths)


def trained(log: Log, *, position_bias: bool = True, seed: int = 0) -> RankingModel:
    config = RankingConfig(d_model=8, n_heads=2, d_hidden=16, max_history=4, n_places=3, position_bias=position_bias)
    ranker = model(config, catalogue=Catalogue(CODES[:2]), seed=seed)
    rows = np.arange(len(log.items))
    schedule = RankingTrainingConfig(epochs=2, batch_size=64, learning_rate=0.01, seed=seed)
    train_ranking_model(ranker, log, rows[: -len(rows) // 5], rows[-len(rows) // 5 :], schedule)
    return ranker


def clicks(ranker: RankingModel) -> Tensor:
    with torch.inference_mode():
        return ranker.score(requests([[]]), torch.tensor([[0, 1]])).probabilities_BKM[0, :, 0]


def test_the_correction_tells_an_item_from_its_place() -> None:
    log = Log(4000)
    corrected, uncorrected = trained(log), trained(log, position_bias=False)
    assert corrected.place_biases()[1].item() == pytest.approx(-1.5, abs=0.25)
    # Equally liked, so equally likely on the first place, and as likely as is true.
    assert clicks(corrected).tolist() == pytest.approx([sigmoid(0.3)] * 2, abs=0.05)
    assert clicks(uncorrected)[0] - clicks(uncorrected)[1] > 0.05


def test_equal_seeds_train_equal_models() -> None:
    log = Log(300)
    first, again, other = (trained(log, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["place_bias"], other["place_bias"])


def test_the_best_epoch_is_kept_and_calibrated() -> None:
    """On pure noise every epoch after the first learns the noise; what is left is the first epoch's state."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(1, 4, (200, 2)) for _ in range(2)]

    class Noise(Log):
        def __init__(self) -> None:
            self.items = rng.integers(0, 5, (400, 2))
            self.depths = np.concatenate(batches)

    log, ranker = Noise(), model()
    rows = np.arange(400)
    schedule = RankingTrainingConfig(epochs=4, batch_size=16, learning_rate=0.1)
    epochs = train_ranking_model(ranker, log, rows[:200], rows[200:], schedule)
    assert not ranker.training
    with torch.inference_mode():
        batch = log(rows[200:])
        logits = ranker.at_places(ranker(batch.requests, batch.items_BK), batch.places_BK)
        loss = chain_loss(logits, batch.depth_BK).item()
        # What was chosen is also what was calibrated, and calibration does not raise what it minimises.
        calibrated = chain_loss(ranker.slope * logits + ranker.intercept, batch.depth_BK).item()
    assert loss == pytest.approx(min(epoch["validation_loss"] for epoch in epochs), rel=1e-5)
    assert calibrated <= loss + 1e-6
    before = ranker.slope.clone()
    calibrate(ranker, log, rows[200:])
    assert torch.equal(ranker.slope, before)


def test_probabilities_fall_along_the_chain() -> None:
    ranker = model(behaviours=("exposure", "click", "cart", "purchase"))
    found = ranker.score(requests([[0, 1]]), torch.tensor([[0, 1, 2, 3, 4]])).probabilities_BKM
    assert (found[..., 1:] < found[..., :-1]).all()
    assert torch.allclose(found[..., 0], logsigmoid(ranker(requests([[0, 1]]), torch.arange(5)[None])[..., 1]).exp())
