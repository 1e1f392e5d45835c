"use strict";
// The page: its list of requests, the one that is selected, and the keys. Made by `callboard trace export html`.

const $ = (id) => document.getElementById(id);
const index = JSON.parse($("index").textContent);
const blocks = JSON.parse($("blocks").textContent);
const inflated = new Map();
for (const [colour, label] of index.colours) LABELS.set(colour, label);
const requests = index.requests.map((each, place) => ({
  ...each,
  place,
  text: [each.id, each.model, each.script, each.error, ...each.actors].join(" ").toLowerCase(),
}));
const byId = new Map(requests.map((each) => [each.id, each]));
let shown = requests;
let selected = null;
const waterfall = new Waterfall($("waterfall"), $("tip"), (text) => { $("zoomed").textContent = text; });

/** Return the details of a request, of its block, which is inflated once. */
async function detailsOf(request) {
  const block = Math.floor(request.place / index.perBlock);
  if (!inflated.has(block)) inflated.set(block, inflate(blocks[block]));
  return (await inflated.get(block))[request.place % index.perBlock];
}

async function inflate(text) {
  const raw = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const share = (part, whole) => (whole > 0 ? (100 * part) / whole : 0);
const percent = (part, whole) => {
  const value = share(part, whole);
  return (value >= 99.95 || value === 0 ? value.toFixed(0) : value < 0.1 ? "<0.1" : value.toFixed(1)) + "%";
};
const count = (n, noun) => (n === null ? "– " + noun + "s" : n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s"));

// ---- the list ----

function sorted(list) {
  const orders = {
    newest: (a, b) => b.at - a.at || b.place - a.place,
    oldest: (a, b) => a.at - b.at || a.place - b.place,
    jct: (a, b) => (b.jct ?? Infinity) - (a.jct ?? Infinity) || a.place - b.place,
    ttft: (a, b) => (b.ttft ?? -1) - (a.ttft ?? -1) || a.place - b.place,
  };
  return [...list].sort(orders[$("sort").value]);
}

function list() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const only = $("errors").checked;
  shown = sorted(requests.filter((each) => (!only || each.error) && words.every((word) => each.text.includes(word))));
  $("count").textContent = shown.length === requests.length ? count(shown.length, "request")
    : `${shown.length.toLocaleString("en")} of ${requests.length.toLocaleString("en")}`;
  $("list").replaceChildren(...shown.map((each) => (each.row ??= rowOf(each))));
  $("nothing").hidden = shown.length > 0 || selected !== null;
  $("nothing").textContent = requests.length ? "No request is like that." : "There is no request in this file.";
}

function rowOf(request) {
  const link = make("a", { href: "#" + encodeURIComponent(request.id) });
  const right = make("span", { className: "jct", textContent: request.jct === null ? "open" : time(request.jct) });
  const under = [request.ttft === null ? "no token" : "TTFT " + time(request.ttft), request.script].filter(Boolean);
  link.append(make("span", { className: "row-id", textContent: request.id }), right, bar(request, "small"),
    make("span", { className: "under", textContent: under.join(" · ") }));
  if (request.error) link.append(make("span", { className: "row-error", textContent: request.error }));
  const row = make("li", {}, link);
  row.classList.toggle("selected", request === selected);
  return row;
}

/** A bar of what the time went to. */
function bar(request, className) {
  const made = make("div", { className: "spent " + className });
  const whole = request.spent.reduce((sum, [, us]) => sum + us, 0) + request.rest;
  for (const [colour, us] of [...request.spent, ["rest", request.rest]]) {
    if (!us) continue;
    const part = make("span", { className: "c-" + colour });
    part.style.width = share(us, whole) + "%";
    if (className !== "small") {
      const name = LABELS.get(colour) || "unexplained";
      part.title = `${name}: ${time(us)}, ${percent(us, whole)}`;
      if (share(us, whole) > 8) part.textContent = (share(us, whole) > 24 ? name + " " : "") + percent(us, whole);
    }
    made.append(part);
  }
  return made;
}

// ---- the request ----

async function select(request) {
  if (selected && selected.row) selected.row.classList.remove("selected");
  selected = request;
  request.row ??= rowOf(request);
  request.row.classList.add("selected");
  request.row.scrollIntoView({ block: "nearest" });
  document.title = `${request.id} · Callboard trace`;
  const data = await detailsOf(request);
  if (selected !== request) return; // Another one was chosen meanwhile.
  $("nothing").hidden = true;
  $("request").hidden = false;
  $("id").textContent = request.id;
  $("chips").replaceChildren(...chips(request, data));
  $("bar").replaceChildren(bar(request, "large"));
  $("parts").replaceChildren(...parts(request, data));
  waterfall.show(data, request, index.actors);
  $("subs").tBodies[0].replaceChildren(...subRequests());
  $("verbs").hidden = !waterfall.numbers.size;
  const used = new Set(waterfall.spans.map(colourOf));
  $("colours").replaceChildren(...[...LABELS].filter(([colour]) => used.has(colour)).map(([colour, label]) =>
    make("span", {}, make("i", { className: "swatch c-" + colour }), label)));
}

function chips(request, data) {
  const made = [];
  const chip = (name, value, className = "") => made.push(
    make("span", { className: "chip " + className }, make("small", { textContent: name }), make("b", { textContent: value })));
  if (request.error) chip("failed", request.error, "bad");
  chip("JCT", request.jct === null ? "not over" : time(request.jct), "big");
  chip("TTFT", time(request.ttft), "big");
  if (request.prompt !== null) chip("prompt", count(request.prompt, "token"));
  if (request.tokens !== null) chip("answer", count(request.tokens, "token"));
  if (request.tokens > 1 && request.jct !== null && request.ttft !== null) {
    chip("TPOT", time((request.jct - request.ttft) / (request.tokens - 1)));
  }
  if (request.model) chip("model", request.model);
  if (request.script) chip("script", request.script + (data.version ? " " + data.version : ""));
  for (const [name, value] of Object.entries(data.notes)) chip("chose " + name, value);
  if (request.at) chip("at", new Date(request.at).toLocaleString());
  if (data.clockErrorUs > 0) chip("clocks ±", time(data.clockErrorUs));
  return made;
}

/** Rows of what the time went to: the larger ones, and the rest that nothing explains. */
function parts(request, data) {
  const whole = data.parts.reduce((sum, part) => sum + part[3], 0) + request.rest;
  const most = 8;
  const made = data.parts.slice(0, most).map(([colour, name, actor, us, n]) =>
    part(colour, name, actor, us, whole, n > 1 ? `×${n}` : ""));
  const others = data.parts.slice(most);
  if (others.length) {
    const us = others.reduce((sum, each) => sum + each[3], 0);
    made.push(part("others", `${others.length} others`, "", us, whole, ""));
  }
  const row = part("rest", "unexplained", "", request.rest, whole, "");
  row.title = data.gaps.map(([begin, length, after, before]) =>
    `${time(length)} at ${time(begin)}, between ${after} and ${before}`).slice(0, 12).join("\n");
  return [...made, row];
}

function part(colour, name, actor, us, whole, more) {
  return make("div", { className: "part" }, make("i", { className: "swatch c-" + colour }),
    make("b", { textContent: name }), make("span", { textContent: actor }), make("small", { textContent: more }),
    make("span", { className: "num", textContent: time(us) }), make("span", { className: "num", textContent: percent(us, whole) }));
}

function subRequests() {
  return [...waterfall.numbers].map(([place, number]) => {
    const span = waterfall.spans[place], { engine } = span.facts || {};
    const engineToo = engine && engine !== span.to ? `, of ${engine}` : "";
    const row = make("tr", { tabIndex: 0 },
      make("td", {}, make("i", { className: "number", textContent: number })),
      make("td", {}, make("code", { textContent: span.name })),
      make("td", { className: "who", textContent: `${span.who} → ${span.to}${engineToo}` }),
      make("td", { className: "num", textContent: "at " + time(span.begin) }),
      make("td", { className: "num", textContent: span.isOpen ? "not over" : time(span.end - span.begin) }),
      make("td", {}, span.words, ...(span.error ? [make("span", { className: "error", textContent: " " + span.error })] : [])));
    row.addEventListener("mouseenter", () => waterfall.light(span));
    row.addEventListener("mouseleave", () => waterfall.light(null));
    row.addEventListener("click", () => waterfall.zoomToSpan(span));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") waterfall.zoomToSpan(span); });
    return row;
  });
}

// ---- links, keys ----

function fromLink() {
  let id = location.hash.slice(1);
  try { id = decodeURIComponent(id); } catch { /* It is as it is. */ }
  const request = byId.get(id) || (id ? requests.find((each) => each.id.startsWith(id)) : null) || shown[0] || null;
  return request ? select(request) : Promise.resolve();
}

function go(step) {
  const at = shown.indexOf(selected) + step;
  if (at >= 0 && at < shown.length) location.hash = encodeURIComponent(shown[at].id);
}

function theme() {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

const KEYS = {
  j: () => go(1), ArrowDown: () => go(1), k: () => go(-1), ArrowUp: () => go(-1),
  "/": () => $("search").focus(),
  s: () => { $("sort").selectedIndex = ($("sort").selectedIndex + 1) % $("sort").length; list(); },
  e: () => { $("errors").checked = !$("errors").checked; list(); },
  "+": () => waterfall.zoomBy(0.6), "=": () => waterfall.zoomBy(0.6), "-": () => waterfall.zoomBy(1.7),
  0: () => waterfall.zoomTo(0, waterfall.length),
  ArrowLeft: () => waterfall.pan(-0.2), ArrowRight: () => waterfall.pan(0.2),
  t: theme, "?": () => $("keys").showModal(),
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    document.activeElement.blur();
    waterfall.hush();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.matches("input:not([type=checkbox]), select")) return;
  if (event.key === "Enter" && waterfall.enter()) return;
  const act = Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
  if (!act || (!selected && !["/", "t", "?", "e", "s"].includes(event.key))) return;
  event.preventDefault();
  act();
});
addEventListener("hashchange", fromLink);
$("search").addEventListener("input", list);
$("sort").addEventListener("change", list);
$("errors").addEventListener("change", list);
$("theme").addEventListener("click", theme);
$("help").addEventListener("click", () => $("keys").showModal());
$("keys").addEventListener("click", () => $("keys").close());
$("closer").addEventListener("click", KEYS["+"]);
$("wider").addEventListener("click", KEYS["-"]);
$("whole").addEventListener("click", KEYS[0]);

$("about").textContent = [index.fleet && `fleet ${index.fleet}`, count(requests.length, "request"),
  index.clockErrorUs > 0 && `clocks known to ± ${time(index.clockErrorUs)}`].filter(Boolean).join(" · ");
$("legend").replaceChildren(...index.verbs.flatMap(([verb, words]) =>
  [make("dt", {}, make("code", { textContent: verb })), make("dd", { textContent: words })]));
list();
fromLink().then(() => requestAnimationFrame(() => setTimeout(() => performance.mark("waterfall"))));
