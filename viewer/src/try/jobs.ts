import { useEffect, useRef, useState } from "preact/hooks";
import { api, type Job, type JobRequest } from "../api";
import { reason, say } from "../state";

export interface Work {
  job: Job | null; // the last one started
  busy: boolean;
  start: (request: JobRequest) => Promise<Job | null>; // resolves when it has ended
  cancel: () => void;
}

/** One job of the worker at a time: started, followed, cancelled. A page that is left behind stops asking. */
export function useJob(): Work {
  const [job, set] = useState<Job | null>(null);
  const [busy, setBusy] = useState(false);
  const alive = useRef(true);
  const id = useRef("");
  useEffect(() => () => void (alive.current = false), []);

  const start = async (request: JobRequest): Promise<Job | null> => {
    setBusy(true);
    set(null);
    try {
      const started = await api.start(request);
      id.current = started.id;
      for (let wait = 150; alive.current; wait = Math.min(wait * 1.3, 800)) {
        const now = await api.job(started.id);
        if (!alive.current || id.current !== started.id) return null;
        set(now);
        if (now.status !== "queued" && now.status !== "running") {
          if (now.status === "failed") say(now.error || "The job failed", { error: true });
          return now;
        }
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
      return null;
    } catch (error) {
      say(reason(error), { error: true });
      return null;
    } finally {
      if (alive.current) setBusy(false);
    }
  };
  const cancel = () => {
    if (id.current) api.cancel(id.current).catch((error) => say(reason(error), { error: true }));
  };
  return { job, busy, start, cancel };
}
