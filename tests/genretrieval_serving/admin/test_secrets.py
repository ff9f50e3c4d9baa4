"""No secret is logged or answered, and nothing that runs code is ever unpickled."""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.engine import make_url

from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.admin.sql import SqlStore

SOURCES = ("genretrieval", "tokenizers", "serving", "pipelines")


def test_a_server_logs_no_secret(keyword_bundle_path, make_database, tmp_path) -> None:
    """At the level that logs most, with everything that has a secret, in order and out of order."""
    signer = ec.generate_private_key(ec.SECP256R1())
    published = jwt.get_algorithm_by_name("ES256").to_jwk(signer.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [published | {"kid": "1"}]}))

    def token(**claims: object) -> str:
        whole = {"iss": "issuer", "aud": "shop", "sub": "ann", "scope": "retrieve admin.write"}
        whole["exp"] = datetime.now(UTC) + timedelta(hours=1)
        return jwt.encode(whole | claims, signer, "ES256", headers={"kid": "1"})

    password, redis, log_key = (secrets.token_hex(16) for _ in range(3))
    url = make_database("sqlite")
    if os.environ.get("GENRETRIEVAL_TEST_POSTGRES"):
        url = make_url(make_database("postgresql")).set(password=password).render_as_string(hide_password=False)
    store = SqlStore.open(url)
    _, key = store.create_key("ann", list(Scope))
    store.close()
    callers = [key, key[:-1] + "~", token(), token(aud="others"), token()[:-8] + "AAAAAAAA", "hunter2-hunter2"]
    command = [sys.executable, "-m", "genretrieval.cli", "serve", "--bundle", str(keyword_bundle_path)]
    command += ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0", "--log-level", "debug"]
    command += ["--jwt-issuer", "issuer", "--jwt-audience", "shop", "--jwt-jwks-file", str(tmp_path / "jwks.json")]
    command += ["--log-folder", str(tmp_path / "logs"), "--trace-endpoint", "http://127.0.0.1:1"]
    given = {
        "GENRETRIEVAL_ADMIN_STORE": url,
        "GENRETRIEVAL_HISTORIES": f"redis://:{redis}@127.0.0.1:1/0",
        "GENRETRIEVAL_LOG_KEY": log_key,
        "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={redis}",
    }
    answers = []
    with (
        (tmp_path / "out").open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | given) as process,
    ):
        try:
            ready = None
            while ready is None:
                assert process.poll() is None, (tmp_path / "out").read_text()
                lines = (tmp_path / "out").read_text().splitlines()
                ready = next((entry for line in lines if (entry := json.loads(line))["event"] == "ready"), None)
                time.sleep(0.05)
            with httpx.Client() as http, grpc.insecure_channel(ready["grpc"].removeprefix("grpc://")) as channel:
                for caller in callers:
                    headers = {"Authorization": f"Bearer {caller}"}
                    query = {"query": "labubu", "user_id": "u"}
                    answers.append(http.post(f"{ready['http']}/v1/retrieve", headers=headers, json=query))
                    answers.append(http.post(f"{ready['admin']}/v1/keywords", headers=headers, content=b"{"))
                    answers.append(http.get(f"{ready['admin']}/v1/keywords", headers=headers))
                    try:
                        metadata = (("authorization", headers["Authorization"]),)
                        stubs.RetrievalServiceStub(channel).Retrieve(pb.RetrieveRequest(), metadata=metadata)
                    except grpc.RpcError as error:
                        answers.append(httpx.Response(200, text=error.details()))
        finally:
            process.terminate()
    written = (tmp_path / "out").read_text() + "".join(answer.text for answer in answers)
    assert process.returncode == 0
    assert written.count('"event": "request"') == 4 * len(callers)
    assert "history" in written
    for secret in (
        password,
        redis,
        log_key,
        "Bearer",
        *(part for caller in callers for part in caller.split(".")[-1:]),
    ):
        assert secret not in written


def test_nothing_is_unpickled() -> None:
    """Neither by name nor by a library that would; `torch.load` must be told not to."""
    root, found = Path(__file__).parents[3], []
    for module in (file for source in SOURCES for file in (root / source).rglob("*.py")):
        text = module.read_text()
        if not re.search(r"pickle|joblib|shelve|dill|\.load\(", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if {name.partition(".")[0] for name in names} & {"pickle", "joblib", "shelve", "dill", "cloudpickle"}:
                    found.append(f"{module}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                called = ast.unparse(node.func)
                if options.get("allow_pickle") or called == "yaml.load" or called.endswith(".read_pickle"):
                    found.append(f"{module}:{node.lineno}")
                if called == "torch.load" and options.get("weights_only") is not True:
                    found.append(f"{module}:{node.lineno}")
    assert not found
