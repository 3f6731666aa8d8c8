"""Policies shared by tests."""

from __future__ import annotations

from services.mesh.policy.domain import Document
from services.mesh.policy.parse import parse

EVERYTHING_TEXT = """\
service: vectors
lb: {policy: ring_hash, header: x-user, min_ring_size: 64}
timeout: 5s
retry:
  codes: [unavailable, resource_exhausted]
  attempts: 4
  backoff: {base: 10ms, max: 1s}
  budget: {percent: 25, min_per_second: 2}
circuit_breaker: {max_requests: 7}
outlier_detection:
  {interval: 2s, failure_percent: 40, min_requests: 3, min_hosts: 3, ejection: 10s, max_ejected_percent: 40}
fault:
  delay: {duration: 50ms, percent: 0.5}
  abort: {code: internal, percent: 1}
subsets:
  stable: {version: "1.*", weight: 90}
  canary: {tag: canary, weight: 10}
routes:
  - match: {method: /test.Who/Ask, headers: [{name: x-canary, present: true}]}
    subsets: {canary: 1}
    timeout: 1s
    retry: {attempts: 2}
    fault: {abort: {percent: 50}}
  - match:
      prefix: /test.
      headers:
        - {name: x-a, exact: "1"}
        - {name: x-b, prefix: b}
        - {name: x-c, suffix: c}
        - {name: x-d, contains: d, invert: true}
locality: {failover: {a: [b, c]}}
"""
"""Uses every key of the schema."""
EVERYTHING = parse(Document("vectors.yaml", EVERYTHING_TEXT))
