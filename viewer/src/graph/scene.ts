/**
 * The drawing: sigma draws nodes and the strongest edges in WebGL and owns the camera; three canvases of our own lie
 * between its layers: "back" (layers, pictures, words of the prompt), "lit" (edges of the chosen and the hovered node),
 * and "words" (names of nodes that have room).
 */
import { MultiDirectedGraph } from "graphology";
import Sigma from "sigma";
import type { EdgeDisplayData } from "sigma/types";
import { layout, MARGIN, type Layout } from "./layout";
import { tokenText, type Edge } from "./model";
import { LineProgram, SHAPES, type ShapedData, ShapeProgram } from "./shapes";
import type { GraphStore } from "./store";

export const MOST_EDGES = 5000; // of those drawn for all nodes at once
const LIT = 120; // edges drawn for one node, in each direction
const NAMED = 18; // names of nodes at once, besides those that were asked for
const CROWD = 3000; // visible nodes up to which names keep clear of all of them

/** From pixels of the layout to pixels of the box. */
interface Affine {
  scale: number;
  x: (value: number) => number;
  y: (value: number) => number;
}

interface Colours {
  ink: string;
  soft: string;
  faint: string;
  surface: string;
  sunken: string;
  line: string;
  lineStrong: string;
  accent: string;
  positive: string;
  negative: string;
  pin: string;
  node: string;
}

export class Scene {
  private readonly graph = new MultiDirectedGraph();
  private readonly sigma: Sigma;
  private readonly back: CanvasRenderingContext2D;
  private readonly lit: CanvasRenderingContext2D;
  private readonly words: CanvasRenderingContext2D;
  private readonly rank = new Map<string, number>();
  private readonly pictures: (HTMLImageElement | null)[];
  private readonly watch: ResizeObserver;
  private settling: ReturnType<typeof setTimeout> | undefined;
  private colours!: Colours;
  private map!: Layout;
  private near = new Map<number, number>(); // neighbours of the chosen node; their weight, as a share of the strongest

  constructor(private readonly box: HTMLElement, private readonly store: GraphStore) {
    const { model } = store;
    this.colours = this.readColours();
    this.outputs = model.file.nodes.flatMap((node, number) => (node.kind === "logit" ? [number] : []));
    this.map = layout(model, box.clientWidth, box.clientHeight);
    for (let node = 0; node < model.n; node++) this.graph.addNode(String(node), { x: this.map.x[node], y: -this.map.y[node]!, size: this.size(node), type: "shape" });
    model.strongest.slice(0, MOST_EDGES).forEach((edge, rank) => {
      this.rank.set(String(edge), rank);
      this.graph.addEdgeWithKey(String(edge), String(model.file.source[edge]!), String(model.file.target[edge]!), {});
    });
    this.sigma = new Sigma(this.graph, box, {
      nodeProgramClasses: { shape: ShapeProgram },
      defaultNodeType: "shape",
      edgeProgramClasses: { line: LineProgram },
      defaultEdgeType: "line",
      renderLabels: false,
      defaultDrawNodeHover: () => undefined,
      nodeReducer: (key) => this.look(Number(key)),
      edgeReducer: (key) => this.edgeLook(Number(key)),
      stagePadding: 0,
      zIndex: true,
      minCameraRatio: 0.03,
      maxCameraRatio: 1.25,
      doubleClickZoomingDuration: 0,
      doubleClickZoomingRatio: 1,
      allowInvalidContainer: true,
    });
    this.back = this.layer("back", { beforeLayer: "edges" });
    this.lit = this.layer("lit", { afterLayer: "edges" });
    this.words = this.layer("words", { afterLayer: "nodes" });
    this.frame();
    this.sigma.on("afterRender", () => this.draw());
    this.sigma.on("enterNode", ({ node }) => (this.store.hovered.value = Number(node)));
    this.sigma.on("leaveNode", () => (this.store.hovered.value = null));
    let clicked = "";
    const click = (node: string, { shiftKey, ctrlKey, metaKey }: MouseEvent | TouchEvent): void => {
      clicked = node;
      if (shiftKey || ctrlKey || metaKey) store.mark(Number(node));
      else store.select(Number(node));
    };
    this.sigma.on("clickNode", ({ node, event }) => click(node, event.original));
    this.sigma.on("clickStage", () => {
      store.select(null);
      store.marked.value = new Set();
    });
    this.sigma.on("doubleClickNode", ({ node, event, preventSigmaDefault }) => {
      preventSigmaDefault();
      // Quick clicks on two nodes are two clicks; so are two on one node while marking.
      if (node === clicked && !event.original.shiftKey) store.togglePin([Number(node)]);
      else click(node, event.original);
    });
    this.sigma.getCamera().on("updated", () => {
      store.hovered.value = null;
      ShapeProgram.still = false;
      clearTimeout(this.settling);
      this.settling = setTimeout(() => {
        ShapeProgram.still = true;
        this.sigma.scheduleRender();
      }, 150);
    });
    this.sigma.on("doubleClickStage", ({ preventSigmaDefault }) => {
      preventSigmaDefault();
      this.fit();
    });
    this.pictures = model.file.pictures.map((url) => {
      if (url === null) return null;
      const image = new Image();
      image.onload = () => this.sigma.scheduleRender();
      image.src = url;
      return image;
    });
    Object.assign(box, { scene: this }); // for tests and measurements, which cannot see what WebGL drew
    this.watch = new ResizeObserver(() => this.resized());
    this.watch.observe(box);
  }

