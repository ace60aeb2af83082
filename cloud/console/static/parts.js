// What the pages of a camera and of an event share.

import { h, number, put } from "./dom.js";
import { colour } from "./overlay.js";

/** What is drawn over the picture: from which score on, boxes, masks, of which task. */
export class Controls {
  constructor(overlay, changed) {
    this.overlay = overlay;
    const redraw = () => {
      overlay.draw();
      changed();
    };
    this.said = h("output", {}, "50 %");
    const score = h("input", { type: "range", min: 0.1, max: 0.95, step: 0.05, value: overlay.options.score, "aria-label": "Show objects from this score on", oninput: (event) => {
      overlay.options.score = Number(event.target.value);
      put(this.said, `${Math.round(100 * overlay.options.score)} %`);
      redraw();
    } });
    const toggle = (name, label) => h("label", { class: "check" }, h("input", { type: "checkbox", checked: true, onchange: (event) => {
      overlay.options[name] = event.target.checked;
      redraw();
    } }), label);
    this.masks = toggle("masks", "Masks");
    this.task = h("select", { hidden: true, "aria-label": "Task", onchange: (event) => {
      overlay.options.task = event.target.value === "all" ? "all" : Number(event.target.value);
      redraw();
    } });
    this.tasks = "";
    this.element = h("div", { class: "controls" }, h("label", { class: "range" }, "Score from", score, this.said), toggle("boxes", "Boxes"), this.masks, this.task);
  }

  update(event) {
    const tasks = event.results.map((result) => result.task);
    this.masks.hidden = !event.results.some((result) => result.objects.some((object) => object.mask));
    this.task.hidden = tasks.length < 2;
    if (this.tasks === tasks.join()) return;
    this.tasks = tasks.join();
    this.overlay.options.task = 0;
    this.task.replaceChildren(...tasks.map((task, i) => h("option", { value: i }, task)), h("option", { value: "all" }, "All tasks"));
  }
}

/** The objects by name: what is drawn, for those who read. */
export class ObjectList {
  constructor() {
    this.element = h("ul", { class: "objects", "aria-label": "Objects found" });
    this.told = "";
  }

  update(overlay) {
    const objects = overlay.shown();
    const told = objects.map((object) => `${object.label}${object.score}`).join();
    if (told === this.told) return;
    this.told = told;
    this.element.replaceChildren(...objects.map((object) => {
      const dot = h("i", { "aria-hidden": "true" });
      dot.style.background = colour(object.category);
      return h("li", {}, dot, object.label, h("small", {}, `${number(100 * object.score)} %`));
    }));
  }
}

const STAGES = [["queue_ms", "waiting"], ["unpack_ms", "entropy decoding"], ["synthesise_ms", "picture"], ["task_ms", "detector"]];

/** Where the cloud's time went, drawn to scale. */
export class Stages {
  constructor() {
    this.parts = STAGES.map(([, name], i) => ({ name, bar: h("i", { class: `part-${i}` }), text: h("b", {}) }));
    this.bar = h("div", { class: "stages-bar", role: "img" }, this.parts.map((part) => part.bar));
    this.element = h("div", { class: "stages" }, h("h3", {}, "In the cloud"), this.bar,
      h("ul", {}, this.parts.map((part, i) => h("li", {}, h("i", { class: `part-${i}`, "aria-hidden": "true" }), part.name, part.text))));
  }

  update(event) {
    this.element.hidden = event.outcome !== "detections";
    const values = STAGES.map(([key]) => event.timings[key]);
    const whole = Math.max(1e-9, values.reduce((sum, value) => sum + value, 0));
    this.parts.forEach((part, i) => {
      part.bar.style.width = `${(100 * values[i]) / whole}%`;
      put(part.text, `${number(values[i], 1)} ms`);
    });
    this.bar.setAttribute("aria-label", `In the cloud ${number(whole)} ms: ` + this.parts.map((part) => `${part.name} ${part.text.textContent}`).join(", "));
  }
}
