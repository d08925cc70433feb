"""Make trained neural networks small enough, and quick enough to load, for the web."""
