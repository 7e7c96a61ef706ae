// The chat page: the conversation, asking, and what is kept of it for a reload.
import { copy, newKey, words } from "/assets/site.js";
import { Answer } from "/assets/answer.js";
import { Comparison, coin } from "/assets/compare.js";
import { listen, showHelp } from "/assets/keys.js";

const main = document.getElementById("main");
const log = document.getElementById("log");
const welcome = document.getElementById("welcome");
const form = document.getElementById("ask");
const box = document.getElementById("text");
const send = document.getElementById("send");
const modelLabel = document.getElementById("model");
const KEPT = "thumbwheel.conversation";

// {id, turns: [{question, answer, completion, token, model, start, and what Answer and Comparison add}]}; kept for this
// tab, so that a reload shows it again. start: the first of the turns that the answer's model was told.
let conversation = kept() || fresh();
let running = null;

function fresh() {
  return { id: newKey(), turns: [] };
}

function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT));
    return found.turns.every((turn) => Number.isInteger(turn.start)) ? found : null;
  } catch {
    return null;
  }
}

function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify(conversation));
}

// Change what is shown, and stay at the end if that is where the reader is.
function follow(change) {
  const near = main.scrollHeight - main.scrollTop - main.clientHeight < 120;
  change();
  if (near) main.scrollTop = main.scrollHeight;
}

function add(element) {
  welcome.hidden = true;
  follow(() => log.append(element));
}

function showTurn(turn) {
  const element = copy("question");
  element.querySelector(".text").textContent = turn.question;
  add(element);
  if (turn.rival) {
    showComparison(turn).offer();
    return null;
  }
  const answer = new Answer(turn, keep, () => another(answer));
  add(answer.element);
  if (turn.completion) answer.offer();
  return answer;
}

// asking

function messages(turns, question) {
  const said = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  return [...said, { role: "user", content: question }];
}

// Run `work` with a signal that the send button gives: Stop.
async function stoppable(work) {
  running = new AbortController();
  send.textContent = words.stop;
  try {
    return await work(running.signal);
  } finally {
    running = null;
    send.textContent = words.send;
    keep();
  }
}

async function ask(question) {
  settle();
  for (const element of log.querySelectorAll(".theirs")) element.answer.showWhy(false);
  const turn = { question, answer: "", start: Math.max(0, conversation.turns.length - 20) };
  const answer = showTurn(turn);
  answer.waiting(true);
  try {
    await stoppable(async (signal) => {
      await stream(turn, {}, turn, (text) => follow(() => answer.write(text)), signal);
      conversation.turns.push(turn);
    });
    follow(() => answer.offer());
    showModel(turn.model);
  } catch (error) {
    follow(() => answer.fail(problem(error)));
  }
  answer.waiting(false);
}

function problem(error) {
  return error.name === "AbortError" ? words.stopped : words.failed + " " + error.message;
}

// Ask for the answer to a turn's question and put it into `into`, telling write() the text so far. Of what is too long for
// the model, the first half of the turns is forgotten.
async function stream(turn, extra, into, write, signal) {
  let response;
  for (;;) {
    const before = conversation.turns.slice(turn.start).filter((other) => other !== turn);
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: messages(before, turn.question), stream: true, conversation: conversation.id, ...extra }),
      signal,
    });
    if (response.ok) break;
    const { error: told = { message: "HTTP " + response.status } } = await response.json().catch(() => ({}));
    if (told.code !== "context_length_exceeded" || before.length === 0 || extra.parent) throw new Error(told.message);
    turn.start += Math.ceil(before.length / 2);
    noteOnce();
  }
  let finished = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice && choice.delta.content) {
      into.answer += choice.delta.content;
      write(into.answer);
    }
    if (choice && choice.finish_reason) finished = event;
  }
  if (!finished) throw new Error(words.stopped);
  into.completion = finished.id;
  into.token = response.headers.get("X-Thumbwheel-Feedback-Token");
  into.model = finished.system_fingerprint;
}

