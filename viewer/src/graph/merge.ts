/** Three-way merge of annotations: what two tabs changed since their common base is all kept. */
import type { Annotations, Supernode } from "../api";

export type Content = Omit<Annotations, "version">;

export const EMPTY: Content = { pinned: [], supernodes: [], labels: {}, notes: "" };

export const same = (a: unknown, b: unknown): boolean => JSON.stringify(a) === JSON.stringify(b);

/** What `theirs` has, with what `mine` added and took away since `base`. */
export function mergeSets(base: string[], mine: string[], theirs: string[]): string[] {
  const gone = new Set(base.filter((item) => !mine.includes(item)));
  return [...new Set([...theirs.filter((item) => !gone.has(item)), ...mine.filter((item) => !base.includes(item))])];
}

/** My value where I changed it, else theirs. */
const changed = <T>(base: T, mine: T, theirs: T): T => (same(base, mine) ? theirs : mine);

function mergeSupernodes(base: Supernode[], mine: Supernode[], theirs: Supernode[]): Supernode[] {
  const find = (groups: Supernode[], id: string): Supernode | undefined => groups.find((group) => group.id === id);
  const merged = mergeSets(ids(base), ids(mine), ids(theirs)).map((id): Supernode => {
    const [b, m, t] = [find(base, id), find(mine, id), find(theirs, id)];
    if (!m || !t) return (m ?? t)!;
    return { id, name: changed(b?.name ?? "", m.name, t.name), members: mergeSets(b?.members ?? [], m.members, t.members) };
  });
  // I took a group apart that they changed since: their change would be lost, so it stays.
  for (const group of theirs) {
    const before = find(base, group.id);
    if (before && !find(mine, group.id) && !same(before, group)) merged.push(group);
  }
  return inOneGroup(merged);
}

const ids = (groups: Supernode[]): string[] => groups.map((group) => group.id);

/** A node is in one supernode at most: the last that took it has it. Groups that this leaves empty go. */
export function inOneGroup(groups: Supernode[]): Supernode[] {
  const owner = new Map<string, string>();
  for (const group of groups) for (const member of group.members) owner.set(member, group.id);
  return groups
    .map((group) => ({ ...group, members: group.members.filter((member) => owner.get(member) === group.id) }))
    .filter((group) => group.members.length > 0);
}

function mergeLabels(base: Record<string, string>, mine: Record<string, string>, theirs: Record<string, string>): Record<string, string> {
  const keys = new Set([...Object.keys(mine), ...Object.keys(theirs)]);
  const merged: Record<string, string> = {};
  for (const key of keys) {
    const value = changed(base[key], mine[key], theirs[key]);
    if (value !== undefined) merged[key] = value;
  }
  return merged;
}

export function merge(base: Content, mine: Content, theirs: Content): Content {
  const both = mine.notes !== theirs.notes && !same(base.notes, mine.notes) && !same(base.notes, theirs.notes);
  return {
    pinned: mergeSets(base.pinned, mine.pinned, theirs.pinned),
    supernodes: mergeSupernodes(base.supernodes, mine.supernodes, theirs.supernodes),
    labels: mergeLabels(base.labels, mine.labels, theirs.labels),
    notes: both ? `${theirs.notes}\n${mine.notes}` : changed(base.notes, mine.notes, theirs.notes),
  };
}
