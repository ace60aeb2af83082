// Lines over the last minutes: a small one for a tile, and one that can be read by pointer, keyboard and screen reader.

import { h, put, svg } from "./dom.js";
import { live } from "./live.js";

/** An SVG path through values at 0..count-1, broken where one is missing. */
function path(values, width, height, most) {
  let d = "", pen = false;
  const step = width / Math.max(1, values.length - 1);
  values.forEach((value, i) => {
    if (value === null) {
      pen = false;
      return;
    }
    d += `${pen ? "L" : "M"}${(i * step).toFixed(1)} ${(height - (height * value) / most).toFixed(1)}`;
    if (!pen) d += "h.01"; // a value without neighbours is a dot
    pen = true;
  });
  return d;
}

/** The least "round" number that is not below `value`. */
export function round(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((factor) => factor * power).find((each) => each >= value * 0.9999);
}

export class Spark {
  constructor() {
    this.line = svg("path", { fill: "none" });
    this.element = svg("svg", { class: "spark", viewBox: "0 -1 100 26", preserveAspectRatio: "none", "aria-hidden": "true" }, this.line);
  }

  update(values) {
    const most = Math.max(...values, 1e-9);
    this.line.setAttribute("d", path(values, 100, 24, most));
  }
}

const WIDTH = 600, HEIGHT = 140;

export class Chart {
  /** `say`: a value in words, with its unit. `empty`: what a time without frames counts as. */
  constructor({ title, unit, column, empty, say }) {
    Object.assign(this, { title, unit, column, empty, say });
    this.values = [];
    this.at = null; // which one is pointed at, from the end
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line", fill: "none" });
    this.cross = svg("line", { class: "cross", y1: 0, y2: HEIGHT, hidden: "" });
    this.plot = svg(
      "svg",
      { viewBox: `0 -4 ${WIDTH} ${HEIGHT + 8}`, preserveAspectRatio: "none", role: "img", tabindex: "0" },
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: 0, y2: 0 }),
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }),
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }),
      this.area, this.line, this.cross,
    );
    this.value = h("b", {}, "\u2013");
    this.when = h("span", { class: "quiet" }, "now");
    this.most = h("span", { class: "most quiet" });
    this.element = h(
      "figure", { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), h("p", {}, this.value, " ", this.when)),
      h("div", { class: "plot" }, this.plot, this.most),
      h("div", { class: "axis quiet", "aria-hidden": "true" }, h("span", {}, "5 min ago"), h("span", {}, "now")),
    );
    this.plot.addEventListener("pointermove", (event) => {
      const box = this.plot.getBoundingClientRect();
      const i = Math.round(((event.clientX - box.left) / box.width) * (this.values.length - 1));
      this.point(this.values.length - 1 - i);
    });
    this.plot.addEventListener("pointerleave", () => this.point(null));
    this.plot.addEventListener("blur", () => this.point(null));
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: 1, ArrowRight: -1, PageUp: 15, PageDown: -15, Home: Infinity, End: -Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      this.point((this.at ?? 0) + step);
    });
  }

  point(at) {
    this.at = at === null ? null : Math.min(Math.max(at, 0), this.values.length - 1);
    this.#read();
  }

  update(camera) {
    this.values = live.series(camera, this.column, this.empty);
    const known = this.values.filter((value) => value !== null);
    const most = round(Math.max(...known, 0));
    const line = path(this.values, WIDTH, HEIGHT, most);
    this.line.setAttribute("d", line);
    // Filled only where the line has no gap: an area over a gap would claim what was not measured.
    this.area.setAttribute("d", known.length === this.values.length ? `${line}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}Z` : "");
    put(this.most, this.say(most));
    const mean = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
    this.summary = known.length
      ? `${this.title}, last 5 minutes: mean ${this.say(mean)}, highest ${this.say(Math.max(...known))}. Left and right arrow read values.`
      : `${this.title}: nothing in the last 5 minutes.`;
    this.#read();
  }

  #read() {
    const last = this.values.length - 1;
    // Not pointed at, the last value that there is.
    const latest = this.values.findLastIndex((value) => value !== null);
    const i = this.at === null ? (latest < 0 ? last : latest) : last - this.at;
    const value = this.values[i] ?? null;
    const when = i === last ? "now" : `${(last - i) * live.bucket_s} s ago`;
    put(this.value, this.say(value));
    put(this.when, when);
    this.cross.toggleAttribute("hidden", this.at === null);
    const x = (i * WIDTH) / Math.max(1, this.values.length - 1);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    this.plot.setAttribute("aria-label", this.at === null ? this.summary : `${this.title} ${when}: ${this.say(value)}`);
  }
}
