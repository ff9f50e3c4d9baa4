"""Training speed against Hugging Face ``Trainer`` around a T5 of equal sizes, and what both have learnt from as much.

An example is a history and the item that comes next. The peer trains as open implementations of TIGER (Rajput et al.
2023) do: every example on its own, the history written out as ``n_levels`` tokens an item. Both sides get the same
examples of the same shop, codes alone (no behaviours, times, queries or profiles), the same semantic IDs, optimizer,
schedule and dropout. Where the gain comes from, the largest part first:

1. One causal pass over a history trains the prediction of every item of it, so an item is encoded once; the peer
   encodes it again for each example that has it in its history.
2. The encoder has one position an item instead of one a code.
3. Rows of a batch are of nearly equal length, and matrix products are in bfloat16 where the machine is faster with it
   (`genretrieval.training.precision`). The tuned peer has both, too.

What it costs: in a history longer than the model reads, an example of ours has at least a fifth of the items that the
peer's has before it (`genretrieval.training.data.cut_windows`), and a batch of ours holds all items of few users, the
peer's items of many. Whether less is learnt from it is what the validation losses say. They are cross-entropies of the
codes, each over the softmax of its whole level on both sides, and for that comparison ours is trained on the same:
`NextItemObjective`, which it ships with and is timed with, takes the softmax over existing codes only, so its loss is
lower by what the catalogue gives away. Of the peer's softmax over all tokens only the level's part counts, which can
only lower its loss.

Ours is the bare model: experts, a dense head and a compressed past, which the peer has no counterpart of, are left out.

Contenders take turns within one process. A turn is a fresh ``Trainer`` over every n-th batch of a whole epoch, timed
between the ends of its steps: reading and padding the data, the step and the trainer's own work count, starting it does
not. Where all run on one thread of a CPU, it is the process's CPU time that is taken: other work on the machine then
slows a turn by what it takes of caches and cores, and not by the time it is given.
"""

from __future__ import annotations

import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging as transformers_logging

from genretrieval.catalogue import build_index
from genretrieval.errors import DataError
from genretrieval.export.t5 import N_SPECIAL_TOKENS, t5_level_offsets
from genretrieval.features import RequestFeatures
from genretrieval.figures import Figure, machine
from genretrieval.histories import NO_QUERY, NO_TIME, Histories, LeaveOneOut
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.data import HistoryDataset, LengthBatchSampler, Windows, collate, cut_windows
from genretrieval.training.objectives import NextItemObjective, Objective
from genretrieval.training.precision import fast_bfloat16
from genretrieval.training.trainer import GeneratorTrainer, TrainingConfig, train
from genretrieval_pipelines.bench_decode import Contender, gemm_contenders, gemm_rate, take_turns
from genretrieval_pipelines.embed import EmbeddingPart
from genretrieval_pipelines.recipe import GeneratorSection, Recipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import tokenize
from genretrieval_tokenizers.rq_kmeans import RqKMeansConfig

Rows = NDArray[np.int64]
Losses = NDArray[np.float64]
Clock = Callable[[], float]
"""Seconds since some moment."""

