"""The verbs `bundles` of the command line: which bundle is served, by an alias that servers follow.

`create` writes to the admin store itself, because a server needs an alias to start; `check` looks at a folder alone.
All others talk to the admin API of a running server, as the verbs in `genretrieval_serving.admin.commands` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genretrieval.errors import BundleError, MissingExtraError
from genretrieval_serving.admin.commands import HERE, DryRun, Endpoint, Etag, StoreUrl, open_api, open_store, show

# A server opens a bundle before it answers.
_TIMEOUT = 600.0

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="As in `serve --alias`.")]
Name = Annotated[str, typer.Argument(metavar="BUNDLE", help="Name of its folder in the folder of bundles.")]
Unbound = Annotated[
    bool,
    typer.Option(help="Leave out bindings and rules that cannot hold on the bundle, instead of refusing it."),
]


def group() -> typer.Typer:
    """The verbs."""
    bundles = typer.Typer(no_args_is_help=True, help="Which bundle is served: versions, canary, rollback.")
    for verb in (create, list_, show_, status, set_, canary, end_canary, promote, rollback, check):
        bundles.command(verb.__name__.strip("_").replace("_", "-"))(verb)
    return bundles


def create(
    alias: Alias,
    bundle: Name,
    bundles: Annotated[Path, typer.Option(help="Folder of bundles, as in `serve --bundles`.")],
    store: StoreUrl,
    allow_unbound: Unbound = False,
) -> None:
    """Make an alias, in the admin store itself, for servers that are to be started with it."""
    with open_store(store) as opened:
        from genretrieval_serving.admin.replica import cannot_hold
        from genretrieval_serving.admin.resources import AliasFields, Kind
        from genretrieval_serving.admin.snapshot import AdminSnapshot, Items
        from genretrieval_serving.admin.store import Call, Create
        from genretrieval_serving.bundle_folder import BundleFolder, open_retriever

        fields = AliasFields(bundle=bundle)
        retriever = BundleFolder(bundles, open_retriever).open(bundle)
        items = Items(retriever.catalogue, retriever.bundle.manifest.reserved_slots)
        problems = AdminSnapshot.empty(items).updated(opened.changes(0)).problems()
        if problems and not allow_unbound:
            raise BundleError(cannot_hold(problems))
        show(opened.apply(Call("operator"), [Create(Kind.ALIASES, alias, fields)])[0])


def list_(endpoint: Endpoint = HERE) -> None:
    """Print the bundles of a server's folder, one JSON object a line."""
    with open_api(endpoint) as client:
        for bundle in client.bundles():
            print(bundle.model_dump_json(exclude_none=True))


def show_(alias: Alias, endpoint: Endpoint = HERE) -> None:
    """Print an alias."""
    from genretrieval_serving.admin.resources import Kind

    with open_api(endpoint) as client:
        show(client.get(Kind.ALIASES, alias))


def status(endpoint: Endpoint = HERE) -> None:
    """Print what one server answers with, what its alias asks of it, and why that is not the same."""
    with open_api(endpoint) as client:
        show(client.deployment())


def set_(
    alias: Alias,
    bundle: Name,
    endpoint: Endpoint = HERE,
    allow_unbound: Unbound = False,
    etag: Etag = None,
    validate_only: DryRun = False,
) -> None:
    """Serve a bundle to everybody; a canary ends."""
    with open_api(endpoint, _TIMEOUT) as client:
        patch = {"bundle": bundle, "canary": None}
        show(client.move(alias, patch, allow_unbound=allow_unbound, etag=etag, validate_only=validate_only))


def canary(
    alias: Alias,
    bundle: Name,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the users, always the same ones.")],
    endpoint: Endpoint = HERE,
    allow_unbound: Unbound = False,
    etag: Etag = None,
) -> None:
    """Serve another bundle to a share of the users, or to another share."""
    with open_api(endpoint, _TIMEOUT) as client:
        patch = {"canary": {"bundle": bundle, "share": share}}
        show(client.move(alias, patch, allow_unbound=allow_unbound, etag=etag))


def end_canary(alias: Alias, endpoint: Endpoint = HERE, etag: Etag = None) -> None:
    """Serve the bundle of the alias to everybody again."""
    with open_api(endpoint, _TIMEOUT) as client:
        show(client.move(alias, {"canary": None}, etag=etag))


def promote(alias: Alias, endpoint: Endpoint = HERE, etag: Etag = None) -> None:
    """Serve the canary to everybody."""
    with open_api(endpoint, _TIMEOUT) as client:
        show(client.promote(alias, etag=etag))


def rollback(alias: Alias, endpoint: Endpoint = HERE, allow_unbound: Unbound = False, etag: Etag = None) -> None:
    """Serve the bundle before, and end the canary."""
    with open_api(endpoint, _TIMEOUT) as client:
        show(client.rollback(alias, allow_unbound=allow_unbound, etag=etag))


def check(folder: Annotated[Path, typer.Argument(help="Of one bundle.")]) -> None:
    """Open a bundle as a server would: hashes, graph, catalogue, answers."""
    try:
        from genretrieval_serving.bundle_folder import BundleFolder, open_retriever
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; `pip install 'genretrieval[serve]'` brings it"
        ) from error
    manifest = BundleFolder(folder.resolve().parent, open_retriever).open(folder.resolve().name).bundle.manifest
    print(f"{folder} can be served: version {manifest.version}, {manifest.n_items:,} items")
