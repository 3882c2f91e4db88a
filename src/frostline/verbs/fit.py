"""Cached training: run the frozen part once over the data, train the rest, get the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import GeneratorType
from typing import Any

import numpy as np

from frostline.adapters import adapter_of
from frostline.atomic import atomically
from frostline.cache import FeatureCache, Through, cache_features
from frostline.cache.files import sha256
from frostline.cache.shards import Tensor, sample_digests
from frostline.data.arrays import leaves, map_leaves
from frostline.data.batch import Batch
from frostline.data.batches import is_reiterable
from frostline.graph.mincut import NothingToStoreError
from frostline.types import Array, DataError, FrostlineError, ModelError
from frostline.types.arguments import checked, require, shown, unreadable
from frostline.types.reasons import first_line, warn
from frostline.verbs.split import Split, split

#: Arguments of ``Model.fit`` beside the data, with Keras' defaults.
_KERAS_ARGUMENTS = {
    "batch_size": None,
    "epochs": 1,
    "verbose": "auto",
    "callbacks": None,
    "validation_split": 0.0,
    "validation_data": None,
    "shuffle": True,
    "class_weight": None,
    "sample_weight": None,
    "initial_epoch": 0,
    "steps_per_epoch": None,
    "validation_steps": None,
    "validation_batch_size": None,
    "validation_freq": 1,
}

#: See :func:`trained`.
Follow = Callable[[Callable[[Any], Callable[[Array], Any]]], Any]


@dataclass(frozen=True, kw_only=True)
class Caching:
    """With what features are computed and kept; each field but one is an argument of :func:`fit`.

    Attributes:
        required: Refuse a model that cannot be cut, instead of training it plainly.
    """

    cache: FeatureCache | str | os.PathLike[str] | None = None
    engine: str = "auto"
    precision: str = "float32"
    views: int = 1
    augment: Any = None
    augment_name: str | None = None
    dtype: str = "float32"
    max_gb: float | None = None
    seed: int = 0
    thaw_later: Any = None
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How features are made and kept.

    Attributes:
        parts: Prefix and suffix.
        path: Cache folder, or ``None`` for the default one.
        engine: What runs the prefix.
        views: Augmented views of the training data.
        augment: Their augmentation.
        inference: What stands in its place for validation data; ``None``: nothing.
        options: Further arguments of :func:`frostline.cache_features`.
        earlier: Prefix up to an earlier frontier, whose features are kept on the way.
        rest: Model from there to the frontier.
    """

    parts: Split
    path: Any
    engine: str
    views: int
    augment: Any
    options: dict[str, Any]
    inference: Any = None
    earlier: Any = None
    rest: Any = None


