// Keys, sending, and what waits to be sent. Each answer has a key of its own, so that one that is sent twice is stored
// once; it stays in the browser's storage until the server has said that it is on the disk.
"use strict";

const LOOK_MS = 3000;
const question = document.getElementById("question");
const WAITING = `perlhf-waiting:${question.dataset.project}:${question.dataset.labeller}`; // of this project and person alone
const message = document.getElementById("message");
const instructions = document.getElementById("instructions");
const why = document.getElementById("why"); // null where no reward model explains its scores
let explaining = null;
let shownAt = performance.now();
let marked = "";
let sending = false;

const task = () => question.querySelector("article");
const say = (text, problem = false) => {
  message.textContent = text;
  message.classList.toggle("problem", problem);
};

function show(found) {
  question.innerHTML = found.html; // made and escaped by the server's templates
  const progress = document.getElementById("progress"); // none where hidden tests could be told by it
  if (progress) {
    progress.max = found.wanted;
    progress.value = found.done;
  }
  document.getElementById("count").textContent = progress ? `${found.done} of ${found.wanted}` : `${found.done} answered`;
  shownAt = performance.now();
  marked = "";
  window.scrollTo(0, 0);
  question.focus({ preventScroll: true });
}

// The server answers in JSON. Who says something else in its place (a proxy whose server is gone, a page to log in at)
// has stored nothing: what was sent waits.
async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await fetch(path, options);
  const { status } = response;
  const text = await response.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {} // said below
  if (status === 200 ? "html" in content : status === 202 || "problem" in content) return { status, content };
  const plain = (response.headers.get("Content-Type") || "").startsWith("text/plain");
  const problem = plain ? text.slice(0, 200) : `Instead of the server something else answers (${status}).`;
  return { status: status === 200 ? 0 : status, content: { problem, again: status !== 403 } };
}

function lock(on) {
  sending = on;
  for (const button of question.querySelectorAll("button")) button.disabled = on;
}

async function deliver() {
  const waiting = localStorage.getItem(WAITING);
  if (waiting === null || sending) return;
  lock(true);
  let again = false;
  try {
    const { status, content } = await ask("/answer", JSON.parse(waiting));
    if (status === 200) {
      localStorage.removeItem(WAITING);
      say("");
      show(content);
    } else if (content.again) {
      say(`${content.problem} It is kept here and sent again.`, true);
      again = true;
    } else if (status === 403) {
      say(`${content.problem.replace(/\.$/, "")}. Your answer is kept here: open the page anew.`, true);
    } else {
      localStorage.removeItem(WAITING);
      say(`Your answer isn’t stored: ${content.problem.replace(/\.$/, "")}.`, true);
    }
  } catch {
    say("The server can't be reached. Your answer is kept here and sent again.", true);
    again = true;
  } finally {
    lock(false);
  }
  if (again) setTimeout(deliver, 2000);
}

function grades() {
  const found = {};
  for (const group of question.querySelectorAll(".grade")) {
    const chosen = group.querySelector("input:checked");
    if (chosen) found[group.dataset.criterion] = Number(chosen.value);
  }
  return found;
}

