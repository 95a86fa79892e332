"""All suites share this: the state that is saved, the raw-device ceiling, fresh processes, figures, reports,
results."""
