// The state of the server, and what it accepts once it can be asked.

import { ApiError, ConnectionError, isHealthy, listModels, readLimits } from "./api.js";

const EVERY = 20_000; // milliseconds
const WHEN_DOUBTFUL = 3_000; // while the server is gone or a connection has failed

export class ServerWatch {
  #described = false;
  #timer = null;

  constructor(status, gone, settings, runner) {
    Object.assign(this, { status, gone, settings, runner });
    settings.addEventListener("key", () => { this.#described = false; this.check(); });
    settings.addEventListener("change", () => this.#described && this.check());
    runner.addEventListener("state", () => this.#connectionFailed && this.check());
    document.addEventListener("visibilitychange", () => !document.hidden && this.check());
  }

  get #connectionFailed() {
    return this.runner.problem?.error instanceof ConnectionError;
  }

  /** Ask whether the server is there, show it, and ask again later. */
  async check() {
    clearTimeout(this.#timer);
    const healthy = await isHealthy();
    if (!healthy) this.#described = false;
    else if (!this.#described) await this.#describe();
    const { values, models } = this.settings;
    this.status.dataset.state = healthy ? "ok" : "gone";
    this.status.querySelector("span").textContent = healthy ? (values.model ?? models[0] ?? "Ready") : "Server not reachable";
    this.gone.hidden = healthy;
    clearTimeout(this.#timer); // of another check that ran meanwhile
    if (!document.hidden) this.#timer = setTimeout(() => this.check(), healthy && !this.#connectionFailed ? EVERY : WHEN_DOUBTFUL);
  }

  async #describe() {
    try {
      const [models, limits] = await Promise.all([listModels(), readLimits()]);
      if (this.settings.values.model && !models.includes(this.settings.values.model)) this.settings.set("model", null);
      this.settings.describe(models, limits);
      this.#described = true;
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) return; // asked for where something is generated
      if (!(error instanceof ApiError || error instanceof ConnectionError)) throw error;
    }
  }
}
