// Generation: from the document to a request, and from the events of its stream back to the document.

import { ApiError, respond } from "./api.js";
import { base64Blob, dataUrl } from "./images.js";
import { MODES } from "./modes.js";
import { currentBlob, fullText, imageSegment, isFilled, textSegment } from "./state.js";

const PREVIEWS = 3; // the most that the API sends of an image
const MOST_RETRIES = 5;

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** The items of a request for these segments, a message each. */
async function inputItems(segments) {
  return Promise.all(segments.map(async (segment) => ({
    role: segment.by === "model" ? "assistant" : "user",
    content: [segment.kind === "text" ? { type: "input_text", text: fullText(segment) }
      : { type: "input_image", image_url: await dataUrl(currentBlob(segment)) }],
  })));
}

/** The body of a request: what is given, what is wanted, and the settings. Fields that nobody set are left out. */
export async function requestBody(segments, { wants, mode, seed, candidates }, settings) {
  const values = { ...MODES[mode].settings, ...settings.values };
  const body = {
    model: values.model, input: await inputItems(segments), store: settings.inspects, seed,
    temperature: values.temperature, max_output_tokens: values.maxTokens, num_inference_steps: values.steps,
    guidance_scale: values.guidance, scheduler: values.scheduler,
  };
  if (!settings.models.includes(body.model)) delete body.model;
  if (settings.inspects) body.inspect = true;
  if (wants === "text") body.tool_choice = "none";
  else body.tools = [{ type: "image_generation", partial_images: PREVIEWS, ...(values.size && { size: values.size }) }];
  if (wants === "image") body.tool_choice = { type: "image_generation" };
  if (wants === "both") body.max_tool_calls = values.maxImages;
  if (candidates > 1) body.num_candidates = candidates;
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined && value !== null));
}

/**
 * Runs one generation at a time. Listeners get "state" when it begins, ends or fails, and "say" with words for
 * screen readers, or for everyone (`visibly`).
 *
 * A task is {wants: "text" | "image" | "both", after: id of the segment that it follows or null, target?: id of the image
 * that gets new versions, candidates?}.
 */
export class Runner extends EventTarget {
  current = null;
  problem = null;

  constructor(editor, settings) {
    super();
    Object.assign(this, { editor, settings });
  }

  get isRunning() {
    return this.current !== null;
  }

