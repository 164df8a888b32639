// Workers as cards, the ways of requests between them as lines, requests as dots that run along.

import { byId, bytes, count, element, setText, shortName, svg } from "./dom.js";

const MAX_PAIRS = 48; // more lines than that say nothing
const MAX_DOTS = 36; // a second
const MAX_DOTS_OF_A_WAY = 5;
const REMEMBERED = 10; // states
const PROMPT_MS = 500;
const HANDOFF_MS = 650;

const still = matchMedia("(prefers-reduced-motion: reduce)");
const narrow = matchMedia("(max-width: 640px)");

export class Topology {
  constructor() {
    this.cards = new Map();
    this.paths = new Map();
    this.recent = [];
    this.layer = byId("links");
    new ResizeObserver(() => this.drawLinks()).observe(byId("map"));
  }

  show(state) {
    const status = state.is_draining ? "draining" : state.is_ready ? "ready" : "no decode worker";
    const hidden = state.num_workers - state.workers.length;
    setText(byId("router-status"), hidden > 0 ? `${status}, ${hidden} more workers` : status);
    const changed = this.showCards(state.workers);
    this.recent.push(state.legs);
    if (this.recent.length > REMEMBERED) this.recent.shift();
    if (changed) this.drawLinks();
    this.showWays();
    this.run(state.legs);
  }

  showCards(workers) {
    const alive = new Set(workers.map((worker) => worker.id));
    let changed = false;
    for (const [id, card] of this.cards) {
      if (!alive.has(id)) {
        card.root.remove();
        this.cards.delete(id);
        changed = true;
      }
    }
    for (const worker of workers) {
      let card = this.cards.get(worker.id);
      if (!card) {
        card = new WorkerCard(worker);
        this.cards.set(worker.id, card);
        byId(`${worker.role}-cards`).append(card.root);
        changed = true;
      }
      card.show(worker);
    }
    return changed;
  }

  ways() {
    const ways = new Map();
    for (const leg of this.recent.flat()) {
      const key = `${leg.prefill}>${leg.decode}`;
      const sum = ways.get(key) ?? { ...leg, num_sequences: 0, num_hit_tokens: 0, num_prompt_tokens: 0, bytes: 0 };
      for (const name of ["num_sequences", "num_hit_tokens", "num_prompt_tokens", "bytes"]) sum[name] += leg[name];
      ways.set(key, sum);
    }
    return [...ways.values()].sort((a, b) => b.num_sequences - a.num_sequences);
  }

  showWays() {
    const lines = this.ways()
      .slice(0, 6)
      .map((way) => {
        const decode = shortName(way.decode);
        const name = way.prefill ? `${shortName(way.prefill)} \u2192 ${decode}` : `${decode} alone`;
        const moved = way.prefill ? `, ${bytes(way.bytes)} of KV` : "";
        return `${name}: ${count(way.num_sequences)} requests, ${count(way.num_prompt_tokens)} prompt tokens (${count(way.num_hit_tokens)} cached)${moved}`;
      });
    const list = byId("ways");
    if (list.dataset.shown !== lines.join("\n")) {
      list.dataset.shown = lines.join("\n");
      list.replaceChildren(...lines.map((line) => element("li", { textContent: line })));
    }
    const used = new Set();
    for (const way of this.ways()) {
      if (way.prefill) used.add(`prompt ${way.prefill}`).add(`handoff ${way.prefill}>${way.decode}`);
      else used.add(`local ${way.decode}`);
    }
    for (const [key, path] of this.paths) path.classList.toggle("used", used.has(key));
  }

  drawLinks() {
    const origin = byId("map").getBoundingClientRect();
    const box = (node) => {
      const r = node.getBoundingClientRect();
      return { left: r.left - origin.left, right: r.right - origin.left, top: r.top - origin.top,
        bottom: r.bottom - origin.top, x: (r.left + r.right) / 2 - origin.left, y: (r.top + r.bottom) / 2 - origin.top };
    };
    const router = box(byId("router-card"));
    const cards = [...this.cards].map(([id, card]) => ({ id, role: card.role, ...box(card.root) }));
    const prefill = cards.filter((card) => card.role === "prefill");
    const decode = cards.filter((card) => card.role === "decode");
    const wanted = new Map();
    for (const card of prefill) wanted.set(`prompt ${card.id}`, promptPath(router, card, prefill[0]));
    for (const card of decode) wanted.set(`local ${card.id}`, localPath(router, card, decode.at(-1)));
    if (prefill.length * decode.length <= MAX_PAIRS) {
      for (const from of prefill) for (const to of decode) wanted.set(`handoff ${from.id}>${to.id}`, handoffPath(from, to));
    }
    for (const [key, path] of this.paths) {
      if (!wanted.has(key)) {
        path.remove();
        this.paths.delete(key);
      }
    }
    for (const [key, d] of wanted) {
      if (!this.paths.has(key)) {
        const path = svg("path", { class: key.split(" ")[0] });
        this.paths.set(key, path);
        this.layer.prepend(path);
      }
      this.paths.get(key).setAttribute("d", d);
    }
  }

