/**
 * Where nodes lie, in pixels of the picture as it first appears: x is the position in the prompt, y the layer.
 *
 * Words are columns, as wide as their fullest layer needs. The soft tokens of a picture are one block, as wide as the
 * picture, in which a node lies at its patch: in the row of inputs the picture itself lies under them.
 */
import type { GraphModel } from "./model";
import type { Box } from "./parse";

export interface Column {
  /** The position, or -1 for what has none (biases). */
  position: number;
  x: number;
  width: number;
  words: string;
}
export interface Block {
  image: number;
  x: number;
  width: number;
  /** Positions of its soft tokens, with their boxes. */
  patches: { position: number; box: Box }[];
}
export interface Layout {
  width: number;
  height: number;
  columns: Column[];
  blocks: Block[];
  /** Top and height of each row, from the bottom row up. */
  bands: { top: number; height: number }[];
  x: Float64Array;
  y: Float64Array;
  /** Radius that lets neighbours stand apart. */
  radius: Float64Array;
  /** How much larger everything is than in a small window, 1 to 1.6. */
  unit: number;
}

export const MARGIN = { left: 64, right: 20, top: 14, bottom: 76 };
const GAP = 15; // between the centres of nodes, where there is room, times the unit

export function layout(model: GraphModel, width: number, height: number): Layout {
  const { tokens } = model.file;
  const unit = Math.max(1, Math.min(1.6, width / 950, height / 560));
  const inner = width - MARGIN.left - MARGIN.right;
  const blocks = blocksOf(model);
  const inBlock = new Map(blocks.flatMap((block, number) => block.patches.map(({ position }) => [position, number] as const)));

  // Heights: the row of inputs has room for the picture, the others share the rest.
  const usable = height - MARGIN.top - MARGIN.bottom;
  const tall = blocks.length ? Math.max(70, Math.min(usable * 0.27, (inner * 0.42) / blocks.length, 260 * unit)) : 0;
  const weights = model.rows.map((row) => (row.kind === "output" ? 1.25 : 1));
  const free = usable - tall;
  const sum = model.rows.reduce((all, row, i) => all + (row.kind === "embedding" && tall ? 0 : weights[i]!), 0) || 1;
  const bands: Layout["bands"] = [];
  let bottom = height - MARGIN.bottom;
  model.rows.forEach((row, i) => {
    const size = row.kind === "embedding" && tall ? tall : (free * weights[i]!) / sum;
    bands.push({ top: bottom - size, height: size });
    bottom -= size;
  });

  // Cells: the nodes of one row in one column, strongest first.
  const cells = new Map<string, number[]>();
  const order = Array.from({ length: model.n }, (_, number) => number).sort((a, b) => model.influence[b]! - model.influence[a]!);
  const demand = new Map<number, number>();
  for (const number of order) {
    const { kind, position } = model.node(number);
    const column = kind === "bias" || kind === "rest" ? -1 : position;
    const key = `${model.rowOf[number]!} ${column} ${model.patchOf(number)?.box.join() ?? ""}`;
    const cell = cells.get(key) ?? [];
    cell.push(number);
    cells.set(key, cell);
    demand.set(column, Math.max(demand.get(column) ?? 0, cell.length));
  }

  // Widths: blocks first, then what each column needs, then the rest in proportion.
  const columns: Column[] = [];
  if (demand.has(-1)) columns.push({ position: -1, x: 0, width: 0, words: "biases" });
  tokens.forEach((token, position) => {
    if (!inBlock.has(position)) columns.push({ position, x: 0, width: 0, words: token.text });
  });
  const need = columns.map(({ position }) => Math.min(demand.get(position) ?? 0, 24));
  for (const block of blocks) block.width = Math.min(tall * aspect(block), (inner * 0.5) / blocks.length);
  const left = inner - blocks.reduce((all, block) => all + block.width + 24, 0);
  // Room for the nodes and, but for special tokens, for the word.
  const wanted = columns.map(({ words, position }, i) => {
    const word = position < 0 || /^<.*>$/.test(words) ? 0 : Math.min(words.length, 12);
    return Math.max((28 + Math.max(0, need[i]! - 1) * GAP) * unit, 7.5 * word + 10);
  });
  const all = wanted.reduce((total, one) => total + one, 0) || 1;
  const spare = Math.max(0, left - all);
  columns.forEach((column, i) => (column.width = all > left ? (wanted[i]! * left) / all : wanted[i]! + (spare * (1 + need[i]!)) / need.reduce((t, c) => t + c + 1, 0)));
  let x = MARGIN.left;
  const first = new Map(blocks.map((block) => [block.patches[0]!.position, block]));
  const at = new Map(columns.map((column) => [column.position, column]));
  for (let position = -1; position < tokens.length; position++) {
    const block = first.get(position);
    const column = at.get(position);
    if (block) {
      block.x = x + 12;
      x += block.width + 24;
    } else if (column) {
      column.x = x;
      x += column.width;
    }
  }

  const result: Layout = { width, height, columns, blocks, bands, x: new Float64Array(model.n), y: new Float64Array(model.n), radius: new Float64Array(model.n), unit };
  for (const [key, cell] of cells) {
    const [row, position] = key.split(" ").map(Number) as [number, number];
    const band = bands[row]!;
    const block = inBlock.get(position);
    const input = model.rows[row]!.kind === "embedding";
    // Words stand at the foot of the row of inputs, next to their names.
    const foot = input && tall ? { top: band.top + band.height - 44, height: 44 } : band;
    if (block === undefined) inColumn(result, cell, at.get(position)!, foot);
    else inPicture(result, cell, blocks[block]!, model.patchOf(cell[0]!)!.box, band, input);
  }
  return result;
}

