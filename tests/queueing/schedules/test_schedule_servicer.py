"""ScheduleService over a real server, with the broker and the state in files."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from plexus.client.failures import problem
from plexus.queueing.v1 import queueing_pb2, schedules_pb2_grpc
from plexus.queueing.v1 import schedules_pb2 as pb
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.resources import Subscription, Topic
from services.queueing.schedules.runner import Runner
from services.queueing.schedules.servicer import ScheduleServicer
from services.queueing.schedules.store import ScheduleStore
from services.queueing.state import Database
from tests.contracts import hostile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path

    from services.queueing.domain import Broker
    from tests.conftest import Serve

WITHIN_S = 60
LATER = datetime(2999, 1, 1, tzinfo=UTC)


class Server:
    """A stub with its broker."""

    def __init__(self, stub: schedules_pb2_grpc.ScheduleServiceStub, broker: Broker) -> None:
        self.stub = stub
        self.broker = broker

    async def create(self, name: str = "s", **settings: Any) -> pb.Schedule:
        message = pb.Schedule(name=name, **{"topic": "jobs", **settings})
        if message.WhichOneof("when") is None:
            message.cron.expression = "@yearly"
        return await self.stub.CreateSchedule(pb.CreateScheduleRequest(schedule=message))

    async def get(self, name: str = "s") -> pb.Schedule:
        return await self.stub.GetSchedule(pb.GetScheduleRequest(schedule=name))


@asynccontextmanager
async def serving(folder: Path, serve: Serve, *, ahead_s: float = 0) -> AsyncIterator[Server]:
    """The service on a folder, as it is composed, with a clock that is so far ahead."""
    async with (
        Database(f"sqlite:///{folder}/state.sqlite") as database,
        SqliteBroker(folder / "queue.sqlite") as broker,
    ):
        store = ScheduleStore(database)
        await store.migrate()
        runner = Runner(broker, database, dedup_window_s=600, poll_s=5, clock=lambda: time.time() + ahead_s)
        servicer = ScheduleServicer(store, runner, broker, most=20, shortest=timedelta(seconds=1))
        async with (
            runner.running(),
            serve(
                lambda server: schedules_pb2_grpc.add_ScheduleServiceServicer_to_server(servicer, server)
            ) as channel,
        ):
            yield Server(schedules_pb2_grpc.ScheduleServiceStub(channel), broker)


@pytest.fixture
async def server(tmp_path: Path, serve: Serve) -> AsyncIterator[Server]:
    async with serving(tmp_path, serve) as server:
        await server.broker.create_topic(Topic("jobs"))
        await server.broker.create_subscription(Subscription("work", "jobs"))
        yield server


def at(moment: datetime) -> timestamp_pb2.Timestamp:
    found = timestamp_pb2.Timestamp()
    found.FromDatetime(moment)
    return found


def soon(seconds: float) -> timestamp_pb2.Timestamp:
    return at(datetime.now(UTC) + timedelta(seconds=seconds))


def iso(moment: timestamp_pb2.Timestamp) -> str:
    return moment.ToDatetime(tzinfo=UTC).isoformat().replace("+00:00", "Z")


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and field of a refused call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = problem(caught.value)
    field = found.violations[0].field if found.violations else ""
    return found.code, found.reason, field


async def test_a_schedule_is_created_read_and_deleted(server: Server) -> None:
    message = queueing_pb2.Message(data=b"x", attributes={"k": "v"}, priority=queueing_pb2.PRIORITY_HIGH)
    cron = pb.Cron(expression="30 2 * * *", time_zone="Europe/Berlin")
    made = await server.create(cron=cron, message=message)
    assert await server.get() == made
    assert (made.state, made.revision, made.firings) == (pb.SCHEDULE_STATE_ACTIVE, 1, 0)
    assert (made.missed_runs, made.max_missed_runs) == (pb.MISSED_RUNS_ONCE, 100)
    assert made.message == message
    assert made.next_fire_time.ToDatetime() > made.create_time.ToDatetime()
    await server.stub.DeleteSchedule(pb.DeleteScheduleRequest(schedule="s"))
    for call in (
        server.get(),
        server.stub.DeleteSchedule(pb.DeleteScheduleRequest(schedule="s")),
        server.stub.PauseSchedule(pb.PauseScheduleRequest(schedule="s")),
        server.stub.RunSchedule(pb.RunScheduleRequest(schedule="s")),
        server.stub.ListRuns(pb.ListRunsRequest(schedule="s")),
        server.stub.UpdateSchedule(pb.UpdateScheduleRequest(schedule=pb.Schedule(name="s"))),
    ):
        assert (await refusal(call))[:2] == (grpc.StatusCode.NOT_FOUND, "SCHEDULE_NOT_FOUND")


async def test_nonsense_is_refused_by_field_and_reason(server: Server) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT

    def every(seconds: float) -> pb.Every:
        interval = duration_pb2.Duration()
        interval.FromTimedelta(timedelta(seconds=seconds))
        return pb.Every(interval=interval)

    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"cron": pb.Cron(expression="61 * * * *")}, "INVALID_CRON", "schedule.cron.expression"),
        (
            {"cron": pb.Cron(expression="@daily", time_zone="Mars/Base")},
            "UNKNOWN_TIME_ZONE",
            "schedule.cron.time_zone",
        ),
        ({"at": soon(-1)}, "AT_IN_PAST", "schedule.at"),
        ({"at": timestamp_pb2.Timestamp(seconds=10**12)}, "INVALID_ARGUMENT", "schedule.at"),
        ({"every": every(0.5)}, "INTERVAL_TOO_SHORT", "schedule.every.interval"),
        ({"every": pb.Every()}, "INTERVAL_TOO_SHORT", "schedule.every.interval"),
        ({"every": every(367 * 86400)}, "INTERVAL_TOO_LONG", "schedule.every.interval"),
        ({"start_time": at(LATER), "end_time": at(LATER)}, "END_BEFORE_START", "schedule.end_time"),
        ({"end_time": soon(-1)}, "NEVER_FIRES", "schedule.end_time"),
        ({"jitter": duration_pb2.Duration(seconds=-1)}, "INVALID_ARGUMENT", "schedule.jitter"),
        ({"name": "no name"}, "INVALID_ARGUMENT", "schedule.name"),
        ({"message": queueing_pb2.Message(dedup_id="x")}, "INVALID_ARGUMENT", "schedule.message.dedup_id"),
    ]
    for settings, reason, field in cases:
        assert await refusal(server.create(**{"name": "bad", **settings})) == (invalid, reason, field)
    assert (await refusal(server.create(topic="nothing")))[0] is grpc.StatusCode.NOT_FOUND
    request = pb.CreateScheduleRequest(schedule=pb.Schedule(name="s", topic="jobs"))
    assert await refusal(server.stub.CreateSchedule(request)) == (invalid, "INVALID_ARGUMENT", "schedule")
    listed = await server.stub.ListSchedules(pb.ListSchedulesRequest())
    assert list(listed.schedules) == []


async def test_names_are_unique_and_their_number_is_bounded(server: Server) -> None:
    await server.create("s0")
    assert (await refusal(server.create("s0")))[:2] == (grpc.StatusCode.ALREADY_EXISTS, "SCHEDULE_EXISTS")
    for number in range(1, 20):
        await server.create(f"s{number}")
    code, reason, _ = await refusal(server.create("one-more"))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SCHEDULES")


async def test_a_repeated_creation_and_run_answer_as_the_first_did(server: Server) -> None:
    schedule = pb.Schedule(name="s", topic="jobs", cron=pb.Cron(expression="@yearly"))
    request = pb.CreateScheduleRequest(schedule=schedule, request_id="r1")
    assert await server.stub.CreateSchedule(request) == await server.stub.CreateSchedule(request)
    run = pb.RunScheduleRequest(schedule="s", request_id="r1")
    first = await server.stub.RunSchedule(run)
    assert (first.number, first.manual, first.state) == (1, True, pb.RUN_STATE_PUBLISHED)
    assert await server.stub.RunSchedule(run) == first
    assert (await server.broker.stats("work")).ready == 1


async def test_settings_change_by_mask_and_only_those_that_may(server: Server) -> None:
    await server.create(max_firings=7)
    wanted = pb.Schedule(name="s", cron=pb.Cron(expression="@daily", time_zone="Asia/Tokyo"), topic="jobs")
    mask = field_mask_pb2.FieldMask(paths=["cron"])
    changed = await server.stub.UpdateSchedule(pb.UpdateScheduleRequest(schedule=wanted, update_mask=mask))
    assert (changed.cron.time_zone, changed.max_firings, changed.revision) == ("Asia/Tokyo", 7, 2)
    part = pb.Schedule(
        name="s", cron=pb.Cron(expression="@weekly"), message=queueing_pb2.Message(data=b"new")
    )
    part.message.attributes["kind"] = "not named"
    mask = field_mask_pb2.FieldMask(paths=["cron.expression", "message.data"])
    changed = await server.stub.UpdateSchedule(pb.UpdateScheduleRequest(schedule=part, update_mask=mask))
    assert (changed.cron.expression, changed.cron.time_zone) == ("@weekly", "Asia/Tokyo")
    assert (changed.message.data, dict(changed.message.attributes)) == (b"new", {})
    wanted = pb.Schedule(name="s", at=soon(1000), paused=True)
    changed = await server.stub.UpdateSchedule(pb.UpdateScheduleRequest(schedule=wanted))
    assert (changed.WhichOneof("when"), changed.state) == ("at", pb.SCHEDULE_STATE_PAUSED)
    same = await server.stub.UpdateSchedule(pb.UpdateScheduleRequest(schedule=wanted))
    assert same.revision == changed.revision == 4
    for paths, schedule, reason in (
        (["name"], wanted, "INVALID_ARGUMENT"),
        (["revision"], wanted, "INVALID_ARGUMENT"),
        (["message.nonsense"], wanted, "INVALID_ARGUMENT"),
        (["message.attributes.kind"], wanted, "INVALID_ARGUMENT"),
        (["cron.time_zone"], pb.Schedule(name="s", cron=pb.Cron(time_zone="Asia/Tokyo")), "INVALID_CRON"),
        (["at"], pb.Schedule(name="s", at=soon(-5)), "AT_IN_PAST"),
        (["at"], pb.Schedule(name="s"), "INVALID_ARGUMENT"),
        (["cron"], pb.Schedule(name="s", cron=pb.Cron(expression="nonsense")), "INVALID_CRON"),
    ):
        mask = field_mask_pb2.FieldMask(paths=paths)
        request = pb.UpdateScheduleRequest(schedule=schedule, update_mask=mask)
        assert (await refusal(server.stub.UpdateSchedule(request)))[1] == reason
    topic = pb.UpdateScheduleRequest(schedule=pb.Schedule(name="s", topic="nothing"))
    assert (await refusal(server.stub.UpdateSchedule(topic)))[0] is grpc.StatusCode.NOT_FOUND
    assert await server.get() == changed


async def test_listings_are_filtered_and_paged(server: Server) -> None:
    await server.broker.create_topic(Topic("other"))
    for number in range(5):
        await server.create(f"s{number}", topic="jobs" if number < 3 else "other", paused=number == 0)

    async def names(**settings: Any) -> tuple[list[str], str]:
        answer = await server.stub.ListSchedules(pb.ListSchedulesRequest(**settings))
        return [schedule.name for schedule in answer.schedules], answer.next_page_token

    first, token = await names(page_size=3)
    rest, end = await names(page_size=3, page_token=token)
    assert (first, rest, end) == (["s0", "s1", "s2"], ["s3", "s4"], "")
    assert (await names(topic="other"))[0] == ["s3", "s4"]
    assert (await names(state=pb.SCHEDULE_STATE_PAUSED))[0] == ["s0"]
    assert (await names(state=pb.SCHEDULE_STATE_ACTIVE, topic="jobs"))[0] == ["s1", "s2"]
    call = server.stub.ListSchedules(pb.ListSchedulesRequest(topic="jobs", page_token=token))
    assert (await refusal(call))[1] == "INVALID_PAGE_TOKEN"


async def test_a_listing_of_large_messages_fits_into_an_answer(server: Server) -> None:
    message = queueing_pb2.Message(data=b"x" * 256 * 1024, attributes={"k": "v"})
    for number in range(20):
        await server.create(f"s{number}", message=message)
    answer = await server.stub.ListSchedules(pb.ListSchedulesRequest(page_size=1000))
    assert [found.message.attributes["k"] for found in answer.schedules] == ["v"] * 20
    assert answer.ByteSize() < 10_000
    assert (await server.get("s7")).message.data == message.data


async def test_pause_and_resume(server: Server) -> None:
    await server.create()
    paused = await server.stub.PauseSchedule(pb.PauseScheduleRequest(schedule="s"))
    assert (paused.state, paused.HasField("next_fire_time")) == (pb.SCHEDULE_STATE_PAUSED, False)
    assert await server.stub.PauseSchedule(pb.PauseScheduleRequest(schedule="s")) == paused
    resumed = await server.stub.ResumeSchedule(pb.ResumeScheduleRequest(schedule="s"))
    assert (resumed.state, resumed.revision) == (pb.SCHEDULE_STATE_ACTIVE, 3)
    assert resumed.HasField("next_fire_time")


async def test_a_time_that_comes_is_published_and_told(server: Server) -> None:
    every = pb.Every(interval=duration_pb2.Duration(seconds=1))
    message = queueing_pb2.Message(data=b"now", attributes={"k": "v"})
    made = await server.create(every=every, message=message, max_firings=1)
    due = made.next_fire_time
    deliveries = await server.broker.pull("work", max_messages=9, max_bytes=10**6, wait_s=WITHIN_S)
    (delivery,) = deliveries
    assert delivery.data == b"now"
    assert delivery.message.attributes["k"] == "v"
    assert delivery.message.attributes["plexus-schedule"] == "s"
    assert delivery.message.published >= due.ToDatetime(tzinfo=UTC).timestamp()
    async with asyncio.timeout(WITHIN_S):
        while not (found := await server.get()).HasField("last_fire_time"):  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.02)
    assert (found.state, found.firings) == (pb.SCHEDULE_STATE_COMPLETED, 1)
    runs = await server.stub.ListRuns(pb.ListRunsRequest(schedule="s"))
    (run,) = runs.runs
    assert (run.state, run.message_id) == (pb.RUN_STATE_PUBLISHED, delivery.message.message_id)
    assert delivery.message.attributes["plexus-schedule-due"] == iso(run.due_time)


async def test_a_run_whose_topic_is_gone_fails_and_is_told(server: Server) -> None:
    await server.create()
    await server.broker.delete_topic("jobs")
    call = server.stub.RunSchedule(pb.RunScheduleRequest(schedule="s"))
    assert (await refusal(call))[0] is grpc.StatusCode.NOT_FOUND
    found = await server.get()
    assert "jobs" in found.last_error
    (run,) = (await server.stub.ListRuns(pb.ListRunsRequest(schedule="s"))).runs
    assert (run.state, run.error) == (pb.RUN_STATE_FAILED, found.last_error)


async def test_runs_are_paged_newest_first(server: Server) -> None:
    await server.create()
    for _ in range(5):
        await server.stub.RunSchedule(pb.RunScheduleRequest(schedule="s"))
    page = await server.stub.ListRuns(pb.ListRunsRequest(schedule="s", page_size=3))
    rest = await server.stub.ListRuns(
        pb.ListRunsRequest(schedule="s", page_size=3, page_token=page.next_page_token)
    )
    assert [run.number for run in (*page.runs, *rest.runs)] == [5, 4, 3, 2, 1]
    assert rest.next_page_token == ""


async def test_a_preview_keeps_nothing(server: Server) -> None:
    request = pb.PreviewScheduleRequest(
        schedule=pb.Schedule(cron=pb.Cron(expression="30 2 * * *", time_zone="Europe/Berlin")),
        count=3,
        after=at(datetime(2026, 3, 27, 12, tzinfo=UTC)),
    )
    answer = await server.stub.PreviewSchedule(request)
    assert [each.ToJsonString() for each in answer.fire_times] == [
        "2026-03-28T01:30:00Z",
        "2026-03-29T01:00:00Z",
        "2026-03-30T00:30:00Z",
    ]
    assert (
        len(
            (
                await server.stub.PreviewSchedule(pb.PreviewScheduleRequest(schedule=request.schedule))
            ).fire_times
        )
        == 10
    )
    request.schedule.max_firings = 2
    assert len((await server.stub.PreviewSchedule(request)).fire_times) == 2
    request.schedule.cron.expression = "* * 31 2 *"
    assert (await refusal(server.stub.PreviewSchedule(request)))[1] == "INVALID_CRON"
    request.count = 101
    assert (await refusal(server.stub.PreviewSchedule(request)))[2] == "count"
    made = await server.create(cron=pb.Cron(expression="@daily"), jitter=duration_pb2.Duration(seconds=3600))
    preview = await server.stub.PreviewSchedule(pb.PreviewScheduleRequest(schedule=made, count=1))
    assert list(preview.fire_times) == [made.next_fire_time]


async def test_schedules_and_their_times_survive_a_restart(tmp_path: Path, serve: Serve) -> None:
    async with serving(tmp_path, serve) as server:
        await server.broker.create_topic(Topic("jobs"))
        await server.broker.create_subscription(Subscription("work", "jobs"))
        made = await server.create(at=soon(600))
        await server.create("later", at=at(LATER))
    async with serving(tmp_path, serve, ahead_s=3600) as server:
        (delivery,) = await server.broker.pull("work", max_messages=9, max_bytes=10**6, wait_s=WITHIN_S)
        assert delivery.message.attributes["plexus-schedule-due"] == iso(made.at)
        assert (await server.get("later")).state == pb.SCHEDULE_STATE_ACTIVE


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(server: Server) -> None:
    async def restore() -> None:
        with suppress(grpc.aio.AioRpcError):
            await server.create()

    await restore()
    schedule = {"name": "s", "topic": "jobs", "cron": {"expression": "@yearly"}}
    bases = {
        "CreateSchedule": {"schedule": schedule | {"name": "new"}},
        "UpdateSchedule": {"schedule": schedule},
        "PreviewSchedule": {"schedule": schedule},
    }
    service = pb.DESCRIPTOR.services_by_name["ScheduleService"]
    await hostile.probe(server.stub, service, {"schedule": "s"}, bases, restore)
