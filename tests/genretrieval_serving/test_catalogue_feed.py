"""A folder of changes and the servers on it: order, refusals, restarts, one state for one request."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from structlog.testing import capture_logs

from genretrieval.bundle import Bundle
from genretrieval.catalogue_changes import ChangeChecker, ChangesFile, file_name
from genretrieval.errors import (
    DataError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval.servable import Catalogue
from genretrieval_serving import catalogue_feed
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.catalogue_feed import CatalogueFeed, compact
from genretrieval_serving.client import Client
from genretrieval_serving.deployment import Arm, Deployment
from genretrieval_serving.live_server import running_server
from genretrieval_serving.observability import Metrics

NEW = [7, 7, 7]
NOW = "20260102T030405"


def put(folder: Path, name: str, *, old: bool = False, **columns: Any) -> Path:
    """A file of changes as another program would write it."""
    path = folder / f"{name}.parquet"
    types = {"semantic_id": pl.List(pl.Int32())}
    table = pl.DataFrame([pl.Series(column, values, types.get(column)) for column, values in columns.items()])
    table.write_parquet(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    if old:
        age(path)
    return path


def age(path: Path, days: float = 2) -> None:
    """As if it had been written some days ago."""
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "changes"
    path.mkdir()
    return path


class Served:
    """An arm and its feed, without a thread."""

    def __init__(self, bundle: Bundle, backend: Any, folder: Path, name: str = "primary") -> None:
        self.metrics = Metrics()
        self.feed = CatalogueFeed(folder, self.metrics)
        self.arm = Arm(name, self.feed.current(Retriever(bundle, backend)))
        self.shown: list[Catalogue] = []
        show = self.arm.show

        def counted(catalogue: Catalogue) -> None:
            self.shown.append(catalogue)
            show(catalogue)

        self.arm.show = counted  # type: ignore[method-assign]
        self.feed._deployment = Deployment(self.arm)

    @property
    def catalogue(self) -> Catalogue:
        return self.arm.retriever.catalogue

    @property
    def refused(self) -> float | None:
        return self.metrics.registry.get_sample_value("genretrieval_catalogue_changes_refused_total")

    def price(self, item: str) -> Any:
        return self.catalogue.table["price"][self.catalogue.item_ids.row_of(item)]

    def state(self) -> Any:
        of = self.catalogue
        return of.table.rows(), of.gone.tolist(), of.revision, of.ids.codes.tolist()


Serve = Callable[..., Served]


@pytest.fixture
def serve(bundle: Bundle, backend: Any, folder: Path) -> Serve:
    return lambda: Served(bundle, backend, folder)


def test_files_are_applied_by_name_and_several_are_one_swap(serve, folder) -> None:
    put(folder, f"{NOW}-a", item_id=["item-1", "item-2"], price=[7.0, 7.0])
    served = serve()
    assert (served.price("item-1"), served.catalogue.revision, served.shown) == (7.0, 1, [])
    put(folder, f"{NOW}-c", item_id=["item-1"], price=[9.0])
    put(folder, f"{NOW}-b", item_id=["item-1", "new"], price=[8.0, 1.0], semantic_id=[None, NEW])
    served.feed.refresh()
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.price("new")) == (9.0, 7.0, 1.0)
    assert (served.catalogue.revision, len(served.shown)) == (3, 1)
    assert serve().state() == served.state()


def test_a_late_file_has_the_catalogue_built_again(serve, folder) -> None:
    put(folder, f"{NOW}-b", item_id=["item-1", "x"], price=[8.0, 1.0], semantic_id=[None, NEW])
    served = serve()
    put(folder, f"{NOW}-a", item_id=["item-1", "item-2", "y"], price=[5.0, 5.0, 5.0], semantic_id=[None, None, NEW])
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.price("y")) == (8.0, 5.0, 5.0)
    assert list(served.catalogue.item_ids)[-2:] == ["y", "x"]
    assert serve().state() == served.state()
    put(folder, f"{NOW}-c", item_id=["x"], op=["remove"])
    served.feed.refresh()
    assert serve().state() == served.state()


def test_what_comes_before_an_items_id_is_kept_for_it(serve, folder) -> None:
    served = serve()
    for name, columns in (
        ("a", {"item_id": ["x", "item-1"], "price": [3.0, 3.0]}),
        ("b", {"item_id": ["x"], "brand": ["acme"], "semantic_id": [NEW]}),
    ):
        put(folder, f"{NOW}-{name}", **columns)
        served.feed.refresh()
    assert served.price("x") == 3.0
    assert serve().state() == served.state()


def test_what_is_no_file_yet_is_left_alone(serve, folder) -> None:
    served = serve()
    put(folder, f".{NOW}-hidden", item_id=["item-1"], price=[7.0])
    (folder / f"{NOW}-a.parquet.tmp").write_bytes(b"PAR1")
    (folder / "README.md").write_text("changes")
    served.feed.refresh()
    assert (served.catalogue.revision, served.refused) == (0, 0)


def test_a_file_that_is_still_being_written_is_waited_for(serve, folder) -> None:
    served = serve()
    whole = put(folder, f"{NOW}-a", item_id=["item-1"], price=[7.0]).read_bytes()
    (folder / f"{NOW}-a.parquet").write_bytes(whole[:-30])
    put(folder, f"{NOW}-b", item_id=["item-2"], price=[7.0])
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.refused) == (1.0, 7.0, 0)
    (folder / f"{NOW}-a.parquet").write_bytes(whole)
    served.feed.refresh()
    assert (served.price("item-1"), served.refused) == (7.0, 0)
    assert serve().state() == served.state()


def test_a_file_of_tomorrow_is_not_still_being_written(serve, folder) -> None:
    served = serve()
    cut = folder / f"{NOW}-cut.parquet"
    cut.write_bytes(b"PAR1 and no more")
    age(cut, days=-1)
    served.feed.refresh()
    assert served.refused == 1


def test_a_bad_file_is_refused_whole_and_once(serve, folder) -> None:
    served = serve()
    cut = folder / f"{NOW}-cut.parquet"
    cut.write_bytes(b"PAR1 and no more")
    age(cut)
    bad = put(folder, f"{NOW}-bad", item_id=["item-1", "item-2"], price=[7.0, float("nan")])
    put(folder, "stock", item_id=["item-1"], price=[7.0])
    put(folder, "99999999T999999-stock", item_id=["item-1"], price=[7.0])
    put(folder, f"{NOW}-good", item_id=["item-3"], price=[7.0])
    for _ in range(2):
        served.feed.refresh()
        assert (served.price("item-1"), served.price("item-3"), served.refused) == (1.0, 7.0, 4)
    assert served.catalogue.revision == 1
    put(folder, bad.stem, item_id=["item-1", "item-2"], price=[7.0, 8.0])
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.refused) == (7.0, 8.0, 4)


@pytest.mark.parametrize("fault", [RuntimeError("never met before"), pl.exceptions.PanicException("polars broke")])
def test_a_file_that_nobody_thought_of_leaves_the_others_alone(serve, folder, monkeypatch, fault) -> None:
    served = serve()
    check = ChangeChecker.check

    def checked(self: ChangeChecker, file: ChangesFile, source: str) -> Any:
        if source.startswith(f"{NOW}-a"):
            raise fault
        return check(self, file, source)

    monkeypatch.setattr(ChangeChecker, "check", checked)
    put(folder, f"{NOW}-a", item_id=["item-1"], price=[7.0])
    put(folder, f"{NOW}-b", item_id=["item-2"], price=[7.0])
    for _ in range(2):
        served.feed.refresh()
        assert (served.price("item-1"), served.price("item-2"), served.refused) == (1.0, 7.0, 1)
    assert serve().price("item-2") == 7.0


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that the file system does not give out."""
    names: set[str] = set()
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name in names:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    return names


