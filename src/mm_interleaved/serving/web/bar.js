// The bar at the top: export, colours, and how menus and dialogs open and close.

import { icon } from "./dom.js";
import { fileName, toHtml, toJson, toPng } from "./export.js";
import { download } from "./images.js";
import { notify, say } from "./notices.js";
import { local } from "./storage.js";

const EXPORTS = { html: toHtml, json: toJson, png: toPng };
const THEMES = [["", "half", "Colours: as the system"], ["light", "sun", "Colours: light"], ["dark", "moon", "Colours: dark"]];

export function setUpExport(menu, editor) {
  menu.addEventListener("click", async (event) => {
    const kind = event.target.closest("[data-format]")?.dataset.format;
    if (!kind) return;
    menu.hidePopover();
    if (!editor.segments.length) return notify("There is nothing to export yet.");
    try {
      download(await EXPORTS[kind](editor.document), fileName(editor.document, kind));
    } catch (error) {
      notify(`The document could not be exported: ${error.message}`);
      throw error;
    }
  });
}

export function setUpTheme(button) {
  const root = document.documentElement;
  const current = () => THEMES.findIndex(([theme]) => theme === (root.dataset.theme ?? ""));
  const show = () => {
    const [, name, label] = THEMES[current()];
    button.replaceChildren(icon(name));
    button.setAttribute("aria-label", label);
    button.title = label;
  };
  button.addEventListener("click", () => {
    const [theme] = THEMES[(current() + 1) % THEMES.length];
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    local.set("mmi-theme", theme);
    show();
    say(button.title);
  });
  show();
}

/** A menu gives its first item the focus, and arrow keys go on from there. */
export function setUpMenu(menu) {
  menu.addEventListener("toggle", ({ newState }) => newState === "open" && menu.querySelector("button:enabled").focus());
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...menu.querySelectorAll("button:enabled")];
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
  });
}

/** A dialog is closed by its button, and by a click beside it. */
export function setUpDialog(dialog) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
