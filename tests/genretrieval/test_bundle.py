from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genretrieval.bundle import (
    CATALOGUE,
    GRAPH,
    KEYWORDS,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    load_bundle,
    sha256,
    write_bundle,
)
from genretrieval.errors import BundleError, BundleIncompleteError
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "genretrieval_version": "0.1.0",
        "n_items": 1,
        "codebook_sizes": (4, 4),
        "opset": 18,
        "minimum_onnxruntime": "1.20",
        "graph_inputs": ("beams",),
        "max_history": 5,
        "max_query_tokens": 4,
        "reads_queries": False,
        "beam_width": 10,
        "exclude_seen": False,
    }
    return Manifest(**fields | changes)


def write(path: Path, graph: bytes = b"graph", **changes: Any) -> Manifest:
    wanted = manifest(**changes)
    with write_bundle(path, wanted) as folder:
        (folder / GRAPH).write_bytes(graph)
        pl.DataFrame({"item_id": ["a"], "semantic_id": [[1, 2]], "popularity": [3]}).write_parquet(folder / CATALOGUE)
    return wanted


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    # A server runs as another user than what trains, and safetensors writes for its own alone.
    with write_bundle(tmp_path / "bundle", manifest()) as folder:
        for name in (GRAPH, CATALOGUE):
            (folder / name).write_bytes(b"")
            (folder / name).chmod(0o600)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "bundle").iterdir()}
    assert modes == {(tmp_path / "bundle").stat().st_mode & 0o666}


@pytest.mark.parametrize("name", [GRAPH, MANIFEST])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bundle")
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(Permission denied\).*right to read"):
        load_bundle(tmp_path / "bundle")


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "shop", uuid="0a1b2c3d-0000-4000-8000-000000000000")
    return tmp_path / "shop"


def test_what_is_written_is_read(path) -> None:
    bundle = load_bundle(path)
    assert bundle.manifest.version == "20260102-0a1b2c3d"
    assert bundle.manifest.files == {name: sha256(path / name) for name in (CATALOGUE, GRAPH)}
    assert bundle.catalogue()["item_id"].to_list() == ["a"]
    assert bundle.features().events == ()
    assert [entry.name for entry in path.parent.iterdir()] == ["shop"]


def test_a_folder_or_manifest_that_is_not_there(path, tmp_path) -> None:
    with pytest.raises(BundleIncompleteError, match="is no folder"):
        load_bundle(tmp_path / "nothing")
    (path / MANIFEST).unlink()
    with pytest.raises(BundleIncompleteError, match="never finished"):
        load_bundle(path)


def test_a_changed_file_is_named_with_its_consequence(path) -> None:
    (path / GRAPH).write_bytes(b"GRAPH")
    with pytest.raises(BundleError, match=r"retriever\.onnx has changed.*other items than were evaluated"):
        load_bundle(path)


def test_a_missing_file_is_named(path) -> None:
    (path / CATALOGUE).unlink()
    with pytest.raises(BundleError, match=r"lacks catalogue\.parquet"):
        load_bundle(path)


def test_a_manifest_must_list_what_serving_needs(path) -> None:
    files = load_bundle(path).manifest.files
    edit_manifest(path, files={CATALOGUE: files[CATALOGUE]})
    with pytest.raises(BundleError, match=r"does not list retriever\.onnx"):
        load_bundle(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "inner/../../outside"])
def test_a_manifest_cannot_point_outside_its_folder(path, name) -> None:
    outside = path.parent / "outside"
    outside.write_bytes(b"x")
    edit_manifest(path, files=load_bundle(path).manifest.files | {name: sha256(outside)})
    with pytest.raises(BundleError, match="lacks"):
        load_bundle(path)


def test_a_newer_schema_is_refused_as_newer_whatever_else_it_holds(path) -> None:
    edit_manifest(path, schema_version=SCHEMA_VERSION + 1, a_field_of_the_future=[1])
    with pytest.raises(BundleError, match=rf"version {SCHEMA_VERSION + 1}.*upgrade genretrieval on the server"):
        load_bundle(path)


def test_an_older_schema_is_refused_whatever_it_lacks(path) -> None:
    edit_manifest(path, schema_version=1, graph_inputs=None)
    with pytest.raises(BundleError, match=r"schema version 1.*Export it again"):
        load_bundle(path)