@checked
def fit(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    cache: FeatureCache | str | os.PathLike[str] | None = None,
    engine: str = "auto",
    precision: str = "float32",
    views: int = 1,
    augment: Any = None,
    augment_name: str | None = None,
    dtype: str = "float32",
    max_gb: float | None = None,
    seed: int = 0,
    thaw_later: Any = None,
    **as_keras_fit: Any,
) -> Any:
    """Train like ``model.fit``, with the frozen part of the model computed only once.

    The frozen part (the prefix, see :func:`frostline.split`) runs once over training and validation
    data; its output is kept on disk, and every epoch trains the rest of the model on it. Weights,
    history, optimizer, metrics and callbacks are the model's own, and with the same random seed the
    outcome is that of ``model.fit`` up to rounding: batches are shuffled by Keras itself.

    A model may begin with random layers (``RandomFlip``, ``RandomRotation``, ...): they are taken
    for the augmentation of the data. With ``views=8`` eight views of every sample, drawn by these
    layers with seeds of their own, are computed once; validation data pass through the layers as at
    inference. The model is left as it is.

    Args:
        model: A compiled Keras model that :func:`frostline.split` can cut, part of it frozen.
        x: As in ``model.fit``: arrays, a ``tf.data.Dataset``, a ``PyDataset``, a torch
            ``DataLoader``; or a torch ``Dataset``, or a list of ``(x, y)`` batches.
        y: As in ``model.fit``.
        cache: Folder of the feature cache, or a cache made by :func:`frostline.cache_features`,
            whose folder is used; ``None``: ``FROSTLINE_CACHE_DIR``, or the user's cache folder.
        engine: What runs the frozen part: ``"native"`` is Keras itself; ``"auto"`` the fastest of
            native, ONNX Runtime and OpenVINO that is installed and agrees with native to 1e-4.
        precision: What the frozen part is computed in: ``"float32"``, as the model does, or
            ``"bfloat16"``, which processors with AMX or AVX512-BF16 compute faster, by OpenVINO or
            by torch; the rest of the model trains in its own. How far that is from float32 on a few
            samples is shown, and stands in ``history.params["precision_error"]``.
        views: Augmented views per sample; epoch e trains on view ``e % views``. At least 2 for a
            model that begins with random layers.
        augment: ``(x, seed) -> x`` on numpy batches, or a Keras layer; training data only.
        augment_name: Name of the augmentation, where it cannot be read off.
        dtype: How features are stored; ``"float16"`` and ``"bfloat16"`` halve the disk and round.
        max_gb: Largest size of the cache folder.
        seed: Of the augmentation.
        thaw_later: ``since`` of the :func:`frostline.unfreeze` that will come before the next call,
            for example ``140`` while only the head trains. Features of that frontier are computed
            first and kept, and those of this call from them: the next call on the same data, with
            the same arguments for the cache, finds its own and needs no pass. Disk for both.
        **as_keras_fit: All arguments of ``Model.fit``.

    Returns:
        The ``History`` of ``model.fit``.

    Raises:
        ModelError: Not compiled; everything frozen; a frozen part that is not pure; a model that
            begins with random layers, without ``views``; a callback that thaws or changes the
            frozen part while it is cached.
        DataError: Data that can be read only once with ``views`` > 1; data whose samples change
            from epoch to epoch (augmentation in the data set: use ``views`` and ``augment``).
        OutputError: No room for the features.

    Warns:
        UserWarning: Nothing is frozen, nothing of it is worth storing, or the data are a generator:
            plain ``model.fit`` runs. Or ``thaw_later`` cannot be heeded.
    """
    how = Caching(
        cache=cache, engine=engine, precision=precision, views=views, augment=augment,
        augment_name=augment_name, dtype=dtype, max_gb=max_gb, seed=seed, thaw_later=thaw_later,
    )  # fmt: skip
    return trained(model, x, y, arguments_of(**as_keras_fit), how)


def trained(
    model: Any,
    x: Any,
    y: Any,
    arguments: dict[str, Any],
    how: Caching,
    follow: Follow | None = None,
) -> Any:
    """As :func:`fit`, with all of Keras' arguments, and with a callback that knows the features.

    Args:
        model: See :func:`fit`.
        x: Likewise.
        y: Likewise.
        arguments: All arguments of ``Model.fit`` but the data.
        how: The other arguments of :func:`fit`.
        follow: Makes a callback: it gets a function that turns validation inputs, as an array,
            into a function from rows to what the model takes for them while it trains.
    """
    adapter = adapter_of(model)
    if adapter.train is None:
        raise ModelError(
            "fl.fit runs Keras' own fit, and the training loop of a torch module is yours: "
            "parts = fl.split(model), data = fl.cache_features(parts.prefix, dataset), then train "
            f"parts.suffix on a DataLoader over data. Received: {type(model).__name__}"
        )
    ready = partial(_prepared, adapter.train, model, x, y, arguments, how, follow)
    return atomically(adapter.snapshot(), ready)()


