import { useSignal } from "@preact/signals";
import { api, type FvuRow } from "../api";
import { href } from "../state";
import { Legend, Lines, Spark } from "../ui/charts";
import { Command } from "../ui/command";
import { number, percent, when } from "../ui/format";
import { useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { Table } from "../ui/table";

const MOST = 6; // lines that a chart can tell apart

/** Runs that measured transcoders: the fraction of variance unexplained by layer and by expansion factor. */
export function Transcoders() {
  const { data, error } = useLoad(() => api.fvu(), []);
  const hidden = useSignal<ReadonlySet<string>>(new Set());
  if (error) return <Empty icon="warn" title="The runs could not be read"><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading" />;
  if (!data.runs.length)
    return (
      <Empty icon="graph" title="No transcoders were trained or measured here yet">
        <Command text="python run.py -m experiment=expansion_sweep transcoder.expansion_factor=4,16" />
      </Empty>
    );
  const drawn = data.runs.filter((run) => !hidden.value.has(run.id) && run.fvu_by_layer.length).slice(0, MOST).sort((a, b) => (a.expansion ?? 0) - (b.expansion ?? 0));
  const series = new Map(drawn.map((run, n) => [run.id, n]));
  const most = Math.max(...data.runs.flatMap((run) => run.fvu_by_layer), 1e-9);
  const byFactor = data.runs.filter((run) => run.expansion !== null && run.fvu !== null);
  const name = (run: FvuRow) => [run.name, run.expansion !== null && `× ${number(run.expansion)}`].filter(Boolean).join(", ");
  const toggle = (id: string) => {
    const next = new Set(hidden.value);
    if (!next.delete(id)) next.add(id);
    hidden.value = next;
  };
  return (
    <div class="results">
      <div class="fvu-charts">
        <figure class="card">
          <figcaption>FVU by layer</figcaption>
          <Lines
            label="Fraction of variance unexplained by layer"
            x="layer"
            y="fraction of variance unexplained"
            lines={drawn.map((run) => ({ name: name(run), series: series.get(run.id) ?? 0, points: run.fvu_by_layer.map((y, x) => ({ x, y })) }))}
          />
          <Legend items={drawn.map((run) => ({ name: name(run), series: series.get(run.id) ?? 0 }))} />
        </figure>
        <figure class="card">
          <figcaption>FVU by expansion factor</figcaption>
          {new Set(byFactor.map((run) => run.expansion)).size > 1 ? (
            <Lines
              label="Fraction of variance unexplained by expansion factor"
              x="expansion factor (features for each dimension of the model)"
              y="fraction of variance unexplained"
              marks={[...new Set(byFactor.map((run) => run.expansion ?? 0))]}
              lines={lines(byFactor)}
            />
          ) : (
            <Empty title="One expansion factor"><p>Sweep it to see what more features buy.</p></Empty>
          )}
          {byFactor.length > 0 && <Legend items={lines(byFactor)} />}
        </figure>
      </div>
      <div class="card flush">
        <Table
          rows={data.runs}
          id={(run) => run.id}
          columns={[
            { name: "Run", by: (run) => run.name, cell: (run) => <a href={href("runs", "", { open: run.id })}>{run.name}<span class="mono quiet block">{run.id}</span></a> },
            { name: "Drawn", cell: (run) => <input type="checkbox" aria-label={`Draw ${run.id}`} checked={series.has(run.id)} onChange={() => toggle(run.id)} /> },
            { name: "Expansion", number: true, by: (run) => run.expansion, cell: (run) => number(run.expansion) },
            { name: "L0", number: true, by: (run) => run.l0, cell: (run) => number(run.l0) },
            { name: "FVU", number: true, by: (run) => run.fvu, cell: (run) => number(run.fvu) },
            { name: "FVU by layer", cell: (run) => <Spark values={run.fvu_by_layer} most={most} name="FVU" /> },
            { name: "Dead", number: true, by: (run) => run.dead, cell: (run) => percent(run.dead) },
            { name: "Started", by: (run) => run.started, cell: (run) => <span class="nowrap">{when(run.started)}</span> },
          ]}
        />
      </div>
    </div>
  );
}

/** A line for each experiment; of several runs with one factor the newest counts. */
function lines(runs: FvuRow[]) {
  const names = [...new Set(runs.map((run) => run.name))].slice(0, MOST);
  return names.map((name, series) => {
    const newest = new Map<number, number>();
    for (const run of runs) if (run.name === name && !newest.has(run.expansion ?? 0)) newest.set(run.expansion ?? 0, run.fvu ?? 0);
    return { name, series, points: [...newest].map(([x, y]) => ({ x, y })).sort((a, b) => a.x - b.x) };
  });
}