  close(): void {
    clearTimeout(this.settling);
    ShapeProgram.still = true;
    this.watch.disconnect();
    this.sigma.kill();
  }

  /** Draw again after nodes, edges or colours changed. */
  update(): void {
    const { selected } = this.store;
    const { model } = this.store;
    this.near = new Map();
    if (selected.value !== null) {
      for (const edges of [model.outgoing(selected.value), model.incoming(selected.value)]) {
        const most = Math.abs(edges[0]?.weight ?? 1) || 1;
        for (const edge of edges) this.near.set(edge.node, edge.weight / most);
      }
    }
    this.colours = this.readColours();
    this.sigma.refresh({ skipIndexation: true });
  }

  /** Draw again after something was hovered. */
  overlay(): void {
    // What lies under the edges of one node steps back.
    this.sigma.getCanvases().edges!.style.opacity = this.store.hovered.value === null ? "1" : "0.3";
    this.drawLit();
    this.drawWords();
  }

  fit(): void {
    void this.sigma.getCamera().animate({ x: 0.5, y: 0.5, ratio: 1 }, { duration: 250 });
  }
  zoom(by: number): void {
    const camera = this.sigma.getCamera();
    void camera.animate({ ratio: camera.getBoundedRatio(camera.ratio / by) }, { duration: 150 });
  }
  /** Bring a node into sight, if it is not. */
  reveal(node: number): void {
    const { x, y } = this.at(node);
    const { width, height } = this.map;
    if (x > 30 && y > 30 && x < width - 30 && y < height - 30) return;
    const data = this.sigma.getNodeDisplayData(String(node));
    if (data) void this.sigma.getCamera().animate({ x: data.x, y: data.y }, { duration: 250 });
  }
  /** Where a node lies in the box, in pixels. */
  at(node: number, view = this.view()): { x: number; y: number } {
    return { x: view.x(this.map.x[node]!), y: view.y(this.map.y[node]!) };
  }
  /** The same of a node by its id. */
  whereIs(id: string): { x: number; y: number } {
    return this.at(this.store.model.index.get(id)!);
  }
  camera(): ReturnType<Sigma["getCamera"]> {
    return this.sigma.getCamera();
  }

  private layer(id: string, where: { beforeLayer: string } | { afterLayer: string }): CanvasRenderingContext2D {
    const canvas = this.sigma.createCanvas(id, where);
    canvas.style.pointerEvents = "none";
    this.sigma.resize(true);
    return canvas.getContext("2d")!;
  }

  /** Graph coordinates are the pixels of the layout. */
  private frame(): void {
    this.sigma.setCustomBBox({ x: [0, this.map.width], y: [-this.map.height, 0] });
  }

  private resized(): void {
    const { clientWidth, clientHeight } = this.box;
    if (!clientWidth || !clientHeight || (clientWidth === this.map.width && clientHeight === this.map.height)) return;
    this.map = layout(this.store.model, clientWidth, clientHeight);
    this.frame();
    this.graph.updateEachNodeAttributes((key, attributes) => {
      const node = Number(key);
      return { ...attributes, x: this.map.x[node], y: -this.map.y[node]!, size: this.size(node) };
    });
    this.sigma.refresh();
  }

