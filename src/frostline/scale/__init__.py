"""More data than one process reads: features and statistics on Ray Data.

Ray carries the work: it reads, schedules, retries and moves blocks. Frostline brings the function
that runs on a worker and the merge of what the workers found. Needs ``pip install
"frostline[ray]"``; nothing of Ray is loaded before it is used.

Example:
    >>> dataset = ray.data.read_images(folder, size=(224, 224), include_paths=True)
    >>> cache = scale.cache_features(fl.split(model).prefix, dataset, "/shared/features")
    >>> scale.recalibrate(model, dataset, samples=10_000)
"""

from frostline.scale.cluster import connect
from frostline.scale.features import Features, cache_features
from frostline.scale.statistics import recalibrate

__all__ = ["Features", "cache_features", "connect", "recalibrate"]
