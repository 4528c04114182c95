import { signal, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { embedded } from "../api";
import { FeaturePanel } from "../features/FeaturePanel";
import { go } from "../state";
import { addEdit } from "../try/edits";
import { Button, Segmented } from "../ui/controls";
import { Panel } from "../ui/parts";
import { Attention, HeadDetails, Heads } from "./Heads";
import { type Edge, KINDS } from "./model";
import { Crop, Picture } from "./Patches";
import { NodeRow, percent, percentWidth, signed } from "./rows";
import type { GraphStore } from "./store";

const SHOWN = 12; // edges until "show all"
/** What the panel shows of a node; it stays while one looks at others. */
const tab = signal<"in" | "out" | "examples">("in");

/** The panel at the side: the picture, then the chosen node, or what the graph is about. */
export function Side({ store }: { store: GraphStore }) {
  const node = store.selected.value;
  return (
    <aside class="side" aria-label="Details">
      <Pictures store={store} />
      {node !== null ? <Details key={node} store={store} node={node} /> : store.head.value ? <HeadDetails store={store} head={store.head.value} /> : <Overview store={store} />}
    </aside>
  );
}

function Pictures({ store }: { store: GraphStore }) {
  const { model, selected, hovered } = store;
  const images = model.file.pictures.flatMap((url, image) => (url === null ? [] : [image]));
  if (!images.length) return null;
  const lit = new Set<number>();
  if (selected.value !== null) {
    const feature = model.node(selected.value).feature;
    lit.add(model.node(selected.value).position);
    // A feature may fire on several patches: all of them are its part of the picture.
    if (feature) for (const node of model.file.nodes) if (node.feature === feature) lit.add(node.position);
    for (const position of lit) if (!model.file.tokens[position]?.patch) lit.delete(position);
  }
  const heat = selected.value === null || lit.size ? new Map<number, number>() : patchHeat(store, selected.value);
  const over = hovered.value === null ? null : model.node(hovered.value).position;
  const at = (position: number): number | undefined => {
    const there = model.file.nodes.flatMap((node, number) => (node.position === position && node.kind !== "bias" && node.kind !== "rest" ? [number] : []));
    return there.find((node) => model.node(node).kind === "token") ?? there[0];
  };
  return (
    <div class="pictures">
      {images.map((image) => (
        <Picture
          key={image}
          model={model}
          image={image}
          lit={lit}
          heat={heat}
          hovered={over}
          onPick={(position) => store.select(at(position) ?? null)}
          onHover={(position) => (store.hovered.value = position === null ? null : (at(position) ?? null))}
        />
      ))}
      {heat.size > 0 && <p class="caption">Blue patches add to this node, orange take away</p>}
    </div>
  );
}

/** What each patch gives a node through direct edges, as a share of the patch that gives most. */
function patchHeat({ model }: GraphStore, node: number): Map<number, number> {
  const sums = new Map<number, number>();
  for (const edge of model.incoming(node)) {
    const { position, kind } = model.node(edge.node);
    if (model.file.tokens[position]?.patch && kind !== "bias" && kind !== "rest") sums.set(position, (sums.get(position) ?? 0) + edge.weight);
  }
  const most = Math.max(...[...sums.values()].map(Math.abs), 0);
  return new Map([...sums].map(([position, sum]) => [position, most ? sum / most : 0]));
}

function Overview({ store }: { store: GraphStore }) {
  const { model } = store;
  const outputs = model.file.nodes.flatMap((node, number) => (node.kind === "logit" ? [number] : []));
  const features = model.file.nodes.flatMap((node, number) => (node.kind === "feature" ? [number] : [])).sort((a, b) => model.influence[b]! - model.influence[a]!);
  const scores = model.file.scores;
  return (
    <>
      <Panel title={outputs.length > 1 ? "What the model says next" : "The answer this graph explains"}>
        <ul class="outputs">
          {outputs.slice(0, 10).map((node) => (
            <li key={node}>
              <button type="button" class="row" onClick={() => store.select(node)}>
                <span class="name">{model.name(node, store.labels)}</span>
                <span class="bar">
                  <span style={{ width: percentWidth(model.node(node).probability) }} />
                </span>
                <span class="value">{percent(model.node(node).probability)}</span>
              </button>
            </li>
          ))}
        </ul>
        {scores && (
          <dl class="facts">
            <div title="Share of the influence that comes from inputs through features, rather than from errors">
              <dt>Replacement</dt>
              <dd>{scores.replacement.toFixed(2)}</dd>
            </div>
            <div title="Share of all edges' influence whose source is explained, rather than an error">
              <dt>Completeness</dt>
              <dd>{scores.completeness.toFixed(2)}</dd>
            </div>
          </dl>
        )}
      </Panel>
      <Panel title="Features with most influence on it">
        <ul class="edges">
          {features.slice(0, SHOWN).map((node) => (
            <NodeRow key={node} store={store} node={node} strength={model.influence[node]! / (model.influence[features[0]!] || 1)} value={percent(model.influence[node]!)} />
          ))}
        </ul>
        {!features.length && <p class="hint">This graph has no features.</p>}
      </Panel>
      <Heads store={store} />
      <Panel title="Notes">
        <textarea
          class="notes"
          rows={3}
          placeholder="What you see in this graph. Saved with it."
          aria-label="Notes"
          value={store.content.value.notes}
          onChange={(event) => {
            const notes = event.currentTarget.value;
            store.change(() => ({ notes }));
          }}
        />
      </Panel>
    </>
  );
}

/** To `try it` with a feature, or with all features of its supernode. */
function edit({ model, groupOf }: GraphStore, node: number): void {
  const group = groupOf.value.get(node);
  const members = (group?.members ?? [model.node(node).id]).flatMap((id) => model.index.get(id) ?? []);
  // Nodes of one feature at several positions are one edit, at its largest activation.
  const own = new Map<string, number>();
  for (const { feature, activation } of members.map((member) => model.node(member)))
    if (feature) own.set(feature, Math.max(own.get(feature) ?? 0, activation ?? 0));
  addEdit({ name: group?.name || model.node(node).feature, features: [...own].map(([feature, activation]) => ({ feature, own: activation })) });
  go("try");
}

function Details({ store, node }: { store: GraphStore; node: number }) {
  const { model } = store;
  const { kind, feature, layer, activation, probability, id, label } = model.node(node);
  const incoming = model.incoming(node);
  const outgoing = model.outgoing(node);
  const side = tab.value === "examples" && !feature ? "in" : tab.value === "in" && !incoming.length && outgoing.length ? "out" : tab.value;
  const all = useSignal(false);
  const editing = useSignal(false);
  const field = useRef<HTMLInputElement>(null);
  const pinned = store.pinnedSet.value.has(node);
  const group = store.groupOf.value.get(node);
  useEffect(() => field.current?.select(), [editing.value]);
  const edges = side === "in" ? incoming : outgoing;
  const total = edges.reduce((sum, edge) => sum + Math.abs(edge.weight), 0) || 1;
  const most = Math.abs(edges[0]?.weight ?? 1);
  const own = store.labels[feature || id];
  return (
    <>
      <section class="panel node">
        <div class="head">
          <Crop model={model} patch={model.patchOf(node)} size={44} />
          <div class="title">
            {editing.value ? (
              <input
                ref={field}
                class="rename"
                aria-label="Name of this node"
                defaultValue={own ?? label}
                onBlur={(event) => {
                  const text = event.currentTarget.value;
                  editing.value = false;
                  if (text !== label) store.label(node, text);
                }}
                onKeyDown={(event) => {
                  event.stopPropagation();
                  if (event.key === "Enter") event.currentTarget.blur();
                  if (event.key === "Escape") editing.value = false;
                }}
              />
            ) : (
              <h2>
                {model.name(node, store.labels)}
                {(kind === "feature" || kind === "error") && <Button icon="edit" kind="quiet" small aria-label="Give it a name of your own" onClick={() => (editing.value = true)} />}
              </h2>
            )}
            <p class="place">
              {KINDS[kind]}
              {feature ? ` ${feature}` : kind === "error" ? ` of layer ${layer}` : ""} at {kind === "bias" || kind === "rest" ? "no position" : model.file.tokens[model.node(node).position]?.patch ? model.place(node) : `“${model.place(node)}”`}
            </p>
          </div>
          <Button icon="close" kind="quiet" small aria-label="Back to the overview" onClick={() => store.select(null)} />
        </div>
        <dl class="facts">
          {activation !== null && (
            <div title="How strongly the feature fires here">
              <dt>Activation</dt>
              <dd>{activation.toPrecision(3)}</dd>
            </div>
          )}
          {kind === "logit" && (
            <div>
              <dt>Probability</dt>
              <dd>{percent(probability)}</dd>
            </div>
          )}
          {kind !== "logit" && (
            <div title="Share of the outputs that reaches them through this node, along all paths of this graph">
              <dt>Influence</dt>
              <dd>{percent(model.influence[node]!)}</dd>
            </div>
          )}
          {group && (
            <div>
              <dt>Group</dt>
              <dd>{group.name}</dd>
            </div>
          )}
        </dl>
        <div class="actions">
          <Button icon="pin" small pressed={pinned} onClick={() => store.togglePin([node])}>
            {pinned ? "Pinned" : "Pin"}
          </Button>
          <Button icon="plus" small pressed={store.marked.value.has(node)} onClick={() => store.mark(node)}>
            {store.marked.value.has(node) ? "Marked" : "Mark for a group"}
          </Button>
          {feature && embedded === null && (
            <Button icon="play" small title="Suppress, scale or set it, and see what happens to the answer" onClick={() => edit(store, node)}>
              {group ? "Edit the group" : "Edit"}
            </Button>
          )}
        </div>
      </section>
      <section class="panel">
        <header>
          <Segmented
            label="About this node"
            value={side}
            options={[["in", `Inputs ${incoming.length}`], ["out", `Outputs ${outgoing.length}`], ...(feature ? ([["examples", "Examples"]] as const) : [])]}
            onChange={(value) => ((tab.value = value), (all.value = false))}
          />
        </header>
        {side === "examples" ? (
          <FeaturePanel key={feature} study="" model={model.file.model} feature={feature} named />
        ) : (
        <div class="body">
          <ul class="edges">
            {(all.value ? edges : edges.slice(0, SHOWN)).map((edge) => (
              <NodeRow key={edge.index} store={store} node={edge.node} strength={Math.abs(edge.weight) / most} negative={edge.weight < 0} value={signed(edge.weight)} detail={heads(store, edge) || percent(Math.abs(edge.weight) / total)} />
            ))}
          </ul>
          {!edges.length && <p class="hint">{side === "in" ? "Nothing in this graph leads here." : "Nothing in this graph starts here."}</p>}
          {edges.length > SHOWN && !all.value && (
            <Button kind="quiet" small onClick={() => (all.value = true)}>
              Show all {edges.length}
            </Button>
          )}
        </div>
        )}
      </section>
      <Attention store={store} scores={model.file.attention.filter((score) => score.node === node)} />
    </>
  );
}

/** The heads that carry most of an edge, where the file has them. */
function heads(store: GraphStore, edge: Edge): string {
  const known = store.model.file.heads.get(edge.index) ?? [];
  const top = [...known].sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, 3);
  return top.map(({ layer, head, share }) => `L${layer}H${head} ${percent(Math.abs(share))}`).join(", ");
}
