// What every view is made of: elements, calls of the API, forms that keep what was typed, lists in pages.

const KEY = "genretrieval.key";
const ATTEMPTS = 3;
const PATIENCE_MS = 30_000;
let lastId = 0;

/** An element. Functions are listeners; texts become text nodes, so that nobody's text is ever read as HTML. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  return node;
}

export const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);
export const submit = (text) => h("button", { class: "primary" }, text);
export const bar = (...buttons) => h("div", { class: "actions" }, buttons);
export const row = (...fields) => h("div", { class: "row" }, fields);
export const heading = (title, ...more) => h("div", { class: "head" }, h("h1", {}, title), more);
export const badge = (text, kind = "") => h("span", { class: `badge ${kind}` }, text);
export const link = (text, view, argument) => h("a", { href: `#${view}/${encodeURIComponent(argument)}` }, text);

/** What the API, or a form before it, refuses; `message` is for people. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// A tab's own, and gone with it: never in a URL, where logs and histories would have it.
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (secret) => sessionStorage.setItem(KEY, secret),
  drop: () => sessionStorage.removeItem(KEY),
};

/** Told of 401 and of the revision; the shell listens. */
export const calls = new EventTarget();
const tell = (type, detail) => calls.dispatchEvent(new CustomEvent(type, { detail }));

/** Call the API. `etag` is what a resource must still have; of `query`, what is empty is left out. */
export async function api(method, path, body, { etag, query = {} } = {}) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
  const headers = { Accept: "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (etag) headers["If-Match"] = `"${etag}"`;
  if (method !== "GET") headers["Idempotency-Key"] = random();
  const answer = await sent(url, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.headers.has("X-Revision")) tell("revision", answer.headers.get("X-Revision"));
  const json = await answer.json().catch(() => ({}));
  if (answer.ok) return json;
  if (answer.status === 401) tell("unauthenticated", json.detail);
  throw new Refusal(json.detail || `The server answered ${answer.status} ${answer.statusText}.`, answer.status);
}

// `crypto.randomUUID` is missing where a page came over plain HTTP from another machine; this is not.
const hex = (byte) => byte.toString(16).padStart(2, "0");
const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), hex).join("");

// A call without an answer may have been made. It has its Idempotency-Key, so making it again changes nothing twice.
async function sent(url, options) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      const signal = AbortSignal.timeout(PATIENCE_MS);
      return await fetch(url, { ...options, signal, cache: "no-store", redirect: "error" });
    } catch {
      if (attempt === ATTEMPTS) throw new Refusal("The server cannot be reached; try again.");
      await new Promise((done) => setTimeout(done, 200 * attempt));
    }
  }
}

export const readRevision = async () => tell("revision", (await api("GET", "/v1/revision")).revision);

const items = new Map();

/** An item, asked for once; null where the catalogue has none of that id. */
export function itemOf(id) {
  if (!items.has(id)) {
    const asked = api("GET", `/v1/items/${encodeURIComponent(id)}`);
    items.set(id, asked.catch((error) => {
      if (error.status !== 404) items.delete(id);
      return null;
    }));
  }
  return items.get(id);
}
export const forgetItems = () => items.clear();

/** Where a form or a view says how it went. */
export const region = () => h("div", { class: "said", role: "status", "aria-live": "polite" });

export function say(said, text, kind = "", ...more) {
  said.className = `said ${kind}`;
  said.replaceChildren(text, ...more);
}

/** Do one work at a time, and say in `said` what it came to. `reload` is offered where somebody else was first. */
export async function act(said, work, reload) {
  if (said.hasAttribute("aria-busy")) return;
  said.setAttribute("aria-busy", "true");
  say(said, "");
  try {
    say(said, (await work()) || "", "good");
  } catch (error) {
    if (!(error instanceof Refusal)) {
      say(said, "The console failed; the browser's log says why.", "bad");
      throw error;
    }
    const changed = error.status === 412 && reload;
    say(said, changed ? `Somebody else changed it: ${error.message} ` : error.message, "bad",
      ...(changed ? [button("Load it anew", () => act(said, reload))] : []));
  } finally {
    said.removeAttribute("aria-busy");
  }
}

/** A form whose submission is `work`. */
export function form(props, work, { reload, said = region() } = {}, ...children) {
  const onsubmit = (event) => {
    event.preventDefault();
    act(said, work, reload);
  };
  return h("form", { ...props, novalidate: true, onsubmit }, ...children, said);
}