  private size(node: number): number {
    const room = this.map.radius[node]!;
    const { unit } = this.map;
    if (this.store.model.node(node).kind === "logit") return Math.min(9 * unit, room * 1.3);
    const share = Math.sqrt(Math.min(1, this.store.model.influence[node]! / 0.12));
    return Math.max(Math.min(2, room), Math.min(room, (3 + 5.5 * share) * unit));
  }

  private readColours(): Colours {
    const style = getComputedStyle(this.box);
    // Canvases know no light-dark(): a property of the box resolves it.
    const probe = document.createElement("span");
    this.box.append(probe);
    const value = (name: string): string => {
      probe.style.color = style.getPropertyValue(name);
      return getComputedStyle(probe).color;
    };
    const colours: Colours = {
      ink: value("--ink"),
      soft: value("--soft"),
      faint: value("--faint"),
      surface: value("--surface"),
      sunken: value("--band"),
      line: value("--line"),
      lineStrong: value("--line-strong"),
      accent: value("--accent"),
      positive: value("--positive"),
      negative: value("--negative"),
      pin: value("--pin"),
      node: value("--node"),
    };
    probe.remove();
    return colours;
  }

  private look(node: number): Partial<ShapedData> {
    const { store, colours } = this;
    const kind = store.model.node(node).kind;
    const chosen = store.selected.value;
    const data = { x: this.map.x[node]!, y: -this.map.y[node]!, size: this.size(node), type: "shape", shape: SHAPES[kind] };
    if (!store.visible.value[node]) return { ...data, hidden: true };
    const joined = this.near.get(node);
    const pinned = store.pinnedSet.value.has(node);
    const marked = store.marked.value.has(node);
    let color = kind === "feature" ? colours.node : kind === "token" || kind === "logit" ? colours.ink : colours.faint;
    let zIndex = 1;
    if (chosen !== null) {
      if (node === chosen) [color, zIndex] = [colours.accent, 4];
      else if (joined !== undefined) [color, zIndex] = [faded(joined > 0 ? colours.positive : colours.negative, 0.3 + 0.7 * Math.sqrt(Math.abs(joined))), 2];
      else [color, zIndex] = [faded(color, 0.22), 0];
    }
    const ring = node === chosen ? colours.accent : marked ? colours.ink : pinned ? colours.pin : colours.surface;
    if (node === chosen || marked || pinned) zIndex = Math.max(zIndex, 3);
    const ringed = marked || pinned || node === chosen;
    const size = data.size * (node === chosen ? 1.3 : 1) + (marked || pinned ? 1 : 0);
    // About three pixels wide, whatever the size.
    return { ...data, color, ring, ringWidth: Math.min(0.4, (ringed ? 1.5 : 0.8) / size), zIndex, size };
  }

  private edgeLook(edge: number): Partial<EdgeDisplayData> {
    const { store, colours } = this;
    const { source, target, weight } = store.model.file;
    const shown = this.rank.get(String(edge))! < store.edgeCount.value && store.visible.value[source[edge]!] && store.visible.value[target[edge]!];
    if (!shown || store.selected.value !== null || store.head.value !== null) return { hidden: true };
    const strength = Math.sqrt(Math.min(1, store.model.edgeShare[edge]! / 0.05));
    const opacity = (0.07 + 0.4 * strength) * Math.min(1, Math.max(0.3, 25 / Math.sqrt(store.edgeCount.value)));
    return { color: premultiplied(weight[edge]! > 0 ? colours.positive : colours.negative, opacity), size: 0.6 + 1.7 * strength, hidden: false };
  }

  private draw(): void {
    this.drawBack();
    this.drawLit();
    this.drawWords();
  }

  /** A cleared canvas in CSS pixels. */
  private clean(context: CanvasRenderingContext2D): { width: number; height: number } {
    const { width, height } = this.sigma.getDimensions();
    const ratio = window.devicePixelRatio || 1;
    const { canvas } = context;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return { width, height };
  }

