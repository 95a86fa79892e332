"""Several test modules share these: rank processes, states, scenarios, file systems."""
