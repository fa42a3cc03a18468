"""A campaign of faults: runs on one process and on two are killed, stopped, robbed of checkpoints and of their disk.

`make faults` starts runs of SiD on a tiny teacher, and ends them at random moments, in steps and while checkpoints are
written: SIGKILL, SIGTERM, SIGSTOP with SIGCONT. Between two starts it damages checkpoints. Other runs have a disk that
is full or read-only before they end. Every run must end with the bytes of the undisturbed run of as many processes, and
lose nothing beyond the steps since its last checkpoint; what else it may do is the message that it should give.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
BAR = f"/{STEPS} step ["  # in a line of progress: the first one says that training begins
RUN = f"--max_train_steps {STEPS} --logging_steps 1 --train_batch_size 8 --validation_images 4 --validation_steps 6"
RUN += " --checkpoints_total_limit 3 --resume_from_checkpoint latest"
GRACE = 10  # seconds that a launcher gives the others after one has died (torchrun: 30)


@dataclass(frozen=True)
class Campaign:
    """How much to break."""

    kills: int = 200  # SIGKILL, SIGTERM, SIGSTOP together; two of five on two processes
    disks: int = 6  # full or read-only disks, on as many processes each
    seed: int = 0
    output: Path | None = None  # of the table; None: the terminal only


class Group:
    """The processes of one start of a run, and what torchrun does for them: when one dies, the others are ended.

    A process is a fork: what is imported is not imported again. limit: bytes that a file may have, where no small disk
    can be mounted.
    """

    def __init__(self, home: Path, folder: Path, processes: int, every: int, limit: int | None = None) -> None:
        self.said, self.status = home / "said.txt", {}
        self.said.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"{RUN} --checkpointing_steps {every} --teacher {home / 'teacher'} --output_dir {folder}"
        self.alive = {rank: self._fork(rank, processes, port, flags.split(), limit) for rank in range(processes)}

    def _fork(self, rank: int, processes: int, port: int, flags: list[str], limit: int | None) -> int:
        if child := os.fork():
            return child
        status = 70
        try:
            if processes > 1:
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{processes}"}
                os.environ |= {**where, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            if limit is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            from distill.training import checkpoint
            from pipelines.run import main
            from recipes.digits import TABLE

            with self.said.open("a") as said:
                os.dup2(said.fileno(), 2)
            # what this process has seen, the next one has to see for itself
            checkpoint.integrity.warn_skipped.cache_clear()
            checkpoint.integrity.digest.cache_clear()
            main(TABLE["sid"].config, flags)
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, seconds: float, until=lambda: False) -> int | None:
        """The status of the first that failed, once none is alive; 0 if all ended well; None: they still run."""
        deadline = time.monotonic() + seconds
        while self.alive:
            for rank, child in [*self.alive.items()]:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del self.alive[rank]
                    self.status[rank] = os.waitstatus_to_exitcode(status)
                    if self.status[rank] and len(self.status) == 1 and self.alive:
                        self.send(signal.SIGTERM)
                        deadline = time.monotonic() + GRACE
            failed = any(self.status.values())
            if time.monotonic() > deadline:
                if not failed:
                    return None
                self.send(signal.SIGKILL)
            if not failed and until():
                return None
            time.sleep(0.001)
        return next((status for status in self.status.values() if status), 0)

    def send(self, number: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in self.alive.keys() & {*ranks}:
            os.kill(self.alive[rank], number)


def saving(folder: Path, since: float) -> bool:
    """Whether a checkpoint is being written, or was when its process died; what is older than `since` was left."""
    try:
        return any(p.stat().st_mtime > since for p in folder.glob(".checkpoint-*[0-9].partial"))
    except FileNotFoundError:
        return False


def newest(folder: Path) -> int:
    return max([int(one.name.split("-")[1]) for one in whole(folder)], default=0)


def whole(folder: Path) -> list[Path]:
    """The checkpoints that are neither torn nor corrupted."""
    from distill.training import checkpoint

    return [one for one in checkpoint.integrity.checkpoint_folders(folder) if checkpoint.find_corruption(one) is None]


def later(folder: Path) -> set[Path]:
    """The damaged checkpoints after the newest whole one."""
    from distill.training import checkpoint

    return {
        one
        for one in checkpoint.integrity.checkpoint_folders(folder)
        if checkpoint.integrity.step_of_name(one) > newest(folder)
    }


def logged(folder: Path) -> int:
    """The last step in the log; a line that was cut does not count."""
    steps = [0]
    if (folder / "log.jsonl").is_file():
        steps += [json.loads(line)["step"] for line in (folder / "log.jsonl").open() if line.endswith("\n")]
    return steps[-1]


def result(folder: Path) -> tuple[dict[str, bytes], list[int]]:
    """Every byte that a finished run must have: the last checkpoint, the exported weights; and the steps logged."""
    files = [*whole(folder)[-1].iterdir(), *(folder / "pipeline").rglob("*.safetensors")]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "something half-written is left"
    lines = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    return {f"{file.relative_to(folder)}": file.read_bytes() for file in files}, lines


# ---- what is broken ----


def truncate(folder: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(folder.iterdir()))
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip(folder: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def remove(folder: Path, chance: random.Random) -> None:
    chance.choice(sorted(folder.iterdir())).unlink()


DAMAGE = {
    "a file of a checkpoint truncated": truncate,
    "one bit of a checkpoint flipped": flip,
    "a file of a checkpoint removed": remove,
}


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, option: str) -> bool:
    return not subprocess.run(["mount", "-o", f"remount,{option}", folder], stderr=subprocess.DEVNULL).returncode


def mounts() -> bool:
    """Whether this process may mount: it may in a mount namespace of its own."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with disk(Path(name) / "disk", 4096):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


