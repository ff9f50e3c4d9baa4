"""Training of the generator: the stages of a recipe, one after another, each resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress, TaskID
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState, set_seed

from genretrieval.errors import RecipeError
from genretrieval.features import N_GAPS
from genretrieval.metrics import ndcg, recall
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.model.profile import Profile, TorchRecProfile
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.self_routing import SelfRouting
from genretrieval.training.trainer import METRIC, TrainingConfig, train
from genretrieval_pipelines import preference, self_distillation
from genretrieval_pipelines.draft import StageResult, Trained
from genretrieval_pipelines.evaluate import utility
from genretrieval_pipelines.recipe import (
    PreferenceStage,
    RankingModelStage,
    SelfDistillationStage,
    SupervisedStage,
    content_hash,
)
from genretrieval_pipelines.stages import (
    JUDGING_DENSE_WEIGHT,
    StageInputs,
    StageRun,
    mean_at_10,
    nothing_to_learn,
    training_set,
    validate,
    validation_recall,
)

# Tried in this order; at equal quality the earlier one is kept.
DENSE_WEIGHTS = (JUDGING_DENSE_WEIGHT, 0.0, 0.25, 0.5, 2.0, 4.0, 8.0)
SECONDS = "seconds"
_FINISHED = "generator.safetensors"


def train_generator(inputs: StageInputs) -> Trained:
    """Train the generator, or read it back if this very training has finished before.

    A stage that has finished is read back too, so that a killed run goes on within the stage that it was in. What
    another run with the same work folder is training is waited for.

    Raises:
        RecipeError: no stage has anything to learn from.
    """
    recipe, console = inputs.recipe, inputs.console
    config = generator_config(inputs)
    key = inputs_key(inputs, config)
    set_seed(recipe.training.seed)
    model = Generator(config)
    if model.dense is not None and inputs.content is not None:
        model.dense.set_content(torch.from_numpy(inputs.content))
    plain = model.context.profile
    if isinstance(plain, Profile) and recipe.generator.profile_tables == "torchrec":
        model.context.profile = TorchRecProfile(plain)
    results: list[StageResult] = []
    for stage in recipe.stages:
        if isinstance(stage, RankingModelStage):
            key = content_hash(key, stage)
            folder = inputs.work / f"{stage.objective}-{key}"
            with _alone(folder, console):
                preference.fit_ranking_stage(inputs, stage, folder)
            continue
        schedule = stage.schedule(recipe.training)
        # Its weights depend on the stages before it, so its name does: a recipe with one more stage trains that one.
        key = content_hash(key, stage, schedule, *([preference.FORMAT] if isinstance(stage, PreferenceStage) else []))
        folder = inputs.work / f"{stage.objective}-{key}"
        with nullcontext() if _measured(inputs, folder).exists() else _alone(folder, console):
            result = _train_stage(inputs, stage, schedule, model, folder)
        if result is not None:
            results.append(result)
    if isinstance(plain, Profile) and isinstance(model.context.profile, TorchRecProfile):
        # What is exported and kept is plain torch.
        plain.load_state_dict(model.context.profile.state_dict())
        model.context.profile = plain
    if not results:
        stages = [stage for stage in recipe.stages if not isinstance(stage, RankingModelStage)]
        reasons = "; ".join(f"{stage.objective}: {nothing_to_learn(inputs, stage)}" for stage in stages)
        learns = any(stage.objective == "next_item" for stage in stages)
        raise RecipeError(
            f"no stage of the recipe finds anything to learn from in these logs ({reasons}); "
            + ("give interactions, or queries of the split train" if learns else "add next_item to `stages`")
        )
    return Trained(model.eval(), results[-1].dense_weight, tuple(results))


def _train_stage(
    inputs: StageInputs,
    stage: SupervisedStage | SelfDistillationStage | PreferenceStage,
    schedule: TrainingConfig,
    model: Generator,
    folder: Path,
) -> StageResult | None:
    """Train `model` by one stage, or read it back; None for a stage that finds nothing to learn from.

    Raises:
        RecipeError: as `train`, with the stage's name.
    """
    console, finished, measured = inputs.console, folder / _FINISHED, _measured(inputs, folder)
    if finished.exists():
        seconds = read_stage(model, finished)
    else:
        run = stage_run(inputs, stage, model)
        if not len(run.dataset):
            why = f"stage {stage.objective}: left out, as {nothing_to_learn(inputs, stage)}"
            console.print(why, style="yellow", highlight=False, markup=False, soft_wrap=True)
            return None
        console.print(f"stage {stage.objective}: {len(run.dataset):,} histories", style="dim", highlight=False)
        clock = _training_clock()
        started = clock()
        hooks = (TrainingProgress(console, run.judged_by), *run.callbacks)
        try:
            train(model, run.objective, run.dataset, run.validate, schedule, folder, callbacks=hooks)
        except RecipeError as error:
            raise RecipeError(f"stage {stage.objective}: {error}") from error
        seconds = clock() - started
        if PartialState().is_main_process:
            write_stage(model, seconds, finished)
    if measured.exists():
        return StageResult(**json.loads(measured.read_text("utf-8")))
    result = measure_stage(inputs, model.eval(), stage.objective, seconds)
    if PartialState().is_main_process:
        partial_file = measured.with_suffix(".partial")
        partial_file.write_text(json.dumps(asdict(result)), "utf-8")
        os.replace(partial_file, measured)
    return result


def _measured(inputs: StageInputs, folder: Path) -> Path:
    """What is known of a stage's weights, which depends on how wide the search is; written after them."""
    return folder / f"measured-{inputs.recipe.evaluation.beam_width}.json"


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """While no other run trains the same stage; processes of torchrun, which train it together, do not look."""
    if PartialState().num_processes > 1:
        yield
        return
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another run is training {folder.name}: waiting for it", style="yellow", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _training_clock() -> Callable[[], float]:
    """What training costs: seconds of all cores together on CPUs, which neighbours do not change, else of the wall."""
    state = PartialState()
    if state.device.type != "cpu":
        return time.perf_counter
    return lambda: time.process_time() * state.num_processes  # which all do the same


