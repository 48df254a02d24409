"""kill -9 at every stage of a training run, many times, and what must be true after it: `make chaos`.

    python tests/chaos/run.py [--kills 20] [--seed 0] [--only save,rename] [--keep FOLDER] [--set KEY=VALUE]

The bundled model trains for a few steps through the command line. Runs are killed: in the decode loop, while
a reward worker scores (the run, the worker, or the process that workers come from), in the backward pass, in
the optimizer's step, at random times of a checkpoint's writing and before each kind of its calls on files
(a rename, a removal, …), with half a line of metrics written, while a run is taken up again, and at any time.
After each kill:

- nothing is left: no process, no temporary file, no shared memory;
- every checkpoint that counts as whole loads, and the newest is no older than before.

The same command is given again until the run is done, and then all is as in a run that nobody killed: each
step's metrics, once, and the weights and the optimizer's state of the last checkpoint, bit for bit. Of a kill
that was to hit a stage and came after it, the stage's count knows nothing.

And (where it may mount one) runs on a file system with too little room: each ends with a message and exit
status 1, with whole what was whole, and goes on once there is room.

Exit status 0 where all of this held.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # this process forks: it may have no threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

sys.path.insert(0, str(Path(__file__).parent))

import lives
from full_disk import fill
from lives import Life, Wrong
from spy import Aim

# What is killed: the point, the call on a file if there is one, and whom the signal goes to.
STAGES: dict[str, tuple[str, str | None, str]] = {
    "rollout": ("decode", None, "run"),
    "reward": ("score", None, "run"),
    "reward worker": ("score", None, "worker"),
    "workers' parent": ("score", None, "nursery"),
    "backward": ("backward", None, "run"),
    "optimizer": ("optimizer", None, "run"),
    "save": ("save", None, "run"),
    "save: any call": ("save", "any", "run"),
    "save: flush": ("save", "fsync", "run"),
    "save: rename": ("save", "rename", "run"),
    "save: prune": ("save", "unlink", "run"),
    "save: prune's end": ("save", "rmdir", "run"),
    "evaluation": ("evaluate", None, "run"),
    "metrics": ("metrics", "write", "run"),
    "resume": ("resume", None, "run"),
    "reopen": ("reopen", "any", "run"),
    "config": ("config", "any", "run"),
    "any time": ("", None, "run"),
}
FULL_DISK = "full disk"
LIVES_MOST = 8  # kills in one folder, before its run may end


@dataclass
class Tally:
    hit: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)  # killed behind the stage, or it never came
    refused: Counter[str] = field(default_factory=Counter)  # by a full disk, by what was to be written
    runs: int = 0
    resumed_from_older: int = 0
    slowest_to_go: float = 0.0  # seconds until the last process of a killed run was gone


class Chaos:
    def __init__(self, folder: Path, kills: int, seed: int, stages: list[str]) -> None:
        self._folder = folder
        self._kills = kills
        self._stages = stages
        self._random = random.Random(seed)
        self.tally = Tally()

    def run(self) -> None:
        """Raises Wrong where something does not hold."""
        self._straight = Life(self._folder / "straight")
        counted = self._straight.start(count=True)
        said = counted.finish()
        counted.expect_success()
        self._straight.check_whole()
        self._end = self._straight.end()
        again = self._straight.start(count=True)  # takes up a run: that it is done already changes nothing
        said += again.finish()
        again.expect_success()
        self._straight.expect_end(self._end)
        passed = [message for message in said if message["what"] == "past"]
        self._often = Counter(message["point"] for message in passed)
        self._seconds = {
            point: statistics.median(m["seconds"] for m in passed if m["point"] == point)
            for point in self._often
        }
        self._seconds["score"] = lives.SCORING_SECONDS
        self._seconds["resume"] = max(m["seconds"] for m in passed if m["point"] == "resume")
        self._often["score"] = lives.STEPS  # in each of the workers, at least
        self._calls = {
            (m["point"], call): max(n["calls"].get(call, 0) for n in passed if n["point"] == m["point"])
            for m in passed
            for call in m["calls"]
        }
        self._calls["reopen", "any"] = 3  # of a file from which lines are dropped: made, flushed, renamed
        self._whole_run = counted.seconds
        if FULL_DISK in self._stages:
            self._stages.remove(FULL_DISK)
            self._fill_disk()
        while wanted := [s for s in self._stages if self.tally.hit[s] < self._kills]:
            self._one_run(wanted)
            tries = self.tally.hit + self.tally.late
            never = [s for s in wanted if not self.tally.hit[s] and tries[s] > 20 + 5 * self._kills]
            if never:
                raise Wrong(f"no kill has hit {', '.join(never)} in {max(tries.values())} tries")

    def _fill_disk(self) -> None:
        try:
            self.tally.refused = fill(self._folder, self._end, self._kills, self._random)
        except PermissionError as error:
            print(f"full disk: not tried, nothing can be mounted here: {error}", file=sys.stderr)

    def _one_run(self, wanted: list[str]) -> None:
        self.tally.runs += 1
        life = Life(self._folder / f"run-{self.tally.runs:04}")
        for _ in range(LIVES_MOST):
            if self._one_kill(life, self._random.choice(wanted)):
                break
        else:
            last = life.start()
            last.finish()
            last.expect_success()
        life.check_whole()
        life.expect_end(self._end)
        shutil.rmtree(life.folder)

    def _one_kill(self, life: Life, stage: str) -> bool:
        """True where the run came to its end."""
        if stage in ("resume", "reopen") and not (life.run / "metrics.jsonl").exists():
            stage = "any time"  # there is nothing to take up yet
        point, call, whom = STAGES[stage]
        older = None
        if len(life.whole) > 1 and self._random.random() < 0.15:
            older = self._random.choice(life.whole[:-1])
            self.tally.resumed_from_older += 1
        if not point:
            child = life.start(older=older)
            child.kill_after(self._random.uniform(0, self._whole_run))
            hit = True
        else:
            aim = self._aim(life, point, call)
            child = life.start(aim, older=older)
            delay = 0.0 if call is not None else self._random.uniform(0, 0.6 * self._seconds.get(point, 0.01))
            hit = child.kill_at(whom, delay)
        (self.tally.hit if hit else self.tally.late)[stage] += 1
        if whom == "worker":
            child.expect_success()
        elif whom == "nursery" and child.status != 0:
            child.expect_failure("reward workers come from is gone")
        life.check_left_behind()
        life.check_whole()
        self.tally.slowest_to_go = max(self.tally.slowest_to_go, child.outlived)
        return child.status == 0

    def _aim(self, life: Life, point: str, call: str | None) -> Aim:
        left = int(self._often[point] * (1 - life.newest / lives.STEPS))
        first = max(1, lives.KEEP + 1 - len(life.whole)) if call in ("unlink", "rmdir") else 1
        occurrence = self._random.randint(first, max(first, left))
        number = self._random.randint(1, self._calls.get((point, call), 1)) if call else 1
        return Aim(point=point, occurrence=occurrence, call=call, number=number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each stage (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of stages, places and delays")
    every = (*STAGES, FULL_DISK)
    parser.add_argument("--only", default=",".join(every), help=f"some of: {', '.join(every)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in every run")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, kept where something is wrong")
    arguments = parser.parse_args()
    stages = [stage.strip() for stage in arguments.only.split(",")]
    unknown = [stage for stage in stages if stage not in every]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(every)}")
    Life.overrides = tuple(arguments.set)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.keep))
    chaos = Chaos(folder, arguments.kills, arguments.seed, stages)
    lives.be_subreaper()
    try:
        chaos.run()
    except Wrong as error:
        print(f"chaos: {error}\nthe runs are in {folder}", file=sys.stderr)
        return 1
    finally:
        report(chaos.tally, stages, time.monotonic() - started)
    shutil.rmtree(folder)
    return 0


def report(tally: Tally, stages: list[str], seconds: float) -> None:
    if tally.refused:
        said = ", ".join(f"{name} {count}" for name, count in tally.refused.most_common())
        print(f"a full disk has refused {said}; all of these runs went on with room again")
    print(f"{'stage':18}{'killed':>8}{'came late':>12}")
    for stage in stages:
        print(f"{stage:18}{tally.hit[stage]:8}{tally.late[stage]:12}")
    print(
        f"{sum(tally.hit.values())} kills in {tally.runs} runs, {tally.resumed_from_older} taken up from "
        f"an older checkpoint; {seconds:.0f} s; a run's last process went at most "
        f"{tally.slowest_to_go:.2f} s after it"
    )


if __name__ == "__main__":
    sys.exit(main())
