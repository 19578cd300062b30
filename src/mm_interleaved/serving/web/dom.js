// Elements without markup strings: what a model or a user wrote only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

/** An element; attributes that begin with "on" are listeners, false and null are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

const PATHS = {
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  plus: "M12 5v14M5 12h14",
  play: "M7 4.5v15l12-7.5z",
  again: "M20 12a8 8 0 1 1-2.5-5.8M20 3v4.5h-4.5",
  grid: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  save: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  boxes: "M4 8V4h4M16 4h4v4M20 16v4h-4M8 20H4v-4",
  eye: "M2 12s3.6-6.5 10-6.5S22 12 22 12s-3.6 6.5-10 6.5S2 12 2 12zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  image: "M4 5h16v14H4zM4 16l4.5-4.5 4 4 3-3L20 17M15.5 9.5h.01",
  close: "M6 6l12 12M18 6L6 18",
  stop: "M7 7h10v10H7z",
  page: "M6 3h8l4 4v14H6zM14 3v4h4",
  clock: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 8v4.5l3 2",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  moon: "M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  half: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  text: "M5 6h14M12 6v13M9 19h6",
};

/** A line icon, which screen readers skip. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon and a name for screen readers and tooltips. */
export function iconButton(name, label, onclick, attributes = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

const FITS_ITSELF = CSS.supports("field-sizing", "content");

/** Let a text field be as high as its text, where style.css alone cannot. */
export function fitHeight(field) {
  if (FITS_ITSELF) return;
  const { scrollY } = window;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  if (window.scrollY !== scrollY) window.scrollTo(window.scrollX, scrollY); // the page was shorter for a moment
}
