"""The console in a browser: what merchandisers and people on call do with it, on a running server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import polars as pl
import pytest

from genretrieval.bundle import CATALOGUE, MANIFEST, load_bundle, write_bundle
from genretrieval.retrieval import Retriever
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import AliasFields, Kind, Scope
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.bundle_folder import BundleFolder
from genretrieval_serving.rollout import Followed

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium")
HOSTILE = '<img src=x onerror="document.title=1;window.ran=1">'


def missing(what: str) -> Any:
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what}, and REQUIRE_BROWSER=1")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: make browser")
    if CHROMIUM is None:
        missing("there is no chromium on the PATH")
    with sync_playwright() as playwright:
        # Containers have no user namespaces, which the sandbox needs; only our own page is opened.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Shop(NamedTuple):
    """A server, and the keys of those who may write, read and retrieve: ann, bob and web."""

    admin: str
    keys: dict[str, str]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: Any, save_bundle: Any, keyword_codebook: Any, serving: Any) -> Iterator[Any]:
    """A server that needs keys, with titles, reserved slots and a folder of catalogue changes."""
    folder = tmp_path_factory.mktemp("console")
    untitled = load_bundle(save_bundle(folder / "untitled", keyword_codebook(3)))
    with write_bundle(folder / "shop", untitled.manifest) as written:
        for file in untitled.path.iterdir():
            if file.name != MANIFEST:
                shutil.copy(file, written)
        table = pl.read_parquet(written / CATALOGUE)
        titles = [HOSTILE if id_ == "item-5" else f"Title of {id_}" for id_ in table["item_id"]]
        table.with_columns(title=pl.Series(titles)).write_parquet(written / CATALOGUE)
    changes = folder / "changes"
    changes.mkdir()
    with closing(SqlStore.open(f"sqlite:///{folder}/admin.db", quarantine=timedelta(0))) as store:
        principals = {"ann": Scope.ADMIN_WRITE, "bob": Scope.ADMIN_READ, "web": Scope.RETRIEVE}
        keys = {name: store.create_key(name, [scope])[1] for name, scope in principals.items()}
        with serving(load_bundle(folder / "shop"), store=store, auth=True, catalogue_changes=changes) as running:
            yield Shop(running.admin, keys)


@pytest.fixture
def admin(shop: Any) -> Iterator[AdminClient]:
    """The API beside the page; what is stored is deleted afterwards."""
    with AdminClient(shop.admin, api_key=shop.keys["ann"]) as client:
        yield client
        for kind in (Kind.KEYWORDS, Kind.RULES, Kind.SYNONYMS):
            for resource in client.pages(kind):
                client.delete(kind, resource.id)


# The browser notes every refusal of the API, and every call that a test breaks, as an error. The page tells of them.
REFUSED = re.compile(r"Failed to load resource: (.* a status of (401|403|404|409|412) |net::ERR_FAILED)")


@pytest.fixture
def open_page(browser: Any, shop: Any) -> Iterator[Callable[..., Any]]:
    """A new visitor: ``open_page("keywords", who="bob")``. Nothing may fail in the page, or leave for elsewhere."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def opened(view: str = "", who: str | None = "ann", url: str = shop.admin, **options: Any) -> Any:
        def look_at_message(message: Any) -> None:
            if message.type in ("error", "warning") and not REFUSED.match(message.text):
                wrong.append(message.text)

        def look_at_request(request: Any) -> None:
            if urlsplit(request.url).netloc != urlsplit(url).netloc and not request.url.startswith("data:"):
                wrong.append(request.url)

        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", look_at_message)
        page.on("request", look_at_request)
        page.goto(f"{url}/console#{view}")
        if who is not None:
            sign_in(page, shop.keys[who])
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def sign_in(page: Any, secret: str) -> None:
    page.get_by_label("API key or token").fill(secret)
    page.get_by_role("button", name="Sign in").click()


def results(page: Any, name: str = "Results") -> Any:
    return page.get_by_role("list", name=name).get_by_role("listitem")


def retrieve(page: Any, query: str) -> Any:
    page.get_by_role("link", name="Try", exact=True).click()
    page.get_by_label("Query").fill(query)
    page.get_by_role("button", name="Retrieve").click()
    return results(page)


