/**
 * Graph files: `graph.json` in the schema of Neuronpedia and circuit-tracer, with our keys under `vlmscope`.
 *
 * Tolerant of what peers leave out or spell otherwise, strict about shape and size: a file either becomes a `GraphFile`
 * or an error with one clear line.
 */

export type Kind = "token" | "feature" | "error" | "logit" | "bias" | "rest";
export type Box = readonly [left: number, top: number, right: number, bottom: number];
export interface Patch {
  image: number;
  box: Box;
}
export interface Token {
  text: string;
  role: string;
  patch: Patch | null;
}
export interface GraphNode {
  id: string;
  kind: Kind;
  /** `L5/709` of a feature, else "". */
  feature: string;
  /** As the file names it: E, 0, 1, ... */
  layer: string;
  position: number;
  label: string;
  activation: number | null;
  probability: number;
  /** Share of the influence that nodes at least as strong have together, 0 to 1; null: always shown. */
  cumulative: number | null;
  answer: boolean;
  queryKeys: QueryKeys | null;
}
/** Why an attention feature's head attends: pairs of nodes (query, key) and single ones, with their part of the score. */
export interface QueryKeys {
  pairs: [string, string, number][];
  queries: [string, number][];
  keys: [string, number][];
}
export interface Head {
  layer: number;
  head: number;
  share: number;
}
export interface GraphFile {
  name: string;
  model: string;
  prompt: string;
  tokens: Token[];
  pictures: (string | null)[];
  nodes: GraphNode[];
  source: Int32Array;
  target: Int32Array;
  weight: Float64Array;
  heads: Map<number, Head[]>;
  /** Links that name nodes which the file lacks. */
  dangling: number;
  scores: { replacement: number; completeness: number } | null;
  pinned: string[];
  supernodes: string[][];
  /** The file as it came, to be exported with annotations. */
  raw: Record<string, unknown>;
}

export const LIMITS = { bytes: 300e6, nodes: 200_000, links: 5_000_000, tokens: 100_000, picture: 4e6, text: 2000 };

class Malformed extends Error {}
function refuse(message: string): never {
  throw new Malformed(message);
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);
const list = (value: unknown): unknown[] => (Array.isArray(value) ? value : []);
const text = (value: unknown): string => (typeof value === "string" ? value.slice(0, LIMITS.text) : typeof value === "number" ? String(value) : "");
const finite = (value: unknown): number | null => (typeof value === "number" && Number.isFinite(value) ? value : null);

/** The graph in the text of a file. */
export function parseText(content: string): GraphFile {
  let value: unknown;
  try {
    value = JSON.parse(content);
  } catch {
    refuse("This file is no JSON, so it is no attribution graph.");
  }
  return parse(value);
}

export function parse(raw: unknown): GraphFile {
  if (!isRecord(raw)) refuse("This file holds no attribution graph: it is not a JSON object.");
  const { metadata, nodes: rawNodes, links: rawLinks } = raw;
  if (!Array.isArray(rawNodes) || !Array.isArray(rawLinks)) refuse("This file holds no attribution graph: it has no lists of nodes and links.");
  if (!rawNodes.length) refuse("This graph has no nodes.");
  if (rawNodes.length > LIMITS.nodes) refuse(`This graph has ${rawNodes.length.toLocaleString("en")} nodes; at most ${LIMITS.nodes.toLocaleString("en")} can be drawn.`);
  if (rawLinks.length > LIMITS.links) refuse(`This graph has ${rawLinks.length.toLocaleString("en")} links; at most ${LIMITS.links.toLocaleString("en")} can be read.`);
  const meta = isRecord(metadata) ? metadata : {};
  const own = isRecord(raw.vlmscope) ? raw.vlmscope : {};

  const nodes = rawNodes.map(nodeOf);
  const index = new Map<string, number>();
  nodes.forEach((node, number) => {
    if (index.has(node.id)) refuse(`Two nodes of this graph have the id ${shown(node.id)}.`);
    index.set(node.id, number);
  });

  const source = new Int32Array(rawLinks.length);
  const target = new Int32Array(rawLinks.length);
  const weight = new Float64Array(rawLinks.length);
  const heads = new Map<number, Head[]>();
  let kept = 0;
  rawLinks.forEach((link: unknown, number) => {
    if (!isRecord(link)) refuse(`Link ${number + 1} of this graph is no object.`);
    const value = finite(link.weight) ?? refuse(`Link ${number + 1} of this graph has no weight that is a number.`);
    const from = index.get(text(link.source));
    const to = index.get(text(link.target));
    if (from === undefined || to === undefined) return;
    [source[kept], target[kept], weight[kept]] = [from, to, value];
    const carriers = list(link.heads).flatMap(headOf);
    if (carriers.length) heads.set(kept, carriers);
    kept++;
  });
  if (rawLinks.length && !kept) refuse("No link of this graph names two of its nodes.");

  const tokens = tokensOf(own.tokens, meta.prompt_tokens, nodes);
  const view = isRecord(raw.qParams) ? raw.qParams : {};
  const scores = isRecord(own.scores) ? own.scores : {};
  const replacement = finite(scores.replacement);
  const completeness = finite(scores.completeness);
  return {
    name: text(meta.slug) || "graph",
    model: text(meta.scan),
    prompt: text(meta.prompt) || tokens.map((token) => token.text).join(""),
    tokens,
    pictures: list(own.pictures).slice(0, 64).map(pictureOf),
    nodes,
    source: source.subarray(0, kept),
    target: target.subarray(0, kept),
    weight: weight.subarray(0, kept),
    heads,
    dangling: rawLinks.length - kept,
    scores: replacement === null || completeness === null ? null : { replacement, completeness },
    pinned: words(view.pinnedIds).filter((id) => index.has(id)),
    supernodes: list(view.supernodes).map(words).filter((group) => group.length > 1),
    raw,
  };
}

