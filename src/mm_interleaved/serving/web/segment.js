// The view of one segment: its element is made once and then updated, so that focus and caret stay.

import { boxLayer, describeBoxes } from "./boxes.js";
import { fitHeight, h, icon, iconButton } from "./dom.js";
import { blobUrl } from "./images.js";
import { currentBlob } from "./state.js";

/** A toolbar: one stop of the Tab key, and arrow keys within it. */
function toolbar(label, buttons) {
  const element = h("div", { class: "tools", role: "toolbar", "aria-label": label });
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const shown = buttons.filter((button) => !button.hidden && !button.disabled);
    const at = shown.indexOf(event.target);
    if (!step || at < 0 || event.altKey) return;
    event.preventDefault();
    const next = shown[(at + step + shown.length) % shown.length];
    for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  });
  element.append(...buttons);
  return element;
}

class SegmentView {
  constructor(id, actions) {
    Object.assign(this, { id, actions });
    const act = (name) => () => actions[name](id);
    this.buttons = {
      goOn: iconButton("play", "Go on from here", act("goOn")),
      up: iconButton("up", "Move up", () => actions.move(id, -1)),
      down: iconButton("down", "Move down", () => actions.move(id, 1)),
      inspect: iconButton("eye", "Show what the model looked at", act("inspect")),
      remove: iconButton("bin", "Delete", act("remove")),
    };
    this.gap = h("div", { class: "gap" }, h("button", {
      type: "button", class: "gap-button", "aria-label": "Insert here", title: "Insert here", "aria-haspopup": "menu",
      onclick: (event) => actions.openInsert(id, event.currentTarget),
    }, icon("plus")));
    this.element = h("li", { class: "segment" }, this.gap);
  }

  /** Append the content and the toolbar with these buttons. */
  build(content, names) {
    this.tools = names.map((name) => this.buttons[name]);
    this.tools.forEach((button, number) => { button.tabIndex = number ? -1 : 0; });
    this.toolbar = toolbar("Tools", this.tools);
    this.element.append(h("div", { class: "content" }, content), this.toolbar);
  }

  updateShared(segment, context) {
    const { number, count, isRunning, canInspect } = context;
    const label = `${segment.kind === "text" ? "Text" : "Image"} ${number} of ${count}, by ${segment.by === "model" ? "the model" : "you"}`;
    this.element.dataset.by = segment.by;
    this.element.setAttribute("aria-label", label);
    this.toolbar.setAttribute("aria-label", `Tools of ${label}`);
    this.buttons.up.disabled = number === 1;
    this.buttons.down.disabled = number === count;
    this.buttons.goOn.disabled = isRunning;
    this.buttons.inspect.hidden = !(segment.response && canInspect);
    const usable = this.tools.filter((button) => !button.hidden && !button.disabled);
    if (!usable.some((button) => button.tabIndex === 0) && usable.length) usable[0].tabIndex = 0;
  }
}

export class TextView extends SegmentView {
  constructor(id, actions) {
    super(id, actions);
    this.field = h("textarea", { rows: 1, spellcheck: true, "data-focus": id, placeholder: "Write …" });
    this.field.addEventListener("input", () => actions.setText(id, this.field.value));
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Backspace" && !this.field.value) {
        event.preventDefault();
        actions.remove(id);
      }
    });
    this.label = h("span", { class: "frame", "aria-hidden": "true" });
    this.build(h("div", { class: "text" }, this.label, this.field), ["goOn", "up", "down", "inspect", "remove"]);
  }

  update(segment, context) {
    this.updateShared(segment, context);
    this.element.classList.toggle("writing", Boolean(segment.writing));
    this.element.classList.toggle("is-box", /^\s*\(\d{3},\d{3}\)/.test(segment.text));
    this.field.setAttribute("aria-label", [this.element.getAttribute("aria-label"), segment.label].filter(Boolean).join(". "));
    this.field.readOnly = Boolean(segment.writing);
    this.label.textContent = segment.label ?? "";
    this.label.title = segment.label ? `For the model: ${segment.before}…${segment.after}` : "";
    this.setText(segment.text);
  }

  setText(text) {
    if (this.field.value !== text) this.field.value = text;
    fitHeight(this.field);
  }
}

