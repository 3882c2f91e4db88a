"""Statistics, averages, shares: pure numpy."""
