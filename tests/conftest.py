"""Fixtures that several packages' tests share: random catalogues and a generator small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# Hypothesis imports it in the middle of a test, which fails ("AST constructor recursion depth mismatch") where garbage
# is collected meanwhile whose end is logged: python/cpython#106905.
import hypothesis.internal.conjecture.optimiser  # noqa: F401
import numpy as np
import pytest
from numpy.typing import NDArray

from genretrieval.histories import NO_QUERY, Histories
from genretrieval.semantic_ids import SemanticIds

if TYPE_CHECKING:
    from genretrieval.model import Generator, GeneratorConfig

MakeIds = Callable[..., SemanticIds]
MakeRequests = Callable[..., dict[str, NDArray[Any]]]
MakeGenerator = Callable[..., "Generator"]

SIZES = (5, 6, 4)


@pytest.fixture(scope="session")
def make_ids() -> MakeIds:
    """Random semantic IDs: ``make_ids(n_items, seed)``; small codebooks, so that IDs collide and share prefixes."""

    def make(n_items: int, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> SemanticIds:
        codes = np.random.default_rng(seed).integers(0, sizes, (n_items, len(sizes)))
        return SemanticIds(codes.astype(np.int32), sizes)

    return make


@pytest.fixture(scope="session")
def tiny_config() -> GeneratorConfig:
    """Every part of the generator, at the smallest size that can still go wrong."""
    import torch

    from genretrieval.model import GeneratorConfig

    # Threads cost tensors of this size more than they bring.
    torch.set_num_threads(1)
    return GeneratorConfig(
        codebook_sizes=SIZES,
        d_model=16,
        n_heads=2,
        d_ff=32,
        query_vocab_size=11,
        n_events=3,
        n_gaps=4,
        n_profile_buckets=7,
        n_items=30,
        content_dim=5,
        n_scenarios=3,
        n_experts=4,
        n_past_tokens=2,
        max_past=20,
        max_history=8,
        n_position_buckets=8,
        max_distance=16,
        dropout=0.1,
    )


@pytest.fixture(scope="session")
def make_generator(tiny_config: GeneratorConfig) -> MakeGenerator:
    """A generator with random weights, ready to be asked: ``make_generator(seed, **changes of tiny_config)``."""
    import torch

    from genretrieval.model import Generator, GeneratorConfig

    def make(seed: int = 0, **changes: Any) -> Generator:
        torch.manual_seed(seed)
        generator = Generator(GeneratorConfig(**{**tiny_config.to_dict(), **changes}))
        # Random gains, so that nothing may forget them.
        for name, parameter in generator.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if generator.dense is not None:
            torch.nn.init.normal_(generator.dense.reading.own_ID)
            torch.nn.init.normal_(generator.dense.ranking.own_ID)
            generator.dense.set_content(torch.randn(generator.config.n_items, generator.config.content_dim))
        return generator.eval()

    return make


@pytest.fixture(scope="session")
def make_requests() -> MakeRequests:
    """Random requests as the model reads them: ``make_requests(config, n, length, n_query_tokens, seed, n_past)``."""

    def make(
        config: GeneratorConfig, n: int, length: int = 4, n_query_tokens: int = 3, seed: int = 0, n_past: int = 6
    ) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(seed)
        made: dict[str, NDArray[Any]] = {
            "history_codes": rng.integers(0, config.codebook_sizes, (n, length, config.n_levels)),
            "history_events": rng.integers(0, config.n_events, (n, length)),
            "history_gaps": rng.integers(0, config.n_gaps, (n, length)),
            "history_mask": np.arange(length) < rng.integers(0, length + 1, (n, 1)),
        }
        if config.query_vocab_size:
            made["query_tokens"] = rng.integers(1, config.query_vocab_size + config.n_query_codes, (n, n_query_tokens))
            made["query_mask"] = np.arange(n_query_tokens) < rng.integers(0, n_query_tokens + 1, (n, 1))
        if config.n_profile_buckets:
            made["profile"] = rng.integers(0, config.n_profile_buckets, (n, 2))
        if config.n_scenarios:
            made["scenario"] = rng.integers(0, config.n_scenarios, n)
        if config.n_past_tokens:
            made["past_codes"] = rng.integers(0, config.codebook_sizes, (n, n_past, config.n_levels))
            made["past_events"] = rng.integers(0, config.n_behaviours, (n, n_past))
            made["past_mask"] = np.arange(n_past) < rng.integers(0, n_past + 1, (n, 1))
        if config.n_past_tokens and config.n_items:
            made["past_vectors"] = rng.normal(size=(n, n_past, 2 * config.d_model)).astype(np.float32)
        if config.n_items:
            made["history_vectors"] = rng.normal(size=(n, length, 2 * config.d_model)).astype(np.float32)
        return made

    return make


@pytest.fixture(scope="session")
def make_histories() -> Callable[..., Histories]:
    """Histories in which item i + 1 follows item i, so that there is something to learn; some with a query."""

    def make(n_users: int = 60, n_items: int = 30, seed: int = 0, max_length: int = 12) -> Histories:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, max_length + 1, n_users)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = rng.integers(0, n_items, n_users)
        n = int(offsets[-1])
        items = np.concatenate(
            [(start + np.arange(length)) % n_items for start, length in zip(starts, lengths, strict=True)]
        )
        return Histories(
            user_ids=[f"u{user}" for user in range(n_users)],
            offsets=offsets,
            items=items.astype(np.int32),
            events=rng.integers(0, 2, n).astype(np.int16),
            times=np.cumsum(rng.integers(1, 10**6, n)).astype(np.int64),
            query_rows=np.where(rng.random(n) < 0.3, items % 3, NO_QUERY).astype(np.int32),
            event_names=("click", "purchase"),
            queries=["red", "red blue", "?!"],
            order_rule="made up",
        )

    return make
