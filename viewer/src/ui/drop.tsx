import { useEffect, useRef, useState } from "preact/hooks";
import { say } from "../state";

const isPicture = (file: File): boolean => file.type.startsWith("image/");

/** Takes a picture that is dropped anywhere on the page or pasted; `dragging` while one is held over it. */
export function usePictureDrop(take: (file: File) => void): boolean {
  const [dragging, set] = useState(false);
  const last = useRef(take);
  last.current = take;
  useEffect(() => {
    const taken = (files: FileList | undefined) => {
      const file = [...(files ?? [])].find(isPicture);
      if (file) last.current(file);
      else if (files?.length) say("That is not a picture: drop a PNG, JPEG or WebP file.", { error: true });
    };
    const over = (event: DragEvent) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      set(true);
    };
    const leave = (event: DragEvent) => event.relatedTarget === null && set(false);
    const drop = (event: DragEvent) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      set(false);
      taken(event.dataTransfer.files);
    };
    const paste = (event: ClipboardEvent) => event.clipboardData?.files.length && taken(event.clipboardData.files);
    addEventListener("dragover", over);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    addEventListener("paste", paste);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
      removeEventListener("paste", paste);
    };
  }, []);
  return dragging;
}

/** A hidden file field behind a label that looks like a button. */
export function PictureInput({ take, children }: { take: (file: File) => void; children: string }) {
  return (
    <label class="button small">
      {children}
      <input
        type="file"
        class="hidden"
        accept="image/*"
        onChange={(event) => {
          const file = event.currentTarget.files?.[0];
          if (file) take(file);
          event.currentTarget.value = "";
        }}
      />
    </label>
  );
}
