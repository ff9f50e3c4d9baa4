"""The command `genretrieval`: verbs are functions, and this module is where the packages are put together.

Imports are local to each verb, so that `serve` never loads torch and `--help` answers at once.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from genretrieval import __version__
from genretrieval.errors import (
    BundleError,
    GenRetrievalError,
    InvalidInputError,
    MissingExtraError,
    RecipeError,
    UnavailableError,
    disk_is_full,
)
from genretrieval_serving import bundle_commands, item_commands
from genretrieval_serving.admin.commands import client_options, groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genretrieval.request import RetrieveResponse
    from genretrieval.retrieval import Backend

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Make and check logs.")
tokenize_app = typer.Typer(no_args_is_help=True, help="Turn items into semantic IDs, and compare ways to do it.")
served_log_app = typer.Typer(no_args_is_help=True, help="What servers logged.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed against named peers.")
app.add_typer(data_app, name="data")
app.add_typer(tokenize_app, name="tokenize")
app.add_typer(served_log_app, name="served-log")
app.add_typer(bench_app, name="bench")
for _name, _group in {**groups(), "bundles": bundle_commands.group(), "items": item_commands.group()}.items():
    app.add_typer(_group, name=_name)

Data = Annotated[Path, typer.Option(help="Folder of house Parquet: items.parquet and, if any, interactions.parquet.")]
BundleFolder = Annotated[Path, typer.Option(help="Folder that `genretrieval run` wrote.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Cores to use; all by default.")]
LogKeyFile = Annotated[
    Path | None,
    typer.Option(help="Secret that hashes user ids in logs; else GENRETRIEVAL_LOG_KEY. Without, none are kept."),
]
HistoryStore = Annotated[
    str | None,
    typer.Option(
        envvar="GENRETRIEVAL_HISTORIES",  # as with the admin store
        help="Histories by user id: memory, or redis://HOST:PORT/DATABASE.",
    ),
]


def _writable(path: Path | None) -> Path | None:
    """Hours of work may lie between this and the figures."""
    from genretrieval.figures import check_writable

    if path is not None:
        check_writable(path)
    return path


def _ratio(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):  # with NaN every bundle would pass
        raise typer.BadParameter(f"{value} is no ratio; give 0 or more")
    return value


JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Also write the figures to this file.")
]


class SplitName(StrEnum):
    """Splits that can be evaluated."""

    validation = "validation"
    test = "test"


class Precision(StrEnum):
    """Precisions that a bundle can be exported in again."""

    int8 = "int8"


def main() -> None:
    """Run the command; an error of ours ends with its message and its exit code, without a traceback."""
    # Training's operators are short. Threads that wait for each other without spinning at all lose half the gain of a
    # second core; threads that spin as long as libgomp lets them slow a busy machine fivefold.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # ONNX Runtime tells its makers how it is used, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        app()
    except GenRetrievalError as error:
        _fail(error)
    except Exception as error:
        of_system = _system_error(error)
        if of_system is None:
            raise  # a fault of ours, which its traceback helps to find
        _fail(of_system)


def _fail(error: GenRetrievalError) -> NoReturn:
    Console(stderr=True).print(f"genretrieval: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


def _system_error(error: BaseException) -> GenRetrievalError | None:
    """What the machine denies, a full disk or a folder that may not be written to, as an error of ours."""
    if disk_is_full(error):
        return UnavailableError(
            f"the disk is full, or a quota: {error}; make room, or give other folders, and start again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return InvalidInputError(f"{error}; give another path, or the right to use this one")
    if isinstance(error, OSError) and error.strerror:
        return UnavailableError(str(error))
    return None


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing package into the name of the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; `pip install 'genretrieval[{name}]'` brings it"
        ) from error


def _recipe_file(recipe: str) -> Path:
    """A path, or the name of a recipe that ships with the package."""
    given = Path(recipe)
    if given.is_file():
        return given
    shipped = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]
    for folder in shipped:
        candidate = folder / given.with_suffix(".yaml").name
        if candidate.is_file():
            return candidate
    names = sorted({file.stem for folder in shipped for file in folder.glob("*.yaml")})
    raise RecipeError(f"no recipe at {recipe}; shipped recipes: {', '.join(names)}")


def _open_backend(graph: Path) -> Backend:
    from genretrieval_serving.backend import OnnxBackend

    return OnnxBackend(graph)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe, or the name of a shipped one (next_item, demo).")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Bundle to write.")],
    work: Annotated[
        Path | None, typer.Option(help="Intermediate results, reused on the next run. Default: OUTPUT.work")
    ] = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Logs to bundle: check, embed, tokenize, train, evaluate on validation beside baselines, export."""
    with _extra("train"):
        from genretrieval_pipelines.recipe import load_recipe
        from genretrieval_pipelines.run import run as run_recipe
        from genretrieval_pipelines.run import set_threads
    set_threads(threads)
    figures = run_recipe(
        load_recipe(_recipe_file(recipe)),
        data,
        output,
        work or output.with_name(output.name + ".work"),
        open_backend=_open_backend,
        console=Console(stderr=True),
    )
    _report_figures(figures, json_file)


