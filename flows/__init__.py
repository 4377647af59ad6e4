"""Prefect flows, the command line and its display, and the services that run them."""
