"""Tasks: declared, sent, run by a worker, over a real service."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import plexus.client
from plexus.client.replies import CALL_ID, REPLY_TO
from plexus.client.tasks import ACTION, COMPENSATION, PHASE, STEP, TASK
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
    from tests.servers.queueing import QueueingServer

pytestmark = pytest.mark.timeout(400)
LONG_S = 120.0


@dataclass
class Line:
    article: str
    count: int = 1


@asynccontextmanager
async def working(
    app: plexus.client.TaskApp, stub: QueueingServiceStub, **settings: Any
) -> AsyncIterator[plexus.client.Worker]:
    """The app, open, with a worker."""
    worker = plexus.client.Worker(app, stub, **settings)
    async with asyncio.timeout(2 * LONG_S), app.open(stub):
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.drain()
            await running


async def letters(stub: QueueingServiceStub, queue: str) -> list[pb.DeadLetter]:
    async with asyncio.timeout(LONG_S):
        while True:
            answer = await stub.ListDeadLetters(pb.ListDeadLettersRequest(subscription=queue))
            if answer.dead_letters:
                return list(answer.dead_letters)
            await asyncio.sleep(0.02)


async def test_a_task_gets_typed_arguments_reports_progress_and_gives_a_typed_result(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task()
    async def invoice(due: date, lines: list[Line], *, country: str = "NL") -> dict[str, int]:
        assert isinstance(due, date)
        for number, line in enumerate(lines):
            plexus.client.progress({"line": number, "article": line.article})
        return {country: sum(line.count for line in lines) + due.year}

    assert await invoice(date(2026, 1, 1), []) == {"NL": 2026}  # still a function
    async with working(app, queueing):
        handle = await invoice.delay(date(2026, 1, 1), [Line("pen", 2), Line("ink")], country="BE")
        assert [step async for step in handle.progress()] == [
            {"line": 0, "article": "pen"},
            {"line": 1, "article": "ink"},
        ]
        assert await handle.result(timeout_s=LONG_S) == {"BE": 2029}
        assert await handle.result(timeout_s=LONG_S) == {"BE": 2029}
        assert handle.done


async def test_a_plain_function_runs_in_a_thread_and_reports_from_there(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")
    loop_thread = threading.get_ident()

    @app.task()
    def thread(schema: int) -> bool:  # a name that models have too
        plexus.client.progress(schema)
        return threading.get_ident() != loop_thread and plexus.client.attempt() == 1

    async with working(app, queueing):
        handle = await thread.delay(7)
        assert await handle.result(timeout_s=LONG_S) is True
        assert [step async for step in handle.progress()] == [7]


async def test_arguments_that_do_not_fit_are_refused_where_they_are_sent(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task()
    async def charge(order: int, note: Any = None) -> None: ...

    async with app.open(queueing):
        for send in (
            lambda: charge.send(order=1, order_again=2),  # type: ignore[call-arg]
            lambda: charge.send("seventeen"),  # type: ignore[arg-type]
            lambda: charge.send(17, other=1),  # type: ignore[call-arg]
            lambda: charge.delay(17, object()),
        ):
            with pytest.raises(TypeError):
                await send()
    with pytest.raises(RuntimeError, match="open"):
        await charge.send(17)


def test_what_cannot_be_a_task_is_refused_where_it_is_declared() -> None:
    app = plexus.client.TaskApp("shop")

    def several(*numbers: int) -> None: ...

    with pytest.raises(TypeError, match="numbers"):
        app.task()(several)
    with pytest.raises(ValueError, match="retries"):
        app.task(retries=-1)
    app.task(name="one")(lambda: None)
    with pytest.raises(ValueError, match="'one' already"):
        app.task(name="one")(lambda: None)


async def test_retries_are_chosen_by_exception_and_what_is_given_up_is_told_and_kept(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")
    attempts: dict[str, list[int]] = {
        "flaky": [],
        "broken": [],
        "later": [],
        "wrong": [],
        "no": [],
    }

    @app.task(retries=2, retry_on=(OSError,), backoff_s=0)
    async def work(kind: str) -> str:
        attempts[kind].append(plexus.client.attempt())
        if kind == "flaky" and plexus.client.attempt() < 3:
            raise ConnectionError("not yet")
        if kind == "broken":
            raise OSError("for ever")
        if kind == "later" and plexus.client.attempt() < 3:
            raise plexus.client.RetryLaterError("closed today", delay_s=0)
        if kind == "wrong":
            raise KeyError("bug")
        if kind == "no":
            raise plexus.client.TaskError("sold out", code=grpc.StatusCode.NOT_FOUND, reason="SOLD_OUT")
        return kind

    failures = {}
    async with working(app, queueing):
        handles = {kind: await work.delay(kind) for kind in attempts}
        for kind in ("flaky", "later"):
            assert await handles.pop(kind).result(timeout_s=LONG_S) == kind
        for kind, handle in handles.items():
            with pytest.raises(plexus.client.TaskFailedError) as caught:
                await handle.result(timeout_s=LONG_S)
            failures[kind] = (caught.value.code.name, caught.value.reason, str(caught.value))
    tried = {kind: len(numbers) for kind, numbers in attempts.items()}
    assert tried == {"flaky": 3, "broken": 3, "later": 3, "wrong": 1, "no": 1}
    assert attempts["broken"] == [1, 2, 3]
    assert failures == {
        "broken": ("INTERNAL", "", "OSError: for ever"),
        "wrong": ("INTERNAL", "", "KeyError: 'bug'"),
        "no": ("NOT_FOUND", "SOLD_OUT", "sold out"),
    }
    assert sorted(letter.reason for letter in await letters(queueing, "shop")) == [
        "KeyError: 'bug'",
        "OSError: for ever",
        "sold out",
    ]


async def test_a_run_that_takes_too_long_has_failed(queueing: QueueingServiceStub) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task(timeout_s=0.01)
    async def slow() -> None:
        await asyncio.Event().wait()

    async with working(app, queueing):
        with pytest.raises(plexus.client.TaskFailedError) as caught:
            await (await slow.delay()).result(timeout_s=LONG_S)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "longer than 0.01 s" in str(caught.value)


async def test_what_is_too_large_to_be_told_is_told_so(queueing: QueueingServiceStub) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task()
    async def large(size: int) -> str:
        with pytest.raises(ValueError, match="at most"):
            plexus.client.progress("x" * size)
        return "x" * size

    async with working(app, queueing):
        with pytest.raises(plexus.client.TaskFailedError) as caught:
            await (await large.delay(11 * 1024 * 1024)).result(timeout_s=LONG_S)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESULT_TOO_LARGE")


async def test_messages_of_other_makers_are_taken_or_given_up_with_a_reason(
    queueing: QueueingServiceStub,
) -> None:
    """As JSON by hand through Call, with nonsense, and with a caller that is not there any more."""
    app = plexus.client.TaskApp("shop")

    @app.task()
    async def double(number: int) -> int:
        return 2 * number

    attributes = {TASK: "double"}
    async with working(app, queueing):
        await double.send(1)  # the queue is there now
        request = pb.CallRequest(topic="shop", data=b'{"number": 21}', attributes=attributes)
        request.timeout.FromSeconds(int(LONG_S))
        answer = await queueing.CallAndWait(pb.CallAndWaitRequest(request=request))
        assert answer.result.data == b"42"
        request.data = b'{"number": "many", "extra": 1}'
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await queueing.CallAndWait(pb.CallAndWaitRequest(request=request))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        gone = attributes | {REPLY_TO: "plexus-reply.gone", CALL_ID: "1"}
        messages = [
            pb.Message(data=b'{"number": 1}', attributes=gone),
            pb.Message(data=b"\xff not JSON", attributes=attributes),
        ]
        await queueing.Publish(pb.PublishRequest(topic="shop", messages=messages))
        async with asyncio.timeout(LONG_S):
            while len(found := await letters(queueing, "shop")) < 2:  # noqa: ASYNC110 - polls a server
                await asyncio.sleep(0.02)
    assert [letter.data for letter in found] == [request.data, b"\xff not JSON"]


async def test_a_task_goes_on_elsewhere_without_its_worker_and_its_result_comes_after_a_kill(
    server: QueueingServer, killable: QueueingServiceStub
) -> None:
    app = plexus.client.TaskApp("shop")
    begun, go_on = asyncio.Event(), asyncio.Event()
    runs = 0

    @app.task(retries=5, backoff_s=0)
    async def work(number: int) -> int:
        nonlocal runs
        runs += 1
        begun.set()
        await go_on.wait()
        return number

    async with asyncio.timeout(2 * LONG_S), app.open(killable):
        first = asyncio.create_task(plexus.client.Worker(app, killable).run())
        handle = await work.delay(1)
        await begun.wait()
        first.cancel()  # gives the task back at once
        await asyncio.gather(first, return_exceptions=True)
        begun.clear()
        second = plexus.client.Worker(app, killable)
        running = asyncio.create_task(second.run())
        await begun.wait()
        server.kill()
        server.start()
        go_on.set()
        assert await handle.result(timeout_s=LONG_S) == 1
        assert await (await work.delay(2)).result(timeout_s=LONG_S) == 2
        second.drain()
        await running
    assert runs >= 3


async def test_many_tasks_at_once_get_their_own_results(queueing: QueueingServiceStub) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task()
    async def double(number: int) -> int:
        plexus.client.progress(number)
        return 2 * number

    async with working(app, queueing, concurrency=100):
        handles = await asyncio.gather(*(double.delay(number) for number in range(500)))
        results = await asyncio.gather(*(handle.result(timeout_s=LONG_S) for handle in handles))
        assert results == [2 * number for number in range(500)]
        assert [step async for step in handles[7].progress()] == [7]


async def test_options_say_when_and_whether_a_task_is_run(queueing: QueueingServiceStub) -> None:
    app = plexus.client.TaskApp("shop")
    seen: list[str] = []

    @app.task()
    async def work(name: str) -> None:
        seen.append(name)

    before = time.monotonic()
    async with working(app, queueing):
        once = work.options(dedup_id="once")
        assert await once.send("one") == await once.send("one")
        late = await work.options(delay_s=1.5, priority=pb.PRIORITY_HIGH).delay("late")
        await late.result(timeout_s=LONG_S)
        assert time.monotonic() - before >= 1.5
    assert sorted(seen) == ["late", "one"]


async def test_a_worker_begins_tasks_at_its_rate_and_gives_back_what_waits_for_its_turn(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")
    begun: list[float] = []

    @app.task()
    async def work(_number: int) -> None:
        begun.append(time.monotonic())

    async with working(app, queueing, per_second=5):
        handles = [await work.delay(number) for number in range(4)]
        for handle in handles:
            await handle.result(timeout_s=LONG_S)
    assert begun[3] - begun[0] >= 0.6  # slower is possible, faster is not
    async with asyncio.timeout(2 * LONG_S), app.open(queueing):
        handles = [await work.delay(4), await work.delay(5)]
        slow = plexus.client.Worker(app, queueing, per_second=1 / 3600)
        running = asyncio.create_task(slow.run())
        while not any(handle.done for handle in handles):  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.02)
        slow.drain()
        await running  # the other had an hour to wait
        rest = plexus.client.Worker(app, queueing)
        running = asyncio.create_task(rest.run())
        for handle in handles:
            await handle.result(timeout_s=LONG_S)
        rest.drain()
        await running
    assert len(begun) == 6
    assert (await queueing.GetStats(pb.GetStatsRequest(subscription="shop"))).dead == 0


async def test_a_task_does_or_undoes_a_step_of_a_saga_and_leaves_no_dead_letter(
    queueing: QueueingServiceStub,
) -> None:
    app = plexus.client.TaskApp("shop")

    @app.task(step="reserve")
    async def reserve(input: Line, attempt: int) -> dict[str, int]:  # noqa: A002 - the request's own name
        if input.count > 9:
            raise plexus.client.TaskError("sold out")
        return {"shelf": input.count + attempt}

    @app.task(undoes="reserve")
    def release(results: dict[str, dict[str, int]]) -> int:
        return results["reserve"]["shelf"]

    async def asked(step: str, phase: str, **content: Any) -> bytes:
        data = {"saga_id": "s", "step": step, "phase": phase, "attempt": 1, "input": {}, "results": {}}
        request = pb.CallRequest(
            topic="shop",
            data=json.dumps(data | content).encode(),
            attributes={STEP: step, PHASE: phase, "plexus-saga": "s"},
        )
        request.timeout.FromSeconds(int(LONG_S))
        return (await queueing.CallAndWait(pb.CallAndWaitRequest(request=request))).result.data

    async with working(app, queueing):
        await release.send({"reserve": {"shelf": 1}})  # a task as others are; and the queue is there now
        line = {"article": "book", "count": 2}
        assert json.loads(await asked("reserve", ACTION, input=line)) == {"shelf": 3}
        assert await asked("reserve", COMPENSATION, results={"reserve": {"shelf": 3}}) == b"3"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked("reserve", ACTION, input=line | {"count": 10})
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await queueing.GetStats(pb.GetStatsRequest(subscription="shop"))).dead == 0
    with pytest.raises(ValueError, match="action of step 'reserve'"):
        app.task(name="again", step="reserve")(reserve.function)
    with pytest.raises(ValueError, match="does a step or undoes one"):
        app.task(step="a", undoes="b")
    with pytest.raises(LookupError, match="compensation of step 'pay'"):
        app.meant({STEP: "pay", PHASE: COMPENSATION})
