"""Training of the ranking model: its loss, its loop, and its calibration.

Tensor names carry the shapes of `genretrieval.model.ranking`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genretrieval.errors import RecipeError
from genretrieval.model.ranking import RankingModel, RankingRequests

PADDING = -1
"""Depth of what only fills up a row of a batch."""

# Precision of the prior of a calibration: a tenth is its standard deviation. A model that minimises a likelihood is
# nearly calibrated, and a few hundred clicks do not know its odds much better than that: on the demo shop, a weaker
# prior left larger errors.
_PRIOR = 100.0
_NEWTON_STEPS = 25

Rows = NDArray[np.int64]


class RankingBatch(NamedTuple):
    """Requests with items and what came of them.

    Attributes:
        requests: B requests.
        items_BK: int64, item rows; any row in padding.
        places_BK: int64, where on the page each was shown, `genretrieval.model.ranking.NO_PLACE` where unknown.
        depth_BK: int64, how many behaviours of the model's chain came of each, or `PADDING`.
    """

    requests: RankingRequests
    items_BK: Tensor
    places_BK: Tensor
    depth_BK: Tensor


Fetch = Callable[[Rows], RankingBatch]


@dataclass(frozen=True, slots=True)
class RankingTrainingConfig:
    """How long and how fast to learn.

    Attributes:
        epochs: passes over the training requests; the one with the lowest validation loss is kept.
        batch_size: requests a step.
        learning_rate: AdamW's at the start; it falls in a straight line to 0.
        weight_decay: AdamW's, on matrices.
        seed: of initial weights, order and dropout. Equal seed and thread count give equal weights on CPU.

    Raises:
        RecipeError: a value is out of range.
    """

    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate) <= 0 or self.weight_decay < 0:
            raise RecipeError(f"{self}: epochs, batch size and rate must be above 0, and weight decay not below")


def chain_loss(logits_BKM: Tensor, depth_BK: Tensor) -> Tensor:
    """Negative log-likelihood of how deep each item went, mean over items.

    Binary cross-entropy of every behaviour over the items that decide it: all decide about the first of the chain,
    those that were clicked whether there is a cart, and so on. With ``z_m`` the logits and depth d of M behaviours::

        sum_{m < d} -log sigmoid(z_m)  +  [d < M] (-log sigmoid(-z_d))

    ESMM trains the same chain by the cross-entropies of the products ``p(cart)``, ``p(purchase)`` over everything
    shown. Both have the same optimum; this one is the likelihood of what a log holds.

    Args:
        logits_BKM: float, of the chain, where the items were shown.
        depth_BK: int64 in ``[0, M]``, or `PADDING`.
    """
    known_BKM, went_on_BKM = _decided(logits_BKM, depth_BK)
    losses = nn.functional.binary_cross_entropy_with_logits(logits_BKM, went_on_BKM.float(), reduction="none")
    return (losses * known_BKM).sum() / (depth_BK != PADDING).sum().clamp(min=1)


def _decided(logits_BKM: Tensor, depth_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[B, K, M]``: which behaviours each item decides, and which it went on to."""
    level_M = torch.arange(logits_BKM.shape[-1], device=depth_BK.device)
    return depth_BK[..., None] >= level_M, depth_BK[..., None] > level_M


def train_ranking_model(
    model: RankingModel, fetch: Fetch, train_rows: Rows, validation_rows: Rows, config: RankingTrainingConfig
) -> list[dict[str, float]]:
    """Train, keep the epoch with the lowest validation loss, and calibrate on the validation requests.

    Args:
        model: with its initial weights; trained in place, and left in evaluation mode.
        fetch: makes a batch of requests from their rows.
        train_rows: int64 ``[n]``, requests that are learnt from.
        validation_rows: int64 ``[n]``, requests that choose the epoch and the calibration.
        config: schedule.

    Returns:
        Of each epoch: ``loss`` and ``validation_loss``, in nats an item.
    """
    assert len(train_rows)
    assert len(validation_rows)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    optimizer = _optimizer(model, config)
    steps = config.epochs * -(-len(train_rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    log, best_state = [], model.state_dict()
    for _ in range(config.epochs):
        model.train()
        loss = _mean_loss(model, fetch, rng.permutation(train_rows), config.batch_size, optimizer, schedule)
        model.eval()
        with torch.inference_mode():
            validation = _mean_loss(model, fetch, validation_rows, config.batch_size)
        log.append({"loss": loss, "validation_loss": validation})
        if validation == min(epoch["validation_loss"] for epoch in log):
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    calibrate(model, fetch, validation_rows, config.batch_size)
    return log


def _optimizer(model: RankingModel, config: RankingTrainingConfig) -> torch.optim.Optimizer:
    places = [] if model.place_bias is None else [model.place_bias]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1 and p is not model.place_bias]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest},
        # A few numbers that must cross whole logits before the rest has learnt to make up for them.
        {"params": places, "lr": 10 * config.learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)


