"""Frostline: frozen Batch Normalization that is really frozen.

``import frostline`` loads numpy at most; a framework is loaded only by the model you pass. Every
public name is imported on first use.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which cannot see what __getattr__ finds
    from frostline import callbacks as callbacks, layers as layers
    from frostline.cache import cache_features as cache_features
    from frostline.cache.features import FeatureCache as FeatureCache
    from frostline.numerics.averages import suggest_momentum as suggest_momentum
    from frostline.types.comparison import Comparison as Comparison
    from frostline.types.errors import (
        BackendError as BackendError,
        DataError as DataError,
        FrostlineError as FrostlineError,
        ModelError as ModelError,
        OutputError as OutputError,
    )
    from frostline.types.findings import Finding as Finding
    from frostline.types.phases import PhaseTable as PhaseTable
    from frostline.types.report import Report as Report
    from frostline.types.sites import Boundary as Boundary, Crossing as Crossing, Site as Site
    from frostline.verbs.cached import cached as cached
    from frostline.verbs.compare import compare as compare
    from frostline.verbs.diagnose import (
        diagnose as diagnose,
        lint as lint,
        phases as phases,
        sites as sites,
    )
    from frostline.verbs.edit import (
        Change as Change,
        convert as convert,
        fold as fold,
        freeze as freeze,
        frozen as frozen,
        recalibrate as recalibrate,
        restore as restore,
        set_momentum as set_momentum,
        unfreeze as unfreeze,
    )
    from frostline.verbs.fit import fit as fit
    from frostline.verbs.merge_statistics import merge_statistics as merge_statistics
    from frostline.verbs.recalibrated import recalibrated as recalibrated
    from frostline.verbs.split import Split as Split, split as split
    from frostline.verbs.watch import (
        NotFrozenError as NotFrozenError,
        assert_frozen as assert_frozen,
        watch as watch,
    )

__version__ = _version("frostline")

#: Public name -> module that defines it. A name equal to the module's own name is the module.
_EXPORTS = {
    "BackendError": "types.errors",
    "Boundary": "types.sites",
    "Change": "verbs.edit",
    "Comparison": "types.comparison",
    "Crossing": "types.sites",
    "DataError": "types.errors",
    "FeatureCache": "cache.features",
    "Finding": "types.findings",
    "FrostlineError": "types.errors",
    "ModelError": "types.errors",
    "NotFrozenError": "verbs.watch",
    "OutputError": "types.errors",
    "PhaseTable": "types.phases",
    "Report": "types.report",
    "Site": "types.sites",
    "assert_frozen": "verbs.watch",
    "Split": "verbs.split",
    "cache_features": "cache",
    "cached": "verbs.cached",
    "callbacks": "callbacks",
    "compare": "verbs.compare",
    "convert": "verbs.edit",
    "diagnose": "verbs.diagnose",
    "fit": "verbs.fit",
    "fold": "verbs.edit",
    "freeze": "verbs.edit",
    "frozen": "verbs.edit",
    "layers": "layers",
    "lint": "verbs.diagnose",
    "phases": "verbs.diagnose",
    "merge_statistics": "verbs.merge_statistics",
    "recalibrate": "verbs.edit",
    "recalibrated": "verbs.recalibrated",
    "restore": "verbs.edit",
    "set_momentum": "verbs.edit",
    "sites": "verbs.diagnose",
    "split": "verbs.split",
    "suggest_momentum": "numerics.averages",
    "unfreeze": "verbs.edit",
    "watch": "verbs.watch",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'frostline' has no attribute {name!r}")
    module = importlib.import_module(f"frostline.{_EXPORTS[name]}")
    value = module if name == _EXPORTS[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
