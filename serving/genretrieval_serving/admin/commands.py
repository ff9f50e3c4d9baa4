"""The verbs `keywords`, `rules`, `synonyms`, `keys` and `admin` of the command line.

The first three talk to the admin API of a running server, with the API key or token in GENRETRIEVAL_API_KEY, and where
that speaks TLS with the files in GENRETRIEVAL_CA, GENRETRIEVAL_CERT and GENRETRIEVAL_KEY. The others open the store
itself: the first key has to come from somewhere. Imports are local to each verb, as in the command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genretrieval.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from genretrieval_serving.admin.client import AdminClient
    from genretrieval_serving.admin.resources import Kind
    from genretrieval_serving.admin.sql import SqlStore

API_KEY = "GENRETRIEVAL_API_KEY"
_TLS = {"ca": "GENRETRIEVAL_CA", "cert": "GENRETRIEVAL_CERT", "key": "GENRETRIEVAL_KEY"}

Endpoint = Annotated[str, typer.Option(help="Of the admin API: http://HOST:PORT")]
HERE = "http://127.0.0.1:8082"
Id = Annotated[str, typer.Argument(metavar="ID")]
Etag = Annotated[str | None, typer.Option(help="Refuse where the resource has another etag by now.")]
DryRun = Annotated[bool, typer.Option("--validate-only", help="Check and answer as if done, and change nothing.")]
Format = Annotated[str | None, typer.Option(help="jsonl or csv; by default what the file's name says, else jsonl.")]
StoreUrl = Annotated[
    str,
    typer.Option(
        envvar="GENRETRIEVAL_ADMIN_STORE", help="sqlite:///FILE or postgresql://..., as `serve --admin-store`."
    ),
]
Items = Annotated[list[str] | None, typer.Option("--item", help="Item id; repeat.")]
ItemsFile = Annotated[Path | None, typer.Option(help="File of item ids, one a line.")]
Select = Annotated[
    str | None, typer.Option(metavar="JSON", help='Items by a rule: {"text": "...", "filters": {...}}, or @FILE.')
]
From = Annotated[datetime | None, typer.Option(help="When it begins; local time.")]
Until = Annotated[datetime | None, typer.Option(help="When it ends.")]
NewId = Annotated[str | None, typer.Option("--id", help="By default made from the fields.")]


def groups() -> dict[str, typer.Typer]:
    """The verbs by the name of their group."""
    keywords = _group("keywords", "Words, and the items they are bound to.")
    keywords.command("create")(_create_keyword)
    keywords.command("bind")(_bind)
    keywords.command("unbind")(_unbind)
    rules = _group("rules", "Pin, boost, bury and block items.")
    rules.command("create")(_create_rule)
    synonyms = _group("synonyms", "Terms that mean the same.")
    synonyms.command("create")(_create_synonyms)
    keys = typer.Typer(no_args_is_help=True, help="API keys, made and revoked in the admin store.")
    keys.command("create")(_create_key)
    keys.command("list")(_list_keys)
    keys.command("revoke")(_revoke_key)
    admin = typer.Typer(no_args_is_help=True, help="The whole admin state as a file.")
    admin.command("backup")(_backup)
    admin.command("restore")(_restore)
    return {"keywords": keywords, "rules": rules, "synonyms": synonyms, "keys": keys, "admin": admin}


def client_options(endpoint: str) -> dict[str, Any]:
    """What a client takes from the environment: an API key, and files of TLS for an endpoint that speaks it."""
    from genretrieval_serving.client import ClientTls

    files = {name: Path(os.environ[variable]) for name, variable in _TLS.items() if os.environ.get(variable)}
    tls = ClientTls(**files) if endpoint.startswith(("grpcs:", "https:")) else None
    return {"api_key": os.environ.get(API_KEY), "tls": tls}


@contextmanager
def open_api(endpoint: str, timeout: float = 30.0) -> Iterator[AdminClient]:
    """A client of the admin API, with the key and the files of TLS that the environment names."""
    try:
        from genretrieval_serving.admin.client import AdminClient
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; `pip install 'genretrieval[client]'` brings it"
        ) from error
    with AdminClient(endpoint, timeout=timeout, **client_options(endpoint)) as client:
        yield client


def open_store(url: str) -> closing[SqlStore]:
    """The admin store itself."""
    try:
        from genretrieval_serving.admin.sql import SqlStore
        from genretrieval_serving.observability import configure_logging
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; `pip install 'genretrieval[serve]'` brings it"
        ) from error
    configure_logging("warning", sys.stderr)  # standard output is the answer's
    return closing(SqlStore.open(url))


def _group(name: str, help_: str) -> typer.Typer:
    """The verbs that every kind of resource has."""
    group = typer.Typer(no_args_is_help=True, help=help_)

    def kind() -> Kind:
        from genretrieval_serving.admin.resources import Kind

        return Kind(name)

    def verb(function: Callable[..., None]) -> Callable[..., None]:
        return group.command(function.__name__.strip("_"))(function)

    @verb
    def list_(
        endpoint: Endpoint = HERE, deleted: Annotated[bool, typer.Option(help="Deleted ones, too.")] = False
    ) -> None:
        """Print all, one JSON object a line."""
        with open_api(endpoint) as client:
            for resource in client.pages(kind(), deleted=deleted):
                print(resource.model_dump_json(exclude_none=True))

    @verb
    def get(id_: Id, endpoint: Endpoint = HERE) -> None:
        """Print one, deleted or not."""
        with open_api(endpoint) as client:
            show(client.get(kind(), id_))

    @verb
    def patch(
        id_: Id,
        fields: Annotated[str, typer.Argument(metavar="JSON", help="Fields to change, null to take away; or @FILE.")],
        endpoint: Endpoint = HERE,
        etag: Etag = None,
    ) -> None:
        """Change some fields."""
        with open_api(endpoint) as client:
            show(client.patch(kind(), id_, _json(fields), etag=etag))

    @verb
    def delete(id_: Id, endpoint: Endpoint = HERE, etag: Etag = None) -> None:
        """Delete; `undelete` brings it back."""
        with open_api(endpoint) as client:
            show(client.delete(kind(), id_, etag=etag))

    @verb
    def undelete(id_: Id, endpoint: Endpoint = HERE) -> None:
        """Bring a deleted one back as it was."""
        with open_api(endpoint) as client:
            show(client.undelete(kind(), id_))

    @verb
    def import_(
        file: Annotated[Path, typer.Argument(help="What `export` wrote, or the like.")],
        endpoint: Endpoint = HERE,
        file_format: Format = None,
        validate_only: DryRun = False,
    ) -> None:
        """Create or overwrite what a file has, all or nothing."""
        with open_api(endpoint) as client:
            show(client.import_(kind(), _read(file), _format(file_format, file), validate_only=validate_only))

    @verb
    def export(
        output: Annotated[Path | None, typer.Argument(help="File to write; by default standard output.")] = None,
        endpoint: Endpoint = HERE,
        file_format: Format = None,
    ) -> None:
        """Write all that are not deleted to a file."""
        with open_api(endpoint) as client:
            content = client.export(kind(), _format(file_format, output))
        if output is None:
            sys.stdout.buffer.write(content)
            sys.stdout.flush()
        else:
            output.write_bytes(content)

    @verb
    def test(
        resource: Annotated[str, typer.Argument(help="Id of one that is stored, JSON of one that is not, or @FILE.")],
        query: Annotated[str | None, typer.Option(help="What the visitor typed.")] = None,
        history: Annotated[list[str] | None, typer.Option(help="Item id, oldest first; repeat.")] = None,
        scenario: Annotated[str | None, typer.Option(help="Page or surface that asks.")] = None,
        top_k: Annotated[int, typer.Option(help="Items wanted.")] = 10,
        endpoint: Endpoint = HERE,
    ) -> None:
        """Show what a request returns without it and with it; changes nothing."""
        from genretrieval.request import HistoryEvent, RetrieveRequest

        events = [HistoryEvent(item_id=item) for item in history or []]
        request = RetrieveRequest(query=query, history=events, scenario=scenario, top_k=top_k)
        with open_api(endpoint) as client:
            from genretrieval_serving.admin.client import as_new

            tried = _json(resource) if resource[:1] in ("{", "@") else as_new(kind(), client.get(kind(), resource))
            _print_test(client.test(kind(), tried, request))

    return group


def _create_keyword(
    text: Annotated[str, typer.Argument(help="One or more words, as they stand in a query.")],
    id_: NewId = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Attribute type, e.g. Brand; decides where a slot is taken first.")
    ] = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
    item: Items = None,
    items_file: ItemsFile = None,
    select: Select = None,
    valid_from: From = None,
    valid_until: Until = None,
    endpoint: Endpoint = HERE,
    validate_only: DryRun = False,
) -> None:
    """A new word, bound at once where items are given."""
    new: dict[str, Any] = {"text": text, "note": note}
    new |= {name: value for name, value in (("id", id_), ("type", type_)) if value is not None}
    if item or items_file or select:
        new["binding"] = _binding(item, items_file, select, valid_from, valid_until)
    from genretrieval_serving.admin.resources import Kind

    with open_api(endpoint) as client:
        show(client.create(Kind.KEYWORDS, new, validate_only=validate_only))


def _bind(
    id_: Id,
    item: Items = None,
    items_file: ItemsFile = None,
    select: Select = None,
    valid_from: From = None,
    valid_until: Until = None,
    endpoint: Endpoint = HERE,
    etag: Etag = None,
) -> None:
    """Bind a word to items, in place of those it was bound to."""
    with open_api(endpoint) as client:
        show(client.bind(id_, _binding(item, items_file, select, valid_from, valid_until), etag=etag))


def _unbind(id_: Id, endpoint: Endpoint = HERE, etag: Etag = None) -> None:
    """Give a word's slot back; the word stays."""
    with open_api(endpoint) as client:
        show(client.unbind(id_, etag=etag))


