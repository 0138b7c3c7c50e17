// One job: how it stands, its curves, its log, its file, what it left.

import { call, state } from "./app.js";
import { Chart } from "./chart.js";
import { smooth } from "./curve.js";
import { $, ACTIVE, ago, bytes, duration, h, number, say, share, short, stateIcon, svg, text, word } from "./dom.js";

const TABS = [["curves", "Curves"], ["log", "Log"], ["config", "Job"], ["files", "Files"]];
const VERBS = {
  pause: ["Pause", "M6 4v10M12 4v10"], resume: ["Resume", "M6 4l8 5-8 5z"],
  retry: ["Retry", "M14 9a5 5 0 1 1-2-4M12 2v3.5H8.5"], cancel: ["Cancel", "M5 5l8 8M13 5l-8 8"],
};
const MOST_LINES = 4000;

export class JobView {
  constructor(id, tab) {
    this.id = id;
    this.charts = [];
    this.said = [];
    this.head = h("div", { class: "head" });
    this.cards = h("div", { class: "cards" });
    this.hash = h("div", { class: "card hash", hidden: true });
    this.tabs = h("div", { class: "tabs", role: "tablist" }, TABS.map(([key, name], i) => h("button", {
      type: "button", role: "tab", id: `tab-${key}`, "aria-controls": "panel", title: `${name} (${i + 1})`,
      onclick: () => { location.hash = `#/job/${encodeURIComponent(id)}/${key}`; },
    }, name)));
    this.tabs.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const i = TABS.findIndex(([key]) => key === this.tab);
      const key = TABS[(i + step + TABS.length) % TABS.length][0];
      location.hash = `#/job/${encodeURIComponent(id)}/${key}`;
      $(`tab-${key}`).focus();
    });
    this.panel = h("div", { id: "panel", role: "tabpanel" });
    this.node = h("div", { class: "page" }, this.head, this.cards, this.hash, this.tabs, this.panel);
    this.buildHead();
    this.open(tab);
    this.update();
  }

  buildHead() {
    this.title = h("h1", {});
    this.pill = h("span", { class: "pill" });
    this.verbs = h("div", { class: "row" });
    this.message = h("p", { class: "message" });
    this.fill = h("i");
    this.bar = h("div", { class: "bar tall", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Progress" }, this.fill);
    this.done = h("span");
    this.left = h("span", { id: "eta" });
    this.ident = h("span", { class: "id mono" });
    this.head.append(
      h("div", { class: "row" }, h("a", { class: "button back", href: "#/" }, "All jobs"), this.title, this.pill, h("span", { class: "grow" }), this.verbs),
      h("div", { class: "row" }, this.ident, this.message),
      h("div", { class: "progress" }, this.bar, h("div", { class: "row" }, this.done, this.left)),
    );
  }

  open(tab) {
    this.tab = TABS.some(([key]) => key === tab) ? tab : "curves";
    for (const [key] of TABS) {
      const button = this.tabs.querySelector(`#tab-${key}`);
      button.setAttribute("aria-selected", key === this.tab);
      button.tabIndex = key === this.tab ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${this.tab}`);
    this.close();
    this.panel.replaceChildren();
    this[this.tab]();
  }

  close() {
    for (const chart of this.charts) chart.destroy();
    this.charts = [];
    this.named = null;
  }

  update() {
    const job = state.jobs.get(this.id);
    if (!job) return;
    text(this.title, job.name);
    document.title = `${ACTIVE.has(job.state) && job.total_steps ? `${Math.floor(100 * share(job))}% · ` : ""}${job.name} · dptrain`;
    if (this.pill.dataset.state !== job.state) {
      this.pill.dataset.state = job.state;
      this.pill.replaceChildren(stateIcon(job.state), word(job.state));
    }
    text(this.ident, job.id === job.name ? "" : job.id);
    text(this.message, job.message);
    this.message.classList.toggle("bad", job.state === "FAILED");
    const part = share(job);
    this.fill.style.width = `${100 * part}%`;
    this.bar.className = `bar tall ${job.state === "FAILED" ? "failed" : ""}`;
    this.bar.setAttribute("aria-valuenow", Math.round(100 * part));
    const of = job.total_steps ? ` of ${number(job.total_steps)}` : "";
    text(this.done, `step ${number(job.step)}${of} · epoch ${number(job.epoch, 3)}${job.total_steps ? ` · ${Math.floor(100 * part)}%` : ""}`);
    const ends = job.remaining === null ? null : new Date(Date.now() + 1000 * job.remaining);
    const soon = ends?.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    text(this.left, ends ? `${duration(job.remaining)} left · done at ${soon}` : job.finished ? `ended ${ago(job.finished)}` : "");
    this.figures(job);
    this.proof(job);
    const may = state.me && state.me.role !== "read" ? job.verbs : [];
    if (this.verbs.dataset.now !== may.join()) {
      this.verbs.dataset.now = may.join();
      this.verbs.replaceChildren(...may.filter((verb) => VERBS[verb]).map((verb) => h("button", {
        type: "button", id: `do-${verb}`, class: verb === "cancel" ? "danger" : "", onclick: () => this.ask(verb),
      }, icon(VERBS[verb][1]), VERBS[verb][0])));
    }
    if (this.tab === "curves") this.redraw();
  }

  figures(job) {
    const curve = state.curve(this.id);
    const found = [["loss", number(job.loss)]];
    for (const [name, value] of Object.entries(job.metrics)) if (name !== "loss") found.push([name.replaceAll("_", " "), number(value)]);
    found.push(["samples a second", short(job.samples_per_second)]);
    found.push([job.workers === 1 ? "worker" : "workers", number(job.workers)]);
    if (curve.time.length) found.push(["trained", duration(curve.time.at(-1))]);
    found.push([job.recoveries === 1 ? "recovery" : "recoveries", number(job.recoveries)]);
    if (job.launches > 1) found.push(["starts", number(job.launches)]);
    const key = found.map(([name]) => name).join();
    if (this.cards.dataset.key !== key) {
      this.cards.dataset.key = key;
      this.cards.replaceChildren(...found.map(([name]) => h("div", { class: "figure" }, h("b", {}), h("span", {}, name))));
    }
    found.forEach(([, value], i) => text(this.cards.children[i].firstChild, value));
  }

  proof(job) {
    const result = job.result;
    this.hash.hidden = !result?.weights_sha256 || this.hash.childElementCount > 0 && this.hash.dataset.hash === result.weights_sha256;
    if (!result?.weights_sha256) return;
    this.hash.hidden = false;
    if (this.hash.dataset.hash === result.weights_sha256) return;
    this.hash.dataset.hash = result.weights_sha256;
    const sum = result.weights_sha256.replace("sha256:", "");
    this.hash.replaceChildren(
      h("span", { class: "soft" }, "weights"), h("code", { title: sum }, `sha256:${sum}`),
      result.same_bits
        ? h("span", { class: "badge", title: "Any number of workers, with or without deaths and restarts, ends in these bits." }, "same bits anywhere")
        : h("span", { class: "badge warn" }, "bits of this way to train alone"),
      h("button", { type: "button", onclick: () => copy(sum) }, "Copy"),
    );
  }

  async ask(verb) {
    if (verb === "cancel") {
      text($("question"), "Cancel this job?");
      text($("meaning"), "It finishes its step, writes a checkpoint and ends. Retry goes on from there.");
      text($("yes"), "Cancel the job");
      $("ask").returnValue = "no";
      $("ask").showModal();
      await new Promise((done) => { $("ask").addEventListener("close", done, { once: true }); });
      if ($("ask").returnValue !== "yes") return;
    }
    try {
      const { job } = await call(`jobs/${encodeURIComponent(this.id)}/${verb}`, { method: "POST" });
      state.jobs.set(job.id, job);
      this.update();
    } catch (error) { say(error.message); }
  }

  // The curves.
  curves() {
    const choice = state.choice;
    const seg = h("span", { class: "seg", role: "group", "aria-label": "Along" }, ["step", "epoch", "time"].map((axis) => h("button", {
      type: "button", "aria-pressed": choice.axis === axis,
      onclick: () => { choice.axis = axis; for (const b of seg.children) b.setAttribute("aria-pressed", b.textContent === axis); this.redraw(); },
    }, axis)));
    const log = h("input", { type: "checkbox", id: "log", checked: choice.log });
    log.addEventListener("change", () => { choice.log = log.checked; this.redraw(); });
    const soft = h("input", { type: "range", min: 0, max: 0.98, step: 0.01, value: choice.smooth, "aria-label": "Smooth the loss" });
    soft.addEventListener("input", () => { choice.smooth = Number(soft.value); this.redraw(); });
    this.loss = new Chart("Loss", { wide: true, height: 270 });
    this.rate = new Chart("Throughput", { unit: " samples/s", zero: true });
    this.lr = new Chart("Learning rate", { zero: true });
    this.time = new Chart("Step time", { unit: " ms", zero: true });
    this.crew = h("section", { class: "card workers", "aria-label": "Workers" });
    this.grid = h("div", { class: "charts" }, this.loss.node, this.rate.node, this.time.node, this.lr.node, this.crew);
    this.charts = [this.loss, this.rate, this.time, this.lr];
    this.named = new Map();
    this.happened = h("section", { class: "card events", "aria-label": "Events", hidden: true });
    this.panel.append(h("div", { class: "page" },
      h("div", { class: "bench" }, seg, h("label", {}, log, "logarithmic loss"), h("label", {}, "smooth", soft)),
      this.grid, this.happened));
  }

  redraw() {
    if (this.tab !== "curves" || !this.named) return;
    const curve = state.curve(this.id), { axis, log, smooth: weight } = state.choice;
    const x = curve.x(axis);
    const marks = curve.marks(axis);
    const see = { axis, marks };
    const losses = curve.loss;
    if (weight) this.loss.show([{ label: "raw", colour: 0, faint: true }, { label: "loss", colour: 0 }], [x, losses, smooth(losses, weight)], { ...see, log });
    else this.loss.show([{ label: "loss", colour: 0, fill: !log }], [x, losses], { ...see, log });
    this.rate.show([{ label: "", colour: 4, fill: true }], [x, curve.rate], see);
    this.lr.show([{ label: "lr", colour: 5 }], [x, curve.lr], see);
    const steps = curve.step.map((step, i) => Math.max(1, step - (curve.step[i - 1] ?? 0)));
    const each = (column) => column.map((value, i) => (value === null ? null : (1000 * value) / steps[i]));
    this.time.show([{ label: "compute", colour: 0 }, { label: "wait", colour: "w" }], [x, each(curve.compute), each(curve.wait)], see);
    let colour = 1;
    for (const [name, points] of curve.metrics) {
      if (!this.named.has(name)) {
        const chart = new Chart(name === "loss" ? "Validation loss" : name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "));
        this.named.set(name, chart);
        this.charts.push(chart);
        this.grid.insertBefore(chart.node, this.rate.node);
      }
      this.named.get(name).show([{ label: name, colour, dots: true }], [points.map(([step]) => curve.place(step, axis)), points.map(([, value]) => value)], see);
      colour = 1 + (colour % 3);
    }
    // The workers fill the row that the charts leave half empty.
    this.crew.classList.toggle("wide", this.charts.length % 2 === 1);
    this.drawCrew(curve);
    this.drawEvents(curve);
  }

  drawCrew(curve) {
    const workers = curve.workers;
    this.crew.hidden = !workers.length;
    if (!workers.length) return;
    if (this.crew.dataset.size !== String(workers.length)) {
      this.crew.dataset.size = workers.length;
      this.crew.replaceChildren(
        h("div", { class: "legend" }, h("h3", {}, "Workers, over the last steps"), h("span", { class: "grow" }),
          h("span", {}, h("i", { class: "k0" }), "compute"), h("span", {}, h("i", { class: "kw" }), "wait for others")),
        ...workers.map((_, i) => h("div", { class: "worker" }, h("span", {}, `worker ${i}`),
          h("div", { class: "load" }, h("i", { class: "k0" }), h("i", { class: "kw" })), h("span", { class: "num" }))));
    }
    const most = Math.max(...workers.map(([compute, wait]) => compute + wait), 1e-9);
    workers.forEach(([compute, wait], i) => {
      const [, load, num] = this.crew.children[i + 1].children;
      load.children[0].style.width = `${(100 * compute) / most}%`;
      load.children[1].style.width = `${(100 * wait) / most}%`;
      text(num, `${Math.round((100 * compute) / Math.max(compute + wait, 1e-9))}% compute · ${Math.round((100 * wait) / Math.max(compute + wait, 1e-9))}% wait`);
    });
  }

  drawEvents(curve) {
    this.happened.hidden = !curve.events.length;
    if (this.happened.dataset.size === String(curve.events.length)) return;
    this.happened.dataset.size = curve.events.length;
    this.happened.replaceChildren(h("h3", {}, "On the way"), h("ul", {}, curve.events.slice(-100).reverse().map((event) => h("li", {},
      h("span", { class: "at" }, event.step === undefined ? "" : `step ${number(event.step)}`),
      h("span", { class: `badge ${["recovery", "workers"].includes(event.event) ? "" : "warn"}` }, event.event),
      h("span", {}, sentence(event))))));
  }

  // The log.
  log() {
    this.lines = h("div", { class: "lines", tabindex: 0, role: "log", "aria-label": "Log", "aria-live": "off" });
    this.follow = true;
    this.lines.addEventListener("scroll", () => {
      this.follow = this.lines.scrollTop + this.lines.clientHeight > this.lines.scrollHeight - 24;
      tail.checked = this.follow;
    });
    const tail = h("input", { type: "checkbox", checked: true });
    tail.addEventListener("change", () => { this.follow = tail.checked; if (this.follow) this.lines.scrollTop = this.lines.scrollHeight; });
    const wrap = h("input", { type: "checkbox" });
    wrap.addEventListener("change", () => this.lines.classList.toggle("wrap", wrap.checked));
    this.sieve = h("input", { type: "search", placeholder: "Only lines with", "aria-label": "Only lines with", autocomplete: "off" });
    this.sieve.addEventListener("input", () => this.sift());
    this.panel.append(h("div", { class: "log" },
      h("div", { class: "bench" }, this.sieve, h("label", {}, tail, "follow"), h("label", {}, wrap, "wrap lines")), this.lines));
    this.sift();
  }

  takeLog(lines) {
    this.said.push(...lines);
    const over = this.said.length - MOST_LINES;
    if (over > 0) this.said.splice(0, over);
    if (this.tab !== "log") return;
    this.lines.append(...lines.filter((line) => this.passes(line)).map(lineNode));
    while (this.lines.childElementCount > MOST_LINES) this.lines.firstChild.remove();
    if (this.follow) this.lines.scrollTop = this.lines.scrollHeight;
  }

  passes([, , , said]) { return said.toLowerCase().includes(this.sieve.value.toLowerCase()); }

  sift() {
    this.lines.replaceChildren(...this.said.filter((line) => this.passes(line)).map(lineNode));
    this.lines.scrollTop = this.lines.scrollHeight;
  }

  // The job's file.
  async config() {
    const pre = h("pre", { class: "card toml", tabindex: 0 });
    this.panel.append(h("div", { class: "page" }, h("div", { class: "bench" }, h("button", { type: "button", onclick: () => copy(pre.textContent) }, "Copy")), pre));
    try {
      const { text: toml } = await call(`jobs/${encodeURIComponent(this.id)}/config`);
      pre.replaceChildren(...coloured(toml));
    } catch (error) { say(error.message); }
  }

  // What it left.
  async files() {
    try {
      const { files } = await call(`jobs/${encodeURIComponent(this.id)}/files`);
      if (this.tab !== "files") return;
      const kept = files.filter((file) => file.path.startsWith("checkpoints/")).sort((a, b) => (a.path < b.path ? 1 : -1));
      const rest = files.filter((file) => !file.path.startsWith("checkpoints/"));
      this.panel.replaceChildren(h("div", { class: "page" }, table("Model and records", rest, this.id), table("Checkpoints, newest first", kept, this.id)));
    } catch (error) { say(error.message); }
  }
}

function table(title, files, id) {
  const rows = files.map((file) => h("tr", {},
    h("td", {}, h("a", { class: "mono", download: "", href: `/api/jobs/${encodeURIComponent(id)}/files/${file.path.split("/").map(encodeURIComponent).join("/")}` }, file.path.replace(/^checkpoints\//, ""))),
    h("td", { class: "r" }, bytes(file.size)), h("td", { class: "r soft" }, ago(file.modified))));
  return h("section", { class: "card" }, h("h3", {}, title), h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, "file"), h("th", { class: "r" }, "size"), h("th", { class: "r" }, "written"))),
    h("tbody", {}, rows.length ? rows : h("tr", {}, h("td", { class: "soft", colspan: 3 }, "none yet"))))));
}

const icon = (path) => { const made = svg(path); made.setAttribute("width", "14"); made.setAttribute("height", "14"); return made; };

function lineNode([time, stream, rank, said]) {
  const made = h("div", { class: stream === "err" ? "err" : "" });
  if (time) made.append(h("span", { class: "t" }, new Date(1000 * time).toLocaleTimeString()));
  if (rank) made.append(h("span", { class: "t" }, `rank ${rank}`));
  made.append(said);
  return made;
}

function sentence(event) {
  if (event.text) return event.text;
  if (event.event === "restart") return `started again, start ${event.attempt}`;
  if (event.event === "recovery" && Array.isArray(event.died)) {
    const who = event.died.map((one) => `worker ${one.rank}${one.phase ? `, last seen in ${one.phase}` : ""}${one.hung ? ", hung" : ""}`).join("; ");
    return `lost ${who}. The other ${event.workers} went on after ${duration(event.seconds)}`;
  }
  if (event.event === "workers") return `now ${event.workers} ${event.workers === 1 ? "worker" : "workers"}, ${event.before} before`;
  if (event.event === "corruption") return `${event.what}; back to step ${number(event.back_to)}`;
  const { event: kind, step, attempt, ...rest } = event;
  return Object.entries(rest).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
}

// TOML, with as much colour as helps to read it.
function coloured(toml) {
  const made = [];
  const pattern = /("""[\s\S]*?"""|'[^'\n]*'|"(?:[^"\\\n]|\\.)*")|(#[^\n]*)|^(\[[^\n]*\])$|\b(true|false|[+-]?\d[\d_.eE+-]*)\b/gm;
  let at = 0;
  for (const found of toml.matchAll(pattern)) {
    made.push(toml.slice(at, found.index));
    const kind = found[1] ? "s" : found[2] ? "r" : found[3] ? "h" : "n";
    made.push(h("span", { class: kind }, found[0]));
    at = found.index + found[0].length;
  }
  made.push(toml.slice(at));
  return made;
}

async function copy(value) {
  try {
    await navigator.clipboard.writeText(value);
    say("Copied.");
  } catch { say("The browser does not let the page copy."); }
}
