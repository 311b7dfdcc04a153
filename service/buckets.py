"""Upper bounds of the histograms in /metrics; an objective can be judged at such a bound only."""

_MS = 1e-3
LATENCY_BUCKETS_S = tuple(
    ms * _MS for ms in (0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 250, 1000)
)
LAG_BUCKETS_S = tuple(ms * _MS for ms in (1, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 100, 250, 1000))
ROWS_BUCKETS = (1, 5, 10, 20, 50, 100, 150, 200, 300, 400, 600, 1000, 2000)
REQUESTS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PROBABILITY_BUCKETS = (
    *(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
)
_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
AGE_BUCKETS_S = (
    *(hours * _HOUR_S for hours in (1, 3, 6, 12)),
    *(days * _DAY_S for days in (1, 2, 3, 5, 7, 14, 30)),
)
