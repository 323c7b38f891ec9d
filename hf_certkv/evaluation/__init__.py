"""Paired evaluation of dense, naive and certified caches, and what is made of its results: pages, figures, model cards."""
