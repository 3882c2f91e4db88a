"""The errors that Frostline raises on purpose.

A part that should be frozen and is not raises ``NotFrozenError``, an ``AssertionError`` that
``verbs/watch.py`` defines.
"""


class FrostlineError(Exception):
    """Root of every error that Frostline raises on purpose; its text is meant for people."""


class BackendError(FrostlineError, ImportError):
    """No usable framework is installed, or another one is needed."""


class ModelError(FrostlineError, ValueError):
    """The model cannot be used as asked: no BN layer, an unknown boundary, a bad file."""


class DataError(FrostlineError, ValueError):
    """The data cannot be used as asked: a missing file, a corrupt image, wrong shapes."""


class OutputError(FrostlineError, OSError):
    """A file or folder could not be written."""
