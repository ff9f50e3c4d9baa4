"""From a shop's items to published semantic IDs: embed, fit, resolve collisions, publish, report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from genretrieval.bundle import CODEBOOKS
from genretrieval.errors import DataError
from genretrieval.histories import NO_QUERY, LeaveOneOut
from genretrieval.keywords import KeywordDictionary
from genretrieval.semantic_ids import SemanticIds
from genretrieval_pipelines.embed import EmbeddingPart, embed_items, embed_new_items, embed_queries, mine_keywords
from genretrieval_pipelines.recipe import Recipe, content_hash, load_recipe
from genretrieval_pipelines.shop import Shop
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.family import Pairs, TokenizerConfig, fit_tokenizer, load_tokenizer, needs_pairs
from genretrieval_tokenizers.publish import PUBLISHED, Published, append, check_unpublished, open_published, publish
from genretrieval_tokenizers.report import TokenizerReport, report
from genretrieval_tokenizers.rq_opq import RqOpqConfig
from genretrieval_tokenizers.rq_vae import RqVaeConfig
from genretrieval_tokenizers.stream import EmbeddingShards, encode_shards
from genretrieval_tokenizers.swing import swing_pairs
from genretrieval_tokenizers.tokenizer import Tokenizer

REPORT = "report.json"
RECIPE = "recipe.yaml"
KEYWORDS = "keywords.parquet"
SIMILAR = 0.9
"""Cosine of embeddings from which two items with equal codes are a benign overlap and no conflict."""
_METHODS_VERSION = 1  # raise it when a change would give other IDs for equal input


@dataclass(frozen=True)
class Tokenized:
    """The catalogue's semantic IDs, the tokenizer that gave them, and how good they are (Markdown)."""

    ids: SemanticIds
    codebooks: Path
    report: str


def tokenize(recipe: Recipe, shop: Shop, work: Path) -> Tokenized:
    """Embed the items and give each a semantic ID; published IDs are read back, never computed again."""
    parts = usable_parts(recipe.embedding, shop)
    embeddings = embed_shop(parts, shop, work)
    config = usable_tokenizer(recipe.tokenizer, shop)
    folder = work / tokenizer_folder(config, recipe.collisions, embeddings, shop)
    if not (folder / REPORT).exists():
        publish_shop(folder, config, recipe.collisions, parts, shop, work)
    notes = [f"the embedding {part.name} was left out" for part in recipe.embedding if part not in parts]
    notes += ["the contrast of the tokenizer was left out"] if config != recipe.tokenizer else []
    text = read_report(folder).to_markdown() + "".join(f"\nNo interactions, so {note}.\n" for note in notes)
    return Tokenized(open_published(folder).ids, folder / CODEBOOKS, text)


def embed_shop(parts: list[EmbeddingPart], shop: Shop, work: Path) -> NDArray[np.float32]:
    """Vectors of the shop's items, float32 ``[n_items, dim]``; each part is cached in `work`."""
    histories = shop.histories if shop.histories.n_users else None
    return embed_items(shop.items, parts, histories, work / "embeddings", shop_keywords(parts, shop))


def shop_keywords(parts: list[EmbeddingPart], shop: Shop) -> KeywordDictionary | None:
    """The dictionary for parts with `keywords`: the shop's ``keywords.parquet``, or else mined from its items."""
    if not any(part.keywords for part in parts):
        return None
    given = shop.data / KEYWORDS
    return KeywordDictionary.load(given) if given.exists() else mine_keywords(shop.items)


def training_queries(shop: Shop) -> list[str]:
    """Distinct queries of the training part of all histories and of training pairs, sorted."""
    h = shop.histories
    users = np.repeat(np.arange(h.n_users), h.lengths())
    trained = np.arange(len(h.items)) < LeaveOneOut(h).train_ends()[users] if len(users) else np.empty(0, bool)
    rows = np.unique(h.query_rows[trained])
    pairs = shop.pairs.filter(pl.col("split") == "train")["query"].to_list()
    return sorted({*(h.queries[row] for row in rows if row != NO_QUERY), *pairs})


def embed_shop_queries(queries: list[str], parts: list[EmbeddingPart], shop: Shop, work: Path) -> NDArray[np.float32]:
    """Vectors of queries in the space of `embed_shop`, float32 ``[len(queries), dim]``."""
    histories = shop.histories if shop.histories.n_users else None
    keywords = shop_keywords(parts, shop)
    return embed_queries(queries, shop.items, parts, histories, work / "embeddings", keywords)


