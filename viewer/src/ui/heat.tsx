/** What a feature does on pictures and words: the stronger, the deeper the tint. */
import "./heat.css";
import type { Example, Picture, Token } from "../api";
import { number, token as shown } from "./format";

/** A picture with a tint on each patch, and a frame around the strongest one. */
export function HeatPicture({ picture, alt, peak = true }: { picture: Picture; alt: string; peak?: boolean }) {
  const strongest = picture.levels.reduce((best, level, n) => (level > (picture.levels[best] ?? 0) ? n : best), 0);
  const frame = peak && picture.levels[strongest] ? picture.boxes[strongest] : undefined;
  return (
    <span class="heat">
      <img src={picture.url} alt={alt} loading="lazy" />
      <svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">
        {picture.levels.map((level, n) => {
          const box = picture.boxes[n];
          if (!level || !box) return null;
          const [left, top, right, bottom] = box;
          return <rect key={n} x={100 * left} y={100 * top} width={100 * (right - left)} height={100 * (bottom - top)} fill="#ff00c8" opacity={0.08 + (0.47 * level) / 255} />;
        })}
        {frame && <FrameOf box={frame} />}
      </svg>
    </span>
  );
}

function FrameOf({ box: [left, top, right, bottom] }: { box: [number, number, number, number] }) {
  const place = { x: 100 * left, y: 100 * top, width: 100 * (right - left), height: 100 * (bottom - top), fill: "none" };
  return (
    <>
      <rect {...place} class="outer" />
      <rect {...place} class="inner" />
    </>
  );
}

/** Words of an example; those on which the feature fires are tinted. */
export function HeatText({ tokens }: { tokens: Token[] }) {
  return (
    <p class="heat-text">
      {tokens.map((token, n) =>
        token.kind === "image" ? (
          <span key={n} class="chip">picture</span>
        ) : /^<[^<>\s]+>$/.test(token.text) && !token.level ? null : (
          <span key={n} class={token.peak ? "word peak" : "word"} title={token.level ? `${Math.round((100 * token.level) / 255)} % of the peak` : undefined}>
            {token.level > 0 && <i style={{ opacity: 0.12 + (0.5 * token.level) / 255 }} />}
            {shown(token.text)}
          </span>
        ),
      )}
    </p>
  );
}

/** One input on which the feature fires: pictures above, words below. */
export function ExampleCard({ example }: { example: Example }) {
  return (
    <figure class="example">
      {example.pictures.map((picture, n) => (
        <HeatPicture key={n} picture={picture} alt={`picture of ${example.origin}`} />
      ))}
      <figcaption>
        <HeatText tokens={example.tokens} />
        <span class="peak-value" title={example.origin}>
          {number(example.activation)}
          {(example.times ?? 1) > 1 && <span class="quiet"> · {example.times} times</span>}
        </span>
      </figcaption>
    </figure>
  );
}
