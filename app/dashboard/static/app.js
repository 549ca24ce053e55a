// Live updates. Pages work without this script. It requests the same page again and takes the parts that
// changed, so that all HTML is made in one place. A live element has an id, and its data-live says how it is
// updated:
//   replace  replace the element, if the server's HTML of it has changed
//   append   add the children whose ids are not here yet
//   keep     never change the element
"use strict";

const PAUSE = 250; // least ms between two requests for the same page
const BACKOFF = [1000, 15000]; // ms after a failed request, first and last
const main = document.getElementById("main");
const turns = document.getElementById("turns");
const sent = new Map(); // id -> the server's HTML

for (const element of document.querySelectorAll("[data-live=replace]")) sent.set(element.id, element.outerHTML);

// Merging

function merge(page) {
  const stick = atEnd();
  for (const fresh of page.querySelectorAll("[data-live]")) {
    const old = document.getElementById(fresh.id);
    if (!old || fresh.dataset.live === "keep") continue;
    if (fresh.dataset.live === "append") append(old, fresh);
    else if (sent.get(fresh.id) !== fresh.outerHTML) replace(old, fresh);
  }
  for (const part of document.querySelectorAll(".message > [data-slot]")) file(part);
  tick();
  listen();
  if (stick) toEnd();
}

function replace(old, fresh) {
  sent.set(fresh.id, fresh.outerHTML);
  const copy = document.importNode(fresh, true);
  // The user is typing in it: leave it, and replace it another time.
  if (old.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return sent.delete(fresh.id);
  const open = [...old.querySelectorAll("details[open]")].map(place);
  const focus = old.contains(document.activeElement) ? place(document.activeElement) : null;
  const scrolled = window.scrollY;
  old.replaceWith(copy);
  for (const element of copy.querySelectorAll("details")) if (open.includes(place(element))) element.open = true;
  if (focus) [...copy.querySelectorAll("a, button, summary, [tabindex]")].find((e) => place(e) === focus)?.focus({ preventScroll: true });
  if (window.scrollY !== scrolled) window.scrollTo(0, scrolled);
}

// A key that finds the same element in another version of the page.
function place(element) {
  const owner = element.closest("[id]");
  return [owner?.id, element.tagName, element.getAttribute("href"), element.getAttribute("aria-label"), element.textContent.slice(0, 40)].join("|");
}

function append(old, fresh) {
  for (const child of fresh.children) if (child.id && !document.getElementById(child.id)) old.append(document.importNode(child, true));
  for (const name of ["seq", "more"]) {
    if (name in fresh.dataset) old.dataset[name] = fresh.dataset[name];
    else delete old.dataset[name];
  }
}

// Move an element into the slot that it names, if that slot is on the page and empty.
function file(part) {
  const slot = document.getElementById(part.dataset.slot);
  if (!slot || slot.childElementCount) return;
  const message = part.closest(".message");
  slot.append(part);
  if (!message.children.length) message.hidden = true; // the element stays, so that append() finds its id
}

// Requests

let asking = null;
let again = false;
let whole = false; // request the whole conversation, not only what is new
let failures = 0;

function refresh() {
  again = true;
  asking ??= ask().finally(() => { asking = null; if (again) refresh(); });
}

async function ask() {
  again = false;
  const address = turns?.dataset.page && !whole ? turns.dataset.page + turns.dataset.seq : location.href;
  try {
    const answer = await fetch(address, { headers: { Accept: "text/html" } });
    if (answer.status >= 400 && answer.status < 500) return say(answer.status === 401 ? "sign in again" : "gone");
    if (!answer.ok) throw new Error(String(answer.status));
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (turns && address === location.href) retell(page);
    merge(page);
    failures = 0;
    if (turns && "more" in turns.dataset) again = true;
    await pause(PAUSE);
  } catch {
    failures += 1;
    say("reconnecting …");
    await pause(Math.min(BACKOFF[0] * 2 ** (failures - 1), BACKOFF[1]));
    again = !document.hidden;
  }
}

const pause = (time) => new Promise((done) => setTimeout(done, time));

// A superseded attempt moves on the page, so the whole conversation is loaded again.
function reload() {
  whole = true;
  refresh();
}

function retell(page) {
  whole = false;
  const fresh = page.getElementById("turns");
  const open = [...turns.querySelectorAll(".message details[open]")].map((details) => details.closest(".message").id);
  turns.replaceChildren(...[...fresh.children].map((child) => document.importNode(child, true)));
  for (const id of open) document.querySelector(`#${id} details`)?.setAttribute("open", "");
}

// Events

let source = null;
let address = null;

function listen() {
  const element = document.querySelector("[data-events]");
  const wanted = document.hidden || !element ? null : element.dataset.events;
  // A conversation keeps its stream. A list needs a new one when the set of unfinished sessions changes.
  if (source && source.readyState !== EventSource.CLOSED && (wanted === address || (wanted && turns))) return;
  source?.close();
  source = null;
  address = wanted;
  if (!wanted) return;
  source = new EventSource(turns ? wanted.replace(/after=\d+/, `after=${turns.dataset.seq}`) : wanted);
  source.addEventListener("open", () => say("live"));
  source.addEventListener("status", refresh);
  source.addEventListener("message", refresh);
  source.addEventListener("superseded", reload);
  source.addEventListener("error", () => {
    const over = source.readyState === EventSource.CLOSED;
    say(over ? "" : "reconnecting …");
    if (over && !turns) refresh();
  });
}

function say(text) {
  const place = document.getElementById("live");
  if (place && place.textContent !== text) {
    place.textContent = text;
    place.dataset.state = text === "live" ? "on" : "off";
  }
}

// A hidden tab keeps no connection: a browser has only six for each server, and all tabs share them.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
  listen();
});
const every = Number(main.dataset.refresh);
if (every) setInterval(() => { if (!document.hidden && !asking) refresh(); }, every * 1000);

