"""Sweeps over noise schedules."""
