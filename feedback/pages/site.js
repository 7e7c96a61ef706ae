// What the scripts of all pages share. Text of people and of models only ever becomes textContent, never markup.

export const words = JSON.parse(document.body.dataset.words);
export const lang = document.documentElement.lang;

// 32 hexadecimal digits that nobody guesses
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// a copy of what stands in <template id=name>
export function copy(name) {
  return document.getElementById(name).content.firstElementChild.cloneNode(true);
}

// The line of a form that says how it stands: "", "saved" or "failed".
export function say(line, state, text) {
  for (const name of ["saved", "failed"]) line.classList.toggle(name, name === state);
  line.textContent = text;
}

// The answer to a request, tried again while the server cannot be reached or has trouble of its own; give a write an
// Idempotency-Key, so that a repetition changes nothing. Throws an Error with the server's own words where it refuses.
export async function call(method, url, body, headers = {}) {
  const request = { method, headers: { "X-CSRF-Token": document.body.dataset.csrf, ...headers } };
  if (body !== undefined) {
    request.body = JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  let problem;
  for (const pause of [0, 400, 1200]) {
    if (pause) await new Promise((done) => setTimeout(done, pause));
    let response;
    try {
      response = await fetch(url, request);
    } catch (error) {
      problem = error;
      continue;
    }
    if (response.ok) return response.json();
    const told = await response.json().catch(() => ({}));
    problem = new Error(told.error ? told.error.message : "HTTP " + response.status);
    problem.status = response.status;
    if (response.status < 500 && response.status !== 429) break;
  }
  throw problem;
}