def _create_rule(
    fields: Annotated[
        str,
        typer.Argument(
            metavar="JSON",
            help='E.g. {"condition": {"query": {"match": "contains", "text": "gift"}}, '
            '"effect": {"kind": "boost", "items": {"text": "gift box"}, "amount": 0.7}}; or @FILE.',
        ),
    ],
    id_: NewId = None,
    endpoint: Endpoint = HERE,
    validate_only: DryRun = False,
) -> None:
    """A new rule."""
    from genretrieval_serving.admin.resources import Kind

    new = _json(fields) | ({} if id_ is None else {"id": id_})
    with open_api(endpoint) as client:
        show(client.create(Kind.RULES, new, validate_only=validate_only))


def _create_synonyms(
    terms: Annotated[list[str], typer.Argument(help="Two or more; with --one-way the first stands for the others.")],
    one_way: Annotated[bool, typer.Option(help="Only the first brings the others.")] = False,
    id_: NewId = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
    endpoint: Endpoint = HERE,
    validate_only: DryRun = False,
) -> None:
    """A new synonym set."""
    from genretrieval_serving.admin.resources import Kind

    new: dict[str, Any] = {"kind": "one_way" if one_way else "two_way", "terms": terms, "note": note}
    new |= {} if id_ is None else {"id": id_}
    with open_api(endpoint) as client:
        show(client.create(Kind.SYNONYMS, new, validate_only=validate_only))


