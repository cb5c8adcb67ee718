"use strict";
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
  };

  // a row is sorted with what stands under it: a table of groups has a body for each
  function sort(table, column, up) {
    const bodies = [...table.tBodies];
    const items = bodies.length > 1 ? bodies : [...bodies[0].rows];
    const key = (item) => value(item.rows ? item.rows[0] : item, column);
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    items.sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b)));
    const parent = bodies.length > 1 ? table : bodies[0];
    const before = bodies.length > 1 ? table.tFoot : null;
    for (const item of items) parent.insertBefore(item, before);
  }

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const first = table.tBodies[0];
    if (!first || (table.tBodies.length < 2 && first.rows.length < 2)) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.title = "Sort by this column";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : head.classList.contains("text");
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table, column, up);
      });
    });
  }
})();