/** Peers write lists, or their ids joined by commas in one string. */
function words(value: unknown): string[] {
  const items = typeof value === "string" ? value.split(",") : list(value);
  return items.map(text).filter(Boolean);
}

const shown = (id: string): string => JSON.stringify(id.slice(0, 60));

function kindOf(type: string): Kind {
  if (type.includes("error")) return "error";
  if (type.includes("embedding")) return "token";
  if (type.includes("logit")) return "logit";
  if (type === "bias") return "bias";
  return type.startsWith("left out") ? "rest" : "feature";
}

function nodeOf(value: unknown, number: number): GraphNode {
  if (!isRecord(value)) refuse(`Node ${number + 1} of this graph is no object.`);
  const id = text(value.node_id) || text(value.jsNodeId);
  if (!id) refuse(`Node ${number + 1} of this graph has no id.`);
  const kind = kindOf(text(value.feature_type).toLowerCase());
  const layer = text(value.layer) || (kind === "token" ? "E" : "");
  const position = finite(value.ctx_idx) ?? 0;
  if (!layer) refuse(`Node ${shown(id)} has no layer.`);
  if (!Number.isInteger(position) || position < 0 || position >= LIMITS.tokens) refuse(`Node ${shown(id)} has no position in the prompt.`);
  return {
    id,
    kind,
    feature: kind === "feature" ? featureOf(id, layer, finite(value.feature)) : "",
    layer,
    position,
    label: text(value.clerp) || text(value.ppClerp),
    activation: finite(value.activation),
    probability: finite(value.token_prob) ?? 0,
    cumulative: finite(value.influence),
    answer: value.is_target_logit === true,
    queryKeys: queryKeysOf(value.qk_tracing_results),
  };
}

/** Features have ids `layer_index_position`; their number alone is a Cantor pair of layer and index in CLT graphs. */
function featureOf(id: string, layer: string, feature: number | null): string {
  const index = /^[A-Za-z]*\d+_(\d+)_\d+/.exec(id)?.[1] ?? (feature === null ? "" : String(feature));
  return index && `${/^\d/.test(layer) ? "L" : ""}${layer}/${index}`;
}

function headOf(value: unknown): Head[] {
  const [layer, head, share] = Array.isArray(value) ? value.map(finite) : isRecord(value) ? [finite(value.layer), finite(value.head), finite(value.share ?? value.weight)] : [];
  return layer == null || head == null || share == null ? [] : [{ layer, head, share }];
}

function queryKeysOf(value: unknown): QueryKeys | null {
  if (!isRecord(value)) return null;
  const single = (items: unknown): [string, number][] => list(items).flatMap((item) => (Array.isArray(item) && finite(item[1]) !== null ? [[text(item[0]), item[1] as number] as [string, number]] : []));
  const pairs = list(value.pair_wise_contributors).flatMap((item) =>
    Array.isArray(item) && finite(item[2]) !== null ? [[text(item[0]), text(item[1]), item[2] as number] as [string, string, number]] : [],
  );
  return { pairs, queries: single(value.top_q_marginal_contributors), keys: single(value.top_k_marginal_contributors) };
}

function boxOf(value: unknown): Box | null {
  const box = list(value).map(finite);
  const [left, top, right, bottom] = box;
  if (box.length !== 4 || left == null || top == null || right == null || bottom == null) return null;
  return left >= 0 && top >= 0 && right <= 1 && bottom <= 1 && left < right && top < bottom ? [left, top, right, bottom] : null;
}

function tokensOf(own: unknown, prompt: unknown, nodes: GraphNode[]): Token[] {
  const details = list(own);
  const names = list(prompt);
  const count = nodes.reduce((most, node) => Math.max(most, node.position + 1), Math.min(names.length, LIMITS.tokens));
  return Array.from({ length: count }, (_, position) => {
    const value = details[position];
    const detail = isRecord(value) ? value : {};
    const patch = isRecord(detail.patch) ? detail.patch : {};
    const box = boxOf(patch.box);
    const image = finite(patch.image);
    return {
      text: text(names[position]) || text(detail.token),
      role: text(detail.role),
      patch: box === null || image === null || !Number.isInteger(image) || image < 0 || image > 63 ? null : { image, box },
    };
  });
}

/** Pictures are part of the file: nothing is ever fetched. */
function pictureOf(value: unknown): string | null {
  const url = isRecord(value) ? value.data : value;
  const good = typeof url === "string" && url.length <= LIMITS.picture && /^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$/.test(url);
  return good ? url : null;
}
