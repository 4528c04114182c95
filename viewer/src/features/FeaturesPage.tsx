import "./features.css";
import { useEffect, useState } from "preact/hooks";
import { api, type FeatureQuery, type FeatureRow, type FindResult, type Study } from "../api";
import { href, reason, replaceAddress, say, type Route } from "../state";
import { Work } from "../try/jobs";
import { Stack } from "../ui/charts";
import { Command } from "../ui/command";
import { Button, Field, Slider } from "../ui/controls";
import { PictureInput, usePictureDrop } from "../ui/drop";
import { count, number, percent, token } from "../ui/format";
import { HeatPicture, HeatText } from "../ui/heat";
import { Icon } from "../ui/icons";
import { useEscape, useLoad, useSettled } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { FeaturePanel } from "./FeaturePanel";
import { allStudies } from "./studies";

const work = new Work();
const STEP = 60; // cards that are added at a time
const DENSITIES: Record<string, { words: string; min: string; max: string }> = {
  "": { words: "any density", min: "", max: "" },
  rare: { words: "under 1 % of inputs", min: "0.0000001", max: "0.01" },
  some: { words: "1 to 10 % of inputs", min: "0.01", max: "0.1" },
  often: { words: "over 10 % of inputs", min: "0.1", max: "" },
  dead: { words: "never", min: "", max: "0" },
};
const SORTS = { score: "surest label", max: "strongest activation", fires: "fires most often", rare: "fires least often", feature: "layer and number" };

/** All features of a study: filtered, found by words or by a picture. */
export default function FeaturesPage({ route }: { route: Route }) {
  const studies = useLoad(allStudies, []);
  if (studies.error) return <Empty icon="warn" title="No studies">{studies.error}</Empty>;
  if (!studies.data) return <Progress fraction={null} text="loading the studies" />;
  const study = studies.data.find((one) => one.id === route.rest) ?? studies.data[0];
  if (!study)
    return (
      <Empty icon="image" title="No study yet">
        <p>A study sends a data set through the model once and keeps, for every feature, what it fires on. It takes some minutes.</p>
        <Command text="python run.py task=study" />
      </Empty>
    );
  return <Browser key={study.id} study={study} studies={studies.data} query={route.query} />;
}

