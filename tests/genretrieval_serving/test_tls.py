"""TLS on every port: who is let in, certificates that change while they are served, and where probes are."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs
from typer.testing import CliRunner

from genretrieval.cli import app
from genretrieval.errors import InvalidInputError, UnavailableError
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.app import Settings
from genretrieval_serving.client import Client, ClientTls
from genretrieval_serving.observability import Metrics
from genretrieval_serving.tls import Certificates, TlsSettings


@dataclass
class Authority:
    """Makes certificates."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._made(self.name, self.key, self.name, self.key, ca=True)
        self.file = self._written(f"{self.name}.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, *, file: str = "", passphrase: bytes = b"", lasts: timedelta = timedelta(days=30)
    ) -> tuple[Path, Path]:
        """Certificate and key for this machine."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._made(name, key, self.name, self.key, ca=False, lasts=lasts)
        locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked)
        return (
            self._written(f"{file or name}.crt", made.public_bytes(pem)),
            self._written(f"{file or name}.key", private),
        )

    def _written(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.with_suffix(".new").write_bytes(content)
        return path.with_suffix(".new").rename(path)

    def _made(
        self, name: str, key: Any, issuer: str, issuer_key: Any, *, ca: bool, lasts: timedelta = timedelta(days=30)
    ) -> x509.Certificate:
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, issuer)]
        now = datetime.now(UTC)
        here = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            builder = builder.add_extension(here, critical=False)
        return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture
def shop(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "shop-ca")


@pytest.fixture
def visitors(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "visitors-ca")


def health_of(running: Any, credentials: grpc.ChannelCredentials) -> int:
    with grpc.secure_channel(running.grpc.removeprefix("grpcs://"), credentials) as channel:
        return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status)


def test_every_port_speaks_tls_and_probes_do_not(start, shop, tmp_path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/admin.db")
    tls = ClientTls(ca=shop.file)
    with start(tls=TlsSettings(*shop.issue("server")), probe_port=0, store=store) as running:
        assert {url.partition(":")[0] for url in (running.http, running.admin)} == {"https"}
        for url in (running.http, running.grpc, running.grpc.replace("127.0.0.1", "localhost")):
            with Client(url, tls=tls) as client:
                assert client.retrieve(top_k=1).items
        for stranger in (running.http, running.grpc, running.grpc.replace("grpcs", "grpc")):
            with Client(stranger, 2.0) as client, pytest.raises(UnavailableError):
                client.info()
        with AdminClient(running.admin, tls=tls) as admin:
            assert admin.revision() == 0
        for path in ("livez", "readyz", "metrics"):
            assert httpx.get(f"{running.server.probes_url}/{path}").status_code == 200
            assert httpx.get(f"{running.http}/{path}", verify=tls.context()).status_code == 404
        for path in ("v1/info", "openapi.json"):
            assert httpx.get(f"{running.server.probes_url}/{path}").status_code == 404
        assert health_of(running, tls.credentials()) == health_pb2.HealthCheckResponse.SERVING
    store.close()


def test_only_clients_of_the_authority_are_let_in(start, shop, visitors) -> None:
    known = ClientTls(shop.file, *visitors.issue("visitor"))
    strangers = [ClientTls(shop.file), ClientTls(shop.file, *shop.issue("stranger"))]
    # Where only they can call, retrieval needs no key; changing what is retrieved does.
    settings = TlsSettings(*shop.issue("server"), visitors.file)
    assert Settings(host="0.0.0.0", tls=settings).tls
    for exposed in ({"tls": TlsSettings(settings.cert, settings.key)}, {"tls": settings, "admin_port": 0}):
        with pytest.raises(InvalidInputError, match="other machines"):
            Settings(host="0.0.0.0", **exposed)
    with start(tls=settings) as running:
        for url in (running.http, running.grpc):
            with Client(url, tls=known) as client:
                assert client.retrieve(top_k=1).items
            for stranger in strangers:
                with Client(url, 2.0, tls=stranger) as client, pytest.raises(UnavailableError):
                    client.info()


def served_name(url: str, tls: ClientTls) -> str:
    """Whom a server says it is."""
    with httpx.Client(verify=tls.context()) as client, client.stream("GET", f"{url}/livez") as answer:
        stream = answer.extensions["network_stream"].get_extra_info("ssl_object")
        return str(x509.load_der_x509_certificate(stream.getpeercert(True)).subject.rfc4514_string())


def test_certificates_change_while_they_are_served(start, shop, visitors, logged) -> None:
    old, new = ClientTls(shop.file, *visitors.issue("visitor")), Authority(shop.folder, "new-ca")
    settings = TlsSettings(*shop.issue("first", file="server"), visitors.file)
    with start(tls=settings) as running, Client(running.grpc, tls=old) as open_connection:
        assert served_name(running.http, old) == "CN=first"
        assert open_connection.info()
        settings.key.write_bytes(b"half written")
        assert served_name(running.http, old) == "CN=first"
        shop.issue("second", file="server")
        assert served_name(running.http, old) == "CN=second"
        with Client(running.grpc, tls=old) as client:
            assert client.info()
        # Another authority, of both sides.
        new.issue("third", file="server")
        os.replace(new.file, visitors.file)
        new._written("new-ca.pem", new.certificate.public_bytes(serialization.Encoding.PEM))
        latest = ClientTls(new.file, *new.issue("visitor-2"))
        assert served_name(running.http, latest) == "CN=third"
        with Client(running.grpc, tls=latest) as client:
            assert client.info()
        for url in (running.http, running.grpc):
            with (
                Client(url, 2.0, tls=ClientTls(new.file, old.cert, old.key)) as client,
                pytest.raises(UnavailableError),
            ):
                client.info()
        assert open_connection.info()  # what is open stays as it is
    assert "certificate_not_renewed" in logged.getvalue()


def test_files_that_cannot_be_used_are_refused_at_once(shop, tmp_path) -> None:
    cert, key = shop.issue("server")
    _, other_key = shop.issue("other")
    locked, locked_key = shop.issue("locked", passphrase=b"hunter2")
    for files in ((cert, other_key), (cert, tmp_path / "nowhere"), (locked, locked_key), (cert, key, key)):
        with pytest.raises(InvalidInputError, match="without a passphrase"):
            TlsSettings(*files)
    with pytest.raises(InvalidInputError, match="belong together"):
        ClientTls(shop.file, cert)
    for url in ("grpc://localhost:1", "http://localhost:1"):
        with pytest.raises(InvalidInputError, match="without TLS"):
            Client(url, tls=ClientTls(shop.file))
        with pytest.raises(InvalidInputError, match="without TLS"):
            AdminClient(url, tls=ClientTls(shop.file))


@pytest.mark.parametrize(
    "options",
    [
        ["--tls-cert", "cert"],
        ["--tls-key", "key"],
        ["--tls-client-ca", "ca"],
        ["--jwt-issuer", "issuer"],
        ["--jwt-audience", "shop"],
        ["--jwt-jwks-url", "https://login.example"],
        ["--jwt-issuer", "issuer", "--jwt-audience", "shop"],
    ],
)
def test_half_of_what_belongs_together_is_refused(options) -> None:
    refused = CliRunner().invoke(app, ["serve", "--bundle", "nowhere", *options])
    assert isinstance(refused.exception, InvalidInputError)
    assert "give" in str(refused.exception)


def test_keys_in_the_clear_are_said_to_be(start, shop, tmp_path, monkeypatch, logged) -> None:
    monkeypatch.setattr("genretrieval_serving.app.is_loopback", lambda _: False)
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store:
        with start(store=store, auth=True):
            assert logged.getvalue().count("keys_travel_in_the_clear") == 1
        with start(store=store, auth=True, tls=TlsSettings(*shop.issue("server"))):
            assert logged.getvalue().count("keys_travel_in_the_clear") == 1


def test_a_file_that_is_gone_for_a_while_changes_nothing(shop) -> None:
    settings = TlsSettings(*shop.issue("server"))
    certificates = Certificates(settings, Metrics())
    before = certificates._for_grpc()
    settings.cert.rename(settings.cert.with_suffix(".away"))
    assert certificates._for_grpc() is before
    settings.cert.with_suffix(".away").rename(settings.cert)
    assert certificates._for_grpc() is not before


def test_a_file_that_is_mended_in_place_is_taken(shop) -> None:
    settings = TlsSettings(*shop.issue("server"))
    certificates = Certificates(settings, Metrics())
    before = certificates._for_grpc()
    cert, key = shop.issue("renewed")
    old, stat = settings.key.read_bytes(), settings.key.stat()
    settings.cert.write_bytes(cert.read_bytes())
    assert certificates._for_grpc() is before
    # As a tool that keeps times writes it, over what was there: the same file, as long as before.
    assert len(old) == len(key.read_bytes())
    settings.key.write_bytes(key.read_bytes())
    os.utime(settings.key, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert certificates._for_grpc() is not before


def test_files_that_could_not_be_read_are_tried_again(shop, monkeypatch, logged) -> None:
    settings = TlsSettings(*shop.issue("server"))
    certificates = Certificates(settings, Metrics())
    before = certificates._for_grpc()
    shop.issue("renewed", file="server")
    context, why = TlsSettings.context, ["it is not ours yet"] * 3 + ["the disk is gone"]

    def unreadable(_: TlsSettings) -> Any:
        raise PermissionError(why.pop(0))

    monkeypatch.setattr("genretrieval_serving.tls.RETRY_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TlsSettings, "context", unreadable)
        while why:
            assert certificates._for_grpc() is before
    assert TlsSettings.context is context
    assert certificates._for_grpc() is not before
    events = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert [(event["event"], event.get("error")) for event in events] == [
        ("certificate_not_renewed", "it is not ours yet"),
        ("certificate_not_renewed", "the disk is gone"),
        ("certificate_renewed", None),
    ]


def test_files_that_stay_as_they_are_are_not_tried_at_every_connection(shop, monkeypatch) -> None:
    settings = TlsSettings(*shop.issue("server"))
    certificates, tried = Certificates(settings, Metrics()), []
    settings.key.write_bytes(b"half written")
    monkeypatch.setattr("genretrieval_serving.tls.RETRY_SECONDS", 1000.0)
    monkeypatch.setattr(certificates, "_load", lambda: tried.append(1) or TlsSettings.context(settings))
    for _ in range(5):
        certificates._for_grpc()
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("lasts", "event"),
    [
        (timedelta(minutes=-1), "certificate_expired"),
        (timedelta(days=6), "certificate_expires_soon"),
        (timedelta(days=8), ""),
    ],
)
def test_a_certificate_that_ends_is_said_to(shop, logged, lasts, event) -> None:
    metrics = Metrics()
    settings = TlsSettings(*shop.issue("server", lasts=lasts))
    certificates = Certificates(settings, metrics)

    def ends() -> float:
        return metrics.registry.get_sample_value("genretrieval_tls_certificate_expiry_timestamp_seconds")

    about = datetime.now(UTC) + lasts
    assert abs(ends() - about.timestamp()) < 60
    assert [json.loads(line)["event"] for line in logged.getvalue().splitlines()] == ([event] if event else [])
    shop.issue("renewed", file="server", lasts=timedelta(days=90))
    certificates._for_grpc()
    assert ends() > about.timestamp() + timedelta(days=80).total_seconds()


def test_the_end_of_a_chain_is_that_of_the_servers_own_certificate(shop) -> None:
    # Old authorities stay in chains for years after they ended.
    metrics = Metrics()
    cert, key = shop.issue("server", lasts=timedelta(days=90))
    old, _ = shop.issue("old", lasts=timedelta(minutes=-1))
    cert.write_bytes(cert.read_bytes() + old.read_bytes())
    with capture_logs() as logged:
        Certificates(TlsSettings(cert, key), metrics)
    ends = metrics.registry.get_sample_value("genretrieval_tls_certificate_expiry_timestamp_seconds")
    assert ends > (datetime.now(UTC) + timedelta(days=80)).timestamp()
    assert logged == []