@app.command()
def evaluate(
    bundle: BundleFolder,
    data: Annotated[Path | None, typer.Option(help="Logs; by default those that the bundle was trained on.")] = None,
    split: Annotated[
        SplitName, typer.Option(help="`test` is for the last look and is counted.")
    ] = SplitName.validation,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask a live server instead (grpc://HOST:PORT or http://HOST:PORT) and compare.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Quality of a bundle beside its baselines, item by item."""
    with _extra("train"):
        from genretrieval_pipelines import quality_report
        from genretrieval_pipelines.run import evaluate_bundle, work_folder
    from genretrieval.bundle import GRAPH, load_bundle
    from genretrieval.retrieval import Retriever

    opened = load_bundle(bundle)
    console = Console(stderr=True)
    answer: Callable[..., list[RetrieveResponse]] = Retriever(opened, _open_backend(opened.path / GRAPH)).retrieve
    agreement = None
    if endpoint:
        from genretrieval_pipelines.agreement import Agreement
        from genretrieval_serving.client import Client

        client = Client(endpoint, **client_options(endpoint))
        if (live := client.info().bundle_version) != opened.manifest.version:
            raise BundleError(f"{endpoint} serves bundle {live}, not {opened.manifest.version}; their answers differ")
        agreement = Agreement(offline=answer, live=client.batch_retrieve)
        answer = agreement
    report = evaluate_bundle(opened, data, split.value, answer, console)
    if agreement:
        report["extra"] = {**report["extra"], **agreement.figures()}
    figures = quality_report.write(report, work_folder(opened) / "quality")
    quality_report.print_table(report, console)
    _report_figures(figures, json_file)


@app.command()
def export(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option(help="Bundle to write.")],
    precision: Annotated[Precision, typer.Option(help="Of the new bundle's graph; int8 is for CPUs.")],
    data: Annotated[Path | None, typer.Option(help="Logs; by default those that the bundle was trained on.")] = None,
    min_recall_ratio: Annotated[
        float,
        typer.Option(
            callback=_ratio,
            help="Recall@10 on validation, over that of the bundle as it is, below which none is written.",
        ),
    ] = 0.99,
    json_file: JsonFile = None,
) -> None:
    """A bundle again with its graph in another precision, if it still finds what it found."""
    assert precision is Precision.int8
    with _extra("train"):
        from genretrieval_pipelines.int8 import export_int8
    figures = export_int8(
        bundle,
        output,
        data=data,
        min_recall_ratio=min_recall_ratio,
        open_backend=_open_backend,
        console=Console(stderr=True),
    )
    _report_figures(figures, json_file)


def _report_figures(figures: dict[str, Any], json_file: Path | None) -> None:
    from genretrieval.figures import print_lines, write_json

    print_lines(figures)
    if json_file:
        write_json(json_file, figures)


@data_app.command("synth")
def data_synth(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    items: Annotated[int | None, typer.Option(help="Items of the catalogue.")] = None,
    users: Annotated[int | None, typer.Option(help="Visitors.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Equal seeds give equal shops.")] = None,
) -> None:
    """Make a believable shop whose truth is known: catalogue, visitors, searches, pages, purchases."""
    with _extra("train"):
        from genretrieval_pipelines.synth import ShopConfig, synthesize
    given = {"n_items": items, "n_users": users, "seed": seed}
    print(synthesize(output, ShopConfig(**{name: value for name, value in given.items() if value is not None})))


@data_app.command("check")
def data_check(
    data: Annotated[Path, typer.Argument(help="Folder of house Parquet.")],
    output: Annotated[Path, typer.Option(help="Where the checked tables and the quarantine go.")],
) -> None:
    """Check logs: every problem with file, column, count and first rows; bad rows go to quarantine."""
    from genretrieval.logs import prepare_logs

    for line in prepare_logs(data, output).report.lines():
        print(line)


@tokenize_app.command("fit")
def tokenize_fit(
    recipe: Annotated[str, typer.Argument(help="Recipe whose embedding, tokenizer and collisions are used.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder to publish the semantic IDs in; must hold none yet.")],
    work: Annotated[Path | None, typer.Option(help="Checked logs and embeddings. Default: OUTPUT.work")] = None,
    threads: Threads = None,
) -> None:
    """Embed a shop's items, fit a tokenizer, publish an ID for every item, and report how good they are."""
    with _extra("train"):
        from genretrieval_pipelines.recipe import load_recipe
        from genretrieval_pipelines.run import set_threads
        from genretrieval_pipelines.shop import open_shop
        from genretrieval_pipelines.tokenize import fit_and_publish
    set_threads(threads)
    work = work or output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    print(fit_and_publish(load_recipe(_recipe_file(recipe)), open_shop(data, work, Console(stderr=True)), output, work))


@tokenize_app.command("append")
def tokenize_append(
    published: Annotated[Path, typer.Argument(help="Folder that `tokenize fit` wrote.")],
    data: Annotated[Path, typer.Option(help="Folder of house Parquet; items that have an ID already are passed over.")],
    work: Annotated[Path | None, typer.Option(help="Checked logs. Default: PUBLISHED.work")] = None,
    changes: Annotated[
        Path | None, typer.Option(help="Folder of `serve --catalogue-changes`: put what --bundle lacks there.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="With --changes: the bundle that is served.")] = None,
) -> None:
    """Give new items an ID; no published ID moves."""
    with _extra("train"):
        from genretrieval_pipelines.shop import open_shop
        from genretrieval_pipelines.tokenize import append_items, changes_of
    if (changes is None) != (bundle is None):
        raise InvalidInputError("--changes needs the --bundle that is served, to tell which items are new there")
    from genretrieval.bundle import load_bundle

    # First what could be refused after the IDs are appended.
    served = None if bundle is None else load_bundle(bundle)
    if changes is not None:
        changes.mkdir(parents=True, exist_ok=True)
    work = work or published.with_name(published.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    shop = open_shop(data, work, Console(stderr=True))
    for line in append_items(published, shop):
        print(line)
    if changes is not None and served is not None:
        from datetime import UTC, datetime

        from genretrieval.catalogue_changes import file_name

        file = changes_of(published, shop, served)
        if file is None:
            print("the bundle has all of them")
        else:
            path = changes / file_name(datetime.now(UTC), "append")
            file.write(path)
            print(f"{len(file.table):,} items that the bundle lacks are in {path}")


@tokenize_app.command("query")
def tokenize_query(
    published: Annotated[Path, typer.Argument(help="Folder that `tokenize fit` wrote.")],
    queries: Annotated[list[str], typer.Argument(help="What a visitor types; several in quotes.")],
) -> None:
    """The semantic IDs of queries, by the tokenizer of the items, and the items beside them."""
    with _extra("train"):
        from genretrieval_pipelines.tokenize import query_ids
    for query, (codes, items) in zip(queries, query_ids(published, queries), strict=True):
        print(f"{query}: {tuple(codes)} beside {', '.join(items) or 'no item'}")


@tokenize_app.command("encode")
def tokenize_encode(
    shards: Annotated[Path, typer.Argument(help="Folder of Parquet files with an id and an embedding column.")],
    output: Annotated[Path, typer.Option(help="Folder to publish the semantic IDs in; must hold none yet.")],
    recipe: Annotated[
        str, typer.Option(help="Recipe whose tokenizer is fitted, on a sample, and whose collisions are resolved.")
    ] = "next_item",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A codebooks.safetensors to encode with instead of fitting one.")
    ] = None,
    column: Annotated[str, typer.Option(help="Embedding column, a list of floats.")] = "embedding",
    id_column: Annotated[str, typer.Option(help="Item id column.")] = "item_id",
    sample: Annotated[int | None, typer.Option(help="Items that a tokenizer is fitted on; 262,144 by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the sample; 0 by default.")] = None,
) -> None:
    """Ready embeddings of any number of items to semantic IDs: fit on a sample, encode as a stream."""
    with _extra("train"):
        from genretrieval_pipelines.recipe import load_recipe
        from genretrieval_pipelines.tokenize import encode_stream
    encode_stream(
        shards,
        output,
        load_recipe(_recipe_file(recipe)),
        codebooks=tokenizer,
        column=column,
        id_column=id_column,
        sample=sample,
        seed=seed,
        console=Console(stderr=True),
    )


@tokenize_app.command("report")
def tokenize_report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Tokenizers of the recipe; their references come along.")
    ] = None,
    *,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for comparison.md, comparison.json and the plots.")],
    recipe: Annotated[str, typer.Option(help="Path of a comparison recipe, or the name of a shipped one.")] = (
        "tokenizers"
    ),
    work: Annotated[
        Path | None, typer.Option(help="Every finished cell, reused on the next run. Default: OUTPUT.work")
    ] = None,
    downstream: Annotated[
        bool, typer.Option(help="Also train a generator on the IDs of each tokenizer, for every seed: hours.")
    ] = False,
    split: Annotated[SplitName, typer.Option(help="`test` is for the last look.")] = SplitName.validation,
    generator: Annotated[
        str | None,
        typer.Option(help="With --downstream, a run recipe to train with instead of the small one, e.g. next_item."),
    ] = None,
    sasrec: Annotated[bool, typer.Option(help="With --downstream, train the SASRec baseline too.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells computed at a time, each on one core.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Fit tokenizers and put their diagnostics side by side; on request, what a generator makes of their IDs."""
    with _extra("train"):
        from genretrieval_pipelines.compare_tokenizers import Grid, compare
        from genretrieval_pipelines.recipe import ComparisonRecipe, load_recipe, read_recipe
    wanted = read_recipe(_recipe_file(recipe), ComparisonRecipe).only(names or [])
    if generator and not downstream:
        raise InvalidInputError(
            "--generator says what to train on the IDs, and without --downstream nothing is trained"
        )
    if generator:
        wanted = wanted.with_generator(load_recipe(_recipe_file(generator)))
    grid = Grid(wanted, data, work or output.with_name(output.name + ".work"))
    console = Console(stderr=True)
    figures = compare(grid, output, downstream=downstream, split=split.value, sasrec=sasrec, jobs=jobs, console=console)
    _report_figures(figures, json_file)


@app.command("import")
def import_(
    source_format: Annotated[str, typer.Argument(metavar="FORMAT", help="served, house, amazon-2014 or kuaisearch.")],
    source: Annotated[Path, typer.Argument(help="Folder of the files as released, or of `serve --log-folder`.")],
    output: Annotated[Path, typer.Argument(help="Folder of house Parquet to write.")],
    merge: Annotated[
        Path | None, typer.Option(help="Of served: house logs of the time before, which are completed by them.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Of served, without --merge: the bundle whose catalogue are the items.")
    ] = None,
    log_key_file: LogKeyFile = None,
) -> None:
    """Convert a public format, or what servers logged, to house Parquet."""
    with _extra("train"):
        from genretrieval_pipelines.importers import SERVED_LOGS, import_logs
        from genretrieval_pipelines.importers.served import ServedOptions
    from genretrieval.served_logs import UserKeys

    served = None
    if source_format == SERVED_LOGS:
        # The key is in the environment for other uses, too.
        served = ServedOptions(bundle, merge, UserKeys.load(log_key_file) if merge or log_key_file else None)
    elif merge or bundle or log_key_file:
        raise InvalidInputError(f"--merge, --bundle and --log-key-file are for {SERVED_LOGS}; leave them out")
    for line in import_logs(source_format, source, output, served).lines():
        print(line)


@served_log_app.command("forget")
def served_log_forget(
    user_id: Annotated[str, typer.Argument(help="As requests and events had it.")],
    log_folder: Annotated[Path, typer.Option(help="Of `serve --log-folder`.")],
    log_key_file: LogKeyFile = None,
    histories: HistoryStore = None,
    wait: Annotated[
        bool, typer.Option(help="Stay until running servers have written what they hold, and look again.")
    ] = True,
) -> None:
    """Remove a user from served logs and from stored histories; logs imported before and trained models stay."""
    with _extra("serve"):
        from genretrieval_serving.served_log import forget
    from genretrieval.served_logs import UserKeys

    keys = UserKeys.load(log_key_file)
    if keys is None:
        raise InvalidInputError(
            "without the key of the logs no user is found in them: give --log-key-file or set GENRETRIEVAL_LOG_KEY"
        )
    for line in forget(user_id, log_folder, keys, histories, wait=wait):
        print(line)


@app.command()
def serve(
    bundle: Annotated[Path | None, typer.Option(help="Folder that `genretrieval run` wrote.")] = None,
    bundles: Annotated[
        Path | None, typer.Option(help="In place of --bundle: folder of bundles, of which --alias says the one.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="Of the admin store; where it moves, this server follows, see `bundles`.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback needs API keys, or --insecure.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="REST; 0 takes a free port.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="gRPC; 0 takes a free port.")] = 8081,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores a request may use; by default the CPU quota.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda needs the extra `serve-gpu`.")] = "cpu",
    max_wait: Annotated[
        float, typer.Option(help="Seconds; a request that would wait longer is refused at once, not answered too late.")
    ] = 0.25,
    max_batch: Annotated[int, typer.Option(help="Rows run together, at most 32; a usual request is one.")] = 8,
    rate_limit: Annotated[
        str | None, typer.Option(help="Requests that each caller may make, e.g. 100/second; each of a batch counts.")
    ] = None,
    drain_delay: Annotated[
        float, typer.Option(help="Seconds between a failing /readyz and closed ports, for load balancers to notice.")
    ] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="Seconds that accepted requests get to finish.")] = 20.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    quiet: Annotated[bool, typer.Option(help="Log no line for each request.")] = False,
    insecure: Annotated[bool, typer.Option(help="Listen beyond loopback without authentication.")] = False,
    admin_store: Annotated[
        str | None,
        typer.Option(
            envvar="GENRETRIEVAL_ADMIN_STORE",  # other users of a machine read what is typed, not the environment
            help="sqlite:///FILE or postgresql://...: opens the admin API, and keeps its state.",
        ),
    ] = None,
    admin_port: Annotated[int, typer.Option(help="Admin API; 0 takes a free port.")] = 8082,
    auth: Annotated[
        bool,
        typer.Option(help="Require API keys, also while the admin store has none; once it has, they are required."),
    ] = False,
    admin_notify: Annotated[
        bool, typer.Option(help="Let PostgreSQL tell servers of changes; without, they are found a little later.")
    ] = True,
    slot_quarantine: Annotated[
        float, typer.Option(help="Seconds that a slot which a keyword gave up rests before another may have it.")
    ] = 3600.0,
    allow_unbound: Annotated[
        bool, typer.Option(help="Leave out bindings and rules that cannot hold on the bundle instead of refusing it.")
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain in PEM, read again when it changes; needs --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of --tls-cert, without a passphrase.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of these authorities.")
    ] = None,
    probe_port: Annotated[
        int | None, typer.Option(help="Probes and metrics here alone, in plain HTTP; 0 takes a free port.")
    ] = None,
    jwt_issuer: Annotated[
        str | None, typer.Option(help="Take this issuer's tokens beside API keys; needs an audience and a JWKS.")
    ] = None,
    jwt_audience: Annotated[str | None, typer.Option(help="Audience that tokens must have.")] = None,
    jwt_jwks_url: Annotated[str | None, typer.Option(help="Where the issuer publishes its keys: https://...")] = None,
    jwt_jwks_file: Annotated[Path | None, typer.Option(help="The same as a file.")] = None,
    jwt_scope_claim: Annotated[str, typer.Option(help="Claim that holds the scopes of a token.")] = "scope",
    trace_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_ENDPOINT",  # as OpenTelemetry names it
            help="Send traces to an OpenTelemetry collector: http://HOST:4318; extra `otel`.",
        ),
    ] = None,
    histories: HistoryStore = None,
    log_folder: Annotated[
        Path | None, typer.Option(help="Log answers, and events of POST /v1/events, as Parquet in this folder.")
    ] = None,
    log_sample: Annotated[float, typer.Option(help="Share of users whose answers are logged.")] = 1.0,
    log_key_file: LogKeyFile = None,
    log_retention_days: Annotated[
        int, typer.Option(help="Remove logs that are older; 0 keeps them until you remove them.")
    ] = 90,
    catalogue_changes: Annotated[
        Path | None,
        typer.Option(help="Folder of changes of the catalogue, applied as they come; needed to change `items`."),
    ] = None,
) -> None:
    """Serve a bundle by gRPC and REST until SIGTERM."""
    with _extra("serve"):
        from genretrieval_serving.admin.tokens import JwtSettings
        from genretrieval_serving.app import serve as serve_bundle
        from genretrieval_serving.served_log import LogSettings
        from genretrieval_serving.tls import TlsSettings
    from genretrieval.served_logs import UserKeys

    if log_folder is None and log_key_file is not None:
        raise InvalidInputError("--log-key-file is for served logs, and without --log-folder there are none; give both")
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise InvalidInputError("TLS needs --tls-cert and --tls-key, also for --tls-client-ca; give both")
    if (jwt_issuer is None) != (jwt_audience is None) or (jwt_issuer is None and (jwt_jwks_url or jwt_jwks_file)):
        raise InvalidInputError("tokens need --jwt-issuer, --jwt-audience, and a JWKS as URL or file; give all three")
    serve_bundle(
        bundle,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        bundles=bundles,
        alias=alias,
        threads=threads,
        device=device,
        max_wait=max_wait,
        max_batch=max_batch,
        drain_delay=drain_delay,
        drain_seconds=drain_seconds,
        log_level=log_level,
        quiet=quiet,
        insecure=insecure,
        auth=auth,
        admin_port=admin_port,
        admin_store=admin_store,
        notify=admin_notify,
        slot_quarantine=slot_quarantine,
        allow_unbound=allow_unbound,
        tls=None if tls_cert is None or tls_key is None else TlsSettings(tls_cert, tls_key, tls_client_ca),
        jwt=None
        if jwt_issuer is None or jwt_audience is None
        else JwtSettings(jwt_issuer, jwt_audience, jwt_jwks_url, jwt_jwks_file, jwt_scope_claim),
        probe_port=probe_port,
        trace_endpoint=trace_endpoint,
        histories=histories,
        served_log=None
        if log_folder is None
        else LogSettings(log_folder, log_sample, log_retention_days or None, UserKeys.load(log_key_file)),
        catalogue_changes=catalogue_changes,
        rate_limit=rate_limit,
    )


