"use strict";
// Rows move by the data-key of their cells: numbers as numbers, words as words, an absent key always last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const other = { ascending: "descending", descending: "ascending" };
    const order = other[head.getAttribute("aria-sort")] ?? head.dataset.first;
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => row.cells[column].dataset.key;
    const compare = (a, b) => a === undefined || b === undefined
      ? (a === undefined) - (b === undefined)
      : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  }));
}
for (const quality of document.querySelectorAll(".quality")) {
  quality.querySelector("select")?.addEventListener("change", (event) => {
    for (const plots of quality.querySelectorAll(".plots")) plots.hidden = plots.dataset.metric !== event.target.value;
  });
}
