"""What `doctor` finds, what it says to do, and that it changes nothing."""

from __future__ import annotations

import shutil
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from genretrieval.cli import app
from genretrieval.doctor import Check
from genretrieval_serving import doctor
from genretrieval_serving.admin.resources import Binding, KeywordFields, Kind, Selector, SlotRef
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.doctor import examine_server


def found(about: str, **given: Any) -> Check:
    (check,) = [check for check in examine_server(**given) if check.about == about]
    return check


def test_a_bundle_that_can_be_served_answers(bundle_path) -> None:
    states = {check.about: check for check in examine_server(bundle=bundle_path, threads=1)}
    assert {check.state for about, check in states.items() if about.startswith("bundle")} == {"ok"}
    assert "opset 18" in states["bundle"].found
    assert "ms" in states["bundle request"].found


def test_a_bundle_that_was_changed_fails(bundle_path, tmp_path) -> None:
    broken = shutil.copytree(bundle_path, tmp_path / "broken")
    (broken / "retriever.onnx").write_bytes(b"x")
    failed = [check for check in examine_server(bundle=broken) if check.state == "fail"]
    assert [check.about for check in failed] == ["bundle"]
    assert "retriever.onnx" in failed[0].found
    assert found("bundle", bundle=tmp_path / "nowhere").state == "fail"


def test_limits_of_the_machine(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 2)
    assert found("cpu", threads=2).state == found("cpu").state == "ok"
    assert found("cpu", threads=3).state == "warn"
    for limit, state in ((-1, "ok"), (65_536, "ok"), (1024, "warn")):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert found("open files").state == state


def test_an_admin_store(tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/admin.db"
    assert found("admin store", admin_store=url).state == "warn"
    assert not list(tmp_path.iterdir())
    Path(tmp_path, "admin.db").touch()
    assert "no tables" in found("admin store", admin_store=url).found
    with closing(SqlStore.open(url)) as store:
        store.sync_slots([SlotRef(level=0, code=6)])
        assert found("admin store", admin_store=url).state == found("keyword slots", admin_store=url).state == "ok"
        assert found("clock", admin_store=url).state == "ok"
        word = KeywordFields(text="labubu", binding=Binding(items=Selector(item_ids=["1"])))
        store.apply(Call("ann"), [Create(Kind.KEYWORDS, "labubu", word)])
        assert found("keyword slots", admin_store=url).state == "warn"
        for version, state in (("0000", "fail"), ("0999", "warn"), ("9999", "fail")):
            with store._engine.begin() as connection:
                connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")
            assert found("admin store", admin_store=url).state == state
            assert store._transact(store._reading, lambda c: c.exec_driver_sql("SELECT * FROM alembic_version").all())
    away = found("admin store", admin_store="postgresql://ann:hunter2@127.0.0.1:1/shop")
    assert away.state == "fail"
    assert "hunter2" not in away.found


@pytest.mark.parametrize(("seconds", "state"), [(0.5, "ok"), (-1, "ok"), (3, "warn"), (-3, "warn"), (40, "fail")])
def test_clocks(seconds, state) -> None:
    assert doctor._skew(timedelta(seconds=seconds)).state == state


def test_histories() -> None:
    assert found("histories", histories="memory").state == "ok"
    away = found("histories", histories="redis://:hunter2@127.0.0.1:1/0")
    assert away.state == "fail"
    assert "hunter2" not in away.found


@pytest.mark.parametrize(("days", "state"), [(365, "ok"), (29, "warn"), (-1, "fail")])
def test_certificates(tmp_path, days, state) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(90), now + timedelta(days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("shop.example")]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "cert").write_bytes(made.public_bytes(pem))
    (tmp_path / "key").write_bytes(private)
    assert found("TLS", tls=(tmp_path / "cert", tmp_path / "key", None)).state == state
    (tmp_path / "key").write_bytes(b"")
    assert found("TLS", tls=(tmp_path / "cert", tmp_path / "key", None)).state == "fail"


def test_the_verb_ends_with_1_if_something_fails(bundle_path, tmp_path) -> None:
    good = CliRunner().invoke(app, ["doctor", "--bundle", str(bundle_path)])
    assert good.exit_code == 0
    assert {line[:5].strip() for line in good.output.splitlines()} <= {"ok", "warn"}
    assert CliRunner().invoke(app, ["doctor", "--bundle", str(tmp_path)]).exit_code == 1
