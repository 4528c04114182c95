"""The search and the trials of cross_modal for several sets of concepts."""

from vlmscope.tasks.experiment import own_analysis

declare = own_analysis("cross_modal").declare
