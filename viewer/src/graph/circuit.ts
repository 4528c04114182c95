/** What leaves the page: circuit YAML, the graph with its annotations, files to save. */
import type { GraphStore } from "./store";

/** Supernodes (and pinned features that are in none) as `task=circuit circuit_spec=file` reads them. */
export function circuitYaml(store: GraphStore): string {
  const { model, content } = store;
  const feature = (id: string): string => {
    const node = model.index.get(id);
    return node === undefined ? "" : model.node(node).feature;
  };
  const features = (ids: string[]): string[] => [...new Set(ids.map(feature).filter(Boolean))];
  const grouped = new Set(content.value.supernodes.flatMap((group) => group.members));
  const parts: [string, string[]][] = content.value.supernodes.map((group) => [group.name, features(group.members)]);
  for (const id of features(content.value.pinned.filter((id) => !grouped.has(id)))) parts.push([store.labels[id] ?? id, [id]]);
  const names = new Set<string>();
  const blocks = parts
    .filter(([, ids]) => ids.length > 0)
    .map(([name, ids]) => {
      const stem = name.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_+|_+$/g, "") || "supernode";
      let key = /^[a-z]/.test(stem) ? stem : `s_${stem}`;
      for (let i = 2; names.has(key); i++) key = `${stem}_${i}`;
      names.add(key);
      return `  ${key}:\n    name: ${JSON.stringify(name)}\n    ids: [${ids.join(", ")}]\n`;
    });
  const stem = model.file.name.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_+|_+$/g, "") || "circuit";
  return `# Pinned in the graph of: ${JSON.stringify(model.file.prompt)}\nname: ${stem}\nsupernodes:\n${blocks.join("") || "  {}\n"}`;
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
