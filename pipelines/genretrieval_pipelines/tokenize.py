"""From a shop's items to published semantic IDs: embed, fit, resolve collisions, publish, report."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from genretrieval.bundle import CODEBOOKS
from genretrieval.catalogue_changes import ChangesFile
from genretrieval.errors import DataError
from genretrieval.histories import NO_QUERY, LeaveOneOut
from genretrieval.item_texts import item_fields
from genretrieval.keyword_codebook import EMPTY, KeywordCodebook
from genretrieval.keywords import KeywordDictionary
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval.servable import Servable
from genretrieval_pipelines.embed import EmbeddingPart, FittedEmbedding
from genretrieval_pipelines.embed.fitted import EMBEDDING
from genretrieval_pipelines.embed.keywords import mined_columns
from genretrieval_pipelines.embed.parts import catalogue_keywords
from genretrieval_pipelines.recipe import Recipe, content_hash
from genretrieval_pipelines.shop import Shop
from genretrieval_tokenizers.collisions import CollisionConfig, Costs
from genretrieval_tokenizers.family import (
    Pairs,
    TokenizerConfig,
    fit_tokenizer,
    load_codebooks,
    load_tokenizer,
    needs_pairs,
)
from genretrieval_tokenizers.keyword_aligned import Fields, KeywordAligned, KeywordAlignedConfig
from genretrieval_tokenizers.publish import (
    PUBLISHED,
    Published,
    append_encoded,
    check_unpublished,
    open_published,
    publish_codes,
)
from genretrieval_tokenizers.report import TokenizerReport, report
from genretrieval_tokenizers.rq_opq import RqOpqConfig
from genretrieval_tokenizers.rq_vae import RqVaeConfig
from genretrieval_tokenizers.stream import EmbeddingShards, check_streamable, encode_shards
from genretrieval_tokenizers.swing import swing_pairs
from genretrieval_tokenizers.tokenizer import Tokenizer

REPORT = "report.json"
RECIPE = "recipe.yaml"
KEYWORDS = "keywords.parquet"
SAMPLE = 262_144
"""Items that `encode_stream` fits a tokenizer on."""
SIMILAR = 0.9
"""Cosine of embeddings from which two items with equal codes are a benign overlap and no conflict."""
_METHODS_VERSION = 1  # raise it when a change would give other IDs for equal input
_OF_CODES = "figures that compare items with their embeddings are left out"
_AFTER_REASSIGNING = "collisions are counted after last codes were reassigned"


@dataclass(frozen=True)
class Tokenized:
    """The catalogue's semantic IDs, and what gave them.

    Attributes:
        ids: of the items, in row order.
        codebooks: file of the tokenizer.
        report: how good they are, as Markdown.
        keywords: slots of words, where the IDs begin with them.
    """

    ids: SemanticIds
    codebooks: Path
    report: str
    keywords: KeywordCodebook | None = None

    @classmethod
    def read(cls, folder: Path) -> Tokenized:
        """What `publish_shop` published."""
        tokenizer = load_codebooks(folder / CODEBOOKS)
        keywords = tokenizer.keywords if isinstance(tokenizer, KeywordAligned) else None
        return cls(open_published(folder).ids, folder / CODEBOOKS, read_report(folder).to_markdown(), keywords)


def tokenize(recipe: Recipe, shop: Shop, work: Path) -> Tokenized:
    """Embed the items and give each a semantic ID; published IDs are read back, never computed again."""
    inputs = _Inputs.of(recipe.tokenizer, recipe.embedding, shop, work)
    x_ND = inputs.embedding.vectors
    folder = work / tokenizer_folder(recipe.tokenizer, recipe.collisions, x_ND, shop, recipe.embedding)
    if not (folder / REPORT).exists():
        _publish(folder, inputs, recipe.collisions, shop)
    return Tokenized.read(folder)


def embed_shop(parts: Sequence[EmbeddingPart], shop: Shop, work: Path) -> NDArray[np.float32]:
    """Vectors of the shop's items, float32 ``[n_items, dim]``; each part is cached in `work`."""
    return fit_embedding(parts, shop, work)[0].vectors


