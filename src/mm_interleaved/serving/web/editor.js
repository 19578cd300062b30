// The view of the document: one element for each segment, in order, and the problem of the last generation where it
// happened.

import { findBoxes } from "./boxes.js";
import { h } from "./dom.js";
import { ImageView, TextView } from "./segment.js";

export class EditorView {
  #views = new Map();

  constructor(list, editor, runner, settings, actions) {
    Object.assign(this, { list, editor, runner, settings, actions });
    editor.addEventListener("change", ({ detail }) => this.#update(detail));
    runner.addEventListener("state", () => this.render());
    settings.addEventListener("change", () => this.render());
    list.addEventListener("focusin", (event) => this.#activate(event.target.closest(".segment")));
    new ResizeObserver(() => this.#fitTexts()).observe(list);
  }

  #activate(element) {
    for (const other of this.list.querySelectorAll(".segment.active")) if (other !== element) other.classList.remove("active");
    element?.classList.add("active");
  }

  #fitTexts() {
    for (const segment of this.editor.segments) {
      if (segment.kind === "text") this.#views.get(segment.id)?.setText(segment.text);
    }
  }

  /** A keystroke or a word of the model changes one text; all else is rendered whole. */
  #update({ kind, id }) {
    if (kind === "typing") {
      const segment = this.editor.find(id);
      this.#views.get(id)?.setText(segment.text);
      if (/\d{3}\)/.test(segment.text)) this.render();
      return;
    }
    this.render();
  }

  render() {
    const { segments } = this.editor;
    const boxes = findBoxes(segments);
    const focused = document.activeElement;
    const kept = new Set(segments.map((segment) => segment.id));
    for (const [id, view] of this.#views) {
      if (kept.has(id)) continue;
      view.element.remove();
      this.#views.delete(id);
    }
    segments.forEach((segment, index) => {
      const view = this.#viewOf(segment);
      if (this.list.children[index] !== view.element) this.list.insertBefore(view.element, this.list.children[index] ?? null);
      view.update(segment, {
        number: index + 1, count: segments.length, isRunning: this.runner.isRunning, boxes: boxes.get(segment.id),
        canInspect: this.settings.limits?.canInspect, candidates: this.settings.candidates,
      });
    });
    if (focused && focused !== document.activeElement && this.list.contains(focused)) focused.focus(); // it was moved
    this.#renderProblem();
  }

  #viewOf(segment) {
    if (!this.#views.has(segment.id)) {
      const View = segment.kind === "text" ? TextView : ImageView;
      this.#views.set(segment.id, new View(segment.id, this.actions));
    }
    return this.#views.get(segment.id);
  }

  #renderProblem() {
    const { problem } = this.runner;
    if (!problem) {
      this.problem?.remove();
      this.problem = null;
      return;
    }
    const place = this.#views.get(problem.place)?.element;
    if (this.problem?.of !== problem) {
      this.problem?.remove();
      this.problem = problemBox(problem, this.runner, this.settings);
      this.problem.of = problem;
    }
    const host = place ?? this.list.parentElement;
    if (this.problem.parentElement !== host) host.append(this.problem);
    this.problem.update();
  }

  /** Put the focus on a segment. */
  focus(id) {
    this.list.querySelector(`[data-focus="${CSS.escape(id)}"]`)?.focus();
  }
}

/** What went wrong, in words, with what can be done about it. */
function problemBox(problem, runner, settings) {
  const { error } = problem;
  const words = h("p", { role: "alert" }, explain(error));
  const retry = h("button", { type: "button", class: "small", onclick: () => runner.retry() }, "Try again");
  const box = h("div", { class: "problem" }, words);
  if (error.status === 401) {
    const key = h("input", { type: "password", id: "problem-key", autocomplete: "off" });
    const form = h("form", { class: "key-form", onsubmit: (event) => { event.preventDefault(); settings.key = key.value.trim(); runner.retry(); } },
      h("label", { for: "problem-key" }, "API key"), key, h("button", { class: "small" }, "Use this key"));
    box.append(form);
  } else box.append(retry);
  box.append(h("button", { type: "button", class: "link", onclick: () => runner.dismiss() }, "Dismiss"));
  box.update = () => {
    if (problem.seconds > 0) retry.textContent = `Trying again in ${problem.seconds} s – now`;
  };
  return box;
}

function explain(error) {
  if (error.status === 401) return "This server needs an API key.";
  if (error.status === 429) return "The server is busy: too many requests wait.";
  if (error.status === 503) return `The server takes no requests at the moment (${error.message}).`;
  if (error.code === "context_length_exceeded") return `The document is too long for the model. Delete something. (${error.message})`;
  return error.message;
}
