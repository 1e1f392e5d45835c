"use strict";
// The waterfall of one request: a lane per actor, bars nested in rows, arrows between a call and where it is served.

/** The places of a span's fields in the data. `who` did it; of a call, who asked. `to` is asked. Times: microseconds. */
const FIELDS = ["parent", "kind", "name", "category", "who", "to", "begin", "length", "words", "error", "sequence",
  "bytes", "items", "first", "facts"];
const ROW = 22; // pixels from row to row
const LEAST = 2; // pixels of the shortest bar
const LANE = 42; // pixels of the lowest lane: its name and kind fit in
const TYPICAL = 850; // pixels that the time axis has on most screens
const SVG = "http://www.w3.org/2000/svg";

class Waterfall {
  constructor(root, tip, onZoom) {
    this.root = root;
    this.tip = tip;
    this.onZoom = onZoom;
    this.bars = [];
    root.addEventListener("pointermove", (event) => this.move(event));
    root.addEventListener("pointerleave", () => this.leave());
    root.addEventListener("pointerdown", (event) => this.grab(event));
    root.addEventListener("pointerup", (event) => this.drop(event));
    root.addEventListener("pointercancel", () => { this.from = null; this.selection.hidden = true; });
    root.addEventListener("dblclick", () => this.zoomTo(0, this.length));
    root.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    root.addEventListener("focusin", (event) => this.focus(event));
    root.addEventListener("focusout", () => this.leave());
    new ResizeObserver(() => this.place()).observe(root);
  }

  /** Show a request: `data` as html.py made it; `actors` are [name, kind] in the order of the lanes. */
  show(data, summary, actors) {
    this.spans = data.spans.map((row, index) => {
      const span = { index };
      FIELDS.forEach((field, place) => { span[field] = row[place]; });
      return span;
    });
    this.length = Math.max(data.length, 1);
    this.ttft = summary.ttft;
    this.numbers = new Map(data.subRequests.map((index, place) => [index, place + 1]));
    for (const span of this.spans) {
      span.isOpen = span.length === null;
      span.end = span.begin + (span.isOpen ? Math.max(0, this.length - span.begin) : span.length);
      span.above = span.parent === null ? null : this.spans[span.parent];
      span.number = this.numbers.get(span.index) ||
        (span.kind === "serve" && span.above ? this.numbers.get(span.above.index) : 0) || 0;
    }
    const rows = this.layOut(actors);
    this.build(rows);
    this.zoomTo(0, this.length);
  }

  /** Give each span a lane and a row: below what it is in, beside nothing that is done at the same time. */
  layOut(actors) {
    const lanes = new Map(actors.map(([name, kind]) => [name, { name, kind, rows: [] }]));
    const below = this.spans.map(() => []);
    const roots = [];
    for (const span of this.spans) (span.parent === null ? roots : below[span.parent]).push(span);
    // However short a sub-request is, it is named beside its bar: nothing else is put there.
    for (const span of this.spans) {
      span.reach = span.end + (span.number && span.kind !== "bus" ? (labelWidth(this.title(span), true) / TYPICAL) * this.length : 0);
    }
    const put = (span) => {
      if (span.kind === "bus") {
        span.row = span.above ? span.above.row : 0;
        span.lane = span.above ? span.above.lane : null;
      } else {
        const lane = span.lane = lanes.get(span.who) || [...lanes.values()][0];
        let above = span.above;
        while (above && (above.lane !== lane || above.kind === "bus")) above = above.above;
        let row = above && span.begin < above.end ? above.row + 1 : 0;
        const isTaken = (other) => {
          // Where one ends as the next begins, clocks were read twice: they may overlap by next to nothing.
          const slack = Math.min(this.length / 4000, (span.end - span.begin) / 2, (other.end - other.begin) / 2);
          return span.begin + slack < other.reach && other.begin + slack < span.reach;
        };
        while (lane.rows[row] && lane.rows[row].some(isTaken)) row++;
        span.row = row;
        (lane.rows[row] = lane.rows[row] || []).push(span);
      }
      below[span.index].forEach(put);
    };
    roots.forEach(put);
    return [...lanes.values()].filter((lane) => lane.rows.length);
  }

