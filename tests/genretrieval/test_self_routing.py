from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genretrieval.catalogue import build_index, reserved_paths
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.rollouts import RolloutSearch
from genretrieval.training.self_routing import SelfRouting

# Two keyword levels of four codes, the last one reserved, and a level that tells collisions apart.
SIZES, RESERVED, VOCAB = (4, 4, 2), (1, 1, 0), 20
IDS = SemanticIds(np.asarray([[1, 1, 0], [1, 2, 0], [2, 1, 0], [2, 1, 1]], np.int32), SIZES)
PATHS = reserved_paths(SIZES, RESERVED)
INDEX = build_index(IDS, reserved=PATHS)
N = IDS.n_items


def test_a_reserved_slot_has_a_leaf_of_its_own_without_items() -> None:
    assert PATHS.tolist() == [[3, 0, 0], [0, 3, 0]]
    assert INDEX.leaf_codes(INDEX.keyword_leaves).tolist() == PATHS.tolist()
    assert INDEX.n_leaves == N + 2
    assert INDEX.n_items == N
    assert [len(INDEX.items_of(int(leaf))) for leaf in INDEX.keyword_leaves] == [0, 0]
    assert not INDEX.allowed_leaves(np.ones(N, bool))[INDEX.keyword_leaves].any()


def batch(rows: int = 64) -> dict[str, torch.Tensor]:
    """Every row one history of two targets, the second asked for with slots 1 and 2 and two words."""
    items = torch.arange(rows)[:, None].expand(-1, 2) % N
    codes = torch.from_numpy(IDS.codes).long()[items]
    return {
        "target_items": items.contiguous(),
        "target_codes": codes.contiguous(),
        "learn": torch.ones(rows, 2, dtype=torch.bool),
        "history_codes": codes[:, :1],
        "history_events": torch.zeros(rows, 1, dtype=torch.long),
        "history_gaps": torch.zeros(rows, 1, dtype=torch.long),
        "history_mask": torch.ones(rows, 1, dtype=torch.bool),
        "profile": torch.zeros(rows, 0, dtype=torch.long),
        "query_rows": torch.arange(rows) * 2 + 1,
        "query_tokens": torch.tensor([VOCAB + 1, VOCAB + 4 + 2, 5, 6]).repeat(rows, 1),
        "query_mask": torch.ones(rows, 4, dtype=torch.bool),
        "target_scenarios": torch.zeros(rows, 2, dtype=torch.long),
    }


def routing(share: float) -> SelfRouting:
    return SelfRouting(INDEX, RESERVED, VOCAB, share)


def test_a_chosen_query_asks_for_a_slot_and_its_target_is_the_leaf_of_that_slot() -> None:
    torch.manual_seed(0)
    before, after = batch(), routing(0.999999)(batch())
    items = after["target_items"][:, 1]
    assert set(items.tolist()) == {N, N + 1}
    assert after["target_codes"][:, 1].tolist() == PATHS[items - N].tolist()
    # The slot stands in front: level 0's reserved code, or level 1's.
    assert after["query_tokens"][:, 0].tolist() == [VOCAB + 3 if i == N else VOCAB + 4 + 3 for i in items.tolist()]
    assert after["query_mask"][:, 0].all()
    # The other targets, and what histories are read by, are as they were.
    assert after["target_items"][:, 0].tolist() == before["target_items"][:, 0].tolist()
    assert after["history_codes"] is not None
    assert torch.equal(after["history_codes"], before["history_codes"])


def test_words_are_kept_or_dropped_and_the_slot_whose_place_is_taken_always_goes() -> None:
    torch.manual_seed(0)
    after = routing(0.999999)(batch())
    taken = torch.where(after["target_items"][:, 1] == N, 0, 1)
    own = after["query_mask"][:, 1:5]
    assert not own[torch.arange(64), taken].any()
    kept = own[torch.arange(64), 1 - taken]
    assert 0 < int(kept.sum()) < 64
    assert torch.equal(own[:, 2], kept)
    words = after["query_tokens"][:, 5:]
    assert words.min() >= 1
    assert words.max() < VOCAB
    assert after["query_mask"][:, 5].all()


