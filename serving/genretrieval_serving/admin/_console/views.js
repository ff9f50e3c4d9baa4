// What is retrieved, what is in the catalogue, which bundles answer, and who changed what.

import {
  act, api, area, badge, bar, button, check, forgetItems, form, h, heading, itemOf, lines, link, number, pages,
  readRevision, region, row, say, submit, sure, table, text, when,
} from "/console/core.js";

/** What a request asks, where people try one. */
export function requestFields() {
  const query = text("Query", "", undefined, { type: "search" });
  const history = area("History", "", "Item ids, one a line, oldest first.", 2);
  const scenario = text("Scenario");
  const topK = number("How many (top_k)", 10);
  const read = () => ({
    query: query.read() || null,
    history: lines(history.read()).map((item_id) => ({ item_id })),
    scenario: scenario.read() || null,
    top_k: topK.read(),
  });
  return { node: row(query.node, history.node, scenario.node, topK.node), read };
}

/** Names of bindings and rules, each as a way to it. */
const touched = (names) => names.map((name) => [" ", h("a", { class: "badge accent", href: `#${name}` }, name)]);
const told = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

/** Items in their order. The list stands at once, and titles come as the catalogue tells them. */
function results(label, items, mark = () => null) {
  return h("ol", { class: "results", "aria-label": label }, items.map((item, place) => {
    const title = h("span", { class: "title" });
    const id = item.item_id;
    itemOf(id).then((found) => { title.textContent = found?.attributes.title ?? ""; });
    return h("li", {},
      h("span", { class: "place" }, place + 1),
      h("div", {}, title, " ", link(id, "items", id), " ", mark(item, place), touched(item.touched_by)),
      h("div", { class: "quiet numbers" },
        h("span", { title: "Score" }, item.score.toFixed(4)),
        h("span", { title: "Semantic ID" }, item.semantic_id.join(" ")),
        h("span", { title: "Keyword path" }, item.keyword_path.filter(Boolean).join(" › "))));
  }));
}

/** What a response says beside its items. */
function around({ items, applied, degraded, missing_ids, revision, bundle_version, timings }) {
  const ms = (value) => `${value.toFixed(1)} ms`;
  const facts = [
    ["Items", items.length],
    applied.length && ["Applied", touched(applied)],
    degraded.length && ["Degraded", degraded.map((reason) => [badge(reason, "warn"), " "])],
    missing_ids.length && ["Missing ids", missing_ids.join(", ")],
    ["Revision", revision],
    ["Bundle", bundle_version],
    ["Time", `${ms(timings.total_ms)}: queue ${ms(timings.queue_ms)}, inference ${ms(timings.inference_ms)}`],
  ];
  return h("dl", { class: "facts" }, facts.filter(Boolean).map((fact) => told(...fact)));
}

/** The answers of a trial side by side, with what moved marked. */
export function compared({ before, after, missing_ids }) {
  const placeIn = ({ items }) => new Map(items.map((item, place) => [item.item_id, place]));
  const [was, is] = [placeIn(before), placeIn(after)];
  const gone = (item) => (is.has(item.item_id) ? null : badge("gone", "bad"));
  const moved = (item, place) => {
    const by = was.get(item.item_id) - place;
    if (Number.isNaN(by)) return badge("new", "good");
    return by === 0 ? null : badge(`${by > 0 ? "up" : "down"} ${Math.abs(by)}`, by > 0 ? "good" : "warn");
  };
  const side = (title, response, mark) => h("section", { "aria-label": title },
    h("h3", {}, title), results(title, response.items, mark), around(response));
  const missing = `Not in the catalogue: ${missing_ids.join(", ")}`;
  return h("div", {}, missing_ids.length > 0 && h("p", { class: "warn-text" }, missing),
    h("div", { class: "sides" }, side("Before", before, gone), side("After", after, moved)));
}

export function retrieve() {
  const request = requestFields();
  const facts = h("div", { "aria-live": "polite" });
  const answer = h("div");
  const work = async () => {
    const response = await api("POST", "/v1/retrieve", request.read());
    facts.replaceChildren(around(response));
    answer.replaceChildren(results("Results", response.items));
  };
  const label = "Try a request";
  const asking = form({ role: "search", "aria-label": label }, work, {}, request.node, bar(submit("Retrieve")));
  return { node: [heading(label), asking, facts, answer], show: () => {} };
}

