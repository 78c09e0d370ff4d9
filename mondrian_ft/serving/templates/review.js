const GONE = "The server does not answer; start task=review again on the same port. " +
  "What was typed here is kept while this page stays open.";
const copy = (value) => JSON.parse(JSON.stringify(value));
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const SAID = { accept: "Accepted", correct: "Corrected", reject: "Rejected" };

let rows = []; // every row in short, by index
let at = -1; // the row that is shown
let row = null; // it, whole
let now = null; // its critique as it stands in the fields
const drafts = new Map(); // unsaved critiques of rows, by index
const decided = []; // rows in the order they were decided here

// -- the list
const filter = () => document.querySelector("[name=filter]:checked").value;
const FITS = {
  all: () => true,
  flagged: (one) => one.flags.length > 0,
  undecided: (one) => !one.decision,
};

function showCounts(counts) {
  for (const name of ["all", "flagged", "undecided"]) {
    $("n-" + name).textContent = rows.filter(FITS[name]).length;
  }
  $("counts").textContent =
    `${counts.accept} accepted, ${counts.correct} corrected, ${counts.reject} rejected`;
  const done = counts.all - counts.left;
  $("ticks").setAttribute("aria-valuemax", counts.all);
  $("ticks").setAttribute("aria-valuenow", done);
  $("ticks").setAttribute("aria-valuetext", `${done} of ${counts.all} decided`);
}

function showTicks() {
  const ticks = $("ticks");
  if (!ticks.children.length) ticks.append(...rows.map(() => element("i")));
  rows.forEach((one, index) => {
    ticks.children[index].className = (one.decision || "") + (index === at ? " here" : "");
  });
  $("place").textContent = `${at + 1} of ${rows.length}`;
}

/** The nearest row of the chosen kind in a direction, or -1; undecided ones all round. */
function neighbour(step) {
  const fits = FITS[filter()];
  for (let index = at + step; index >= 0 && index < rows.length; index += step) {
    if (fits(rows[index])) return index;
  }
  return filter() === "undecided" ? rows.findIndex((one, index) => fits(one) && index !== at) : -1;
}

async function move(step, said = "") {
  const index = neighbour(step);
  if (index >= 0) return go(index, said);
  tell(`${said} This is the ${step > 0 ? "last" : "first"} row of this list.`.trim());
}

async function go(index, said = "") {
  const found = await ask(`/api/rows/${index}`);
  at = index;
  history.replaceState(null, "", `#${index + 1}`);
  show(found);
  tell(said);
  window.scrollTo(0, 0);
  const after = rows[neighbour(1)]; // its photograph is loaded ahead
  if (after) new Image().src = `/photographs/${after.image_sha256}`;
}

// -- one row
const saved = () => row.corrected || row.critique;
const changed = () => Boolean(row && row.critique) && !same(now, saved());

function show(found) {
  row = found;
  if (document.activeElement.closest("form")) document.activeElement.blur();
  now = drafts.get(at) || copy(saved());
  enlarge(false);
  $("missing").hidden = true;
  $("zoom").hidden = false;
  $("photo").src = `/photographs/${row.image_sha256}`;
  $("photo").alt = `Photograph ${row.file}`;
  $("file").textContent = row.file;
  $("job").textContent = `${row.advisor} · ${row.job_id}`;
  $("stale").textContent = row.stale;
  $("stale").hidden = !row.stale;
  $("remark").value = row.remark;
  $("flags").replaceChildren(...row.flags.map((flag) => {
    const item = element("li", flag.grave ? "grave" : "");
    const title = flag.title[0].toUpperCase() + flag.title.slice(1);
    item.append(element("b", "", `${title}.`), element("span", "", flag.explanation));
    return item;
  }));
  showFields();
  showState();
  showTicks();
}

function showState() {
  const what = $("decision");
  what.textContent = SAID[row.decision] || "Undecided";
  what.className = row.decision || "";
  const unsaved = changed();
  unsaved ? drafts.set(at, now) : drafts.delete(at);
  $("unsaved").hidden = $("discard").hidden = !unsaved;
  $("correct").disabled = !unsaved;
  $("accept").disabled = unsaved || !row.critique;
}

