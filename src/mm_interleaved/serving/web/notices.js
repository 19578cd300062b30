// Short messages at the edge of the page, each of which may have one action, and the live region for screen readers.

import { h, iconButton } from "./dom.js";

const SHOWN = 8000; // milliseconds

/** Say something to screen readers alone. */
export function say(words) {
  document.getElementById("live").textContent = words;
}

/** Show a message; `action` is {label, run}. */
export function notify(words, action = null) {
  const list = document.getElementById("notices");
  const close = () => notice.remove();
  const notice = h("div", { class: "notice" }, h("span", {}, words),
    action && h("button", { type: "button", class: "link", onclick: () => { close(); action.run(); } }, action.label),
    iconButton("close", "Close the message", close));
  list.replaceChildren(notice);
  let timer = setTimeout(close, SHOWN);
  notice.addEventListener("focusin", () => clearTimeout(timer)); // who has reached it may take their time
  notice.addEventListener("focusout", () => { timer = setTimeout(close, SHOWN); });
  say(words);
}