def _prepared(
    role: Any,
    model: Any,
    x: Any,
    y: Any,
    arguments: dict[str, Any],
    how: Caching,
    follow: Follow | None,
) -> Callable[[], Any]:
    """Cut the model and compute its features; what comes back trains."""
    _require_trainable(model)
    if how.views > 1 and not is_reiterable(x):
        raise DataError(
            f"views={how.views} reads the data more than once, and a generator can be read only "
            f"once: pass arrays or a data set. Received: {type(x).__name__}"
        )
    if y is not None and hasattr(x, "__next__"):
        raise DataError(
            "y must be None where x is a generator, which yields (x, y). "
            f"Received: x={shown(x)}, y={shown(y)}"
        )
    x = _as_loader(role, x, y, arguments)
    parts, peeled, reason = _parts(role, model, x, arguments, how)
    if parts is None:
        if how.views > 1 or how.augment is not None:
            raise ModelError(f"views and augment need a cache, and there is none: {reason}")
        warn(f"fl.fit runs plain model.fit: {reason}")
        if follow is not None:
            after = follow(lambda held: lambda rows: map_leaves(lambda leaf: leaf[rows], held))
            arguments["callbacks"] = role.with_callback(arguments["callbacks"], after)
        generators = _Generators()
        held = generators.told(arguments["validation_data"], "validation_data")
        given = generators.told(x, "x")
        return partial(
            generators.run, partial(model.fit, given, y, **{**arguments, "validation_data": held})
        )
    loss = getattr(model, "loss", None)
    if y is None and role.is_arrays(x, None, None) and (isinstance(loss, str) or callable(loss)):
        raise DataError(
            f"y must be the labels that the model's loss compares with. Received: y={shown(y)}"
        )
    inference = None
    if peeled is not None:
        if how.augment is not None:
            raise ModelError(
                "the model begins with augmentation of its own, which is cached with views=; a "
                "second one cannot be put before it: leave augment= out, or take the layers out of "
                f"the model. Received: augment={how.augment!r}"
            )
        how, inference = replace(how, augment=peeled), role.AtInference(peeled)
    if how.thaw_later is not None and (how.augment is not None or how.dtype != "float32"):
        raise DataError(
            "thaw_later computes features from features, which must be exact and not augmented: "
            f"leave it out. Received: augment={how.augment!r}, dtype={how.dtype!r}"
        )
    kept = ("augment_name", "dtype", "max_gb", "precision", "seed")
    options = {name: getattr(how, name) for name in kept} | {"verbose": arguments["verbose"]}
    with role.randomness_kept():
        earlier, rest = _on_the_way(role, model, parts, arguments, how.thaw_later)
        plan = _Plan(
            parts=parts,
            earlier=earlier,
            rest=rest,
            path=how.cache.path if isinstance(how.cache, FeatureCache) else how.cache,
            engine=how.engine,
            views=how.views,
            augment=how.augment,
            inference=inference,
            options=options,
        )
        guard = role.Guard(plan.parts.prefix, arguments["callbacks"])
        train, validation, whole = _adapters(role, plan, x, y, arguments, guard)
    if follow is not None:

        def features(held: Any) -> Callable[[Array], Any]:
            found = _cached(role, _without_views(plan), held, "validation data")
            return lambda rows: dict(zip(train.keys, found.rows(rows), strict=True))

        arguments["callbacks"] = role.with_callback(arguments["callbacks"], follow(features))
    return partial(_train, model, role, plan, train, validation, arguments, guard, whole)


class _Generators:
    """Generators that say which argument they are where they raise, whoever reads them.

    TensorFlow reads them in a thread of its own and raises an error of its own instead.
    """

    def __init__(self) -> None:
        self.raised: tuple[Exception, Exception] | None = None

    def told(self, data: Any, name: str) -> Any:
        """Data as they are, and a generator as one that says what it raised."""
        return self._read(data, name) if isinstance(data, GeneratorType) else data

    def _read(self, data: Any, name: str) -> Iterator[Any]:
        try:
            yield from data
        except Exception as error:
            self.raised = unreadable(data, name, error), error
            raise self.raised[0] from error

    def run(self, fit: Callable[[], Any]) -> Any:
        """Run what reads them; what a generator raised comes out, with its cause."""
        try:
            return fit()
        except Exception:
            if self.raised is None:
                raise
            problem, cause = self.raised
            raise problem from cause


