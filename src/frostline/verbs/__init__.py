"""What ``frostline`` exports: one file per verb."""