def fit_embedding(parts: Sequence[EmbeddingPart], shop: Shop, work: Path) -> tuple[FittedEmbedding, tuple[str, ...]]:
    """Embed a shop's items by the parts that its data allow.

    A part without dimensions is left out: ``collaborative`` where no user met two different items, hashing where no
    item has words. Where none is left, hashing alone is tried.

    Returns:
        The embedding, and what was left out.

    Raises:
        DataError: nothing tells the items apart; or as `FittedEmbedding.fit`.
    """
    keywords = given_keywords(parts, shop)
    fitted = FittedEmbedding.fit(shop.items, parts, shop.histories, work / "embeddings", keywords)
    kept = [part for part, block in zip(parts, fitted.blocks, strict=True) if block.shape[1]]
    if len(kept) == len(parts):
        return fitted, ()
    why = {"collaborative": "no user met two different items in the training part of the history"}
    left_out = [part.name for part in parts if part not in kept]
    notes = [f"the embedding {name} was left out: {why.get(name, 'no item has words')}" for name in left_out]
    if not kept:
        kept = [EmbeddingPart(name="hashing")]
        notes.append("nothing of the recipe's embedding is left, so items are embedded by hashing their words")
    fitted = FittedEmbedding.fit(shop.items, kept, shop.histories, work / "embeddings", keywords)
    if not fitted.dim:
        raise DataError(
            f"no item has words, and nothing else in the recipe's embedding ({', '.join(part.name for part in parts)}) "
            "tells the items apart. Fill title, brand, categories or description in items.parquet; or add "
            "interactions.parquet and the embedding `collaborative`; or add a column of vectors and the embedding "
            "`column:NAME`"
        )
    return fitted, tuple(notes)


def given_keywords(parts: Sequence[EmbeddingPart], shop: Shop) -> KeywordDictionary | None:
    """The shop's ``keywords.parquet``, where a part reads keywords and there is one; else they are mined."""
    return _given(shop) if any(part.keywords for part in parts) else None


def _given(shop: Shop) -> KeywordDictionary | None:
    given = shop.data / KEYWORDS
    return KeywordDictionary.load(given) if given.exists() else None


def training_queries(shop: Shop) -> list[str]:
    """Distinct queries of the training part of all histories and of training pairs, sorted."""
    h = shop.histories
    rows = np.unique(h.query_rows[LeaveOneOut(h).trained()])
    pairs = shop.pairs.filter(pl.col("split") == "train")["query"].to_list()
    return sorted({*(h.queries[row] for row in rows if row != NO_QUERY), *pairs})


def tokenizer_folder(
    config: TokenizerConfig,
    collisions: CollisionConfig,
    embeddings: NDArray[np.float32],
    shop: Shop,
    parts: Sequence[EmbeddingPart],
) -> str:
    """Name of the folder that holds this tokenization; another input never shares it.

    Args:
        config: what the recipe asks for.
        collisions: what the recipe asks for.
        embeddings: what is quantised.
        shop: where pairs and queries come from.
        parts: what the recipe asks for; the embedding may lack some of it, and the report then says so.
    """
    histories = shop.histories
    reads: list[object] = []
    if needs_pairs(config):
        reads += [histories.items.tobytes(), histories.offsets.tobytes()]
    if isinstance(config, RqOpqConfig | KeywordAlignedConfig):
        given = shop.data / KEYWORDS
        mined_from = shop.items.select(mined_columns(shop.items)).write_ndjson()
        reads.append(given.read_bytes() if given.exists() else mined_from)
    if isinstance(config, RqOpqConfig):
        reads += training_queries(shop)
    if isinstance(config, KeywordAlignedConfig):
        reads.append(item_fields(shop.items))
    key = content_hash(
        _METHODS_VERSION,
        config,
        collisions,
        list(parts),
        embeddings.shape,
        np.ascontiguousarray(embeddings).data,
        *reads,
    )
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
    parts: Sequence[EmbeddingPart],
    shop: Shop,
    work: Path,
) -> Published:
    """Fit a tokenizer, publish its IDs in `folder` and write the report, which appears last.

    What the data do not allow is left out, and the report notes it. IDs without a report are of a run that was cut
    off: they stay, and get their report.

    Raises:
        DataError: as `fit_tokenizer` and `publish`; or the folder holds IDs of something else.
    """
    return _publish(folder, _Inputs.of(config, parts, shop, work), collisions, shop)