def confirm(page: Any, verb: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=verb).click()


def row(page: Any, text: str) -> Any:
    return page.get_by_role("row").filter(has_text=text)


def test_a_wrong_key_is_refused_and_a_right_one_is_of_this_tab_alone(open_page, shop) -> None:
    page = open_page("keywords", who=None)
    sign_in(page, "grk_wrong")
    page.get_by_text("the API key is not known").wait_for()
    sign_in(page, shop.keys["web"])
    page.get_by_text("lacks the scope admin.read").wait_for()
    sign_in(page, shop.keys["ann"])
    page.get_by_role("heading", name="Keywords").wait_for()
    assert page.get_by_label("API key or token").is_hidden()
    assert page.get_by_text(re.compile(r"^revision \d+$")).is_visible()
    assert page.get_by_role("link", name="Keywords", exact=True).get_attribute("aria-current") == "page"
    assert shop.keys["ann"] not in page.url
    kept = page.evaluate("({local: localStorage.length, session: sessionStorage.length, cookies: document.cookie})")
    assert kept == {"local": 0, "session": 1, "cookies": ""}
    page.reload()
    page.get_by_role("heading", name="Keywords").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key or token").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.get_by_role("table").count() == 0


def test_a_bound_word_comes_first_and_is_unbound_deleted_and_brought_back(open_page, admin) -> None:
    page = open_page("keywords")
    page.get_by_role("button", name="New keyword").click()
    page.get_by_label("Word", exact=True).fill("Labubu")
    page.get_by_label("Type").select_option("Brand")
    page.get_by_label("Items", exact=True).select_option("ids")
    page.get_by_label("Item ids").fill("item-17\nitem-9\n")
    form = page.get_by_role("form", name="New keyword")
    form.get_by_role("button", name="Save").click()
    page.get_by_text("Saved Labubu: revision").wait_for()
    assert f"revision {admin.revision()}" == page.locator("#revision").inner_text()
    text = row(page, "Labubu").inner_text()
    assert all(part in text for part in ("Brand", "2 items", "level 0", "in force")), text
    assert page.get_by_text("2 free").is_visible()

    first = retrieve(page, "red labubu").first
    first.get_by_text("keywords/labubu").wait_for()
    assert re.search("item-(17|9)", first.inner_text())
    first.get_by_text("Title of item-").wait_for()
    retrieve(page, "red")
    page.get_by_text("keywords/labubu").first.wait_for(state="detached")

    page.get_by_role("link", name="Keywords", exact=True).click()
    page.get_by_role("button", name="Unbind Labubu").click()
    confirm(page, "Cancel")
    assert admin.get(Kind.KEYWORDS, "labubu").binding is not None
    page.get_by_role("button", name="Unbind Labubu").click()
    confirm(page, "Unbind")
    page.get_by_text("Unbound Labubu").wait_for()
    assert "not bound" in row(page, "Labubu").inner_text()
    page.get_by_role("button", name="Edit Labubu").click()
    page.get_by_label("Items", exact=True).select_option("rule")
    page.get_by_label("Filters").fill('{"max_price": oops}')
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Filters: ").wait_for()
    page.get_by_label("Filters").fill('{"max_price": 3}')
    page.get_by_label("Until").fill("2035-01-31T12:00")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved Labubu").wait_for()
    bound = admin.get(Kind.KEYWORDS, "labubu").binding
    assert (bound.items.filters.max_price, bound.valid_until.year) == (3, 2035)

    page.get_by_role("button", name="Delete Labubu").click()
    confirm(page, "Delete")
    page.get_by_text("Deleted Labubu").wait_for()
    assert row(page, "Labubu").count() == 0
    page.get_by_label("Show deleted").check()
    page.get_by_role("button", name="Undelete Labubu").click()
    page.get_by_text("Brought back Labubu").wait_for()
    assert admin.get(Kind.KEYWORDS, "labubu").deleted_at is None

    row(page, "Labubu").get_by_role("link", name="History").click()
    row(page, "undelete keywords/labubu").wait_for()
    assert "ann" in row(page, "create keywords/labubu").inner_text()
    assert page.get_by_label("Of one resource").input_value() == "keywords/labubu"
    changed = row(page, "update keywords/labubu").first.inner_text()
    assert "binding" in changed
    assert "etag" not in changed


