/** A graph made ready for drawing and asking: neighbours of nodes, influence, rows of layers, search. */
import type { GraphFile, GraphNode, Kind, Patch } from "./parse";

export interface Row {
  /** What stands at the axis. */
  name: string;
  kind: "layer" | "embedding" | "output" | "tower";
}

export interface Edge {
  index: number;
  /** The node at the other end. */
  node: number;
  weight: number;
}

export class GraphModel {
  readonly n: number;
  readonly m: number;
  /** From the bottom up. */
  readonly rows: Row[];
  readonly rowOf: Int32Array;
  readonly index: Map<string, number>;
  /** Share of the outputs that each node carries, along all paths; summed over a layer's inputs it is at most 1. */
  readonly influence: Float64Array;
  /** As in the file, or made from `influence` where it says nothing; 0 for nodes that are always shown. */
  readonly cumulative: Float64Array;
  /** All edges, those that hand down most influence first. */
  readonly strongest: Int32Array;
  readonly edgeShare: Float64Array;
  readonly hasBoxes: boolean;
  /** All nodes, the top row first. */
  private readonly downwards: number[];
  private readonly inStart: Int32Array;
  private readonly inEdges: Int32Array;
  private readonly outStart: Int32Array;
  private readonly outEdges: Int32Array;

  constructor(readonly file: GraphFile) {
    const { nodes, source, target } = file;
    this.n = nodes.length;
    this.m = source.length;
    this.index = new Map(nodes.map((node, number) => [node.id, number]));
    [this.rows, this.rowOf] = rowsOf(nodes);
    [this.inStart, this.inEdges] = byEnd(target, this.n);
    [this.outStart, this.outEdges] = byEnd(source, this.n);
    const weight = file.weight;
    const sizes = weight.map(Math.abs);
    for (let node = 0; node < this.n; node++) {
      for (const [start, edges] of [[this.inStart, this.inEdges], [this.outStart, this.outEdges]] as const)
        edges.subarray(start[node]!, start[node + 1]!).sort((a, b) => sizes[b]! - sizes[a]!);
    }
    this.downwards = Array.from(this.rowOf.keys()).sort((a, b) => this.rowOf[b]! - this.rowOf[a]!);
    this.edgeShare = new Float64Array(this.m);
    this.influence = this.spread(sizes, undefined, this.edgeShare);
    this.strongest = Int32Array.from(this.edgeShare.keys()).sort((a, b) => this.edgeShare[b]! - this.edgeShare[a]!);
    this.cumulative = this.cumulated();
    this.hasBoxes = file.tokens.some((token) => token.patch !== null);
  }

  node(number: number): GraphNode {
    return this.file.nodes[number]!;
  }

  /** Strongest first. */
  incoming(node: number): Edge[] {
    return Array.from(this.inEdges.subarray(this.inStart[node]!, this.inStart[node + 1]!), (index) => ({
      index,
      node: this.file.source[index]!,
      weight: this.file.weight[index]!,
    }));
  }

  outgoing(node: number): Edge[] {
    return Array.from(this.outEdges.subarray(this.outStart[node]!, this.outStart[node + 1]!), (index) => ({
      index,
      node: this.file.target[index]!,
      weight: this.file.weight[index]!,
    }));
  }

  /**
   * Replacement and completeness score of the pinned nodes, of the edges in this file: features that are not pinned count
   * as errors. The rule is `attribution.influence.subgraph_scores`, which the server applies to the whole graph.
   */
  score(pinned: ReadonlySet<number>): { replacement: number; completeness: number } {
    const { nodes } = this.file;
    const inside = (node: number): boolean => nodes[node]!.kind === "logit" || (nodes[node]!.kind === "feature" && pinned.has(node));
    const flow = this.spread(this.file.weight.map(Math.abs), inside);
    let [inputs, unexplained, total] = [0, 0, 0];
    flow.forEach((value, node) => {
      const { kind } = nodes[node]!;
      total += value;
      if (kind === "token") inputs += value;
      else if (kind === "error" || kind === "rest" || (kind === "feature" && !inside(node))) unexplained += value;
    });
    return { replacement: inputs + unexplained ? inputs / (inputs + unexplained) : 0, completeness: total ? 1 - unexplained / total : 0 };
  }

