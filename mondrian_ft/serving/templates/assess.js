const GONE = "The server does not answer; start task=assess again on the same port.";
const SAID = { left: "Left is better", right: "Right is better", equal: "Equal" };

let pairs = []; // every pair in short, in the order they are shown
let at = -1; // the pair that is shown
let pair = null; // it, whole
let reference = null; // its reference, while it is in sight
let final = false; // which was which is known
let counted = 0; // milliseconds this pair was in sight, up to `since`
let since = 0;
const remarks = new Map(); // remarks that are not kept yet, by index
const judged = []; // pairs in the order they were judged here

// -- the list
function showCounts(counts) {
  $("counts").textContent = `${counts.judged} of ${counts.all} judged`;
  $("ticks").setAttribute("aria-valuemax", counts.all);
  $("ticks").setAttribute("aria-valuenow", counts.judged);
  $("ticks").setAttribute("aria-valuetext", `${counts.judged} of ${counts.all} judged`);
}

function showTicks() {
  const ticks = $("ticks");
  if (!ticks.children.length) ticks.append(...pairs.map(() => element("i")));
  pairs.forEach((one, index) => {
    ticks.children[index].className = (one.choice ? "judged" : "") + (index === at ? " here" : "");
  });
  $("place").textContent = at < 0 ? "all judged" : `${at + 1} of ${pairs.length}`;
}

const inSight = () => counted + (document.hidden ? 0 : performance.now() - since);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) counted += performance.now() - since;
  since = performance.now();
});

async function go(index, said = "") {
  const found = await ask(`/api/pairs/${index}`);
  at = index;
  history.replaceState(null, "", `#${index + 1}`);
  pair = found;
  reference = null;
  counted = 0;
  since = performance.now();
  $("judging").hidden = false;
  $("closing").hidden = true;
  document.activeElement.blur();
  showPhoto();
  $("remark").value = remarks.get(at) ?? pair.remark;
  $("show").disabled = !pair.has_reference;
  showTexts();
  showState();
  tell(said);
  window.scrollTo(0, 0);
  // The next photograph is loaded ahead.
  if (pairs[at + 1]) new Image().src = `/photographs/${at + 1}`;
}

function move(step) {
  if (at < 0) return step < 0 ? go(pairs.length - 1) : undefined;
  if (pairs[at + step]) return go(at + step);
  if (step > 0 && pairs.every((one) => one.choice)) return close();
  return tell(`This is the ${step > 0 ? "last" : "first"} photograph.`);
}

// -- one pair
function showPhoto() {
  enlarge(false);
  $("file").textContent = pair.image;
  $("missing").textContent = pair.problem;
  $("missing").hidden = !pair.problem;
  $("zoom").hidden = Boolean(pair.problem);
  $("photo").alt = `Photograph ${pair.image}`;
  if (pair.problem) $("photo").removeAttribute("src");
  else $("photo").src = `/photographs/${at}`;
}

function showState() {
  for (const name of ["left", "right", "equal"]) {
    $(name).classList.toggle("chosen", at >= 0 && pairs[at].choice === name);
    $(name).disabled = final || at < 0;
  }
  for (const head of document.querySelectorAll(".heads b")) {
    head.classList.toggle("chosen", head.textContent.toLowerCase() === pairs[at]?.choice);
  }
  $("remark").disabled = $("undo").disabled = final;
  $("show").setAttribute("aria-pressed", Boolean(reference));
  $("show").textContent = reference ? "Hide the reference" : "Show the reference";
  showTicks();
}

