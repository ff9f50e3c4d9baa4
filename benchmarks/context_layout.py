"""What should a position of the context be, and how should histories be trained? Equal CPU time for each answer.

    python benchmarks/context_layout.py LOGS --work FOLDER --cpu-minutes 4

Three ways to train the same sizes on the same semantic IDs (hashing + collaborative embeddings):

- item, one pass: one position an item (the sum of its codes' embeddings); a causal encoder, so that one pass over
  a history trains every item of it. What `Generator` does.
- item, windows: the same model, but every interaction is a training example of its own with the history before it.
- code, one pass: one position a code, n_levels times longer.

Prints validation Recall@10 of each, and how many interactions it has learnt from in that time. The decision that
rests on it: docs/decisions/0001-context-layout.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import set_seed

from genretrieval.features import N_GAPS
from genretrieval.figures import Figure, print_lines
from genretrieval.histories import LeaveOneOut
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.model.generator import Context, ContextEncoder
from genretrieval.training.data import HistoryDataset, LengthBatchSampler, Windows, collate
from genretrieval.training.objectives import NextItemObjective
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.stages import stage_inputs, training_set, validation_recall
from genretrieval_pipelines.tokenize import tokenize

RECIPE = {
    "embedding": [{"name": "hashing"}, {"name": "collaborative"}],
    "training": {"validation_users": 5000},
}


class CodePositions(ContextEncoder):
    """One context position a code: ``1 + S * L`` of them."""

    def history(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        profile: Tensor | None = None,
    ) -> Tensor:
        n_levels = history_codes.shape[-1]
        about_item = (self.events(history_events) + self.gaps(history_gaps))[:, :, None]
        x_BSD = (self.embed(history_codes) + about_item).flatten(1, 2)
        first = self.begin.expand(x_BSD.shape[0], 1, -1)
        mask_BS = torch.cat(
            [history_mask.new_ones(history_mask.shape[0], 1), history_mask.repeat_interleave(n_levels, 1)], 1
        )
        return self.encoder(torch.cat([first, x_BSD], 1), mask_BS)

    def forward(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
        profile: Tensor | None = None,
    ) -> Context:
        n_levels = history_codes.shape[-1]
        memory = self.history(history_codes, history_events, history_gaps, history_mask)
        last = (history_mask.sum(1) * n_levels)[:, None, None].expand(-1, 1, memory.shape[-1])
        mask = torch.cat(
            [history_mask.new_ones(history_mask.shape[0], 1), history_mask.repeat_interleave(n_levels, 1)], 1
        )
        return Context(memory, mask, self.start(memory.gather(1, last)[:, 0]))


class CodePass(NextItemObjective):
    """`NextItemObjective` for `CodePositions`: target t sees the first ``1 + t * L`` positions."""

    def decode(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        names = ("history_codes", "history_events", "history_gaps", "history_mask")
        memory = model.context.history(*(batch[name] for name in names))
        targets = batch["target_codes"]
        n_rows, n_targets, n_levels = targets.shape
        ends = torch.arange(n_targets) * n_levels
        start = model.context.start(memory[:, ends]) + model.context.codes.weight[0]
        x_BTLD = torch.cat([start[:, :, None], model.context.embed(targets[..., :-1])], 2)
        seen = (torch.arange(memory.shape[1]) <= ends[:, None]).expand(n_rows, -1, -1)
        return model.decoder(x_BTLD, memory, seen)


class WindowPass(NextItemObjective):
    """`NextItemObjective` for windows: the last interaction of each is the only target."""

    def forward(self, model: Generator, batch: dict[str, Tensor]) -> Tensor:
        rows = torch.arange(len(batch["learn"]))
        last = batch["learn"].float().argmax(1)
        # The history is what stands before the target, however long the batch's longest is.
        mask = torch.arange(batch["history_mask"].shape[1]) < last[:, None]
        context = model.context(batch["history_codes"], batch["history_events"], batch["history_gaps"], mask)
        targets = batch["target_codes"][rows, last]
        start = context.start_BD + model.context.codes.weight[0]
        x_BLD = torch.cat([start[:, None], model.context.embed(targets[..., :-1])], 1)
        states = model.decoder(x_BLD[:, None], context.memory_BSD, context.mask_BS[:, None])[:, 0]
        return self.loss(model, states, batch["target_items"][rows, last], targets)


def expanded(windows: Windows) -> Windows:
    """A window for every interaction that `windows` trains."""
    counts = windows.ends - windows.learn_from
    repeat = np.repeat(np.arange(len(windows)), counts)
    nth = np.arange(len(repeat)) - np.repeat(np.cumsum(counts) - counts, counts)
    target = windows.learn_from[repeat] + nth
    return Windows(windows.users[repeat], windows.starts[repeat], target + 1, target)


def train_for(model: Generator, objective: nn.Module, dataset: HistoryDataset, cpu_seconds: float, peak: float) -> int:
    """Train on a cosine over CPU time; returns how many interactions were learnt from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    sampler = LengthBatchSampler(dataset.windows.lengths, 2048, seed=0)
    model.train()
    begun, learnt, epoch = time.process_time(), 0, 0
    while True:
        sampler.set_epoch(epoch)
        epoch += 1
        for rows in sampler:
            share = (time.process_time() - begun) / cpu_seconds
            if share >= 1:
                return learnt
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, share / 0.05) * (0.5 + 0.5 * np.cos(np.pi * share))
            batch = collate([dataset[row] for row in rows])
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learnt += int(batch["learn"].sum())


def main(
    logs: Path,
    work: Annotated[Path, typer.Option(help="Folder of intermediate results.")],
    cpu_minutes: Annotated[float, typer.Option(help="Training time of each variant.")] = 4.0,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 1,
) -> None:
    """Compare the three layouts."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(RECIPE)
    work.mkdir(parents=True, exist_ok=True)
    shop: Shop = open_shop(logs, work)
    tokenized = tokenize(recipe, shop, work)
    features = request_features(recipe, shop)
    draft = draft_bundle(recipe, shop, tokenized.ids, features)
    inputs = stage_inputs(recipe, shop, tokenized.ids, draft, work, Console(quiet=True))
    dataset = training_set(recipe, shop, tokenized.ids, features)
    one_each = HistoryDataset(dataset.histories, expanded(dataset.windows), dataset.ids, features, dataset.profiles)
    assert len(one_each) == int(LeaveOneOut(shop.histories).train_ends().sum() - shop.histories.offsets[:-1].sum())
    figures: dict[str, Figure] = {}
    for name in ("item_one_pass", "item_windows", "code_one_pass"):
        recalls, learnt = [], 0
        for seed in range(seeds):
            set_seed(seed)
            config = GeneratorConfig(
                codebook_sizes=tokenized.ids.codebook_sizes, n_events=features.n_events, n_gaps=N_GAPS, max_distance=256
            )
            model = Generator(config)
            if name == "code_one_pass":
                model.context = CodePositions(config)
                model.context.apply(model._init_weights)
            objective = {"item_one_pass": NextItemObjective, "item_windows": WindowPass, "code_one_pass": CodePass}[
                name
            ]
            data = one_each if name == "item_windows" else dataset
            learnt = train_for(model, objective(inputs.index), data, cpu_minutes * 60, peak=2e-3)
            recalls.append(validation_recall(inputs, model.eval()))
        spread = (min(recalls), max(recalls)) if seeds > 1 else None
        figures[f"context.{name}.recall10"] = Figure(float(np.mean(recalls)), "share", spread)
        figures[f"context.{name}.learnt"] = Figure(learnt, "interactions")
    print_lines(figures)


if __name__ == "__main__":
    typer.run(main)
