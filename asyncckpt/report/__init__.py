"""The report of a run is one page: what was saved, what it cost, what is kept, and what went wrong."""
