"""Models, and the verbs that are interrupted on them; see ``inject.py``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import frostline as fl

#: What takes a verb back; ``None`` where nothing is left to take back.
Back = Callable[[], None] | None


@dataclass(frozen=True)
class Network:
    """A model in a state in which every verb has something to do.

    Attributes:
        model: A Keras model or a torch module.
        x: Inputs, 8 samples.
        y: Labels of 3 classes.
        cut: First layer that is not frozen.
        optimizer: Of a torch module, after a step.
        folder: For caches.
    """

    model: Any
    x: Any
    y: Any
    cut: Any
    optimizer: Any = None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="inject-")))

    def forward(self) -> Any:
        """Outputs at inference, as the user would ask for them."""
        if self.optimizer is None:
            return np.asarray(self.model.predict_on_batch(self.x))
        torch = sys.modules["torch"]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(torch.from_numpy(self.x)).numpy()
        for module, mode in modes:
            module.training = mode
        return outputs


def networks(framework: str, size: str) -> Network:
    """Build one.

    Args:
        framework: ``"torch"`` or ``"keras"``.
        size: ``"small"`` or ``"lite0"``: the shape of EfficientNet-Lite0, with random weights.
    """
    rng = np.random.default_rng(0)
    y = np.arange(8) % 3
    side = 8 if size == "small" else 32
    x = rng.normal(size=(8, side, side, 2 if size == "small" else 3)).astype("float32")
    if framework == "torch":
        return _torch_network(x.transpose(0, 3, 1, 2).copy(), y, size)
    return _keras_network(x, y, size)


def _torch_network(x: Any, y: Any, size: str) -> Network:
    import torch
    from torch import nn

    torch.manual_seed(0)
    if size == "small":
        model: Any = nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3)),
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 3),
        )  # fmt: skip
        cut: Any = "3"
    else:
        model, cut = _torch_lite0(), "pool"
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
    loss.backward()
    optimizer.step()
    next(model.children()).eval()  # modes that differ
    model.register_forward_hook(_seen)
    return Network(model, x, y, cut, optimizer)


def _seen(*_: Any) -> None:
    """A hook of the user's own, which must stay."""


def _torch_lite0() -> Any:
    from collections import OrderedDict

    from torch import nn

    def step(inside: int, outside: int, kernel: int, stride: int, groups: int = 1) -> list[Any]:
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outside, eps=1e-3), nn.ReLU6()]

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, inside: int, outside: int, kernel: int, stride: int, times: int) -> None:
            super().__init__()
            wide = inside * times
            first = step(inside, wide, 1, 1) if times > 1 else []
            last = step(wide, outside, 1, 1)[:2]
            self.body = nn.Sequential(*first, *step(wide, wide, kernel, stride, wide), *last)
            self.skip = stride == 1 and inside == outside

        def forward(self, x: Any) -> Any:
            return x + self.body(x) if self.skip else self.body(x)

    stages = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
              (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]  # fmt: skip
    blocks: list[Any] = []
    inside = 32
    for repeats, kernel, stride, times, outside in stages:
        for number in range(repeats):
            blocks.append(Block(inside, outside, kernel, 1 if number else stride, times))
            inside = outside
    parts = [("stem", nn.Sequential(*step(3, 32, 3, 2))), ("blocks", nn.Sequential(*blocks)),
             ("last", nn.Sequential(*step(320, 1280, 1, 1))), ("pool", nn.AdaptiveAvgPool2d(1)),
             ("flat", nn.Flatten()), ("head", nn.Linear(1280, 3))]  # fmt: skip
    return nn.Sequential(OrderedDict(parts))


