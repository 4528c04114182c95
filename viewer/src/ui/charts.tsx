/** Small charts in SVG: bars with intervals, lines, histograms, and bars inside a row of a table. */
import "./charts.css";
import { number, percent } from "./format";

export interface Bar {
  name: string;
  value: number;
  low?: number;
  high?: number;
  series: number; // colour
  detail?: string; // after the number, such as "n = 100"
}

/** Horizontal bars of shares from 0 to 1 with 95 % intervals; bars of one group stand together. */
export function Bars({ groups, label }: { groups: { name: string; bars: Bar[] }[]; label: string }) {
  const [width, left, right, bar, space] = [640, 178, 92, 18, 14];
  const scale = (share: number) => left + Math.min(Math.max(share, 0), 1) * (width - left - right);
  let y = 20;
  const placed = groups.map((group) => {
    const top = y;
    y += (group.name ? 22 : 4) + group.bars.length * (bar + 6) + space;
    return { ...group, top };
  });
  return (
    <svg class="chart" viewBox={`0 0 ${width} ${y}`} role="img" aria-label={label}>
      {[0, 0.25, 0.5, 0.75, 1].map((share) => (
        <g key={share}>
          <line class="grid" x1={scale(share)} x2={scale(share)} y1={18} y2={y - space} />
          <text x={scale(share)} y={11} text-anchor="middle">{`${100 * share} %`}</text>
        </g>
      ))}
      {placed.map((group) => (
        <g key={group.name}>
          {group.name && <text class="strong" x={0} y={group.top + 16} font-weight="600">{group.name}</text>}
          {group.bars.map((one, row) => {
            const at = group.top + (group.name ? 22 : 4) + row * (bar + 6);
            const middle = at + bar / 2;
            return (
              <g key={one.name} class={`s${one.series}`}>
                <title>{`${one.name}: ${percent(one.value)}${one.low === undefined ? "" : `, 95 % interval ${percent(one.low)} to ${percent(one.high)}`}${one.detail ? `, ${one.detail}` : ""}`}</title>
                <text x={left - 10} y={middle + 4} text-anchor="end">{one.name}</text>
                <rect class="fill" x={scale(0)} y={at} width={Math.max(scale(one.value) - scale(0), 1.5)} height={bar} rx={3} />
                {one.low !== undefined && one.high !== undefined && (
                  <path class="whisker" fill="none" d={`M${scale(one.low)} ${middle}H${scale(one.high)}M${scale(one.low)} ${middle - 4}v8M${scale(one.high)} ${middle - 4}v8`} />
                )}
                <text class="strong" x={width - right + 10} y={middle + 4}>
                  {percent(one.value)}
                  {one.detail && <tspan class="aside" dx={6} fill="var(--faint)">{one.detail}</tspan>}
                </text>
              </g>
            );
          })}
        </g>
      ))}
    </svg>
  );
}

export interface Line {
  name: string;
  points: { x: number; y: number; low?: number; high?: number }[];
  series: number;
  dashed?: boolean;
}

/** Round steps of an axis between two values. */
export function ticks(low: number, high: number, most = 5): number[] {
  const raw = (high - low || 1) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw) ?? raw;
  const out: number[] = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) out.push(Number(value.toPrecision(12)));
  return out;
}

interface LineChart {
  lines: Line[];
  x: string; // name of the axis
  y: string;
  label: string;
  share?: boolean; // y is a share, shown from 0 to 100 %
  marks?: number[]; // the values that x takes, when they are few
  height?: number;
}

/** Lines with bands of their intervals. */
export function Lines({ lines, x, y, label, share = false, marks, height = 260 }: LineChart) {
  const [width, left, right, top, bottom] = [520, 52, 14, 22, 40];
  const points = lines.flatMap((line) => line.points);
  if (!points.length) return null;
  const xs = points.map((point) => point.x);
  const highest = share ? 1 : Math.max(...points.map((point) => point.high ?? point.y));
  const lowest = Math.min(0, ...points.map((point) => point.low ?? point.y));
  const yTicks = share ? [0, 0.25, 0.5, 0.75, 1] : ticks(lowest, highest * 1.04);
  const roof = Math.max(highest, yTicks.at(-1) ?? highest) || 1;
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const px = (value: number) => (first === last ? (left + width - right) / 2 : left + ((value - first) / (last - first)) * (width - left - right));
  const py = (value: number) => height - bottom - ((value - lowest) / (roof - lowest)) * (height - top - bottom);
  const path = (of: (point: Line["points"][number]) => number, line: Line) => line.points.map((point, n) => `${n ? "L" : "M"}${px(point.x).toFixed(1)} ${py(of(point)).toFixed(1)}`).join("");
  return (
    <svg class="chart" viewBox={`0 0 ${width} ${height}`} role="img" aria-label={label}>
      <text x={0} y={10}>{y}</text>
      {yTicks.map((value) => (
        <g key={value}>
          <line class="grid" x1={left} x2={width - right} y1={py(value)} y2={py(value)} />
          <text x={left - 8} y={py(value) + 4} text-anchor="end">{share ? `${100 * value} %` : number(value)}</text>
        </g>
      ))}
      {(marks ?? ticks(first, last, 6)).map((value) => (
        <text key={value} x={px(value)} y={height - bottom + 18} text-anchor="middle">{number(value)}</text>
      ))}
      <line class="axis" x1={left} x2={width - right} y1={py(lowest)} y2={py(lowest)} />
      <text x={(left + width - right) / 2} y={height - 4} text-anchor="middle">{x}</text>
      {lines.map((line) => {
        const band = line.points.length > 1 && line.points.every((point) => point.low !== undefined);
        const back = { ...line, points: [...line.points].reverse() };
        return (
          <g key={line.name} class={`s${line.series}`}>
            {band && <path class="area" d={`${path((point) => point.high ?? point.y, line)}${path((point) => point.low ?? point.y, back).replace("M", "L")}Z`} />}
            <path class="stroke" stroke-dasharray={line.dashed ? "5 4" : undefined} d={path((point) => point.y, line)} />
            {line.points.length <= 40 &&
              line.points.map((point) => (
                <circle key={point.x} class="dot" cx={px(point.x)} cy={py(point.y)} r={3.2}>
                  <title>{`${line.name}, ${x} ${number(point.x)}: ${share ? percent(point.y) : number(point.y)}`}</title>
                </circle>
              ))}
          </g>
        );
      })}
    </svg>
  );
}

