/** What the lists of the side panel are made of. */
import { Crop } from "./Patches";
import type { GraphStore } from "./store";

export const percent = (share: number): string => (share >= 0.0995 ? `${Math.round(100 * share)} %` : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : share > 0 ? "< 0.1 %" : "0 %");
export const signed = (value: number): string => `${value < 0 ? "−" : "+"}${Math.abs(value) >= 100 ? Math.abs(value).toFixed(0) : Math.abs(value).toPrecision(3)}`;
export const percentWidth = (share: number): string => `${Math.max(0, Math.min(1, share)) * 100}%`;

/** One node in a list, with a bar. */
export function NodeRow(props: { store: GraphStore; node: number; strength: number; value: string; negative?: boolean; detail?: string }) {
  const { store, node, strength, value, negative, detail } = props;
  const { model } = store;
  const { feature, kind } = model.node(node);
  const name = model.name(node, store.labels);
  const place = kind === "token" ? "input" : kind === "logit" ? "output" : model.place(node);
  return (
    <li>
      <button type="button" class="row edge" onClick={() => store.select(node)} onMouseEnter={() => (store.hovered.value = node)} onMouseLeave={() => (store.hovered.value = null)}>
        <Crop model={model} patch={model.patchOf(node)} size={26} />
        <span class="text">
          <span class="name">{name}</span>
          <span class="place">
            {feature && feature !== name ? `${feature} · ` : ""}
            {place}
            {detail ? ` · ${detail}` : ""}
          </span>
        </span>
        <span class={negative ? "bar negative" : "bar"}>
          <span style={{ width: percentWidth(strength) }} />
        </span>
        <span class="value">{value}</span>
      </button>
    </li>
  );
}