def test_a_file_that_cannot_be_read_is_asked_for_again(serve, folder, unreadable) -> None:
    unreadable.add(put(folder, f"{NOW}-a", old=True, item_id=["item-1"], price=[7.0]).name)
    put(folder, f"{NOW}-b", item_id=["item-2"], price=[7.0])
    served = serve()
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.refused) == (1.0, 7.0, 1)
    unreadable.clear()
    served.feed.refresh()
    assert (served.price("item-1"), served.refused) == (7.0, 1)


def test_the_catalogue_is_not_built_again_without_a_file_that_cannot_be_read(serve, folder, unreadable) -> None:
    unreadable.add(put(folder, f"{NOW}-b", old=True, item_id=["item-1"], op=["remove"]).name)
    put(folder, f"{NOW}-c", item_id=["item-2"], price=[7.0])
    applied = unreadable.copy()
    unreadable.clear()
    served = serve()
    unreadable |= applied
    put(folder, f"{NOW}-a", item_id=["item-2", "item-3"], price=[5.0, 5.0])
    put(folder, f"{NOW}-d", item_id=["item-4"], price=[7.0])
    served.feed.refresh()
    assert served.catalogue.gone.tolist() == [1]
    assert (served.price("item-3"), served.price("item-4"), served.catalogue.revision) == (3.0, 7.0, 3)
    unreadable.clear()
    served.feed.refresh()
    assert (served.price("item-2"), served.price("item-3"), served.catalogue.revision) == (7.0, 5.0, 4)
    assert serve().state() == served.state()


