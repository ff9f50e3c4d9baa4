// Keywords, rules and synonyms: a table of each, a form to write one, and a trial before it is stored.

import {
  Refusal, act, api, area, badge, bar, button, check, choice, form, h, heading, lines, link, moment, number, pages,
  parsed, region, row, say, submit, sure, table, text, when,
} from "/console/core.js";
import { compared, requestFields } from "/console/views.js";

const TYPES = ["Entity", "Modifier", "Brand", "Material", "Style", "Function", "Location", "Audience", "Color", "Scene",
  "Specifications", "Price", "Model", "Anchor", "Series", "Marketing", "Season", "Pattern"].map((type) => [type]);

/** Whether something is in force now, and from when or until when. */
function state({ enabled = true, deleted_at, valid_from, valid_until }) {
  const now = Date.now();
  if (deleted_at) return badge("deleted", "bad");
  if (!enabled) return badge("off");
  if (valid_from && Date.parse(valid_from) > now) return badge(`from ${when(valid_from)}`, "warn");
  if (valid_until && Date.parse(valid_until) <= now) return badge(`expired ${when(valid_until)}`);
  return [badge("in force", "good"), valid_until ? ` until ${when(valid_until)}` : ""];
}

function slotsText({ free, bound, quarantined, levels }) {
  const where = levels.map((slots) => `${slots.free} on level ${slots.level}`).join(", ");
  return `Slots: ${free} free${where && ` (${where})`}, ${bound} bound, ${quarantined} resting.`;
}

function selectorText(items) {
  const ids = items.item_ids;
  if (ids) return h("span", { title: ids.slice(0, 20).join(", ") }, `${ids.length} item${ids.length === 1 ? "" : "s"}`);
  const filters = items.filters && JSON.stringify(given(items.filters));
  return `rule: ${[items.text && `“${items.text}”`, filters].filter(Boolean).join(" and ")}`;
}

function effectText({ kind, items, amount }) {
  if (kind === "pin") return `pin ${items.map((item) => `${item.item_id} at ${item.position}`).join(", ")}`;
  return [`${kind} `, selectorText(items), amount === undefined ? "" : ` by ${amount}`];
}

function conditionText({ query, scenarios }) {
  const asked = query && `query ${query.match} “${query.text}”`;
  const from = scenarios.length && `scenario ${scenarios.join(" or ")}`;
  return [asked, from].filter(Boolean).join(" and ") || "always";
}

/** What of an object is more than a default. */
const given = (object) =>
  Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null && JSON.stringify(value) !== "{}"));

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
/** The merge patch (RFC 7396) that makes `after` of `before`; undefined where there is nothing to change. */
function patchOf(before, after) {
  if (JSON.stringify(before) === JSON.stringify(after)) return undefined;
  if (!isObject(before) || !isObject(after)) return after;
  const patch = {};
  for (const name of new Set([...Object.keys(before), ...Object.keys(after)])) {
    const change = patchOf(before[name] ?? null, after[name] ?? null);
    if (change !== undefined) patch[name] = change;
  }
  return Object.keys(patch).length ? patch : undefined;
}

function filtersOf(typed) {
  try {
    return typed ? JSON.parse(typed) : null;
  } catch (error) {
    throw new Refusal(`Filters: ${error.message}.`);
  }
}

/** Fields that stand while a choice is one of some. */
function shownFor(control, some, node) {
  const show = () => { node.hidden = !some.includes(control.value); };
  control.addEventListener("change", show);
  show();
  return node;
}

/** A set of items: ids, a rule, or with `none` nothing. */
function selector(items, none) {
  const now = items ? (items.item_ids ? "ids" : "rule") : none ? "none" : "ids";
  const choices = [["none", none], ["ids", "these ids"], ["rule", "all that a rule finds"]];
  const by = choice("Items", choices.filter(([, says]) => says), now);
  const ids = area("Item ids", items?.item_ids?.join("\n"), "One a line.", 4);
  const words = text("Words", items?.text, "In title, brand or a category, one after another.");
  const json = items?.filters && JSON.stringify(given(items.filters));
  const filters = area("Filters", json, 'JSON, as {"max_price": 50}.', 2);
  const read = () => {
    if (by.read() === "none") return null;
    if (by.read() === "ids") return { item_ids: parsed(ids, lines, items?.item_ids) };
    return { text: words.read() || null, filters: parsed(filters, filtersOf, items?.filters) };
  };
  const node = [
    by.node,
    shownFor(by.control, ["ids"], ids.node),
    shownFor(by.control, ["rule"], row(words.node, filters.node)),
  ];
  return { node, read, by };
}

/** When something is in force. */
function validity(stored) {
  const from = moment("From", stored?.valid_from);
  const until = moment("Until", stored?.valid_until);
  const read = () => ({ valid_from: from.read(), valid_until: until.read() });
  return { node: row(from.node, until.node), read };
}

