// Moderation by keyboard. Without this the page works the same by its forms.

import { listen, showHelp } from "./keys.js";

const PLACE = "thumbwheel.moderation.place";
const form = document.getElementById("judge");
const cases = [...document.querySelectorAll(".case")];
const reason = document.getElementById("reason");
let current = -1;
let wanted = ""; // the verdict that waits for its reason

function go(place) {
  if (!cases.length) return;
  current = Math.max(0, Math.min(place, cases.length - 1));
  cases.forEach((one, index) => one.classList.toggle("current", index === current));
  cases[current].focus();
}

const boxes = () => [...form.querySelectorAll(".pick input")];

function count() {
  document.getElementById("number").textContent = boxes().filter((box) => box.checked).length;
}

// what is ticked, else the current one
function judge(verdict) {
  if (!form) return;
  if (!boxes().some((box) => box.checked)) {
    if (current < 0) return go(0);
    const box = cases[current].querySelector(".pick input");
    if (!box) return;
    box.checked = true;
    count();
  }
  if (verdict !== "accepted" && !reason.value.trim()) {
    wanted = verdict;
    reason.focus();
    return;
  }
  form.requestSubmit(form.querySelector(`.bar-below button[value="${verdict}"]`));
}

function pick() {
  const box = cases[current]?.querySelector(".pick input");
  if (!box) return;
  box.checked = !box.checked;
  count();
}

document.getElementById("help").hidden = false;
document.getElementById("help").addEventListener("click", showHelp);
listen({
  j: () => go(current + 1),
  k: () => go(current - 1),
  x: pick,
  a: () => judge("accepted"),
  q: () => judge("quarantined"),
  r: () => judge("rejected"),
  z: () => document.querySelector(".told button")?.click(),
  "?": showHelp,
});

if (form) {
  count();
  form.addEventListener("change", count);
  for (const [place, one] of cases.entries()) one.addEventListener("focusin", () => { current = place; });
  form.addEventListener("submit", () => sessionStorage.setItem(PLACE, Math.max(current, 0)));
  reason.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") {
      event.preventDefault();
      if (wanted && reason.value.trim()) judge(wanted);
    }
    if (event.key === "Escape") {
      wanted = "";
      go(current);
    }
  });
  // a button that needs a reason asks for it before the server has to
  form.addEventListener("click", (event) => {
    const button = event.target.closest("button[name=do]");
    if (!button || button.value.startsWith("accepted") || reason.value.trim()) return;
    event.preventDefault();
    const box = button.closest(".case")?.querySelector(".pick input");
    if (box) for (const other of boxes()) other.checked = other === box;
    count();
    wanted = button.value.split(":")[0];
    reason.focus();
  });
  const place = sessionStorage.getItem(PLACE);
  if (place !== null) go(Number(place));
}
sessionStorage.removeItem(PLACE);