def _mean_loss(
    model: RankingModel,
    fetch: Fetch,
    rows: Rows,
    batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> float:
    """One pass over `rows` in their order, learning where there is an optimizer; mean loss of the items."""
    total, n = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = fetch(rows[start : start + batch_size])
        logits_BKM = model.at_places(model(batch.requests, batch.items_BK), batch.places_BK)
        loss = chain_loss(logits_BKM, batch.depth_BK)
        if optimizer is not None and schedule is not None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        n_batch = int((batch.depth_BK != PADDING).sum())
        total, n = total + float(loss.detach()) * n_batch, n + n_batch
    return total / n


@torch.inference_mode()
def calibrate(model: RankingModel, fetch: Fetch, rows: Rows, batch_size: int = 128) -> None:
    """Fit the calibration of every logit of the chain, each on the items that decide it.

    Logits are taken where the items were shown, since that is where what came of them was seen. Calibrating the chain
    and not its products keeps a purchase less likely than a click.

    Args:
        model: calibrated in place.
        fetch: makes a batch of requests from their rows.
        rows: int64 ``[n]``, requests that the model was not trained on.
        batch_size: requests at once.
    """
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), batch_size):
        batch = fetch(rows[start : start + batch_size])
        logits_BKM = model.at_places(model(batch.requests, batch.items_BK), batch.places_BK)
        parts.append((logits_BKM.double(), *_decided(logits_BKM, batch.depth_BK)))
    logits_XM, known_XM, went_on_XM = (
        np.concatenate([part.flatten(0, 1).cpu().numpy() for part in kind]) for kind in zip(*parts, strict=True)
    )
    fitted = [
        fit_platt(logits_X[known_X], went_on_X[known_X])
        for logits_X, known_X, went_on_X in zip(logits_XM.T, known_XM.T, went_on_XM.T, strict=True)
    ]
    slope_M, intercept_M = torch.tensor(fitted, dtype=torch.float64).T
    model.calibrate(slope_M, intercept_M)


def fit_platt(logits_X: NDArray[np.float64], labels_X: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of a logistic regression of labels on logits (Platt 1999), by Newton's method.

    Minimises ``sum_x BCE(sigmoid(m + a (z_x - m) + b), y_x) + 100 ((a - 1)^2 + b^2) / 2`` with m the mean logit. The
    last term, a normal prior around changing nothing, also keeps both finite where logits separate the labels.

    Args:
        logits_X: float64 ``[X]``.
        labels_X: bool ``[X]``.

    Returns:
        Slope a and intercept ``m (1 - a) + b``; 1 and 0 of no logits at all.
    """
    if not len(logits_X):
        return 1.0, 0.0
    mean = logits_X.mean()
    design_X2 = np.column_stack([logits_X - mean, np.ones(len(logits_X))])
    prior_2 = np.array([1.0, 0.0])

    def objective(ab_2: NDArray[np.float64]) -> float:
        z_X = mean + design_X2 @ ab_2
        return float((np.logaddexp(0, z_X) - labels_X * z_X).sum() + _PRIOR / 2 * ((ab_2 - prior_2) ** 2).sum())

    ab_2 = prior_2.copy()
    for _ in range(_NEWTON_STEPS):
        p_X = 0.5 * (1 + np.tanh((mean + design_X2 @ ab_2) / 2))
        gradient_2 = design_X2.T @ (p_X - labels_X) + _PRIOR * (ab_2 - prior_2)
        hessian_22 = design_X2.T @ (design_X2 * (p_X * (1 - p_X))[:, None]) + _PRIOR * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        # The objective is convex, so a short enough step always leads down.
        while objective(ab_2 - step_2) > objective(ab_2) and np.abs(step_2).max() > 1e-9:
            step_2 = step_2 / 2
        ab_2 = ab_2 - step_2
        if np.abs(step_2).max() < 1e-9:
            break
    return float(ab_2[0]), float(mean * (1 - ab_2[0]) + ab_2[1])
