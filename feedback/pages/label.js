// The labelling page: takes a task, lets its answers be put in order (ranks.js), sends the order, takes the next one.
import { call, copy, lang, newKey, say, words } from "/assets/site.js";
import { showMarkdown } from "/assets/markdown.js";
import { fill, letter, Ranks } from "/assets/ranks.js";

const find = (id) => document.getElementById(id);
const state = find("state");
const ranks = new Ranks(find("ranks"), { changed: show, tell: (text) => { find("said").textContent = text; } });
let task = null; // as /v1/tasks/next gave it
let sent = null; // {body, key}: what was sent last, so that a repetition has the same key
let busy = false;

function show() {
  find("order").textContent = ranks.groups.map((group) => group.map(letter).join(" = ")).join("  >  ");
  find("submit").disabled = busy || !(ranks.touched || find("as-is").checked);
  find("skip").disabled = busy;
}

function showTask() {
  for (const id of ["task", "bar"]) find(id).hidden = !task;
  find("nothing").hidden = Boolean(task);
  if (!task) return find("look").focus({ preventScroll: true });
  find("messages").replaceChildren(
    ...task.messages.map((message) => {
      const element = copy("message");
      element.classList.add(message.role);
      element.querySelector("h3").textContent = words["role_" + message.role] || message.role;
      showMarkdown(element.querySelector(".text"), message.content);
      return element;
    }),
  );
  for (const id of ["expert", "as-is"]) find(id).checked = false;
  find("comment").value = "";
  ranks.begin(task.answers);
  find("main").scrollIntoView();
  find("main").focus({ preventScroll: true });
  find("said").textContent = fill(words.new_task, { n: task.answers.length });
}

async function progress() {
  const { yours, everybody } = await call("GET", "/v1/tasks?limit=1");
  const numbers = { mine: yours.ranked, skipped: yours.skipped, all: everybody.ranked };
  find("progress").textContent = fill(words.progress, numbers);
}

// Do something with the server, and say what went wrong if it does.
async function guarded(doing) {
  if (busy) return;
  busy = true;
  show();
  find("problem").hidden = true;
  try {
    await doing();
  } catch (error) {
    say(state, "failed", "");
    find("problem").textContent = words.not_saved + " " + error.message;
    find("problem").hidden = false;
  }
  busy = false;
  show();
}

async function next() {
  task = (await call("GET", "/v1/tasks/next")).task;
  showTask();
  await progress();
}

function submit() {
  if (find("submit").disabled) return;
  guarded(async () => {
    const source = find("expert").checked ? "human_expert" : "human_user";
    const body = { ranking: ranks.groups, comment: find("comment").value, source, channel: "label", locale: lang };
    const spelled = task.id + JSON.stringify(body);
    if (!sent || sent.spelled !== spelled) sent = { spelled, key: newKey() };
    say(state, "", words.saving);
    await call("POST", `/v1/tasks/${task.id}/ranking`, body, { "Idempotency-Key": sent.key });
    say(state, "saved", words.saved);
    await next();
  });
}

find("submit").addEventListener("click", submit);
find("as-is").addEventListener("change", show);
find("look").addEventListener("click", () => guarded(next));
find("skip").addEventListener("click", () => find("why-skip").showModal());
find("why-skip").addEventListener("close", () => {
  const dialog = find("why-skip");
  const chosen = dialog.returnValue;
  dialog.returnValue = "";
  if (chosen !== "skip") return;
  guarded(async () => {
    const reason = dialog.querySelector("input:checked").value;
    await call("POST", `/v1/tasks/${task.id}/skip`, { reason });
    say(state, "saved", words.skipped);
    await next();
  });
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !task || find("why-skip").open) return;
  event.preventDefault();
  submit();
});
// where there is no room beside the answers, the guideline waits to be opened
if (matchMedia("(max-width: 900px)").matches) find("guideline").open = false;
guarded(next);
