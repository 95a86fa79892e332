"""The ranks of a job: they talk through the job's store, and save and restore together."""
