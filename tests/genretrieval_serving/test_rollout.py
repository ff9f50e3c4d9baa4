"""Bundles that take over while a server runs: swap, canary, rollback, and those that never may."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import onnx.parser
import polars as pl
import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from genretrieval.bundle import CATALOGUE, GRAPH, MANIFEST, load_bundle, sha256
from genretrieval.catalogue_changes import ChangesFile, file_name
from genretrieval.cli import app
from genretrieval.errors import BundleError, ConflictError, GenRetrievalError, InvalidInputError, NotFoundError
from genretrieval.request import RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval_serving import catalogue_feed as catalogue_feed_module
from genretrieval_serving import rollout as rollout_module
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import AliasFields, Canary, Kind
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create, Update
from genretrieval_serving.bundle_folder import BundleFolder, open_retriever
from genretrieval_serving.client import Client
from genretrieval_serving.deployment import Arm
from genretrieval_serving.rollout import Followed

USERS = [f"user-{n}" for n in range(60)]
# What a server reports as its bundle, by the name that its folder has.
UUIDS = {name: f"{name * 8}-0000-4000-8000-000000000000" for name in "abc"}
VERSIONS = {name: f"20260102-{name * 8}" for name in "abc"}


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    late = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < late, "it never came to hold"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, save_bundle: Any, keyword_codebook: Any) -> Path:
    """Bundles whose items have other names. Of the words' codes, a reserves the last three and b and c two."""
    folder = tmp_path_factory.mktemp("written")
    for name, reserved in (("a", 3), ("b", 2), ("c", 2)):
        save_bundle(folder / name, keyword_codebook(reserved), uuid=UUIDS[name], prefix=f"{name}-")
    save_bundle(folder / "wordless", uuid=UUIDS["c"], prefix="c-")
    return folder


