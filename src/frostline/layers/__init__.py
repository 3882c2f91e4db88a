"""The Keras layer whose ``trainable`` is part of the computation; `normalization` says how."""

from frostline.layers.adoption import adopt, dismiss
from frostline.layers.normalization import BatchNormalization

__all__ = ["BatchNormalization", "adopt", "dismiss"]
