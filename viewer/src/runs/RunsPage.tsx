import "./runs.css";
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { api, type Run } from "../api";
import { go, href, replaceAddress, type Route } from "../state";
import { Command } from "../ui/command";
import { Button, Field, Segmented } from "../ui/controls";
import { count, duration, number, when, words } from "../ui/format";
import { Icon } from "../ui/icons";
import { useEscape, useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { Transcoders } from "./Transcoders";

type Kind = "all" | "graph" | "trials" | "study" | "report" | "failed";
const KINDS: Record<Kind, { name: string; fits: (run: Run) => boolean }> = {
  all: { name: "All", fits: () => true },
  graph: { name: "Graphs", fits: (run) => run.has.graph },
  trials: { name: "Trials", fits: (run) => run.has.trials },
  study: { name: "Studies", fits: (run) => run.has.study },
  report: { name: "Reports", fits: (run) => run.has.report },
  failed: { name: "Failed", fits: (run) => run.status === "failed" },
};
const STEP = 100; // rows that are added when the end of the list comes into view

/** All runs under the root, or the transcoders among them. */
export default function RunsPage({ route }: { route: Route }) {
  const { data, error } = useLoad(() => api.runs(), []);
  const get = (name: string) => route.query.get(name) ?? "";
  const [kind, text, open, tab] = [(get("kind") || "all") as Kind, get("words"), get("open"), get("view") === "fvu" ? "fvu" : "runs"] as const;
  const change = (to: Record<string, string>) => {
    const next: Record<string, string> = { view: get("view"), kind: get("kind"), words: text, open, ...to };
    if (next.kind === "all") next.kind = "";
    replaceAddress("runs", "", next);
  };
  useEscape(() => open && change({ open: "" }));
  if (error) return <Empty icon="warn" title="The runs could not be read"><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the runs" />;
  if (!data.runs.length)
    return (
      <Empty icon="folder" title="No runs yet">
        <p>Runs appear here when there are some in {data.root}. Make one by clicking, or with</p>
        <Command text="python run.py task=trace image=assets/pictures/mars.png 'prompt=what planet is this ?'" />
        <a class="button primary" href={href("try")}>Try it</a>
      </Empty>
    );
  const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
  const named = data.runs.filter((run) => {
    const all = `${run.id} ${run.task} ${run.experiment ?? ""} ${run.title} ${run.status}`.toLowerCase();
    return wanted.every((word) => all.includes(word));
  });
  const shown = named.filter((KINDS[kind] ?? KINDS.all).fits);
  return (
    <div class={open ? "browser open" : "browser"}>
      <div class="filters">
        <Segmented label="View" value={tab} options={[["runs", "Runs"], ["fvu", "Transcoders"]]} onChange={(view) => change({ view: view === "runs" ? "" : view, open: "" })} />
        {tab === "runs" && (
          <>
            <Field icon="search" class="find-field">
              <input type="search" placeholder="Find a run: mars, trace, 2026-11-30" aria-label="Find a run" value={text} onInput={(event) => change({ words: event.currentTarget.value })} />
            </Field>
            <div class="segmented" role="group" aria-label="Kind of run">
              {(Object.keys(KINDS) as Kind[]).map((key) => {
                const n = named.filter(KINDS[key].fits).length;
                return (key === "all" || key === kind || n > 0) && (
                  <button type="button" key={key} aria-pressed={kind === key} onClick={() => change({ kind: key })}>
                    {KINDS[key].name} <span class="quiet">{count(n)}</span>
                  </button>
                );
              })}
            </div>
          </>
        )}
      </div>
      {tab === "fvu" ? <Transcoders /> : <List runs={shown} open={open} root={data.root} onOpen={(id) => change({ open: id === open ? "" : id })} />}
      {open && (
        <aside class="drawer" aria-label={`Run ${open}`}>
          <Button class="close" icon="close" kind="quiet" small aria-label="Close the run" onClick={() => change({ open: "" })} />
          <Detail id={open} />
        </aside>
      )}
    </div>
  );
}

function List({ runs, open, root, onOpen }: { runs: Run[]; open: string; root: string; onOpen: (id: string) => void }) {
  const limit = useSignal(STEP);
  const end = useRef<HTMLDivElement>(null);
  const picked = useSignal<string[]>([]);
  useEffect(() => {
    const seen = new IntersectionObserver(([entry]) => entry?.isIntersecting && (limit.value += STEP), { rootMargin: "600px" });
    if (end.current) seen.observe(end.current);
    return () => seen.disconnect();
  }, [limit.value]);
  const pick = (id: string) => (picked.value = picked.value.includes(id) ? picked.value.filter((other) => other !== id) : [...picked.value.slice(-1), id]);
  return (
    <div class="results runs">
      <p class="result-line" role="status">
        <span><b>{count(runs.length)}</b> run{runs.length === 1 ? "" : "s"} in {root}</span>
        {picked.value.length > 0 && (
          <span class="picked">
            {picked.value.length === 1 ? "one graph picked, pick another to compare" : "two graphs picked"}
            <Button small kind="primary" disabled={picked.value.length < 2} onClick={() => go("compare", "", { a: picked.value[0] ?? "", b: picked.value[1] ?? "" })}>Compare</Button>
          </span>
        )}
      </p>
      {!runs.length && <Empty icon="search" title="No run fits"><p>Other words, or another kind.</p></Empty>}
      {runs.length > 0 && (
        <table class="table run-table">
          <thead>
            <tr><th class="pick"><span class="hidden">Compare</span></th><th>Run</th><th>What it has</th><th class="wide">Numbers</th><th>Started</th><th class="number wide">Took</th></tr>
          </thead>
          <tbody>
            {runs.slice(0, limit.value).map((run) => (
              <tr key={run.id} class={run.id === open ? "link chosen" : "link"} tabIndex={0} onClick={() => onOpen(run.id)} onKeyDown={(event) => event.key === "Enter" && event.target === event.currentTarget && onOpen(run.id)}>
                <td class="pick" onClick={(event) => event.stopPropagation()}>
                  {run.has.graph && <input type="checkbox" aria-label={`Compare the graph of ${run.id}`} checked={picked.value.includes(run.id)} onChange={() => pick(run.id)} />}
                </td>
                <td class="name">
                  <b>{nameOf(run)}</b>
                  {run.status !== "done" && <span class={`chip status ${run.status}`}>{run.status}</span>}
                  <span class="mono quiet">{run.id}</span>
                </td>
                <td><Links run={run} /></td>
                <td class="wide numbers">{Object.entries(run.metrics).slice(0, 2).map(([name, value]) => <span key={name} title={name}>{words(name.split("/").at(-1) ?? name)} <b>{number(value)}</b></span>)}</td>
                <td class="nowrap">{when(run.started)}</td>
                <td class="number wide nowrap">{duration(run.seconds)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {limit.value < runs.length && <div ref={end} class="quiet">more…</div>}
    </div>
  );
}

/** What a reader calls it: the prompt of a trace, else the experiment or the task. */
export const nameOf = (run: Run): string => run.title || words(run.experiment || run.task || "run");

/** Where a run leads: each link is a page that shows that part of it. */
function Links({ run, big = false }: { run: Run; big?: boolean }) {
  const to: [boolean, string, string, string][] = [
    [run.has.graph, "Graph", href("graph", run.id), ""],
    [run.has.trials, "Trials", href("trials", run.id), ""],
    [run.has.study, "Features", href("features", run.id), ""],
    [run.has.report, "Report", api.fileUrl(run.id, "report.html"), "_blank"],
  ];
  const links = to.filter(([has]) => has);
  return (
    <span class="links" onClick={(event) => event.stopPropagation()}>
      {links.map(([, name, address, target]) => (
        <a key={name} class={big ? "button" : "button small"} href={address} target={target || undefined} rel={target ? "noopener" : undefined}>{name}</a>
      ))}
      {!links.length && !big && <span class="quiet">files only</span>}
    </span>
  );
}

function Detail({ id }: { id: string }) {
  const { data, error } = useLoad(() => api.run(id), [id]);
  if (error) return <Empty icon="warn" title={id}><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the run" />;
  const metrics = Object.entries(data.metrics);
  return (
    <div class="run-detail">
      <header>
        <h2>{nameOf(data)}</h2>
        <p class="mono quiet">{data.id}</p>
        <p class="soft">{[`task ${words(data.task)}`, when(data.started), duration(data.seconds), data.status].filter(Boolean).join(" · ")}</p>
        <Links run={data} big />
      </header>
      <Command title="Run it again" text={data.command} />
      {data.graphs.length > 1 && (
        <details>
          <summary>{count(data.graphs.length)} graphs</summary>
          <ul>{data.graphs.map((graph) => <li key={graph}><a href={href("graph", graph)}>{graph}</a></li>)}</ul>
        </details>
      )}
      {metrics.length > 0 && (
        <details open={metrics.length <= 12}>
          <summary>{count(metrics.length)} numbers</summary>
          <table class="metrics"><tbody>{metrics.map(([name, value]) => <tr key={name}><th>{name}</th><td>{number(value, 4)}</td></tr>)}</tbody></table>
        </details>
      )}
      <details>
        <summary>Settings</summary>
        <pre>{data.config}</pre>
      </details>
      <details open={data.files.length <= 12}>
        <summary>{count(data.files.length)} files</summary>
        <ul class="files">
          {data.files.map((file) => (
            <li key={file.path}>
              <a href={api.fileUrl(data.id, file.path)} target="_blank" rel="noopener"><Icon name="download" size={12} /> {file.path}</a>
              <span class="quiet">{size(file.bytes)}</span>
            </li>
          ))}
        </ul>
      </details>
    </div>
  );
}

const size = (bytes: number): string => (bytes < 1e4 ? `${(bytes / 1e3).toFixed(1)} kB` : bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
