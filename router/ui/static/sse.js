// Server-sent events of a fetch response: EventSource cannot send the admin key.

const MAX_LINE = 8 << 20;

export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "message";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      if (rest.length > MAX_LINE) throw new Error("an event without an end");
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) {
          yield { name, data: line.slice(5).trim() };
          name = "message";
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
