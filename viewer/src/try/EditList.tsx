import { useSignal } from "@preact/signals";
import { api } from "../api";
import { isFeature } from "../features/studies";
import { parse } from "../graph/parse";
import { nameOf } from "../runs/RunsPage";
import { reason, say } from "../state";
import { Button, Field } from "../ui/controls";
import { count, token as shownToken } from "../ui/format";
import { useLoad } from "../ui/load";
import { Dialog, Empty, Progress } from "../ui/parts";
import { ACTIONS, addEdit, change, edits, exchange, featuresOf, flattened, knowsOwn, remove, type Action, type EditGroup } from "./edits";
import { layers, positions, prompt, steer, steering, traced, where } from "./state";
import { Working } from "./TryPage";

/** The features to edit, what happens to them and where, and the button that runs it. */
export function EditList() {
  const typed = useSignal("");
  const choosing = useSignal(false);
  const graph = traced.value?.graph ?? null;
  const asked = flattened(edits.value, layers.value);
  const add = () => {
    const names = typed.value.toUpperCase().split(/[\s,]+/).filter(Boolean);
    const wrong = names.find((name) => !isFeature(name));
    if (wrong) return say(`${wrong} is no feature: write layer and number as L3/1242.`, { error: true });
    const own = new Map(graph ? featuresOf(graph).map((member) => [member.feature, member.own]) : []);
    if (names.length) addEdit({ name: names.join(", "), features: names.map((feature) => ({ feature, own: own.get(feature) ?? null })) });
    typed.value = "";
  };
  return (
    <>
      {!edits.value.length && (
        <p class="remark">
          {graph ? "Exchange this graph's strongest features for those of another picture, " : "Trace first, or "}
          name a feature such as L3/1242, or press <b>Edit</b> at any feature of a graph or study.
        </p>
      )}
      <ul class="edits">
        {edits.value.map((group) => (
          <EditRow key={group.id} group={group} />
        ))}
      </ul>
      <form class="ask" onSubmit={(event) => (event.preventDefault(), add())}>
        <Field icon="plus">
          <input aria-label="Add features by number" placeholder="L3/1242" value={typed.value} onInput={(event) => (typed.value = event.currentTarget.value)} />
        </Field>
        <button type="submit" class="button" disabled={!typed.value.trim()}>Add</button>
      </form>
      {graph && (
        <div class="strip">
          <Button small icon="plus" onClick={() => addEdit({ name: `20 strongest of “${answer(graph)}”`, features: featuresOf(graph).slice(0, 20) })}>Strongest 20</Button>
          <Button small icon="group" onClick={() => (choosing.value = true)}>Exchange with another graph</Button>
        </div>
      )}
      <Where />
      <button type="button" class="button primary run" disabled={!asked.length || !prompt.value.trim() || steering.busy.value} onClick={() => void steer()}>
        Run{asked.length ? ` with ${count(asked.length)} feature${asked.length === 1 ? "" : "s"} edited` : ""}
      </button>
      <Working work={steering} />
      {choosing.value && <ChooseGraph onClose={() => (choosing.value = false)} />}
    </>
  );
}

const answer = (graph: { nodes: { kind: string; probability: number; label: string }[] }): string => {
  const [best] = graph.nodes.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
  return /"(.*)"/s.exec(best?.label ?? "")?.[1]?.trim() ?? "graph";
};

function EditRow({ group }: { group: EditGroup }) {
  const options = (Object.keys(ACTIONS) as Action[]).filter((action) => action !== "raise" || knowsOwn(group));
  const many = group.features.length;
  const act = (action: Action) => change(group.id, { action, value: action === "suppress" ? 0 : group.action === "suppress" ? 2 : group.value });
  return (
    <li>
      <div class="edit-name" title={group.features.map((member) => member.feature).join(", ")}>
        <b>{group.name}</b>
        {many > 1 && <span class="remark">{count(many)} features</span>}
        <Button icon="trash" kind="quiet" small aria-label={`Remove ${group.name}`} onClick={() => remove(group.id)} />
      </div>
      <div class="strip">
        <span class="field small">
          <select aria-label={`What happens to ${group.name}`} value={group.action} onChange={(event) => act(event.currentTarget.value as Action)}>
            {options.map((action) => (
              <option key={action} value={action}>{ACTIONS[action]}</option>
            ))}
          </select>
        </span>
        {group.action !== "suppress" && (
          <span class="field small value">
            <input
              type="number"
              step="any"
              aria-label={`Value for ${group.name}`}
              value={group.value}
              onInput={(event) => Number.isFinite(event.currentTarget.valueAsNumber) && change(group.id, { value: event.currentTarget.valueAsNumber })}
            />
          </span>
        )}
      </div>
    </li>
  );
}

