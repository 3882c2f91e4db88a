"""Statistics of replicas, or of federated clients, merged exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frostline.adapters import Adapter, adapter_of, store
from frostline.atomic import atomically, undone
from frostline.data import files
from frostline.data.arrays import to_numpy
from frostline.numerics.mixture import mixture, shares
from frostline.numerics.stats import normals_apart
from frostline.types import BackendError, DataError, ModelError
from frostline.types.arguments import checked
from frostline.verbs.edit import Change, undoing

#: Last part of a mean's name -> that of its variance.
PAIRS = {"running_mean": "running_var", "moving_mean": "moving_variance"}
COUNTER = "num_batches_tracked"

_KERAS_FILES = (".keras", ".h5")
_STATE_FILES = (".pt", ".pth", ".safetensors")


class MergedStatistics(dict[str, Any]):
    """Name -> merged statistic, under the names and in the types of the first source.

    For torch, ``model.load_state_dict(merged, strict=False)`` loads it; :meth:`load_into` fills a
    model of either framework.

    Attributes:
        shares: Share of each source, adding up to 1.
        apart: Site -> how far the source farthest from the merged statistics is from them, in
            standard deviations: the median over channels.
    """

    def __init__(
        self, values: Mapping[str, Any], shares: tuple[float, ...], apart: Mapping[str, float]
    ) -> None:
        super().__init__(values)
        self.shares = shares
        self.apart = dict(apart)

    def load_into(self, model: Any) -> Change:
        """Store the merged statistics in a model, in place.

        Returns:
            A change; ``undo()`` puts the old statistics back.

        Raises:
            ModelError: The model lacks one of the sites, or has it with other channels. It is
                unchanged then.
        """
        adapter = adapter_of(model)
        return atomically(adapter.snapshot(), lambda: self._stored_in(adapter))

    def _stored_in(self, adapter: Adapter) -> Change:
        known = {site.path: site for site in adapter.sites()}
        # A model that is nothing but one BN layer has no name for it in its state.
        found = {path or next(iter(known), ""): names for path, names in _sites(self).items()}
        for path, (mean, _) in found.items():
            channels = known[path].channels if path in known else 0
            if channels != len(self[mean]):
                what = f"has {channels} channels" if path in known else "is not in this model"
                raise ModelError(
                    f"'{path}' {what}: the statistics do not fit. Received: {len(self[mean])} "
                    "channels"
                )
        meter = adapter.meter(list(found))
        undo = meter.snapshot()
        for path, (mean, variance) in found.items():
            meter.store(path, to_numpy(self[mean]), to_numpy(self[variance]))
        return Change(verb="merge_statistics", text=self.text(), _undo=undoing(adapter, undo))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the statistics by name as ``.safetensors``: a sidecar to a file with weights.

        ``merge_statistics([model]).save(path)`` keeps those of one model, and
        ``merge_statistics([path]).load_into(model)`` puts them back.

        Raises:
            OutputError: Another ending, or a file that cannot be written; nothing is left behind.
            BackendError: safetensors is not installed.
        """
        try:
            from safetensors.numpy import save
        except ImportError as error:
            raise BackendError("a sidecar needs safetensors: pip install safetensors") from error
        target = Path(path)
        files.check_output(target, (".safetensors",), "a sidecar", force=overwrite)
        # An array of shape () is no tensor for its writer.
        arrays = {name: np.atleast_1d(to_numpy(value)) for name, value in self.items()}
        plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        return files.write(target, memoryview(save(plain)))

    def text(self) -> str:
        """What was merged, in numbers, in one sentence."""
        worst = max(self.apart, key=lambda path: self.apart[path])
        sites = "1 site" if len(self.apart) == 1 else f"{len(self.apart)} sites"
        return (
            f"merged the statistics of {sites} from {len(self.shares)} replicas: the farthest was "
            f"{self.apart[worst]:.3g} standard deviations off at '{worst}'"
        )


@checked
def merge_statistics(
    models_or_states: Sequence[Any], weights: Sequence[float] | None = None
) -> MergedStatistics:
    """Merge the stored BN statistics of replicas or of federated clients into one set.

    Each source stands for a population with a mean and a variance; what comes back are those of all
    of them together, in float64::

        mean = Σ wᵢ meanᵢ        variance = Σ wᵢ (varianceᵢ + (meanᵢ − mean)²)

    An average of the variances alone, which is what timm's ``distribute_bn`` and most federated
    code take, leaves out the second term: how far the replicas are apart. The outcome is exact for
    statistics that one and the same network saw on different data. Where the parameters differ
    too, merge those first and recalibrate: merged statistics are those of no network then.

    The variance that a torch layer keeps in training is an average of unbiased ones, n/(n − 1) as
    large as that of the batch. It is merged as it is stored: what comes back is the same kind of
    number, and where all agree it is what all have.

    Args:
        models_or_states: Two or more, each a torch module, a ``state_dict``, a Keras model, or the
            path of a ``.pt``, ``.pth``, ``.safetensors``, ``.keras`` or ``.h5`` file. Nothing in a
            file is executed. None of the models changes.
        weights: One number per source, for example its samples; need not add up to 1. Equal by
            default. ``num_batches_tracked`` is not used: it counts steps and not samples, and an
            average with a fixed momentum rests on the last few of them however many there were.

    Returns:
        A dict of the statistics alone, under the names and with the types of the first source;
        ``num_batches_tracked`` is the largest. Load it with ``load_into(model)``, or in torch with
        ``model.load_state_dict(merged, strict=False)``.

    Raises:
        ModelError: No source; one without BN statistics; names or shapes that differ, or statistics
            that are not finite, each named; a file that cannot be read.
        DataError: Weights that cannot be used.

    Example:
        >>> a = {"bn.running_mean": np.zeros(1), "bn.running_var": np.ones(1)}
        >>> b = {"bn.running_mean": np.full(1, 2.0), "bn.running_var": np.ones(1)}
        >>> {name: value.tolist() for name, value in merge_statistics([a, b]).items()}
        {'bn.running_mean': [1.0], 'bn.running_var': [2.0]}
    """
    if isinstance(models_or_states, (str, os.PathLike, Mapping)) or not len(models_or_states):
        raise ModelError(
            "merge_statistics takes a list of models, state_dicts or files. "
            f"Received: {type(models_or_states).__name__}"
        )

    def merged() -> MergedStatistics:
        return merged_states([read_state(source) for source in models_or_states], weights)

    # No model changes; a framework's modes, which reading one goes through, are put back.
    models = [s for s in models_or_states if not isinstance(s, (str, os.PathLike, Mapping))]
    around = [adapter_of(model).surroundings() for model in models]
    return atomically(lambda: undone(*around), merged)


