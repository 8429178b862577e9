// A conversation with streamed answers, and what is said about them. Feedback has a key of its own, so that what is sent
// twice is stored once; it stays in the browser's storage until the server has said that it is on the disk.
"use strict";

const KEPT = "perlhf-chat", OWN = "perlhf-chat-settings", WAITING = "perlhf-chat-waiting";
const at = (id) => document.getElementById(id);
const talk = at("talk"), turnsAt = at("turns"), text = at("text"), message = at("message"), why = at("why");
const newKey = () => (crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}-${Math.random()}`);
const asksFeedback = document.body.dataset.feedback === "1";
let conversation = newKey(), turns = []; // {role, text} and of an answer: id, index, model, asked (the messages), whole, thumb, judged, seen
let answering = null; // an AbortController while an answer is being written
let choosing = null; // what waits for a choice between two answers
let rewards = [];
let delivering = false;

const say = (said, problem = false) => {
  message.textContent = said;
  message.classList.toggle("problem", problem);
};
const clone = (id) => at(id).content.firstElementChild.cloneNode(true);

// What is kept in the browser: the conversation until the tab is closed, settings and unsent feedback for longer.

function stored(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function store(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {} // full, or not allowed: it lasts as long as the page
}

const keep = () => store(sessionStorage, KEPT, { conversation, turns, draft: text.value });
const SETTINGS = ["system", "temperature", "longest", "name", "model", "other", "twice", "reward"];

function keepSettings() {
  const own = {};
  for (const id of SETTINGS) if (at(id)) own[id] = id === "twice" ? at(id).checked : at(id).value;
  store(localStorage, OWN, own);
  document.body.classList.toggle("twice", at("twice").checked);
}

function restoreSettings() {
  const own = stored(localStorage, OWN, {});
  for (const id of SETTINGS) {
    if (!at(id) || own[id] === undefined) continue;
    if (id === "twice") at(id).checked = own[id] === true;
    else at(id).value = own[id];
  }
  for (const id of ["model", "other", "reward"]) if (at(id).selectedIndex < 0) at(id).selectedIndex = 0;
  document.body.classList.toggle("twice", at("twice").checked);
}

// Requests

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers };
  return fetch(path, { ...options, signal });
}

async function problemOf(response) {
  let said = "";
  try {
    said = await response.text();
    const content = JSON.parse(said);
    said = content.error?.message || content.problem || content.detail || said;
  } catch {
    if (said.trimStart().startsWith("<")) said = ""; // a page that something else sent in the server's place
  }
  said = String(said).slice(0, 400);
  if (response.status === 401) return "The server wants its token again: load the page anew, nothing is lost.";
  if (response.status === 429) return `The server is busy: too many wait. ${said}`;
  if (response.status === 503) return `The server can't answer now. ${said}`;
  return said || `The server said ${response.status}.`;
}

async function json(path, body) {
  const response = await ask(path, body);
  if (!response.ok) throw new Error(await problemOf(response));
  return response.json();
}

async function loadModels() {
  try {
    const found = (await json("/v1/models")).data;
    rewards = found.filter((model) => model.stage === "reward").map((model) => model.id);
    const worth = ["policy", "sft", "base"]; // what was trained most is offered first
    const chats = found.filter((model) => model.stage !== "reward").sort((a, b) => worth.indexOf(a.stage) - worth.indexOf(b.stage)).map((model) => model.id);
    for (const [id, names] of [["model", chats], ["other", chats], ["reward", rewards]]) {
      at(id).replaceChildren(...names.map((name) => new Option(name, name)));
    }
    at("reward-choice").hidden = rewards.length < 2;
    if (!chats.length) say("The server has no model that answers.", true);
  } catch (error) {
    say(error instanceof TypeError ? "The server can't be reached." : error.message, true);
  }
  restoreSettings();
  for (const element of document.querySelectorAll(".score")) element.hidden = !rewards.length;
}

// One answer as it is written. It is whole where the server said how it ended.

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let begun = "";
  for (;;) {
    const { done, value } = await reader.read();
    begun += value ?? "";
    const parts = begun.split(/\r?\n\r?\n/);
    begun = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}

