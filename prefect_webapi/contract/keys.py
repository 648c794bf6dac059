"""Names that survive a crash: the fingerprint of a job, its key, and names fitted to a service's rules.

A job's identity is (base, ordinal, attempt). The base is what the call is: the run key, the task and
the fingerprint of what it sends, or the user's own idempotency key. The ordinal parts equal calls, the
attempt parts retries. Nothing that Prefect draws anew at a re-run is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any, NewType, cast

from pydantic import BaseModel

from prefect_webapi.contract.errors import BadTaskSpecification

__all__ = [
    "Base",
    "Fingerprint",
    "JobKey",
    "base_of",
    "fingerprint_of",
    "fit_name",
    "idempotent_base",
    "is_visible",
    "job_key",
    "lowest_free",
]

JobKey = NewType("JobKey", str)
Fingerprint = NewType("Fingerprint", str)
Base = NewType("Base", str)

Levels = Mapping[str, str]
"""Enclosing runs of a call: run id to the id of its Running state."""

_DIGITS = "abcdefghijklmnopqrstuvwxyz0123456789"
_HASH_CHARS = 25  # of 36 symbols: 129 bits
_MIN_MAX_LENGTH = _HASH_CHARS + 1


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no blanks: equal data gives equal text in every process."""
    return _ENCODER.encode(value)


def _sha256(value: object) -> str:
    return _hashed(canonical_json(value))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint_of(task_type: str, connection: str, spec: BaseModel) -> Fingerprint:
    """Hash of everything that `create` would send, never of secrets.

    Raises:
        BadTaskSpecification: a field of the spec has no JSON form.
    """
    data = _sets_in_order(_as_json(spec), spec)
    return Fingerprint(_sha256([task_type, connection, data]))


def _as_json(spec: BaseModel) -> Any:
    try:
        return spec.model_dump(mode="json")
    except ValueError as error:  # also of bytes that are no UTF-8
        problem = str(error)
    for name in type(spec).model_fields:
        try:
            spec.model_dump(mode="json", include={name})
        except ValueError as error:
            raise BadTaskSpecification(
                f"{type(spec).__name__}.{name} has no JSON form: {error}. Give it as text, numbers, lists and mappings",
                code="NoJsonForm",
            ) from None
    raise BadTaskSpecification(f"{type(spec).__name__} has no JSON form: {problem}")


def _sets_in_order(data: Any, value: Any) -> Any:
    """`data`, the JSON form of `value`, with its sets sorted: another process lists them in another order.

    Where a serialiser of the author's own gave the data another shape, it is taken as it is.
    """
    if not _may_hold_sets(data):
        return data
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        names = (
            type(value).model_fields if isinstance(value, BaseModel) else value.__dataclass_fields__
        )
        value = {name: getattr(value, name) for name in names}
        if isinstance(data, dict):
            known = cast(dict[str, Any], data)
            return {k: _sets_in_order(v, value[k]) if k in value else v for k, v in known.items()}
    elif isinstance(value, Mapping) and isinstance(data, dict):
        known, parts = cast(dict[str, Any], data), cast(Mapping[Any, Any], value).values()
        if len(known) == len(parts):
            return {k: _sets_in_order(known[k], v) for k, v in zip(known, parts, strict=True)}
    elif isinstance(value, list | tuple | Set) and isinstance(data, list):
        items, parts = cast(list[Any], data), cast(Collection[Any], value)
        if len(items) == len(parts):
            items = [_sets_in_order(i, v) for i, v in zip(items, parts, strict=True)]
        return sorted(items, key=canonical_json) if isinstance(value, Set) else items
    return cast(Any, data)


def _may_hold_sets(data: Any) -> bool:
    """A set is a list here, and most specs hold none."""
    if isinstance(data, dict):
        parts = cast(dict[str, Any], data).values()
        return any(isinstance(part, dict | list) for part in parts)
    return isinstance(data, list)


def base_of(run_key: str, task_key: str, fingerprint: Fingerprint) -> Base:
    """Identity of a call without ordinal and attempt."""
    return Base(_hashed(f'{_list_that_begins(run_key, task_key)},"{fingerprint}"]'))


@lru_cache(maxsize=1024)
def _list_that_begins(*parts: str) -> str:
    """As canonical JSON, without its end: of many calls only the end differs."""
    return canonical_json(parts)[:-1]


def idempotent_base(idempotency_key: str) -> Base:
    """Identity of a call that the user named: equal names meet in every run."""
    return Base(_sha256(["idempotency_key", idempotency_key]))


def job_key(base: Base, ordinal: int, attempt: int) -> JobKey:
    """26 characters of `[a-z0-9]`, the first a letter, 129 bits of the hash kept."""
    return JobKey(_short_hash(f"{base}:{ordinal}:{attempt}"))


def _short_hash(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    digits: list[str] = []
    for _ in range(_HASH_CHARS):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "j" + "".join(digits)


def fit_name(name: str, min_length: int, max_length: int) -> str:
    """Bring `name` to a length between both bounds (included), by `[a-z0-9-]`, a letter first.

    Short names are padded on the right with `0`; of long ones a beginning is kept and the rest becomes a
    hash of 129 bits over the whole name.

    Raises:
        ValueError: `max_length` is below 26, where the hash would no longer tell names apart, or below
            `min_length`.
    """
    if max_length < _MIN_MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}; below {_MIN_MAX_LENGTH} names could collide")
    if min_length > max_length:
        raise ValueError(f"min_length {min_length} is above max_length {max_length}")
    clean = "".join(c if c in _DIGITS else "-" for c in name.lower())
    if clean != name or not clean[:1].isalpha() or len(clean) > max_length:
        kept = f"j-{clean}" if not clean[:1].isalpha() else clean
        kept = kept[: max(0, max_length - _MIN_MAX_LENGTH - 1)].rstrip("-")
        clean = f"{kept}-{_short_hash(name)}" if kept else _short_hash(name)
    return clean.ljust(min_length, "0")


def is_visible(claim_levels: Levels, mine: Levels) -> bool:
    """Whether a claim of the same execution of the root run counts for this caller.

    A claim made in an earlier execution of a subflow or of an enclosing task does not: that one runs
    again, and its calls shall meet their own jobs.
    """
    return all(mine.get(run, state) == state for run, state in claim_levels.items())


def lowest_free(taken: Iterable[int]) -> int:
    """The lowest ordinal not in `taken`."""
    numbers = set(taken)
    return next(n for n in range(len(numbers) + 1) if n not in numbers)
