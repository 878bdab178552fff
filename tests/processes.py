"""Several processes on this machine, as torchrun starts them, but forked from one that has imported everything."""

import itertools
import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from llmq import pipeline
from llmq.distributed import join
from llmq.methods import Method
from llmq.report.record import Report
from tests import runs
from tests.command_line import Outcome, llmq

PRELOADED = ["tests.processes", "tests.builders", "llmq.cli.quantize", "llmq.job",
             "llmq.verification.engines.planned_run",
             "llmq.distributed.process_group", "transformers.models.llama.modeling_llama",
             "transformers.models.mixtral.modeling_mixtral"]  # fmt: skip
SECONDS = 300  # for all processes of a test


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(size: int, work: Callable[..., Any], *arguments: Any) -> list[tuple[BaseProcess, Connection]]:
    """Start `size` processes that call `work`; the connection of each one gets the result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, started = free_port(), []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(rank, size, port, theirs, work, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def results(started: Sequence[tuple[BaseProcess, Connection]]) -> list[Any]:
    """The result of each process; None for one that was killed."""
    end, values = time.monotonic() + SECONDS, list[Any]()
    for process, connection in started:
        arrived = connection.poll(max(0.0, end - time.monotonic()))
        try:
            values.append(pickle.loads(connection.recv_bytes()) if arrived else None)
        except (EOFError, ConnectionResetError):
            values.append(None)
        process.join(max(1.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return values


def quantize(size: int, *arguments: str | Path) -> list[Outcome]:
    """`llmq quantize` with several processes on the CPU."""
    return results(start(size, _command, "quantize", *arguments, "--device", "cpu"))


def job(size: int, model: Path, out: Path, text: Path, stages: Method, **settings: Any) -> list[Report]:
    """A job with these stages; the reports of all ranks, of which that of the first one is complete."""
    return results(start(size, _job, model, out, text, stages, settings))


def exchange(size: int) -> list[dict[str, Any]]:
    """What each of several ranks gets from every kind of exchange."""
    return results(start(size, _exchange))


def _work(
    rank: int, size: int, port: int, connection: Connection, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"})  # fmt: skip
    connection.send_bytes(pickle.dumps(work(*arguments)))
    connection.close()
    sys.stdout.flush()
    os._exit(0)  # without the destructors of gloo, which would wait for processes that were killed


def _command(*arguments: str | Path) -> Outcome:
    return llmq(*arguments)


def _job(model: Path, out: Path, text: Path, stages: Method, settings: dict[str, Any]) -> Report:
    return runs.job(model, out, text, stages=stages, ranks=join("cpu"), **settings).run()


def job_out_of_memory(size: int, failures: Sequence[tuple[int, str, int]], *arguments: Any) -> list[Report]:
    """`job`, where call number n of a function of `pipeline` runs out of memory on a rank: (rank, function, n)."""
    return results(start(size, _job_out_of_memory, failures, *arguments))


def _job_out_of_memory(
    failures: Sequence[tuple[int, str, int]], model: Path, out: Path, text: Path, stages: Method
) -> Report:
    for rank, name, number in failures:
        if os.environ["RANK"] == str(rank):
            setattr(pipeline, name, _out_of_memory_at(number, getattr(pipeline, name)))
    return _job(model, out, text, stages, {})


def _out_of_memory_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise MemoryError("in a test")
        return function(*arguments, **options)

    return called


def _exchange() -> dict[str, Any]:
    ranks = join("cpu")
    parts = [torch.randn(1001, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks.size)]
    own = torch.tensor(ranks.rank)
    outcome = {
        "rank": ranks.rank,
        "sums": [ranks.sum_(parts[ranks.rank].clone()) for _ in range(2)],
        "expected": torch.stack(parts).sum(0),
        "mean": ranks.mean(parts[ranks.rank]),
        "total": ranks.total(ranks.rank, 0.5),
        "least": ranks.least(7 + ranks.rank),
        "first": ranks.first(lambda: f"of {ranks.rank}"),
        "all": ranks.all(own.clone()),
        "reports": ranks.reports("a message"),
    }
    ranks.copy_(own)
    ranks.leave()
    return {**outcome, "copied": int(own)}
