// The page's state, its stream of news, its list of jobs, and where one is.

import { spark } from "./chart.js";
import { Curve } from "./curve.js";
import { $, ACTIVE, ago, duration, h, number, say, share, stateIcon, svg, text, word } from "./dom.js";
import { JobView } from "./job.js";
import { Overlay } from "./overlay.js";

export const state = {
  me: null, order: [], jobs: new Map(), curves: new Map(), marked: new Set(), filter: "all",
  choice: { axis: "step", log: false, smooth: 0 },
  curve(id) {
    if (!this.curves.has(id)) this.curves.set(id, new Curve());
    return this.curves.get(id);
  },
};
const FILTERS = {
  all: ["All", () => true],
  active: ["Active", (job) => ACTIVE.has(job.state)],
  done: ["Done", (job) => job.state === "SUCCEEDED"],
  ended: ["Ended otherwise", (job) => ["FAILED", "CANCELLED", "PAUSED"].includes(job.state)],
};
let view = null, source = null, listening = "", rows = new Map(), route = { kind: "list" };

// Asking the server. What changes something carries the session's own proof that it comes from this page.
export async function call(path, { method = "GET", body } = {}) {
  const headers = {};
  if (method !== "GET" && state.me) headers["x-dptrain-csrf"] = state.me.csrf;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`/api/${path}`, { method, headers, body: body && JSON.stringify(body) });
  } catch { throw new Error("The server can't be reached."); }
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401 && path !== "session") { enter(); }
  if (!answer.ok) throw Object.assign(new Error(content.error ?? `The server answered ${answer.status}.`), { status: answer.status });
  return content;
}

async function enter() {
  try {
    state.me = await call("session");
  } catch (error) {
    if (error.status === 401) { listen(true); if (!$("login").open) $("login").showModal(); return; }
    say(error.message);
    setTimeout(enter, 2000);
    return;
  }
  $("leave").hidden = !state.me.token;
  text($("place"), state.me.server.title ?? "");
  go();
}

$("login").addEventListener("cancel", (event) => event.preventDefault());
$("login").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = $("token");
  try {
    state.me = await call("session", { method: "POST", body: { token: field.value } });
    field.value = "";
    text($("wrong"), "");
    $("login").close();
    enter();
  } catch (error) { text($("wrong"), error.message); }
});
$("leave").addEventListener("click", async () => {
  await call("session", { method: "DELETE" }).catch((error) => say(error.message));
  location.reload();
});

// The news.
function watched() {
  if (route.kind === "job") return [route.id];
  return route.kind === "over" ? route.ids : [];
}

function listen(stop = false) {
  const query = new URLSearchParams();
  for (const id of watched()) query.append("watch", id);
  if (route.kind === "job" && route.tab === "log") query.set("log", route.id);
  const wanted = stop || document.hidden ? "" : `/api/stream?${query}`;
  if (wanted === listening && source && source.readyState !== EventSource.CLOSED) return;
  source?.close();
  source = null;
  listening = wanted;
  if (!wanted) return;
  source = new EventSource(wanted);
  const on = (name, take) => source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  // A new stream tells the log from its end again; one that only connects again goes on.
  if (view?.said) { view.said.length = 0; if (view.tab === "log") view.sift(); }
  source.onopen = () => live("on", "live");
  source.onerror = () => {
    live("off", "connecting again");
    if (source?.readyState === EventSource.CLOSED) setTimeout(() => { listening = ""; enter(); }, 2000);
  };
  on("jobs", ({ order, changed, server }) => {
    state.order = order;
    for (const job of changed) state.jobs.set(job.id, job);
    text($("place"), server.slots ? `${server.busy ?? 0} of ${server.slots} slots busy` : server.title ?? "");
    drawList();
    view?.update();
    if (!view) go();
  });
  on("curves", (told) => {
    state.curve(told.job).take(told);
    if (watched().includes(told.job)) view?.redraw?.();
    if (route.kind === "job") view?.update();
  });
  on("log", ({ job, lines }) => { if (route.id === job) view?.takeLog(lines); });
  on("gone", ({ job }) => say(`There is no job ${job}.`));
  on("out", () => { listen(true); enter(); });
  on("trouble", ({ error }) => say(error));
}

function live(kind, said) {
  $("live").className = `live ${kind}`;
  text($("live").lastElementChild, said);
}
document.addEventListener("visibilitychange", () => { if (state.me) listen(); });

