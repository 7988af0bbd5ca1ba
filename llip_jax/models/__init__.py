"""Towers, poolers and the dual encoder."""
