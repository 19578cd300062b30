// The panel that shows what the model looked at. The server's page has scripts of its own, so it runs in a frame with an
// origin of its own (frame.html), which can reach neither this page nor the network.

import { inspectionPage } from "./api.js";
import { h } from "./dom.js";

/** Show the inspection of a response in a dialog. */
export async function showInspection(dialog, id) {
  const body = dialog.querySelector(".dialog-body");
  body.replaceChildren(h("p", { class: "help", role: "status" }, "Loading …"));
  dialog.showModal();
  const loading = new AbortController();
  dialog.addEventListener("close", () => { loading.abort(); body.replaceChildren(); }, { once: true });
  try {
    const page = await inspectionPage(id, loading.signal);
    const frame = h("iframe", { title: "What the model looked at", sandbox: "allow-scripts", src: "/web/frame.html" });
    frame.addEventListener("load", () => frame.contentWindow?.postMessage({ page }, "*"), { once: true });
    body.replaceChildren(frame);
  } catch (error) {
    if (error.name === "AbortError") return;
    const gone = error.status === 404 ? "The server no longer has this response. Generate it again to inspect it." : error.message;
    body.replaceChildren(h("p", { class: "problem", role: "alert" }, gone));
  }
}
