"""Training runs of the generator: Hugging Face `Trainer`, its checkpoints and its hooks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from genretrieval.errors import RecipeError
from genretrieval.model import Generator
from genretrieval.model.moe import update_balance
from genretrieval.training.data import HistoryDataset, LengthBatchSampler, collate
from genretrieval.training.objectives import Objective
from genretrieval.training.precision import fast_bfloat16

METRIC = "recall10"


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How long and how fast to learn.

    Attributes:
        epochs: passes over the training histories.
        learning_rate: peak of the cosine schedule (AdamW).
        warmup_share: share of all steps over which the rate rises to its peak.
        weight_decay: on matrices.
        targets_per_batch: interactions of a batch, padding included; rows follow from their length.
        accumulate: batches of a step, on each process. Equal products of `accumulate` and processes take equal steps.
        max_grad_norm: gradients are clipped to this norm.
        seed: of initialisation, order and dropout. Equal seed and thread count give equal weights on CPU.
        validation_users: users that a checkpoint is judged by, a fixed sample; the best checkpoint is kept.
        evaluate_every: epochs between two judgements, and between two checkpoints.

    Raises:
        RecipeError: a value is out of range.
    """

    epochs: int = 20
    learning_rate: float = 2e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    targets_per_batch: int = 512
    accumulate: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    validation_users: int = 4000
    evaluate_every: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with before anything is spent on it."""
        positive = (
            "epochs",
            "learning_rate",
            "targets_per_batch",
            "accumulate",
            "max_grad_norm",
            "validation_users",
            "evaluate_every",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise RecipeError(f"training.{name} is {getattr(self, name)}; it must be above 0")
        if self.weight_decay < 0:
            raise RecipeError(f"training.weight_decay is {self.weight_decay}; it must be 0 or above")
        if not 0 <= self.warmup_share < 1:
            raise RecipeError(f"training.warmup_share is {self.warmup_share}; it is a share of all steps, in [0, 1)")


class ExpertBalance(TrainerCallback):
    """Moves the routers' biases after every step and keeps count of who works on how much.

    Attributes:
        loads: by mixture, int64 ``[n_experts]``, tokens of each expert since the last evaluation.
    """

    def __init__(self) -> None:
        self.loads: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Balance; under torchrun all processes do, with the loads of all."""
        for name, load in update_balance(kwargs["model"]).items():
            self.loads[name] = self.loads.get(name, 0) + load

    def report(self) -> dict[str, float]:
        """Share of the fullest expert of each mixture, times the number of experts: 1 is balanced."""
        report = {f"expert_load/{name}": float(load.max() / load.float().mean()) for name, load in self.loads.items()}
        self.loads = {}
        return report


class GeneratorTrainer(Trainer):
    """`Trainer` with an objective over histories, batches by length, and retrieval as its evaluation.

    The loss of a step is the mean over all targets of its batches, of every process: each batch counts by its number of
    targets, not as much as any other. Matrix products are in bfloat16 where the machine is faster with it.

    Args:
        model: the generator.
        objective: loss of a batch.
        dataset: training windows.
        validate: Recall@10 of a generator on validation cases.
        config: schedule and sizes.
        output: folder of checkpoints.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Generator,
        objective: Objective,
        dataset: HistoryDataset,
        validate: Callable[[Generator], float],
        config: TrainingConfig,
        output: Path,
    ) -> None:
        self.objective = objective
        self.validate = validate
        self.config = config
        gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(output),
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_share,
            gradient_accumulation_steps=config.accumulate,
            weight_decay=config.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=config.max_grad_norm,
            bf16=fast_bfloat16(),
            use_cpu=not gpu,
            seed=config.seed,
            eval_strategy="steps",
            save_strategy="steps",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=METRIC,
            greater_is_better=True,
            logging_strategy="steps",
            logging_nan_inf_filter=False,  # `compute_loss` looks at every loss, and stops at one that is not finite
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=gpu,
            ddp_find_unused_parameters=True,
            disable_tqdm=True,  # progress is the caller's: see the callbacks of `train`
        )
        batches_per_step = arguments.world_size * config.accumulate
        lengths = dataset.windows.lengths
        self.sampler = LengthBatchSampler(lengths, config.targets_per_batch, config.seed, multiple=batches_per_step)
        # Processes share the batches of an epoch; a checkpoint stands at the end of one, where nothing is half read.
        epoch_steps = math.ceil(len(self.sampler) / batches_per_step)
        steps = epoch_steps * config.evaluate_every
        arguments.eval_steps = arguments.save_steps = arguments.logging_steps = steps
        super().__init__(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)
        self.remove_callback(PrinterCallback)
        self.experts = ExpertBalance()
        self.add_callback(self.experts)
        if isinstance(objective, torch.nn.Module):
            objective.to(self.args.device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length; accelerate shards them over processes."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=collate)
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Targets of all batches of a step on all processes; Hugging Face counts ``labels``, which ours lack.

        What is counted here comes back as `compute_loss`'s ``num_items_in_batch``, and as it is not None, Hugging Face
        leaves it to that function to divide by it.
        """
        if not batch_samples:
            return None
        found = torch.stack([batch["learn"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(found).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """A batch's share of its step's loss.

        The objective is run inside the model's forward so that data-parallel wrappers see it. It is a mean over the
        batch's targets; the shares of all batches add up to the mean over all of the step's. Wrappers take the mean
        of the processes' gradients, where a sum is wanted, hence the number of processes.

        Raises:
            RecipeError: the training diverged; nothing that follows would bring the weights back.
        """
        loss = model(objective=self.objective, batch=inputs)
        if not torch.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}: the "
                f"training has diverged; lower learning_rate, which is {self.config.learning_rate:g}"
            )
        if num_items_in_batch is None:
            return loss
        return loss * (inputs["learn"].sum() / num_items_in_batch * self.accelerator.num_processes)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation Recall@10 of the current weights."""
        self.model.eval()
        metrics = {f"eval_{METRIC}": self.validate(self.accelerator.unwrap_model(self.model))}
        self.model.train()
        self.log(metrics | self.experts.report())
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(
    model: Generator,
    objective: Objective,
    dataset: HistoryDataset,
    validate: Callable[[Generator], float],
    config: TrainingConfig,
    output: Path,
    *,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> float:
    """Train `model` in place, or go on where a killed run left off, and load its best checkpoint.

    Args:
        model: the generator.
        objective: loss of a batch.
        dataset: training windows.
        validate: Recall@10 of a generator on validation cases.
        config: schedule and sizes.
        output: folder of checkpoints.
        callbacks: hooks of the Hugging Face trainer: progress, TensorBoard, W&B.

    Returns:
        Validation Recall@10 of the best checkpoint.

    Raises:
        RecipeError: the loss is no longer finite.
    """
    trainer = GeneratorTrainer(model, objective, dataset, validate, config, output)
    for callback in callbacks:
        trainer.add_callback(callback)
    with trainer.args.main_process_first(local=False):
        checkpoint = last_complete_checkpoint(output)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.best_metric is not None, "a run is judged at its end at the latest"
    return float(trainer.state.best_metric)


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end; what a kill left half written is removed.

    `Trainer` writes ``trainer_state.json`` last, so one that parses means that everything before it is there.
    """
    complete: list[tuple[int, Path]] = []
    for folder in output.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(folder)
            continue
        complete.append((int(state["global_step"]), folder))
    return str(max(complete)[1]) if complete else None
