"""Metrics of sagas."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.queueing.sagas.domain import Kind, State

SAGAS = Gauge("plexus_sagas", "Sagas that have not ended, as all replicas see them.", ["state"])
ENDED = Counter("plexus_sagas_ended_total", "Sagas that this replica saw end.", ["state"])
STEPS = Histogram(
    "plexus_saga_step_seconds",
    "Time from the start of an attempt to its end.",
    ["phase", "outcome"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
LATE = Counter("plexus_saga_late_replies_total", "Replies that came after their attempt had timed out.")
OUTCOMES = {
    Kind.ATTEMPT_SUCCEEDED: "succeeded",
    Kind.ATTEMPT_FAILED: "failed",
    Kind.ATTEMPT_TIMED_OUT: "timed_out",
}
STATES = tuple(state for state in State if not state.ended)
