import { signal } from "@preact/signals";
import { api, type Job, type JobRequest } from "../api";
import { reason, say } from "../state";

/** One job of the worker at a time: started, followed until it ends, cancelled. It goes on when its page is left. */
export class Work {
  readonly job = signal<Job | null>(null);
  readonly busy = signal(false);
  private id = "";

  /** Resolves when the job has ended; null when it could not be started or followed, or another one took its place. */
  async start(request: JobRequest): Promise<Job | null> {
    this.job.value = null;
    this.busy.value = true;
    const mine = `starting ${Math.random()}`;
    this.id = mine;
    try {
      const { id } = await api.start(request);
      if (this.id !== mine) {
        await api.cancel(id);
        return null;
      }
      this.id = id;
      for (let wait = 150; this.id === id; wait = Math.min(wait * 1.3, 800)) {
        const job = await api.job(id);
        if (this.id !== id) return null;
        this.job.value = job;
        if (job.status !== "queued" && job.status !== "running") {
          if (job.status === "failed") say(job.error || "The job failed.", { error: true });
          return job;
        }
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    } catch (error) {
      say(reason(error), { error: true });
    } finally {
      if (this.id === mine || this.id === this.job.value?.id || this.job.value === null) this.busy.value = false;
    }
    return null;
  }

  /** Stop the job; `start` then resolves with the cancelled one. */
  async cancel(): Promise<void> {
    const id = this.id;
    if (id.startsWith("starting")) {
      this.id = "";
      this.busy.value = false;
    } else if (id && this.busy.value) await api.cancel(id).catch((error) => say(reason(error), { error: true }));
  }
}