def test_an_attribute_that_a_bundle_does_not_have_is_told_once(serve, folder) -> None:
    served = serve()
    with capture_logs() as logged:
        for name in "ab":
            put(folder, f"{NOW}-{name}", item_id=["item-1"], colour=["red"], op=["remove"])
            served.feed.refresh()
    assert (served.catalogue.gone.tolist(), served.refused) == ([1], 0)
    assert [entry["event"] for entry in logged].count("catalogue_attributes_unknown") == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Puts the clock of the servers so far ahead."""

    def put_to(ahead: timedelta) -> None:
        class Shifted(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + ahead

        monkeypatch.setattr(catalogue_feed, "datetime", Shifted)

    return put_to


def at(ahead: timedelta, rest: str) -> str:
    """A file's name, without its ending, of so long from now."""
    return f"{datetime.now(UTC) + ahead:%Y%m%dT%H%M%S}-{rest}"


def test_a_file_of_the_year_one_holds_up_no_other(serve, folder) -> None:
    # What programs write that have no time.
    served = serve()
    put(folder, "00010101T000000-a", item_id=["item-1"], price=[7.0])
    served.feed.refresh()
    put(folder, f"{NOW}-b", item_id=["item-2"], price=[8.0])
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2")) == (7.0, 8.0)


def test_a_file_of_the_future_waits_for_its_time(serve, folder, clock) -> None:
    served = serve()
    oops = at(timedelta(days=3), "oops")
    put(folder, oops, item_id=["item-1", "item-2"], price=[5.0, 5.0])
    put(folder, f"{NOW}-a", item_id=["item-1"], price=[7.0])
    with capture_logs() as logged:
        for _ in range(3):
            served.feed.refresh()
        put(folder, f"{NOW}-b", item_id=["item-1"], price=[8.0])
        served.feed.refresh()
        changed = change(served, {"item_id": "item-3", "price": 9.0})
    assert (served.price("item-1"), served.price("item-2"), served.price("item-3")) == (8.0, 2.0, 9.0)
    assert changed.file < oops
    (told,) = [entry for entry in logged if entry["event"] == "catalogue_changes_refused"]
    assert (told["file"], served.refused) == (f"{oops}.parquet", 1)
    assert "more than 10 minutes ahead of this server's clock" in told["why"]
    assert "catalogue_built_again" not in [entry["event"] for entry in logged]
    assert serve().state() == served.state()

    # Its time comes: for one that saw it wait, and for one that sees all at once.
    clock(timedelta(days=3, minutes=-9))
    served.feed.refresh()
    assert (served.price("item-1"), served.price("item-2"), served.refused) == (5.0, 5.0, 1)
    assert change(served, {"item_id": "item-1", "price": 6.0}).file > oops
    assert served.price("item-1") == 6.0
    assert serve().state() == served.state()


def test_a_clock_that_is_behind_by_minutes_refuses_nothing(serve, folder, clock) -> None:
    here = serve()
    changed = change(here, {"item_id": "item-1", "price": 7.0})
    clock(timedelta(minutes=-8))
    behind = serve()
    assert (behind.state(), behind.refused) == (here.state(), 0)
    assert change(behind, {"item_id": "item-1", "price": 8.0}).file > changed.file
    here.feed.refresh()
    assert here.state() == behind.state()


