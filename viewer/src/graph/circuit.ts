/** What leaves the page: circuit YAML, the graph with its annotations, files to save. */
import type { GraphStore } from "./store";

/** Supernodes (and pinned features that are in none) as `task=circuit circuit_spec=file` reads them. */
export function circuitYaml(store: GraphStore): string {
  const { model, content, pinnedSet, groupOf } = store;
  const groups = new Map(content.value.supernodes.map((group) => [group.name, group.members.flatMap((id) => model.index.get(id) ?? [])]));
  for (const node of pinnedSet.value) {
    if (groupOf.value.has(node)) continue;
    const name = store.labels[model.node(node).feature] ?? model.node(node).feature;
    groups.set(name, [...(groups.get(name) ?? []), node]);
  }
  const keys = new Set<string>();
  const blocks = [...groups].flatMap(([name, members]) => {
    const nodes = members.map((member) => model.node(member)).filter(({ feature }) => feature);
    if (!nodes.length) return [];
    const roles = [...new Set(nodes.map(({ position }) => model.file.tokens[position]!.role))];
    let key = stem(name, "supernode");
    while (keys.has(key)) key += "_";
    keys.add(key);
    const where = roles.every(Boolean) ? `\n    positions: {roles: [${roles.join(", ")}]}` : "";
    return `  ${key}:\n    name: ${JSON.stringify(name)}\n    ids: [${[...new Set(nodes.map(({ feature }) => feature))].join(", ")}]${where}\n`;
  });
  return `# Pinned in the graph of: ${JSON.stringify(model.file.prompt)}\nname: ${stem(model.file.name, "circuit")}\nsupernodes:\n${blocks.join("") || "  {}\n"}`;
}

/** A name as a key of YAML. */
function stem(name: string, other: string): string {
  const words = name.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_+|_+$/g, "") || other;
  return /^[a-z]/.test(words) ? words : `s_${words}`;
}

/** The graph file with pins and supernodes where Neuronpedia and circuit-tracer keep theirs. */
export function annotatedGraph(store: GraphStore): string {
  const { raw } = store.model.file;
  const { pinned, supernodes, labels } = store.content.value;
  const view = typeof raw.qParams === "object" && raw.qParams !== null ? raw.qParams : {};
  const nodes = (raw.nodes as Record<string, unknown>[]).map((node, number) => {
    const { feature, id } = store.model.node(number);
    const own = labels[feature || id];
    return own === undefined ? node : { ...node, clerp: own };
  });
  const groups = supernodes.map((group) => [group.name, ...group.members]);
  return JSON.stringify({ ...raw, qParams: { ...view, pinnedIds: pinned, supernodes: groups }, nodes });
}

export function save(name: string, content: string | Blob, type = "text/plain"): void {
  const url = URL.createObjectURL(typeof content === "string" ? new Blob([content], { type }) : content);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
