"""Whole deployments under stress: minutes each, run by hand and not by pytest."""
