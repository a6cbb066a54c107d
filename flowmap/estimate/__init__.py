"""Estimates of a run without weights or training: the dry run, FLOPs, memory, and a check of the teacher."""