def test_what_is_applied_stays_when_the_clock_is_set_back(serve, folder, clock) -> None:
    served = serve()
    change(served, {"item_id": "item-1", "op": "remove"})
    clock(timedelta(hours=-1))
    put(folder, f"{NOW}-late", item_id=["item-2"], price=[7.0])
    served.feed.refresh()
    assert (served.catalogue.gone.tolist(), served.price("item-2")) == ([1], 7.0)
    change(served, {"item_id": "item-1", "op": "upsert"})
    assert (served.catalogue.gone.tolist(), served.refused) == ([], 0)
    clock(timedelta())
    assert serve().state() == served.state()


def test_servers_that_write_often_do_not_run_ahead(serve, folder) -> None:
    ahead = datetime.now(UTC) + timedelta(minutes=9)
    put(folder, file_name(ahead, "other").removesuffix(".parquet"), item_id=["item-1"], price=[5.0])
    served = serve()
    names = [change(served, {"item_id": "item-1", "price": float(n)}).file for n in range(8)]
    assert names == sorted(names)
    assert names[-1] < file_name(ahead + timedelta(milliseconds=1), "")


def test_what_vanishes_stays_in_force_until_a_restart(serve, folder) -> None:
    served = serve()
    path = put(folder, f"{NOW}-a", item_id=["item-1"], op=["remove"])
    served.feed.refresh()
    path.unlink()
    served.feed.refresh()
    assert served.catalogue.gone.tolist() == [1]
    assert serve().catalogue.gone.tolist() == []


def test_a_folder_that_is_not_there(bundle, backend, tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="is no folder; make it"):
        CatalogueFeed(tmp_path / "none", Metrics())
    feed = CatalogueFeed(tmp_path, Metrics())
    feed.folder = tmp_path / "unmounted"
    with pytest.raises(UnavailableError, match="see that it is mounted"):
        feed.current(Retriever(bundle, backend))


def test_older_files_are_merged_into_one(serve, folder, bundle, monkeypatch) -> None:
    put(folder, f"{NOW}-a", old=True, item_id=["item-1", "x"], price=[7.0, 1.0], semantic_id=[None, NEW])
    put(folder, f"{NOW}-b", old=True, item_id=["item-2", "x"], op=["upsert", "remove"], brand=["umbra", None])
    put(folder, f"{NOW}-c", old=True, item_id=["item-1", "y"], price=[8.0, 2.0])
    put(folder, f"{NOW}-d", item_id=["y", "x"], semantic_id=[NEW, None])
    running = serve()
    left: list[Any] = []
    with monkeypatch.context() as patched:
        # A server that starts when the new file is there, and the old ones are, too.
        patched.setattr(Path, "unlink", lambda self, **_: left.append(self))
        assert compact(folder, bundle) == (f"{NOW}-c.parquet", 3)
        assert serve().state() == running.state()
    for path in left:
        path.unlink(missing_ok=True)
    assert sorted(path.name for path in folder.iterdir()) == [f"{NOW}-c.parquet", f"{NOW}-d.parquet"]
    assert serve().state() == running.state()
    running.feed.refresh()
    assert running.shown == []
    assert compact(folder, bundle) is None
    put(folder, f"{NOW}-e", item_id=["item-1"], price=[1.0])
    running.feed.refresh()
    assert (running.price("item-1"), running.refused) == (1.0, 0)
    assert serve().state() == running.state()


def test_what_servers_leave_out_is_not_merged(serve, folder, bundle) -> None:
    put(folder, f"{NOW}-a", old=True, item_id=["item-1"], price=[7.0])
    put(folder, f"{NOW}-b", old=True, item_id=["item-1"], price=[8.0])
    left_out = {
        put(folder, at(timedelta(days=300), "oops"), old=True, item_id=["item-1"], price=[5.0]),
        put(folder, "stock", old=True, item_id=["item-1"], price=[6.0]),
    }
    running = serve()
    assert compact(folder, bundle) == (f"{NOW}-b.parquet", 2)
    assert {*folder.iterdir()} == {folder / f"{NOW}-b.parquet", *left_out}
    assert running.price("item-1") == 8.0
    assert serve().state() == running.state()


