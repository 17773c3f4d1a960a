"""Read hostile inputs in forked processes, and say what became of each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests._processes import ended, in_child
from tests.faults._corpus import Case
from vision_plugin.images import BadImageError

SECONDS = 2.0
"""Longest time that an input may take."""
MEGABYTES = 1000.0
"""Most memory that an input may take beside what the process held before."""
MANNERS = ("read", "refused", "unclear", "traceback", "hang", "memory", "canary")
"""What may become of an input; the first two are right."""
_NO_MEMORY = re.compile(
    r"MemoryError|[Cc]annot allocate|can't allocate|[Uu]nable to allocate|malloc"
)
_LONGEST_MESSAGE = 2100
_ROOM = 3 << 30
"""Bytes that an input may ask for: more than it may use, so that who uses them is seen."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    name: str
    kind: str
    manner: str
    """One of ``MANNERS``."""
    seconds: float = 0.0
    """Processor time."""
    megabytes: float = 0.0
    """Peak of the resident memory above what it was before."""
    error: str = ""
    message: str = ""

    @property
    def right(self) -> bool:
        """Whether the input was read, or refused in one sentence, in time."""
        return self.manner in MANNERS[:2]


class Sandbox:
    """A folder to read inputs in, with things beside them that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.work, self.canary = self.root / "work", self.root / "canary"
        for name in ("work", "canary/inner", "home", "tmp"):
            (self.root / name).mkdir(parents=True)
        for name in ("keep.txt", "inner/keep.png"):
            (self.canary / name).write_text("untouched")

    def fresh(self) -> Path:
        """Return an empty folder for an input."""
        shutil.rmtree(self.work)
        folder = self.work / "hostile"
        folder.mkdir(parents=True)
        return folder

    def seen(self) -> dict[str, tuple[int, ...]]:
        """Return the kind, size and time of every file, by its path."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = os.path.join(folder, name)  # noqa: PTH118  # paths as text are quick
                status = os.lstat(path)
                is_folder = name in folders
                found[path] = (status.st_mode, *(() if is_folder else _size_and_time(status)))
        return found

    def enter(self) -> None:
        """Make this process read, and write what it must, inside."""
        os.chdir(self.work)
        os.environ.update(HOME=str(self.root / "home"), TMPDIR=str(self.root / "tmp"))
        tempfile.tempdir = None

    def untouched(self) -> bool:
        """Whether the canaries are as they were."""
        names = {path.name for path in self.canary.rglob("*")}
        texts = {path.read_text() for path in self.canary.rglob("*") if path.is_file()}
        return names == {"inner", "keep.txt", "keep.png"} and texts == {"untouched"}


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def run(
    cases: Sequence[Case],
    root: Path,
    told: Callable[[Outcome], object] = lambda _: None,
    *,
    per_process: int = 500,
) -> list[Outcome]:
    """Read inputs in forked processes, many in each; a process that hangs is killed.

    Args:
        cases: The inputs.
        root: An empty folder.
        told: Called with each outcome.
        per_process: Most inputs for one process.
    """
    sandbox, outcomes = Sandbox(root), list[Outcome]()
    while len(outcomes) < len(cases):
        first = len(outcomes)
        alone = cases[first].writes
        last = first + (1 if alone else per_process)
        if not alone:
            last = next((i for i in range(first, min(last, len(cases))) if cases[i].writes), last)
        for outcome in _in_one_process(cases[first:last], sandbox):
            told(outcome)
            outcomes.append(outcome)
    return outcomes


def _in_one_process(cases: Sequence[Case], sandbox: Sandbox) -> Iterator[Outcome]:
    """Yield outcomes up to the first that ends the process."""
    reader, writer = os.pipe()
    child = in_child(lambda: _work(cases, sandbox, writer))
    os.close(writer)
    watch, done = _Watch(child), 0
    with os.fdopen(reader, "rb"):
        rest = b""
        while True:
            ready, _, _ = select.select([reader], [], [], 0.1)
            received = os.read(reader, 1 << 20) if ready else None
            if received == b"":
                break
            *lines, rest = (rest + (received or b"")).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if isinstance(told, str):
                    raise RuntimeError(f"an input could not be written: {told}")
                if told is None:
                    watch.start()
                else:
                    watch.stop()
                    done += 1
                    yield Outcome(**told)
            if watch.running and watch.hangs(cases[done].patience):
                os.kill(child, signal.SIGKILL)
    status = ended(child)
    if watch.running:
        case = cases[done]
        manner, why = ("hang", "killed") if watch.killed else ("traceback", f"ended with {status}")
        if not sandbox.untouched():
            manner = "canary"
        yield Outcome(case.name, case.kind, manner, watch.seconds, 0.0, why)
    elif not done:
        raise RuntimeError(f"the process of {cases[0].name} ended with {status}")


