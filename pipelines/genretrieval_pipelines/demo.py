"""The demo: a made shop, its bundle, and requests worth showing."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from genretrieval.figures import Figure
from genretrieval.request import RetrieveRequest
from genretrieval_pipelines.evaluate import Reads, requests
from genretrieval_pipelines.recipe import load_recipe
from genretrieval_pipelines.run import OpenBackend, run, stage
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize

SHOWN_ITEMS = 5


def build_demo(
    folder: Path, recipe: Path, open_backend: OpenBackend, console: Console
) -> tuple[dict[str, Figure], dict[str, RetrieveRequest]]:
    """Make the demo shop in ``folder/shop`` and a bundle of it in ``folder/bundle``.

    Returns:
        The figures of the validation table, and a search and a recommendation of real visitors of the shop.
    """
    shop_folder, work = folder / "shop", folder / "bundle.work"
    if not (shop_folder / "items.parquet").exists():
        with stage(console, "making a shop"):
            synthesize(shop_folder, ShopConfig())
    figures = run(load_recipe(recipe), shop_folder, folder / "bundle", work, open_backend=open_backend, console=console)
    shop = open_shop(shop_folder, work)
    cases = shop.cases("test")
    shown: dict[str, RetrieveRequest] = {}
    for request in requests(shop, cases, Reads(history=10), beam_width=50):
        kind = "search" if request.query else "recommendation"
        if len(request.history) >= SHOWN_ITEMS and kind not in shown:
            shown[kind] = request.model_copy(update={"top_k": SHOWN_ITEMS})
        if len(shown) == 2:
            break
    return figures, shown
