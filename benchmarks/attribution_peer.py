"""circuit-tracer's side of the attribution benchmark, run by the Python of its own environment.

`python attribution_peer.py FOLDER THREADS`, with the project's root on the path; requests and answers are JSON lines.
Its reader of transcoders knows no TopK, so the nonlinearity is put in by hand, with its own TopK module.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from benchmarks.measured import measured
from circuit_tracer.attribution.attribute import attribute  # pyright: ignore[reportMissingImports]
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph  # pyright: ignore[reportMissingImports]
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel  # pyright: ignore[reportMissingImports]
from circuit_tracer.transcoder.activation_functions import TopK  # pyright: ignore[reportMissingImports]
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set  # pyright: ignore[reportMissingImports]
from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig  # pyright: ignore[reportMissingImports]


def attribution(folder):
    case = json.loads((folder / "case.json").read_text())
    transcoders = load_transcoder_set(
        {layer: str(folder / "transcoders" / f"layer_{layer}.safetensors") for layer in range(case["n_layers"])},
        scan="random",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="hook_mlp_out",
        device=torch.device("cpu"),
        dtype=torch.float32,
        lazy_encoder=False,
        lazy_decoder=False,
    )
    if case["activation"] == "topk":
        for layer in range(case["n_layers"]):
            transcoders.transcoders[layer].activation_function = TopK(case["k"])
    model = NNSightReplacementModel.from_pretrained_and_transcoders(
        str(folder / "model"), transcoders, device=torch.device("cpu"), dtype=torch.float32
    )
    ids = torch.tensor(case["input_ids"])

    def run(batch_size, save=None):
        with measured() as found:
            graph = attribute(ids, model, batch_size=batch_size, max_feature_nodes=None)
        assert len(graph.input_tokens) == len(ids), "the peer changed the prompt"
        if save:
            save_matrix(graph, save)
        matrix = graph.adjacency_matrix
        return found | {"nodes": len(matrix), "edges": int((matrix != 0).sum())}

    return run


def save_matrix(graph, path):
    n_features, n_logits = len(graph.active_features), len(graph.logit_targets)
    rows = list(range(n_features)) + list(range(len(graph.adjacency_matrix) - n_logits, len(graph.adjacency_matrix)))
    np.savez(
        path,
        features=graph.active_features.numpy(),
        logits=graph.logit_token_ids.numpy(),
        matrix=graph.adjacency_matrix[rows][:, :-n_logits].detach().double().numpy(),
    )


def pruning(folder):
    """The dense graph is the peer's own form of it, so it is there before the measurement begins."""
    with np.load(folder / "graph.npz") as arrays:
        order, counts = arrays["order"], arrays["counts"]
        n_nodes = len(order)
        dense = torch.zeros(n_nodes, n_nodes)
        place = np.argsort(order)
        rows = np.repeat(np.arange(n_nodes), np.diff(arrays["indptr"]))
        dense[torch.from_numpy(place[rows]), torch.from_numpy(place[arrays["indices"]])] = torch.from_numpy(
            arrays["weights"]
        )
        probabilities = torch.from_numpy(arrays["probabilities"]).float()
    n_features, n_middle, n_tokens, n_logits = (int(count) for count in counts)
    # Errors and biases are treated alike by the peer's pruning: one layer of them stands for all.
    shape = UnifiedConfig(1, 1, 1, 1, 1, 1, "", "", "Gemma3ForCausalLM")
    graph = Graph(
        input_string="",
        input_tokens=torch.zeros(n_tokens, dtype=torch.long),
        active_features=torch.zeros(n_features, 3, dtype=torch.long),
        adjacency_matrix=dense,
        cfg=shape,
        selected_features=torch.arange(n_features),
        activation_values=torch.ones(n_features),
        logit_targets=[None] * n_logits,
        logit_probabilities=probabilities,
        scan="random",
        vocab_size=1,
    )
    del rows, place

    def run(scores=False):
        with measured() as found:
            kept = prune_graph(graph)
            if scores:
                compute_graph_scores(graph)
        return found | {"kept_nodes": int(kept.node_mask.sum()), "kept_edges": int(kept.edge_mask.sum())}

    return run


def main():
    logging.disable(logging.WARNING)
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    run = pruning(folder) if (folder / "graph.npz").exists() else attribution(folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
