"use strict";
// Requests of one's own: a prompt, or twenty of all kinds.

const headers = () => ({ "Content-Type": "application/json", ...(sessionStorage.apiKey ? { Authorization: `Bearer ${sessionStorage.apiKey}` } : {}) });

// Streams the events of a request to the end.
async function stream(path, body, signal, onEvent) {
  const response = await fetch(path, { method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body, stream: true }) });
  if (response.status === 401) { sessionStorage.apiKey = window.prompt("API key") || ""; throw new Error("send it again, now with the key"); }
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n"); rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      onEvent(event);
    }
  }
}

// The one whose answer is shown. A second one ends the first.
let shown = null;

$("form").onsubmit = async event => {
  event.preventDefault();
  shown?.abort.abort();
  const mine = shown = { abort: new AbortController(), id: null, levels: [] };
  const tell = (element, text) => { if (shown === mine) $(element).textContent = text; };
  $("answer").textContent = ""; $("path").textContent = "waiting for its first token …";
  let text = "";
  const body = {
    messages: [{ role: "user", content: $("prompt").value }],
    max_tokens: Number($("max-tokens").value), priority: Number($("priority").value),
  };
  try {
    await stream("v1/chat/completions", body, mine.abort.signal, chunk => {
      if (!mine.id) { mine.id = chunk.id; own.add(chunk.id); }
      tell("answer", text += chunk.choices[0]?.delta?.content ?? "");
    });
    tell("path", `${mine.levels.join(" → ")}${mine.levels.length ? "; " : ""}finished`);
  } catch (error) {
    if (error.name !== "AbortError") tell("answer", String(error.message || error));
  }
  if (mine.id) own.delete(mine.id);
  if (shown === mine) shown = null;
};

function followAnswer(snapshot) {
  if (!shown?.id) return;
  const replica = snapshot.replicas.find(r => r.requests.some(each => each.request_id.startsWith(shown.id)));
  if (!replica) return;
  const request = replica.requests.find(each => each.request_id.startsWith(shown.id));
  const level = levelName(replica, request.level);
  if (shown.levels[shown.levels.length - 1] !== level) shown.levels.push(level);
  $("path").textContent = `${shown.levels.join(" → ")}: ${request.running ? "in a step" : request.place}, ${request.num_output_tokens} tokens`;
}

// Of each kind one HTTP request with many prompts: a browser has six connections to a server.
const MIXED = {
  short: { count: 14, tokens: 24, prompts: ["The capital of France is", "My favourite colour is", "Twelve times twelve is", "Light rhymes with", "Hello in Spanish is"] },
  long: { count: 6, tokens: 256, prompts: ["The story of the lighthouse keeper begins", "To bake bread, first", "A walk through the forest in autumn:"] },
};

$("mixed").onclick = async () => {
  $("mixed").disabled = true;
  const began = performance.now(), times = { short: [], long: [] };
  let trouble = "";
  const tell = () => {
    const mean = list => list.length ? seconds(list.reduce((a, b) => a + b, 0) / list.length) : "–";
    $("mixed-state").textContent = `${times.short.length + times.long.length} of 20 finished; a short one takes ${mean(times.short)}, a long one ${mean(times.long)} on average${trouble}`;
  };
  tell();
  await Promise.all(Object.entries(MIXED).map(async ([kind, { count, tokens, prompts }]) => {
    const prompt = Array.from({ length: count }, (_, index) => `${index + 1}. ${prompts[index % prompts.length]}`);
    let id = null;
    try {
      await stream("v1/completions", { prompt, max_tokens: tokens, ignore_eos: true }, undefined, event => {
        if (!id) { id = event.id; own.add(id); }
        if (event.choices[0]?.finish_reason) times[kind].push((performance.now() - began) / 1000);
        tell();
      });
    } catch (error) { trouble = `; ${error.message || error}`; }
    own.delete(id);
    tell();
  }));
  $("mixed").disabled = false;
};

fetch("v1/models", { headers: headers() }).then(r => r.json()).then(models => { $("model").textContent = models.data[0].id; }).catch(() => {});
