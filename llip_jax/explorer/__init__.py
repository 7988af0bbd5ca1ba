"""A local page that shows a model at work: scores of captions, what each makes it look at, zero-shot guesses."""
