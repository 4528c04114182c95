import "./graph.css";
import { signal, useSignal, useSignalEffect } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { api, embedded } from "../api";
import { go, href, reason, replaceAddress, type Route, route as address, say } from "../state";
import { Button, Segmented, Slider } from "../ui/controls";
import { Icon } from "../ui/icons";
import { Empty, Progress } from "../ui/parts";
import { annotatedGraph, save } from "./circuit";
import { Help } from "./Help";
import { walk } from "./keys";
import { GraphModel } from "./model";
import { LIMITS, parse, parseText } from "./parse";
import { MOST_EDGES, type Scene } from "./scene";
import { Search } from "./Search";
import { Side } from "./Side";
import { Stage } from "./Stage";
import { GraphStore, type View } from "./store";
import { Subgraph } from "./Subgraph";

const EXAMPLE = "example";
/** The last file that was dropped: it lives as long as the page. */
const dropped = signal<GraphModel | null>(null);

async function openFile(file: File): Promise<void> {
  try {
    if (file.size > LIMITS.bytes) throw new Error(`This file has ${Math.round(file.size / 1e6)} MB; at most ${LIMITS.bytes / 1e6} can be opened.`);
    dropped.value = new GraphModel(parseText(await file.text()));
    go("graph", "", { file: file.name });
  } catch (error) {
    say(`${file.name}: ${reason(error)}`, { error: true });
  }
}

/** The newest run that has a graph, else the example. */
async function newest(): Promise<string> {
  const { runs } = await api.runs();
  return runs.find((run) => run.has.graph)?.id ?? EXAMPLE;
}

export default function GraphPage({ route }: { route: Route }) {
  const store = useSignal<GraphStore | null>(null);
  const failed = useSignal("");
  const dragging = useSignal(false);
  const file = route.query.get("file");

  useEffect(() => {
    let current = true;
    const show = async (): Promise<void> => {
      if (file !== null && embedded === null) {
        if (dropped.value === null) throw new Error(`${file} was opened from your disk, and is gone since the page was loaded again. Drop it here once more.`);
        return use(new GraphStore(dropped.value, null));
      }
      const id = embedded !== null ? null : route.rest || (await newest());
      if (current && id !== null && !route.rest) return replaceAddress("graph", id);
      const model = new GraphModel(parse(await api.graph(id ?? "")));
      const opened = new GraphStore(model, id);
      await opened.load();
      use(opened);
    };
    const use = (opened: GraphStore): void => {
      if (!current) return;
      fromAddress(opened, route.query);
      store.value?.close();
      store.value = opened;
      const { dangling, repeated } = opened.model.file;
      if (repeated) say(`Nodes with the id of another node: ${repeated.toLocaleString("en")}. They are shown without edges.`);
      if (dangling) say(`${dangling.toLocaleString("en")} links of this file name nodes that it lacks; they are left out.`);
    };
    failed.value = "";
    store.value = null;
    show().catch((error: unknown) => current && (failed.value = reason(error)));
    return () => {
      current = false;
    };
  }, [route.rest, file, file === null ? null : dropped.value]);

  useEffect(() => {
    const isFile = (event: DragEvent): boolean => event.dataTransfer?.types.includes("Files") ?? false;
    const over = (event: DragEvent): void => {
      if (!isFile(event) || embedded !== null) return;
      event.preventDefault();
      dragging.value = true;
    };
    const leave = (event: DragEvent): void => {
      if (event.relatedTarget === null) dragging.value = false;
    };
    const drop = (event: DragEvent): void => {
      if (!isFile(event) || embedded !== null) return;
      event.preventDefault();
      dragging.value = false;
      const given = event.dataTransfer?.files[0];
      if (given) void openFile(given);
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
    };
  }, []);

  return (
    <>
      {failed.value ? (
        <Empty icon="warn" title="This graph cannot be shown">
          <p>{failed.value}</p>
          <p>
            <OpenFile label="Open a graph file" /> <a href={href("graph", EXAMPLE)}>See the example</a>
          </p>
        </Empty>
      ) : store.value === null ? (
        <Progress fraction={null} text="loading the graph" />
      ) : (
        <GraphView key={store.value.serial} store={store.value} route={route} />
      )}
      {dragging.value && (
        <div class="dropzone">
          <Icon name="upload" size={32} />
          <p>Drop a graph.json of vlmscope, circuit-tracer or Neuronpedia</p>
        </div>
      )}
    </>
  );
}

