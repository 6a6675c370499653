"""One machine's workers, with their exit code kept and signals passed on to them.

torchrun turns every failure into exit code 1, dies of SIGUSR1, and answers SIGTERM by stopping its workers at once.
Here its agent runs in a thread, where it installs no signal handler, and the main thread waits and forwards.
"""

import concurrent.futures
import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megasora.cluster.agent import SETTLE, Agent, Crew
from megasora.cluster.origin import node_name, process_start
from megasora.cluster.signals import catches, collected_signals
from megasora.errors import ConfigError

CONNECT = 300  # seconds for the first node to open the rendezvous
SIOCGIFADDR = 0x8915  # netdevice(7)

# What a worker is before it becomes the worker. From here on it dies with the launcher, whatever kills that, so no
# orphan is left; and it survives a SIGUSR1 that a scheduler sends to every process before the worker listens for it.
SHIM = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "  # PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "signal.signal(signal.SIGUSR1, signal.SIG_IGN); os.execvp(sys.argv[2], sys.argv[2:])"
)


def launch_local(
    command: list[str],
    *,
    nproc: int,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    rdzv_id: str = "local",
    local_addr: str | None = None,
    max_restarts: int = 0,
    stall: int = 0,
    log_dir: Path | None = None,
    pending: Iterable[int] = (),
) -> int:
    """Runs `command` on `nproc` processes here, and so on each of `nnodes` machines; returns the code to exit with.

    The workers find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, write to this
    process's stdout and stderr, and lead process groups of their own. Call it from the main thread.

    The code is that of `agent.root_cause` over all nodes. A worker killed by signal N counts as 128+N and is named in
    one line on stderr, with its `log_dir`/rank-NNNNN.log if there is one. SIGUSR1, SIGTERM and SIGINT go to the workers
    (SIGUSR1 once a worker catches it); a second SIGTERM or SIGINT kills them, and the code is 128 + that signal.
    Signals that came before the call are given as `pending`. Failures are restarted `max_restarts` times, all nodes
    together, but not the codes 2, 3, 4 and 75. A rank that shows by its heartbeat that it has made no progress for `stall`
    seconds (0: any) is a failure, too: it is named, all stacks are written to `log_dir`, and all workers are killed.

    One node finds a free port by itself. Several need the same `rdzv_endpoint` (HOST:PORT, served by the node that has
    the address) and `rdzv_id`, and each its own `local_addr` where host names do not resolve. Raises ConfigError for a
    missing or malformed endpoint.
    """
    if nnodes == 1:
        rdzv_endpoint, local_addr = "127.0.0.1:0", "127.0.0.1"
    if local_addr and (interface := _interface_of(local_addr)):
        # Gloo would look up the host's name, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    parameters = _rendezvous_parameters(rdzv_endpoint, rdzv_id, nnodes, local_addr)
    # The run's fence asks for it.
    os.environ["MEGASORA_LAUNCHER"] = f"{node_name()}-{os.getpid()}-{process_start():.2f}"
    _silence_torchrun()
    crew = Crew()

    def run_agent() -> int:
        handler, serves = _join(parameters)
        spec = WorkerSpec(
            role="megasora",
            local_world_size=nproc,
            entrypoint=sys.executable,
            # torchrun substitutes ${local_rank} in arguments, and makes one dollar of two.
            args=("-ISc", SHIM, str(os.getpid()), *(arg.replace("$", "$$") for arg in command)),
            rdzv_handler=handler,
            max_restarts=max_restarts,
            monitor_interval=0.1 if nnodes == 1 else 0.5,
            local_addr=local_addr,
        )
        agent = Agent(spec, crew, nnodes, log_dir, stall)
        code = agent.run_to_code()
        if serves:
            agent.board.wait_until_left()
        handler.shutdown()
        agent.board.leave()
        return code

    with collected_signals() as received:
        received[:0] = pending
        outcome: concurrent.futures.Future[int] = concurrent.futures.Future()
        threading.Thread(target=_fulfil, args=(outcome, run_agent), daemon=True).start()
        try:
            return _wait(outcome, crew, received)
        except (RendezvousError, DistError) as error:
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            print(f"megasora: the rendezvous of the nodes at {rdzv_endpoint} failed: {reason}", file=sys.stderr)
            return 1


def _rendezvous_parameters(
    endpoint: str | None, run_id: str, nnodes: int, local_addr: str | None
) -> RendezvousParameters:
    try:
        _, port = parse_rendezvous_endpoint(endpoint, default_port=-1)
    except ValueError:
        port = -1
    if port == -1:
        raise ConfigError(
            f"--rdzv-endpoint={endpoint or ''}: several nodes need HOST:PORT of one of them, the same on all"
        )
    return RendezvousParameters(
        backend="c10d",
        endpoint=endpoint or "",
        run_id=run_id,
        min_nodes=nnodes,
        max_nodes=nnodes,
        local_addr=local_addr,
        read_timeout=CONNECT,
    )


def _silence_torchrun() -> None:
    """Its log repeats at length what the workers and the one line here say. Its errors still arrive, as exceptions."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _join(parameters: RendezvousParameters) -> tuple[RendezvousHandler, bool]:
    """Serves the rendezvous on the node that has the endpoint's address, connects to it on the others; says which.

    torch would compare host names, which fails for a second network card and where a name maps to a loopback address.
    """
    host, _ = parse_rendezvous_endpoint(parameters.endpoint, default_port=-1)
    if _is_own_address(host):
        parameters.config["is_host"] = True
        with suppress(RendezvousConnectionError):  # the port is taken: by another launcher on this machine
            return get_rendezvous_handler(parameters), True
    parameters.config["is_host"] = False
    return get_rendezvous_handler(parameters), False


def _is_own_address(host: str) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _interface_of(address: str) -> str | None:
    """The network interface with that IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _fulfil(outcome: concurrent.futures.Future[int], run_agent: Callable[[], int]) -> None:
    try:
        outcome.set_result(run_agent())
    except BaseException as error:
        outcome.set_exception(error)


def _wait(outcome: concurrent.futures.Future[int], crew: Crew, received: list[int]) -> int:
    """Waits for the agent; meanwhile forwards the signals to the workers."""
    forwarding: signal.Signals | None = None
    told: set[int] = set()
    requests = 0
    while not concurrent.futures.wait([outcome], timeout=0.05).done:
        while received:
            forwarding = signal.Signals(received.pop(0))
            crew.stopping = True
            told.clear()
            requests += forwarding != signal.SIGUSR1
            if requests > 1 or (requests and not crew.started):
                _kill(crew)
                concurrent.futures.wait([outcome], timeout=SETTLE)
                return 128 + forwarding
        for pid in set(crew.pids.values()) - told:
            # A worker that does not catch SIGUSR1 yet is still starting: it is told once it does.
            if forwarding is not None and (forwarding != signal.SIGUSR1 or catches(pid, forwarding)):
                with suppress(ProcessLookupError):
                    os.kill(pid, forwarding)
                told.add(pid)
    return outcome.result()


def _kill(crew: Crew) -> None:
    """Every worker with whatever it has started: each leads a process group."""
    for pid in crew.pids.values():
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
