"""What several test modules share: rank processes, states, scenarios, file systems."""