@pytest.mark.parametrize("change", [{"n_items": None}, {"unknown": 1}, {"schema_version": "new"}])
def test_a_manifest_with_mistakes_is_refused(path, change) -> None:
    edit_manifest(path, **change)
    with pytest.raises(BundleError, match="damaged or no manifest"):
        load_bundle(path)


def test_a_manifest_that_is_no_json_is_refused(path) -> None:
    (path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="damaged or no manifest"):
        load_bundle(path)


def test_a_failed_export_leaves_nothing_and_the_older_bundle_alone(path) -> None:
    before = load_bundle(path).manifest
    with pytest.raises(FileNotFoundError), write_bundle(path, manifest()) as folder:
        (folder / GRAPH).write_bytes((folder / "weights").read_bytes())
    assert load_bundle(path).manifest == before
    assert [entry.name for entry in path.parent.iterdir()] == ["shop"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("parquet: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_and_says_how_far_it_came(path, error) -> None:
    before = load_bundle(path).manifest

    def fill() -> None:
        with write_bundle(path, before.model_copy(update={"uuid": "another"})) as folder:
            (folder / "retriever.onnx").write_bytes(bytes(1500))
            raise error

    with pytest.raises(BundleError, match=r"disk is full: .* for the bundle \S+ after 1,500 bytes"):
        fill()
    assert load_bundle(path).manifest == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_killed_export_never_loads_and_is_removed_by_the_next(tmp_path) -> None:
    path = tmp_path / "shop"
    killed = write_bundle(path, manifest(uuid="killed"))
    partial = killed.__enter__()
    (partial / GRAPH).write_bytes(b"half")
    # Killed here: nothing of the context manager runs any more.
    assert not path.exists()
    with pytest.raises(BundleIncompleteError, match="never finished"):
        load_bundle(partial)
    write(path)
    load_bundle(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop"]
    with pytest.raises(FileNotFoundError):
        killed.__exit__(None, None, None)


def test_a_newer_bundle_replaces_the_older_one_whole(path) -> None:
    (path / "notes.txt").write_text("of the older one")
    write(path, graph=b"newer", uuid="newer")
    assert load_bundle(path).manifest.uuid == "newer"
    assert (path / GRAPH).read_bytes() == b"newer"
    assert not (path / "notes.txt").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["shop"]


def test_folders_of_other_bundles_are_left_alone(tmp_path) -> None:
    others = [".shop.v2.partial-1", ".shop.old", ".shop.my-notes", ".shop-2.partial-1"]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "shop")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, "shop"])


def test_an_output_that_is_no_bundle_is_refused_before_the_work(tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        with (
            pytest.raises(BundleError, match="is not a bundle; it was left as it is"),
            write_bundle(tmp_path / name, manifest()),
        ):
            pytest.fail("the work was begun")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    load_bundle(tmp_path / "empty")


def write_with_keywords(path: Path, keywords: KeywordCodebook | None, **changes: Any) -> None:
    with write_bundle(path, manifest(**changes)) as folder:
        (folder / GRAPH).write_bytes(b"graph")
        pl.DataFrame({"item_id": ["a"], "semantic_id": [[1, 2]], "popularity": [3]}).write_parquet(folder / CATALOGUE)
        if keywords is not None:
            keywords.save(folder / KEYWORDS)


def test_keywords_come_with_reserved_slots_and_fit_the_codebooks(tmp_path: Path) -> None:
    dictionary = KeywordDictionary((Keyword("red", AttributeType.COLOR),))
    keywords = KeywordCodebook(dictionary, ((AttributeType.COLOR,),), np.array([1], np.int32), (4,), (2,))
    write_with_keywords(tmp_path / "fits", keywords, reserved_slots=(2, 0))
    assert load_bundle(tmp_path / "fits").features().keywords == keywords
    write_with_keywords(tmp_path / "without", keywords)
    assert load_bundle(tmp_path / "without").features().keywords is None
    write_with_keywords(tmp_path / "lacks", None, reserved_slots=(2, 0))
    with pytest.raises(BundleError, match=r"does not list keywords\.parquet"):
        load_bundle(tmp_path / "lacks").features()
    for number, wrong in enumerate(
        ({"codebook_sizes": (5, 4)}, {"reserved_slots": (3, 0)}, {"reserved_slots": (2, 1)})
    ):
        write_with_keywords(tmp_path / str(number), keywords, **{"reserved_slots": (2, 0)} | wrong)
        with pytest.raises(BundleError, match=r"read as other slots than the model was trained on"):
            load_bundle(tmp_path / str(number)).features()