@dataclass(frozen=True)
class _Inputs:
    """What a tokenizer is fitted with.

    Attributes:
        config: settings, without what the data do not allow.
        embedding: of the items.
        queries: training queries that RQ-OPQ is fitted to beside the items, as OneSearch does, where every part of the
            embedding reads text, so that both are of one kind.
        pairs: int32 ``[P, 2]``, where `config` needs them.
        keywords: the shop's words, where the tokenizer reads words.
        fields: what they are looked for in.
        notes: what was left out.
    """

    config: TokenizerConfig
    embedding: FittedEmbedding
    queries: list[str]
    pairs: Pairs | None
    keywords: KeywordDictionary | None
    fields: Callable[[], Fields]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, config: TokenizerConfig, parts: Sequence[EmbeddingPart], shop: Shop, work: Path) -> _Inputs:
        """What the recipe asks for, as far as the data allow it."""
        embedding, notes = fit_embedding(parts, shop, work)
        pairs = pairs_for(config, shop, work)
        if isinstance(config, RqVaeConfig) and pairs is not None and not len(pairs):
            config, pairs = replace(config, contrast=None), None
            notes += ("the contrast of the tokenizer was left out: no two users met the same two items",)
        queries = training_queries(shop) if isinstance(config, RqOpqConfig) else []
        unread = [part.name for part in embedding.spec if not part.reads_text]
        if queries and unread:
            notes += (
                f"fitted to items without the {len(queries):,} training queries: {', '.join(unread)} reads no words",
            )
            queries = []
        keywords = None
        if isinstance(config, KeywordAlignedConfig):
            keywords = _given(shop) or catalogue_keywords(shop.items, work / "embeddings")
        return cls(config, embedding, queries, pairs, keywords, _fields(shop.items), notes)

    def fit(self) -> tuple[Tokenizer | KeywordAligned, float]:
        """The tokenizer, and the seconds that fitting it took."""
        x_ND = self.embedding.vectors
        if self.queries:
            x_ND = np.concatenate([x_ND, self.embedding.queries(self.queries)])
        started = time.perf_counter()
        tokenizer: Tokenizer | KeywordAligned
        if isinstance(self.config, KeywordAlignedConfig):
            assert self.keywords is not None
            tokenizer = KeywordAligned.fit(x_ND, self.fields(), self.keywords, self.config)
        else:
            tokenizer = fit_tokenizer(x_ND, self.config, self.pairs)
        return tokenizer, time.perf_counter() - started


def _fields(items: pl.DataFrame) -> Callable[[], Fields]:
    """Texts of items, made once and when they are asked for."""
    return functools.cache(lambda: item_fields(items))


def _codes_of(
    tokenizer: Tokenizer | KeywordAligned, x_ND: NDArray[np.float32], fields: Callable[[], Fields]
) -> tuple[Codes, Costs]:
    """Codes of items, and what it would cost to give them another last one."""
    if not isinstance(tokenizer, KeywordAligned):
        return tokenizer.encode(x_ND), lambda rows: tokenizer.last_level_costs(x_ND[rows])
    texts = fields()
    return tokenizer.encode(x_ND, texts), lambda rows: tokenizer.last_level_costs(x_ND[rows], [texts[r] for r in rows])


