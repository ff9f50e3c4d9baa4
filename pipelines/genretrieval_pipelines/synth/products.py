"""The catalogue of the demo shop: products and their variants, drawn from the words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval_pipelines.synth.words import ATTRIBUTE_KINDS, BRANDS, LEAVES, LINES, Leaf

BRANDS_PER_DEPARTMENT = 10
BRANDS_PER_LEAF = 6
MAX_VARIANTS = 4
# Standard deviation of log price inside a leaf: prices are log-normal around the leaf's median.
LOG_PRICE_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Products:
    """What the shop sells; row i of every array is row i of ``items.parquet``.

    Attributes:
        leaves: the leaf categories in use.
        brands: brand names in use.
        attribute_values: (kind, value) of each attribute id; id 0 means "has none".
        leaf: int64 ``[n_items]``, position in `leaves`.
        brand: int64 ``[n_items]``, position in `brands`.
        attributes: int64 ``[n_items, n_kinds]``, ids of `attribute_values`, kinds as in `ATTRIBUTE_KINDS`.
        price_position: float32 ``[n_items]``, how dear the item is for its leaf, in standard deviations.
        popularity: float32 ``[n_items]``, log of how much better the item sells than taste explains.
        launch_share: float64 ``[n_items]``, when it enters the shop as a share of the log's span; 0 is "before".
        retire_share: float64 ``[n_items]``, when it is sold out for good; above 1 for what is still in stock.
        table: ``items.parquet`` itself.
    """

    leaves: list[Leaf]
    brands: list[str]
    attribute_values: list[tuple[str, str]]
    leaf: NDArray[np.int64]
    brand: NDArray[np.int64]
    attributes: NDArray[np.int64]
    price_position: NDArray[np.float32]
    popularity: NDArray[np.float32]
    launch_share: NDArray[np.float64]
    retire_share: NDArray[np.float64]
    table: pl.DataFrame


@dataclass(frozen=True, slots=True)
class _Product:
    """One product and what its variants share."""

    leaf: int
    brand: int
    line: str
    material: str
    style: str
    audience: str
    log_price: float
    popularity: float
    launch_share: float


def draw_products(n_items: int, rng: np.random.Generator) -> Products:
    """Draw a catalogue of exactly `n_items` variants.

    A small catalogue uses the first leaf categories only, so that a leaf keeps about 20 items or more.
    """
    n_leaves = int(np.clip(n_items // 20, 16, len(LEAVES)))
    leaves = LEAVES[:n_leaves]
    departments = sorted({leaf.department for leaf in leaves})
    brands = [str(name) for name in rng.permutation(BRANDS)[: BRANDS_PER_DEPARTMENT * len(departments)]]
    brand_price = rng.normal(0.0, 1.0, len(brands))
    brand_popularity = rng.normal(0.0, 0.7, len(brands))
    leaf_popularity = rng.normal(0.0, 0.5, n_leaves)
    sizes = 1 + rng.multinomial(n_items - n_leaves, rng.dirichlet(np.full(n_leaves, 4.0)))

    rows: list[dict[str, object]] = []
    arrays: list[tuple[int, int, float, float, float, float]] = []
    n_products = 0
    for leaf_row, leaf in enumerate(leaves):
        first_brand = departments.index(leaf.department) * BRANDS_PER_DEPARTMENT
        carried = first_brand + rng.choice(BRANDS_PER_DEPARTMENT, BRANDS_PER_LEAF, replace=False)
        share = np.exp(brand_popularity[carried])
        lines = {int(brand): list(rng.permutation(LINES)) for brand in carried}
        left = int(sizes[leaf_row])
        while left:
            brand = int(rng.choice(carried, p=share / share.sum()))
            product = _Product(
                leaf=leaf_row,
                brand=brand,
                line=_next_line(lines[brand]),
                material=_pick(leaf.choices[1], rng),
                style=_pick(leaf.choices[2], rng),
                audience=_pick(leaf.choices[3], rng),
                log_price=LOG_PRICE_SPREAD * (0.8 * brand_price[brand] + 0.6 * rng.normal()),
                popularity=leaf_popularity[leaf_row] + brand_popularity[brand] + rng.normal(0.0, 0.6),
                launch_share=rng.uniform(0.0, 0.95) if rng.random() < 0.25 else 0.0,
            )
            for color, size_row in _variants(leaf, min(left, 1 + int(rng.integers(MAX_VARIANTS))), rng):
                left -= 1
                retires = rng.uniform(0.5, 1.0) if rng.random() < 0.04 else 2.0
                arrays.append(
                    (
                        leaf_row,
                        brand,
                        product.log_price,
                        product.popularity + rng.normal(0.0, 0.4),
                        product.launch_share,
                        max(retires, product.launch_share),
                    )
                )
                rows.append(_row(len(rows), n_products, product, leaf, brands[brand], color, size_row, retires))
            n_products += 1

    table = pl.DataFrame(rows, schema_overrides={"size": pl.String})
    kinds = list(ATTRIBUTE_KINDS)
    values = sorted({(kind, value) for kind in kinds for value in table[kind].drop_nulls()})
    ids = {pair: row + 1 for row, pair in enumerate(values)}
    attributes = [[ids.get((kind, value), 0) for value in table[kind]] for kind in kinds]
    columns = [np.asarray(column) for column in zip(*arrays, strict=True)]
    return Products(
        leaves=leaves,
        brands=brands,
        attribute_values=[("", ""), *values],
        leaf=columns[0],
        brand=columns[1],
        attributes=np.asarray(attributes, np.int64).T.copy(),
        price_position=(columns[2] / LOG_PRICE_SPREAD).astype(np.float32),
        popularity=columns[3].astype(np.float32),
        launch_share=columns[4],
        retire_share=columns[5],
        table=table,
    )


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))] if values else ""


def _next_line(lines: list[str]) -> str:
    """The next unused line name of a brand in a leaf; used ones come back numbered, so that titles differ."""
    name = lines.pop(0)
    base, _, number = name.partition(" ")
    lines.append(f"{base} {int(number or 1) + 1}")
    return name


def _variants(leaf: Leaf, wanted: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Up to `wanted` distinct (color, position in `leaf.sizes`) of one product; position -1 where it has no size."""
    colors = leaf.choices[0] or ("",)
    sizes = range(len(leaf.sizes)) if leaf.sizes else [-1]
    pairs = [(color, size) for color in colors for size in sizes]
    chosen = rng.permutation(len(pairs))[:wanted]
    return [pairs[row] for row in sorted(chosen)]


