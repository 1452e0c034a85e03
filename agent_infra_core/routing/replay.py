"""Would another routing policy have been faster? Recorded turns, served again by simulated replicas that are calibrated
to them. Pure."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.routing.policies import LeastInFlight, Ours, Recorded, RoundRobin, StickySessions
from agent_infra_core.routing.rates import ServiceRates
from agent_infra_core.routing.simulator import FIRST_SESSION, Fleet, Physics, Policy, Script, Step

MOST_TURNS = 20_000  # the latest are replayed
FEWEST_TURNS, FEWEST_SESSIONS = 100, 10
OVERLAP = 0.7  # share of the span for which each replica must have served
SCALINGS, CLOSE = 8, 0.01  # times that the costs are scaled, at most; share by which the mean turn may differ then
RESAMPLES, LEVEL = 1000, 0.9
SLOTS_SEEN_S = 0.05  # mean queue time from which the most turns seen at once are taken for the replicas' slots
UNLIMITED_TOKENS = 10**12
AFFINITY, STICKY = "least_load with session_affinity", "sticky sessions, as other routers have them"
POLICIES: Mapping[str, Callable[[Fleet, int], Policy]] = {
    AFFINITY: Ours,
    "least_load without session_affinity": LeastInFlight,
    "round_robin": RoundRobin,
    STICKY: StickySessions,
}
_MODELS = "SELECT model FROM turns WHERE finished_at >= ? AND model IS NOT NULL GROUP BY model ORDER BY count(*) DESC"
_TURNS = (
    "SELECT session, backend, started_at, queue_ms, inference_ms, prompt_tokens, completion_tokens, cached_tokens "
    "FROM turns WHERE finished_at >= ? AND model = ? AND outcome = 'completed' AND session IS NOT NULL "
    "AND backend IS NOT NULL AND started_at IS NOT NULL AND inference_ms IS NOT NULL AND prompt_tokens > 0 "
    f"AND completion_tokens > 0 ORDER BY id DESC LIMIT {MOST_TURNS}"
)


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """A completed turn of the history; times in s."""

    session: str
    backend: str
    arrived: float
    sent: float
    ended: float
    prompt: int  # tokens
    output: int
    cached: int | None

    @property
    def computed(self) -> int:
        """Tokens of its prompt that were prefilled."""
        return self.prompt - (self.cached or 0)


@dataclass(frozen=True)
class Recording:
    """A model's turns by session, in the order of the sessions' first arrivals, and what they show of the replicas."""

    model: str
    sessions: Sequence[Sequence[RecordedTurn]]
    replicas: Sequence[str]
    shared_tokens: int  # that a new session finds cached
    slots: int
    block_tokens: int = 1  # of the engines' prefix caches

    @property
    def turns(self) -> list[RecordedTurn]:
        return [turn for session in self.sessions for turn in session]

    @property
    def mean_s(self) -> float:
        """How long a turn took, its time in the queue included."""
        return statistics.fmean(turn.ended - turn.arrived for turn in self.turns)


def read_recording(query: Callable[..., Sequence[Sequence[Any]]], model: str | None, since: float) -> Recording:
    """Read a history. ``query`` runs SQL on it, with the values that follow. RefusedError if it can't be replayed."""
    models = [str(name) for [name] in query(_MODELS, since)]
    if not models or (model is not None and model not in models):
        raise RefusedError(f"no turns of {model or 'any model'} since then; models: {', '.join(models) or 'none'}")
    model = model or models[0]
    turns = []
    for session, backend, at, queue_ms, took_ms, prompt, output, cached in query(_TURNS, since, model):
        sent = at + (queue_ms or 0.0) / 1000
        turns.append(RecordedTurn(session, backend, at, sent, sent + took_ms / 1000, prompt, output, cached))
    sessions = by_session(turns)
    if len(turns) < FEWEST_TURNS or len(sessions) < FEWEST_SESSIONS:
        raise RefusedError(
            f"{len(turns)} turns of {len(sessions)} sessions of {model} have their tokens recorded; a replay needs "
            f"{FEWEST_TURNS} turns of {FEWEST_SESSIONS} sessions"
        )
    firsts = [session[0].cached or 0 for session in sessions]
    return Recording(model, sessions, _replicas(turns), int(statistics.median(firsts)), _slots(turns))


def by_session(turns: Iterable[RecordedTurn]) -> list[list[RecordedTurn]]:
    """The turns of each session, all in the order of their arrivals."""
    sessions: dict[str, list[RecordedTurn]] = {}
    for turn in sorted(turns, key=lambda turn: turn.arrived):
        sessions.setdefault(turn.session, []).append(turn)
    return list(sessions.values())


