"""A GAN in which one BN layer lives under two regimes, correct on TensorFlow, JAX and torch.

The discriminator's BN trains in its own model, on half real and half generated samples. In the
combined model, which trains the generator through the discriminator, it must be frozen: neither
its weights nor its statistics may move, and it normalises with what it has stored. `fl.frozen`
does that for a single step, without compiling anything again::

    python examples/gan.py --steps 400
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import frostline as fl

L = keras.layers
NOISE = 4


@dataclass(frozen=True)
class Gan:
    """Three models that share their layers."""

    generator: Any
    discriminator: Any
    combined: Any


def build(units: int = 16, rate: float = 0.05) -> Gan:
    """Make the two networks and compile each of the two steps."""
    generator = keras.Sequential(
        [
            keras.Input((NOISE,)),
            L.Dense(units, use_bias=False),
            fl.layers.BatchNormalization(momentum=0.9),
            L.Activation("tanh"),
            L.Dense(2),
        ],
        name="generator",
    )
    discriminator = keras.Sequential(
        [
            keras.Input((2,)),
            L.Dense(units, use_bias=False),
            fl.layers.BatchNormalization(momentum=0.9),
            L.LeakyReLU(0.2),
            L.Dense(1),
        ],
        name="discriminator",
    )
    combined = keras.Sequential([generator, discriminator], name="combined")
    for model in (discriminator, combined):
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.5),
            keras.losses.BinaryCrossentropy(from_logits=True),
        )
    return Gan(generator, discriminator, combined)


def step(gan: Gan, real: Any, noise: Any) -> tuple[float, float]:
    """Train the discriminator once, then the generator once; returns their losses.

    Args:
        gan: The models.
        real: Real samples, shape ``(n, 2)``.
        noise: Shape ``(n, NOISE)``; used in both halves of the step.
    """
    fake = gan.generator.predict_on_batch(noise)
    labels = np.concatenate([np.ones((len(real), 1)), np.zeros((len(fake), 1))])
    samples = np.concatenate([real, fake]).astype("float32")
    d_loss = gan.discriminator.train_on_batch(samples, labels.astype("float32"))
    with fl.frozen(gan.discriminator):
        g_loss = gan.combined.train_on_batch(noise, np.ones((len(noise), 1), "float32"))
    return float(d_loss), float(g_loss)


def main() -> None:
    """Learn a ring of eight Gaussians and print how the discriminator's statistics follow."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    gan = build()
    norm = next(x for x in gan.discriminator.layers if isinstance(x, L.BatchNormalization))
    for number in range(1, steps + 1):
        angle = rng.integers(0, 8, 64) * np.pi / 4
        real = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.1, (64, 2))
        noise = rng.normal(size=(64, NOISE)).astype("float32")
        losses = step(gan, real.astype("float32"), noise)
        if number % 100 == 0 or number == steps:
            variance = keras.ops.convert_to_numpy(norm.moving_variance).mean()
            print(
                f"step {number}: discriminator {losses[0]:.3f}, generator {losses[1]:.3f}, "
                f"mean stored variance {variance:.3f}"
            )


if __name__ == "__main__":
    main()
