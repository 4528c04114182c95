import type { ButtonHTMLAttributes, ComponentChildren } from "preact";
import { Icon, type IconName } from "./icons";

type ButtonProps = ButtonHTMLAttributes & {
  icon?: IconName;
  kind?: "primary" | "quiet" | "danger";
  small?: boolean;
  pressed?: boolean;
  disabled?: boolean;
  children?: ComponentChildren;
};

/** A button; with an icon alone, `aria-label` names it (and shows as its tooltip). */
export function Button({ icon, kind, small, pressed, children, class: extra, ...rest }: ButtonProps) {
  const classes = ["button", kind, small && "small", !children && "icon", extra].filter(Boolean).join(" ");
  const label = rest["aria-label"];
  return (
    <button type="button" class={classes} aria-pressed={pressed} title={typeof label === "string" ? label : undefined} {...rest}>
      {icon && <Icon name={icon} />}
      {children}
    </button>
  );
}

/** One of a few choices. */
export function Segmented<T extends string>(props: { label: string; value: T; options: readonly (readonly [T, ComponentChildren])[]; onChange: (value: T) => void }) {
  return (
    <div class="segmented" role="group" aria-label={props.label}>
      {props.options.map(([value, words]) => (
        <button type="button" key={value} aria-pressed={value === props.value} onClick={() => props.onChange(value)}>
          {words}
        </button>
      ))}
    </div>
  );
}

export function Slider(props: { label: string; value: number; min?: number; max: number; step?: number; shown: string; onInput: (value: number) => void }) {
  return (
    <label class="slider">
      <span>{props.label}</span>
      <output>{props.shown}</output>
      <input
        type="range"
        min={props.min ?? 0}
        max={props.max}
        step={props.step ?? 0.01}
        value={props.value}
        aria-valuetext={props.shown}
        onInput={(event) => props.onInput(event.currentTarget.valueAsNumber)}
      />
    </label>
  );
}

/** A text or select field with an icon: the input is the child. */
export function Field({ icon, children, class: extra }: { icon?: IconName; children: ComponentChildren; class?: string }) {
  return (
    <label class={["field", extra].filter(Boolean).join(" ")}>
      {icon && <Icon name={icon} />}
      {children}
    </label>
  );
}
