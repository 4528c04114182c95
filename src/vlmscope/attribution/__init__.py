"""Attribution graphs: edges by an explicit linear adjoint, influence, pruning, scores, files and export."""
