// Elements and numbers for people. Text is only ever set as text: nothing that comes over the wire is read as HTML.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets text only where it changed, so that nothing is laid out again for nothing. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Says something to those who listen to the page. */
export function say(text) {
  put(document.getElementById("say"), text);
}

const NONE = "\u2013";

export function number(value, digits = 0) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function kbits(value) {
  if (value === null || value === undefined) return NONE;
  if (value >= 1000) return `${number(value / 1000, 2)} Mbit/s`;
  return `${number(value, value < 100 ? 1 : 0)} kbit/s`;
}

export function bytes(value) {
  if (value < 1000) return `${number(value)} bytes`;
  if (value < 1e6) return `${number(value / 1e3, 1)} kB`;
  if (value < 1e9) return `${number(value / 1e6, 1)} MB`;
  return `${number(value / 1e9, 2)} GB`;
}

export function bpp(event) {
  const pixels = event.width * event.height;
  return pixels ? (8 * event.bytes) / pixels : null;
}

export function duration(ms) {
  if (ms === null || ms === undefined) return NONE;
  if (ms < 1000) return `${number(ms)} ms`;
  if (ms < 60_000) return `${number(ms / 1000, 1)} s`;
  if (ms < 3_600_000) return `${number(ms / 60_000)} min`;
  if (ms < 172_800_000) return `${number(ms / 3_600_000)} h`;
  return `${number(ms / 86_400_000)} days`;
}

/** How long ago, in words that change seldom. */
export function ago(ms) {
  if (ms < 3000) return "now";
  if (ms < 60_000) return `${Math.floor(ms / 1000)} s ago`;
  return `${duration(ms)} ago`;
}

const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 1 });

export function clock(ms) {
  return CLOCK.format(new Date(ms));
}

export function day(ms) {
  return DAY.format(new Date(ms));
}

/** {person: 2, dog: 1} as "2 person, dog". */
export function objects(counts, most = 4) {
  const all = Object.entries(counts);
  if (!all.length) return "Nothing found";
  const named = all.slice(0, most).map(([label, count]) => (count > 1 ? `${count} ${label}` : label));
  if (all.length > most) named.push(`${all.length - most} more`);
  return named.join(", ");
}

export const OUTCOMES = {
  detections: "Looked at",
  rejected: "Rejected",
  expired: "Expired",
  dropped: "Dropped at the edge",
};

export async function fetchJson(path, options) {
  const response = await fetch(path, options);
  const text = await response.text();
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    answer = { error: text.slice(0, 200) || response.statusText };
  }
  if (!response.ok) throw Object.assign(new Error(answer.error || `the console answered ${response.status}`), { status: response.status });
  return answer;
}
