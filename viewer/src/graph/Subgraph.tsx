import { useSignal, useSignalEffect } from "@preact/signals";
import { render } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { api, type Score } from "../api";
import { dark, reason, say } from "../state";
import { Button } from "../ui/controls";
import { Empty, Progress } from "../ui/parts";
import { circuitYaml, save } from "./circuit";
import type { GraphStore } from "./store";
import { diagram, THUMB, type Diagram, type Item } from "./subgraph";

interface Palette {
  ink: string;
  soft: string;
  paper: string;
  box: string;
  line: string;
  accent: string;
  positive: string;
  negative: string;
}
// The file that is exported has the light one: it goes into papers.
const LIGHT: Palette = { ink: "#16191d", soft: "#566070", paper: "#ffffff", box: "#f4f6f8", line: "#c7ced6", accent: "#005f9e", positive: "#0072b2", negative: "#d55e00" };
const DARK: Palette = { ink: "#e9ecef", soft: "#a3adb9", paper: "#171b20", box: "#20262d", line: "#404a55", accent: "#7cc0f5", positive: "#56b4e9", negative: "#ff9a4d" };

/** The pinned nodes as a diagram, with its scores, grouping and export. */
export function Subgraph({ store }: { store: GraphStore }) {
  const drawn = useSignal<Diagram | null>(null);
  const failed = useSignal("");
  const score = useSignal<Score | string | null>(null);
  const renaming = useSignal<string | null>(null);
  const paper = useRef<HTMLDivElement>(null);
  const pinned = store.content.value.pinned.length;

  useSignalEffect(() => {
    void store.view.value; // another room
    const ids = store.content.value.pinned;
    let current = true;
    failed.value = "";
    const lay = async (): Promise<void> => {
      await null; // until the room has its size
      const { clientWidth = 1, clientHeight = 1 } = paper.current ?? {};
      const value = await diagram(store, clientWidth > 1.8 * clientHeight);
      if (current) drawn.value = value;
    };
    if (ids.length) lay().catch((error: unknown) => current && (failed.value = reason(error)));
    return () => (current = false);
  });
  useSignalEffect(() => {
    const ids = store.content.value.pinned;
    if (store.id === null || !ids.length) {
      score.value = ids.length ? store.model.score(store.pinnedSet.value) : null;
      return;
    }
    let current = true;
    const timer = setTimeout(() => {
      api.score(store.id!, ids).then(
        (value) => current && (score.value = value),
        (error: unknown) => current && (score.value = reason(error)),
      );
    }, 300);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  });

  if (!pinned)
    return (
      <section class="subgraph" aria-label="Subgraph">
        <Empty icon="pin" title="Nothing is pinned yet">
          <p>
            Choose a node and press <kbd>P</kbd>, or double-click it. What you pin appears here as a small diagram.
          </p>
        </Empty>
      </section>
    );
  const value = drawn.value;
  return (
    <section class="subgraph" aria-label="Subgraph">
      <header>
        <h2>Pinned subgraph</h2>
        <Scores store={store} score={score.value} />
        <div class="spacer" />
        <Button small icon="download" disabled={!value} onClick={() => value && save(`${store.model.file.name}.svg`, svgOf(store, value), "image/svg+xml")}>
          SVG
        </Button>
        <Button small icon="download" disabled={!value} onClick={() => value && void savePng(store, value)}>
          PNG
        </Button>
        <Button small icon="download" onClick={() => save(`${store.model.file.name}.yaml`, circuitYaml(store), "application/yaml")} title="For task=circuit circuit_spec=file">
          Circuit YAML
        </Button>
      </header>
      <div class="paper" ref={paper}>
        {failed.value ? (
          <Empty icon="warn" title="The diagram could not be laid out">
            <p>{failed.value}</p>
          </Empty>
        ) : value === null ? (
          <Progress fraction={null} text="laying out" />
        ) : (
          <Picture store={store} value={value} palette={dark.value ? DARK : LIGHT} onRename={(id) => (renaming.value = id)} />
        )}
      </div>
      {renaming.value !== null && <Rename store={store} id={renaming.value} onClose={() => (renaming.value = null)} />}
    </section>
  );
}

