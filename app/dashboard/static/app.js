// What is live. Pages work without it: it asks the server for the same page again and takes over what
// changed, so that all HTML is made in one place. An element says how in data-live, and has an id:
//   replace  put the new one in its place, if it differs from what the server sent before
//   append   add those children whose ids are not here yet
//   keep     never touch it
"use strict";

const PAUSE = 250; // ms between two requests for the same page, at least
const BACKOFF = [1000, 15000]; // ms after a request that failed, first and last
const main = document.getElementById("main");
const turns = document.getElementById("turns");
const sent = new Map(); // id -> HTML as the server sent it

for (const element of document.querySelectorAll("[data-live=replace]")) sent.set(element.id, element.outerHTML);

// Taking over

function merge(page) {
  const stick = atEnd();
  for (const fresh of page.querySelectorAll("[data-live]")) {
    const old = document.getElementById(fresh.id);
    if (!old || fresh.dataset.live === "keep") continue;
    if (fresh.dataset.live === "append") append(old, fresh);
    else if (sent.get(fresh.id) !== fresh.outerHTML) replace(old, fresh);
  }
  for (const result of document.querySelectorAll("#turns > * > * .message > .returned")) file(result);
  tick();
  listen();
  if (stick) toEnd();
}

function replace(old, fresh) {
  sent.set(fresh.id, fresh.outerHTML);
  const copy = document.importNode(fresh, true);
  // Whoever types in it, or has it open, goes on.
  if (old.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return sent.delete(fresh.id);
  const open = [...old.querySelectorAll("details[open]")].map(place);
  const focus = old.contains(document.activeElement) ? place(document.activeElement) : null;
  const scrolled = window.scrollY;
  old.replaceWith(copy);
  for (const element of copy.querySelectorAll("details")) if (open.includes(place(element))) element.open = true;
  if (focus) [...copy.querySelectorAll("a, button, summary, [tabindex]")].find((e) => place(e) === focus)?.focus({ preventScroll: true });
  if (window.scrollY !== scrolled) window.scrollTo(0, scrolled);
}

// Tells an element from its like in another version of the page.
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

// Put a tool's result under its call, if the call is here.
function file(result) {
  const call = result.closest(".attempt")?.querySelector(`[data-call="${CSS.escape(result.dataset.result)}"] > .slot:empty`);
  if (!call) return;
  const message = result.closest(".message");
  call.append(result);
  if (!message.children.length) message.hidden = true; // its id stays: it has been seen
}

// Asking

let asking = null;
let again = false;
let whole = false; // the whole conversation is wanted, not only what came since
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

// An attempt that was superseded moves: all is told anew.
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

// Listening

let source = null;
let address = null;

function listen() {
  const element = document.querySelector("[data-events]");
  const wanted = document.hidden || !element ? null : element.dataset.events;
  // A conversation's stream goes on by itself; that of a list is another when other sessions move.
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

// A tab that nobody looks at keeps no connection: a browser has six for each server, in all its tabs.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
  listen();
});
const every = Number(main.dataset.refresh);
if (every) setInterval(() => { if (!document.hidden && !asking) refresh(); }, every * 1000);

// Acting: a form is sent from here, and its answer taken over, so that the place on the page stays.

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
    // Whoever has gone on to something else meanwhile keeps the focus there.
    const stayed = form.contains(document.activeElement) || document.activeElement === document.body;
    if (stayed) document.activeElement.blur();
    if (turns) refresh(); // the page it answered with tells results with their calls: those here would miss them
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

// Whoever reads the end stays there.
const atEnd = () => turns && window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;
const toEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);

tick();
listen();
if (turns && !location.search && !location.hash) toEnd();