function showFields() {
  const fields = $("fields");
  fields.replaceChildren();
  if (!row.critique) {
    fields.append(element("p", "note", `This row has no critique to correct. ${row.problem}`));
    fields.append(element("pre", "", row.text));
    return;
  }
  fields.append(text("Description", [], "image_description"));
  row.critique.dimensions.forEach((dimension, place) => {
    const path = ["dimensions", place];
    const box = score(String(place + 1), dimension.name, path, "score", 0.5);
    box.append(text("Comment", path, "comment"), text("Recommendation", path, "recommendation"));
    fields.append(box);
  });
  const overall = score("0", "Overall", [], "overall_score", 0.1);
  overall.classList.add("overall");
  const mean = element("button", "", "Set to the mean of the dimensions");
  Object.assign(mean, { type: "button", id: "mean", onclick: setMean, ariaKeyShortcuts: "m" });
  overall.firstChild.append(mean);
  fields.append(overall, text("Key strengths, one a line", [], "key_strengths"));
  fields.append(text("Priority improvements, one a line", [], "priority_improvements"));
  fields.append(text("Technical notes", [], "technical_notes"));
}

const holder = (critique, path) => path.reduce((value, key) => value[key], critique);

/** A slider with a tick at the score as it is stored; scores that lie between steps stay so. */
function score(key, name, path, field, step) {
  const stored = holder(row.critique, path)[field];
  const box = element("section", "score");
  const line = element("div");
  const slide = element("span", "slide");
  const input = element("input");
  const output = element("output");
  const place = (value) => `calc(8px + (100% - 16px) * ${value / 10})`;
  Object.assign(input, { type: "range", min: 0, max: 10, step: "any", ariaLabel: name });
  input.dataset.key = key;
  const tick = element("i");
  tick.style.left = place(stored);
  const draw = () => {
    const value = holder(now, path)[field];
    input.value = value;
    input.ariaValueText = shown(value) + (value === stored ? "" : `, stored as ${shown(stored)}`);
    slide.style.setProperty("--at", place(value));
    output.replaceChildren(shown(value));
    if (value !== stored) output.prepend(element("small", "", shown(stored)));
    box.classList.toggle("changed", value !== stored);
  };
  input.setScore = (value) => {
    const snapped = Math.round(Math.min(10, Math.max(0, value)) / step) * step;
    holder(now, path)[field] = Math.round(snapped * 100) / 100;
    draw();
    showState();
  };
  // A step from between two steps goes to the next one, not past it.
  input.nudge = (way) => {
    const steps = holder(now, path)[field] / step;
    const whole = way > 0 ? Math.floor(steps + 1e-6) + 1 : Math.ceil(steps - 1e-6) - 1;
    input.setScore(whole * step);
  };
  input.addEventListener("input", () => input.setScore(Number(input.value)));
  slide.append(tick, input);
  line.append(element("kbd", "", key), element("b", "", name), slide, output);
  box.append(line);
  draw();
  return box;
}

function text(label, path, field) {
  const box = element("label", "text");
  const area = element("textarea");
  const stored = holder(row.critique, path)[field];
  const isList = ["key_strengths", "priority_improvements"].includes(field);
  const value = holder(now, path)[field];
  area.rows = 1;
  area.value = (isList ? (value || []).join("\n") : value) || "";
  if (stored === undefined) area.placeholder = "not there";
  const fit = () => {
    box.classList.toggle("changed", !same(holder(now, path)[field], stored));
    if (CSS.supports("field-sizing", "content")) return;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", () => {
    const owner = holder(now, path);
    const typed = isList ? area.value.split("\n").filter((line) => line.trim()) : area.value;
    // A key that is not there stays so until something is written.
    if (!area.value.trim() && stored === undefined) delete owner[field];
    else owner[field] = typed;
    fit();
    showState();
  });
  box.append(element("span", "", label), area);
  requestAnimationFrame(fit);
  return box;
}

function setMean() {
  if (!row.critique) return;
  const sum = now.dimensions.reduce((total, dimension) => total + dimension.score, 0);
  document.querySelector("[data-key='0']").setScore(sum / now.dimensions.length);
  tell(`The overall score is ${shown(now.overall_score)}, the mean of the dimensions.`);
}

function discard() {
  if (!changed()) return;
  now = copy(saved());
  showFields();
  showState();
  tell("The changes of this row were discarded.");
}