export function Legend({ items }: { items: { name: string; series: number }[] }) {
  return (
    <div class="legend">
      {items.map((item) => (
        <span key={item.name}>
          <i class={`s${item.series}`} />
          {item.name}
        </span>
      ))}
    </div>
  );
}

export const KINDS = [
  { key: "image", name: "picture", series: 0 },
  { key: "text", name: "prompt", series: 1 },
  { key: "answer", name: "answer", series: 2 },
] as const;

/** How often a feature fires how strongly, by kind of position; bins are octaves or parts of them. */
export function Histogram({ edges, counts }: { edges: number[]; counts: Record<"image" | "text" | "answer", number[]> }) {
  const [width, height, left, top, bottom] = [420, 132, 4, 8, 22];
  const bins = edges.length - 1;
  if (bins < 1) return <p class="quiet">It never fires in this study.</p>;
  const totals = edges.slice(0, -1).map((_, bin) => KINDS.reduce((sum, kind) => sum + (counts[kind.key][bin] ?? 0), 0));
  const most = Math.max(...totals, 1);
  const step = (width - left) / bins;
  const every = Math.max(1, Math.ceil(bins / 7));
  return (
    <svg class="chart" viewBox={`0 0 ${width} ${height}`} role="img" aria-label="Histogram of activations">
      {totals.map((total, bin) => {
        let at = height - bottom;
        return (
          <g key={bin}>
            <title>{`activation ${number(edges[bin])} to ${number(edges[bin + 1])}: ${total.toLocaleString("en")} positions`}</title>
            {KINDS.map((kind) => {
              const size = ((counts[kind.key][bin] ?? 0) / most) * (height - top - bottom);
              at -= size;
              return size > 0 && <rect key={kind.key} class={`s${kind.series} fill`} x={left + bin * step + 1} y={at} width={Math.max(step - 2, 1)} height={size} />;
            })}
            <rect x={left + bin * step} y={0} width={step} height={height - bottom} fill="transparent" />
          </g>
        );
      })}
      <line class="axis" x1={left} x2={width} y1={height - bottom} y2={height - bottom} />
      {edges.map((edge, n) => n % every === 0 && <text key={n} x={left + n * step} y={height - 6} text-anchor={n === 0 ? "start" : n === bins ? "end" : "middle"}>{number(edge, 2)}</text>)}
    </svg>
  );
}

/** Tiny bars in a row, one for each layer; `most` is the value of a full bar, the same in a whole table. */
export function Spark({ values, most, name }: { values: number[]; most: number; name: string }) {
  const [height, step] = [24, values.length > 16 ? 5 : 8];
  const said = values.map((value, layer) => `layer ${layer}: ${number(value)}`).join(", ");
  return (
    <svg width={values.length * step} height={height} role="img" aria-label={`${name}: ${said}`} class="s0">
      <title>{said}</title>
      {values.map((value, layer) => {
        const size = Math.max(1, Math.min(1, value / (most || 1)) * height);
        return <rect key={layer} x={layer * step} y={height - size} width={step - 2} height={size} rx={1} fill="var(--series)" />;
      })}
    </svg>
  );
}

/** A share as a bar in a track. */
export function Meter({ share, name }: { share: number; name: string }) {
  return (
    <div class="meter" role="img" aria-label={`${name}: ${percent(share)}`} title={`${name}: ${percent(share)}`}>
      <i style={{ width: `${100 * Math.min(Math.max(share, 0), 1)}%` }} />
    </div>
  );
}

/** Where a feature fires: shares of its firings by kind of position. */
export function Stack({ shares }: { shares: Record<"image" | "text" | "answer", number> }) {
  const said = KINDS.filter((kind) => shares[kind.key] > 0).map((kind) => `${kind.name} ${percent(shares[kind.key])}`).join(", ");
  return (
    <div class="stack" role="img" aria-label={said} title={`fires at: ${said || "nowhere"}`}>
      {KINDS.map((kind) => shares[kind.key] > 0 && <i key={kind.key} class={`s${kind.series}`} style={{ width: `${100 * shares[kind.key]}%` }} />)}
    </div>
  );
}
