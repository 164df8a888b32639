// Load of each expert in each layer, relative to the mean of its layer.

import { byId, count, element, setText } from "./dom.js";

const TOP = 4; // times the mean: the end of the scale
const RAMPS = {
  light: [[244, 246, 249], [255, 221, 163], [240, 140, 40], [180, 60, 10], [95, 20, 10]],
  dark: [[24, 32, 42], [74, 52, 22], [176, 98, 20], [245, 167, 66], [255, 240, 200]],
};

const dark = matchMedia("(prefers-color-scheme: dark)");

export class ExpertHeat {
  constructor() {
    this.maps = {};
    this.role = null;
    this.canvas = byId("heat-map");
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => setText(byId("heat-reading"), "logical expert"));
    dark.addEventListener("change", () => this.draw());
  }

  show(maps) {
    this.maps = maps;
    const roles = Object.keys(maps).filter((role) => maps[role].num_tokens > 0).sort();
    if (!roles.includes(this.role)) this.role = roles[0] ?? null;
    this.showRoles(roles);
    byId("heat").hidden = this.role === null;
    if (this.role !== null) this.draw();
  }

  showRoles(roles) {
    const group = byId("expert-roles");
    if (group.dataset.roles !== roles.join()) {
      group.dataset.roles = roles.join();
      group.replaceChildren(...roles.map((role) => {
        const button = element("button", { type: "button", textContent: role });
        button.dataset.role = role;
        button.addEventListener("click", () => {
          this.role = role;
          this.show(this.maps);
        });
        return button;
      }));
    }
    for (const button of group.children) button.setAttribute("aria-pressed", button.dataset.role === this.role);
  }

  draw() {
    const map = this.maps[this.role];
    if (!map) return;
    const cells = Uint8Array.from(atob(map.cells), (character) => character.charCodeAt(0));
    this.ratios = Float32Array.from(cells, (cell) => cell / map.cells_per_mean);
    this.shape = [map.num_layers, map.num_experts];
    paint(this.canvas, this.ratios, map.num_experts, map.num_layers);
    this.canvas.style.height = `${Math.max(40, Math.min(420, map.num_layers * (map.num_layers > 20 ? 7 : 16)))}px`;
    paint(byId("heat-scale"), Float32Array.from({ length: 256 }, (_, i) => (TOP * i) / 255), 256, 1);
    const text = summary(this.ratios, map);
    setText(byId("expert-summary"), text);
    this.canvas.setAttribute("aria-label", text);
  }

  point(event) {
    if (!this.shape) return;
    const [numLayers, numExperts] = this.shape;
    const layer = Math.min(numLayers - 1, Math.floor((event.offsetY / this.canvas.clientHeight) * numLayers));
    const expert = Math.min(numExperts - 1, Math.floor((event.offsetX / this.canvas.clientWidth) * numExperts));
    const ratio = this.ratios[layer * numExperts + expert] ?? 0;
    setText(byId("heat-reading"), `MoE layer ${layer}, logical expert ${expert}: ${ratio.toFixed(1)} times the mean`);
  }
}

function summary(ratios, map) {
  let busiest = 0;
  let balancedness = 0;
  for (let layer = 0; layer < map.num_layers; layer += 1) {
    let top = 0;
    for (let i = layer * map.num_experts; i < (layer + 1) * map.num_experts; i += 1) {
      top = Math.max(top, ratios[i]);
      if (ratios[i] > ratios[busiest]) busiest = i;
    }
    balancedness += (top > 0 ? 1 / top : 1) / map.num_layers;
  }
  const layer = Math.floor(busiest / map.num_experts);
  const share = ratios[busiest] >= 7.9 ? "8 or more" : ratios[busiest].toFixed(1);
  return `${map.num_layers} layers of ${map.num_experts} experts, ${count(map.num_tokens)} tokens lately. Busiest: ` +
    `layer ${layer}, expert ${busiest % map.num_experts}, ${share} times the mean. Balancedness ${balancedness.toFixed(2)}.`;
}

function paint(canvas, ratios, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const ramp = dark.matches ? RAMPS.dark : RAMPS.light;
  ratios.forEach((ratio, index) => {
    const at = Math.min(1, ratio / TOP) * (ramp.length - 1);
    const low = Math.min(ramp.length - 2, Math.floor(at));
    for (let channel = 0; channel < 3; channel += 1) {
      image.data[index * 4 + channel] = ramp[low][channel] + (ramp[low + 1][channel] - ramp[low][channel]) * (at - low);
    }
    image.data[index * 4 + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}
