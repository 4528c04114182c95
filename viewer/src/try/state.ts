/** What the page `try it` holds: it stays when the user looks at another page and comes back. */
import { signal } from "@preact/signals";
import { api, type SteerResult } from "../api";
import { parse, type GraphFile } from "../graph/parse";
import { reason, say } from "../state";
import { edits, flattened } from "./edits";
import { Work } from "./jobs";

export interface Chosen {
  picture: string; // for the server
  url: string;
  name: string;
}
export const picture = signal<Chosen | null>(null);
export const prompt = signal("");
export const tracing = new Work();
export const steering = new Work();
/** The traced run and its graph, and on what they were traced. */
export const traced = signal<{ run: string; graph: GraphFile; picture: Chosen | null; prompt: string; command: string } | null>(null);
export const effect = signal<{ result: SteerResult; command: string; run: string | null } | null>(null);
export const view = signal<"graph" | "effect">("graph");

export const where = signal<"all" | "last" | "pictures" | "chosen">("all");
export const positions = signal<ReadonlySet<number>>(new Set());
export const layers = signal({ from: 0, to: 999 });

export async function take(file: File): Promise<void> {
  const url = URL.createObjectURL(file);
  try {
    const stored = await api.upload(file);
    picture.value = { picture: stored.picture, url, name: file.name };
  } catch (error) {
    URL.revokeObjectURL(url);
    say(reason(error), { error: true });
  }
}

export async function trace(): Promise<void> {
  const [on, asked] = [picture.value, prompt.value.trim()];
  const job = await tracing.start({ task: "trace", picture: on?.picture ?? null, prompt: asked });
  if (job?.status !== "done" || !job.run) return;
  try {
    traced.value = { run: job.run, graph: parse(await api.graph(job.run)), picture: on, prompt: asked, command: job.command };
    view.value = "graph";
    [where.value, positions.value] = ["all", new Set()];
  } catch (error) {
    say(reason(error), { error: true });
  }
}

/** Positions of the prompt that the user means; null: everywhere, words that are generated included. */
function places(): number[] | null {
  const tokens = traced.value?.graph.tokens ?? [];
  if (where.value === "last" && tokens.length) return [tokens.length - 1];
  if (where.value === "pictures") return tokens.flatMap((token, position) => (token.patch ? [position] : []));
  if (where.value === "chosen") return [...positions.value].sort((a, b) => a - b);
  return null;
}

export async function steer(): Promise<void> {
  const asked = flattened(edits.value, layers.value);
  const at = places();
  if (!asked.length) return say("No feature is left to edit: add one, or take more layers.", { error: true });
  if (at?.length === 0) return say("Choose at least one word or picture to edit at.", { error: true });
  const job = await steering.start({ task: "steer", picture: picture.value?.picture ?? null, prompt: prompt.value.trim(), edits: asked, positions: at });
  if (job?.status !== "done") return;
  effect.value = { result: job.result as SteerResult, command: job.command, run: job.run };
  view.value = "effect";
}
