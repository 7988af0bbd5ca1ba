"""One pass of a model over a set, and all that is computed from it: tasks, intervals, diagnostics, exhibits."""
