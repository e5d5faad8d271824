"""Processes end with the one that started them."""

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

PARENT = """
import multiprocessing, os, signal, time
from dia_diffusion.process.signals import watch_parent


def work(pipe):
    watch_parent()
    pipe.send(os.getpid())
    time.sleep(100)


if __name__ == "__main__":
    there, here = multiprocessing.Pipe()
    context = multiprocessing.get_context("METHOD")
    context.Process(target=work, args=(here,)).start()
    print(there.recv(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no fork server, or another signal")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_process_ends_with_the_one_that_started_it_in_whatever_way(tmp_path, method):
    """A fork server between them lives as long as the processes that it forked."""
    (tmp_path / "parent.py").write_text(PARENT.replace("METHOD", method))
    with subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
    with suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(timeout=20)
