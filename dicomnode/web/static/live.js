// Parts of a page that follow by themselves: <div data-live="3" hx-get=... hx-trigger="refresh">, every 3 s while the page
// is seen. What did not change is not put in again, and only the summary is read out, when it changes.
"use strict";

(() => {
  const board = document.querySelector("[data-live]");
  if (!board) return;
  let last = "";

  function say() {
    const said = board.querySelector("#said");
    const summary = document.querySelector("#summary");
    if (said && summary && summary.textContent !== said.textContent) summary.textContent = said.textContent;
  }

  function refresh() {
    if (document.visibilityState === "visible") htmx.trigger(board, "refresh");
  }

  board.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.serverResponse === last) event.detail.shouldSwap = false;
    last = event.detail.serverResponse;
  });
  board.addEventListener("htmx:afterSettle", say);
  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, 1000 * Number(board.dataset.live));
  say();
})();