export function catalogue() {
  const id = text("Item id");
  const said = region();
  const place = h("section");
  const look = async (wanted = id.read()) => {
    place.replaceChildren();
    forgetItems();
    place.append(shown(await api("GET", `/v1/items/${encodeURIComponent(wanted)}`)));
  };
  // What stands in the field may be another item's id by now.
  const changing = (done, item, method, path, body) => act(said, async () => {
    await api(method, path, body);
    await Promise.all([look(item.item_id), readRevision()]);
    return `${item.item_id} is ${done}.`;
  });
  const remove = async (item, path) => (await sure(`Remove ${item.item_id}? It can be brought back.`, "Remove"))
    && changing("removed", item, "DELETE", path);
  const actions = (item) => {
    const path = `/v1/items/${encodeURIComponent(item.item_id)}`;
    const stock = (yes) => button(yes ? "In stock" : "Out of stock",
      () => changing(yes ? "in stock" : "out of stock", item, "PATCH", path, { in_stock: yes }));
    const back = { items: [{ item_id: item.item_id, op: "upsert" }] };
    if (item.removed) return button("Bring back", () => changing("back", item, "POST", "/v1/items:batch", back));
    return [
      "in_stock" in item.attributes && stock(!item.attributes.in_stock),
      button("Remove", () => remove(item, path)),
    ];
  };
  const shown = (item) => h("div", {},
    h("h2", {}, item.attributes.title ?? item.item_id, " ", item.removed && badge("removed", "bad")),
    h("dl", { class: "rows" },
      told("Item id", item.item_id), told("Semantic ID", item.semantic_id.join(" ")),
      told("Popularity", item.popularity),
      Object.entries(item.attributes).map(([name, value]) => told(name, plain(value))),
      told("Catalogue revision", item.catalogue_revision)),
    bar(actions(item), link("History", "audit", `items/${item.item_id}`)));
  const asking = form({ role: "search", "aria-label": "Look up an item" }, () => look(), { said },
    row(id.node, bar(submit("Look up"))));
  return { node: [heading("Items"), asking, place], show: (wanted) => {
    if (!wanted) return;
    id.control.value = wanted;
    act(said, () => look());
  } };
}

/** JSON without what is not set. */
const plain = (value) =>
  (typeof value === "string" ? value : JSON.stringify(value, (_, part) => (part === null ? undefined : part)) ?? "");
const percent = (share) => `${Number((share * 100).toFixed(2))} %`;

