"""Processes that start at once: forked from one that has imported everything, and has computed nothing."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["autoencoders", "dia_diffusion.latents.encoding", "dia_diffusion.training.loop"])


def start(function, *arguments, output=os.devnull, **environment):
    """A process that calls a function of a module, with variables in its environment, and ends with the status that it
    returns. What it prints goes to a file."""
    process = _SERVER.Process(target=_call, args=(function, arguments, output, environment))
    process.start()
    return process


def start_together(count, function, *arguments, output=os.devnull, **environment):
    """Processes that know of each other, as `accelerate launch` starts them on a CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": 1}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count} for rank in range(count)]
    return [start(function, *arguments, output=output, **common | environment | rank) for rank in ranks]


def _call(function, arguments, output, environment):
    os.environ.update({name: str(value) for name, value in environment.items()})
    with Path(output).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))