async function write(asked, model, place, signal) {
  const answer = { role: "assistant", text: "", id: "", index: 0, model, asked, whole: false, problem: "" };
  const body = { model, messages: asked, stream: true };
  if (at("temperature").value !== "") body.temperature = Number(at("temperature").value);
  if (at("longest").value !== "") body.max_tokens = Number(at("longest").value);
  place.textContent = "";
  place.classList.add("plain");
  place.setAttribute("aria-busy", "true");
  try {
    const response = await ask("/v1/chat/completions", body, signal);
    if (!response.ok) answer.problem = await problemOf(response);
    else {
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message || "The server stopped.");
        answer.id = chunk.id ?? answer.id;
        answer.by = chunk.system_fingerprint ?? model; // with its version
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        answer.index = choice.index ?? 0;
        if (choice.delta?.content) {
          const below = document.documentElement.scrollHeight - window.scrollY - window.innerHeight < 120;
          answer.text += choice.delta.content;
          place.append(choice.delta.content);
          if (below) window.scrollTo(0, document.documentElement.scrollHeight);
        }
        if (choice.finish_reason) answer.whole = true;
      }
      if (!answer.whole) answer.problem = "The answer broke off: the connection was lost.";
    }
  } catch (error) {
    if (signal.aborted) answer.problem = "Stopped.";
    else if (error instanceof TypeError) answer.problem = answer.text ? "The answer broke off: the connection was lost." : "The server can't be reached.";
    else answer.problem = `The answer broke off: ${error.message}`;
  } finally {
    place.removeAttribute("aria-busy");
  }
  return answer;
}

async function render(places) {
  const shown = places.filter(([, written]) => written);
  if (!shown.length) return;
  try {
    const { html } = await json("/chat/render", { texts: shown.map(([, written]) => written) });
    shown.forEach(([place], number) => {
      place.innerHTML = html[number]; // made and escaped by the server
      place.classList.remove("plain");
    });
  } catch {} // the text stays as it came
}

// The conversation

