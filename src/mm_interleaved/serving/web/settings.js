// Settings: their form, and where they are kept. The key stays in this tab (sessionStorage).

import { h } from "./dom.js";
import { local, session } from "./storage.js";

const STORED = "mmi-settings";
const KEY = "mmi-key";

/** Each field: its kind, its label, and help. An empty number means: what the mode or the server takes by default. */
const FIELDS = [
  { name: "model", label: "Model or adapter", kind: "select" },
  { name: "seed", label: "Seed", kind: "number", min: 0, step: 1, help: "Empty: another one each time" },
  { name: "maxImages", label: "Images at once", kind: "number", min: 1, step: 1, most: "images", help: "When text and images take turns" },
  { name: "maxTokens", label: "Longest text, in tokens", kind: "number", min: 1, step: 1, most: "tokens" },
  { name: "temperature", label: "Temperature", kind: "number", min: 0, max: 2, step: 0.05, help: "0: always the likeliest word" },
  { name: "steps", label: "Steps of an image", kind: "number", min: 1, step: 1, most: "steps", help: "More take longer" },
  { name: "guidance", label: "Guidance", kind: "number", min: 0, max: 100, step: 0.5, help: "How closely images follow the text" },
  { name: "scheduler", label: "Sampler", kind: "select" },
  { name: "size", label: "Image size", kind: "select" },
  { name: "candidates", label: "Candidates to choose among", kind: "number", min: 2, step: 1, most: "candidates" },
  { name: "inspect", label: "Keep what the model looks at", kind: "checkbox", help: "Texts and images get a button that shows it" },
];

const DEFAULTS = { maxImages: 3, candidates: 4, inspect: false };

export class Settings extends EventTarget {
  values = { ...DEFAULTS, ...readStored() };
  limits = null;
  models = [];
  #form = null;

  get key() {
    return session.get(KEY) ?? "";
  }

  set key(value) {
    if (value) session.set(KEY, value);
    else session.remove(KEY);
    this.dispatchEvent(new Event("key"));
  }

  /** What the server accepts; the form offers nothing else. */
  describe(models, limits) {
    Object.assign(this, { models, limits });
    if (this.#form) this.#fill();
    this.dispatchEvent(new Event("change"));
  }

  set(name, value) {
    if (value === "" || value == null) delete this.values[name];
    else this.values[name] = value;
    local.set(STORED, JSON.stringify(this.values));
    this.dispatchEvent(new Event("change"));
  }

  reset() {
    this.values = { ...DEFAULTS };
    local.remove(STORED);
    this.#fill();
    this.dispatchEvent(new Event("change"));
  }

  /** Whether generated segments can be inspected. */
  get inspects() {
    return Boolean(this.values.inspect && this.limits?.canInspect);
  }

  /** How many candidates "Candidates" makes; less than 2 if the server has only one. */
  get candidates() {
    return Math.min(this.values.candidates ?? DEFAULTS.candidates, this.limits?.candidates ?? 1);
  }

  /** Put the form into a dialog. */
  mount(container) {
    this.#form = container;
    this.#fill();
  }

  #fill() {
    const rows = FIELDS.filter((field) => this.#isOffered(field)).map((field) => this.#row(field));
    const key = h("input", {
      type: "password", id: "setting-key", autocomplete: "off", onchange: (event) => (this.key = event.target.value.trim()),
    });
    key.value = this.key;
    this.#form.replaceChildren(
      ...rows,
      h("div", { class: "field" }, h("label", { for: "setting-key" }, "API key"), key,
        h("p", { class: "help", id: "help-key" }, "Kept in this tab only")),
      h("button", { type: "button", class: "quiet", onclick: () => this.reset() }, "Reset all settings"),
    );
    key.setAttribute("aria-describedby", "help-key");
  }

  #isOffered({ name, most }) {
    if (name === "inspect") return Boolean(this.limits?.canInspect);
    if (name === "candidates") return (this.limits?.candidates ?? 1) > 1;
    return !most || !this.limits || this.limits[most] !== 0;
  }

  #row(field) {
    const id = `setting-${field.name}`;
    const input = field.kind === "select" ? this.#select(field) : this.#input(field);
    input.id = id;
    if (field.help) input.setAttribute("aria-describedby", `help-${field.name}`);
    const parts = [h("label", { for: id }, field.label), input];
    if (field.help) parts.push(h("p", { class: "help", id: `help-${field.name}` }, field.help));
    return h("div", { class: `field ${field.kind}` }, ...parts);
  }

  #select({ name }) {
    const options = {
      model: this.models, size: this.limits?.sizes ?? [], scheduler: ["", ...(this.limits?.schedulers ?? [])],
    }[name];
    const select = h("select", { onchange: (event) => this.set(name, event.target.value) },
      ...options.map((option) => h("option", { value: option }, option ? option.replace(/Scheduler$/, "") : "as the server does")));
    select.value = options.includes(this.values[name]) ? this.values[name] : (options[0] ?? "");
    return select;
  }

  #input({ name, kind, min, max, step, most }) {
    const highest = max ?? this.limits?.[most] ?? undefined;
    if (kind === "checkbox") {
      return h("input", { type: kind, checked: Boolean(this.values[name]), onchange: (event) => this.set(name, event.target.checked) });
    }
    const input = h("input", { type: kind, min: String(min), max: highest && String(highest), step: String(step), inputmode: "decimal" });
    input.value = this.values[name] ?? "";
    input.placeholder = DEFAULTS[name] ?? "default";
    input.addEventListener("change", () => {
      if (!input.reportValidity()) return;
      this.set(name, input.value === "" ? null : Number(input.value));
    });
    return input;
  }
}

function readStored() {
  try {
    return JSON.parse(local.get(STORED) ?? "{}");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return {}; // written by something else
  }
}