def fit_shop(
    config: TokenizerConfig, parts: list[EmbeddingPart], shop: Shop, embeddings: NDArray[np.float32], work: Path
) -> Tokenizer:
    """Fit a tokenizer to a shop's items.

    RQ-OPQ is fitted to items and training queries together, as OneSearch does, where every part of the embedding reads
    text, so that both are of one kind.
    """
    if isinstance(config, RqOpqConfig) and all(part.reads_text for part in parts) and (asked := training_queries(shop)):
        embeddings = np.concatenate([embeddings, embed_shop_queries(asked, parts, shop, work)])
    return fit_tokenizer(embeddings, config, pairs_for(config, shop, work))


def usable_parts(parts: list[EmbeddingPart], shop: Shop) -> list[EmbeddingPart]:
    """The recipe's embeddings that these data allow: without interactions there is nothing collaborative."""
    if shop.histories.n_users:
        return parts
    return [part for part in parts if part.name != "collaborative"] or [EmbeddingPart(name="hashing")]


def usable_tokenizer(config: TokenizerConfig, shop: Shop) -> TokenizerConfig:
    """The recipe's tokenizer as these data allow it: without interactions no two items belong together."""
    if isinstance(config, RqVaeConfig) and config.contrast is not None and not shop.histories.n_users:
        return replace(config, contrast=None)
    return config


def tokenizer_folder(
    config: TokenizerConfig, collisions: CollisionConfig, embeddings: NDArray[np.float32], shop: Shop
) -> str:
    """Name of the folder that holds this tokenization; another input never shares it."""
    reads: list[object] = [shop.histories.items.tobytes()] if needs_pairs(config) else []
    reads += training_queries(shop) if isinstance(config, RqOpqConfig) else []
    key = content_hash(_METHODS_VERSION, config, collisions, embeddings.shape, embeddings.tobytes(), *reads)
    return f"tokenizer-{key}"


def pairs_for(config: TokenizerConfig, shop: Shop, work: Path) -> Pairs | None:
    """Swing pairs of the training part of all histories, int32 ``[P, 2]``, where `config` needs them; cached."""
    if not needs_pairs(config):
        return None
    histories = shop.histories
    key = content_hash(_METHODS_VERSION, histories.items.tobytes(), histories.offsets.tobytes(), len(shop.items))
    cached = work / f"swing-{key}.npy"
    if not cached.exists():
        pairs = swing_pairs(LeaveOneOut(histories).train_sequences(), len(shop.items)).pairs
        partial = cached.with_suffix(".partial.npy")
        np.save(partial, pairs)
        partial.replace(cached)
    read: Pairs = np.load(cached, allow_pickle=False)
    return read


def publish_shop(
    folder: Path,
    config: TokenizerConfig,
    collisions: CollisionConfig,
    parts: list[EmbeddingPart],
    shop: Shop,
    work: Path,
) -> Published:
    """Fit a tokenizer, publish its IDs in `folder` and write the report, which appears last.

    Raises:
        DataError: as `fit_tokenizer` and `publish`.
    """
    # IDs without a report are of a run that was cut off: nothing has been made from them.
    (folder / PUBLISHED).unlink(missing_ok=True)
    embeddings = embed_shop(parts, shop, work)
    started = time.perf_counter()
    tokenizer = fit_shop(config, parts, shop, embeddings, work)
    seconds = time.perf_counter() - started
    published = publish(folder, tokenizer, collisions, shop.items["item_id"].to_list(), embeddings)
    measured = report(
        published.ids,
        embeddings,
        tokenizer.decode(published.ids.codes[:, : len(tokenizer.codebook_sizes)]),
        dedup_level=collisions.method == "dedup",
        encoded=tokenizer.encode(embeddings),
        similarity_threshold=SIMILAR,
        notes=(*tokenizer.notes, *published.notes),
        fit_seconds=seconds,
    )
    partial = folder / (REPORT + ".partial")
    partial.write_text(measured.to_json(), "utf-8")
    partial.replace(folder / REPORT)
    return published


def read_report(folder: Path) -> TokenizerReport:
    """The report that `publish_shop` wrote."""
    return TokenizerReport.from_json((folder / REPORT).read_text("utf-8"))