function Scores({ store, score }: { store: GraphStore; score: Score | string | null }) {
  if (score === null) return null;
  if (typeof score === "string") return <span class="chip" title={score}>no score</span>;
  // Without the run folder, all that is known are the edges that pruning left in the file.
  const pruned = store.id === null;
  const whole = pruned ? null : store.model.file.scores;
  const of = (value: number | undefined): string => (value === undefined ? "" : ` of ${value.toFixed(2)}`);
  return (
    <span class="scores" title={pruned ? "Of the pinned nodes alone, by the edges in this file" : "Of the pinned nodes alone, next to those of the whole graph"}>
      Replacement <b>{score.replacement.toFixed(2)}</b>
      {of(whole?.replacement)} · Completeness <b>{score.completeness.toFixed(2)}</b>
      {of(whole?.completeness)}
    </span>
  );
}

/** The group's name, and taking it apart. */
function Rename({ store, id, onClose }: { store: GraphStore; id: string; onClose: () => void }) {
  const input = useRef<HTMLInputElement>(null);
  useEffect(() => input.current?.select(), [id]);
  const group = store.content.value.supernodes.find((one) => one.id === id);
  if (!group) return null;
  return (
    <form
      class="naming"
      onSubmit={(event) => {
        event.preventDefault();
        store.rename(id, input.current?.value ?? "");
        onClose();
      }}
      onKeyDown={(event) => {
        event.stopPropagation();
        if (event.key === "Escape") onClose();
      }}
    >
      <label>
        <span>Name of the group</span>
        <input ref={input} defaultValue={group.name} maxLength={80} />
      </label>
      <button type="submit" class="button primary small">
        Save
      </button>
      <Button small onClick={() => (store.ungroup(id), onClose())}>
        Ungroup
      </Button>
    </form>
  );
}

/** All attributes are in the elements, none in a style sheet, so that the SVG stands alone. */
function Picture(props: { store: GraphStore; value: Diagram; palette: Palette; onRename?: (id: string) => void }) {
  const { store, value, palette, onRename } = props;
  const { width, height } = value;
  const grow = onRename ? 1.4 : 1; // on the page as large as there is room, up to this
  const chosen = store.selected.value;
  const most = Math.max(...value.links.map(({ share }) => Math.abs(share)), 0.05);
  return (
    <svg xmlns="http://www.w3.org/2000/svg" width={grow * width} height={grow * height} viewBox={`0 0 ${width} ${height}`} font-family="Inter, system-ui, sans-serif" role="img" aria-label="Diagram of the pinned nodes">
      <rect width={width} height={height} fill={palette.paper} />
      <defs>
        {(["positive", "negative"] as const).map((sign) => (
          <marker key={sign} id={`arrow-${sign}`} viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">
            <path d="M0 .5 8 4 0 7.5Z" fill={palette[sign]} />
          </marker>
        ))}
      </defs>
      {[...value.links]
        .sort((a, b) => Math.abs(a.share) - Math.abs(b.share))
        .map(({ id, share, path }) => {
          const sign = share > 0 ? "positive" : "negative";
          return (
            <path key={id} d={path} fill="none" stroke={palette[sign]} stroke-width={1 + (3 * Math.abs(share)) / most} stroke-opacity={0.4 + (0.5 * Math.abs(share)) / most} stroke-dasharray={share > 0 ? undefined : "6 4"} marker-end={`url(#arrow-${sign})`}>
              <title>{`${Math.round(100 * share)} % of all input`}</title>
            </path>
          );
        })}
      {value.links
        .filter(({ share }) => Math.abs(share) >= 0.05)
        .map(({ id, share, middle }) => (
          <text key={id} x={middle.x} y={middle.y + 4} font-size="10.5" font-weight="600" text-anchor="middle" fill={share > 0 ? palette.positive : palette.negative} stroke={palette.paper} stroke-width="3.5" paint-order="stroke">
            {`${share < 0 ? "−" : ""}${Math.round(100 * Math.abs(share))} %`}
          </text>
        ))}
      {value.items.map((item) => (
        <BoxOf key={item.id} store={store} item={item} palette={palette} chosen={chosen !== null && item.nodes.includes(chosen)} onRename={onRename} />
      ))}
    </svg>
  );
}

