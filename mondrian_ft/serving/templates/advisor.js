const GONE = "The service does not answer; it may have been stopped.";
const NAMES = { base: "The base model", fine_tuned: "The tuned model" };
let chosen = null; // the photograph
let asking = null; // what stops the answers that are under way

// -- the photograph
function take(file) {
  if (!file) return;
  const most = Number($("file").dataset.most);
  if (file.size > most) {
    tell(`${file.name} has ${file.size.toLocaleString()} bytes; at most ${most.toLocaleString()} are taken.`, true);
    return;
  }
  chosen = file;
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    $("photo").src = reader.result;
    $("photo").alt = `Photograph ${file.name}`;
    $("photo").hidden = false;
    $("drop").classList.add("filled");
  });
  reader.readAsDataURL(file);
  $("caption").textContent = file.name;
  $("caption").hidden = false;
  tell("");
}

$("file").addEventListener("change", () => take($("file").files[0]));
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

// -- asking
function headers() {
  const token = $("token").value || sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function refusal(answer) {
  if (answer.status === 401) {
    $("token-field").hidden = false;
    sessionStorage.removeItem("token");
  }
  const content = await answer.json().catch(() => ({ error: `The service answered ${answer.status}.` }));
  return new Error(content.error);
}

/** Calls told(name, content) for each server-sent event of an answer. */
async function readEvents(answer, told) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (.*)\ndata: (.*)$/);
      told(name, JSON.parse(data));
    }
  }
}

async function askFor(mode, signal) {
  const form = new FormData();
  form.append("image", chosen, "photograph");
  form.append("advisor", $("advisor").value);
  if (mode) form.append("mode", mode);
  const shownAs = open(mode);
  try {
    const answer = await fetch("/analyze_stream", { method: "POST", body: form, headers: headers(), signal }).catch(
      (error) => {
        throw error.name === "AbortError" ? error : new Error(GONE);
      },
    );
    if (!answer.ok) throw await refusal(answer);
    if ($("token").value) sessionStorage.setItem("token", $("token").value);
    let ended = false;
    await readEvents(answer, (name, content) => {
      if (name === "piece") more(shownAs, content.text);
      if (name === "answer") show(shownAs, content);
      if (name === "error") fail(shownAs, content);
      ended ||= name === "answer" || name === "error";
    });
    if (!ended) throw new Error(GONE);
  } catch (error) {
    if (error.name === "AbortError") fail(shownAs, { error: "Stopped." });
    else fail(shownAs, { error: error.message });
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (asking) return;
  if (!chosen) return tell("Choose a photograph first.", true);
  const modes = $("compare").checked ? ["base", "fine_tuned"] : [null];
  asking = new AbortController();
  $("answers").replaceChildren();
  // A button that is really disabled would lose the keyboard's focus.
  $("go").setAttribute("aria-disabled", "true");
  $("stop").hidden = false;
  tell("Asking…");
  Promise.all(modes.map((mode) => askFor(mode, asking.signal))).then(() => {
    asking = null;
    $("go").removeAttribute("aria-disabled");
    if (document.activeElement === $("stop")) $("go").focus();
    $("stop").hidden = true;
    const wrong = document.querySelectorAll(".failed").length;
    tell(wrong ? "" : modes.length > 1 ? "Both critiques are complete." : "The critique is complete.");
  });
});
$("stop").addEventListener("click", () => asking?.abort());

// -- an answer
function open(mode) {
  const made = $("answer").content.firstElementChild.cloneNode(true);
  made.querySelector("h2").textContent = mode ? NAMES[mode] : $("advisor").selectedOptions[0].textContent;
  made.querySelector(".body").append(element("pre", "coming"));
  $("answers").append(made);
  return made;
}

/** What is there of a critique so far; the text itself while nothing of it can be read. */
function more(article, text) {
  article.dataset.text = (article.dataset.text ?? "") + text;
  const critique = soFar(article.dataset.text);
  if (critique) article.querySelector(".body").replaceChildren(...parts(critique));
  else if (article.querySelector(".coming")) article.querySelector(".coming").textContent = article.dataset.text;
}

/** The object in the beginning of a JSON text, or null where it breaks off in an awkward place. */
function soFar(text) {
  const open = [];
  let quoted = false;
  for (let place = 0; place < text.length; place += 1) {
    const letter = text[place];
    if (quoted) {
      if (letter === "\\") place += 1;
      else if (letter === '"') quoted = false;
    } else if (letter === '"') quoted = true;
    else if (letter === "{") open.unshift("}");
    else if (letter === "[") open.unshift("]");
    else if (letter === "}" || letter === "]") open.shift();
  }
  try {
    const found = JSON.parse((quoted ? `${text}"` : text.replace(/[,\s]+$/, "")) + open.join(""));
    return found && typeof found === "object" ? found : null;
  } catch {
    return null;
  }
}

