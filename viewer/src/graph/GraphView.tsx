import { href } from "../state";
import { Empty } from "../ui/parts";

/** A graph inside another page: it fills its parent and leaves the address alone. */
export function GraphView({ id }: { id: string }) {
  return <Empty icon="graph" title="The graph is ready"><p><a href={href("graph", id)}>Open it</a></p></Empty>;
}
