"""Kills and stops each process of a served deployment under load, and counts what that costs."""
