// Events: search by time, camera and class, and replay from any of them.

import { bpp, bytes, clock, day, duration, fetchJson, h, number, objects, OUTCOMES, put, say } from "./dom.js";
import { live } from "./live.js";
import { Overlay, pictureUrl } from "./overlay.js";
import { Controls, ObjectList, Stages } from "./parts.js";

const FIELDS = ["camera", "category", "outcome", "score", "since", "until"];
const PAGE = 40;

export class EventsView {
  title = "Events";

  constructor(query) {
    this.form = this.#form();
    this.list = h("ul", { class: "results", "aria-label": "Events found" });
    this.state = h("p", { class: "quiet", role: "status" });
    this.more = h("button", { type: "button", class: "tool", hidden: true, onclick: () => this.search(false) }, "Older events");
    this.player = new Player((event) => this.#mark(event));
    this.element = h("div", { class: "wrap events" },
      h("h1", { class: "unseen" }, "Events"),
      this.form,
      h("div", { class: "split" }, h("section", { class: "found-list", "aria-label": "Results" }, this.state, this.list, this.more), this.player.element),
    );
    this.query = query;
    this.next = null;
    this.asked = 0;
  }

  async opened() {
    for (const name of FIELDS) if (this.query.has(name)) this.form.elements[name].value = this.query.get(name);
    await this.#categories();
    this.search(true);
    if (this.query.has("event")) {
      try {
        this.player.open(await fetchJson(`/api/events/${encodeURIComponent(this.query.get("event"))}`));
      } catch (error) {
        this.player.fail(error.message);
      }
    }
  }

  close() {
    this.asked++;
    this.player.close();
  }

  #form() {
    const field = (label, control) => h("label", { class: "field" }, h("span", {}, label), control);
    const cameras = h("datalist", { id: "cameras" }, [...live.cameras.keys()].sort().map((id) => h("option", { value: id })));
    this.category = h("select", { name: "category" }, h("option", { value: "" }, "Any"));
    return h("form", { class: "search", onsubmit: (event) => {
      event.preventDefault();
      this.search(true);
    } },
      field("Camera", h("input", { name: "camera", list: "cameras", placeholder: "Any", autocomplete: "off", spellcheck: "false" })), cameras,
      field("Class", this.category),
      field("Score from", h("input", { name: "score", type: "number", min: 0, max: 1, step: 0.05, placeholder: "0.1", inputmode: "decimal" })),
      field("From", h("input", { name: "since", type: "datetime-local", step: 1 })),
      field("To", h("input", { name: "until", type: "datetime-local", step: 1 })),
      field("Outcome", h("select", { name: "outcome" }, h("option", { value: "" }, "Any"), Object.entries(OUTCOMES).map(([value, name]) => h("option", { value }, name)))),
      h("button", { type: "submit", class: "main" }, "Search"),
    );
  }