def _replicas(turns: Sequence[RecordedTurn]) -> list[str]:
    """The replicas that served. RefusedError if there is one, or if they served at different times."""
    begin, end = min(turn.arrived for turn in turns), max(turn.ended for turn in turns)
    spans: dict[str, tuple[float, float]] = {}
    for turn in turns:
        first, last = spans.get(turn.backend, (math.inf, -math.inf))
        spans[turn.backend] = min(first, turn.arrived), max(last, turn.ended)
    if len(spans) == 1:
        raise RefusedError("one replica served all turns: no policy could have sent them elsewhere")
    for name, (first, last) in spans.items():
        if last - first < OVERLAP * (end - begin):
            raise RefusedError(f"replica {name} served for a part of the time only; --since a time without changes")
    return sorted(spans)


def _running(
    turns: Sequence[RecordedTurn], weigh: Callable[[RecordedTurn], int]
) -> Iterator[tuple[RecordedTurn, float]]:
    """Each turn as it ends, with the weight of what ran on its replica, itself included: the mean of when it was sent
    and when it ended."""
    moments = sorted(
        [(turn.sent, 1, number) for number, turn in enumerate(turns)]
        + [(turn.ended, 0, number) for number, turn in enumerate(turns)]
    )
    running: dict[str, int] = {}
    at_start: dict[int, int] = {}
    for _, is_start, number in moments:
        turn = turns[number]
        now = running.get(turn.backend, 0)
        if is_start:
            at_start[number] = running[turn.backend] = now + weigh(turn)
        else:
            running[turn.backend] = now - weigh(turn)
            yield turn, (at_start.get(number, now) + now) / 2


def _prefilled(turns: Sequence[RecordedTurn]) -> list[int]:
    """Tokens that each turn's replica prefilled while it ran, its own and those of turns that were sent meanwhile: all
    of them delayed it. What was sent before it and wasn't prefilled yet stands for what wasn't at its end."""
    sent: dict[str, list[float]] = {}
    sums: dict[str, list[int]] = {}
    for turn in sorted(turns, key=lambda turn: turn.sent):
        sent.setdefault(turn.backend, []).append(turn.sent)
        tokens = sums.setdefault(turn.backend, [0])
        tokens.append(tokens[-1] + turn.computed)

    def until(backend: str, moment: float) -> int:
        return sums[backend][bisect_left(sent[backend], moment)]

    return [until(turn.backend, turn.ended) - until(turn.backend, turn.sent) for turn in turns]


def _slots(turns: Sequence[RecordedTurn]) -> int:
    """Turns that a replica runs at once, if turns had to wait for them; else more than there were."""
    most = max(running for _, running in _running(turns, lambda _: 1))
    waits = statistics.fmean(turn.sent - turn.arrived for turn in turns) > SLOTS_SEEN_S
    return math.ceil(most) if waits else 1024


def scripts_of(recording: Recording) -> list[Script]:
    """What the sessions did: each says and thinks what it said and thought, whenever it is answered."""
    scripts = []
    for session in recording.sessions:
        shared = recording.shared_tokens if recording.shared_tokens < session[0].prompt else 0
        steps, context, before = [], shared, 0
        for turn, following in zip(session, [*session[1:], None], strict=True):
            think_s = max(0.0, following.arrived - turn.ended) if following is not None else 0.0
            is_compacted = turn.prompt < before
            appended = turn.prompt - (shared if is_compacted else context)
            steps.append(Step(max(1, appended) if is_compacted else appended, turn.output, think_s, is_compacted))
            context, before = turn.prompt + turn.output, turn.prompt
        scripts.append(Script(((1, shared),) if shared else (), tuple(steps)))
    return scripts


@dataclass(frozen=True)
class Replayed:
    """What a policy made of the recorded sessions."""

    seconds: Sequence[float]  # of each session's turns, in all
    turns: int
    hit_rate: float

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / self.turns


