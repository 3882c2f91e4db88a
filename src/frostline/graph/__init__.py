"""Algorithms on graphs and addresses of layers. Pure Python and numpy."""
