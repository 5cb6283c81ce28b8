"""A run from its settings to its record, and sweeps of runs."""
