// One chart: a card around uPlot, in the page's colours, with the values under the pointer and marks on the time line.
/* global uPlot */

import { duration, h, number, short } from "./dom.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const cursors = uPlot.sync("curves");

export class Chart {
  // series: [{label, colour: index or "w", faint, fill, dots}]; data: [xs, ...ys].
  constructor(title, { wide = false, log = false, height = 220, unit = "", zero = false } = {}) {
    this.log = log;
    this.height = height;
    this.unit = unit;
    this.zero = zero;
    this.at = h("span", { class: "at" });
    this.plot = h("div", { class: "plot" });
    this.none = h("div", { class: "empty" }, "no points yet");
    this.plot.append(this.none);
    this.node = h("section", { class: `card chart${wide ? " wide" : ""}`, "aria-label": title },
      h("header", {}, h("h3", {}, title), this.at), this.plot);
    this.u = null;
    this.key = "";
    this.marks = [];
    this.zoomed = false;
    this.watch = new ResizeObserver(() => this.fit());
    this.watch.observe(this.plot);
  }

  show(series, data, { axis = "step", marks = [], log = this.log } = {}) {
    this.marks = marks;
    this.log = log;
    this.series = series;
    const key = JSON.stringify([series, axis, log]);
    this.none.hidden = data[0].length > 0;
    if (!this.u || key !== this.key) this.build(series, data, axis, key);
    else this.u.setData(data, !this.zoomed);
    if (this.zoomed) this.u.redraw();
    this.values();
  }

  build(series, data, axis, key) {
    this.u?.destroy();
    this.key = key;
    this.axis = axis;
    this.zoomed = false;
    const ink = style("--soft"), grid = style("--grid");
    const say = axis === "time" ? (v) => duration(v) : (v) => short(v);
    const lines = series.map((one) => {
      const stroke = style(one.colour === "w" ? "--wait" : `--c${one.colour}`);
      return {
        label: one.label,
        stroke: one.faint ? `color-mix(in srgb, ${stroke} 30%, transparent)` : stroke,
        width: one.faint ? 1 : 2,
        fill: one.fill ? `color-mix(in srgb, ${stroke} 14%, transparent)` : undefined,
        spanGaps: true,
        points: { show: one.dots ? undefined : false, size: 5, fill: style("--card") },
      };
    });
    const fixed = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11.5px system-ui, sans-serif" };
    this.u = new uPlot({
      width: Math.max(120, this.plot.clientWidth), height: this.height,
      legend: { show: false },
      padding: [12, 18, 0, 0],
      cursor: { sync: { key: cursors.key, scales: ["x", null] }, y: false, points: { size: 7 }, drag: { x: true, y: false, uni: 12 } },
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1, range: this.log ? undefined : (u, low, high) => around(low, high, this.zero) } },
      axes: [
        { ...fixed, size: 30, space: 70, values: (u, ticks) => ticks.map(say), gap: 6 },
        { ...fixed, size: 54, space: 34, values: (u, ticks) => ticks.map((v) => (v === null ? "" : short(v))) },
      ],
      series: [{}, ...lines],
      hooks: {
        setCursor: [() => this.values()],
        setSelect: [(u) => { if (u.select.width > 0) this.zoomed = true; }],
        draw: [(u) => this.drawMarks(u)],
        ready: [(u) => u.over.addEventListener("dblclick", () => { this.zoomed = false; })],
      },
    }, data, this.plot);
  }

  drawMarks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = style("--warn");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const at of this.marks) {
      const x = u.valToPos(at, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const r = 4 * devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(x - r, bbox.top - r); ctx.lineTo(x + r, bbox.top - r); ctx.lineTo(x, bbox.top + r);
      ctx.fill();
    }
    ctx.restore();
  }

  values() {
    const u = this.u;
    if (!u || !u.data[0].length) return this.at.replaceChildren();
    const i = u.cursor.idx ?? null;
    const parts = [];
    if (i !== null) {
      const x = u.data[0][i];
      parts.push(h("span", {}, this.axis === "time" ? duration(x) : `${this.axis} ${number(x)}`));
    }
    this.series.forEach((one, k) => {
      if (one.faint && this.series.length > 1) return;
      const column = u.data[k + 1];
      let value = i === null ? null : column[i];
      // Between two points the one before counts; without a pointer the last.
      for (let j = i ?? column.length - 1; (value === null || value === undefined) && j >= 0; j -= 1) value = column[j];
      const dot = h("i", { class: `k${one.colour}` });
      parts.push(h("span", {}, dot, `${one.label} ${number(value)}${this.unit}`));
    });
    this.at.replaceChildren(...parts);
    return undefined;
  }

  fit() {
    if (this.u && this.plot.clientWidth > 0 && this.plot.clientWidth !== this.u.width)
      this.u.setSize({ width: this.plot.clientWidth, height: this.height });
  }

  repaint() { this.key = ""; }

  destroy() {
    this.watch.disconnect();
    this.u?.destroy();
    this.u = null;
  }
}

function around(low, high, zero) {
  if (low === null || high === null || low === undefined) return [0, 1];
  if (zero && low > 0) low = 0;
  const gap = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - gap < 0 ? 0 : low - gap, high + gap];
}

// A few losses as a line of the size of a word.
export function spark(canvas, values, colour) {
  const ratio = devicePixelRatio || 1;
  const w = 74, height = 30;
  canvas.width = w * ratio;
  canvas.height = height * ratio;
  const known = values.filter((value) => Number.isFinite(value) && value > 0).map(Math.log);
  if (known.length < 2) return;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  const low = Math.min(...known), high = Math.max(...known);
  const y = (value) => 4 + (height - 8) * (high > low ? (high - value) / (high - low) : 0.5);
  ctx.beginPath();
  known.forEach((value, i) => ctx.lineTo(2 + (i * (w - 6)) / (known.length - 1), y(value)));
  ctx.strokeStyle = style(colour);
  ctx.lineWidth = 1.6;
  ctx.lineJoin = "round";
  ctx.stroke();
  ctx.beginPath();
  ctx.arc(w - 4, y(known.at(-1)), 2, 0, 7);
  ctx.fillStyle = style(colour);
  ctx.fill();
}

