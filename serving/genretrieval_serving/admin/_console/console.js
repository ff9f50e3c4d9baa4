// The shell: who is signed in, which view is shown, which revision is in force.

import { Refusal, bar, calls, field, form, h, key, readRevision, submit } from "/console/core.js";
import { resources } from "/console/resources.js";
import { audit, bundles, catalogue, retrieve } from "/console/views.js";

const VIEWS = {
  try: ["Try", retrieve],
  keywords: ["Keywords", () => resources("keywords")],
  rules: ["Rules", () => resources("rules")],
  synonyms: ["Synonyms", () => resources("synonyms")],
  items: ["Items", catalogue],
  bundles: ["Bundles", bundles],
  audit: ["Audit", audit],
};
const PARTS = ["tabs", "view", "door", "sign-out", "revision"];
const [tabs, view, door, signOut, revision] = PARTS.map((id) => document.getElementById(id));
// A view is made once, so that what was typed in it is there when it is shown again.
const made = new Map();

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function wanted() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const argument = rest.length ? decoded(rest.join("/")) : undefined;
  return { name: Object.hasOwn(VIEWS, name) ? name : "try", argument };
}

/** Show the view that the address names; `again` leaves alone what is open in it. */
async function show({ again = false } = {}) {
  const { name, argument } = wanted();
  if (!made.has(name)) made.set(name, VIEWS[name][1]());
  for (const tab of tabs.children) {
    if (tab.hash === `#${name}`) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name][0]} · genretrieval console`;
  view.replaceChildren(...made.get(name).node);
  await made.get(name).show(again ? undefined : argument);
}

function askForKey(said) {
  if (!door.hidden) return;
  const typed = h("input", { type: "password", autocomplete: "off" });
  const secret = field("API key or token", typed, "Kept in this tab until it is closed.");
  const enter = async () => {
    // Anything else no header can carry, and no key has.
    if (!/^[!-~]+$/.test(secret.read())) throw new Refusal("Give an API key or a token, without spaces.");
    key.set(secret.read());
    try {
      await readRevision();
    } catch (error) {
      key.drop();
      throw error;
    }
    door.hidden = true;
    door.replaceChildren();
    await start();
  };
  door.replaceChildren(h("h1", {}, "Sign in"), h("p", { class: "quiet" }, said),
    form({ "aria-label": "Sign in" }, enter, {}, secret.node, bar(submit("Sign in"))));
  door.hidden = false;
  secret.control.focus();
}

function start() {
  signOut.hidden = !key.get();
  return show({ again: made.size > 0 });
}

calls.addEventListener("unauthenticated", ({ detail }) => askForKey(detail));
calls.addEventListener("revision", ({ detail }) => { revision.textContent = `revision ${detail}`; });
// Another person may sign in next: nothing of what was read stays in the page.
signOut.addEventListener("click", () => {
  key.drop();
  location.reload();
});
tabs.append(...Object.entries(VIEWS).map(([name, [title]]) => h("a", { href: `#${name}` }, title)));
addEventListener("hashchange", () => show());
readRevision().then(start, (error) => {
  signOut.hidden = !key.get();
  if (error.status !== 401) view.replaceChildren(h("p", { class: "bad-text" }, error.message));
});
