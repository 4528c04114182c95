import { useSignal } from "@preact/signals";
import type { GraphFile } from "../graph/parse";
import { percent } from "../ui/format";
import { answerOf, type Both } from "./match";

/** The features of two graphs by layer, one graph at each side; those of both are joined across the middle. */
export function Joined({ list, graphs, selected, onSelect }: { list: Both[]; graphs: [GraphFile, GraphFile]; selected: string; onSelect: (feature: string) => void }) {
  const over = useSignal("");
  const layers = [...new Set(list.map((one) => one.layer))].sort((x, y) => y - x);
  const most = Math.max(...list.map((one) => Math.max(one.a, one.b)), 1e-9);
  const radius = (share: number) => 3.5 + 9 * Math.sqrt(share / most);
  const [width, row, edge, gap] = [1000, 46, 44, 130];
  const height = row * layers.length + 30;
  const middle = width / 2;
  const y = (layer: number) => 20 + row * layers.indexOf(layer) + row / 2;

  // In each layer what both have stands nearest to the middle, so that the joining lines are short.
  const place = new Map<string, { a?: number; b?: number }>();
  for (const layer of layers)
    for (const side of ["a", "b"] as const) {
      const own = list.filter((one) => one.layer === layer && one[side] > 0).sort((x, z) => Number(z.a > 0 && z.b > 0) - Number(x.a > 0 && x.b > 0) || z[side] - x[side]);
      const wanted = own.reduce((sum, one) => sum + 2 * radius(one[side]) + 5, 0);
      const squeeze = Math.min(1, (middle - gap / 2 - edge) / (wanted || 1));
      let at = gap / 2;
      for (const one of own) {
        const size = (2 * radius(one[side]) + 5) * squeeze;
        const x = at + size / 2;
        at += size;
        place.set(one.feature, { ...place.get(one.feature), [side]: side === "a" ? middle - x : middle + x });
      }
    }
  const lit = over.value || selected;
  const kind = (one: Both) => (one.a > 0 && one.b > 0 ? 2 : one.a > 0 ? 0 : 5);
  const says = (one: Both) => `${one.feature}${one.label ? ` ${one.label}` : ""}: ${percent(one.a)} and ${percent(one.b)} of the influence`;
  return (
    <svg class="chart joined" viewBox={`0 0 ${width} ${height}`} role="group" aria-label={`Features of ${answerOf(graphs[0])} and ${answerOf(graphs[1])} by layer`} onPointerLeave={() => (over.value = "")}>
      {layers.map((layer) => (
        <g key={layer}>
          <line class="grid" x1={edge} x2={width - edge} y1={y(layer)} y2={y(layer)} />
          <text x={0} y={y(layer) + 4}>{`L${layer}`}</text>
          <text x={width} y={y(layer) + 4} text-anchor="end">{`L${layer}`}</text>
        </g>
      ))}
      {list.map((one) => {
        const at = place.get(one.feature);
        if (at?.a === undefined || at.b === undefined) return null;
        const bend = (at.b - at.a) / 2;
        const up = y(one.layer) - Math.min(row / 2 - 3, 6 + bend / 9);
        return <path key={one.feature} class={`s2 join ${lit === one.feature ? "lit" : ""}`} d={`M${at.a} ${y(one.layer)}Q${middle} ${up} ${at.b} ${y(one.layer)}`} />;
      })}
      {list.map((one) => {
        const at = place.get(one.feature) ?? {};
        return (["a", "b"] as const).map(
          (side) =>
            at[side] !== undefined && (
              <circle
                key={`${one.feature} ${side}`}
                class={`s${kind(one)} node ${lit === one.feature ? "lit" : ""}`}
                cx={at[side]}
                cy={y(one.layer)}
                r={radius(one[side])}
                tabIndex={0}
                role="button"
                aria-label={says(one)}
                onPointerEnter={() => (over.value = one.feature)}
                onFocus={() => (over.value = one.feature)}
                onBlur={() => (over.value = "")}
                onClick={() => onSelect(one.feature)}
                onKeyDown={(event) => event.key === "Enter" && onSelect(one.feature)}
              >
                <title>{says(one)}</title>
              </circle>
            ),
        );
      })}
    </svg>
  );
}