  build(lanes) {
    let top = 0;
    const body = make("div", { className: "lanes" });
    const names = make("div", { className: "names" });
    for (const lane of lanes) {
      lane.top = top;
      const height = Math.max(LANE, lane.rows.length * ROW + 8);
      const label = make("div", { className: "lane-name" }, make("b", { textContent: lane.name, title: lane.name }),
        make("small", { textContent: lane.kind.replace("_", " ").replace("kv", "KV") }));
      const band = make("div", { className: "lane" });
      label.style.height = band.style.height = height + "px";
      names.append(label);
      body.append(band);
      top += height;
    }
    this.arrows = document.createElementNS(SVG, "svg");
    this.arrows.setAttribute("aria-hidden", "true");
    this.arrows.style.height = top + "px";
    this.ticks = make("div", { className: "ticks" });
    this.marks = make("div", { className: "marks" });
    this.cursor = make("div", { className: "cursor", hidden: true });
    this.selection = make("div", { className: "selection", hidden: true });
    body.append(this.marks, this.arrows);
    this.bars = [];
    for (const span of this.spans) {
      if (!span.lane) continue;
      const bar = span.bar = make("div", { className: "bar" });
      bar.classList.add(span.kind, "c-" + colourOf(span));
      bar.classList.toggle("failed", span.error !== "");
      bar.classList.toggle("open", span.isOpen);
      bar.style.top = span.lane.top + 5 + span.row * ROW + "px";
      bar.dataset.index = span.index;
      if (span.kind !== "bus") {
        bar.tabIndex = 0;
        bar.setAttribute("role", "button");
        bar.setAttribute("aria-label", `${this.title(span)}, ${span.who}, ${time(span.end - span.begin)}`);
        if (span.number && (span.kind === "call" || span.kind === "serve")) {
          bar.append(make("i", { className: "number", textContent: span.number }));
        }
        span.label = make("span", { className: "label", textContent: this.title(span) });
        bar.append(span.label);
      }
      body.append(bar);
      this.bars.push(span);
    }
    body.append(this.cursor, this.selection);
    this.body = body;
    const scale = make("div", { className: "scale" }, make("div", { className: "corner" }), this.ticks);
    this.root.replaceChildren(scale, make("div", { className: "field" }, names, body));
  }

  title(span) {
    if (span.kind === "call") return `${span.name} → ${span.to}`;
    return span.kind === "http" ? "request" : span.name;
  }

  // ---- what is seen of it ----

  zoomTo(begin, end) {
    const width = Math.max(end - begin, this.length / 1e6, 0.01);
    this.begin = Math.max(0, Math.min(begin, this.length - width));
    this.end = Math.min(this.length, this.begin + width);
    this.place();
    this.onZoom(this.begin > 0 || this.end < this.length ? `${time(this.begin)} to ${time(this.end)}` : "");
  }

  zoomBy(factor, middle = (this.begin + this.end) / 2) {
    this.zoomTo(middle - (middle - this.begin) * factor, middle + (this.end - middle) * factor);
  }

  pan(share) {
    const step = (this.end - this.begin) * share;
    const begin = Math.max(0, Math.min(this.begin + step, this.length - (this.end - this.begin)));
    this.zoomTo(begin, begin + (this.end - this.begin));
  }

  x(us) { return ((us - this.begin) / (this.end - this.begin)) * this.width; }

  /** Put everything where it belongs at this zoom. */
  place() {
    if (!this.body || !this.body.clientWidth) return;
    this.width = this.body.clientWidth;
    const ends = new Map(); // Where the next bar of a row begins: a label may run on until there.
    for (const span of [...this.bars].reverse()) {
      const left = this.x(span.begin), right = this.x(span.end), bar = span.bar;
      const isOff = right < -LEAST || left > this.width;
      bar.hidden = isOff;
      if (isOff) continue;
      const from = Math.max(left, -4), to = Math.min(Math.max(right, left + LEAST), this.width + 4);
      bar.style.left = from + "px";
      bar.style.width = to - from + "px";
      if (!span.label) continue;
      const key = span.lane.top + ":" + span.row;
      const room = (ends.get(key) ?? this.width) - to;
      ends.set(key, from);
      const hasNumber = bar.firstChild !== span.label;
      const wanted = labelWidth(span.label.textContent, hasNumber);
      const isInside = to - from >= Math.min(wanted, hasNumber ? 62 : 46);
      bar.classList.toggle("beside", !isInside && room >= wanted);
      bar.classList.toggle("bare", !isInside && room < wanted);
    }
    this.placeTicks();
    this.placeMarks();
    this.placeArrows();
  }

