import type { GraphFile } from "../graph/parse";

/** A feature of one or both graphs: its share of the influence on the answer, 0 where pruning left it out. */
export interface Both {
  feature: string;
  layer: number;
  label: string;
  a: number;
  b: number;
}

/** The word with the largest probability among a graph's answers. */
export function answerOf(graph: GraphFile): string {
  const [best] = graph.nodes.filter((node) => node.kind === "logit").sort((x, y) => y.probability - x.probability);
  return /"(.*)"/s.exec(best?.label ?? "")?.[1]?.trim() ?? best?.label ?? "";
}

/**
 * Each node's share of the influence on the answer. Files hold the cumulated share up to a node, strongest first, so
 * that a node's own is the step from the one before.
 */
function shares(graph: GraphFile): Map<string, { share: number; label: string }> {
  const ranked = graph.nodes.filter((node) => node.cumulative !== null).sort((x, y) => x.cumulative! - y.cumulative!);
  const out = new Map<string, { share: number; label: string }>();
  let before = 0;
  for (const node of ranked) {
    const share = Math.max(0, node.cumulative! - before);
    before = node.cumulative!;
    if (node.kind !== "feature" || !node.feature) continue;
    const known = out.get(node.feature);
    out.set(node.feature, { share: share + (known?.share ?? 0), label: known?.label || node.label });
  }
  // Peers' files may have no influence: then a feature counts as often as it has nodes.
  if (!ranked.length) {
    const features = graph.nodes.filter((node) => node.kind === "feature" && node.feature);
    for (const node of features) {
      const known = out.get(node.feature);
      out.set(node.feature, { share: 1 / features.length + (known?.share ?? 0), label: known?.label || node.label });
    }
  }
  return out;
}

/** Features of two graphs by layer and number, positions added up, the most used first. */
export function matched(first: GraphFile, second: GraphFile): Both[] {
  const [a, b] = [shares(first), shares(second)];
  return [...new Set([...a.keys(), ...b.keys()])]
    .map((feature) => ({
      feature,
      layer: Number(/(\d+)\//.exec(feature)?.[1] ?? 0),
      label: a.get(feature)?.label || b.get(feature)?.label || "",
      a: a.get(feature)?.share ?? 0,
      b: b.get(feature)?.share ?? 0,
    }))
    .sort((x, y) => Math.max(y.a, y.b) - Math.max(x.a, x.b));
}
