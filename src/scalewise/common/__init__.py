"""Shared by all packages: errors, files, processes, images."""
