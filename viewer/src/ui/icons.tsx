/** Line icons on a 16 x 16 grid. */
const PATHS = {
  logo: "M2.5 13 8 2.5 13.5 13M5 8.5h6M8 2.5V13",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.7 10.7 14 14",
  pin: "M10 2 14 6 11 7.5 9.5 11.5 4.5 6.5 8.5 5ZM6.8 9.2 2.5 13.5",
  group: "M2.5 2.5h5v5h-5zM8.5 8.5h5v5h-5zM10 5h1.5v1.5M6 11H4.5V9.5",
  undo: "M6 3 2.5 6.5 6 10M3 6.5h6.5a3.5 3.5 0 0 1 0 7H7",
  redo: "M10 3l3.5 3.5L10 10M13 6.5H6.5a3.5 3.5 0 0 0 0 7H9",
  close: "m4 4 8 8M12 4l-8 8",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  fit: "M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10",
  help: "M8 14.5a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13ZM6 6.2a2 2 0 1 1 2.8 1.9c-.6.3-.8.6-.8 1.2M8 11.5v.1",
  sun: "M8 11a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1",
  moon: "M13.5 9.8A6 6 0 0 1 6.2 2.5 6 6 0 1 0 13.5 9.8Z",
  auto: "M8 14a6 6 0 1 0 0-12 6 6 0 0 0 0 12ZM8 2v12M8 5h4.5M8 8h6M8 11h4.5",
  download: "M8 2v8M4.8 7 8 10.2 11.2 7M2.5 13.5h11",
  upload: "M8 10.5V2.5M4.8 5.5 8 2.3 11.2 5.5M2.5 13.5h11",
  folder: "M2 4.5v8h12v-7H8L6.5 3.5H2z",
  edit: "m10.5 2.8 2.7 2.7-7.7 7.7-3.2.5.5-3.2ZM9 4.3 11.7 7",
  trash: "M2.5 4h11M6 4V2.5h4V4M4 4l.6 9.5h6.8L12 4M6.7 6.5v4.5M9.3 6.5v4.5",
  image: "M2 3h12v10H2zM2 11l3.5-3.5L9 11l2-2 3 3M10.5 6.5v.1",
  graph: "M3.5 13.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM12.5 13.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM8 5.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM7.2 5.3 4.3 10.7M8.8 5.3l2.9 5.4",
  play: "M4.5 2.5v11l9-5.5Z",
  stop: "M3.5 3.5h9v9h-9z",
  check: "m3 8.5 3.5 3.5L13 4.5",
  warn: "M8 2 1.5 13.5h13ZM8 6.5v3M8 11.5v.1",
  left: "M10 3 5 8l5 5",
  right: "m6 3 5 5-5 5",
  down: "m3 6 5 5 5-5",
  more: "M3 8h.1M8 8h.1M13 8h.1",
  link: "M7 9a2.5 2.5 0 0 0 3.6 0l2.2-2.2a2.5 2.5 0 0 0-3.6-3.6l-.9.9M9 7a2.5 2.5 0 0 0-3.6 0L3.2 9.2a2.5 2.5 0 0 0 3.6 3.6l.9-.9",
  copy: "M5.5 5.5h8v8h-8zM3 10.5h-.5v-8h8V3",
  filter: "M2 4h12M4.5 8h7M6.5 12h3",
} as const;
export type IconName = keyof typeof PATHS;

export function Icon({ name, size = 16 }: { name: IconName; size?: number }) {
  return (
    <svg width={size} height={size} viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
