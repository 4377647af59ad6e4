"""Objectives of training: what a loss is, the losses of each stage, of routers, and of every token."""