@pytest.fixture
def bundles(written: Path, tmp_path: Path) -> Path:
    """A folder of bundles that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "bundles"))


@pytest.fixture
def opened() -> list[weakref.ref[Retriever]]:
    return []


@pytest.fixture
def follow(bundles: Path, fake_backend: Any, opened: Any) -> Callable[..., Followed]:
    """What follows an alias; graphs are fakes, unless real ones are asked for."""

    def opener(path: Path) -> Retriever:
        retriever = Retriever(load_bundle(path), fake_backend())
        opened.append(weakref.ref(retriever))
        return retriever

    def make(alias: str = "prod", opener: Callable[[Path], Retriever] = opener) -> Followed:
        return Followed(BundleFolder(bundles, opener, max_batch=2), alias)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store:
        yield store


def put(store: SqlStore, bundle: str, canary: Canary | None = None, id_: str = "prod") -> None:
    """Make or move an alias behind the back of the admin API, which would look at its bundles."""
    fields = AliasFields(bundle=bundle, canary=canary)
    try:
        store.apply(Call("test"), [Update(Kind.ALIASES, id_, lambda _: fields)])
    except NotFoundError:
        store.apply(Call("test"), [Create(Kind.ALIASES, id_, fields)])


@contextmanager
def served(serving: Any, followed: Followed, store: SqlStore, **settings: Any) -> Iterator[tuple[Any, AdminClient]]:
    with serving(followed, store=store, **settings) as running, AdminClient(running.admin) as admin:
        yield running, admin


def names(admin: AdminClient) -> dict[str, str | None]:
    return {arm.arm: arm.bundle for arm in admin.deployment().arms}


def whole(response: RetrieveResponse) -> str:
    """The name of the bundle that an answer is of, from its first item to its token."""
    (name,) = (name for name, version in VERSIONS.items() if version == response.bundle_version)
    assert response.items
    assert all(item.item_id.startswith(f"{name}-") for item in response.items)
    assert response.attribution_token.startswith(f"{response.bundle_version}.")
    return name


def test_a_swap_under_load_fails_no_request_and_mixes_no_answer(serving, follow, store, opened) -> None:
    put(store, "a")
    with served(serving, follow(), store) as (running, admin):
        done = threading.Event()

        def ask(url: str) -> list[str]:
            found = []
            with Client(url) as client:
                while not done.is_set():
                    found.append(whole(client.retrieve(user_id=url, top_k=5)))
            return found

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, url) for url in (running.http, running.grpc) * 2]
            for name in ("b", "a", "c"):
                admin.move("prod", {"bundle": name})
                until(lambda name=name: names(admin) == {"primary": name})
                time.sleep(0.3)
            done.set()
            answers = [future.result(20) for future in asking]
        for found in answers:
            # One after another, and never back.
            assert [name for name, _ in itertools.groupby(found)] == list("abac")
        with Client(running.grpc) as client:
            assert client.info().bundle_uuid == UUIDS["c"]
            # The batcher lets go of the last batch with the next one.
            client.retrieve()
        assert running.metric("genretrieval_bundle_info", arm="primary", version=VERSIONS["c"], uuid=UUIDS["c"]) == 1
        assert running.metric("genretrieval_bundle_info", arm="primary", version=VERSIONS["a"], uuid=UUIDS["a"]) is None
        until(lambda: sum(retriever() is not None for retriever in opened) == 1)
        assert admin.get(Kind.ALIASES, "prod").previous == "a"


def test_a_canary_answers_its_share_always_the_same_users(serving, follow, store) -> None:
    put(store, "a")
    with served(serving, follow(), store) as (running, admin), Client(running.grpc) as client:

        def by_user() -> dict[str, str]:
            return {user: whole(client.retrieve(user_id=user, top_k=3)) for user in USERS}

        def become(**arms: str) -> None:
            until(lambda: names(admin) == arms)

        admin.move("prod", {"canary": {"bundle": "b", "share": 0.3}})
        become(primary="a", canary="b")
        first = by_user()
        assert first == by_user()
        assert 6 < Counter(first.values())["b"] < 32
        assert running.metric("genretrieval_results_returned_count", arm="canary") == 2 * Counter(first.values())["b"]
        status = admin.deployment()
        assert [(arm.share, arm.version) for arm in status.arms] == [(0.7, VERSIONS["a"]), (0.3, VERSIONS["b"])]
        admin.move("prod", {"canary": {"share": 0.6}})
        until(lambda: admin.deployment().arms[1].share == 0.6)
        more = by_user()
        assert {user for user, name in first.items() if name == "b"} < {u for u, name in more.items() if name == "b"}
        admin.promote("prod")
        become(primary="b")
        assert set(by_user().values()) == {"b"}
        admin.move("prod", {"canary": {"bundle": "c", "share": 1}})
        become(primary="b", canary="c")
        assert set(by_user().values()) == {"c"}
        admin.rollback("prod")
        become(primary="a")
        assert set(by_user().values()) == {"a"}
        with pytest.raises(ConflictError, match="no bundle before a"):
            admin.rollback("prod")


def test_what_a_bundle_fails_on_is_counted_for_its_arm(serving, follow, store) -> None:
    put(store, "a", Canary(bundle="b", share=1.0))
    with served(serving, follow(), store) as (running, admin), Client(running.grpc) as client:
        until(lambda: names(admin) == {"primary": "a", "canary": "b"})
        client.retrieve(user_id="u")
        with pytest.raises(GenRetrievalError, match="inference_failed"):
            client.retrieve(user_id="u", history=[{"item_id": "b-item-23"}])
        assert running.metric("genretrieval_failed_total", arm="canary") == 1
        assert running.metric("genretrieval_failed_total", arm="primary") is None


def reseal(path: Path, **manifest: Any) -> None:
    """Make the manifest true of the files again: what is wrong with them no hash tells."""
    said = json.loads((path / MANIFEST).read_text())
    files = {name: sha256(path / name) for name in said["files"]}
    (path / MANIFEST).write_text(json.dumps(said | {"files": files} | manifest))


def regraph(old: str, new: str) -> Callable[[Path, str], None]:
    """Put another graph into a bundle: the one that all have, with a change in its text."""

    def spoil(path: Path, model: str) -> None:
        assert old in model
        (path / GRAPH).write_bytes(onnx.parser.parse_model(model.replace(old, new)).SerializeToString())
        reseal(path)

    return spoil


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, str], object]:
    return lambda path, _: (path / name).write_bytes(change((path / name).read_bytes()))


def claim(**manifest: Any) -> Callable[[Path, str], None]:
    return lambda path, _: reseal(path, **manifest)


# What is wrong with a bundle, and what has to be said of it.
SPOILT: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "a flipped bit": (rewrite(GRAPH, lambda content: bytes([content[0] ^ 1]) + content[1:]), "sha256 differs"),
    "a file cut short": (rewrite(CATALOGUE, lambda content: content[:-9]), "sha256 differs"),
    "a missing file": (lambda path, _: (path / GRAPH).unlink(), f"lacks {GRAPH}"),
    "no manifest": (lambda path, _: (path / MANIFEST).unlink(), "never finished"),
    "half a manifest": (rewrite(MANIFEST, lambda content: content[:99]), "damaged or no manifest"),
    "a newer schema": (claim(schema_version=99), "upgrade genretrieval"),
    "a newer runtime": (claim(minimum_onnxruntime="99.1"), "needs onnxruntime 99.1"),
    "another catalogue": (claim(n_items=23), "24 items and its manifest says 23"),
    "other codebooks": (claim(codebook_sizes=[8, 2, 8]), "outside its codebook of 2"),
    "an opset of the future": (regraph('["" : 18]', '["" : 999]'), "cannot be loaded by onnxruntime"),
    "another graph": (regraph("mask_row", "rows_of"), "differ in the graph's inputs"),
    "a graph that fails": (regraph("time_and_level = {1, 2}", "time_and_level = {1, 7}"), "cannot be served"),
    "a graph that finds nothing": (regraph("Sub (shifted, rank)", "Add (closed, rank)"), "finds no item"),
}


@pytest.fixture(scope="module")
def wary(serving: Any, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of real graphs on bundle a, its admin API, its store and its folder of bundles."""
    folder = tmp_path_factory.mktemp("wary")
    bundles = Path(shutil.copytree(written, folder / "bundles"))
    with closing(SqlStore.open(f"sqlite:///{folder}/admin.db")) as store:
        put(store, "a")
        followed = Followed(BundleFolder(bundles, lambda path: open_retriever(path, 1), 2), "prod")
        with served(serving, followed, store) as (running, admin):
            yield running, admin, store, bundles


