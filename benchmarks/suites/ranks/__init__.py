"""Saves, restores and planning of many ranks are measured at several world sizes."""