  placeTicks() {
    const rough = ((this.end - this.begin) / Math.max(this.width, 1)) * 110;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    const made = [], lines = [];
    const flag = this.ttft === null ? -Infinity : this.x(this.ttft);
    for (let at = Math.ceil(this.begin / step) * step; at <= this.end; at += step) {
      const tick = make("span", { textContent: tickLabel(at, step) }), line = make("div", { className: "line" });
      tick.style.left = line.style.left = this.x(at) + "px";
      if (this.x(at) > this.width - 50) tick.className = "last";
      if (this.x(at) < flag - 52 || this.x(at) > flag + 72) made.push(tick);
      lines.push(line);
    }
    this.ticks.replaceChildren(...made);
    this.marks.replaceChildren(...lines);
  }

  placeMarks() {
    if (this.ttft === null || this.ttft < this.begin || this.ttft > this.end) return;
    const mark = make("div", { className: "mark" }), flag = make("span", { className: "flag", textContent: "first token" });
    mark.style.left = flag.style.left = this.x(this.ttft) + "px";
    if (this.x(this.ttft) > this.width - 80) flag.classList.add("last");
    this.marks.append(mark);
    this.ticks.append(flag);
  }

  /** Draw a line from each call to where it is served, and back. */
  placeArrows() {
    const paths = [];
    for (const span of this.spans) {
      const call = span.above;
      if (span.kind !== "serve" || !call || call.kind !== "call" || !call.lane || !span.lane) continue;
      const from = call.lane.top + 5 + call.row * ROW, to = span.lane.top + 5 + span.row * ROW;
      const isDown = to > from;
      const leave = isDown ? from + ROW - 4 : from, arrive = isDown ? to : to + ROW - 4;
      const ways = [[call.begin, span.begin, leave, arrive]];
      if (!call.isOpen && !span.isOpen) ways.push([call.end, span.end, leave, arrive]);
      for (const [a, b, y1, y2] of ways) {
        const x1 = this.x(a), x2 = this.x(b);
        if (Math.max(x1, x2) < 0 || Math.min(x1, x2) > this.width) continue;
        const path = document.createElementNS(SVG, "path");
        path.setAttribute("d", `M${x1} ${y1}L${x2} ${y2}`);
        path.setAttribute("class", span.number ? "verb" : "other");
        path.dataset.call = call.index;
        paths.push(path);
      }
    }
    this.arrows.replaceChildren(...paths);
  }

  // ---- pointer and keys ----

  at(event) {
    const box = this.body.getBoundingClientRect();
    return this.begin + ((event.clientX - box.left) / box.width) * (this.end - this.begin);
  }

  isOnField(event) { return this.body && event.clientX >= this.body.getBoundingClientRect().left; }

  move(event) {
    if (!this.isOnField(event)) return this.leave();
    const us = this.at(event);
    this.cursor.hidden = us > this.length;
    this.cursor.style.left = this.x(us) + "px";
    this.cursor.dataset.time = time(us);
    if (this.from !== null && this.from !== undefined) {
      const a = this.x(Math.min(this.from, us)), b = this.x(Math.max(this.from, us));
      this.selection.hidden = b - a < 4;
      this.selection.style.left = a + "px";
      this.selection.style.width = b - a + "px";
    }
    const bar = event.target.closest ? event.target.closest(".bar") : null;
    if (bar) this.tell(this.spans[bar.dataset.index], event.clientX, event.clientY);
    else this.hush();
  }

  grab(event) {
    if (event.button !== 0 || !this.isOnField(event)) return;
    this.from = this.at(event);
  }

