// The page's frame: which view is shown, colours, pause, and what the connection is like.

import { fetchJson, put, say } from "./dom.js";
import { live } from "./live.js";
import { LoginView } from "./login.js";
import { CameraView } from "./camera.js";
import { EventsView } from "./events.js";
import { SystemView } from "./system.js";
import { WallView } from "./wall.js";

const main = document.getElementById("main");
let view = null;

function chosen() {
  const path = location.pathname;
  if (live.state === "locked") return ["", () => new LoginView()];
  if (path.startsWith("/camera/")) return ["wall", () => new CameraView(decodeURIComponent(path.slice("/camera/".length)))];
  if (path === "/events") return ["events", () => new EventsView(new URLSearchParams(location.search))];
  if (path === "/system") return ["system", () => new SystemView()];
  return ["wall", () => new WallView()];
}

function show(focus) {
  view?.close();
  const [name, make] = chosen();
  view = make();
  document.title = `${view.title} - Sightline`;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.replaceChildren(view.element);
  if (focus) {
    window.scrollTo(0, 0);
    main.focus({ preventScroll: true });
    say(view.title);
  }
  view.opened?.(); // last: it may know a better place for the focus
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  const url = new URL(link.href);
  if (url.origin !== location.origin || link.target || url.hash) return;
  event.preventDefault();
  history.pushState(null, "", url);
  show(true);
});
window.addEventListener("popstate", () => show(true));

// Connection.
const STATES = { wait: "Connecting", open: "Live", lost: "Connection lost, trying again", locked: "Not logged in", paused: "Paused" };
const link = document.getElementById("link");
live.addEventListener("state", () => {
  link.dataset.state = live.state;
  put(link.querySelector("span"), STATES[live.state]);
  document.body.classList.toggle("stale", live.state === "lost");
  if (live.state === "locked") show(true);
  if (live.state === "open") offerToLeave();
});

const pause = document.getElementById("pause");
pause.addEventListener("click", () => {
  live.pause(!live.paused);
  pause.setAttribute("aria-pressed", String(live.paused));
  put(pause, live.paused ? "Resume" : "Pause");
});

// Colours: as the system says, or as chosen here.
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const theme = document.getElementById("theme");
function colours(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  put(theme, name[0].toUpperCase() + name.slice(1));
  theme.setAttribute("aria-label", `Colours: ${THEMES[name]}`);
}
function remembered() {
  try {
    const name = localStorage.getItem("theme");
    return name in THEMES ? name : "auto";
  } catch {
    return "auto";
  }
}
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(remembered()) + 1) % names.length];
  try {
    localStorage.setItem("theme", next);
  } catch {
    // a browser that keeps nothing still shows it
  }
  colours(next);
});
colours(remembered());

// Somebody who logged in by token can log out.
const leave = document.getElementById("leave");
async function offerToLeave() {
  try {
    leave.hidden = !(await fetchJson("/api/whoami")).by_token;
  } catch {
    leave.hidden = true;
  }
}
leave.addEventListener("click", async () => {
  await fetchJson("/api/logout", { method: "POST" });
  location.assign("/");
});

live.start();
show(false);