def test_what_would_be_lost_is_not_merged(folder, bundle) -> None:
    put(folder, f"{NOW}-a", old=True, item_id=["item-1"], price=[7.0])
    stranger = ChangesFile(pl.DataFrame({"item_id": ["x"], "semantic_id": [NEW]}), codebooks="another")
    stranger.write(folder / f"{NOW}-b.parquet")
    age(folder / f"{NOW}-b.parquet")
    with pytest.raises(DataError, match=f"{NOW}-b.parquet: semantic IDs of other codebooks"):
        compact(folder, bundle)
    put(folder, f"{NOW}-b", old=True, item_id=["item-1"], colour=["red"])
    with pytest.raises(DataError, match="colour: the bundle has no such attributes"):
        compact(folder, bundle)
    assert len(list(folder.iterdir())) == 2


def test_every_arm_is_shown_every_change(bundle, keyword_bundle, backend, folder) -> None:
    served = Served(bundle, backend, folder)
    canary = Arm("canary", Retriever(keyword_bundle, backend))
    served.feed._deployment.become(served.feed._deployment.split._replace(canary=canary, share=0.5))
    put(folder, f"{NOW}-a", item_id=["item-1"], op=["remove"])
    served.feed.refresh()
    assert [arm.retriever.catalogue.gone.tolist() for arm in (served.arm, canary)] == [[1], [1]]


def test_an_arm_that_takes_over_has_what_changed_while_it_loaded(bundle, keyword_bundle, backend, folder) -> None:
    served = Served(bundle, backend, folder)
    loaded = Arm("loaded", served.feed.current(Retriever(keyword_bundle, backend)))
    put(folder, f"{NOW}-a", item_id=["item-1"], op=["remove"])
    served.feed.refresh()
    assert (served.catalogue.gone.tolist(), loaded.retriever.catalogue.gone.tolist()) == ([1], [])
    served.feed.catch_up(loaded)
    assert loaded.retriever.catalogue.gone.tolist() == [1]
    served.feed.folder = folder / "unmounted"
    with pytest.raises(UnavailableError, match="see that it is mounted"):
        served.feed.catch_up(loaded)


def change(served: Served, *rows: dict[str, Any], **call: Any) -> Any:
    table = pl.DataFrame(list(rows), {"semantic_id": pl.List(pl.Int64())} if "semantic_id" in rows[0] else None)
    asked = {"fingerprint": call.pop("fingerprint", "1"), "principal": "ann"}
    return served.feed.change(lambda _: table, call=asked, **call)


def test_a_call_is_in_force_when_it_is_answered_and_comes_last(serve, folder) -> None:
    ahead = at(timedelta(minutes=9), "other")
    put(folder, ahead, item_id=["item-1"], price=[5.0])
    here, there = serve(), serve()
    changed = change(here, {"item_id": "item-1", "price": 7.0})
    assert (changed.revision, changed.n_upserted, here.price("item-1")) == (2, 1, 7.0)
    assert changed.file > f"{ahead}.parquet"
    there.feed.refresh()
    assert there.state() == here.state() == serve().state()
    (read,) = (ChangesFile.read(path) for path in folder.iterdir() if path.name == changed.file)
    assert read.call == {"fingerprint": "1", "principal": "ann"}


def test_a_call_is_refused_whole_and_can_be_tried(serve, folder) -> None:
    served = serve()
    with pytest.raises(RequestError, match=r"item_id is not in the catalogue and has no semantic_id"):
        change(served, {"item_id": "item-1", "price": 7.0}, {"item_id": "x", "price": 7.0})
    told = []
    tried = change(served, {"item_id": "item-1", "op": "remove"}, validate_only=True, note=told.append)
    assert (tried.n_removed, tried.file, told) == (1, "", [])

    def refuse(changed: Any) -> None:
        told.append(changed)
        raise UnavailableError("the audit is away")

    with pytest.raises(UnavailableError, match="audit"):
        change(served, {"item_id": "item-1", "op": "remove"}, note=refuse)
    assert [changed.n_removed for changed in told] == [1]
    assert (list(folder.iterdir()), served.catalogue.revision) == ([], 0)


def test_a_repeated_call_changes_nothing_more(serve, folder) -> None:
    served, other = serve(), serve()
    row = {"item_id": "item-1", "op": "remove"}
    first = change(served, row, key="k")
    change(served, {"item_id": "item-1", "op": "upsert"})
    again = change(other, row, key="k")
    assert (again.file, again.n_removed, again.revision) == (first.file, 1, 2)
    assert other.catalogue.gone.tolist() == []
    with pytest.raises(IdempotencyKeyReusedError):
        change(served, row, key="k", fingerprint="2")


