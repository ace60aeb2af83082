// One camera: its picture as large as it fits, what was found in it, and its last five minutes.

import { ago, bpp, bytes, clock, duration, h, kbits, number, objects, OUTCOMES, put } from "./dom.js";
import { BPP, KBITS, LATENCY, live, OBJECTS } from "./live.js";
import { Overlay } from "./overlay.js";
import { Chart } from "./chart.js";
import { Controls, ObjectList, Stages } from "./parts.js";

export class CameraView {
  constructor(id) {
    this.id = id;
    this.title = id;
    this.view = h("div", { class: "view large" });
    this.overlay = new Overlay(this.view, 1280);
    this.age = h("span", { class: "age" });
    this.facts = Object.fromEntries(["captured", "size", "coded", "quality", "latency", "edge"].map((name) => [name, h("dd", {})]));
    this.found = h("p", { class: "found" });
    this.list = new ObjectList();
    this.stages = new Stages();
    this.controls = new Controls(this.overlay, () => this.list.update(this.overlay));
    this.charts = [
      new Chart({ title: "Rate", column: KBITS, empty: 0, say: kbits }),
      new Chart({ title: "Bits per pixel", column: BPP, empty: null, say: (value) => number(value, 3) }),
      new Chart({ title: "Capture to detection", column: LATENCY, empty: null, say: duration }),
      new Chart({ title: "Objects a frame", column: OBJECTS, empty: null, say: (value) => number(value, 1) }),
    ];
    this.body = h("div", {},
      h("div", { class: "stage" },
        h("div", {}, this.view, this.controls.element),
        h("aside", { "aria-label": "Latest frame" },
          this.found, this.list.element,
          h("dl", { class: "facts" },
            h("dt", {}, "Captured"), this.facts.captured,
            h("dt", {}, "Picture"), this.facts.size,
            h("dt", {}, "Coded"), this.facts.coded,
            h("dt", {}, "Quality"), this.facts.quality,
            h("dt", {}, "To detection"), this.facts.latency,
            h("dt", {}, "Edge"), this.facts.edge,
          ),
          this.stages.element,
        ),
      ),
      h("section", { class: "charts", "aria-label": "Last five minutes" }, this.charts.map((chart) => chart.element)),
    );
    this.blank = h("div", { class: "blank" });
    this.element = h("div", { class: "wrap" },
      h("div", { class: "head" },
        h("div", {}, h("a", { class: "back", href: "/" }, "All cameras"), h("h1", {}, id)),
        h("div", { class: "head-tools" }, this.age, h("a", { class: "tool", href: `/events?camera=${encodeURIComponent(id)}` }, "Events of this camera")),
      ),
      this.body, this.blank,
    );
    this.onCameras = (event) => event.detail.includes(id) && this.update();
    this.onState = () => this.update();
    live.addEventListener("cameras", this.onCameras);
    live.addEventListener("state", this.onState);
    this.timer = setInterval(() => this.tick(), 1000);
    this.update();
  }

  close() {
    live.removeEventListener("cameras", this.onCameras);
    live.removeEventListener("state", this.onState);
    clearInterval(this.timer);
  }

  async update() {
    const camera = live.cameras.get(this.id);
    this.body.hidden = !camera;
    this.blank.hidden = Boolean(camera);
    if (!camera) {
      this.blank.replaceChildren(
        h("h2", {}, live.state === "open" ? "Nothing from this camera in the last five minutes" : "Asking the cloud"),
        h("p", {}, "What it saw before is under ", h("a", { href: `/events?camera=${encodeURIComponent(this.id)}` }, "its events"), "."),
      );
      return;
    }
    this.tick();
    if (!this.overlay.event) this.tell(camera.shown); // its picture is on its way
    await this.overlay.show(camera.shown);
    if (this.overlay.event) this.tell(this.overlay.event);
  }

  /** Everything beside the picture. */
  tell(event) {
    const fine = event.outcome === "detections";
    put(this.found, fine ? objects(event.objects, 6) : `${OUTCOMES[event.outcome]}: ${event.reason}`);
    this.controls.update(event);
    this.list.update(this.overlay);
    this.stages.update(event);
    put(this.facts.captured, event.captured ? clock(event.captured) : "\u2013");
    put(this.facts.size, `${event.width} \u00d7 ${event.height}`);
    put(this.facts.coded, `${bytes(event.bytes)}, ${number(bpp(event), 3)} bit per pixel`);
    put(this.facts.quality, number(event.quality, 1));
    put(this.facts.latency, duration(event.latency));
    put(this.facts.edge, event.edge);
  }

  tick() {
    const camera = live.cameras.get(this.id);
    if (!camera) return;
    put(this.age, ago(live.now() - camera.latest.logged));
    for (const chart of this.charts) chart.update(camera);
  }
}