def _keras_network(x: Any, y: Any, size: str) -> Network:
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    cut: Any
    if size == "small":
        inputs = keras.Input(x.shape[1:])
        inner_input = keras.Input((8, 8, 3))
        inner = keras.Model(inner_input, layers.BatchNormalization(name="inner_bn")(inner_input))
        z = layers.Conv2D(3, 1, name="conv")(inputs)
        z = inner(layers.BatchNormalization(name="bn", gamma_regularizer="l2")(z))
        z = layers.GlobalAveragePooling2D(name="pool")(layers.Dropout(0.3)(z))
        model, cut = keras.Model(inputs, layers.Dense(3, activation="softmax")(z)), "pool"
    else:
        from frostline.experiments import backbones

        model = backbones.build("efficientnet-lite0", image_size=32, weights=None, classes=3)
        cut = model.layers[-1].name
    model.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(x, y, batch_size=4, verbose=0)
    model.predict_on_batch(x)
    return Network(model, x, y, cut)


# --- verbs ----------------------------------------------------------------------------------------

Verb = Callable[[Network], Back]


def _frozen(net: Network) -> Back:
    with fl.frozen(net.model):
        pass
    return None


def _watch(net: Network) -> Back:
    with fl.watch(net.model, (net.x, net.y), loss=_loss(net), batch_size=4) as seen:
        seen.check()
    return None


def _loss(net: Network) -> Any:
    return None if net.optimizer is None else sys.modules["torch"].nn.functional.cross_entropy


def _recalibrated(net: Network) -> Back:
    with fl.recalibrated(net.model, net.x, sites="all", batch_size=4):
        pass
    return None


def _assert_frozen(net: Network) -> Back:
    try:
        fl.assert_frozen(net.model, data=net.x)
    except fl.NotFrozenError:
        return None
    raise AssertionError("nothing is frozen")


def _cached(net: Network) -> Back:
    torch = sys.modules["torch"]
    batches = [(torch.from_numpy(net.x[at : at + 4]), net.y[at : at + 4]) for at in (0, 4)]
    for _ in range(2):
        for x, _ in fl.cached(net.model, batches):
            net.model(x)
    return None


def _merge(net: Network) -> Back:
    from frostline.verbs.merge_statistics import merge_statistics

    return merge_statistics([net.model, net.model]).load_into(net.model).undo


def _fit(net: Network) -> Back:
    fl.fit(net.model, net.x, net.y, cache=net.folder, engine="native", batch_size=4, verbose=0)
    return None


class Begins(Exception):  # noqa: N818 - no error: the training is about to begin
    """Ends a verb where its training begins."""


