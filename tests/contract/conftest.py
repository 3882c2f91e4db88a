"""The same tests for every framework: each one here builds the same networks in its own words.

``framework`` runs a test once per framework. Native torch has a process of its own, the one whose
Keras backend is torch too. To hold another framework to the same tests, add a class to FRAMEWORKS.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fake_view import FakeView

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
            "tanh": lambda: layers.Activation("tanh", name=name),
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

    def cross_entropy(self) -> Any:
        """A smooth loss of any outputs."""
        import keras

        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(self, model: Any, x: Any) -> Any:
        """Outputs of a copy in training mode, numpy."""
        import keras

        twin = keras.models.clone_model(model)
        twin.set_weights(model.get_weights())
        return keras.ops.convert_to_numpy(twin(x, training=True))

    def state(self, model: Any) -> dict[str, Any]:
        """Name -> copy of every array that the model holds."""
        import keras

        return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.variables}

    def spoil(self, model: Any, path: str, value: float) -> None:
        """Set the stored mean of a site."""
        mean = self.child(model, path).moving_mean
        mean.assign(np.full(mean.shape, value, "float32"))

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
            "tanh": nn.Tanh,
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

    def cross_entropy(self) -> Any:
        """See :meth:`KerasFramework.cross_entropy`."""
        from torch import nn

        return nn.CrossEntropyLoss()

    def train(self, model: Any, x: Any) -> Any:
        """See :meth:`KerasFramework.train`."""
        import torch

        with torch.no_grad():
            return copy.deepcopy(model).train()(torch.as_tensor(x)).numpy()

    def state(self, model: Any) -> dict[str, Any]:
        """See :meth:`KerasFramework.state`."""
        return {name: value.numpy().copy() for name, value in model.state_dict().items()}

    def spoil(self, model: Any, path: str, value: float) -> None:
        """See :meth:`KerasFramework.spoil`."""
        self.child(model, path).running_mean.fill_(value)

    def centred(self, name: str) -> Any:
        """See :meth:`KerasFramework.centred`."""
        from torch import nn

        class Centred(nn.Module):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                return x - x.mean(0)

        return Centred()


class FakeFramework:
    """The network in numpy on which rooms above the adapters are tested: it keeps the contract too.

    It is always the same network, whatever the layout.
    """

    name = "fake"

    def build(self, layout: Layout) -> Any:
        """A network of two sites; its adapter is itself."""
        del layout
        return FakeView(WIDTH)

    def run(self, model: Any, x: Any) -> Any:
        """See :meth:`KerasFramework.run`."""
        return model.forward(x, training=False)

    def cross_entropy(self) -> Any:
        """``None``: it has one of its own."""

    def train(self, model: Any, x: Any) -> Any:
        """See :meth:`KerasFramework.train`."""
        return model.forward(x, training=True)

    def state(self, model: Any) -> dict[str, Any]:
        """See :meth:`KerasFramework.state`."""
        pairs = model.stored.items()
        return {f"{path}/{i}": np.array(pair[i]) for path, pair in pairs for i in (0, 1)}

    def spoil(self, model: Any, path: str, value: float) -> None:
        """See :meth:`KerasFramework.spoil`."""
        mean, variance = model.stored[path]
        model.stored[path] = (np.full_like(mean, value), variance)


FRAMEWORKS: dict[str, Any] = {"keras": KerasFramework, "torch": TorchFramework}


#: Two sites with something that is not linear between them.
TWO_SITES = {"d1": "dense", "bn1": "norm", "act": "tanh", "d2": "dense", "bn2": "norm"}


@dataclass
class Network:
    """A model, the framework that it is written in, and its adapter."""

    framework: Any
    model: Any

    def __post_init__(self) -> None:
        fake = self.framework.name == "fake"
        self.adapter: Any = self.model if fake else adapter_of(self.model)
        self.paths = tuple(site.path for site in self.adapter.sites())

    def inference(self, x: Any) -> Any:
        """Outputs of the model itself at inference."""
        return self.framework.run(self.model, x)

    def training(self, x: Any) -> Any:
        """Outputs of a copy of the model in training mode."""
        return self.framework.train(self.model, x)

    def state(self) -> dict[str, Any]:
        """Name -> copy of every array that the model holds."""
        return dict(self.framework.state(self.model))

    def spoil(self, path: str, value: float) -> None:
        """Set the stored mean of a site."""
        self.framework.spoil(self.model, path, value)


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Any:
    """What builds networks in one framework."""
    if request.param == "torch" and os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("torch has a process of its own")
    return FRAMEWORKS[request.param]()


@pytest.fixture(params=[pytest.param("fake", marks=pytest.mark.once), *FRAMEWORKS])
def network(request: pytest.FixtureRequest) -> Any:
    """A network with two sites in each framework and in numpy, and what it computes by itself."""
    if request.param == "torch" and os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("torch has a process of its own")
    framework = {"fake": FakeFramework, **FRAMEWORKS}[request.param]()
    return Network(framework, framework.build(TWO_SITES))


@pytest.fixture
def adapter(framework: Any) -> Any:
    """A function: layout -> the framework's adapter of a model with these layers."""
    return lambda layout: adapter_of(framework.build(layout))


@pytest.fixture
def x() -> Any:
    """A batch that every layout takes."""
    return np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