// Forms: the script sends a form and merges the answer, so that the page keeps its position.

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("[data-inline]")) return;
  event.preventDefault();
  const buttons = form.querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  const notice = document.getElementById("notice");
  notice.hidden = true;
  try {
    const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) throw new Error(page.querySelector(".problem")?.textContent ?? `Status ${answer.status}`);
    form.closest("details.confirm")?.removeAttribute("open");
    if ("clear" in form.dataset) form.reset();
    // If the user has moved on to another element, the focus stays there.
    const stayed = form.contains(document.activeElement) || document.activeElement === document.body;
    if (stayed) document.activeElement.blur();
    if (turns) refresh(); // the answer has results below their calls already, so the calls here would not get them
    else merge(page);
    if (stayed) ("clear" in form.dataset ? form.querySelector("textarea") : main).focus({ preventScroll: true });
  } catch (error) {
    notice.textContent = error.message;
    notice.hidden = false;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("[data-submit]")) event.target.form.requestSubmit();
  if (event.key === "Escape") {
    const open = document.querySelector("details.confirm[open]");
    if (open) { open.open = false; open.querySelector("summary").focus(); }
  }
});

// Time

function tick() {
  for (const element of document.querySelectorAll("[data-since]")) {
    const seconds = Math.max(0, Math.round((Date.now() - Date.parse(element.dataset.since)) / 1000));
    const text = seconds < 60 ? `${seconds} s` : seconds < 3600 ? `${Math.floor(seconds / 60)} min ${seconds % 60} s` : `${Math.floor(seconds / 3600)} h ${Math.floor(seconds / 60) % 60} min`;
    if (element.textContent !== text) element.textContent = text;
  }
}
setInterval(tick, 1000);

// A page scrolled to its end stays at the end.
const atEnd = () => turns && window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;
const toEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);

tick();
listen();
if (turns && !location.search && !location.hash) toEnd();
