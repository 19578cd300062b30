// The documents of this browser, in IndexedDB. Nothing of them is kept on the server.

import { h, iconButton } from "./dom.js";
import { blobUrl } from "./images.js";
import { notify } from "./notices.js";
import { currentBlob, newDocument, titleOf } from "./state.js";
import { local } from "./storage.js";

const STORE = "documents";
const LAST = "mmi-last";
const WAIT = 300; // milliseconds after a change

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** The library of this browser; one that lasts as long as the page where the browser keeps nothing. */
export async function openLibrary() {
  try {
    return await Library.open();
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    notify("This browser keeps no documents. Export what you want to have later.");
    return new MemoryLibrary();
  }
}

class MemoryLibrary {
  #documents = new Map();
  get = async (id) => this.#documents.get(id);
  put = async (document) => this.#documents.set(document.id, document);
  delete = async (id) => this.#documents.delete(id);
  list = async () => [...this.#documents.values()].sort((a, b) => b.updated - a.updated);
}

/** Documents by their id, in IndexedDB. */
class Library {
  static async open() {
    const request = indexedDB.open("mm-interleaved", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    const library = new Library();
    library.database = await finished(request);
    return library;
  }

  #store(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }

  get(id) {
    return finished(this.#store("readonly").get(id));
  }

  put(document) {
    return finished(this.#store("readwrite").put(document));
  }

  delete(id) {
    return finished(this.#store("readwrite").delete(id));
  }

  /** All of them, the latest first. */
  async list() {
    return (await finished(this.#store("readonly").getAll())).sort((a, b) => b.updated - a.updated);
  }
}

/** Keeps the open document while it is edited, and opens the last one again. */
export class Keeper {
  #timer = null;

  constructor(editor, library) {
    Object.assign(this, { editor, library });
    editor.addEventListener("change", ({ detail }) => {
      if (detail.kind === "open") return;
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.save(), WAIT);
    });
    document.addEventListener("visibilitychange", () => document.hidden && this.save());
  }

  /** Write the document now; an empty one is not kept. */
  async save() {
    clearTimeout(this.#timer);
    const { document } = this.editor;
    if (!document.segments.length) return this.library.delete(document.id);
    const segments = document.segments.map(({ pending, writing, ...segment }) => segment)
      .filter((segment) => segment.kind === "text" || segment.takes.length);
    try {
      await this.library.put({ ...document, segments });
      local.set(LAST, document.id);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      notify(`This browser could not keep the document (${error.message}). Export it.`);
    }
  }

  async openLast() {
    const id = local.get(LAST);
    const found = id && (await this.library.get(id));
    if (found) this.editor.open(found);
  }

  /** Begin another document; the open one stays in the list. */
  async leaveFor(document) {
    await this.save();
    if (document.segments.length) local.set(LAST, document.id);
    else local.remove(LAST);
    this.editor.open(document);
  }
}

/** Show the documents in a list; `open` is called with the one that is chosen. */
export async function showDocuments(list, keeper, open) {
  const documents = await keeper.library.list();
  const remove = async (document) => {
    if (document.id === keeper.editor.document.id) await keeper.leaveFor(newDocument(document.mode));
    await keeper.library.delete(document.id);
    await showDocuments(list, keeper, open);
    (list.querySelector("button") ?? list.closest("dialog")?.querySelector("button"))?.focus();
    notify(`“${titleOf(document)}” was deleted.`, {
      label: "Undo", run: async () => { await keeper.library.put(document); await showDocuments(list, keeper, open); },
    });
  };
  list.replaceChildren(...documents.map((document) => entry(document, keeper.editor.document.id, open, remove)));
  if (!documents.length) list.append(h("li", { class: "help" }, "Documents that you write are kept here, in this browser."));
}

function entry(document, openId, open, remove) {
  const image = document.segments.find((segment) => segment.kind === "image" && segment.takes.length);
  const when = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" }).format(document.updated);
  return h("li", { class: "entry" },
    h("button", { type: "button", class: "entry-open", "aria-current": document.id === openId && "true", onclick: () => open(document) },
      image ? h("img", { src: blobUrl(currentBlob(image)), alt: "" }) : h("span", { class: "no-image" }),
      h("span", { class: "entry-words" }, h("span", { class: "entry-title" }, titleOf(document)), h("span", { class: "help" }, when))),
    iconButton("bin", `Delete “${titleOf(document)}”`, () => remove(document)));
}
