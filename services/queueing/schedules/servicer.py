"""ScheduleService over the store and the runner."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plexus.queueing.v1 import schedules_pb2, schedules_pb2_grpc
from services.queueing.schedules import convert, timing
from services.queueing.schedules.domain import MAX_PREVIEW, Schedule, check, check_fires, check_timing
from services.runtime.errors import InvalidArgumentError
from services.runtime.idempotency import Answers
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from services.queueing.domain import Broker
    from services.queueing.schedules.runner import Runner
    from services.queueing.schedules.store import ScheduleStore

_PREVIEW = 10
_PAGE = 100


class ScheduleServicer(schedules_pb2_grpc.ScheduleServiceServicer):
    """Validates, delegates, converts."""

    def __init__(
        self, store: ScheduleStore, runner: Runner, broker: Broker, *, most: int, shortest: timedelta
    ) -> None:
        self._store = store
        self._runner = runner
        self._broker = broker
        self._most = most
        self._shortest = shortest
        self._answers = Answers()

    async def CreateSchedule(
        self, request: schedules_pb2.CreateScheduleRequest, context: Any
    ) -> schedules_pb2.Schedule:
        return await self._answers.once(request, lambda: self._create(request.schedule))

    async def _create(self, message: schedules_pb2.Schedule) -> schedules_pb2.Schedule:
        now = self._runner.now()
        definition = convert.definition_from(message, now)
        check(message.name, definition, shortest=self._shortest)
        check_fires(definition.timing, now)
        await self._broker.get_topic(definition.topic)
        uid = uuid.uuid4().hex
        schedule = Schedule(message.name, uid, definition, now, now, paused=message.paused).from_now(now)
        await self._store.create(schedule, most=self._most)
        self._runner.changed()
        return convert.schedule_to(schedule)

    async def GetSchedule(
        self, request: schedules_pb2.GetScheduleRequest, context: Any
    ) -> schedules_pb2.Schedule:
        return convert.schedule_to(await self._store.get(request.schedule))

    async def UpdateSchedule(
        self, request: schedules_pb2.UpdateScheduleRequest, context: Any
    ) -> schedules_pb2.Schedule:
        return await self._answers.once(request, lambda: self._update(request))

    async def _update(self, request: schedules_pb2.UpdateScheduleRequest) -> schedules_pb2.Schedule:
        present = await self._store.get(request.schedule.name)
        wanted = convert.merged(present, request.schedule, request.update_mask)
        if wanted.topic != present.definition.topic:
            await self._broker.get_topic(wanted.topic)
        now = self._runner.now()

        def edit(before: Schedule) -> Schedule:
            message = convert.merged(before, request.schedule, request.update_mask)
            definition = convert.definition_from(message, before.created)
            check(before.name, definition, shortest=self._shortest)
            after = replace(before, definition=definition, paused=message.paused)
            if after == before:
                return before
            if definition.timing != before.definition.timing:
                check_fires(definition.timing, now)
            return _carried_on(before, replace(after, updated=now), now)

        changed = await self._store.change(request.schedule.name, edit)
        self._runner.changed()
        return convert.schedule_to(changed)

    async def ListSchedules(
        self, request: schedules_pb2.ListSchedulesRequest, context: Any
    ) -> schedules_pb2.ListSchedulesResponse:
        limit = page_size(request.page_size, maximum=_PAGE)
        scope = ("schedules", request.topic, str(request.state))
        after = (decode_token(request.page_token, *scope) or b"").decode()
        found = await self._store.schedules(
            topic=request.topic, state=convert.state_from(request.state), limit=limit + 1, after=after
        )
        token = encode_token(found[limit - 1].name.encode(), *scope) if len(found) > limit else ""
        return schedules_pb2.ListSchedulesResponse(
            schedules=map(convert.outline_to, found[:limit]), next_page_token=token
        )

    async def DeleteSchedule(
        self, request: schedules_pb2.DeleteScheduleRequest, context: Any
    ) -> schedules_pb2.DeleteScheduleResponse:
        await self._store.delete(request.schedule)
        return schedules_pb2.DeleteScheduleResponse()

    async def PauseSchedule(
        self, request: schedules_pb2.PauseScheduleRequest, context: Any
    ) -> schedules_pb2.Schedule:
        return await self._pause(request.schedule, paused=True)

    async def ResumeSchedule(
        self, request: schedules_pb2.ResumeScheduleRequest, context: Any
    ) -> schedules_pb2.Schedule:
        return await self._pause(request.schedule, paused=False)

    async def _pause(self, name: str, *, paused: bool) -> schedules_pb2.Schedule:
        now = self._runner.now()

        def edit(before: Schedule) -> Schedule:
            if before.paused == paused:
                return before
            return replace(before, paused=paused, updated=now).from_now(now)

        changed = await self._store.change(name, edit)
        self._runner.changed()
        return convert.schedule_to(changed)

    async def RunSchedule(self, request: schedules_pb2.RunScheduleRequest, context: Any) -> schedules_pb2.Run:
        run = await self._answers.once(request, lambda: self._runner.run_now(request.schedule))
        return convert.run_to(run)

    async def ListRuns(
        self, request: schedules_pb2.ListRunsRequest, context: Any
    ) -> schedules_pb2.ListRunsResponse:
        limit = page_size(request.page_size, maximum=_PAGE)
        scope = ("runs", request.schedule)
        before = int(decode_token(request.page_token, *scope) or b"0")
        found = await self._store.runs(request.schedule, limit=limit + 1, before=before)
        token = encode_token(str(found[limit - 1].number).encode(), *scope) if len(found) > limit else ""
        return schedules_pb2.ListRunsResponse(runs=map(convert.run_to, found[:limit]), next_page_token=token)

    async def PreviewSchedule(
        self, request: schedules_pb2.PreviewScheduleRequest, context: Any
    ) -> schedules_pb2.PreviewScheduleResponse:
        now = self._runner.now()
        after = convert.moment(request.after, "after") if request.HasField("after") else now
        if not 0 <= request.count <= MAX_PREVIEW:
            raise InvalidArgumentError(f"must be 1 to {MAX_PREVIEW}", field="count")
        # A rare time takes a while to find.
        times = await asyncio.to_thread(
            _preview, request.schedule, now, after, request.count or _PREVIEW, self._shortest
        )
        return schedules_pb2.PreviewScheduleResponse(fire_times=[convert.timestamp(each) for each in times])


def _carried_on(before: Schedule, after: Schedule, now: datetime) -> Schedule:
    """A changed schedule with its next time: the one it had, if nothing that concerns it changed."""
    old, new = before.definition, after.definition
    if (old.timing, old.max_firings, before.paused) == (new.timing, new.max_firings, after.paused):
        return after
    return after.from_now(now)


def _preview(
    message: schedules_pb2.Schedule, anchor: datetime, after: datetime, count: int, shortest: timedelta
) -> list[datetime]:
    when = convert.timing_from(message, anchor)
    check_timing(when, shortest=shortest)
    limit = min(count, message.max_firings) if message.max_firings > 0 else count
    check_fires(when, after)
    found = timing.dues(when, after, limit=limit)
    return [timing.fires(message.name, when.jitter, due) for due in found] if message.name else found
