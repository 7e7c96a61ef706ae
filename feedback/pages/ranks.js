// Answers in order, in groups of equal ones: moved by drag (mouse, pen, touch), by keys, by buttons.
import { copy, words } from "/assets/site.js";
import { showMarkdown } from "/assets/markdown.js";

// "{n} of {m}" with values
export function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

// What an answer is called on the page: a letter, because the numbers are the ranks.
export function letter(number) {
  return String.fromCharCode(64 + number);
}

export class Ranks {
  // list: the element that holds the ranks. changed(): after each move. tell(text): for those who do not see it.
  constructor(list, { changed, tell }) {
    Object.assign(this, { list, changed, tell, groups: [], touched: false, cards: new Map(), drag: null });
    list.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("pointerdown", (event) => this.grab(event));
    list.addEventListener("pointermove", (event) => this.move(event));
    list.addEventListener("pointerup", () => this.drop(true));
    list.addEventListener("pointercancel", () => this.drop(false));
  }

  // answers: [{number, text}], in the order in which they are to be shown
  begin(answers) {
    this.touched = false;
    this.cards = new Map(answers.map((answer) => [answer.number, this.card(answer)]));
    this.groups = answers.map((answer) => [answer.number]);
    this.draw();
  }

  card({ number, text }) {
    const element = copy("answer");
    element.dataset.number = number;
    element.setAttribute("aria-label", fill(words.answer, { n: letter(number) }));
    element.querySelector("h3").textContent = fill(words.answer, { n: letter(number) });
    showMarkdown(element.querySelector(".text"), text);
    for (const [name, act] of [["up", () => this.step(number, -1)], ["down", () => this.step(number, 1)], ["tie", () => this.tie(number)]]) {
      const button = element.querySelector("." + name);
      button.setAttribute("aria-label", fill(words["move_" + name], { n: letter(number) }));
      button.title = button.getAttribute("aria-label");
      button.addEventListener("click", act);
    }
    return element;
  }

  draw() {
    const focused = document.activeElement;
    this.list.replaceChildren(
      ...this.groups.map((group, index) => {
        const rank = copy("rank");
        rank.querySelector(".place").textContent = String(index + 1);
        rank.classList.toggle("tied", group.length > 1);
        rank.querySelector(".cards").append(...group.map((number) => this.cards.get(number)));
        return rank;
      }),
    );
    if (focused && this.list.contains(focused)) {
      focused.focus({ preventScroll: true });
      focused.closest(".answer").scrollIntoView({ block: "nearest" });
    }
    this.changed();
  }

  // which group an answer stands in, from 0
  place(number) {
    return this.groups.findIndex((group) => group.includes(number));
  }

  // The groups without an answer; a group that it leaves empty goes.
  without(number) {
    return this.groups.map((group) => group.filter((other) => other !== number)).filter((group) => group.length);
  }

  set(groups, number) {
    this.groups = groups;
    this.touched = true;
    this.draw();
    const index = this.place(number);
    const others = groups[index].filter((other) => other !== number).map(letter).join(", ");
    const values = { n: letter(number), rank: index + 1, ranks: groups.length, others };
    this.tell(fill(others ? words.tied_at : words.at_rank, values));
  }

  // Alone at a place, from 0.
  put(number, index) {
    const groups = this.without(number);
    groups.splice(Math.max(0, Math.min(index, groups.length)), 0, [number]);
    this.set(groups, number);
  }

  // Beside the answers of the group that `other` stands in.
  join(number, other) {
    const groups = this.without(number);
    groups.find((group) => group.includes(other)).push(number);
    groups.forEach((group) => group.sort((a, b) => a - b));
    this.set(groups, number);
  }

  // One place up (-1) or down (1): out of a tie to the place beside it, else past the neighbour.
  step(number, by) {
    const index = this.place(number);
    const tied = this.groups[index].length > 1;
    const target = tied ? index + (by > 0 ? 1 : 0) : index + by;
    if (!tied && (target < 0 || target >= this.groups.length)) {
      this.tell(fill(by < 0 ? words.first_already : words.last_already, { n: letter(number) }));
    } else {
      this.put(number, target);
    }
  }

  tie(number) {
    const above = this.groups[this.place(number) - 1];
    if (above) this.join(number, above[0]);
    else this.tell(fill(words.none_above, { n: letter(number) }));
  }

  key(event) {
    const card = event.target;
    if (!card.matches(".answer") || event.ctrlKey || event.metaKey || event.altKey) return;
    const number = Number(card.dataset.number);
    if (event.key === "ArrowUp") this.step(number, -1);
    else if (event.key === "ArrowDown") this.step(number, 1);
    else if (event.key === "=") this.tie(number);
    else if (/^[1-9]$/.test(event.key)) this.put(number, Number(event.key) - 1);
    else return;
    event.preventDefault();
  }

  grab(event) {
    const grip = event.target.closest(".grip");
    if (!grip || event.button || this.drag) return;
    event.preventDefault();
    const card = grip.closest(".answer");
    this.drag = { card, number: Number(card.dataset.number), id: event.pointerId, from: event.pageY, target: null };
    this.list.setPointerCapture(event.pointerId);
    card.classList.add("held");
    document.body.classList.add("dragging");
  }

  move(event) {
    if (!this.drag || event.pointerId !== this.drag.id) return;
    const edge = 70;
    if (event.clientY < edge) scrollBy(0, -14);
    else if (event.clientY > innerHeight - edge - 60) scrollBy(0, 14);
    this.drag.card.style.translate = `0 ${event.pageY - this.drag.from}px`;
    this.aim(event.clientY);
  }

  // Where the answer would fall: before or after a rank, or, over its middle, beside what stands there.
  aim(y) {
    const { number } = this.drag;
    let nearest = Infinity;
    this.drag.target = null;
    [...this.list.children].forEach((rank, index) => {
      rank.classList.remove("before", "after", "join");
      if (this.groups[index].length === 1 && this.groups[index][0] === number) return;
      const { top, bottom } = rank.getBoundingClientRect();
      const distance = Math.max(top - y, y - bottom, 0);
      if (distance >= nearest) return;
      nearest = distance;
      const part = (y - top) / (bottom - top);
      this.drag.target = { rank, index, how: part < 0.3 ? "before" : part > 0.7 ? "after" : "join" };
    });
    if (this.drag.target) this.drag.target.rank.classList.add(this.drag.target.how);
  }

  drop(done) {
    if (!this.drag) return;
    const { card, number, target } = this.drag;
    this.drag = null;
    card.classList.remove("held");
    card.style.translate = "";
    document.body.classList.remove("dragging");
    for (const rank of this.list.children) rank.classList.remove("before", "after", "join");
    if (!done || !target) return;
    const other = this.groups[target.index].find((one) => one !== number);
    if (target.how === "join") return this.join(number, other);
    const groups = this.without(number);
    const index = groups.findIndex((group) => group.includes(other));
    this.put(number, index + (target.how === "after" ? 1 : 0));
  }
}
