import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { dismiss, messages } from "../state";
import { Button } from "./controls";
import { Icon, type IconName } from "./icons";

/** A titled part of a side panel; `actions` stand at the right of the title. */
export function Panel({ title, actions, children, class: extra }: { title: ComponentChildren; actions?: ComponentChildren; children: ComponentChildren; class?: string }) {
  return (
    <section class={["panel", extra].filter(Boolean).join(" ")}>
      <header>
        <h2>{title}</h2>
        {actions}
      </header>
      <div class="body">{children}</div>
    </section>
  );
}

/** Where there is nothing yet: what it is, and what to do. */
export function Empty({ icon, title, children }: { icon?: IconName; title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      {icon && <Icon name={icon} size={32} />}
      <h2>{title}</h2>
      {children}
    </div>
  );
}

/** `fraction` null: busy, and nobody knows how long. */
export function Progress({ fraction, text }: { fraction: number | null; text?: string }) {
  return (
    <div role="progressbar" aria-valuenow={fraction === null ? undefined : Math.round(100 * fraction)} aria-valuemin={0} aria-valuemax={100} aria-label={text ?? "progress"}>
      <div class={fraction === null ? "progress busy" : "progress"}>
        <div style={fraction === null ? {} : { width: `${100 * fraction}%` }} />
      </div>
    </div>
  );
}

export function Toasts() {
  return (
    <div class="toasts" role="status" aria-live="polite">
      {messages.value.map(({ id, text, error, action }) => (
        <div key={id} class={error ? "toast error" : "toast"} role={error ? "alert" : undefined}>
          <span>{text}</span>
          {action && (
            <button type="button" onClick={() => (dismiss(id), action.run())}>
              {action.label}
            </button>
          )}
          <button type="button" aria-label="Close this message" onClick={() => dismiss(id)}>
            <Icon name="close" size={14} />
          </button>
        </div>
      ))}
    </div>
  );
}

/** A modal window, open while it is on the page; Escape and a click outside close it. */
export function Dialog({ title, onClose, children }: { title: string; onClose: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => box.current?.showModal(), []);
  return (
    <dialog ref={box} aria-label={title} onClose={onClose} onClick={(event) => event.target === box.current && box.current?.close()}>
      <header>
        <h2>{title}</h2>
        <Button icon="close" kind="quiet" small aria-label="Close" onClick={() => box.current?.close()} />
      </header>
      <div class="body">{children}</div>
    </dialog>
  );
}
