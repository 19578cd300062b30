// The bar at the bottom: the mode, what comes next, a text, images, and the button that runs or stops the model.

import { fitHeight } from "./dom.js";
import { MODES, framed } from "./modes.js";
import { imageSegment, isFilled, textSegment } from "./state.js";

export class Composer {
  constructor(form, editor, runner, addImages) {
    Object.assign(this, { form, editor, runner });
    const find = (name) => form.querySelector(`[data-part="${name}"]`);
    this.field = find("field");
    this.mode = find("mode");
    this.run = find("run");
    this.stop = find("stop");
    this.problem = find("problem");
    this.picker = find("picker");
    for (const [value, { name }] of Object.entries(MODES)) this.mode.append(new Option(name, value));
    form.addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    this.field.addEventListener("input", () => { fitHeight(this.field); this.say(""); });
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    this.mode.addEventListener("change", () => editor.setMode(this.mode.value));
    this.stop.addEventListener("click", () => { runner.stop(); this.field.focus(); });
    find("attach").addEventListener("click", () => this.picker.click());
    this.picker.addEventListener("change", async () => { await addImages([...this.picker.files]); this.picker.value = ""; });
    editor.addEventListener("change", ({ detail }) => ["mode", "open"].includes(detail.kind) && this.#showMode());
    runner.addEventListener("state", () => this.#showState());
    this.#showMode();
  }

  get wants() {
    return this.form.elements.wants.value;
  }

  #showMode() {
    const mode = MODES[this.editor.document.mode];
    this.mode.value = this.editor.document.mode;
    this.field.placeholder = mode.placeholder;
    this.field.setAttribute("aria-label", mode.placeholder);
    this.run.querySelector("span").textContent = mode.verb;
    this.form.elements.wants.value = mode.wants;
    this.say("");
  }

  #showState() {
    const { isRunning } = this.runner;
    if (!isRunning) this.say("");
    const hadFocus = document.activeElement === (isRunning ? this.run : this.stop);
    this.run.hidden = isRunning;
    this.stop.hidden = !isRunning;
    if (hadFocus) (isRunning ? this.stop : this.run).focus();
  }

  /** A problem of what is to be sent, in words. */
  say(words) {
    this.problem.textContent = words;
    this.problem.hidden = !words;
  }

  /** Add the text to the document and let the model go on. */
  send(text = this.field.value.trim()) {
    if (this.runner.isRunning) return this.say("The model is still at work. Stop it first (Esc), or wait.");
    const { mode } = this.editor.document;
    const { segments } = this.editor;
    const given = framed(mode, text);
    const hasImage = segments.some((segment) => segment.kind === "image" && isFilled(segment));
    if (MODES[mode].needsImage && !hasImage) return this.say("Add an image first: with the button, or drop or paste it.");
    if (MODES[mode].frame && !given.text) return this.say(`${MODES[mode].placeholder} first.`);
    if (!given.text && !segments.some(isFilled)) return this.say("Write something or add an image first.");
    if (given.text) this.editor.insert([textSegment(given.text, given)]);
    this.field.value = "";
    fitHeight(this.field);
    this.runner.run({ wants: this.wants, after: segments.at(-1)?.id ?? this.editor.segments.at(-1).id });
  }

  /** Add images at the end of the document, after what was written here. */
  add(blobs) {
    const text = this.field.value.trim();
    const written = text ? [textSegment(text)] : [];
    this.editor.insert([...written, ...blobs.map((blob) => imageSegment(blob))]);
    this.field.value = "";
    fitHeight(this.field);
    this.say("");
  }
}