class Replay:
    """Serves a recording's sessions by simulated replicas, whose costs are fitted to the recorded turns.

    The rates are those of ServiceRates, as the relay fits them; then all are scaled until the recorded placement takes
    as long in the mean as it took.
    """

    def __init__(self, recording: Recording, kv_tokens: int | None) -> None:
        self.recording, self._scripts = recording, scripts_of(recording)
        begin = recording.sessions[0][0].arrived
        self._starts = [session[0].arrived - begin for session in recording.sessions]
        numbers = {name: number for number, name in enumerate(recording.replicas)}
        self._places = [[numbers[turn.backend] for turn in session] for session in recording.sessions]
        rates, measured, predicted = ServiceRates(), dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0.0)
        turns, contexts = zip(*_running(recording.turns, lambda turn: turn.prompt), strict=True)
        work = list(zip(turns, _prefilled(turns), contexts, strict=True))
        for turn, computed, context in work:
            rates.add(computed, turn.output, context, turn.ended - turn.sent)
        for turn, computed, context in work:
            measured[turn.backend] += turn.ended - turn.sent
            predicted[turn.backend] += rates.seconds(computed, turn.output, context)
        self._speeds = [predicted[name] / measured[name] if measured[name] else 1.0 for name in recording.replicas]
        self._physics = Physics(
            rates.step_s, 0.0, rates.context_s, rates.prefill_s, 0.0, kv_tokens or UNLIMITED_TOKENS, recording.slots,
            block_tokens=recording.block_tokens,
        )  # fmt: skip
        for _ in range(SCALINGS):
            self.recorded = self.run(lambda fleet, _: Recorded(fleet, self._places))
            scale = recording.mean_s / self.recorded.mean_s
            if abs(scale - 1.0) < CLOSE:
                break
            costs = {
                name: scale * getattr(self._physics, name) for name in ("step_s", "context_token_s", "prefill_token_s")
            }
            self._physics = dataclasses.replace(self._physics, **costs)

    def run(self, policy: Callable[[Fleet, int], Policy], seed: int = 0) -> Replayed:
        fleet = Fleet(self._physics, self._scripts, self._speeds, len(self._scripts), starts=self._starts)
        fleet.run(policy(fleet, seed))
        seconds = [0.0] * len(self._scripts)
        for turn in fleet.turns:
            seconds[turn.session.id - FIRST_SESSION] += turn.finished - turn.arrived
        cached, prompts = sum(turn.cached for turn in fleet.turns), sum(turn.prompt for turn in fleet.turns)
        return Replayed(seconds, len(fleet.turns), cached / prompts)

    def error(self) -> float:
        """How far the simulated mean turn of the recorded placement is off in the worse half of the sessions, as a
        share; over all of them it is scaled to fit."""
        measured = [sum(turn.ended - turn.arrived for turn in session) for session in self.recording.sessions]
        half = len(measured) // 2
        parts = (slice(0, half), slice(half, None))
        return max(abs(sum(self.recorded.seconds[part]) / sum(measured[part]) - 1.0) for part in parts)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The ratio of two sums over the same sessions, and its interval at LEVEL: sessions are drawn with replacement."""
    source, size = random.Random(seed), len(ours)  # noqa: S311 - it draws samples, and hides nothing
    ratios = []
    for _ in range(RESAMPLES):
        drawn = source.choices(range(size), k=size)
        ratios.append(sum(ours[number] for number in drawn) / sum(theirs[number] for number in drawn))
    ratios.sort()
    cut = round((1.0 - LEVEL) / 2 * RESAMPLES)
    return sum(ours) / sum(theirs), ratios[cut], ratios[-1 - cut]


CANT_KNOW = """
What this can't know:

- The agents say and think what they said and thought: an agent that acts on the clock would have acted differently.
- Tokens that new sessions share are the median of what they found cached. Whose system prompts differ isn't recorded.
- Turns that failed or whose tokens weren't reported are left out, and so is what others sent to the same replicas.
- The capacity of the KV caches isn't recorded. {kv}
- The interval is that of other sessions of the same kind on these replicas, and of the simulation's error. It says
  nothing about another load, other agents or another number of replicas."""


def replay(
    query: Callable[..., Sequence[Sequence[Any]]], model: str | None, since: float, kv_tokens: int | None = None
) -> str:
    """Return in Markdown how much faster or slower other policies would have served a history's turns. ``query`` runs
    SQL on it. RefusedError if it can't be replayed."""
    recording = read_recording(query, model, since)
    simulated = Replay(recording, kv_tokens)
    error, recorded = simulated.error(), simulated.recorded
    known = [turn for turn in recording.turns if turn.cached is not None]
    hits = sum(turn.cached or 0 for turn in known) / sum(turn.prompt for turn in known) if known else math.nan
    lines = [
        f"# Replay of {recording.model}",
        "",
        f"{len(recording.turns):,} turns of {len(recording.sessions):,} sessions on {len(recording.replicas)} "
        f"replicas; a turn took {recording.mean_s:.2f} s in the mean. With the recorded placement, the simulation hits "
        f"{recorded.hit_rate:.0%} of the prompts' tokens in the caches (recorded: {hits:.0%}), and is off by up to "
        f"{error:.0%} in half of the sessions.",
        "",
        f"| policy | mean turn | time over the recorded one's ({LEVEL:.0%} interval) | cached |",
        "|---|---:|---:|---:|",
        f"| as recorded | {recorded.mean_s:.2f} s | 1 | {recorded.hit_rate:.0%} |",
    ]
    verdicts = []
    for name, policy in POLICIES.items():
        result = simulated.run(policy)
        ratio, low, high = ratio_interval(result.seconds, recorded.seconds)
        low, high = low - error, high + error
        interval = f"{ratio:.2f} ({max(0.0, low):.2f} to {high:.2f})"
        lines.append(f"| {name} | {result.mean_s:.2f} s | {interval} | {result.hit_rate:.0%} |")
        if high < 1.0 and name != STICKY:  # which can't be configured here
            verdicts.append((ratio, f"{name} would have been faster: {1 - ratio:.0%} ({1 - high:.0%} at least)"))
    kv = f"It was taken as {kv_tokens:,} tokens." if kv_tokens else "It was taken as unlimited; see --kv-tokens."
    verdict = min(verdicts)[1] if verdicts else "No other policy would clearly have been faster"
    return "\n".join([*lines, "", f"**{verdict}.**", CANT_KNOW.format(kv=kv), ""])
