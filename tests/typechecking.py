"""The run-time type checker of the tests: beartype, for which an int is a float as it is for Python's type system."""

import ast
import inspect
from collections.abc import Callable, Hashable
from functools import cache, update_wrapper
from types import CodeType, FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, _decorator

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))


#: The checks of functions that are defined inside functions, by all that they depend on.
_checks: dict[Hashable, Callable] = {}


def checked(function: Callable) -> Callable:
    """Check a function's annotations at each call, but for the constructors of configs built on `TrainingArguments`.

    transformers breaks its own annotations there (its argument parser passes `debug=None`); such configs check their
    values in `__post_init__`.

    jaxtyping passes not the function itself but a stand-in with the same signature and no body. A function inside
    another is defined at each call of that one, and beartype takes a millisecond, so equal stand-ins share a check.
    """
    signature = inspect.signature(function)
    if "per_device_train_batch_size" in signature.parameters:
        return function
    if "<locals>" not in function.__qualname__:
        return _beartype(function)
    of_parameters = ((p.name, p.kind, p.annotation, type(p.default)) for p in signature.parameters.values())
    key = (function.__module__, function.__qualname__, *of_parameters, signature.return_annotation)
    try:
        check = _checks.get(key)
    except TypeError:  # an annotation that is not hashable
        return _beartype(function)
    if check is None:
        check = _checks[key] = _beartype(function)
    return check


def _is_type(statement: ast.stmt) -> bool:
    """Whether a statement imports types, from outside the package or from a file `types.py`, or names one."""
    if isinstance(statement, ast.ImportFrom):
        module = str(statement.module)
        return not module.startswith("hf_transfer_ext") or module.endswith(".types")
    return isinstance(statement, (ast.Import, ast.AnnAssign))


@cache
def _types_for_type_checkers(file: str) -> list[CodeType]:
    """What a file says about types under `if TYPE_CHECKING`, compiled."""
    with open(file, encoding="utf-8") as source:
        body = ast.parse(source.read()).body
    blocks = [one for one in body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    statements = [statement for block in blocks for statement in block.body if _is_type(statement)]
    return [compile(ast.Module([statement], type_ignores=[]), file, "exec") for statement in statements]


def _value_of(annotation: Any, scope: dict[str, Any], plain: Callable = _decorator._destring_annotation) -> Any:
    """The value of an annotation, also if its types are imported under `if TYPE_CHECKING` only.

    jaxtyping does not check annotations that it cannot evaluate. The imported types are not added to the module, so
    that code which uses them at run time fails in the tests as well.
    """
    found = plain(annotation, scope)
    file = scope.get("__file__")
    if found is not Any or not isinstance(annotation, str) or file is None:
        return found
    types = dict(scope)
    for statement in _types_for_type_checkers(file):
        try:
            exec(statement, types)
        except NameError:  # it names a class that is defined further down
            continue
    return plain(annotation, types)


def _has_shapes(annotation: Any) -> bool:
    """Whether jaxtyping's shapes are somewhere in an annotation."""
    is_array = isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    return is_array or any(_has_shapes(inner) for inner in get_args(annotation))


def _jaxtyped(*given: Any, plain: Callable = _decorator.jaxtyped, **options: Any) -> Any:
    """What `jaxtyped` gives; a function without shapes in its signature is checked by beartype alone.

    jaxtyping binds the arguments of each call to compare their shapes, some 20 microseconds for half a microsecond of
    checks. Functions inside functions stay with it, for they share their checks (see `checked`).
    """
    function = given[0] if given else None
    if (
        "typechecker" not in options
        or not inspect.isfunction(function)
        or "<locals>" in function.__qualname__
        or "per_device_train_batch_size" in function.__code__.co_varnames
        or inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
    ):
        return plain(*given, **options)
    annotations = {name: _value_of(one, function.__globals__) for name, one in function.__annotations__.items()}
    if any(_has_shapes(one) for one in annotations.values()):
        return plain(*given, **options)
    evaluated = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    update_wrapper(evaluated, function)
    del evaluated.__wrapped__
    evaluated.__kwdefaults__, evaluated.__annotations__ = function.__kwdefaults__, annotations
    return update_wrapper(_beartype(evaluated), function)


_decorator._destring_annotation = _value_of
_decorator.jaxtyped = jaxtyping.jaxtyped = _jaxtyped
