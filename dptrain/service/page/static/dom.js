// Elements, and how figures are written. Text is always set as text: nothing that a job says is ever markup.

export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || (value === false && !key.startsWith("aria-"))) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else made.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = {
  QUEUED: "M9 4.5V9l3 2M9 1.8a7.2 7.2 0 1 0 .01 0",
  STARTING: "M9 2a7 7 0 1 1-7 7",
  RUNNING: "M9 2a7 7 0 1 1-7 7",
  RECOVERING: "M9 2a7 7 0 1 1-6 3.4M3 1.8v3.8h3.8",
  PAUSING: "M6.5 5v8M11.5 5v8",
  PAUSED: "M6.5 4v10M11.5 4v10",
  CANCELLING: "M4 14L14 4M9 1.8a7.2 7.2 0 1 0 .01 0",
  SUCCEEDED: "M3.5 9.5l3.7 3.8L14.5 5",
  FAILED: "M4.5 4.5l9 9M13.5 4.5l-9 9",
  CANCELLED: "M4 14L14 4M9 1.8a7.2 7.2 0 1 0 .01 0",
};

export function svg(path, view = "0 0 18 18", width = 2) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", view);
  made.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  for (const [key, value] of Object.entries({
    d: path, fill: "none", stroke: "currentColor", "stroke-width": width, "stroke-linecap": "round", "stroke-linejoin": "round",
  })) line.setAttribute(key, value);
  made.append(line);
  return made;
}

export function stateIcon(state) {
  const made = h("span", { class: `state ${state}`, title: word(state) });
  made.append(svg(SHAPES[state] ?? SHAPES.QUEUED));
  return made;
}

export const word = (state) => state.charAt(0) + state.slice(1).toLowerCase();

export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return number(value, 3);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${Number(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  const s = Math.round(seconds);
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function ago(time) {
  const s = Date.now() / 1000 - time;
  if (!time) return "";
  if (s < 60) return "just now";
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString();
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (size >= 1000 && i < units.length - 1) { size /= 1000; i += 1; }
  return `${Number(size.toPrecision(3))} ${units[i]}`;
}

export function say(sentence) {
  const line = h("div", {}, sentence);
  $("said").append(line);
  setTimeout(() => line.remove(), 7000);
}

export const ACTIVE = new Set(["QUEUED", "STARTING", "RUNNING", "PAUSING", "RECOVERING", "CANCELLING"]);

export function share(job) {
  if (job.state === "SUCCEEDED") return 1;
  return job.total_steps ? Math.min(1, job.step / job.total_steps) : 0;
}
