"""The generator sees the past alone, and the same in training as when it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genretrieval.model import Generator, GeneratorConfig
from genretrieval.model.layers import _bucket

N_ROWS, N_TARGETS = 3, 5
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def generator(make_generator: Any) -> Generator:
    made: Generator = make_generator()
    return made


@pytest.fixture
def batch(tiny_config: GeneratorConfig, make_requests: Any) -> dict[str, Tensor]:
    """Full histories and their targets; targets 1 and 7 (flat) have a query."""
    made = {name: torch.from_numpy(array) for name, array in make_requests(tiny_config, N_ROWS, N_TARGETS).items()}
    codes = made["history_codes"]
    return {
        "target_codes": codes,
        "history_codes": codes[:, :-1],
        "history_events": made["history_events"][:, :-1],
        "history_gaps": made["history_gaps"][:, :-1],
        "history_mask": torch.ones(N_ROWS, N_TARGETS - 1, dtype=torch.bool),
        "profile": made["profile"],
        "history_vectors": made["history_vectors"][:, :-1],
        "query_rows": torch.tensor([1, 7]),
        "query_tokens": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "query_mask": torch.tensor([[True, True, False], [True, True, True]]),
    }


def decode(generator: Generator, batch: dict[str, Tensor]) -> Tensor:
    """States ``[B, T, L, D]`` as training computes them."""
    history = [batch[f"history_{name}"] for name in ("codes", "events", "gaps", "mask")]
    states = generator.context.history(*history, batch["profile"], batch["history_vectors"])
    query = [batch[name] for name in ("query_rows", "query_tokens", "query_mask")]
    return generator.decode_targets(batch["target_codes"], states, *query)


@torch.inference_mode()
def test_later_items_change_nothing(generator: Generator, batch: dict[str, Tensor]) -> None:
    before = decode(generator, batch)
    for first_changed in range(N_TARGETS):
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed["target_codes"][:, first_changed:] = 0
        changed["history_codes"][:, first_changed:] = 0
        changed["history_events"][:, first_changed:] = 1
        changed["history_gaps"][:, first_changed:] = 1
        changed["history_vectors"][:, first_changed:] = 0.0
        after = decode(generator, changed)
        torch.testing.assert_close(after[:, :first_changed], before[:, :first_changed], **CLOSE)
        # The first code of the changed target is written before anything that changed is read.
        torch.testing.assert_close(after[:, first_changed, 0], before[:, first_changed, 0], **CLOSE)
        if first_changed + 1 < N_TARGETS:
            assert (after[:, first_changed + 1] - before[:, first_changed + 1]).abs().max() > 1e-3


@torch.inference_mode()
def test_later_codes_of_a_target_change_nothing(generator: Generator, batch: dict[str, Tensor]) -> None:
    before = decode(generator, batch)
    batch["target_codes"] = batch["target_codes"].clone()
    batch["target_codes"][..., 1] = (batch["target_codes"][..., 1] + 1) % 6
    after = decode(generator, batch)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2], **CLOSE)
    assert (after[:, :, 2] - before[:, :, 2]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_target_in_training_is_the_same_target_alone(generator: Generator, batch: dict[str, Tensor]) -> None:
    together = decode(generator, batch)
    query_of = {1: (4, 5), 7: (6, 7, 8)}
    for row in range(N_ROWS):
        for target in range(N_TARGETS):
            history = {name: batch[name][row : row + 1, :target] for name in batch if name.startswith("history_")}
            query = query_of.get(row * N_TARGETS + target)
            if query is not None:
                history["query_tokens"] = torch.tensor([query])
                history["query_mask"] = torch.ones(1, len(query), dtype=torch.bool)
            codes = batch["target_codes"][row, target]
            flat = torch.cat([torch.zeros(1, dtype=torch.long), codes[:-1] + generator.context.level_offsets[:-1]])
            logits = generator(**history, profile=batch["profile"][row : row + 1], decoder_input_ids=flat[None]).logits[
                0
            ]
            for level in range(generator.config.n_levels):
                expected = generator.level_logits(together[row, target, level], level)
                torch.testing.assert_close(logits[level][logits[level] > -torch.inf], expected, **CLOSE)


@torch.inference_mode()
def test_only_a_target_s_own_query_reaches_it(generator: Generator, batch: dict[str, Tensor]) -> None:
    before = decode(generator, batch)
    batch["query_tokens"] = batch["query_tokens"].clone()
    batch["query_tokens"][1] = 1
    moved = (decode(generator, batch) - before).abs().amax((-1, -2)).flatten()
    assert moved[7] > 1e-3
    assert moved[np.arange(15) != 7].max() < 1e-5


@torch.inference_mode()
def test_a_batch_without_queries_decodes_like_a_model_without(generator: Generator, batch: dict[str, Tensor]) -> None:
    batch |= {
        "query_rows": torch.empty(0, dtype=torch.long),
        "query_tokens": torch.zeros(0, 1, dtype=torch.long),
        "query_mask": torch.zeros(0, 1, dtype=torch.bool),
    }
    states = generator.context.history(*list(batch.values())[1:7])
    torch.testing.assert_close(decode(generator, batch), generator.decode_targets(batch["target_codes"], states))


@torch.inference_mode()
def test_padding_changes_nothing(generator: Generator, tiny_config: GeneratorConfig, make_requests: Any) -> None:
    requests = {k: torch.from_numpy(v) for k, v in make_requests(tiny_config, 4, 3).items()}
    start = torch.zeros(4, 1, dtype=torch.long)
    before = generator(**requests, decoder_input_ids=start).logits
    padded = {}
    for name, tensor in requests.items():
        shape = (4, 2, *tensor.shape[2:])
        # Padding is any code, not only zero; the mask alone tells.
        fill = (torch.zeros if tensor.dtype == torch.bool else torch.ones)(shape, dtype=tensor.dtype)
        padded[name] = tensor if name == "profile" else torch.cat([tensor, fill], 1)
    after = generator(**padded, decoder_input_ids=start).logits
    torch.testing.assert_close(after, before, **CLOSE)


@torch.inference_mode()
def test_an_empty_history_is_answered(generator: Generator) -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    context = generator.context(
        empty[..., None].expand(2, 0, 3), empty, empty, empty.bool(), profile=torch.zeros(2, 2).long()
    )
    assert context.memory_BSD.shape == (2, 1, 16)
    assert context.start_BD.isfinite().all()


def test_dropout_acts_in_training_alone(generator: Generator, batch: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        assert torch.equal(decode(generator, batch), decode(generator, batch))
        generator.train()
        first, second = decode(generator, batch), decode(generator, batch)
        generator.eval()
    assert not torch.equal(first, second)


def test_distances_fall_into_t5_s_buckets() -> None:
    """Causal, 8 buckets, distances to 16: four exact ones, then 4 + floor(4 * log(d / 4) / log(4))."""
    distance = -torch.arange(18)
    buckets = _bucket(distance, 8, 16, bidirectional=False).tolist()
    assert buckets == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7]
    both = _bucket(torch.tensor([-3, -1, 0, 1, 3]), 8, 16, bidirectional=True).tolist()
    assert both == [2, 1, 0, 5, 6]


def test_configuration_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="d_model=10 must be a multiple of n_heads=4"):
        GeneratorConfig(d_model=10, n_heads=4)


def test_configuration_refuses_item_vectors_without_content() -> None:
    with pytest.raises(ValueError, match="n_items=3 needs content_dim"):
        GeneratorConfig(n_items=3)


@torch.inference_mode()
def test_item_vectors_by_hand(make_generator: Any) -> None:
    """A projection of the content, scaled to length 1, plus what was learnt of the item."""
    head = make_generator(d_model=2, n_heads=1, n_items=2, content_dim=2).dense
    head.projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    head.own_ID.copy_(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    head.set_content(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    expected = torch.tensor([[0.6 + 0.5, 2 * 0.8 + 0.5], [0.0, 0.0]])
    torch.testing.assert_close(head.item_vectors(), expected)
    torch.testing.assert_close(head.item_vectors(torch.tensor([1, 0])), expected.flip(0))


def test_configuration_numbers_the_flat_tokens() -> None:
    config = GeneratorConfig(codebook_sizes=(5, 6, 4))
    assert config.level_offsets == (1, 6, 12)
    assert config.vocab_size == 16


def test_every_part_starts_as_wide_as_it_is_said_to(tiny_config: GeneratorConfig) -> None:
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(**{**tiny_config.to_dict(), "d_model": 64, "d_ff": 256}))
    layer = generator.decoder.layers[0]
    assert generator.dense is not None
    # What no one has met is placed by its content alone.
    assert not generator.dense.own_ID.any()
    expected = {
        generator.context.codes.weight: 0.5,
        generator.context.start.weight: 64**-0.5,
        generator.decoder.bias.embedding.weight: 0.1,
        # PyTorch's default: uniform within 1 / sqrt(inputs).
        layer.cross.query.weight: (3 * 64) ** -0.5,
        layer.feed_forward.outer.weight: (3 * 256) ** -0.5,
        generator.head.weight: (3 * 64) ** -0.5,
        generator.dense.projection.weight: 0.5,
        generator.dense.user.weight: 0.1 * 64**-0.5,
    }
    for weight, std in expected.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.35 if weight.numel() < 100 else 0.1)
    assert layer.cross_norm.weight.tolist() == [1.0] * 64


def test_saved_and_loaded_it_is_the_same(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert isinstance(loaded.config, GeneratorConfig)
    assert loaded.config.codebook_sizes == generator.config.codebook_sizes
    assert loaded.dense is not None
    assert generator.dense is not None
    # Content is an input, not a weight.
    loaded.dense.content_IC.copy_(generator.dense.content_IC)
    for (name, tensor), (_, other) in zip(
        [*generator.named_parameters(), *generator.named_buffers()],
        [*loaded.named_parameters(), *loaded.named_buffers()],
        strict=True,
    ):
        assert torch.equal(tensor, other), name
