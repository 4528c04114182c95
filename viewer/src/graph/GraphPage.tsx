import type { Route } from "../state";
import { Empty } from "../ui/parts";

export default function GraphPage({ route }: { route: Route }) {
  return <Empty icon="graph" title={route.rest || "The graph comes here"} />;
}
