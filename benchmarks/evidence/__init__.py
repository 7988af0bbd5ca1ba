"""The paper's ladder in small: what is run, how, and what is made of the results (benchmarks/ladder.py)."""