  async #categories() {
    try {
      const { categories } = await fetchJson("/api/system");
      const wanted = this.query.get("category") ?? "";
      this.category.append(...categories.map(({ id, name }) => h("option", { value: id }, name)));
      this.category.value = wanted;
    } catch {
      // the search itself says what is wrong
    }
  }

  async search(anew) {
    const asked = ++this.asked;
    if (anew) {
      this.next = null;
      this.list.replaceChildren();
    }
    const values = new URLSearchParams(), kept = new URLSearchParams();
    for (const name of FIELDS) {
      const value = this.form.elements[name].value;
      if (!value) continue;
      kept.set(name, value);
      values.set(name, name === "since" || name === "until" ? new Date(value).getTime() : value);
    }
    history.replaceState(null, "", `/events${kept.size ? `?${kept}` : ""}`);
    this.more.hidden = true;
    put(this.state, "Searching");
    let wanted = PAGE, scanned = 0;
    try {
      while (wanted > 0) {
        const query = new URLSearchParams(values);
        query.set("limit", wanted);
        if (this.next) query.set("before", this.next);
        const found = await fetchJson(`/api/events?${query}`);
        if (asked !== this.asked) return;
        scanned += found.scanned;
        wanted -= found.events.length;
        this.list.append(...found.events.map((event) => this.#row(event)));
        this.next = found.next;
        if (!this.next) break;
        if (wanted > 0) put(this.state, `Searching, ${number(scanned)} events looked at`);
      }
      const count = this.list.children.length;
      put(this.state, count ? `${number(count)} ${count === 1 ? "event" : "events"}, newest first` : "No event matches. Widen the time, or leave a field empty.");
      this.more.hidden = !this.next;
    } catch (error) {
      if (asked === this.asked) put(this.state, `The search failed: ${error.message}`);
    }
  }

  #row(event) {
    const fine = event.outcome === "detections";
    const picture = fine ? h("img", { src: pictureUrl(event, 480), alt: "", loading: "lazy", width: 112, height: 84, onerror: (failed) => failed.target.replaceWith(h("span", { class: "no-picture" }, "not kept")) }) : h("span", { class: "no-picture" }, OUTCOMES[event.outcome]);
    const at = event.captured ?? event.logged;
    const button = h("button", { type: "button", onclick: () => this.player.open(event) },
      picture,
      h("span", { class: "row-text" },
        h("b", {}, fine ? objects(event.objects) : event.reason),
        h("span", { class: "quiet" }, `${event.camera}, ${day(at)} ${clock(at)}`),
      ),
    );
    button.dataset.sequence = event.sequence;
    return h("li", {}, button);
  }

  #mark(event) {
    for (const button of this.list.querySelectorAll("button")) {
      if (button.dataset.sequence === String(event.sequence)) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    const query = new URLSearchParams(location.search);
    query.set("event", event.sequence);
    history.replaceState(null, "", `/events?${query}`);
  }
}

const BATCH = 120;

/** One event, and those of its camera after it, as a film. */
class Player {
  constructor(shown) {
    this.shown = shown;
    this.events = [];
    this.at = 0;
    this.more = null; // sequence after which there may be more
    this.playing = false;
    this.turn = 0;
    this.view = h("div", { class: "view large" });
    this.overlay = new Overlay(this.view, 1280);
    this.list = new ObjectList();
    this.stages = new Stages();
    this.controls = new Controls(this.overlay, () => this.list.update(this.overlay));
    this.heading = h("h2", {});
    this.when = h("p", { class: "quiet" });
    this.facts = h("dl", { class: "facts" });
    this.play = h("button", { type: "button", class: "main", onclick: () => (this.playing ? this.stop() : this.run()) }, "Replay");
    this.back = h("button", { type: "button", class: "tool", onclick: () => this.step(-1) }, "Back");
    this.forth = h("button", { type: "button", class: "tool", onclick: () => this.step(1) }, "Next");
    this.speed = h("select", { "aria-label": "Speed" }, [["1", "1\u00d7"], ["2", "2\u00d7"], ["4", "4\u00d7"], ["16", "16\u00d7"]].map(([value, name]) => h("option", { value }, name)));
    this.ask = h("button", { type: "button", class: "tool", onclick: () => this.again() }, "Ask the edge for it at quality 8");
    this.answer = h("span", { class: "quiet", role: "status" });
    this.place = h("input", { type: "range", min: 0, max: 0, value: 0, step: 1, "aria-label": "Place in the replay", oninput: () => this.go(Number(this.place.value)) });
    this.body = h("div", { hidden: true },
      this.heading, this.when, this.view,
      h("div", { class: "player" }, this.play, this.back, this.forth, this.place, this.speed),
      this.controls.element, this.list.element,
      h("p", { class: "again" }, this.ask, this.answer),
      this.facts, this.stages.element,
    );
    this.blank = h("div", { class: "blank" }, h("h2", {}, "Choose an event"), h("p", {}, "Its picture is decoded again from what the camera sent, and can be replayed from there."));
    this.element = h("section", { class: "watch", "aria-label": "Event" }, this.blank, this.body);
  }

  close() {
    this.stop();
    this.turn++;
  }

  fail(sentence) {
    this.body.hidden = true;
    this.blank.hidden = false;
    this.blank.replaceChildren(h("h2", {}, "This event cannot be shown"), h("p", {}, sentence));
  }