function tuned(used) {
  return used.endsWith("fine_tuned");
}

function who(article, answer) {
  const line = article.querySelector(".who");
  const adapter = answer.adapter;
  article.classList.add(tuned(answer.model_used) ? "tuned" : "base");
  line.textContent = "";
  line.append(tuned(answer.model_used) ? "tuned" : "base", ` · ${answer.model}`);
  if (adapter) {
    line.append(adapter.version ? ` · adapter ${adapter.version} ` : " · adapter ");
    const hash = element("code", "", adapter.hash.slice(0, 12));
    hash.title = adapter.hash;
    line.append(hash);
  }
  line.append(` · ${shown(answer.seconds.service)} s`);
  if (answer.model_used.startsWith("ab_test")) line.append(" · part of a test");
}

function fail(article, answer) {
  if (answer.model) who(article, answer);
  const body = article.querySelector(".body");
  const raw = answer.raw ?? article.dataset.text;
  body.replaceChildren(element("p", "failed", answer.error));
  if (raw) body.append(element("pre", "", raw));
  tell("");
}

function show(article, answer) {
  who(article, answer);
  const details = element("details");
  details.append(element("summary", "", "The model’s own text"), element("pre", "", answer.raw));
  article.querySelector(".body").replaceChildren(...parts(answer.analysis), details);
  votable(article, answer.answer_id);
}

/** A critique, or what is there of one. */
function parts(critique) {
  const made = [];
  if (typeof critique.overall_score === "number") {
    const overall = element("p", "overall", shown(critique.overall_score));
    overall.append(element("small", "", "of 10 overall"));
    made.push(overall);
  }
  if (critique.image_description) made.push(element("p", "description", critique.image_description));
  made.push(...(critique.dimensions ?? []).filter((one) => one.name).map(dimension));
  made.push(...list("Strengths", critique.key_strengths));
  made.push(...list("To improve first", critique.priority_improvements));
  if (critique.technical_notes?.trim()) {
    made.push(element("h4", "", "Technical notes"), element("p", "notes", critique.technical_notes));
  }
  return made;
}

function dimension(one) {
  const made = element("div", "dimension");
  const title = element("h3", "", one.name);
  made.append(title);
  if (typeof one.score !== "number") return made;
  title.append(element("output", "", `${shown(one.score)} / 10`));
  const bar = element("div", "bar");
  bar.setAttribute("role", "meter");
  bar.setAttribute("aria-label", one.name);
  bar.setAttribute("aria-valuemin", 0);
  bar.setAttribute("aria-valuemax", 10);
  bar.setAttribute("aria-valuenow", one.score);
  const filled = element("i");
  filled.style.width = `${one.score * 10}%`;
  bar.append(filled);
  made.append(bar);
  for (const text of [one.comment, one.recommendation]) if (text) made.append(element("p", "", text));
  return made;
}

function list(title, texts) {
  if (!texts?.length) return [];
  const items = element("ul");
  items.append(...texts.map((text) => element("li", "", text)));
  return [element("h4", "", title), items];
}

// -- votes
function votable(article, answerId) {
  const footer = article.querySelector("footer");
  const buttons = [...footer.querySelectorAll(".vote")];
  const said = footer.querySelector(".kept");
  footer.hidden = false;
  for (const button of buttons) {
    button.addEventListener("click", async () => {
      const again = button.getAttribute("aria-pressed") === "true";
      const vote = again ? "none" : button.dataset.vote;
      try {
        const body = JSON.stringify({ answer_id: answerId, vote });
        const options = { method: "POST", body, headers: { "Content-Type": "application/json", ...headers() } };
        const answer = await fetch("/preference", options).catch(() => {
          throw new Error(GONE);
        });
        if (!answer.ok) throw await refusal(answer);
        for (const one of buttons) one.setAttribute("aria-pressed", String(!again && one === button));
        said.textContent = again ? "Taken back." : "Kept, thank you.";
      } catch (error) {
        said.textContent = error.message;
      }
    });
  }
}

// -- whether the model is ready
async function watch() {
  const answer = await fetch("/health").catch(() => null);
  if (!answer) return tell(GONE, true);
  const health = await answer.json();
  if (health.status === "loading") {
    tell(`The model is loading: ${health.stage}, ${Math.round(health.progress * 100)} %.`);
    setTimeout(watch, 500);
  } else if (health.status === "ready") tell("");
  else tell(`The model does not answer: ${health.reason}`, true);
}

$("format").remove(); // Only without JavaScript is the answer a page of its own.
watch();