def fit_and_publish(recipe: Recipe, shop: Shop, folder: Path, work: Path) -> str:
    """Fit the recipe's tokenizer to a shop and publish in `folder`, with all that appending needs later.

    Returns:
        The report, as Markdown.

    Raises:
        DataError: the folder holds published IDs, or as `publish_shop`.
    """
    check_unpublished(folder)
    parts, config = usable_parts(recipe.embedding, shop), usable_tokenizer(recipe.tokenizer, shop)
    used = recipe.model_copy(update={"embedding": parts, "tokenizer": config})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(used.dump(), sort_keys=False), "utf-8")
    publish_shop(folder, config, recipe.collisions, parts, shop, work)
    text = read_report(folder).to_markdown()
    (folder / "report.md").write_text(text, "utf-8")
    return text


def append_items(folder: Path, shop: Shop, work: Path) -> list[str]:
    """Give the items of `shop` that `folder` does not know yet an ID; no published ID moves.

    A new item's vector must lie in the space that the tokenizer was fitted in, so its text is embedded by what was
    fitted on the published items, and its collaborative part is zero: nobody had met it then.

    Returns:
        What there is to say about it, line by line.

    Raises:
        DataError: as `genretrieval_tokenizers.publish.append`; or the shop no longer has the published items, whose
            texts the embedding was fitted on.
    """
    published, recipe = open_published(folder), load_recipe(folder / RECIPE)
    known = published.item_ids.to_pylist()
    is_known = shop.items["item_id"].is_in(known)
    old, new = shop.items.filter(is_known), shop.items.filter(~is_known)
    if len(old) < len(known):
        raise DataError(
            f"{len(known) - len(old):,} of {len(known):,} published items are not in the item table; give the whole "
            "table, old items and new ones, because the new ones are embedded by what was fitted on the old"
        )
    if not len(new):
        return [f"no item is new; {len(known):,} IDs stay as they are"]
    tokenizer = load_tokenizer(folder / CODEBOOKS)
    keywords = shop_keywords(recipe.embedding, replace(shop, items=old))
    vectors = embed_new_items(new, old, recipe.embedding, tokenizer.dim, work / "embeddings", keywords)
    after = append(folder, tokenizer, new["item_id"].to_list(), vectors)
    return [f"{len(new):,} items appended to {len(known):,}; no published ID moved", *after.notes]


def query_ids(folder: Path, shop: Shop, queries: list[str], work: Path) -> list[tuple[list[int], list[str]]]:
    """Codes of queries by the tokenizer of the items, and the items that share most of them from the front.

    Returns:
        For each query its codes and up to ten item ids.

    Raises:
        RecipeError: no part of the embedding reads text, so a query has no vector.
        DataError: the shop is not the one that was published.
    """
    published, recipe = open_published(folder), load_recipe(folder / RECIPE)
    vectors = embed_shop_queries(queries, recipe.embedding, shop, work)
    codes_QL = load_tokenizer(folder / CODEBOOKS).encode(vectors)
    described = published.ids.codes[:, : codes_QL.shape[1]]
    found = []
    for codes_L in codes_QL:
        shared_N = np.cumprod(described == codes_L, axis=1).sum(axis=1)
        nearest = np.argsort(-shared_N, kind="stable")[:10]
        found.append((codes_L.tolist(), [published.item_ids[int(row)].as_py() for row in nearest if shared_N[row]]))
    return found


def encode_stream(
    source: Path,
    output: Path,
    recipe: Recipe,
    codebooks: Path | None,
    column: str,
    id_column: str,
    sample: int,
    seed: int,
    console: Console,
) -> Published:
    """Shards of ready embeddings to published IDs; see `genretrieval_tokenizers.stream`.

    Raises:
        DataError: as `EmbeddingShards` and `encode_shards`, or the tokenizer needs pairs and none is given.
    """
    shards = EmbeddingShards(source, column, id_column)
    if codebooks is None and needs_pairs(recipe.tokenizer):
        raise DataError(
            "the recipe's tokenizer is fitted with pairs of items that users meet together, and shards hold none; fit "
            "it with `genretrieval tokenize fit` and give its codebooks with --tokenizer, or set contrast: null"
        )
    output.mkdir(parents=True, exist_ok=True)
    fitted = codebooks or output / "fitted.safetensors"
    if not fitted.exists():
        fit_tokenizer(shards.sample(sample, seed), recipe.tokenizer).save(fitted)
    tokenizer = load_tokenizer(fitted)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=shards.n_items)
        published = encode_shards(
            shards, tokenizer, recipe.collisions, output, progress=lambda n: bar.update(task, completed=n)
        )
    if codebooks is None:
        fitted.unlink()  # published as codebooks.safetensors
    console.print(f"{published.ids.n_items:,} items published in {output}", highlight=False)
    return published
