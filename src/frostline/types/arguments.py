"""What public functions are given, looked at once, at the door: one table, by the argument's name.

An argument of the same name means the same in every function. What is refused here is of a wrong
type, or out of every range; what depends on the model or the data is refused where these are known.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar, cast

from frostline.types.errors import DataError

Function = TypeVar("Function", bound=Callable[..., Any])

Item = TypeVar("Item")

#: Longest value that a message repeats.
_SHOWN = 80


def checked(function: Function) -> Function:
    """Refuse arguments of a wrong type, by name, before the function sees them.

    A value that is the parameter's default is always fine.

    Raises:
        DataError: It names the argument, what it may be, and what was received.
    """
    signature = inspect.signature(function)
    defaults = {name: known.default for name, known in signature.parameters.items()}
    doors = [name for name in defaults if name in _DOORS]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # of Python's own: the call below says it
            given = {}
        for name in doors:
            if name in given and given[name] is not defaults[name]:
                require(name, given[name])
        return function(*args, **kwargs)

    return cast(Function, run)


def require(name: str, value: Any) -> None:
    """Refuse a value of a wrong type for an argument of this name.

    Raises:
        DataError: It names the argument, what it may be, and what was received.
    """
    wanted = _DOORS[name](value) if name in _DOORS else None
    if wanted is not None:
        raise DataError(f"{name} must be {wanted}. Received: {name}={shown(value)}")


def listed(value: Iterable[Item], name: str) -> list[Item]:
    """The content of an argument that is iterated once.

    Raises:
        DataError: Iterating it raised an error.
    """
    try:
        return list(value)
    except Exception as error:
        raise unreadable(value, name, error) from error


def unreadable(value: Any, name: str, error: Exception) -> DataError:
    """What to raise where iterating an argument raised an error."""
    return DataError(
        f"{name} cannot be read to its end ({type(error).__name__}: {error}). "
        f"Received: {name}={shown(value)}"
    )


def shown(value: Any) -> str:
    """A value in a message: short, and there even if the value cannot say what it is."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    text = text.replace("\n", " ")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


Door = Callable[[Any], "str | None"]


def _whole(least: int) -> Door:
    words = f"a whole number, at least {least}"

    def door(value: Any) -> str | None:
        try:
            number = operator.index(value)
        except (TypeError, ValueError):  # of an array with several numbers
            return words
        if type(value) is bool or _is_array(value) or number > sys.maxsize:
            return words
        return None if number >= least else f"at least {least}"

    return door


def _number(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def _is_array(value: Any) -> bool:
    """Not one of NumPy's numbers, which have a shape, too."""
    return bool(getattr(value, "shape", None))


def _amount(value: Any) -> str | None:
    return None if _number(value) and value >= 0 else "a number of gigabytes or seconds, or None"


def _ratio(value: Any) -> str | None:
    plain = type(value) is not bool and isinstance(value, Real)
    return None if plain else "a number"


def _flag(value: Any) -> str | None:
    plain = isinstance(value, int) or type(value).__name__ in ("bool_", "bool")
    return None if plain and value in (0, 1) else "True or False"


def _word(value: Any) -> str | None:
    """The function knows which ones; here it is told from what cannot even be compared."""
    return "one word or number" if _is_array(value) else None


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a word"


def _function(value: Any) -> str | None:
    return None if callable(value) else "a function that makes one"


def _folder(value: Any) -> str | None:
    text = value
    if hasattr(value, "__fspath__") and not isinstance(value, type):
        text = os.fspath(value)
    sound = isinstance(text, str) and "\0" not in text
    return None if sound else "a path: a string or a pathlib.Path"


def _cache(value: Any) -> str | None:
    return _folder(getattr(value, "path", value))


def _history(value: Any) -> str | None:
    return "the path of a file" if isinstance(value, str) and "\0" in value else None


def _names(value: Any) -> str | None:
    words = "a word, or a list of words"
    if isinstance(value, str):
        return None
    # An iterator would be used up by a look.
    several = isinstance(value, Iterable) and not hasattr(value, "__next__")
    try:
        return None if several and all(isinstance(word, str) for word in value) else words
    except Exception:
        return words


def _of_numbers(value: Any) -> str | None:
    """Refuses NumPy's arrays of words and objects, wherever they are inside."""
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (list, tuple, Mapping)):
        return next(filter(None, map(_of_numbers, inner)), None)
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    return None if kind in "biufcV" else "a batch of numbers, as the model takes it"


