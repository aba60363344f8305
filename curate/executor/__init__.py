"""Shards → workers, each with an event loop that is at up to two shards at a time; results as they end.

    run         who is given what; a worker that dies costs one try of the shards it was at
    worker      the inside of a worker
    processes   workers on this machine
    cluster     workers on the nodes of a Ray cluster; the one module that imports Ray, and only when it is used

A second shard is handed to a worker when each has one: so the last slow rows of one leave no worker idle.
"""

from curate.executor.processes import Processes
from curate.executor.run import Crew, Outcome, WorkerError, run_over
from curate.executor.worker import Do, Report, Work

__all__ = ["Crew", "Do", "Outcome", "Processes", "Report", "Work", "WorkerError", "run_over"]
