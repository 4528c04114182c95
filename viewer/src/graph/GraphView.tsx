import "./graph.css";
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { reason } from "../state";
import { Empty, Progress } from "../ui/parts";
import { GraphModel } from "./model";
import type { GraphFile } from "./parse";
import type { Scene } from "./scene";
import { Side } from "./Side";
import { Stage } from "./Stage";
import { GraphStore } from "./store";

/** A graph inside another page: drawing and side panel fill the parent, the address and the keyboard stay that page's. */
export function GraphView({ id, graph }: { id: string; graph: GraphFile }) {
  const store = useSignal<GraphStore | null>(null);
  const failed = useSignal("");
  const scene = useRef<Scene | null>(null);
  useEffect(() => {
    const opened = new GraphStore(new GraphModel(graph), id);
    let current = true;
    opened.load().then(
      () => current && (store.value = opened),
      (error: unknown) => current && (failed.value = reason(error)),
    );
    return () => {
      current = false;
      opened.close();
    };
  }, [id]);
  if (failed.value) return <Empty icon="warn" title="This graph cannot be shown"><p>{failed.value}</p></Empty>;
  if (store.value === null) return <Progress fraction={null} text="loading the graph" />;
  return (
    <div class="graph-inside">
      <Stage store={store.value} scene={scene} />
      <Side store={store.value} />
    </div>
  );
}
