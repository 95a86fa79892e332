"""What a path is good for: ``examine(path)`` tries what saves rely on, measures, and recommends settings."""

from asyncckpt.doctor.examination import examine
from asyncckpt.doctor.findings import Finding, Report, Setting, Speeds, Status

__all__ = ["Finding", "Report", "Setting", "Speeds", "Status", "examine"]