def _as_loader(role: Any, x: Any, y: Any, arguments: dict[str, Any]) -> Any:
    """Data that the other verbs take and Keras does not, as what Keras takes."""
    if y is not None:
        return x
    return role.as_loader(x, arguments["batch_size"], arguments["shuffle"])


def _parts(
    role: Any, model: Any, x: Any, arguments: dict[str, Any], how: Caching
) -> tuple[Split | None, Any, str | None]:
    """Prefix and suffix, and the augmentation before them; or why plain ``fit`` has to run.

    What a callback will thaw counts as thawed from the start: it is in the suffix, frozen as ever
    until it is due.
    """
    places = role.to_be_thawed(model, arguments["callbacks"])
    with role.randomness_kept(), role.as_thawed(model, places):
        reason = role.why_plain(model, x, arguments["validation_data"])
        if reason is not None:
            return None, None, reason
        peeled = role.peel(model)
        if peeled is not None and how.views < 2:
            raise ModelError(
                f"the model begins with random layers ({role.random_layers(peeled[0])}), so what "
                "its frozen part computes differs from epoch to epoch, and one pass over the data "
                "does not hold it. Write fl.fit(..., views=8): eight augmented views of every "
                "sample are computed once, and epoch e trains on view e % 8; or model.fit for a "
                f"new view in every epoch. Received: views={how.views}"
            )
        augmentation, rest = (None, model) if peeled is None else peeled
        try:
            return split(rest), augmentation, None
        except ModelError as problem:
            if places:
                why = f"a callback will thaw too much of the model to cache the rest: {problem}"
            elif how.required and not isinstance(problem, NothingToStoreError):
                raise
            else:
                why = str(problem)
            return None, None, why


def _on_the_way(
    role: Any, model: Any, parts: Split, arguments: dict[str, Any], since: Any
) -> tuple[Any, Any]:
    """Prefix of the cut that comes once ``since`` is thawed, and what lies from there to this cut.

    Both are cut by the rules of every cut; ``(None, None)`` where there is nothing to share.
    """
    if since is None:
        return None, None
    places = role.to_be_thawed(model, arguments["callbacks"])
    behind = role.behind(model, since)
    try:
        with role.as_thawed(model, [*places, *behind]):
            later = split(model)
        if later.frontier == parts.frontier:
            return None, None
        with role.as_thawed(model, places):
            rest = split(later.suffix)
    except ModelError as problem:
        reason = str(problem)
    else:
        if rest.frontier == parts.frontier:
            return later.prefix, rest.prefix
        reason = "what it leaves frozen does not lead to the frontier of this call"
    warn(f"thaw_later={since!r} is not heeded: {reason}")
    return None, None


def arguments_of(**given: Any) -> dict[str, Any]:
    """All arguments of ``Model.fit`` but the data: those given, and Keras' defaults."""
    unknown = sorted(set(given) - set(_KERAS_ARGUMENTS))
    if unknown:
        raise DataError(
            f"fit takes the arguments of keras.Model.fit ({', '.join(_KERAS_ARGUMENTS)}) and its "
            f"own, and no other. Received: {unknown[0]}={shown(given[unknown[0]])}"
        )
    for name, value in given.items():
        none = name == "epochs" and type(value) is int and value == 0  # Keras trains for none, too
        if value is not _KERAS_ARGUMENTS[name] and not none:
            require(name, value)
    return {**_KERAS_ARGUMENTS, **given}