function OpenFile({ label, small }: { label: string; small?: boolean }) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <Button icon="folder" small={small} kind={small ? "quiet" : undefined} title="Open a graph.json from your disk, or drop it onto the page" onClick={() => input.current?.click()}>
        {label}
      </Button>
      <input
        ref={input}
        class="hidden"
        type="file"
        accept=".json,application/json"
        aria-label="Graph file"
        tabIndex={-1}
        onChange={(event) => {
          const given = event.currentTarget.files?.[0];
          event.currentTarget.value = "";
          if (given) void openFile(given);
        }}
      />
    </>
  );
}

/** Selection, pins, thresholds and view from a permalink. */
function fromAddress(store: GraphStore, query: URLSearchParams): void {
  const { model } = store;
  store.selected.value = model.index.get(query.get("sel") ?? "") ?? null;
  const pins = (query.get("pins") ?? "").split(",").filter((id) => model.index.has(id));
  if (pins.length) store.change(({ pinned }) => ({ pinned: [...new Set([...pinned, ...pins])] }));
  const view = query.get("view");
  if (view === "both" || view === "subgraph") store.view.value = view;
  const [nodes, edges] = [Number(query.get("nodes") ?? NaN), Number(query.get("edges") ?? NaN)];
  if (nodes > 0 && nodes <= 1) store.nodeShare.value = nodes;
  if (Number.isInteger(edges) && edges >= 0) store.edgeCount.value = Math.min(edges, model.m, MOST_EDGES);
}

function addressOf(store: GraphStore, pins: boolean): Record<string, string> {
  const { model, selected, view, nodeShare, edgeCount, content, wholeShare } = store;
  return {
    sel: selected.value === null ? "" : model.node(selected.value).id,
    view: view.value === "graph" ? "" : view.value,
    nodes: nodeShare.value >= wholeShare ? "" : nodeShare.value.toFixed(3),
    edges: edgeCount.value === Math.min(model.m, 300) ? "" : String(edgeCount.value),
    pins: pins ? content.value.pinned.join(",") : "",
  };
}

