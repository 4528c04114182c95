import "./command.css";
import { say } from "../state";
import { Button } from "./controls";

/** A command line that repeats what was clicked, with a button that copies it. */
export function Command({ text, title }: { text: string; title?: string }) {
  const copy = () =>
    navigator.clipboard.writeText(text).then(
      () => say("Copied"),
      () => say("The browser refuses to copy; select the text instead.", { error: true }),
    );
  return (
    <div class="command">
      {title && <h3>{title}</h3>}
      <div>
        <code>{text}</code>
        <Button icon="copy" kind="quiet" small aria-label="Copy the command line" onClick={copy} />
      </div>
    </div>
  );
}
