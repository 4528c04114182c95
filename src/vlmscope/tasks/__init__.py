"""One module per task: a one-line docstring, a `Config` dataclass and `run(cfg, context) -> flat metrics`.

The only place that wires the other packages together; tasks never import each other. All task modules are imported to
compose any configuration, so heavy imports (torch, transformers) are inside functions.
"""
