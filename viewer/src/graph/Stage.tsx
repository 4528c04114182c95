import { useSignal, useSignalEffect } from "@preact/signals";
import type { RefObject } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { dark } from "../state";
import { Button } from "../ui/controls";
import { KINDS } from "./model";
import { Crop } from "./Patches";
import { Scene } from "./scene";
import type { GraphStore } from "./store";

/** The drawing of the whole graph, the card of the hovered node, and the bar of what can be done with marked nodes. */
export function Stage({ store, scene }: { store: GraphStore; scene: RefObject<Scene | null> }) {
  const box = useRef<HTMLDivElement>(null);
  const failed = useSignal(false);
  const settled = useSignal(0);
  useEffect(() => {
    try {
      scene.current = new Scene(box.current!, store);
    } catch (error) {
      console.error(error);
      failed.value = true;
      return;
    }
    settled.value++;
    // Canvases draw with the fonts that are there: once more when the page's own has come.
    void document.fonts.ready.then(() => scene.current?.update());
    return () => {
      scene.current?.close();
      scene.current = null;
    };
  }, [store]);
  useSignalEffect(() => {
    void [settled.value, store.selected.value, store.head.value, store.marked.value, store.visible.value, store.edgeCount.value, store.content.value, dark.value];
    // The theme's variables have their new values after this task.
    queueMicrotask(() => scene.current?.update());
  });
  useSignalEffect(() => {
    void store.hovered.value;
    scene.current?.overlay();
  });
  return (
    <div class="stage" role="application" aria-label="Graph. Use the arrow keys to walk along edges, and the slash key to search.">
      {failed.value ? <p class="hint">This browser has no WebGL, which draws the graph.</p> : <div class="canvas" ref={box} />}
      <Card store={store} scene={scene} />
      <div class="corner">
        <Button icon="plus" small aria-label="Zoom in" onClick={() => scene.current?.zoom(1.5)} />
        <Button icon="minus" small aria-label="Zoom out" onClick={() => scene.current?.zoom(1 / 1.5)} />
        <Button icon="fit" small aria-label="Fit into the window (F)" onClick={() => scene.current?.fit()} />
      </div>
      <Marked store={store} />
    </div>
  );
}

function Card({ store, scene }: { store: GraphStore; scene: RefObject<Scene | null> }) {
  const node = store.hovered.value;
  const card = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const element = card.current;
    const place = node === null ? null : scene.current?.at(node);
    const room = element?.parentElement;
    if (!element || !place || !room) return;
    const { offsetWidth: width, offsetHeight: height } = element;
    const right = place.x + 16 + width < room.clientWidth;
    element.style.left = `${Math.max(4, right ? place.x + 16 : place.x - 16 - width)}px`;
    element.style.top = `${Math.max(4, Math.min(room.clientHeight - height - 4, place.y - height / 2))}px`;
  }, [node]);
  if (node === null || node === store.selected.value) return null;
  const { model } = store;
  const { kind, feature, activation, probability } = model.node(node);
  return (
    <div class="hovercard" ref={card} role="tooltip">
      <Crop model={model} patch={model.patchOf(node)} size={40} />
      <div>
        <b>{model.name(node, store.labels)}</b>
        <span>
          {KINDS[kind]} {feature} · {model.place(node)}
        </span>
        <span>
          {kind === "logit" ? `probability ${(100 * probability).toFixed(1)} %` : `influence ${(100 * model.influence[node]!).toFixed(1)} %`}
          {activation === null ? "" : ` · activation ${activation.toPrecision(3)}`}
        </span>
      </div>
    </div>
  );
}

function Marked({ store }: { store: GraphStore }) {
  const count = store.marked.value.size;
  if (!count) return null;
  return (
    <div class="markbar" role="toolbar" aria-label="Marked nodes">
      <span>{count === 1 ? "1 node marked" : `${count} nodes marked`}</span>
      <Button small kind="primary" icon="group" disabled={count < 2} onClick={() => store.group([...store.marked.value])}>
        Group <kbd>G</kbd>
      </Button>
      <Button small icon="pin" onClick={() => store.togglePin([...store.marked.value])}>
        Pin <kbd>P</kbd>
      </Button>
      <Button small kind="quiet" icon="close" aria-label="Clear the marks" onClick={() => (store.marked.value = new Set())} />
    </div>
  );
}