def merged_states(
    states: Sequence[Mapping[str, Any]], weights: Sequence[float] | None
) -> MergedStatistics:
    """See :func:`merge_statistics`; takes states that are read already."""
    share = shares(weights, len(states))
    sites = [_sites(state) for state in states]
    for number, found in enumerate(sites, 1):
        if not found:
            raise ModelError(f"number {number} of {len(states)} holds no BN statistics")
        odd = sorted(found.keys() ^ sites[0].keys())
        if odd:
            has, lacks = (number, 1) if odd[0] in found else (1, number)
            raise ModelError(
                f"not the same model: number {has} has statistics of '{odd[0]}', number {lacks} "
                f"has none{f' ({len(odd)} such sites)' if len(odd) > 1 else ''}"
            )
    values: dict[str, Any] = {}
    apart: dict[str, float] = {}
    for path, names in sites[0].items():
        pairs = [
            tuple(_array(state, name, number) for name in found[path])
            for number, (state, found) in enumerate(zip(states, sites, strict=True), 1)
        ]
        for number, pair in enumerate(pairs, 1):
            if [array.shape for array in pair] != [array.shape for array in pairs[0]]:
                raise ModelError(
                    f"not the same model: '{path}' has shape {pairs[0][0].shape} in number 1 and "
                    f"{pair[0].shape} in number {number}"
                )
            if (pair[1] < 0).any():
                raise ModelError(f"'{path}' of number {number} has a negative variance")
        mean, variance = mixture([m for m, _ in pairs], [v for _, v in pairs], share)
        apart[path] = max(normals_apart((m, v + 1e-12), (mean, variance + 1e-12)) for m, v in pairs)
        for name, value in zip(names, (mean, variance), strict=True):
            values[name] = _like(states[0][name], value)
        counter = names[0].removesuffix("running_mean") + COUNTER
        counts = [state[counter] for state in states if counter in state]
        if counts and counter in states[0]:
            values[counter] = max(counts, key=int)
    return MergedStatistics(values, tuple(float(fraction) for fraction in share), apart)


def read_state(source: Any) -> Mapping[str, Any]:
    """Name -> value of a model, a state or a file; of a Keras model the statistics alone."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".safetensors" and (held := _sidecar(path)) is not None:
            return held
        if path.suffix in _KERAS_FILES:
            return read_state(store("keras").load_model(str(path)))
        if path.suffix in _STATE_FILES:
            state: Mapping[str, Any] = store("torch").read_state_file(path)
            return state
        raise ModelError(
            f"statistics are read from {', '.join((*_STATE_FILES, *_KERAS_FILES))}. "
            f"Received: {path}"
        )
    adapter = adapter_of(source)
    if adapter.saved_as == "state":
        own: Mapping[str, Any] = store(adapter.framework).state_of(source)
        return own
    found: dict[str, Any] = {}
    for facts in adapter.facts():
        if facts.mean is not None and facts.variance is not None:
            found[f"{facts.site.path}/moving_mean"] = facts.mean
            found[f"{facts.site.path}/moving_variance"] = facts.variance
    return found


def _sidecar(path: Path) -> Mapping[str, Any] | None:
    """What :meth:`MergedStatistics.save` wrote of a Keras model; ``None``: torch reads it."""
    try:
        from safetensors.numpy import load_file

        held: Mapping[str, Any] = load_file(path)
    except Exception:  # not installed, dtypes that numpy lacks, no such file: torch's reader tells
        return None
    return held if any(name.endswith("/moving_mean") for name in held) else None


def _sites(state: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Path -> names of its mean and its variance."""
    found: dict[str, tuple[str, str]] = {}
    for name in state:
        last = name.replace(".", "/").rpartition("/")[2]
        other = name[: len(name) - len(last)] + PAIRS.get(last, "")
        if last in PAIRS and other in state:
            path = name[: len(name) - len(last)].replace(".", "/").strip("/")
            found[path.removeprefix("module/")] = (name, other)
    return found


def _array(state: Mapping[str, Any], name: str, number: int) -> Any:
    try:
        array = to_numpy(state[name]).astype(np.float64)
    except (DataError, ValueError, TypeError) as error:
        raise ModelError(f"'{name}' of number {number} is no array of numbers: {error}") from None
    if not np.isfinite(array).all():
        raise ModelError(f"'{name}' of number {number} has NaN or infinite values")
    return array


def _like(template: Any, value: Any) -> Any:
    """The value as the template is: a tensor of torch of its dtype and device, or an array."""
    if hasattr(template, "new_tensor"):
        return template.detach().new_tensor(value)
    return value.astype(getattr(template, "dtype", None) or np.float64, copy=False)
