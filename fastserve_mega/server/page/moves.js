"use strict";
// Why a request is elsewhere than at the last look, a quarter of a second ago.

const MOST_MOVES = 60;
const moveNames = new Map();  // request id → a number that can be remembered
let moveCount = 0;

function nameOf(request) {
  if (!moveNames.has(request.request_id)) {
    if (moveNames.size > 2000) moveNames.clear();
    moveNames.set(request.request_id, ++moveCount);
  }
  return `#${moveNames.get(request.request_id)}`;
}

// Why a request is where the policy paced has put it.
const STANDINGS = {
  urgent: "its reader is about to wait",
  ahead: "its reader has enough to read",
  late: "it cannot be in time any more",
};

// One sentence without its subject, or null when it stayed.
function reasonOf(now, last, replica) {
  const level = number => levelName(replica, number), quantum = number => replica.quanta_s[number];
  if (!last) {
    const skipped = now.level > 0 && replica.quanta_s.length ? `, its prompt of ${now.num_prompt_tokens} tokens needs more than the levels above` : "";
    return `arrived in ${level(now.level)}${skipped}`;
  }
  if (now.level !== last.level && STANDINGS[level(now.level)]) return `${STANDINGS[level(now.level)]}: ${level(now.level)}`;
  if (now.level > last.level) {
    const used = quantum(last.level), further = now.level - last.level > 1 ? ` up to ${level(now.level - 1)}` : "";
    return `used up ${level(last.level)}${used === undefined ? "" : ` (${seconds(used)})`}${further}: to ${level(now.level)}`;
  }
  if (now.level < last.level) return `starving, it waited for too long: to ${level(now.level)}`;
  if (now.place === last.place) return null;
  if (now.place === "swapped") return "made room for others: KV to host memory";
  if (last.place === "swapped" && now.place === "resident") return "comes next: KV back on the device";
  if (now.place === "resident") return `started after ${seconds(last.waited_s)}`;
  return "made room for others: KV dropped, to be computed again";
}

function tellMoves(snapshot, previous) {
  if (!previous) return;
  const known = new Map(previous.replicas.flatMap(r => r.requests).map(each => [each.request_id, each]));
  const present = new Set(), told = [];
  for (const replica of snapshot.replicas) for (const request of replica.requests) {
    present.add(request.request_id);
    const reason = reasonOf(request, known.get(request.request_id), replica);
    if (reason) told.push([request, reason]);
  }
  // Only where all were shown: else it may have left the view, and not ended.
  const all = previous.replicas.every(r => r.requests.length === r.levels.reduce((a, b) => a + b, 0));
  if (all) for (const [id, request] of known) if (!present.has(id)) told.push([request, `ended after ${request.num_output_tokens} tokens or a few more`]);
  if (!told.length) return;
  const list = $("moves");
  if (!moveCount || list.dataset.used !== "yes") { list.replaceChildren(); list.dataset.used = "yes"; }
  for (const [request, reason] of told) {
    const line = make("li"), name = make("b", "", nameOf(request));
    if (isMine(request)) name.style.color = "var(--mine)";
    line.append(name, ` ${reason}`);
    list.prepend(line);
  }
  while (list.children.length > MOST_MOVES) list.lastChild.remove();
}
