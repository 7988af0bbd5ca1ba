"""Loss terms over pair scores and tower outputs."""
