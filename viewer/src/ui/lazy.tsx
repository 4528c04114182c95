import { useSignal } from "@preact/signals";
import type { ComponentType } from "preact";
import { useEffect } from "preact/hooks";
import type { Route } from "../state";
import { reason } from "../state";
import { Empty, Progress } from "./parts";

type View = ComponentType<{ route: Route }>;

/** A page whose code is fetched when it is first shown. */
export function lazy(load: () => Promise<{ default: View }>): View {
  let known: View | null = null;
  return function Lazy({ route }: { route: Route }) {
    const view = useSignal<{ view: View | null }>({ view: known });
    const failed = useSignal("");
    useEffect(() => {
      if (known === null)
        load().then(
          (module) => (view.value = { view: (known = module.default) }),
          (error: unknown) => (failed.value = reason(error)),
        );
    }, []);
    const Shown = view.value.view;
    if (failed.value) return <Empty icon="warn" title="This page could not be loaded"><p>{failed.value}</p></Empty>;
    return Shown ? <Shown route={route} /> : <Progress fraction={null} text="loading" />;
  };
}
