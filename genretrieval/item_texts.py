"""What an item says in words: the same text wherever an item is embedded, tokenized or searched for."""

from __future__ import annotations

import polars as pl

DESCRIPTION_CHARACTERS = 500

_LEADING = ("title", "brand", "categories")
_NOT_WORDS = {
    "id",
    "ids",
    "url",
    "urls",
    "link",
    "links",
    "image",
    "images",
    "sku",
    "asin",
    "ean",
    "gtin",
    "upc",
}


def item_texts(items: pl.DataFrame) -> list[str]:
    """One text an item: title, brand, categories, other words in column order, start of the description.

    The order matters to models that read only the first tokens. Other words are the columns of strings or
    lists of strings whose name does not say id, url, image or the like; values that are web addresses are
    left out. Fields are joined by ``". "``; the description stops after `DESCRIPTION_CHARACTERS`.
    """
    columns = [name for name in _LEADING if name in items.columns]
    columns += [name for name in items.columns if is_words(name, items.schema[name])]
    fields = [_words_of(name, items.schema[name]) for name in columns]
    if "description" in items.columns:
        fields.append(pl.col("description").cast(pl.String).str.slice(0, DESCRIPTION_CHARACTERS))
    if not fields:
        return [""] * len(items)
    filled = [pl.when(field.str.strip_chars() != "").then(field.str.strip_chars()) for field in fields]
    return items.select(pl.concat_str(filled, separator=". ", ignore_nulls=True).fill_null("").alias("text"))[
        "text"
    ].to_list()


def item_fields(items: pl.DataFrame) -> list[tuple[str, ...]]:
    """Texts of each item, those first that say most surely what it is: brand, last category, title, all words."""
    columns = {"brand": pl.col("brand"), "categories": pl.col("categories").cast(pl.List(pl.String)).list.last()}
    columns["title"] = pl.col("title")
    sure = items.select(
        column.cast(pl.String).fill_null("").alias(name) for name, column in columns.items() if name in items.columns
    )
    return [(*texts, text) for texts, text in zip(sure.rows(), item_texts(items), strict=True)]


def is_words(name: str, dtype: pl.DataType) -> bool:
    """Whether a column of the shop's own holds words: strings or lists of them, and no ids, addresses or images."""
    if name in (*_LEADING, "description") or _NOT_WORDS & set(name.lower().split("_")):
        return False
    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    return isinstance(inner, (pl.String, pl.Categorical, pl.Enum))


def _words_of(name: str, dtype: pl.DataType) -> pl.Expr:
    if isinstance(dtype, pl.List):
        return pl.col(name).cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    text = pl.col(name).cast(pl.String)
    return pl.when(~text.str.contains("^https?://")).then(text)
