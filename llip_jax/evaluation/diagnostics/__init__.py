"""What an evaluation says of embeddings and mixtures beyond right and wrong: pure functions of arrays on the host."""
