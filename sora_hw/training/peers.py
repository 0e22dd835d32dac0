"""Whether the other ranks are still there: a rank that has frozen, or whose machine has gone, is named.

Ranks that wait for a lost one in a collective operation would wait for as long as its library has it, half an hour and
more, and then not say for whom. So each rank tells the others by a store of its own that it lives, and how far it has
come; where one has done neither for the profile's time, the run ends with one line.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist

from sora_hw.errors import UserError

LOST_PEER = 75  # exit code; what sysexits.h has for a failure that another try may not meet
BEAT = 1.0  # seconds from one sign of life to the next
MISSED = 5  # signs of life that a rank misses which has ended
ADVICE = "look there for the reason (memory, a file system, the machine); --resume goes on from the last checkpoint"
OTHERS_SPEAK = 3.0  # seconds that a rank which has nothing to say leaves to the one that has
STORE_ANSWERS = timedelta(seconds=10)


class LostPeer(UserError):
    """Another rank is gone."""

    code = LOST_PEER


class Peers:
    """The ranks of this run, watched while it trains: `with peers: ...`. Every rank must enter and leave it.

    Args:
        patience: seconds without a sign of life, or without any progress while others have come further, after which a
            rank is lost. Then this process is ended: its main thread may be waiting where nothing can reach it.
        end: what ends it, given an exit code.
    """

    def __init__(self, patience: float, end: Callable[[int], None] = os._exit):
        self.patience, self.end = patience, end
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.steps = [0] * self.ranks  # the micro-steps of each rank, as far as this one has heard
        self.done = Event()

    def __enter__(self) -> "Peers":
        if self.ranks == 1:
            return self
        self.store = _own_store(self.rank)
        self.store.set(f"machine/{self.rank}", socket.gethostname())
        self._tell(0)
        self.machines = [self.store.get(f"machine/{rank}").decode() for rank in range(self.ranks)]
        self.signs = [b""] * self.ranks
        now = time.monotonic()
        self.heard, self.answered, self.moved = [now] * self.ranks, now, now
        dist.barrier()
        for each in (self._exchange, self._watch):
            Thread(target=each, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """An error of this rank may be another's end, seen from here: then LostPeer takes its place."""
        if self.ranks > 1 and isinstance(error, RuntimeError):
            time.sleep(MISSED * BEAT)
            if problem := self._lost((MISSED - 2) * BEAT):  # a rank's last sign may be heard a beat after its end
                self.done.set()
                raise LostPeer(problem) from error
        self.done.set()

    def step(self) -> None:
        """This rank has come to the end of another forward pass."""
        self.steps[self.rank] += 1
        self.moved = time.monotonic()

    def _exchange(self) -> None:
        """Tell the others and hear of them, for as long as the store answers. It lives in rank 0 and freezes with it,
        and so does this thread then: another one watches the clock."""
        beats = 0
        keys = [f"rank/{rank}" for rank in range(self.ranks)]
        while not self.done.wait(BEAT):
            beats += 1
            try:
                self._tell(beats)
                signs = self.store.multi_get(keys)
            except dist.DistNetworkError:
                return  # rank 0 has ended, and its store does not come back
            except RuntimeError:  # what torch calls an answer that has not come in time, too
                continue
            now = self.answered = time.monotonic()
            for rank, sign in enumerate(signs):
                if sign != self.signs[rank]:
                    self.heard[rank], self.signs[rank] = now, sign
                    if rank != self.rank:
                        self.steps[rank] = int(sign.split()[1])

    def _tell(self, beats: int) -> None:
        self.store.set(f"rank/{self.rank}", f"{beats} {self.steps[self.rank]}")

    def _watch(self) -> None:
        while not self.done.wait(BEAT):
            if problem := self._lost(self.patience):
                if self._speaks():
                    print("error:", problem, file=sys.stderr, flush=True)
                else:
                    time.sleep(OTHERS_SPEAK)
                self.end(LOST_PEER)
                return

    def _lost(self, patience: float) -> str | None:
        """One line on the ranks that are gone, or have stopped on their way; None while all is well."""
        silent = self._silent(patience)
        if silent:
            return f"{self._named(silent)} no longer answers: {ADVICE}"
        # Signs of life go on for a moment after the last step of one that has frozen.
        if time.monotonic() - self.moved > self.patience + MISSED * BEAT and len(set(self.steps)) > 1:
            behind = [rank for rank, steps in enumerate(self.steps) if steps == min(self.steps)]
            return (
                f"{self._named(behind)} has stopped in micro-step {min(self.steps) + 1}, for which the others have "
                f"waited for {self.patience:.0f} s: {ADVICE}"
            )
        return None

    def _silent(self, patience: float) -> list[int]:
        now = time.monotonic()
        if now - self.answered > patience and self.rank != 0:
            return [0]  # of the others nothing can be heard without it
        return [rank for rank, last in enumerate(self.heard) if now - last > patience and rank != self.rank]

    def _speaks(self) -> bool:
        """The first of those that live."""
        return self.rank == min(set(range(self.ranks)) - set(self._silent(self.patience)))

    def _named(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self.machines[rank]}" for rank in ranks)


def _own_store(rank: int) -> dist.TCPStore:
    """Beside the one by which the ranks have met, which a thread may not use while the libraries do."""
    host = os.environ["MASTER_ADDR"]
    port: list[int | None] = [None]
    if rank == 0:
        store = dist.TCPStore(host, 0, None, True, timeout=STORE_ANSWERS, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)
    if rank > 0:
        store = dist.TCPStore(host, port[0], None, False, timeout=STORE_ANSWERS, wait_for_workers=False)
    return store