def _require_trainable(model: Any) -> None:
    if not getattr(model, "compiled", False):
        raise ModelError(
            "the model is not compiled: call model.compile(optimizer, loss, ...) first."
        )
    if not model.trainable_variables:
        raise ModelError(
            "everything in the model is frozen, so there is nothing to train: thaw its last "
            "layers, for example with fl.unfreeze(model, since=...), and compile it again."
        )


def _adapters(
    role: Any, plan: _Plan, x: Any, y: Any, arguments: dict[str, Any], guard: Any
) -> tuple[Any, Any, FeatureCache]:
    """Cache the features of both data sets; what Keras draws its batches from, and the features."""
    weight = arguments["sample_weight"]
    rows: Any = None
    held: Any = None
    validation = arguments["validation_data"]
    if role.is_arrays(x, y, weight):
        whole = _cached(role, plan, x, "training data")
        rows = np.arange(len(whole))
        if arguments["validation_split"] and validation is None:
            if plan.augment is None and plan.views == 1:
                plain = whole
            else:
                plain = _cached(role, _without_views(plan), x, "validation data")
            (rows, y, weight), held = role.split_off(rows, y, weight, arguments["validation_split"])
        fetch = _by_row(whole, guard)
    else:
        if arguments["validation_split"] and validation is None:
            raise DataError(
                "validation_split needs arrays, as in model.fit; pass validation_data instead. "
                f"Received: {type(x).__name__}"
            )
        whole = _cached(role, plan, x, "training data")
        fetch = _by_content(whole, guard, role.as_trained)
    train = _adapter(
        role,
        plan,
        whole,
        fetch,
        (x if rows is None else rows, y, weight),
        batch_size=arguments["batch_size"],
        steps=arguments["steps_per_epoch"],
        shuffle=arguments["shuffle"],
        class_weight=arguments["class_weight"],
    )
    size = arguments["validation_batch_size"] or arguments["batch_size"]
    ways = {"batch_size": size, "steps": arguments["validation_steps"]}
    if held is not None:
        return train, _adapter(role, plan, plain, _by_row(plain, None), held, **ways), whole
    if validation is None:
        return train, None, whole
    return train, _validation(role, _without_views(plan), validation, ways), whole


def _without_views(plan: _Plan) -> _Plan:
    name = None if plan.inference is None else plan.inference.name
    options = {**plan.options, "augment_name": name}
    return replace(plan, views=1, augment=plan.inference, options=options)


def _validation(role: Any, plan: _Plan, data: Any, ways: dict[str, Any]) -> Any:
    x, y, weight = role.unpack(data)
    cached = _cached(role, plan, x, "validation data")
    if role.is_arrays(x, y, weight):
        given = (np.arange(len(cached)), y, weight)
        return _adapter(role, plan, cached, _by_row(cached, None), given, **ways)
    fetch = _by_content(cached, None, role.as_trained)
    return _adapter(role, plan, cached, fetch, (x, y, weight), **ways)


def _cached(role: Any, plan: _Plan, x: Any, title: str) -> FeatureCache:
    """Features of ``x``, in the form in which Keras would hand it to the model."""
    arrays = role.is_arrays(x, None, None)
    data = Batch(x) if arrays else _Stream(role.untouched(x), role)
    ways = {"engine": plan.engine, **plan.options}
    through = None
    if plan.earlier is not None:
        at_first = f"frozen part of the next call, {title}"
        earlier = cache_features(plan.earlier, data, plan.path, title=at_first, **ways)
        through = Through(cache=earlier, rest=plan.rest)
    try:
        return cache_features(
            plan.parts.prefix,
            data,
            plan.path,
            views=plan.views,
            augment=plan.augment,
            title=f"frozen part, {title}",
            through=through,
            **ways,
        )
    except FrostlineError:
        raise
    except ValueError as error:
        raise DataError(
            f"the frozen part does not take the {title}: {first_line(error)} Pass them as "
            f"model.fit takes them. Received: {type(x).__name__}"
        ) from error


