import "./trials.css";
import { useSignal } from "@preact/signals";
import { api, type Claim, type TrialRate, type Trials } from "../api";
import { href, type Route } from "../state";
import { Bars, Legend, Lines, type Bar } from "../ui/charts";
import { Segmented } from "../ui/controls";
import { count, number, percent, words } from "../ui/format";
import { Icon } from "../ui/icons";
import { useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { Choice } from "../features/FeaturesPage";

/** The rates of an experiment with their intervals, next to controls and baselines, and what they allow to claim. */
export default function TrialsPage({ route }: { route: Route }) {
  const { data, error } = useLoad(() => api.trials(route.rest), [route.rest]);
  if (error) return <Empty icon="warn" title="No trials"><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the trials" />;
  return <Shown trials={data} />;
}

const SERIES = { "": 0, matched: 1, random_direction: 6 } as const;
const NAMES: Record<string, string> = { "": "the trial", matched: "other features, matched", random_direction: "random directions" };

function Shown({ trials }: { trials: Trials }) {
  const names = [...new Set(trials.rows.map((row) => row.trial))];
  const trial = useSignal(names[0] ?? "");
  const measures = [...new Set(trials.rows.filter((row) => row.trial === trial.value).map((row) => row.measure))];
  const asked = useSignal(measures[0] ?? "");
  const measure = measures.includes(asked.value) ? asked.value : (measures[0] ?? "");
  const rows = trials.rows.filter((row) => row.trial === trial.value && row.measure === measure);
  const settings = [...new Set(rows.map((row) => row.setting))];
  const share = rows.every((row) => row.rate >= 0 && row.rate <= 1);
  return (
    <div class="page trials">
      <p class="crumb"><a href={href("runs", "", { open: trials.id })}><Icon name="left" size={12} /> The run</a></p>
      <h1>{words(trials.title)}</h1>
      <p class="lead">{trials.hypothesis}</p>
      {trials.claims.length > 0 && <Claims claims={trials.claims} />}
      <div class="trial-bar">
        <Segmented label="Trial" value={trial.value} options={names.map((name) => [name, words(name)] as const)} onChange={(name) => (trial.value = name)} />
        {measures.length > 1 && <Choice name="Measure" value={measure} options={measures.map((name) => [name, words(name)])} onChange={(name) => (asked.value = name)} />}
        <Legend items={Object.entries(SERIES).filter(([control]) => rows.some((row) => row.control === control)).map(([control, series]) => ({ name: NAMES[control] ?? control, series }))} />
      </div>
      <div class="settings">
        {settings.map((setting) => (
          <Setting key={setting} name={setting} share={share} rows={rows.filter((row) => row.setting === setting)} />
        ))}
      </div>
    </div>
  );
}

/** Curves where the setting has several strengths, else bars by question. */
function Setting({ name, rows, share }: { name: string; rows: TrialRate[]; share: boolean }) {
  const own = rows.filter((row) => !row.baseline);
  const strengths = [...new Set(own.map((row) => row.strength))].filter((value) => value !== null);
  if (strengths.length > 1) {
    const lines = [...new Set(own.map((row) => `${row.question}|${row.control}`))].map((key, n) => {
      const [question = "", control = ""] = key.split("|");
      const points = own
        .filter((row) => row.question === question && row.control === control && row.strength !== null)
        .map((row) => ({ x: row.strength ?? 0, y: row.rate, low: row.low, high: row.high }))
        .sort((a, b) => a.x - b.x);
      return { name: [words(question), control && (NAMES[control] ?? control)].filter(Boolean).join(", "), series: n % 7, points, dashed: control !== "" };
    });
    return (
      <figure class="card">
        <figcaption>{words(name)} <span class="quiet">n = {count(Math.max(...own.map((row) => row.n)))} for each point</span></figcaption>
        <Lines lines={lines} x="strength" y="rate" label={`${words(name)} by strength`} share={share} marks={[...strengths].sort((a, b) => a - b)} />
        <Legend items={lines} />
      </figure>
    );
  }
  // A setting may take several places or modes: each is a group of bars of its own.
  const varies = (["mode", "layers", "positions"] as const).filter((key) => new Set(own.map((row) => row[key])).size > 1);
  const groups = new Map<string, Bar[]>();
  const title = (row: TrialRate) => [words(row.question), ...varies.map((key) => words(row[key]))].join(" · ");
  for (const row of own) {
    const bar: Bar = {
      name: row.control ? (row.control === "matched" ? "matched" : "random directions") : "the trial",
      value: row.rate,
      low: row.control && row.draws > 1 ? undefined : row.low,
      high: row.control && row.draws > 1 ? undefined : row.high,
      series: SERIES[row.control as keyof typeof SERIES] ?? 6,
      detail: row.control ? `${row.draws} draw${row.draws === 1 ? "" : "s"}` : `n = ${row.n}`,
    };
    groups.set(title(row), [...(groups.get(title(row)) ?? []), bar]);
  }
  const baselines = rows.filter((row) => row.baseline);
  return (
    <figure class="card">
      <figcaption>{words(name)}</figcaption>
      {share ? (
        <Bars label={words(name)} groups={[...groups].map(([group, bars]) => ({ name: group, bars }))} />
      ) : (
        <table class="plain"><tbody>{own.map((row, n) => <tr key={n}><th>{title(row)}{row.control && `, ${NAMES[row.control] ?? row.control}`}</th><td>{number(row.rate)}</td><td class="quiet">{number(row.low)} to {number(row.high)}</td></tr>)}</tbody></table>
      )}
      {baselines.length > 0 && (
        <details>
          <summary>{count(new Set(baselines.map((row) => row.baseline)).size)} baselines</summary>
          <table class="plain">
            <tbody>
              {baselines.map((row, n) => (
                <tr key={n}><th>{words(row.baseline)} <span class="quiet">{title(row)}</span></th><td>{share ? percent(row.rate) : number(row.rate)}</td><td class="quiet">{share ? `${percent(row.low)} to ${percent(row.high)}` : `${number(row.low)} to ${number(row.high)}`}</td></tr>
              ))}
            </tbody>
          </table>
        </details>
      )}
    </figure>
  );
}

/** A row for each claim, a column for each trial: shown or not, and the number that decides. */
function Claims({ claims }: { claims: Claim[] }) {
  const trials = [...new Set(claims.map((claim) => claim.trial))];
  const names = [...new Set(claims.map((claim) => claim.claim))];
  return (
    <section class="card flush claims">
      <table class="table">
        <thead><tr><th>What may be claimed</th>{trials.map((trial) => <th key={trial}>{words(trial)}</th>)}</tr></thead>
        <tbody>
          {names.map((name) => (
            <tr key={name}>
              <th>{words(name)}</th>
              {trials.map((trial) => {
                const claim = claims.find((one) => one.claim === name && one.trial === trial);
                return (
                  <td key={trial} class={claim?.shown ? "shown" : ""}>
                    {claim ? (
                      <>
                        <b><Icon name={claim.shown ? "check" : "minus"} size={13} /> {claim.shown ? "shown" : "not shown"}</b>
                        <span>{claim.shown ? range(claim) : claim.reason || range(claim)}</span>
                      </>
                    ) : <span class="quiet">–</span>}
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}

const range = ({ value, low, high, question }: Claim): string => {
  const interval = low === null || high === null ? "" : ` (${percent(low)} to ${percent(high)})`;
  return value === null ? "" : `${percent(value)}${interval}${question ? ` on ${words(question)}` : ""}`;
};
