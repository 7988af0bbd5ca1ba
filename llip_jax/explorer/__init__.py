"""A local page that shows a model at work: scores and maps of captions, zero-shot guesses."""
