"""Environments: made from ids, functions and objects, and stepped alike."""