function answer(verdict) {
  if (sending || localStorage.getItem(WAITING) !== null) return;
  const missing = question.querySelectorAll(".grade").length - Object.keys(grades()).length;
  if (verdict === "graded" && missing) {
    say(`${missing} grade${missing > 1 ? "s are" : " is"} missing.`, true);
    return;
  }
  const said = {
    task: task().dataset.task,
    key: crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}-${Math.random()}`,
    verdict,
    reason: document.getElementById("reason").value,
    span: marked,
    edit: document.getElementById("edit").value,
    grades: verdict === "graded" ? grades() : {},
    seconds: (performance.now() - shownAt) / 1000,
  };
  localStorage.setItem(WAITING, JSON.stringify(said));
  deliver();
}

async function undo() {
  // The one before it would be taken back, and the question of the one that waits with it.
  if (localStorage.getItem(WAITING) !== null) return say("Your last answer isn’t stored yet.", true);
  if (sending) return;
  lock(true);
  try {
    const { status, content } = await ask("/undo", {});
    if (status === 200) {
      show(content);
      say("Your last answer was taken back.");
    } else say(content.problem, true);
  } catch {
    say("The server can't be reached.", true);
  } finally {
    lock(false);
  }
}

// What moved the score of the last answer. Looking at it is no time of the next question.
async function explain() {
  if (!why || why.open) return;
  if (sending || localStorage.getItem(WAITING) !== null) return say("Your last answer isn’t stored yet.", true);
  const opened = performance.now();
  const asked = {};
  explaining = asked;
  const told = document.getElementById("why-message");
  const place = document.getElementById("why-shown");
  place.replaceChildren();
  told.textContent = "The score is being looked into …";
  why.addEventListener("close", () => { shownAt += performance.now() - opened; }, { once: true });
  why.showModal();
  while (why.open && explaining === asked) {
    let found = { status: 0, content: { problem: "The server can't be reached." } };
    try {
      found = await ask("/why", {});
    } catch {} // said below
    if (explaining !== asked) return;
    if (found.status === 202 || found.content.again) {
      await new Promise((done) => setTimeout(done, found.status === 202 ? 700 : 2000));
      continue;
    }
    told.textContent = found.status === 200 ? "" : found.content.problem;
    if (found.status === 200) place.innerHTML = found.content.html; // made and escaped by the server's templates
    return;
  }
}

function differences() {
  const button = document.getElementById("differences");
  if (!button) return;
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(on));
  for (const view of question.querySelectorAll(".difference-view")) view.hidden = !on;
  for (const view of question.querySelectorAll(".plain-view")) view.hidden = on;
}

function more() {
  const details = document.getElementById("more");
  if (!details) return;
  details.open = true;
  document.getElementById("reason").focus();
}

function grade(digit) {
  const missing = [...question.querySelectorAll(".grade")].find((group) => !group.querySelector("input:checked"));
  const chosen = missing && missing.querySelector(`input[value="${digit}"]`);
  if (chosen) chosen.checked = true;
  return Boolean(chosen);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.verdict) answer(button.dataset.verdict);
  else if (button.dataset.copy !== undefined) document.getElementById("edit").value = button.dataset.copy;
  else if (button.id === "undo") undo();
  else if (button.id === "differences") differences();
  else if (button.id === "show-why") explain();
  else if (button.id === "show-instructions") instructions.showModal();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || event.repeat) return;
  const typing = event.target.closest("textarea, input:not([type=radio])");
  if (typing) {
    if (event.key === "Escape") question.focus();
    return;
  }
  if (event.key === "Enter" && event.target.closest("button, summary, a")) return;
  if (event.key.startsWith("Arrow") && event.target.closest("input, .conversation")) return;
  if (event.key === "i" || event.key === "?") instructions.showModal();
  else if (event.key === "w") explain();
  else if (event.key === "u") undo();
  else if (event.key === "d") differences();
  else if (event.key === "e") more();
  else if (/^[1-5]$/.test(event.key) && question.querySelector(".grade")) grade(event.key);
  else {
    const pressed = [...question.querySelectorAll("[data-keys]")].find((b) => b.dataset.keys.split(" ").includes(event.key));
    if (!pressed) return;
    answer(pressed.dataset.verdict);
  }
  event.preventDefault();
});

// The browser tells of a new selection a moment later, when it may be gone: it is looked at before each key, too.
function mark() {
  const selection = document.getSelection();
  const inside = selection.anchorNode && selection.anchorNode.parentElement && selection.anchorNode.parentElement.closest(".answer");
  const text = selection.toString().trim();
  if (!inside || !text) return;
  marked = text.slice(0, 20000);
  const place = document.getElementById("span");
  if (place) place.textContent = `“${marked.slice(0, 200)}”`;
}

document.addEventListener("selectionchange", mark);
document.addEventListener("keydown", mark, true);
document.addEventListener("pointerdown", mark, true);

// Questions may come while somebody has none: of a loop's next round, or of answers that runs still give.
async function look() {
  const idle = () => !sending && !document.hidden && !document.querySelector("dialog[open]") && question.querySelector(".done");
  if (!idle()) return;
  try {
    const { status, content } = await ask("/next");
    if (status === 200 && content.asked && idle()) show(content);
  } catch {} // it looks again
}

setInterval(look, LOOK_MS);
deliver();
