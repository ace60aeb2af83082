// The system: this cloud process, its models, and the edges that send to it.

import { ago, bytes, duration, fetchJson, h, number, put } from "./dom.js";

export class SystemView {
  title = "System";

  constructor() {
    this.body = h("div", { class: "system" }, h("p", { class: "quiet" }, "Asking the cloud"));
    this.error = h("p", { class: "bad", role: "alert", hidden: true });
    this.element = h("div", { class: "wrap" }, h("h1", {}, "System"), this.error, this.body);
    this.timer = setInterval(() => this.update(), 3000);
    this.update();
  }

  close() {
    clearInterval(this.timer);
    this.closed = true;
  }

  async update() {
    if (document.hidden) return;
    try {
      const facts = await fetchJson("/api/system");
      this.error.hidden = true;
      if (!this.closed) this.#show(facts);
    } catch (error) {
      this.error.hidden = false;
      put(this.error, `The cloud does not answer: ${error.message}`);
    }
  }

  #show(facts) {
    const kept = facts.kept.frames ? `${number(facts.kept.frames)} frames, ${bytes(facts.kept.bytes)}` : "nothing";
    const rows = [
      ["Process", `${facts.cloud}, Sightline ${facts.version}`],
      ["Networks run on", facts.device],
      ["Frames under way", `${number(facts.in_flight)}, ${number(facts.waiting)} wait for a batch`],
      ["Events in the log", number(facts.log.newest - facts.log.oldest + 1)],
      ["Kept for review", kept + (facts.kept.not_kept ? `, ${number(facts.kept.not_kept)} not kept for want of room` : "")],
      ["Watching this console", number(facts.viewers)],
    ];
    const sections = [
      section("This cloud", h("dl", { class: "facts" }, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))),
      section("Edges", facts.edges.length ? this.#edges(facts) : h("p", { class: "quiet" }, "No edge is connected.")),
      section("Codecs", table(["Name", "Model id"], facts.codecs.map((codec) => [codec.name, h("code", {}, codec.id)]))),
      section("Task models", table(["Name", "Finds", "Runs", "Model id"], facts.tasks.map((task) => [
        task.name, task.kind.replaceAll("_", " "), task.runs_on_upload ? "on every frame" : "when asked", h("code", {}, task.id),
      ]))),
    ];
    this.body.replaceChildren(...sections);
  }

  #edges(facts) {
    return table(["Edge", "Known as", "Cameras", "Connected", "Frames", "Received", "Unanswered", "Last frame", "Software"], facts.edges.map((edge) => [
      edge.id, edge.identity, edge.cameras.join(", ") || "\u2013", duration(facts.now - edge.opened), number(edge.frames), bytes(edge.bytes), number(edge.unanswered),
      edge.last ? ago(facts.now - edge.last) : "none yet", edge.version || "\u2013",
    ]));
  }
}

function section(title, ...content) {
  return h("section", {}, h("h2", {}, title), ...content);
}

function table(columns, rows) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": columns[0] },
    h("table", {}, h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => (i ? h("td", {}, cell) : h("th", { scope: "row" }, cell))))))));
}
