import "./compare.css";
import { useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { api, type Run } from "../api";
import { FeaturePanel } from "../features/FeaturePanel";
import { parse, type GraphFile } from "../graph/parse";
import { nameOf } from "../runs/RunsPage";
import { href, replaceAddress, type Route } from "../state";
import { Legend } from "../ui/charts";
import { Button, Segmented } from "../ui/controls";
import { percent, token } from "../ui/format";
import { useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { Choice } from "../features/FeaturesPage";
import { answerOf, matched, type Both } from "./match";
import { Joined } from "./Joined";

/** Two graphs side by side, their shared features joined: two pictures, picture and text, before and after an edit. */
export default function ComparePage({ route }: { route: Route }) {
  const { data, error } = useLoad(() => api.runs(), []);
  const [a, b] = [route.query.get("a") ?? "", route.query.get("b") ?? ""];
  if (error) return <Empty icon="warn" title="The runs could not be read"><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the runs" />;
  const runs = data.runs.filter((run) => run.has.graph);
  const set = (to: { a?: string; b?: string }) => replaceAddress("compare", "", { a, b, ...to });
  return (
    <div class="page compare">
      <div class="compare-bar">
        <Pick name="First graph" value={a} runs={runs} onChange={(id) => set({ a: id })} />
        <Button icon="redo" kind="quiet" small aria-label="Exchange the sides" disabled={!a || !b} onClick={() => set({ a: b, b: a })} />
        <Pick name="Second graph" value={b} runs={runs} onChange={(id) => set({ b: id })} />
      </div>
      {!runs.length ? (
        <Empty icon="graph" title="No graphs to compare yet"><p>Trace two pictures first.</p><a class="button primary" href={href("try")}>Try it</a></Empty>
      ) : a && b ? (
        <Loaded key={`${a} ${b}`} a={a} b={b} />
      ) : (
        <Empty icon="graph" title="Which two graphs?"><p>Choose one at each side: say, two pictures with the same question.</p></Empty>
      )}
    </div>
  );
}

function Pick({ name, value, runs, onChange }: { name: string; value: string; runs: Run[]; onChange: (id: string) => void }) {
  const known = runs.some((run) => run.id === value) || !value;
  const words = (run: Run) => `${nameOf(run)}  (${run.id})`;
  return <Choice name={name} value={value} options={[["", "choose a graph…"], ...(known ? [] : [[value, value] as const]), ...runs.map((run) => [run.id, words(run)] as const)]} onChange={onChange} />;
}

function Loaded({ a, b }: { a: string; b: string }) {
  const { data, error } = useLoad(() => Promise.all([api.graph(a).then(parse), api.graph(b).then(parse)]), [a, b]);
  if (error) return <Empty icon="warn" title="These cannot be compared"><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the graphs" />;
  return <Shown graphs={data} ids={[a, b]} />;
}

const NAMES = { both: "both", first: "first alone", second: "second alone" };

function Shown({ graphs, ids }: { graphs: [GraphFile, GraphFile]; ids: [string, string] }) {
  const list = useMemo(() => matched(graphs[0], graphs[1]), [graphs]);
  const selected = useSignal("");
  const side = useSignal<keyof typeof NAMES>("both");
  const counts = { both: list.filter((one) => one.a && one.b).length, first: list.filter((one) => !one.b).length, second: list.filter((one) => !one.a).length };
  const rows = list.filter((one) => (side.value === "both" ? one.a && one.b : side.value === "first" ? !one.b : !one.a)).sort((x, y) => weight(y) - weight(x));
  const overlap = list.reduce((sum, one) => sum + Math.min(one.a, one.b), 0) / (list.reduce((sum, one) => sum + Math.max(one.a, one.b), 0) || 1);
  const model = graphs[0].model;
  return (
    <>
      {graphs[0].model !== graphs[1].model && <p class="warning">These graphs are of different models ({graphs[0].model || "?"} and {graphs[1].model || "?"}): features of the same number are not the same features.</p>}
      <div class="card compare-card">
        <div class="sides">
          {graphs.map((graph, n) => (
            <header key={n} class={n ? "second" : "first"}>
              {graph.pictures[0] && <img src={graph.pictures[0]} alt={`picture of the ${n ? "second" : "first"} graph`} />}
              <div>
                <h2>{answerOf(graph)}</h2>
                <p class="soft">{question(graph)}</p>
                <a href={href("graph", ids[n])}>Open the graph</a>
              </div>
            </header>
          ))}
        </div>
        <Joined list={list} graphs={graphs} selected={selected.value} onSelect={(feature) => (selected.value = feature)} />
        <Legend items={[{ name: `${counts.both} features in both`, series: 2 }, { name: `${counts.first} in the first alone`, series: 0 }, { name: `${counts.second} in the second alone`, series: 5 }]} />
        <p class="remark">
          A circle is a feature, larger the more of the answer's influence goes through it; lines join the same feature in both. Overlap of their influence: <b>{percent(overlap)}</b> (sum of the smaller shares over sum of the larger).
        </p>
      </div>
      <div class="compare-lists">
        <section class="card">
          <Segmented label="Which features" value={side.value} options={(Object.keys(NAMES) as (keyof typeof NAMES)[]).map((key) => [key, `${NAMES[key]} (${counts[key]})`] as const)} onChange={(key) => (side.value = key)} />
          <table class="plain shared">
            <thead><tr><th>feature</th><th class="number">first</th><th class="number">second</th></tr></thead>
            <tbody>
              {rows.slice(0, 100).map((one) => (
                <tr key={one.feature} class={one.feature === selected.value ? "chosen" : ""} tabIndex={0} onClick={() => (selected.value = one.feature)} onKeyDown={(event) => event.key === "Enter" && (selected.value = one.feature)}>
                  <th><span class="mono">{one.feature}</span> <span class="soft">{one.label}</span></th>
                  <td>{one.a ? percent(one.a) : "–"}</td>
                  <td>{one.b ? percent(one.b) : "–"}</td>
                </tr>
              ))}
            </tbody>
          </table>
          {!rows.length && <p class="soft">None.</p>}
        </section>
        <section class="card panel-card">
          {selected.value ? <FeaturePanel study="" model={model} feature={selected.value} /> : <Empty icon="image" title="Choose a feature"><p>Click a circle or a row to see what it fires on.</p></Empty>}
        </section>
      </div>
    </>
  );
}

const weight = (one: Both): number => Math.max(one.a, one.b);
const question = (graph: GraphFile): string => {
  const words = graph.tokens.filter((one) => one.role === "question" && !one.patch).map((one) => token(one.text)).join(" ");
  return words || graph.prompt.slice(0, 120);
};
