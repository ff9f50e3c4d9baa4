"""What semantic IDs do for a ranking model on items it hardly knows: COINS against plain ways to represent an item.

One small ranking model is trained with each representation of `genretrieval.model.fusion`, on the same examples in the
same order, and asked how often it puts what a user took next above what the user did not take.

Tensor names carry their shape: B examples, H items of a history, C candidates, D width, N all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genretrieval.errors import DataError
from genretrieval.figures import Figure
from genretrieval.histories import Histories, LeaveOneOut, Split
from genretrieval.model.fusion import SidFusion, SidFusionConfig, Variant, similar_items
from genretrieval_pipelines.embed import EmbeddingPart, embed_items
from genretrieval_pipelines.shop import open_shop
from genretrieval_tokenizers.rq_opq import RqOpq, RqOpqConfig

EMBEDDINGS = (EmbeddingPart(name="minilm"), EmbeddingPart(name="collaborative"))
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_CASES_AT_ONCE = 1024
_CONTRASTED = 256  # items a step at most: the losses of COINS look at all pairs of them

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FusionBenchConfig:
    """Settings of a run.

    Epochs and rate are those with the highest AUC over all validation cases of Beauty for every variant, among 3 or 6
    epochs at 0.003 and 1 or 6 at 0.001 (one seed).

    Attributes:
        n_seeds: trainings of each representation; seed s draws initial weights, order and negatives of all of them.
        epochs: passes over the training examples.
        batch_size: examples a step.
        learning_rate: Adam's.
        max_history: most recent items that stand for a user.
        n_negatives: items not taken for every item taken, drawn by popularity.
        n_eval_negatives: the same in evaluation; never an item of the user's history.
        sparse_below: an item is sparse with fewer training interactions than this; cold, as everywhere, with none.
        n_similar: positives of the contrastive loss.
        split: whose targets are ranked; settings were chosen on validation.

    Raises:
        DataError: a setting is out of range.
    """

    n_seeds: int = 5
    epochs: int = 3
    batch_size: int = 512
    learning_rate: float = 3e-3
    max_history: int = 20
    n_negatives: int = 4
    n_eval_negatives: int = 50
    sparse_below: int = 5
    n_similar: int = 10
    split: Split = "test"

    def __post_init__(self) -> None:
        counts = (self.n_seeds, self.epochs, self.batch_size, self.max_history, self.n_negatives)
        if min(*counts, self.n_eval_negatives, self.sparse_below, self.n_similar) < 1 or self.learning_rate <= 0:
            raise DataError(f"{self}: give numbers of at least 1 and a rate above 0; without, nothing can be measured")


def bench_fusion(
    shop_data: Path,
    work: Path,
    *,
    embeddings: Sequence[EmbeddingPart] = EMBEDDINGS,
    tokenizer: RqOpqConfig | None = None,
    config: FusionBenchConfig | None = None,
) -> dict[str, Figure]:
    """Measure on the targets of the leave-one-out split.

    Args:
        shop_data: folder of the shop's logs.
        work: where prepared logs and embeddings are kept.
        embeddings: what the semantic IDs are made from.
        tokenizer: settings of RQ-OPQ.
        config: settings of the run.

    Returns:
        ``fusion.<variant>.<cohort>auc`` and ``gauc``, the cohort being everything (no prefix), ``sparse_`` or
        ``cold_``: means over seeds, with the lowest and highest seed as spread; and
        ``fusion.fusion.<cohort>auc_over_<variant>``, the same of the paired differences between the method and each
        other variant. `Cohort` says who the negatives are, `auc` and `gauc` what the figures are. ``fusion.cases``,
        ``fusion.sparse_cases`` and ``fusion.cold_cases`` are numbers of cases; a cohort without any has no other
        figures.

    Raises:
        DataError: no user has a history that is long enough to train on.
    """
    config = config or FusionBenchConfig()
    tokenizer = tokenizer or RqOpqConfig()
    shop = open_shop(shop_data, work)
    x_ND = embed_items(shop.items, embeddings, shop.histories, work / "embeddings")
    sids = Sids.of(RqOpq.fit(x_ND, tokenizer), x_ND, config.n_similar)
    examples = Examples.of(shop.histories, len(shop.items), config)
    return measure(examples, sids, config)


def measure(examples: Examples, sids: Sids, config: FusionBenchConfig) -> dict[str, Figure]:
    """Train and evaluate every variant with every seed; figures as of `bench_fusion`."""
    figures = {f"fusion.{name}cases": Figure(len(c.cases_B), "cases") for name, c in examples.cohorts.items()}
    by_seed: dict[Variant, list[dict[str, float]]] = {
        variant: [
            evaluate(train(examples, sids, SidFusionConfig(variant), config, seed), examples)
            for seed in range(config.n_seeds)
        ]
        for variant in VARIANTS
    }
    for variant, runs in by_seed.items():
        for name in runs[0]:
            figures[f"fusion.{variant}.{name}"] = _over_seeds([run[name] for run in runs])
    method = by_seed.pop("fusion")
    for variant, runs in by_seed.items():
        for name in (name for name in runs[0] if not name.endswith("gauc")):
            differences = [ours[name] - theirs[name] for ours, theirs in zip(method, runs, strict=True)]
            figures[f"fusion.fusion.{name}_over_{variant}"] = _over_seeds(differences)
    return figures


@dataclass(frozen=True, slots=True)
class Sids:
    """Semantic IDs as `SidFusion` takes them.

    Attributes:
        codes_NM: int64 ``[N, M]``, RQ codes and behind them OPQ codes.
        codebook_sizes: codes of each level.
        n_opq: how many levels are OPQ codes.
        similar_NP: int64 ``[N, P]``, the items nearest by OPQ codes.
    """

    codes_NM: Tensor
    codebook_sizes: tuple[int, ...]
    n_opq: int
    similar_NP: Tensor

    @classmethod
    def of(cls, tokenizer: RqOpq, x_ND: NDArray[np.float32], n_similar: int) -> Self:
        """Encode items, and find the `n_similar` others that are nearest to each; fewer in a smaller catalogue."""
        n_opq = tokenizer.config.n_subvectors
        codes_NM = torch.from_numpy(tokenizer.encode(x_ND)).long()
        codebooks = [torch.from_numpy(codebook_KD).double() for codebook_KD in tokenizer.codebooks[-n_opq:]]
        distances = [torch.cdist(codebook_KD, codebook_KD).square() for codebook_KD in codebooks]
        similar_NP = similar_items(codes_NM[:, -n_opq:], distances, min(n_similar, len(codes_NM) - 1))
        return cls(codes_NM, tokenizer.codebook_sizes, n_opq, similar_NP)


@dataclass(frozen=True, slots=True)
class Cohort:
    """Cases that are evaluated together, and their negatives.

    Of all cases, negatives are drawn by popularity. Of a cohort of items they are drawn evenly from its own items, as
    where a cohort's impressions are evaluated: beside popular items, a score that knows nothing but popularity would do
    harm to the cohort or help it, whatever it knows of its items.

    Attributes:
        cases_B: int64, positions of the cases.
        negatives_BC: int64 ``[B, C]``, item rows.
        valid_BC: bool ``[B, C]``, whether the negative is no item of the user's history.
    """

    cases_B: Rows
    negatives_BC: Rows
    valid_BC: NDArray[np.bool_]


class History(NamedTuple):
    """Items before a position, int64 ``[B, H]``, the nearest first, and which of them there are, bool ``[B, H]``."""

    items_BH: Tensor
    there_BH: Tensor


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained and evaluated on: interactions by their positions in the flat arrays of `Histories`.

    Attributes:
        items: int64, item rows of all interactions.
        starts: int64, where the history of each interaction's user begins.
        train_positions: int64, targets of training; each has an item before it.
        train_items: int64, item rows of all training interactions: drawing from them evenly is drawing by popularity.
        eval_positions: int64, targets of the split that is measured.
        counts_N: int64, training interactions of each item.
        cohorts: by the prefix of their figures.
        max_history: items of a history that are read.
    """

    items: Rows
    starts: Rows
    train_positions: Rows
    train_items: Rows
    eval_positions: Rows
    counts_N: Rows
    cohorts: dict[str, Cohort]
    max_history: int

    @classmethod
    def of(cls, histories: Histories, n_items: int, config: FusionBenchConfig) -> Self:
        """Split a shop's histories and draw the negatives of evaluation, the same ones for every seed.

        Raises:
            DataError: no user has two training interactions.
        """
        split = LeaveOneOut(histories)
        items, lengths = histories.items.astype(np.int64), histories.lengths()
        starts, trained = np.repeat(histories.offsets[:-1], lengths), split.trained()
        train_positions = np.flatnonzero(trained & (np.arange(len(items)) > starts))
        if not len(train_positions):
            raise DataError(
                "no user has two interactions before validation, so there is nothing to train a ranking model on; "
                "take a shop with longer histories"
            )
        counts_N = np.bincount(items[trained], minlength=n_items)
        users, eval_positions = split.targets(config.split)
        taken = np.unique(np.repeat(np.arange(histories.n_users), lengths) << 32 | items)
        rng = np.random.default_rng(0)

        def cohort(member_N: NDArray[np.bool_], draw_from: Rows) -> Cohort:
            cases = np.flatnonzero(member_N[items[eval_positions]])
            negatives = draw_from[rng.integers(0, max(len(draw_from), 1), (len(cases), config.n_eval_negatives))]
            return Cohort(cases, negatives, ~np.isin(users[cases, None] << 32 | negatives, taken))

        sparse_N, cold_N = counts_N < config.sparse_below, counts_N == 0
        cohorts = {
            "": cohort(np.ones(n_items, np.bool_), items[trained]),
            "sparse_": cohort(sparse_N, np.flatnonzero(sparse_N)),
            "cold_": cohort(cold_N, np.flatnonzero(cold_N)),
        }
        return cls(
            items, starts, train_positions, items[trained], eval_positions, counts_N, cohorts, config.max_history
        )

    def history(self, positions_B: Rows) -> History:
        """What the users of positions had taken before."""
        before_BH = positions_B[:, None] - 1 - np.arange(self.max_history)
        there_BH = before_BH >= self.starts[positions_B, None]
        return History(torch.from_numpy(self.items[np.where(there_BH, before_BH, 0)]), torch.from_numpy(there_BH))