function Browser({ study, studies, query }: { study: Study; studies: Study[]; query: URLSearchParams }) {
  const get = (name: string) => query.get(name) ?? "";
  const filters = { words: get("words"), layer: get("layer"), modality: get("modality"), density: get("density"), label: get("label"), score: get("score"), sort: get("sort") || "score" };
  const open = get("open");
  const change = (to: Partial<typeof filters> & { open?: string }) => {
    const next = { ...filters, open, ...to };
    if (next.sort === "score") next.sort = "";
    replaceAddress("features", study.id, next);
  };

  const [asked, setAsked] = useState<{ url: string; name: string } | null>(null);
  const [found, setFound] = useState<FeatureRow[] | null>(null);
  /** What fires on a picture, or on inputs that have to do with words: the model's work, so a job. */
  const find = async (what: { picture: string } | { query: string }, shown: { url: string; name: string }) => {
    setAsked(shown);
    setFound(null);
    const job = await work.start({ task: "find", study: study.id, ...what });
    if (job?.status !== "done") return setAsked(null);
    const rows = (job.result as FindResult).rows;
    const described = await api.features(study.id, { only: rows.map((row) => row.feature).join(",") });
    setFound(described.rows.map((row, n) => ({ ...row, why: rows[n]?.why })));
  };
  const findPicture = async (file: File) => {
    const shown = URL.createObjectURL(file);
    setAsked({ url: shown, name: file.name });
    try {
      const { picture } = await api.upload(file);
      await find({ picture }, { url: shown, name: file.name });
    } catch (error) {
      say(reason(error), { error: true });
      setAsked(null);
    }
  };
  const dragging = usePictureDrop(findPicture);
  useEscape(() => open && change({ open: "" }));

  const settled = useSettled(JSON.stringify(filters));
  const density = DENSITIES[filters.density] ?? DENSITIES[""]!;
  const asking: FeatureQuery = { ...filters, density_min: density.min, density_max: density.max, score_min: filters.score };
  const [limit, setLimit] = useState(STEP);
  useEffect(() => setLimit(STEP), [settled]);
  const { data, error, busy } = useLoad((signal) => {
    const { density: _, score: __, ...rest } = asking as FeatureQuery & { density?: string; score?: string };
    return api.features(study.id, { ...rest, offset: 0, limit }, signal);
  }, [study.id, settled, limit]);
  const rows = asked ? (found ?? []) : (data?.rows ?? []);

  return (
    <div class={open ? "browser open" : "browser"}>
      <div class="filters">
        <Field icon="search" class="find-field">
          <input
            type="search"
            placeholder="mars, red, L3/1242"
            aria-label="Find features by words"
            value={filters.words}
            onInput={(event) => (setAsked(null), change({ words: event.currentTarget.value }))}
          />
        </Field>
        <PictureInput take={findPicture}>By a picture</PictureInput>
        <Choice name="Layer" value={filters.layer} options={[["", "all layers"], ...study.layers.map(({ layer, name }) => [String(layer), layer < 0 ? `tower layer ${name.slice(1)}` : `layer ${layer}`] as [string, string])]} onChange={(layer) => change({ layer })} />
        <Choice name="Where it fires" value={filters.modality} options={[["", "fires anywhere"], ["image", "on pictures"], ["text", "on the prompt"], ["answer", "on answers"]]} onChange={(modality) => change({ modality })} />
        <Choice name="How often it fires" value={filters.density} options={Object.entries(DENSITIES).map(([key, { words }]) => [key, words])} onChange={(density) => change({ density })} />
        <Choice name="Label" value={filters.label} options={[["", "labelled or not"], ["yes", "with a label"], ["no", "without"]]} onChange={(label) => change({ label })} />
        <Slider label="Label score" min={0.5} max={1} step={0.01} value={Number(filters.score) || 0.5} shown={filters.score ? `≥ ${filters.score}` : "any"} onInput={(value) => change({ score: value <= 0.5 ? "" : value.toFixed(2) })} />
        <Choice name="Order" value={filters.sort} options={Object.entries(SORTS)} onChange={(sort) => change({ sort })} />
        {studies.length > 1 && <Choice name="Study" value={study.id} options={studies.map((one) => [one.id, one.name])} onChange={(id) => replaceAddress("features", id)} />}
      </div>
      <div class="results" aria-busy={busy || work.busy.value}>
        <div class="result-line" role="status">
          {asked ? (
            <>
              {asked.url && <img class="asked-picture" src={asked.url} alt={asked.name} />}
              <span>
                {!found ? (work.job.value?.progress.text ?? "Which features fire on it?") : asked.url ? (
                  <><b>{count(found.length)} features</b> are active on your picture and rarely so strong elsewhere</>
                ) : (
                  <><b>{count(found.length)} features</b> whose strongest inputs have to do with “{asked.name}”</>
                )}
              </span>
              {work.busy.value && <Button small icon="stop" onClick={() => work.cancel()}>Cancel</Button>}
              <Button small icon="close" onClick={() => (work.busy.value && work.cancel(), setAsked(null))}>Back to all</Button>
            </>
          ) : (
            data && <span><b>{count(data.total)}</b> of {count(study.layers.reduce((sum, { features }) => sum + features, 0))} features of {study.model}, on {count(study.items)} inputs</span>
          )}
        </div>
        {asked && work.busy.value && <Progress fraction={work.job.value?.progress.fraction ?? null} text="looking for features" />}
        {!asked && !data && busy && <Progress fraction={null} text="loading the features" />}
        {error && <Empty icon="warn" title="The study could not be read"><p>{error}</p></Empty>}
        {!asked && data && !rows.length && (
          <Empty icon="search" title="No label or promoted word fits">
            <p>Other words, or fewer filters{filters.words ? ", or search in what the features fire on:" : "."}</p>
            {filters.words && <Button kind="primary" onClick={() => void find({ query: filters.words }, { url: "", name: filters.words }).catch((problem) => say(reason(problem), { error: true }))}>Search the examples for “{filters.words}”</Button>}
          </Empty>
        )}
        {rows.length > 0 && (
          <div class="cards">
            {rows.map((row) => (
              <FeatureCard key={row.feature} row={row} open={row.feature === open} onOpen={() => change({ open: row.feature === open ? "" : row.feature })} />
            ))}
          </div>
        )}
        {!asked && data && rows.length < data.total && (
          <p class="more">
            <Button disabled={busy} onClick={() => setLimit(limit + STEP)}>Show more</Button>
          </p>
        )}
      </div>
      {open && (
        <aside class="drawer" aria-label={`Feature ${open}`}>
          <Button class="close" icon="close" kind="quiet" small aria-label="Close the feature" onClick={() => change({ open: "" })} />
          <FeaturePanel study={study.id} model={study.model} feature={open} />
        </aside>
      )}
      {dragging && <div class="dropping">Drop the picture: which features fire on it?</div>}
    </div>
  );
}

export function Choice({ name, value, options, onChange }: { name: string; value: string; options: readonly (readonly [string, string])[]; onChange: (value: string) => void }) {
  return (
    <span class="field">
      <select aria-label={name} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
        {options.map(([key, words]) => (
          <option key={key} value={key}>{words}</option>
        ))}
      </select>
    </span>
  );
}

function FeatureCard({ row, open, onOpen }: { row: FeatureRow; open: boolean; onOpen: () => void }) {
  const tokens = row.top_tokens.slice(0, 3).map(token).join(", ");
  return (
    <button type="button" class="feature-card" aria-pressed={open} aria-label={`Feature ${row.feature}: ${row.label || "no label"}`} onClick={onOpen}>
      {row.thumbnail ? (
        <HeatPicture picture={row.thumbnail} alt="" />
      ) : (
        <span class="no-picture">{row.excerpt.length ? <HeatText tokens={row.excerpt} /> : row.fires ? "no example" : "never fires"}</span>
      )}
      <span class="words">
        <span class={row.label ? "title" : "title none"}>{row.label || "no label"}</span>
        {row.why ? <span class="why" title={row.why}>{row.why}</span> : tokens && <span class="why" title="pushes the answer towards these">→ {tokens}</span>}
        <Stack shares={{ image: row.share_image, text: row.share_text, answer: row.share_answer }} />
        <span class="card-facts">
          <span class="mono">{row.feature}</span>
          <span title="share of inputs on which it fires">fires {percent(row.fires)}</span>
          <span title="strongest activation">max {number(row.max, 2)}</span>
          {row.score !== null && <span title="score of the label (AUROC; chance is 0.5)"><Icon name="check" size={12} /> {row.score.toFixed(2)}</span>}
        </span>
      </span>
    </button>
  );
}

export const studyHref = (study: string, feature = ""): string => href("features", study, feature ? { open: feature } : {});
