"""Bring the processes of one run together: start helpers on this machine, or join those torchrun started.

The caller's process is the first one; its terminal, signals and files stay its own. Helpers are other
Python processes that run `phinetune.runs.helper`; they end when the first one does, however that ends.
Knows nothing of what a run does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from phinetune.base.errors import LostProcessError, UserError
from phinetune.training.distributed import Ranks, joined

HELPER = "phinetune.runs.helper"
STORE_FILE = "store"
END_S = 10.0
# A GPU that waits for a lost one cannot be interrupted; after this long the process ends itself.
STUCK_S = 120.0
_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process's number among those of a run; `local_rank` among those of its machine."""

    rank: int
    size: int
    local_rank: int


def launched_place() -> Place | None:
    """The place that torchrun, or another launcher with its variables, gave this process."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    rank = int(os.environ["RANK"])
    return Place(
        rank=rank,
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
    )


class Processes:
    """A block around one run in its first process; leaving it ends the helpers.

    A `LostProcessError` that leaves the block says what became of the helper.
    """

    def __init__(self, project: Path, num_processes: int, *, is_sharded: bool = False) -> None:
        self._project, self._is_sharded = project, is_sharded
        self._place = launched_place()
        if self._place and num_processes > 1:
            raise UserError(
                "the processes are started twice",
                where="--nproc",
                why=f"a launcher such as torchrun has started {self._place.size} already",
                do="leave --nproc out, or start without torchrun",
            )
        self._num = self._place.size if self._place else num_processes
        if is_sharded and self._num < 2:
            raise UserError(
                "a base cannot be divided among one process",
                where="--shard",
                do="write --nproc 2 or more, or leave --shard out",
            )
        self._stack, self._threads = contextlib.ExitStack(), contextlib.ExitStack()
        self._folder = Path()
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._is_told = False
        self.ranks = Ranks()

    @property
    def is_sharded(self) -> bool:
        """Whether the base is divided among the processes."""
        return self._is_sharded

    @property
    def num_here(self) -> int:
        """The processes of the run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self._num)) if self._place else self._num

    def __enter__(self) -> Processes:
        if self._place:
            self.ranks = self._stack.enter_context(
                joined(self._place.rank, self._num, is_sharded=self._is_sharded)
            )
        return self

    def begin(self, device_type: str, task: bytes) -> Ranks:
        """Bring all processes together, each on a device of this type, and tell them the task."""
        if self._num == 1:
            return self.ranks
        use_own_device(device_type, self._place or Place(rank=0, size=self._num, local_rank=0))
        if not self._place:
            self._begin_here()
        if device_type == "cuda":
            threading.Thread(target=self._end_if_stuck, args=(list(self._helpers),), daemon=True).start()
        self._is_told = True
        self.ranks.from_first(task)
        return self.ranks

    def release(self) -> None:
        """The others have nothing more to do: this process may use all threads of the machine."""
        if not self._is_sharded:
            self._threads.close()

    def _begin_here(self) -> None:
        self._stack.enter_context(on_loopback())
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="phinetune-")))
        self._stack.callback(self._end_helpers)
        self._stack.enter_context(self._threads)
        self._start_helpers(self._threads.enter_context(divided_threads(self._num)))
        store = local_store(self._folder, self._num)
        self.ranks = self._stack.enter_context(joined(0, self._num, store=store, is_sharded=self._is_sharded))
        # Before this process leaves: what it may still wait for then fails instead of lasting for ever.
        self._stack.callback(self._end_helpers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._place and not self._is_told:
            with contextlib.suppress(LostProcessError):
                self.ranks.from_first(b"")  # there is nothing to do
        explained = self._explained(error) if isinstance(error, LostProcessError) else None
        self._stack.close()
        if explained:
            raise explained from error

    def _start_helpers(self, num_threads: int) -> None:
        for rank in range(1, self._num):
            command = [sys.executable, "-m", HELPER, str(self._folder), str(self._project.absolute())]
            command += [str(rank), str(self._num), str(int(self._is_sharded))]
            with self._log(rank).open("wb") as log:
                helper = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
                    # A Ctrl-C in the terminal is for the first process: it tells the others.
                    start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
            self._helpers.append(helper)
        waiting = {ready_file(self._folder, rank) for rank in range(1, self._num)}
        while waiting := {path for path in waiting if not path.exists()}:
            if any(helper.poll() is not None for helper in self._helpers):
                raise LostProcessError("a process of the run did not start")
            time.sleep(0.02)

    def _log(self, rank: int) -> Path:
        return self._folder / f"process-{rank}.log"

    def _explained(self, error: LostProcessError) -> LostProcessError | None:
        """The error with what became of the first helper that failed, if one did."""
        end = time.monotonic() + END_S
        while self._helpers and time.monotonic() < end:
            for rank, helper in enumerate(self._helpers, start=1):
                if code := helper.poll():
                    return LostProcessError(
                        error.what,
                        where=f"process {rank + 1} of {self._num}",
                        why=f"{_ending(code)}{_last_words(self._log(rank))}",
                        do=error.do or "mend it and start again",
                    )
            time.sleep(0.05)
        return None

    def _end_helpers(self) -> None:
        for helper in self._helpers:
            assert helper.stdin
            helper.stdin.close()  # the sign to end
        for helper in self._helpers:
            try:
                helper.wait(END_S)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()
        self._helpers = []

    def _end_if_stuck(self, helpers: list[subprocess.Popen[bytes]]) -> None:
        while not any(codes := [helper.poll() for helper in helpers]):
            if all(code == 0 for code in codes):
                return
            time.sleep(1)
        time.sleep(STUCK_S)
        if self._helpers:
            message = "a process of the run is lost; to go on from the last checkpoint: --resume\n"
            os.write(2, message.encode())
            os._exit(1)


def use_own_device(device_type: str, place: Place) -> None:
    """Make this process's own GPU its current one. Raises `UserError` when there are too few."""
    if device_type == "cpu":
        return
    num_devices = torch.cuda.device_count() if device_type == "cuda" else 1
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", place.size))
    if num_here > num_devices:
        raise UserError(
            f"there are more processes than {device_type} devices",
            where="--nproc",
            why=f"{num_here} processes on this machine, {num_devices} of them with a device of their own",
            do=f"write --nproc {num_devices}" if num_devices > 1 else "leave --nproc out, or device: cpu",
        )
    torch.cuda.set_device(place.local_rank)


def local_store(folder: Path, size: int) -> object:
    """Where processes of one machine find each other: a file, so that no port is open for it."""
    return dist.FileStore(str(folder / STORE_FILE), size)  # type: ignore[attr-defined]


def ready_file(folder: Path, rank: int) -> Path:
    """Made by a helper once it is about to join."""
    return folder / f"ready-{rank}"


@contextlib.contextmanager
def divided_threads(num_processes: int) -> Iterator[int]:
    """Within the block this process uses its part of the threads; gives their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_processes))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Within the block processes talk to each other over this machine's loopback alone."""
    import psutil

    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    ]
    if _INTERFACE in os.environ or not names or sys.platform == "win32":
        yield
        return
    os.environ[_INTERFACE] = names[0]
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _ending(code: int) -> str:
    if code == -signal.SIGTERM or code >= 0:
        return f"it ended with code {code}"
    if code == -9:
        return "it was killed (signal 9): by somebody, or by the system for lack of memory"
    return f"it was ended by signal {-code}"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return ": " + " ".join(line.strip() for line in lines[-4:]) if lines else ""
