// Shown where the cloud does not know the caller: a token, or the reason why not.

import { fetchJson, h, put } from "./dom.js";
import { live } from "./live.js";

export class LoginView {
  title = "Log in";

  constructor() {
    this.error = h("p", { class: "bad", role: "alert" });
    this.token = h("input", { type: "password", name: "token", autocomplete: "current-password", required: true, spellcheck: "false" });
    this.element = h("div", { class: "wrap" }, h("form", { class: "login", onsubmit: (event) => this.#send(event) },
      h("h1", {}, "Log in"),
      h("p", { class: "quiet" }, "The cloud shows a camera to those whom its policy lets subscribe to it. Give the bearer token that it names for you."),
      h("label", { class: "field" }, h("span", {}, "Token"), this.token),
      h("button", { type: "submit", class: "main" }, "Log in"),
      this.error,
      h("p", { class: "quiet" }, `The cloud said: ${live.error}.`),
    ));
  }

  close() {}

  opened() {
    this.token.focus();
  }

  async #send(event) {
    event.preventDefault();
    try {
      await fetchJson("/api/login", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ token: this.token.value.trim() }) });
      location.reload();
    } catch (error) {
      put(this.error, `That did not work: ${error.message}.`);
      this.token.select();
    }
  }
}
