"""The dual forward: dual tensors carry a tangent through an unmodified network, by a table of tangent rules."""
