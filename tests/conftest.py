"""Fixtures that several packages' tests share: random catalogues and a generator small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
    from genretrieval.model import GeneratorConfig

    return GeneratorConfig(
        codebook_sizes=SIZES,
        d_model=16,
        n_heads=2,
        d_ff=32,
        query_vocab_size=11,
        n_events=3,
        n_gaps=4,
        n_profile_buckets=7,
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
        return generator.eval()

    return make


@pytest.fixture(scope="session")
def make_requests() -> MakeRequests:
    """Random requests as the model reads them: ``make_requests(config, n, length, n_query_tokens, seed)``."""

    def make(
        config: GeneratorConfig, n: int, length: int = 4, n_query_tokens: int = 3, seed: int = 0
    ) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(seed)
        made: dict[str, NDArray[Any]] = {
            "history_codes": rng.integers(0, config.codebook_sizes, (n, length, config.n_levels)),
            "history_events": rng.integers(0, config.n_events, (n, length)),
            "history_gaps": rng.integers(0, config.n_gaps, (n, length)),
            "history_mask": np.arange(length) < rng.integers(0, length + 1, (n, 1)),
        }
        if config.query_vocab_size:
            made["query_tokens"] = rng.integers(1, config.query_vocab_size, (n, n_query_tokens))
            made["query_mask"] = np.arange(n_query_tokens) < rng.integers(0, n_query_tokens + 1, (n, 1))
        if config.n_profile_buckets:
            made["profile"] = rng.integers(0, config.n_profile_buckets, (n, 2))
        return made

    return make