def _row(
    item: int, parent: int, product: _Product, leaf: Leaf, brand: str, color: str, size_row: int, retires: float
) -> dict[str, object]:
    """One row of ``items.parquet``: a title as a shop would write it and the facts it is made of."""
    size = leaf.sizes[size_row] if size_row >= 0 else ""
    price = leaf.price * np.exp(product.log_price) * (1.0 + 0.25 * max(size_row, 0))
    words = [product.style, leaf.noun, color]
    title = " ".join([brand, product.line, *(_capitalize(word) for word in words if word), size]).strip()
    in_color = f", in {color}" if color else ""
    made_of = f", {product.material}" if product.material else ""
    audience = {"women": " for women", "men": " for men"}.get(product.audience, "")
    description = (
        f"{product.style[:1].upper()}{product.style[1:]} {leaf.noun}{audience} by {brand}{made_of}. "
        f"{leaf.category[:1].upper()}{leaf.category[1:]} from the {product.line} line{in_color}."
    )
    return {
        "item_id": f"i{item:06d}",
        "title": title,
        "description": description,
        "brand": brand,
        "categories": [leaf.department, leaf.category, leaf.noun],
        "price": round(float(price), 2),
        "parent_id": f"p{parent:06d}",
        "in_stock": retires > 1.0,
        "color": color or None,
        "material": product.material or None,
        "style": product.style or None,
        "audience": product.audience or None,
        "size": size or None,
    }


def _capitalize(phrase: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in phrase.split(" "))
