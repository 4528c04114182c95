/** What the user wants to do to the model: groups of features, each with an action. Kept while the tab is open. */
import { signal } from "@preact/signals";
import type { Edit } from "../api";
import { parts } from "../features/studies";
import type { GraphFile } from "../graph/parse";
import { say } from "../state";

export interface Member {
  feature: string;
  own: number | null; // its activation where it was picked; null: not known
}
export type Action = "suppress" | "scale" | "set" | "raise";

/** A feature or a supernode, and what happens to it. */
export interface EditGroup {
  id: number;
  name: string;
  features: Member[];
  action: Action;
  value: number;
}

const KEY = "vlmscope.edits";
const stored = (): EditGroup[] => {
  try {
    const value: unknown = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
    return Array.isArray(value) ? (value as EditGroup[]) : [];
  } catch {
    return []; // storage that is refused, or not ours
  }
};
export const edits = signal<EditGroup[]>(stored());
edits.subscribe((value) => {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(value));
  } catch {
    /* then they last as long as the page */
  }
});

export const ACTIONS: Record<Action, string> = {
  suppress: "suppress",
  scale: "scale by",
  set: "set to",
  raise: "set to its own ×",
};

/** Add a feature or a supernode; a group of the same name is replaced. */
export function addEdit(group: { name: string; features: Member[]; action?: Action; value?: number }): void {
  if (!group.features.length) return say(`${group.name} has no features that can be edited`, { error: true });
  const action = group.action ?? "suppress";
  const made = { id: Date.now() + Math.random(), name: group.name, features: group.features, action, value: group.value ?? (action === "suppress" ? 0 : 2) };
  edits.value = [...edits.value.filter((other) => other.name !== group.name), made];
}

export function change(id: number, to: Partial<EditGroup>): void {
  edits.value = edits.value.map((group) => (group.id === id ? { ...group, ...to } : group));
}

export function remove(id: number): void {
  edits.value = edits.value.filter((group) => group.id !== id);
}

/** Whether all of a group's activations are known, so that it can be set to multiples of them. */
export const knowsOwn = (group: EditGroup): boolean => group.features.every((member) => member.own !== null);

/** What the server is asked for: one edit for each feature in the layers; of a feature in two groups the later one counts. */
export function flattened(groups: EditGroup[], layers: { from: number; to: number }): Edit[] {
  const all = new Map<string, Edit>();
  for (const group of groups)
    for (const { feature, own } of group.features) {
      const [layer] = parts(feature);
      if (layer < layers.from || layer > layers.to) continue;
      const value = group.action === "suppress" ? 0 : group.action === "raise" ? group.value * (own ?? 0) : group.value;
      all.set(feature, { feature, action: group.action === "scale" ? "scale" : "set", value: Number(value.toPrecision(6)) });
    }
  return [...all.values()];
}

/** Features of a graph, the most influential first, with their largest activation. */
export function featuresOf(graph: GraphFile): Member[] {
  const found = new Map<string, Member>();
  const nodes = graph.nodes.filter((node) => node.kind === "feature" && node.feature.startsWith("L"));
  for (const { feature, activation } of [...nodes].sort((a, b) => (a.cumulative ?? 1) - (b.cumulative ?? 1)))
    found.set(feature, { feature, own: Math.max(found.get(feature)?.own ?? 0, activation ?? 0) });
  return [...found.values()];
}

/** Suppress the strongest features of one graph and raise those of another; what both have is left alone. */
export function exchange(from: GraphFile, to: GraphFile, names: [string, string], most = 20, strength = 3): void {
  const [first, second] = [featuresOf(from), featuresOf(to)];
  const has = (members: Member[]) => new Set(members.map((member) => member.feature));
  const [inFirst, inSecond] = [has(first), has(second)];
  edits.value = [];
  addEdit({ name: names[0], features: first.slice(0, most).filter((member) => !inSecond.has(member.feature)) });
  addEdit({ name: names[1], features: second.slice(0, most).filter((member) => !inFirst.has(member.feature)), action: "raise", value: strength });
}
