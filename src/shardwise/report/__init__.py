"""Nouns -> terminal tables, JSON and one HTML file. Computes nothing: statistics and verdicts come ready in
the noun. No torch."""