function noteOnce() {
  if (log.querySelector(".note")) return;
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = words.shortened;
  follow(() => log.lastElementChild.before(note));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// two answers side by side

function showComparison(turn) {
  const comparison = new Comparison(turn, keep, settle);
  add(comparison.element);
  return comparison;
}

// Another answer to the newest question, to compare with the one that is there.
async function another(answer) {
  const turn = conversation.turns.at(-1);
  if (running || turn !== answer.turn) return;
  turn.rival = { answer: "" };
  turn.swapped = coin();
  answer.element.remove();
  const comparison = showComparison(turn);
  comparison.element.setAttribute("aria-busy", "true");
  comparison.element.focus();
  try {
    await stoppable((signal) =>
      stream(turn, { parent: turn.completion }, turn.rival, (text) => follow(() => comparison.write(text)), signal),
    );
    follow(() => comparison.offer());
  } catch (error) {
    const first = settle();
    if (first) first.fail(problem(error)); // else the person went on already
  }
}

// Go on with the chosen answer of an open comparison, or with the first.
function settle() {
  const open = log.querySelector(".compare");
  if (!open) return null;
  if (running) running.abort();
  const settled = open.comparison.settle();
  conversation.turns[conversation.turns.length - 1] = settled;
  const answer = new Answer(settled, keep, () => another(answer));
  const had = open.contains(document.activeElement);
  open.replaceWith(answer.element);
  answer.offer();
  if (had) answer.element.focus();
  return answer;
}

// the rest of the page

function showModel(hash) {
  modelLabel.textContent = hash ? hash.slice(0, 12) : words.no_model;
  modelLabel.classList.toggle("ready", Boolean(hash));
}

async function watchModel() {
  try {
    const listed = await (await fetch("/v1/models")).json();
    showModel(listed.data.length ? listed.data[0].model_hash : "");
  } catch {
    showModel("");
  }
  setTimeout(watchModel, document.hidden ? 15000 : 4000);
}

function grow() {
  box.style.height = "auto";
  box.style.height = box.scrollHeight + "px";
}

function startAnew() {
  if (running) running.abort();
  conversation = fresh();
  keep();
  log.replaceChildren();
  welcome.hidden = false;
  box.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const suggested = event.submitter && event.submitter.name === "suggestion" ? event.submitter.value : "";
  const question = suggested || box.value.trim();
  if (!question) return;
  if (!suggested) box.value = "";
  grow();
  ask(question);
});

box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!running) form.requestSubmit(send);
  }
  if (event.key === "Escape") focusOn(0);
});

// keys act on the answer that has the focus, else on the newest
function current() {
  const shown = [...log.querySelectorAll(".theirs, .compare")];
  const at = shown.findIndex((element) => element.contains(document.activeElement));
  return { shown, at: at < 0 ? shown.length - 1 : at };
}

function focusOn(step) {
  const { shown, at } = current();
  const next = shown[Math.max(0, Math.min(shown.length - 1, at + step))];
  if (next) next.focus();
}

function press(selector) {
  const { shown, at } = current();
  const button = at < 0 ? null : shown[at].querySelector(selector);
  if (button && button.checkVisibility() && !button.disabled) button.click();
}

listen({
  u: () => press(".up"),
  d: () => press(".down"),
  z: () => press(".undo"),
  r: () => press(".again"),
  e: () => press(".better"),
  j: () => focusOn(1),
  k: () => focusOn(-1),
  1: () => press('.choose[data-choice="left"]'),
  2: () => press('.choose[data-choice="right"]'),
  3: () => press('.choose[data-choice="tie"]'),
  n: startAnew,
  "/": () => box.focus(),
  "?": showHelp,
});
document.getElementById("new").addEventListener("click", startAnew);
document.getElementById("help").addEventListener("click", showHelp);
for (const name of ["model", "new", "help"]) document.getElementById(name).hidden = false;

for (const turn of conversation.turns) {
  if (turn.rival && !turn.rival.completion) Object.assign(turn, { rival: undefined, verdict: undefined });
  const answer = showTurn(turn);
  if (answer) answer.refresh();
}
watchModel();
box.focus();
