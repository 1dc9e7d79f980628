// Keys of a list: "/" to the search, j and k or the arrows from row to row, Enter opens (it is a link).
"use strict";

(() => {
  const links = () => [...document.querySelectorAll("tbody a.open")];

  function move(step) {
    const rows = links();
    if (!rows.length) return;
    const at = rows.indexOf(document.activeElement);
    const next = rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + step))];
    next.focus();
    next.closest("tr").scrollIntoView({ block: "nearest" });
  }

  const STEPS = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input, select, textarea");
    if (event.key === "/" && !field) {
      event.preventDefault();
      document.querySelector("#q").select();
      document.querySelector("#q").focus();
    } else if (event.key in STEPS && (!field || (field.id === "q" && event.key === "ArrowDown"))) {
      event.preventDefault();
      move(STEPS[event.key]);
    } else if (event.key === "Escape" && field) {
      field.blur();
    }
  });
})();