  /** Influence flows from the outputs down: each node divides its own among its inputs by their absolute weights. */
  private spread(sizes: Float64Array, through: (node: number) => boolean = () => true, shares?: Float64Array): Float64Array {
    const influence = new Float64Array(this.n);
    const { nodes } = this.file;
    const ends = nodes.flatMap((node, number) => (node.kind === "logit" ? [number] : []));
    const total = ends.reduce((sum, end) => sum + nodes[end]!.probability, 0);
    ends.forEach((end) => (influence[end] = total > 0 ? nodes[end]!.probability / total : 1 / ends.length));
    for (const node of this.downwards) {
      if (!through(node)) continue;
      const edges = this.inEdges.subarray(this.inStart[node]!, this.inStart[node + 1]!);
      const sum = edges.reduce((all, edge) => all + sizes[edge]!, 0);
      if (sum === 0 || influence[node] === 0) continue;
      for (const edge of edges) {
        const share = (influence[node]! * sizes[edge]!) / sum;
        if (shares) shares[edge] = share;
        const from = this.file.source[edge]!;
        if (this.rowOf[from]! < this.rowOf[node]!) influence[from]! += share;
      }
    }
    return influence;
  }

  private cumulated(): Float64Array {
    const { nodes } = this.file;
    if (nodes.some((node) => node.cumulative !== null)) return Float64Array.from(nodes, (node) => node.cumulative ?? 0);
    const inner = Array.from(nodes.keys()).filter((number) => nodes[number]!.kind !== "logit");
    inner.sort((a, b) => this.influence[b]! - this.influence[a]!);
    const total = inner.reduce((sum, number) => sum + this.influence[number]!, 0) || 1;
    const values = new Float64Array(this.n);
    let sum = 0;
    for (const number of inner) values[number] = (sum += this.influence[number]!) / total;
    return values;
  }

  /** Where a node sits, in words: the token, or the place on the picture. */
  place(number: number): string {
    return this.placeOf(this.node(number));
  }
  private placeOf(node: GraphNode): string {
    if (node.kind === "bias" || node.kind === "rest") return "no position";
    // A patch of the vision tower is a part of that of a soft token.
    return `${/^[PT]/.test(node.layer) ? "in " : ""}${this.placeAt(node.position)}`;
  }
  /** A position in words. */
  placeAt(position: number): string {
    const token = this.file.tokens[position];
    return token?.patch ? `patch ${this.patchNumber(position)}` : tokenText(token?.text ?? "");
  }

  /** The part of the picture that a node stands for. */
  patchOf(node: number | GraphNode): Patch | null {
    const { patch, position } = typeof node === "number" ? this.node(node) : node;
    return patch ?? this.file.tokens[position]?.patch ?? null;
  }
  /** The number of a soft token within its picture. */
  patchNumber(position: number): number {
    const image = this.file.tokens[position]?.patch?.image;
    let first = position;
    while (this.file.tokens[first - 1]?.patch?.image === image && first > 0) first--;
    return position - first;
  }

  /** What to call a node where there is room for a few words. */
  name(number: number, labels: Record<string, string> = {}): string {
    return this.nameOf(this.node(number), labels);
  }
  private nameOf(node: GraphNode, labels: Record<string, string>): string {
    const own = labels[node.feature || node.id];
    if (own) return own;
    if (node.kind === "token") return this.placeOf(node);
    if (node.kind === "logit") return outputText(node.label) || node.id;
    return node.label || node.feature || node.id;
  }

  /** Name and place of a node by its id, also of one that is in no link. */
  about(id: string, labels: Record<string, string>): { node: number | null; name: string; place: string; patch: Patch | null } {
    const node = this.index.get(id) ?? null;
    const known = node === null ? this.file.others.get(id) : this.node(node);
    if (known === undefined) return { node, name: id, place: "", patch: null };
    const name = this.nameOf(known, labels);
    const place = known.kind === "token" ? "input" : this.placeOf(known);
    return { node, name, place: known.feature && known.feature !== name ? `${known.feature} · ${place}` : place, patch: this.patchOf(known) };
  }

