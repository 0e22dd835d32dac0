"""Scoring rules: how an answer is chosen and counted."""
