/** The pages by the first word of their address, in the order of the bar at the top. */
import { lazy } from "./ui/lazy";

export interface PageEntry {
  /** The word in the bar; without one the page is reached from others. */
  title?: string;
  view: ReturnType<typeof lazy>;
}

const GRAPH: Record<string, PageEntry> = { graph: { title: "Graph", view: lazy(() => import("./graph/GraphPage")) } };

/** A single file has the graph alone: the condition is a constant of the build, which leaves the other pages out. */
export const PAGES: Record<string, PageEntry> = __SINGLE__
  ? GRAPH
  : {
      ...GRAPH,
      try: { title: "Try it", view: lazy(() => import("./try/TryPage")) },
      features: { title: "Features", view: lazy(() => import("./features/FeaturesPage")) },
      feature: { view: lazy(() => import("./features/FeaturePage")) },
      runs: { title: "Runs", view: lazy(() => import("./runs/RunsPage")) },
      trials: { view: lazy(() => import("./trials/TrialsPage")) },
      compare: { title: "Compare", view: lazy(() => import("./compare/ComparePage")) },
    };
