// Boxes that texts state, shown over the image before them.
//
// A text states a box as "(012,045)(678,999)": thousandths of the sides of the image as the model sees it, which is the
// central square (docs/data_formats.md, "Boxes and regions").

import { h } from "./dom.js";
import { fullText } from "./state.js";

const BOX = /\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)/g;
const PHRASE = /<ref>([^<]*)<\/ref>(?:<box>)?(?:\(\d{3},\d{3}\)\(\d{3},\d{3}\))*(?:<box>)?$/;
const ASKED = /describes\. (.*?)<box>\s*$/;

/** The boxes of each image by its id: [{sides: [x1, y1, x2, y2], label}]. */
export function findBoxes(segments) {
  const found = new Map();
  let image = null;
  let before = "";
  for (const segment of segments) {
    if (segment.kind === "image") {
      image = segment.id;
      before = "";
      continue;
    }
    const text = fullText(segment);
    for (const match of text.matchAll(BOX)) {
      const sides = match.slice(1, 5).map(Number);
      if (!image || sides[0] >= sides[2] || sides[1] >= sides[3]) continue;
      const label = PHRASE.exec(text.slice(0, match.index))?.[1] ?? ASKED.exec(before + text.slice(0, match.index))?.[1] ?? "";
      if (!found.has(image)) found.set(image, []);
      found.get(image).push({ sides, label: label.trim() });
    }
    before = text;
  }
  return found;
}

/** The boxes over an image, and their names. `image` is the element; it must have loaded. */
export function boxLayer(boxes, image) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const side = Math.min(width, height);
  const place = (value, whole) => (100 * ((whole - side) / 2 + (value / 999) * side)) / whole;
  return h("div", { class: "boxes", "aria-hidden": "true" }, ...boxes.map(({ sides: [x1, y1, x2, y2], label }, number) => {
    const box = h("div", { class: "box", "data-color": String(number % 4) }, label && h("span", {}, label));
    box.style.left = `${place(x1, width)}%`;
    box.style.top = `${place(y1, height)}%`;
    box.style.width = `${place(x2, width) - place(x1, width)}%`;
    box.style.height = `${place(y2, height) - place(y1, height)}%`;
    if (y1 < 90) box.classList.add("label-below");
    return box;
  }));
}

/** The boxes in words, for those who do not see them. */
export function describeBoxes(boxes) {
  const percent = (value) => Math.round(value / 9.99);
  return boxes
    .map(({ sides: [x1, y1, x2, y2], label }) =>
      `${label || "Box"}: ${percent(x1)} to ${percent(x2)} percent from the left, ${percent(y1)} to ${percent(y2)} percent from the top.`)
    .join(" ");
}