  /** Layout pixels to box pixels: one scale and a shift. */
  private view(): Affine {
    const origin = this.sigma.graphToViewport({ x: 0, y: 0 });
    const unit = this.sigma.graphToViewport({ x: 100, y: 0 });
    const scale = (unit.x - origin.x) / 100;
    return { scale, x: (value) => origin.x + value * scale, y: (value) => origin.y + value * scale };
  }

  private drawBack(): void {
    const { back: c, map, colours } = this;
    const { model, selected, hovered } = this.store;
    const { width } = this.clean(c);
    const { scale, x, y } = this.view();

    map.bands.forEach(({ top, height: tall }, row) => {
      if (row % 2 === 0) return;
      c.fillStyle = colours.sunken;
      c.fillRect(0, y(top), width, tall * scale);
    });
    for (const block of map.blocks) {
      const input = map.bands[model.rows.findIndex((row) => row.kind === "embedding")];
      if (!input) continue;
      const [left, top, wide, tall] = [x(block.x), y(input.top), block.width * scale, input.height * scale];
      c.strokeStyle = colours.line;
      c.lineWidth = 1;
      c.strokeRect(left, y(map.bands.at(-1)!.top), wide, top - y(map.bands.at(-1)!.top));
      const picture = this.pictures[block.image];
      if (picture?.complete && picture.naturalWidth) {
        c.imageSmoothingEnabled = picture.naturalWidth > 128;
        c.drawImage(picture, left, top, wide, tall);
        c.fillStyle = faded(colours.surface, 0.12);
        c.fillRect(left, top, wide, tall);
      } else {
        c.fillStyle = colours.sunken;
        c.fillRect(left, top, wide, tall);
      }
      const litAt = new Set([selected.value, hovered.value].flatMap((node) => (node === null ? [] : [model.node(node).position])));
      c.strokeStyle = "rgba(255, 255, 255, 0.28)";
      c.lineWidth = 0.75;
      for (const { position, box } of block.patches) {
        const patch = [left + box[0] * wide, top + box[1] * tall, (box[2] - box[0]) * wide, (box[3] - box[1]) * tall] as const;
        if (block.patches.length <= 400) c.strokeRect(...patch);
        if (!litAt.has(position)) continue;
        c.save();
        c.strokeStyle = colours.accent;
        c.lineWidth = 2.5;
        c.strokeRect(...patch);
        c.restore();
      }
    }
  }

  private used: { visible: Uint8Array; positions: Set<number> } | null = null;
  /** Positions at which something is drawn. */
  private positionsOf(visible: Uint8Array): Set<number> {
    if (this.used?.visible !== visible) {
      const { nodes } = this.store.model.file;
      this.used = { visible, positions: new Set(nodes.flatMap(({ position }, node) => (visible[node] ? [position] : []))) };
    }
    return this.used.positions;
  }

  private drawLit(): void {
    const { lit: c, store } = this;
    this.clean(c);
    const { selected, hovered, model } = store;
    const view = this.view();
    for (const node of new Set([selected.value, hovered.value])) {
      if (node === null || !store.visible.value[node]) continue;
      const edges = [...model.incoming(node).slice(0, LIT), ...model.outgoing(node).slice(0, LIT)];
      const most = edges.reduce((max, edge) => Math.max(max, Math.abs(edge.weight)), 0) || 1;
      for (const edge of edges.reverse()) this.curve(c, view, edge, Math.abs(edge.weight) / most);
    }
    const carried = store.headEdges.value.slice(0, LIT);
    for (const edge of [...carried].reverse()) this.curve(c, view, edge, Math.abs(edge.weight / carried[0]!.weight));
  }

  /** Edges leave their source upwards and reach their target from below. */
  private curve(c: CanvasRenderingContext2D, view: Affine, edge: Edge, strength: number): void {
    const { file } = this.store.model;
    const { visible } = this.store;
    const [source, target] = [file.source[edge.index]!, file.target[edge.index]!];
    if (!visible.value[source] || !visible.value[target]) return;
    const [from, to] = [this.at(source, view), this.at(target, view)];
    const bend = (from.y - to.y) * 0.45;
    c.beginPath();
    c.moveTo(from.x, from.y);
    c.bezierCurveTo(from.x, from.y - bend, to.x, to.y + bend, to.x, to.y);
    c.strokeStyle = edge.weight > 0 ? this.colours.positive : this.colours.negative;
    c.globalAlpha = 0.14 + 0.76 * strength;
    c.lineWidth = 0.7 + 2.8 * strength;
    c.setLineDash(edge.weight > 0 ? [] : [6, 4]);
    c.stroke();
    c.globalAlpha = 1;
    c.setLineDash([]);
  }

