"""How long tests wait for what should happen soon: enough for a slow machine that does other work, too."""

HANG_S = 600  # seconds; only something that hangs takes as long, and no test measures how long it took
