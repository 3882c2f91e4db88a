"""Native torch modules: everything that Frostline asks of them and does to them."""