  /** Names of the rows stay at the left edge, the prompt at the bottom, over all that is drawn. */
  private drawAxes(c: CanvasRenderingContext2D, width: number, height: number): void {
    const { map, colours } = this;
    const { model, selected, hovered, visible } = this.store;
    const { scale, x, y } = this.view();
    const axis = height - MARGIN.bottom;
    c.textBaseline = "middle";
    c.textAlign = "right";
    map.bands.forEach(({ top, height: tall }, row) => {
      const middle = y(top + tall / 2);
      if (middle > axis || (tall * scale < 11 && row % 2)) return;
      const { name, kind } = model.rows[row]!;
      c.font = kind === "layer" ? "500 11px Inter, sans-serif" : "600 11px Inter, sans-serif";
      c.fillStyle = kind === "layer" ? colours.faint : colours.soft;
      c.strokeStyle = colours.surface;
      c.lineWidth = 4;
      c.lineJoin = "round";
      const words = kind === "layer" ? `L${name}` : name;
      c.strokeText(words, MARGIN.left - 18, middle);
      c.fillText(words, MARGIN.left - 18, middle);
    });
    c.fillStyle = colours.surface;
    c.fillRect(0, axis, width, MARGIN.bottom);
    c.strokeStyle = colours.line;
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(0, axis + 0.5);
    c.lineTo(width, axis + 0.5);
    c.stroke();
    const used = this.positionsOf(visible.value);
    const marked = new Set([selected.value, hovered.value].flatMap((node) => (node === null ? [] : [model.node(node).position])));
    let free = -Infinity;
    for (const column of map.columns) {
      const centre = x(column.x + column.width / 2);
      const strong = marked.has(column.position);
      if (centre < MARGIN.left - 20 || centre > width + 10 || (centre - free < 11 && !strong)) continue;
      const word = column.position < 0 ? column.words : tokenText(column.words);
      const special = /^<\|?(.+?)\|?>$/.exec(word)?.[1]; // such as <end_of_image>
      const short = cut(special ?? word, 12);
      c.font = `${strong ? 650 : 450} ${special === undefined ? 12.5 : 11}px Inter, sans-serif`;
      c.fillStyle = strong ? colours.accent : special !== undefined || column.position < 0 || !used.has(column.position) ? colours.faint : colours.ink;
      const flat = c.measureText(short).width <= column.width * scale - 6;
      c.save();
      c.translate(centre, axis + (flat ? 16 : 9));
      if (!flat) c.rotate(-Math.PI / 4);
      c.textAlign = flat ? "center" : "right";
      c.fillText(short, flat ? 0 : -2, flat ? 0 : 4);
      c.restore();
      free = centre;
    }
    c.textAlign = "center";
    map.blocks.forEach((block, i) => {
      c.font = "600 12px Inter, sans-serif";
      c.fillStyle = colours.soft;
      c.fillText(map.blocks.length > 1 ? `picture ${i + 1}` : "picture", x(block.x + block.width / 2), axis + 16);
    });
  }

