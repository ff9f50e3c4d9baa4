"""Both REST interfaces against their own descriptions: whatever is sent, answers are as documented."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from genretrieval_serving import rest
from genretrieval_serving.admin import api
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.admin.sql import SqlStore

# Of the tools, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module:Warning")
schemathesis.serializer.alias("application/jsonl", "text/plain")

QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=100, derandomize=False)


@pytest.fixture(scope="module")
def world(keyword_bundle: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A server that needs keys, and one that may do everything."""
    with closing(SqlStore.open(f"sqlite:///{tmp_path_factory.mktemp('contract')}/admin.db")) as store:
        _, secret = store.create_key("ann", list(Scope))
        with serving(keyword_bundle, store=store, catalogue_changes=tmp_path_factory.mktemp("changes")) as running:
            yield running, secret


# Beside the statuses that a good request may always get: what no schema can say, as that two terms are equal once
# normalised, that an etag is of yesterday, or that a key came with another request, is refused with these.
ACCEPTED = {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 409, 412, 422]}}


def described(module: Any, *, coverage: bool) -> Any:
    """An interface; `coverage` adds thousands of requests at the limits of what it allows."""
    config = {"checks": ACCEPTED, "phases": {"coverage": {"enabled": coverage}}}
    document = module.openapi()
    for operation in (o for operations in document["paths"].values() for o in operations.values()):
        # Every call here has a key, so that none may be made "without one"; what keys may do is a table in test_auth.
        del operation["security"]
    return schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(config))


@described(rest, coverage=False).parametrize()
@QUICK
def test_rest(case, world) -> None:
    check(case, world[0].http, world[1])


@described(api, coverage=False).parametrize()
@QUICK
def test_admin(case, world) -> None:
    check(case, world[0].admin, world[1])


@pytest.mark.slow
@described(rest, coverage=True).parametrize()
@LONG
def test_rest_at_length(case, world) -> None:
    check(case, world[0].http, world[1])


@pytest.mark.slow
@described(api, coverage=True).parametrize()
@LONG
def test_admin_at_length(case, world) -> None:
    check(case, world[0].admin, world[1])


def check(case: Any, url: str, secret: str) -> None:
    case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {secret}"})
