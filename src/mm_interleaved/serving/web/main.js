// Puts the page together.

import { ApiError, ConnectionError, isHealthy, listModels, readLimits, useKey } from "./api.js";
import { Composer } from "./composer.js";
import { h, icon } from "./dom.js";
import { EditorView } from "./editor.js";
import { fileName, toHtml, toJson, toPng } from "./export.js";
import { Runner } from "./generate.js";
import { Keeper, Library, showDocuments } from "./history.js";
import { download, imageFiles, readImageFile } from "./images.js";
import { showInspection } from "./inspect.js";
import { MODES, exampleParts, exampleUrl, framed, thumbnail } from "./modes.js";
import { notify, say } from "./notices.js";
import { Settings } from "./settings.js";
import { Editor, currentBlob, imageSegment, newDocument, textSegment } from "./state.js";

const $ = (id) => document.getElementById(id);
const HEALTH_EVERY = 20_000; // milliseconds; while the server is gone or a connection has failed, more often
const HEALTH_WHEN_GONE = 3_000;

const settings = new Settings();
useKey(() => settings.key);
const editor = new Editor();
const runner = new Runner(editor, settings);
const keeper = new Keeper(editor, await Library.open());

// ---- what can be done with a segment

/** Change the document in a way that can be undone. */
function undoable(words, change) {
  const before = [...editor.segments];
  const { document } = editor;
  change();
  notify(words, { label: "Undo", run: () => editor.document === document && editor.restore(before) });
}

