import { useEffect, useRef, useState } from "preact/hooks";
import { reason } from "../state";

export interface Loaded<T> {
  data: T | null; // the last answer stays while the next one is under way
  error: string;
  busy: boolean;
}

/** The answer of `ask` whenever one of `keys` changes; an answer that comes late, after another question, is dropped. */
export function useLoad<T>(ask: (signal: AbortSignal) => Promise<T>, keys: readonly unknown[]): Loaded<T> {
  const [state, set] = useState<Loaded<T>>({ data: null, error: "", busy: true });
  useEffect(() => {
    const stop = new AbortController();
    set((before) => ({ ...before, busy: true, error: "" }));
    ask(stop.signal).then(
      (data) => !stop.signal.aborted && set({ data, error: "", busy: false }),
      (error) => !stop.signal.aborted && set({ data: null, error: reason(error), busy: false }),
    );
    return () => stop.abort();
  }, keys);
  return state;
}

/** Calls `close` when Escape is pressed outside a field and a dialog. */
export function useEscape(close: () => void): void {
  const last = useRef(close);
  last.current = close;
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const busy = event.target instanceof Element && event.target.closest("input, select, textarea, dialog");
      if (event.key === "Escape" && !busy && !event.defaultPrevented) last.current();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
}

/** `value`, once it has not changed for `wait` milliseconds. */
export function useSettled<T>(value: T, wait = 200): T {
  const [settled, set] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => set(value), wait);
    return () => clearTimeout(timer);
  }, [value, wait]);
  return settled;
}