/** Rows of nodes, centred in the cell. */
function inColumn(layout: Layout, cell: number[], column: Column, band: { top: number; height: number }): void {
  const room = { width: Math.max(column.width - 4, 4), height: Math.max(band.height * 0.8, 3) };
  let gap = GAP * layout.unit;
  const fits = (size: number): boolean => Math.max(1, Math.floor(room.width / size)) * Math.max(1, Math.floor(room.height / size)) >= cell.length;
  while (gap > 1.5 && !fits(gap)) gap *= 0.93;
  const across = Math.max(1, Math.floor(room.width / gap));
  const rows = Math.ceil(cell.length / across);
  cell.forEach((number, i) => {
    const row = Math.floor(i / across);
    const inRow = row < rows - 1 ? across : cell.length - row * across;
    layout.x[number] = column.x + column.width / 2 + ((i % across) - (inRow - 1) / 2) * gap;
    layout.y[number] = band.top + band.height / 2 + (row - (rows - 1) / 2) * gap;
    layout.radius[number] = Math.min(gap * 0.46, band.height * 0.42);
  });
}

/** Around the centre of the patch; above the inputs the patch grid is pressed into the height of the layer. */
function inPicture(layout: Layout, cell: number[], block: Block, [l, t, r, b]: Box, band: { top: number; height: number }, whole: boolean): void {
  const inset = whole ? 1 : 0.8;
  const [x, y] = [block.x + ((l + r) / 2) * block.width, band.top + band.height * (0.5 + inset * ((t + b) / 2 - 0.5))];
  const patch = Math.min((r - l) * block.width, (b - t) * band.height * inset);
  cell.forEach((number, i) => {
    const turn = i * 2.4; // the golden angle: each next one falls into a gap
    const out = Math.min(4.5 * layout.unit, 0.45 * patch) * Math.sqrt(i);
    layout.x[number] = x + out * Math.cos(turn);
    layout.y[number] = y + out * Math.sin(turn);
    layout.radius[number] = Math.max(2, Math.min(7 * layout.unit, 0.36 * Math.max(patch, 7)));
  });
}

function blocksOf(model: GraphModel): Block[] {
  const blocks: Block[] = [];
  model.file.tokens.forEach(({ patch }, position) => {
    if (patch === null) return;
    const last = blocks.at(-1);
    const joins = last !== undefined && last.image === patch.image && position - last.patches.at(-1)!.position <= 2;
    if (joins) last.patches.push({ position, box: patch.box });
    else blocks.push({ image: patch.image, x: 0, width: 0, patches: [{ position, box: patch.box }] });
  });
  return blocks;
}

/** Width over height of the picture, if its patches are square. */
function aspect(block: Block): number {
  const across = new Set(block.patches.map(({ box }) => box[0].toFixed(4))).size;
  const down = new Set(block.patches.map(({ box }) => box[1].toFixed(4))).size;
  return Math.max(0.4, Math.min(2.5, across / down));
}
