// Puts the page together.

import { useKey } from "./api.js";
import { setUpDialog, setUpExport, setUpMenu, setUpTheme } from "./bar.js";
import { Composer } from "./composer.js";
import { h, icon } from "./dom.js";
import { EditorView } from "./editor.js";
import { Runner } from "./generate.js";
import { Keeper, openLibrary, showDocuments } from "./history.js";
import { download } from "./images.js";
import { Inserter } from "./insert.js";
import { showInspection } from "./inspect.js";
import { MODES, exampleParts, exampleUrl, thumbnail } from "./modes.js";
import { notify, say } from "./notices.js";
import { ServerWatch } from "./server.js";
import { Settings } from "./settings.js";
import { Editor, currentBlob, imageSegment, newDocument, textSegment, titleOf } from "./state.js";

const $ = (id) => document.getElementById(id);

const settings = new Settings();
useKey(() => settings.key);
const editor = new Editor();
const runner = new Runner(editor, settings);
const keeper = new Keeper(editor, await openLibrary());

// ---- what can be done with a segment

/** Change the document in a way that can be undone. */
function undoable(words, change) {
  const before = [...editor.segments];
  const { document } = editor;
  change();
  notify(words, { label: "Undo", run: () => editor.document === document && editor.restore(before) });
}

/** Remove what follows a segment, and let the model go on. */
function goOn(id) {
  const count = editor.segments.length - 1 - editor.index(id);
  const words = count === 1 ? "What followed was removed." : `The ${count} parts that followed were removed.`;
  if (count) undoable(words, () => editor.removeAfter(id));
  runner.run({ wants: composer.wants, after: id });
}

function remove(id) {
  const at = editor.index(id);
  const { kind } = editor.find(id);
  undoable(kind === "text" ? "The text was deleted." : "The image was deleted.", () => editor.remove(id));
  const next = editor.segments[Math.max(0, at - 1)];
  if (next) view.focus(next.id);
  else composer.field.focus();
}

function redo(id, candidates) {
  const before = editor.segments[editor.index(id) - 1];
  runner.run({ wants: "image", target: id, candidates, after: before?.id ?? null });
}

function save(id) {
  const blob = currentBlob(editor.find(id));
  download(blob, `image-${editor.index(id) + 1}.${blob.type.split("/")[1]}`);
}

const actions = {
  goOn, remove, save,
  move: (id, by) => editor.move(id, by) && say(`Moved to place ${editor.index(id) + 1}.`),
  setText: (id, text) => editor.setText(id, text),
  choose: (id, chosen) => editor.change(id, { chosen }),
  again: (id) => redo(id, 1),
  several: (id) => redo(id, settings.candidates),
  inspect: (id) => showInspection($("inspection"), editor.find(id).response),
  openInsert: (id, button) => inserter.open(id, button),
};

const view = new EditorView($("segments"), editor, runner, settings, actions);
const composer = new Composer($("composer"), editor, runner, (files) => inserter.addFiles(files));
const places = { list: $("segments"), menu: $("insert"), picker: $("insert-picker") };
const inserter = new Inserter(places, editor, runner, composer, view);

// ---- an empty document: modes with their examples

for (const [name, mode] of Object.entries(MODES)) {
  const image = thumbnail(name);
  $("examples").append(h("li", {}, h("button", { type: "button", class: "example", onclick: () => startExample(name) },
    image ? h("img", { src: exampleUrl(image), alt: "", width: 56, height: 56 }) : h("span", { class: "no-image" }, icon("text")),
    h("span", { class: "entry-words" }, h("span", { class: "entry-title" }, mode.name), h("span", { class: "help" }, mode.about)))));
}

async function startExample(mode) {
  let parts;
  try {
    parts = await exampleParts(mode);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // what fetch throws
    return composer.say("The server cannot be reached, so there is no example.");
  }
  editor.setMode(mode);
  editor.insert(parts.map((part) => (typeof part === "string" ? textSegment(part) : imageSegment(part))));
  composer.send(MODES[mode].example.ask ?? "");
  (runner.isRunning ? composer.stop : composer.field).focus();
}

function showTitle() {
  const isEmpty = !editor.segments.length;
  $("empty").hidden = !isEmpty;
  $("title").hidden = isEmpty;
  if ($("title").value !== editor.document.title) $("title").value = editor.document.title;
  document.title = isEmpty ? "MM-Interleaved" : `${titleOf(editor.document)} – MM-Interleaved`;
}
editor.addEventListener("change", showTitle);
$("title").addEventListener("input", () => editor.setTitle($("title").value));
$("title").addEventListener("keydown", (event) => event.key === "Enter" && composer.field.focus());

// ---- what is generated stays in sight, unless the reader has scrolled away

const SETTLED = 500; // milliseconds after the end in which the last image gets its size
let follows = false;
let last = { y: 0, height: 0 };
document.addEventListener("scroll", () => {
  const height = document.documentElement.scrollHeight;
  if (scrollY < last.y && height >= last.height) follows = false; // else the page has become shorter
  last = { y: scrollY, height };
});
runner.addEventListener("state", () => {
  const { current } = runner;
  if (!current) setTimeout(() => { follows = follows && runner.isRunning; }, SETTLED);
  else follows = current.task.after === editor.segments.at(-1)?.id;
});
new ResizeObserver(() => {
  if (follows) scrollTo({ top: document.documentElement.scrollHeight });
}).observe($("segments"));

// ---- the bar at the top

async function openDocument(document) {
  runner.stop();
  runner.dismiss();
  await keeper.leaveFor(document);
  $("documents").close();
  window.scrollTo(0, 0);
}

$("new").addEventListener("click", async () => {
  await openDocument(newDocument(editor.document.mode));
  composer.field.focus();
});
$("open-documents").addEventListener("click", async () => {
  await keeper.save();
  await showDocuments($("document-list"), keeper, openDocument);
  $("documents").showModal();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("open-keys").addEventListener("click", () => $("keys").showModal());
document.querySelectorAll("dialog").forEach(setUpDialog);
document.querySelectorAll(".menu").forEach(setUpMenu);
setUpExport($("export"), editor);
setUpTheme($("theme"));
settings.mount($("settings-form"));

// ---- keys

document.addEventListener("keydown", (event) => {
  const inText = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape" && runner.isRunning && !document.querySelector("dialog[open]")) runner.stop();
  if (event.key === "?" && !inText) $("keys").showModal();
  const id = event.target.closest?.(".segment")?.querySelector("[data-focus]")?.dataset.focus;
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && !runner.isRunning) {
    event.preventDefault();
    if (id) goOn(id);
    else composer.send();
  }
  if (id && event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    event.preventDefault();
    actions.move(id, event.key === "ArrowUp" ? -1 : 1);
    view.focus(id);
  }
});

// ---- begin

runner.addEventListener("say", ({ detail: { words, visibly } }) => (visibly ? notify(words) : say(words)));
await keeper.openLast();
showTitle();
view.render();
document.body.dataset.ready = "true";
await new ServerWatch($("status"), $("gone"), settings, runner).check();
