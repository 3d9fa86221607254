"""Devices: what the processor offers and how work reaches its threads."""
