// Several jobs over one another.
/* global uPlot */

import { state } from "./app.js";
import { Chart } from "./chart.js";
import { smooth } from "./curve.js";
import { h, number, stateIcon } from "./dom.js";

export class Overlay {
  constructor(ids) {
    this.ids = ids.slice(0, 8);
    this.loss = new Chart("Loss", { wide: true, height: 320 });
    this.rate = new Chart("Throughput, samples a second", { wide: true, zero: true });
    this.charts = [this.loss, this.rate];
    this.named = new Map();
    const choice = state.choice;
    const seg = h("span", { class: "seg", role: "group", "aria-label": "Along" }, ["step", "epoch", "time"].map((axis) => h("button", {
      type: "button", "aria-pressed": choice.axis === axis,
      onclick: () => { choice.axis = axis; for (const b of seg.children) b.setAttribute("aria-pressed", b.textContent === axis); this.update(); },
    }, axis)));
    const log = h("input", { type: "checkbox", checked: choice.log });
    log.addEventListener("change", () => { choice.log = log.checked; this.update(); });
    const soft = h("input", { type: "range", min: 0, max: 0.98, step: 0.01, value: choice.smooth, "aria-label": "Smooth the loss" });
    soft.addEventListener("input", () => { choice.smooth = Number(soft.value); this.update(); });
    this.grid = h("div", { class: "charts" }, this.loss.node, this.rate.node);
    this.rows = h("tbody");
    this.verdict = h("span", { class: "badge" });
    this.node = h("div", { class: "page" },
      h("div", { class: "row" }, h("a", { class: "button back", href: "#/" }, "All jobs"), h("h1", {}, `${this.ids.length} jobs over one another`), this.verdict),
      h("section", { class: "card scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["", "job", "loss", "step", "samples/s", "workers", "weights"].map((name) => h("th", {}, name)))), this.rows)),
      h("div", { class: "bench" }, seg, h("label", {}, log, "logarithmic loss"), h("label", {}, "smooth", soft)),
      this.grid);
    this.update();
  }

  update() {
    const { axis, log, smooth: weight } = state.choice;
    document.title = `${this.ids.length} jobs · dptrain`;
    const jobs = this.ids.map((id) => state.jobs.get(id));
    const names = jobs.map((job, i) => (job ? (jobs.filter((other) => other?.name === job.name).length > 1 ? job.id : job.name) : this.ids[i]));
    this.rows.replaceChildren(...this.ids.map((id, i) => row(jobs[i], names[i], id, i)));
    const sums = jobs.map((job) => job?.result?.weights_sha256);
    const whole = sums.every(Boolean) && sums.length > 1, alike = new Set(sums).size === 1;
    this.verdict.hidden = !whole;
    this.verdict.className = alike ? "badge" : "badge warn";
    this.verdict.textContent = alike ? "the same weights, to the last bit" : "different weights";
    const curves = this.ids.map((id) => state.curve(id));
    const series = names.map((label, colour) => ({ label, colour }));
    this.loss.show(series, joined(curves.map((curve) => [curve.x(axis), smooth(curve.loss, weight)])), { axis, log });
    this.rate.show(series, joined(curves.map((curve) => [curve.x(axis), curve.rate])), { axis });
    for (const name of new Set(curves.flatMap((curve) => [...curve.metrics.keys()]))) {
      if (!this.named.has(name)) {
        const chart = new Chart(name === "loss" ? "Validation loss" : name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "), { wide: true });
        this.named.set(name, chart);
        this.charts.push(chart);
        this.grid.insertBefore(chart.node, this.rate.node);
      }
      const points = curves.map((curve) => {
        const found = curve.metrics.get(name) ?? [];
        return [found.map(([step]) => curve.place(step, axis)), found.map(([, value]) => value)];
      });
      this.named.get(name).show(series.map((one) => ({ ...one, dots: true })), joined(points), { axis });
    }
  }

  redraw() { this.update(); }

  takeLog() { /* there is no log here */ }

  close() { for (const chart of this.charts) chart.destroy(); }
}

// uPlot wants one x for all.
function joined(tables) {
  const clean = tables.map(([x, y]) => {
    const xs = [], ys = [];
    x.forEach((value, i) => { if (!xs.length || value > xs.at(-1)) { xs.push(value); ys.push(y[i] ?? null); } });
    return [xs, ys];
  });
  return clean.length > 1 ? uPlot.join(clean) : clean[0];
}

function row(job, name, id, i) {
  const sum = job?.result?.weights_sha256?.replace("sha256:", "");
  return h("tr", {},
    h("td", {}, job ? stateIcon(job.state) : ""),
    h("td", {}, h("a", { href: `#/job/${encodeURIComponent(id)}` }, h("span", { class: "at" }, name)), " ", h("span", { class: "swatch" }, swatch(i))),
    h("td", {}, number(job?.loss)), h("td", {}, number(job?.step)), h("td", {}, number(job?.samples_per_second)),
    h("td", {}, number(job?.workers)), h("td", { class: "mono", title: sum ?? "" }, sum ? `${sum.slice(0, 12)}…` : "–"));
}

const swatch = (i) => h("i", { class: `k${i % 8} dot` });
