/** The state of one open graph: what is chosen and shown, and the annotations with undo, saving and merging. */
import { computed, signal } from "@preact/signals";
import { api, ApiError, type Annotations, embedded, type Supernode } from "../api";
import { kept, reason, say } from "../state";
import { type Content, EMPTY, inOneGroup, merge, same } from "./merge";
import type { Edge, GraphModel } from "./model";

export interface HeadId {
  layer: number;
  head: number;
}
export type View = "graph" | "both" | "subgraph";
const SAVE_AFTER = 400; // ms without a further change
const STRONGEST = 300; // edges that are drawn at first
let opened = 0;

export class GraphStore {
  readonly selected = signal<number | null>(null);
  readonly hovered = signal<number | null>(null);
  /** The attention head that is looked at, while no node is chosen. */
  readonly head = signal<HeadId | null>(null);
  /** Nodes marked for grouping. */
  readonly marked = signal<ReadonlySet<number>>(new Set());
  readonly nodeShare = signal(1);
  readonly edgeCount = signal(0);
  readonly view = signal<View>("graph");
  readonly content = signal<Content>(EMPTY);
  readonly saving = signal<"saved" | "saving" | "failed">("saved");
  readonly undoable = signal(0);
  readonly redoable = signal(0);

  /** The largest value of the node slider: all nodes. */
  readonly wholeShare: number;
  /** 1 for each node that is drawn. */
  readonly visible = computed(() => {
    const share = this.nodeShare.value + 1e-9;
    const pinned = this.pinnedSet.value;
    return Uint8Array.from(this.model.cumulative, (value, node) => (value <= share || pinned.has(node) ? 1 : 0));
  });
  readonly pinnedSet = computed(() => new Set(this.content.value.pinned.flatMap((id) => this.model.index.get(id) ?? [])));
  /** The supernode of each node that is in one. */
  readonly groupOf = computed(() => new Map(this.content.value.supernodes.flatMap((group) => group.members.flatMap((id) => {
    const node = this.model.index.get(id);
    return node === undefined ? [] : [[node, group] as const];
  }))));

  /** What the chosen head carries, strongest first: `node` is the source, `weight` the head's part of the edge. */
  readonly headEdges = computed((): Edge[] => {
    const { file } = this.model;
    const chosen = this.head.value;
    if (chosen === null) return [];
    const edges = [...file.heads].flatMap(([index, heads]) => {
      const own = heads.find(({ layer, head }) => layer === chosen.layer && head === chosen.head);
      return own ? [{ index, node: file.source[index]!, weight: own.share * file.weight[index]! }] : [];
    });
    return edges.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  });

  /** One number for each graph that was opened, for lists and effects that must begin anew with it. */
  readonly serial = ++opened;
  private past: Content[] = [];
  private future: Content[] = [];
  private base: Annotations = { version: 0, ...EMPTY };
  private timer: ReturnType<typeof setTimeout> | undefined;
  private closed = false;

  /** `id` is the server's name of the graph, or null for a file that was dropped or travels alone. */
  constructor(readonly model: GraphModel, readonly id: string | null) {
    this.wholeShare = model.cumulative.reduce((most, value) => Math.max(most, value), 0);
    this.nodeShare.value = this.wholeShare;
    this.edgeCount.value = Math.min(model.m, STRONGEST);
    const { pinned, supernodes } = model.file;
    const groups = supernodes.map(([name = "", ...members], i) => ({ id: `file-${i}`, name, members: members.filter((member) => model.index.has(member)) }));
    const fromFile: Content = { ...EMPTY, pinned: [...new Set([...pinned, ...groups.flatMap((group) => group.members)])], supernodes: inOneGroup(groups) };
    this.content.value = fromFile;
    if (id === null) {
      const stored = embedded?.annotations ? null : kept.get(this.key);
      try {
        if (embedded?.annotations) this.content.value = contentOf(embedded.annotations);
        else if (stored !== null) this.content.value = contentOf(JSON.parse(stored) as Annotations);
      } catch {
        /* what another version stored there: the file's own stay */
      }
    }
  }

  get labels(): Record<string, string> {
    return this.content.value.labels;
  }
  private get key(): string {
    return `vlmscope.annotations.${this.model.file.name}.${this.model.n}.${this.model.m}`;
  }

  /** Fetch what the server has: before the first save, what the graph's own file says. */
  async load(): Promise<void> {
    if (this.id === null) return;
    try {
      const found = await api.annotations(this.id);
      this.base = found;
      this.content.value = contentOf(found);
    } catch (error) {
      say(`Annotations could not be read: ${reason(error)}`, { error: true });
    }
  }

  close(): void {
    this.closed = true;
    this.flush();
  }

  /** Save at once what still waits for further changes. */
  flush(): void {
    if (this.timer === undefined) return;
    clearTimeout(this.timer);
    void this.save();
  }

  change(edit: (content: Content) => Partial<Content>): void {
    const before = this.content.value;
    const after = { ...before, ...edit(before) };
    if (same(before, after)) return;
    this.past.push(before);
    this.future = [];
    this.set(after);
  }

