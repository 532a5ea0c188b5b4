"""Around every stage and before a training: lock, freshness, launchers, preflight, probe, plan."""
