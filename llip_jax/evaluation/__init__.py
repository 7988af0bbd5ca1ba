"""Scorers, classification and retrieval."""