def test_a_pin_is_tried_before_it_is_stored(open_page, admin) -> None:
    page = open_page("rules")
    page.get_by_role("button", name="New rule").click()
    page.get_by_label("Query", exact=True).first.select_option("contains")
    page.get_by_label("Text", exact=True).fill("gift")
    page.get_by_label("Pinned items").fill("item-20")
    trial = page.get_by_role("form", name="Try before you store")
    trial.get_by_label("Query").fill("a gift")
    trial.get_by_label("How many").fill("5")
    trial.get_by_role("button", name="Try").click()
    trial.get_by_text("line 1 is no place and item id").wait_for()
    page.get_by_label("Pinned items").fill("2 item-20\n9 nobody")
    trial.get_by_role("button", name="Try").click()
    before, after = (page.get_by_role("region", name=name) for name in ("Before", "After"))
    page.get_by_text("Not in the catalogue: nobody").wait_for()
    pinned = after.get_by_role("listitem")
    assert re.search(r"item-20\s+new\s+rules/", pinned.nth(1).inner_text())
    assert "down 1" in pinned.nth(2).inner_text()
    assert "gone" in before.get_by_role("listitem").last.inner_text()
    assert list(admin.pages(Kind.RULES)) == []
    page.get_by_role("form", name="New rule").get_by_role("button", name="Save").click()
    page.get_by_text("Saved pin-").wait_for()
    assert "query contains “gift”" in row(page, "pin-").inner_text()
    assert "item-20" in retrieve(page, "a gift").nth(1).inner_text()


def test_other_effects_synonyms_and_pages(open_page, admin) -> None:
    for n in range(101):
        admin.create(Kind.SYNONYMS, {"kind": "two_way", "terms": [f"a{n:03}", f"b{n:03}"]})
    page = open_page("synonyms")
    row(page, "a099").wait_for()
    assert row(page, "a100").count() == 0
    page.get_by_role("button", name="More").click()
    row(page, "a100").wait_for()
    page.get_by_role("button", name="New synonym set").click()
    page.get_by_label("Kind").select_option("one_way")
    page.get_by_label("Terms").fill("sofa\ncouch")
    page.get_by_label("Enabled").uncheck()
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved sofa, couch").wait_for()
    stored = admin.get(Kind.SYNONYMS, "sofa-couch")
    assert (stored.kind, stored.terms, stored.enabled) == ("one_way", ["sofa", "couch"], False)

    page.get_by_role("link", name="Rules", exact=True).click()
    page.get_by_role("button", name="New rule").click()
    page.get_by_label("Effect").select_option("bury")
    page.get_by_label("Item ids").fill("item-0")
    page.get_by_label("Scenarios").fill("home, cart")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved bury-").wait_for()
    (rule,) = admin.pages(Kind.RULES)
    assert (rule.effect.amount, rule.condition.scenarios) == (0.7, ["home", "cart"])
    page.get_by_role("button", name="Edit bury-").click()
    page.get_by_role("form", name="Edit rule").get_by_role("button", name="Save").click()
    page.get_by_text("Nothing was changed").wait_for()
    page.get_by_label("Effect").select_option("block")
    page.get_by_role("form", name="Edit rule").get_by_role("button", name="Save").click()
    page.get_by_text("Saved bury-").wait_for()
    assert next(admin.pages(Kind.RULES)).effect.kind == "block"


def test_what_nobody_touched_is_stored_as_it_was(open_page, admin) -> None:
    """A line has no room for a line break, and a list of lines none for spaces at an end."""
    keyword = admin.create(
        Kind.KEYWORDS,
        {
            "text": " odd  word ",
            "note": "two\nlines ",
            "binding": {"items": {"item_ids": [" a", "b c "]}, "valid_until": "2035-01-31T12:34:56.789Z"},
        },
    )
    rule = admin.create(
        Kind.RULES,
        {
            "effect": {"kind": "boost", "amount": 0.25, "items": {"filters": {"min_price": 3.0}}},
            "condition": {"query": {"match": "regex", "text": " x$ "}, "scenarios": ["a, b"]},
        },
    )
    page = open_page(f"keywords/{keyword.id}")
    page.get_by_label("Type").select_option("Brand")
    page.get_by_role("form", name="Edit keyword").get_by_role("button", name="Save").click()
    page.get_by_text("Saved").wait_for()
    after = admin.get(Kind.KEYWORDS, keyword.id)
    assert (after.type, after.text, after.note, after.binding) == ("Brand", keyword.text, keyword.note, keyword.binding)
    page.goto(page.url.partition("#")[0] + f"#rules/{rule.id}")
    page.get_by_label("Priority").fill("7")
    page.get_by_role("form", name="Edit rule").get_by_role("button", name="Save").click()
    page.get_by_text("Saved").wait_for()
    again = admin.get(Kind.RULES, rule.id)
    assert (again.priority, again.condition, again.effect) == (7, rule.condition, rule.effect)


