// Two answers to one question side by side, in random order and without the models' names until one is chosen.
import { call, copy, lang, words } from "/assets/site.js";
import { Opinion } from "/assets/opinion.js";
import { showMarkdown } from "/assets/markdown.js";

// a fair coin
export function coin() {
  return (crypto.getRandomValues(new Uint8Array(1))[0] & 1) === 1;
}

export class Comparison {
  // turn: {answer, completion, token, model, rival: the same of the other answer, swapped: whether the rival stands left,
  // verdict: {chosen, strength} as the server has it}. keep(): the turn has changed. done(): the person goes on.
  constructor(turn, keep, done) {
    Object.assign(this, { turn, keep });
    this.element = copy("comparison");
    this.element.comparison = this;
    this.opinion = new Opinion({
      line: this.find(".state"),
      retry: this.find(".retry"),
      send: (state, key) => this.send(state, key),
      changed: () => this.show(),
      said: turn.verdict || null,
    });
    for (const button of this.element.querySelectorAll(".choose")) {
      button.addEventListener("click", () => this.choose(button.dataset.choice));
    }
    this.find(".undo").addEventListener("click", () => {
      this.opinion.wish(null);
      this.element.focus();
    });
    this.find(".clearly").addEventListener("change", (event) => {
      this.opinion.wish({ ...this.opinion.state, strength: event.target.checked ? 2 : 1 });
    });
    this.find(".skip-it").addEventListener("click", done);
    this.write(turn.rival.answer);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // the two in the order in which they are shown
  get shown() {
    const { rival } = this.turn;
    return this.turn.swapped ? [rival, this.turn] : [this.turn, rival];
  }

  // the other answer's text so far
  write(text) {
    this.turn.rival.answer = text;
    const [left, right] = this.shown;
    showMarkdown(this.find(".left .text"), left.answer);
    showMarkdown(this.find(".right .text"), right.answer);
  }

  // both answers are whole
  offer() {
    for (const button of this.element.querySelectorAll(".choose")) button.disabled = false;
    this.element.removeAttribute("aria-busy");
    this.show();
  }

  choose(choice) {
    if (!this.turn.rival.completion) return;
    const [left, right] = this.shown;
    const chosen = { left: left.completion, right: right.completion, tie: null }[choice];
    this.opinion.wish({ chosen, strength: 1 });
  }

  send(state, key) {
    const ids = this.shown.map((answer) => answer.completion);
    const tokens = this.shown.map((answer) => answer.token).join(",");
    const headers = { "Idempotency-Key": key, "X-Thumbwheel-Feedback-Token": tokens };
    if (state === null) {
      const query = ids.map((id) => "completion_id=" + encodeURIComponent(id)).join("&");
      return call("DELETE", "/v1/comparisons?" + query, undefined, headers);
    }
    const body = { completion_ids: ids, ...state, source: "human_user", channel: "page", locale: lang };
    return call("POST", "/v1/comparisons", body, headers);
  }

  show() {
    const state = this.opinion.state;
    const kept = this.opinion.said;
    const [left, right] = this.shown;
    const chosen = state && (state.chosen === null ? "tie" : state.chosen === left.completion ? "left" : "right");
    for (const button of this.element.querySelectorAll(".choose")) {
      button.setAttribute("aria-pressed", String(button.dataset.choice === chosen));
    }
    for (const [name, answer] of [["left", left], ["right", right]]) {
      this.find("." + name).classList.toggle("chosen", chosen === name);
      this.find("." + name + " .version").textContent = kept ? answer.model.slice(0, 12) : "";
    }
    this.find(".undo").hidden = !state;
    this.find(".much").hidden = !state || state.chosen === null;
    this.find(".clearly").checked = Boolean(state) && state.strength === 2;
    this.find(".outcome").textContent = kept ? (kept.chosen === null ? words.tied : words.chosen) : "";
    this.find(".skip-it").textContent = kept ? words.go_on : words.skip_comparison;
    this.turn.verdict = kept;
    this.keep();
    if (kept) this.find(".outcome").scrollIntoView({ block: "nearest" });
  }

  // The turn with the chosen answer, or with the first one where none is.
  settle() {
    const { rival, verdict, swapped, ...first } = this.turn;
    const state = this.opinion.state;
    if (!state || state.chosen === null || state.chosen !== rival.completion) return first;
    return { ...first, ...rival, thumb: null, rated: false, edit: null, edited: false };
  }
}
