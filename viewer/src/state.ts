/** What every part of the page shares: where the user is, the theme, and messages. */
import { computed, effect, signal } from "@preact/signals";

/** An address such as `#/graph/trace/mars?sel=5_709_4`: page "graph", rest "trace/mars", query {sel}. */
export interface Route {
  page: string;
  rest: string;
  query: URLSearchParams;
}

function parsed(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [page = "", ...rest] = path.split("/").map(decoded);
  return { page, rest: rest.join("/"), query: new URLSearchParams(query) };
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a stray "%" that nobody encoded
  }
}

const hash = signal(location.hash);
addEventListener("hashchange", () => (hash.value = location.hash));
export const route = computed(() => parsed(hash.value));

/** The address of a page; slashes in `rest` stay readable. */
export function href(page: string, rest = "", query: Record<string, string> = {}): string {
  const words = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "")).toString();
  return `#/${[page, ...rest.split("/")].filter(Boolean).map(encodeURIComponent).join("/")}${words ? `?${words}` : ""}`;
}

export function go(page: string, rest = "", query: Record<string, string> = {}): void {
  location.hash = href(page, rest, query);
}

/** Change the address without an entry in the browser's history: selections, not pages. */
export function replaceAddress(page: string, rest = "", query: Record<string, string> = {}): void {
  if (location.hash !== hash.peek()) return; // a link was followed, whose event is still to come
  history.replaceState(null, "", href(page, rest, query));
  hash.value = location.hash;
}

export type Theme = "auto" | "light" | "dark";
const KEY = "vlmscope.theme";

/** Storage is refused to pages opened from disk in some browsers: then the choice lasts as long as the page. */
export const kept = {
  get: (key: string): string | null => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  },
  set: (key: string, value: string): void => {
    try {
      localStorage.setItem(key, value);
    } catch {
      /* as above */
    }
  },
};

const known = kept.get(KEY);
export const theme = signal<Theme>(known === "light" || known === "dark" ? known : "auto");
const system = matchMedia("(prefers-color-scheme: dark)");
const systemDark = signal(system.matches);
system.addEventListener("change", (event) => (systemDark.value = event.matches));
/** For what is drawn on a canvas: read after a change, CSS variables have their new values. */
export const dark = computed(() => theme.value === "dark" || (theme.value === "auto" && systemDark.value));
effect(() => {
  document.documentElement.dataset.theme = theme.value;
  kept.set(KEY, theme.value);
});

export interface Message {
  id: number;
  text: string;
  error: boolean;
  action?: { label: string; run: () => void };
}
export const messages = signal<Message[]>([]);
let count = 0;

/** Show a message for some seconds; errors stay until they are closed. */
export function say(text: string, options: { error?: boolean; action?: Message["action"] } = {}): void {
  const message: Message = { id: ++count, text, error: options.error ?? false, action: options.action };
  messages.value = [...messages.value.filter((other) => other.text !== text).slice(-3), message];
  if (!message.error) setTimeout(() => dismiss(message.id), 5000);
}

export function dismiss(id: number): void {
  messages.value = messages.value.filter((message) => message.id !== id);
}

/** The one clear line of anything thrown. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
