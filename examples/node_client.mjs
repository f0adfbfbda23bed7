// Another language: a client for Node, written from docs/protocol.md alone.
//
//   npm install zeromq@6 @msgpack/msgpack@3
//   node node_client.mjs tcp://127.0.0.1:5570 1,2,3 20     # prompt as token ids; 20 tokens
//   node node_client.mjs tcp://127.0.0.1:5570 1,2,3 200 5  # cancel after 5 tokens
//
// Prints one JSON object per line: welcome, tokens as they come, finished.
import { randomUUID } from "node:crypto";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const VERSION = 2;
const PING_MS = Number(process.env.PING_MS ?? 5_000), ANSWER_MS = 10_000, SILENCE_MS = 30_000;

export class Client {
  #socket = new Dealer({ linger: 0 });
  #requests = new Map(); // request_id -> { submit, queue, wake }
  #epoch = null;
  #patientUntil = 0;
  #heardAt = Date.now();
  #welcome = resolvers();
  #timer = setInterval(() => this.#beat(), PING_MS);

  constructor(endpoint) {
    this.#socket.connect(endpoint);
    this.#read();
    this.#send("Hello");
  }

  /** The server's model, context length and vocabulary. */
  welcome() {
    const late = setTimeout(() => this.#welcome.reject(new Error("no answer")), ANSWER_MS);
    return this.#welcome.promise.finally(() => clearTimeout(late));
  }

  /** Yields arrays of new token ids; returns the Finished message. */
  // With a requestId and a fingerprint, both the same again, another process gets the same answer.
  async *generate(prompt, params, { requestId = randomUUID(), fingerprint = "" } = {}) {
    const submit = {
      request_id: requestId, prompt, params, received: [], failed_attempts: 0, fingerprint,
    };
    const request = { queue: [], submit };
    this.#requests.set(requestId, request);
    this.#send("Submit", submit);
    try {
      for (;;) {
        while (request.queue.length === 0) await new Promise((wake) => (request.wake = wake));
        const event = request.queue.shift();
        if (event instanceof Error) throw event;
        if (!Array.isArray(event)) return event;
        yield event;
      }
    } finally {
      this.#requests.delete(requestId);
    }
  }

  /** Its stream ends with the reason `abort`. */
  cancel(requestId) {
    this.#send("Cancel", { request_id: requestId });
  }

  close() {
    clearInterval(this.#timer);
    this.#socket.close();
  }

  #outbox = Promise.resolve(); // zeromq.js allows one send at a time
  #send(type, fields = {}) {
    const frame = Buffer.concat([Buffer.from([VERSION]), encode({ type, ...fields })]);
    this.#outbox = this.#outbox.then(() => this.#socket.send(frame)).catch(() => {});
  }

  #beat() {
    const silent = Date.now() - this.#heardAt > SILENCE_MS && Date.now() > this.#patientUntil;
    if (silent) for (const request of this.#requests.values()) push(request, new Error("silence"));
    this.#send("Ping");
  }

  async #read() {
    for await (const [frame] of this.#socket) {
      this.#heardAt = Date.now();
      if (frame[0] === VERSION) this.#handle(decode(frame.subarray(1)));
      else this.#refuse(`the server speaks protocol version ${frame[0]}, not ${VERSION}`);
    }
  }

  /** A message of ours was wrong, and nobody knows which. */
  #refuse(reason) {
    this.#welcome.reject(new Error(reason));
    for (const request of this.#requests.values()) push(request, new Error(reason));
  }

  #handle({ type, ...message }) {
    const request = this.#requests.get(message.request_id);
    if (type === "Welcome" || type === "Pong") {
      const restarted = this.#epoch !== null && message.epoch !== this.#epoch;
      this.#epoch = message.epoch;
      if (type === "Welcome") this.#welcome.resolve(message);
      if (restarted) for (const each of this.#requests.values()) this.#send("Submit", each.submit);
    } else if (type === "Tokens" && request) {
      const received = request.submit.received;
      const news = message.token_ids.slice(received.length - message.offset);
      received.push(...news);
      if (news.length === 0) return;
      request.submit.failed_attempts = 0;
      push(request, news);
    } else if (type === "Finished" && request) {
      push(request, message);
    } else if (type === "Refused" && request) {
      push(request, new Error(message.message));
    } else if (type === "Refused" && message.request_id === null) {
      this.#refuse(message.message);
    } else if (type === "Restarting") {
      this.#patientUntil = Date.now() + 1000 * message.within_s;
      for (const id of message.suspects)
        if (this.#requests.has(id)) this.#requests.get(id).submit.failed_attempts += 1;
    }
  }
}

function push(request, event) {
  request.queue.push(event);
  request.wake?.();
}

function resolvers() {
  const all = {};
  all.promise = new Promise((resolve, reject) => Object.assign(all, { resolve, reject }));
  return all;
}

async function main([endpoint, prompt, maxTokens = "16", cancelAfter = "0"]) {
  const client = new Client(endpoint);
  try {
    const print = (object) => console.log(JSON.stringify(object));
    const { model_name, max_context } = await client.welcome();
    print({ model_name, max_context });
    const requestId = randomUUID();
    const params = { max_tokens: Number(maxTokens), temperature: 0, ignore_eos: true };
    const answer = client.generate(prompt.split(",").map(Number), params, { requestId });
    for (let count = 0, cancelled = false; ; ) {
      const { value, done } = await answer.next();
      if (done) return print({ reason: value.reason, usage: value.usage });
      print({ tokens: value });
      count += value.length;
      if (Number(cancelAfter) && count >= Number(cancelAfter) && !cancelled) {
        client.cancel(requestId);
        cancelled = true;
      }
    }
  } finally {
    client.close();
  }
}

if (import.meta.url === `file://${process.argv[1]}`) {
  main(process.argv.slice(2)).catch((error) => {
    console.error(error.message);
    process.exitCode = 1;
  });
}
