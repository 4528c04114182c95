import type { GraphModel } from "./model";
import type { Box, Patch } from "./parse";

const pixelated = (url: string): string => (url.length < 30_000 ? "pixelated" : "auto");

/** A part of a picture. */
export function Crop({ model, patch, size }: { model: GraphModel; patch: Patch | null; size: number }) {
  const url = patch && model.file.pictures[patch.image];
  if (!patch || !url) return null;
  const [left, top, right, bottom] = patch.box;
  return (
    <svg class="crop" width={size} height={size} viewBox={`${left} ${top} ${right - left} ${bottom - top}`} preserveAspectRatio="none" role="img" aria-label="part of the picture">
      <image href={url} width="1" height="1" preserveAspectRatio="none" image-rendering={pixelated(url)} />
    </svg>
  );
}

/** A whole picture with its patch grid, some patches lit or heated (-1 to 1); a patch can be clicked. */
export function Picture(props: { model: GraphModel; image: number; lit: Set<number>; heat: Map<number, number>; hovered: number | null; onPick: (position: number) => void; onHover: (position: number | null) => void }) {
  const { model, image, lit, heat, hovered, onPick, onHover } = props;
  const url = model.file.pictures[image];
  const patches = model.file.tokens.flatMap(({ patch }, position) => (patch?.image === image ? [{ position, box: patch.box }] : []));
  if (!url) return null;
  return (
    <div class="picture">
      <img
        src={url}
        alt={`Picture ${image + 1} of the prompt`}
        class={url.length < 30_000 ? "pixelated" : ""}
        onLoad={({ currentTarget: img }) => img.parentElement!.style.setProperty("--ratio", String(img.naturalWidth / img.naturalHeight || 1))}
      />
      <svg viewBox="0 0 1 1" preserveAspectRatio="none" onMouseLeave={() => onHover(null)}>
        {lit.size > 0 && <path class="shade" fill-rule="evenodd" d={`M0 0H1V1H0Z${patches.filter(({ position }) => lit.has(position)).map(({ box }) => rect(box)).join("")}`} />}
        {patches.map(({ position, box: [l, t, r, b] }) => {
          const share = heat.get(position) ?? 0;
          return share ? <rect key={`heat ${position}`} class={share > 0 ? "heat" : "heat negative"} x={l} y={t} width={r - l} height={b - t} fill-opacity={0.75 * Math.abs(share)} /> : null;
        })}
        {patches.map(({ position, box: [l, t, r, b] }) => (
          <rect
            key={position}
            class={lit.has(position) ? "lit" : position === hovered ? "near" : ""}
            x={l}
            y={t}
            width={r - l}
            height={b - t}
            onClick={() => onPick(position)}
            onMouseEnter={() => onHover(position)}
          >
            <title>{`patch ${model.patchNumber(position)}`}</title>
          </rect>
        ))}
      </svg>
    </div>
  );
}

const rect = ([l, t, r, b]: Box): string => `M${l} ${t}V${b}H${r}V${t}Z`;
