from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genretrieval.catalogue import CatalogueIndex, build_index
from genretrieval.model import Generator
from genretrieval.model.generator import Context
from genretrieval.training.rollouts import RolloutSearch


def encoded(generator: Generator, make_requests: Any, n: int) -> Context:
    requests = {name: torch.from_numpy(array) for name, array in make_requests(generator.config, n).items()}
    context: Context = generator.context(requests)
    return context


def exhaustive(generator: Generator, context: Context, index: CatalogueIndex) -> Tensor:
    """Log-probability of every code of every leaf, float ``[N, X, L]``, by teacher forcing and a dict of children."""
    leaves = torch.from_numpy(index.leaf_codes(np.arange(index.n_leaves))).long()
    n = len(context.memory_BSD)
    x = generator.context.embed(leaves[:, :-1]).expand(n, -1, -1, -1)
    start = (context.start_BD + generator.context.codes.weight[0])[:, None, None].expand(-1, len(leaves), -1, -1)
    seen = context.mask_BS[:, None].expand(-1, len(leaves), -1)
    states = generator.decoder(torch.cat([start, x], 2), context.memory_BSD, seen)
    logp = torch.zeros(n, *leaves.shape)
    known = leaves.tolist()
    for level in range(index.n_levels):
        logits = generator.level_logits(states[:, :, level], level)
        for i, codes in enumerate(known):
            children = sorted({other[level] for other in known if other[:level] == codes[:level]})
            logp[:, i, level] = logits[:, i, codes[level]] - logits[:, i, children].logsumexp(-1)
    return logp


@pytest.mark.parametrize("n_rollouts", [1, 7, 200], ids=["one", "some", "more than there are"])
@torch.no_grad()
def test_rollouts_are_the_best_of_an_exhaustive_search(
    make_generator: Any, make_requests: Any, make_ids: Any, n_rollouts: int
) -> None:
    # Two children under any prefix or so, so that a beam of seven loses nothing that it would need.
    ids = make_ids(30)
    index = build_index(ids, order=-np.arange(30))
    generator = make_generator(query_vocab_size=11)
    context = encoded(generator, make_requests, 5)
    logp = exhaustive(generator, context, index)
    generator.train()  # a search has no dropout whatever the mode
    rollouts = RolloutSearch(index, n_rollouts)(generator, context)
    wide = RolloutSearch(index, index.n_leaves)(generator, context)

    assert rollouts.items_NG.shape == rollouts.mask_NG.shape == (5, n_rollouts)
    assert rollouts.codes_NGL.shape == rollouts.logp_NGL.shape == (5, n_rollouts, index.n_levels)
    assert (rollouts.items_NG.dtype, rollouts.logp_NGL.dtype) == (torch.int64, torch.float32)
    assert not rollouts.logp_NGL.requires_grad
    assert (rollouts.mask_NG.sum(1) == min(n_rollouts, index.n_leaves)).all()
    leaves = {tuple(codes): leaf for leaf, codes in enumerate(index.leaf_codes(np.arange(index.n_leaves)).tolist())}
    for row in range(5):
        best = logp[row].sum(-1).argsort(descending=True).tolist()
        n = int(rollouts.mask_NG[row].sum())
        found = [leaves[tuple(codes)] for codes in rollouts.codes_NGL[row, :n].tolist()]
        assert [leaves[tuple(codes)] for codes in wide.codes_NGL[row].tolist()] == best
        if n == index.n_leaves:
            assert found == best
        torch.testing.assert_close(rollouts.logp_NGL[row, :n], logp[row, found], atol=1e-5, rtol=0)
        assert rollouts.items_NG[row, :n].tolist() == [int(index.items_of(leaf)[0]) for leaf in found]
    sums = rollouts.logp_NGL.sum(-1)[rollouts.mask_NG].view(5, -1)
    assert (sums.diff(dim=1) <= 0).all()
    assert (rollouts.items_NG[~rollouts.mask_NG] == -1).all()
    assert (rollouts.logp_NGL[~rollouts.mask_NG] == 0).all()


def test_a_search_follows_the_weights(make_generator: Any, make_requests: Any, make_ids: Any) -> None:
    index = build_index(make_ids(30))
    generator = make_generator()
    context = encoded(generator, make_requests, 2)
    search = RolloutSearch(index, 5)
    before = search(generator, context)
    with torch.no_grad():
        generator.head.weight.mul_(2.0)
    assert not torch.equal(before.logp_NGL, search(generator, context).logp_NGL)
