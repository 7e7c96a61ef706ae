// The little of markdown that answers use (paragraphs, headings, lists, quotes, code, bold, italics), as elements built one
// by one: text only ever becomes textContent. Links and pictures stay the text that they are.

const FENCE = /^\s*(```+|~~~+)/;
const HEADING = /^#{1,6}\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;
const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?\S|\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]*?[^\s*])\*(?![\w*])/s;

function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

// text with `code`, **bold** and *italics*, as nodes
function inline(text) {
  const nodes = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) {
      nodes.push(rest);
      break;
    }
    if (found.index) nodes.push(rest.slice(0, found.index));
    const [whole, , code, bold, italics] = found;
    if (code !== undefined) nodes.push(make("code", code));
    else if (bold !== undefined) nodes.push(make("strong", ...inline(bold)));
    else nodes.push(make("em", ...inline(italics)));
    rest = rest.slice(found.index + whole.length);
  }
  return nodes;
}

function kind(line) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (BULLET.test(line)) return "ul";
  if (NUMBER.test(line)) return "ol";
  return QUOTE.test(line) ? "quote" : "text";
}

// the lines from `start` on that are of one kind
function run(lines, start) {
  let end = start + 1;
  while (end < lines.length && kind(lines[end]) === kind(lines[start])) end += 1;
  return lines.slice(start, end);
}

function fenced(lines, start) {
  const mark = FENCE.exec(lines[start])[1];
  let end = start + 1;
  while (end < lines.length && !lines[end].trim().startsWith(mark)) end += 1;
  const element = make("pre", make("code", lines.slice(start + 1, end).join("\n")));
  element.tabIndex = 0; // it may scroll
  return [element, end + 1 - start];
}

function block(lines, start) {
  const what = kind(lines[start]);
  if (what === "blank") return [null, 1];
  if (what === "fence") return fenced(lines, start);
  if (what === "heading") return [make("h3", ...inline(HEADING.exec(lines[start])[1])), 1];
  const found = run(lines, start);
  if (what === "quote") return [make("blockquote", ...inline(found.map((line) => QUOTE.exec(line)[1]).join("\n"))), found.length];
  if (what === "text") return [make("p", ...inline(found.join("\n"))), found.length];
  const list = make(what);
  if (what === "ol") list.start = Number(NUMBER.exec(found[0])[1]);
  for (const line of found) list.append(make("li", ...inline(what === "ol" ? NUMBER.exec(line)[2] : BULLET.exec(line)[1])));
  return [list, found.length];
}

// Show an answer in `element`.
export function showMarkdown(element, text) {
  const lines = text.split("\n");
  const elements = [];
  for (let at = 0; at < lines.length; ) {
    const [made, used] = block(lines, at);
    if (made) elements.push(made);
    at += used;
  }
  element.replaceChildren(...elements);
}
