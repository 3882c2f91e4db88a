"""How a class and a function of the same loss are named: in one spelling."""

from __future__ import annotations


def snake_case(name: str) -> str:
    """Spell the name of a class as Keras spells that of its function.

    Example:
        >>> snake_case("SparseCategoricalCrossentropy"), snake_case("mse")
        ('sparse_categorical_crossentropy', 'mse')
    """
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and name[i - 1].islower() else c.lower()
        for i, c in enumerate(name)
    )
