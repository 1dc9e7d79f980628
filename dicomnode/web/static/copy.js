// Buttons that copy a text: <button class="copy" data-copy="1.2.3">. Works without HTTPS too, where there is no clipboard.
"use strict";

async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "offscreen";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  await copyText(button.dataset.copy);
  button.focus();
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1500);
});