@app.command()
def retrieve(
    endpoint: Annotated[
        str, typer.Option(help="grpc://HOST:PORT or http://HOST:PORT; grpcs, https.")
    ] = "grpc://127.0.0.1:8081",
    query: Annotated[str | None, typer.Option(help="What the visitor typed.")] = None,
    history: Annotated[list[str] | None, typer.Option(help="Item id, oldest first; repeat.")] = None,
    event: Annotated[str, typer.Option(help="Behaviour of the history's items.")] = "purchase",
    top_k: Annotated[int, typer.Option(help="Items wanted.")] = 10,
    exclude: Annotated[list[str] | None, typer.Option(help="Item id that must not come back; repeat.")] = None,
) -> None:
    """Ask a server, with the API key or token in GENRETRIEVAL_API_KEY if there is one; prints the response as JSON."""
    with _extra("client"):
        from genretrieval_serving.client import Client
    from genretrieval.request import HistoryEvent, RetrieveRequest

    request = RetrieveRequest(
        query=query,
        history=[HistoryEvent(item_id=item, event=event) for item in history or []],
        exclude_item_ids=exclude or [],
        top_k=top_k,
    )
    with Client(endpoint, **client_options(endpoint)) as client:
        print(client.retrieve(request).model_dump_json(indent=2))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the shop, the bundle and intermediate results go.")] = Path(
        "runs/demo"
    ),
    once: Annotated[bool, typer.Option(help="Stop after the answers instead of serving until Ctrl-C.")] = False,
) -> None:
    """A made shop from logs to answers: make, train, export, serve, ask."""
    with _extra("train"):
        from genretrieval_pipelines.demo import build_demo
    with _extra("serve"):
        from genretrieval_serving.demo import show_demo
    from genretrieval.bundle import load_bundle

    figures, requests = build_demo(folder, _recipe_file("demo"), _open_backend, Console(stderr=True))
    _report_figures(figures, None)
    command = [sys.executable, "-m", "genretrieval.cli"]
    show_demo(load_bundle(folder / "bundle"), requests, command, Console(), once=once)