def test_a_full_folder_changes_nothing(serve, folder, monkeypatch) -> None:
    served = serve()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ChangesFile, "write", full)
    with pytest.raises(UnavailableError, match=r"No space left on device.*nothing was changed"):
        change(served, {"item_id": "item-1", "op": "remove"})
    assert served.catalogue.revision == 0


def test_a_change_that_is_written_is_not_said_to_be_none(serve, folder, monkeypatch, unreadable) -> None:
    served = serve()
    write = ChangesFile.write

    def written(file: ChangesFile, path: Path) -> None:
        write(file, path)
        if path.name not in unreadable:
            monkeypatch.setattr(served.feed, "folder", folder / "unmounted")

    monkeypatch.setattr(ChangesFile, "write", written)
    told = r"is written, as .*, and not yet in force on this server"
    with pytest.raises(UnavailableError, match=told):
        change(served, {"item_id": "item-1", "op": "remove"}, key="k")
    monkeypatch.setattr(served.feed, "folder", folder)
    assert change(served, {"item_id": "item-1", "op": "remove"}, key="k").n_removed == 1
    assert (served.catalogue.gone.tolist(), len(list(folder.iterdir()))) == ([1], 1)

    name = f"{at(timedelta(minutes=5), 'next')}.parquet"
    monkeypatch.setattr(catalogue_feed, "_next_name", lambda *_: name)
    unreadable.add(name)
    with pytest.raises(UnavailableError, match=told):
        change(served, {"item_id": "item-2", "op": "remove"})
    unreadable.clear()
    served.feed.refresh()
    assert served.catalogue.gone.tolist() == [1, 2]


def test_a_repeated_call_does_not_say_in_force_what_waits(serve, folder, clock) -> None:
    row = {"item_id": "item-1", "op": "remove"}
    clock(timedelta(hours=1))
    change(serve(), row, key="k")
    clock(timedelta())
    with pytest.raises(UnavailableError, match=r"is written, as .*, and not yet in force on this server"):
        change(serve(), row, key="k")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("fault", [MemoryError(), pl.exceptions.PanicException("polars broke")])
def test_whatever_keeps_a_change_from_being_written_is_told(serve, folder, monkeypatch, fault) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    served, noted, failed = serve(), [], []
    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(type(fault)):
        change(
            served,
            {"item_id": "item-1", "op": "remove"},
            note=noted.append,
            not_made=lambda *told: failed.append(told),
        )
    assert failed == [(noted[0], fault)]
    assert list(folder.iterdir()) == []


def test_a_change_that_was_renamed_is_made_whatever_the_file_system_says(serve, folder, monkeypatch) -> None:
    served, replace, failed = serve(), os.replace, []

    def did(*paths: Any) -> None:
        replace(*paths)
        raise FileNotFoundError(2, "No such file or directory")  # of NFS, when an answer got lost

    monkeypatch.setattr(os, "replace", did)
    changed = change(served, {"item_id": "item-1", "op": "remove"}, not_made=lambda *told: failed.append(told))
    assert (served.catalogue.gone.tolist(), failed) == ([1], [])
    assert [path.name for path in folder.iterdir()] == [changed.file]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_feed, "POLL_SECONDS", 0.02)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_sees_one_state(start, folder, quick, backend) -> None:
    with start(catalogue_changes=folder, max_batch=1) as running, Client(running.http) as client:
        (before,) = client.retrieve(top_k=1).items
        backend.entered.acquire(timeout=5)
        backend.gate.clear()
        with ThreadPoolExecutor(2) as threads:
            begun = [threads.submit(client.retrieve, top_k=1) for _ in range(2)]
            assert backend.entered.acquire(timeout=20)  # one is in the graph, and the other waits
            until(lambda: running.metric("genretrieval_in_flight_requests") == 2)
            put(folder, f"{NOW}-a", item_id=[before.item_id], op=["remove"])
            arm = running.server.service.deployment.primary
            until(lambda: arm.retriever.catalogue.revision == 1)
            backend.gate.set()
            answers = [future.result(20) for future in begun]
        assert [(a.items[0].item_id, a.catalogue_revision) for a in answers] == [(before.item_id, 0)] * 2
        after = client.retrieve(top_k=1)
        assert after.items[0].item_id != before.item_id
        assert after.catalogue_revision == 1
        assert running.metric("genretrieval_catalogue_revision", arm="primary") == 1
        assert running.metric("genretrieval_catalogue_items", arm="primary") == 23


