// Ways into the document: the menu of a "+", and images that are picked, dropped or pasted.

import { imageFiles, readImageFile } from "./images.js";
import { say } from "./notices.js";
import { imageSegment, textSegment } from "./state.js";

const holdsFiles = (event) => [...event.dataTransfer.types].includes("Files");

export class Inserter {
  #place = null; // id of the segment before which the menu inserts

  constructor({ list, menu, picker }, editor, runner, composer, view) {
    Object.assign(this, { list, menu, picker, editor, runner, composer, view });
    menu.addEventListener("click", (event) => this.#choose(event.target.closest("button")));
    picker.addEventListener("change", async () => {
      await this.addFiles([...picker.files], editor.index(this.#place));
      picker.value = "";
    });
    document.addEventListener("paste", (event) => this.#paste(event));
    for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => this.#dragOver(event));
    document.addEventListener("dragleave", (event) => !event.relatedTarget && this.#endDrag());
    document.addEventListener("drop", (event) => this.#drop(event));
  }

  /** Open the menu of the place before a segment, at its button. */
  open(id, button) {
    this.#place = id;
    const isFirst = this.editor.index(id) === 0; // the model needs something before
    for (const item of this.menu.querySelectorAll("[data-wants]")) item.disabled = this.runner.isRunning || isFirst;
    this.menu.showPopover();
    const place = button.getBoundingClientRect();
    const size = this.menu.getBoundingClientRect();
    const within = (value, most) => `${Math.max(8, Math.min(value, most - 8))}px`;
    this.menu.style.left = within(place.left + (place.width - size.width) / 2, innerWidth - size.width);
    this.menu.style.top = within(place.bottom + 6, innerHeight - size.height);
  }

  #choose(item) {
    if (!item) return;
    this.menu.hidePopover();
    const at = this.editor.index(this.#place);
    if (item.dataset.wants) this.runner.run({ wants: item.dataset.wants, after: this.editor.segments[at - 1].id });
    else if (item.dataset.insert === "image") this.picker.click();
    else {
      const segment = textSegment();
      this.editor.insert([segment], at);
      this.view.focus(segment.id);
    }
  }

  /** Add image files at a place, or at the end; says what could not be read. */
  async addFiles(files, at = null) {
    const blobs = [];
    for (const file of files) {
      try {
        blobs.push(await readImageFile(file));
      } catch (error) {
        this.composer.say(error.message);
      }
    }
    if (!blobs.length) return;
    if (at === null) this.composer.add(blobs);
    else this.editor.insert(blobs.map((blob) => imageSegment(blob)), at);
    say(blobs.length === 1 ? "The image was added." : `${blobs.length} images were added.`);
  }

  #paste(event) {
    const files = imageFiles(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    const segment = event.target.closest?.(".segment");
    this.addFiles(files, segment ? [...this.list.children].indexOf(segment) + 1 : null);
  }

  /** The place of a drop: before the first segment whose middle is below it. */
  #dropPlace(event) {
    const below = [...this.list.children].findIndex((element) => {
      const box = element.getBoundingClientRect();
      return event.clientY < box.top + box.height / 2;
    });
    return below < 0 ? null : below;
  }

  #dragOver(event) {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
    const place = this.#dropPlace(event);
    [...this.list.children].forEach((element, index) => element.classList.toggle("drop-before", index === place));
  }

  #endDrag() {
    document.body.classList.remove("dropping");
    for (const element of this.list.children) element.classList.remove("drop-before");
  }

  #drop(event) {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    const place = this.#dropPlace(event);
    this.#endDrag();
    this.addFiles([...event.dataTransfer.files], place);
  }
}
