import { useSignal } from "@preact/signals";
import type { RefObject } from "preact";
import { Field } from "../ui/controls";
import type { GraphStore } from "./store";

/** Finds nodes by label, token, feature id; arrows and Enter choose one. */
export function Search({ store, input, onPick }: { store: GraphStore; input: RefObject<HTMLInputElement | null>; onPick: (node: number) => void }) {
  const query = useSignal("");
  const open = useSignal(false);
  const active = useSignal(0);
  const { model } = store;
  const found = open.value ? model.search(query.value, store.labels) : [];
  const pick = (node: number | undefined): void => {
    if (node === undefined) return;
    onPick(node);
    open.value = false;
    input.current?.blur();
  };
  const keys = (event: KeyboardEvent): void => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      active.value = (active.value + (event.key === "ArrowDown" ? 1 : -1) + found.length) % Math.max(found.length, 1);
    } else if (event.key === "Enter") pick(found[active.value]);
    else if (event.key === "Escape") {
      open.value = false;
      input.current?.blur();
    }
    event.stopPropagation();
  };
  return (
    <div class="search" onBlurCapture={(event) => !(event.currentTarget as HTMLElement).contains(event.relatedTarget as Node | null) && (open.value = false)}>
      <Field icon="search">
        <input
          ref={input}
          type="search"
          placeholder="Label, token, feature"
          aria-label="Search nodes by label, token or feature id"
          role="combobox"
          list={undefined}
          aria-expanded={open.value}
          aria-controls="found"
          value={query.value}
          onInput={(event) => {
            query.value = event.currentTarget.value;
            active.value = 0;
            open.value = true;
          }}
          onFocus={() => (open.value = query.value !== "")}
          onKeyDown={keys}
        />
        <kbd>/</kbd>
      </Field>
      {open.value && query.value.trim() !== "" && (
        <ul id="found" class="found" role="listbox" aria-label="Nodes found">
          {found.length === 0 && <li class="none">No node has these words.</li>}
          {found.map((node, i) => (
            <li key={node} role="option" aria-selected={i === active.value}>
              <button type="button" class={i === active.value ? "active" : ""} onMouseDown={(event) => event.preventDefault()} onMouseEnter={() => ((active.value = i), (store.hovered.value = node))} onMouseLeave={() => (store.hovered.value = null)} onClick={() => pick(node)}>
                <span class="name">{model.name(node, store.labels)}</span>
                <span class="place">
                  {model.node(node).feature} {model.place(node)}
                </span>
              </button>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}
