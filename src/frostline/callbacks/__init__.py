"""Keras callbacks: watch BN during ``fit``, keep its statistics right, thaw without compiling.

``frostline.callbacks.X`` goes into ``model.fit(callbacks=[...])`` on every backend. Keras calls
callbacks in their order in that list: one that writes into ``logs`` comes before those that read
them, and one that changes the model before those that save it.
"""

from frostline.callbacks.monitor import BatchNormMonitor
from frostline.callbacks.statistics import KeepFrozen, Recalibrate
from frostline.callbacks.thawing import GradualUnfreeze

__all__ = ["BatchNormMonitor", "GradualUnfreeze", "KeepFrozen", "Recalibrate"]
