"""The run-time type checker of the tests: beartype, for which an int is a float as it is for Python's type system."""

import inspect
from collections.abc import Callable

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Check a function's annotations at each call, but for the constructors of configs built on `TrainingArguments`.

    transformers breaks its own annotations there (its argument parser passes `debug=None`); such configs check their
    values in `__post_init__`.
    """
    names = inspect.signature(function).parameters
    return function if "per_device_train_batch_size" in names else _beartype(function)
