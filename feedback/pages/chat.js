// The chat page. Text of people and of models only ever becomes textContent, never markup.
import { call, copy, lang, newKey, say, words } from "/assets/site.js";

const log = document.getElementById("main");
const welcome = document.getElementById("welcome");
const form = document.getElementById("ask");
const box = document.getElementById("text");
const send = document.getElementById("send");
const modelLabel = document.getElementById("model");
const KEPT = "thumbwheel.conversation";

// {id, turns: [{question, answer, completion, token, model, thumb}]}; kept for this tab, so that a reload shows it again
let conversation = kept() || fresh();
let running = null;

function fresh() {
  return { id: newKey(), turns: [] };
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify(conversation));
}

function add(element) {
  welcome.hidden = true;
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
  log.append(element);
  if (near) log.scrollTop = log.scrollHeight;
  return element;
}

function follow(change) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
  change();
  if (near) log.scrollTop = log.scrollHeight;
}

function showQuestion(text) {
  const element = add(copy("question"));
  element.querySelector(".text").textContent = text;
}

function showAnswer(turn) {
  const element = add(copy("answer"));
  element.querySelector(".text").textContent = turn.answer || "";
  if (turn.completion) offerThumbs(element, turn);
  return element;
}

// thumbs

function offerThumbs(element, turn) {
  const thumbs = element.querySelector(".thumbs");
  const up = element.querySelector(".up");
  const down = element.querySelector(".down");
  element.querySelector(".version").textContent = turn.model.slice(0, 12);
  thumbs.hidden = false;
  press(element, turn.thumb || 0);
  up.addEventListener("click", () => choose(element, turn, 1));
  down.addEventListener("click", () => choose(element, turn, -1));
}

function press(element, value) {
  element.querySelector(".up").setAttribute("aria-pressed", String(value === 1));
  element.querySelector(".down").setAttribute("aria-pressed", String(value === -1));
}

// A second click on the same thumb takes it back. One request a time; the last choice wins.
function choose(element, turn, value) {
  const chosen = turn.wanted === undefined ? turn.thumb || 0 : turn.wanted;
  turn.wanted = chosen === value ? 0 : value;
  turn.key = newKey();
  press(element, turn.wanted);
  keep();
  save(element, turn);
}

async function save(element, turn) {
  if (turn.saving) return;
  turn.saving = true;
  const retry = element.querySelector(".retry");
  const line = element.querySelector(".state");
  retry.hidden = true;
  let failed = false;
  while (turn.wanted !== undefined && !failed) {
    const wanted = turn.wanted;
    const sent = turn.key;
    say(line, "", words.saving);
    failed = !(await deliver(turn, wanted, sent));
    if (!failed && turn.key === sent) {
      turn.thumb = wanted;
      delete turn.wanted;
      keep();
      say(line, "saved", wanted === 0 ? words.removed : words.saved);
    }
  }
  turn.saving = false;
  if (failed) {
    say(line, "failed", words.not_saved);
    retry.hidden = false;
    retry.onclick = () => save(element, turn);
  }
}

// True only when the server said that it is committed. The same key each time: a repetition changes nothing.
async function deliver(turn, value, sent) {
  const url = "/v1/feedback/" + encodeURIComponent(turn.completion) + "/thumb";
  const headers = { "Idempotency-Key": sent, "X-Thumbwheel-Feedback-Token": turn.token };
  const thumb = { value, source: "human_user", channel: "page", locale: lang };
  try {
    await (value === 0 ? call("DELETE", url, undefined, headers) : call("PUT", url, thumb, headers));
    return true;
  } catch {
    return false;
  }
}

async function refreshThumb(element, turn) {
  try {
    const url = "/v1/feedback/" + encodeURIComponent(turn.completion) + "/thumb";
    const response = await fetch(url, { headers: { "X-Thumbwheel-Feedback-Token": turn.token } });
    if (!response.ok && response.status !== 404) return;
    const said = response.ok ? await response.json() : { retracted: true };
    turn.thumb = said.retracted ? 0 : said.value;
    press(element, turn.wanted === undefined ? turn.thumb : turn.wanted);
    keep();
  } catch {
    return;
  }
}

// answers

function messages(turns, question) {
  const past = turns.filter((turn) => turn.completion);
  const said = past.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  return [...said, { role: "user", content: question }];
}

async function ask(question) {
  const turns = conversation.turns.slice(-20);
  const turn = { question, answer: "" };
  showQuestion(question);
  const element = showAnswer(turn);
  element.classList.add("waiting");
  conversation.turns.push(turn);
  running = new AbortController();
  send.textContent = words.stop;
  try {
    await answer(element, turn, turns, running.signal);
  } catch (error) {
    const stopped = error.name === "AbortError";
    const text = element.querySelector(".text");
    if (!stopped) text.classList.add("failed");
    const problem = stopped ? words.stopped : words.failed + " " + error.message;
    text.textContent = turn.answer ? turn.answer + "\n— " + problem : problem;
    conversation.turns.pop();
  }
  element.classList.remove("waiting");
  running = null;
  send.textContent = words.send;
  keep();
}

async function answer(element, turn, turns, signal) {
  let response;
  for (;;) {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: messages(turns, turn.question), stream: true, conversation: conversation.id }),
      signal,
    });
    if (response.ok) break;
    const problem = (await response.json()).error;
    if (problem.code !== "context_length_exceeded" || turns.length === 0) throw new Error(problem.message);
    turns = turns.slice(Math.ceil(turns.length / 2));
    noteOnce();
  }
  const text = element.querySelector(".text");
  let finished = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice && choice.delta.content) {
      turn.answer += choice.delta.content;
      follow(() => (text.textContent = turn.answer));
    }
    if (choice && choice.finish_reason) finished = event;
  }
  if (!finished) throw new Error(words.stopped);
  turn.completion = finished.id;
  turn.token = response.headers.get("X-Thumbwheel-Feedback-Token");
  turn.model = finished.system_fingerprint;
  follow(() => offerThumbs(element, turn));
  showModel(turn.model);
}

function noteOnce() {
  if (document.querySelector(".note")) return;
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = words.shortened;
  add(note);
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

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const question = box.value.trim();
  if (!question) return;
  box.value = "";
  grow();
  ask(question);
});

box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});

for (const button of document.querySelectorAll(".suggestion")) {
  button.addEventListener("click", () => running || ask(button.textContent));
}

document.getElementById("new").addEventListener("click", () => {
  if (running) running.abort();
  conversation = fresh();
  keep();
  for (const element of log.querySelectorAll(".turn, .note")) element.remove();
  welcome.hidden = false;
  box.focus();
});

for (const turn of conversation.turns) {
  const rated = "thumb" in turn || "wanted" in turn;
  delete turn.saving;
  delete turn.wanted; // whether it arrived before the reload, the server knows
  showQuestion(turn.question);
  const element = showAnswer(turn);
  if (rated) refreshThumb(element, turn);
}
watchModel();
box.focus();