// -- decisions
/** Why a decision would make no sense, and whether that is a mistake. */
function objection(decision) {
  if (decision === "correct" && !changed()) return ["Nothing was changed; a accepts the label."];
  if (decision !== "accept") return [];
  if (!row.critique) return ["There is no critique to accept; r rejects this row.", true];
  if (changed()) return ["There are unsaved changes: c saves them, x discards them.", true];
  if (row.decision !== "correct") return [];
  return ["This row is corrected already; u takes the correction back."];
}

async function decide(decision, index = at) {
  if (!row) return;
  const [sentence, wrong] = objection(decision);
  if (sentence) return tell(sentence, wrong);
  const one = index === at ? row : await ask(`/api/rows/${index}`);
  const answer = await ask(`/api/rows/${index}/decision`, {
    job_id: one.job_id,
    analysis_sha256: one.analysis_sha256,
    decision,
    critique: decision === "correct" ? now : null,
    remark: decision === "undo" ? "" : $("remark").value,
    reviewer: $("reviewer").value.trim() || null,
  });
  rows[index] = answer.row;
  // What was corrected is not lost by taking the correction back: it is unsaved again.
  if (decision === "undo" && one.corrected) drafts.set(index, drafts.get(index) || one.corrected);
  showCounts(answer.counts);
  if (decision === "undo") return go(index, "Taken back.");
  decided.push(index);
  row = answer.row;
  showState();
  showTicks();
  const left = answer.counts.left;
  return move(1, `${SAID[decision]}. ${left ? `${left} left.` : "Every row is decided."}`);
}

/** Takes back the decision on this row; if it has none, the last one made on this page. */
function undo() {
  if (row && row.decision) return decide("undo");
  while (decided.length) {
    const index = decided.pop();
    if (rows[index].decision) return decide("undo", index);
  }
  return tell("There is no decision to take back.");
}

// -- a photograph that is gone
$("photo").addEventListener("error", () => {
  $("zoom").hidden = true;
  $("missing").hidden = false;
});

// -- keys and buttons
const KEYS = {
  a: () => decide("accept"),
  c: () => decide("correct"),
  r: () => decide("reject"),
  u: undo,
  j: () => move(1),
  k: () => move(-1),
  m: setMean,
  x: discard,
  z: () => enlarge(!isLarge()),
  "?": () => $("help").showModal(),
};

function choose(key) {
  const slider = document.querySelector(`[data-key='${key}']`);
  slider?.focus();
  slider?.scrollIntoView({ block: "center" });
}

document.addEventListener("keydown", (event) => {
  const active = document.activeElement;
  if ($("help").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return soon(KEYS.c);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (active.matches("textarea, input[type=text]")) {
    if (event.key === "Escape") active.blur();
    return;
  }
  const slider = active.matches("input[type=range]") && active;
  const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  let act = KEYS[event.key];
  if (/^[0-9]$/.test(event.key)) act = () => choose(event.key);
  else if (slider && way) act = () => slider.nudge(way);
  else if (slider && event.key === "Escape") act = () => slider.blur();
  else if (!slider && !active.matches("[type=radio]")) {
    act ||= { ArrowRight: KEYS.j, ArrowLeft: KEYS.k }[event.key];
  }
  if (!act) return;
  event.preventDefault();
  // A key that is held down goes through rows; it must not decide about them.
  if (!event.repeat || !"acru".includes(event.key)) soon(act);
});

const BUTTONS = {
  accept: KEYS.a, correct: KEYS.c, reject: KEYS.r, undo, previous: KEYS.k, next: KEYS.j,
  discard, ask: KEYS["?"],
};
press(BUTTONS);
$("critique").addEventListener("submit", (event) => event.preventDefault());
for (const radio of document.querySelectorAll("[name=filter]")) {
  radio.addEventListener("change", () => {
    const first = rows.findIndex(FITS[filter()]);
    if (first < 0) tell("There is no such row.");
    else if (!FITS[filter()](rows[at])) soon(() => go(first));
  });
}
window.addEventListener("beforeunload", (event) => drafts.size && event.preventDefault());

async function start() {
  const found = await ask("/api/rows");
  rows = found.rows;
  $("path").textContent = found.file;
  showCounts(found.counts);
  const asked = Number(location.hash.slice(1)) - 1;
  await go(rows[asked] ? asked : Math.max(0, rows.findIndex(FITS.undecided)));
}
soon(start);
