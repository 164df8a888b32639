// Follows /ui/events: asks for the key when the router wants one, connects again when it was away.

import { byId } from "./dom.js";
import { readEvents } from "./sse.js";

const KEY = "baton.adminKey";
const REFUSALS = { 401: "That key was not right.", 403: "That key may not look here." };
const MAX_WAIT_MS = 8000;

// `model`: null for the first one that the router serves.
export async function follow(model, { onOpening, onState, onConnection }) {
  let waitMs = 500;
  for (;;) {
    try {
      const response = await fetch(`ui/events${model ? `?${new URLSearchParams({ model })}` : ""}`, { headers: keyHeaders(), cache: "no-store" });
      if (response.status in REFUSALS) {
        onConnection("locked");
        await askForKey(adminKey() ? REFUSALS[response.status] : "");
        continue;
      }
      if (!response.ok) throw new Error(`the router answered ${response.status}`);
      onConnection("live");
      waitMs = 500;
      for await (const event of readEvents(response)) {
        const data = JSON.parse(event.data);
        if (event.name === "opening") onOpening(data);
        else if (event.name === "state") onState(data);
      }
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof Error)) throw error;
    }
    onConnection("away");
    await new Promise((resolve) => setTimeout(resolve, waitMs));
    waitMs = Math.min(MAX_WAIT_MS, waitMs * 2);
  }
}

export const adminKey = () => sessionStorage.getItem(KEY);

function keyHeaders() {
  const key = adminKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function askForKey(reason) {
  const dialog = byId("login");
  const input = byId("admin-key");
  byId("login-reason").textContent = reason;
  input.value = "";
  return new Promise((resolve) => {
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    byId("login-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        sessionStorage.setItem(KEY, input.value);
        dialog.close();
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
}
