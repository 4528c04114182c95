import "./try.css";
import { useEffect } from "preact/hooks";
import { api } from "../api";
import { href, type Route } from "../state";
import { Command } from "../ui/command";
import { Button, Segmented } from "../ui/controls";
import { PictureInput, usePictureDrop } from "../ui/drop";
import { useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { GraphView } from "../graph/GraphView";
import { EditList } from "./EditList";
import { Effect } from "./Effect";
import type { Work } from "./jobs";
import { effect, picture, prompt, take, trace, traced, tracing, view } from "./state";

/** Trace a picture and a question, change features, and see the answer change, or not. */
export default function TryPage(_: { route: Route }) {
  const dragging = usePictureDrop(take);
  const shipped = useLoad(() => api.pictures(), []);
  const choices = shipped.data?.pictures ?? [];
  useEffect(() => {
    const first = choices.find((one) => one.name === "mars") ?? choices[0];
    if (!first || picture.value || prompt.value) return;
    picture.value = { picture: first.picture, url: first.url, name: first.name };
    prompt.value = first.prompt;
  }, [shipped.data]);
  const chosen = picture.value;
  const ready = prompt.value.trim() !== "" && !tracing.busy.value;

  return (
    <div class="try">
      <div class="try-side">
        <section class="step">
          <h2><b>1</b> A picture and a question</h2>
          <div class="try-picture">
            {chosen ? <img src={chosen.url} alt={chosen.name} /> : <span class="none">no picture:<br />words alone</span>}
            <div>
              <div class="shipped" role="group" aria-label="Pictures that come with vlmscope">
                {choices.map((one) => (
                  <button
                    type="button"
                    key={one.picture}
                    aria-pressed={chosen?.picture === one.picture}
                    aria-label={`Take the picture ${one.name}`}
                    title={one.name}
                    onClick={() => {
                      picture.value = { picture: one.picture, url: one.url, name: one.name };
                      prompt.value = one.prompt || prompt.value;
                    }}
                  >
                    <img src={one.url} alt="" />
                  </button>
                ))}
              </div>
              <div class="strip">
                <PictureInput take={take}>Your own</PictureInput>
                {chosen && <Button small kind="quiet" icon="close" onClick={() => (picture.value = null)}>None</Button>}
              </div>
              <p class="remark">or drop a file anywhere on this page</p>
            </div>
          </div>
          <form class="ask" onSubmit={(event) => (event.preventDefault(), ready && void trace())}>
            <span class="field">
              <input aria-label="Question" placeholder="what planet is this ?" value={prompt.value} onInput={(event) => (prompt.value = event.currentTarget.value)} />
            </span>
            <button type="submit" class="button primary" disabled={!ready}>Trace</button>
          </form>
          <Working work={tracing} />
        </section>
        <section class="step">
          <h2><b>2</b> What if these features were different?</h2>
          <EditList />
        </section>
      </div>
      <div class="try-main">
        {(traced.value || effect.value) && (
          <div class="try-tabs">
            <Segmented
              label="What is shown"
              value={view.value}
              options={[["graph", "Graph"], ["effect", "Effect of the edit"]]}
              onChange={(to) => (view.value = to)}
            />
            {view.value === "graph" && traced.value && (
              <>
                <span class="answer">answer: <b>{answerOf(traced.value.graph)}</b></span>
                <a class="button small" href={href("graph", traced.value.run)}>Open on its own</a>
              </>
            )}
          </div>
        )}
        {view.value === "effect" && effect.value ? (
          <Effect />
        ) : view.value === "graph" && traced.value ? (
          <>
            <div class="try-graph"><GraphView key={traced.value.run} id={traced.value.run} graph={traced.value.graph} /></div>
            <details class="try-command"><summary>The same from the command line</summary><Command text={traced.value.command} /></details>
          </>
        ) : view.value === "effect" ? (
          <Empty icon="play" title="Nothing has been edited yet"><p>Add features at the left, say what happens to them, and press Run.</p></Empty>
        ) : (
          <Empty icon="graph" title="How does the model arrive at its answer?">
            <p>Choose a picture, ask a question and press Trace: the attribution graph appears here. Then change features and see whether the answer follows them.</p>
          </Empty>
        )}
      </div>
      {dragging && <div class="dropping">Drop the picture to ask about it</div>}
    </div>
  );
}

const answerOf = (graph: { nodes: { kind: string; answer: boolean; label: string; probability: number }[] }): string => {
  const logits = graph.nodes.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
  return /"(.*)"/s.exec(logits[0]?.label ?? "")?.[1]?.trim() ?? logits[0]?.label ?? "?";
};

/** A running job: how far it is, and a way to stop it. */
export function Working({ work }: { work: Work }) {
  const job = work.job.value;
  if (!work.busy.value) return job?.status === "cancelled" ? <p class="remark" role="status">Cancelled.</p> : null;
  const words = job?.progress.text || (job?.status === "running" ? "working" : "starting");
  return (
    <div class="working" role="status">
      <Progress fraction={job?.progress.fraction ?? null} text={words} />
      <div class="strip">
        <span>{words}</span>
        <Button small icon="stop" onClick={() => void work.cancel()}>Cancel</Button>
      </div>
    </div>
  );
}
