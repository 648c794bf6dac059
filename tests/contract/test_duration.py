"""Durations: Go's grammar in, Go's text out, no bare numbers."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from prefect_webapi.contract.duration import GoDuration, format_duration, parse_duration

SECOND = timedelta(seconds=1)
DECADE = timedelta(days=3650)
UNITS = {
    **{"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9},
    **{"m": 60 * 10**9, "h": 3600 * 10**9},
}


class Model(BaseModel):
    span: GoDuration = SECOND
    other: GoDuration | None = None


@pytest.mark.parametrize("text", ["1m30s", "90s", "1.5m", "+1m30s", "0.025h", "1m29s1000ms"])
def test_one_span_written_in_several_ways_prints_one_way(text: str) -> None:
    """REQ-08, CASE-005."""
    assert parse_duration(text) == timedelta(seconds=90)
    assert Model(span=parse_duration(text)).model_dump() == {"span": "1m30s", "other": None}


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (timedelta(), "0s"),
        (timedelta(hours=1), "1h0m0s"),
        (timedelta(minutes=1), "1m0s"),
        (timedelta(hours=1, seconds=1), "1h0m1s"),
        (timedelta(days=7), "168h0m0s"),
        (timedelta(milliseconds=250), "250ms"),
        (timedelta(milliseconds=1, microseconds=500), "1.5ms"),
        (timedelta(microseconds=7), "7µs"),
        (timedelta(seconds=1.5), "1.5s"),
        (timedelta(seconds=12, microseconds=345678), "12.345678s"),
        (-timedelta(seconds=90), "-1m30s"),
        (-timedelta(microseconds=1), "-1µs"),
    ],
)
def test_a_span_prints_as_go_prints_it(span: timedelta, text: str) -> None:
    """REQ-08."""
    assert format_duration(span) == text


@pytest.mark.parametrize(
    "text",
    [
        *("1d", "1w", "1mm", "1y", "5", "s", ".s", "1h 30m", "1h,30m", " 1s", "1s ", "1s\n"),
        *("1H", "--1s", "1h-5m", "1.2.3s", "1e3s", "\u0661s", "PT30S", "0x1s", "inf", "1:30"),
    ],
)
def test_what_go_refuses_is_refused(text: str) -> None:
    """REQ-08, CASE-006: durationpy alone takes days and what stands between two parts."""
    with pytest.raises(ValueError, match='for example "30s"'):
        parse_duration(text)


@pytest.mark.parametrize("text", ["2562048h", "-2562048h", "9" * 400 + "h"])
def test_more_than_go_can_count_is_refused(text: str) -> None:
    """REQ-08."""
    with pytest.raises(ValueError, match="292 years"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "0", "+0", "-0", "0s", "0h0m", "1ns"])
def test_nothing_and_less_than_a_microsecond_are_zero(text: str) -> None:
    """REQ-08."""
    assert parse_duration(text) == timedelta()


@pytest.mark.parametrize("number", [30, 30.0, 0, -1])
def test_a_bare_number_is_refused_with_the_reason(number: float) -> None:
    """REQ-08, CASE-007."""
    for check in (
        lambda: Model.model_validate({"span": number}),
        lambda: Model.model_validate_json(f'{{"span": {number}}}'),
    ):
        with pytest.raises(ValidationError, match="nanoseconds") as found:
            check()
        assert '"30s"' in str(found.value)


@pytest.mark.parametrize("value", [True, None, [], b"30s"])
def test_other_values_are_refused(value: Any) -> None:
    """REQ-08."""
    with pytest.raises(ValidationError, match="not a duration"):
        Model.model_validate({"span": value})


def test_python_code_may_give_a_timedelta() -> None:
    """REQ-08, CASE-008."""
    assert Model(span=timedelta(seconds=30)).span == timedelta(seconds=30)


def test_forms_see_a_string() -> None:
    """REQ-12."""
    properties = Model.model_json_schema()["properties"]
    assert properties["span"]["type"] == "string"
    assert properties["other"]["anyOf"] == [{"type": "string"}, {"type": "null"}]


@given(st.timedeltas(-DECADE, DECADE))
def test_every_span_survives_printing_and_reading(span: timedelta) -> None:
    """REQ-08."""
    assert parse_duration(format_duration(span)) == span
    model = Model(span=span, other=span)
    assert Model.model_validate(model.model_dump(mode="json")) == model
    assert Model.model_validate_json(model.model_dump_json()) == model


@given(
    st.sampled_from(["", "+", "-"]),
    st.lists(
        st.tuples(
            st.from_regex(
                r"[0-9]{1,4}(\.[0-9]{0,6})?|\.[0-9]{1,6}", fullmatch=True, alphabet="0123456789."
            ),
            st.sampled_from(sorted(UNITS)),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_every_text_of_the_grammar_has_its_exact_value(
    sign: str, parts: list[tuple[str, str]]
) -> None:
    """REQ-08: within the microsecond that a timedelta can count."""
    text = sign + "".join(number + unit for number, unit in parts)
    exact = sum(Fraction("0" + number.rstrip(".")) * UNITS[unit] for number, unit in parts)
    exact = -exact if sign == "-" else exact
    assert abs(parse_duration(text) // timedelta(microseconds=1) - exact / 1000) <= Fraction(
        501, 1000
    )