def test_the_thread_goes_on_after_a_fault(start, folder, quick, monkeypatch) -> None:
    with start(catalogue_changes=folder) as running:
        arm, feed = running.server.service.deployment.primary, running.server._feed
        monkeypatch.setattr(feed, "folder", folder / "gone")
        until(lambda: feed._failing)
        monkeypatch.setattr(feed, "folder", folder)
        put(folder, f"{NOW}-a", item_id=["item-1"], op=["remove"])
        until(lambda: arm.retriever.catalogue.revision == 1)


def test_a_file_system_that_hangs_does_not_keep_a_server(bundle, backend, folder, quick, monkeypatch) -> None:
    served, hanging, gate = Served(bundle, backend, folder), threading.Event(), threading.Event()
    monkeypatch.setattr(served.feed, "_names", lambda: hanging.set() or (gate.wait(20) and []))
    served.feed.follow(served.feed._deployment)
    assert hanging.wait(20)
    served.feed.stop(0.01)
    assert (served.feed._thread.is_alive(), served.feed._thread.daemon) == (True, True)
    gate.set()
    served.feed.stop(20)
    assert not served.feed._thread.is_alive()


@pytest.fixture
def http() -> Any:
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = SqlStore.open(f"sqlite:///{tmp_path}/admin.db")
    yield opened
    opened.close()


def test_items_over_the_api(start, store, folder, quick) -> None:
    with (
        start(catalogue_changes=folder, store=store) as running,
        AdminClient(running.admin) as admin,
        Client(running.http) as client,
    ):
        item = admin.item("item-1")
        assert (item.semantic_id, item.removed, item.catalogue_revision) == ([0, 0, 0], False, 0)
        assert item.attributes == {"brand": "umbra", "categories": ["shoes", "size 1"], "price": 1.0, "in_stock": True}

        rows = [
            {"item_id": "item-1", "price": None, "categories": ["boots"]},
            {"item_id": "a/b:remove", "semantic_id": NEW, "price": 3, "in_stock": True},
            {"item_id": "item-2", "op": "remove"},
            {"item_id": "nobody", "op": "remove"},
        ]
        tried = admin.change_items(rows, validate_only=True)
        assert (tried.catalogue_revision, tried.file, tried.upserted) == (0, "", 2)
        changed = admin.change_items(rows)
        assert changed.model_dump(exclude={"file"}) == {
            "catalogue_revision": 1, "upserted": 2, "removed": 1, "missing_ids": ["nobody"],
        }  # fmt: skip
        item = admin.item("item-1")
        assert (item.attributes["price"], item.attributes["categories"]) == (None, ["boots"])
        assert item.attributes["brand"] == "umbra"
        assert admin.item("item-2").removed
        new = admin.item("a/b:remove")
        assert (new.semantic_id, new.attributes["brand"], new.attributes["price"]) == (NEW, None, 3.0)
        answer = client.retrieve(filters=Filters(attributes={"category": ["boots"]}), top_k=30)
        assert [found.item_id for found in answer.items] == ["item-1"]
        found = {item.item_id for item in client.retrieve(top_k=30).items}
        assert "a/b:remove" in found
        assert "item-2" not in found

        with pytest.raises(
            RequestError, match=r"price is Float64 in the catalogue; 2 items have no such value, first 0, 1"
        ):
            admin.change_items([{"item_id": "item-1", "price": "free"}, {"item_id": "item-3", "price": True}])
        with pytest.raises(RequestError, match=r"colour is no attribute.*\n.*not in the catalogue"):
            admin.change_items([{"item_id": "x", "colour": "red"}])
        with pytest.raises(NotFoundError, match="there is no item 'x'"):
            admin.item("x")
        (event,) = admin.audit("items")
        assert event.after == {
            "file": changed.file, "upserted": 2, "removed": 1, "items": [row["item_id"] for row in rows],
        }  # fmt: skip


