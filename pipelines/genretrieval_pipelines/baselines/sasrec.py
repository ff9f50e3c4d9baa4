"""SASRec trained with the full softmax: the strong plain sequence model that a generator has to clear.

Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018), with the cross-entropy over the
whole catalogue in place of one sampled negative, which alone closes most of the gap to later models
(Klenitskiy and Vasilev, "Turning Dross Into Gold Loss", RecSys 2023). One setting serves every data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genretrieval.errors import DataError, RecipeError
from genretrieval.histories import Histories, LeaveOneOut
from genretrieval.training.full_softmax import full_softmax_loss
from genretrieval.training.precision import fast_bfloat16
from genretrieval_pipelines.baselines.counts import Popularity
from genretrieval_pipelines.baselines.ranking import Baseline, Scores
from genretrieval_pipelines.cases import Cases, leave_one_out_cases

CACHE_FORMAT = 1  # raise when a change of this file changes what equal settings train


@dataclass(frozen=True, slots=True)
class SasrecConfig:
    """Settings of a run; the defaults are meant for any shop.

    Attributes:
        dim: width of item embeddings and hidden states.
        n_layers: Transformer layers.
        n_heads: attention heads.
        dropout: on embeddings, attention output and feed-forward output.
        max_history: most recent items read; longer training sequences are cut into windows, not thrown away.
        learning_rate: AdamW's, after a warm-up over the first epoch, cosine to a tenth at `max_epochs`.
        weight_decay: AdamW's, on matrices only.
        batch_positions: item positions of a batch, padding included.
        max_epochs: upper limit.
        patience: epochs without a better validation NDCG@10 before training stops.
        validation_users: at most this many users, evenly spread, decide which epoch was best.
        seed: of initial weights, batches and dropout.

    Raises:
        RecipeError: a value is out of range.
    """

    dim: int = 128
    n_layers: int = 2
    n_heads: int = 2
    dropout: float = 0.4
    max_history: int = 50
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    batch_positions: int = 512
    max_epochs: int = 24
    patience: int = 4
    validation_users: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with: the baseline has its turn when the generator is trained already."""
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "max_history",
            "learning_rate",
            "batch_positions",
            "max_epochs",
            "patience",
            "validation_users",
        ):
            if getattr(self, name) <= 0:
                raise RecipeError(f"sasrec.{name} is {getattr(self, name)}; it must be above 0")
        if self.dim % self.n_heads:
            raise RecipeError(
                f"sasrec.dim {self.dim} is no multiple of sasrec.n_heads {self.n_heads}; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"sasrec.dropout is {self.dropout}; it is a share of activations, in [0, 1)")
        if self.weight_decay < 0:
            raise RecipeError(f"sasrec.weight_decay is {self.weight_decay}; it must be 0 or above")


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward layer.

    Attention is written out as two products and a softmax: the bfloat16 backward of
    `scaled_dot_product_attention` is several times slower on a CPU.
    """

    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        d = config.dim
        self.n_heads = config.n_heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, future_LL: Tensor) -> Tensor:
        """``[B, L, D] -> [B, L, D]``; `future_LL` is ``-inf`` above the diagonal."""
        B, L, D = x_BLD.shape
        q, k, v = (
            self.qkv(self.norm_attention(x_BLD)).view(B, L, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * (D // self.n_heads) ** -0.5 + future_LL, dim=-1)
        attended = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + self.dropout(self.out(attended))
        return x_BLD + self.dropout(self.feed(self.norm_feed(x_BLD)))  # type: ignore[no-any-return]


class SasrecModel(nn.Module):
    """Hidden state of every position; an item's logit is its product with the item's input embedding."""

    def __init__(self, n_items: int, config: SasrecConfig) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, config.dim)
        self.positions = nn.Embedding(config.max_history, config.dim)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, items_BL: Tensor) -> Tensor:
        """Item rows int64 ``[B, L]``, padded on the right, to hidden states ``[B, L, D]``.

        Padding needs no mask: no position reads what comes after it.
        """
        L = items_BL.shape[1]
        x = self.dropout(self.items(items_BL) + self.positions.weight[:L])
        future = torch.full((L, L), -torch.inf).triu(1)
        for block in self.blocks:
            x = block(x, future)
        return self.norm(x)  # type: ignore[no-any-return]


def windows(sequences: list[NDArray[np.int32]], max_history: int) -> list[NDArray[np.int32]]:
    """Cut sequences, from their end, into pieces of at most ``max_history + 1`` items that overlap in one.

    Every item but a sequence's first is then predicted exactly once. Sequences of one item predict nothing.
    """
    return [
        sequence[max(0, end - max_history - 1) : end]
        for sequence in sequences
        for end in range(len(sequence), 1, -max_history)
    ]


def batches(
    pieces: list[NDArray[np.int32]], positions: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pieces of like length in random order: int64 ``[B, L + 1]`` and the lengths ``[B]``."""
    lengths = np.array([len(piece) for piece in pieces])
    order = np.lexsort((rng.random(len(pieces)), lengths))
    groups, start = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i + 1 - start) * (lengths[order[i]] - 1) > positions:
            groups.append(order[start:i])
            start = i
    for g in rng.permutation(len(groups)):
        group = groups[g]
        padded = np.zeros((len(group), lengths[group].max()), np.int64)
        for row, piece in enumerate(group):
            padded[row, : lengths[piece]] = pieces[piece]
        yield torch.from_numpy(padded), torch.from_numpy(lengths[group])


