import "./features.css";
import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, embedded, type Feature, type Neighbour } from "../api";
import { go, href } from "../state";
import { addEdit } from "../try/edits";
import { Histogram, KINDS, Legend, Stack } from "../ui/charts";
import { Button, Segmented } from "../ui/controls";
import { count, number, percent, token } from "../ui/format";
import { ExampleCard } from "../ui/heat";
import { useLoad } from "../ui/load";
import { Empty, Panel, Progress } from "../ui/parts";
import { Command } from "../ui/command";
import { studyOf } from "./studies";

/**
 * What a feature stands for: examples, histogram, logits, neighbours. `study` "" is the one of the model. `named`: what
 * stands above it names the feature already, and offers to edit it.
 */
export function FeaturePanel({ study, model, feature, named = false }: { study: string; model: string; feature: string; named?: boolean }) {
  // Neighbours open in the same panel, and a button leads back.
  const trail = useSignal<string[]>([]);
  useEffect(() => void (trail.value = []), [feature]);
  const shown = trail.value.at(-1) ?? feature;
  const { data, error, busy } = useLoad(async () => {
    const from = study || (await studyOf(model, shown));
    if (!from && embedded === null) return null;
    return api.feature(from, shown);
  }, [study, model, shown]);
  const back = trail.value.length > 0 && (
    <Button icon="left" kind="quiet" small onClick={() => (trail.value = trail.value.slice(0, -1))}>
      Back to {trail.value.at(-2) ?? feature}
    </Button>
  );
  if (error) return <Empty icon="warn" title={shown}>{back}<p>{error}</p></Empty>;
  if (data === null) return busy ? <Progress fraction={null} text="loading the feature" /> : <NoStudy feature={shown} />;
  return (
    <div class="feature-view" data-feature={data.feature}>
      {back}
      <FeatureView feature={data} named={named && shown === feature} onOpen={(other) => (trail.value = [...trail.value, other])} />
    </div>
  );
}

function NoStudy({ feature }: { feature: string }) {
  return (
    <Empty icon="image" title={feature}>
      <p>What a feature means is known from a study: one run over a data set that keeps its strongest examples.</p>
      <Command text="python run.py task=study" />
    </Empty>
  );
}

/** Groups of drawn examples go from q1, the weakest, up to q4. */
const STRENGTHS: Record<string, string> = { top: "strongest", q4: "strong", q3: "middle", q2: "weak", q1: "weakest" };
const level = (name: string): string => STRENGTHS[name] ?? name;

/** All about one feature; `wide` lays the parts out side by side. */
export function FeatureView({ feature, onOpen, wide = false, named = false }: { feature: Feature; onOpen: (feature: string) => void; wide?: boolean; named?: boolean }) {
  const group = useSignal("top");
  const groups = feature.groups.filter((one) => one.examples.length);
  const examples = (groups.find((one) => one.name === group.value) ?? groups[0])?.examples ?? [];
  const fired = feature.fired.text + feature.fired.image + feature.fired.answer;
  const shares = { image: feature.fired.image / (fired || 1), text: feature.fired.text / (fired || 1), answer: feature.fired.answer / (fired || 1) };
  return (
    <>
      <div class="feature-head">
        {!named && <h2>{feature.label?.text || feature.guess}</h2>}
        <p class="feature-line">
          <span class="chip mono">{feature.feature}</span>
          {feature.label && <ScoreChip label={feature.label} />}
          {!feature.label && <span class="chip" title="from what its strongest examples share">a guess, no label</span>}
        </p>
        <p class="soft">{feature.sentence}</p>
        {embedded === null && (
          <p class="feature-line">
            {!named && (
              <Button small icon="play" onClick={() => (addEdit({ name: feature.feature, features: [{ feature: feature.feature, own: null }] }), go("try"))}>
                Edit
              </Button>
            )}
            {!wide && <a class="button small" href={href("feature", `${feature.study}/${feature.feature}`)}>Whole page</a>}
          </p>
        )}
      </div>
      <div class={wide ? "feature-wide" : ""}>
        <Panel
          title="Examples"
          class="examples-part"
          actions={
            groups.length > 1 && (
              <Segmented label="Strength of the examples" value={group.value} options={groups.map((one) => [one.name, level(one.name)] as const)} onChange={(name) => (group.value = name)} />
            )
          }
        >
          {feature.missing && <p class="soft">{feature.missing}</p>}
          {examples.length ? (
            <div class={examples.some((example) => example.pictures.length) ? "examples" : "examples words"}>
              {examples.map((example, n) => (
                <ExampleCard key={n} example={example} />
              ))}
            </div>
          ) : (
            <p class="soft">It does not fire on anything in this study.</p>
          )}
        </Panel>
        <div>
          <Panel title={`Fires on ${percent(feature.items ? feature.items_fired / feature.items : 0)} of ${count(feature.items)} inputs`}>
            <Stack shares={shares} />
            <Legend items={KINDS.filter((kind) => shares[kind.key] > 0).map((kind) => ({ name: `${kind.name} ${percent(shares[kind.key])}`, series: kind.series }))} />
            <h3 class="small-title">Activations, at {count(fired)} positions</h3>
            <Histogram edges={feature.histogram.edges} counts={feature.histogram} />
          </Panel>
          {feature.top_logits.length > 0 && (
            <Panel title="Pushes the answer">
              <div class="logits">
                <Logits title="towards" entries={feature.top_logits} series={0} />
                <Logits title="away from" entries={feature.bottom_logits} series={5} />
              </div>
            </Panel>
          )}
          <Neighbours title="Writes alike" hint="cosine of the decoder rows" entries={feature.neighbours.decoder} onOpen={onOpen} />
          <Neighbours title="Fires together" hint="share of firings in common" entries={feature.neighbours.coactivation} onOpen={onOpen} />
        </div>
      </div>
    </>
  );
}

/** The score of a label, in words: 0.5 is chance. */
function ScoreChip({ label }: { label: NonNullable<Feature["label"]> }) {
  if (label.score === null) return <span class="chip">{label.source} label</span>;
  const range = label.low === null ? "" : `, 95 % interval ${number(label.low, 2)} to ${number(label.high, 2)}`;
  return (
    <span class="chip score" title={`Detection AUROC ${number(label.score)}${range}: how well the label alone tells inputs on which the feature fires from others. Chance is 0.5. (${label.source})`}>
      <b>{label.score.toFixed(2)}</b> of 1, chance is 0.5
    </span>
  );
}

function Logits({ title, entries, series }: { title: string; entries: [string, number][]; series: number }) {
  const most = Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-9);
  return (
    <div class={`s${series}`}>
      <h3 class="small-title">{title}</h3>
      <ul>
        {entries.slice(0, 8).map(([text, value]) => (
          <li key={text} title={number(value)}>
            <i style={{ width: `${(100 * Math.abs(value)) / most}%` }} />
            <span>{token(text)}</span>
          </li>
        ))}
      </ul>
    </div>
  );
}

function Neighbours({ title, hint, entries, onOpen }: { title: string; hint: string; entries: Neighbour[]; onOpen: (feature: string) => void }) {
  if (!entries.length) return null;
  return (
    <Panel title={<span title={hint}>{title}</span>}>
      <ul class="neighbours">
        {entries.slice(0, 8).map((entry) => (
          <li key={entry.feature}>
            <button type="button" onClick={() => onOpen(entry.feature)}>
              <span class="mono">{entry.feature}</span>
              <span class="name">{entry.label || "no label"}</span>
              <span class="value" title={hint}>{number(entry.value, 2)}</span>
            </button>
          </li>
        ))}
      </ul>
    </Panel>
  );
}