def _prepare_fit(net: Network) -> Back:
    keras = sys.modules["keras"]

    class Stop(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras passes it
            raise Begins

    with contextlib.suppress(Begins):
        fl.fit(net.model, net.x, net.y, cache=net.folder, engine="native", batch_size=4, verbose=0,
               callbacks=[Stop()])  # fmt: skip
    return None


def _compare(net: Network) -> Back:
    own: dict[str, Any] = {}
    if net.optimizer is not None:
        sgd = sys.modules["torch"].optim.SGD
        own = {"loss": _loss(net), "optimizer": lambda p: sgd(p, 0.01)}
    fl.compare(net.model, (net.x, net.y), validation=(net.x, net.y), epochs=1, seeds=1,
               batch_size=4, treatments=["recalibrated"], cache=net.folder, engine="native",
               verbose=0, **own)  # fmt: skip
    return None


def _cache_features(net: Network) -> Back:
    fl.cache_features(net.model, net.x, net.folder, engine="native", batch_size=4, verbose=0)
    return None


def _silent(run: Callable[[Network], Any], net: Network) -> Back:
    run(net)
    return None


#: Verb -> what runs it.
EVERYWHERE: dict[str, Verb] = {
    "freeze": lambda net: fl.freeze(net.model, net.cut, dropout=True).undo,
    "unfreeze": lambda net: fl.unfreeze(net.model).undo,
    "set_momentum": lambda net: fl.set_momentum(net.model, 0.5).undo,
    "recalibrate": lambda net: fl.recalibrate(net.model, net.x, sites="all", batch_size=4).undo,
    "recalibrate batch": lambda net: (
        fl.recalibrate(net.model, net.x, sites="all", method="batch", batch_size=4).undo
    ),
    "frozen": _frozen,
    "watch": _watch,
    "recalibrated": _recalibrated,
    "assert_frozen": _assert_frozen,
    "merge_statistics": _merge,
    "split": functools.partial(_silent, lambda net: fl.split(net.model, sample=net.x)),
    "fold": functools.partial(_silent, lambda net: fl.fold(net.model)),
    "compare": _compare,
    "cache_features": _cache_features,
    "sites": functools.partial(_silent, lambda net: fl.sites(net.model)),
    "lint": functools.partial(_silent, lambda net: fl.lint(net.model)),
    "phases": functools.partial(
        _silent, lambda net: fl.phases(net.model, (net.x, net.y), loss=_loss(net), batch_size=4)
    ),
    "diagnose": functools.partial(
        _silent,
        lambda net: fl.diagnose(
            net.model, (net.x, net.y), loss=_loss(net), batch_size=4, verbose=0
        ),
    ),
}
TORCH: dict[str, Verb] = {"cached": _cached}
KERAS: dict[str, Verb] = {
    "convert": lambda net: _converted(net),
    "restore": lambda net: _restored(net),
    "prepare fit": _prepare_fit,
    "fit": _fit,
}
#: Verbs that need a frozen part, or one of our layers, before they begin.
_BEFORE: dict[str, Callable[[Network], Any]] = {
    "unfreeze": lambda net: fl.freeze(net.model, dropout=True),
    "split": lambda net: fl.freeze(net.model, net.cut, dropout=True),
    "cached": lambda net: fl.freeze(net.model, net.cut, dropout=True),
    "fit": lambda net: _frozen_and_compiled(net),
    "prepare fit": lambda net: _frozen_and_compiled(net),
    "compare": lambda net: _frozen_for_compare(net),
    "cache_features": lambda net: fl.freeze(net.model, dropout=True),
    "restore": lambda net: fl.convert(net.model),
}
#: Verbs with a change to take back.
UNDONE = ("freeze", "unfreeze", "set_momentum", "recalibrate", "merge_statistics")
#: Verbs whose work stays when they are done.
STAYS = ("convert", "restore", "fit")
#: Verbs that are about to train: Keras notes that, but no weight has moved.
PREPARES = ("prepare fit",)
#: Verbs that train: weights may have moved, as after any interrupted training.
TRAINS = ("fit",)


def _frozen_and_compiled(net: Network) -> None:
    fl.freeze(net.model, net.cut, dropout=True)
    keras = sys.modules["keras"]
    net.model.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    net.model.fit(net.x, net.y, batch_size=4, verbose=0)
    net.model.predict_on_batch(net.x)


def _frozen_for_compare(net: Network) -> None:
    if net.optimizer is None:
        _frozen_and_compiled(net)
    else:
        fl.freeze(net.model, net.cut, dropout=True)


def _converted(net: Network) -> Back:
    fl.convert(net.model, version="2.2.4")
    return None


def _restored(net: Network) -> Back:
    fl.restore(net.model)
    return None


def verbs(framework: str) -> dict[str, Verb]:
    """Verb -> what runs it, with the ``undo()`` of those that have one."""
    own = TORCH if framework == "torch" else KERAS
    return {**EVERYWHERE, **own, **{f"undo of {name}": EVERYWHERE[name] for name in UNDONE}}


def prepared(framework: str, size: str, verb: str) -> Network:
    """A network on which the verb can run."""
    net = networks(framework, size)
    before = _BEFORE.get(verb.removeprefix("undo of "))
    if before is not None:
        before(net)
        net.forward()
    return net


def fresh_folder(net: Network) -> Network:
    """The same network with an empty folder for its cache."""
    number = next(_numbers)
    return Network(net.model, net.x, net.y, net.cut, net.optimizer, net.folder / str(number))


_numbers = itertools.count()