class Sasrec(Baseline):
    """A trained SASRec. Cases without a history get popularity, the only thing known about them."""

    name = "SASRec (full softmax)"

    def __init__(self, model: SasrecModel, config: SasrecConfig, popularity: Popularity, log: dict[str, Any]) -> None:
        """Takes a trained model; `log` is what `train` reported."""
        self.model = model.eval()
        self.config = config
        self.popularity = popularity
        self.log = log
        self.n_items = popularity.n_items

    @classmethod
    def fit(
        cls,
        histories: Histories,
        n_items: int,
        *,
        config: SasrecConfig | None = None,
        cache: Path | None = None,
        console: Console | None = None,
    ) -> Sasrec:
        """Train on every user's training part, keep the epoch with the best validation NDCG@10.

        Equal seed, data and thread count give equal weights.

        Args:
            histories: all users; split by `LeaveOneOut`.
            n_items: items of the catalogue.
            config: settings, or None for the defaults.
            cache: folder of finished runs, named by the hash of data and settings; an equal run is read back
                instead of trained again.
            console: where progress is drawn, when it is a terminal.

        Raises:
            DataError: if no user has two training interactions, so that there is nothing to predict.
        """
        config = config or SasrecConfig()
        ends = LeaveOneOut(histories).train_ends()
        popularity = Popularity.fit(histories, ends, n_items)
        stored = cache / f"sasrec-{_content_hash(histories, ends, n_items, config)}" if cache else None
        if stored and stored.with_suffix(".json").exists():  # written last: its presence means complete
            with torch.random.fork_rng(devices=[]):  # drawing weights to overwrite is no caller's business
                model = SasrecModel(n_items, config)
            model.load_state_dict(load_file(stored.with_suffix(".safetensors")))
            return cls(model, config, popularity, json.loads(stored.with_suffix(".json").read_text()))
        with torch.random.fork_rng(devices=[]):
            model, log = train(histories, n_items, config, console)
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), stored.with_suffix(".safetensors"))
            partial = stored.with_suffix(".json.part")
            partial.write_text(json.dumps(log, indent=2))
            partial.replace(stored.with_suffix(".json"))
        return cls(model, config, popularity, log)

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """Natural-log probabilities of the next item; popularity counts where there is no history."""
        with torch.inference_mode():
            logits = _next_item_logits(self.model, histories, cases, self.config.max_history)
            scores = torch.log_softmax(logits, dim=1).numpy()
        scores[cases.ends == cases.starts] = self.popularity.counts
        return scores