class Ranker(nn.Module):
    """A ranking model: the mean of the history's representations, a candidate's, and their product, into a network.

    The gate of the fusion reads how often an item was met in training (C), the user as the mean above (U_p) and the
    shared part of the item (X). For items of the history, whose user is not known before them, U_p is zero.
    """

    exposure: Tensor

    def __init__(self, sids: Sids, counts_N: Rows, config: SidFusionConfig) -> None:
        super().__init__()
        d = config.d_model
        self.fusion = SidFusion(sids.codes_NM, sids.codebook_sizes, sids.n_opq, n_context=1 + 2 * d, config=config)
        self.score = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 1))
        exposure_N = torch.from_numpy(counts_N).float().log1p()
        self.register_buffer("exposure", exposure_N / exposure_N.max())

    def users(self, history: History) -> Tensor:
        """Float ``[B, D]``."""
        nobody = torch.zeros(len(history.items_BH), self.fusion.config.d_model)
        items_BHD: Tensor = self.fusion(history.items_BH, self.context(history.items_BH, nobody))
        there_BH1 = history.there_BH[:, :, None]
        return (items_BHD * there_BH1).sum(dim=1) / there_BH1.sum(dim=1)

    def context(self, items_BC: Tensor, users_BD: Tensor) -> Tensor:
        """What the gate reads, float ``[B, C, 1 + 2 D]``; nothing learns by being read."""
        users_BCD = users_BD[:, None].expand(*items_BC.shape, -1)
        exposure_BC1 = self.exposure[items_BC][..., None]
        return torch.cat([exposure_BC1, users_BCD, self.fusion.shared(items_BC)], dim=-1).detach()

    def forward(self, users_BD: Tensor, items_BC: Tensor) -> Tensor:
        """Logits of candidates, float ``[B, C]``."""
        items_BCD = self.fusion(items_BC, self.context(items_BC, users_BD))
        users_BCD = users_BD[:, None].expand_as(items_BCD)
        logits: Tensor = self.score(torch.cat([users_BCD, items_BCD, users_BCD * items_BCD], dim=-1))
        return logits[..., 0]


