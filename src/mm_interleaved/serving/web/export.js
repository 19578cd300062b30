// The document as a file: an HTML page, the JSON that `mmi generate` reads, or one PNG image.

import { canvasBlob, dataUrl } from "./images.js";
import { currentBlob, fullText, isFilled, titleOf } from "./state.js";

const PAGE_STYLE = `
body { max-width: 40rem; margin: 4rem auto; padding: 0 1.5rem; background: #fbfaf7; color: #22211e;
  font: 1.15rem/1.65 Charter, "Bitstream Charter", Georgia, Cambria, serif; }
h1 { font-size: 1.9rem; line-height: 1.25; font-weight: 600; }
img { display: block; width: min(100%, 28rem); border-radius: 6px; }
p { white-space: pre-wrap; }
@media (prefers-color-scheme: dark) { body { background: #171715; color: #e9e6df; } }
`;
const STRIP = { width: 640, margin: 40, gap: 28, image: 400, font: 20, line: 31 };

/** A name for a file of this document. */
export function fileName(document, extension) {
  const words = titleOf(document).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${words.slice(0, 40) || "document"}.${extension}`;
}

/** {"segments": [{"text"}, {"image"}]}, with images as data URLs (docs/data_formats.md, "Segments"). */
export async function toJson(document) {
  const segments = await Promise.all(document.segments.filter(isFilled).map(async (segment) =>
    segment.kind === "text" ? { text: fullText(segment) } : { image: await dataUrl(currentBlob(segment)) }));
  return new Blob([JSON.stringify({ id: titleOf(document), segments }, null, 1)], { type: "application/json" });
}

/** A page that needs nothing else. */
export async function toHtml(source) {
  const page = document.implementation.createHTMLDocument(titleOf(source));
  page.documentElement.lang = document.documentElement.lang;
  const meta = page.createElement("meta");
  meta.setAttribute("charset", "utf-8");
  const viewport = page.createElement("meta");
  viewport.name = "viewport";
  viewport.content = "width=device-width, initial-scale=1";
  page.head.prepend(meta, viewport);
  if (source.title.trim()) page.body.append(element(page, "h1", source.title.trim()));
  for (const segment of source.segments.filter(isFilled)) {
    if (segment.kind === "text") page.body.append(element(page, "p", fullText(segment)));
    else {
      const image = page.createElement("img");
      image.alt = segment.by === "model" ? "Image by the model" : "Image";
      image.src = await dataUrl(currentBlob(segment));
      page.body.append(image);
    }
  }
  // the style is added as text: this page's own policy would refuse the element
  const html = page.documentElement.outerHTML.replace("</head>", `<style>${PAGE_STYLE}</style></head>`);
  return new Blob([`<!doctype html>\n${html}\n`], { type: "text/html" });
}

function element(page, tag, text) {
  const found = page.createElement(tag);
  found.textContent = text;
  return found;
}

/** Texts and images below each other, on paper, at two pixels a point. */
export async function toPng(source) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  const font = `${STRIP.font}px Charter, "Bitstream Charter", Georgia, Cambria, serif`;
  context.font = font;
  const blocks = [];
  for (const segment of source.segments.filter(isFilled)) {
    if (segment.kind === "text") {
      const lines = wrap(context, fullText(segment), STRIP.width - 2 * STRIP.margin);
      blocks.push({ lines, height: lines.length * STRIP.line });
    } else {
      const image = await createImageBitmap(currentBlob(segment));
      const width = Math.min(STRIP.image, STRIP.width - 2 * STRIP.margin);
      blocks.push({ image, width, height: (width * image.height) / image.width });
    }
  }
  const height = blocks.reduce((sum, block) => sum + block.height + STRIP.gap, 2 * STRIP.margin - STRIP.gap);
  canvas.width = STRIP.width * 2;
  canvas.height = Math.round(height * 2);
  context.scale(2, 2);
  context.fillStyle = "#fbfaf7";
  context.fillRect(0, 0, STRIP.width, height);
  context.fillStyle = "#22211e";
  context.font = font;
  context.textBaseline = "middle";
  let y = STRIP.margin;
  for (const { lines, image, width, height: tall } of blocks) {
    lines?.forEach((line, number) => context.fillText(line, STRIP.margin, y + (number + 0.5) * STRIP.line));
    if (image) context.drawImage(image, STRIP.margin, y, width, tall);
    image?.close();
    y += tall + STRIP.gap;
  }
  return canvasBlob(canvas);
}

function wrap(context, text, width) {
  const lines = [];
  for (const paragraph of text.split("\n")) {
    let line = "";
    for (const word of paragraph.split(" ")) {
      const longer = line ? `${line} ${word}` : word;
      if (line && context.measureText(longer).width > width) {
        lines.push(line);
        line = word;
      } else line = longer;
    }
    lines.push(line);
  }
  return lines;
}
