"""Freeze and thaw every network of timm that has BN."""