export function bundles() {
  const said = region();
  const place = h("div", { class: "editor" });
  const quiet = h("div");
  const names = h("datalist", { id: "bundle-names" });
  const status = h("div");
  const arms = table("What this server answers with", [
    ["Arm", (arm) => h("strong", {}, arm.arm)],
    ["Bundle", ({ bundle, wanted }) => [bundle, wanted && wanted !== bundle && badge(`wanted: ${wanted}`, "warn")]],
    ["Version", (arm) => arm.version ?? "none yet"],
    ["Share", (arm) => percent(arm.share)],
    ["Items", (arm) => arm.items.toLocaleString()],
    ["Since", (arm) => when(arm.since)],
    ["Error", ({ error, failures, retry_at }) => error && h("span", { class: "bad-text" },
      `${error} (tried ${failures} times, again ${when(retry_at) ?? "soon"})`)],
  ]);
  const known = table("Bundles in this server's folder", [
    ["Bundle", (bundle) => h("strong", {}, bundle.name)],
    ["Version", (bundle) => bundle.version],
    ["Items", (bundle) => bundle.items?.toLocaleString()],
    ["Made", (bundle) => when(bundle.created)],
    ["Error", (bundle) => bundle.error && h("span", { class: "bad-text" }, bundle.error)],
  ]);
  const move = async (alias, verb, path, question) => (await sure(question, verb)) && act(said, async () => {
    const after = await api("POST", path, undefined, { etag: alias.etag });
    await refresh();
    return `${alias.id} serves ${after.bundle}: revision ${after.revision}.`;
  }, refresh);
  const actions = (alias) => bar(
    button("Change", () => {
      place.replaceChildren(aliasEditor(alias));
      place.querySelector("input").focus();
    }, { "aria-label": `Change ${alias.id}` }),
    alias.canary && button("Promote", () => move(alias, "Promote", `/v1/aliases/${alias.id}:promote`,
      `Serve ${alias.canary.bundle} to everybody who follows ${alias.id}?`)),
    alias.previous && button("Roll back", () => move(alias, "Roll back", `/v1/aliases/${alias.id}:rollback`,
      `Serve ${alias.previous} again to everybody who follows ${alias.id}?`)),
    link("History", "audit", `aliases/${alias.id}`));
  const aliases = table("Aliases", [
    ["Alias", (alias) => h("strong", {}, alias.id)],
    ["Bundle", (alias) => alias.bundle],
    ["Canary", (alias) => (alias.canary ? `${alias.canary.bundle}, ${percent(alias.canary.share)}` : "none")],
    ["Before", (alias) => alias.previous ?? "none"],
    ["Note", (alias) => alias.note],
    ["Changed", (alias) => when(alias.updated_at)],
    ["", actions],
  ]);
  const list = pages(aliases, async (token) => {
    const page = await api("GET", "/v1/aliases", undefined, { query: { page_token: token } });
    return [page.resources, page.next_page_token];
  }, "There are no aliases.");

  function aliasEditor(alias) {
    const bundle = text("Bundle", alias.bundle, undefined, { list: names.id });
    const canary = text("Canary bundle", alias.canary?.bundle, "Empty for none.", { list: names.id });
    const share = number("Canary share", alias.canary?.share ?? 0.05, "Of the users, from 0 to 1.");
    const unbound = check("Leave out bindings and rules that cannot hold", false);
    const work = async () => {
      const beside = canary.read() ? { bundle: canary.read(), share: share.read() } : null;
      const patch = { bundle: bundle.read(), canary: beside };
      const what = [patch.bundle, beside && `${percent(beside.share ?? 0)} of the users with ${beside.bundle}`];
      if (!(await sure(`From now on ${alias.id} serves ${what.filter(Boolean).join(", ")}?`, "Serve"))) return;
      const query = { allow_unbound: unbound.read() && "true" };
      const after = await api("PATCH", `/v1/aliases/${alias.id}`, patch, { etag: alias.etag, query });
      place.replaceChildren();
      await refresh();
      say(said, `${alias.id} serves ${after.bundle}: revision ${after.revision}.`, "good");
    };
    const reload = async () => {
      place.replaceChildren(aliasEditor(await api("GET", `/v1/aliases/${alias.id}`)));
      await refresh();
    };
    const title = `Change alias “${alias.id}”`;
    return h("section", {}, h("h2", {}, title), form({ "aria-label": title }, work, { reload },
      row(bundle.node, canary.node, share.node, unbound.node),
      bar(submit("Save"), button("Close", () => place.replaceChildren()))));
  }
  async function refresh() {
    const [deployment, folder] = await Promise.all([
      api("GET", "/v1/deployment"),
      api("GET", "/v1/bundles").catch((error) => error),
      list.reload(),
    ]);
    arms.body.replaceChildren(...deployment.arms.map(arms.row));
    const follows = `This server follows ${deployment.alias ? `the alias ${deployment.alias}` : "no alias"}.`;
    const error = deployment.error ? h("p", { class: "bad-text" }, deployment.error) : "";
    status.replaceChildren(h("p", { class: "quiet" }, follows), error);
    known.body.replaceChildren(...(folder.bundles ?? []).map(known.row));
    names.replaceChildren(...(folder.bundles ?? []).map(({ name }) => h("option", { value: name })));
    quiet.replaceChildren(folder.bundles ? known.node : h("p", { class: "quiet" }, folder.message));
  }
  const head = heading("Bundles");
  return { node: [head, said, status, arms.node, place, aliases.node, list.foot, quiet, names],
    show: () => act(said, refresh) };
}

// These come with every change, and say nothing of it.
const ALWAYS = new Set(["id", "etag", "revision", "created_at", "updated_at"]);

function changes({ before, after }) {
  const names = [...new Set([...Object.keys(before ?? {}), ...Object.keys(after ?? {})])];
  const differ = names.filter((name) => !ALWAYS.has(name)
    && JSON.stringify(before?.[name] || null) !== JSON.stringify(after?.[name] || null));
  const side = (tag, value) => value !== null && value !== undefined && value !== "" && h(tag, {}, plain(value));
  const both = (name) => [side("del", before?.[name]), " ", side("ins", after?.[name])];
  return h("dl", { class: "diff" }, differ.map((name) => told(name, both(name))));
}

export function audit() {
  const name = text("Of one resource", "", "As keywords/labubu; empty for all.");
  const shown = table("Changes, newest first", [
    ["When", (event) => when(event.at)],
    ["Who", (event) => h("strong", {}, event.principal)],
    ["What", (event) => `${event.action} ${event.name}`],
    ["Revision", (event) => event.revision],
    ["Changed fields", changes],
  ]);
  const list = pages(shown, async (token) => {
    const query = { name: name.read(), page_size: "50", page_token: token };
    const page = await api("GET", "/v1/auditEvents", undefined, { query });
    return [page.events, page.next_page_token];
  }, "Nothing was changed.");
  const asking = form({ role: "search", "aria-label": "Which changes" }, list.reload, {},
    row(name.node, bar(submit("Show"))));
  return { node: [heading("Audit"), asking, shown.node, list.foot], show: (wanted) => {
    if (wanted !== undefined) name.control.value = wanted;
    return list.reload();
  } };
}