def stage_run(
    inputs: StageInputs, stage: SupervisedStage | SelfDistillationStage | PreferenceStage, model: Generator
) -> StageRun:
    """Make a stage ready: what it learns from, its loss and its judge."""
    match stage:
        case PreferenceStage():
            return preference.stage_run(inputs, stage, model)
        case SelfDistillationStage():
            return self_distillation.stage_run(inputs, stage)
        case SupervisedStage():
            features, reserved = inputs.draft.request_features, inputs.draft.manifest.reserved_slots
            dataset = training_set(
                inputs.recipe, inputs.shop, inputs.ids, features, stage.objective, stage.scenario, stage.made_queries
            )
            routing = None
            if stage.self_routing and any(reserved):
                routing = SelfRouting(inputs.index, reserved, features.query_vocab_size, stage.self_routing)
            objective = NextItemObjective(inputs.index, dataset.trained_items(), routing=routing)
            return StageRun(objective, dataset, partial(validation_recall, inputs))


def measure_stage(inputs: StageInputs, model: Generator, objective: str, seconds: float) -> StageResult:
    """Quality on the cases that judge checkpoints, with the weight of the dense head that is best there by NDCG@10.

    The search is as wide as the one that is served: a narrower one leaves the dense head less to choose from. At equal
    NDCG@10 the earlier of `DENSE_WEIGHTS`.
    """
    weights = DENSE_WEIGHTS if model.dense is not None else (0.0,)
    cases, answers = validate(inputs, Trained(model, weights[0]), inputs.recipe.evaluation.beam_width)
    ranked = [answers.reweighted(weight - weights[0]) for weight in weights]
    found = [mean_at_10(ndcg, inputs.shop, cases, items) for items in ranked]
    best = int(np.argmax(found))
    recall10 = mean_at_10(recall, inputs.shop, cases, ranked[best])
    scenarios = np.asarray(cases.scenarios, object)
    by_scenario = {}
    for name in sorted({name for name in cases.scenarios if name is not None}):
        rows = np.flatnonzero(scenarios == name)
        by_scenario[name] = mean_at_10(recall, inputs.shop, cases.take(rows), ranked[best][rows])
    worth = utility(inputs.shop, cases, ranked[best])
    return StageResult(objective, seconds, weights[best], recall10, found[best], by_scenario, worth)


