import { useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";

export interface Column<Row> {
  name: string;
  /** What the cell shows. */
  cell: (row: Row) => ComponentChildren;
  /** What the column sorts by; without it the column does not sort. */
  by?: (row: Row) => string | number | null;
  number?: boolean;
}

/** A table whose columns sort at a click, and whose rows may lead somewhere. */
export function Table<Row>({ rows, columns, id, onOpen }: { rows: Row[]; columns: Column<Row>[]; id: (row: Row) => string; onOpen?: (row: Row) => void }) {
  const sorted = useSignal<{ column: number; down: boolean } | null>(null);
  const by = sorted.value === null ? undefined : columns[sorted.value.column]?.by;
  const shown = by === undefined ? rows : [...rows].sort((a, b) => compared(by(a), by(b)) * (sorted.value?.down ? -1 : 1));
  const turn = (column: number) => (sorted.value = { column, down: sorted.value?.column === column ? !sorted.value.down : (columns[column]?.number ?? false) });
  return (
    <table class="table">
      <thead>
        <tr>
          {columns.map(({ name, by: sorts, number }, column) => (
            <th key={name} class={number ? "number" : ""} aria-sort={sorted.value?.column === column ? (sorted.value.down ? "descending" : "ascending") : undefined}>
              {sorts ? (
                <button type="button" onClick={() => turn(column)}>
                  {name}
                  {sorted.value?.column === column ? (sorted.value.down ? " ↓" : " ↑") : ""}
                </button>
              ) : (
                name
              )}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {shown.map((row) => (
          <tr key={id(row)} class={onOpen ? "link" : ""} tabIndex={onOpen ? 0 : undefined} onClick={() => onOpen?.(row)} onKeyDown={(event) => event.key === "Enter" && onOpen?.(row)}>
            {columns.map(({ name, cell, number }) => (
              <td key={name} class={number ? "number" : ""}>
                {cell(row)}
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function compared(a: string | number | null, b: string | number | null): number {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}
