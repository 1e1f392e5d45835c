"use strict";
// How the page writes things: elements, durations, sizes, facts.

/** What colours mean, by name; filled by page.js. */
const LABELS = new Map();

/** Make an element: its properties, then its children; text is never markup. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A duration in microseconds for people. */
function time(us) {
  if (us === null || us === undefined) return "–";
  const size = Math.abs(us);
  if (size >= 10e6) return (us / 1e6).toFixed(1) + " s";
  if (size >= 1e6) return (us / 1e6).toFixed(2) + " s";
  if (size >= 1e5) return (us / 1e3).toFixed(0) + " ms";
  if (size >= 1e3) return (us / 1e3).toFixed(1) + " ms";
  return us.toFixed(size >= 10 || us === 0 ? 0 : 1) + " µs";
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit++; }
  return (unit ? n.toFixed(n >= 100 ? 0 : 1) : n) + " " + units[unit];
}

/** A fact of a span for people, by what its name says it is. */
function fact(name, value) {
  if (typeof value === "number") {
    if (name.endsWith("_s")) return time(value * 1e6);
    if (name.endsWith("_bytes")) return bytes(value);
    return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
  }
  return value === null ? "–" : value;
}

/** A time on the axis, as exact as the step from tick to tick asks for. */
function tickLabel(us, step) {
  if (us === 0) return "0";
  if (step >= 1e6) return us / 1e6 + " s";
  if (us >= 1e6) return (us / 1e6).toFixed(Math.max(0, Math.ceil(6 - Math.log10(step)))) + " s";
  if (step >= 1e3) return (us / 1e3).toFixed(0) + " ms";
  if (us >= 1e3) return (us / 1e3).toFixed(Math.max(0, Math.ceil(3 - Math.log10(step)))) + " ms";
  return us.toFixed(Math.max(0, Math.ceil(-Math.log10(step)))) + " µs";
}
