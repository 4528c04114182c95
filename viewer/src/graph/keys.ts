/** Walking along edges with the arrow keys. */
import type { GraphStore } from "./store";

interface Step {
  from: number;
  down: boolean;
  rank: number;
  at: number;
}
let last: Step | null = null;

/** Down: the strongest input; up: the strongest output; left and right: the neighbour before or after it instead. */
export function walk(store: GraphStore, way: "up" | "down" | "left" | "right", go: (node: number) => void): void {
  const { model, selected } = store;
  const at = selected.value;
  const edges = (from: number, down: boolean): number[] => (down ? model.incoming(from) : model.outgoing(from)).map((edge) => edge.node).filter((node) => store.visible.value[node]);
  if (at === null) {
    const answer = model.file.nodes.findIndex((node) => node.answer);
    last = null;
    return go(Math.max(answer, 0));
  }
  if (way === "up" || way === "down") {
    const next = edges(at, way === "down")[0];
    if (next === undefined) return;
    last = { from: at, down: way === "down", rank: 0, at: next };
    return go(next);
  }
  if (last === null || last.at !== at) return;
  const all = edges(last.from, last.down);
  const rank = (last.rank + (way === "right" ? 1 : -1) + all.length) % all.length;
  last = { ...last, rank, at: all[rank]! };
  go(last.at);
}
