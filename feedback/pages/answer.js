// One answer on the chat page: its text, thumbs with reasons and a comment, and the better answer that a person writes.
import { copy, words } from "/assets/site.js";
import { Opinion, askOne, sendOne } from "/assets/opinion.js";
import { showMarkdown } from "/assets/markdown.js";

export class Answer {
  // turn: {answer, completion, token, model, thumb, rated, edit, edited}, kept by whoever asked. keep(): the turn has
  // changed. again(): ask for another answer.
  constructor(turn, keep, again) {
    Object.assign(this, { turn, keep, again });
    this.element = copy("answer");
    this.element.answer = this;
    showMarkdown(this.find(".text"), turn.answer || "");
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // the text so far
  write(text) {
    showMarkdown(this.find(".text"), text);
  }

  fail(text) {
    const problem = document.createElement("p");
    problem.className = "failure";
    problem.textContent = text;
    this.find(".text").append(problem);
  }

  waiting(is) {
    this.element.classList.toggle("waiting", is);
    this.element.setAttribute("aria-busy", String(is));
  }

  // the answer is whole: it can be rated
  offer() {
    this.find(".version").textContent = this.turn.model.slice(0, 12);
    this.find(".tools").hidden = false;
    this.find(".again").addEventListener("click", () => this.again());
    this.offerThumbs();
    this.offerEdit();
  }

  offerThumbs() {
    this.thumb = new Opinion({
      line: this.find(".tools .state"),
      retry: this.find(".tools .retry"),
      send: (state, key) => sendOne(this.turn, "thumb", state, key),
      changed: () => this.showThumb(),
      said: this.turn.thumb || null,
    });
    this.find(".up").addEventListener("click", () => this.choose(1));
    this.find(".down").addEventListener("click", () => this.choose(-1));
    this.find(".undo").addEventListener("click", () => this.undo());
    for (const chip of this.element.querySelectorAll(".why .chip")) {
      chip.addEventListener("click", () => this.toggleReason(chip.dataset.code));
    }
    const why = this.find(".why");
    const comment = this.find(".comment");
    why.addEventListener("submit", (event) => {
      event.preventDefault();
      comment.value = comment.value.trim();
      this.comment = comment.value;
      this.thumb.wish({ ...this.thumb.state, comment: comment.value });
    });
    this.find(".because").addEventListener("click", () => this.showWhy(why.hidden));
    this.showThumb();
  }

  // a second time the same takes it back
  choose(value) {
    const state = this.thumb.state;
    if (state && state.value === value) {
      this.undo();
      return;
    }
    this.thumb.wish({ value, reasons: [], comment: state ? state.comment : "" });
    this.showWhy(true);
  }

  undo() {
    if (!this.thumb.state) return;
    const had = this.element.contains(document.activeElement) && document.activeElement.matches(".undo");
    this.find(".comment").value = this.comment = "";
    this.thumb.wish(null);
    this.showWhy(false);
    if (had) this.find(".up").focus(); // the button that had the focus is gone
  }

  toggleReason(code) {
    const { reasons, ...rest } = this.thumb.state;
    this.thumb.wish({ ...rest, reasons: reasons.includes(code) ? reasons.filter((one) => one !== code) : [...reasons, code] });
  }

  showWhy(open) {
    const why = this.find(".why");
    why.hidden = !open;
    if (open) why.scrollIntoView({ block: "nearest" });
    this.find(".because").setAttribute("aria-expanded", String(open));
  }

  showThumb() {
    const { said, state } = this.thumb;
    const value = state ? state.value : 0;
    this.find(".up").setAttribute("aria-pressed", String(value === 1));
    this.find(".down").setAttribute("aria-pressed", String(value === -1));
    this.find(".undo").hidden = !state;
    this.find(".because").hidden = !value;
    for (const group of this.element.querySelectorAll(".reasons")) group.hidden = Number(group.dataset.value) !== value;
    for (const chip of this.element.querySelectorAll(".why .chip")) {
      chip.setAttribute("aria-pressed", String(Boolean(state) && state.reasons.includes(chip.dataset.code)));
    }
    this.showComment(state ? state.comment : "");
    this.turn.thumb = said;
    this.turn.rated = this.turn.rated || Boolean(state);
    this.keep();
  }

  // unless somebody is writing another one
  showComment(text) {
    const box = this.find(".comment");
    if (box.value === (this.comment || "")) box.value = text;
    this.comment = text;
  }

  offerEdit() {
    this.edit = new Opinion({
      line: this.find(".edit-state"),
      retry: this.find(".edit-retry"),
      send: (state, key) => sendOne(this.turn, "edit", state, key),
      changed: () => this.showEdit(),
      said: this.turn.edit || null,
    });
    const form = this.find(".write");
    const text = this.find(".correction");
    this.find(".better").addEventListener("click", () => this.openEdit(form.hidden));
    this.find(".change").addEventListener("click", () => this.openEdit(true));
    this.find(".cancel").addEventListener("click", () => this.openEdit(false));
    this.find(".withdraw").addEventListener("click", () => {
      this.edit.wish(null);
      this.find(".better").focus();
    });
    form.addEventListener("keydown", (event) => event.key === "Escape" && this.openEdit(false));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!text.value.trim()) return;
      this.edit.wish({ correction: text.value.trim() });
      this.openEdit(false);
    });
    this.showEdit();
  }

  // prefilled with what was said last
  openEdit(open) {
    const text = this.find(".correction");
    const had = this.find(".write").contains(document.activeElement);
    this.find(".write").hidden = !open;
    this.find(".better").setAttribute("aria-expanded", String(open));
    if (open) {
      text.value = this.edit.state ? this.edit.state.correction : this.turn.answer;
      text.focus();
    } else if (had) {
      this.find(".better").focus();
    }
  }

  showEdit() {
    const state = this.edit.state;
    this.find(".kept").hidden = !state;
    this.find(".correction-text").textContent = state ? state.correction : "";
    this.find(".edit-line").hidden = false;
    this.turn.edit = this.edit.said;
    this.turn.edited = this.turn.edited || Boolean(state);
    this.keep();
  }

  // after a reload: what the server has; of what was under way then, only the server knows whether it arrived
  async refresh() {
    if (this.turn.rated) await this.refreshOne(this.thumb, "thumb", ({ value, reasons, comment }) => ({ value, reasons, comment }));
    if (this.turn.edited) await this.refreshOne(this.edit, "edit", ({ correction }) => ({ correction }));
  }

  async refreshOne(opinion, kind, state) {
    const said = await askOne(this.turn, kind);
    if (said === undefined || opinion.wanted !== undefined) return;
    opinion.said = said && state(said);
    opinion.changed();
  }
}
