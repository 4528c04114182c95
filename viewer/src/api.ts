/**
 * The server's answers, typed. In a single file, which has no server, the data that the file carries is served instead,
 * and what would change something is refused.
 */

export interface Has {
  graph: boolean;
  circuit: boolean;
  trials: boolean;
  study: boolean;
  report: boolean;
  sweep: boolean;
}

/** One run folder; `id` is its path relative to the root. */
export interface Run {
  id: string;
  task: string;
  experiment: string | null;
  title: string; // what tells it from others, such as the prompt and answer of a trace; may be empty
  started: string | null; // ISO 8601
  seconds: number | null;
  status: "done" | "failed" | "running" | "unknown";
  metrics: Record<string, number>; // a few that tell most
  has: Has;
}

export interface RunDetail extends Run {
  config: string; // YAML
  overrides: string[];
  command: string; // the command line that repeats it
  files: { path: string; bytes: number }[];
  fvu_by_layer?: number[];
  graphs: string[]; // ids for `/api/graphs/`: the run itself, or rows of a batch
}

/** A run that measured transcoders. */
export interface FvuRow {
  id: string;
  name: string; // experiment, or task
  started: string | null;
  expansion: number | null; // expansion factor
  l0: number | null;
  fvu: number | null; // over all layers
  fvu_by_layer: number[];
  dead: number | null; // share of dead features
}

export interface Study {
  id: string; // its path relative to the root; "shipped" and "shipped_tower" for those that come with the package
  name: string;
  model: string;
  items: number;
  layers: { layer: number; name: string; features: number }[]; // below 0: of the vision tower, T0 ..
  labels: string[]; // names of label sets
}

export interface FeatureRow {
  feature: string; // L5/709
  label: string; // empty: none
  score: number | null; // AUROC of the label
  fires: number; // share of items on which it fires
  share_image: number; // of its firings, by kind of position
  share_text: number;
  share_answer: number;
  max: number; // strongest activation
  top_tokens: string[];
  why?: string; // of a search: because of what it was found
  thumbnail: Picture | null; // of the strongest example, if its peak is in a picture
  excerpt: Token[]; // else the words around the peak
}

/** One picture with what a feature does on it: boxes are left, top, right, bottom as fractions, levels 0 to 255. */
export interface Picture {
  url: string;
  boxes: [number, number, number, number][];
  levels: number[];
}

export interface Token {
  text: string;
  level: number; // 0 to 255, of the example's peak
  kind: "text" | "image" | "answer";
  peak?: boolean;
}

export interface Example {
  activation: number;
  origin: string;
  tokens: Token[]; // runs of soft tokens are one token of kind "image"
  pictures: Picture[];
  times?: number; // equal examples, shown once
}

export interface Neighbour {
  feature: string;
  label: string;
  value: number; // cosine of decoder rows, or share of shared firings
}

export interface Feature {
  feature: string;
  study: string;
  label: { text: string; score: number | null; low: number | null; high: number | null; source: string } | null;
  guess: string; // what the strongest examples share, in words
  sentence: string; // where it fires and what it promotes
  items: number;
  items_fired: number;
  fired: { text: number; image: number; answer: number };
  max: number;
  histogram: { edges: number[]; text: number[]; image: number[]; answer: number[] };
  top_logits: [string, number][];
  bottom_logits: [string, number][];
  groups: { name: string; title: string; examples: Example[] }[];
  neighbours: { decoder: Neighbour[]; coactivation: Neighbour[] };
  missing: string; // why pictures are not there; empty when they are
}

/** An aggregated rate of an experiment: of the trial itself, or of one kind of control. */
export interface TrialRate {
  trial: string;
  setting: string;
  question: string;
  mode: string;
  baseline: string; // empty: the trial itself and its controls
  control: string; // empty: the trial; "matched", "random_direction"
  measure: string;
  strength: number | null;
  layers: string;
  positions: string;
  rate: number;
  low: number;
  high: number;
  n: number;
  draws: number; // of a control
}

export interface Claim {
  trial: string;
  claim: string;
  shown: boolean;
  question: string;
  value: number | null;
  low: number | null;
  high: number | null;
  decided_by: string;
  other: number | null;
  p: number | null;
  reason: string;
}

export interface Trials {
  id: string;
  title: string;
  hypothesis: string;
  rows: TrialRate[];
  claims: Claim[];
}

export interface Shipped {
  picture: string; // what a job takes as `picture`
  name: string;
  url: string;
  prompt: string; // a question that suits it
}

/** One feature under edit; a supernode becomes one of these for each member. */
export interface Edit {
  feature: string;
  action: "set" | "scale"; // suppressing is set to 0
  value: number; // an activation, or a factor of the feature's own activation
}

