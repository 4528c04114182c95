/** Attention heads: which of them carry the edges, and why one attends where it does, as pairs of query and key. */
import { useSignal } from "@preact/signals";
import { Button, Segmented } from "../ui/controls";
import { Panel } from "../ui/parts";
import { Crop } from "./Patches";
import type { Score } from "./parse";
import { NodeRow, percent, percentWidth, signed } from "./rows";
import type { GraphStore, HeadId } from "./store";

const SHOWN = 8;
const nameOf = ({ layer, head }: HeadId): string => `L${layer}H${head}`;

/** The heads that carry most of the influence, to choose one. */
export function Heads({ store }: { store: GraphStore }) {
  const heads = store.model.file.ranked.slice(0, SHOWN);
  if (!heads.length) return null;
  return (
    <Panel title="Attention heads that carry most of it">
      <ul class="outputs">
        {heads.map((head) => (
          <li key={nameOf(head)}>
            <button type="button" class="row" title="Its edges, and why it attends where it does" onClick={() => store.lookAt(head)}>
              <span class="name">{nameOf(head)}</span>
              <span class="bar">
                <span style={{ width: percentWidth(head.share / heads[0]!.share) }} />
              </span>
              <span class="value">{percent(head.share)}</span>
            </button>
          </li>
        ))}
      </ul>
    </Panel>
  );
}

/** One head: the edges that it carries and its scores. */
export function HeadDetails({ store, head }: { store: GraphStore; head: HeadId }) {
  const { model } = store;
  const known = model.file.ranked.find((other) => nameOf(other) === nameOf(head));
  const edges = store.headEdges.value;
  const most = Math.abs(edges[0]?.weight ?? 1);
  return (
    <>
      <section class="panel node">
        <div class="head">
          <div class="title">
            <h2>{nameOf(head)}</h2>
            <p class="place">attention head {head.head} of layer {head.layer}</p>
          </div>
          <Button icon="close" kind="quiet" small aria-label="Back to the overview" onClick={() => (store.head.value = null)} />
        </div>
        {known && (
          <dl class="facts">
            <div title="Share of the influence that all edges hand down">
              <dt>Carries</dt>
              <dd>{percent(known.share)}</dd>
            </div>
          </dl>
        )}
      </section>
      <Attention store={store} scores={model.file.attention.filter((score) => nameOf(score) === nameOf(head))} />
      <Panel title="Edges it carries">
        <ul class="edges">
          {edges.slice(0, 2 * SHOWN).map(({ index, node, weight }) => (
            <NodeRow key={index} store={store} node={node} strength={Math.abs(weight) / most} negative={weight < 0} value={signed(weight)} detail={`→ ${model.name(model.file.target[index]!, store.labels)}`} />
          ))}
        </ul>
        {!edges.length && <p class="hint">It is among the strongest heads of no edge.</p>}
      </Panel>
    </>
  );
}

export function Attention({ store, scores }: { store: GraphStore; scores: Score[] }) {
  return (
    <>
      {scores.map((score, i) => (
        <Why key={i} store={store} score={score} />
      ))}
    </>
  );
}

/** Why a head attends there: the score as a sum over pairs, or over one side. */
function Why({ store, score }: { store: GraphStore; score: Score }) {
  const { model } = store;
  const side = useSignal<"pairs" | "queries" | "keys">("pairs");
  const rows = side.value === "pairs" ? score.pairs : score[side.value].map(([id, part]) => [id, "", part] as const);
  const most = Math.max(...rows.map(([, , part]) => Math.abs(part)), 1e-12);
  const from = score.query >= 0 && score.key >= 0;
  return (
    <Panel title={from ? `Why ${nameOf(score)} attends` : "Why it attends"}>
      {from && (
        <p class="place looks">
          <button type="button" class="plain" onClick={() => store.lookAt(score)}>
            {nameOf(score)}
          </button>{" "}
          looks from “{model.placeAt(score.query)}” at “{model.placeAt(score.key)}”{score.probability === null ? "" : `: ${percent(score.probability)} of its attention`}
        </p>
      )}
      <Segmented
        label="Parts of the score"
        value={side.value}
        options={[["pairs", "Pairs"], ["queries", "Query alone"], ["keys", "Key alone"]]}
        onChange={(value) => (side.value = value)}
      />
      <ul class="edges">
        {rows.slice(0, SHOWN).map(([first, second, part]) => (
          <li key={`${first} ${second}`} class="row">
            <span class="text">
              <Source store={store} id={first} side={side.value === "keys" ? "key" : "query"} />
              {second && <Source store={store} id={second} side="key" />}
            </span>
            <span class={part < 0 ? "bar negative" : "bar"}>
              <span style={{ width: percentWidth(Math.abs(part) / most) }} />
            </span>
            <span class="value">{signed(part)}</span>
          </li>
        ))}
      </ul>
      {!rows.length && <p class="hint">The file has none.</p>}
    </Panel>
  );
}

/** A source of a score, by name; one that is a node of the graph can be chosen. */
function Source({ store, id, side }: { store: GraphStore; id: string; side: "query" | "key" }) {
  const { model } = store;
  const { node, name, place, patch } = model.about(id, store.labels);
  const words = (
    <>
      <span class="place">{side}</span> <Crop model={model} patch={patch} size={18} /> <b>{name}</b> <span class="place">{place}</span>
    </>
  );
  if (node === null) return <span class="source">{words}</span>;
  return (
    <button type="button" class="source plain" onClick={() => store.select(node)} onMouseEnter={() => (store.hovered.value = node)} onMouseLeave={() => (store.hovered.value = null)}>
      {words}
    </button>
  );
}
