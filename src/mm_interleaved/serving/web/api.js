// The public API of `mmi serve`, as any other client uses it.

import { readEvents } from "./sse.js";

/** An answer that is an error; `code`, `param` and `message` are those of the server. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** The server cannot be reached, or the connection broke. */
export class ConnectionError extends Error {}

let key = () => "";

/** Set what gives the API key; an empty one is not sent. */
export function useKey(source) {
  key = source;
}

async function call(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (body) headers["content-type"] = "application/json";
  if (key()) headers.authorization = `Bearer ${key()}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionError("The server cannot be reached. It may have stopped, or the network is down.");
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer) {
  const details = { status: answer.status, retryAfter: Number(answer.headers.get("retry-after")) || null };
  let message = `The server answered with status ${answer.status}.`;
  try {
    const { error } = await answer.json();
    message = error.message ?? message;
    Object.assign(details, { code: error.code, param: error.param });
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error; // a proxy's page has no JSON
  }
  return new ApiError(message, details);
}

/** Whether the server can answer requests. */
export async function isHealthy() {
  try {
    await call("/health");
    return true;
  } catch (error) {
    if (error instanceof ConnectionError || error instanceof ApiError) return false;
    throw error;
  }
}

/** The names of the model and its adapters. */
export async function listModels() {
  const { data } = await (await call("/v1/models")).json();
  return data.map((model) => model.id);
}

/** What this server accepts, from its own description: limits, sizes, schedulers, and whether it can inspect. */
export async function readLimits() {
  const description = await (await call("/openapi.json")).json();
  const { ResponseRequest, ImageTool } = description.components.schemas;
  const kinds = (property) => property?.anyOf ?? [property ?? {}];
  const most = (name) => kinds(ResponseRequest.properties[name]).find((kind) => kind.maximum != null)?.maximum ?? null;
  const names = (schema, name) => kinds(schema?.properties[name]).find((kind) => kind.enum)?.enum ?? [];
  return {
    steps: most("num_inference_steps"),
    candidates: most("num_candidates") ?? 1,
    tokens: most("max_output_tokens"),
    images: most("max_tool_calls"),
    sizes: names(ImageTool, "size"),
    schedulers: names(ResponseRequest, "scheduler"),
    canInspect:
      "inspect" in ResponseRequest.properties && "/v1/responses/{response_id}/inspection" in description.paths,
  };
}

/** The events of a new response. Aborting the signal closes the connection, which ends the generation. */
export async function* respond(body, signal) {
  const answer = await call("/v1/responses", { body: { ...body, stream: true }, signal, accept: "text/event-stream" });
  let ended = false;
  try {
    for await (const event of readEvents(answer.body)) {
      ended = ["response.completed", "response.incomplete", "response.failed"].includes(event.type);
      yield event;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ConnectionError("The connection broke. What had arrived is kept.");
  }
  if (!ended) throw new ConnectionError("The connection ended early. What had arrived is kept.");
}

/** The page that shows where the model looked for a response. */
export async function inspectionPage(id, signal) {
  return (await call(`/v1/responses/${encodeURIComponent(id)}/inspection?format=html`, { signal, accept: "text/html" })).text();
}
