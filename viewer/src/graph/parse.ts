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
  /** Its part of a picture; inside the vision tower smaller than its position's. */
  patch: Patch | null;
  label: string;
  activation: number | null;
  probability: number;
  /** Share of the influence that nodes at least as strong have together, 0 to 1; null: always shown. */
  cumulative: number | null;
  answer: boolean;
}
/**
 * Why a head attends from one position to another: its score as a sum over pairs of nodes (query, key), and over one
 * side alone. Attention features of other programs have no head and no positions; then these are -1.
 */
export interface Score {
  /** The node that the head serves here, or -1. */
  node: number;
  layer: number;
  head: number;
  query: number;
  key: number;
  /** Of the attention pattern there; null where the file has none. */
  probability: number | null;
  pairs: [query: string, key: string, part: number][];
  queries: [node: string, part: number][];
  keys: [node: string, part: number][];
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
  /** Heads that carry a link, with their share of its weight. */
  heads: Map<number, Head[]>;
  /** Heads by their share of the influence of all links. */
  ranked: Head[];
  attention: Score[];
  /** What scores name besides the nodes of the graph, by id. */
  others: Map<string, GraphNode>;
  /** Links that name nodes which the file lacks. */
  dangling: number;
  /** Nodes whose id another one has too; they have no links. */
  repeated: number;
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
  let repeated = 0;
  nodes.forEach((node, number) => {
    // Older files of circuit-tracer call the error of layer 7 as they call feature 7 of layer 0.
    if (index.has(node.id)) node.id = `${node.id} (${++repeated + 1})`;
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
  const attention = isRecord(own.attention) ? own.attention : {};
  const others = isRecord(raw.qk_only_nodes) ? Object.values(raw.qk_only_nodes).filter(isRecord).slice(0, LIMITS.nodes).map(nodeOf) : [];
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
    ranked: Object.entries(isRecord(attention.heads) ? attention.heads : {}).flatMap(([name, share]) => headOf([...(/^L(\d+)H(\d+)$/.exec(name)?.slice(1).map(Number) ?? []), share])),
    attention: scoresOf(list(attention.scores), rawNodes, index),
    others: new Map(others.map((node) => [node.id, node])),
    repeated,
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
    patch: patchOf(value.patch),
    label: text(value.clerp) || text(value.ppClerp),
    activation: finite(value.activation),
    probability: finite(value.token_prob) ?? 0,
    cumulative: finite(value.influence),
    answer: value.is_target_logit === true,
  };
}

/** Features have ids `layer_index_position`; their number alone is a Cantor pair of layer and index in CLT graphs. */
function featureOf(id: string, layer: string, feature: number | null): string {
  const index = /^[A-Za-z]*\d+_0*(\d+)_\d+/.exec(id)?.[1] ?? (feature === null ? "" : String(feature));
  return index && `${/^\d/.test(layer) ? "L" : ""}${layer}/${index}`;
}

function headOf(value: unknown): Head[] {
  const [layer, head, share] = Array.isArray(value) ? value.map(finite) : isRecord(value) ? [finite(value.layer), finite(value.head), finite(value.share ?? value.weight)] : [];
  return layer == null || head == null || share == null ? [] : [{ layer, head, share }];
}

/** Scores of heads, and those that other programs keep at nodes of attention features. */
function scoresOf(listed: unknown[], rawNodes: unknown[], index: Map<string, number>): Score[] {
  const scores = listed.filter(isRecord).map((score) => {
    const node = index.get(text(score.node)) ?? -1;
    const at = "pair_wise_contributors" in score ? score : (rawNodes[node] as Record<string, unknown> | undefined)?.qk_tracing_results;
    return scoreOf(at, node, score);
  });
  const known = new Set(scores.map((score) => score.node));
  rawNodes.forEach((raw, node) => {
    const at = (raw as Record<string, unknown>).qk_tracing_results;
    if (isRecord(at) && !known.has(node)) scores.push(scoreOf(at, node, {}));
  });
  return scores.filter(({ pairs, queries, keys }) => pairs.length + queries.length + keys.length > 0);
}

function scoreOf(value: unknown, node: number, about: Record<string, unknown>): Score {
  const lists = isRecord(value) ? value : {};
  const rows = (items: unknown, length: number): unknown[][] => list(items).filter((item): item is unknown[] => Array.isArray(item) && item.length === length && finite(item.at(-1)) !== null);
  const single = (items: unknown): [string, number][] => rows(items, 2).map(([id, part]) => [idOf(id), part as number]);
  const number = (key: string): number => finite(about[key]) ?? -1;
  return {
    node,
    layer: number("layer"),
    head: number("head"),
    query: number("query"),
    key: number("key"),
    probability: finite(about.probability),
    pairs: rows(lists.pair_wise_contributors, 3).map(([query, key, part]) => [idOf(query), idOf(key), part as number]),
    queries: single(lists.top_q_marginal_contributors),
    keys: single(lists.top_k_marginal_contributors),
  };
}

/** Some programs write a whole node where others write its id. */
const idOf = (value: unknown): string => text(isRecord(value) ? value.node_id : value);

function boxOf(value: unknown): Box | null {
  const box = list(value).map(finite);
  const [left, top, right, bottom] = box;
  if (box.length !== 4 || left == null || top == null || right == null || bottom == null) return null;
  return left >= 0 && top >= 0 && right <= 1 && bottom <= 1 && left < right && top < bottom ? [left, top, right, bottom] : null;
}

function patchOf(value: unknown): Patch | null {
  const patch = isRecord(value) ? value : {};
  const box = boxOf(patch.box);
  const image = finite(patch.image);
  return box === null || image === null || !Number.isInteger(image) || image < 0 || image > 63 ? null : { image, box };
}

function tokensOf(own: unknown, prompt: unknown, nodes: GraphNode[]): Token[] {
  const details = list(own);
  const names = list(prompt);
  const count = nodes.reduce((most, node) => Math.max(most, node.position + 1), Math.min(names.length, LIMITS.tokens));
  return Array.from({ length: count }, (_, position) => {
    const value = details[position];
    const detail = isRecord(value) ? value : {};
    return { text: text(names[position]) || text(detail.token), role: text(detail.role), patch: patchOf(detail.patch) };
  });
}

/** Pictures are part of the file: nothing is ever fetched. */
function pictureOf(value: unknown): string | null {
  const url = isRecord(value) ? value.data : value;
  const good = typeof url === "string" && url.length <= LIMITS.picture && /^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$/.test(url);
  return good ? url : null;
}
