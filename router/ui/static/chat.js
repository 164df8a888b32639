// A conversation with the served model, streamed; under each answer where it came from and how fast.

import { byId, element, seconds, setText, shortName } from "./dom.js";
import { adminKey } from "./live.js";
import { readEvents } from "./sse.js";

const ROLES = { user: "you", assistant: "answer" };

const hint = byId("hint");

let model = null;
let history = [];
let running = null; // the AbortController of the answer that is coming

export function startChat(servedModel) {
  const isFirst = model === null;
  model = servedModel;
  if (!isFirst) return;
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new-chat").addEventListener("click", reset);
}

function reset() {
  running?.abort();
  history = [];
  byId("messages").replaceChildren(hint);
  byId("message").focus();
}

async function ask() {
  const box = byId("message");
  const content = box.value.trim();
  if (!content || running) return;
  box.value = "";
  hint.remove();
  showMessage("user", content);
  const own = history;
  own.push({ role: "user", content });
  const answer = new Answer(showMessage("assistant", ""));
  setRunning(new AbortController());
  try {
    await answer.stream(requestBody(own), running.signal);
    own.push({ role: "assistant", content: answer.content });
  } catch (error) {
    own.pop();
    answer.fail(error.name === "AbortError" ? "stopped" : error.message);
  } finally {
    setRunning(null);
  }
}

function setRunning(controller) {
  running = controller;
  byId("send").disabled = controller !== null;
  byId("stop").hidden = controller === null;
}

function requestBody(messages) {
  return JSON.stringify({
    model,
    messages,
    max_tokens: Math.max(1, Math.round(Number(byId("max-tokens").value) || 256)),
    temperature: Math.max(0, Number(byId("temperature").value) || 0),
    stream: true,
    stream_options: { include_usage: true },
  });
}

function showMessage(role, text) {
  const body = element("div", { className: "text", textContent: text });
  const root = element("article", { className: `message ${role}` }, body);
  root.setAttribute("aria-label", ROLES[role]);
  byId("messages").append(root);
  root.scrollIntoView({ block: "nearest" });
  return { root, body };
}

class Answer {
  constructor({ root, body }) {
    this.root = root;
    this.body = body;
    this.content = "";
    this.firstAt = null;
    this.lastAt = null;
    this.usage = null;
    root.classList.add("waiting");
  }

  async stream(body, signal) {
    const askedAt = performance.now();
    const headers = { "content-type": "application/json" };
    const key = byId("api-key").value || adminKey(); // which is asked for on an admin port of its own
    if (key) headers.authorization = `Bearer ${key}`;
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
    if (!response.ok) throw new Error(await errorText(response));
    for await (const event of readEvents(response)) {
      if (event.data === "[DONE]") break;
      this.take(JSON.parse(event.data));
    }
    this.root.classList.remove("waiting");
    this.showFacts(response.headers.get("x-baton-route") ?? "", askedAt);
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const text = chunk.choices?.[0]?.delta?.content;
    if (!text) return;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.content += text;
    const log = byId("messages");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this.body.append(text);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  showFacts(route, askedAt) {
    const pairs = routePairs(route);
    const facts = [["route", routeText(pairs)]];
    const prompt = this.usage?.prompt_tokens;
    if (prompt) facts.push(["cached", `${this.usage.prompt_tokens_details?.cached_tokens ?? 0} of ${prompt} prompt tokens`]);
    if (this.firstAt !== null) {
      const expected = expectedSeconds(pairs);
      const suffix = expected === null ? "" : `, ${seconds(expected)} expected`;
      facts.push(["TTFT", seconds((this.firstAt - askedAt) / 1000) + suffix]);
    }
    const tokens = this.usage?.completion_tokens ?? 0;
    if (tokens > 1 && this.firstAt !== null) facts.push(["TPOT", seconds((this.lastAt - this.firstAt) / 1000 / (tokens - 1))]);
    facts.push(["tokens", `${tokens}`]);
    const list = element("dl", { className: "facts", title: route });
    for (const [name, value] of facts) {
      list.append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
    }
    this.root.append(list);
    const log = byId("messages");
    log.scrollTop = log.scrollHeight;
  }

  fail(reason) {
    this.root.classList.remove("waiting");
    if (reason === "stopped") {
      this.root.append(element("p", { className: "facts", textContent: "stopped" }));
      return;
    }
    this.root.classList.add("failed");
    setText(this.body, this.content ? `${this.content}\n${reason}` : reason);
  }
}

async function errorText(response) {
  const fallback = `the router answered ${response.status}`;
  try {
    return (await response.json()).error?.message ?? fallback;
  } catch {
    return fallback;
  }
}

// What docs/operations.md says of the header x-baton-route.
function routePairs(header) {
  return Object.fromEntries(header.split(";").map((part) => part.trim().split("=", 2)));
}

function routeText(pairs) {
  if (!pairs.decode) return "unknown";
  const decode = shortName(pairs.decode);
  const isLocal = !pairs.prefill || pairs.prefill === "local";
  const way = isLocal ? `${decode}, no hand-off` : `${shortName(pairs.prefill)} \u2192 ${decode}`;
  return pairs.peer ? `${way}, may fetch from ${shortName(pairs.peer)}` : way;
}

function expectedSeconds(pairs) {
  const sum = ["wait_s", "load_s", "compute_s", "handoff_s"].reduce((total, name) => total + Number(pairs[name]), 0);
  return Number.isFinite(sum) ? sum : null;
}
