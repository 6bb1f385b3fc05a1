"""For any graph and any events: limits, needs and paths are respected, every task ends, and none starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.scheduling.dispatch import AGING_SECONDS, DispatchBoard, DispatchEntry
from orchestrator.domain.settings.path_patterns import has_any_overlap
from tests.hypothesis_settings import example_settings

PATTERNS = ("a/**", "a/b", "b/*", "**/b", "c", "**")
ADAPTERS = ("x", "y", "z")
LIMITS = st.dictionaries(st.sampled_from(ADAPTERS), st.integers(1, 2))


@st.composite
def entries(draw: st.DrawFn) -> dict[str, DispatchEntry]:
    """Draw an acyclic graph in which tasks need earlier ones."""
    names = [f"t{index}" for index in range(draw(st.integers(1, 12)))]
    made = {
        name: DispatchEntry(
            needs=tuple(draw(st.lists(st.sampled_from(names[:index]), max_size=3))) if index else (),
            adapter=draw(st.sampled_from(ADAPTERS)),
            priority=draw(st.integers(-1, 1)),
            owns=tuple(draw(st.lists(st.sampled_from(PATTERNS), max_size=2))),
            fallback=tuple(draw(st.lists(st.sampled_from(ADAPTERS), max_size=2))),
        )
        for index, name in enumerate(names)
    }
    return {name: made[name] for name in draw(st.permutations(names))}


class Run:
    """A scheduler without sessions that follows the board and the drawn events, and checks each step."""

    def __init__(self, tasks: Mapping[str, DispatchEntry], capacity: int, capacities: Mapping[str, int]) -> None:
        self.tasks, self.capacity, self.capacities = tasks, capacity, capacities
        self.board, self.now = DispatchBoard(tasks, capacities), 0.0
        self.running, self.built, self.waiting = list[str](), list[str](), dict[str, float]()
        self.adapters = dict[str, str]()
        self.landed, self.over, self.parked = set[str](), set[str](), dict[str, float]()
        self.unproven, self.probes = set[str](), dict[str, str]()

    def decide(self) -> None:
        for task in self.board.choose_tasks(self.capacity - len(self.running), self.now):
            self._check_start(task)
            self.waiting.pop(task, None)
            self.running.append(task)
            adapter = self.adapters[task] = self.board.adapter_of(task)
            if adapter in self.unproven:
                self.probes[adapter] = task
        assert len(self.running) == self.board.adapters.running() <= self.capacity
        counts = Counter(self.adapters[task] for task in self.running)
        assert all(counts[adapter] <= limit for adapter, limit in self.capacities.items())
        self._check_blocked()
        self._check_adapters()

    def _check_adapters(self) -> None:
        """Assert that a ready task that owns no contended path waits for capacity or a cooldown."""
        counts = Counter(self.adapters[task] for task in self.running)
        for task in self.startable(with_parked=True):
            best = self.first_open(task)
            assert best is None or self.board.adapter_of(task) == best
            if self.tasks[task].owns:
                continue
            if best is not None and len(self.running) < self.capacity:
                assert counts[best] >= self.capacities.get(best, self.capacity), "its adapter has capacity"
            better = [one for one in self.better(task, best) if one not in self.board.adapters.disabled]
            ends = [self.parked[one] for one in better if self.parked.get(one, 0.0) > self.now]
            due = self.board.forecast.next_time()
            assert not ends or (due is not None and due <= min(ends)), "no wake-up at the end of its adapter's cooldown"

    def first_open(self, task: str) -> str | None:
        return next(filter(self.is_open, self.tasks[task].adapters), None)

    def better(self, task: str, adapter: str | None) -> tuple[str, ...]:
        """Return the adapters of a task that precede this one, or all of them."""
        adapters = self.tasks[task].adapters
        return adapters if adapter is None else adapters[: adapters.index(adapter)]

    def _check_start(self, task: str) -> None:
        entry = self.tasks[task]
        live = [*self.running, *self.built]
        assert set(entry.needs) <= self.landed
        assert task not in {*live, *self.landed, *self.over, *self.board.blocked}
        assert self.waiting.get(task, 0.0) <= self.now
        assert self.board.adapter_of(task) == self.first_open(task)
        assert not [other for other in live if has_any_overlap(entry.owns, self.tasks[other].owns)]

    def is_open(self, adapter: str) -> bool:
        if adapter in self.board.adapters.disabled or adapter in self.probes:
            return False
        return self.parked.get(adapter, 0.0) <= self.now

    def _check_blocked(self) -> None:
        dead = self.over | set(self.board.blocked)
        for task, need in self.board.blocked.items():
            assert need in self.tasks[task].needs
            assert need in dead
        assert not set(self.board.blocked) & (self.landed | self.over)
        untouched = set(self.tasks) - dead - self.landed
        assert not [task for task in untouched if set(self.tasks[task].needs) & dead]

    def startable(self, *, with_parked: bool = False) -> list[str]:
        """Return the tasks that could start with unlimited capacity and all adapters available, computed naively."""
        busy = {*self.running, *self.built, *self.landed, *self.over, *self.waiting, *self.board.blocked}
        live = [self.tasks[task].owns for task in (*self.running, *self.built)]
        return [
            task
            for task, entry in self.tasks.items()
            if task not in busy
            and set(entry.needs) <= self.landed
            and (with_parked or any(map(self.is_open, entry.adapters)))
            and not any(has_any_overlap(entry.owns, owns) for owns in live)
        ]

    def end(self, task: str, how: str, delay: float) -> None:
        if task in self.running:
            self.running.remove(task)
            self._end_probe(task, has_response=how in {"build", "land"})
        elif task in self.built:
            self.built.remove(task)
        self.waiting.pop(task, None)
        match how:
            case "build":
                self.built.append(task)
                self.board.built(task)
            case "retry":
                self.waiting[task] = self.now + delay
                self.board.wait(task, self.now + delay)
            case "end":
                self.over.add(task)
                self.board.ended(task)
            case _:
                self.landed.add(task)
                self.board.landed(task)

    def _end_probe(self, task: str, *, has_response: bool) -> None:
        adapter = self.adapters[task]
        if self.probes.get(adapter) == task:
            del self.probes[adapter]
        if has_response and adapter in self.unproven and self.is_open(adapter):
            self.unproven.remove(adapter)
            self.board.adapters.enable(adapter)

    def disturb(self, what: str, task: str, delay: float) -> None:
        """Apply an external event."""
        adapter = self.tasks[task].adapter
        match what:
            case "park":
                self.parked[adapter] = max(self.parked.get(adapter, 0.0), self.now + delay)
                self.unproven.add(adapter)
                self.board.adapters.start_cooldown(adapter, self.now + delay)
            case "close":
                self.board.adapters.disable(adapter, "its login failed")
            case "cancel" if task not in self.landed | self.over:
                self.end(task, "end", delay)
            case "retry" if task in self.over:
                self.over.remove(task)
                self.board.retry(task)
            case "pass":
                self.now += delay


@example_settings(200)
@given(entries(), st.integers(1, 4), LIMITS, st.data())
def test_dispatch_respects_limits_and_ends_every_task(
    tasks: dict[str, DispatchEntry], capacity: int, capacities: dict[str, int], data: st.DataObject
) -> None:
    """With cooldowns, disabled adapters, retries, cancellations and revivals."""
    run, budget = Run(tasks, capacity, capacities), 30
    delays = st.floats(0, 2000)
    while True:
        if budget and data.draw(st.booleans()):
            budget -= 1
            what = data.draw(st.sampled_from(["park", "close", "cancel", "cancel", "retry", "retry", "pass"]))
            run.disturb(what, data.draw(st.sampled_from(list(tasks))), data.draw(delays))
        run.decide()
        moving = [*run.running, *run.built]
        if moving:
            how = data.draw(st.sampled_from(["land", "build", "end", "retry"])) if budget else "land"
            budget -= how == "retry"
            task = data.draw(st.sampled_from(moving))
            run.end(task, "land" if task in run.built and how == "build" else how, data.draw(delays))
        elif run.board.forecast.has_work():
            due = run.board.forecast.next_time()
            assert due is not None, "work is left, but nothing runs and nothing waits"
            assert due > run.now
            run.now = due
        else:
            break
    left = set(tasks) - run.landed - run.over - set(run.board.blocked)
    assert not run.startable()
    closed = {task for task in left if set(tasks[task].adapters) <= run.board.adapters.disabled.keys()}
    assert all(task in closed or set(tasks[task].needs) & left for task in left)


@example_settings(200)
@given(entries(), st.integers(1, 4), st.data())
def test_dispatch_without_work_starts_nothing(
    tasks: dict[str, DispatchEntry], capacity: int, data: st.DataObject
) -> None:
    """With nothing running, `has_work` distinguishes tasks that may start from those that need a landing."""
    run = Run(tasks, capacity, {})
    for _ in range(20):
        run.decide()
        if not run.running:
            held = [run.tasks[task] for task in run.built]
            assert not run.board.forecast.has_work() or run.board.forecast.next_time() is not None
            assert run.built or not run.startable(), held
            break
        run.end(run.running[0], data.draw(st.sampled_from(["build", "land", "end"])), 0.0)


LISTS = st.lists(st.sampled_from(ADAPTERS), min_size=1, max_size=3)
STEPS = st.lists(st.tuples(st.sampled_from(["park", "pass", "land", "retry"]), st.integers(0, 9), st.integers(1, 3)))


@example_settings(300)
@given(st.lists(LISTS, min_size=2, max_size=8), st.integers(1, 3), LIMITS, STEPS)
def test_fallback_adapter_is_used_only_during_cooldowns(
    lists: list[list[str]], capacity: int, capacities: dict[str, int], steps: list[tuple[str, int, int]]
) -> None:
    """At every decision, with more ready tasks than capacity, and changing cooldowns."""
    tasks = {f"t{one}": DispatchEntry(adapter=names[0], fallback=tuple(names[1:])) for one, names in enumerate(lists)}
    run = Run(tasks, capacity, capacities)
    run.decide()
    for what, which, delay in steps:
        if what in {"park", "pass"}:
            run.disturb(what, f"t{which % len(tasks)}", delay)
        elif run.running:
            run.end(run.running[which % len(run.running)], what, delay)
        run.decide()


STREAM = st.lists(
    st.tuples(st.sampled_from([(), ("a/b",), ("b/*",), ("**",)]), st.integers(1, 4)), min_size=8, max_size=8
)


@example_settings(100)
@given(st.integers(1, 3), st.integers(0, 3), st.sampled_from([(), ("a/**",), ("a/b", "c")]), STREAM)
def test_dispatch_starves_no_task(
    capacity: int, levels: int, owns: tuple[str, ...], stream: list[tuple[tuple[str, ...], int]]
) -> None:
    """In an endless stream of tasks with higher priority, late enough ones do not overtake."""
    total, step = 200, 60.0
    tasks = {"low": DispatchEntry((), "x", 0, owns)}
    for index in range(total):
        tasks[f"s{index}"] = DispatchEntry((f"gate{index}",), "x", levels, stream[index % 8][0])
        tasks[f"gate{index}"] = DispatchEntry((), "gate")
    board, sessions, ahead = (
        DispatchBoard(tasks),
        dict[str, int](),
        {f"s{n}" for n in range(total) if n * step < levels * AGING_SECONDS},
    )
    board.adapters.disable("gate", "they land when the test says so")
    for index in range(total):
        board.landed(f"gate{index}")
        for task in [task for task, end in sessions.items() if end <= index]:
            del sessions[task]
            board.landed(task)
        for task in board.choose_tasks(capacity - len(sessions), index * step):
            if task == "low":
                return
            if task not in ahead:
                assert owns, "a task without paths must not be held"
                assert ahead or not has_any_overlap(owns, tasks[task].owns), "it overtook the oldest task"
            ahead.discard(task)
            sessions[task] = index + stream[int(task[1:]) % 8][1]
    raise AssertionError("it never started")
