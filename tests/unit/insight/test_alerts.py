"""What the tracker finds notable: context that was not cached, and sessions that someone should look at."""

from typing import Any

import pytest

from agent_infra_core.insight.alerts import LISTED_ALERTS
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import TurnFinished, TurnStarted


class Driver:
    """A tracker and the turns of its sessions, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.tracker = Tracker(lambda: self.now)
        self.turns = 0

    def turn(self, session: str = "s", backend: str | None = "a", outcome: str = "completed", **more: Any) -> None:
        """A turn of one second, a second after whatever was before."""
        self.turns += 1
        self.now += more.pop("think_s", 1.0)
        told = {name: more.pop(name) for name in ("prompt", "prints", "client") if name in more}
        model, path = more.pop("model", "m"), more.pop("path", "/v1/chat/completions")
        started = TurnStarted(str(self.turns), self.now, model, path, session, **told)
        self.now += 1.0
        self.tracker.observe(
            TurnFinished(started.turn, self.now, outcome, 200, backend, 0.0, 10.0, 1000.0, started=started, **more)
        )

    def last(self) -> TurnRecord:
        return self.tracker.take_records()[0][-1]

    def look(self, seconds: float = 5.0, capacity: int | None = None) -> list[dict[str, Any]]:
        """What the watchdog says after so many seconds."""
        self.now += seconds
        self.tracker.sample({"backends": {"a": {"load": {"kv_capacity_tokens": capacity}}}})
        rows: list[dict[str, Any]] = self.tracker.snapshot([], [], "")["watchdog"]
        return rows

    def session(self, name: str = "s") -> dict[str, Any]:
        clients = self.tracker.snapshot([], [], "")["clients"]
        return next(row for client in clients for row in client["sessions"] if row["id"] == name)


@pytest.fixture
def driver() -> Driver:
    return Driver()


# --- what should have been cached


def test_a_first_turn_has_nothing_to_expect(driver: Driver) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=100, cached_tokens=0)
    record = driver.last()
    assert (record.expected_cached_tokens, record.cache_miss) == (None, None)


def test_the_last_prompt_and_answer_are_expected_and_whole_blocks_are_no_miss(driver: Driver) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=100)
    driver.turn(prompt_tokens=1200, completion_tokens=100, cached_tokens=1088)
    record = driver.last()
    assert (record.expected_cached_tokens, record.cache_miss) == (1099, None)  # its last token was never computed


@pytest.mark.parametrize(
    ("backend", "cached", "reason"),
    [
        ("b", 16, "moved from a to b"),
        ("a", 16, "evicted from a"),
        ("a", 992, "the last answer came back changed, by your client or by the chat template"),
        ("b", 1300, None),
        ("a", None, None),
    ],
)
def test_a_miss_has_its_reason(driver: Driver, backend: str, cached: int | None, reason: str | None) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=400)
    driver.turn(backend=backend, prompt_tokens=1500, completion_tokens=100, cached_tokens=cached)
    assert driver.last().cache_miss == reason
    assert (driver.session()["cache_misses"], driver.session()["last_miss"]) == (reason is not None, reason)


def test_a_context_that_was_cut_short_is_expected_up_to_its_own_length(driver: Driver) -> None:
    driver.turn(prompt_tokens=5000, completion_tokens=100)
    driver.turn(prompt_tokens=1000, completion_tokens=100, cached_tokens=960)
    record = driver.last()
    assert (record.expected_cached_tokens, record.cache_miss) == (999, None)  # the last token always is computed


@pytest.mark.parametrize("completion", [None, 0])
def test_a_prompt_without_an_answer_is_expected_whole(driver: Driver, completion: int | None) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=completion)
    driver.turn(prompt_tokens=1200)
    assert driver.last().expected_cached_tokens == 1000


def test_an_empty_prompt_is_expected_nowhere(driver: Driver) -> None:
    for _ in range(2):
        driver.turn(prompt_tokens=0, completion_tokens=5)
    assert driver.last().expected_cached_tokens == 0


def test_a_turn_that_failed_leaves_what_is_cached_as_it_was(driver: Driver) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=400)
    driver.turn(backend="b", outcome="error")
    driver.turn(backend="a", prompt_tokens=1500, cached_tokens=10)
    assert driver.last().cache_miss == "evicted from a"


def test_changes_of_the_replica_are_counted(driver: Driver) -> None:
    for backend in ("a", "a", "b", None, "b", "a"):
        driver.turn(backend=backend)
    assert driver.session()["moves"] == 2


def test_turns_of_another_model_are_no_moves_and_miss_nothing(driver: Driver) -> None:
    for number in range(10):
        model, tokens = (("planner", 20_000), ("executor", 3000))[number % 2]
        driver.turn(model=model, backend=f"{model}-1", prompt_tokens=tokens + number, cached_tokens=0)
        assert driver.last().expected_cached_tokens is None
    assert driver.look() == []
    assert (driver.session()["moves"], driver.session()["cache_misses"]) == (0, 0)
    driver.turn(model="executor", backend="executor-2", prompt_tokens=3100, cached_tokens=0)
    assert driver.last().cache_miss == "moved from executor-1 to executor-2"
    assert driver.session()["moves"] == 1


def test_another_models_turn_that_failed_leaves_what_is_held(driver: Driver) -> None:
    driver.turn(prompt_tokens=1000, completion_tokens=100)
    driver.turn(model="other", backend="b", outcome="error")
    driver.turn(prompt_tokens=1200, cached_tokens=1088)
    assert (driver.last().expected_cached_tokens, driver.session()["moves"]) == (1099, 0)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/tokenize", "/v1/messages/count_tokens"])
def test_a_turn_that_generates_nothing_neither_expects_nor_leaves_a_context(driver: Driver, path: str) -> None:
    driver.turn(prompt_tokens=20_000, completion_tokens=100)
    for model in ("m", "other"):
        driver.turn(model=model, path=path, backend="b", prompt_tokens=7000, cached_tokens=0)
        assert driver.last().expected_cached_tokens is None
    assert driver.look(capacity=30_000)[0]["kind"] == "runaway_context"  # it still is, of its own replica's cache
    driver.turn(prompt_tokens=20_200, completion_tokens=100, cached_tokens=20_096)
    assert driver.last().expected_cached_tokens == 20_099
    assert driver.session()["last_miss"] is None
    assert (driver.session()["context_tokens"], driver.session()["moves"]) == (20_300, 0)


# --- the watchdog


def test_silence_is_unusual_when_it_is_long_for_this_session(driver: Driver) -> None:
    for _ in range(6):
        driver.turn(think_s=20.0)
    silent_since = driver.now
    assert driver.look(99) == []
    [row] = driver.look(10)
    assert (row["kind"], row["session"], row["since"]) == ("silent", "s", silent_since)
    assert "109 s" in row["sentence"]
    assert driver.session()["alerts"] == ["silent"]
    driver.turn()
    assert driver.look() == []
    assert driver.session()["alerts"] == []


def test_a_session_that_thought_long_before_may_be_silent_for_long(driver: Driver) -> None:
    for think_s in (2.0, 2.0, 100.0, 2.0, 2.0, 2.0, 2.0):
        driver.turn(think_s=think_s)
    assert driver.look(400) == []


def test_identical_turns_in_a_row_are_noticed_and_the_row_keeps_its_time(driver: Driver) -> None:
    for number in range(3):
        driver.turn(prompt="again", answer="no", prompt_tokens=100 * number, completion_tokens=50)
    assert driver.look() == []
    for number in range(3, 6):
        driver.turn(prompt="again", answer="no", prompt_tokens=100 * number, completion_tokens=50)
    [row] = driver.look()
    assert row["kind"] == "repeating"
    driver.turn(prompt="again", answer="no", prompt_tokens=600, completion_tokens=50)
    [later] = driver.look()
    assert later["since"] == row["since"]
    driver.turn(prompt="something else", answer="yes")
    assert driver.look() == []


def test_a_context_far_above_the_others_ran_away(driver: Driver) -> None:
    for number in range(8):
        driver.turn(session=f"s{number}", prompt_tokens=3000, completion_tokens=0)
    driver.turn(session="large", prompt_tokens=20_000, completion_tokens=0)
    [row] = driver.look()
    assert (row["kind"], row["session"]) == ("runaway_context", "large")


def test_a_context_of_half_a_replicas_cache_ran_away(driver: Driver) -> None:
    driver.turn(prompt_tokens=20_000, completion_tokens=0)
    assert driver.look(capacity=100_000) == []
    [row] = driver.look(capacity=39_000)
    assert row["kind"] == "runaway_context"


def test_a_session_that_changes_its_replica_again_and_again_thrashes(driver: Driver) -> None:
    for backend in "aababa":
        driver.turn(backend=backend)
    [row] = driver.look()
    assert row["kind"] == "thrashing"
    for _ in range(5):
        driver.turn(backend="a")
    assert driver.look() == []


def test_alerts_are_fifty_at_most(driver: Driver) -> None:
    for number in range(60):
        for backend in "ababab":
            driver.turn(session=f"s{number}", backend=backend)
    assert len(driver.look()) == LISTED_ALERTS == 50
