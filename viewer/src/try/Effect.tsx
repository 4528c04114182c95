import type { ControlResult, SteerResult } from "../api";
import { href } from "../state";
import { Command } from "../ui/command";
import { count, number, percent, token } from "../ui/format";
import { effect } from "./state";

const CONTROLS: Record<ControlResult["name"], { name: string; what: string }> = {
  matched: { name: "Other features", what: "random ones, as many, of the same layers, changed as much" },
  "random direction": { name: "Random directions", what: "of the same size at each layer and position" },
};

/** What the edit does to the answer, next to edits of equal size that should do nothing. */
export function Effect() {
  if (!effect.value) return null;
  const { result, command, run } = effect.value;
  const changed = result.answer.before !== result.answer.after;
  return (
    <div class="effect" data-changed={changed}>
      <header>
        <p class="turn">
          <span>{token(result.answer.before)}</span>
          <span class="arrow" aria-label={changed ? "becomes" : "stays"}>{changed ? "→" : "="}</span>
          <strong>{token(result.answer.after)}</strong>
        </p>
        <p class="verdict">{verdict(result)}</p>
      </header>
      <section class="card">
        <h3>The next word</h3>
        <NextWords result={result} />
      </section>
      <section class="card">
        <h3>Is it these features, or would any edit of this size do?</h3>
        <table class="controls">
          <thead>
            <tr><th>edited</th><th>answer</th><th>changes the answer</th><th class="number" title="Kullback-Leibler divergence from the unedited model, nats">moves the output by</th></tr>
          </thead>
          <tbody>
            <tr class="mine">
              <th>Your {count(result.features)} feature{result.features === 1 ? "" : "s"}<span>{count(result.active)} of them active in this prompt</span></th>
              <td><b>{token(result.answer.after)}</b></td>
              <td><Share value={changed ? 1 : 0} words={changed ? "yes" : "no"} /></td>
              <td class="number">{number(result.kl)} nats</td>
            </tr>
            {result.controls.map((control) => (
              <tr key={control.name}>
                <th>{CONTROLS[control.name].name}<span>{CONTROLS[control.name].what}</span></th>
                <td>{Object.entries(control.answers).map(([said, n], at) => <span key={said}>{at > 0 && ", "}{token(said)}{control.draws > 1 && <span class="remark"> {n} of {control.draws}</span>}</span>)}</td>
                <td><Share value={control.changed} words={`${Math.round(control.changed * control.draws)} of ${control.draws}`} /></td>
                <td class="number">{number(control.kl)} nats</td>
              </tr>
            ))}
          </tbody>
        </table>
      </section>
      <section class="card texts">
        <div><h3>Answer before</h3><p>{result.text.before || "(nothing)"}</p></div>
        <div><h3>Answer under the edit</h3><p>{result.text.after || "(nothing)"}</p></div>
      </section>
      <section class="card">
        <Command title="The same from the command line" text={command} />
        {run && <p class="remark">Logged as the run <a href={href("runs", "", { open: run })}>{run}</a></p>}
      </section>
    </div>
  );
}

function verdict({ answer, controls }: SteerResult): string {
  const same = controls.filter((control) => control.changed > 0);
  if (answer.before === answer.after) return "The answer stays. Try more features, a larger value, or those of other layers.";
  if (!controls.length) return "The answer changes. Without controls nobody knows whether any edit of this size would do it.";
  if (!same.length) return "The answer changes, and no edit of the same size elsewhere changes it: on this prompt, it is these features and not the size of the edit.";
  const [worst] = [...same].sort((a, b) => b.changed - a.changed);
  return `The answer changes, but so it does with ${worst!.name === "matched" ? "other features" : "random directions"} (${percent(worst!.changed)} of the draws): the size of the edit may be all.`;
}

function Share({ value, words }: { value: number; words: string }) {
  return (
    <span class="share">
      <span class="meter"><i style={{ width: `${100 * value}%` }} /></span>
      {words}
    </span>
  );
}

function NextWords({ result }: { result: SteerResult }) {
  return (
    <table class="next-words">
      <thead><tr><th /><th>before</th><th>under the edit</th></tr></thead>
      <tbody>
        {[...result.top].sort((a, b) => Math.max(b.before, b.after) - Math.max(a.before, a.after)).map((row) => (
          <tr key={row.token}>
            <th>{token(row.token)}</th>
            <td><Probability value={row.before} kind="before" /></td>
            <td><Probability value={row.after} kind="after" /></td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function Probability({ value, kind }: { value: number; kind: "before" | "after" }) {
  return (
    <span class={`probability ${kind}`}>
      <span><i style={{ width: `${100 * value}%` }} /></span>
      {percent(value)}
    </span>
  );
}
