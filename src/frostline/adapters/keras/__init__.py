"""Keras 3 models: everything that Frostline asks of them and does to them."""
