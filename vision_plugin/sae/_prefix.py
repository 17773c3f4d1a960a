"""How this package's own training classes are called in SAELens's registry."""

PREFIX = "vision_plugin_"
"""Begins their names; what follows is SAELens's name of the architecture."""