@pytest.mark.parametrize("way", SPOILT)
def test_a_bad_bundle_is_refused_by_the_api_and_by_every_replica(way, wary, model) -> None:
    running, admin, store, bundles = wary
    spoil, why = SPOILT[way]
    name = way.replace(" ", "-").replace("'", "")
    spoil(Path(shutil.copytree(bundles / "b", bundles / name)), model)
    failures = running.metric("genretrieval_bundle_load_failures_total")
    revision = admin.revision()
    for patch in ({"bundle": name}, {"canary": {"bundle": name, "share": 1.0}}):
        with pytest.raises(ConflictError, match=why) as refused:
            admin.move("prod", patch)
        assert f"{name} cannot be served" in str(refused.value)
    assert admin.revision() == revision
    # As if another server had found it good, whose disk is not this one's.
    with capture_logs() as logs, Client(running.http) as client:
        put(store, "a", Canary(bundle=name, share=1.0))
        until(lambda: any(arm.failures for arm in admin.deployment().arms[1:]))
        assert running.metric("genretrieval_bundle_load_failures_total") > failures
        canary = admin.deployment().arms[1]
        assert (canary.wanted, canary.bundle, canary.version) == (name, None, None)
        assert why in canary.error
        assert canary.retry_at is not None
        put(store, name)
        until(lambda: admin.deployment().arms[0].failures)
        (primary,) = admin.deployment().arms
        assert (primary.wanted, primary.bundle, primary.version) == (name, "a", VERSIONS["a"])
        assert whole(client.retrieve(user_id="u")) == "a"
        assert httpx.get(f"{running.http}/readyz").status_code == 200
        put(store, "a")
    assert name in {entry["bundle"] for entry in logs if entry["event"] == "bundle_refused"}