def _create_key(
    principal: Annotated[str, typer.Argument(help="Who will hold it, as the audit names them.")],
    store: StoreUrl,
    scope: Annotated[
        list[str], typer.Option(help="retrieve, admin.read or admin.write (which includes read); repeat.")
    ],
    expires: Annotated[datetime | None, typer.Option(help="When it ends by itself; local time.")] = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from genretrieval_serving.admin.resources import Scope

    if unknown := [name for name in scope if name not in list(Scope)]:
        raise InvalidInputError(f"no scope {', '.join(unknown)}; there are {', '.join(Scope)}")
    with open_store(store) as opened:
        id_, secret = opened.create_key(principal, map(Scope, scope), _aware(expires))
    print(f"id {id_}", file=sys.stderr)
    print(secret)


def _list_keys(store: StoreUrl) -> None:
    """Print all keys without their secrets, one JSON object a line."""
    with open_store(store) as opened:
        for key in opened.list_keys():
            times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
            shown = {"id": key.id, "principal": key.principal, "scopes": sorted(key.scopes)}
            print(json.dumps(shown | {name: time.isoformat() for name, time in times.items() if time}))


def _revoke_key(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it; not the secret.")], store: StoreUrl
) -> None:
    """End a key for good; servers follow within seconds."""
    with open_store(store) as opened:
        opened.revoke_key(id_)
    print(f"{id_} revoked")


def _backup(
    file: Annotated[Path, typer.Argument(help="File to write, for its owner alone; one that is there is replaced.")],
    store: StoreUrl,
) -> None:
    """Write everything that a store holds to a file: resources, deleted ones too, slots, audit, hashes of keys."""
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).is_file():
        raise InvalidInputError(f"there is no {store}, so nothing to back up; opening it would make an empty one")
    with open_store(store) as opened:
        from genretrieval_serving.admin.backup import backup

        contents = backup(opened, file)
    print(json.dumps({"revision": contents.revision, "rows": contents.rows}))


