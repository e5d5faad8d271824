"""Processes that start at once: forked from one that has imported everything, and has computed nothing."""

import multiprocessing
import os
import socket

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["autoencoders", "dia_diffusion.latents.encoding", "dia_diffusion.training.loop"])


def start(function, *arguments, **environment):
    """A process that calls a function of a module, with variables in its environment."""
    process = _SERVER.Process(target=_call, args=(function, arguments, environment))
    process.start()
    return process


def start_together(count, function, *arguments, **environment):
    """Processes that know of each other, as `accelerate launch` starts them on a CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": 1}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count} for rank in range(count)]
    return [start(function, *arguments, **environment, **common, **rank) for rank in ranks]


def _call(function, arguments, environment):
    os.environ.update({name: str(value) for name, value in environment.items()})
    function(*arguments)