def test_a_bundle_that_was_mended_is_found_by_the_next_try(
    serving, follow, store, bundles, written, monkeypatch
) -> None:
    monkeypatch.setattr(rollout_module, "FIRST_PAUSE", 0.1)
    put(store, "a")
    with served(serving, follow(), store) as (_, admin):
        (bundles / "b" / GRAPH).unlink()
        put(store, "b")
        until(lambda: admin.deployment().arms[0].failures >= 2)
        shutil.copy(written / "b" / GRAPH, bundles / "b" / GRAPH)
        until(lambda: names(admin) == {"primary": "b"})
        assert admin.deployment().arms[0].error is None


def test_what_keeps_it_from_following_is_told_until_it_follows_again(serving, follow, store, monkeypatch) -> None:
    monkeypatch.setattr(rollout_module, "FIRST_PAUSE", 0.05)
    original = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.parent.name == "c":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self)

    def sync_slots(*_: Any) -> None:
        raise RuntimeError("never seen before")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    put(store, "a")
    with served(serving, follow(), store) as (_, admin):
        put(store, "c", id_="other")
        put(store, "b")
        until(lambda: names(admin) == {"primary": "b"})
        assert ["Permission denied" in (bundle.error or "") for bundle in admin.bundles()] == [
            False,
            False,
            True,
            False,
        ]
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(store, "sync_slots", sync_slots)
            put(store, "a")
            until(lambda: admin.deployment().error == "never seen before")
            time.sleep(0.2)
            assert names(admin) == {"primary": "b"}
        until(lambda: names(admin) == {"primary": "a"})
        until(lambda: admin.deployment().error is None)
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["alias_not_followed"]