def test_peoples_texts_are_text(open_page, admin) -> None:
    binding = {"items": {"item_ids": ["item-5"]}}
    admin.create(Kind.KEYWORDS, {"id": "hostile", "text": HOSTILE, "note": HOSTILE, "binding": binding})
    page = open_page()
    first = retrieve(page, HOSTILE).first
    first.get_by_text(HOSTILE).wait_for()
    page.get_by_role("link", name="keywords/hostile").first.click()
    page.get_by_role("heading", name=HOSTILE).wait_for()
    page.get_by_role("link", name="Items", exact=True).click()
    page.get_by_label("Item id").fill("item-5")
    page.get_by_role("button", name="Look up").click()
    page.get_by_role("heading", name=HOSTILE).wait_for()
    # What is changed is the item that is shown, whatever stands in the field.
    page.get_by_label("Item id").fill("nobody")
    page.get_by_role("button", name="Out of stock").or_(page.get_by_role("button", name="In stock")).click()
    page.get_by_text(re.compile("^item-5 is (in|out of) stock")).wait_for()
    page.get_by_role("heading", name=HOSTILE).wait_for()
    page.get_by_role("link", name="Audit", exact=True).click()
    page.get_by_text(HOSTILE).first.wait_for()
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    assert page.title() == "Audit · genretrieval console"


def test_who_was_first_is_told_and_nothing_typed_is_lost(open_page, admin) -> None:
    admin.create(Kind.KEYWORDS, {"text": "furby"})
    page = open_page("keywords/furby")
    page.get_by_label("Note").fill("mine")
    admin.patch(Kind.KEYWORDS, "furby", {"note": "theirs"})
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Somebody else changed it").wait_for()
    assert page.get_by_label("Note").input_value() == "mine"
    page.get_by_role("button", name="Load it anew").click()
    page.wait_for_function("[...document.querySelectorAll('input')].some(i => i.value === 'theirs')")
    page.get_by_label("Note").fill("ours")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved furby").wait_for()
    assert admin.get(Kind.KEYWORDS, "furby").note == "ours"
    # The same for what a list offers.
    admin.patch(Kind.KEYWORDS, "furby", {"note": "theirs"})
    page.get_by_role("button", name="Delete furby").click()
    confirm(page, "Delete")
    page.get_by_text("Somebody else changed it").wait_for()


