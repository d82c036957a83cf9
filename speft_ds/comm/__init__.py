"""Communication between ranks: collectives, the watchdog, stop requests."""
