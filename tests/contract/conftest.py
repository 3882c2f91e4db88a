"""The same tests for every framework: each one here builds the same networks in its own words.

``framework`` runs a test once per framework. Native torch has a process of its own, the one whose
Keras backend is torch too. To hold another framework to the same tests, add a class to FRAMEWORKS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from frostline.adapters import adapter_of

WIDTH = 4
#: Name -> kind of layer, or what a container holds.
Layout = Mapping[str, Any]


class KerasFramework:
    """Nested sequential models."""

    name = "keras"
    word = "layer"

    def build(self, layout: Layout) -> Any:
        """A model with these layers; every one takes and returns WIDTH numbers per sample."""
        import keras

        keras.utils.set_random_seed(0)
        model = self._container(layout, "model")
        model.build((None, WIDTH))
        return model

    def _container(self, layout: Layout, name: str) -> Any:
        import keras

        layers = [keras.Input((WIDTH,)), *map(self._layer, layout.items())]
        return keras.Sequential(layers, name=name)

    def _layer(self, item: tuple[str, Any]) -> Any:
        from keras import layers

        name, kind = item
        if isinstance(kind, Mapping):
            return self._container(kind, name)
        if callable(kind):
            return kind(self, name)
        made: dict[str, Any] = {
            "dense": lambda: layers.Dense(WIDTH, name=name),
            "norm": lambda: layers.BatchNormalization(name=name),
            "relu": lambda: layers.ReLU(name=name),
            "dropout": lambda: layers.Dropout(0.5, name=name),
        }
        return made[kind]()

    def top(self, model: Any) -> list[Any]:
        """The layers that an index counts."""
        return list(model.layers)

    def child(self, model: Any, path: str) -> Any:
        """The layer with a path."""
        for name in path.split("/"):
            model = model.get_layer(name)
        return model

    def run(self, model: Any, x: Any) -> Any:
        """Outputs at inference, numpy."""
        import keras

        return keras.ops.convert_to_numpy(model(x, training=False))

    def centred(self, name: str) -> Any:
        """A layer without weights that subtracts the mean of the batch."""
        from keras import Layer, ops

        class Centred(Layer):  # type: ignore[misc]
            def call(self, x: Any) -> Any:
                return x - ops.mean(x, axis=0)

        return Centred(name=name)


class TorchFramework:
    """Nested ``nn.Sequential``."""

    name = "torch"
    word = "module"

    def build(self, layout: Layout) -> Any:
        """See :meth:`KerasFramework.build`."""
        import torch

        torch.manual_seed(0)
        return self._container(layout)

    def _container(self, layout: Layout) -> Any:
        from collections import OrderedDict

        from torch import nn

        layers = OrderedDict((name, self._layer(name, kind)) for name, kind in layout.items())
        return nn.Sequential(layers)

    def _layer(self, name: str, kind: Any) -> Any:
        from torch import nn

        if isinstance(kind, Mapping):
            return self._container(kind)
        if callable(kind):
            return kind(self, name)
        made: dict[str, Any] = {
            "dense": lambda: nn.Linear(WIDTH, WIDTH),
            "norm": lambda: nn.BatchNorm1d(WIDTH),
            "relu": nn.ReLU,
            "dropout": lambda: nn.Dropout(0.5),
        }
        return made[kind]()

    def top(self, model: Any) -> list[Any]:
        """See :meth:`KerasFramework.top`."""
        return list(model.children())

    def child(self, model: Any, path: str) -> Any:
        """See :meth:`KerasFramework.child`."""
        return model.get_submodule(path.replace("/", "."))

    def run(self, model: Any, x: Any) -> Any:
        """See :meth:`KerasFramework.run`."""
        import torch

        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            found = model.eval()(torch.as_tensor(x)).numpy()
        for module, mode in modes:
            module.training = mode
        return found

    def centred(self, name: str) -> Any:
        """See :meth:`KerasFramework.centred`."""
        from torch import nn

        class Centred(nn.Module):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                return x - x.mean(0)

        return Centred()


FRAMEWORKS: dict[str, Any] = {"keras": KerasFramework, "torch": TorchFramework}


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Any:
    """What builds networks in one framework."""
    if request.param == "torch" and os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("torch has a process of its own")
    return FRAMEWORKS[request.param]()


@pytest.fixture
def adapter(framework: Any) -> Any:
    """A function: layout -> the framework's adapter of a model with these layers."""
    return lambda layout: adapter_of(framework.build(layout))


@pytest.fixture
def x() -> Any:
    """A batch that every layout takes."""
    return np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
