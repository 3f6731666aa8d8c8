"""The process manager behind `plexus up`: one thread, no event loop, one forked child a process.

It forks from a process that has imported what all children share and has made neither thread nor gRPC
channel: children start in milliseconds and share those pages.
"""
