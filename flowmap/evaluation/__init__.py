"""Measure a student: metrics, held-out data, sample grids, reports."""