def test_a_change_whose_answer_was_lost_is_made_once(open_page, admin) -> None:
    page = open_page("synonyms")
    keys = []

    def lose_answer(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route(
        "**/v1/synonyms", lambda route: lose_answer(route) if route.request.method == "POST" else route.continue_()
    )
    page.get_by_role("button", name="New synonym set").click()
    page.get_by_label("Terms").fill("once\nonly")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved once, only").wait_for()
    assert (len(keys), len(set(keys))) == (2, 1)
    assert [event.action for event in admin.audit("synonyms/once-only")] == ["create"]
    page.route("**/v1/retrieve", lambda route: route.abort())
    page.get_by_role("link", name="Try", exact=True).click()
    page.get_by_label("Query").fill("typed")
    page.get_by_role("button", name="Retrieve").click()
    page.get_by_text("The server cannot be reached").wait_for()
    assert page.get_by_label("Query").input_value() == "typed"


def test_a_key_that_may_only_read_is_refused_and_what_was_typed_stays(open_page) -> None:
    page = open_page("keywords", who="bob")
    page.get_by_role("button", name="New keyword").click()
    page.get_by_label("Word", exact=True).fill("Labubu")
    page.get_by_label("Note").fill("typed")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("lacks the scope admin.write").wait_for()
    page.get_by_role("link", name="Audit", exact=True).click()
    page.get_by_role("heading", name="Audit").wait_for()
    page.get_by_role("link", name="Keywords", exact=True).click()
    assert page.get_by_label("Word", exact=True).input_value() == "Labubu"
    assert page.get_by_label("Note").input_value() == "typed"


def test_items_are_looked_up_sold_out_and_removed(open_page, admin) -> None:
    page = open_page("items/item-7")
    page.get_by_role("heading", name="Title of item-7").wait_for()
    assert page.get_by_text("umbra").is_visible()
    page.get_by_role("button", name="Out of stock").click()
    page.get_by_text("item-7 is out of stock").wait_for()
    assert admin.item("item-7").attributes["in_stock"] is False
    page.get_by_role("button", name="Remove").click()
    confirm(page, "Remove")
    page.get_by_text("item-7 is removed").wait_for()
    page.get_by_role("button", name="Bring back").click()
    page.get_by_text("item-7 is back").wait_for()
    assert not admin.item("item-7").removed
    page.get_by_label("Item id").fill("nobody")
    page.get_by_role("button", name="Look up").click()
    page.get_by_text("there is no item 'nobody'").wait_for()


def test_a_canary_is_promoted_and_rolled_back_where_no_key_is_needed(
    open_page, save_bundle, keyword_codebook, fake_backend, serving, tmp_path
) -> None:
    for name in "ab":
        save_bundle(tmp_path / "bundles" / name, keyword_codebook(3), uuid=f"{name * 8}-0000-4000-8000-000000000000")
    opener = lambda path: Retriever(load_bundle(path), fake_backend())  # noqa: E731
    followed = Followed(BundleFolder(tmp_path / "bundles", opener, max_batch=2), "prod")
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store:
        store.apply(Call("test"), [Create(Kind.ALIASES, "prod", AliasFields(bundle="a"))])
        with serving(followed, store=store) as running, AdminClient(running.admin) as admin:
            page = open_page("bundles", who=None, url=running.admin)
            page.get_by_text("follows the alias prod").wait_for()
            assert page.get_by_label("API key or token").count() == 0
            assert page.get_by_role("button", name="Sign out").is_hidden()
            page.get_by_role("button", name="Change prod").click()
            page.get_by_label("Canary bundle").fill("nothing")
            page.get_by_role("button", name="Save").click()
            confirm(page, "Serve")
            page.locator(".said.bad").get_by_text("nothing").wait_for()
            page.get_by_label("Canary bundle").fill("b")
            page.get_by_label("Canary share").fill("0.25")
            page.get_by_role("button", name="Save").click()
            confirm(page, "Serve")
            page.get_by_text("prod serves a: revision").wait_for()
            assert "b, 25 %" in row(page, "prod").inner_text()
            page.get_by_role("button", name="Promote").click()
            confirm(page, "Promote")
            page.get_by_text("prod serves b: revision").wait_for()
            page.get_by_role("button", name="Roll back").click()
            confirm(page, "Roll back")
            page.get_by_text("prod serves a: revision").wait_for()
            page.get_by_role("link", name="Items", exact=True).click()
            page.get_by_label("Item id").fill("item-5")
            page.get_by_role("button", name="Look up").click()
            page.get_by_role("button", name="Out of stock").click()
            page.get_by_text("--catalogue-changes").wait_for()
            alias = admin.get(Kind.ALIASES, "prod")
            assert (alias.bundle, alias.canary, alias.previous) == ("a", None, None)


def test_what_answers_is_shown_in_a_narrow_dark_window_too(open_page) -> None:
    page = open_page("bundles", viewport={"width": 400, "height": 800}, color_scheme="dark")
    row(page, "primary").wait_for()
    page.get_by_text("this server serves one bundle and follows no alias").wait_for()
    for view in ("Try", "Keywords", "Rules", "Synonyms", "Items", "Bundles", "Audit"):
        page.get_by_role("link", name=view, exact=True).click()
        page.locator("h1").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, view
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(c => !c.labels.length).length"
    assert page.evaluate(unlabelled) == 0