class _Stream:
    """A data set of batches; only inputs, in the dtype that Keras trains on."""

    def __init__(self, data: Any, role: Any) -> None:
        self.data = data
        self.role = role
        if hasattr(data, "cardinality"):
            self.cardinality = data.cardinality
        if hasattr(data, "dataset"):
            self.dataset = data.dataset

    def __iter__(self) -> Any:
        from frostline.data.batches import batches

        return (Batch(self.role.as_trained(batch.x)) for batch in batches(self.data))

    def __len__(self) -> int:
        return len(self.data)


def _by_row(cached: FeatureCache, guard: Any) -> Callable[[Any], Sequence[Array]]:
    """Features by row number, in the view of the epoch."""

    def fetch(x: Any) -> Sequence[Array]:
        return cached.rows(_as_numpy(x), view=_view(cached, guard))

    return fetch


def _by_content(
    cached: FeatureCache, guard: Any, as_trained: Callable[[Any], Any]
) -> Callable[[Any], Sequence[Array]]:
    """Features of samples that a data set hands out in whatever order."""
    rows = {digest.tobytes(): row for row, digest in enumerate(cached.views[0].digests())}

    def fetch(x: Any) -> Sequence[Array]:
        digests = sample_digests(leaves(as_trained(x)))
        found = [rows.get(digest.tobytes()) for digest in digests]
        if None in found:
            raise DataError(
                f"sample {found.index(None)} of a batch is none of the {len(cached)} that the data "
                "set had when it was read first: its samples change from epoch to epoch, so their "
                "features cannot be kept. Take the augmentation out of the data set and pass it "
                "as fl.fit(..., views=8, augment=...)."
            )
        return cached.rows(found, view=_view(cached, guard))

    return fetch


def _view(cached: FeatureCache, guard: Any) -> int:
    return 0 if guard is None else int(guard.epoch) % len(cached.views)


def _as_numpy(x: Any) -> Array:
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def _adapter(
    role: Any, plan: _Plan, cached: FeatureCache, fetch: Any, data: Any, **ways: Any
) -> Any:
    x, y, weight = data
    try:
        inner = role.adapter(x, y, weight, **ways)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise DataError(f"Keras does not take these data: {said:.300}") from error
    shapes = [(tensor.shape, _read_dtype(tensor)) for tensor in cached.tensors]
    crossing = sha256(*(crossing.path for crossing in plan.parts.frontier))[:16]
    return role.FeatureAdapter(inner, fetch, shapes, crossing)


def _read_dtype(tensor: Tensor) -> str:
    """Dtype in which a tensor of the frontier is read back."""
    return "float32" if tensor.dtype in ("float16", "bfloat16") else tensor.dtype


def _train(
    model: Any,
    role: Any,
    plan: _Plan,
    train: Any,
    validation: Any,
    arguments: dict[str, Any],
    guard: Any,
    features: FeatureCache,
) -> Any:
    """Run the model's own ``fit`` on features."""
    taken = ("batch_size", "shuffle", "class_weight", "sample_weight", "validation_split")
    left = {name: value for name, value in arguments.items() if name not in taken}
    left["validation_data"] = None if validation is None else (validation,)
    # Keras sizes validation batches with its own adapter; ours has done so already.
    left["callbacks"] = role.with_callback(arguments["callbacks"], guard)
    given = arguments["callbacks"]
    try:
        with (
            role.features_accepted(model, plan.parts.suffix, train.keys),
            role.frozen_gradients_missing(plan.parts.prefix),
        ):
            history = role.plain_fit(model, train, **left)
    except Exception as error:
        problem = train.problem or (validation.problem if validation is not None else None)
        if problem is not None and problem is not error:
            raise problem from error
        raise
    finally:
        role.without_callback(given, guard)
    if features.precision != "float32":
        history.params |= {"precision": features.precision, "precision_error": features.error}
    return history
