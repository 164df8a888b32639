// p50 and p99 of the last five minutes, as a small line chart that pointer and arrow keys can read.

import { byId, element, seconds, setText, svg } from "./dom.js";

const SPAN_S = 300;
const SHORTEST_S = 60;
const HEIGHT = 130;
const LEFT = 50;
const TOP = 8;
const BOTTOM = 18;

export class LatencyChart {
  constructor(name, title) {
    this.name = name;
    this.title = title;
    this.points = [];
    this.cursor = null; // index of the point that is read; null: the latest
    this.now = element("span", { className: "now" });
    this.view = svg("svg", { role: "img", tabindex: "0" });
    const caption = element("figcaption", {}, element("b", { textContent: title }), this.now);
    byId("charts").append(element("figure", { className: "chart" }, caption, this.view));
    this.view.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.view.addEventListener("pointerleave", () => this.read(null));
    this.view.addEventListener("blur", () => this.read(null));
    this.view.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.view);
  }

  load(history) {
    this.points = [];
    for (const entry of history) this.append(entry);
    this.draw();
  }

  add(entry) {
    this.append(entry);
    if (!document.hidden) this.draw();
  }

  append(entry) {
    const [p50, p99] = entry[this.name] ?? [null, null];
    this.points.push({ time: entry.time, p50, p99 });
    const oldest = entry.time - SPAN_S;
    while (this.points[0].time < oldest) this.points.shift();
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.points.length) return;
    event.preventDefault();
    const last = this.points.length - 1;
    this.read(Math.max(0, Math.min(last, (this.cursor ?? last) + step)));
  }

  point(x) {
    const time = this.start() + ((x - LEFT) / (this.width - LEFT)) * this.span();
    let best = null;
    this.points.forEach((point, index) => {
      if (best === null || Math.abs(point.time - time) < Math.abs(this.points[best].time - time)) best = index;
    });
    this.read(best);
  }

  read(index) {
    this.cursor = index;
    this.draw();
  }

  // As much as there is, at least a minute.
  span() {
    const age = this.points.length ? this.points.at(-1).time - this.points[0].time : 0;
    return Math.min(SPAN_S, Math.max(SHORTEST_S, Math.ceil(age / 60) * 60));
  }

  start() {
    return (this.points.at(-1)?.time ?? 0) - this.span();
  }

  draw() {
    this.width = this.view.clientWidth;
    if (!this.width) return;
    const most = this.points.reduce((top, point) => Math.max(top, point.p99 ?? 0), 0);
    const top = niceTop(most || 0.1);
    const x = (time) => LEFT + ((time - this.start()) / this.span()) * (this.width - LEFT);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: this.width, y1: at, y2: at }));
      parts.push(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, seconds(top * share)));
    }
    parts.push(svg("text", { x: LEFT, y: HEIGHT - 3 }, `${this.span() / 60} min ago`));
    parts.push(svg("text", { x: this.width, y: HEIGHT - 3, "text-anchor": "end" }, "now"));
    for (const kind of ["p99", "p50"]) parts.push(svg("path", { class: kind, d: line(this.points, kind, x, y) }));
    const read = this.cursor === null ? this.points.at(-1) : this.points[Math.min(this.cursor, this.points.length - 1)];
    if (read && this.cursor !== null) {
      parts.push(svg("line", { class: "cursor", x1: x(read.time), x2: x(read.time), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.view.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.view.replaceChildren(...parts);
    this.tell(read);
  }

  tell(read) {
    const text = read ? `p50 ${seconds(read.p50)}, p99 ${seconds(read.p99)}` : "";
    const ago = read && this.cursor !== null ? `${Math.round(this.points.at(-1).time - read.time)} s ago: ` : "";
    setText(this.now, ago + text);
    this.view.setAttribute("aria-label", `${this.title}: ${ago}${text}`);
  }
}

function line(points, kind, x, y) {
  let d = "";
  let pen = "M";
  let before = null;
  for (const point of points) {
    if (point[kind] === null || (before !== null && point.time - before > 5)) pen = "M";
    before = point.time;
    if (point[kind] === null) continue;
    const at = `${x(point.time).toFixed(1)} ${y(point[kind]).toFixed(1)}`;
    d += pen === "M" ? `M${at} h0.1` : `L${at}`;
    pen = "L";
  }
  return d;
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((top) => top >= value);
}