export interface JobRequest {
  task: "trace" | "steer" | "find" | "generate";
  picture?: string | null;
  prompt?: string;
  study?: string;
  query?: string;
  edits?: Edit[];
  positions?: number[] | null; // of the prompt; null: everywhere, generated tokens included
  controls?: number; // draws of each control
  new_tokens?: number;
}

export interface Likely {
  token: string;
  before: number;
  after: number;
}

export interface ControlResult {
  name: "matched" | "random direction";
  draws: number;
  changed: number; // share of draws that change the answer
  kl: number;
  answer: string; // the most frequent one
  answers: Record<string, number>; // count of draws by answer
}

export interface SteerResult {
  features: number;
  active: number; // of them, in this prompt
  answer: { before: string; after: string }; // most probable next token
  top: Likely[];
  kl: number;
  controls: ControlResult[];
  text: { before: string; after: string }; // generated
}

/** What a search found, best first, and why. */
export interface FindResult {
  rows: { feature: string; why: string }[];
}

export interface Job {
  id: string;
  task: string;
  status: "queued" | "running" | "done" | "failed" | "cancelled";
  progress: { text: string; fraction: number | null };
  command: string;
  run: string | null; // id of the run folder once there is one
  error: string | null;
  result: unknown;
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

/** What a single file carries, written by Python into `<script type="application/json" id="data">`. */
export interface Embedded {
  name: string;
  graph: unknown;
  annotations?: Annotations;
  features: Record<string, Feature>;
  /** Of the features' examples, whose `url` is a number in this list. */
  pictures: string[];
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
  } catch (error) {
    if (options.signal?.aborted) throw error;
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

function withPictures({ features, pictures }: Embedded, name: string): Feature | undefined {
  const feature = features[name];
  if (feature === undefined) return undefined;
  const known = (example: Example): Example => ({ ...example, pictures: example.pictures.map((one) => ({ ...one, url: pictures[Number(one.url)] ?? "" })) });
  return { ...feature, groups: feature.groups.map((group) => ({ ...group, examples: group.examples.map(known) })) };
}

export interface FeatureQuery {
  layer?: string;
  modality?: string; // "image", "text", "answer": where it fires most
  density_min?: string; // shares of items
  density_max?: string;
  label?: string; // "yes", "no"
  score_min?: string;
  words?: string;
  sort?: string;
  offset?: number;
  limit?: number;
  only?: string; // these features, separated by commas and in this order, whatever the filters
}
const asked = (query: object): string =>
  new URLSearchParams(Object.entries(query).flatMap(([key, value]) => (value === "" || value === undefined ? [] : [[key, String(value)]]))).toString();

export const api = {
  runs: () => request<{ root: string; runs: Run[] }>("api/runs"),
  run: (id: string) => request<RunDetail>(`api/runs/${path(id)}`),
  fileUrl: (id: string, file: string) => `api/runs/${path(id)}/file?path=${encodeURIComponent(file)}`,
  /** A graph as parsed JSON; `graph/parse.ts` checks it. The id "" is the bundled example. */
  graph: (id: string) => served<unknown>((data) => data.graph, () => request(id ? `api/graphs/${path(id)}` : "api/example")),
  annotations: (id: string) => request<Annotations>(`api/graphs/${path(id)}/annotations`),
  saveAnnotations: (id: string, value: Annotations) =>
    send<Annotations>("PUT", `api/graphs/${path(id)}/annotations`, value, { "if-match": String(value.version) }),
  score: (id: string, pinned: string[]) => send<Score>("POST", `api/graphs/${path(id)}/score`, { pinned }),
  studies: () => request<{ studies: Study[] }>("api/studies"),
  features: (study: string, query: FeatureQuery, signal?: AbortSignal) =>
    request<{ total: number; rows: FeatureRow[] }>(`api/studies/${path(study)}/features?${asked(query)}`, { signal }),
  feature: (study: string, feature: string) =>
    served<Feature>((data) => withPictures(data, feature), () => request(`api/studies/${path(study)}/features/${path(feature)}`)),
  trials: (id: string) => request<Trials>(`api/runs/${path(id)}/trials`),
  fvu: () => request<{ runs: FvuRow[] }>("api/fvu"),
  /** Pictures that come with the package. */
  pictures: () => request<{ pictures: Shipped[] }>("api/pictures"),
  upload: (file: Blob) => request<{ picture: string; url: string }>("api/uploads", { method: "POST", body: file, headers: { "content-type": "application/octet-stream" } }),
  start: (job: JobRequest) => send<{ id: string; command: string }>("POST", "api/jobs", job),
  job: (id: string) => request<Job>(`api/jobs/${path(id)}`),
  cancel: (id: string) => send<unknown>("DELETE", `api/jobs/${path(id)}`),
};
