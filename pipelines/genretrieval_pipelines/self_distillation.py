"""The self-distillation stage of a recipe: what its teacher is told about the items of this shop."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from genretrieval.item_texts import item_texts
from genretrieval.keywords import AttributeType, KeywordDictionary
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.self_distillation import SelfDistillationObjective, make_teacher
from genretrieval_pipelines.embed.parts import catalogue_keywords
from genretrieval_pipelines.recipe import SelfDistillationStage
from genretrieval_pipelines.stages import StageInputs, StageRun, training_set, validation_recall

# What an item is and who makes it: with colours, sizes and lines beside them, most items would be known by their words.
PRIVILEGED = (AttributeType.ENTITY, AttributeType.BRAND)


def stage_run(inputs: StageInputs, stage: SelfDistillationStage) -> StageRun:
    """Make the stage ready: the data and the judge of `next_item`, and the teacher.

    A privileged teacher in a shop without a query tokenizer has no words to read; the data are empty then, which
    leaves the stage out.
    """
    features, config = inputs.draft.request_features, stage.distillation
    dataset = training_set(inputs.recipe, inputs.shop, inputs.ids, features)
    keywords_IW: Tensor | None = None
    if config.teacher == "privileged":
        keywords_IW = privileged_tokens(inputs)
        if not features.query_tokenizer:
            dataset.windows = dataset.windows.of_users(len(dataset.profiles))
    teacher = make_teacher(config, inputs.index, inputs.recipe.generator.d_model, keywords_IW)
    objective = SelfDistillationObjective(NextItemObjective(inputs.index, dataset.trained_items()), teacher, config)
    return StageRun(objective, dataset, partial(validation_recall, inputs))


def privileged_tokens(inputs: StageInputs) -> Tensor:
    """int64 ``[n_items, W]``: query tokens of every item's entity and brand, zeros on the right; W is 1 or more.

    They are mined from the catalogue (`mine_keywords`), where a keyword is a word of several items.
    """
    items, features = inputs.shop.items, inputs.draft.request_features
    words = privileged_words(catalogue_keywords(items, inputs.work), item_texts(items))
    rows = [features.query_tokens(text) for text in words]
    tokens_IW = np.zeros((len(rows), max(1, max(map(len, rows)))), np.int64)
    for i, row in enumerate(rows):
        tokens_IW[i, : len(row)] = row
    return torch.from_numpy(tokens_IW)


def privileged_words(dictionary: KeywordDictionary, texts: list[str]) -> list[str]:
    """The keywords of each text whose type is one of `PRIVILEGED`, each once, in the order of the text."""
    return [
        " ".join(dict.fromkeys(m.keyword.text for m in found if m.keyword.type in PRIVILEGED))
        for found in dictionary.match_all(texts)
    ]
