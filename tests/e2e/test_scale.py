"""Several instances of one service on one machine."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.backend import Backend, eventually
from tests.models import model_folder
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
COUNT = 3
HANDLED = re.compile(
    r'^grpc_server_handled_total\{code="OK",.*service="plexus\.inference\.v1.*\} (\S+)$', re.MULTILINE
)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    made = Backend(tmp_path_factory.mktemp("state"), free_port())
    (made.state / "models").symlink_to(model_folder(), target_is_directory=True)
    try:
        made.plexus("up", "--detach", "--scale", f"inference={COUNT}")
        yield made
    finally:
        made.down()


def instances(backend: Backend) -> list[dict[str, Any]]:
    catalogue = json.loads((backend.state / "data/control/catalogue.json").read_text())["instances"]
    return [entry for entry in catalogue if entry["service"] == "inference"]


def handled(backend: Backend) -> dict[str, float]:
    """Calls that each instance has answered."""
    counts = {}
    for instance in instances(backend):
        text = httpx.get(f"http://{instance['meta']['metrics']}/metrics").text
        counts[instance["id"]] = sum(map(float, HANDLED.findall(text)))
    return counts


def test_calls_spread_over_three_and_a_killed_one_is_survived(scaled: Backend) -> None:
    rows = scaled.wait_serving()
    assert [name for name in rows if name.startswith("inference")] == [
        "inference",
        "inference-2",
        "inference-3",
    ]
    with scaled.client() as client:

        def list_models() -> int:
            # Patient with the edge's rate limit.
            while (answer := client.get("/v1/models")).status_code == 429:
                pass
            return answer.status_code

        def all_three() -> bool:
            assert list_models() == 200
            return len(handled(scaled)) == COUNT and min(handled(scaled).values()) > 0

        eventually(all_three, within_s=60)
        os.kill(rows["inference-2"]["pid"], signal.SIGKILL)
        # A call that was on its way may fail; after that the two others answer, before the third is back.
        eventually(lambda: [list_models() for _ in range(20)] == [200] * 20, within_s=60)
        after = scaled.wait_serving(60)
        assert after["inference-2"]["pid"] != rows["inference-2"]["pid"]
        assert after["inference"]["pid"] == rows["inference"]["pid"]
        eventually(all_three, within_s=60)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vectors=2", "vectors keeps its data in an embedded engine, which has one owner"),
        ("edge=2", "no such service; there are: vectors, storage, search, inference, queueing, knowledge"),
        ("inference=0", "needs a count, as in inference=3, from 1 to 64"),
        ("inference", "needs a count, as in inference=3, from 1 to 64"),
    ],
)
def test_what_cannot_be_scaled_says_why(text: str, problem: str, tmp_path: Any) -> None:
    backend = Backend(tmp_path, free_port())
    refused = backend.plexus("up", "--detach", "--scale", text, check=False)
    assert refused.returncode == 1
    assert problem in refused.stderr
    assert refused.stderr.count("\n") <= 2
