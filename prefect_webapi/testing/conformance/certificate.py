"""What was found out about a plugin: as data, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

__all__ = ["Certificate", "Finding", "Subject", "Verdict"]


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    NOT_IMPLEMENTED = "not implemented"  # by the plugin
    NOT_CHECKED = "not checked"  # the service's description gives nothing to check it with
    NOT_REACHED = "not reached"  # another check failed that this one builds on
    NOT_RUN = "not run"  # left out of this run of the kit


class Finding(BaseModel):
    """What one check came to.

    Attributes:
        promise: what holds if it holds, in one sentence.
        told: why, with every verdict but `holds`; with it, what else was seen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: str
    promise: str
    verdict: Verdict
    told: str = ""
    seconds: float = 0.0


class Subject(BaseModel):
    """What was certified. `package` and `version`: of the distribution that the plugin is from, if it is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plugin: str
    task_types: tuple[str, ...]
    plugin_class: str
    package: str = ""
    version: str = ""
    guarantee: str
    optional: tuple[str, ...] = ()
    service: str


_HEADINGS = {
    Verdict.HOLDS: "Guaranteed",
    Verdict.FAILS: "NOT guaranteed: the check fails",
    Verdict.NOT_REACHED: "NOT guaranteed: not reached, since an earlier check fails",
    Verdict.NOT_IMPLEMENTED: "Not implemented by the plugin",
    Verdict.NOT_CHECKED: "Not checked: the description of the service leaves it out",
    Verdict.NOT_RUN: "Not run this time",
}


class Certificate(BaseModel):
    """Of one plugin against one service.

    Attributes:
        kit: version of this package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: Subject
    kit: str
    at: datetime
    findings: tuple[Finding, ...]

    @property
    def conforms(self) -> bool:
        """Every check was run and none failed; what is not implemented or not checked is listed."""
        bad = {Verdict.FAILS, Verdict.NOT_REACHED, Verdict.NOT_RUN}
        return not any(each.verdict in bad for each in self.findings)

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.findings)

    def of(self, verdict: Verdict) -> Sequence[Finding]:
        return [each for each in self.findings if each.verdict is verdict]

    def text(self) -> str:
        return "\n".join(self._lines())

    def _in_a_word(self) -> str:
        if self.of(Verdict.FAILS) or self.of(Verdict.NOT_REACHED):
            return "DOES NOT CONFORM"
        return "NOT DECIDED" if self.of(Verdict.NOT_RUN) else "CONFORMS"

    def _lines(self) -> Iterable[str]:
        subject = self.subject
        package = f", {subject.package} {subject.version}" if subject.package else ""
        yield f"Certificate of plugin {subject.plugin!r} ({subject.plugin_class}{package})"
        yield (
            f"guarantee {subject.guarantee!r}; optional methods: {', '.join(subject.optional) or 'none'}; "
            f"against {subject.service}"
        )
        for verdict, heading in _HEADINGS.items():
            found = self.of(verdict)
            if found:
                yield ""
                yield f"{heading} ({len(found)})"
            for each in found:
                yield f"  {each.check:<22} {each.promise}"
                if each.told and verdict is not Verdict.FAILS:
                    yield f"  {'':<22} {each.told}"
        yield ""
        yield (
            f"{self._in_a_word()}: "
            f"{', '.join(f'{len(self.of(v))} {v.value}' for v in Verdict if self.of(v))}; "
            f"{self.seconds:.0f} s on {self.at:%Y-%m-%d %H:%M} UTC, prefect-webapi {self.kit}"
        )
