"""Whether a server could run here with what it would be given: machine, bundle, stores, certificates."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import onnxruntime as ort
from cryptography import x509

from genretrieval.bundle import read_manifest
from genretrieval.doctor import Check
from genretrieval.errors import GenRetrievalError, InvalidInputError
from genretrieval.request import RetrieveRequest
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.backend import usable_cpus
from genretrieval_serving.bundle_folder import open_retriever, warm_up
from genretrieval_serving.history import open_histories
from genretrieval_serving.tls import TlsSettings

# A connection takes one, and as many may wait to be taken as the ports' backlog.
ENOUGH_FILES = 4096
EXPIRES_SOON = timedelta(days=30)
# Clocks that differ more make windows of rules begin and end at different times; beyond the second, tokens fail too.
SKEW_WARNS, SKEW_FAILS = timedelta(seconds=2), timedelta(seconds=30)
_ASKED = 7


def examine_server(
    *,
    threads: int | None = None,
    bundle: Path | None = None,
    admin_store: str | None = None,
    histories: str | None = None,
    tls: tuple[Path, Path, Path | None] | None = None,
) -> Iterator[Check]:
    """Look at the machine and at all that is given, one after another; nothing is changed.

    Args:
        threads: as for `genretrieval_serving.app.serve`, like all others.
        bundle: its files are hashed, and it answers requests.
        admin_store: its tables are left as they are.
        histories: one that nobody has is asked for.
        tls: certificate, key, and authorities of clients.
    """
    yield from _machine(threads)
    parts = [
        ("bundle", None if bundle is None else _bundle(bundle, threads)),
        ("admin store", None if admin_store is None else _admin_store(admin_store)),
        ("histories", None if histories is None else _histories(histories)),
        ("TLS", None if tls is None else _tls(*tls)),
    ]
    for about, checks in parts:
        try:
            yield from checks or ()
        except GenRetrievalError as error:
            yield Check("fail", about, str(error))


def _machine(threads: int | None) -> Iterator[Check]:
    cpus = usable_cpus()
    if threads is not None and threads > cpus:
        yield Check("warn", "cpu", f"{threads} threads on {cpus} CPUs wait for each other; take no more than {cpus}")
    else:
        yield Check("ok", "cpu", f"{threads or cpus} threads, {cpus} of {os.cpu_count()} CPUs usable")
    try:
        import resource
    except ModuleNotFoundError:  # no such limits on this system
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < ENOUGH_FILES:
        remedy = f"each connection takes one; raise it to {ENOUGH_FILES} (`ulimit -n`, LimitNOFILE)"
        yield Check("warn", "open files", f"at most {files}: {remedy}")
    else:
        yield Check("ok", "open files", "no limit" if files < 0 else f"at most {files}")


def _bundle(path: Path, threads: int | None) -> Iterator[Check]:
    manifest = read_manifest(path)
    about = f"opset {manifest.opset}, onnxruntime {manifest.minimum_onnxruntime} or newer; here {ort.__version__}"
    yield Check("ok", "bundle", f"{manifest.version}, {manifest.n_items} items, {about}")
    begun = time.perf_counter()
    retriever = open_retriever(path, threads)
    yield Check("ok", "bundle files", f"as they were written; opened in {time.perf_counter() - begun:.2f} s")
    warm_up(retriever, 1)
    taken = []
    for _ in range(_ASKED):
        begun = time.perf_counter()
        retriever.retrieve([RetrieveRequest()])
        taken.append((time.perf_counter() - begun) * 1e3)
    yield Check("ok", "bundle request", f"{statistics.median(taken):.1f} ms (median of {_ASKED}, an empty request)")


def _admin_store(url: str) -> Iterator[Check]:
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        yield Check("warn", "admin store", "there is no such file; the first server makes it")
        return
    with closing(SqlStore.open(url, migrate=False)) as store:
        begun = time.perf_counter()
        found, newest = store.schema(), max(store.known_schemas())
        reached = f"answers in {(time.perf_counter() - begun) * 1e3:.1f} ms"
        if found is None:
            yield Check("warn", "admin store", f"{reached}, and has no tables; the first server makes them")
            return
        if found == newest:
            yield Check("ok", "admin store", f"{reached}; tables of version {found}")
        elif found < newest:
            remedy = f"a server of this release brings them to {newest} when it starts"
            yield Check("warn", "admin store", f"{reached}; tables of version {found}, {remedy}")
        else:
            remedy = "a newer release made them; update this one soon"
            yield Check("warn", "admin store", f"{reached}; tables of version {found}, newer than {newest}: {remedy}")
        counts = store.slot_counts()
        slots = f"{counts.free} free, {counts.bound} bound, {counts.quarantined} resting"
        if counts.bound and not counts.free:
            yield Check("warn", "keyword slots", f"{slots}: the next word is refused; unbind one, or wait for a rest")
        else:
            yield Check("ok", "keyword slots", slots)
        yield _skew(store.time() - datetime.now(UTC))


def _skew(ahead: timedelta) -> Check:
    found = f"{ahead.total_seconds():+.2f} s, the admin store's against this machine's"
    if abs(ahead) <= SKEW_WARNS:
        return Check("ok", "clock", found)
    remedy = "synchronise both (NTP), or rules and keys begin and end at the wrong time"
    return Check("fail" if abs(ahead) > SKEW_FAILS else "warn", "clock", f"{found}; {remedy}")


def _histories(url: str) -> Iterator[Check]:
    async def ask() -> float:
        provider = open_histories(url)
        try:
            await provider.get("genretrieval-doctor")  # the first also connects
            begun = time.perf_counter()
            await provider.get("genretrieval-doctor")
            return time.perf_counter() - begun
        finally:
            await provider.close()

    yield Check("ok", "histories", f"answered in {asyncio.run(ask()) * 1e3:.1f} ms")


def _tls(cert: Path, key: Path, client_ca: Path | None) -> Iterator[Check]:
    settings = TlsSettings(cert, key, client_ca)
    now = datetime.now(UTC)
    for file in (settings.cert, settings.client_ca):
        if file is None:
            continue
        try:
            chain = x509.load_pem_x509_certificates(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{file} cannot be read: {error}") from error
        ends = min(each.not_valid_after_utc for each in chain)
        begins = max(each.not_valid_before_utc for each in chain)
        about = f"{file.name}, valid until {ends:%Y-%m-%d %H:%M} UTC"
        if ends <= now or begins > now:
            yield Check("fail", "TLS", f"{about}, from {begins:%Y-%m-%d %H:%M}: not now; put another one in its place")
        elif ends - now < EXPIRES_SOON:
            yield Check("warn", "TLS", f"{about}: renew it; a running server takes the new one over")
        else:
            yield Check("ok", "TLS", about)
