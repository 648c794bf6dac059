"""Jobs run in a thread of the user's process; what the user has seeded there is the user's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect_webapi.clock import Clock
from prefect_webapi.engine.durations import Durations
from prefect_webapi.engine.evidence import back_off
from prefect_webapi.poller import Observation, Poller, ReadingPolicy


class Nobody:
    async def one(self, context: Any) -> Any: ...

    async def many(self, contexts: Sequence[Any]) -> Sequence[Any]:
        return contexts


async def test_a_sequence_that_the_user_has_seeded_goes_on_undisturbed() -> None:
    async def take(observation: Observation) -> None:
        return

    before = random.getstate()
    durations = Durations({})
    for seconds in range(200):
        durations.note("plugin", "task", float(seconds), float(seconds))
    back_off(3, timedelta(seconds=1), timedelta(seconds=30))
    poller = Poller(ReadingPolicy(initial=1.0, longest=30.0, workers=1), Nobody(), take, Clock())
    poller.again(poller.watch(None, None, is_known=True))
    assert random.getstate() == before
