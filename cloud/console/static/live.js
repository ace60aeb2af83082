// The cameras as the cloud tells of them: one stream of server-sent events, kept as a map that the views read.

import { fetchJson } from "./dom.js";

const KEEP = 150; // rows of history a camera

export const live = new (class extends EventTarget {
  cameras = new Map(); // id -> {id, latest, shown, rows}
  state = "wait"; // wait, open, lost, locked, paused
  bucket_s = 2;
  window_s = 300;
  error = "";
  #source = null;
  #offset = 0; // the cloud's clock less ours, ms
  #paused = false;

  /** The cloud's time, ms. */
  now() {
    return Date.now() + this.#offset;
  }

  get paused() {
    return this.#paused;
  }

  pause(paused) {
    this.#paused = paused;
    this.#connect();
  }

  start() {
    // A page that nobody sees asks for nothing.
    document.addEventListener("visibilitychange", () => this.#connect());
    this.#connect();
  }

  #connect() {
    const wanted = !document.hidden && !this.#paused;
    if (!wanted) {
      this.#source?.close();
      this.#source = null;
      this.#become(this.#paused ? "paused" : this.state);
      return;
    }
    if (this.#source) return;
    const source = new EventSource("/api/live");
    this.#source = source;
    this.#become(this.state === "lost" ? "lost" : "wait");
    source.addEventListener("wall", (event) => this.#whole(JSON.parse(event.data)));
    source.addEventListener("news", (event) => this.#news(JSON.parse(event.data)));
    source.addEventListener("error", () => this.#failed(source));
  }

  async #failed(source) {
    if (this.#source !== source) return;
    if (source.readyState !== EventSource.CLOSED) {
      this.#become("lost"); // the browser tries again by itself
      return;
    }
    // An answer that is an error is final for the browser, and it does not say which one it was.
    this.#source = null;
    try {
      await fetchJson("/api/whoami");
      this.#become("lost");
    } catch (error) {
      this.error = error.message;
      this.#become(error.status === 401 || error.status === 403 ? "locked" : "lost");
    }
    if (this.state === "lost") setTimeout(() => this.#connect(), 2000);
  }

  #become(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }

  #whole(message) {
    this.#offset = message.now - Date.now();
    this.bucket_s = message.bucket_s;
    this.window_s = message.window_s;
    this.cameras = new Map(message.cameras.map((camera) => [camera.id, camera]));
    this.#become("open");
    this.dispatchEvent(new CustomEvent("cameras", { detail: [...this.cameras.keys()] }));
  }

  #news(message) {
    for (const camera of message.cameras) {
      const known = this.cameras.get(camera.id);
      if (known) {
        const from = camera.rows[0]?.[0] ?? Infinity;
        camera.rows = [...known.rows.filter((row) => row[0] < from), ...camera.rows].slice(-KEEP);
      }
      this.cameras.set(camera.id, camera);
    }
    this.dispatchEvent(new CustomEvent("cameras", { detail: message.cameras.map((camera) => camera.id) }));
  }

  /** One value of a row over the window, oldest first; `empty` where nothing came. Column as in the row. */
  series(camera, column, empty) {
    const last = Math.floor(this.now() / 1000 / this.bucket_s) * this.bucket_s - this.bucket_s; // the last whole one
    const count = this.window_s / this.bucket_s;
    const values = new Array(count).fill(empty);
    for (const row of camera.rows) {
      const at = count - 1 - (last - row[0]) / this.bucket_s;
      if (at >= 0 && at < count) values[at] = row[column];
    }
    return values;
  }

  /** The mean of a column over the last whole buckets, null where nothing came. */
  recent(camera, column, empty, buckets = 8) {
    const values = this.series(camera, column, empty).slice(-buckets).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  }
})();

export const FPS = 1;
export const KBITS = 2;
export const BPP = 3;
export const LATENCY = 4;
export const OBJECTS = 5;
