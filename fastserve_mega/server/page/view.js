"use strict";
// What the scheduler is doing: figures, levels, pools. Events come from /live four times a second.

const $ = id => document.getElementById(id);
const make = (tag, name, text) => { const e = document.createElement(tag); if (name) e.className = name; if (text !== undefined) e.textContent = text; return e; };
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const twoDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const seconds = s => s === 0 ? "–" : s < 0.01 ? `${twoDigits.format(s * 1000)} ms` : s < 1 ? `${Math.round(s * 1000)} ms` : `${number.format(s)} s`;
const POLICIES = {
  paced: "every reader is served as fast as it reads; what is left finishes the least work first",
  skip_join_mlfq: "levels by attained service; newcomers start where their prompt fits",
  mlfq: "levels by attained service; newcomers start in the highest",
  fcfs: "first come, first served",
  fixed_priority: "by prompt length, decided on arrival",
};

let before = null;
const own = new Set();  // request ids of this page begin with one of these
const isMine = request => [...own].some(id => request.request_id.startsWith(id));

const figures = {};
for (const name of ["output tokens/s", "TTFT, median", "TTFT, P95", "JCT, median", "JCT, P95", "unfinished", "finished", "preemptions"]) {
  const box = make("div", "figure"), value = make("b", "", "–");
  box.append(make("span", "", name), value);
  $("figures").append(box);
  figures[name] = value;
}
const charts = {
  rate: new Chart($("charts"), "output tokens/s", [{ name: "now", colour: "var(--running)" }]),
  requests: new Chart($("charts"), "requests", [
    { name: "in a step", colour: "var(--running)" }, { name: "KV on the device", colour: "var(--resident)" },
    { name: "in host memory", colour: "var(--swapped)" }, { name: "no KV", colour: "var(--waiting)" }]),
  kv: new Chart($("charts"), "KV blocks of the device", [{ name: "in use", colour: "var(--resident)" }, { name: "cached", colour: "color-mix(in srgb, var(--resident) 45%, transparent)" }], " %", 100),
};

const levelName = (replica, level) => replica.level_names?.[level] ?? `Q${level + 1}`;
const lanes = [];
function lane(replica, level) {
  if (lanes[level]) return lanes[level];
  const row = make("div", "lane"), name = make("div"), requests = make("div", "requests"), count = make("div", "count");
  const quantum = make("span", "quantum");
  name.append(make("b", "", levelName(replica, level)), quantum);
  row.append(name, requests, count);
  $("lanes").append(row);
  return lanes[level] = { requests, count, quantum };
}

const chips = new Map();
function drawRequests(snapshot) {
  const old = new Map();
  for (const [id, chip] of chips) old.set(id, chip.getBoundingClientRect());
  const present = new Set();
  const levels = Math.max(...snapshot.replicas.map(r => r.levels.length));
  for (let level = 0; level < levels; level++) {
    const row = lane(snapshot.replicas[0], level);
    const count = snapshot.replicas.reduce((sum, r) => sum + r.levels[level], 0);
    row.count.textContent = count || "";
    const quantum = snapshot.replicas[0].quanta_s[level];
    row.quantum.textContent = quantum === undefined ? "" : seconds(quantum);
    const wanted = snapshot.replicas.flatMap(r => r.requests.filter(q => q.level === level));
    wanted.forEach((request, index) => {
      present.add(request.request_id);
      let chip = chips.get(request.request_id);
      if (!chip) { chip = make("div"); chips.set(request.request_id, chip); }
      chip.className = `request ${request.running ? "running" : request.place}${isMine(request) ? " mine" : ""}`;
      chip.textContent = request.num_output_tokens;
      chip.title = `${nameOf(request)} (${request.request_id})\n${request.num_prompt_tokens} prompt tokens, ${request.num_computed_tokens} with KV, waited ${seconds(request.waited_s)}`;
      if (row.requests.children[index] !== chip) row.requests.insertBefore(chip, row.requests.children[index] || null);
    });
  }
  for (const [id, chip] of chips) if (!present.has(id)) { chip.remove(); chips.delete(id); }
  slide(old);
}