  #notify() {
    this.dispatchEvent(new Event("state"));
  }

  #say(words, visibly = false) {
    this.dispatchEvent(new CustomEvent("say", { detail: { words, visibly } }));
  }

  /** Close the connection, which ends the generation; what has arrived stays. */
  stop() {
    this.current?.controller.abort();
  }

  dismiss() {
    clearInterval(this.problem?.timer);
    this.problem = null;
    this.#notify();
  }

  async run(task) {
    if (this.isRunning) return;
    this.dismiss();
    const current = { task, controller: new AbortController(), last: task.after, made: [], open: null, response: null };
    const document = this.editor.document;
    this.current = current;
    this.#notify();
    this.#say("The model is working.");
    let error = null;
    try {
      await this.#stream(current);
    } catch (caught) {
      error = caught;
    }
    this.#tidy(current);
    this.current = null;
    if (this.editor.document === document) { // else another one was opened meanwhile
      if (error && error.name !== "AbortError") this.#fail(task, error);
      else if (error) this.#say("Stopped.");
      else this.#summarize(current);
    }
    this.#notify();
  }

  async #stream(current) {
    const { task, controller } = current;
    const { segments, document } = this.editor;
    const place = task.target ? this.editor.index(task.target) : this.editor.index(task.after) + 1;
    const given = segments.slice(0, place).filter(isFilled);
    if (!given.length) throw new Error("There is nothing to go on from yet. Write something, or add an image.");
    const seed = task.target || this.settings.values.seed === undefined ? randomSeed() : this.settings.values.seed;
    if (task.target) this.editor.change(task.target, { pending: { progress: 0 } });
    const body = await requestBody(given, { ...task, mode: document.mode, seed }, this.settings);
    for await (const event of respond(body, controller.signal)) this.#take(current, event);
  }

  #take(current, event) {
    switch (event.type) {
      case "response.created":
        current.response = event.response;
        break;
      case "response.output_item.added":
        this.#open(current, event.item);
        break;
      case "response.output_text.delta":
        this.editor.setText(current.open, this.editor.find(current.open)?.text + event.delta);
        break;
      case "response.image_generation_call.partial_image":
        this.#preview(current, event);
        break;
      case "response.output_item.done":
        this.#close(current, event.item);
        break;
      case "response.incomplete":
        current.note = "The text reached its longest length. Go on to let the model finish.";
        break;
      case "response.failed":
        throw new ApiError(event.response.error?.message ?? "The server ended the generation.", { code: event.response.error?.code });
    }
  }

  /** A segment for an item that begins; a redone image stays where it is. */
  #open(current, item) {
    if (current.task.target) {
      current.open = current.task.target;
      return;
    }
    const more = { by: "model", ...(this.settings.inspects && { response: current.response.id }) };
    const segment = item.type === "message" ? textSegment("", { ...more, writing: true })
      : imageSegment(null, { ...more, pending: { progress: 0 } });
    const at = current.last === null ? 0 : this.editor.index(current.last) + 1;
    this.editor.insert([segment], at > 0 || current.last === null ? at : undefined);
    current.open = current.last = segment.id;
    current.made.push(segment.id);
    this.#say(item.type === "message" ? "Writing a text." : "Generating an image.");
  }

  #preview(current, event) {
    const progress = (event.partial_image_index + 1) / (PREVIEWS + 1);
    this.editor.change(current.open, { pending: { progress, blob: base64Blob(event.partial_image_b64, event.output_format) } });
    this.#say(`Image, preview ${event.partial_image_index + 1}.`);
  }

  #close(current, item) {
    const id = current.open;
    current.open = null;
    if (item.type === "message") {
      this.editor.change(id, { text: item.content[0].text, writing: false });
      return;
    }
    const results = item.candidates ?? [item.result];
    const takes = results.map((result, number) => ({
      blob: base64Blob(result, item.output_format), seed: current.response.seed, ...(results.length > 1 && { number: number + 1 }),
    }));
    this.editor.addTakes(id, takes);
    if (current.task.target) this.editor.change(id, this.settings.inspects ? { response: current.response.id, by: "model" } : { by: "model" });
  }

  /** Remove what is empty after a stop or a failure: half an image is no image. */
  #tidy(current) {
    for (const id of [...current.made, current.task.target]) {
      const segment = this.editor.find(id);
      if (!segment) continue;
      if (segment.kind === "text" ? !segment.text : !segment.takes.length) this.editor.remove(id);
      else if (segment.pending || segment.writing) this.editor.change(id, { pending: null, writing: false });
    }
  }

  #fail(task, error) {
    if (error instanceof TypeError || error instanceof ReferenceError) reportError(error); // the page's own mistake
    const made = this.editor.find(task.after) || task.after === null ? task.after : this.editor.segments.at(-1)?.id;
    this.problem = { error, task: { ...task, after: made }, place: task.target ?? lastOf(this.editor, made) };
    if (error instanceof ApiError && error.status === 429 && (task.tries ?? 0) < MOST_RETRIES) this.#retryLater(error.retryAfter ?? 5);
  }

  #retryLater(seconds) {
    const problem = this.problem;
    problem.seconds = seconds;
    problem.timer = setInterval(() => {
      problem.seconds -= 1;
      if (problem.seconds > 0) this.#notify();
      else this.retry();
    }, 1000);
  }

  #summarize({ made, task, note }) {
    if (note) this.#say(note, true);
    else if (task.target) this.#say("The image has a new version.");
    else if (made.length) this.#say(`Done. The model added ${made.length} ${made.length === 1 ? "part" : "parts"}.`);
    else this.#say("The model has nothing to add here.", true);
  }

  retry() {
    const { task } = this.problem;
    this.run({ ...task, tries: (task.tries ?? 0) + 1 });
  }
}

/** The last segment that stands where a task has failed: the error is shown below it. */
function lastOf(editor, after) {
  return after ?? editor.segments[0]?.id ?? null;
}