  run(legs) {
    if (still.matches || document.hidden) return;
    let left = MAX_DOTS;
    for (const leg of legs) {
      const num = Math.min(leg.num_sequences, MAX_DOTS_OF_A_WAY, left);
      left -= num;
      for (let i = 0; i < num; i += 1) {
        const delay = (i / num) * 700;
        if (!leg.prefill) this.runDot(`local ${leg.decode}`, "local-dot", delay, PROMPT_MS + HANDOFF_MS);
        else {
          this.runDot(`prompt ${leg.prefill}`, "prompt-dot", delay, PROMPT_MS);
          this.runDot(`handoff ${leg.prefill}>${leg.decode}`, "baton", delay + PROMPT_MS, HANDOFF_MS);
        }
      }
    }
  }

  runDot(key, kind, delay, duration) {
    const path = this.paths.get(key);
    if (!path) return;
    const dot = kind === "baton"
      ? svg("rect", { class: kind, x: -9, y: -4, width: 18, height: 8, rx: 4 })
      : svg("circle", { class: kind, r: 5 });
    dot.style.offsetPath = `path("${path.getAttribute("d")}")`;
    this.layer.append(dot);
    const frames = [{ offsetDistance: "0%", opacity: 0 }, { opacity: 1, offset: 0.1 }, { opacity: 1, offset: 0.9 }, { offsetDistance: "100%", opacity: 0 }];
    const motion = dot.animate(frames, { duration, delay, easing: "ease-in-out", fill: "both" });
    motion.finished.then(() => dot.remove(), () => dot.remove());
  }
}

class WorkerCard {
  constructor(worker) {
    this.role = worker.role;
    this.name = element("h3", { textContent: shortName(worker.id), title: worker.id });
    this.rank = worker.ep_size > 1 ? `rank ${worker.ep_rank} of ${worker.ep_size}` : "";
    this.status = element("span", { className: "status" });
    this.load = element("p", { className: "load" });
    this.tiers = element("div");
    this.root = element("li", { className: `card ${worker.role}` },
      element("div", { className: "head" }, this.name, this.status), this.load, this.tiers);
    this.root.dataset.worker = worker.id;
  }

  show(worker) {
    const isReady = worker.status === "ready";
    this.root.classList.toggle("away", !isReady);
    setText(this.status, isReady ? this.rank : worker.status);
    setText(this.load, `${worker.num_running} running, ${worker.num_waiting} waiting`);
    const names = Object.keys(worker.tiers).filter((tier) => worker.tiers[tier].total > 0);
    if (this.tiers.childElementCount !== names.length) this.tiers.replaceChildren(...names.map(tierRow));
    names.forEach((name, index) => showTier(this.tiers.children[index], name, worker.tiers[name]));
  }
}

function tierRow() {
  const bar = element("span", { className: "bar" }, element("i", { className: "used" }), element("i", { className: "cached" }));
  bar.setAttribute("role", "img");
  return element("div", { className: "tier" }, element("span"), bar, element("span", { className: "numbers" }));
}

function showTier(row, name, tier) {
  const [label, bar, numbers] = row.children;
  setText(label, name);
  const [used, cached] = bar.children;
  used.style.width = `${(100 * tier.used) / tier.total}%`;
  cached.style.width = `${(100 * tier.cached) / tier.total}%`;
  setText(numbers, `${count(tier.used + tier.cached)}/${count(tier.total)}`);
  const text = `${name}: ${tier.used} blocks in use, ${tier.cached} cached, of ${tier.total}`;
  bar.setAttribute("aria-label", text);
  row.title = text;
}

// A line through points, with round corners.
function rounded(points, radius = 9) {
  let d = `M${points[0][0]} ${points[0][1]}`;
  for (let i = 1; i < points.length - 1; i += 1) {
    const [x, y] = points[i];
    const before = towards(points[i], points[i - 1], radius);
    const after = towards(points[i], points[i + 1], radius);
    d += ` L${before[0]} ${before[1]} Q${x} ${y} ${after[0]} ${after[1]}`;
  }
  return `${d} L${points.at(-1)[0]} ${points.at(-1)[1]}`;
}

function towards([x, y], [toX, toY], most) {
  const length = Math.hypot(toX - x, toY - y) || 1;
  const share = Math.min(most, length / 2) / length;
  return [x + (toX - x) * share, y + (toY - y) * share];
}

function promptPath(router, card, first) {
  const bus = first.top - 11;
  if (narrow.matches) return rounded([[router.x, router.bottom], [router.x, bus], [card.x, bus], [card.x, card.top]]);
  const lane = router.right + 18;
  const y = router.y - 10;
  return rounded([[router.right, y], [lane, y], [lane, bus], [card.x, bus], [card.x, card.top]]);
}

function localPath(router, card, last) {
  const bus = last.bottom + 11;
  if (narrow.matches) {
    const lane = router.left - 9;
    return rounded([[router.left, router.y], [lane, router.y], [lane, bus], [card.x, bus], [card.x, card.bottom]]);
  }
  const lane = router.right + 18;
  const y = router.y + 10;
  return rounded([[router.right, y], [lane, y], [lane, bus], [card.x, bus], [card.x, card.bottom]]);
}

function handoffPath(from, to) {
  const middle = (from.bottom + to.top) / 2;
  return `M${from.x} ${from.bottom} C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${to.top}`;
}
