"""One module per task with its settings in `settings`: a one-line docstring and `run(cfg, context) -> flat metrics`.

The only place that wires the other packages together; tasks never import each other. A task's module is imported when
it runs: composing a configuration needs `settings` alone, which is free of torch.
"""