@pytest.fixture
def slow_b(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Set while b is being loaded; what lets it be loaded."""
    loading, go_on = threading.Event(), threading.Event()
    original = BundleFolder.open

    def open_slowly(self: BundleFolder, name: str) -> Retriever:
        retriever = original(self, name)
        if name == "b":
            loading.set()
            assert go_on.wait(20)
        return retriever

    monkeypatch.setattr(BundleFolder, "open", open_slowly)
    return loading, go_on


def test_what_is_wanted_no_more_when_it_is_loaded_is_given_up(serving, follow, store, opened, slow_b) -> None:
    put(store, "a")
    loading, go_on = slow_b
    with served(serving, follow(), store) as (running, admin), Client(running.http) as client:
        put(store, "b")
        assert loading.wait(20)
        assert admin.deployment().arms[0].wanted == "b"
        assert whole(client.retrieve()) == "a"
        put(store, "a")
        until(lambda: admin.deployment().arms[0].wanted == "a")
        go_on.set()
        until(lambda: len(opened) == 2 and opened[1]() is None)
        assert names(admin) == {"primary": "a"}
        assert running.metric("genretrieval_bundle_load_failures_total") == 0


def test_the_end_of_a_canary_waits_for_no_bundle_that_is_being_loaded(serving, follow, store, slow_b) -> None:
    put(store, "a", Canary(bundle="c", share=0.5))
    loading, go_on = slow_b
    with served(serving, follow(), store) as (_, admin):
        until(lambda: names(admin) == {"primary": "a", "canary": "c"})
        put(store, "b", Canary(bundle="c", share=0.5))
        assert loading.wait(20)
        assert names(admin) == {"primary": "a", "canary": "c"}
        put(store, "b")
        until(lambda: names(admin) == {"primary": "a"})
        go_on.set()
        until(lambda: names(admin) == {"primary": "b"})


def test_what_is_removed_while_a_bundle_loads_is_never_retrieved_from_it(
    serving, follow, store, tmp_path, monkeypatch
) -> None:
    put(store, "a")
    (tmp_path / "changes").mkdir()
    original = Arm.__init__

    def loaded(self: Arm, name: str, *given: Any, **options: Any) -> None:
        original(self, name, *given, **options)
        if name == "loaded" and self.manifest.uuid == UUIDS["b"]:
            ids = {"item_id": ["b-item-9"], "op": ["remove"]}
            ChangesFile(pl.DataFrame(ids)).write(tmp_path / "changes" / file_name(datetime.now(UTC), "sold"))

    monkeypatch.setattr(Arm, "__init__", loaded)
    # Nobody looks by himself.
    monkeypatch.setattr(catalogue_feed_module, "POLL_SECONDS", 60.0)
    with served(serving, follow(), store, catalogue_changes=tmp_path / "changes") as (_, admin):
        put(store, "b")
        until(lambda: names(admin) == {"primary": "b"})
        (primary,) = admin.deployment().arms
        assert (primary.items, primary.catalogue_revision) == (23, 1)


def test_all_replicas_follow_and_a_new_one_comes_up_with_what_they_serve(serving, follow, store) -> None:
    put(store, "a")
    with ExitStack() as stack:
        replicas = [stack.enter_context(served(serving, follow(), store)) for _ in range(2)]
        replicas[0][1].move("prod", {"bundle": "b"})
        for _, admin in replicas:
            until(lambda admin=admin: names(admin) == {"primary": "b"})
        replicas.append(stack.enter_context(served(serving, follow(), store)))
        for running, _ in replicas:
            with Client(running.grpc) as client:
                assert whole(client.retrieve()) == "b"


def test_a_server_starts_on_the_bundle_before_where_the_present_one_is_bad(serving, follow, store, bundles) -> None:
    with pytest.raises(NotFoundError, match="bundles create prod"), serving(follow(), store=store):
        pass
    put(store, "a")
    put(store, "b")
    shutil.rmtree(bundles / "b")
    with capture_logs() as logs, served(serving, follow(), store) as (running, admin), Client(running.http) as client:
        assert whole(client.retrieve()) == "a"
        (primary,) = admin.deployment().arms
        assert (primary.wanted, primary.bundle) == ("b", "a")
        assert "no folder" in primary.error
        assert admin.rollback("prod").bundle == "a"
        until(lambda: admin.deployment().arms[0].error is None)
    assert "bundle_before_served" in {entry["event"] for entry in logs}
    put(store, "b")
    shutil.rmtree(bundles / "a")
    with pytest.raises(BundleError, match="b cannot be served"), serving(follow(), store=store):
        pass


def test_admin_state_moves_along_and_what_cannot_hold_is_refused(serving, follow, store) -> None:
    put(store, "a")
    with served(serving, follow(), store) as (running, admin), Client(running.grpc) as client:
        pins = [{"item_id": f"{name}-item-9", "position": 1} for name in "ab"]
        pins[1]["position"] = 2
        admin.create(Kind.RULES, {"id": "pin", "effect": {"kind": "pin", "items": pins}})
        assert client.retrieve(top_k=2, min_revision=admin.revision()).items[0].item_id == "a-item-9"
        binding = {"items": {"text": "acme"}}
        words = [admin.create(Kind.KEYWORDS, {"text": f"word{n}", "binding": binding}) for n in range(3)]
        assert [word.slot.code for word in words] == [5, 6, 7]
        with pytest.raises(ConflictError, match=r"keywords/word0: slot: the bundle reserves no slot 5 on level 0"):
            admin.move("prod", {"bundle": "b"})
        with pytest.raises(ConflictError, match="in 3 places"):
            admin.move("prod", {"canary": {"bundle": "wordless", "share": 0.1}}, validate_only=True)
        admin.move("prod", {"bundle": "b"}, allow_unbound=True)
        until(lambda: names(admin) == {"primary": "b"})
        assert client.retrieve(query="word1", top_k=3).items[1].item_id == "b-item-9"
        assert client.retrieve(query="word1").applied == ["rules/pin", "keywords/word1"]
        assert client.retrieve(query="word0").applied == ["rules/pin"]
        assert running.metric("genretrieval_admin_skipped_resources") == 1
        # Replicas that still serve the bundle before answer with the slot; bound again, the word gets another one.
        assert store.get(Kind.KEYWORDS, "word0").slot == words[0].slot
        admin.delete(Kind.KEYWORDS, "word2")
        with closing(SqlStore.open(str(store._engine.url), quarantine=timedelta(0))) as rested:
            assert [slot.code for slot in rested.free_slots()] == [7]
        admin.rollback("prod")
        until(lambda: names(admin) == {"primary": "a"})
        assert client.retrieve(query="word0", top_k=3).items[0].item_id == "a-item-9"
        assert client.retrieve(query="word0").applied == ["rules/pin", "keywords/word0"]


def test_words_are_bound_to_slots_that_bundle_and_canary_have(serving, follow, store) -> None:
    put(store, "a")
    with served(serving, follow(), store) as (_, admin):
        assert admin.slots().free == 3
        admin.move("prod", {"canary": {"bundle": "b", "share": 0.5}})
        until(lambda: admin.slots().free == 2)
        admin.create(Kind.KEYWORDS, {"text": "word", "binding": {"items": {"text": "acme"}}})
        admin.move("prod", {"canary": None})
        until(lambda: admin.slots().free == 2 and admin.slots().bound == 1)


def test_a_server_of_one_bundle_says_what_it_serves_and_follows_nothing(keyword_bundle, serving, store) -> None:
    with served(serving, keyword_bundle, store) as (_, admin):
        (primary,) = admin.deployment().arms
        assert (primary.arm, primary.wanted, primary.version) == ("primary", None, keyword_bundle.manifest.version)
        for call in (admin.bundles, lambda: admin.create(Kind.ALIASES, {"id": "prod", "bundle": "a"})):
            with pytest.raises(ConflictError, match="--alias"):
                call()


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_process_is_told_by_the_command_line(bundles, tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/admin.db"
    shutil.rmtree(bundles / "c")
    with pytest.raises(BundleError, match="no folder"):
        run("bundles", "create", "prod", "c", "--bundles", str(bundles), "--store", url)
    run("bundles", "create", "prod", "a", "--bundles", str(bundles), "--store", url)
    with pytest.raises(InvalidInputError, match="--admin-store"):
        run("serve", "--bundles", str(bundles), "--alias", "prod")
    options = ["--bundles", str(bundles), "--alias", "prod", "--admin-store", url, "--threads", "1", "--quiet"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0"]
    command = [sys.executable, "-m", "genretrieval.cli", "serve", *options, *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = next(line for line in map(json.loads, process.stdout) if line["event"] == "ready")
            here = ("--endpoint", ready["admin"])

            def serves(**arms: str) -> None:
                def told() -> dict[str, str]:
                    return {
                        arm["arm"]: arm.get("bundle") for arm in json.loads(run("bundles", "status", *here))["arms"]
                    }

                until(lambda: told() == arms)

            listed = [json.loads(line) for line in run("bundles", "list", *here).splitlines()]
            assert [bundle["name"] for bundle in listed] == ["a", "b", "wordless"]
            assert listed[0]["version"] == VERSIONS["a"]
            run("bundles", "canary", "prod", "b", "--share", "0.1", *here)
            serves(primary="a", canary="b")
            run("bundles", "end-canary", "prod", *here)
            serves(primary="a")
            run("bundles", "canary", "prod", "b", "--share", "0.1", *here)
            run("bundles", "promote", "prod", *here)
            serves(primary="b")
            assert json.loads(run("bundles", "show", "prod", *here))["previous"] == "a"
            run("bundles", "rollback", "prod", *here)
            serves(primary="a")
            run("bundles", "set", "prod", "b", "--validate-only", *here)
            run("bundles", "set", "prod", "b", *here)
            serves(primary="b")
        finally:
            process.terminate()
        assert process.wait(20) == 0
    assert VERSIONS["a"] in run("bundles", "check", str(bundles / "a"))
    (bundles / "a" / GRAPH).unlink()
    with pytest.raises(BundleError, match="lacks"):
        run("bundles", "check", str(bundles / "a"))