export class ImageView extends SegmentView {
  constructor(id, actions) {
    super(id, actions);
    const act = (name) => () => actions[name](id);
    Object.assign(this.buttons, {
      again: iconButton("again", "Another version, with another seed", act("again")),
      several: iconButton("grid", "Several candidates to choose among", act("several")),
      boxes: iconButton("boxes", "Show boxes", () => { this.showsBoxes = !this.showsBoxes; this.refreshBoxes(); }),
      save: iconButton("save", "Save the image", act("save")),
    });
    this.showsBoxes = true;
    this.image = h("img", { onload: () => this.refreshBoxes() });
    this.progress = h("progress", { max: "1", "aria-label": "Progress of the image" });
    this.frame = h("div", { class: "frame-of-image" }, this.image, this.progress);
    this.takes = h("div", { class: "takes", role: "radiogroup", "aria-label": "Versions of this image" });
    this.caption = h("figcaption", { class: "help" });
    this.figure = h("figure", { tabindex: "0", "data-focus": id }, this.frame, this.takes, this.caption);
    this.figure.addEventListener("keydown", (event) => {
      if (event.target === this.figure && ["Delete", "Backspace"].includes(event.key)) {
        event.preventDefault();
        actions.remove(id);
      }
    });
    this.build(this.figure, ["again", "several", "goOn", "up", "down", "boxes", "inspect", "save", "remove"]);
  }

  update(segment, context) {
    this.updateShared(segment, context);
    const blob = segment.pending?.blob ?? currentBlob(segment);
    const label = this.element.getAttribute("aria-label");
    this.figure.setAttribute("aria-label", label);
    this.image.hidden = !blob;
    if (blob && this.image.getAttribute("src") !== blobUrl(blob)) this.image.src = blobUrl(blob);
    this.boxes = segment.pending ? [] : (context.boxes ?? []);
    this.image.alt = [segment.pending ? "An image that is being generated" : label, describeBoxes(this.boxes)].filter(Boolean).join(". ");
    this.element.classList.toggle("pending", Boolean(segment.pending));
    this.element.classList.toggle("has-preview", Boolean(segment.pending?.blob));
    this.progress.hidden = !segment.pending;
    if (segment.pending?.progress) this.progress.value = segment.pending.progress;
    else this.progress.removeAttribute("value");
    this.buttons.again.disabled = this.buttons.several.disabled = context.isRunning || context.number === 1;
    this.buttons.several.hidden = context.candidates < 2;
    this.buttons.several.title = `${context.candidates} candidates to choose among`;
    this.buttons.boxes.hidden = !this.boxes.length;
    this.buttons.save.hidden = !currentBlob(segment);
    this.#updateTakes(segment);
    this.refreshBoxes();
  }

  #updateTakes(segment) {
    const take = segment.takes[segment.chosen];
    const seed = take?.seed === undefined ? "" : `Seed ${take.seed}${take.number ? `, candidate ${take.number}` : ""}`;
    this.caption.textContent = segment.takes.length > 1 ? `Version ${segment.chosen + 1} of ${segment.takes.length}${seed && ` · ${seed}`}` : seed;
    this.caption.hidden = !this.caption.textContent || Boolean(segment.pending);
    this.takes.hidden = segment.takes.length < 2;
    while (this.takes.children.length > segment.takes.length) this.takes.lastChild.remove();
    segment.takes.forEach((one, number) => {
      const button = this.takes.children[number] ?? this.takes.appendChild(this.#takeButton(number));
      const image = button.firstChild;
      if (image.getAttribute("src") !== blobUrl(one.blob)) image.src = blobUrl(one.blob);
      button.setAttribute("aria-checked", String(number === segment.chosen));
      button.tabIndex = number === segment.chosen ? 0 : -1;
    });
  }

  #takeButton(number) {
    return h("button", {
      type: "button", role: "radio", class: "take", "aria-label": `Version ${number + 1}`,
      onclick: () => this.actions.choose(this.id, number),
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step || event.altKey) return;
        event.preventDefault();
        const count = this.takes.children.length;
        const next = (number + step + count) % count;
        this.actions.choose(this.id, next);
        this.takes.children[next].focus();
      },
    }, h("img", { alt: "" }));
  }

  refreshBoxes() {
    this.frame.querySelector(".boxes")?.remove();
    const shown = this.showsBoxes && this.boxes?.length && this.image.complete && this.image.naturalWidth;
    if (shown) this.frame.append(boxLayer(this.boxes, this.image));
    this.buttons.boxes.setAttribute("aria-pressed", String(this.showsBoxes));
  }
}