def test_what_is_not_chosen_reads_as_before() -> None:
    torch.manual_seed(0)
    after = routing(0.5)(batch())
    plain = after["target_items"][:, 1] < N
    assert 10 < int(plain.sum()) < 54
    mask = after["query_mask"][plain]
    assert mask.tolist() == [[False, *[True] * 4, *[False] * 4]] * int(plain.sum())
    torch.manual_seed(0)
    untouched = batch()
    assert routing(1e-9)(untouched) is untouched


def config(**changes: object) -> GeneratorConfig:
    return GeneratorConfig(
        codebook_sizes=SIZES, d_model=16, n_heads=2, d_ff=32, query_vocab_size=VOCAB, n_query_codes=8, dropout=0.0,
        **changes,
    )  # fmt: skip


def test_a_slot_in_a_query_has_the_embedding_of_its_code() -> None:
    torch.manual_seed(0)
    model = Generator(config()).eval()
    mask = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        before = model.context.query(torch.tensor([[VOCAB + 4 + 3]]), mask)
        # Level 1, code 3: flat token 1 + 4 + 3.
        model.context.codes.weight[8] += 1.0
        assert not torch.allclose(before, model.context.query(torch.tensor([[VOCAB + 4 + 3]]), mask))
        other = model.context.query(torch.tensor([[VOCAB + 4 + 2]]), mask)
        model.context.codes.weight[8] += 1.0
        assert torch.equal(other, model.context.query(torch.tensor([[VOCAB + 4 + 2]]), mask))


def test_the_loss_of_a_keyword_leaf_by_hand() -> None:
    """Uniform logits: under the root 0, 1, 2, 3; below a reserved path nothing else exists."""
    model = Generator(config())
    torch.nn.init.zeros_(model.head.weight)
    objective = NextItemObjective(INDEX)
    states = torch.zeros(2, 3, 16)
    items = torch.tensor([N, N + 1])
    loss = objective.loss(model, states, items, torch.from_numpy(PATHS).long()).detach()
    # Level 0: four codes exist (the 0 leads to slot (0, 3)); below, one code each.
    assert float(loss) == pytest.approx(math.log(4) / 3)


@pytest.mark.parametrize("dense", [False, True])
def test_it_learns_to_write_the_slot_that_it_reads(dense: bool) -> None:
    torch.manual_seed(0)
    model = Generator(config(n_items=N, content_dim=3) if dense else config())
    if model.dense is not None:
        model.dense.set_content(torch.eye(N)[:, :3])
    objective = NextItemObjective(INDEX, routing=routing(0.5))
    optimiser = torch.optim.AdamW(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(objective=objective, batch=batch(16))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert math.isfinite(losses[-1])
    asked = routing(0.999999)(batch(16))
    with torch.no_grad():
        states = objective.decode(model.eval(), objective.with_vectors(model, batch(16)) | asked).states_BTLD[:, 1]
        codes = asked["target_codes"][:, 1]
        logits = objective.existing_logits(model, states, asked["target_items"][:, 1])
        right = torch.stack([z.argmax(-1) == codes[:, level] for level, z in enumerate(logits)])
    assert right.float().mean() > 0.95


def test_a_batch_of_nothing_but_slots_has_a_finite_loss_and_finite_gradients() -> None:
    torch.manual_seed(0)
    model = Generator(config(n_items=N, content_dim=3))
    assert model.dense is not None
    model.dense.set_content(torch.eye(N)[:, :3])
    only_asked = batch(4)
    only_asked["learn"][:, 0] = False
    loss = model(objective=NextItemObjective(INDEX, routing=routing(0.999999)), batch=only_asked)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_rollouts_write_items_and_no_reserved_slot() -> None:
    torch.manual_seed(0)
    model = Generator(config()).eval()
    request = {name: tensor[:, :1] if name.startswith("history") else tensor for name, tensor in batch(3).items()}
    context = model.context(request | {"query_tokens": request["query_tokens"], "query_mask": request["query_mask"]})
    found = RolloutSearch(INDEX, 6)(model, context)
    assert found.mask_NG.sum(1).tolist() == [N] * 3
    assert set(found.items_NG[found.mask_NG].tolist()) == set(range(N))


def test_a_query_without_words_is_finite_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = Generator(config()).eval()
    tokens, mask = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model.context.query(tokens, mask)).all()
