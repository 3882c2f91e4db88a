"""The Keras layer: Batch Normalization whose ``trainable`` is part of the computation.

One trick carries it. A stock layer's gamma and beta belong to the optimizer that was compiled with
them, and no framework lets a variable join or leave it later. So each of ours exists twice: a
*trained* variable that the optimizer always owns, and a *held* one that it never sees. While the
layer is frozen the held one **is** ``layer.gamma`` (in ``call``, in ``weights``, when saving) and
the trained one receives a zero gradient and is ignored, whatever momentum or weight decay do to it;
on thawing it is overwritten from the held one. Which of the two a compiled step uses is read from a
flag *variable*, so flipping ``trainable`` needs neither ``compile`` nor a new trace.

This room must not know about models, data or reports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from frostline.layers.releases import Release, release
from frostline.layers.state import State, WhileTrainable
from frostline.layers.tensors import copy_of, move, read, select, traced, values_per_channel
from frostline.numerics.blend import mixed
from frostline.types import Policy

_POLICIES = ("inference", "batch", "update")


@keras.saving.register_keras_serializable(package="frostline")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch Normalization that is locked to its stored statistics while it is frozen.

    With default arguments it computes what ``keras.layers.BatchNormalization`` computes and has the
    same weights in the same order; checkpoints load both ways. It adds:

    - ``trainable`` is live: flipping it, in either direction, takes effect at the next training
      step on TensorFlow, JAX and torch, without ``compile`` and without a new trace. While it is
      ``False`` neither the statistics nor gamma and beta move, whatever the optimizer does.
    - ``momentum`` is live: assign it at any time.
    - ``policy``: what the layer does in training while frozen.
    - ``debias``: correct the moving average for its start.
    - ``version``: reproduce an old Keras release exactly.

    Normalisation always uses the biased variance: ``(x - mean) / sqrt(var + epsilon) * gamma +
    beta`` (Ioffe and Szegedy 2015, algorithm 1). The moving statistics follow ``stored = decay *
    stored + (1 - decay) * batch`` with Keras' ``momentum`` as decay.

    Because gamma and beta can be thawed at any time, the optimizer keeps variables for them while
    the layer is frozen: they stay in ``model.trainable_variables``, which Keras builds optimizers
    from. ``trainable_weights``, of the layer and of the model, are empty of them then, as in the
    stock layer (except inside a step that TensorFlow traces). On TensorFlow and JAX a step
    that can thaw must also compute the gradients of gamma and beta, so backpropagation runs through
    a frozen prefix down to them. Where nothing will be thawed without ``compile``, ``layer.live =
    False`` before ``compile`` leaves them out and costs what the stock layer costs.

    Args:
        policy: ``"inference"`` (default): frozen means stored statistics, no update, as in Keras 3.
            ``"batch"``: batch statistics, no update, as in Keras 2.1.3 to 2.2.4. ``"update"``:
            batch statistics and update, as in Keras before 2.1.3 and in PyTorch.
        debias: Let the moving average start from nothing and divide it by ``1 - decay**t``, t the
            number of updates so far (Kingma and Ba 2015, section 3), so that a few steps after
            thawing suffice. The first update discards the statistics the layer came with.
        version: ``"2.1.2"``, ``"2.1.3"``, ``"2.1.5"``, ``"2.2.4"``, ``"fork-2.2.4"``, ``"3"`` or a
            release between them: sets policy, debias and the variance that is averaged.
        live: Whether ``trainable`` may be flipped after ``compile``. With ``False`` it is read when
            a step is compiled, as in the stock layer.
        **kwargs: All arguments of ``keras.layers.BatchNormalization``.

    Raises:
        ValueError: Unknown ``policy`` or ``version``; a ``version`` that contradicts ``policy`` or
            ``debias``; ``renorm=True`` together with anything but the defaults (batch
            renormalisation keeps running statistics of its own, which have no meaning under them).

    Example:
        >>> layer = BatchNormalization(policy="inference")
        >>> layer.trainable = False            # live, also after compile
        >>> layer.momentum = 0.9               # live as well
    """

    renorm = False  # of Keras 3.12, which has no such argument

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *args: Any,
        policy: Policy = "inference",
        debias: bool = False,
        version: str | None = None,
        live: bool = True,
        **kwargs: Any,
    ) -> None:
        self._live = bool(live)
        self._state: State | None = None
        self._trainable: bool
        self._momentum = float(momentum)
        super().__init__(axis, momentum, epsilon, *args, **kwargs)
        self._behave(policy, debias, version)

    def _behave(self, policy: Any, debias: Any, version: str | None) -> None:
        chosen, corrected, name = behaviour(policy, debias, version)
        if self.renorm and (chosen != "inference" or corrected or name is not None):
            raise ValueError(
                f"Layer '{self.name}': renorm=True keeps running statistics of its own and allows "
                "only policy='inference', debias=False, version=None. "
                f"Received: policy={policy!r}, debias={debias!r}, version={version!r}"
            )
        self.policy: Policy = chosen
        self.debias: bool = corrected
        self.version: str | None = name
        self._release: Release | None = None if name is None else release(name)

    # --- live attributes ----------------------------------------------------------------------

    @property
    def momentum(self) -> float:
        """Kept share of the moving average per update; assignable at any time."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        value = float(value)
        if self._state is not None:
            self._state.decay.assign(np.array([value, 1.0 - value]))
        self._momentum = value

    @property
    def trainable(self) -> bool:
        """Whether the layer trains; assignable at any time, effective at the next step."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        value = bool(value)
        state = self._state
        if state is not None and value != self._trainable:
            _require_values(self, self.variables)
            if self._live:
                self._exchange(thaw=value)
            state.flag.assign(value)
        self._trainable = value
        self._offer_to_optimizer()

    @property
    def live(self) -> bool:
        """Whether ``trainable`` may be flipped after ``compile``; set it before ``compile``."""
        return self._live

    @live.setter
    def live(self, value: bool) -> None:
        value = bool(value)
        if value != self._live and not self._trainable:
            # The value in force must be in the variable that will be read from now on.
            self._exchange(thaw=not value)
        self._live = value
        self._offer_to_optimizer()

    def _exchange(self, *, thaw: bool) -> None:
        """Copy gamma and beta from the held to the trained variables, or the other way."""
        for trained, held in self._twins():
            source, target = (held, trained) if thaw else (trained, held)
            target.assign(copy_of(source))

    def _offer_to_optimizer(self) -> None:
        """Mark gamma and beta for the optimizer: always while live, else as the stock layer."""
        for trained, _ in self._twins():
            trained.trainable = self._live or self._trainable
        if self._state is not None and keras.backend.backend() == "torch":
            self._track_variables()

    @property
    def gamma(self) -> Any:
        """The scale, shape ``(channels,)``; the held variable while the layer is frozen."""
        return self._active(self._trained_gamma, "held_gamma")

    @gamma.setter
    def gamma(self, variable: Any) -> None:
        self._trained_gamma = variable

    @property
    def beta(self) -> Any:
        """The offset, shape ``(channels,)``; the held variable while the layer is frozen."""
        return self._active(self._trained_beta, "held_beta")

    @beta.setter
    def beta(self, variable: Any) -> None:
        self._trained_beta = variable

    # --- variables ----------------------------------------------------------------------------

    @property
    def variables(self) -> list[Any]:
        """All state: the trained gamma and beta, the statistics, and what Frostline adds."""
        own = [*self._trainable_variables, *self._non_trainable_variables]
        return own if self._state is None else own + self._state.variables()

    @property
    def weights(self) -> list[Any]:
        """The stock weights in stock order: gamma, beta, moving mean, moving variance."""
        own = [*self._trainable_variables, *self._non_trainable_variables]
        # A step that is being traced must serve both states: it gets the optimizer's variables.
        if self._reads_trained() or traced(self._require_state().flag) is not None:
            return own
        held = {id(trained): held for trained, held in self._twins()}
        return [held.get(id(variable), variable) for variable in own]

    def _twins(self) -> list[tuple[Any, Any]]:
        """Pairs of (trained, held) variables that exist."""
        state = self._state
        if state is None:
            return []
        pairs = [(self._trained_gamma, state.held_gamma), (self._trained_beta, state.held_beta)]
        return [pair for pair in pairs if pair[0] is not None]

    def _track_variables(self) -> None:
        """Torch: register as parameters what is in ``weights``, under the stock names."""
        import torch

        own = [*self._trainable_variables, *self._non_trainable_variables]
        self._torch_params = torch.nn.ParameterDict(
            {stock.path: active.value for stock, active in zip(own, self.weights, strict=True)}
        )

    def _active(self, trained: Any, held_name: str) -> Any:
        if self._reads_trained() or trained is None:
            return trained
        return getattr(self._state, held_name)

    def _reads_trained(self) -> bool:
        """Whether gamma and beta are, at this moment, the optimizer's variables."""
        return self._trainable or self._state is None or not self._live

    def _require_state(self) -> State:
        if self._state is None:
            raise ValueError(f"Layer '{self.name}' is not built yet: call it or build() it first.")
        return self._state

    def build(self, input_shape: Any) -> None:
        """Create the stock weights and, beside them, the state that makes them live.

        Args:
            input_shape: Shape of the input with ``None`` for unknown sizes.

        Raises:
            ValueError: The channel axis is out of range or has no known size.
        """
        if not -len(input_shape) <= self.axis < len(input_shape):
            raise ValueError(
                f"Axis {self.axis} is out of bounds for input shape {tuple(input_shape)}. "
                f"Received: axis={self.axis}"
            )
        super().build(input_shape)
        self._add_state()

    def _add_state(self) -> None:
        for variable in (self._trained_gamma, self._trained_beta):
            if variable is not None and variable.regularizer is not None:
                variable.regularizer = WhileTrainable(self._is_trainable, variable.regularizer)
        self._state = self._make_state()
        self._offer_to_optimizer()

    def _make_state(self) -> State:
        def variable(initializer: Any, shape: tuple[int, ...], dtype: Any, name: str) -> Any:
            return keras.Variable(
                initializer=initializer,
                shape=shape,
                dtype=dtype,
                trainable=False,
                autocast=False,
                aggregation="none",
                name=name,
            )

        def held(trained: Any, name: str) -> Any:
            if trained is None:
                return None
            return variable(lambda *_, **__: copy_of(trained), trained.shape, trained.dtype, name)

        def average(name: str, like: Any, start: str) -> Any:
            shape = () if like is None else like.shape
            return variable(start, shape, self.variable_dtype, name) if self.debias else None

        decay = np.array([self._momentum, 1.0 - self._momentum])
        return State(
            flag=variable(lambda *_, **__: ops.array(self._trainable, "bool"), (), "bool", "flag"),
            decay=variable(
                lambda _, dtype: ops.convert_to_tensor(decay, dtype),
                (2,),
                self.variable_dtype,
                "decay",
            ),
            held_gamma=held(self._trained_gamma, "held_gamma"),
            held_beta=held(self._trained_beta, "held_beta"),
            biased_mean=average("biased_mean", self.moving_mean, "zeros"),
            biased_variance=average("biased_variance", self.moving_mean, "zeros"),
            unseen=average("unseen", None, "ones"),
        )

    # --- computation --------------------------------------------------------------------------

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise a batch.

        Args:
            inputs: Tensor of rank 2 to 5 with the channels on ``axis``.
            training: Whether this is a training step.
            mask: Boolean tensor of the inputs' shape without the last axis; masked elements do not
                count in the batch statistics.

        Returns:
            A tensor of the inputs' shape in the layer's compute dtype.

        Raises:
            ValueError: The mask's rank is not the inputs' rank less one.
        """
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            raise ValueError(
                f"Layer '{self.name}': the mask must have one dimension less than the inputs. "
                f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
            )
        # Half precision overflows in the variance: compute in float32 at least, as the stock layer.
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        live = self._is_trainable()
        gamma = self._parameter(live, self._trained_gamma, "held_gamma", x.dtype)
        beta = self._parameter(live, self._trained_beta, "held_beta", x.dtype)
        mean = read(self.moving_mean, x.dtype)
        variance = read(self.moving_variance, x.dtype)
        if training:
            if self.renorm:
                mean, variance, gamma, beta = self._renormalise(x, mask, live, gamma, beta)
            else:
                use_batch = live if self.policy == "inference" else True
                update = True if self.policy == "update" else live
                mean, variance = self._train(x, mask, use_batch, update, (mean, variance))
        outputs = ops.batch_normalization(
            x=x,
            mean=mean,
            variance=variance,
            axis=self.axis,
            offset=beta,
            scale=gamma,
            epsilon=self.epsilon,
        )
        return ops.cast(outputs, self.compute_dtype)

    def _is_trainable(self) -> Any:
        """Whether the layer trains: a bool, or the flag's tensor inside a step being traced."""
        if self._state is None or not self._live:
            return self._trainable
        flag = traced(self._state.flag)
        return self._trainable if flag is None else flag

    def _parameter(self, live: Any, trained: Any, held_name: str, dtype: Any) -> Any:
        if trained is None:
            return None
        if self._state is None or not self._live:
            return read(trained, dtype)
        held = getattr(self._state, held_name)
        return select(live, read(trained, dtype), read(held, dtype))

    def _train(
        self, x: Any, mask: Any, use_batch: Any, update: Any, stored: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        """Return the (mean, variance) to normalise with and move the stored statistics."""
        if use_batch is False:
            return stored
        if self._branches(use_batch):
            mean, variance = ops.cond(
                use_batch, lambda: self._channel_moments(x, mask), lambda: stored
            )
        else:
            batch = self._channel_moments(x, mask)
            mean, variance = (select(use_batch, *pair) for pair in zip(batch, stored, strict=True))
        used = (mean, variance)
        if self._state is not None and self._state.ramp is not None:
            # Before the update: torch changes in place what `stored` refers to.
            used = self._ramped(used, stored, update)
        if update is not False:
            self._update(mean, variance, update, stored, x, mask)
        return used

    def _ramped(
        self, batch: tuple[Any, Any], stored: tuple[Any, Any], live: Any
    ) -> tuple[Any, Any]:
        """Blend the two by λ = steps done / steps in all, and count this step if it trains."""
        ramp = self._require_state().ramp
        counts = read(ramp, batch[0].dtype)
        blend = ops.minimum(counts[0] / counts[1], 1.0)
        move(ramp, ops.stack([ops.minimum(counts[0] + 1.0, counts[1]), counts[1]]), live)
        mean, variance = (
            mixed(blend, old, new, ops) for old, new in zip(stored, batch, strict=True)
        )
        return mean, variance

    def _branches(self, use_batch: Any) -> bool:
        """Whether a traced step jumps over the moments while the layer is frozen.

        A select costs nothing while training and rounds as the stock layer does; a branch hides the
        moments from the compiler's fusion, but saves them in a frozen layer. JAX gains too little
        from the branch to pay for its rounding, TensorFlow much if the layer is frozen at the start
        (`benchmarks/bench_layer.py`). No branch may hold a cross-replica reduction.
        """
        return (
            not isinstance(use_batch, bool)
            and not self._trainable
            and not self.synchronized
            and keras.backend.backend() == "tensorflow"
        )

    def _channel_moments(self, x: Any, mask: Any) -> tuple[Any, Any]:
        mean, variance = self._moments(x, mask)
        shape = self.moving_mean.shape  # the masked moments of one channel come as scalars
        return ops.reshape(mean, shape), ops.reshape(variance, shape)

    def _update(
        self, mean: Any, variance: Any, update: Any, stored: tuple[Any, Any], x: Any, mask: Any
    ) -> None:
        if self._release is not None and self._release.variance != "biased":
            fused = len(x.shape) == 4 and self.axis in (-1, 3)
            n = values_per_channel(x, mask, self._reduction_axes)
            variance = variance * self._release.variance_factor(
                n, fused=fused, epsilon=self.epsilon
            )
        decay, rest = self._decay(x.dtype)
        if self.debias:
            self._update_debiased(mean, variance, update, stored, decay, rest)
            return
        move(self.moving_mean, stored[0] * decay + mean * rest, update)
        move(self.moving_variance, stored[1] * decay + variance * rest, update)

    def _update_debiased(
        self, mean: Any, variance: Any, update: Any, stored: tuple[Any, Any], decay: Any, rest: Any
    ) -> None:
        """Zero-debias: ``b += (batch - b)(1 - decay)``, ``stored = b / (1 - decay**t)``."""
        state = self._require_state()
        unseen = read(state.unseen, mean.dtype) * decay
        seen = 1.0 - unseen
        rows = (
            (self.moving_mean, state.biased_mean, mean, stored[0]),
            (self.moving_variance, state.biased_variance, variance, stored[1]),
        )
        for moving, average, batch, old in rows:
            biased = read(average, batch.dtype)
            biased = biased + (batch - biased) * rest
            # With decay 1 nothing is ever seen: keep what is stored instead of 0/0.
            fresh = ops.where(seen > 0, biased / ops.where(seen > 0, seen, 1.0), old)
            move(average, biased, update)
            move(moving, fresh, update)
        move(state.unseen, unseen, update)

    def _decay(self, dtype: Any) -> tuple[Any, Any]:
        if self._state is None or traced(self._state.flag) is None:
            return self._momentum, 1.0 - self._momentum
        pair = read(self._state.decay, dtype)
        return pair[0], pair[1]

    def _renormalise(
        self, x: Any, mask: Any, live: Any, gamma: Any, beta: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Batch renormalisation (Ioffe 2017, algorithm 1), switched off while frozen."""
        stored = read(self.moving_mean, x.dtype), read(self.moving_variance, x.dtype)
        if live is False:
            return *stored, gamma, beta
        mean, variance = self._channel_moments(x, mask)
        r, d, mean, variance = self._renorm_correction_and_moments(mean, variance)
        r, d = select(live, r, ops.ones_like(r)), select(live, d, ops.zeros_like(d))
        gamma, beta = self._compose_transforms(r, d, gamma, beta, x.dtype)
        stddev = ops.sqrt(variance + self.epsilon)
        decay, rest = self._decay(x.dtype)
        slow, quick = self.renorm_momentum, 1.0 - self.renorm_momentum
        move(self.renorm_mean, read(self.renorm_mean, x.dtype) * slow + mean * quick, live)
        moved = read(self.renorm_stddev, x.dtype) * slow + stddev * quick
        move(self.renorm_stddev, moved, live)
        move(self.moving_mean, stored[0] * decay + mean * rest, live)
        moved = read(self.moving_stddev, x.dtype) * decay + stddev * rest
        move(self.moving_stddev, moved, live)
        move(self.moving_variance, ops.relu(moved * moved - self.epsilon), live)
        return (select(live, mean, stored[0]), select(live, variance, stored[1]), gamma, beta)

    # --- a ramp after thawing -----------------------------------------------------------------

    def reserve_ramp(self) -> None:
        """Make room for a ramp; call it before a training step is compiled.

        Until :meth:`start_ramp` the layer computes what it computed before.

        Raises:
            ValueError: Not built, or another policy than ``"inference"``, which uses batch
                statistics while frozen, or ``renorm=True``.
        """
        state = self._require_state()
        if self.policy != "inference" or self.renorm:
            raise ValueError(
                f"Layer '{self.name}': a ramp leads from stored to batch statistics, so it needs "
                "policy='inference' and renorm=False. "
                f"Received: policy={self.policy!r}, renorm={self.renorm}"
            )
        if state.ramp is None:
            with self._open_name_scope():
                ramp = keras.Variable(
                    initializer=lambda *_, **__: ops.ones((2,), dtype="float32"),
                    shape=(2,),
                    dtype="float32",
                    trainable=False,
                    autocast=False,
                    aggregation="only_first_replica",
                    name="ramp",
                )
            self._state = replace(state, ramp=ramp)

    def start_ramp(self, steps: int) -> None:
        """Let λ go from 0 to 1 over the next training steps, live, after :meth:`reserve_ramp`.

        A step that trains the layer normalises with ``(1 - λ) * stored + λ * batch`` statistics,
        λ = steps done / ``steps``; the stored ones follow the batch as always. A layer that is used
        several times in a step counts each use.

        Args:
            steps: At least 1; from then on λ is 1, bit for bit the plain layer.
        """
        state = self._require_state()
        if state.ramp is None or steps < 1:
            raise ValueError(
                f"Layer '{self.name}': reserve_ramp() comes first, and steps must be at least 1. "
                f"Received: steps={steps}"
            )
        state.ramp.assign(np.array([0.0, steps]))

    def release_ramp(self) -> None:
        """Take away what :meth:`reserve_ramp` made; steps compiled with it must go, too."""
        if self._state is not None:
            self._state = replace(self._state, ramp=None)

    # --- saving -------------------------------------------------------------------------------

    def save_own_variables(self, store: Any) -> None:
        """Save the stock weights, as the stock layer does."""
        for index, variable in enumerate(self.weights):
            store[str(index)] = variable

    def load_own_variables(self, store: Any) -> None:
        """Load a checkpoint of this layer or of the stock layer; a debiased average starts anew."""
        super().load_own_variables(store)
        self._exchange(thaw=False)
        self.forget_average()

    def forget_average(self) -> None:
        """Let the debiased moving average start from nothing at the next update."""
        state = self._state
        if state is None or state.unseen is None:
            return
        for average in (state.biased_mean, state.biased_variance):
            average.assign(ops.zeros(self.moving_mean.shape, dtype=self.variable_dtype))
        state.unseen.assign(1.0)

    def continue_average(self) -> None:
        """Let the debiased moving average go on from the statistics that are stored now.

        The next update then keeps ``decay`` of them, as without ``debias``. Call it after
        statistics were assigned from outside, for example by a recalibration.
        """
        state = self._state
        if state is None or state.unseen is None:
            return
        state.biased_mean.assign(copy_of(self.moving_mean))
        state.biased_variance.assign(copy_of(self.moving_variance))
        state.unseen.assign(0.0)

    def get_config(self) -> dict[str, Any]:
        """Return the stock configuration with ``policy``, ``debias``, ``version``, ``live``."""
        return {
            **super().get_config(),
            "policy": self.policy,
            "debias": self.debias,
            "version": self.version,
            "live": self.live,
        }


def behaviour(policy: Any, debias: Any, version: str | None) -> tuple[Policy, bool, str | None]:
    """Check the three arguments against each other; a version decides the other two."""
    if policy not in _POLICIES:
        raise ValueError(f"policy must be one of {', '.join(_POLICIES)}. Received: {policy!r}")
    if not isinstance(debias, bool):
        raise ValueError(f"debias must be True or False. Received: debias={debias!r}")
    if version is None:
        return policy, debias, None
    preset = release(version)
    if policy not in ("inference", preset.policy) or debias not in (False, preset.debias):
        raise ValueError(
            f"version={version!r} means policy={preset.policy!r}, debias={preset.debias}; leave "
            f"the two out or let them agree. Received: policy={policy!r}, debias={debias!r}"
        )
    return preset.policy, preset.debias, str(version)


def _require_values(layer: BatchNormalization, variables: list[Any]) -> None:
    """Refuse to copy variables whose values live in a running JAX ``fit`` only."""
    if keras.backend.backend() == "jax" and any(v._value is None for v in variables):
        raise ValueError(
            f"Layer '{layer.name}': its values are inside the running fit(); reach the layer "
            "through the callback's `self.model`, which brings them back, and set `trainable` then."
        )