function messagesBefore(number) {
  const system = at("system").value.trim();
  const said = turns.slice(0, number).map((turn) => ({ role: turn.role, content: turn.text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function add(element) {
  at("empty").hidden = true;
  turnsAt.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function addUser(said) {
  const element = add(clone("of-user"));
  element.querySelector(".text").textContent = said;
  return element;
}

const answered = (number) => turnsAt.querySelector(`.answered[data-turn="${number}"]`);

function addAnswer(number) {
  const element = add(clone("of-assistant"));
  element.dataset.turn = number;
  return element;
}

// What an answer's element shows of its turn: who wrote it, what was said of it, what may be asked.
function show(number) {
  const turn = turns[number], element = answered(number);
  if (!element) return;
  const last = number === turns.length - 1;
  element.querySelector(".who").textContent = turn.model;
  const broken = element.querySelector(".broken");
  broken.hidden = !turn.problem;
  broken.firstElementChild.textContent = turn.problem || "";
  broken.querySelector(".retry").hidden = !last;
  element.querySelector(".opinion").hidden = !turn.whole;
  element.querySelector(".thumbs").hidden = element.querySelector(".more").hidden = !asksFeedback;
  for (const thumb of element.querySelectorAll(".thumb")) {
    thumb.setAttribute("aria-pressed", String(turn.thumb === thumb.dataset.thumb));
    thumb.disabled = Boolean(turn.seen);
  }
  const pass = element.querySelector(".pass");
  pass.hidden = Boolean(turn.judged) || !rewards.length;
  const score = element.querySelector(".score");
  score.hidden = !rewards.length;
  score.setAttribute("aria-disabled", String(asksFeedback && !turn.judged));
  score.title = asksFeedback && !turn.judged ? "After your opinion: a score before it would sway you." : "";
}

function busy(on) {
  answering = on ? new AbortController() : null;
  at("send").hidden = on;
  at("stop").hidden = !on;
  talk.setAttribute("aria-busy", String(on));
}

function giveBack(said) {
  text.value = text.value.trim() ? `${said}\n\n${text.value}` : said;
  grow();
}

function send() {
  const said = text.value;
  if (answering || !said.trim()) return;
  if (choosing) return say("Choose one of the two answers first.", true);
  text.value = "";
  grow();
  converse(said);
}

async function converse(said) {
  const here = turns, number = turns.length;
  for (const retry of turnsAt.querySelectorAll(".retry")) retry.hidden = true;
  turns.push({ role: "user", text: said });
  const element = addUser(said);
  keep();
  busy(true);
  if (at("model").selectedIndex < 0) await loadModels();
  const { signal } = answering;
  const went = at("model").selectedIndex >= 0 && (await (at("twice").checked ? answerTwice(signal) : answerOnce(signal)));
  busy(false);
  if (turns !== here) return; // a new conversation has begun
  if (!went) { // nothing came: what was typed goes back
    turns.length = number;
    element.remove();
    giveBack(said);
  }
  keep();
}

async function answerOnce(signal) {
  const here = turns, number = turns.length, element = addAnswer(number), place = element.querySelector(".text");
  say("An answer is being written.");
  const answer = await write(messagesBefore(number), at("model").value, place, signal);
  if (turns !== here) return true;
  if (!answer.text && !answer.whole) {
    element.remove();
    say(`${answer.problem} Your message is kept.`, answer.problem !== "Stopped.");
    return false;
  }
  turns.push(answer);
  show(number);
  say(answer.problem || "The answer is complete.", Boolean(answer.problem) && answer.problem !== "Stopped.");
  // Not waited for: an answer that is shown can be asked for again, or be followed, at once.
  render([[place, answer.text]]).then(() => number === turns.length - 1 && element.scrollIntoView({ block: "end" }));
  return true;
}

// Two answers side by side: who wrote which is told after the choice, and is nowhere in the page before.
async function answerTwice(signal) {
  const here = turns, number = turns.length, asked = messagesBefore(number), element = add(clone("of-two"));
  const models = [at("model").value, at("other").value];
  if (Math.random() < 0.5) models.reverse();
  const places = [...element.querySelectorAll(".text")];
  say("Two answers are being written.");
  const both = await Promise.all(models.map((model, side) => write(asked, model, places[side], signal)));
  if (turns !== here) return true;
  both.forEach((answer, side) => {
    const broken = element.querySelectorAll(".broken")[side];
    broken.hidden = !answer.problem;
    broken.textContent = answer.problem;
  });
  await render(both.map((answer, side) => [places[side], answer.text]));
  const whole = both.filter((answer) => answer.whole);
  const same = whole.length === 2 && both[0].text === both[1].text;
  if (whole.length === 2 && !same && asksFeedback) {
    choosing = { number, element, both };
    element.querySelector(".verdicts").hidden = false;
    element.scrollIntoView({ block: "end" });
    say("Both answers are complete. Which is better?");
    if (!text.value) element.focus({ preventScroll: true }); // on neither side
    return true;
  }
  const kept = whole[0] ?? both.find((answer) => answer.text);
  if (!kept) {
    element.remove();
    const problem = both.map((answer) => answer.problem).find((said) => said !== "Stopped.") ?? "Stopped.";
    say(`${problem} Your message is kept.`, problem !== "Stopped.");
    return false;
  }
  goOn(number, element, both, both.indexOf(kept));
  say(same ? "Both answers are the same: there is nothing to choose." : whole.length === 2 ? "The conversation goes on with the left one." : "One of the two answers isn't whole, so that there is nothing to choose.");
  return true;
}

function choose(verdict) {
  const { number, element, both } = choosing;
  choosing = null;
  element.querySelector(".verdicts").hidden = true;
  const side = verdict === "second" ? 1 : 0;
  const [first, second] = both.map((answer) => ({ id: answer.id, index: answer.index }));
  const inFull = both.map((answer) => ({ messages: answer.asked, answer: answer.text, model: answer.by }));
  goOn(number, element, both, side, true);
  const said = { equal: "About equal", both_bad: "Both bad" }[verdict];
  const how = `${said ? `${said}: the` : "The"} conversation goes on with the ${side ? "right" : "left"} one.`;
  say(how);
  tell(number, { first, second, verdict }, { first: inFull[0], second: inFull[1], verdict });
  text.focus();
}

// The conversation goes on with one of two answers; the other can still be read, and who wrote them is told.
function goOn(number, element, both, side, judged = false) {
  element.querySelectorAll("h4").forEach((head, other) => {
    head.textContent = `${other ? "Right" : "Left"}: ${both[other].model}${other === side ? ", goes on" : ""}`;
  });
  element.querySelectorAll(".answer")[side].classList.add("chosen");
  turns.push({ ...both[side], judged });
  const one = addAnswer(number);
  one.classList.add("after-two");
  one.querySelector(".text").remove();
  show(number);
  one.scrollIntoView({ block: "end" });
  keep();
}

function retry(number) {
  if (answering || number !== turns.length - 1) return;
  const [{ text: said }] = turns.splice(number - 1);
  answered(number).remove();
  if (turnsAt.lastElementChild.classList.contains("two-answers")) turnsAt.lastElementChild.remove();
  turnsAt.lastElementChild.remove();
  converse(said);
}

async function restore() {
  const kept = stored(sessionStorage, KEPT, { turns: [], draft: "" });
  text.value ||= kept.draft ?? "";
  turns = Array.isArray(kept.turns) ? kept.turns : [];
  conversation = kept.conversation ?? conversation;
  if (turns.at(-1)?.role === "user") giveBack(turns.pop().text); // its answer never came
  const places = [];
  turns.forEach((turn, number) => {
    if (turn.role === "user") return addUser(turn.text);
    const place = addAnswer(number).querySelector(".text");
    place.textContent = turn.text;
    places.push([place, turn.text]);
    show(number);
  });
  grow();
  await render(places);
}

function startAnew() {
  answering?.abort();
  choosing = null;
  conversation = newKey();
  turns = [];
  turnsAt.replaceChildren();
  at("empty").hidden = false;
  keep();
  say("A new conversation.");
  text.focus();
}

// What is said about answers

function tell(number, body, inFull) {
  const name = at("name")?.value.trim();
  const waiting = stored(localStorage, WAITING, []);
  const own = { key: newKey(), ...(name ? { user: name } : {}) };
  waiting.push({ conversation, number, body: { ...body, ...own }, inFull: { ...inFull, ...own } });
  store(localStorage, WAITING, waiting);
  noted(number, "");
  deliver();
}

function tellOf(number, said) {
  const { id, index, asked, text: answer, by: model } = turns[number];
  turns[number].judged = true;
  tell(number, { id, index, ...said }, { messages: asked, answer, model, ...said });
  show(number);
  keep();
}

const noted = (number, said, problem = false, of = conversation) => {
  if (of !== conversation) return;
  const place = answered(number)?.querySelector(".stored");
  if (!place) return;
  place.textContent = said;
  place.classList.toggle("problem", problem);
};

async function deliver() {
  if (delivering) return;
  delivering = true;
  let kept = "";
  for (;;) {
    const [one] = stored(localStorage, WAITING, []);
    if (!one) break;
    try {
      let response = await ask("/v1/feedback", one.body);
      // An answer that the server has forgotten is given in full.
      if (response.status === 400 || response.status === 404) response = await ask("/v1/feedback", one.inFull);
      const content = await response.clone().json().catch(() => ({}));
      if (content.stored) noted(one.number, "Stored.", false, one.conversation);
      // Who answers neither that it is stored nor why not isn't the server: a proxy, or a page to log in at.
      else if (response.status === 429 || response.status >= 500 || response.status === 401 || !content.error) {
        kept = await problemOf(response);
        break;
      } else {
        const problem = await problemOf(response);
        noted(one.number, `Not stored: ${problem}`, true, one.conversation);
        say(`Not stored: ${problem}`, true);
      }
    } catch {
      kept = "The server can't be reached.";
      break;
    }
    store(localStorage, WAITING, stored(localStorage, WAITING, []).filter(({ body }) => body.key !== one.body.key));
  }
  delivering = false;
  const unsent = stored(localStorage, WAITING, []), left = unsent.length;
  for (const one of unsent) noted(one.number, "Not stored yet.", true, one.conversation);
  at("waiting").hidden = !kept;
  at("waiting-text").textContent = kept ? `${kept} ${left === 1 ? "What you said is" : `${left} things that you said are`} kept here and sent again.` : "";
  if (kept) setTimeout(deliver, 5000);
}

function better(element, number, open) {
  const form = element.querySelector(".better");
  form.hidden = !open;
  element.querySelector(".more").setAttribute("aria-expanded", String(open));
  element.querySelector(open ? ".reason" : ".more").focus();
}

function storeBetter(element, number) {
  const reason = element.querySelector(".reason").value.trim(), edit = element.querySelector(".edit").value;
  const { thumb } = turns[number];
  if (!thumb && !edit.trim()) return noted(number, "A reason goes with a thumb, or with a better answer.", true);
  tellOf(number, { ...(thumb ? { thumb } : {}), ...(edit.trim() ? { edit } : {}), ...(reason ? { reason } : {}) });
  better(element, number, false);
}

// Never before the person has judged: a model's opinion before an answer would make the labels its echo.
async function score(number) {
  const turn = turns[number];
  if (asksFeedback && !turn.judged) return say("Say first what you think of the answer, or that you have no opinion.");
  const told = at("why-message"), place = at("why-shown"), model = at("reward").value || rewards[0];
  place.replaceChildren();
  told.textContent = "The score is being looked into …";
  why.showModal();
  try {
    const messages = [...turn.asked, { role: "assistant", content: turn.text }];
    const { score: mean, spread, members, explanation } = (await json("/v1/score", { model, messages, explain: true })).data[0];
    const models = Object.values(members).flat().length;
    turn.seen = true; // what was said of it stays
    show(number);
    keep();
    const shown = await json("/chat/why", { explanations: [explanation ?? null], models });
    place.innerHTML = shown.html; // made and escaped by the server
    told.textContent = `${model}: ${mean.toFixed(2)}${models > 1 ? `, its ${models} members ${spread.toFixed(2)} apart` : ""}`;
  } catch (error) {
    told.textContent = error instanceof TypeError ? "The score can't be asked for: the server can't be reached." : error.message;
  }
}

// Keys and clicks

function grow() {
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const element = button.closest(".answered"), number = element ? Number(element.dataset.turn) : -1;
  const is = (name) => button.classList.contains(name);
  if (button.dataset.verdict) choose(button.dataset.verdict);
  else if (button.dataset.thumb) {
    turns[number].thumb = button.dataset.thumb;
    tellOf(number, { thumb: button.dataset.thumb });
  } else if (is("pass")) {
    turns[number].judged = true;
    show(number);
    noted(number, "Nothing is stored.");
    element.querySelector(".score").focus();
    keep();
  } else if (is("more")) better(element, number, element.querySelector(".better").hidden);
  else if (is("cancel")) better(element, number, false);
  else if (is("copy")) element.querySelector(".edit").value = turns[number].text;
  else if (is("score")) score(number);
  else if (is("retry")) retry(number);
  else if (button.id === "stop") answering?.abort();
  else if (button.id === "new") startAnew();
  else if (button.id === "deliver") deliver();
  else if (button.id === "show-settings") at("settings").showModal();
});

document.addEventListener("submit", (event) => {
  const element = event.target.closest(".answered");
  if (event.target.method === "dialog") return;
  event.preventDefault();
  if (element) storeBetter(element, Number(element.dataset.turn));
  else send();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") return answering?.abort();
  if (event.target === text) {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    return send();
  }
  if (!choosing || event.repeat || event.target.closest("textarea, input, select")) return;
  const pressed = [...choosing.element.querySelectorAll("[data-keys]")].find((b) => b.dataset.keys.split(" ").includes(event.key));
  if (!pressed) return;
  event.preventDefault();
  choose(pressed.dataset.verdict);
});

text.addEventListener("input", () => {
  grow();
  keep();
});
at("settings").addEventListener("close", () => {
  keepSettings();
  if (!at("model").options.length) loadModels();
  deliver();
});
for (const id of ["model", "other", "twice", "reward"]) at(id).addEventListener("change", keepSettings);

restoreSettings();
loadModels().then(restore).then(deliver);
