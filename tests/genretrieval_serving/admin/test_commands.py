"""The verbs `keywords`, `rules`, `synonyms` and `keys`, typed against a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from genretrieval.cli import app
from genretrieval.errors import (
    EtagMismatchError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from genretrieval_serving.admin.sql import SqlStore

Genretrieval = Callable[..., str]


def run(*words: str) -> str:
    """What a command printed; its error as it raised it."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('commands')}/admin.db"


@pytest.fixture(scope="module")
def shop(keyword_bundle: Any, serving: Any, url: str) -> Iterator[Any]:
    with closing(SqlStore.open(url)) as store, serving(keyword_bundle, store=store) as running:
        yield running


@pytest.fixture
def genretrieval(shop: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Genretrieval:
    """Types a verb of the admin API, as somebody whose key may do all."""
    for line in run("keys", "list", "--store", url).splitlines():
        if not json.loads(line).get("revoked_at"):
            run("keys", "revoke", json.loads(line)["id"], "--store", url)
    scopes = ("--scope", "admin.write", "--scope", "retrieve")
    monkeypatch.setenv("GENRETRIEVAL_API_KEY", run("keys", "create", "ann", *scopes, "--store", url).strip())
    return lambda *words: run(*words, "--endpoint", shop.admin)


def test_a_word_from_its_creation_to_its_end(genretrieval, shop, tmp_path) -> None:
    made = json.loads(genretrieval("keywords", "create", "Labubu", "--type", "Brand", "--note", "new"))
    assert (made["id"], made["type"], made["note"]) == ("labubu", "Brand", "new")
    (tmp_path / "ids").write_text("item-5\n\nitem-6\r\n")
    genretrieval("keywords", "bind", "labubu", "--item", "item-17", "--items-file", str(tmp_path / "ids"))
    bound = json.loads(genretrieval("keywords", "get", "labubu"))
    assert bound["binding"]["items"]["item_ids"] == ["item-17", "item-5", "item-6"]
    answer = json.loads(run("retrieve", "--endpoint", shop.grpc, "--query", "red labubu", "--top-k", "3"))
    assert {item["item_id"] for item in answer["items"]} == {"item-17", "item-5", "item-6"}
    table = genretrieval("keywords", "test", "labubu", "--query", "labubu", "--top-k", "3")
    assert "item-17" in table
    assert "applied: keywords/labubu" in table

    select = ("--select", '{"filters": {"min_price": 3}}', "--valid-until", "2099-01-01")
    bound = json.loads(genretrieval("keywords", "bind", "labubu", *select))
    assert bound["binding"]["items"]["filters"]["min_price"] == 3
    assert bound["binding"]["valid_until"]
    with pytest.raises(EtagMismatchError):
        genretrieval("keywords", "unbind", "labubu", "--etag", made["etag"])
    assert "slot" not in json.loads(genretrieval("keywords", "unbind", "labubu"))
    assert json.loads(genretrieval("keywords", "patch", "labubu", '{"note": null}'))["note"] == ""
    genretrieval("keywords", "delete", "labubu")
    assert genretrieval("keywords", "list") == ""
    assert json.loads(genretrieval("keywords", "list", "--deleted"))["deleted_at"]
    genretrieval("keywords", "undelete", "labubu")
    assert [json.loads(line)["id"] for line in genretrieval("keywords", "list").splitlines()] == ["labubu"]


def test_rules_and_synonyms(genretrieval, tmp_path) -> None:
    rule = {
        "effect": {"kind": "pin", "items": [{"item_id": "gone", "position": 1}, {"item_id": "item-3", "position": 2}]}
    }
    (tmp_path / "rule.json").write_text(json.dumps(rule))
    given = f"@{tmp_path / 'rule.json'}"
    assert "not in the catalogue: gone" in genretrieval("rules", "test", given)
    dry = genretrieval("rules", "create", given, "--id", "mine", "--validate-only")
    with pytest.raises(NotFoundError):
        genretrieval("rules", "get", "mine")
    assert json.loads(genretrieval("rules", "create", given, "--id", "mine"))["id"] == json.loads(dry)["id"] == "mine"
    one_way = json.loads(genretrieval("synonyms", "create", "shoes", "boots", "--one-way", "--id", "s"))
    assert (one_way["kind"], one_way["terms"]) == ("one_way", ["shoes", "boots"])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files(genretrieval, tmp_path, suffix) -> None:
    genretrieval("synonyms", "create", f"=a {suffix}", f"b {suffix}")
    file = tmp_path / f"synonyms.{suffix}"
    genretrieval("synonyms", "export", str(file))
    assert genretrieval("synonyms", "export", "--file-format", suffix) == file.read_text()
    report = json.loads(genretrieval("synonyms", "import", str(file), "--validate-only"))
    assert (report["created"], report["updated"]) == (0, 0)
    assert report["unchanged"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keywords", "bind", "x"], "say which items"),
        (["keywords", "bind", "x", "--item", "a", "--select", "{}"], "not both"),
        (["keywords", "bind", "x", "--items-file", "no-such-file"], "no-such-file cannot be read"),
        (["rules", "create", "{"], "no JSON"),
        (["rules", "create", "[]"], "no JSON object"),
        (["rules", "export", "--file-format", "xml"], "no format 'xml'"),
    ],
)
def test_what_cannot_be_meant_is_refused(genretrieval, words, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        genretrieval(*words)


def test_keys(genretrieval, url, monkeypatch, capsys) -> None:
    reader = run("keys", "create", "bob", "--scope", "admin.read", "--expires", "2099-01-01", "--store", url).strip()
    keys = {key["principal"]: key for key in map(json.loads, run("keys", "list", "--store", url).splitlines())}
    assert keys["bob"]["scopes"] == ["admin.read"]
    assert keys["bob"]["expires_at"].startswith(("2098", "2099"))
    assert reader not in run("keys", "list", "--store", url)
    monkeypatch.setenv("GENRETRIEVAL_API_KEY", reader)
    genretrieval("rules", "list")
    with pytest.raises(PermissionDeniedError):
        genretrieval("keywords", "create", "x")
    monkeypatch.delenv("GENRETRIEVAL_API_KEY")
    with pytest.raises(UnauthenticatedError):
        genretrieval("rules", "list")
    with pytest.raises(InvalidInputError, match="no scope root"):
        run("keys", "create", "eve", "--scope", "root", "--store", url)
    assert run("keys", "revoke", keys["bob"]["id"], "--store", url) == f"{keys['bob']['id']} revoked\n"
    with pytest.raises(NotFoundError):
        run("keys", "revoke", "nobody", "--store", url)


def test_a_store_is_named_by_its_url(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        run("keys", "list", "--store", str(tmp_path / "admin.db"))