END_OF_SEQUENCE = 1
"""T5's token; an empty history is it alone, as an encoder has to read something."""
TUNED_ROWS = (8, 32)
"""Examples a step that the tuned peer may take; on an accelerator our own number and more, besides."""
DEFAULT_ROWS = int(TrainingArguments.__dataclass_fields__["per_device_train_batch_size"].default)
"""Examples a step of ``Trainer``, unless it is told otherwise."""
SHARED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "num_train_epochs",
    "seed",
)
"""What the peer's arguments take over from ours."""
HISTORY_LENGTHS = (50, 1000)
N_PAST_TOKENS = 8
PEAK_FLOPS = {
    # Dense bfloat16 by the maker's data sheets; the first name that the device's begins with.
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
_UNTIMED_STEPS = 2  # the optimizer's state is made in the first one
_FEWEST_BATCHES = 3  # of a turn
_TRIAL_EXAMPLES = 300
_RESAMPLES = 1000
_VALIDATION_ROWS = 64


@dataclass(frozen=True, slots=True)
class TrainBenchConfig:
    """Settings of a run.

    A run is a single pass over few examples, in which the number of steps decides how much is learnt. So ours takes
    smaller batches than recipes do: slower than theirs, and with fewer steps than the untuned peer's still. The peer
    trains some tens of examples a second on one thread, which sets the sizes: the model is that of configs/demo.yaml.

    Attributes:
        generator: sizes of both models.
        training: optimizer and schedule of both sides, passes over the examples, our targets a batch, and how many
            validation users there are at most.
        shop: the shop that is made where no logs are given.
        codebook_sizes: codes wanted of each level, before the level that numbers collisions.
        examples: distinct training examples at most; whole users are left out beyond it.
        rounds: turns of each contender.
        turn_seconds: how long a turn shall be; a whole epoch at most.
        threads: settings that each side chooses its best from; empty means one thread, and all cores. With one thread
            alone, CPU time is taken instead of wall-clock time.

    Raises:
        DataError: a setting is out of range.
    """

    generator: GeneratorSection = field(default_factory=partial(GeneratorSection, d_model=64, d_ff=256))
    training: TrainingConfig = field(
        default_factory=partial(TrainingConfig, epochs=1, targets_per_batch=32, validation_users=600)
    )
    shop: ShopConfig = field(default_factory=ShopConfig)
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    examples: int = 4000
    rounds: int = 5
    turn_seconds: float = 3.0
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if min(self.examples, self.rounds, *self.threads, 1) < 1 or self.turn_seconds <= 0:
            raise DataError(
                f"{self}: give numbers of at least 1, and turns that last; without, nothing can be measured"
            )


QUICK = TrainBenchConfig(
    generator=GeneratorSection(d_model=32, n_heads=2, d_ff=64, n_encoder_layers=1, n_decoder_layers=1, max_history=10),
    training=TrainingConfig(epochs=1, targets_per_batch=128, validation_users=200),
    shop=ShopConfig(n_items=200, n_users=60, median_history=20.0, mean_history=40.0),
    codebook_sizes=(16, 16),
    examples=1500,
    rounds=2,
    turn_seconds=0.3,
)
"""For a smoke test: its speeds and losses mean nothing."""


def bench_train(data: Path | None = None, config: TrainBenchConfig | None = None) -> dict[str, Figure]:
    """Measure; what is being done goes to stderr.

    Args:
        data: a shop's logs; without, the shop of `config` is made. IDs are RQ-KMeans of hashed words.
        config: settings of the run.

    Returns:
        Figures by name. Speeds are medians over turns with their 10th and 90th percentile, and so are speedups, each
        taken within a round: ``train.speedup_vs_hf``, over ``Trainer`` with its default batch, precision and order;
        ``train.speedup_vs_hf_tuned``, over the same with batches by length, bfloat16 where the machine is faster with
        it, and the number of examples a step and the attention kernel that are fastest here.
        ``train.examples_per_second.ours_plain`` is ours with the objective that the losses are compared by.

        ``train.validation_loss.*`` are nats a code over the validation users after equal examples, one training each,
        with the 95 % interval over users; ``train.validation_loss_ratio`` is ours over the lower of the peers, and
        ``train.validation_loss_ratio_vs_*`` over each, users resampled in pairs. Another seed may move a loss by more.

        ``train.gflops.ours`` are the model's operations (`training_flops`) a second; on an accelerator whose peak is
        known ``train.mfu`` is its share of that, on CPU ``train.gemm_share`` its share of the rate of a float32 matrix
        product (above 1 where bfloat16 is faster). ``train.history_cost.1000_over_50`` is the time of a training step
        a target, at the recipes' batch size, of the same model with a Query-Former over what came before its history.

    Raises:
        DataError: the logs have too few interactions to train on, or nobody to validate with.
    """
    config = config or TrainBenchConfig()
    threads_before = torch.get_num_threads()
    console = Console(stderr=True)
    transformers_logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with console.status("making a shop" if data is None else "reading the logs"):
                if data is None:
                    synthesize(folder / "shop", config.shop)
                shop = open_shop(data or folder / "shop", folder / "work")
                material = Material.of(shop, config, folder / "work")
            return _Bench(config, material, folder, console).figures()
    finally:
        torch.set_num_threads(threads_before)


class _Bench:
    """One run over one shop."""

    def __init__(self, config: TrainBenchConfig, material: Material, folder: Path, console: Console) -> None:
        self.config = config
        self.material = material
        self.folder = folder
        self.console = console
        self.threads = config.threads or tuple(sorted({1, machine()["cores"]}))
        alone = self.threads == (1,) and not torch.cuda.is_available()
        self.clock = time.process_time if alone else time.perf_counter
        self.ours = OurSide("ours", material, config.training, NextItemObjective(build_index(material.ids)), folder)
        self.plain = OurSide("ours_plain", material, config.training, PlainObjective(material), folder)
        arguments = self.ours.arguments()
        self.peer = PeerSide("hf", material, PeerConfig(), arguments, folder)
        bf16 = fast_bfloat16()
        tuned = [PeerConfig(rows, bf16=bf16, by_length=True) for rows in self._tuned_rows()]
        self.tuned = [PeerSide("hf_tuned", material, config, arguments, folder) for config in tuned]

    def figures(self) -> dict[str, Figure]:
        """Everything, in the order in which it is printed."""
        contenders: list[list[Side]] = [[self.ours], [self.plain], [self.peer], [*self.tuned]]
        self._say("choosing the fastest setting of each side")
        chosen = {sides[0].name: self._fastest(sides) for sides in contenders}
        self._say(f"timing {self.config.rounds} rounds")
        speeds, gemm = self._take_turns(chosen)
        losses = {}
        for name, choice in (("ours", chosen["ours_plain"]), ("hf", chosen["hf"]), ("hf_tuned", chosen["hf_tuned"])):
            self._say(f"training {name} on {len(self.material.examples):,} examples")
            losses[name] = choice.side.fit(choice.setting)
        return {
            **speed_figures(speeds),
            **loss_figures(losses),
            **self._history_cost(),
            **self._size_figures(),
            **self._setting_figures(chosen),
            **self._machine_figures(median(speeds["ours"]), gemm, chosen["ours"].setting.threads),
        }

    def _say(self, text: str) -> None:
        """A line and no spinner: its thread would run beside what is timed."""
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def _tuned_rows(self) -> list[int]:
        """Examples a step that the tuned peer may take; on an accelerator as many as ours has and more, too.

        On CPU a batch of a hundred histories written out as codes leaves the caches, and small ones are faster.
        """
        ours = max(1, round(len(self.material.examples) / len(self.ours.batches)))
        return sorted({*TUNED_ROWS, *([128, ours, 4 * ours] if torch.cuda.is_available() else [])})

    def _fastest(self, sides: Sequence[Side]) -> Chosen:
        """The fastest of all settings of some sides, and how fast it is.

        A short turn of each, and another of those that are not clearly slower than the fastest.
        """
        rates: dict[tuple[Side, Setting], list[float]] = {
            (side, setting): [] for side in sides for setting in side.settings(self.threads)
        }
        for part in range(2):
            fastest = max((max(taken) for taken in rates.values() if taken), default=0.0)
            for (side, setting), taken in rates.items():
                if not taken or taken[-1] > 0.8 * fastest:
                    parts = self._parts(side, _TRIAL_EXAMPLES)
                    taken.append(side.turn(part % parts, parts, setting, self.clock))
        best = max(rates, key=lambda candidate: median(rates[candidate]))
        side, setting = best
        self._say(f"{side}: {setting}, the fastest of {len(rates)}")
        return Chosen(side, setting, median(rates[best]))

    def _parts(self, side: Side, examples: float) -> int:
        """Turns that an epoch is cut into, so that each has about so many examples."""
        wanted = len(self.material.examples) / examples
        return max(1, min(round(wanted), len(side.batches) // _FEWEST_BATCHES))

    def _take_turns(self, chosen: Mapping[str, Chosen]) -> tuple[dict[str, list[float]], list[float]]:
        """Examples a second of every side and GFLOP/s of a matrix product, round by round."""
        speeds: dict[str, list[float]] = {name: [] for name in chosen}
        gemm = []
        for number in range(self.config.rounds):
            for name, choice in chosen.items():
                parts = self._parts(choice.side, self.config.turn_seconds * choice.examples_per_second)
                speeds[name].append(choice.side.turn(number % parts, parts, choice.setting, self.clock))
            gemm.append(gemm_rate(take_turns(gemm_contenders(), 3, self.clock)))
        return speeds, gemm

    def _history_cost(self) -> dict[str, Figure]:
        """The cost of long histories, of the same model with a Query-Former over what came before its history."""
        near, far = HISTORY_LENGTHS
        sizes = self.material.config
        past = {"n_events": 2, "n_past_tokens": N_PAST_TOKENS, "max_past": max(1, far - sizes.max_history)}
        config = GeneratorConfig(**{**sizes.to_dict(), **past})
        make_batch = partial(made_batch, self.material.ids, config, n_targets=TrainingConfig().targets_per_batch)
        model = new_generator(config).to(self.ours.arguments().device)
        cost = history_cost(make_batch, (near, far), model, self.ours.objective, clock=self.clock)
        return {f"train.history_cost.{far}_over_{near}": cost}

    def _size_figures(self) -> dict[str, Figure]:
        """What was trained on what."""
        examples, epochs = self.material.examples, self.config.training.epochs
        sizes = {
            "ours": _n_parameters(new_generator(self.material.config)),
            "hf": _n_parameters(new_t5(self.material.config)),
        }
        return {
            "train.examples": Figure(len(examples) * epochs, "examples"),
            "train.validation_users": Figure(len(self.material.validation), "users"),
            "train.history_items.mean": Figure(float((examples.positions - examples.starts).mean()), "items"),
            **{f"train.parameters.{name}": Figure(n, "parameters") for name, n in sizes.items()},
        }

    def _setting_figures(self, chosen: Mapping[str, Chosen]) -> dict[str, Figure]:
        """What each side was given because it is fastest so."""
        eager = chosen["hf_tuned"].setting.attention == "eager"
        return {
            **{
                f"train.examples_per_step.{name}": Figure(choice.side.examples_per_step, "examples")
                for name, choice in chosen.items()
            },
            **{f"train.threads.{name}": Figure(choice.setting.threads, "threads") for name, choice in chosen.items()},
            "train.eager_attention.hf_tuned": Figure(float(eager), "setting"),
        }

    def _machine_figures(self, examples_per_second: float, gemm: Sequence[float], threads: int) -> dict[str, Figure]:
        """How much of what the machine can do the model's own operations are."""
        windows = self.material.windows
        flops = training_flops(self.material.config, windows.lengths, windows.ends - windows.learn_from)
        rate = flops / len(self.material.examples) * examples_per_second
        figures = {
            "train.gflops.ours": Figure(rate / 1e9, "GFLOP/s"),
            "machine.gemm_gflops.t1": Figure(median(gemm), "GFLOP/s", (min(gemm), max(gemm))),
        }
        if not torch.cuda.is_available():
            figures["train.gemm_share"] = Figure(rate / 1e9 / (median(gemm) * threads), "share")
            self._say(f"machine: {machine()['cpu']}, {machine()['cores']} cores")
            return figures
        device = torch.cuda.get_device_name()
        self._say(f"machine: {device}")
        if peak := peak_flops(device):
            figures["train.mfu"] = Figure(rate / peak, "share")
        else:
            self._say(f"train.mfu: not available, the peak of {device} is not known here")
        return figures


# --- the examples, and what each side reads of them ---


@dataclass(frozen=True, slots=True)
class Examples:
    """Histories and what comes next: example i is the item at ``positions[i]`` after those from ``starts[i]`` on.

    Attributes:
        users: int64 ``[n]``.
        starts: int64 ``[n]``, position in the flat arrays of `Histories` where the history begins.
        positions: int64 ``[n]``, that of the target, where its history ends.
    """

    users: Rows
    starts: Rows
    positions: Rows

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.positions)

    @classmethod
    def before(cls, users: Rows, positions: Rows, histories: Histories, max_history: int) -> Self:
        """Targets at `positions`, each with at most `max_history` items of its user before it."""
        return cls(users, np.maximum(histories.offsets[users], positions - max_history), positions)

    def windows(self) -> Windows:
        """A window for each, of which the last interaction alone is learnt."""
        return Windows(users=self.users, starts=self.starts, ends=self.positions + 1, learn_from=self.positions)


@dataclass(frozen=True)
class Material:
    """A shop as both sides read it: item codes in time order, and nothing else.

    Attributes:
        histories: of the shop, without times and queries.
        ids: semantic IDs.
        windows: what ours is trained on.
        examples: the targets of these windows, as the peer is trained on them.
        validation: the validation target of each user, or of a sample of them.
        config: of our model.
    """

    histories: Histories
    ids: SemanticIds
    windows: Windows
    examples: Examples
    validation: Examples
    config: GeneratorConfig

    @classmethod
    def of(cls, shop: Shop, config: TrainBenchConfig, work: Path) -> Self:
        """Tokenize a shop and choose the examples.

        Raises:
            DataError: fewer than two training interactions, or no user with three interactions.
        """
        recipe = Recipe(
            embedding=[EmbeddingPart(name="hashing")], tokenizer=RqKMeansConfig(codebook_sizes=config.codebook_sizes)
        )
        return cls.choose(codes_alone(shop.histories), tokenize(recipe, shop, work).ids, config)

    @classmethod
    def choose(cls, histories: Histories, ids: SemanticIds, config: TrainBenchConfig) -> Self:
        """Choose users until they have as many examples as wanted; errors are those of `of`."""
        split, sizes = LeaveOneOut(histories), config.generator
        rng = np.random.default_rng(config.training.seed)
        per_user = split.train_ends() - histories.offsets[:-1]
        order = rng.permutation(histories.n_users)
        before = np.cumsum(per_user[order]) - per_user[order]
        chosen = np.zeros(histories.n_users, np.bool_)
        chosen[order[before + per_user[order] <= config.examples]] = True
        windows = cut_windows(histories.offsets, split.train_ends(), sizes.max_history)
        windows = _take(windows, chosen[windows.users])
        users, positions = _targets(windows)
        evaluated, targets = split.targets("validation")
        sample = np.sort(rng.permutation(len(evaluated))[: config.training.validation_users])
        if len(positions) < 2 or not len(sample):
            raise DataError(
                f"the logs have {len(positions)} training interactions of at most {config.examples} wanted, and "
                f"{len(sample)} users with a validation target; both sides need two and one at least. Take a shop with "
                "more histories, or more examples"
            )
        return cls(
            histories,
            ids,
            windows,
            Examples.before(users, positions, histories, sizes.max_history),
            Examples.before(evaluated[sample], targets[sample], histories, sizes.max_history),
            GeneratorConfig(
                codebook_sizes=ids.codebook_sizes,
                d_model=sizes.d_model,
                n_heads=sizes.n_heads,
                d_ff=sizes.d_ff,
                n_encoder_layers=sizes.n_encoder_layers,
                n_decoder_layers=sizes.n_decoder_layers,
                max_history=sizes.max_history,
                dropout=sizes.dropout,
            ),
        )

    def dataset(self, windows: Windows) -> HistoryDataset:
        """What ours reads."""
        no_profiles = np.zeros((self.histories.n_users, 0), np.int64)
        return HistoryDataset(self.histories, windows, self.ids, RequestFeatures(), no_profiles)

    def peer_dataset(self, examples: Examples) -> PeerDataset:
        """What the peer reads."""
        return PeerDataset(self.histories.items, self.ids, examples)


def codes_alone(histories: Histories) -> Histories:
    """The same items in the same order, without what the peer cannot read."""
    n = len(histories.items)
    return replace(
        histories,
        times=np.full(n, NO_TIME, np.int64),
        query_rows=np.full(n, NO_QUERY, np.int32),
        queries=[],
    )


def _take(windows: Windows, kept: NDArray[np.bool_]) -> Windows:
    return Windows(**{column.name: getattr(windows, column.name)[kept] for column in fields(windows)})


def _targets(windows: Windows) -> tuple[Rows, Rows]:
    """User and position of every interaction that some window trains."""
    counts = windows.ends - windows.learn_from
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(windows.users, counts), np.repeat(windows.learn_from, counts) + nth


class PeerDataset(Dataset[dict[str, Rows]]):
    """Examples as tokens: a history's codes one after another, and the codes of its target as labels."""

    def __init__(self, items: NDArray[np.int32], ids: SemanticIds, examples: Examples) -> None:
        """Keep references.

        Args:
            items: item rows of all interactions.
            ids: semantic IDs; code c of level l is token ``t5_level_offsets(ids.codebook_sizes)[l] + c``.
            examples: what is read.
        """
        self.items = items
        self.tokens_NL = ids.codes.astype(np.int64) + np.asarray(t5_level_offsets(ids.codebook_sizes))
        self.examples = examples

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Rows]:
        """``input_ids`` int64 ``[items of the history * L]``, and ``labels`` int64 ``[L]``."""
        start, position = self.examples.starts[row], self.examples.positions[row]
        tokens: Rows = self.tokens_NL[self.items[start:position]].ravel()
        return {
            "input_ids": tokens if len(tokens) else np.array([END_OF_SEQUENCE]),
            "labels": self.tokens_NL[self.items[position]],
        }

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        n_items = self.examples.positions - self.examples.starts
        return cast("list[int]", np.maximum(n_items * self.tokens_NL.shape[1], 1).tolist())


def collate_tokens(entries: list[dict[str, Rows]]) -> dict[str, Tensor]:
    """Pad examples to one batch.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, S]``, ``labels`` int64 ``[B, L]``.
    """
    length = max(len(entry["input_ids"]) for entry in entries)
    tokens_BS, mask_BS = np.zeros((2, len(entries), length), np.int64)
    for row, entry in enumerate(entries):
        n = len(entry["input_ids"])
        tokens_BS[row, :n], mask_BS[row, :n] = entry["input_ids"], 1
    arrays = {
        "input_ids": tokens_BS,
        "attention_mask": mask_BS,
        "labels": np.stack([entry["labels"] for entry in entries]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# --- the sides ---


@dataclass(frozen=True, slots=True)
class Setting:
    """What a side may choose, as it changes nothing but its speed.

    Attributes:
        threads: of torch.
        attention: implementation in the peer's T5.
    """

    threads: int
    attention: str = "sdpa"

    def __str__(self) -> str:
        return f"{self.threads} thread(s)" + ("" if self.attention == "sdpa" else f", {self.attention} attention")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The fastest of what a contender may be, and its examples a second."""

    side: Side
    setting: Setting
    examples_per_second: float


class Side(ABC):
    """Something that can be trained on the material."""

    name: str  # of its figures
    batches: list[Rows]
    """An epoch's batches, of nearly equal cost from one to the next, so that every n-th is like the whole."""

    def turn(self, part: int, parts: int, setting: Setting, clock: Clock = time.perf_counter) -> float:
        """Examples a second, by a clock, over the batches ``part, part + parts, ...`` of an epoch."""
        torch.set_num_threads(setting.threads)
        timed = self.batches[part::parts]
        # From the middle, so that the untimed steps have a batch of common size.
        trainer = self.trainer([timed[len(timed) // 2]] * _UNTIMED_STEPS + timed, setting)
        steps = StepClock(clock)
        trainer.add_callback(steps)
        trainer.train()
        return sum(self.n_examples(batch) for batch in timed) / steps.seconds

    @property
    def examples_per_step(self) -> float:
        """Their mean over an epoch."""
        return sum(self.n_examples(batch) for batch in self.batches) / len(self.batches)

    def __str__(self) -> str:
        return f"{self.name} with {self.examples_per_step:.4g} examples a step"

    @abstractmethod
    def settings(self, threads: Sequence[int]) -> list[Setting]:
        """What the side may choose from."""

    @abstractmethod
    def n_examples(self, batch: Rows) -> int:
        """Examples of a batch."""

    @abstractmethod
    def trainer(self, batches: list[Rows], setting: Setting) -> Trainer:
        """A fresh model's trainer that passes over `batches` once."""

    @abstractmethod
    def fit(self, setting: Setting) -> Losses:
        """Train on all examples; nats a code of every validation case, float64 ``[n]``."""


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when a run's steps end, by a clock."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Note the time; where a step is only asked for, wait for it at both ends of what is timed."""
        if torch.cuda.is_available() and state.global_step in (_UNTIMED_STEPS, state.max_steps):
            torch.cuda.synchronize()
        self.ends.append(self.clock())

    @property
    def seconds(self) -> float:
        """Between the end of the untimed steps and that of the last one."""
        return self.ends[-1] - self.ends[_UNTIMED_STEPS - 1]


class GivenBatches(Sampler[list[int]]):
    """Batches as they are given."""

    def __init__(self, batches: list[Rows]) -> None:
        self.batches = batches
        # What accelerate reads, as in `LengthBatchSampler`.
        self.batch_size = None
        self.drop_last = False

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of each."""
        return (batch.tolist() for batch in self.batches)


class PlainObjective(NextItemObjective):
    """Cross-entropy of the next item's codes, each softmax taken over its whole level, as the peer's is."""

    def __init__(self, material: Material) -> None:
        """Take the index for the decoder's sake; nothing is masked."""
        super().__init__(build_index(material.ids))

    def loss(self, model: Generator, states_NLD: Tensor, items_N: Tensor, codes_NL: Tensor) -> Tensor:
        """Mean loss of N targets from the decoder's states before each of their codes."""
        return code_losses(level_logits(model, states_NLD), codes_NL).mean()


class OurSide(Side):
    """`Generator` in `GeneratorTrainer`.

    Args:
        name: of its figures.
        material: what it learns.
        training: schedule and sizes.
        objective: its loss.
        folder: of checkpoints.
    """

    def __init__(
        self, name: str, material: Material, training: TrainingConfig, objective: NextItemObjective, folder: Path
    ) -> None:
        self.name = name
        self.material = material
        self.training = training
        self.objective = objective
        self.folder = folder / name
        self.dataset = material.dataset(material.windows)
        lengths = material.windows.lengths
        batches = [np.asarray(rows) for rows in LengthBatchSampler(lengths, training.targets_per_batch, training.seed)]
        self.batches = sorted(batches, key=lambda batch: int(lengths[batch].max()))

    def settings(self, threads: Sequence[int]) -> list[Setting]:
        """Threads alone."""
        return [Setting(n) for n in threads]

    def n_examples(self, batch: Rows) -> int:
        """Targets that the batch's windows train."""
        windows = self.material.windows
        return int((windows.ends - windows.learn_from)[batch].sum())

    def arguments(self) -> TrainingArguments:
        """What the trainer is given: the peer shares its optimizer and schedule."""
        return self._trainer(self.training).args

    def trainer(self, batches: list[Rows], setting: Setting) -> Trainer:
        """As `train` makes it, with the given batches and no checkpoint."""
        trainer = self._trainer(replace(self.training, epochs=1))
        trainer.sampler = GivenBatches(batches)  # type: ignore[assignment]
        trainer.args.save_strategy = trainer.args.eval_strategy = "no"
        return trainer

    def _trainer(self, training: TrainingConfig) -> GeneratorTrainer:
        set_seed(training.seed)
        model = new_generator(self.material.config)
        return GeneratorTrainer(model, self.objective, self.dataset, _unjudged, training, self.folder)

    def fit(self, setting: Setting) -> Losses:
        """By `train`, judged once, at the end."""
        torch.set_num_threads(setting.threads)
        set_seed(self.training.seed)
        model = new_generator(self.material.config)
        training = replace(self.training, evaluate_every=self.training.epochs)
        train(model, self.objective, self.dataset, _unjudged, training, self.folder / "fit")
        return our_losses(model, self.objective, self.material.dataset(self.material.validation.windows()))


def _unjudged(_: Generator) -> float:
    """In place of retrieval on validation cases: the last checkpoint is as good as any."""
    return 0.0


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """How the peer is trained; as it comes, ``Trainer``'s defaults.

    Attributes:
        rows: examples a step.
        bf16: autocast to bfloat16; the tuned peer has it where it is faster.
        by_length: batches of similar length, by ``train_sampling_strategy="group_by_length"``.
    """

    rows: int = DEFAULT_ROWS
    bf16: bool = False
    by_length: bool = False

    @property
    def tuned(self) -> bool:
        """Whether somebody has looked after it."""
        return self.by_length


class PeerSide(Side):
    """A Hugging Face T5 in ``Trainer``, neither of them touched.

    Args:
        name: of its figures.
        material: what it learns.
        config: how it is trained.
        ours: our trainer's arguments; optimizer and schedule are taken over from them.
        folder: where the trainer may write.
    """

    def __init__(
        self, name: str, material: Material, config: PeerConfig, ours: TrainingArguments, folder: Path
    ) -> None:
        self.name = name
        self.material = material
        self.config = config
        self.shared = {argument: getattr(ours, argument) for argument in SHARED_ARGUMENTS}
        self.folder = folder / name
        self.dataset = material.peer_dataset(material.examples)
        order = self._epoch_order()
        # A last batch of fewer rows is left out of the timing, unless there is no other.
        full = len(order) - len(order) % config.rows or len(order)
        self.batches = [order[at : at + config.rows] for at in range(0, full, config.rows)]

    def _epoch_order(self) -> Rows:
        """Rows of the dataset in the order in which ``Trainer`` would read them."""
        generator = torch.Generator().manual_seed(int(self.shared["seed"]))
        if not self.config.by_length:
            return torch.randperm(len(self.dataset), generator=generator).numpy()
        lengths = self.dataset.lengths()
        return np.asarray(list(LengthGroupedSampler(self.config.rows, lengths=lengths, generator=generator)))

    def settings(self, threads: Sequence[int]) -> list[Setting]:
        """Threads, and for the tuned peer the implementation of attention."""
        attentions = ("sdpa", "eager") if self.config.tuned else ("sdpa",)
        return [Setting(n, attention) for n in threads for attention in attentions]

    def n_examples(self, batch: Rows) -> int:
        """One a row."""
        return len(batch)

    def arguments(self, **changes: Any) -> TrainingArguments:
        """``Trainer``'s defaults, but for the peer's configuration, what both sides share, and files and prints."""
        gpu = torch.cuda.is_available()
        return TrainingArguments(
            **{
                **self.shared,
                "output_dir": str(self.folder),
                "per_device_train_batch_size": self.config.rows,
                "bf16": self.config.bf16,
                "train_sampling_strategy": "group_by_length" if self.config.by_length else "random",
                "use_cpu": not gpu,
                "dataloader_pin_memory": gpu,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **changes,
            }
        )

    def trainer(self, batches: list[Rows], setting: Setting) -> Trainer:
        """``Trainer`` over the rows of `batches`, in that order."""
        dataset = Subset(self.dataset, np.concatenate(batches).tolist())
        return self._trainer(dataset, self.arguments(train_sampling_strategy="sequential", num_train_epochs=1), setting)

    def _trainer(self, dataset: Dataset[Any], arguments: TrainingArguments, setting: Setting) -> Trainer:
        set_seed(arguments.seed)
        model = new_t5(self.material.config, setting.attention)
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate_tokens)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def fit(self, setting: Setting) -> Losses:
        """By ``Trainer``, as a user would."""
        torch.set_num_threads(setting.threads)
        trainer = self._trainer(self.dataset, self.arguments(), setting)
        trainer.train()
        # Weights alone: accelerate has put autocast around the model that was trained, and ours is judged in float32.
        model = new_t5(self.material.config)
        model.load_state_dict(trainer.model.state_dict())
        model = model.to(trainer.args.device)
        sizes = self.material.ids.codebook_sizes
        return peer_losses(model, sizes, self.material.peer_dataset(self.material.validation))


def new_generator(config: GeneratorConfig) -> Generator:
    """An untrained model of ours."""
    generator: Generator = Generator(config)
    return generator


def new_t5(config: GeneratorConfig, attention: str = "sdpa") -> T5ForConditionalGeneration:
    """An untrained T5 of the sizes of `config`, over special tokens and all codes."""
    sizes = T5Config(
        vocab_size=N_SPECIAL_TOKENS + sum(config.codebook_sizes),
        d_model=config.d_model,
        d_kv=config.d_model // config.n_heads,
        d_ff=config.d_ff,
        num_layers=config.n_encoder_layers,
        num_decoder_layers=config.n_decoder_layers,
        num_heads=config.n_heads,
        relative_attention_num_buckets=config.n_position_buckets,
        relative_attention_max_distance=config.max_distance,
        dropout_rate=config.dropout,
        pad_token_id=0,
        eos_token_id=END_OF_SEQUENCE,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    return T5ForConditionalGeneration(sizes)


def _n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- what was learnt ---


def code_losses(logits: Sequence[Tensor], codes_NL: Tensor) -> Tensor:
    """Nats a code of N semantic IDs, the mean over their levels, each by the softmax over its whole level.

    Args:
        logits: of each level, float ``[N, V]``.
        codes_NL: int64 ``[N, L]``.

    Returns:
        Float32 ``[N]``.
    """
    losses = [
        nn.functional.cross_entropy(scores_NV.float(), codes_NL[:, level], reduction="none")
        for level, scores_NV in enumerate(logits)
    ]
    return torch.stack(losses).mean(0)


def level_logits(model: Generator, states_NLD: Tensor) -> list[Tensor]:
    """Our logits of every level, float ``[N, V]`` each."""
    return [model.level_logits(states_NLD[:, level], level) for level in range(states_NLD.shape[1])]


def token_logits(logits_NLV: Tensor, codebook_sizes: tuple[int, ...]) -> list[Tensor]:
    """The peer's logits of every level, float ``[N, V]`` each, from those of all tokens at each place of an ID."""
    starts = t5_level_offsets(codebook_sizes)
    return [
        logits_NLV[:, level, start : start + size]
        for level, (start, size) in enumerate(zip(starts, codebook_sizes, strict=True))
    ]


@torch.inference_mode()
def our_losses(model: Generator, objective: NextItemObjective, dataset: HistoryDataset) -> Losses:
    """`code_losses` of every window's learnt target, float64 ``[n]``; there is one in each."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for rows in _chunks(len(dataset)):
        batch = {name: tensor.to(device) for name, tensor in collate([dataset[row] for row in rows]).items()}
        learn_BT = batch["learn"]
        states_NLD = objective.decode(model, batch).states_BTLD[learn_BT]
        losses.append(code_losses(level_logits(model, states_NLD), batch["target_codes"][learn_BT]))
    return torch.cat(losses).double().cpu().numpy()


@torch.inference_mode()
def peer_losses(model: T5ForConditionalGeneration, codebook_sizes: tuple[int, ...], dataset: PeerDataset) -> Losses:
    """`code_losses` of every example, float64 ``[n]``."""
    model.eval()
    device = next(model.parameters()).device
    offsets_L = torch.tensor(t5_level_offsets(codebook_sizes), device=device)
    losses = []
    for rows in _chunks(len(dataset)):
        batch = {name: tensor.to(device) for name, tensor in collate_tokens([dataset[row] for row in rows]).items()}
        logits = token_logits(model(**batch).logits, codebook_sizes)
        losses.append(code_losses(logits, batch["labels"] - offsets_L))
    return torch.cat(losses).double().cpu().numpy()


def _chunks(n: int) -> Iterator[range]:
    return (range(at, min(n, at + _VALIDATION_ROWS)) for at in range(0, n, _VALIDATION_ROWS))


# --- figures ---


def speed_figures(speeds: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Examples a second of every side, and our speedups, from one number a round and side."""
    rates = {name: np.asarray(rounds) for name, rounds in speeds.items()}
    speedups = {
        f"train.speedup_vs_{name}": _over_rounds(rates["ours"] / rates[name], "ratio") for name in ("hf", "hf_tuned")
    }
    return {
        **speedups,
        **{f"train.examples_per_second.{name}": _over_rounds(rate, "examples/s") for name, rate in rates.items()},
    }


def _over_rounds(values: NDArray[np.float64], unit: str) -> Figure:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return Figure(float(middle), unit, (float(low), float(high)))


def loss_figures(losses: Mapping[str, Losses]) -> dict[str, Figure]:
    """Mean losses and their ratios, from one loss a side and validation case.

    The intervals are those of 95 % over cases that are drawn again, the same ones for all sides.
    """
    n = len(losses["ours"])
    drawn = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    means = {name: float(loss.mean()) for name, loss in losses.items()}
    resampled = {name: loss[drawn].mean(1) for name, loss in losses.items()}

    def figure(value: float, values: NDArray[np.float64], unit: str) -> Figure:
        low, high = np.quantile(values, [0.025, 0.975])
        return Figure(value, unit, (float(low), float(high)))

    peers = [name for name in losses if name != "ours"]
    ratios = {name: figure(means["ours"] / means[name], resampled["ours"] / resampled[name], "ratio") for name in peers}
    return {
        **{f"train.validation_loss.{name}": figure(means[name], resampled[name], "nats/code") for name in losses},
        "train.validation_loss_ratio": ratios[min(peers, key=lambda name: means[name])],
        **{f"train.validation_loss_ratio_vs_{name}": ratio for name, ratio in ratios.items()},
    }


# --- operations ---


def training_flops(config: GeneratorConfig, lengths_W: Rows, learnt_W: Rows) -> float:
    """Floating-point operations that one training pass over windows needs, forward and backward.

    Two for every multiply-add of a matrix product; the backward pass has twice the forward pass's. Norms, softmax and
    the optimizer count as nothing, nor do padding and interactions that are context only, beyond being encoded.

    Args:
        config: of a bare model: no queries, past, experts or dense head.
        lengths_W: int64 ``[W]``, interactions of each window; a history of one fewer and the position before it are
            encoded.
        learnt_W: int64 ``[W]``, how many of them are targets.
    """
    d, n_levels = config.d_model, config.n_levels
    positions_W, targets_W = lengths_W.astype(np.float64), learnt_W.astype(np.float64)
    projections, feed_forward = 2 * 4 * d * d, 2 * 2 * d * config.d_ff
    encoder_W = config.n_encoder_layers * positions_W * (projections + feed_forward + 4 * d * positions_W)
    start_W = targets_W * 2 * d * d
    memory_W = positions_W * 2 * 2 * d * d  # keys and values that all targets of a window share
    code_W = projections + 4 * d * n_levels + 2 * 2 * d * d + 4 * d * positions_W + feed_forward
    decoder_W = config.n_decoder_layers * (memory_W + targets_W * n_levels * code_W)
    head_W = targets_W * 2 * d * sum(config.codebook_sizes)
    return float(3 * (encoder_W + start_W + decoder_W + head_W).sum())


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 operations a second of a device, None where its name is unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device.startswith(name)), None)


# --- long histories ---


MakeBatch = Callable[[int], dict[str, Tensor]]
"""A batch, as `genretrieval.training.data.collate` makes it, of histories of so many events."""


def history_cost(
    make_batch: MakeBatch,
    lengths: tuple[int, int],
    model: Generator,
    objective: Objective,
    rounds: int = 7,
    clock: Clock = time.perf_counter,
) -> Figure:
    """Time of a training step a target at histories of the second length, over that at the first.

    Args:
        make_batch: histories of a length; batches should have about as many targets at either.
        lengths: events of the histories that are compared.
        model: anything that reads both whole; it is trained by this.
        objective: its loss.
        rounds: steps of each length, in turn; the ratio is one of medians, its spread that of the 10th and 90th
            percentiles at their furthest apart.
        clock: what times a step.

    Raises:
        DataError: a batch has no target.
    """
    device = next(model.parameters()).device
    batches = {n: {name: tensor.to(device) for name, tensor in make_batch(n).items()} for n in lengths}
    targets = {n: int(batch["learn"].sum()) for n, batch in batches.items()}
    if not all(targets.values()):
        raise DataError(f"no targets in a batch of histories of {lengths} events: {targets}; a step has nothing to do")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step(batch: dict[str, Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16()):
            loss = objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = take_turns([Contender(str(n), partial(step, batches[n])) for n in lengths], rounds, clock)
    near, far = (_scaled(times[str(n)], 1 / targets[n]) for n in lengths)
    return _ratio(far, near)


def _scaled(time_: Figure, factor: float) -> Figure:
    assert time_.spread is not None
    return Figure(time_.value * factor, time_.unit, (time_.spread[0] * factor, time_.spread[1] * factor))


def _ratio(over: Figure, under: Figure) -> Figure:
    assert over.spread is not None
    assert under.spread is not None
    return Figure(
        over.value / under.value, "ratio", (over.spread[0] / under.spread[1], over.spread[1] / under.spread[0])
    )


def made_batch(ids: SemanticIds, config: GeneratorConfig, length: int, n_targets: int) -> dict[str, Tensor]:
    """A batch of random histories of `length` events and the item after each.

    The newest ``config.max_history`` of a history and the item after it are targets; what came before is its past. Rows
    follow from the targets, as in training: about `n_targets` of them, one history at least.
    """
    read = min(length, config.max_history)
    n_rows = max(1, math.floor(n_targets / (read + 1)))
    n = n_rows * (length + 1)
    offsets = np.arange(n_rows + 1, dtype=np.int64) * (length + 1)
    histories = Histories(
        user_ids=[str(row) for row in range(n_rows)],
        offsets=offsets,
        items=np.random.default_rng(0).integers(0, ids.n_items, n).astype(np.int32),
        events=np.zeros(n, np.int16),
        times=np.full(n, NO_TIME, np.int64),
        query_rows=np.full(n, NO_QUERY, np.int32),
        event_names=("made",),
        queries=[],
        order_rule="made",
    )
    starts = offsets[1:] - read - 1
    windows = Windows(users=np.arange(n_rows), starts=starts, ends=offsets[1:], learn_from=starts)
    no_profiles = np.zeros((n_rows, 0), np.int64)
    features = RequestFeatures(events=("made",) if config.n_past_tokens else ())
    dataset = HistoryDataset(histories, windows, ids, features, no_profiles, max_past=config.max_past)
    return collate([dataset[row] for row in range(len(dataset))])