  async open(event) {
    this.stop();
    this.blank.hidden = true;
    this.body.hidden = false;
    this.events = [event];
    this.at = 0;
    this.more = event.sequence;
    this.place.max = 0;
    await this.go(0);
    await this.#load();
  }

  async #load() {
    const turn = ++this.turn;
    const after = this.more;
    if (after === null) return;
    const query = new URLSearchParams({ camera: this.events[0].camera, after, limit: BATCH, outcome: "detections" });
    try {
      const found = await fetchJson(`/api/events?${query}`);
      if (turn !== this.turn) return;
      this.events.push(...found.events);
      this.more = found.next;
      this.place.max = this.events.length - 1;
      this.#buttons();
    } catch (error) {
      if (turn === this.turn) say(`The replay cannot go on: ${error.message}`);
    }
  }

  async go(at) {
    this.at = Math.min(Math.max(at, 0), this.events.length - 1);
    const event = this.events[this.at];
    this.place.value = this.at;
    this.place.setAttribute("aria-valuetext", clock(event.captured ?? event.logged));
    this.#tell(event);
    await this.overlay.show(event);
    this.controls.update(event);
    this.list.update(this.overlay);
    this.shown(event);
    this.#buttons();
  }

  /** The frame once more from its edge, where that keeps originals. */
  async again() {
    this.stop();
    const event = this.events[this.at];
    this.ask.disabled = true;
    put(this.answer, "Asking the edge");
    try {
      const response = await fetch(`/again/${encodeURIComponent(event.camera)}/${event.epoch}/${event.frame}?quality=8`, { method: "POST" });
      if (!response.ok) throw new Error((await response.json()).error);
      const blob = await response.blob();
      if (this.events[this.at] !== event) return;
      await this.overlay.replace(blob);
      put(this.answer, `Coded again from the original: ${bytes(Number(response.headers.get("x-coded-bytes")))}`);
    } catch (error) {
      put(this.answer, `Not to be had: ${error.message}`);
    } finally {
      this.ask.disabled = false;
    }
  }

  step(by) {
    this.stop();
    this.go(this.at + by);
  }

  #buttons() {
    this.back.disabled = this.at === 0;
    this.forth.disabled = this.at >= this.events.length - 1;
    this.play.disabled = this.events.length < 2;
  }

  #tell(event) {
    const at = event.captured ?? event.logged;
    put(this.heading, event.outcome === "detections" ? objects(event.objects, 6) : OUTCOMES[event.outcome]);
    put(this.when, `${event.camera}, ${day(at)} ${clock(at)}`);
    const facts = [
      ["Frame", `${event.epoch} / ${event.frame}`],
      ["Event", number(event.sequence)],
      ["Picture", event.width ? `${event.width} \u00d7 ${event.height}, quality ${number(event.quality, 1)}` : "\u2013"],
      ["Coded", event.width ? `${bytes(event.bytes)}, ${number(bpp(event), 3)} bit per pixel` : "\u2013"],
      ["To detection", duration(event.latency)],
      ["Edge", event.edge],
    ];
    if (event.reason) facts.unshift(["Why", event.reason]);
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    this.stages.update(event);
    this.ask.hidden = event.outcome !== "detections";
    put(this.answer, "");
  }

  async run() {
    this.playing = true;
    put(this.play, "Stop");
    if (this.at >= this.events.length - 1) await this.go(0);
    while (this.playing) {
      const start = performance.now(), event = this.events[this.at], next = this.events[this.at + 1];
      if (!next) break;
      if (this.events.length - this.at < 20 && this.more !== null) this.#load();
      new Image().src = pictureUrl(next, 1280); // on its way while this one is looked at
      const between = ((next.captured ?? next.logged) - (event.captured ?? event.logged)) / Number(this.speed.value);
      await new Promise((done) => setTimeout(done, Math.min(Math.max(between, 30), 2000) - (performance.now() - start)));
      if (this.playing) await this.go(this.at + 1);
    }
    this.stop();
  }

  stop() {
    this.playing = false;
    put(this.play, "Replay");
  }
}
