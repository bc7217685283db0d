"""Evaluation on public benchmarks: their images for the official scorers, and scores by questions."""
