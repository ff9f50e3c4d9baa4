"""The generator sees the past alone, and the same in training as when it is asked."""

from __future__ import annotations

import math
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
    past = {name: made[name] for name in made if name.startswith("past_")}
    return {
        **past,
        "target_scenarios": torch.arange(N_ROWS * N_TARGETS).reshape(N_ROWS, -1) % 3,
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
    return generator.decode_targets(batch).states_BTLD


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
            history["query_tokens"] = torch.tensor([query or (0,)])
            history["query_mask"] = torch.full(history["query_tokens"].shape, query is not None)
            history |= {name: batch[name][row : row + 1] for name in batch if name.startswith("past_")}
            history["scenario"] = batch["target_scenarios"][row : row + 1, target]
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
def test_a_query_without_tokens_is_no_query(generator: Generator, batch: dict[str, Tensor]) -> None:
    none = {
        "query_rows": torch.empty(0).long(),
        "query_tokens": torch.zeros(0, 1).long(),
        "query_mask": torch.zeros(0, 1),
    }
    empty = {**batch, "query_mask": torch.zeros_like(batch["query_mask"])}
    torch.testing.assert_close(decode(generator, batch | none), decode(generator, empty), **CLOSE)


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
        padded[name] = tensor if name in ("profile", "scenario") else torch.cat([tensor, fill], 1)
    after = generator(**padded, decoder_input_ids=start).logits
    torch.testing.assert_close(after, before, **CLOSE)


@torch.inference_mode()
def test_an_empty_history_is_answered(generator: Generator) -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    history = {"codes": empty[..., None].expand(2, 0, 3), "events": empty, "gaps": empty, "mask": empty.bool()}
    past = {"codes": empty[..., None].expand(2, 0, 3), "events": empty, "mask": empty.bool()}
    context = generator.context(
        {
            **{f"history_{name}": tensor for name, tensor in history.items()},
            **{f"past_{name}": tensor for name, tensor in past.items()},
            "profile": torch.zeros(2, 2).long(),
            "query_tokens": empty,
            "query_mask": empty.bool(),
            "scenario": torch.zeros(2).long(),
        }
    )
    # The beginning, and two tokens for each of four behaviours, none of which says anything.
    assert context.memory_BSD.shape == (2, 9, 16)
    assert context.mask_BS.tolist() == [[True] + [False] * 8] * 2
    assert context.start_BD.isfinite().all()


@torch.inference_mode()
def test_the_past_and_the_scenario_reach_every_target(generator: Generator, batch: dict[str, Tensor]) -> None:
    before = decode(generator, batch)
    batch["past_mask"] = torch.ones_like(batch["past_mask"])
    changed = {**batch, "past_codes": (batch["past_codes"] + 1) % 4}
    moved = (decode(generator, changed) - decode(generator, batch)).abs().amax((-1, -2))
    assert (moved > 1e-3).all()
    scenarios = batch["target_scenarios"].clone()
    scenarios[1, 2] = (scenarios[1, 2] + 1) % 3
    moved = (
        (decode(generator, {**batch, "target_scenarios": scenarios}) - decode(generator, batch)).abs().amax((-1, -2))
    )
    assert moved[1, 2] > 1e-3
    moved[1, 2] = 0.0
    assert not moved.any()
    assert before.isfinite().all()


@torch.inference_mode()
def test_a_behaviour_s_tokens_read_its_own_events_alone(generator: Generator) -> None:
    """Behaviours 0 to 2 are events of a history, 3 is exposure; two tokens each."""
    former = generator.context.query_former
    assert former is not None
    torch.manual_seed(0)
    x, events = torch.randn(1, 5, 16), torch.tensor([[1, 3, 1, 2, 1]])
    mask = torch.tensor([[True, True, True, True, False]])
    tokens, meant = former(x, events, mask)
    assert meant.tolist() == [[False, False, True, True, True, True, True, True]]
    for changed, touched in ((0, [2, 3]), (1, [6, 7]), (3, [4, 5]), (4, [])):
        other = x.clone()
        other[0, changed] += 1.0
        moved = (former(other, events, mask)[0] - tokens).abs().amax(-1)[0]
        assert [i for i in range(2, 8) if moved[i] > 1e-4] == touched


@torch.inference_mode()
def test_ages_count_back_from_the_newest_event(generator: Generator) -> None:
    """Twice the binary logarithm of how far back an event lies, rounded down."""
    former = generator.context.query_former
    assert former is not None
    assert former.age_of_N[1:10].tolist() == [0, 2, 3, 4, 4, 5, 5, 6, 6]
    # Alike but for padding: the same tokens.
    x, events = torch.randn(1, 3, 16), torch.tensor([[1, 1, 1]])
    short, _ = former(x, events, torch.ones(1, 3, dtype=torch.bool))
    padded = torch.cat([x, torch.ones(1, 4, 16)], 1)
    long, _ = former(padded, torch.ones(1, 7).long(), torch.arange(7)[None] < 3)
    torch.testing.assert_close(long[:, 2:4], short[:, 2:4], **CLOSE)


@pytest.mark.parametrize("per_token", [0, 3])
def test_configuration_refuses_experts_that_do_not_share_a_layer(per_token: int) -> None:
    with pytest.raises(ValueError, match="d_ff=512 must be a multiple of experts_per_token"):
        GeneratorConfig(n_experts=8, experts_per_token=per_token)


def test_configuration_refuses_half_a_past() -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        GeneratorConfig(n_past_tokens=4)


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
    for nothing in ({"n_heads": 0}, {"d_model": 0}, {"max_history": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            GeneratorConfig(**nothing)


def test_configuration_refuses_item_vectors_without_content() -> None:
    with pytest.raises(ValueError, match="n_items=3 needs content_dim"):
        GeneratorConfig(n_items=3)


@torch.inference_mode()
def test_item_vectors_by_hand(make_generator: Any) -> None:
    """A projection of the content, scaled to length 1, plus what was learnt of the item; then its factor."""
    head = make_generator(d_model=2, n_heads=1, n_items=2, content_dim=2).dense
    head.ranking.projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    head.ranking.own_ID.copy_(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    head.taking_ID.copy_(torch.tensor([[7.0, 8.0], [0.0, 0.0]]))
    head.set_content(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    expected = torch.tensor([[0.6 + 0.5, 2 * 0.8 + 0.5, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(head.rank(), expected)
    torch.testing.assert_close(head.rank(torch.tensor([1, 0])), expected.flip(0))


@torch.inference_mode()
def test_user_vectors_by_hand(make_generator: Any) -> None:
    """What decoder and encoder say, then what the last item left, as far as the decoder lets it through."""
    head = make_generator(d_model=2, n_heads=1, n_items=2, content_dim=2).dense
    head.user.weight.copy_(torch.eye(2))
    head.history.weight.copy_(10 * torch.eye(2))
    head.gate.weight.copy_(torch.tensor([[0.0, math.log(3.0)]]))
    states, items = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[9.0, 9.0, 5.0, 6.0]]])
    seen = head.seen(states, items)
    # Nothing has been left before the first item.
    assert seen.tolist() == [[[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0]]]
    user = head.user_vectors(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), seen[0])
    # 2 sigmoid(0) is 1, 2 sigmoid(log 3) is 1.5.
    torch.testing.assert_close(user, torch.tensor([[11.0, 20.0, 0.0, 0.0], [30.0, 41.0, 7.5, 9.0]]))


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
    assert not generator.dense.reading.own_ID.any()
    assert not generator.dense.ranking.own_ID.any()
    expected = {
        generator.context.codes.weight: 0.5,
        generator.context.start.weight: 64**-0.5,
        generator.decoder.bias.embedding.weight: 0.1,
        # PyTorch's default: uniform within 1 / sqrt(inputs).
        layer.cross.query.weight: (3 * 64) ** -0.5,
        layer.feed_forward.outer: (3 * 128) ** -0.5,
        generator.head.weight: (3 * 64) ** -0.5,
        generator.dense.ranking.projection.weight: 0.5,
        generator.dense.user.weight: (3 * 64) ** -0.5,
    }
    for weight, std in expected.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.5 if weight.numel() < 100 else 0.1)
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
