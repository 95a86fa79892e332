"""Many ranks, one checkpoint. A package, so that its modules can be imported by rank processes (``ranks.states``)."""
