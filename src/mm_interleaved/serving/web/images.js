// Image files: read, made fit for the API, shown.

const ACCEPTED = ["image/png", "image/jpeg"]; // WebP is encoded anew, since it may have several frames
const LONGEST = 1024; // pixels; the model sees less, and the browser keeps every document
const urls = new WeakMap();

/** A URL of a blob, always the same one. */
export function blobUrl(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** The image of a file that a user chose, at most 1024 pixels wide and high. */
export async function readImageFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    const name = file.name ? `“${file.name}”` : "This";
    throw new Error(`${name} is no image that this browser can read. PNG, JPEG and WebP work.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  if (scale === 1 && ACCEPTED.includes(file.type)) {
    bitmap.close();
    return new Blob([file], { type: file.type });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(2, Math.round(width * scale));
  canvas.height = Math.max(2, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvasBlob(canvas, file.type === "image/jpeg" ? "image/jpeg" : "image/png");
}

/** The image of a canvas. */
export function canvasBlob(canvas, type = "image/png") {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The image is too large for this browser."))), type, 0.92);
  });
}

/** A `data:` URL of a blob. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The blob of base64 as the API sends it. */
export function base64Blob(text, format = "png") {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

/** The image files of a drop or a paste. */
export function imageFiles(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** Save a blob as a file of the user's. */
export function download(blob, name) {
  const link = document.createElement("a");
  const url = URL.createObjectURL(blob);
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