/** A label and its control, and what reads it. */
export function field(label, control, hint) {
  const id = `f${(lastId += 1)}`;
  control.id = id;
  if (hint) control.setAttribute("aria-describedby", `${id}-hint`);
  const node = h("div", { class: `field ${control.type === "checkbox" ? "check" : ""}` },
    h("label", { for: id }, label), control, hint && h("small", { id: `${id}-hint` }, hint));
  const shown = control.value;
  return { node, control, touched: () => control.value !== shown, read: () => control.value.trim() };
}

// A control may not hold a text as it is stored: lines in one line, spaces at an end. Untouched, it stays as it is.
function typed(label, control, hint, stored) {
  const made = field(label, control, hint);
  return { ...made, read: () => (made.touched() ? made.read() : stored ?? "") };
}
export const text = (label, stored, hint, props = {}) =>
  typed(label, h("input", { ...props, value: stored ?? "" }), hint, stored);
export const area = (label, stored, hint, rows = 3) =>
  typed(label, h("textarea", { rows, spellcheck: "false", value: stored ?? "" }), hint, stored);
/** What the text of a field says by `parse`: `stored`, where there is that, until somebody touches it. */
export const parsed = (made, parse, stored) => (stored && !made.touched() ? stored : parse(made.read()));
export function check(label, on) {
  const made = field(label, h("input", { type: "checkbox", checked: on }));
  return { ...made, read: () => made.control.checked };
}
export const choice = (label, options, value) =>
  field(label, h("select", { value }, options.map(([name, says]) => h("option", { value: name }, says ?? name))));
export const number = (label, value, hint) => {
  const made = text(label, value, hint, { inputmode: "decimal" });
  const read = () => {
    const digits = made.control.value.trim();
    if (digits && !Number.isFinite(Number(digits))) throw new Refusal(`${label}: ${digits} is no number.`);
    return digits ? Number(digits) : undefined;
  };
  return { ...made, read };
};

/** A moment, shown and typed in the visitor's time zone. One that nobody touched goes back to the millisecond. */
export function moment(label, stored) {
  const at = stored && new Date(stored);
  // The control has no time zone, and Date writes only UTC without one.
  const shown = at ? new Date(at - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16) : "";
  const made = text(label, shown, "In your time zone.", { type: "datetime-local" });
  const read = () => {
    if (made.control.validity.badInput) throw new Refusal(`${label}: the date is not complete.`);
    if (!made.touched()) return stored ?? null;
    return made.control.value ? new Date(made.control.value).toISOString() : null;
  };
  return { ...made, read };
}

export const lines = (typed) => typed.split("\n").map((line) => line.trim()).filter(Boolean);
export const when = (instant) =>
  instant && new Date(instant).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Ask before something is taken away. */
export function sure(question, verb) {
  return new Promise((decide) => {
    const close = (yes) => () => dialog.close(yes);
    const dialog = h("dialog", { "aria-labelledby": "question", onclose: () => {
      dialog.remove();
      decide(dialog.returnValue === "yes");
    } }, h("p", { id: "question" }, question),
    bar(button("Cancel", close(""), { autofocus: true }), button(verb, close("yes"), { class: "danger" })));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A table that stands as cards where the window is narrow: each cell knows its column's name. */
export function table(caption, columns, { captioned = true } = {}) {
  const body = h("tbody");
  const head = h("thead", {}, h("tr", {}, columns.map(([name]) => h("th", { scope: "col" }, name))));
  const filled = (content) => [content].flat(Infinity).some((part) => part || part === 0) && h("div", {}, content);
  const row = (data) => h("tr", {}, columns.map(([name, cell]) => h("td", { "data-name": name }, filled(cell(data)))));
  const node = h("table", { "aria-label": caption }, captioned && h("caption", {}, caption), head, body);
  return { node, body, row };
}

/** A list in pages: `load(token)` answers with what is listed and the next token, the table makes a row of each. */
export function pages({ body, row: shown }, load, none) {
  const said = region();
  const empty = h("p", { class: "quiet", hidden: true }, none);
  const more = button("More", () => act(said, () => next()), { hidden: true });
  let token = "";
  let turn = 0;
  async function next(fresh = false) {
    const mine = (turn += 1);
    const [listed, following] = await load(fresh ? "" : token);
    // A slow answer to an earlier question must not overwrite a later one.
    if (mine !== turn) return;
    if (fresh) body.replaceChildren();
    body.append(...listed.map(shown));
    token = following;
    more.hidden = !token;
    empty.hidden = body.hasChildNodes();
  }
  const reload = async () => {
    said.removeAttribute("aria-busy");
    await act(said, () => next(true));
  };
  return { foot: h("div", { class: "foot" }, more, empty, said), reload };
}
