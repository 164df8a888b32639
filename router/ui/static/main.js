import { startChat } from "./chat.js";
import { LatencyChart } from "./chart.js";
import { byId, count, element, setText } from "./dom.js";
import { ExpertHeat } from "./heat.js";
import { follow } from "./live.js";
import { Topology } from "./topology.js";

const WORDS = { live: "live", locked: "locked", away: "router away" };

const topology = new Topology();
const heat = new ExpertHeat();
const charts = [
  new LatencyChart("ttft", "Time to first token"),
  new LatencyChart("tpot", "Mean time per token"),
  new LatencyChart("itl", "Gap between tokens"),
];

function showConnection(kind) {
  const pill = byId("connection");
  setText(pill, WORDS[kind]);
  pill.className = `pill ${kind === "live" ? "good" : "bad"}`;
}

function showOpening(opening) {
  showModels(opening);
  document.title = `${opening.model} - Baton`;
  for (const chart of charts) chart.load(opening.history);
  heat.show(opening.experts);
  startChat(opening.model);
}

// One model at a time: another one is another page, with its own workers, charts and chat.
function showModels({ model, models }) {
  const choice = byId("models");
  choice.hidden = models.length < 2;
  byId("model").hidden = !choice.hidden;
  setText(byId("model"), model);
  choice.replaceChildren(...models.map((name) => element("option", { value: name, textContent: name })));
  choice.value = model;
}

function showState(state) {
  const { rates } = state;
  setText(byId("num-in-flight"), count(state.num_in_flight));
  setText(byId("sequences-per-s"), count(rates.sequences_per_s));
  setText(byId("tokens-per-s"), count(rates.tokens_per_s));
  setText(byId("hit-ratio"), `${(rates.hit_ratio * 100).toFixed(0)} %`);
  topology.show(state);
  for (const chart of charts) chart.add(state.latency);
  if (state.experts) heat.show(state.experts);
}

byId("models").addEventListener("change", (event) => {
  location.search = new URLSearchParams({ model: event.target.value });
});
const model = new URLSearchParams(location.search).get("model");
follow(model, { onOpening: showOpening, onState: showState, onConnection: showConnection });
