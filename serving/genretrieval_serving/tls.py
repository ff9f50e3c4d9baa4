"""TLS of every port but the one for probes: one certificate, read again when its files change."""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import structlog
from cryptography import x509

from genretrieval.errors import InvalidInputError
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

# Until files that could not be used are tried again without having changed: what was wrong may not be theirs.
RETRY_SECONDS = 1.0
EXPIRES_SOON = timedelta(days=7)


@dataclass(frozen=True)
class TlsSettings:
    """Files in PEM.

    Attributes:
        cert: the server's certificate, followed by those between it and its authority.
        key: its private key, not encrypted.
        client_ca: authorities of clients. With it, a client without a certificate of theirs is not let in.

    Raises:
        InvalidInputError: a file cannot be read, or certificate and key do not belong together.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Find out now, not with the first client."""
        try:
            self.context()
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise InvalidInputError(
                f"TLS cannot be served with {', '.join(map(str, self.files()))}: {error}. Give a certificate chain, "
                "its key without a passphrase, and authorities of clients where only theirs may call, all in PEM"
            ) from error

    def files(self) -> list[Path]:
        """All of them."""
        return [file for file in (self.cert, self.key, self.client_ca) if file is not None]

    def context(self) -> ssl.SSLContext:
        """The files as they are now; raises what `ssl` raises."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A passphrase would be asked for at the terminal.
        context.load_cert_chain(self.cert, self.key, password=b"")
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Certificates:
    """What `TlsSettings` name, as it is when a client connects. Thread-safe.

    Files that cannot be used, for example while they are being replaced, are logged and tried again, and the last ones
    that could are served. Connections that are open stay as they are.
    """

    def __init__(self, settings: TlsSettings, metrics: Metrics) -> None:
        """Read them; `metrics` are told when the certificate ends, each time it is read."""
        self._settings, self._metrics = settings, metrics
        self._guard = threading.Lock()
        # Of the files that are served, and of those that were tried last.
        self._stamps = self._tried = self._stamp()
        self._try_again, self._failure = 0.0, ""
        self._context, self._chain = self._load()

    def ssl_context(self) -> ssl.SSLContext:
        """For a server that takes one context for its life: each handshake is done with the newest."""
        context = self._settings.context()
        context.sni_callback = self._on_hello  # called for clients that name no server, too
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for gRPC."""
        must_show = self._settings.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._chain, self._for_grpc, must_show)

    def _on_hello(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        with self._guard:
            self._look()
            connection.context = self._context

    def _for_grpc(self) -> grpc.ServerCertificateConfiguration:
        with self._guard:
            self._look()
            return self._chain

    def _look(self) -> None:
        """Take over files that have changed since they were read."""
        stamps, now = self._stamp(), time.monotonic()
        if stamps == self._stamps or (stamps == self._tried and now < self._try_again):
            return
        self._tried, self._try_again = stamps, now + RETRY_SECONDS
        try:
            self._context, self._chain = self._load()
        except (OSError, ValueError) as error:
            if str(error) != self._failure:  # once, however often it is tried
                log.warning("certificate_not_renewed", cert=str(self._settings.cert), error=str(error))
            self._failure = str(error)
        else:
            # Those of before they were read: what was written meanwhile is read again.
            self._stamps, self._failure = stamps, ""
            log.info("certificate_renewed", cert=str(self._settings.cert))

    def _load(self) -> tuple[ssl.SSLContext, grpc.ServerCertificateConfiguration]:
        """The files as they are now, and when they end; raises what `ssl` raises."""
        settings = self._settings
        context, cert = settings.context(), settings.cert.read_bytes()
        roots = None if settings.client_ca is None else settings.client_ca.read_bytes()
        chain = grpc.ssl_server_certificate_configuration([(settings.key.read_bytes(), cert)], roots)
        # The server's own comes first. Behind it there may be some that have ended, which clients find a way around.
        ends = x509.load_pem_x509_certificates(cert)[0].not_valid_after_utc
        self._metrics.certificate_expiry.set(ends.timestamp())
        left = ends - datetime.now(UTC)
        if left < EXPIRES_SOON:
            event = "certificate_expired" if left <= timedelta(0) else "certificate_expires_soon"
            log.warning(event, cert=str(settings.cert), ends=ends.isoformat())
        return context, chain

    def _stamp(self) -> list[tuple[int, ...] | None]:
        """What tells a file from another one of its name; None while there is none."""
        stamps: list[tuple[int, ...] | None] = []
        for file in self._settings.files():
            try:
                stat = file.stat()
            except OSError:
                stamps.append(None)
            else:
                # The last is there for who may read it, which is often said after it was written.
                stamps.append((stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_ctime_ns))
        return stamps