# ---- the campaign ----


class Faults:
    """counts: (processes, what, how it came out) -> [how often, how often while a checkpoint was written]."""

    def __init__(self, campaign: Campaign, home: Path) -> None:
        from pipelines.families import tiny as teachers

        self.campaign, self.home, self.chance = campaign, home, random.Random(campaign.seed)
        self.counts: dict[tuple[int, str, str], list[int]] = {}
        self.runs, self.hits, self.lost, self.others = Counter(), Counter(), Counter(), Counter()
        self.whole: dict[int, tuple[dict[str, bytes], list[int]]] = {}
        self.seconds: dict[int, float] = {}
        teachers.save("edm", home / "teacher")

    def undisturbed(self, processes: int) -> None:
        for name in ("whole", "again"):  # the second one is as fast as those to come
            start, group = time.monotonic(), Group(self.home, self.home / name, processes, 3)
            assert group.wait(600) == 0, group.said.read_text()
            self.seconds[processes] = time.monotonic() - start
        self.whole[processes] = result(self.home / "whole")
        assert result(self.home / "again") == self.whole[processes]
        self.room = sum(file.stat().st_size for file in (self.home / "whole").rglob("*"))
        for name in ("whole", "again"):
            shutil.rmtree(self.home / name)

    def count(self, processes: int, what: str, came: str, in_save: bool = False) -> None:
        row = self.counts.setdefault((processes, what, came), [0, 0])
        row[0] += 1
        row[1] += in_save

    def kills(self, processes: int, number: int) -> None:
        """Runs one after the other, until so many signals have hit."""
        while self.hits[processes] < number:
            folder = self.home / f"run-{processes}-{self.runs[processes]}"
            every = self.chance.choice((1, 1, 3))
            status = None
            while status != 0:
                before, harmed = newest(folder), later(folder)
                status, hit, ranks, in_save, group = self.life(processes, folder, every, number)
                said, last = group.said.read_text(), newest(folder)
                assert all(f"{one} is skipped: " in said for one in harmed) or BAR not in said, said
                assert (" is skipped: " in said) <= bool(harmed) and later(folder) <= harmed, said
                if hit is not None and status == 0:
                    self.count(processes, hit.name, "had already finished", in_save)
                elif hit is not None:
                    came = self.came(hit, group)
                    self.count(processes, hit.name, came, in_save)
                    if ranks != (0, 1)[:processes]:
                        self.others[group.status[1 - ranks[0]]] += 1
                    if not harmed:
                        lost = logged(folder) - last
                        assert last >= before, f"checkpoint-{before} is lost: {said}"
                        assert lost <= (0 if "saved" in came else 2 * every), f"{lost} steps are lost: {said}"
                        self.lost[every] = max(self.lost[every], lost)
                if status and self.chance.random() < 0.3:
                    self.harm(processes, folder)
            assert result(folder) == self.whole[processes], f"{folder} is not as the undisturbed run"
            shutil.rmtree(folder)
            self.runs[processes] += 1

    def life(self, processes: int, folder: Path, every: int, number: int):
        """One start: (status, the signal that was to end it or None, to which ranks, whether in a save, processes)."""
        since, group, chance, hit = time.time(), Group(self.home, folder, processes, every), self.chance, None
        while self.hits[processes] < number and hit is None:
            status = self.moment(processes, folder, group, since)
            if status is not None:
                return status, None, (), False, group
            hit = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
            ranks = chance.choice(((0, 1), (0,), (1,))) if processes > 1 else (0,)
            in_save = saving(folder, since)
            group.send(hit, ranks)
            self.hits[processes] += 1
            if hit == signal.SIGSTOP:
                time.sleep(chance.uniform(0.01, 0.3))
                group.send(signal.SIGCONT, ranks)
                self.count(processes, "SIGSTOP", "continues after SIGCONT", in_save)
                hit = None
        status = group.wait(600)
        assert status is not None, f"a run hangs: {group.said.read_text()}"
        if hit is None:
            return status, None, (), False, group
        if hit == signal.SIGKILL:
            in_save = saving(folder, since)  # the others may have gone on to it, or have finished it
        return status, hit, ranks, in_save, group

    def moment(self, processes: int, folder: Path, group: Group, since: float) -> int | None:
        """Wait for one: while it starts, after a step, or in a save after it; the status of a run that has ended."""
        kind, step, late = self.chance.choice("start step save save".split()), self.chance.randrange(STEPS), None
        if kind == "start":
            return group.wait(self.chance.uniform(0, self.seconds[processes] / 2))
        late = group.wait(600, lambda: group.said.read_text().count(BAR) > 1 and logged(folder) >= step)
        if late is None and kind == "save":
            late = group.wait(600, lambda: saving(folder, since))
        if late is None:
            time.sleep(self.chance.uniform(0, 0.01 if kind == "save" else 0.1))
            late = group.wait(0)
        return late

    def came(self, hit: signal.Signals, group: Group) -> str:
        """How a start ended, in words; only what is allowed has words."""
        if hit == signal.SIGKILL:
            assert -9 in group.status.values(), group.said.read_text()
            return "dies; resumes from its last checkpoint"
        if group.status[0] == 143 and "interrupted; saved" in group.said.read_text():
            return "finishes its step, saves, ends with status 143"
        assert -15 in group.status.values() or 143 in group.status.values(), group.said.read_text()
        return "before or after training: ends at once; resumes"

    def harm(self, processes: int, folder: Path) -> None:
        """Damage the newest checkpoint, sometimes all of them."""
        if found := whole(folder):
            what, everything = self.chance.choice(sorted(DAMAGE)), self.chance.random() < 0.2
            for one in found if everything else found[-1:]:
                DAMAGE[what](one, self.chance)
            alone = everything or len(found) == 1
            self.count(
                processes,
                what,
                "named in a message; the run starts from step 0"
                if alone
                else "named in a message; the run resumes from the checkpoint before",
            )

    def disks(self, processes: int, number: int, mounted: bool) -> None:
        """Full and read-only disks: a message, the last checkpoint whole; with room it goes on."""
        for i in range(number):
            folder, read_only = self.home / f"disk-{processes}-{i}", mounted and i % 3 == 2
            share = self.chance.uniform(0.1, 0.95)
            if mounted:
                with disk(folder, 1 << 30 if read_only else int(share * self.room)):
                    self.refused(processes, folder, read_only, None)
                    assert remount(folder, f"rw,size={1 << 30}")
                    self.again(processes, folder)
            else:
                self.refused(processes, folder, False, int(share * 60_000))
                self.again(processes, folder)
                shutil.rmtree(folder)
            self.runs[processes] += 1

    def refused(self, processes: int, folder: Path, read_only: bool, limit: int | None) -> None:
        group = Group(self.home, folder, processes, 1, limit)
        if read_only:
            late = time.monotonic() + self.chance.uniform(0.3, 0.9) * self.seconds[processes]
            group.wait(600, lambda: time.monotonic() > late and remount(folder, "ro"))
        status, why = group.wait(600), "the disk is read-only" if read_only else "the disk is full"
        said = group.said.read_text()
        if status == 0:  # it had ended before
            self.count(processes, why, "had already finished")
            return
        assert group.status[0] == 2 and f"error: {why}" in said, said
        assert "go on with --resume_from_checkpoint latest" in said, said
        if processes == 1:
            assert "Traceback" not in said, said
        assert logged(folder) - newest(folder) <= 3, said
        self.count(
            processes,
            why,
            "stops with a message and status 2; the last checkpoint is intact; resumes once there is space",
        )

    def again(self, processes: int, folder: Path) -> None:
        group = Group(self.home, folder, processes, 1)
        assert group.wait(600) == 0, group.said.read_text()
        assert "is skipped" not in group.said.read_text(), "a full disk has left a damaged checkpoint"
        assert result(folder) == self.whole[processes], f"{folder} is not as the undisturbed run"


