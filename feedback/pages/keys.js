// Keyboard shortcuts: single keys, which rest while somebody writes, and can be switched off in the help.

const OFF = "thumbwheel.keys";
const help = document.getElementById("keys");
const on = document.getElementById("keys-on");

export function showHelp() {
  help.showModal();
}

function rests(event) {
  if (!on.checked || help.open || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return true;
  return event.target.matches("textarea, select, input:not([type=checkbox]):not([type=radio])");
}

// actions: key → what it does
export function listen(actions) {
  on.checked = localStorage.getItem(OFF) !== "off";
  on.addEventListener("change", () => localStorage.setItem(OFF, on.checked ? "on" : "off"));
  document.addEventListener("keydown", (event) => {
    const action = actions[event.key];
    if (!action || rests(event)) return;
    event.preventDefault();
    action();
  });
}
