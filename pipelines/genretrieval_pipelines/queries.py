"""Queries: the pairs that teach search, made ones for a shop that has none, and the query tokenizer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import polars as pl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from genretrieval.histories import NO_QUERY, NO_SCENARIO, NO_TIME, Histories, LeaveOneOut

PADDING, UNKNOWN = "[PAD]", "[UNK]"


def made_queries(items: pl.DataFrame) -> pl.DataFrame:
    """Queries that a visitor might type for each item: its title, brand, categories, and pairs of them.

    For a shop whose logs hold no query. Returns the columns ``query`` and ``item_row``.
    """
    rows = items.with_row_index("item_row").with_columns(pl.col("item_row").cast(pl.Int32))
    named = [name for name in ("title", "brand") if name in items.columns]
    frames = [rows.select(pl.col(name).alias("query"), "item_row") for name in named]
    if "categories" in items.columns:
        leaf = pl.col("categories").list.last()
        frames.append(rows.select(leaf.alias("query"), "item_row"))
        if "brand" in items.columns:
            frames.append(rows.select(pl.format("{} {}", "brand", leaf).alias("query"), "item_row"))
    if not frames:
        return pl.DataFrame(schema={"query": pl.String, "item_row": pl.Int32})
    queries = pl.concat(frames).with_columns(pl.col("query").str.strip_chars())
    return queries.filter(pl.col("query").is_not_null() & (pl.col("query") != "")).unique(maintain_order=True)


def split_queries(pairs: pl.DataFrame) -> pl.DataFrame:
    """Give every pair a ``split``: the one in the data where there is one, else by a hash of the query (90 / 5 / 5)."""
    if "split" in pairs.columns and pairs["split"].is_not_null().any():
        return pairs.with_columns(pl.col("split").fill_null("train"))
    hashed = pl.Series([_stable_share(query) for query in pairs["query"]], dtype=pl.Float64)
    split = pl.when(hashed < 0.9).then(pl.lit("train")).when(hashed < 0.95).then(pl.lit("validation"))
    return pairs.with_columns(split.otherwise(pl.lit("test")).alias("split"))


def _stable_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, on every machine."""
    return zlib.crc32(text.encode()) / 2**32


def with_query_pairs(histories: Histories, pairs: pl.DataFrame) -> Histories:
    """Append each (query, item) pair as a visitor of one interaction, after all users; its event is -1, none."""
    known = {query: row for row, query in enumerate(histories.queries)}
    rows = np.asarray([known.setdefault(query, len(known)) for query in pairs["query"]], np.int32)
    n = len(pairs)
    return replace(
        histories,
        user_ids=[*histories.user_ids, *[""] * n],
        offsets=np.concatenate([histories.offsets, histories.offsets[-1] + 1 + np.arange(n, dtype=np.int64)]),
        items=np.concatenate([histories.items, pairs["item_row"].to_numpy().astype(np.int32)]),
        events=np.concatenate([histories.events, np.full(n, -1, np.int16)]),
        times=np.concatenate([histories.times, np.full(n, NO_TIME, np.int64)]),
        query_rows=np.concatenate([histories.query_rows, rows]),
        queries=list(known),
        scenario_rows=(
            None
            if histories.scenario_rows is None
            else np.concatenate([histories.scenario_rows, np.full(n, NO_SCENARIO, np.int16)])
        ),
    )


def with_made_queries(histories: Histories, made: pl.DataFrame, share: float, seed: int) -> Histories:
    """Give interactions without a query one of the queries made for their item.

    Args:
        histories: all interactions.
        made: columns ``query`` and ``item_row``, see `made_queries`.
        share: of the interactions without a query, drawn once.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    known = {query: row for row, query in enumerate(histories.queries)}
    made = made.sort("item_row", maintain_order=True)
    made_rows = np.asarray([known.setdefault(query, len(known)) for query in made["query"]], np.int32)
    items = made["item_row"].to_numpy()
    starts = np.searchsorted(items, histories.items)
    counts = np.searchsorted(items, histories.items, side="right") - starts
    given = (histories.query_rows == NO_QUERY) & (counts > 0) & (rng.random(len(counts)) < share)
    drawn = starts[given] + (rng.random(int(given.sum())) * counts[given]).astype(np.int64)
    query_rows = histories.query_rows.copy()
    query_rows[given] = made_rows[drawn]
    return replace(histories, query_rows=query_rows, queries=list(known))


def searched(histories: Histories) -> pl.DataFrame:
    """Every query of the training part of the histories with an item taken for it: columns ``query``, ``item_row``."""
    found = np.flatnonzero(LeaveOneOut(histories).trained() & (histories.query_rows != NO_QUERY))
    queries = [histories.queries[row] for row in histories.query_rows[found]]
    items = pl.Series(histories.items[found].astype(np.int32))
    return pl.DataFrame({"query": queries, "item_row": items}, schema={"query": pl.String, "item_row": pl.Int32})


def has_queries(histories: Histories) -> bool:
    """Whether any interaction was made with a query."""
    return bool((histories.query_rows != NO_QUERY).any())


def train_query_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-pair tokenizer on the shop's own words.

    Text is NFKC-normalised, lower-cased and stripped of accents; digits stand alone; scripts without spaces work
    because merges start from characters. Token 0 is padding, token 1 an unknown character.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.NFKC()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING, UNKNOWN], min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