function GraphView({ store, route }: { store: GraphStore; route: Route }) {
  const scene = useRef<Scene | null>(null);
  const search = useRef<HTMLInputElement>(null);
  const help = useSignal(false);
  const { model, view } = store;
  const file = route.query.get("file");
  /** Whether the address is still that of this graph: the next page may be on its way. */
  const here = (): boolean => address.peek().page === route.page && address.peek().rest === route.rest;

  useSignalEffect(() => {
    const query = { ...addressOf(store, false), file: file ?? "" };
    // Browsers refuse many changes of the address in a short time, such as those of a slider.
    const timer = setTimeout(() => embedded === null && here() && replaceAddress("graph", route.rest, query), 200);
    return () => clearTimeout(timer);
  });
  // Before the page is painted: a key pressed at once is not lost.
  useLayoutEffect(() => {
    const pick = (node: number): void => {
      store.select(node);
      scene.current?.reveal(node);
    };
    const keys = (event: KeyboardEvent): void => {
      const target = event.target as HTMLElement;
      if (target.closest("input, textarea, select, dialog")) return;
      const key = event.key.toLowerCase();
      const steered = event.ctrlKey || event.metaKey;
      if (key === "z" || (steered && key === "y")) event.shiftKey || key === "y" ? store.redo() : store.undo();
      else if (steered || event.altKey) return;
      else if (key.startsWith("arrow")) walk(store, key.slice(5) as "up" | "down" | "left" | "right", pick);
      else if (key === "/") search.current?.focus();
      else if (key === "?") help.value = true;
      else if (key === "p") store.subjects.length ? store.togglePin(store.subjects) : say("Choose a node first, then press P to pin it.");
      else if (key === "g") store.group([...store.marked.value]);
      else if (key === "f") scene.current?.fit();
      else if (key === "s") view.value = view.value === "graph" ? "both" : "graph";
      else if (key === "escape") {
        if (store.marked.value.size) store.marked.value = new Set();
        else store.select(null);
      } else return;
      event.preventDefault();
    };
    const seen = (): void => {
      if (document.visibilityState === "visible") void store.refresh();
      else store.flush(); // the tab may be about to close
    };
    // A link to this same graph, followed or typed.
    const moved = (): void => void (here() && fromAddress(store, address.peek().query));
    addEventListener("hashchange", moved);
    addEventListener("keydown", keys);
    addEventListener("focus", seen);
    document.addEventListener("visibilitychange", seen);
    return () => {
      removeEventListener("hashchange", moved);
      removeEventListener("keydown", keys);
      removeEventListener("focus", seen);
      document.removeEventListener("visibilitychange", seen);
      store.close();
    };
  }, [store]);

  const best = model.file.nodes.findIndex((node) => node.answer);
  const pinned = store.content.value.pinned.length;
  return (
    <div class={`graph-page view-${view.value}`} data-saving={store.saving.value}>
      <div class="toolbar">
        <h1 title={model.file.prompt}>
          <span class="prompt">{model.file.prompt}</span>
          {best >= 0 && <span class="answer">→ {model.name(best, {})}</span>}
        </h1>
        <span class="chip model">{model.file.model}</span>
        <div class="spacer" />
        <Search
          store={store}
          input={search}
          onPick={(node) => {
            store.select(node);
            scene.current?.reveal(node);
          }}
        />
        <Segmented<View>
          label="View"
          value={view.value}
          options={[
            ["graph", "Graph"],
            ["both", "Both"],
            ["subgraph", pinned ? `Pinned ${pinned}` : "Pinned"],
          ]}
          onChange={(value) => (view.value = value)}
        />
        <div class="tools">
          <Button icon="undo" kind="quiet" small disabled={!store.undoable.value} aria-label="Undo (Z)" onClick={() => store.undo()} />
          <Button icon="redo" kind="quiet" small disabled={!store.redoable.value} aria-label="Redo (Shift Z)" onClick={() => store.redo()} />
          {embedded === null && <OpenFile label="Open" small />}
          {embedded === null && (
            <Button
              icon="link"
              kind="quiet"
              small
              aria-label="Copy a link to this view"
              onClick={() => {
                const link = new URL(href("graph", route.rest, addressOf(store, true)), location.href).href;
                navigator.clipboard.writeText(link).then(
                  () => say("The link to this view, with its pins, is on the clipboard."),
                  () => say(link),
                );
              }}
            />
          )}
          <Button icon="download" kind="quiet" small aria-label="Save the graph file with pins and groups (Neuronpedia's format)" onClick={() => save(`${model.file.name}.json`, annotatedGraph(store), "application/json")} />
          <Button icon="help" kind="quiet" small aria-label="Help (?)" onClick={() => (help.value = true)} />
        </div>
      </div>
      <div class="work">
        {view.value !== "subgraph" && <Stage store={store} scene={scene} />}
        {view.value !== "graph" && <Subgraph store={store} />}
        <Footer store={store} />
      </div>
      <Side store={store} />
      {help.value && <Help onClose={() => (help.value = false)} />}
    </div>
  );
}

/** Thresholds that act at once, and what the shapes mean. */
function Footer({ store }: { store: GraphStore }) {
  const { model, visible, nodeShare, edgeCount, wholeShare } = store;
  const most = Math.min(model.m, MOST_EDGES);
  const shown = visible.value.reduce((sum: number, one) => sum + one, 0);
  // Even steps of the slider multiply the number of edges.
  const toSlider = (count: number): number => (most > 1 ? Math.log1p(count) / Math.log1p(most) : count);
  const kinds = new Set(model.file.nodes.map((node) => node.kind));
  return (
    <footer class="footer">
      <Slider
        label="Nodes"
        value={nodeShare.value}
        max={wholeShare}
        step={0.001}
        shown={`${shown.toLocaleString("en")} of ${model.n.toLocaleString("en")}`}
        onInput={(value) => (nodeShare.value = value >= wholeShare - 0.001 ? wholeShare : value)}
      />
      <Slider
        label="Edges"
        value={toSlider(edgeCount.value)}
        max={1}
        step={0.001}
        shown={`top ${edgeCount.value.toLocaleString("en")} of ${model.m.toLocaleString("en")}`}
        onInput={(value) => (edgeCount.value = Math.min(most, Math.round(Math.expm1(value * Math.log1p(most)))))}
      />
      <ul class="shapes" aria-label="Legend">
        <li><i class="dot" />feature</li>
        {kinds.has("token") && <li><i class="square" />input</li>}
        {kinds.has("error") && <li><i class="diamond" />error</li>}
        {kinds.has("bias") && <li><i class="triangle" />bias</li>}
        <li><i class="line plus" />adds</li>
        <li><i class="line minus" />takes away</li>
      </ul>
    </footer>
  );
}
