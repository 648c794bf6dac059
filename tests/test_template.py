"""Templates in data: each value in its place, with its type, and never read as a template itself."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_webapi.contract.errors import (
    BadTaskSpecification,
    LedgerUnavailable,
    RemoteSystemError,
)
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.engine.contexts import TaskView, task_view
from prefect_webapi.template import (
    STORAGE,
    job_values,
    names_in,
    render,
    render_path,
    render_text,
    storage_values,
)
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import FolderOutputs, NoSecrets, request

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def with_inputs(**inputs: Any) -> dict[str, Any]:
    return {"inputs": inputs, "perRetryUniqueKey": "jkey"}


@pytest.mark.parametrize(
    "template",
    ["{{ .inputs.day }}", "{{.inputs.day}}", "{{   $inputs.day\t}}", "{{ .INPUTS.Day }}"],
)
def test_a_template_may_have_blanks_either_sigil_and_any_case(template: str) -> None:
    """REQ-70."""
    assert render(template, with_inputs(day=3)) == 3


@given(anything)
def test_a_string_that_is_one_template_becomes_the_value_with_its_type(value: Any) -> None:
    """REQ-70, CASE-263: bodies are data; a quote or a number of any length arrives as it is."""
    body = {"parameters": [{"value": "{{ .inputs.x }}"}]}
    sent = json.loads(json.dumps(render(body, with_inputs(x=value))))
    assert sent == {"parameters": [{"value": value}]}


@given(st.text())
def test_a_value_is_never_expanded_again(text: str) -> None:
    """CASE-262."""
    hostile = f"{{{{ .inputs.y }}}}{text}{{{{ .perRetryUniqueKey }}}}"
    values = with_inputs(x=hostile, y="secret")
    assert render("{{ .inputs.x }}", values) == hostile
    assert render("a {{ .inputs.x }} b", values) == f"a {hostile} b"


def test_values_that_make_a_template_together_are_not_expanded() -> None:
    """CASE-262."""
    values = with_inputs(a="{{ .inp", b="uts.c }}", c="secret")
    assert render("{{ .inputs.a }}{{ .inputs.b }}", values) == "{{ .inputs.c }}"


def test_inside_a_text_a_value_is_text_or_json() -> None:
    values = with_inputs(day=3, wet=True, none=None, parts=["ä", {"b": 1}])
    template = "{{ .inputs.day }}-{{ .inputs.wet }}-{{ .inputs.none }}-{{ .inputs.parts }}"
    assert render(template, values) == '3-true-null-["ä", {"b": 1}]'


def test_the_template_is_not_changed_and_what_is_no_template_stays() -> None:
    """CASE-264: the next job is rendered from what was written."""
    template = {"a": ["{{ .inputs.x }}", 1, None], "b": {"c": "{{ ds }} { .inputs.x }", "d": 1.5}}
    before = copy.deepcopy(template)
    rendered = render(template, with_inputs(x={"k": []}))
    rendered["a"].append("more")
    assert template == before
    assert rendered["b"] == before["b"]


def test_all_inputs_may_be_sent_as_they_are() -> None:
    assert render({"spec": "{{ .inputs }}"}, with_inputs(a=1)) == {"spec": {"a": 1}}


@pytest.mark.parametrize("name", ["inputs.hour", "input", "inputs.day.of", "perRetryUniqueKey.x"])
def test_a_name_without_a_value_is_the_users_error(name: str) -> None:
    """CASE-261: the text names the template, and what there is."""
    with pytest.raises(BadTaskSpecification, match=re.escape(name)) as caught:
        render(f"{{{{ .{name} }}}}", with_inputs(day=1))
    assert "day" in str(caught.value) or "inputs" in str(caught.value) or "nothing" in str(caught)


def test_of_names_that_differ_in_case_only_the_exact_one_is_taken() -> None:
    values = with_inputs(day=1, Day=2)
    assert render("{{ .inputs.Day }}", values) == 2
    with pytest.raises(BadTaskSpecification):
        render("{{ .inputs.DAY }}", values)


@given(st.text(min_size=1).filter(lambda text: text not in (".", "..")))
def test_a_value_stays_inside_its_segment_of_a_path(text: str) -> None:
    """CASE-257."""
    if "\ud800" <= max(text) <= "\udfff":
        return  # half a character has no form in UTF-8
    path = render_path("/jobs/{{ .inputs.id }}/runs", with_inputs(id=text))
    assert urlsplit(path).path == path
    assert [unquote(part) for part in path.split("/")] == ["", "jobs", text, "runs"]


@pytest.mark.parametrize("text", ["", ".", ".."])
def test_a_value_that_would_change_the_path_is_refused(text: str) -> None:
    """CASE-257: such a path would mean something else."""
    with pytest.raises(BadTaskSpecification):
        render_path("/jobs/{{ .inputs.id }}", with_inputs(id=text))


def test_a_value_in_an_address_is_encoded() -> None:
    link = render_text("https://x/?id={{ .inputs.id }}", with_inputs(id="a&b"), lambda s: s.upper())
    assert link == "https://x/?id=A&B"


def test_names_are_found_wherever_they_stand() -> None:
    template = {"a": ["{{ .inputs.x }} {{ $b }}", {"c": ("{{ .d.e }}",)}], "f": 1}
    assert list(names_in(template)) == ["inputs.x", "b", "d.e"]


@pytest.mark.parametrize(
    "template",
    ["{{ .inputs.x", "{{ . }}", "{{ .a b }}", "{{ .a | upper }}", ["{{ .a.. }}"], {"{{ .a }}": 1}],
)
def test_what_begins_like_a_template_and_is_none_is_a_fault(template: Any) -> None:
    with pytest.raises(ValueError, match="template"):
        list(names_in(template))


@pytest.fixture
def view(tmp_path: Path) -> TaskView:
    return task_view(
        request(ReportJob(day=3), task_run="t", inputs={"day": 3}),
        key=JobKey("jkey"),
        fingerprint=Fingerprint("f" * 64),
        attempt=1,
        secrets=NoSecrets(),
        store=FolderOutputs(tmp_path),
        connection=None,
        max_dataset_size_bytes=-1,
    )


def test_a_job_brings_its_key_and_its_labels(view: TaskView) -> None:
    """REQ-70, REQ-67."""
    values = job_values(view, {"x": 1})
    assert render("{{ .inputs.x }}", values) == 1
    assert render("{{ .perretryuniquekey }}", values) == "jkey"
    assert render("{{ .fingerprint }}", values) == "f" * 64
    assert render("{{ .labels.task_run_id }}", values) == "t"


async def test_places_in_the_storage_are_addresses(view: TaskView, tmp_path: Path) -> None:
    """REQ-70: each of them, and each another one; there is no attempt before the first."""
    values = await storage_values(view, [f"{{{{ .{name} }}}}" for name in STORAGE])
    assert values.pop("prevCheckpointPrefix") == ""
    assert len(values) == len(STORAGE) - 1
    assert len(set(values.values())) == len(values)
    assert all(address.startswith(str(tmp_path)) for address in values.values())
    written = [await view.data_store.read(values[name]) for name in ("input", "taskTemplatePath")]
    inputs, task = (json.loads(data or b"") for data in written)
    assert (inputs, task["custom"]["day"]) == ({"day": 3}, 3)


class Unreachable(FolderOutputs):
    async def uri(self, name: str, /) -> str:
        raise LedgerUnavailable("no storage")

    async def write(self, name: str, data: bytes, /) -> str:
        raise LedgerUnavailable("no storage")


async def test_only_what_is_named_is_looked_up(view: TaskView) -> None:
    """REQ-64, REQ-65: and a storage that is away is nobody's fault, and made no job."""
    ctx = replace(view, data_store=Unreachable(Path("nowhere")))
    assert await storage_values(ctx, {"x": "{{ .inputs.input }} {{ .perRetryUniqueKey }}"}) == {}
    with pytest.raises(RemoteSystemError) as caught:
        await storage_values(ctx, ["{{ .OUTPUTPREFIX }}"])
    assert not caught.value.job_may_exist