class _Watch:
    """How long a process has worked on its input, or waited."""

    def __init__(self, child: int) -> None:
        self.child, self.running, self.killed = child, False, False
        self.seconds, self._asleep = 0.0, 0

    def start(self) -> None:
        self.running, self._asleep = True, 0
        self._began, self._spent = time.monotonic(), self._state()[1]

    def stop(self) -> None:
        self.running = False

    def hangs(self, patience: float) -> bool:
        awake, spent = self._state()
        waited = time.monotonic() - self._began
        self.seconds = spent - self._spent
        self._asleep = 0 if awake else self._asleep + 1
        if self._asleep > 10 and waited > SECONDS and self.seconds < waited / 4:
            self.seconds, self.killed = waited, True
        # Half as long again: an input that ends by itself says more about what it did.
        self.killed |= self.seconds > 1.5 * max(patience, SECONDS) or waited > 30 * patience
        return self.killed

    def _state(self) -> tuple[bool, float]:
        """Return whether any thread runs, and the processor time taken, workers included."""
        states, ticks = set[str](), 0
        for process in _family(self.child):
            for thread in Path(f"/proc/{process}/task").glob("*/stat"):
                with contextlib.suppress(OSError):  # it may have ended meanwhile
                    fields = thread.read_text().rpartition(")")[2].split()
                    states.add(fields[0])
                    ticks += int(fields[11]) + int(fields[12])
        return not states <= {"S"}, ticks / os.sysconf("SC_CLK_TCK")


def _family(process: int) -> Iterator[int]:
    """Yield a process and those that it has started."""
    yield process
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in listed.read_text().split():
                yield from _family(int(child))


def _work(cases: Sequence[Case], sandbox: Sandbox, writer: int) -> None:
    """Read inputs one after another, and tell what became of each."""
    _silence()
    sandbox.enter()
    for case in cases:
        folder = sandbox.fresh()
        os.chdir(sandbox.work)
        try:
            opened = case.write(folder)
        except Exception:
            os.write(writer, json.dumps(f"{case.name}: {traceback.format_exc()}").encode() + b"\n")
            raise
        before = sandbox.seen()
        os.write(writer, b"null\n")
        outcome = _attempt(case, opened, folder, sandbox, before)
        os.write(writer, json.dumps(asdict(outcome)).encode() + b"\n")
        if outcome.megabytes > MEGABYTES / 2 or not sandbox.untouched():
            return


def _silence() -> None:
    """Give this process no input, and nobody to talk to."""
    nobody, kept = os.pipe()
    os.dup2(nobody, 0)
    os.set_inheritable(kept, True)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


def _status(field: str) -> float:
    """Return a field of this process's status in kilobytes."""
    text = Path("/proc/self/status").read_text()
    return float(text.partition(f"{field}:")[2].split()[0])


def _attempt(
    case: Case, opened: Path, folder: Path, sandbox: Sandbox, before: dict[str, tuple[int, ...]]
) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, began = _status("VmRSS"), time.process_time()
    error: BaseException | None = None
    most = int(_status("VmSize") * 1024) + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    try:
        case.read(opened)
    except BaseException as caught:
        error = caught
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    seconds = time.process_time() - began
    megabytes = (_status("VmHWM") - held) / 1024
    kind, message = ("", "") if error is None else (type(error).__name__, _one_line(error))
    says = case.says or (opened.name, *(path.name for path in folder.rglob("*")))
    if isinstance(error, BadImageError):
        says = (*says, error.id)
    manner = _manner(error, message, says)
    if _NO_MEMORY.search(f"{kind}: {message}") or megabytes > MEGABYTES:
        manner = "memory"
    elif seconds > (SECONDS if manner != "read" else case.patience):
        manner = "hang"
    if not _left_alone(case, manner, sandbox, before):
        manner = "canary"
    if manner == "traceback":
        assert error is not None
        message = f"{message[:300]} [{_place(error)}]"
    return Outcome(
        case.name, case.kind, manner, round(seconds, 3), round(megabytes, 1), kind, message[:600]
    )


def _manner(error: BaseException | None, message: str, says: Sequence[str]) -> str:
    if error is None:
        return "read"
    if not isinstance(error, ValueError | OSError):
        return "traceback"
    if message.startswith(("exit status", "several lines")):
        return "unclear"
    named = any(text in message for text in says)
    return "refused" if named and 8 < len(message) < _LONGEST_MESSAGE else "unclear"


def _one_line(error: BaseException) -> str:
    """Return an error's text as the command prints it."""
    return " ".join(str(error).split())


def _left_alone(
    case: Case, manner: str, sandbox: Sandbox, before: dict[str, tuple[int, ...]]
) -> bool:
    """Whether nothing changed on disk but what may."""
    after = sandbox.seen()
    if not case.writes or manner != "read":
        return after == before
    new = [path for path in after if path not in before]
    kept = all(after.get(path) == seen for path, seen in before.items())
    return kept and all(Path(path).is_relative_to(sandbox.work) for path in new)


def _place(error: BaseException) -> str:
    """Return where in the package an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/vision_plugin/" in f.filename or "/hooks/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


def import_everything() -> None:
    """Import what reading any input imports, so that every forked process has it."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import vision_plugin
    from vision_plugin import cli, evaluation, images, metrics, models, report, sae
    from vision_plugin.demo import job  # noqa: F401

    for package in (vision_plugin, evaluation, images, metrics, models, report, sae):
        for name in package.__all__:
            getattr(package, name)
    for command in cli.COMMANDS.values():
        importlib.import_module(f"vision_plugin.cli.{command.module}")


def main() -> None:
    """Read the inputs that are named, here and now, and let their errors show."""
    from tests.faults._corpus import case_of

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            case = case_of(name)
            case.read(case.write(Path(folder)))


if __name__ == "__main__":
    main()
