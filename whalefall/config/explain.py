"""A pydantic error, told in one line to the person who wrote the values."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from whalefall.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Mapping[str, Any]) -> Model:
    """``model`` made from ``values``.

    Raises:
        UserError: names the first wrong key, its value, what is allowed, and for an unknown key
            the nearest valid one; further errors are only counted.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # The branches of a union complain one by one about the same value: keep one per key.
        messages = dict(_explain(model, each) for each in reversed(error.errors()))
    *others, first = messages.values()
    raise UserError(first + (f" (and {len(others)} more)" if others else ""))


def _explain(model: type[BaseModel], error: ErrorDetails) -> tuple[str, str]:
    """The key that is wrong, and a line about it."""
    section, path = _locate(model, error)
    name = ".".join(path)
    match error["type"]:
        case "value_error":  # raised by a validator of ours, which names its keys
            return name, str(error["ctx"]["error"])
        case "missing":
            return name, f"{name} is missing"
        case "extra_forbidden":
            parent = ".".join(path[:-1]) or "a run"
            return name, f"{name} is not a key of {parent}; {_suggestion(path[-1], section)}"
        case "model_type":
            allowed = "a mapping of keys"
        case _:
            allowed = re.sub(r"^Input (should be|is not) |, unable .*| for <.*", "", error["msg"])
    value = repr(error["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return name, f"{name} is {shown}; must be {allowed}"


def _locate(model: type[BaseModel], error: ErrorDetails) -> tuple[type[BaseModel], list[str]]:
    """The section that holds the wrong key, and the path to the key as the user writes it.

    A location of pydantic also names the branch of a union (``eos_token_id.int``): those are left.
    """
    path = []
    section, inner = model, model
    for part in error["loc"]:
        if isinstance(part, int):
            path.append(str(part))
        elif part in inner.model_fields:
            path.append(part)
            section, inner = inner, _section_in(inner.model_fields[part].annotation) or inner
        elif error["type"] == "extra_forbidden":
            path.append(part)
            section = inner
    return section, path


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as ``list[Phase]`` or ``RopeScaling | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _suggestion(key: str, section: type[BaseModel]) -> str:
    for name, field in section.model_fields.items():
        if (inner := _section_in(field.annotation)) and key in inner.model_fields:
            return f"did you mean {name}.{key}?"
    if near := get_close_matches(key, section.model_fields, n=1):
        return f"did you mean {near[0]}?"
    return f"its keys are {', '.join(section.model_fields)}"
