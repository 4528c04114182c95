import { Dialog } from "../ui/parts";

const KEYS: readonly (readonly [string[], string])[] = [
  [["/"], "search by label, token or feature id"],
  [["↓"], "go to the strongest input"],
  [["↑"], "go to the strongest output"],
  [["←", "→"], "the next one instead"],
  [["P"], "pin or unpin"],
  [["Shift", "click"], "mark several nodes"],
  [["G"], "make one supernode of the marked nodes"],
  [["Z"], "undo"],
  [["Shift", "Z"], "redo"],
  [["S"], "show the subgraph of what is pinned"],
  [["F"], "fit the graph into the window"],
  [["Esc"], "clear the choice"],
];

export function Help({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="How to read and use this graph" onClose={onClose}>
      <div class="help">
        <section>
          <h3>Reading</h3>
          <p>
            From the bottom to the top: the prompt (words, and the patches of the picture) goes through the layers of the model to the answer. Each dot is a <b>feature</b> that fires at that position. Edges say how much one node adds to (<span class="positive">blue</span>) or takes away from (<span class="negative">orange, dashed</span>) another.
          </p>
          <p>
            Click a node to see what feeds it and what it feeds. The faint lines are the edges that hand most of the answer down. <b>Influence</b> is the share of the answer that passes through a node.
          </p>
          <p>
            <b>Attention heads</b> carry edges from one position to another. Choose one (<b>L4H0</b> is head 0 of layer 4) to see its edges, and which pairs of features make it look there.
          </p>
          <p>Squares are inputs, diamonds are errors (what the features miss), triangles are biases.</p>
        </section>
        <section>
          <h3>Keys</h3>
          <dl>
            {KEYS.map(([keys, words]) => (
              <div key={words}>
                <dt>
                  {keys.map((key) => (
                    <kbd key={key}>{key}</kbd>
                  ))}
                </dt>
                <dd>{words}</dd>
              </div>
            ))}
          </dl>
        </section>
      </div>
    </Dialog>
  );
}
