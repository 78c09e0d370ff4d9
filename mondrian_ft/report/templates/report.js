"use strict";
// Puts the photographs in another order. Without this script they stand in that of the file.
const control = document.getElementById("sort");
if (control) {
  const select = control.querySelector("select"), told = control.querySelector("output");
  const lists = [...document.querySelectorAll("[data-sorted]")].map((list) => [list, [...list.children]]);
  const order = () => {
    const key = select.value, file = key === "index";
    for (const [list, items] of lists) {
      const value = (item) => Number(item.dataset[key] ?? -1);
      const by = (a, b) => (file ? 0 : value(b) - value(a)) || a.dataset.index - b.dataset.index;
      list.append(...[...items].sort(by));
    }
    told.textContent = file ? "" : "Largest first.";
  };
  select.addEventListener("change", order);
  control.hidden = false;
  order(); // A browser that comes back to the page remembers what was chosen.
}