def _publish(folder: Path, inputs: _Inputs, collisions: CollisionConfig, shop: Shop) -> Published:
    """Publish and report; IDs that a run left without a report are kept, if they are of these items."""
    x_ND, item_ids = inputs.embedding.vectors, shop.items["item_id"].to_list()
    seconds = None
    if (folder / PUBLISHED).exists():
        published, tokenizer = open_published(folder), load_codebooks(folder / CODEBOOKS)
        codes_NL, _ = _codes_of(tokenizer, x_ND, inputs.fields)
        if not _is_of(published, item_ids, codes_NL):
            check_unpublished(folder)
    else:
        tokenizer, seconds = inputs.fit()
        codes_NL, costs = _codes_of(tokenizer, x_ND, inputs.fields)
        published = publish_codes(folder, tokenizer, collisions, item_ids, codes_NL, costs)
    measured = report(
        published.ids,
        x_ND,
        tokenizer.decode(published.ids.codes[:, : codes_NL.shape[1]]),
        dedup_level=collisions.method == "dedup",
        encoded=codes_NL,
        similarity_threshold=SIMILAR,
        notes=(*inputs.notes, *tokenizer.notes, *published.notes),
        fit_seconds=seconds,
    )
    _write_report(folder, measured)
    return published


def _is_of(published: Published, item_ids: list[str], codes_NL: NDArray[np.int32]) -> bool:
    """Whether published IDs are those of these items and codes, whatever became of collisions."""
    described = codes_NL.shape[1] - (published.collisions.method == "reassign")
    return published.item_ids.to_pylist() == item_ids and np.array_equal(
        published.ids.codes[:, :described], codes_NL[:, :described]
    )


def _write_report(folder: Path, measured: TokenizerReport) -> None:
    """Markdown to read, then JSON, whose presence means complete."""
    for name, text in (("report.md", measured.to_markdown()), (REPORT, measured.to_json())):
        partial = folder / (name + ".partial")
        partial.write_text(text, "utf-8")
        partial.replace(folder / name)


def _report_of_codes(published: Published, notes: tuple[str, ...], fit_seconds: float | None = None) -> TokenizerReport:
    """What can be said of published IDs without the embeddings of their items."""
    said = (_OF_CODES, _AFTER_REASSIGNING) if published.collisions.method == "reassign" else (_OF_CODES,)
    measured = report(
        published.ids,
        dedup_level=published.collisions.method == "dedup",
        notes=tuple(dict.fromkeys((*notes, *published.notes, *said))),
        fit_seconds=fit_seconds,
    )
    return replace(measured, moved=published.moved)


def read_report(folder: Path) -> TokenizerReport:
    """The report that `publish_shop` wrote."""
    return TokenizerReport.from_json((folder / REPORT).read_text("utf-8"))


