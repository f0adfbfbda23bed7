"""Experiments that anyone can repeat with the installed package."""
