"""What `benchmark.py` measures, one file a benchmark: each has `measure(bench, options)`.

Ground floor: settings.py (what may be asked for), bench.py (the one runner: timing in turn, records), memory.py,
networks.py (networks and their forms), engines.py. A new benchmark is a file beside them and its name in settings.WHAT.
"""
