"""Writing: staged extents → files: compared with what is there, encoded, placed, written or linked."""