function keywordFields(keyword) {
  const word = text("Word", keyword?.text, "One or more words, as in a query.", { required: true });
  const type = choice("Type", TYPES, keyword?.type ?? "Entity");
  const note = text("Note", keyword?.note);
  const items = selector(keyword?.binding?.items, "not bound");
  const times = validity(keyword?.binding);
  const bound = shownFor(items.by.control, ["ids", "rule"], times.node);
  const read = () => {
    const bindTo = items.read();
    const binding = bindTo && { items: bindTo, ...times.read() };
    return { text: word.read(), type: type.read(), note: note.read(), binding };
  };
  return { node: [row(word.node, type.node, note.node),
    h("fieldset", {}, h("legend", {}, "Binding"), items.node, bound)], read };
}

function pinned(typed) {
  return lines(typed).map((line, i) => {
    const [, position, item_id] = line.match(/^(\d+)\s+(.+)$/) ?? [];
    if (!item_id) throw new Refusal(`Pinned items: line ${i + 1} is no place and item id, as 1 item-7.`);
    return { item_id, position: Number(position) };
  });
}

function ruleFields(rule) {
  const { condition = {}, effect } = rule ?? {};
  const matches = [["", "any"], ["contains", "contains words"], ["exact"], ["regex"]];
  const match = choice("Query", matches, condition.query?.match ?? "");
  const words = text("Text", condition.query?.text);
  const scenarios = text("Scenarios", condition.scenarios?.join(", "), "With commas between; none is all.");
  const kind = choice("Effect", ["pin", "boost", "bury", "block"].map((name) => [name]), effect?.kind ?? "pin");
  const stored = effect?.kind === "pin" ? effect.items : undefined;
  const places = stored?.map((item) => `${item.position} ${item.item_id}`).join("\n");
  const pins = area("Pinned items", places, "A place and an item id a line; 1 is first.", 3);
  const items = selector(stored ? null : effect?.items);
  const amount = number("Amount", effect?.amount ?? 0.7, "Of a score, a log-probability: 0.7 is about twofold.");
  const priority = number("Priority", rule?.priority ?? 0, "The higher wins a place that two rules pin to.");
  const enabled = check("Enabled", rule?.enabled ?? true);
  const note = text("Note", rule?.note);
  const times = validity(rule);
  const effectOf = () => {
    if (kind.read() === "pin") return { kind: "pin", items: parsed(pins, pinned, stored) };
    const chosen = { kind: kind.read(), items: items.read() };
    return kind.read() === "block" ? chosen : { ...chosen, amount: amount.read() };
  };
  const read = () => ({
    condition: {
      query: match.read() ? { match: match.read(), text: words.read() } : null,
      scenarios: parsed(scenarios, (names) => lines(names.replaceAll(",", "\n")), condition.scenarios),
    },
    effect: effectOf(), priority: priority.read() ?? 0, enabled: enabled.read(), note: note.read(), ...times.read(),
  });
  const node = [
    h("fieldset", {}, h("legend", {}, "When"),
      row(match.node, shownFor(match.control, ["contains", "exact", "regex"], words.node), scenarios.node)),
    h("fieldset", {}, h("legend", {}, "What"),
      row(kind.node, shownFor(kind.control, ["boost", "bury"], amount.node)),
      shownFor(kind.control, ["pin"], pins.node),
      shownFor(kind.control, ["boost", "bury", "block"], h("div", { class: "group" }, items.node))),
    times.node, row(priority.node, note.node, enabled.node),
  ];
  return { node, read };
}

function synonymsFields(set) {
  const kinds = [["two_way", "two-way: any brings the others"], ["one_way", "one-way: the first brings the others"]];
  const kind = choice("Kind", kinds, set?.kind ?? "two_way");
  const terms = area("Terms", set?.terms.join("\n"), "One a line, two or more.", 3);
  const enabled = check("Enabled", set?.enabled ?? true);
  const note = text("Note", set?.note);
  const read = () => (
    { kind: kind.read(), terms: parsed(terms, lines, set?.terms), enabled: enabled.read(), note: note.read() });
  return { node: [row(kind.node, note.node, enabled.node), terms.node], read };
}

const KINDS = {
  keywords: {
    one: "keyword",
    fields: keywordFields,
    nameOf: (keyword) => keyword.text,
    columns: [
      ["Word", (k) => h("strong", {}, k.text)],
      ["Type", (k) => k.type],
      ["Bound to", (k) => (k.binding ? selectorText(k.binding.items) : "nothing")],
      ["Slot", (k) => (k.slot ? `level ${k.slot.level}, code ${k.slot.code}` : "none")],
      ["State", ({ binding, deleted_at }) =>
        (binding || deleted_at ? state({ ...binding, deleted_at }) : badge("not bound"))],
    ],
  },
  rules: {
    one: "rule",
    fields: ruleFields,
    nameOf: (rule) => rule.id,
    columns: [
      ["Rule", (r) => h("strong", {}, r.id)],
      ["When", (r) => conditionText(r.condition)],
      ["What", (r) => effectText(r.effect)],
      ["Priority", (r) => r.priority],
      ["State", state],
    ],
  },
  synonyms: {
    one: "synonym set",
    fields: synonymsFields,
    nameOf: (set) => set.terms.join(", "),
    columns: [
      ["Terms", ({ kind, terms: [first, ...others] }) =>
        h("strong", {}, first, kind === "one_way" ? " → " : ", ", others.join(", "))],
      ["Kind", (s) => s.kind.replace("_", "-")],
      ["State", state],
    ],
  },
};