def write_stage(model: Generator, seconds: float, path: Path) -> None:
    """Keep a stage's weights, and how long it took to train them."""
    partial_file = path.with_suffix(".partial")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial_file, {SECONDS: repr(seconds)})
    os.replace(partial_file, path)


def read_stage(model: Generator, path: Path) -> float:
    """Give `model` the weights of a finished stage; the seconds that it took."""
    with safe_open(path, "pt") as file:
        seconds = float(file.metadata()[SECONDS])
    model.load_state_dict(load_file(path))
    return seconds


def generator_config(inputs: StageInputs) -> GeneratorConfig:
    """Sizes of the recipe, with what follows from the data."""
    sizes, features, content = inputs.recipe.generator, inputs.draft.request_features, inputs.content
    return GeneratorConfig(
        codebook_sizes=inputs.ids.codebook_sizes,
        d_model=sizes.d_model,
        n_heads=sizes.n_heads,
        d_ff=sizes.d_ff,
        n_encoder_layers=sizes.n_encoder_layers,
        n_decoder_layers=sizes.n_decoder_layers,
        n_query_layers=sizes.n_query_layers,
        n_experts=sizes.n_experts,
        experts_per_token=sizes.experts_per_token,
        query_vocab_size=features.query_vocab_size,
        n_query_codes=features.n_query_codes,
        max_query_tokens=sizes.max_query_tokens,
        n_events=features.n_events,
        n_gaps=N_GAPS,
        n_profile_buckets=features.n_profile_buckets,
        n_items=0 if content is None else len(content),
        content_dim=0 if content is None else content.shape[1],
        n_scenarios=features.n_scenarios,
        n_past_tokens=sizes.n_past_tokens if sizes.max_past else 0,
        max_past=sizes.max_past,
        max_history=sizes.max_history,
        dropout=sizes.dropout,
    )


def inputs_key(inputs: StageInputs, config: GeneratorConfig) -> str:
    """Hash of everything that the weights depend on, but for the stages.

    Stages read exposures, scenarios and the texts of items beside the histories, each something else, so the logs count
    as they are: better a training that a change could have spared than one that missed it. What was read from them
    counts too, as a newer version of this package may read it otherwise.
    """
    shop, ids, content = inputs.shop, inputs.ids, inputs.content
    features, histories = inputs.draft.request_features, shop.histories
    return content_hash(
        config.to_dict(),
        features.query_tokenizer,
        features.profile_features,
        *([] if features.keywords is None else [features.keywords, features.keywords.slots.tobytes()]),
        ids.codes.tobytes(),
        b"" if content is None else np.ascontiguousarray(content).data,
        shop.fingerprint,
        histories.items.data,
        histories.offsets.data,
        histories.events.data,
        histories.times.data,
        histories.query_rows.data,
        histories.event_names,
        histories.queries,
        *(table.write_ipc(None).getvalue() for table in (shop.pairs, shop.users)),
    )


class TrainingProgress(TrainerCallback):
    """A rich progress bar on a terminal; one line an evaluation elsewhere."""

    def __init__(self, console: Console, judged_by: str) -> None:
        self.console = console
        self.judged_by = judged_by
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("training the generator", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move it."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Say how good it has become."""
        value = metrics[f"eval_{METRIC}"]
        line = f"epoch {state.epoch or 0:.0f} of {state.num_train_epochs}: {self.judged_by} {value:.4f}"
        self.console.print(line, style="dim", highlight=False)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Remove it."""
        self.bar.stop()
