"""What a run will cost, found without weights and without training: the dry run, FLOPs, memory, and a check of the teacher."""