  undo(): void {
    this.travel(this.past, this.future);
  }
  redo(): void {
    this.travel(this.future, this.past);
  }
  private travel(from: Content[], to: Content[]): void {
    const state = from.pop();
    if (state === undefined) return;
    to.push(this.content.value);
    this.set(state);
  }
  private set(content: Content): void {
    this.content.value = content;
    [this.undoable.value, this.redoable.value] = [this.past.length, this.future.length];
    clearTimeout(this.timer);
    this.saving.value = "saving";
    this.timer = setTimeout(() => void this.save(), SAVE_AFTER);
  }

  private async save(): Promise<void> {
    this.timer = undefined;
    if (this.id === null) {
      kept.set(this.key, JSON.stringify({ version: 0, ...this.content.value }));
      this.saving.value = "saved";
      return;
    }
    for (let attempt = 0; attempt < 5; attempt++) {
      const sent = this.content.value;
      try {
        this.base = { ...sent, version: (await api.saveAnnotations(this.id, { version: this.base.version, ...sent })).version };
        if (this.timer === undefined) this.saving.value = "saved";
        return;
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 409)) {
          this.saving.value = "failed";
          say(`Annotations are not saved: ${reason(error)}`, { error: true, action: { label: "Try again", run: () => void this.save() } });
          return;
        }
        await this.take();
      }
    }
    this.saving.value = "failed";
  }

  /** Take in what another tab saved. */
  private async take(): Promise<void> {
    const theirs = await api.annotations(this.id!);
    if (theirs.version === this.base.version) return;
    const common = contentOf(this.base);
    const rebased = (mine: Content): Content => merge(common, mine, contentOf(theirs));
    // Undo must not take back what the other tab did.
    this.past = this.past.map(rebased);
    this.future = this.future.map(rebased);
    this.content.value = rebased(this.content.value);
    this.base = theirs;
  }

  /** When the tab is looked at again. */
  async refresh(): Promise<void> {
    if (this.id === null || this.closed || this.timer !== undefined) return;
    await this.take().catch(() => undefined);
  }

  // What users do.

  select(node: number | null): void {
    this.selected.value = node;
    this.head.value = null;
  }
  lookAt({ layer, head }: HeadId): void {
    this.selected.value = null;
    this.head.value = { layer, head };
  }
  mark(node: number): void {
    const marked = new Set(this.marked.value);
    if (!marked.delete(node)) marked.add(node);
    // The node that was chosen before belongs to what is being marked.
    if (this.marked.value.size === 0 && this.selected.value !== null && this.selected.value !== node) marked.add(this.selected.value);
    this.marked.value = marked;
  }
  /** What an action is about: the marked nodes, else the selected one. */
  get subjects(): number[] {
    return this.marked.value.size ? [...this.marked.value] : this.selected.value === null ? [] : [this.selected.value];
  }
  togglePin(nodes: number[]): void {
    const ids = nodes.map((node) => this.model.node(node).id);
    this.change(({ pinned, supernodes }) => {
      if (!ids.every((id) => pinned.includes(id))) return { pinned: [...new Set([...pinned, ...ids])] };
      const left = supernodes.map((group) => ({ ...group, members: group.members.filter((id) => !ids.includes(id)) }));
      return { pinned: pinned.filter((id) => !ids.includes(id)), supernodes: left.filter((group) => group.members.length > 0) };
    });
  }
  /** Makes one supernode of several nodes, pinned with it; returns its id. */
  group(nodes: number[]): string | null {
    const members = nodes.map((node) => this.model.node(node).id);
    if (members.length < 2) {
      say("Mark two or more nodes first: hold Shift and click them. Then press G.");
      return null;
    }
    const id = `g${Date.now().toString(36)}${Math.random().toString(36).slice(2, 6)}`;
    this.change(({ pinned, supernodes }) => {
      const name = this.model.name(nodes[0]!, this.labels);
      const group: Supernode = { id, name, members };
      return { pinned: [...new Set([...pinned, ...members])], supernodes: inOneGroup([...supernodes, group]) };
    });
    this.marked.value = new Set();
    return id;
  }
  rename(id: string, name: string): void {
    this.change(({ supernodes }) => ({ supernodes: supernodes.map((group) => (group.id === id ? { ...group, name: name.trim() || group.name } : group)) }));
  }
  ungroup(id: string): void {
    this.change(({ supernodes }) => ({ supernodes: supernodes.filter((group) => group.id !== id) }));
  }
  /** The user's own name of a feature, at all its positions. */
  label(node: number, text: string): void {
    const { feature, id } = this.model.node(node);
    this.change(({ labels }) => {
      const { [feature || id]: _, ...others } = labels;
      return { labels: text.trim() ? { ...others, [feature || id]: text.trim() } : others };
    });
  }
}

function contentOf({ pinned, supernodes, labels, notes }: Annotations): Content {
  return { pinned: pinned ?? [], supernodes: supernodes ?? [], labels: labels ?? {}, notes: notes ?? "" };
}
