"""Tests of ``vision_plugin.tasks``."""
