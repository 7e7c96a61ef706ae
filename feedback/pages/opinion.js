// What somebody says of an answer: kept when the server says so, tried again under the same key, the last wish wins.
import { call, lang, newKey, say, words } from "/assets/site.js";

export class Opinion {
  // line, retry: the elements that say how it stands. send(state, key): a promise that the server has it; state null takes
  // it back. changed(): after each wish and each success. said: what the server has.
  constructor({ line, retry, send, changed, said = null }) {
    Object.assign(this, { line, retry, send, changed, said, wanted: undefined, key: "", busy: false });
    retry.addEventListener("click", () => this.save());
  }

  // what is wished, else what is kept
  get state() {
    return this.wanted === undefined ? this.said : this.wanted;
  }

  wish(state) {
    this.wanted = state;
    this.key = newKey();
    this.changed();
    this.save();
  }

  async save() {
    if (this.busy) return;
    this.busy = true;
    this.retry.hidden = true;
    let failed = false;
    while (this.wanted !== undefined && !failed) {
      const { wanted, key } = this;
      say(this.line, "", words.saving);
      const kept = await this.deliver(wanted, key);
      if (this.key !== key) continue; // something newer is wished
      failed = !kept;
      if (failed) continue;
      this.said = wanted;
      this.wanted = undefined;
      say(this.line, "saved", wanted === null ? words.removed : words.saved);
      this.changed();
    }
    this.busy = false;
    if (failed) {
      say(this.line, "failed", words.not_saved);
      this.retry.hidden = false;
    }
  }

  // true only when the server said that it is committed
  async deliver(wanted, key) {
    try {
      await this.send(wanted, key);
      return true;
    } catch (error) {
      return wanted === null && error.status === 404; // it never arrived: nothing to take back
    }
  }
}

// where an opinion about one answer stands
export function place(turn, kind) {
  return "/v1/feedback/" + encodeURIComponent(turn.completion) + "/" + kind;
}

// Send an opinion about one answer, or take it back.
export function sendOne(turn, kind, state, key) {
  const headers = { "Idempotency-Key": key, "X-Thumbwheel-Feedback-Token": turn.token };
  if (state === null) return call("DELETE", place(turn, kind), undefined, headers);
  return call("PUT", place(turn, kind), { ...state, source: "human_user", channel: "page", locale: lang }, headers);
}

// What the server has; undefined when it cannot be asked.
export async function askOne(turn, kind) {
  try {
    const said = await call("GET", place(turn, kind), undefined, { "X-Thumbwheel-Feedback-Token": turn.token });
    return said.retracted ? null : said;
  } catch (error) {
    return error.status === 404 ? null : undefined;
  }
}