def train(
    histories: Histories, n_items: int, config: SasrecConfig, console: Console | None
) -> tuple[SasrecModel, dict[str, Any]]:
    """Train from scratch; returns the best epoch's model and the log that is stored beside its weights."""
    pieces = windows(list(LeaveOneOut(histories).train_sequences()), config.max_history)
    if not pieces:
        raise DataError("no user has two interactions before validation: SASRec has nothing to train on")
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    model = SasrecModel(n_items, config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    cases = _validation_cases(histories, config.validation_users)
    best, best_state, epochs = -1.0, model.state_dict(), []
    with _progress(console) as progress:
        task = progress.add_task("SASRec", total=config.max_epochs) if progress else None
        for epoch in range(config.max_epochs):
            loss = _train_epoch(model, optimizer, list(batches(pieces, config.batch_positions, rng)), epoch, config)
            recall, ndcg = _validate(model, histories, cases, config.max_history)
            epochs.append({"loss": loss, "recall10": recall, "ndcg10": ndcg})
            if ndcg > best:
                best, best_state = ndcg, {name: value.clone() for name, value in model.state_dict().items()}
            if progress and task is not None:
                progress.update(task, advance=1, description=f"SASRec, validation Recall@10 {recall:.4f}")
            best_epoch = int(np.argmax([e["ndcg10"] for e in epochs]))
            if epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(best_state)
    return model, {"config": asdict(config), "best_epoch": best_epoch + 1, "epochs": epochs}


def _train_epoch(
    model: SasrecModel,
    optimizer: torch.optim.Optimizer,
    epoch_batches: list[tuple[Tensor, Tensor]],
    epoch: int,
    config: SasrecConfig,
) -> float:
    """One pass; returns the mean loss in nats an item."""
    model.train()
    total, n = 0.0, 0
    for i, (items, lengths) in enumerate(epoch_batches):
        done = epoch + i / len(epoch_batches)
        share = min(1.0, done + 1 / len(epoch_batches)) * (0.55 + 0.45 * np.cos(np.pi * done / config.max_epochs))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        real = torch.arange(1, items.shape[1]) < lengths[:, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            hidden = model(items[:, :-1])
            loss = full_softmax_loss(hidden[real], model.items.weight, items[:, 1:][real])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach()) * int(real.sum())
        n += int(real.sum())
    return total / n


@torch.inference_mode()
def _validate(model: SasrecModel, histories: Histories, cases: Cases, max_history: int) -> tuple[float, float]:
    """Recall@10 and NDCG@10 over the whole catalogue, seen items kept, ties counted against the model."""
    model.eval()
    ranks = []
    for first in range(0, len(cases), 512):
        part = cases.take(np.arange(first, min(first + 512, len(cases)), dtype=np.int64))
        logits = _next_item_logits(model, histories, part, max_history)
        target = logits.gather(1, torch.from_numpy(part.relevant.astype(np.int64))[:, None])
        ranks.append((logits >= target).sum(1).numpy())  # 1 is best
    rank = np.concatenate(ranks)
    found = rank <= 10
    return float(found.mean()), float((found / np.log2(rank + 1)).mean())


def _next_item_logits(model: SasrecModel, histories: Histories, cases: Cases, max_history: int) -> Tensor:
    """float32 ``[n_cases, n_items]``; rows of cases without a history mean nothing."""
    starts = np.maximum(cases.starts, cases.ends - max_history)
    lengths = cases.ends - starts
    last = torch.empty(len(cases), model.items.embedding_dim)
    by_length = np.argsort(lengths, kind="stable")
    for first in range(0, len(cases), 64):  # neighbours in length, so that little is computed for padding
        rows = by_length[first : first + 64]
        within = np.arange(max(1, int(lengths[rows].max())))
        at = np.minimum(starts[rows, None] + within, len(histories.items) - 1)
        items = torch.from_numpy(np.where(within < lengths[rows, None], histories.items[at], 0).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            hidden = model(items)
        last[rows] = hidden[torch.arange(len(rows)), np.maximum(lengths[rows] - 1, 0)].float()
    return last @ model.items.weight.T


def _validation_cases(histories: Histories, at_most: int) -> Cases:
    """The validation cases, thinned evenly to `at_most`."""
    cases = leave_one_out_cases(histories, "validation")
    if len(cases) == 0:
        raise DataError("no user has three interactions: SASRec has no validation item to choose its best epoch by")
    return cases.take(np.unique(np.linspace(0, len(cases) - 1, min(at_most, len(cases))).astype(np.int64)))


def _content_hash(histories: Histories, ends: NDArray[np.int64], n_items: int, config: SasrecConfig) -> str:
    """Name of a run: everything its weights depend on but the versions of the libraries."""
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, n_items, asdict(config)]).encode())
    for array in (histories.offsets, ends, histories.items):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _progress(console: Console | None) -> AbstractContextManager[Progress | None]:
    """A progress bar on a terminal, nothing anywhere else."""
    return Progress(console=console, transient=True) if console and console.is_terminal else nullcontext()
