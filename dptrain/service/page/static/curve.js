// A job's curves as they come: columns by step. A step that comes again replaces the earlier one and all after it.

const COLUMNS = ["step", "time", "epoch", "loss", "lr", "rate", "compute", "wait"];
const MOST = 4000;

export class Curve {
  constructor() { this.clear(); }

  clear() {
    for (const name of COLUMNS) this[name] = [];
    this.metrics = new Map();
    this.events = [];
    this.workers = [];
    this.attempt = 0;
    this.base = 0;
  }

  take(told) {
    if (told.whole) this.clear();
    for (const [step, seconds, epoch, loss, lr, rate, attempt, compute, wait] of told.rows) {
      if (this.step.length && this.step.at(-1) >= step) this.cut(step);
      if (attempt !== this.attempt) {
        this.base = this.time.at(-1) ?? 0;
        if (attempt > 1) this.events.push({ event: "restart", step: step - 1, attempt });
        this.attempt = attempt;
      }
      const row = [step, this.base + (seconds ?? 0), epoch, loss, lr, rate, compute, wait];
      COLUMNS.forEach((name, i) => this[name].push(row[i]));
    }
    for (const [name, points] of Object.entries(told.metrics)) {
      const known = this.metrics.get(name) ?? [];
      for (const point of points) {
        while (known.length && known.at(-1)[0] >= point[0]) known.pop();
        known.push(point);
      }
      this.metrics.set(name, known);
    }
    this.events.push(...told.events);
    this.events.sort((a, b) => (a.attempt - b.attempt) || ((a.step ?? 0) - (b.step ?? 0)));
    if (told.workers.length) this.workers = told.workers;
    if (this.step.length > MOST) this.thin();
  }

  cut(step) {
    while (this.step.length && this.step.at(-1) >= step) for (const name of COLUMNS) this[name].pop();
  }

  thin() {
    for (const name of COLUMNS) this[name] = this[name].filter((_, i) => i % 2 || i === this.step.length - 1);
  }

  // The axis that a person chose.
  x(axis) { return this[axis]; }

  // A metric's points have steps; on another axis each stands where the row of its step does.
  place(step, axis) {
    if (axis === "step") return step;
    let low = 0, high = this.step.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.step[middle] < step) low = middle + 1; else high = middle;
    }
    return this[axis][low] ?? 0;
  }

  // Where the time line has a mark.
  marks(axis) {
    const told = this.events.filter((event) => ["recovery", "corruption", "restart"].includes(event.event));
    return told.map((event) => this.place(event.step ?? event.found_at ?? 0, axis));
  }
}

// Exponential moving average, without the pull towards its start.
export function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = sum * weight + value * (1 - weight);
    norm = norm * weight + (1 - weight);
    return sum / norm;
  });
}