/** Both sides part by part, so that what is said of one thing stands side by side. */
function showTexts() {
  const sides = [pair.left, pair.right, ...(reference ? [reference] : [])];
  const heads = element("div", "row heads");
  heads.append(element("b", "", "Left"), element("b", "", "Right"));
  if (pair.same) heads.append(element("span", "both", "Both are the same, word for word."));
  const made = [heads];
  const unread = sides.map((one) => (one.critique ? null : element("pre", "", one.text)));
  if (unread.some(Boolean)) made.push(row("Text as it came", unread));
  const parts = (take) => sides.map((one) => one.critique && take(one.critique));
  const words = (text) => text && [element("p", "", text)];
  made.push(row("Description", parts((one) => words(one.description))));
  const names = new Map();
  // The order is the reference's own, or the alphabet's: neither side's.
  for (const one of sides) {
    for (const dimension of one.critique?.dimensions || []) {
      if (!names.has(dimension.key)) names.set(dimension.key, dimension.name);
    }
  }
  const order = pair.order.filter((key) => names.has(key));
  for (const key of [...order, ...[...names.keys()].filter((k) => !order.includes(k)).sort()]) {
    made.push(row(names.get(key), parts((one) => {
      const found = one.dimensions.find((dimension) => dimension.key === key);
      return found && [score(found.score), ...["comment", "advice"]
        .filter((name) => found[name]).map((name) => element("p", "", found[name]))];
    })));
  }
  made.push(row("Overall", parts((one) => [score(one.overall)])));
  const listed = (list) => words(list.filter((one) => one.trim()).join(" · "));
  made.push(row("Strengths", parts((one) => listed(one.strengths))));
  made.push(row("To improve first", parts((one) => listed(one.improvements))));
  made.push(row("Technical notes", parts((one) => words(one.notes))));
  $("texts").replaceChildren(...made.filter(Boolean));
}

function row(title, cells) {
  if (!cells.some((cell) => cell && (cell.nodeType || cell.length))) return null;
  const line = element("div", "row");
  line.append(element("h3", "", title));
  cells.forEach((content, place) => {
    const filled = content && (content.nodeType || content.length);
    if (place === 2 && !filled) return;
    const cell = element("div", `cell${filled ? "" : " empty"}${place === 2 ? " reference" : ""}`);
    if (place < 2) cell.dataset.side = ["Left", "Right"][place];
    else cell.append(element("small", "", "Reference"));
    cell.append(...(filled ? [content].flat() : ["–"]));
    line.append(cell);
  });
  return line;
}

function score(value) {
  const output = element("output", "", shown(value));
  const bar = element("meter-bar");
  bar.style.setProperty("--at", `${10 * value}%`);
  output.append(bar);
  return output;
}

async function showReference() {
  if (at < 0) return;
  if (!pair.has_reference) return tell("The report holds no reference for this photograph.");
  reference = reference ? null : await ask(`/api/pairs/${at}/reference`, { key: pair.key });
  showTexts();
  showState();
  tell(reference ? "The reference is in sight; that is written beside your choice." : "");
}

// -- judging
async function judge(choice, index = at, stay = false) {
  if (final) return tell("Which was which is known; nothing is judged any more.");
  if (index < 0) return;
  const one = index === at ? pair : await ask(`/api/pairs/${index}`);
  const remark = index === at ? $("remark").value : one.remark;
  const answer = await ask(`/api/pairs/${index}/judgement`, {
    key: one.key, choice, remark, seconds: index === at ? inSight() / 1000 : 0,
  });
  pairs[index] = answer.pair;
  if (choice === "undo") remarks.set(index, remark);
  else remarks.delete(index);
  showCounts(answer.counts);
  if (choice === "undo") return go(index, "Taken back.");
  if (!judged.includes(index)) judged.push(index);
  const left = answer.counts.left;
  if (stay) {
    pair.remark = remark;
    showState();
    return tell("The remark is kept.");
  }
  const after = pairs.findIndex((one, place) => place > index && !one.choice);
  const next = after >= 0 ? after : pairs.findIndex((one) => !one.choice);
  if (next < 0) return close();
  return go(next, `${SAID[choice]}: kept. ${left} left; u takes it back.`);
}

/** Takes back the choice on this pair; if it has none, the last one made on this page. */
function undo() {
  if (at >= 0 && pairs[at].choice) return judge("undo");
  while (judged.length) {
    const index = judged.pop();
    if (pairs[index].choice) return judge("undo", index);
  }
  return tell("There is no choice to take back.");
}

function keepRemark() {
  $("remark").blur();
  if (pairs[at].choice && $("remark").value !== pair.remark) {
    soon(() => judge(pairs[at].choice, at, true));
  }
}

