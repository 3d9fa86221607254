"""Definitions of networks that commands run by name (needs torch)."""