// Chips that changed their lane slide there; one that is on its way is not started anew.
function slide(old) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const [id, chip] of chips) {
    const from = old.get(id), to = chip.getBoundingClientRect();
    if (!from || from.top === to.top || chip.getAnimations().length) continue;
    chip.animate([{ transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)` }, { transform: "none" }], { duration: 180, easing: "ease-out" });
  }
}

const pools = [];
function makePools(index, several) {
  const box = make("div"), bars = {};
  if (several) box.append(make("div", "small", `replica ${index}`));
  for (const kind of ["device", "host"]) {
    const pool = make("div", `pool ${kind}`), label = make("div", "small"), bar = make("div", "bar");
    const owned = make("i", "owned"), cached = make("i", "cached");
    bar.append(owned, cached); pool.append(label, bar);
    bars[kind] = { label, owned, cached };
    box.append(pool);
    if (kind === "device") box.append(bars.swaps = make("div", "swaps small"));
  }
  $("pools").append(box);
  return bars;
}

function drawPools(snapshot, elapsed) {
  snapshot.replicas.forEach((replica, index) => {
    pools[index] ??= makePools(index, snapshot.replicas.length > 1);
    for (const kind of ["device", "host"]) {
      const pool = replica[kind], bar = pools[index][kind], share = n => `${pool.capacity ? 100 * n / pool.capacity : 0}%`;
      bar.owned.style.width = share(pool.owned);
      bar.cached.style.width = share(pool.cached);
      bar.label.textContent = pool.capacity
        ? `${kind}: ${pool.owned.toLocaleString("en")} in use, ${pool.cached.toLocaleString("en")} cached, of ${pool.capacity.toLocaleString("en")}`
        : `${kind}: no pool`;
    }
    const last = before && before.replicas[index];
    const rate = name => last && elapsed > 0 ? number.format((replica[name] - last[name]) / elapsed) : "–";
    pools[index].swaps.textContent = `↓ out ${rate("swapped_out_blocks")} blocks/s    ↑ in ${rate("swapped_in_blocks")} blocks/s`;
  });
}

function drawCharts(snapshot, rate) {
  const requests = snapshot.replicas.flatMap(r => r.requests);
  const count = place => requests.filter(each => !each.running && each.place === place).length;
  const unseen = snapshot.replicas.flatMap(r => r.levels).reduce((a, b) => a + b, 0) - requests.length;
  charts.requests.add(snapshot.clock_s, [requests.filter(each => each.running).length, count("resident"), count("swapped"), count("waiting") + unseen]);
  const device = name => snapshot.replicas.reduce((sum, r) => sum + r.device[name], 0);
  charts.kv.add(snapshot.clock_s, [100 * device("owned") / device("capacity"), 100 * device("cached") / device("capacity")]);
  if (rate !== null) charts.rate.add(snapshot.clock_s, [rate]);
}

const recent = [];
function draw(snapshot) {
  const elapsed = before ? snapshot.clock_s - before.clock_s : 0;
  if (before && elapsed <= 0) { before = null; return; }  // another coordinator
  recent.push(snapshot);
  if (recent.length > 9) recent.shift();
  const first = recent[0], span = snapshot.clock_s - first.clock_s;
  const rate = span > 0 ? (snapshot.generation_tokens - first.generation_tokens) / span : null;
  figures["output tokens/s"].textContent = rate === null ? "–" : number.format(rate);
  figures["TTFT, median"].textContent = seconds(snapshot.ttft_s.p50);
  figures["TTFT, P95"].textContent = seconds(snapshot.ttft_s.p95);
  figures["JCT, median"].textContent = seconds(snapshot.jct_s.p50);
  figures["JCT, P95"].textContent = seconds(snapshot.jct_s.p95);
  figures["unfinished"].textContent = snapshot.replicas.flatMap(r => r.levels).reduce((a, b) => a + b, 0).toLocaleString("en");
  figures["finished"].textContent = snapshot.finished_requests.toLocaleString("en");
  figures["preemptions"].textContent = snapshot.replicas.reduce((total, r) => total + r.preemptions, 0).toLocaleString("en");
  $("policy").textContent = POLICIES[snapshot.policy] ? `${snapshot.policy}: ${POLICIES[snapshot.policy]}` : snapshot.policy;
  tellMoves(snapshot, before);
  drawRequests(snapshot);
  drawPools(snapshot, elapsed);
  drawCharts(snapshot, rate);
  followAnswer(snapshot);
  before = snapshot;
}

function say(text, lost) { $("state").textContent = text; $("state").className = lost ? "lost" : ""; }
const events = new EventSource("live");
events.onmessage = event => { say("live"); draw(JSON.parse(event.data)); };
events.addEventListener("unavailable", () => say("the coordinator does not answer", true));
events.onerror = () => say("the server does not answer; trying again", true);
