"""The nouns of Frostline: frozen dataclasses and errors. No behaviour, no framework.

What a person prints or saves (``PhaseTable``, ``Report``) hands itself to ``report/`` for that;
these imports are the only ones that lead out of this room, and happen on use.
"""

from frostline.types.arrays import Array as Array, as_float64 as as_float64
from frostline.types.errors import (
    BackendError as BackendError,
    DataError as DataError,
    FrostlineError as FrostlineError,
    ModelError as ModelError,
    OutputError as OutputError,
)
from frostline.types.findings import (
    Certainty as Certainty,
    Finding as Finding,
    Severity as Severity,
    Skipped as Skipped,
)
from frostline.types.phases import PhaseRow as PhaseRow, PhaseTable as PhaseTable
from frostline.types.sites import (
    Boundary as Boundary,
    Crossing as Crossing,
    Policy as Policy,
    Site as Site,
)
