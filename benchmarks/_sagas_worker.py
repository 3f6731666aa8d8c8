"""A worker that does the steps of sagas, with the SDK's subscriber and publisher, in a process of its own.

    python benchmarks/_sagas_worker.py PORT

Says a JSON line when it works; for each line it reads, its CPU time so far.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack

import grpc.aio

from plexus.client import Publisher, Subscriber
from plexus.client.replies import RESULT, request_of
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc

TOPICS = ("reserve", "charge", "ship")
SUBSCRIPTION = "worker"
_AT_ONCE = 256


async def _work(port: int) -> None:
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        publishers: dict[str, Publisher] = {}

        async def handle(delivery: pb.Delivery) -> None:
            request = request_of(delivery.attributes)
            assert request is not None
            publisher = publishers.get(request.reply_to)
            if publisher is None:
                publisher = publishers[request.reply_to] = Publisher(stub, request.reply_to)
                await stack.enter_async_context(publisher)
            reply = request.reply(RESULT, json.dumps({"of": delivery.message_id}).encode())
            reply.dedup_id = f"{request.call_id}.{delivery.attempt}"
            await publisher.publish(reply)

        await stack.enter_async_context(Subscriber(stub, SUBSCRIPTION, handle, concurrency=_AT_ONCE))
        print("{}", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            used = os.times()
            print(json.dumps({"answer": {"cpu_s": used.user + used.system}}), flush=True)


if __name__ == "__main__":
    asyncio.run(_work(int(sys.argv[1])))