  /** Nodes that have all words of a query in their label, feature id, token, or id; the most influential first. */
  search(query: string, labels: Record<string, string>, limit = 50): number[] {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const found: number[] = [];
    for (let number = 0; number < this.n; number++) {
      const node = this.node(number);
      const token = this.file.tokens[node.position]?.text ?? "";
      const hay = `${labels[node.feature || node.id] ?? ""} ${node.label} ${node.feature} ${token} ${node.id}`.toLowerCase();
      if (words.every((word) => hay.includes(word))) found.push(number);
    }
    return found.sort((a, b) => this.influence[b]! - this.influence[a]!).slice(0, limit);
  }
}

/** Edges grouped by one of their ends: where each node's begin, and their numbers. */
function byEnd(ends: Int32Array, n: number): [Int32Array, Int32Array] {
  const start = new Int32Array(n + 1);
  for (const end of ends) start[end + 1]!++;
  for (let node = 0; node < n; node++) start[node + 1]! += start[node]!;
  const next = start.slice();
  const edges = new Int32Array(ends.length);
  ends.forEach((end, edge) => (edges[next[end]!++] = edge));
  return [start, edges];
}

/** Patches and layers of the vision tower (P, T0, T1, ...) lie under the embeddings, layers above them, outputs at the top. */
function rowsOf(nodes: GraphNode[]): [Row[], Int32Array] {
  const numbers = new Set<number>();
  const tower = new Map<string, number>();
  const has = { patches: false, embedding: false, output: false };
  for (const node of nodes) {
    const { kind, layer } = node;
    if (kind === "logit") has.output = true;
    else if (isPatch(node)) has.patches = true;
    else if (kind === "token" || layer === "E") has.embedding = true;
    else if (/^\d{1,3}$/.test(layer)) numbers.add(Number(layer));
    else tower.set(layer, Number(/\d+$/.exec(layer)?.[0] ?? 0));
  }
  const rows: Row[] = has.patches ? [{ name: "patches", kind: "tower" }] : [];
  rows.push(...[...tower].sort(([, a], [, b]) => a - b).map(([name]) => ({ name, kind: "tower" as const })));
  if (has.embedding) rows.push({ name: "input", kind: "embedding" });
  const top = numbers.size ? Math.max(...numbers) : -1;
  for (let layer = numbers.size ? Math.min(...numbers) : 0; layer <= top; layer++) rows.push({ name: String(layer), kind: "layer" });
  if (has.output) rows.push({ name: "output", kind: "output" });
  const at = new Map(rows.map((row, number) => [row.name, number]));
  const rowOf = Int32Array.from(nodes, (node) => {
    const { kind, layer } = node;
    if (isPatch(node)) return at.get("patches")!;
    return kind === "logit" ? rows.length - 1 : kind === "token" || layer === "E" ? at.get("input")! : at.get(/^\d+$/.test(layer) ? String(Number(layer)) : layer)!;
  });
  return [rows, rowOf];
}

/** What the vision tower begins with: embeddings of patches, and its bias. */
const isPatch = ({ layer }: GraphNode): boolean => layer === "P";

/** A token as a word on the page: spaces at its ends do not show otherwise. */
export function tokenText(token: string): string {
  return token.replace(/^[▁Ġ ](?=\S)/, "").replaceAll("▁", "␣").replaceAll("Ċ", "⏎").replaceAll("\n", "⏎") || "␣";
}

/** The word of an output out of the label that all viewers write: `Output "mars" (p=0.998)`. */
function outputText(label: string): string {
  return /^Output\s+"(.*)"\s*\(p=/s.exec(label)?.[1] ?? label;
}

export const KINDS: Record<Kind, string> = {
  token: "input",
  feature: "feature",
  error: "error",
  logit: "output",
  bias: "bias",
  rest: "features left out",
};