  drop(event) {
    const from = this.from;
    this.from = null;
    if (from === null || from === undefined || !this.selection) return;
    this.selection.hidden = true;
    const to = this.at(event);
    if (Math.abs(this.x(to) - this.x(from)) >= 4) this.zoomTo(Math.min(from, to), Math.max(from, to));
  }

  wheel(event) {
    if (!this.isOnField(event)) return;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoomBy(event.deltaY > 0 ? 1.25 : 0.8, this.at(event));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.pan((event.deltaX || event.deltaY) / 1000);
    }
  }

  focus(event) {
    const bar = event.target.closest(".bar");
    if (!bar) return;
    const box = bar.getBoundingClientRect();
    this.tell(this.spans[bar.dataset.index], Math.max(box.left, 200), box.bottom);
  }

  /** Zoom to the bar that has the focus. */
  enter() {
    const bar = document.activeElement.closest(".bar");
    if (bar) this.zoomToSpan(this.spans[bar.dataset.index]);
    return bar !== null;
  }

  zoomToSpan(span) {
    const margin = Math.max(span.end - span.begin, this.length / 1e5) * 0.06;
    this.zoomTo(span.begin - margin, span.end + margin);
  }

  leave() {
    if (this.cursor) this.cursor.hidden = true;
    this.hush();
  }

  hush() {
    this.tip.hidden = true;
    this.light(null);
  }

  /** Mark a call, where it is served, and the lines between. */
  light(span) {
    const call = span && (span.kind === "serve" || span.kind === "bus" ? span.above : span);
    if (call === this.lit) return;
    this.lit = call;
    for (const each of this.bars) {
      const isLit = call && (each === call || (each.above === call && each.kind === "serve"));
      each.bar.classList.toggle("lit", Boolean(isLit && call.kind === "call"));
    }
    for (const path of this.arrows ? this.arrows.children : []) {
      path.classList.toggle("lit", Boolean(call && Number(path.dataset.call) === call.index));
    }
  }

  /** Say all that is known of a span beside the pointer. */
  tell(span, x, y) {
    this.light(span);
    const rows = [];
    const row = (name, value) => rows.push(make("dt", { textContent: name }), make("dd", { textContent: String(value) }));
    row("took", span.isOpen ? "not over, or its end was lost" : time(span.end - span.begin));
    row("from", `${time(span.begin)} to ${time(span.end)}`);
    if (span.kind === "call" || span.kind === "bus") {
      row("asked by", span.who);
      row("served by", span.to);
    } else row("by", span.who);
    if (span.sequence) row("sequence", span.sequence);
    if (span.first) row("first item", "after " + time(span.first));
    if (span.items) row("items", span.items);
    if (span.bytes) row(span.kind === "call" ? "on the bus" : "bytes", bytes(span.bytes));
    for (const [name, value] of Object.entries(span.facts)) {
      if (name !== "category" && name !== "num_bytes") row(name, fact(name, value));
    }
    const head = make("p", { className: "tip-title" }, make("b", { textContent: this.title(span) }),
      make("span", { className: "kind c-" + colourOf(span), textContent: kindOf(span) }));
    const parts = [head];
    if (span.words) parts.push(make("p", { textContent: span.words }));
    if (span.error) parts.push(make("p", { className: "error", textContent: span.error }));
    this.tip.replaceChildren(...parts, make("dl", {}, ...rows));
    this.tip.hidden = false;
    const box = this.tip.getBoundingClientRect();
    this.tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    const isBelow = y + 18 + box.height < innerHeight;
    this.tip.style.top = Math.max(8, isBelow ? y + 18 : y - box.height - 12) + "px";
  }
}

/** About how many pixels a bar's text takes. */
function labelWidth(text, hasNumber) { return text.length * 6.4 + 10 + (hasNumber ? 18 : 0); }

/** What a span is coloured by: its category; decoding has a colour of its own. */
function colourOf(span) {
  return span.name === "decode" && span.category === "compute" ? "decode" : span.category || "none";
}

function kindOf(span) {
  return { http: "the whole request", call: "call", serve: "served", bus: "on its way" }[span.kind] ||
    LABELS.get(colourOf(span)) || "phase";
}
