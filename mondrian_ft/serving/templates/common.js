// What the pages of many photographs share, after basics.js. A page names go().

// -- the photograph
function enlarge(on) {
  const photo = $("photo");
  $("zoom").setAttribute("aria-pressed", on);
  const most = Math.max(2, (photo.naturalWidth || 0) / (photo.clientWidth || 1));
  photo.style.transform = on ? `scale(${Math.min(6, most)})` : "";
  if (!on) photo.style.transformOrigin = "";
}

function lookAt(event) {
  const box = $("zoom").getBoundingClientRect();
  const share = (value, start, size) => `${(100 * (value - start)) / size}%`;
  $("photo").style.transformOrigin =
    `${share(event.clientX, box.left, box.width)} ${share(event.clientY, box.top, box.height)}`;
}

const isLarge = () => $("zoom").getAttribute("aria-pressed") === "true";
$("zoom").addEventListener("click", (event) => {
  if (event.detail) lookAt(event);
  enlarge(!isLarge());
});
$("zoom").addEventListener("pointermove", (event) => isLarge() && lookAt(event));
// -- buttons and ticks
function press(buttons) {
  for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", () => soon(act));
}

$("ticks").addEventListener("click", (event) => {
  const index = [...event.currentTarget.children].indexOf(event.target);
  if (index >= 0) soon(() => go(index));
});

