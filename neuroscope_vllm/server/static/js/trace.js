// One choice of a request: its tokens, and their features by layer in typed arrays, so that ten
// thousand tokens take megabytes.

const HEARD = 1, KNOWN = 2, SINK = 4, CACHED = 8;

function grown(array, size) {
  if (size <= array.length) return array;
  const larger = new array.constructor(Math.max(size, array.length * 2, 512));
  larger.set(array);
  return larger;
}

class Layer {
  start = new Int32Array(0);       // by token: where its features begin
  count = new Uint16Array(0);
  l0 = new Int32Array(0);
  flags = new Uint8Array(0);
  index = new Int32Array(0);       // by feature of a token
  activation = new Float32Array(0);
  score = new Float32Array(0);
  used = 0;
  steered = new Map();             // token -> [{index, before, after}]
  #sums = new Map();
  #summed = 0;
  #skipped;

  put(at, event) {
    if (this.flags[at] & HEARD) return false;
    const top = event.top_features;
    for (const name of ["start", "count", "l0", "flags"]) this[name] = grown(this[name], at + 1);
    for (const name of ["index", "activation", "score"]) this[name] = grown(this[name], this.used + top.length);
    this.start[at] = this.used;
    this.count[at] = top.length;
    this.l0[at] = event.l0 ?? -1;
    this.flags[at] = HEARD | (event.features_at ? KNOWN : 0) | (event.sink ? SINK : 0) | (event.cached ? CACHED : 0);
    for (const { index, activation, score } of top) {
      this.index[this.used] = index;
      this.activation[this.used] = activation;
      this.score[this.used++] = score;
    }
    if (event.steered?.length) this.steered.set(at, event.steered);
    if (at < this.#summed) this.#skipped = undefined;   // late: sum again
    return true;
  }

  features(at) {
    const from = this.start[at] ?? 0, found = [];
    for (let i = from; i < from + (this.count[at] ?? 0); i++) {
      found.push({ index: this.index[i], activation: this.activation[i], score: this.score[i] });
    }
    return found;
  }

  activationAt(at, index) {
    const from = this.start[at] ?? 0;
    for (let i = from; i < from + (this.count[at] ?? 0); i++) if (this.index[i] === index) return this.activation[i];
    return 0;
  }

  // Why a token has no features, or "" where it has.
  lack(at) {
    const flags = this.flags[at] ?? 0;
    if (this.count[at]) return "";
    if (flags & SINK) return "an attention sink: its residual drowns every feature";
    if (flags & CACHED && !(flags & KNOWN)) return "from the prefix cache: not computed";
    if (!(flags & HEARD)) return "not observed at this layer";
    return flags & KNOWN ? "no active feature" : "the model did not run on this token";
  }

  // index -> {count, activation, score}: how often a feature is on top, and how strongly at most.
  // `skip(token)` leaves tokens out; `mode` names it, so that a change of it is noticed.
  sums(tokens, skip, mode) {
    if (mode !== this.#skipped) {
      this.#sums = new Map();
      this.#summed = 0;
      this.#skipped = mode;
    }
    for (let at = this.#summed; at < tokens; at++) {
      if (skip(at)) continue;
      const from = this.start[at] ?? 0;
      for (let i = from; i < from + (this.count[at] ?? 0); i++) {
        const sum = this.#sums.get(this.index[i]);
        if (sum === undefined) {
          this.#sums.set(this.index[i], { index: this.index[i], count: 1, activation: this.activation[i], score: this.score[i] });
          continue;
        }
        sum.count++;
        sum.activation = Math.max(sum.activation, this.activation[i]);
        sum.score = Math.max(sum.score, this.score[i]);
      }
    }
    this.#summed = tokens;
    return this.#sums;
  }
}

export class Trace {
  tokens = [];           // {text, id, prompt}
  notes = [];            // {at, text, title}: what happened before token `at`
  layers = new Map();
  first = null;          // position of tokens[0]
  told = 0;              // how often it was told from the start
  prompt = 0;            // prompt tokens told so far
  asked = null;          // prompt tokens there are
  steering = null;
  done = null;
  #epoch = "";
  #seq = -1;

  constructor(event) {
    this.requestId = event.request_id;
    this.internalId = event.internal_id;
    this.choice = event.choice ?? 0;
    this.created = event.created ?? Date.now() / 1000;
  }

  // Whether an event is news: two streams may tell the same. Tokens may be told twice and late.
  news(id) {
    if (!id) return true;
    const at = id.lastIndexOf("-"), seq = Number(id.slice(at + 1));
    if (id.slice(0, at) === this.#epoch && seq <= this.#seq) return false;
    this.#epoch = id.slice(0, at);
    this.#seq = seq;
    return true;
  }

  begin(event) {
    this.asked = event.prompt_tokens;
    if (event.retold && this.tokens.length && !this.done) this.#anew();
    this.steering = event.steering ?? null;
    this.created = event.created ?? this.created;
    for (const layer of event.layers ?? []) this.layer(layer);
  }

  #anew() {
    Object.assign(this, { tokens: [], notes: [], layers: new Map(), first: null, done: null, prompt: 0 });
    this.told++;
  }

  token(event) {
    // Heard from its middle on until now: it is being told from its start.
    if (event.position < this.first) this.#anew();
    this.first ??= event.position;
    const at = event.position - this.first;
    while (this.tokens.length < at) this.tokens.push({ text: "", id: -1, prompt: false });
    if (at === this.tokens.length || this.tokens[at].id < 0) {
      const prompt = event.phase === "prompt";
      if (at < this.tokens.length) this.told++;   // it came late: show all anew
      this.tokens[at] = { text: event.token, id: event.token_id, prompt };
      if (prompt) this.prompt = Math.max(this.prompt, at + 1);
    }
    if (event.layer !== null && event.layer !== undefined) this.layer(event.layer).put(at, event);
  }

  note(text, title = "") {
    this.notes.push({ at: this.tokens.length, text, title });
  }

  layer(number) {
    let layer = this.layers.get(number);
    if (!layer) {
      this.layers.set(number, layer = new Layer());
      this.layers = new Map([...this.layers].sort(([a], [b]) => a - b));
    }
    return layer;
  }

  // Tokens the traces begin with alike.
  shared(other) {
    const most = Math.min(this.tokens.length, other.tokens.length);
    let at = 0;
    while (at < most && this.tokens[at].id === other.tokens[at].id) at++;
    return this.first === 0 && other.first === 0 ? at : 0;
  }
}
