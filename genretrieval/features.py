"""What of a request the model reads, as integers: one module for training and for serving, so they cannot drift."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from genretrieval.histories import NO_TIME
from genretrieval.keyword_codebook import EMPTY, KeywordCodebook

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# Upper ends of the buckets of the time since the previous interaction; bucket 0 is unknown.
GAP_SECONDS = (
    1,
    10 * _MINUTE,
    _HOUR,
    6 * _HOUR,
    _DAY + 1,
    3 * _DAY,
    7 * _DAY,
    30 * _DAY,
    90 * _DAY,
    365 * _DAY,
)
N_GAPS = len(GAP_SECONDS) + 2


@dataclass(frozen=True)
class RequestFeatures:
    """Events, time gaps, query tokens and profile features of a model; part of its bundle.

    Attributes:
        events: behaviours in training; event id 0 is every other one.
        profile_features: names of the profile features the model reads, in order.
        n_profile_buckets: rows of the hashed table; a missing value hashes like any other.
        query_tokenizer: Hugging Face tokenizer, as JSON; empty for a model without queries. Token 0 is padding.
        max_query_tokens: longer queries are cut.
        scenarios: surfaces in training; scenario id 0 is every other one, and none.
        keywords: slots of words, for a model whose semantic IDs begin with them.
    """

    events: tuple[str, ...] = ()
    profile_features: tuple[str, ...] = ()
    n_profile_buckets: int = 0
    query_tokenizer: str = ""
    max_query_tokens: int = 16
    scenarios: tuple[str, ...] = ()
    keywords: KeywordCodebook | None = None
    _tokenizer: Tokenizer | None = field(init=False, repr=False, compare=False, default=None)
    _scenario_ids: Mapping[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Load the tokenizer and number the scenarios once."""
        object.__setattr__(self, "_scenario_ids", {name: i + 1 for i, name in enumerate(self.scenarios)})
        if self.query_tokenizer:
            object.__setattr__(self, "_tokenizer", Tokenizer.from_str(self.query_tokenizer))

    @property
    def n_events(self) -> int:
        """Rows of the event table."""
        return len(self.events) + 1

    @property
    def exposure_id(self) -> int:
        """Event id of an exposure in the past; a history has none."""
        return self.n_events

    @property
    def n_scenarios(self) -> int:
        """Rows of the scenario table; 0 without scenarios."""
        return len(self.scenarios) + 1 if self.scenarios else 0

    def scenario_id(self, scenario: str | None) -> int:
        """Row of the scenario table."""
        return 0 if scenario is None else self._scenario_ids.get(scenario, 0)

    @property
    def query_vocab_size(self) -> int:
        """Rows of the query token table; 0 without queries."""
        return int(self._tokenizer.get_vocab_size()) if self._tokenizer else 0

    def event_ids(self, events: Sequence[str]) -> NDArray[np.int64]:
        """int64 ``[len(events)]``."""
        known = {name: i + 1 for i, name in enumerate(self.events)}
        return np.asarray([known.get(event, 0) for event in events], np.int64)

    @staticmethod
    def gap_buckets(times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bucket of the time since the previous interaction.

        Args:
            times: int64 ``[n]``, unix seconds in history order, `NO_TIME` where unknown.

        Returns:
            int64 ``[n]``: 0 where either time is unknown, else 1 + the number of `GAP_SECONDS` passed.
        """
        out = np.zeros(len(times), np.int64)
        if len(times) > 1:
            known = (times[1:] != NO_TIME) & (times[:-1] != NO_TIME)
            buckets = 1 + np.searchsorted(GAP_SECONDS, times[1:] - times[:-1], side="right")
            out[1:] = np.where(known, buckets, 0)
        return out

    def query_tokens(self, query: str | None, slots: Mapping[int, int] | None = None) -> NDArray[np.int64]:
        """What a model reads of a query, int64 ``[n <= n_groups + max_query_tokens]``; empty where it reads none.

        A model with keywords reads the slots of the query before its tokens, those given by `slots` first; slot c of
        group g has the number of the code, counted over all groups, behind those of the tokens.

        Args:
            query: the text.
            slots: level to the slot that stands there in place of the text's own: of a keyword that is bound.
        """
        if not query or self._tokenizer is None:
            return np.empty(0, np.int64)
        tokens = self._tokenizer.encode(query, add_special_tokens=False).ids[: self.max_query_tokens]
        if self.keywords is None:
            return np.asarray(tokens, np.int64)
        slots = slots or {}
        codes = self.query_codes(query)
        codes[list(slots)] = EMPTY
        first = self.query_vocab_size + np.concatenate([[0], np.cumsum(self.keywords.sizes)[:-1]])
        given = [first[level] + slot for level, slot in slots.items()]
        return np.concatenate([given, (first + codes)[codes != EMPTY], tokens]).astype(np.int64)

    @property
    def n_query_codes(self) -> int:
        """Numbers of `query_tokens` behind those of the tokens; 0 without queries."""
        return sum(self.keywords.sizes) if self.keywords and self._tokenizer else 0

    def query_codes(self, query: str | None) -> NDArray[np.int64]:
        """int64 ``[n_groups]``: the slots of a query, all empty without one; empty for a model without keywords."""
        if self.keywords is None:
            return np.empty(0, np.int64)
        return self.keywords.encode(query or "").astype(np.int64)

    def profile_ids(self, profile: Mapping[str, Any]) -> NDArray[np.int64]:
        """int64 ``[n_features]``: each feature's name and value, hashed together."""
        return np.asarray(
            [
                int.from_bytes(hashlib.blake2b(f"{name}={profile.get(name)}".encode(), digest_size=8).digest(), "big")
                % self.n_profile_buckets
                for name in self.profile_features
            ],
            np.int64,
        )
