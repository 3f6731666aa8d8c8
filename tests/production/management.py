"""Every method of the queueing service that has a place in the REST API, called there."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from google.api import annotations_pb2

from plexus.queueing.v1 import queueing_pb2, sagas_pb2, schedules_pb2

if TYPE_CHECKING:
    import httpx

_FILES = (queueing_pb2, sagas_pb2, schedules_pb2)


def methods() -> set[str]:
    """Names of the methods that have a place there."""
    every = [
        method
        for file in _FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    return {m.name for m in every if m.GetOptions().Extensions[annotations_pb2.http].WhichOneof("pattern")}


def _data(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Management:
    """Calls, and notes what was called.

    Attributes:
        called: Names of methods.
    """

    def __init__(self, edge: httpx.Client) -> None:
        """Set it up; `edge` is a client with a token of an administrator."""
        self._edge = edge
        self.called: set[str] = set()

    def __call__(self, name: str, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call a method, which succeeds; what it answered."""
        answer = self._edge.request(verb, f"/v1/{path}", json=body)
        assert answer.is_success, f"{name}: {answer.status_code} {answer.text}"
        self.called.add(name)
        if answer.headers["content-type"].startswith("text/event-stream"):
            lines = answer.text.splitlines()
            return [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
        return answer.json()

    def run(self) -> None:
        """All of them, on things of their own that are deleted at the end."""
        self._catalogue()
        self._messages()
        self._dead_letters()
        self._log()
        self._snapshots()
        self._calls()
        self._schedules()
        self._sagas()
        for name in ("rest-work", "rest-reader"):
            self("DeleteSubscription", "DELETE", f"subscriptions/{name}")
        for name in ("rest.jobs", "rest.audit"):
            self("DeleteTopic", "DELETE", f"topics/{name}")
        assert self("ListTopics", "GET", "topics?pageSize=1000")["topics"]

    def _catalogue(self) -> None:
        self("CreateTopic", "POST", "topics", {"topic": "rest.jobs"})
        self("CreateTopic", "POST", "topics", {"topic": "rest.audit", "settings": {"log": True}})
        changed = self("UpdateTopic", "PATCH", "topics/rest.jobs", {"labels": {"owner": "me"}})
        assert changed == self("GetTopic", "GET", "topics/rest.jobs")
        assert changed["labels"] == {"owner": "me"}
        for name, topic in (("rest-work", "rest.jobs"), ("rest-reader", "rest.audit")):
            settings = {"name": name, "topic": topic, "retry": {"backoff": "BACKOFF_IMMEDIATE"}}
            self("CreateSubscription", "POST", "subscriptions", settings)
        changed = self("UpdateSubscription", "PATCH", "subscriptions/rest-work", {"ackDeadline": "600s"})
        assert changed == self("GetSubscription", "GET", "subscriptions/rest-work")
        assert (changed["ackDeadline"], changed["topic"]) == ("600s", "rest.jobs")
        listed = self("ListSubscriptions", "GET", "subscriptions?topic=rest.jobs")["subscriptions"]
        assert [each["name"] for each in listed] == ["rest-work"]

    def _publish(self, topic: str, *texts: str, **settings: Any) -> None:
        messages = [{"data": _data(text), **settings} for text in texts]
        published = self("Publish", "POST", f"topics/{topic}:publish", {"messages": messages})
        assert len(published["messageIds"]) == len(texts)

    def _pull(self, name: str = "rest-work") -> dict[str, Any]:
        pulled = self("Pull", "POST", f"subscriptions/{name}:pull", {"maxMessages": 1, "wait": "60s"})
        (delivery,) = pulled["deliveries"]
        return dict(delivery)

    def _messages(self) -> None:
        self._publish("rest.jobs", "a", attributes={"größe": "ü"}, correlationId="c")
        delivery = self._pull()
        assert (delivery["data"], delivery["attributes"]["größe"]) == (_data("a"), "ü")
        lease = {"ackId": delivery["ackId"], "deadline": "0s"}
        path = "subscriptions/rest-work"
        self("ModifyAckDeadline", "POST", f"{path}:modifyAckDeadline", {"extensions": [lease]})
        delivery = self._pull()
        done = self("Acknowledge", "POST", f"{path}:acknowledge", {"ackIds": [delivery["ackId"], "other"]})
        assert done["expired"] == ["other"]
        stats = self("GetStats", "GET", f"{path}/stats")
        assert [int(stats[key]) for key in ("ready", "leased", "delayed", "dead")] == [0, 0, 0, 0]

    def _dead_letters(self) -> None:
        path = "subscriptions/rest-work"
        self._publish("rest.jobs", "bad", "worse")
        for _ in range(2):
            refusal = {"ackId": self._pull()["ackId"], "reason": "broken & torn", "dead": True}
            self("Nack", "POST", f"{path}:nack", {"refusals": [refusal]})
        found = self("ListDeadLetters", "GET", f"{path}/deadLetters?filter.reason=%26%20torn")["deadLetters"]
        assert [letter["data"] for letter in found] == [_data("bad"), _data("worse")]
        letter = self("GetDeadLetter", "GET", f"{path}/deadLetters/{found[0]['id']}")
        assert (letter["attempts"], letter["history"][0]["reason"]) == (1, "broken & torn")
        stats = self("GetDeadLetterStats", "GET", f"{path}/deadLetterStats")
        assert {reason: int(count) for reason, count in stats["reasons"].items()} == {"broken & torn": 2}
        chosen = {"ids": [found[0]["id"]], "maxPerSecond": 100}
        assert self("RedriveDeadLetters", "POST", f"{path}/deadLetters:redrive", chosen)["redriven"] == 1
        assert self._pull()["data"] == _data("bad")
        chosen = {"filter": {"reason": "broken"}}
        assert self("PurgeDeadLetters", "POST", f"{path}/deadLetters:purge", chosen)["purged"] == 1

    def _log(self) -> None:
        self._publish("rest.audit", "one", attributes={"type": "made"})
        self._publish("rest.audit", "two", attributes={"type": "sold"})
        events = self("ListEvents", "GET", "topics/rest.audit/events?filter.type=sold")["events"]
        assert [event["data"] for event in events] == [_data("two")]
        body = {"subscription": "rest-reader", "filter": {"type": "made"}}
        assert self("Replay", "POST", "topics/rest.audit:replay", body)["replayed"] == 1
        self("Seek", "POST", "subscriptions/rest-reader:seek", {"sequence": events[0]["sequence"]})
        assert self._pull("rest-reader")["data"] == _data("two")

    def _snapshots(self) -> None:
        kept = self("CreateSnapshot", "POST", "snapshots", {"snapshot": "rest", "subscription": "rest-work"})
        assert kept == self("GetSnapshot", "GET", "snapshots/rest")
        assert self("UpdateSnapshot", "PATCH", "snapshots/rest", {"labels": {"a": "b"}})["labels"] == {
            "a": "b"
        }
        listed = self("ListSnapshots", "GET", "snapshots?topic=rest.jobs")["snapshots"]
        assert [each["name"] for each in listed] == ["rest"]
        self("Seek", "POST", "subscriptions/rest-work:seek", {"snapshot": "rest"})
        self(
            "Acknowledge", "POST", "subscriptions/rest-work:acknowledge", {"ackIds": [self._pull()["ackId"]]}
        )
        self("DeleteSnapshot", "DELETE", "snapshots/rest")

    def _calls(self) -> None:
        def answer() -> None:
            request = self._pull()
            told = {key: request["attributes"][key] for key in ("plexus-call-id",)}
            attributes = {**told, "plexus-reply": "result"}
            self._publish(request["attributes"]["plexus-reply-to"], "done", attributes=attributes)
            acks = {"ackIds": [request["ackId"]]}
            self("Acknowledge", "POST", "subscriptions/rest-work:acknowledge", acks)

        body = {"data": _data("work"), "timeout": "60s"}
        for name, path in (("Call", "call"), ("CallAndWait", "callAndWait")):
            with ThreadPoolExecutor(1) as worker:
                answered = worker.submit(answer)
                told = self(name, "POST", f"topics/rest.jobs:{path}", body)
                answered.result()
            last = told[-1] if isinstance(told, list) else told
            assert last["result"]["data"] == _data("done")

    def _schedules(self) -> None:
        when = {"cron": {"expression": "0 9 * * MON", "timeZone": "Europe/Berlin"}}
        times = self("PreviewSchedule", "POST", "schedules:preview", {"schedule": when, "count": 3})[
            "fireTimes"
        ]
        assert len(times) == 3
        made = {"name": "rest", "topic": "rest.jobs", **when, "message": {"data": _data("tick")}}
        self("CreateSchedule", "POST", "schedules", made)
        assert self("UpdateSchedule", "PATCH", "schedules/rest", {"jitter": "60s"})["jitter"] == "60s"
        assert self("GetSchedule", "GET", "schedules/rest")["cron"] == when["cron"]
        assert self("PauseSchedule", "POST", "schedules/rest:pause", {})["paused"]
        assert not self("ResumeSchedule", "POST", "schedules/rest:resume", {})["paused"]
        listed = self("ListSchedules", "GET", "schedules?topic=rest.jobs")["schedules"]
        assert [each["name"] for each in listed] == ["rest"]
        self("RunSchedule", "POST", "schedules/rest:run", {})
        delivery = self._pull()
        assert delivery["attributes"]["plexus-schedule"] == "rest"
        self("Acknowledge", "POST", "subscriptions/rest-work:acknowledge", {"ackIds": [delivery["ackId"]]})
        (run,) = self("ListRuns", "GET", "schedules/rest/runs")["runs"]
        assert (run["manual"], run["messageId"]) == (True, delivery["messageId"])
        self("DeleteSchedule", "DELETE", "schedules/rest")

    def _sagas(self) -> None:
        action = {"topic": "rest.jobs", "timeout": "600s", "retry": {"maxAttempts": 1}}
        steps = [{"name": "only", "action": action, "compensation": action}]
        self("CreateSagaDefinition", "POST", "sagaDefinitions", {"name": "rest", "steps": steps})
        changed = {"steps": steps, "labels": {"a": "b"}}
        assert self("UpdateSagaDefinition", "PATCH", "sagaDefinitions/rest", changed)["version"] == 2
        assert self("GetSagaDefinition", "GET", "sagaDefinitions/rest")["labels"] == {"a": "b"}
        names = [
            each["name"] for each in self("ListSagaDefinitions", "GET", "sagaDefinitions")["definitions"]
        ]
        assert "rest" in names
        self("StartSaga", "POST", "sagas", {"definition": "rest", "id": "rest-1", "input": {"n": 1}})
        self._answer({"plexus-reply": "error", "plexus-code": "INVALID_ARGUMENT"})
        watched = self("WatchSaga", "GET", "sagas/rest-1:watch")
        assert watched
        self("StartSaga", "POST", "sagas", {"definition": "rest", "id": "rest-2", "input": {}})
        self("CancelSaga", "POST", "sagas/rest-2:cancel", {})
        self._answer({"plexus-reply": "result"})
        self._answer({"plexus-reply": "error", "plexus-code": "INVALID_ARGUMENT"})
        self._until("rest-2", "SAGA_STATE_STUCK")
        self("RetrySaga", "POST", "sagas/rest-2:retry", {"skip": True})
        self._until("rest-2", "SAGA_STATE_COMPENSATED")
        assert self("ListSagaEvents", "GET", "sagas/rest-2/events")["events"]
        listed = self("ListSagas", "GET", "sagas?definition=rest")["sagas"]
        assert {each["id"] for each in listed} == {"rest-1", "rest-2"}
        self("DeleteSagaDefinition", "DELETE", "sagaDefinitions/rest")

    def _answer(self, attributes: dict[str, str]) -> None:
        """As a worker."""
        request = self._pull()
        told = {"plexus-call-id": request["attributes"]["plexus-call-id"], **attributes}
        self._publish(request["attributes"]["plexus-reply-to"], "{}", attributes=told)
        self("Acknowledge", "POST", "subscriptions/rest-work:acknowledge", {"ackIds": [request["ackId"]]})

    def _until(self, saga: str, state: str) -> None:
        for _ in range(1000):
            found = self("GetSaga", "GET", f"sagas/{saga}")
            if found["state"] == state:
                return
        raise AssertionError(f"{saga} is {found}")