  private drawWords(): void {
    const { words: c, store, colours, map } = this;
    const { model, selected, hovered, visible } = store;
    const { width, height } = this.clean(c);
    const wanted = this.named();
    const view = this.view();
    const taken: Rect[] = [];
    // Names keep clear of nodes too, where there are few enough to look at.
    const dots: Rect[] = [];
    for (let node = 0; node < model.n && dots.length < CROWD; node++) {
      if (!visible.value[node]) continue;
      const { x, y } = this.at(node, view);
      const radius = this.sigma.scaleSize(this.size(node));
      dots.push([x - radius, y - radius, x + radius, y + radius]);
    }
    const asked = new Set([selected.value, hovered.value, ...store.marked.value]);
    c.textBaseline = "middle";
    c.textAlign = "left";
    c.lineJoin = "round";
    let count = 0;
    for (const node of wanted) {
      const pinned = store.pinnedSet.value.has(node);
      if (count >= NAMED * map.unit && !asked.has(node) && !pinned) continue;
      if (!visible.value[node]) continue;
      const { x, y } = this.at(node, view);
      const strong = node === selected.value || node === hovered.value;
      const isEnd = model.node(node).kind === "logit";
      if (x < 0 || y < 0 || x > width || y > height - MARGIN.bottom) continue;
      const full = model.name(node, store.labels);
      const text = cut(full, strong ? 40 : 22);
      c.font = `${strong || isEnd ? 650 : 500} ${(isEnd ? 13 : 11.5) + 1.5 * (map.unit - 1)}px Inter, sans-serif`;
      const wide = c.measureText(text).width;
      const radius = this.sigma.scaleSize(this.size(node)) * (node === selected.value ? 1.3 : 1) + (asked.has(node) || pinned ? 4 : 2);
      const spots: [number, number][] = [[x + radius + 2, y], [x - wide / 2, y - radius - 8], [x - wide - radius - 2, y], [x - wide / 2, y + radius + 8]];
      const free = ([left, middle]: [number, number], clear: boolean): boolean => {
        const rect: Rect = [left - 2, middle - 7, left + wide + 2, middle + 7];
        const inside = rect[0] >= MARGIN.left - 12 && rect[2] <= width - 2 && rect[1] >= 0;
        return inside && !taken.some((other) => overlap(rect, other)) && !(clear && dots.some((other) => overlap(rect, other)));
      };
      const spot = spots.find((one) => free(one, true)) ?? (asked.has(node) || isEnd ? spots.find((one) => free(one, false)) : undefined);
      if (!spot) continue;
      taken.push([spot[0] - 2, spot[1] - 7, spot[0] + wide + 2, spot[1] + 7]);
      c.strokeStyle = colours.surface;
      c.lineWidth = 3.5;
      c.strokeText(text, ...spot);
      c.fillStyle = strong ? colours.accent : isEnd ? colours.ink : pinned ? colours.pin : colours.soft;
      c.fillText(text, ...spot);
      count++;
    }
    this.drawAxes(c, width, height);
  }

  /** Nodes to name, the most important first. */
  private named(): Iterable<number> {
    const { store } = this;
    const { model, selected, hovered, pinnedSet, marked } = store;
    const first = new Set<number>();
    for (const node of [hovered.value, selected.value]) if (node !== null) first.add(node);
    for (const node of this.outputs) first.add(node);
    for (const node of [...marked.value, ...pinnedSet.value]) first.add(node);
    if (selected.value !== null) {
      const near = [...model.incoming(selected.value), ...model.outgoing(selected.value)].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      for (const edge of near.slice(0, 12)) first.add(edge.node);
    } else {
      for (const node of this.byInfluence) first.add(node);
    }
    return [...first].filter((node) => first.size < 4 || model.node(node).kind !== "token" || node === hovered.value || node === selected.value);
  }

  private readonly outputs: number[];
  private influential: number[] | null = null;
  /** The features that matter most; the others get no name until they are hovered. */
  private get byInfluence(): number[] {
    const { model } = this.store;
    this.influential ??= Array.from({ length: model.n }, (_, node) => node)
      .filter((node) => model.node(node).kind === "feature")
      .sort((a, b) => model.influence[b]! - model.influence[a]!)
      .slice(0, 200);
    return this.influential;
  }
}

type Rect = [left: number, top: number, right: number, bottom: number];
const cut = (text: string, most: number): string => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const overlap = (a: Rect, b: Rect): boolean => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

function channels(color: string): [number, number, number, number] {
  const [r = 0, g = 0, b = 0, a = 1] = (color.match(/[\d.]+/g) ?? []).map(Number);
  return [r, g, b, a];
}
function faded(color: string, opacity: number): string {
  const [r, g, b] = channels(color);
  return `rgba(${r}, ${g}, ${b}, ${opacity})`;
}
/** What sigma's edge program expects of a transparent colour. */
function premultiplied(color: string, opacity: number): string {
  const [r, g, b] = channels(color).map((value) => Math.round(value * opacity));
  return `rgba(${r}, ${g}, ${b}, ${opacity})`;
}