/** At which layers and positions the edit acts. */
function Where() {
  const graph = traced.value?.graph;
  const tokens = graph?.tokens ?? [];
  const top = Math.max(...edits.value.flatMap((group) => group.features.map((member) => Number(/^L(\d+)/.exec(member.feature)?.[1] ?? 0))), 0);
  const pick = (from: number, to: number) => (layers.value = { from, to: to >= top ? 999 : to });
  const [from, to] = [Math.min(layers.value.from, top), Math.min(layers.value.to, top)];
  const numbers = Array.from({ length: top + 1 }, (_, layer) => layer);
  const hasPicture = tokens.some((token) => token.patch);
  const toggle = (position: number) => {
    const next = new Set(positions.value);
    if (!next.delete(position)) next.add(position);
    positions.value = next;
  };
  if (!edits.value.length) return null;
  return (
    <div class="where">
      <label>
        <span>at</span>
        <span class="field small">
          <select aria-label="Positions of the edit" value={where.value} onChange={(event) => (where.value = event.currentTarget.value as typeof where.value)}>
            <option value="all">every position, generated words too</option>
            {tokens.length > 0 && <option value="last">the last position of the prompt</option>}
            {hasPicture && <option value="pictures">the picture</option>}
            {tokens.length > 0 && <option value="chosen">chosen words…</option>}
          </select>
        </span>
      </label>
      {where.value === "chosen" && (
        <div class="tokens" role="group" aria-label="Positions">
          {tokens.map((token, position) => (
            <button type="button" key={position} aria-pressed={positions.value.has(position)} title={`position ${position}${token.patch ? ", part of the picture" : ""}`} onClick={() => toggle(position)}>
              {token.patch ? "▦" : shownToken(token.text)}
            </button>
          ))}
        </div>
      )}
      {top > 0 && (
        <label>
          <span>layers</span>
          <span class="field small">
            <select aria-label="First layer" value={from} onChange={(event) => pick(Number(event.currentTarget.value), Math.max(to, Number(event.currentTarget.value)))}>
              {numbers.map((layer) => <option key={layer} value={layer}>{layer}</option>)}
            </select>
          </span>
          <span>to</span>
          <span class="field small">
            <select aria-label="Last layer" value={to} onChange={(event) => pick(Math.min(from, Number(event.currentTarget.value)), Number(event.currentTarget.value))}>
              {numbers.map((layer) => <option key={layer} value={layer}>{layer}</option>)}
            </select>
          </span>
        </label>
      )}
    </div>
  );
}

/** Which graph's features take the place of this one's. */
function ChooseGraph({ onClose }: { onClose: () => void }) {
  const { data, error } = useLoad(() => api.runs(), []);
  const most = useSignal(20);
  const strength = useSignal(3);
  const mine = traced.value;
  const runs = (data?.runs ?? []).filter((run) => run.has.graph && run.id !== mine?.run).slice(0, 200);
  const choose = async (id: string) => {
    if (!mine) return;
    try {
      const other = parse(await api.graph(id));
      if (other.model !== mine.graph.model) throw new Error(`That graph is of ${other.model || "another model"}, this one of ${mine.graph.model}.`);
      const names: [string, string] = [answer(mine.graph), answer(other)];
      exchange(mine.graph, other, names[0] === names[1] ? [`${names[0]} here`, `${names[1]} there`] : names, most.value, strength.value);
      onClose();
    } catch (problem) {
      say(reason(problem), { error: true });
    }
  };
  return (
    <Dialog title="Exchange with another graph" onClose={onClose}>
      <p class="remark">
        Suppresses the strongest features of this graph, and sets the strongest of the other one to a multiple of their activation there. What both have is left alone.
      </p>
      <div class="strip spaced">
        <label class="strip">strongest <span class="field small value"><input type="number" min={1} max={200} aria-label="How many features" value={most.value} onInput={(event) => (most.value = Math.max(1, event.currentTarget.valueAsNumber || 20))} /></span> of each</label>
        <label class="strip">the other's at <span class="field small value"><input type="number" step="any" aria-label="Strength" value={strength.value} onInput={(event) => (strength.value = event.currentTarget.valueAsNumber || 1)} /></span> × their activation</label>
      </div>
      {error ? <p>{error}</p> : !data ? <Progress fraction={null} text="loading the runs" /> : !runs.length ? (
        <Empty icon="graph" title="No other graph yet"><p>Trace another picture first, then come back to this one.</p></Empty>
      ) : (
        <ul class="choose">
          {runs.map((run) => (
            <li key={run.id}>
              <button type="button" onClick={() => void choose(run.id)}>
                <b>{nameOf(run)}</b>
                <span class="mono remark">{run.id}</span>
              </button>
            </li>
          ))}
        </ul>
      )}
    </Dialog>
  );
}