function BoxOf(props: { store: GraphStore; item: Item; palette: Palette; chosen: boolean; onRename?: (id: string) => void }) {
  const { store, item, palette, chosen, onRename } = props;
  const { x, y, width, height, group, title, name, subtitle, image } = item;
  const kind = store.model.node(item.nodes[0]!).kind;
  const solid = kind === "logit" && !group;
  const left = image === null ? width / 2 : (width + THUMB + 6) / 2;
  const act = (): void => (group && onRename ? onRename(group.id) : store.select(item.nodes[0]!));
  return (
    <g
      transform={`translate(${x} ${y})`}
      class="item"
      tabIndex={onRename ? 0 : undefined}
      role={onRename ? "button" : undefined}
      aria-label={name}
      onClick={onRename && (() => store.select(item.nodes[0]!))}
      onDblClick={onRename && act}
      onKeyDown={onRename && ((event) => event.key === "Enter" && act())}
      onMouseEnter={onRename && (() => (store.hovered.value = item.nodes[0]!))}
      onMouseLeave={onRename && (() => (store.hovered.value = null))}
    >
      {group && <rect x="4" y="-4" width={width} height={height} rx="9" fill={palette.box} stroke={palette.line} />}
      <rect width={width} height={height} rx="9" fill={solid ? palette.ink : palette.box} stroke={chosen ? palette.accent : palette.line} stroke-width={chosen ? 2 : 1} />
      {image !== null && <Thumb store={store} item={item} palette={palette} />}
      {title.map((line, i) => (
        <text key={line} x={left} y={20 + 15 * i} font-size="13" font-weight="600" text-anchor="middle" fill={solid ? palette.paper : palette.ink}>
          {line}
        </text>
      ))}
      <text x={left} y={height - 11} font-size="11" text-anchor="middle" fill={solid ? palette.line : palette.soft}>
        {subtitle}
      </text>
      {group && onRename && <title>{`${name}: double-click to rename the group or take it apart`}</title>}
    </g>
  );
}

/** One patch is shown large, several as parts of the whole picture. */
function Thumb({ store, item, palette }: { store: GraphStore; item: Item; palette: Palette }) {
  const { file } = store.model;
  const boxes = item.patches.flatMap((position) => file.tokens[position]?.patch?.box ?? []).length;
  const patches = item.patches.map((position) => file.tokens[position]!.patch!.box);
  const one = boxes === 4 ? patches[0]! : null;
  const view = one ? `${one[0]} ${one[1]} ${one[2] - one[0]} ${one[3] - one[1]}` : "0 0 1 1";
  return (
    <svg x="6" y={(item.height - THUMB) / 2} width={THUMB} height={THUMB} viewBox={view} preserveAspectRatio="none">
      <image href={file.pictures[item.image!]!} width="1" height="1" preserveAspectRatio="none" image-rendering="pixelated" />
      {!one && patches.map(([l, t, r, b]) => <rect key={`${l} ${t}`} x={l} y={t} width={r - l} height={b - t} fill="none" stroke={palette.accent} stroke-width="0.05" />)}
    </svg>
  );
}

function svgOf(store: GraphStore, value: Diagram): string {
  const box = document.createElement("div");
  render(<Picture store={store} value={value} palette={LIGHT} />, box);
  const svg = box.querySelector("svg")!;
  svg.querySelectorAll("image").forEach((image) => image.setAttributeNS("http://www.w3.org/1999/xlink", "xlink:href", image.getAttribute("href")!));
  const text = new XMLSerializer().serializeToString(svg);
  render(null, box);
  return text;
}

async function savePng(store: GraphStore, value: Diagram): Promise<void> {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgOf(store, value))}`;
  try {
    await image.decode();
    const scale = Math.min(3, 8000 / Math.max(value.width, value.height));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [Math.ceil(value.width * scale), Math.ceil(value.height * scale)];
    canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise<Blob | null>((done) => canvas.toBlob(done, "image/png"));
    if (blob === null) throw new Error("this browser made no PNG");
    save(`${store.model.file.name}.png`, blob);
  } catch (error) {
    say(`The picture could not be made: ${reason(error)}`, { error: true });
  }
}
