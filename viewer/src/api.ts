/**
 * The server's answers, typed. In a single file, which has no server, the data that the file carries is served instead,
 * and what would change something is refused.
 */

/** A run in the list. */
export interface RunRow {
  id: string;
  task: string;
  experiment: string | null;
  started: string;
  seconds: number | null;
  status: string;
  metrics: Record<string, number>;
  has: Record<"graph" | "circuit" | "trials" | "study" | "report" | "sweep", boolean>;
}
export interface RunDetail {
  config: string;
  overrides: string[];
  metrics: Record<string, number>;
  files: { path: string; bytes: number }[];
  fvu_by_layer?: number[];
  command: string;
}
export interface Supernode {
  id: string;
  name: string;
  members: string[];
}
/** Everything a user adds to a graph; `version` counts the saves. */
export interface Annotations {
  version: number;
  pinned: string[];
  supernodes: Supernode[];
  labels: Record<string, string>;
  notes: string;
}
export interface Score {
  replacement: number;
  completeness: number;
}
export interface Study {
  id: string;
  model: string;
  layers: Record<string, number>;
  label_sets: string[];
}
export interface FeatureRow {
  feature: string;
  label: string | null;
  score: number | null;
  fires: number;
  share_image: number;
  max: number;
  top_tokens: string[];
}
export interface Example {
  tokens: string[];
  levels: number[];
  activation: number;
  pictures: string[];
  grid?: { rows: number; columns: number; levels: number[]; boxes: [number, number, number, number][] };
}
export interface Feature {
  feature: string;
  label: string | null;
  score: number | null;
  fires: number;
  share_image: number;
  histogram?: { edges: number[]; counts: number[] };
  logits?: { top: { token: string; value: number }[]; bottom: { token: string; value: number }[] };
  groups: { name: string; examples: Example[] }[];
  neighbours?: { decoder: { feature: string; label: string | null; value: number }[]; coactivation: { feature: string; label: string | null; value: number }[] };
}
export interface Job {
  id: string;
  command: string;
  status: "queued" | "running" | "done" | "failed" | "cancelled";
  progress: { text: string; fraction: number | null };
  run: string | null;
  error: string | null;
  result: unknown;
}

/** What a single file carries, written by Python into `<script type="application/json" id="data">`. */
export interface Embedded {
  name: string;
  graph: unknown;
  annotations?: Annotations;
  features: Record<string, Feature>;
}

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    /** The body of the answer, such as the annotations that another tab saved. */
    readonly body: unknown = null,
  ) {
    super(message);
  }
}

const carried = document.getElementById("data")?.textContent ?? null;
export const embedded: Embedded | null = carried === null ? null : (JSON.parse(carried) as Embedded);

const path = (id: string): string => id.split("/").map(encodeURIComponent).join("/");

export async function request<T>(url: string, options: RequestInit = {}): Promise<T> {
  let answer: Response;
  try {
    answer = await fetch(url, options);
  } catch {
    throw new ApiError("The server does not answer. Is task=serve still running?", 0);
  }
  const type = answer.headers.get("content-type") ?? "";
  const body: unknown = type.includes("json") ? await answer.json().catch(() => null) : await answer.text();
  if (answer.ok) return body as T;
  const said = body !== null && typeof body === "object" && "error" in body ? String(body.error) : `The server answered ${answer.status}.`;
  throw new ApiError(said, answer.status, body);
}

export function send<T>(method: "POST" | "PUT" | "DELETE", url: string, body?: unknown, headers: Record<string, string> = {}): Promise<T> {
  const json: Record<string, string> = body === undefined ? {} : { "content-type": "application/json" };
  return request<T>(url, { method, headers: { ...json, ...headers }, body: body === undefined ? undefined : JSON.stringify(body) });
}

function served<T>(make: (data: Embedded) => T | undefined, fetchIt: () => Promise<T>): Promise<T> {
  if (embedded === null) return fetchIt();
  const value = make(embedded);
  return value === undefined ? Promise.reject(new ApiError("This file does not contain it.", 404)) : Promise.resolve(value);
}

export const api = {
  runs: () => request<RunRow[]>("api/runs"),
  run: (id: string) => request<RunDetail>(`api/runs/${path(id)}`),
  fileUrl: (id: string, file: string) => `api/runs/${path(id)}/file?path=${encodeURIComponent(file)}`,
  /** A graph as parsed JSON; `graph/parse.ts` checks it. The id "" is the bundled example. */
  graph: (id: string) => served<unknown>((data) => data.graph, () => request(id ? `api/graphs/${path(id)}` : "api/example")),
  annotations: (id: string) => request<Annotations>(`api/graphs/${path(id)}/annotations`),
  saveAnnotations: (id: string, value: Annotations) =>
    send<Annotations>("PUT", `api/graphs/${path(id)}/annotations`, value, { "if-match": String(value.version) }),
  score: (id: string, pinned: string[]) => send<Score>("POST", `api/graphs/${path(id)}/score`, { pinned }),
  circuit: (id: string, value: Pick<Annotations, "pinned" | "supernodes">) =>
    send<string>("POST", `api/graphs/${path(id)}/circuit`, value),
  studies: () => request<Study[]>("api/studies"),
  features: (study: string, query: Record<string, string>) =>
    request<{ rows: FeatureRow[]; total: number }>(`api/studies/${path(study)}/features?${new URLSearchParams(query)}`),
  feature: (study: string, feature: string) =>
    served<Feature>((data) => data.features[feature], () => request(`api/studies/${path(study)}/features/${path(feature)}`)),
  trials: (id: string, query: Record<string, string>) => request<unknown>(`api/runs/${path(id)}/trials?${new URLSearchParams(query)}`),
  fvu: () => request<unknown>("api/fvu"),
  upload: (file: Blob) => request<{ picture: string }>("api/uploads", { method: "POST", body: file }),
  start: (job: Record<string, unknown>) => send<{ id: string; command: string }>("POST", "api/jobs", job),
  job: (id: string) => request<Job>(`api/jobs/${path(id)}`),
  cancel: (id: string) => send<unknown>("DELETE", `api/jobs/${path(id)}`),
};