/** The view of a kind. It stays as it is while others are looked at, so that what was typed is there again. */
export function resources(kind) {
  const { one, nameOf, columns } = KINDS[kind];
  const said = region();
  const place = h("div", { class: "editor" });
  const free = h("p", { class: "quiet" });
  const deleted = check("Show deleted", false);

  const change = (resource, path, says, method = "POST") => act(said, async () => {
    const after = await api(method, path, undefined, { etag: resource.etag });
    await list.reload();
    return `${says} ${nameOf(resource)}: revision ${after.revision}.`;
  }, () => list.reload());
  const unbind = async (r) => (await sure(`Unbind “${nameOf(r)}”? Its slot is given back, and rests.`, "Unbind"))
    && change(r, `/v1/keywords/${r.id}:unbind`, "Unbound");
  const remove = async (r) => (await sure(`Delete ${one} “${nameOf(r)}”? It can be undeleted.`, "Delete"))
    && change(r, `/v1/${kind}/${r.id}`, "Deleted", "DELETE");
  const actions = (r) => {
    const named = (verb) => ({ "aria-label": `${verb} ${nameOf(r)}` });
    return bar(
      r.deleted_at
        ? button("Undelete", () => change(r, `/v1/${kind}/${r.id}:undelete`, "Brought back"), named("Undelete"))
        : [button("Edit", () => open(r), named("Edit")),
          r.binding && button("Unbind", () => unbind(r), named("Unbind")),
          button("Delete", () => remove(r), named("Delete"))],
      link("History", "audit", `${kind}/${r.id}`));
  };
  const more = [["Note", (r) => r.note], ["Changed", (r) => when(r.updated_at)], ["", actions]];
  const shown = table(`${one}s`, [...columns, ...more], { captioned: false });
  const list = pages(shown, async (token) => {
    const query = { page_token: token, show_deleted: deleted.read() && "true" };
    const page = await api("GET", `/v1/${kind}`, undefined, { query });
    if (kind === "keywords") free.textContent = slotsText(await api("GET", "/v1/slots"));
    return [page.resources, page.next_page_token];
  }, `There are no ${one}s.`);
  deleted.control.addEventListener("change", list.reload);

  const load = (id) => act(said, async () => open(await api("GET", `/v1/${kind}/${id}`)));
  function open(resource) {
    const close = () => {
      place.replaceChildren();
      creating.focus();
    };
    const reload = async () => {
      await load(resource.id);
      await list.reload();
    };
    const saved = async (after) => {
      close();
      await list.reload();
      say(said, `Saved ${nameOf(after)}: revision ${after.revision}.`, "good");
    };
    say(said, "");
    place.replaceChildren(editor(kind, resource, { close, reload, saved }));
    place.querySelector("input, select, textarea").focus();
    place.scrollIntoView({ block: "nearest" });
  }

  const creating = button(`New ${one}`, () => open(null), { class: "primary" });
  const head = heading(`${one[0].toUpperCase()}${one.slice(1)}s`, creating, deleted.node);
  return { node: [head, free, said, place, shown.node, list.foot], show: async (id) => {
    await list.reload();
    if (id) await load(id);
  } };
}

function editor(kind, resource, { close, reload, saved }) {
  const { one, fields, nameOf } = KINDS[kind];
  const made = fields(resource);
  const id = resource ? null : text("Id", "", "Made from the fields where none is given.");
  const full = () => ({ ...made.read(), ...(id ? id.read() && { id: id.read() } : { id: resource.id }) });
  const save = async () => {
    if (!resource) return saved(await api("POST", `/v1/${kind}`, full()));
    const after = made.read();
    const before = Object.fromEntries(Object.keys(after).map((name) => [name, resource[name]]));
    const patch = patchOf(before, after);
    if (!patch) return "Nothing was changed.";
    return saved(await api("PATCH", `/v1/${kind}/${resource.id}`, patch, { etag: resource.etag }));
  };
  const title = resource ? `Edit ${one} “${nameOf(resource)}”` : `New ${one}`;
  return h("section", { "aria-label": title }, h("h2", {}, title),
    form({ "aria-label": title }, save, { reload }, made.node, id?.node, bar(submit("Save"), button("Close", close))),
    trial(kind, full));
}

function trial(kind, read) {
  const request = requestFields();
  const answer = h("div");
  const work = async () => {
    answer.replaceChildren();
    const tried = await api("POST", `/v1/${kind}:test`, { resource: read(), request: request.read() });
    answer.append(compared(tried));
  };
  const title = "Try before you store";
  return h("details", { open: true }, h("summary", {}, title),
    form({ "aria-label": title }, work, {}, request.node, bar(h("button", {}, "Try"))), answer);
}