def train(examples: Examples, sids: Sids, fusion: SidFusionConfig, config: FusionBenchConfig, seed: int) -> Ranker:
    """Train with binary cross-entropy on taken items and on negatives drawn by popularity, plus the fusion's losses."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = Ranker(sids, examples.counts_N, fusion)
    optimizer = torch.optim.Adam(ranker.parameters(), lr=config.learning_rate)
    for _ in range(config.epochs):
        order = rng.permutation(examples.train_positions)
        for start in range(0, len(order), config.batch_size):
            positions_B = order[start : start + config.batch_size]
            drawn = rng.integers(0, len(examples.train_items), (len(positions_B), config.n_negatives))
            items_BC = np.column_stack([examples.items[positions_B], examples.train_items[drawn]])
            optimizer.zero_grad(set_to_none=True)
            _loss(ranker, examples.history(positions_B), torch.from_numpy(items_BC), sids.similar_NP).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return ranker.eval()


def _loss(ranker: Ranker, history: History, items_BC: Tensor, similar_NP: Tensor) -> Tensor:
    """Loss of a batch whose first candidates were taken."""
    users_BD = ranker.users(history)
    logits_BC = ranker(users_BD, items_BC)
    taken_BC = torch.zeros_like(logits_BC)
    taken_BC[:, 0] = 1
    ranking = nn.functional.binary_cross_entropy_with_logits(logits_BC, taken_BC)
    _, first = np.unique(items_BC[:_CONTRASTED, 0].numpy(), return_index=True)
    items_B1 = items_BC[first, :1]
    context_BC = ranker.context(items_B1, users_BD[first])[:, 0]
    return ranking + ranker.fusion.auxiliary_loss(items_B1[:, 0], context_BC, similar_NP[items_B1[:, 0]])


@torch.inference_mode()
def evaluate(ranker: Ranker, examples: Examples) -> dict[str, float]:
    """``<cohort>auc`` and ``<cohort>gauc`` of every cohort that has a case with a valid negative."""
    figures = {}
    for name, cohort in examples.cohorts.items():
        if cohort.valid_BC.any():
            positions = examples.eval_positions[cohort.cases_B]
            candidates_BC = np.column_stack([examples.items[positions], cohort.negatives_BC])
            scores = []
            for start in range(0, len(positions), _CASES_AT_ONCE):
                rows = slice(start, start + _CASES_AT_ONCE)
                users_BD = ranker.users(examples.history(positions[rows]))
                scores.append(ranker(users_BD, torch.from_numpy(candidates_BC[rows])).numpy())
            scores_BC = np.concatenate(scores)
            figures[f"{name}auc"] = auc(scores_BC[:, 0], scores_BC[:, 1:][cohort.valid_BC])
            figures[f"{name}gauc"] = gauc(scores_BC[:, 0], scores_BC[:, 1:], cohort.valid_BC)
    return figures


def auc(targets_B: NDArray[np.floating], negatives_M: NDArray[np.floating]) -> float:
    """Share of pairs of a target and a negative, all users together, in which the target scores higher; ties half."""
    negatives_M = np.sort(negatives_M)
    below = np.searchsorted(negatives_M, targets_B, side="left") + np.searchsorted(negatives_M, targets_B, side="right")
    return float(below.mean() / (2 * len(negatives_M)))


def gauc(targets_B: NDArray[np.floating], negatives_BC: NDArray[np.floating], valid_BC: NDArray[np.bool_]) -> float:
    """Mean over cases of the share of their valid negatives below their target, ties half; every case counts alike."""
    wins_BC = (negatives_BC < targets_B[:, None]) + (negatives_BC == targets_B[:, None]) / 2
    n_valid_B = valid_BC.sum(axis=1)
    share_B = (wins_BC * valid_BC).sum(axis=1)[n_valid_B > 0] / n_valid_B[n_valid_B > 0]
    return float(share_B.mean())


def _over_seeds(values: Sequence[float]) -> Figure:
    return Figure(float(np.mean(values)), "share", (min(values), max(values)))