def test_one_item_over_the_api(start, store, folder, http) -> None:
    with start(catalogue_changes=folder, store=store) as running:
        item = f"{running.admin}/v1/items/item-1"
        removed = http.delete(item, headers={"Idempotency-Key": "k"})
        assert (removed.json()["removed"], removed.json()["catalogue_revision"]) == (1, 1)
        assert http.delete(item, headers={"Idempotency-Key": "k"}).json() == removed.json()
        assert http.get(item).json()["removed"] is True
        assert http.patch(item, json={"price": 9}).json()["catalogue_revision"] == 2
        assert http.get(item).json()["removed"] is False
        assert http.get(item).json()["attributes"]["price"] == 9.0
        for answer, status in (
            (http.patch(item, json={"op": "remove"}), 400),
            (http.patch(item, json={"popularity": 3}), 400),
            (http.patch(f"{running.admin}/v1/items/x", json={"price": 9}), 404),
            (http.delete(f"{running.admin}/v1/items/x"), 404),
            (http.post(f"{running.admin}/v1/items:batch", json={"items": []}), 400),
            (http.post(f"{running.admin}/v1/items:batch", json={"items": [{"item_id": "a", "fields": []}]}), 400),
        ):
            assert answer.status_code == status, answer.text
        assert len(list(folder.iterdir())) == 2


def test_the_audit_says_which_change_was_not_made(start, store, folder, http, monkeypatch) -> None:
    before = []

    def fail(*_: Any) -> None:
        before.extend(store.audit(size=9)[0])
        raise OSError(30, "Read-only file system")

    with start(catalogue_changes=folder, store=store) as running:
        item = f"{running.admin}/v1/items/item-1"
        monkeypatch.setattr(os, "replace", fail)
        answer = http.patch(item, json={"price": 9}, headers={"X-Request-Id": "r1"})
        assert (answer.status_code, "nothing was changed" in answer.json()["detail"]) == (503, True)
        monkeypatch.undo()
        # What was noted first is there whenever the process dies.
        (noted,) = before
        failed, first = store.audit(size=9, name="items/item-1")[0]
        assert first == noted
        assert failed.after == {"file": noted.after["file"], "failed": "Read-only file system"}
        assert (failed.principal, failed.request_id) == (noted.principal, noted.request_id)
        assert list(folder.iterdir()) == []
        assert http.patch(item, json={"price": 9}).status_code == 200
        assert "failed" not in store.audit(size=1)[0][0].after


def test_what_the_audit_cannot_say_the_log_does(start, store, folder, http, monkeypatch) -> None:
    note = store.note

    def once(*about: Any) -> None:
        if "failed" in about[-1]:
            raise UnavailableError("the database is away")
        note(*about)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with start(catalogue_changes=folder, store=store) as running:
        monkeypatch.setattr(store, "note", once)
        monkeypatch.setattr(os, "replace", full)
        with capture_logs() as logged:
            answer = http.delete(f"{running.admin}/v1/items/item-1")
        assert (answer.status_code, "nothing was changed" in answer.json()["detail"]) == (503, True)
    (told,) = [entry for entry in logged if entry["event"] == "item_change_not_marked_as_failed"]
    assert (told["why"], told["error"]) == ("No space left on device", "the database is away")


def test_a_server_without_a_folder_says_which_option_it_lacks(start, store, http) -> None:
    with start(store=store) as running:
        assert http.get(f"{running.admin}/v1/items/item-1").status_code == 200
        refused = http.post(f"{running.admin}/v1/items:batch", json={"items": [{"item_id": "item-1"}]})
        assert (refused.status_code, refused.json()["reason"]) == (409, "CONFLICT")
        assert "--catalogue-changes" in refused.json()["detail"]


def test_a_file_dropped_beside_a_real_server(bundle_path, folder, tmp_path) -> None:
    command = [sys.executable, "-c", "from genretrieval.cli import main; main()"]
    options = ("--catalogue-changes", str(folder))
    with running_server(bundle_path, command, *options, log=tmp_path / "log") as at, Client(at.grpc) as client:
        asked = RetrieveRequest(filters=Filters(attributes={"brand": ["novel"]}), top_k=3, beam_width=60)
        assert client.retrieve(asked).items == []
        put(folder, f"{NOW}-new", item_id=["x", "item-0"], brand=["novel"] * 2, semantic_id=[NEW, None])
        until(lambda: client.retrieve(asked).catalogue_revision == 1)
        assert {item.item_id for item in client.retrieve(asked).items} == {"x", "item-0"}