@bench_app.command("decode")
def bench_decode(
    items: Annotated[list[int] | None, typer.Option(help="Catalogue sizes; repeat.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; more give tighter medians.")] = 15,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle for row B; by default the shipped sizes, untrained.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few rounds of the smallest sizes; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Constrained beam search in one graph against Hugging Face `generate`, interleaved in one process."""
    with _extra("train"):
        from genretrieval_pipelines.bench_decode import bench_decode as bench
    sizes = tuple(items) if items else ((12_000,) if quick else (12_000, 1_000_000))
    _report_figures(bench(sizes, rounds=2 if quick else rounds, bundle=bundle, quick=quick), json_file)


@bench_app.command("int8")
def bench_int8(
    widths: Annotated[list[int] | None, typer.Option(help="Widths of models; repeat.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; more give tighter medians.")] = 25,
    json_file: JsonFile = None,
) -> None:
    """A graph in int8 over the same in float32, by the width of the model, on one thread."""
    with _extra("train"):
        from genretrieval_pipelines.bench_int8 import bench_int8 as bench
    with _extra("serve"):
        from genretrieval_serving.backend import OnnxBackend
    sizes = widths or [64, 128, 256, 512, 768]
    figures = bench(sizes, rounds, lambda graph: OnnxBackend(graph, threads=1), Console(stderr=True))
    _report_figures(figures, json_file)


@bench_app.command("scale")
def bench_scale(
    items: Annotated[list[int] | None, typer.Option(help="Catalogue sizes; repeat.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; more give tighter medians.")] = 200,
    quick: Annotated[bool, typer.Option(help="A few rounds of small sizes; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Catalogues of 10 thousand to 10 million items: latency, memory, rebuild, filters and exclusions."""
    with _extra("train"):
        from genretrieval_pipelines.bench_scale import bench_scale as bench
    with _extra("serve"):
        from genretrieval_serving.backend import OnnxBackend
    sizes = items or ([2_000, 20_000] if quick else [10_000, 100_000, 1_000_000, 10_000_000])
    rounds = 3 if quick else rounds
    _report_figures(bench(sizes, rounds, lambda graph: OnnxBackend(graph, threads=1), Console(stderr=True)), json_file)


@bench_app.command("train")
def bench_train(
    data: Annotated[Path | None, typer.Option(help="A shop's logs; without, a shop is made.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny model and shop; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Training against Hugging Face `Trainer` around an equal T5, interleaved, and what both have learnt."""
    with _extra("train"):
        from genretrieval_pipelines.bench_train import QUICK
        from genretrieval_pipelines.bench_train import bench_train as bench
    _report_figures(bench(data, QUICK if quick else None), json_file)


@bench_app.command("tokenize")
def bench_tokenize(
    items: Annotated[int, typer.Option(help="Items to encode.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; more give tighter medians.")] = 7,
    quick: Annotated[bool, typer.Option(help="A few rounds of a small size; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Encoding against faiss `ResidualQuantizer`, interleaved in one process, with the errors of both."""
    with _extra("train"):
        from genretrieval_pipelines.bench_tokenize import bench_tokenize as bench
    _report_figures(bench(items, rounds=rounds, quick=quick), json_file)


@bench_app.command("tokenize-scale")
def bench_tokenize_scale(
    folder: Annotated[Path, typer.Option(help="Where the made shards and the IDs go; 10 M items take 8 GB.")],
    items: Annotated[int, typer.Option(help="Items to make and encode.")] = 10_000_000,
    json_file: JsonFile = None,
) -> None:
    """Parquet shards of float16 embeddings to published IDs: minutes and peak memory."""
    with _extra("train"):
        from genretrieval_pipelines.bench_tokenize_scale import bench_tokenize_scale as bench
    _report_figures(bench(items, folder=folder), json_file)


@bench_app.command("fusion")
def bench_fusion(
    data: Data,
    work: Annotated[Path, typer.Option(help="Checked logs and embeddings.")],
    json_file: JsonFile = None,
) -> None:
    """Item representations of a ranking model, cold items apart: ID, SID, both, and SMILE's fusion of them."""
    with _extra("train"):
        from genretrieval_pipelines.bench_fusion import bench_fusion as bench
    _report_figures(bench(data, work), json_file)


@bench_app.command("intervention")
def bench_intervention(
    data: Data,
    work: Annotated[Path, typer.Option(help="Models and intermediate results, found again on the next run.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe whose tokenizer is keyword_aligned; path, or the name of a shipped one.")
    ] = "keyword_aligned",
    words: Annotated[int | None, typer.Option(help="Words held out, at most; 650 by default.")] = None,
    most_items: Annotated[
        float | None, typer.Option(help="Most items of a word, as a share of the catalogue; 0.005 by default.")
    ] = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Words that training never saw, bound while the model is served: how many are found, beside closed codebooks."""
    with _extra("train"):
        from genretrieval_pipelines.bench_intervention import InterventionConfig
        from genretrieval_pipelines.bench_intervention import bench_intervention as bench
        from genretrieval_pipelines.recipe import load_recipe
        from genretrieval_pipelines.run import set_threads
    with _extra("serve"):
        from genretrieval_serving.live_server import BoundServer, bound_server
    set_threads(threads)
    given: dict[str, Any] = {"n_words": words, "max_share": most_items}

    def serve_live(bundle: Path) -> AbstractContextManager[BoundServer]:
        for old in work.glob("admin.db*"):
            old.unlink()
        return bound_server(bundle, [sys.executable, "-m", "genretrieval.cli"], f"sqlite:///{work / 'admin.db'}")

    figures = bench(
        load_recipe(_recipe_file(recipe)),
        data,
        work,
        open_backend=_open_backend,
        serve_live=serve_live,
        console=Console(stderr=True),
        config=InterventionConfig(**{name: value for name, value in given.items() if value is not None}),
    )
    _report_figures(figures, json_file)


@bench_app.command("loop")
def bench_loop(
    folder: Annotated[Path, typer.Option(help="Where the shop, the logs and the bundles go; found again.")],
    recipe: Annotated[str, typer.Option(help="Of both bundles; path, or the name of a shipped one.")] = "demo",
    epochs: Annotated[int, typer.Option(help="Passes over the training histories, in place of the recipe's.")] = 3,
    items: Annotated[int | None, typer.Option(help="Items of the made shop; the demo's by default.")] = None,
    users: Annotated[int | None, typer.Option(help="Its visitors.")] = None,
    old_policy: Annotated[
        bool, typer.Option(help="Train also on what the shop itself logged of the same visits.")
    ] = True,
    seeds: Annotated[int, typer.Option(help="Trainings of each bundle.")] = 1,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Serve a made shop, train again on what its visitors did with what they saw: is the second bundle better?"""
    from dataclasses import replace

    with _extra("train"):
        from genretrieval_pipelines.bench_loop import LoopConfig
        from genretrieval_pipelines.bench_loop import bench_loop as bench
        from genretrieval_pipelines.recipe import load_recipe
        from genretrieval_pipelines.run import set_threads
        from genretrieval_pipelines.synth import ShopConfig
    with _extra("serve"):
        from genretrieval_serving.live_server import VisitedServer, visited_server
    from genretrieval.served_logs import UserKeys

    set_threads(threads)
    size = {name: value for name, value in {"n_items": items, "n_users": users}.items() if value is not None}
    loaded = load_recipe(_recipe_file(recipe))
    loaded = loaded.model_copy(update={"training": replace(loaded.training, epochs=epochs)})

    def serve_logged(bundle: Path, logs: Path, keys: UserKeys) -> AbstractContextManager[VisitedServer]:
        return visited_server(bundle, [sys.executable, "-m", "genretrieval.cli"], logs, keys)

    folder.mkdir(parents=True, exist_ok=True)
    figures = bench(
        loaded,
        folder,
        open_backend=_open_backend,
        serve_logged=serve_logged,
        console=Console(stderr=True),
        config=LoopConfig(ShopConfig(**size), old_policy=old_policy, seeds=seeds),
    )
    _report_figures(figures, json_file)


@bench_app.command("bind")
def bench_bind(
    folder: Annotated[Path, typer.Option(help="Where the random bundle goes; a million items take 60 MB.")],
    store: Annotated[
        str | None, typer.Option(help="URL of an empty admin store; by default a SQLite file in FOLDER.")
    ] = None,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 1_000_000,
    replicas: Annotated[int, typer.Option(help="Servers on the store.")] = 4,
    bindings: Annotated[int, typer.Option(help="Words that are bound, one after another.")] = 200,
    quick: Annotated[bool, typer.Option(help="Few items and words; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """How long after a word is bound it is retrieved, on the same server and on all, under reads and without NOTIFY."""
    with _extra("train"):
        from genretrieval_pipelines.random_bundle import write_random_bundle
    with _extra("serve"):
        from genretrieval_serving.bench_bind import BindConfig
        from genretrieval_serving.bench_bind import bench_bind as bench
    items, replicas, bindings = (10_000, 2, 10) if quick else (items, replicas, bindings)
    bundle = folder / f"random-{items}"
    if not bundle.exists():
        write_random_bundle(bundle, items)
    if store is None:
        for old in folder.glob("bind.db*"):
            old.unlink()
        store = f"sqlite:///{(folder / 'bind.db').resolve()}"
    command = [sys.executable, "-m", "genretrieval.cli"]
    _report_figures(bench(bundle, command, store, Console(stderr=True), BindConfig(replicas, bindings)), json_file)


@bench_app.command("catalogue")
def bench_catalogue(
    folder: Annotated[Path, typer.Option(help="Where the random bundle and the changes go.")],
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 20,
    quick: Annotated[bool, typer.Option(help="Few items and rounds; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """What a change of the catalogue takes: in memory beside opening it anew, and until two servers answer from it."""
    with _extra("train"):
        from genretrieval_pipelines.random_bundle import write_random_bundle
    with _extra("serve"):
        from genretrieval_serving.bench_catalogue import bench_catalogue as bench
    items, rounds = (10_000, 3) if quick else (items, rounds)
    bundle = folder / f"random-{items}"
    if not bundle.exists():
        write_random_bundle(bundle, items)
    command = [sys.executable, "-m", "genretrieval.cli"]
    _report_figures(bench(bundle, command, _open_backend, Console(stderr=True), rounds), json_file)


@bench_app.command("overload")
def bench_overload(
    folder: Annotated[Path, typer.Option(help="Where a random bundle and the server's log go.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle to serve; by default the random one.")] = None,
    items: Annotated[int, typer.Option(help="Items of the random bundle.")] = 100_000,
    seconds: Annotated[float, typer.Option(help="Of each load: 80 % of the capacity, threefold, 80 % again.")] = 60.0,
    max_batch: Annotated[int, typer.Option(help="Rows of a batch, of the server.")] = 8,
    quick: Annotated[bool, typer.Option(help="Few items and two seconds a load; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Three times what a server can carry: who is refused and how soon, how long the others wait, and recovery."""
    with _extra("train"):
        from genretrieval_pipelines.random_bundle import write_random_bundle
    with _extra("serve"):
        from genretrieval_serving.bench_overload import QUICK, OverloadConfig
        from genretrieval_serving.bench_overload import bench_overload as bench
    items = 2_000 if quick else items
    if bundle is None:
        bundle = folder / f"random-{items}"
        if not bundle.exists():
            # The shape that is trained by default.
            write_random_bundle(bundle, items, "4x256", d_model=128, beam_width=50)
    config = QUICK if quick else OverloadConfig(seconds=seconds, max_batch=max_batch)
    command = [sys.executable, "-m", "genretrieval.cli"]
    _report_figures(bench(bundle, command, Console(stderr=True), config), json_file)


@bench_app.command("swap")
def bench_swap(
    folder: Annotated[Path, typer.Option(help="Where two random bundles, the admin store and the log go.")],
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 100_000,
    swaps: Annotated[int, typer.Option(help="How often the bundle changes, to the other one and back.")] = 6,
    seconds: Annotated[float, typer.Option(help="That callers ask before and after each swap.")] = 8.0,
    quick: Annotated[bool, typer.Option(help="Few items and two swaps; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Another bundle takes over under load: requests that fail, and p99 before, while and after it does."""
    with _extra("train"):
        from genretrieval_pipelines.random_bundle import write_random_bundle
    with _extra("serve"):
        from genretrieval_serving.bench_swap import bench_swap as bench
        from genretrieval_serving.faults.swaps import SwapConfig
    items, swaps, seconds = (2_000, 2, 1.0) if quick else (items, swaps, seconds)
    bundles = folder / f"bundles-{items}"
    names = ("one", "two")
    for seed, name in enumerate(names):
        if not (bundles / name).exists():
            write_random_bundle(bundles / name, items, seed=seed)
    command = [sys.executable, "-m", "genretrieval.cli"]
    config = SwapConfig(swaps=swaps, seconds=seconds)
    _report_figures(bench(bundles, names, command, folder, Console(stderr=True), config), json_file)


@bench_app.command("faults")
def bench_faults(
    names: Annotated[list[str] | None, typer.Argument(help="Faults to cause; all by default.")] = None,
    folder: Annotated[Path, typer.Option(help="Where bundles, stores and logs go.")] = Path("runs/faults"),
    quick: Annotated[bool, typer.Option(help="A twentieth of the lengths and numbers; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Kill, starve, fill, corrupt and flood on purpose, and count what callers notice; exit 1 if anything is lost."""
    with _extra("train"):
        from genretrieval_pipelines.random_bundle import write_random_bundle
    with _extra("serve"):
        from genretrieval_serving.bench_faults import bench_faults as bench
        from genretrieval_serving.faults.serving import Ground
    bundle, other = folder / "bundles" / "first", folder / "bundles" / "second"
    for seed, path in enumerate((bundle, other)):
        if not path.exists():
            write_random_bundle(path, 10_000, seed=seed)
    ground = Ground(bundle, other, folder, [sys.executable, "-m", "genretrieval.cli"], share=0.05 if quick else 1.0)
    console = Console(stderr=True)
    figures, problems = bench(ground, console, names or [])
    _report_figures(figures, json_file)
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False)
    if problems:
        sys.exit(1)


@bench_app.command("serve")
def bench_serve(
    folder: Annotated[Path, typer.Option(help="Where the model goes, once as a bundle and once for the peer.")],
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; more give tighter medians.")] = 5,
    quick: Annotated[bool, typer.Option(help="A tiny model, seconds of load, without wrk; for a smoke test.")] = False,
    json_file: JsonFile = None,
) -> None:
    """The server against a FastAPI app around Hugging Face `generate`, and against its own bare graph."""
    from dataclasses import replace

    with _extra("train"):
        from genretrieval_pipelines.hf_server import BUNDLE, write_pair
    with _extra("serve"):
        from genretrieval_serving.bench_serve import QUICK, ServeConfig
        from genretrieval_serving.bench_serve import bench_serve as bench
    items = 1000 if quick else items
    pair = folder / f"t5-{items}"
    if not (pair / BUNDLE).exists():
        write_pair(pair, items, small=quick)
    command = [sys.executable, "-m", "genretrieval.cli"]
    peer = [sys.executable, "-m", "genretrieval_pipelines.hf_server", str(pair)]
    config = QUICK if quick else replace(ServeConfig(), rounds=rounds)
    _report_figures(bench(pair / BUNDLE, command, peer, Console(stderr=True), config), json_file)


@app.command()
def doctor(
    bundle: Annotated[Path | None, typer.Option(help="Also check a bundle, and how long it takes to answer.")] = None,
    admin_store: Annotated[
        str | None, typer.Option(envvar="GENRETRIEVAL_ADMIN_STORE", help="Also check an admin store.")
    ] = None,
    histories: HistoryStore = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores that a request may use.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Also check certificates.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of --tls-cert.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Authorities of clients.")] = None,
) -> None:
    """What is installed, what it can run, and whether a server would with what it is given; 1 if something fails."""
    from genretrieval.doctor import examine

    failed = False
    for check in examine():
        print(check)
        failed |= check.state == "fail"
    given = (bundle, admin_store, histories, tls_cert)
    if util.find_spec("uvicorn") is not None or any(given):
        with _extra("serve"):
            from genretrieval_serving.doctor import examine_server
        if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
            raise InvalidInputError("TLS needs --tls-cert and --tls-key, also for --tls-client-ca; give both")
        tls = None if tls_cert is None or tls_key is None else (tls_cert, tls_key, tls_client_ca)
        for check in examine_server(
            threads=threads, bundle=bundle, admin_store=admin_store, histories=histories, tls=tls
        ):
            print(check)
            failed |= check.state == "fail"
    if failed:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


if __name__ == "__main__":
    main()
