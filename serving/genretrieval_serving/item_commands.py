"""The verbs `items` of the command line: what the catalogue of a running server says of items, and changes of it.

All but `compact`, which works on the folder of changes, talk to the admin API, as the verbs in
`genretrieval_serving.admin.commands` do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from genretrieval.errors import InvalidInputError, MissingExtraError
from genretrieval_serving.admin.commands import HERE, DryRun, Endpoint, open_api, show

Id = Annotated[str, typer.Argument(metavar="ITEM_ID")]
Ids = Annotated[list[str], typer.Argument(metavar="ITEM_ID...")]


def group() -> typer.Typer:
    """The verbs."""
    items = typer.Typer(no_args_is_help=True, help="Items of the catalogue while it is served.")
    for verb in (get, upsert, remove, stock, compact):
        items.command(verb.__name__)(verb)
    return items


def get(item_id: Id, endpoint: Endpoint = HERE) -> None:
    """Print an item as a server has it now, removed or not."""
    with open_api(endpoint) as client:
        show(client.item(item_id))


def upsert(
    file: Annotated[
        Path, typer.Argument(help="Parquet, or one JSON object a line: item_id, attributes, semantic_id of new items.")
    ],
    endpoint: Endpoint = HERE,
    validate_only: DryRun = False,
) -> None:
    """Add and change up to 10,000 items, all or none; more belong into the folder of changes as a file."""
    rows = _parquet(file) if file.suffix == ".parquet" else _json_lines(file)
    with open_api(endpoint) as client:
        show(client.change_items(rows, validate_only=validate_only))


def remove(item_ids: Ids, endpoint: Endpoint = HERE, validate_only: DryRun = False) -> None:
    """Return items no more; `upsert` brings them back."""
    with open_api(endpoint) as client:
        rows = [{"item_id": item, "op": "remove"} for item in item_ids]
        show(client.change_items(rows, validate_only=validate_only))


def stock(
    item_ids: Ids,
    in_stock: Annotated[bool, typer.Option("--in/--out", help="Whether they can be bought.")],
    endpoint: Endpoint = HERE,
) -> None:
    """Say that items are in stock, or out of it."""
    with open_api(endpoint) as client:
        show(client.change_items([{"item_id": item, "in_stock": in_stock} for item in item_ids]))


def compact(
    folder: Annotated[Path, typer.Argument(help="Folder of changes, as in `serve --catalogue-changes`.")],
    bundle: Annotated[Path, typer.Option(help="Bundle that is served.")],
) -> None:
    """Merge all files that are older than a day into one; servers are not disturbed."""
    try:
        from genretrieval_serving.catalogue_feed import compact as merge
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; `pip install 'genretrieval[serve]'` brings it"
        ) from error
    from genretrieval.bundle import load_bundle

    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is no folder; give the one that servers follow")
    merged = merge(folder, load_bundle(bundle))
    print("fewer than two files are older than a day" if merged is None else f"{merged[1]} files are now {merged[0]}")


def _parquet(file: Path) -> list[dict[str, Any]]:
    """Rows as they would be in the folder: a null in a column that is there is a value."""
    from genretrieval.catalogue_changes import OP, SEMANTIC_ID, ChangesFile

    try:
        table = ChangesFile.read(file).table
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error
    rows = map(json.loads, table.write_ndjson().splitlines())
    return [{name: row[name] for name in row if row[name] is not None or name not in (OP, SEMANTIC_ID)} for row in rows]


def _json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInputError(f"{file} is not one JSON object a line: {error}") from error
    if (strange := next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None)) is not None:
        raise InvalidInputError(f"{file} is not one JSON object a line; see line {strange + 1}")
    return rows
