// The camera wall: a tile a camera. A tile out of sight asks for no picture.

import { ago, bpp, duration, h, kbits, number, objects, OUTCOMES, put } from "./dom.js";
import { FPS, KBITS, LATENCY, live } from "./live.js";
import { Overlay } from "./overlay.js";
import { Spark } from "./chart.js";

const SILENT_MS = 15_000;

class Tile {
  constructor(id, observer) {
    this.id = id;
    this.visible = false;
    this.event = null;
    const name = h("h2", {}, id);
    this.age = h("span", { class: "age" });
    this.view = h("div", { class: "view" });
    this.found = h("p", { class: "found" });
    this.rate = h("span", {});
    this.bpp = h("span", {});
    this.latency = h("span", {});
    this.spark = new Spark();
    this.link = h("a", { class: "tile", href: `/camera/${encodeURIComponent(id)}` },
      this.view,
      h("div", { class: "tile-head" }, name, this.age),
      this.found,
      h("div", { class: "tile-foot" }, h("p", { class: "figures" }, this.rate, this.bpp, this.latency), this.spark.element),
    );
    this.element = h("li", {}, this.link);
    this.element.tile = this;
    this.overlay = new Overlay(this.view, 480);
    observer.observe(this.element);
  }

  update(camera) {
    this.camera = camera;
    const { latest } = camera;
    if (!this.overlay.event) this.tell(latest);
    put(this.rate, kbits(live.recent(camera, KBITS, 0)));
    put(this.bpp, `${number(bpp(latest), 3)} bpp`);
    put(this.latency, duration(latest.latency));
    this.spark.update(live.series(camera, KBITS, 0));
    this.tick();
    this.look();
  }

  tick() {
    const age = live.now() - this.camera.latest.logged;
    put(this.age, ago(age));
    this.link.classList.toggle("silent", age > SILENT_MS);
  }

  async look() {
    if (!this.camera) return;
    if (!this.visible) {
      this.tell(this.camera.latest);
      return;
    }
    await this.overlay.show(this.camera.shown);
    if (this.overlay.event) this.tell(this.overlay.event);
  }

  /** What was found, in words: of the picture that stands there, where one does. */
  tell(event) {
    const fine = event.outcome === "detections";
    put(this.found, fine ? objects(event.objects) : `${OUTCOMES[event.outcome]}: ${event.reason}`);
    this.found.classList.toggle("bad", !fine);
  }
}

export class WallView {
  title = "Cameras";

  constructor() {
    this.tiles = new Map();
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        entry.target.tile.visible = entry.isIntersecting;
        entry.target.tile.look();
      }
    }, { rootMargin: "200px" });
    this.sum = Object.fromEntries(
      ["cameras", "frames", "rate", "latency"].map((name) => [name, h("dd", {}, "\u2013")]),
    );
    this.filter = h("input", { type: "search", id: "find", placeholder: "Find a camera", "aria-label": "Find a camera", autocomplete: "off", spellcheck: "false", oninput: () => this.arrange() });
    this.list = h("ul", { class: "wall" });
    this.blank = h("div", { class: "blank" });
    this.element = h("div", { class: "wrap" },
      h("h1", { class: "unseen" }, "Cameras"),
      h("div", { class: "wall-top" },
        h("dl", { class: "sum" },
          h("div", {}, h("dt", {}, "Cameras sending"), this.sum.cameras),
          h("div", {}, h("dt", {}, "Frames a second"), this.sum.frames),
          h("div", {}, h("dt", {}, "Over the wire"), this.sum.rate),
          h("div", {}, h("dt", {}, "Capture to detection"), this.sum.latency),
        ),
        this.filter,
      ),
      this.list, this.blank,
    );
    this.onCameras = (event) => this.update(event.detail);
    this.onState = () => this.explain();
    live.addEventListener("cameras", this.onCameras);
    live.addEventListener("state", this.onState);
    this.timer = setInterval(() => this.tick(), 1000);
    this.update([...live.cameras.keys()]);
  }

  close() {
    live.removeEventListener("cameras", this.onCameras);
    live.removeEventListener("state", this.onState);
    clearInterval(this.timer);
    this.observer.disconnect();
  }

  update(ids) {
    let changed = false;
    for (const id of ids) {
      if (!this.tiles.has(id)) {
        this.tiles.set(id, new Tile(id, this.observer));
        changed = true;
      }
      this.tiles.get(id).update(live.cameras.get(id));
    }
    for (const id of this.tiles.keys()) {
      if (!live.cameras.has(id)) {
        this.tiles.delete(id);
        changed = true;
      }
    }
    if (changed) this.arrange();
    this.explain();
    this.tick();
  }

  arrange() {
    const wanted = this.filter.value.trim().toLowerCase();
    const names = [...this.tiles.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const shown = names.filter((id) => id.toLowerCase().includes(wanted));
    this.list.replaceChildren(...shown.map((id) => this.tiles.get(id).element));
    this.list.dataset.count = Math.min(shown.length, 3);
    this.explain();
  }

  explain() {
    const none = !this.list.children.length;
    this.blank.hidden = !none;
    if (!none) return;
    if (this.tiles.size) {
      this.blank.replaceChildren(h("h2", {}, "No camera of that name"), h("p", {}, `${this.tiles.size} others are here.`));
    } else if (live.state === "open") {
      this.blank.replaceChildren(
        h("h2", {}, "No camera has sent a frame in the last five minutes"),
        h("p", {}, "Give an edge service a picture and it shows up here at once. What was seen before is under ", h("a", { href: "/events" }, "Events"), "."),
        h("pre", {}, h("code", {}, "sightline camera video.mp4 --edge 127.0.0.1:7411")),
      );
    } else {
      this.blank.replaceChildren(
        h("h2", {}, live.state === "lost" ? "The cloud does not answer" : live.state === "paused" ? "Paused" : "Asking the cloud"),
        h("p", {}, live.state === "lost" ? "The page tries again every other second." : ""),
      );
    }
  }

  tick() {
    const sending = [...live.cameras.values()].filter((camera) => live.now() - camera.latest.logged <= SILENT_MS);
    for (const tile of this.tiles.values()) tile.tick();
    const total = (column) => sending.reduce((sum, camera) => sum + (live.recent(camera, column, 0) ?? 0), 0);
    const latencies = sending.map((camera) => live.recent(camera, LATENCY, null)).filter((value) => value !== null).sort((a, b) => a - b);
    const all = live.cameras.size;
    put(this.sum.cameras, sending.length === all ? number(all) : `${sending.length} of ${all}`);
    put(this.sum.frames, number(total(FPS), 1));
    put(this.sum.rate, kbits(total(KBITS)));
    put(this.sum.latency, duration(latencies[Math.floor(latencies.length / 2)] ?? null));
  }
}
