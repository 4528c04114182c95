/** The pinned nodes as a small diagram: supernodes and single nodes as boxes, edges summed between them, laid out by ELK. */
import type { ElkExtendedEdge, ElkNode } from "elkjs";
import type { Supernode } from "../api";
import type { GraphStore } from "./store";

export interface Item {
  id: string;
  nodes: number[];
  group: Supernode | null;
  /** One or two lines. */
  title: string[];
  name: string;
  subtitle: string;
  /** Positions of soft tokens among the nodes. */
  patches: number[];
  image: number | null;
  x: number;
  y: number;
  width: number;
  height: number;
}
export interface Link {
  id: string;
  source: string;
  target: string;
  /** Signed share of all that flows into the target, in the whole graph file. */
  share: number;
  path: string;
  middle: { x: number; y: number };
}
export interface Diagram {
  items: Item[];
  links: Link[];
  width: number;
  height: number;
}

const [WIDTH, LINE] = [132, 15];
export const THUMB = 36;
const FAINT = 0.02; // share of a target's input under which an edge is left out

/** What is drawn, without places. */
export function itemsOf(store: GraphStore): Item[] {
  const { model, content, groupOf, pinnedSet } = store;
  const boxes: [string, number[], Supernode | null][] = content.value.supernodes.map((group) => [group.id, group.members.flatMap((id) => model.index.get(id) ?? []), group]);
  for (const node of pinnedSet.value) if (!groupOf.value.has(node)) boxes.push([model.node(node).id, [node], null]);
  return boxes
    .filter(([, nodes]) => nodes.length > 0)
    .map(([id, nodes, group]) => {
      const one = nodes[0]!;
      const title = group?.name ?? model.name(one, store.labels);
      const { kind, feature, probability } = model.node(one);
      const what = kind === "logit" ? `output · ${Math.round(100 * probability)} %` : kind === "token" ? "input" : `${feature && feature !== title ? `${feature} · ` : ""}${model.place(one)}`;
      const patches = [...new Set(nodes.map((node) => model.node(node).position))].filter((position) => model.file.tokens[position]?.patch);
      const image = patches.length ? model.file.tokens[patches[0]!]!.patch!.image : null;
      const shown = image !== null && model.file.pictures[image] ? image : null;
      return { id, nodes, group, title: lines(title), name: title, subtitle: group ? `${nodes.length} nodes` : cut(what, 24), patches, image: shown, x: 0, y: 0, width: 0, height: 0 };
    });
}

/** At most two lines of about the width of a box, broken at spaces. */
function lines(title: string): string[] {
  const [first, ...rest] = title.split(" ").reduce<string[]>((all, word) => {
    const last = all.at(-1);
    if (last !== undefined && last.length + word.length < 19) return [...all.slice(0, -1), `${last} ${word}`];
    return [...all, word];
  }, []);
  return rest.length ? [cut(first ?? "", 20), cut(rest.join(" "), 20)] : [cut(first ?? "", 20)];
}

const cut = (text: string, most: number): string => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function linksOf(store: GraphStore, items: Item[]): Link[] {
  const { model } = store;
  const owner = new Map(items.flatMap((item) => item.nodes.map((node) => [node, item] as const)));
  const links: Link[] = [];
  for (const target of items) {
    const sums = new Map<Item, number>();
    let total = 0;
    for (const node of target.nodes) {
      for (const edge of model.incoming(node)) {
        total += Math.abs(edge.weight);
        const source = owner.get(edge.node);
        if (source && source !== target) sums.set(source, (sums.get(source) ?? 0) + edge.weight);
      }
    }
    for (const [source, sum] of sums) links.push({ id: `${source.id} ${target.id}`, source: source.id, target: target.id, share: sum / (total || 1), path: "", middle: { x: 0, y: 0 } });
  }
  // The faint ones go, unless a box would stand alone without.
  const strongest = new Map<string, Link>();
  for (const link of links) if (Math.abs(link.share) > Math.abs(strongest.get(link.source)?.share ?? 0)) strongest.set(link.source, link);
  return links.filter((link) => Math.abs(link.share) >= FAINT || strongest.get(link.source) === link);
}

let ruler: CanvasRenderingContext2D | null = null;
function measure(text: string, font: string): number {
  ruler ??= document.createElement("canvas").getContext("2d");
  if (ruler === null) return text.length * 7;
  ruler.font = font;
  return ruler.measureText(text).width;
}

/** Upwards, or from left to right where the room is wide. */
export async function diagram(store: GraphStore, wide: boolean): Promise<Diagram> {
  const items = itemsOf(store);
  const links = linksOf(store, items);
  for (const item of items) {
    const words = Math.max(...item.title.map((line) => measure(line, "600 13px Inter, sans-serif")), measure(item.subtitle, "450 11px Inter, sans-serif"));
    item.width = Math.max(76, Math.min(WIDTH, Math.ceil(words)) + 22 + (item.image === null ? 0 : THUMB + 6));
    item.height = 32 + LINE * item.title.length;
  }
  // Fetched when the first diagram is drawn: it is larger than the rest of the page.
  const { default: Elk } = await import("elkjs/lib/elk.bundled.js");
  const graph: ElkNode = {
    id: "root",
    layoutOptions: {
      "elk.algorithm": "layered",
      "elk.direction": wide ? "RIGHT" : "UP",
      "elk.edgeRouting": "SPLINES",
      "elk.spacing.nodeNode": "22",
      "elk.layered.spacing.nodeNodeBetweenLayers": "48",
      "elk.spacing.edgeNode": "14",
      "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF",
      "elk.padding": "[top=16,left=16,bottom=16,right=16]",
    },
    children: items.map(({ id, width, height }) => ({ id, width, height })),
    edges: links.map(({ id, source, target }): ElkExtendedEdge => ({ id, sources: [source], targets: [target] })),
  };
  const placed = await new Elk().layout(graph);
  const nodes = new Map(placed.children?.map((node) => [node.id, node]));
  const edges = new Map(placed.edges?.map((edge) => [edge.id, edge]));
  for (const item of items) [item.x, item.y] = [nodes.get(item.id)?.x ?? 0, nodes.get(item.id)?.y ?? 0];
  for (const link of links) {
    const section = edges.get(link.id)?.sections?.[0];
    if (!section) continue;
    const points = [section.startPoint, ...(section.bendPoints ?? []), section.endPoint];
    link.path = curve(points);
    link.middle = points[Math.floor(points.length / 2)]!;
    if (points.length === 2) link.middle = { x: (points[0]!.x + points[1]!.x) / 2, y: (points[0]!.y + points[1]!.y) / 2 };
  }
  return { items, links, width: placed.width ?? 0, height: placed.height ?? 0 };
}

/** ELK's splines are cubic: two control points, then a point, and so on. */
function curve(points: { x: number; y: number }[]): string {
  const at = ({ x, y }: { x: number; y: number }): string => `${x.toFixed(1)} ${y.toFixed(1)}`;
  const [start, ...rest] = points;
  if (!start) return "";
  if (rest.length % 3 !== 0) return `M${at(start)}${rest.map((point) => `L${at(point)}`).join("")}`;
  let path = `M${at(start)}`;
  for (let i = 0; i < rest.length; i += 3) path += `C${at(rest[i]!)} ${at(rest[i + 1]!)} ${at(rest[i + 2]!)}`;
  return path;
}