def fit_and_publish(recipe: Recipe, shop: Shop, folder: Path, work: Path) -> str:
    """Fit the recipe's tokenizer to a shop and publish in `folder`, with all that appending and queries need later.

    A run that was cut off can be repeated: IDs that are published already stay and get their report.

    Returns:
        The report, as Markdown.

    Raises:
        DataError: the folder holds published IDs and their report, or IDs of another recipe or shop; or as
            `publish_shop`.
    """
    asked = yaml.safe_dump(recipe.dump(), sort_keys=False)
    of_this_recipe = (folder / RECIPE).exists() and (folder / RECIPE).read_text("utf-8") == asked
    if (folder / REPORT).exists() or not of_this_recipe:
        check_unpublished(folder)
    inputs = _Inputs.of(recipe.tokenizer, recipe.embedding, shop, work)
    if not (folder / PUBLISHED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(asked, "utf-8")
        inputs.embedding.save(folder)
    _publish(folder, inputs, recipe.collisions, shop)
    return read_report(folder).to_markdown()


def append_items(folder: Path, shop: Shop) -> list[str]:
    """Give the items of `shop` that `folder` does not know yet an ID; no published ID moves.

    They are embedded by what was fitted to the items that were published first (`FittedEmbedding.new_items`), so it
    makes no difference when they come, beside which others, and which published items the shop still has.

    Returns:
        What there is to say about it, line by line.

    Raises:
        DataError: as `FittedEmbedding.new_items` and `genretrieval_tokenizers.publish.append`; or the IDs are of
            embeddings made elsewhere.
    """
    published, embedding = open_published(folder), _embedding_of(folder)
    new = shop.items.filter(~pl.col("item_id").is_in(published.item_ids.to_pylist()))
    tokenizer, after = load_codebooks(folder / CODEBOOKS), published
    lines = [f"no item is new; {published.ids.n_items:,} IDs stay as they are"]
    if len(new):
        vectors = embedding.new_items(new)
        codes_NL, costs = _codes_of(tokenizer, vectors, _fields(new))
        after = append_encoded(folder, tokenizer, new["item_id"].to_list(), codes_NL, costs)
        lines = [f"{len(new):,} items appended to {published.ids.n_items:,}; no published ID moved", *after.notes]
        if unknown := int((~vectors.any(axis=1)).sum()):
            lines.append(f"nothing is known of {unknown:,} of them, so these have the codes of a vector of zeros")
    earlier = read_report(folder) if (folder / REPORT).exists() else None
    if earlier is None or earlier.n_items != after.ids.n_items:
        notes, seconds = (earlier.notes, earlier.fit_seconds) if earlier else (tokenizer.notes, None)
        _write_report(folder, _report_of_codes(after, notes, seconds))
    return lines


def changes_of(folder: Path, shop: Shop, bundle: Servable) -> ChangesFile | None:
    """The published items of `shop` that a bundle does not have, as a change of its catalogue; None without any.

    Args:
        folder: of published IDs.
        shop: the items with their attributes; those that the bundle does not have are left out.
        bundle: that is served.

    Raises:
        DataError: the bundle's IDs are of other codebooks than those of `folder`.
    """
    published, catalogue = open_published(folder), bundle.catalogue()
    if published.fingerprint != bundle.manifest.files.get(CODEBOOKS):
        raise DataError(
            f"{folder} has IDs of other codebooks than the bundle, so they would name unrelated things there; give the "
            "folder of the same recipe, data and number of threads"
        )
    ids = pl.DataFrame(
        {
            "item_id": published.item_ids.to_pylist(),
            "semantic_id": pl.Series(published.ids.codes.tolist(), dtype=pl.List(pl.Int32())),
        }
    )
    attributes = [name for name in catalogue.columns if name in shop.items.columns and name != "item_id"]
    new = ids.join(catalogue, on="item_id", how="anti", maintain_order="left")
    new = new.join(shop.items.select("item_id", *attributes), on="item_id", maintain_order="left")
    return ChangesFile(new, published.fingerprint) if len(new) else None


def query_ids(folder: Path, queries: list[str]) -> list[tuple[list[int], list[str]]]:
    """Codes of queries by the tokenizer of the items, and the items that share most of them.

    Of codes made from vectors the first ones count, up to where they part; of slots of words, all that are not empty.

    Returns:
        For each query its codes and up to ten item ids.

    Raises:
        RecipeError: no part of the embedding reads text, so a query has no vector.
        DataError: the folder is incomplete or damaged, or its IDs are of embeddings made elsewhere.
    """
    published, vectors = open_published(folder), _embedding_of(folder).queries(queries)
    tokenizer = load_codebooks(folder / CODEBOOKS)
    codes_QL, _ = _codes_of(tokenizer, vectors, lambda: [(query,) for query in queries])
    n_words = tokenizer.keywords.n_groups if isinstance(tokenizer, KeywordAligned) else 0
    described = published.ids.codes[:, : codes_QL.shape[1]]
    found = []
    for codes_L in codes_QL:
        same_NL = described == codes_L
        shared_N = (same_NL & (codes_L != EMPTY))[:, :n_words].sum(axis=1)
        if not n_words:
            shared_N = np.cumprod(same_NL, axis=1).sum(axis=1)
        nearest = np.argsort(-shared_N, kind="stable")[:10]
        found.append((codes_L.tolist(), [published.item_ids[int(row)].as_py() for row in nearest if shared_N[row]]))
    return found


def _embedding_of(folder: Path) -> FittedEmbedding:
    """What the items of a folder were embedded by."""
    if not (folder / EMBEDDING).exists():
        codebooks = folder / CODEBOOKS
        raise DataError(
            f"{folder} has no {EMBEDDING}: its IDs are of embeddings made elsewhere (`genretrieval tokenize encode`), "
            "so nothing here can embed an item or a query. Embed new items as the published ones were, and give their "
            "vectors to `genretrieval_tokenizers.publish.append`; or encode all shards into a new folder with "
            f"`genretrieval tokenize encode --tokenizer {codebooks}`"
        )
    return FittedEmbedding.load(folder)


def encode_stream(
    source: Path,
    output: Path,
    recipe: Recipe,
    *,
    codebooks: Path | None = None,
    column: str = "embedding",
    id_column: str = "item_id",
    sample: int | None = None,
    seed: int | None = None,
    console: Console,
) -> Published:
    """Shards of ready embeddings to published IDs; see `genretrieval_tokenizers.stream`.

    A run that was cut off goes on where it was: a tokenizer fitted to the same sample of the same shards by the same
    settings is not fitted again, and codes are kept as they are made.

    Args:
        source: folder of Parquet files.
        output: folder to publish in.
        recipe: its tokenizer is fitted, where no `codebooks` are given, and its collisions are resolved.
        codebooks: a fitted tokenizer.
        column: embedding column.
        id_column: item id column.
        sample: items that the tokenizer is fitted on, `SAMPLE` by default.
        seed: of the sample, 0 by default.
        console: progress.

    Raises:
        DataError: the folder holds published IDs; collisions are to be reassigned; the tokenizer given is missing, or
            given with a sample; the recipe's tokenizer needs pairs; or as `EmbeddingShards` and `encode_shards`.
    """
    if not (output / PUBLISHED).exists() or (output / REPORT).exists():
        check_unpublished(output)
        published = _encode(source, output, recipe, codebooks, column, id_column, sample, seed, console)
    else:
        published = open_published(output)
    _write_report(output, _report_of_codes(published, load_tokenizer(output / CODEBOOKS).notes))
    console.print(f"{published.ids.n_items:,} items published in {output}", highlight=False)
    return published


def _encode(
    source: Path,
    output: Path,
    recipe: Recipe,
    codebooks: Path | None,
    column: str,
    id_column: str,
    sample: int | None,
    seed: int | None,
    console: Console,
) -> Published:
    if codebooks is not None and (sample is not None or seed is not None):
        raise DataError(
            "a sample and its seed are for fitting a tokenizer, and one that is fitted was given; leave out --sample "
            "and --seed, or --tokenizer"
        )
    check_streamable(recipe.collisions)
    shards = EmbeddingShards(source, column, id_column)
    if codebooks is None:
        tokenizer = _fitted_on_sample(
            shards, output, recipe.tokenizer, SAMPLE if sample is None else sample, 0 if seed is None else seed
        )
    else:
        tokenizer = load_tokenizer(codebooks)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=shards.n_items)
        published = encode_shards(
            shards, tokenizer, recipe.collisions, output, progress=lambda n: bar.update(task, completed=n)
        )
    if codebooks is None:
        for fitted in output.glob("fitted-*.safetensors"):  # published as codebooks.safetensors, or given up
            fitted.unlink()
    return published


def _fitted_on_sample(
    shards: EmbeddingShards, output: Path, config: TokenizerConfig, sample: int, seed: int
) -> Tokenizer:
    """Fit to a sample, once; what was fitted to anything else is not taken for it."""
    if isinstance(config, KeywordAlignedConfig):
        raise DataError(
            "the recipe's tokenizer reads the words of items, and shards hold vectors alone; use `genretrieval "
            "tokenize fit`, which reads the items, or a recipe with another tokenizer"
        )
    if needs_pairs(config):
        raise DataError(
            "the recipe's tokenizer is fitted with pairs of items that users meet together, and shards hold none; fit "
            "it with `genretrieval tokenize fit` and give its codebooks with --tokenizer, or set contrast: null"
        )
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards.files]
    key = content_hash(_METHODS_VERSION, config, sample, seed, shards.column, files)
    fitted = output / f"fitted-{key}.safetensors"
    if not fitted.exists():
        output.mkdir(parents=True, exist_ok=True)
        fit_tokenizer(shards.sample(sample, seed), config).save(fitted)
    return load_tokenizer(fitted)