def _listed(words: str) -> Door:
    def door(value: Any) -> str | None:
        return None if isinstance(value, (list, tuple)) else words

    return door


def _sequence(value: Any) -> str | None:
    return None if isinstance(value, Sequence) else "a list of models, states or files"


def _options(value: Any) -> str | None:
    sound = isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())
    return None if sound else "a mapping: code -> thresholds by name"


def _metrics(value: Any) -> str | None:
    sound = isinstance(value, Mapping) and all(callable(metric) for metric in value.values())
    return None if sound else "a mapping: name -> function of labels and outputs"


def _weights(value: Any) -> str | None:
    words = "a number for each of the models"
    several = isinstance(value, Sequence) or _is_array(value)
    try:
        sound = several and not isinstance(value, (str, bytes))
        return None if sound and all(_number(weight) for weight in value) else words
    except Exception:
        return words


def _through(value: Any) -> str | None:
    sound = hasattr(value, "cache") and hasattr(value, "rest")
    return None if sound else "a frostline.cache.Through"


def _loader(value: Any) -> str | None:
    sound = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, type))
    return None if sound else "a DataLoader, or an iterable of batches"


def _shuffle(value: Any) -> str | None:
    return None if isinstance(value, str) and value == "batch" else _flag(value)


def _verbosity(value: Any) -> str | None:
    words = "'auto', 0, 1 or 2"
    if isinstance(value, str):
        return None if value == "auto" else words
    sound = _flag(value) is None or (_whole(0)(value) is None and value <= 2)
    return None if sound else words


def _share(value: Any) -> str | None:
    return None if _number(value) and 0 <= value < 1 else "a number from 0 up to, not including, 1"


def _callbacks(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_callbacks, value)), None)
    sound = not isinstance(value, type) and hasattr(value, "set_model")
    return None if sound else "a keras.callbacks.Callback, or a list of them"


def _class_weight(value: Any) -> str | None:
    sound = isinstance(value, Mapping) and all(map(_number, [*value.keys(), *value.values()]))
    return None if sound else "a mapping: class -> weight"


def _weight_of_samples(value: Any) -> str | None:
    if isinstance(value, (list, tuple, Mapping)):
        inner = list(value.values() if isinstance(value, Mapping) else value)
        return next(filter(None, map(_weight_of_samples, inner or [0])), None)
    sound = _is_array(value) and _of_numbers(value) is None
    return None if sound else "an array with a number for each sample"


def _frequency(value: Any) -> str | None:
    several = isinstance(value, (list, tuple, set, frozenset, range))
    sound = several and all(_COUNT(epoch) is None for epoch in value)
    return None if sound or _COUNT(value) is None else "a number of epochs, or a list of epochs"


_COUNT = _whole(1)
_DOORS: dict[str, Door] = {
    "batch_size": _COUNT,
    "boundaries": _listed("a list of layers"),
    "cache": _cache,
    "callbacks": _callbacks,
    "class_weight": _class_weight,
    "dropout": _flag,
    "dtype": _word,
    "engine": _word,
    "epochs": _COUNT,
    "history": _history,
    "ignore": _names,
    "initial_epoch": _whole(0),
    "learning_rate_ratio": _ratio,
    "loader": _loader,
    "lock_timeout": _amount,
    "max_gb": _amount,
    "max_samples": _COUNT,
    "method": _word,
    "metric": _text,
    "metrics": _metrics,
    "models_or_states": _sequence,
    "optimizer": _function,
    "options": _options,
    "params": _flag,
    "path": _folder,
    "precision": _text,
    "round_trip": _flag,
    "sample": _of_numbers,
    "sample_weight": _weight_of_samples,
    "samples": _word,
    "seed": _whole(0),
    "seeds": _COUNT,
    "select": _names,
    "shuffle": _shuffle,
    "statistics": _flag,
    "steps_per_epoch": _COUNT,
    "stop_early": _flag,
    "through": _through,
    "treatments": _names,
    "validation_batch_size": _COUNT,
    "validation_freq": _frequency,
    "validation_split": _share,
    "validation_steps": _COUNT,
    "verbose": _verbosity,
    "views": _COUNT,
    "weights": _weights,
}