def run(campaign: Campaign) -> Faults:
    """All of it; a difference, a hang or a lost step is an AssertionError."""
    import torch

    from distill.data import digits

    torch.set_num_threads(1)
    import_module("recipes.digits")
    digits("train")  # what is imported and read here is so in every fork
    with tempfile.TemporaryDirectory() as name:
        faults = Faults(campaign, Path(name))
        two = campaign.kills * 2 // 5
        mounted = mounts()
        for processes, kills in ((1, campaign.kills - two), (2, two)):
            faults.undisturbed(processes)
            faults.kills(processes, kills)
            faults.disks(processes, campaign.disks, mounted)
    faults.mounted = mounted
    return faults


def table(faults: Faults, campaign: Campaign, minutes: float) -> str:
    import torch

    names = ("SIGKILL", "SIGTERM", "SIGSTOP")
    kills = [row for (_, what, _), row in faults.counts.items() if what in names]
    rows = [
        f"| {processes} | {what} | {came} | {often} | {in_save if what in names else ''} |"
        for (processes, what, came), (often, in_save) in sorted(faults.counts.items())
    ]
    lost = ", ".join(f"{n} with a checkpoint every {k}" for k, n in sorted(faults.lost.items()))
    ways = {-9: "SIGKILL", 143: "SIGTERM", -15: "SIGTERM", 0: "by itself after the same step"}
    ends: Counter[str] = Counter()
    for status, n in faults.others.items():
        ends[ways.get(status, "by itself because the other had gone")] += n
    others = ", ".join(f"{how} ({n} times)" for how, n in sorted(ends.items()))
    small = "a mounted tmpfs" if faults.mounted else "a limit on the size of a file, because nothing could be mounted"
    flags = f"--kills {campaign.kills} --disks {campaign.disks} --seed {campaign.seed}"
    table = "\n".join(rows)
    return f"""# Endurance

`make faults` (`python tests/support/campaign.py {flags}`) made {sum(faults.runs.values())} runs of {STEPS} steps: SiD
with a tiny teacher, a checkpoint every step or every third step, on one process and on two. It sent
{sum(row[0] for row in kills)} signals (SIGKILL, SIGTERM, and SIGSTOP followed by SIGCONT),
{sum(row[1] for row in kills)} of them while a checkpoint was being written.
It took {minutes:.0f} minutes on a CPU ({platform.machine()}), torch {torch.__version__}.

Every run ended with the same bytes as an undisturbed run on as many processes: last checkpoint, exported weights and
steps of the log. A SIGKILL lost at most these numbers of steps: {lost}. A checkpoint is written
while the next steps run, so up to twice the interval may be lost. A SIGTERM lost none. The small disk is
{small}. When one of two processes died, the other one ended as under torchrun, which sends SIGTERM
and, after {GRACE} seconds, SIGKILL: {others}.

| processes | fault | what the run does | times | during a save |
|---|---|---|---|---|
{table}
"""


def main(campaign: Campaign) -> None:
    start = time.monotonic()
    text = table(run(campaign), campaign, (time.monotonic() - start) / 60)
    sys.stdout.write(text)
    if campaign.output is not None:
        campaign.output.write_text(text)


if __name__ == "__main__":
    import tyro

    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [f"{ROOT}", f"{ROOT / 'tests' / 'support'}"]
    campaign = tyro.cli(Campaign, use_underscores=True, description=__doc__)
    alone = ["unshare", "--mount", "--map-root-user"]  # where a small disk can be mounted
    if "FAULTS_ALONE" not in os.environ and shutil.which("unshare"):
        if not subprocess.run([*alone, "true"], stderr=subprocess.DEVNULL).returncode:
            os.execvpe("unshare", [*alone, sys.executable, *sys.argv], os.environ | {"FAULTS_ALONE": "1"})
    main(campaign)