// -- the end
function close() {
  at = -1;
  history.replaceState(null, "", location.pathname);
  $("judging").hidden = true;
  $("closing").hidden = false;
  if (!final) {
    $("closing-title").textContent = "Every photograph is judged.";
    $("closing-said").textContent = "Now you can see which critique was whose. " +
      "After that no choice can be changed; u takes the last one back, k goes back to look.";
  }
  $("closing-title").focus();
  window.scrollTo(0, 0);
  showState();
  tell("");
}

async function reveal() {
  const found = await ask("/api/reveal", {});
  final = true;
  const people = found.people;
  // A headline claims no more than the test does.
  $("closing-title").textContent = people.p_value === null || people.p_value > 0.05
    ? "No clear preference."
    : `The ${people.tuned > people.base ? "tuned" : "base"} model’s critiques were preferred.`;
  $("closing-said").textContent = found.sentence;
  const shares = element("div", "shares");
  const legend = element("p", "legend");
  for (const [name, label] of [["tuned", "Tuned"], ["equal", "Equal"], ["base", "Base"]]) {
    if (people[name]) {
      const part = element("i", name);
      part.style.flex = `${people[name]} 1 0`;
      shares.append(part);
    }
    legend.append(element("span", name, `${label} ${people[name]}`));
  }
  shares.setAttribute("aria-hidden", "true");
  const table = element("table");
  const line = (cells, kind) => {
    const made = element("tr");
    made.append(...cells.map((text) => element(kind, "", text)));
    return made;
  };
  const [head, body] = [element("thead"), element("tbody")];
  head.append(line(["Photograph", "Left was", "You preferred", "Remark"], "th"));
  for (const cell of head.querySelectorAll("th")) cell.scope = "col";
  for (const one of found.pairs) {
    const made = line([one.image, one.left, one.preferred, one.remark], "td");
    made.children[2].className = one.preferred;
    body.append(made);
  }
  table.append(head, body);
  $("result").replaceChildren(
    shares, legend, ...found.notes.map((text) => element("p", "note", text)), table);
  $("result").hidden = false;
  $("reveal").hidden = true;
  close();
  tell("Ctrl-C in the terminal stops the server; the report tells the result.");
}

// -- a photograph that is gone
$("photo").addEventListener("error", () => {
  if (!$("photo").hasAttribute("src")) return;
  $("zoom").hidden = true;
  $("missing").textContent = "The photograph cannot be shown.";
  $("missing").hidden = false;
});

// -- keys and buttons
const KEYS = {
  ArrowLeft: () => judge("left"),
  ArrowRight: () => judge("right"),
  ArrowDown: () => judge("equal"),
  e: () => judge("equal"),
  u: undo,
  j: () => move(1),
  k: () => move(-1),
  r: () => $("remark").focus(),
  s: showReference,
  z: () => enlarge(!isLarge()),
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if ($("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const active = document.activeElement;
  if (active.matches("input")) {
    if (event.key === "Escape") active.blur();
    if (event.key === "Enter") keepRemark();
    return;
  }
  let act = KEYS[event.key];
  if (event.key === "Enter" && !$("closing").hidden && !final && !active.matches("button")) {
    act = reveal;
  }
  if (!act) return;
  event.preventDefault();
  // A key that is held down goes through photographs; it must not judge them.
  if (!event.repeat || "jk".includes(event.key)) soon(act);
});

const BUTTONS = {
  left: KEYS.ArrowLeft, right: KEYS.ArrowRight, equal: KEYS.e, undo, previous: KEYS.k,
  next: KEYS.j, show: showReference, reveal, ask: KEYS["?"],
};
press(BUTTONS);
$("remark").addEventListener("input", () => remarks.set(at, $("remark").value));

async function start() {
  const found = await ask("/api/pairs");
  pairs = found.pairs;
  $("path").textContent = found.file;
  showCounts(found.counts);
  const asked = Number(location.hash.slice(1)) - 1;
  const first = pairs.findIndex((one) => !one.choice);
  if (found.revealed) return reveal();
  if (pairs[asked]) return go(asked);
  return first < 0 ? close() : go(first);
}
soon(start);
