"""Everything at once: two thousand rows over several hosts, and what is large."""

import time
from collections import Counter, defaultdict

from tests.hostile.behaviours import SHARED, addresses, cases
from tests.hostile.running import Memory, fetched, hurried, urls_of
from tests.hostile.server import hostile_server

ROWS = 2_000
LARGEST_WORKER_MB = 400
TOTAL_S, RETRIES = 4.0, 2
# Rows that use up their deadline at each try, or unpack to all that is allowed: fewer of them, as in a real list.
SLOW = frozenset(
    {
        *("silent", "drips", "stalls", "slow-headers", "flood", "half-close", "tls-silent", "no-room"),
        *("robots-silent", "wait-absurd", "busy", "gzip-bomb", "brotli-bomb", "zstd-bomb"),
    }
)


def mixed():
    """The cases of so many rows, each case again and again; those that cost deadlines five times only."""
    light = [case for case in cases() if not case.heavy]
    chosen, number = [], 0
    while len(chosen) < ROWS:
        chosen += [(case, number) for case in light if number < 5 or case.name not in SLOW]
        number += 1
    return chosen[:ROWS]


def wrong_ends(chosen, rows):
    """Ends that were not to be, by case."""
    wrong = defaultdict(Counter)
    for (case, _), row in zip(chosen, rows, strict=True):
        if row["reason"] not in ({reason.value for reason in case.reasons} or {None}):
            wrong[case.name][f"{row['reason']} {row['value']}"] += 1
    return {name: dict(counts) for name, counts in wrong.items()}


def test_in_a_mix_of_two_thousand_rows_each_ends_as_it_does_alone(tmp_path, monkeypatch):
    chosen = mixed()
    with hostile_server(addresses(cases())) as server:
        urls = [urls_of([case], server.ports, number)[0] for case, number in chosen]
        config = hurried(
            server.ports, read_timeout_s=2.0, connect_timeout_s=2.0, total_timeout_s=TOTAL_S, retries=RETRIES
        )
        started = time.monotonic()
        with Memory() as memory:
            rows = fetched(tmp_path, urls, config, monkeypatch)
        took_s = time.monotonic() - started
        assert server.forbidden_connections() == 0
        origins = Counter(request.address for request in server.log() if request.path == "/robots.txt")
    assert wrong_ends(chosen, rows) == {}
    assert max(memory.peaks.values()) < LARGEST_WORKER_MB, memory.peaks
    assert len(memory.peaks) >= 2
    assert [origins[host] for host in SHARED[1:]] == [1] * len(SHARED[1:])
    assert origins[SHARED[0]] <= 3  # under its number and its names
    # Every slow row uses up all of its tries; they share the connections. And what the rest may take.
    slow = sum(case.name in SLOW for case, _ in chosen)
    waves = -(-slow // (2 * config.connections))
    assert took_s < waves * (RETRIES + 1) * (TOTAL_S + config.max_retry_after_s) + config.max_wait_s + 20


def test_large_pictures_and_bodies_stay_within_the_memory_of_a_worker(tmp_path, monkeypatch):
    heavy = [case for case in cases() if case.heavy]
    bodies = [case for case in heavy if case.name == "padded"]
    chosen = [(case, number) for number in range(3) for case in heavy] + [(bodies[0], 10 + n) for n in range(16)]
    with hostile_server(addresses(cases()), heavy=True) as server:
        urls = [urls_of([case], server.ports, number)[0] for case, number in chosen]
        config = hurried(server.ports, processes=1, connect_timeout_s=10.0, read_timeout_s=20.0, total_timeout_s=60.0)
        with Memory() as memory:
            rows = fetched(tmp_path, urls, config, monkeypatch)
    assert wrong_ends(chosen, rows) == {}
    assert max(memory.peaks.values()) < LARGEST_WORKER_MB, memory.peaks
