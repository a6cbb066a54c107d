"""Check the conditions that a user gives for samples: rows of numbers, prompts and codes."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NO_NEGATIVE = (
    "a distilled student makes one prediction a step, so it has no prediction for a negative prompt to move away from; "
    "describe what you want in the prompt, or sample the teacher"
)


def no_scale(baked: float | None) -> str:
    """Why a guidance scale is refused, and what to do instead. baked: the scale in the pairs that the student was
    trained on.
    """
    why = "this student was not trained with a guidance scale as input"
    if baked is None:
        return why
    what = f"{baked:g} is baked in by the pairs that it learned from"
    return f"{why}: {what}; leave it out, or train on pairs of another coupling.guidance"


def prompts_of(num: int, cond: Mapping[str, Any] | None) -> list[str] | None:
    """The prompts of `num` samples, None where cond has none."""
    prompt = (cond or {}).get("prompt")
    return [prompt] * num if isinstance(prompt, str) else None if prompt is None else list(prompt)


def texts_of(value: Any, num: int, key: str) -> list[str]:
    """One text for all samples, or one each, as `num` texts. Raises ValueError that names `key`."""
    if not isinstance(value, Iterable):
        raise ValueError(f"{key}: {value!r} was given; allowed: one text, or {num} texts")
    texts = [value] * num if isinstance(value, str) else list(value)
    if len(texts) != num or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"{key}: {len(texts)} given; allowed: one text, or {num} texts")
    return texts


def codes_of(value: Any, num: int, size: int) -> Tensor:
    """The codes z of a learned prior, (num, size) float32. Raises ValueError for other shapes or types."""
    try:
        z = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"z: {value!r} is no ({num}, {size}) numbers") from None
    if z.shape != (num, size):
        raise ValueError(f"z: has shape {tuple(z.shape)}, wants {(num, size)}")
    return z


def labels_of(value: Any, names: Sequence[str] | None) -> Any:
    """The labels with class names replaced by numbers. Raises ValueError for a name that is not in `names`."""
    if isinstance(value, str):
        return label_of(value, names)
    if isinstance(value, Iterable) and not isinstance(value, Tensor):
        return [label_of(one, names) if isinstance(one, str) else one for one in value]
    return value


def class_of(given: str | None, names: Sequence[str] | None) -> str | int | None:
    """The class that a user names: by its name if the student has one of that name, otherwise by its number."""
    if given is None or (names and given in names):
        return given
    return int(given) if re.fullmatch(r"-?\d{1,18}", given) else given


def label_of(name: str, names: Sequence[str] | None) -> int:
    """The number of the class of that name. Raises ValueError that lists the names."""
    if not names:
        raise ValueError(f"class: {name!r} was given, but this student knows no names of classes; give a number")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ValueError(f"class: no class {name!r}{hint}; there are: {shown}")
    return list(names).index(name)


def rows_of(value: Any, num: int, key: str, dtype: torch.dtype) -> Tensor:
    """One value for all samples, or one each, as (num,) of that dtype. Raises ValueError that names `key`."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{key}: {value!r} is neither a number nor {num} numbers") from None
    if dtype == torch.int64 and tensor.is_floating_point():
        raise ValueError(f"{key}: {value!r} is not a whole number")
    if tensor.ndim == 0:
        return tensor.to(dtype).expand(num)
    if tensor.shape != (num,):
        raise ValueError(f"{key}: has shape {tuple(tensor.shape)}, wants one value or {num}")
    return tensor.to(dtype)


def intervals_of(value: Any, num: int, widest: tuple[float, float]) -> Tensor:
    """The intervals of guidance as (num, 2) float32, `widest` where value is None; one pair for all samples, or one
    each. Raises ValueError for what is no interval; one that was not trained on is a warning.
    """
    try:
        given = torch.as_tensor(widest if value is None else value, dtype=torch.float32)
        intervals = given.reshape(*given.shape[:-1], 2).expand(num, 2)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"guidance_interval: {value!r} is no pair of times, nor {num} pairs") from None
    low, high = intervals.unbind(1)
    if not bool(((low >= 0) & (low <= high) & (high <= 1)).all()):
        raise ValueError(f"guidance_interval: {value} must be times (low, high) with 0 <= low <= high <= 1")
    first, last = widest
    if not bool(((low >= first - 1e-6) & (high <= last + 1e-6)).all()):
        what = f"guidance_interval: {value} is not within {first:g}..{last:g}, where this student was trained on it"
        warnings.warn(what, stacklevel=4)
    return intervals