/** What comes after a segment, if its mode asks for nothing else. */
function goOn(id) {
  const after = editor.segments.length - 1 - editor.index(id);
  if (after) undoable(after === 1 ? "What followed was removed." : `The ${after} parts that followed were removed.`, () => editor.removeAfter(id));
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

const redo = (id, candidates) => runner.run({ wants: "image", target: id, candidates, after: editor.segments[editor.index(id) - 1]?.id ?? null });

const actions = {
  goOn, remove,
  move: (id, by) => editor.move(id, by) && say(`Moved to place ${editor.index(id) + 1}.`),
  setText: (id, text) => editor.setText(id, text),
  choose: (id, chosen) => editor.change(id, { chosen }),
  again: (id) => redo(id, 1),
  several: (id) => redo(id, settings.candidates),
  save: (id) => download(currentBlob(editor.find(id)), `image-${editor.index(id) + 1}.${currentBlob(editor.find(id)).type.split("/")[1]}`),
  inspect: (id) => showInspection($("inspection"), editor.find(id).response),
  openInsert,
};

const view = new EditorView($("segments"), editor, runner, settings, actions);
const composer = new Composer($("composer"), editor, runner, (files) => addFiles(files));

// ---- inserting

let insertPlace = null;

function openInsert(id, button) {
  insertPlace = { id, button };
  const at = editor.index(id);
  for (const item of $("insert").querySelectorAll("[data-wants]")) item.disabled = runner.isRunning || at === 0;
  const box = button.getBoundingClientRect();
  $("insert").showPopover();
  const menu = $("insert").getBoundingClientRect();
  $("insert").style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - menu.width / 2, innerWidth - menu.width - 8))}px`;
  $("insert").style.top = `${Math.max(8, Math.min(box.bottom + 6, innerHeight - menu.height - 8))}px`;
  $("insert").querySelector("button").focus();
}

$("insert").addEventListener("click", (event) => {
  const item = event.target.closest("button");
  if (!item) return;
  $("insert").hidePopover();
  const at = editor.index(insertPlace.id);
  if (item.dataset.wants) return runner.run({ wants: item.dataset.wants, after: editor.segments[at - 1].id });
  if (item.dataset.insert === "image") return $("insert-picker").click();
  const segment = textSegment();
  editor.insert([segment], at);
  view.focus(segment.id);
});

$("insert-picker").addEventListener("change", async (event) => {
  await addFiles([...event.target.files], editor.index(insertPlace.id));
  event.target.value = "";
});

/** Add image files at a place, or at the end; says what could not be read. */
async function addFiles(files, at = null) {
  const blobs = [];
  for (const file of files) {
    try {
      blobs.push(await readImageFile(file));
    } catch (error) {
      composer.say(error.message);
    }
  }
  if (!blobs.length) return;
  if (at === null) composer.add(blobs);
  else editor.insert(blobs.map((blob) => imageSegment(blob)), at);
  say(blobs.length === 1 ? "The image was added." : `${blobs.length} images were added.`);
}

document.addEventListener("paste", (event) => {
  const files = imageFiles(event.clipboardData);
  if (!files.length) return;
  event.preventDefault();
  const segment = event.target.closest?.(".segment");
  const at = segment ? [...$("segments").children].indexOf(segment) + 1 : null;
  addFiles(files, at);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
    markDrop(event);
  });
}
document.addEventListener("dragleave", (event) => !event.relatedTarget && endDrop());
document.addEventListener("drop", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  const at = dropIndex(event);
  endDrop();
  const files = [...event.dataTransfer.files];
  addFiles(files, at < editor.segments.length ? at : null);
});

function dropIndex(event) {
  const elements = [...$("segments").children];
  const below = elements.findIndex((element) => { const box = element.getBoundingClientRect(); return event.clientY < box.top + box.height / 2; });
  return below < 0 ? elements.length : below;
}

function markDrop(event) {
  const at = dropIndex(event);
  [...$("segments").children].forEach((element, index) => element.classList.toggle("drop-before", index === at));
}

function endDrop() {
  document.body.classList.remove("dropping");
  for (const element of $("segments").children) element.classList.remove("drop-before");
}

// ---- an empty document: modes with their examples

for (const [name, mode] of Object.entries(MODES)) {
  const image = thumbnail(name);
  $("examples").append(h("li", {}, h("button", { type: "button", class: "example", onclick: () => startExample(name) },
    image ? h("img", { src: exampleUrl(image), alt: "", width: 56, height: 56 }) : h("span", { class: "no-image" }, icon("text")),
    h("span", { class: "entry-words" }, h("span", { class: "entry-title" }, mode.name), h("span", { class: "help" }, mode.about)))));
}

async function startExample(mode) {
  const { ask } = MODES[mode].example;
  let parts;
  try {
    parts = await exampleParts(mode);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return composer.say("The server cannot be reached, so there is no example.");
  }
  editor.setMode(mode);
  editor.insert(parts.map((part) => (typeof part === "string" ? textSegment(part) : imageSegment(part))));
  composer.send(ask ?? "");
  (runner.isRunning ? composer.stop : composer.field).focus();
}

function showEmpty() {
  const empty = !editor.segments.length;
  $("empty").hidden = !empty;
  $("title").hidden = empty;
  $("title").value = editor.document.title;
}
editor.addEventListener("change", ({ detail }) => detail.kind !== "typing" && detail.kind !== "title" && showEmpty());
$("title").addEventListener("input", () => editor.setTitle($("title").value));

// ---- what is generated stays in sight, unless the reader has scrolled away

let followsEnd = true;
const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 120;
document.addEventListener("scroll", () => { followsEnd = atEnd(); });
new ResizeObserver(() => {
  if (runner.isRunning && followsEnd && !runner.current.task.target) scrollTo({ top: document.documentElement.scrollHeight });
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
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
}
settings.mount($("settings-form"));

const EXPORTS = { html: toHtml, json: toJson, png: toPng };
$("export").addEventListener("click", async (event) => {
  const kind = event.target.closest("[data-format]")?.dataset.format;
  if (!kind) return;
  $("export").hidePopover();
  if (!editor.segments.length) return notify("There is nothing to export yet.");
  try {
    download(await EXPORTS[kind](editor.document), fileName(editor.document, kind));
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    notify(`The document could not be exported: ${error.message}`);
  }
});

const THEMES = [["", "half", "Colours: as the system"], ["light", "sun", "Colours: light"], ["dark", "moon", "Colours: dark"]];

function showTheme() {
  const [, name, label] = THEMES.find(([theme]) => theme === (document.documentElement.dataset.theme ?? ""));
  $("theme").replaceChildren(icon(name));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}
$("theme").addEventListener("click", () => {
  const at = THEMES.findIndex(([theme]) => theme === (document.documentElement.dataset.theme ?? ""));
  const [theme] = THEMES[(at + 1) % THEMES.length];
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("mmi-theme", theme);
  showTheme();
  say($("theme").title);
});
showTheme();

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

// ---- the server

let described = false;
let healthTimer = null;

/** Show the state of the server, and learn what it accepts once it can be asked. */
async function checkServer() {
  clearTimeout(healthTimer);
  const healthy = await isHealthy();
  if (healthy && !described) await describeServer();
  const status = $("status");
  status.dataset.state = healthy ? "ok" : "gone";
  status.querySelector("span").textContent = healthy ? (settings.values.model ?? settings.models[0] ?? "ready") : "Server not reachable";
  $("gone").hidden = healthy;
  if (!healthy) described = false;
  const doubtful = !healthy || runner.problem?.error instanceof ConnectionError;
  if (!document.hidden) healthTimer = setTimeout(checkServer, doubtful ? HEALTH_WHEN_GONE : HEALTH_EVERY);
}

async function describeServer() {
  try {
    const [models, limits] = await Promise.all([listModels(), readLimits()]);
    if (settings.values.model && !models.includes(settings.values.model)) settings.set("model", null);
    settings.describe(models, limits);
    described = true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return; // asked for where something is generated
    if (!(error instanceof ApiError || error instanceof ConnectionError)) throw error;
  }
}

settings.addEventListener("key", () => { described = false; checkServer(); });
settings.addEventListener("change", () => described && checkServer());
document.addEventListener("visibilitychange", () => !document.hidden && checkServer());
runner.addEventListener("state", () => runner.problem?.error instanceof ConnectionError && checkServer());
runner.addEventListener("say", ({ detail }) => {
  if (/longest|nothing to add/.test(detail)) notify(detail);
  else say(detail);
});

await keeper.openLast();
showEmpty();
view.render();
document.body.dataset.ready = "true";
await checkServer();
