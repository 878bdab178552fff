"""The version, alone in a file so that packaging and provenance read it without importing anything."""

__version__ = "0.1.0"
