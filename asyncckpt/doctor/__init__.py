"""``examine(path)`` tries on a path what saves rely on, measures its speed, and recommends settings."""

from asyncckpt.doctor.examination import examine
from asyncckpt.doctor.findings import Finding, Report, Setting, Speeds, Status

__all__ = ["Finding", "Report", "Setting", "Speeds", "Status", "examine"]
