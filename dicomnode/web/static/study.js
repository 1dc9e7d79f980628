// The study page: the dialog that asks, the help on keys, and nothing that moves while somebody decides.
"use strict";

(() => {
  const ask = document.getElementById("ask");
  const help = document.getElementById("keys");
  const on = document.getElementById("keys-on");
  let asked = null;

  // htmx puts the question into the dialog; then it opens.
  document.body.addEventListener("htmx:afterSwap", (event) => {
    if (event.target === ask && !ask.open) ask.showModal();
  });
  document.body.addEventListener("htmx:beforeRequest", (event) => {
    const from = event.detail.elt;
    if (from.id === "live" && (ask.open || help.open || document.hidden)) event.preventDefault();
    if (from.matches("[role=button]")) asked = from;
  });
  ask.addEventListener("click", (event) => {
    if (!event.target.closest("[data-close]")) return;
    event.preventDefault();
    if (ask.querySelector(".wrong")) location.reload();
    else ask.close();
  });
  ask.addEventListener("close", () => { ask.replaceChildren(); asked?.focus(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === " " && event.target.matches("a[role=button]")) {
      event.preventDefault();
      event.target.click();
    }
  });

  // Keys of one letter can be switched off: who speaks to the computer would press them by words.
  on.checked = localStorage.getItem("keys") !== "off";
  on.addEventListener("change", () => localStorage.setItem("keys", on.checked ? "on" : "off"));
  document.addEventListener("click", (event) => { if (event.target.closest("[data-keys]")) help.showModal(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ask.open) return;
    if (event.target.matches("input:not([type=range], [type=radio], [type=checkbox]), select, textarea")) return;
    if (event.key === " " && event.target.matches("button, summary, input, a[role=button]")) return;
    if (!on.checked) return;
    if (event.key === "?" && !help.open) {
      event.preventDefault();
      help.showModal();
    } else if (!help.open) {
      const taken = !document.dispatchEvent(new CustomEvent("study:key", { detail: event.key, cancelable: true }));
      if (taken) event.preventDefault();
    }
  });
})();
