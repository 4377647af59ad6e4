"""Forecasts of the trainings of a flow, before any of its steps runs."""