def _restore(
    file: Annotated[Path, typer.Argument(help="What `admin backup` wrote, of a store of either kind.")], store: StoreUrl
) -> None:
    """Fill an empty store from a file; servers on it follow, and its revision goes on where it was."""
    with open_store(store) as opened:
        from genretrieval_serving.admin.backup import restore

        contents = restore(opened, file)
    print(json.dumps({"revision": contents.revision, "rows": contents.rows}))


def _binding(
    item: list[str] | None, items_file: Path | None, select: str | None, begins: datetime | None, ends: datetime | None
) -> dict[str, Any]:
    given = [*(item or []), *(_read(items_file).decode().split("\n") if items_file else [])]
    ids = [id_.strip() for id_ in given if id_.strip()]
    if bool(ids) == (select is not None):
        raise InvalidInputError("say which items: --item or --items-file, or a rule by --select; not both")
    binding: dict[str, Any] = {"items": {"item_ids": ids} if ids else _json(select or "")}
    window = {"valid_from": _aware(begins), "valid_until": _aware(ends)}
    return binding | {name: time.isoformat() for name, time in window.items() if time}


def _aware(time: datetime | None) -> datetime | None:
    """With the zone of this machine, which is what somebody at its keyboard means."""
    return None if time is None else time.astimezone()


def _json(given: str) -> dict[str, Any]:
    text = _read(Path(given[1:])).decode() if given.startswith("@") else given
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"{given[:60]!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{given[:60]!r} is no JSON object; it begins with {{")
    return value


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error


def _format(given: str | None, file: Path | None) -> str:
    name = given or (file.suffix.lstrip(".") if file and file.suffix in (".csv", ".jsonl") else "jsonl")
    if name not in ("jsonl", "csv"):
        raise InvalidInputError(f"no format {name!r}; there are jsonl and csv")
    return name


def show(model: Any) -> None:
    """Print a resource as JSON."""
    print(model.model_dump_json(indent=2, exclude_none=True))


def _print_test(tested: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "because of", title=None)
    before, after = tested.before.items, tested.after.items
    for place in range(max(len(before), len(after))):
        old = before[place].item_id if place < len(before) else ""
        new = after[place] if place < len(after) else None
        table.add_row(str(place + 1), old, new.item_id if new else "", ", ".join(new.touched_by) if new else "")
    console = Console()
    console.print(table, markup=False)
    if tested.before.applied != tested.after.applied:
        print("applied:", ", ".join(tested.after.applied))
    if tested.missing_ids:
        print("not in the catalogue:", ", ".join(tested.missing_ids))
