"use strict";
// What the pages share. Whatever a model or a database wrote is put on a page with textContent or
// value, never as HTML. A page names GONE: what to do when the server does not answer.

const $ = (id) => document.getElementById(id);
const shown = (score) => String(Math.round(score * 100) / 100);
let queue = Promise.resolve(); // what was asked for and is not done yet

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tell(sentence, wrong = false) {
  $("status").textContent = sentence;
  $("status").classList.toggle("wrong", wrong);
}

/** Does one thing after the other, however fast the keys come. */
function soon(act) {
  queue = queue.then(act).catch((error) => tell(error.message, true));
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body) };
  const answer = await fetch(path, options).catch(() => {
    throw new Error(GONE);
  });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}
