"""The workbench's server (docs/workbench.md): run folders, graphs, studies and jobs over HTTP, without torch."""