// Where one is.
function parse() {
  const [kind, ...rest] = location.hash.replace(/^#\//, "").split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  if (kind === "job" && rest[0]) return { kind: "job", id: rest[0], tab: rest[1] ?? "curves" };
  if (kind === "over" && rest.length) return { kind: "over", ids: rest.slice(0, 8) };
  return { kind: "list" };
}

function go() {
  if (!state.me) return;
  const next = parse();
  const same = view && next.kind === route.kind && (next.kind === "job" ? next.id === route.id : next.kind === "over" && next.ids.join() === route.ids.join());
  route = next;
  document.body.dataset.view = route.kind;
  if (same) {
    if (route.kind === "job" && view.tab !== route.tab) { view.open(route.tab); view.update(); }
  } else {
    view?.close();
    view = null;
    if (route.kind === "job") view = new JobView(route.id, route.tab);
    else if (route.kind === "over") view = new Overlay(route.ids);
    else if (state.order.length && matchMedia("(min-width: 821px)").matches) {
      // There is room for a job beside the list: the newest that is under way, else the newest.
      const first = state.order.find((id) => state.jobs.get(id)?.state === "RUNNING") ?? state.order[0];
      history.replaceState(null, "", `#/job/${encodeURIComponent(first)}`);
      go();
      return;
    }
    $("main").replaceChildren(view ? view.node : blank());
    $("main").scrollTop = 0;
    view?.update();
    if (!view) document.title = "dptrain";
  }
  drawList();
  listen();
}
addEventListener("hashchange", go);

function blank() {
  return h("div", { class: "blank" }, h("img", { src: "/static/mark.svg", alt: "", width: 56, height: 56 }),
    h("h2", {}, "No jobs yet"), h("p", {}, "The first one appears here by itself."), h("pre", { class: "mono" }, state.me?.server.slots ? "dptrain submit job.toml" : "dptrain run job.toml -n 2"));
}

// The list.
function shown() {
  const sought = $("find").value.trim().toLowerCase();
  const [, passes] = FILTERS[state.filter];
  return state.order.map((id) => state.jobs.get(id)).filter((job) => job && passes(job)
    && (!sought || `${job.name} ${job.id} ${job.owner} ${job.message}`.toLowerCase().includes(sought)));
}

function drawList() {
  const jobs = shown();
  const all = state.order.map((id) => state.jobs.get(id)).filter(Boolean);
  const chips = Object.entries(FILTERS).map(([key, [name, passes]]) => [key, name, all.filter(passes).length]).filter(([key, , count]) => count || key === "all" || key === state.filter);
  const key = JSON.stringify([chips, state.filter]);
  if ($("states").dataset.key !== key) {
    $("states").dataset.key = key;
    $("states").replaceChildren(...chips.map(([one, name, count]) => h("button", {
      type: "button", "aria-pressed": state.filter === one, onclick: () => { state.filter = one; drawList(); },
    }, name, " ", h("b", {}, String(count)))));
  }
  const kept = new Map();
  for (const job of jobs) kept.set(job.id, rows.get(job.id) ?? new Row(job.id));
  const nodes = [...kept.values()].map((row) => row.node);
  const list = $("list");
  if (nodes.length !== list.children.length || nodes.some((node, i) => list.children[i] !== node)) {
    list.replaceChildren(...(nodes.length ? nodes : [h("li", { class: "none" }, all.length ? "none like that" : "no jobs yet")]));
  }
  rows = kept;
  for (const job of jobs) rows.get(job.id).update(job);
  const marked = [...state.marked].filter((id) => state.jobs.has(id));
  $("overlay").hidden = marked.length < 2;
  $("overlay").href = `#/over/${marked.map(encodeURIComponent).join("/")}`;
  text($("overlay"), `Lay ${marked.length} jobs over one another`);
}

class Row {
  constructor(id) {
    this.mark = h("input", { type: "checkbox" });
    this.mark.addEventListener("change", () => { toggle(id, this.mark.checked); });
    this.icon = h("span");
    this.name = h("span", { class: "name" });
    this.sub = h("span", { class: "sub" });
    this.line = h("canvas", { class: "spark", "aria-hidden": "true" });
    this.fill = h("i");
    this.bar = h("div", { class: "bar" }, this.fill);
    this.link = h("a", { href: `#/job/${encodeURIComponent(id)}` }, this.icon, this.name, this.line, this.sub, this.bar);
    this.node = h("li", { class: "job" }, this.link, this.mark);
  }

  update(job) {
    const here = route.kind === "job" && route.id === job.id;
    this.node.classList.toggle("here", here);
    if (here) this.link.setAttribute("aria-current", "page"); else this.link.removeAttribute("aria-current");
    this.mark.checked = state.marked.has(job.id);
    const look = `${job.state} ${document.documentElement.dataset.theme} ${job.losses.length} ${job.losses.at(-1)}`;
    text(this.name, job.name);
    const parts = [word(job.state)];
    if (job.state === "RUNNING") {
      if (job.total_steps) parts[0] = `${Math.floor(100 * share(job))}%`;
      if (job.remaining !== null) parts.push(`${duration(job.remaining)} left`);
      else parts.push(`step ${number(job.step)}`);
    } else if (ACTIVE.has(job.state)) parts.push(job.message);
    else if (job.state === "SUCCEEDED") parts.splice(0, 1, job.loss === null ? "done" : `loss ${number(job.loss, 3)}`, ago(job.finished || job.created));
    else parts.push(job.loss === null ? "" : `loss ${number(job.loss, 3)}`, ago(job.finished || job.created));
    text(this.sub, parts.filter(Boolean).join(" · "));
    this.mark.setAttribute("aria-label", `mark ${job.name}`);
    this.bar.hidden = !ACTIVE.has(job.state) || !job.total_steps;
    this.fill.style.width = `${100 * share(job)}%`;
    if (this.look !== look) {
      this.look = look;
      const made = stateIcon(job.state);
      this.icon.replaceWith(made);
      this.icon = made;
      spark(this.line, job.losses, job.state === "FAILED" ? "--bad" : ACTIVE.has(job.state) ? "--accent" : "--faint");
    }
  }
}

function toggle(id, on = !state.marked.has(id)) {
  if (on) state.marked.add(id); else state.marked.delete(id);
  drawList();
}
$("find").addEventListener("input", drawList);

// Light and dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() { return document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light"); }
function paint() {
  const made = svg(theme() === "dark" ? "M9 5.5a3.5 3.5 0 1 0 .01 0M9 1v1.5M9 15.500v1.500M1 9h1.500M15.500 9H17M3.300 3.300l1.100 1.100M13.600 13.600l1.100 1.100M3.300 14.700l1.100-1.100M13.600 4.400l1.100-1.100" : "M15 10.500A6.500 6.500 0 1 1 7.500 3a5 5 0 0 0 7.500 7.500z", "0 0 18 18", 1.6);
  made.setAttribute("width", "18");
  $("theme").replaceChildren(made);
  for (const row of rows.values()) row.look = "";
  for (const chart of view?.charts ?? []) chart.repaint();
  drawList();
  view?.redraw?.();
}
function turn() {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* then only until the page is left */ }
  paint();
}
$("theme").addEventListener("click", turn);
dark.addEventListener("change", paint);

// Keys.
$("help").addEventListener("click", () => $("keys").showModal());
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input[type=search], input[type=password], textarea");
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (route.kind !== "list") { location.hash = "#/"; }
    return;
  }
  if (typing) return;
  const jobs = shown();
  const at = jobs.findIndex((job) => job.id === route.id);
  const step = { j: 1, k: -1 }[event.key];
  const tab = { 1: "curves", 2: "log", 3: "config", 4: "files" }[event.key];
  if (step && jobs.length) location.hash = `#/job/${encodeURIComponent(jobs[Math.max(0, Math.min(jobs.length - 1, at + step))].id)}`;
  else if (tab && route.kind === "job") location.hash = `#/job/${encodeURIComponent(route.id)}/${tab}`;
  else if (event.key === "x" && route.kind === "job") toggle(route.id);
  else if (event.key === "o" && !$("overlay").hidden) location.hash = $("overlay").getAttribute("href");
  else if (event.key === "/") $("find").focus();
  else if (event.key === "t") turn();
  else if (event.key === "?") $("keys").showModal();
  else return;
  event.preventDefault();
});

document.body.dataset.view = "list";
paint();
setInterval(() => { if (!document.hidden) drawList(); }, 20000);
enter();
