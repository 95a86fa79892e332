"""The ranks of a job: what they tell each other, and how they save and restore together."""
