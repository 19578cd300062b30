// The document that is open, and everything that changes it. Views listen for "change".
//
// A segment is {id, kind: "text", text, before?, after?, label?, by} or {id, kind: "image", takes, chosen, by, pending?}, where
// `before` and `after` frame a text for the model ("Question: ... Short answer:") and `label` names that frame, `takes` are the versions of an image
// ({blob, seed?}), and `by` is "user" or "model". `response` names the stored response that a segment comes from.

export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;

export const textSegment = (text = "", more = {}) => ({ id: newId(), kind: "text", by: "user", text, ...more });

export const imageSegment = (blob, more = {}) => ({
  id: newId(), kind: "image", by: "user", takes: blob ? [{ blob }] : [], chosen: 0, ...more,
});

/** The text of a segment as the model reads it. */
export const fullText = (segment) => `${segment.before ?? ""}${segment.text}${segment.after ?? ""}`;

/** The image of a segment; null while there is none. */
export const currentBlob = (segment) => segment.takes[segment.chosen]?.blob ?? null;

/** Whether a segment has something for the model. */
export const isFilled = (segment) => (segment.kind === "text" ? Boolean(fullText(segment).trim()) : Boolean(currentBlob(segment)));

export const newDocument = (mode = "story") => ({ id: newId(), title: "", mode, updated: Date.now(), segments: [] });

/** A name for a document without a title. */
export function titleOf(document) {
  const first = document.segments.find((segment) => segment.kind === "text" && segment.text.trim());
  const text = document.title.trim() || first?.text.trim() || (document.segments.length ? "Images" : "Empty document");
  return text.length > 60 ? `${text.slice(0, 57).trimEnd()}…` : text;
}

export class Editor extends EventTarget {
  document = newDocument();

  #changed(kind, id = null) {
    this.document.updated = Date.now();
    this.dispatchEvent(new CustomEvent("change", { detail: { kind, id } }));
  }

  get segments() {
    return this.document.segments;
  }

  index(id) {
    return this.segments.findIndex((segment) => segment.id === id);
  }

  find(id) {
    return this.segments.find((segment) => segment.id === id);
  }

  open(document) {
    this.document = document;
    this.dispatchEvent(new CustomEvent("change", { detail: { kind: "open", id: null } }));
  }

  setTitle(title) {
    this.document.title = title;
    this.#changed("title");
  }

  setMode(mode) {
    this.document.mode = mode;
    this.#changed("mode");
  }

  /** Insert segments at a place, or at the end. */
  insert(segments, at = this.segments.length) {
    this.segments.splice(at, 0, ...segments);
    this.#changed("structure");
  }

  /** Change fields of a segment; nothing happens if it was deleted meanwhile. */
  change(id, fields, kind = "segment") {
    const segment = this.find(id);
    if (!segment) return;
    Object.assign(segment, fields);
    this.#changed(kind, id);
  }

  setText(id, text) {
    this.change(id, { text }, "typing");
  }

  remove(id) {
    this.document.segments = this.segments.filter((segment) => segment.id !== id);
    this.#changed("structure");
  }

  removeAfter(id) {
    this.document.segments = this.segments.slice(0, this.index(id) + 1);
    this.#changed("structure");
  }

  /** Put back what `segments` was before. */
  restore(segments) {
    this.document.segments = segments;
    this.#changed("structure");
  }

  move(id, by) {
    const from = this.index(id);
    const to = from + by;
    if (from < 0 || to < 0 || to >= this.segments.length) return false;
    const [segment] = this.segments.splice(from, 1);
    this.segments.splice(to, 0, segment);
    this.#changed("structure");
    return true;
  }

  /** Add versions of an image and choose the first of them. */
  addTakes(id, takes) {
    const segment = this.find(id);
    if (!segment) return;
    this.change(id, { chosen: segment.takes.length, takes: [...segment.takes, ...takes], pending: null });
  }
}
