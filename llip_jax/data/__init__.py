"""Records, sources, captions, images, tokenizers and the input pipeline. Never imports jax."""
